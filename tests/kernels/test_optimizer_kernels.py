"""Optimizer kernels against their references, bit by bit, and against lion-pytorch, dadaptation and torch over 300 steps.

Nothing here has a tolerance but d of D-Lion and the gradient norm, whose sums are taken in another order than PyTorch's:
they are held against fp64, and may be at most twice as far from it as PyTorch is.
"""

import dadaptation
import lion_pytorch
import pytest
import torch
import triton
import triton.language as tl
from budget import nan_filled_memory
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd_kernels.adamw import adamw_reference, adamw_triton
from fastsd_kernels.arena import join_master, load_parameter, scalars, split_master, store_parameter
from fastsd_kernels.dlion import dlion_estimate_reference, dlion_estimate_triton, dlion_reference, dlion_triton
from fastsd_kernels.gradient_norm import clip_scale, gradient_norm_reference, gradient_norm_triton
from fastsd_kernels.launch import launch, recording
from fastsd_kernels.lion import lion_reference, lion_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("lion", "dlion", "adamw")
LR = {"lion": 3e-4, "dlion": 1.0, "adamw": 3e-3}
PEERS = {
    "lion": lambda p, **kw: lion_pytorch.Lion([p], **kw),
    "dlion": lambda p, **kw: dadaptation.DAdaptLion([p], **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW([p], foreach=False, **kw),
}
# One element, less than a tile, a tile and a half, none, and a filter whose memory order is not its index order.
SHAPES = [(1,), (63,), (3075,), (0,), (8, 5, 3, 3)]


class Run:
    """Parameters and state of one optimizer, stepped by its reference or its kernels."""

    def __init__(self, name, params, kernels, halves=False):
        self.name, self.kernels = name, kernels
        self.params = [p.detach().clone() for p in params]
        self.options = {}
        if halves:
            pairs = [split_master(p) for p in self.params]
            self.params, self.options["lows"] = [h for h, _ in pairs], [low for _, low in pairs]
        self.states = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(1 + (name != "lion"))]
        self.steps = [torch.zeros((), device=DEVICE) for _ in params]
        self.d = torch.full((), 1e-6, dtype=torch.float64, device=DEVICE)
        self.numerator = torch.zeros((), dtype=torch.float64, device=DEVICE)

    def step(self, grads, lr, skip=None, **options):
        options = {"lr": lr, "skip": skip, **self.options, **options}
        if self.name == "lion":
            (lion_triton if self.kernels else lion_reference)(self.params, grads, *self.states, **options)
        elif self.name == "adamw":
            function = adamw_triton if self.kernels else adamw_reference
            function(self.params, grads, *self.states, self.steps, **options)
        else:
            function = dlion_triton if self.kernels else dlion_reference
            estimate = dlion_estimate_triton if self.kernels else dlion_estimate_reference
            sums = function(self.params, grads, *self.states, self.d, **options)
            estimate(self.d, self.numerator, *sums, lr=lr, skip=skip)

    def masters(self):
        return [join_master(*pair) for pair in zip(self.params, self.options["lows"], strict=True)]

    def state(self):
        return [t for column in self.states for t in column]

    def everything(self):
        columns = self.params, *self.states, self.options.get("lows", []), self.options.get("emas", []), self.steps
        return [t for column in columns for t in column] + [self.d, self.numerator]


def bits(tensors):
    return [t.detach().contiguous().flatten().view(torch.uint8).clone() for t in tensors]


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(bits(ours), bits(theirs), strict=True))


def random_tensors(seed, shapes=SHAPES, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(shape, generator=gen).to(DEVICE) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]


def schedule(name, step):
    """Warm-up, a stop in the middle, then a lower rate."""
    return 0.0 if step == 150 else LR[name] * min(1, (step + 1) / 40) * (0.3 if step > 200 else 1)


@pytest.fixture(autouse=True)
def ieee_root(monkeypatch):
    """PyTorch's root on a CPU may be a bit off IEEE's, which the kernel takes and `adamw_reference` is given here."""
    root = lambda tensors: [x.double().sqrt().float() for x in tensors]  # noqa: E731 - rounding twice is exact for roots
    monkeypatch.setattr(torch, "_foreach_sqrt", root)


