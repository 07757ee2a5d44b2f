"""The optimizers' C kernels: equal bits with their references over 120 steps and with every option, and their compilation.

Only D-Lion's two sums and the gradient norm have a tolerance; they are compared with fp64.  All tests fail without a C
compiler.
"""

import ctypes
import dataclasses
import multiprocessing

import dadaptation
import lion_pytorch
import pytest
import torch
from optimizer_runs import (
    ABSURD,
    BAD_OPERANDS,
    LR,
    NAMES,
    OptimizerRun,
    bits,
    check_averages,
    check_found_inf_false,
    check_huge_gradients,
    check_options,
    check_stays_finite,
    exact_d,
    fill_for_found_inf,
    random_tensors,
    same_bits,
)
from sentences import refused, says

from fastsd_kernels import CPU, REFERENCE, cpu_optimizers, fastest

COMPILED_AT_IMPORT = cpu_optimizers._library_or_reason.cache_info().misses
PEERS = {
    "lion": lambda params: lion_pytorch.Lion(params, lr=3e-4, weight_decay=0.02),
    "dlion": lambda params: dadaptation.DAdaptLion(params, lr=1.0, weight_decay=0.02),
}
# One element, odd sizes, more than a tile (512) and a span (16384), no elements, a scalar, and several memory orders.
SHAPES = [(1,), (63,), (16_384 + 515,), (0,), (8, 5, 3, 3), (), (31, 17), (512,), (5, 1, 3)]
pytestmark = pytest.mark.usefixtures("ieee_root")


@pytest.fixture(autouse=True, scope="session")
def compiled(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cpu_optimizers._library_or_reason.cache_clear()
        assert cpu_optimizers.problem() is None, "the C kernels do not compile"
        yield
    cpu_optimizers._library_or_reason.cache_clear()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Return an empty cache folder. No library is loaded from it yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uncached = cpu_optimizers._library_or_reason.__wrapped__
    monkeypatch.setattr(cpu_optimizers, "_library_or_reason", cpu_optimizers.cache(uncached))
    return tmp_path / "fastsd"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_120_steps_have_the_bits_of_the_reference_and_of_the_peer(name):
    start = random_tensors(0, SHAPES, scale=0.1)
    targets = random_tensors(1, SHAPES)
    ours, reference = (OptimizerRun(ops, name, start) for ops in (CPU, REFERENCE))
    threaded = OptimizerRun(CPU, name, start, threads=2)
    halves = OptimizerRun(CPU, name, start, halves=True)
    runs = ours, threaded, reference, halves
    peer_params = [torch.nn.Parameter(p.clone()) for p in start]
    peer = PEERS[name](peer_params) if name in PEERS else None
    keys = {"lion": ("exp_avg",), "dlion": ("exp_avg", "s")}.get(name, ())
    error, peer_error, d = 0.0, 0.0, 0.0

    for step in range(120):
        # Warm-up, a stop in the middle, then a lower rate.
        lr = 0.0 if step == 60 else LR[name] * min(1, (step + 1) / 20) * (0.3 if step > 90 else 1)
        noise = random_tensors(1000 + step, SHAPES)
        grads = [1e-3 * (p - t + n) for p, t, n in zip(ours.params, targets, noise, strict=True)]
        before = [t.double() for t in ours.state()], ours.d.item(), ours.numerator.item()
        for run in runs:
            run.step(grads, lr, weight_decay=0.02)
        everything = [*ours.params, *ours.state()]
        for run in runs[1:]:
            assert same_bits(everything, [*run.masters(), *run.state()]), step
        for run in (threaded, halves):
            assert torch.equal(ours.d, run.d) and torch.equal(ours.numerator, run.numerator)

        if peer is None:
            continue
        for p, g in zip(peer_params, grads, strict=True):
            p.grad = g
        peer.param_groups[0]["lr"] = lr
        peer.step()
        assert same_bits(everything, [*peer_params, *(peer.state[p][k] for k in keys for p in peer_params)]), step
        if name == "dlion":
            d = peer.param_groups[0]["d"]
            exact = exact_d(*before, grads, ours.states[1], lr)
            error = max(error, abs(ours.d.item() / exact - 1))
            peer_error = max(peer_error, abs(d / exact - 1))
            # All runs start every step from upstream's estimate. After one flipped sign they would never be equal again.
            for run in runs:
                run.d.fill_(d)
                run.numerator.fill_(peer.param_groups[0]["numerator_weighted"])

    change = max((p - q).abs().max().item() for p, q in zip(ours.params, start, strict=True) if p.numel())
    print(f"{name}: 120 steps bit-equal, largest change {change:.3f}, error of d {error:.1e}, upstream {peer_error:.1e}")
    assert change > 0.003 and error <= max(2 * peer_error, 1e-7)
    assert name != "dlion" or d > 1e-5  # the estimate has grown


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["g32", "g16"])
@pytest.mark.parametrize("name", NAMES)
def test_options_equal_the_reference(name, dtype, halves):
    params = random_tensors(2, SHAPES, scale=0.1)
    runs = OptimizerRun(CPU, name, params, halves, threads=2), OptimizerRun(REFERENCE, name, params, halves)
    check_options(runs, dtype, steps=6)


