"""The optimizers' C kernels against their references bit by bit, over 120 steps and with every option; then their compilation.

Nothing here has a tolerance but D-Lion's two sums and the gradient norm, which are held against fp64.  They need a C
compiler; where there is none, all of these tests fail.
"""

import ctypes
import dataclasses
import multiprocessing

import dadaptation
import lion_pytorch
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd_kernels import CPU, REFERENCE, cpu_optimizers, fastest
from fastsd_kernels.arena import join_master, split_master

COMPILED_AT_IMPORT = cpu_optimizers._built.cache_info().misses
NAMES = ("lion", "dlion", "adamw")
LR = {"lion": 3e-4, "dlion": 1.0, "adamw": 3e-3}
PEERS = {
    "lion": lambda params: lion_pytorch.Lion(params, lr=3e-4, weight_decay=0.02),
    "dlion": lambda params: dadaptation.DAdaptLion(params, lr=1.0, weight_decay=0.02),
}
# One element, odd numbers, more than a tile (512) and a span (16384), none, a scalar, memory in another order than the index's.
SHAPES = [(1,), (63,), (16_384 + 515,), (0,), (8, 5, 3, 3), (), (31, 17), (512,), (5, 1, 3)]


@pytest.fixture(autouse=True, scope="session")
def compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cpu_optimizers._built.cache_clear()
        assert cpu_optimizers.problem() is None, "the C kernels did not compile, and nothing here can be tested"
        yield
    cpu_optimizers._built.cache_clear()


@pytest.fixture(autouse=True)
def ieee_root(monkeypatch):
    """PyTorch's root on a CPU may be a bit off IEEE's, which the kernel takes and `adamw_reference` is given here."""
    root = lambda tensors: [x.double().sqrt().float() for x in tensors]  # noqa: E731 - rounding twice is exact for roots
    monkeypatch.setattr(torch, "_foreach_sqrt", root)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache and a memory without a library; both are put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = cpu_optimizers._built
    monkeypatch.setattr(cpu_optimizers, "_built", cpu_optimizers.cache(kept.__wrapped__))
    return tmp_path / "fastsd"