@pytest.mark.parametrize("name", NAMES)
def test_300_steps_on_an_arena(name):
    # A whole tile and a part of one. D-Lion moves 8 tiles at a time, or single ones of half the width.
    shape = (1021,) if name == "dlion" else (3083,)
    (start,), (target,) = random_tensors(0, [shape], 0.1), random_tensors(1, [shape])
    ours, reference, halves = Run(name, [start], True), Run(name, [start], False), Run(name, [start[:1021]], True, True)
    theirs, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    settings = {"lr": LR[name], "weight_decay": 0.02}
    peer, truth = PEERS[name](theirs, **settings), torch.optim.AdamW([exact], foreach=False, **settings)
    d_errors = [(0.0, 0.0)]
    for step in range(300):
        (noise,) = random_tensors(1000 + step, [shape])
        g = 1e-3 * (theirs.detach() - target) + 1e-3 * noise
        theirs.grad, exact.grad = g.clone(), g.double()
        peer.param_groups[0]["lr"] = truth.param_groups[0]["lr"] = lr = schedule(name, step)
        before = [t.double() for t in ours.state()], ours.d.item(), ours.numerator.item()
        peer.step()
        for run in (ours, reference, halves):
            run.step([g[: len(run.params[0])]], lr, weight_decay=0.02)
        state = ours.state()
        assert same_bits([*ours.params, *state], [*reference.params, *reference.state()]), step
        assert same_bits([t[:1021] for t in (*ours.params, *state)], [*halves.masters(), *halves.state()]), step
        if name == "adamw":
            truth.step()
        elif DEVICE == "cpu":
            assert same_bits(ours.params, [theirs]), step
        if name == "dlion":
            d = peer.param_groups[0]["d"]
            best = exact_d(*before, g, state[1], lr)
            d_errors.append((abs(ours.d.item() / best - 1), abs(d / best - 1)))
            assert torch.equal(ours.d, halves.d) and torch.equal(ours.numerator, halves.numerator)
            # All start every step from upstream's estimate, or one flipped sign would part them for good.
            for run in (ours, reference, halves):
                run.d.fill_(d)
                run.numerator.fill_(peer.param_groups[0]["numerator_weighted"])
    moved = (theirs.detach() - start).abs().max().item()
    assert moved > 0.005
    if name == "adamw":
        off, peer_off = ((p.detach() - exact.detach()).norm().item() for p in (ours.params[0], theirs))
        print(f"adamw: 300 steps, error {off:.1e}, torch {peer_off:.1e}")
        assert off <= 2 * peer_off
    off, peer_off = (max(column) for column in zip(*d_errors, strict=True))
    print(f"{name}: 300 steps bit-equal, largest move {moved:.3f}, d of one step {off:.1e} from fp64, upstream {peer_off:.1e}")
    assert off <= max(2 * peer_off, 1e-7)
    assert name != "dlion" or d > 1e-5  # the estimate has been at work


def exact_d(state, d, numerator, g, s_new, lr):
    """What d becomes if sums are taken in fp64."""
    (m, s), sb = state, 0.99**0.5
    update = torch.sign(m.float().mul(0.9).add(g, alpha=1 - 0.9)).double()
    weighted = sb * numerator + (1 - sb) * d * lr * (update * s).sum().item()
    return max(d, weighted / ((1 - sb) * s_new.double().abs().sum().item())) if lr else d


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["g32", "g16"])
@pytest.mark.parametrize("name", NAMES)
def test_options_equal_the_reference(name, dtype, halves):
    params = random_tensors(2, scale=0.1)
    runs = Run(name, params, True, halves), Run(name, params, False, halves)
    scale, decay = torch.tensor(0.37, device=DEVICE), torch.tensor(0.9, device=DEVICE)
    for run in runs:
        run.options["emas"] = [p.clone() for p in params]
    for step in range(4):
        every = {"weight_decay": 0.1, "scale": scale if step else None, "ema_decay": decay if step % 2 else 0.99}
        all_grads = [[g.to(dtype) for g in random_tensors(10 + step)] for _ in runs]
        for run, grads in zip(runs, all_grads, strict=True):
            run.step(grads, LR[name], zero_grads=step > 1, **every)
            run.d.fill_(1e-3 * (step + 1))
            run.numerator.fill_(0.0)
        assert same_bits(runs[0].everything(), runs[1].everything()), step
        assert all((g == 0).all() == (step > 1) or not g.numel() for grads in all_grads for g in grads)
    assert not torch.equal(runs[0].options["emas"][2], params[2])


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_skip_leaves_every_byte_and_zeroes_gradients(name, kernels, halves):
    params = random_tensors(3)
    params[2][:8] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 1.0, -1.0, 3.4e38, -3.4e38])
    run = Run(name, params, kernels, halves)
    run.options["emas"] = [-p for p in params]
    for state in run.states:
        state[2][:3] = torch.tensor([-0.0, 1e-42, 2.0])
    if halves:
        run.options["lows"][2][20], run.params[2][20] = 7, torch.nan  # no master splits into this; still bytes
    before = bits(run.everything())
    for flag in (torch.tensor(True), torch.tensor(1.0), torch.tensor(2)):
        poison = torch.nan, torch.inf, -torch.inf, 0.0, 1.0
        grads = [torch.full_like(p, value) for p, value in zip(params, poison, strict=True)]
        run.step(grads, LR[name], skip=flag.to(DEVICE), weight_decay=0.1, zero_grads=True)
        assert same_bits(run.everything(), before)
        assert all((g == 0).all() for g in grads)
        run.step([torch.full_like(p, torch.nan) for p in params], LR[name], skip=flag.to(DEVICE))
        assert same_bits(run.everything(), before)