@pytest.mark.parametrize("ops", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("name, halves", [("lion", True), ("dlion", False), ("adamw", True)])
def test_several_averages_have_the_bits_of_single_ones(name, halves, ops):
    check_averages(ops, name, random_tensors(2, SHAPES, scale=0.1), halves)


def test_averages_need_one_decay_each():
    p, emas = torch.zeros(4), torch.zeros(2, 4)
    for ops, decay, count in ((CPU, 0.9, 1), (REFERENCE, torch.zeros(3), 3)):
        with refused("average-decays", ValueError, count=count, averages=2):
            ops.lion([p], [p.clone()], [p.clone()], lr=1e-3, emas=[emas], ema_decay=decay)


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("name", NAMES)
def test_edge_values_equal_the_reference(name, halves):
    """Each operand has zeros of both signs, subnormal and huge numbers, infinities and NaN, in full tiles and in the last."""
    edges = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 3.3961775e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1.0])
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # a NaN; as a number it would round to -0.0
    edges = torch.cat((edges, payload))
    p, m = torch.meshgrid(edges, edges, indexing="ij")
    columns = [t.flatten().repeat(3)[:290] for t in (p, m, m.t())]
    runs = [OptimizerRun(ops, name, [columns[0]], halves) for ops in (CPU, REFERENCE)]
    for run in runs:
        run.states[0][0].copy_(columns[1])
        run.d.fill_(1e-3)
        run.options["emas"] = [columns[2].clone()[None]]
        run.step([columns[2].clone()], 0.5, weight_decay=0.1)
    for ours, reference in zip(*(run.everything()[:-2] for run in runs), strict=True):
        nan = reference.isnan()
        assert torch.equal(ours.isnan(), nan) and same_bits([ours[~nan]], [reference[~nan]])


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("name, lr, size, d", [(name, *case) for name in NAMES for case in ABSURD[name]])
def test_absurd_updates_leave_finite_numbers(name, lr, size, d, halves):
    params = random_tensors(14, SHAPES, scale=0.1)
    check_stays_finite([OptimizerRun(ops, name, params, halves, threads=2) for ops in (CPU, REFERENCE)], lr, size, d)


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("name", NAMES)
def test_found_inf_keeps_every_byte(name, halves):
    params = random_tensors(3, SHAPES)
    params[2][:8] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 1.0, -1.0, 3.4e38, -3.4e38])
    run = OptimizerRun(CPU, name, params, halves)
    fill_for_found_inf(run, params)
    before = bits(run.everything())
    for flag in (torch.tensor(True), torch.tensor(1.0), torch.tensor(2), torch.tensor(torch.nan)):
        for dtype in (torch.float32, torch.bfloat16):
            grads = [torch.full_like(p, torch.nan, dtype=dtype) for p in params]
            run.step(grads, LR[name], found_inf=flag, weight_decay=0.1)
            assert same_bits(run.everything(), before)
            assert all(g.isnan().all() for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_found_inf_false_changes_nothing_and_lr_may_be_a_tensor(name):
    params = random_tensors(4, SHAPES, scale=0.1)
    check_found_inf_false([OptimizerRun(CPU, name, params) for _ in range(3)])


def test_sums_are_exact_for_any_number_of_threads():
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
    errors = [((x - exact).abs() / exact_l1).max().item() for x, exact in ((dots_K, exact_dots), (l1_K, exact_l1))]
    print(f"sums of a tensor relative to |s|_1: error {errors[0]:.1e} and {errors[1]:.1e}")
    assert max(errors) < 2.0**-24
    sums = CPU.dlion(params, grads, m, s, d, lr=1.0, found_inf=torch.tensor(True))
    assert all((x == 0).all() and len(x) == 4 for x in sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_norm(dtype):
    grads = [g.to(dtype) for g in random_tensors(9, [(40_007,), (1,), (0,), (8, 5, 3, 3)])]
    grads.append(grads[0][:50:2])
    grads.append(grads[0][:1].expand(7, 3))
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    norm, found_inf = CPU.gradient_norm(grads)
    assert norm.dtype == torch.float32 and found_inf.dtype == torch.bool and norm.ndim == found_inf.ndim == 0
    assert not found_inf and (norm.double() / exact - 1).abs() < 2.0**-23
    assert same_bits([norm, found_inf], REFERENCE.gradient_norm(grads))
    for poison in (torch.nan, torch.inf, -torch.inf):
        for index in (0, 20_001, 40_006):
            poisoned = grads[0].clone()
            poisoned[index] = poison
            norm, found_inf = CPU.gradient_norm([*grads[1:], poisoned])
            assert found_inf and not norm.isfinite()
    norm, found_inf = CPU.gradient_norm([torch.zeros(0)])
    assert norm == 0 and not found_inf


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_gradient_norm_of_huge_finite_gradients():
    check_huge_gradients(CPU.gradient_norm)
    for value, count in ((3e38, 1), (1e30, 20_000), (2.0**50, 20_000), (3e38, 20_000), (1e-30, 20_000), (1e-42, 7)):
        gradient = torch.full((count,), value)
        norm, found_inf = CPU.gradient_norm([gradient])
        assert not found_inf
        torch.testing.assert_close(norm, gradient.double().norm().float(), rtol=2.0**-23, atol=0)


def test_many_tensors_are_one_step():
    shapes = [(1 + i * 37 % 701,) for i in range(700)]
    params, grads = random_tensors(10, shapes), random_tensors(11, shapes)
    runs = OptimizerRun(CPU, "adamw", params, threads=2), OptimizerRun(REFERENCE, "adamw", params)
    for i, run in enumerate(runs):
        run.steps = [torch.tensor(float(k % 5)) for k in range(len(params))]
        run.step(grads, 1e-3)
        assert [t.item() for t in run.steps[:6]] == [1, 2, 3, 4, 5, 1], i
    assert same_bits(runs[0].everything(), runs[1].everything())


def test_backward_through_updated_weights_raises():
    w = torch.nn.Parameter(torch.ones(4))
    loss = (w * w).sum()
    CPU.lion([w], [torch.ones(4)], [torch.zeros(4)], lr=0.1)
    assert torch.equal(w.detach(), torch.full((4,), 0.9))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strides_of_single_elements_are_ignored():
    p, g, m = (torch.randn(8, 5, 1, 1) for _ in range(3))
    for odd in (p.contiguous(memory_format=torch.channels_last), torch.as_strided(p, p.shape, (5, 1, 40, 7))):
        before = odd.clone()
        CPU.lion([odd], [g], [m], lr=1e-3)
        assert not torch.equal(odd, before)


@pytest.mark.parametrize(
    "change, name, fields",
    [
        *BAD_OPERANDS,
        ({"params": torch.zeros(4, 12)[:, ::2]}, "operand-layout", {"strides": (12, 2)}),
        ({"grads": torch.zeros(6).expand(4, 6)}, "operand-layout", {"strides": (0, 1)}),
        ({"exp_avgs": torch.zeros(4, 6, device="meta")}, "operand-not-cpu", {"op": "lion", "devices": "meta"}),
        ({"found_inf": torch.zeros((), device="meta")}, "operand-not-cpu", {"devices": "meta"}),
    ],
)
def test_unusable_operands_are_refused(change, name, fields):
    valid = {key: torch.zeros(4, 6) for key in ("params", "grads", "exp_avgs")}
    operands = {key: tensor if key == "found_inf" else [tensor] for key, tensor in (valid | change).items()}
    with refused(name, ValueError, **{"op": "lion"} | fields):
        CPU.lion(**operands, lr=1e-3)
    assert all((t == 0).all() for t in valid.values())


def test_empty_lists_do_nothing_and_uneven_lists_are_refused():
    d = torch.zeros((), dtype=torch.float64)
    CPU.lion([], [], [], lr=1e-3)
    CPU.adamw([], [], [], [], [], lr=1e-3)
    assert [len(x) for x in CPU.dlion([], [], [], [], d, lr=1.0)] == [0, 0]
    with refused("no-gradients", ValueError):
        CPU.gradient_norm([])
    p, step = torch.zeros(3), torch.zeros(())
    with pytest.raises(ValueError):
        CPU.lion([p], [p, p], [p], lr=1e-3)
    with refused("adamw-step-counts", ValueError, parameters=1, steps=2):
        CPU.adamw([p], [p], [p], [p], [step, step], lr=1e-3)
    assert step == 0


def test_table_replaces_four_ops():
    replaced = {f.name for f in dataclasses.fields(CPU) if getattr(CPU, f.name) is not getattr(REFERENCE, f.name)}
    assert replaced == {"name", "lion", "dlion", "adamw", "gradient_norm"} and CPU.name == "cpu"
    assert fastest(torch.device("cpu")) is CPU
    assert fastest(torch.device("meta")) is REFERENCE
    assert not COMPILED_AT_IMPORT
    assert ctypes.sizeof(cpu_optimizers._Options) == 40


def test_reference_is_used_without_a_compiler(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert says(cpu_optimizers.problem(), "no-c-compiler")
    assert fastest(torch.device("cpu")) is REFERENCE
    p, steps = torch.ones(3), [torch.zeros(())]
    for call in (
        lambda: CPU.lion([p], [p], [p], lr=1e-3),
        lambda: CPU.adamw([p], [p], [p], [p], steps, lr=1e-3),
        lambda: CPU.gradient_norm([p]),
    ):
        with refused("cpu-kernels-missing", ValueError, reason=cpu_optimizers.problem()):
            call()
    assert steps[0] == 0 and (p == 1).all()


@pytest.mark.parametrize("script", ["echo 'x.c:1:2: error: so bad' >&2; exit 1", "exit 3", "exit 0"])
def test_compiler_errors_are_reported_in_one_line(script, fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    reason = cpu_optimizers.problem()
    assert says(reason, "compile-failed", source="optimizers.c") and "\n" not in reason
    expected = {"1": "error: so bad", "3": "status 3", "0": "optimizers.so"}[script[-1]]
    assert expected in reason
    assert fastest(torch.device("cpu")) is REFERENCE
    assert not list(fresh.glob("*.so"))
    monkeypatch.setenv("CC", "gcc 'oh")
    cpu_optimizers._library_or_reason.cache_clear()
    assert says(cpu_optimizers.problem(), "cc-invalid")


def test_unwritable_cache_is_reported(fresh):
    fresh.write_text("a file where the folder should be")
    assert says(cpu_optimizers.problem(), "compile-failed") and str(fresh) in cpu_optimizers.problem()


def test_damaged_library_is_rebuilt(fresh, monkeypatch):
    assert cpu_optimizers.problem() is None
    (path,) = fresh.iterdir()
    library, built_at = path.read_bytes(), path.stat().st_mtime_ns
    cpu_optimizers._library_or_reason.cache_clear()
    assert cpu_optimizers.problem() is None and path.stat().st_mtime_ns == built_at  # loaded, not compiled
    for damaged in (library[: len(library) // 2], b"", library[:-1] + b"?"):
        path.unlink()  # the old file is mapped by this process
        path.write_bytes(damaged)
        cpu_optimizers._library_or_reason.cache_clear()
        assert cpu_optimizers.problem() is None
        assert [p.read_bytes() for p in fresh.iterdir()] == [library]
    monkeypatch.setattr(cpu_optimizers, "_FLAGS", [*cpu_optimizers._FLAGS, "-DOTHER"])
    cpu_optimizers._library_or_reason.cache_clear()
    assert cpu_optimizers.problem() is None and len(list(fresh.iterdir())) == 2


def test_processes_may_compile_at_the_same_time(fresh):
    fork = multiprocessing.get_context("fork")
    with fork.Pool(3) as pool:
        assert pool.map(_problem, range(3), chunksize=1) == [None] * 3
    assert all(path.suffix == ".so" for path in fresh.iterdir())


def _problem(_):
    return cpu_optimizers.problem()


@pytest.mark.parametrize("machine", [["-march=native"], []], ids=["no OpenMP", "no vectors, no fma"])
def test_compiler_flags_change_no_bit(machine, fresh, monkeypatch):
    params, grads, m, s = (random_tensors(seed, [(20_011,), (77,)]) for seed in range(4))
    d = torch.full((), 1e-3, dtype=torch.float64)
    if not machine:
        monkeypatch.setattr(cpu_optimizers, "_FLAGS", [flag.replace("-O3", "-O1") for flag in cpu_optimizers._FLAGS])
    results = []
    for machines in (cpu_optimizers._MACHINES, [machine]):
        monkeypatch.setattr(cpu_optimizers, "_MACHINES", machines)
        cpu_optimizers._library_or_reason.cache_clear()
        assert cpu_optimizers.problem() is None
        lists = [[t.clone() for t in column] for column in (params, grads, m, s)]
        sums = CPU.dlion(*lists, d, lr=1.0, weight_decay=0.1)
        CPU.adamw(*lists[:3], [x.abs() for x in lists[3]], [torch.zeros(()) for _ in params], lr=0.1)
        CPU.lion(*lists[:3], lr=0.1)
        results.append([*sums, *CPU.gradient_norm(grads), *(t for column in lists for t in column)])
    assert same_bits(*results)


@pytest.mark.parametrize("key", ["grads", "exp_avgs"])
@pytest.mark.parametrize("rows", [3, 5])
def test_a_tensor_of_another_shape_with_the_same_strides_is_refused(key, rows):
    operands = {name: [torch.zeros(4, 6)] for name in ("params", "grads", "exp_avgs")} | {key: [torch.zeros(rows, 6)]}
    with refused("operand-layout", ValueError, strides=(6, 1)):
        CPU.lion(**operands, lr=1e-3)