class Run:
    """Parameters and state of one optimizer, stepped by one table."""

    def __init__(self, ops, name, params, halves=False, threads=1):
        self.ops, self.name, self.threads, self.options = ops, name, threads, {}
        self.params = [p.detach().clone() for p in params]
        if halves:
            pairs = [split_master(p) for p in self.params]
            self.params, self.options["lows"] = [high for high, _ in pairs], [low for _, low in pairs]
        self.states = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(1 + (name != "lion"))]
        self.steps = [torch.zeros(()) for _ in params]
        self.d = torch.full((), 1e-6, dtype=torch.float64)
        self.numerator = torch.zeros((), dtype=torch.float64)

    def step(self, grads, lr, skip=None, **options):
        options = {"lr": lr, "skip": skip, **self.options, **options}
        lists = self.params, grads, *self.states
        torch.set_num_threads(self.threads)
        try:
            if self.name == "lion":
                self.ops.lion(*lists, **options)
            elif self.name == "adamw":
                self.ops.adamw(*lists, self.steps, **options)
            else:
                sums = self.ops.dlion(*lists, self.d, **options)
                self.ops.dlion_estimate(self.d, self.numerator, *sums, lr=lr, skip=skip)
        finally:
            torch.set_num_threads(1)

    def masters(self):
        lows = self.options.get("lows")
        return self.params if lows is None else [join_master(*pair) for pair in zip(self.params, lows, strict=True)]

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
    """Of 4 dimensions channels_last, of 2 transposed."""
    gen = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(shape, generator=gen) for shape in shapes]
    tensors = [t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    return [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]


@pytest.mark.parametrize("name", NAMES)
def test_120_steps_have_the_bits_of_the_reference_and_of_the_peer(name):
    start, targets = random_tensors(0, scale=0.1), random_tensors(1)
    ours, twin, reference, halves = (
        Run(CPU, name, start),
        Run(CPU, name, start, threads=2),
        Run(REFERENCE, name, start),
        Run(CPU, name, start, halves=True),
    )
    runs = ours, twin, reference, halves
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    peer = PEERS[name](theirs) if name in PEERS else None
    keys = {"lion": ("exp_avg",), "dlion": ("exp_avg", "s")}.get(name, ())
    off, peer_off, d = 0.0, 0.0, 0.0
    for step in range(120):
        # Warm-up, a stop in the middle, then a lower rate.
        lr = 0.0 if step == 60 else LR[name] * min(1, (step + 1) / 20) * (0.3 if step > 90 else 1)
        noise = random_tensors(1000 + step)
        grads = [1e-3 * (p - t + n) for p, t, n in zip(ours.params, targets, noise, strict=True)]
        before = [t.double() for t in ours.state()], ours.d.item(), ours.numerator.item()
        for run in runs:
            run.step(grads, lr, weight_decay=0.02)
        everything = [*ours.params, *ours.state()]
        for run in runs[1:]:
            assert same_bits(everything, [*run.masters(), *run.state()]), step
        assert torch.equal(ours.d, twin.d) and torch.equal(ours.numerator, twin.numerator)
        assert torch.equal(ours.d, halves.d) and torch.equal(ours.numerator, halves.numerator)
        if peer is None:
            continue
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        peer.param_groups[0]["lr"] = lr
        peer.step()
        assert same_bits(everything, [*theirs, *(peer.state[p][k] for k in keys for p in theirs)]), step
        if name == "dlion":
            d = peer.param_groups[0]["d"]
            best = exact_d(*before, grads, ours.states[1], lr)
            off, peer_off = max(off, abs(ours.d.item() / best - 1)), max(peer_off, abs(d / best - 1))
            # All start every step from upstream's estimate, or one flipped sign would part them for good.
            for run in runs:
                run.d.fill_(d)
                run.numerator.fill_(peer.param_groups[0]["numerator_weighted"])
    moved = max((p - q).abs().max().item() for p, q in zip(ours.params, start, strict=True) if p.numel())
    print(f"{name}: 120 steps bit-equal, largest move {moved:.3f}, d of one step {off:.1e} from fp64, upstream {peer_off:.1e}")
    assert moved > 0.003 and off <= max(2 * peer_off, 1e-7)
    assert name != "dlion" or d > 1e-5  # the estimate has been at work


def exact_d(state, d, numerator, grads, s_new, lr):
    """What d becomes if sums are taken in fp64."""
    m, s, sb = state[: len(grads)], state[len(grads) :], 0.99**0.5
    signs = (torch.sign(x.float().mul(0.9).add(g, alpha=1 - 0.9)).double() for x, g in zip(m, grads, strict=True))
    dots, l1 = sum((u * x).sum() for u, x in zip(signs, s, strict=True)), sum(x.double().abs().sum() for x in s_new)
    weighted = sb * numerator + (1 - sb) * d * lr * dots.item()
    return max(d, weighted / ((1 - sb) * l1.item())) if lr else d


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["g32", "g16"])
@pytest.mark.parametrize("name", NAMES)
def test_options_equal_the_reference(name, dtype, halves):
    params = random_tensors(2, scale=0.1)
    runs = Run(CPU, name, params, halves, threads=2), Run(REFERENCE, name, params, halves)
    scale, decay = torch.tensor(0.37), torch.tensor(0.9)
    for run in runs:
        run.options["emas"] = [p.clone() for p in params]
    for step in range(6):
        every = {"weight_decay": 0.1 * (step < 5), "scale": scale if step else None, "ema_decay": decay if step % 2 else 0.99}
        all_grads = [[g.to(dtype) for g in random_tensors(10 + step)] for _ in runs]
        for run, grads in zip(runs, all_grads, strict=True):
            run.step(grads, LR[name], zero_grads=step > 1, **every)
            run.d.fill_(1e-3 * (step + 1))
            run.numerator.fill_(0.0)
        assert same_bits(runs[0].everything(), runs[1].everything()), step
        assert all((g == 0).all() == (step > 1) or not g.numel() for grads in all_grads for g in grads)
    assert not torch.equal(runs[0].options["emas"][2], params[2])


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_at_the_edges(name, halves):
    """Zeros of both signs, subnormal and huge numbers, infinities, NaN, in each operand, in the vectors and in the rest."""
    edges = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 3.3961775e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1.0])
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a NaN that rounds to -0.0 as if a number
    edges = torch.cat((edges, payload))
    p, m = torch.meshgrid(edges, edges, indexing="ij")
    columns = [t.flatten().repeat(3)[:290] for t in (p, m, m.t())]
    runs = [Run(ops, name, [columns[0]], halves) for ops in (CPU, REFERENCE)]
    for run in runs:
        run.states[0][0].copy_(columns[1])
        run.d.fill_(1e-3)
        run.options["emas"] = [columns[2].clone()]
        run.step([columns[2].clone()], 0.5, weight_decay=0.1)
    for ours, theirs in zip(*(run.everything()[:-2] for run in runs), strict=True):
        nan = theirs.isnan()
        assert torch.equal(ours.isnan(), nan) and same_bits([ours[~nan]], [theirs[~nan]])


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("name", NAMES)
def test_skip_leaves_every_byte_and_zeroes_gradients(name, halves):
    params = random_tensors(3)
    params[2][:8] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 1.0, -1.0, 3.4e38, -3.4e38])
    run = Run(CPU, name, params, halves)
    run.options["emas"] = [-p for p in params]
    for state in run.states:
        state[2][:3] = torch.tensor([-0.0, 1e-42, 2.0])
    if halves:
        run.options["lows"][2][20], run.params[2][20] = 7, torch.nan  # no master splits into this; still bytes
    before = bits(run.everything())
    for flag in (torch.tensor(True), torch.tensor(1.0), torch.tensor(2), torch.tensor(torch.nan)):
        for dtype in (torch.float32, torch.bfloat16):
            for zero in (True, False):
                grads = [torch.full_like(p, torch.nan, dtype=dtype) for p in params]
                run.step(grads, LR[name], skip=flag, weight_decay=0.1, zero_grads=zero)
                assert same_bits(run.everything(), before)
                assert all((g == 0 if zero else g.isnan()).all() for g in grads)


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_skip_false_is_no_skip_and_lr_may_be_a_tensor(name):
    params = random_tensors(4, scale=0.1)
    runs = [Run(CPU, name, params) for _ in range(3)]
    lr = 2.0**-10
    for step in range(3):
        grads = random_tensors(20 + step)
        runs[0].step(grads, lr, weight_decay=0.5)
        runs[1].step(grads, lr, weight_decay=0.5, skip=torch.tensor(False))
        with NoReadBack():
            norm, _ = CPU.gradient_norm(grads)
            runs[2].step(grads, torch.tensor(lr), weight_decay=0.5, skip=norm * 0, scale=norm / norm)
    assert same_bits(runs[0].everything(), runs[1].everything())
    assert same_bits(runs[0].everything(), runs[2].everything())