@pytest.mark.parametrize("name", NAMES)
def test_skip_false_is_no_skip_and_lr_may_be_on_the_device(name):
    params = random_tensors(4, scale=0.1)
    runs = [Run(name, params, True) for _ in range(3)]
    lr = 2.0**-10
    for step in range(3):
        grads = random_tensors(20 + step)
        runs[0].step(grads, lr, weight_decay=0.5)
        runs[1].step(grads, lr, weight_decay=0.5, skip=torch.tensor(False, device=DEVICE))
        runs[2].step(grads, torch.tensor(lr, device=DEVICE), weight_decay=0.5, skip=torch.tensor(0.0, device=DEVICE))
    assert same_bits(runs[0].everything(), runs[1].everything())
    assert same_bits(runs[0].everything(), runs[2].everything())


def test_dlion_sums_have_one_order_and_join():
    shapes = [(40_007,), (3,), (16_384,)]
    params, grads = random_tensors(5, shapes), random_tensors(6, shapes)
    states = [random_tensors(7, shapes), random_tensors(8, shapes)]
    d = torch.full((), 1e-3, dtype=torch.float64, device=DEVICE)
    results = []
    for _ in range(2):
        moving = [[t.clone() for t in column] for column in (params, grads, *states)]
        with nan_filled_memory():
            results.append(dlion_triton(*moving, d, lr=1.0))
    assert same_bits(*results)
    dots_K, l1_K = results[0]
    assert len(dots_K) == len(l1_K) == 3 + 1 + 1
    theirs = [[t.clone() for t in column] for column in (params, grads, *states)]
    peer_dots, peer_l1 = dlion_reference(*theirs, d, lr=1.0)
    exact_l1 = sum(s.double().abs().sum() for s in theirs[3])
    signs = [torch.sign(0.9 * m + 0.1 * g) for m, g in zip(states[0], grads, strict=True)]
    exact_dots = sum((u.double() * s.double()).sum() for u, s in zip(signs, states[1], strict=True))
    for found, peer, exact in ((dots_K, peer_dots, exact_dots), (l1_K, peer_l1, exact_l1)):
        ours_off, peer_off = ((x.double().sum() - exact).abs().item() / exact_l1.item() for x in (found, peer))
        print(f"sum relative to |s|_1: error {ours_off:.1e}, reference {peer_off:.1e}")
        assert ours_off <= max(2 * peer_off, 2.0**-24)
    ours, reference = [], []
    for function, out in ((dlion_estimate_triton, ours), (dlion_estimate_reference, reference)):
        for lr, kind in ((1.0, dots_K), (torch.tensor(0.5, device=DEVICE), dots_K.abs()), (0.0, dots_K.abs())):
            now, numerator = d.clone(), torch.full_like(d, 0.25)
            function(now, numerator, kind, l1_K, lr=lr, beta2=0.99)
            out += [now, numerator]
        for sums in (torch.zeros(3, device=DEVICE), torch.full((3,), torch.nan, device=DEVICE)):
            now, numerator = d.clone(), torch.full_like(d, 0.25)
            function(now, numerator, sums, torch.zeros(3, device=DEVICE), lr=1.0)
            out += [now, numerator]
    torch.testing.assert_close(torch.stack(ours), torch.stack(reference), rtol=1e-13, atol=0)
    assert (torch.stack(ours)[[0, 2]] > d).all()


HIGHS = [0, 1, 2, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7F81, 0x7FBF, 0x7FC0, 0x7FFF]


