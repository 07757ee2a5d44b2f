"""Optimizer runs with any table of ops, inputs for them, and bitwise comparisons."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd_kernels.arena import join_master, split_master

NAMES = ("lion", "dlion", "adamw")
LR = {"lion": 3e-4, "dlion": 1.0, "adamw": 3e-3}
ZEROS = torch.zeros(4, 6)
BAD_DTYPES = [
    ({"params": ZEROS.half()}, {"role": "parameter", "dtype": "float16", "expected": "float32"}),
    ({"params": ZEROS.bfloat16()}, {"role": "parameter", "dtype": "bfloat16", "expected": "float32"}),
    ({"masters_lo": ZEROS.short()}, {"role": "parameter", "dtype": "float32", "expected": "bfloat16"}),
    ({"grads": ZEROS.double()}, {"role": "gradient", "dtype": "float64", "expected": "float32 or bfloat16"}),
    ({"exp_avgs": ZEROS.bfloat16()}, {"role": "state", "dtype": "bfloat16", "expected": "float32"}),
]
BAD_LAYOUTS = [
    ({"grads": torch.zeros(6, 4).t()}, {"strides": (1, 4), "parameter_shape": (4, 6), "parameter_strides": (6, 1)}),
    ({"exp_avgs": torch.zeros(24)}, {"shape": (24,)}),
    ({"emas": torch.zeros(1, 4, 12)[..., ::2]}, {"strides": (12, 2)}),
]
# Invalid operands of Lion whose other operands have shape (4, 6), with the name and the fields of the message.
BAD_OPERANDS = [
    *((operand, "operand-dtype", fields) for operand, fields in BAD_DTYPES),
    *((operand, "operand-layout", fields) for operand, fields in BAD_LAYOUTS),
]


class OptimizerRun:
    """The parameters and the state of one optimizer, and the table of ops that steps them."""

    def __init__(self, ops, name, params, halves=False, threads=1):
        self.ops, self.name, self.threads = ops, name, threads
        self.options = {}
        self.params = [p.detach().clone() for p in params]
        if halves:
            pairs = [split_master(p) for p in self.params]
            self.params = [hi for hi, _ in pairs]
            self.options["masters_lo"] = [lo for _, lo in pairs]
        self.states = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(1 + (name != "lion"))]
        self.steps = [torch.zeros((), device=p.device) for p in params]
        self.d = torch.full((), 1e-6, dtype=torch.float64, device=params[0].device)
        self.numerator = torch.zeros_like(self.d)
        self.overflow = torch.zeros_like(self.d, dtype=torch.bool)

    def step(self, grads, lr, found_inf=None, **options):
        options = {"lr": lr, "found_inf": found_inf, "overflow": self.overflow, **self.options, **options}
        lists = self.params, grads, *self.states
        torch.set_num_threads(self.threads)
        try:
            if self.name == "lion":
                self.ops.lion(*lists, **options)
            elif self.name == "adamw":
                self.ops.adamw(*lists, self.steps, **options)
            else:
                sums = self.ops.dlion(*lists, self.d, **options)
                self.ops.dlion_estimate(self.d, self.numerator, *sums, lr=lr, found_inf=found_inf)
        finally:
            torch.set_num_threads(1)

    def masters(self):
        masters_lo = self.options.get("masters_lo")
        return self.params if masters_lo is None else [join_master(*pair) for pair in zip(self.params, masters_lo, strict=True)]

    def state(self):
        return [t for column in self.states for t in column]

    def everything(self):
        columns = self.params, *self.states, self.options.get("masters_lo", []), self.options.get("emas", []), self.steps
        return [t for column in columns for t in column] + [self.d, self.numerator]


def random_tensors(seed, shapes, scale=1.0, device="cpu"):
    """Return normal numbers. 4-D tensors are channels_last, and 2-D tensors are transposed."""
    gen = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(shape, generator=gen).to(device) for shape in shapes]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    return [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]


def averages(params, count=1):
    """Return `count` averages of each parameter, in its layout, that start from its value."""
    flat = [
        torch.empty(count * p.numel(), device=p.device).as_strided((count, *p.shape), (p.numel(), *p.stride())) for p in params
    ]
    return [average.copy_(p) for average, p in zip(flat, params, strict=True)]


def bits(tensors):
    """Return copies of the tensors' bytes."""
    return [t.detach().contiguous().flatten().view(torch.uint8).clone() for t in tensors]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(bits(first), bits(second), strict=True))


def exact_d(state, d, numerator, grads, s_new, lr):
    """Return D-Lion's next d, computed with sums in fp64."""
    m, s, sb = state[: len(grads)], state[len(grads) :], 0.99**0.5
    signs = (torch.sign(x.float().mul(0.9).add(g, alpha=1 - 0.9)).double() for x, g in zip(m, grads, strict=True))
    dots = sum((u * x).sum() for u, x in zip(signs, s, strict=True))
    l1 = sum(x.double().abs().sum() for x in s_new)
    weighted = sb * numerator + (1 - sb) * d * lr * dots.item()
    return max(d, weighted / ((1 - sb) * l1.item())) if lr else d


def check_options(runs, dtype, steps):
    """Step two runs of equal parameters with every option, and assert that all their bits are equal after each step."""
    params = runs[0].masters()
    shapes, device = [p.shape for p in params], params[0].device
    scale, decay = torch.tensor(0.37, device=device), torch.tensor(0.9, device=device)
    for run in runs:
        run.options["emas"] = averages(params)
    unchanged = params[2].clone()

    for step in range(steps):
        options = {"weight_decay": 0.1 * (step < 5), "scale": scale if step else None, "ema_decay": decay if step % 2 else 0.99}
        all_grads = [[g.to(dtype) for g in random_tensors(10 + step, shapes, device=device)] for _ in runs]
        for run, grads in zip(runs, all_grads, strict=True):
            run.step(grads, LR[run.name], **options)
            run.d.fill_(1e-3 * (step + 1))
            run.numerator.fill_(0.0)
        assert same_bits(runs[0].everything(), runs[1].everything()), step
    assert not torch.equal(runs[0].options["emas"][2][0], unchanged)