def test_sums_are_exact_and_of_any_number_of_threads():
    shapes = [(40_007,), (3,), (0,), (16_384,), (200_000,)]
    d = torch.full((), 1e-3, dtype=torch.float64)
    results = []
    for threads in (1, 2, 3):
        params, grads, m, s = (random_tensors(seed, shapes) for seed in range(5, 9))
        signs = [torch.sign(0.9 * x + 0.1 * g).double() for x, g in zip(m, grads, strict=True)]
        exact_dots = torch.stack([(u * x.double()).sum() for u, x in zip(signs, s, strict=True) if len(x)])
        torch.set_num_threads(threads)
        try:
            results.append((*CPU.dlion(params, grads, m, s, d, lr=1.0), *CPU.gradient_norm(grads)))
        finally:
            torch.set_num_threads(1)
    assert all(same_bits(results[0], other) for other in results[1:])
    dots_K, l1_K, _, _ = results[0]
    exact_l1 = torch.stack([x.double().abs().sum() for x in s if len(x)])
    assert dots_K.dtype == l1_K.dtype == torch.float64 and dots_K.shape == l1_K.shape == (4,)
    off = [((x - exact).abs() / exact_l1).max().item() for x, exact in ((dots_K, exact_dots), (l1_K, exact_l1))]
    print(f"sums of a tensor relative to |s|_1: error {off[0]:.1e} and {off[1]:.1e}")
    assert max(off) < 2.0**-24
    skipped = CPU.dlion(params, grads, m, s, d, lr=1.0, skip=torch.tensor(True))
    assert all((x == 0).all() and len(x) == 4 for x in skipped)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_norm(dtype):
    grads = [g.to(dtype) for g in random_tensors(9, [(40_007,), (1,), (0,), (8, 5, 3, 3)])]
    grads.append(grads[0][:50:2])
    grads.append(grads[0][:1].expand(7, 3))
    scale = torch.tensor(0.3)
    for scaled in (None, scale):
        exact = torch.cat([g.double().flatten() for g in grads]).norm() * (1 if scaled is None else scaled.double())
        norm, skip = CPU.gradient_norm(grads, scale=scaled)
        assert norm.dtype == torch.float32 and skip.dtype == torch.bool and norm.ndim == skip.ndim == 0
        assert not skip and (norm.double() / exact - 1).abs() < 2.0**-23
        assert same_bits([norm, skip], REFERENCE.gradient_norm(grads, scale=scaled))
    for poison in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 20_001, 40_006):
            bad = grads[0].clone()
            bad[place] = poison
            norm, skip = CPU.gradient_norm([*grads[1:], bad])
            assert skip and not norm.isfinite()
    norm, skip = CPU.gradient_norm(grads, scale=torch.tensor(torch.inf))
    assert skip and norm == torch.inf
    norm, skip = CPU.gradient_norm([torch.zeros(0)])
    assert norm == 0 and not skip


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_gradient_norm_of_huge_finite_gradients():
    for value, count in ((3e38, 1), (1e30, 20_000), (2.0**50, 20_000), (3e38, 20_000), (1e-30, 20_000), (1e-42, 7)):
        given = torch.full((count,), value)
        norm, skip = CPU.gradient_norm([given])
        want = given.double().norm().float()
        assert not skip
        torch.testing.assert_close(norm, want, rtol=2.0**-23, atol=0)
    small, skip = CPU.gradient_norm([torch.full((3,), 3e38)], scale=torch.tensor(1e-38))
    assert not skip and abs(small.item() / (3 * 3**0.5) - 1) < 1e-6