@triton.jit
def _rejoin(master_ptr, high_ptr, low_ptr, back_ptr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    master = tl.load(master_ptr + start + offs)
    store_parameter(master, high_ptr, low_ptr, None, None, start, offs, None)
    tl.store(back_ptr + start + offs, load_parameter(high_ptr, low_ptr, start, offs, None))


def test_halves_are_exact():
    gen = torch.Generator().manual_seed(0)
    highs = torch.cat((torch.tensor(HIGHS), torch.randint(0, 0x7F80, (18,), generator=gen)))
    highs = torch.cat((highs, highs | 0x8000))
    word = (highs[:, None] << 16 | torch.arange(1 << 16)).flatten()
    master = (word - (word >> 31 << 32)).int().view(torch.float32).to(DEVICE)
    high, low = split_master(master)
    back = join_master(high, low)
    nan = master.isnan()
    assert torch.equal(back.view(torch.int32)[~nan], master.view(torch.int32)[~nan])
    assert back[nan].isnan().all() and high[nan].isnan().all()
    tie = (word & 0xFFFF).to(DEVICE) == 0x8000
    nearest = master.bfloat16()
    assert torch.equal(high[~nan & ~tie].view(torch.int16), nearest[~nan & ~tie].view(torch.int16))
    assert (high[~nan & tie].float().abs() >= master[~nan & tie].abs()).all()
    kernel_high, kernel_low, kernel_back = torch.empty_like(high), torch.empty_like(low), torch.empty_like(master)
    grid = (len(highs),)
    launch(_rejoin, grid, master, kernel_high, kernel_low, kernel_back, BLOCK=1 << 16)
    assert same_bits([kernel_high, kernel_low, kernel_back], [high, low, back])
    # Any shape, any strides.
    picture = torch.randn(2, 3, 4, 5, generator=gen).contiguous(memory_format=torch.channels_last)
    assert torch.equal(join_master(*split_master(picture)), picture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_norm(dtype):
    grads = [g.to(dtype) for g in random_tensors(9, [(40_007,), (1,), (0,), (8, 5, 3, 3)])]
    grads.append(grads[0][:50:2])
    scale = torch.tensor(0.3, device=DEVICE)
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    for scaled, want in ((None, exact), (scale, exact * scale.double())):
        with nan_filled_memory():
            first, again = (gradient_norm_triton(grads, scale=scaled) for _ in range(2))
        norm, skip = first
        assert same_bits(first, again)
        assert norm.dtype == torch.float32 and norm.ndim == skip.ndim == 0 and not skip
        peer = torch.stack(torch._foreach_norm([g.float() for g in grads])).norm() * (1 if scaled is None else scaled)
        off, peer_off = ((x.double() / want - 1).abs().item() for x in (norm, peer))
        print(f"norm of {dtype}: error {off:.1e}, PyTorch {peer_off:.1e}")
        assert off <= 2 * max(peer_off, 2.0**-24)
        reference, reference_skip = gradient_norm_reference(grads, scale=scaled)
        assert (reference.double() / want - 1).abs() < 2.0**-23 and not reference_skip
    for poison in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 39_999):
            bad = grads[0].clone()
            bad[place] = poison
            for function in (gradient_norm_triton, gradient_norm_reference):
                norm, skip = function([bad, *grads[1:]])
                assert skip and not norm.isfinite()


# A norm may have no fp32, and NumPy tells.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("function", [gradient_norm_triton, gradient_norm_reference])
def test_gradient_norm_of_huge_finite_gradients(function):
    for value, count in ((3e38, 1), (1e30, 20_000), (2.0**50, 20_000), (1.1 * 2.0**50, 20_000), (3e38, 20_000)):
        norm, skip = function([torch.full((count,), value, device=DEVICE)])
        want = torch.tensor(value * count**0.5, dtype=torch.float64).float()
        assert not skip
        torch.testing.assert_close(norm.cpu(), want, rtol=2.0**-22, atol=0)
    small, skip = function([torch.full((3,), 3e38, device=DEVICE)], scale=torch.tensor(1e-38, device=DEVICE))
    assert not skip and abs(small.item() / (3 * 3**0.5) - 1) < 1e-6


def test_clip_scale():
    for norm, want in ((4.0, 0.25), (0.5, 1.0), (0.0, 1.0), (torch.inf, 0.0)):
        factor = clip_scale(torch.tensor(norm, device=DEVICE), 1.0)
        assert factor.ndim == 0 and abs(factor.item() - want) < 1e-6
    scale = torch.tensor(0.5, device=DEVICE)
    assert clip_scale(torch.tensor(0.1, device=DEVICE), 1.0, scale=scale) == 0.5


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, launches", [("lion", 1), ("dlion", 2), ("adamw", 1)])
def test_one_launch_an_arena_and_nothing_read_back(name, launches):
    params, grads = random_tensors(12, [(3083,)]), random_tensors(13, [(3083,)])
    run = Run(name, params, True, halves=True)
    run.options["emas"] = [p.clone() for p in params]
    with recording(86) as notes, NoReadBack():
        norm, skip = gradient_norm_triton(grads)
        run.step(grads, LR[name], skip=skip, scale=clip_scale(norm, 1.0), zero_grads=True)
    assert len(notes) == 2 + launches


def test_strides_of_single_elements_do_not_count():
    p, g, m = (torch.randn(8, 5, 1, 1, device=DEVICE) for _ in range(3))
    before = p.clone()
    lion_triton([p.contiguous(memory_format=torch.channels_last)], [g], [m], lr=1e-3)
    odd = torch.as_strided(p, p.shape, (5, 1, 40, 7))
    lion_triton([odd], [g], [m], lr=1e-3)
    assert not torch.equal(p, before)


def operands(halves):
    shape = (2, 40)
    p = torch.randn(shape, device=DEVICE)
    high, low = split_master(p)
    state = [torch.rand(shape, device=DEVICE) for _ in range(4)]
    gain, scale, skip = scalars(p.device, 0.01)[0], torch.ones((), device=DEVICE), torch.tensor(False, device=DEVICE)
    options = (low, state[3], gain, scale, skip) if halves else (None,) * 5
    return (high, state[0].bfloat16(), *state[1:3]) if halves else (p, *state[:3]), options


@pytest.mark.parametrize("halves", [False, True])
def test_opcheck(halves):
    (p, g, m, s), options = operands(halves)
    factors = torch.tensor([0.9, -0.1, 0.1, 0.1], device=DEVICE)
    check, ops = torch.library.opcheck, torch.ops.fastsd
    check(ops.lion.default, (p, g, m, factors, *options, 0.9, 0.99, halves))
    check(ops.dlion.default, (p, g, m, s, factors, *options, 0.9, 0.99, halves))
    check(ops.adamw.default, (p, g, m, s, factors, *options, 0.9, 0.99, 1e-8, halves))
    d, numerator, dlr = (torch.full((), 1e-6, dtype=torch.float64, device=DEVICE) for _ in range(3))
    dots_K, l1_K = torch.rand(2, 5, device=DEVICE).unbind()
    check(ops.dlion_estimate.default, (d, numerator, dots_K, l1_K, dlr, options[4], 0.99))
    check(ops.square_sums.default, (g,))
    check(ops.norm_of_sums.default, (torch.rand(5, dtype=torch.float64, device=DEVICE), options[3]))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"params": torch.zeros(4, 6, dtype=torch.float16)}, "lion: a parameter is float16; give float32"),
        ({"params": torch.zeros(4, 6, dtype=torch.bfloat16)}, "lion: a parameter is bfloat16; give float32"),
        ({"lows": torch.zeros(4, 6, dtype=torch.int16)}, "lion: a parameter is float32; give bfloat16"),
        ({"grads": torch.zeros(4, 6, dtype=torch.float64)}, "lion: a gradient is float64; give float32 or bfloat16"),
        ({"exp_avgs": torch.zeros(4, 6).bfloat16()}, "lion: a state is bfloat16; give float32"),
        ({"grads": torch.zeros(6, 4).t()}, r"strides \(1, 4\) beside a parameter of \(4, 6\) and \(6, 1\)"),
        ({"exp_avgs": torch.zeros(24)}, r"shape \(24,\)"),
        ({"emas": torch.zeros(4, 12)[:, ::2]}, r"strides \(12, 2\)"),
        ({"exp_avgs": torch.zeros(4, 6, device="meta")}, "put them on one device"),
    ],
)
def test_bad_tensors(change, words):
    good = {name: torch.zeros(4, 6, device=DEVICE) for name in ("params", "grads", "exp_avgs")}
    change = {k: v if v.is_meta else v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=words):
        lion_triton(**{name: [tensor] for name, tensor in (good | change).items()}, lr=1e-3)


def test_empty_lists_do_nothing():
    d = torch.zeros((), dtype=torch.float64, device=DEVICE)
    lion_triton([], [], [], lr=1e-3)
    adamw_triton([], [], [], [], [], lr=1e-3)
    assert [len(x) for x in dlion_triton([], [], [], [], d, lr=1.0)] == [0, 0]
    with pytest.raises(ValueError, match="no gradients"):
        gradient_norm_triton([])