def check_averages(ops, name, params, halves):
    """Assert that each of several averages has the bits of a single one with its decay, which is close to the formula's."""
    device = params[0].device
    decays = torch.tensor([0.9, 0.99, 0.0, 0.5], dtype=torch.float64, device=device)
    several, *alone = runs = [OptimizerRun(ops, name, params, halves) for _ in range(1 + len(decays))]
    for run in runs:
        run.options["emas"] = averages(params, len(decays) if run is several else 1)
    expected = [average.double() for average in several.options["emas"]]
    for step in range(3):
        grads = random_tensors(50 + step, [p.shape for p in params], device=device)
        several.step(grads, LR[name], ema_decay=decays)
        for run, decay in zip(alone, decays.tolist(), strict=True):
            run.step(grads, LR[name], ema_decay=decay)
        for average, p in zip(expected, several.masters(), strict=True):
            gains = (1 - decays).reshape(-1, *[1] * p.ndim)
            average += gains * (p.double() - average)
    for k, run in enumerate(alone):
        assert same_bits([average[k] for average in several.options["emas"]], [average[0] for average in run.options["emas"]])
    for average, exact in zip(several.options["emas"], expected, strict=True):
        torch.testing.assert_close(average.double(), exact, rtol=0, atol=1e-6)


def fill_for_found_inf(run, params):
    """Set EMAs, and values that a careless step would change: -0.0, subnormals, and halves that no master is split into."""
    run.options |= {"emas": averages([-p for p in params], 2), "ema_decay": torch.tensor([0.9, 0.5], device=params[0].device)}
    for state in run.states:
        state[2][:3] = torch.tensor([-0.0, 1e-42, 2.0])
    if "masters_lo" in run.options:
        run.options["masters_lo"][2][20] = 7
        run.params[2][20] = torch.nan


def check_found_inf_false(runs):
    """Assert that three runs stay equal: without the flag, with a false one, and with flag, scale and lr on the device."""
    lr, shapes, device = 2.0**-10, [p.shape for p in runs[0].params], runs[0].d.device
    for step in range(3):
        grads = random_tensors(20 + step, shapes, device=device)
        runs[0].step(grads, lr, weight_decay=0.5)
        runs[1].step(grads, lr, weight_decay=0.5, found_inf=torch.tensor(False, device=device))
        with NoReadBack():
            norm, _ = runs[2].ops.gradient_norm(grads)
            runs[2].step(grads, torch.tensor(lr, device=device), weight_decay=0.5, found_inf=norm * 0, scale=norm / norm)
    assert all(same_bits(runs[0].everything(), run.everything()) for run in runs[1:])


# Settings with which finite gradients give an infinite update: lr, size of the gradients, and the first d.
ABSURD = {
    "lion": [(1e38, 1.0, 0.0), (3e38, 1e20, 0.0)],
    "dlion": [(1.0, 1.0, 1e38), (1.0, 1.0, 1e300), (1.0, 1e20, 1e20), (1e38, 1.0, 1e-6)],
    "adamw": [(1e38, 1.0, 0.0), (1e36, 1.0, 0.0), (1e-3, 1e20, 0.0), (1e-3, 1e25, 0.0), (1e-3, 3e38, 0.0)],
}


def check_stays_finite(runs, lr, size, d):
    """Assert that finite gradients leave finite numbers only, with equal bits in all runs, and that `overflow` is set."""
    params = [p.clone() for p in runs[0].masters()]
    shapes, device = [p.shape for p in params], params[0].device
    for run in runs:
        run.options["emas"] = averages(params)
        run.d.fill_(d)
    overflows = []
    for step in range(8):
        grads = [torch.sign(g) * size for g in random_tensors(30 + step, shapes, device=device)]
        for run in runs:
            run.overflow.zero_()
            run.step(grads, lr, weight_decay=0.1, ema_decay=0.5)
            assert all(t.isfinite().all() for t in run.everything()), step
            run.d.copy_(runs[0].d)
            run.numerator.copy_(runs[0].numerator)
        assert all(same_bits(runs[0].everything(), run.everything()) for run in runs), step
        assert all(torch.equal(run.overflow, runs[0].overflow) for run in runs), step
        overflows.append(bool(runs[0].overflow))
    print(f"{runs[0].name}, lr {lr:g}, gradients {size:g}, d {d:g}: overflow in steps {overflows}")
    assert any(overflows) or size == 1e20  # whose square times 1 - beta2 is below the bound


def check_huge_gradients(gradient_norm, device="cpu"):
    """Assert that the norm of finite gradients is finite, even if their squares overflow fp32."""
    for value, count in ((3e38, 1), (1e30, 20_000), (2.0**50, 20_000), (1.1 * 2.0**50, 20_000), (3e38, 20_000)):
        norm, found_inf = gradient_norm([torch.full((count,), value, device=device)])
        assert not found_inf
        expected = torch.tensor(value * count**0.5, dtype=torch.float64).float()
        torch.testing.assert_close(norm.cpu(), expected, rtol=2.0**-22, atol=0)


class NoReadBack(TorchDispatchMode):
    """Forbids operations that wait for a value from the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))