def test_many_tensors_are_one_step():
    shapes = [(1 + i * 37 % 701,) for i in range(700)]
    params, grads = random_tensors(10, shapes), random_tensors(11, shapes)
    runs = Run(CPU, "adamw", params, threads=2), Run(REFERENCE, "adamw", params)
    for i, run in enumerate(runs):
        run.steps = [torch.tensor(float(k % 5)) for k in range(len(params))]
        run.step(grads, 1e-3)
        assert [t.item() for t in run.steps[:6]] == [1, 2, 3, 4, 5, 1], i
    assert same_bits(runs[0].everything(), runs[1].everything())


def test_a_stale_graph_is_told():
    w = torch.nn.Parameter(torch.ones(4))
    loss = (w * w).sum()
    CPU.lion([w], [torch.ones(4)], [torch.zeros(4)], lr=0.1)
    assert torch.equal(w.detach(), torch.full((4,), 0.9))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_of_single_elements_do_not_count():
    p, g, m = (torch.randn(8, 5, 1, 1) for _ in range(3))
    for odd in (p.contiguous(memory_format=torch.channels_last), torch.as_strided(p, p.shape, (5, 1, 40, 7))):
        before = odd.clone()
        CPU.lion([odd], [g], [m], lr=1e-3)
        assert not torch.equal(odd, before)


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
        ({"params": torch.zeros(4, 12)[:, ::2]}, r"strides \(12, 2\)"),
        ({"emas": torch.zeros(4, 12)[:, ::2]}, r"strides \(12, 2\)"),
        ({"grads": torch.zeros(6).expand(4, 6)}, r"strides \(0, 1\)"),
        ({"exp_avgs": torch.zeros(4, 6, device="meta")}, "lion: tensors are on meta, .* all of them on the CPU"),
        ({"skip": torch.zeros((), device="meta")}, "on meta"),
    ],
)
def test_bad_tensors(change, words):
    good = {name: torch.zeros(4, 6) for name in ("params", "grads", "exp_avgs")}
    given = {name: tensor if name == "skip" else [tensor] for name, tensor in (good | change).items()}
    with pytest.raises(ValueError, match=words):
        CPU.lion(**given, lr=1e-3)
    assert all((t == 0).all() for t in good.values())


def test_empty_and_uneven_lists():
    d = torch.zeros((), dtype=torch.float64)
    CPU.lion([], [], [], lr=1e-3)
    CPU.adamw([], [], [], [], [], lr=1e-3)
    assert [len(x) for x in CPU.dlion([], [], [], [], d, lr=1.0)] == [0, 0]
    with pytest.raises(ValueError, match="no gradients"):
        CPU.gradient_norm([])
    p, step = torch.zeros(3), torch.zeros(())
    with pytest.raises(ValueError):
        CPU.lion([p], [p, p], [p], lr=1e-3)
    with pytest.raises(ValueError, match="2 counts of steps for 1 parameters"):
        CPU.adamw([p], [p], [p], [p], [step, step], lr=1e-3)
    assert step == 0


def test_the_table():
    ours = {f.name for f in dataclasses.fields(CPU) if getattr(CPU, f.name) is not getattr(REFERENCE, f.name)}
    assert ours == {"name", "lion", "dlion", "adamw", "gradient_norm"} and CPU.name == "cpu"
    assert fastest(torch.device("cpu")) is CPU
    assert fastest(torch.device("meta")) is REFERENCE
    assert not COMPILED_AT_IMPORT
    assert ctypes.sizeof(cpu_optimizers._Options) == 32


def test_no_compiler(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cpu_optimizers.problem() == "no C compiler: neither $CC nor cc, gcc or clang is found"
    assert fastest(torch.device("cpu")) is REFERENCE
    p, steps = torch.ones(3), [torch.zeros(())]
    for call in (
        lambda: CPU.lion([p], [p], [p], lr=1e-3),
        lambda: CPU.adamw([p], [p], [p], [p], steps, lr=1e-3),
        lambda: CPU.gradient_norm([p]),
    ):
        with pytest.raises(ValueError, match="cannot be used: no C compiler.*; use REFERENCE"):
            call()
    assert steps[0] == 0 and (p == 1).all()


@pytest.mark.parametrize("script", ["echo 'x.c:1:2: error: so bad' >&2; exit 1", "exit 3", "exit 0"])
def test_a_compiler_that_fails(script, fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    why = cpu_optimizers.problem()
    assert why.startswith("optimizers.c does not compile or load: ") and "\n" not in why
    assert "error: so bad" in why or "ends with 3" in why or "No such file" in why or "cannot open" in why
    assert fastest(torch.device("cpu")) is REFERENCE
    assert not list(fresh.glob("*.so"))
    monkeypatch.setenv("CC", "gcc 'oh")
    cpu_optimizers._built.cache_clear()
    assert cpu_optimizers.problem().startswith("$CC cannot be read")


def test_a_cache_that_cannot_be_written(fresh):
    fresh.write_text("a file where the folder should be")
    assert "does not compile or load" in cpu_optimizers.problem() and str(fresh) in cpu_optimizers.problem()


def test_a_damaged_library_is_made_anew(fresh, monkeypatch):
    assert cpu_optimizers.problem() is None
    (path,) = fresh.iterdir()
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    cpu_optimizers._built.cache_clear()
    assert cpu_optimizers.problem() is None and path.stat().st_mtime_ns == made  # found, not compiled
    for broken in (whole[: len(whole) // 2], b"", whole[:-1] + b"?"):
        path.unlink()  # it is loaded: other bytes in its place, not under its feet
        path.write_bytes(broken)
        cpu_optimizers._built.cache_clear()
        assert cpu_optimizers.problem() is None
        assert [p.read_bytes() for p in fresh.iterdir()] == [whole]
    monkeypatch.setattr(cpu_optimizers, "_FLAGS", [*cpu_optimizers._FLAGS, "-DOTHER"])
    cpu_optimizers._built.cache_clear()
    assert cpu_optimizers.problem() is None and len(list(fresh.iterdir())) == 2


def test_processes_may_compile_side_by_side(fresh):
    fork = multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        assert pool.map(_problem, range(3), chunksize=1) == [None] * 3
    assert all(path.suffix == ".so" for path in fresh.iterdir())


def _problem(_):
    return cpu_optimizers.problem()


@pytest.mark.parametrize("machine", [["-march=native"], []], ids=["no OpenMP", "no vectors, no fma"])
def test_other_machines_have_the_same_bits(machine, fresh, monkeypatch):
    params, grads, m, s = (random_tensors(seed, [(20_011,), (77,)]) for seed in range(4))
    d = torch.full((), 1e-3, dtype=torch.float64)
    monkeypatch.setattr(
        cpu_optimizers,
        "_FLAGS",
        [flag.replace("-O3", "-O1") for flag in cpu_optimizers._FLAGS] if not machine else cpu_optimizers._FLAGS,
    )
    results = []
    for machines in (cpu_optimizers._MACHINES, [machine]):
        monkeypatch.setattr(cpu_optimizers, "_MACHINES", machines)
        cpu_optimizers._built.cache_clear()
        assert cpu_optimizers.problem() is None
        lists = [[t.clone() for t in column] for column in (params, grads, m, s)]
        sums = CPU.dlion(*lists, d, lr=1.0, weight_decay=0.1)
        CPU.adamw(*lists[:3], [x.abs() for x in lists[3]], [torch.zeros(()) for _ in params], lr=0.1)
        CPU.lion(*lists[:3], lr=0.1)
        results.append([*sums, *CPU.gradient_norm(grads), *(t for column in lists for t in column)])
    assert same_bits(*results)
