"""Optimizer kernels: equal bits with their references, and 300 steps beside lion-pytorch, dadaptation and torch.

Only d of D-Lion and the gradient norm have a tolerance, because their sums have another order than PyTorch's.  They may be
at most twice as far from fp64 as PyTorch is.
"""

from functools import partial

import dadaptation
import lion_pytorch
import pytest
import torch
import triton
import triton.language as tl
from budget import nan_filled_memory
from environment import DEVICE
from optimizer_runs import (
    ABSURD,
    BAD_OPERANDS,
    LR,
    NAMES,
    NoReadBack,
    OptimizerRun,
    averages,
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
from sentences import refused

from fastsd_kernels import REFERENCE, TRITON
from fastsd_kernels.adamw import adamw_triton
from fastsd_kernels.arena import join_master, load_parameter, scalars, split_master, store_parameter
from fastsd_kernels.dlion import dlion_estimate_reference, dlion_estimate_triton, dlion_reference, dlion_triton
from fastsd_kernels.gradient_norm import clip_scale, gradient_norm_reference, gradient_norm_triton
from fastsd_kernels.launch import launch, recording
from fastsd_kernels.lion import lion_triton

PEERS = {
    "lion": lambda p, **kw: lion_pytorch.Lion([p], **kw),
    "dlion": lambda p, **kw: dadaptation.DAdaptLion([p], **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW([p], foreach=False, **kw),
}
# One element, less than a tile, a tile and a half, no elements, and a channels-last filter.
SHAPES = [(1,), (63,), (3075,), (0,), (8, 5, 3, 3)]
pytestmark = [pytest.mark.kernels, pytest.mark.slow, pytest.mark.usefixtures("ieee_root")]
random_tensors = partial(random_tensors, device=DEVICE)


def run_of(name, params, kernels, halves=False):
    return OptimizerRun(TRITON if kernels else REFERENCE, name, params, halves)


def schedule(name, step):
    """Return the lr of a step: warm-up, a stop in the middle, then a lower rate."""
    return 0.0 if step == 150 else LR[name] * min(1, (step + 1) / 40) * (0.3 if step > 200 else 1)


@pytest.mark.parametrize("name", NAMES)
def test_300_steps_on_an_arena(name):
    # A whole tile and a part of one. D-Lion takes 8 whole tiles at a time, or single ones of half the width.
    shape = (1021,) if name == "dlion" else (3083,)
    (start,) = random_tensors(0, [shape], 0.1)
    (target,) = random_tensors(1, [shape])
    ours, reference = (run_of(name, [start], kernels) for kernels in (True, False))
    halves = run_of(name, [start[:1021]], True, halves=True)
    peer_p, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
    settings = {"lr": LR[name], "weight_decay": 0.02}
    peer, truth = PEERS[name](peer_p, **settings), torch.optim.AdamW([exact], foreach=False, **settings)
    d_errors = [(0.0, 0.0)]

    for step in range(300):
        (noise,) = random_tensors(1000 + step, [shape])
        g = 1e-3 * (peer_p.detach() - target) + 1e-3 * noise
        peer_p.grad, exact.grad = g.clone(), g.double()
        lr = schedule(name, step)
        peer.param_groups[0]["lr"] = truth.param_groups[0]["lr"] = lr
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
            assert same_bits(ours.params, [peer_p]), step
        if name == "dlion":
            d = peer.param_groups[0]["d"]
            true_d = exact_d(*before, [g], state[1:], lr)
            d_errors.append((abs(ours.d.item() / true_d - 1), abs(d / true_d - 1)))
            assert torch.equal(ours.d, halves.d) and torch.equal(ours.numerator, halves.numerator)
            # All runs start every step from upstream's estimate. After one flipped sign they would never be equal again.
            for run in (ours, reference, halves):
                run.d.fill_(d)
                run.numerator.fill_(peer.param_groups[0]["numerator_weighted"])

    change = (peer_p.detach() - start).abs().max().item()
    assert change > 0.005
    if name == "adamw":
        error, peer_error = ((p.detach() - exact.detach()).norm().item() for p in (ours.params[0], peer_p))
        print(f"adamw: 300 steps, error {error:.1e}, torch {peer_error:.1e}")
        assert error <= 2 * peer_error
    error, peer_error = (max(column) for column in zip(*d_errors, strict=True))
    print(f"{name}: 300 steps bit-equal, largest change {change:.3f}, error of d {error:.1e}, upstream {peer_error:.1e}")
    assert error <= max(2 * peer_error, 1e-7)
    assert name != "dlion" or d > 1e-5  # the estimate has grown


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["g32", "g16"])
@pytest.mark.parametrize("name", NAMES)
def test_options_equal_the_reference(name, dtype, halves):
    params = random_tensors(2, SHAPES, scale=0.1)
    check_options([run_of(name, params, kernels, halves) for kernels in (True, False)], dtype, steps=4)


@pytest.mark.parametrize("name, halves", [("lion", True), ("dlion", False), ("adamw", True)])
def test_several_averages_have_the_bits_of_single_ones(name, halves):
    check_averages(TRITON, name, random_tensors(2, [(5000,), (8, 5, 3, 3)], scale=0.1), halves)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # the interpreter's NumPy
@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("name, lr, size, d", [(name, *case) for name in NAMES for case in ABSURD[name]])
def test_absurd_updates_leave_finite_numbers(name, lr, size, d, halves):
    params = random_tensors(14, SHAPES, scale=0.1)
    check_stays_finite([run_of(name, params, kernels, halves) for kernels in (True, False)], lr, size, d)


@pytest.mark.parametrize("halves", [False, True], ids=["fp32", "halves"])
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("name", NAMES)
def test_found_inf_keeps_every_byte(name, kernels, halves):
    params = random_tensors(3, SHAPES)
    params[2][:8] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, 1.0, -1.0, 3.4e38, -3.4e38])
    run = run_of(name, params, kernels, halves)
    fill_for_found_inf(run, params)
    before = bits(run.everything())
    for flag in (torch.tensor(True), torch.tensor(1.0), torch.tensor(2)):
        poison = torch.nan, torch.inf, -torch.inf, 0.0, 1.0
        grads = [torch.full_like(p, value) for p, value in zip(params, poison, strict=True)]
        run.step(grads, LR[name], found_inf=flag.to(DEVICE), weight_decay=0.1)
        assert same_bits(run.everything(), before)
        run.step([torch.full_like(p, torch.nan) for p in params], LR[name], found_inf=flag.to(DEVICE))
        assert same_bits(run.everything(), before)


@pytest.mark.parametrize("name", NAMES)
def test_found_inf_false_changes_nothing_and_lr_may_be_on_the_device(name):
    params = random_tensors(4, SHAPES, scale=0.1)
    check_found_inf_false([run_of(name, params, True) for _ in range(3)])


def test_dlion_sums_are_deterministic_and_accurate():
    shapes = [(40_007,), (3,), (16_384,)]
    params, grads = random_tensors(5, shapes), random_tensors(6, shapes)
    states = [random_tensors(7, shapes), random_tensors(8, shapes)]
    d = torch.full((), 1e-3, dtype=torch.float64, device=DEVICE)
    results = []
    for _ in range(2):
        copies = [[t.clone() for t in column] for column in (params, grads, *states)]
        with nan_filled_memory():
            results.append(dlion_triton(*copies, d, lr=1.0))
    assert same_bits(*results)
    dots_K, l1_K = results[0]
    assert len(dots_K) == len(l1_K) == 3 + 1 + 1

    copies = [[t.clone() for t in column] for column in (params, grads, *states)]
    reference_dots, reference_l1 = dlion_reference(*copies, d, lr=1.0)
    exact_l1 = sum(s.double().abs().sum() for s in copies[3])
    signs = [torch.sign(0.9 * m + 0.1 * g) for m, g in zip(states[0], grads, strict=True)]
    exact_dots = sum((u.double() * s.double()).sum() for u, s in zip(signs, states[1], strict=True))
    for *both, exact in ((dots_K, reference_dots, exact_dots), (l1_K, reference_l1, exact_l1)):
        error, reference_error = ((x.double().sum() - exact).abs().item() / exact_l1.item() for x in both)
        print(f"sum relative to |s|_1: error {error:.1e}, reference {reference_error:.1e}")
        assert error <= max(2 * reference_error, 2.0**-24)

    ours, reference = [], []
    for function, out in ((dlion_estimate_triton, ours), (dlion_estimate_reference, reference)):
        for lr, dots in ((1.0, dots_K), (torch.tensor(0.5, device=DEVICE), dots_K.abs()), (0.0, dots_K.abs())):
            new_d, numerator = d.clone(), torch.full_like(d, 0.25)
            function(new_d, numerator, dots, l1_K, lr=lr, beta2=0.99)
            out += [new_d, numerator]
        for sums in (torch.zeros(3, device=DEVICE), torch.full((3,), torch.nan, device=DEVICE)):
            new_d, numerator = d.clone(), torch.full_like(d, 0.25)
            function(new_d, numerator, sums, torch.zeros(3, device=DEVICE), lr=1.0)
            out += [new_d, numerator]
    torch.testing.assert_close(torch.stack(ours), torch.stack(reference), rtol=1e-13, atol=0)
    assert (torch.stack(ours)[[0, 2]] > d).all()


MASTERS_HI = [0, 1, 2, 0x7F, 0x80, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, 0x7F80, 0x7F81, 0x7FBF, 0x7FC0, 0x7FFF]


@triton.jit
def _rejoin(master_ptr, master_hi_ptr, master_lo_ptr, back_ptr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    master = tl.load(master_ptr + start + offs)
    options = master_lo_ptr, None, None, None, None, None, 0
    store_parameter(master, True, master_hi_ptr, options, start, offs, None, 0)
    tl.store(back_ptr + start + offs, load_parameter(master_hi_ptr, master_lo_ptr, start, offs, None))


def test_halves_are_exact():
    gen = torch.Generator().manual_seed(0)
    masters_hi = torch.cat((torch.tensor(MASTERS_HI), torch.randint(0, 0x7F80, (18,), generator=gen)))
    masters_hi = torch.cat((masters_hi, masters_hi | 0x8000))
    word = (masters_hi[:, None] << 16 | torch.arange(1 << 16)).flatten()
    master = (word - (word >> 31 << 32)).int().view(torch.float32).to(DEVICE)
    master_hi, master_lo = split_master(master)
    back = join_master(master_hi, master_lo)

    nan = master.isnan()
    assert torch.equal(back.view(torch.int32)[~nan], master.view(torch.int32)[~nan])
    assert back[nan].isnan().all() and master_hi[nan].isnan().all()

    tie = (word & 0xFFFF).to(DEVICE) == 0x8000
    nearest = master.bfloat16()
    assert torch.equal(master_hi[~nan & ~tie].view(torch.int16), nearest[~nan & ~tie].view(torch.int16))
    assert (master_hi[~nan & tie].float().abs() >= master[~nan & tie].abs()).all()

    kernel_hi, kernel_lo, kernel_back = (torch.empty_like(t) for t in (master_hi, master_lo, master))
    grid = (len(masters_hi),)
    launch(_rejoin, grid, master, kernel_hi, kernel_lo, kernel_back, BLOCK=1 << 16)
    assert same_bits([kernel_hi, kernel_lo, kernel_back], [master_hi, master_lo, back])

    # Tensors may have any shape and strides.
    picture = torch.randn(2, 3, 4, 5, generator=gen).contiguous(memory_format=torch.channels_last)
    assert torch.equal(join_master(*split_master(picture)), picture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_norm(dtype):
    grads = [g.to(dtype) for g in random_tensors(9, [(40_007,), (1,), (0,), (8, 5, 3, 3)])]
    grads.append(grads[0][:50:2])
    exact = torch.cat([g.double().flatten() for g in grads]).norm()
    with nan_filled_memory():
        first, second = (gradient_norm_triton(grads) for _ in range(2))
    norm, found_inf = first
    assert same_bits(first, second)
    assert norm.dtype == torch.float32 and norm.ndim == found_inf.ndim == 0 and not found_inf
    peer = torch.stack(torch._foreach_norm([g.float() for g in grads])).norm()
    error, peer_error = ((x.double() / exact - 1).abs().item() for x in (norm, peer))
    print(f"norm of {dtype}: error {error:.1e}, PyTorch {peer_error:.1e}")
    assert error <= 2 * max(peer_error, 2.0**-24)
    reference, found_inf = gradient_norm_reference(grads)
    assert (reference.double() / exact - 1).abs() < 2.0**-23 and not found_inf
    for poison in (torch.nan, torch.inf, -torch.inf):
        for index in (0, 39_999):
            poisoned = grads[0].clone()
            poisoned[index] = poison
            for function in (gradient_norm_triton, gradient_norm_reference):
                norm, found_inf = function([poisoned, *grads[1:]])
                assert found_inf and not norm.isfinite()


# NumPy warns if a norm overflows fp32.
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("function", [gradient_norm_triton, gradient_norm_reference])
def test_gradient_norm_of_huge_finite_gradients(function):
    check_huge_gradients(function, DEVICE)


def test_clip_scale():
    for norm, expected in ((4.0, 0.25), (0.5, 1.0), (0.0, 1.0), (torch.inf, 0.0)):
        factor = clip_scale(torch.tensor(norm, device=DEVICE), 1.0)
        assert factor.ndim == 0 and abs(factor.item() - expected) < 1e-6


@pytest.mark.parametrize("name, launches", [("lion", 1), ("dlion", 2), ("adamw", 1)])
def test_an_arena_takes_few_launches_and_reads_nothing_back(name, launches):
    params, grads = random_tensors(12, [(3083,)]), random_tensors(13, [(3083,)])
    run = run_of(name, params, True, halves=True)
    run.options |= {"emas": averages(params, 2), "ema_decay": torch.tensor([0.9, 0.99], device=DEVICE)}
    with recording(86) as recorded, NoReadBack():
        norm, found_inf = gradient_norm_triton(grads)
        run.step(
            grads,
            LR[name],
            found_inf=found_inf,
            scale=clip_scale(norm, 1.0),
            ema_decay=torch.tensor([0.9, 0.99], device=DEVICE),
        )
    assert len(recorded) == 2 + launches


def test_strides_of_single_elements_are_ignored():
    p, g, m = (torch.randn(8, 5, 1, 1, device=DEVICE) for _ in range(3))
    before = p.clone()
    lion_triton([p.contiguous(memory_format=torch.channels_last)], [g], [m], lr=1e-3)
    odd = torch.as_strided(p, p.shape, (5, 1, 40, 7))
    lion_triton([odd], [g], [m], lr=1e-3)
    assert not torch.equal(p, before)


def operands(halves):
    shape = (2, 40)
    p = torch.randn(shape, device=DEVICE)
    master_hi, master_lo = split_master(p)
    state = [torch.rand(shape, device=DEVICE) for _ in range(4)]
    ema, gains, scale = torch.stack([state[3]] * 2), scalars(p.device, 0.01, 0.1), torch.ones((), device=DEVICE)
    flags = [torch.tensor(False, device=DEVICE) for _ in range(2)]
    options = (master_lo, ema, gains, scale, *flags) if halves else (None,) * 6
    return (master_hi, state[0].bfloat16(), *state[1:3]) if halves else (p, *state[:3]), options


@pytest.mark.parametrize("halves", [False, True])
def test_opcheck(halves):
    (p, g, m, s), options = operands(halves)
    factors = torch.tensor([0.9, -0.1, 0.1, 0.1], device=DEVICE)
    check, ops = torch.library.opcheck, torch.ops.fastsd
    check(ops.lion.default, (p, g, m, factors, *options, 0.9, 0.99))
    check(ops.dlion.default, (p, g, m, s, factors, *options, 0.9, 0.99))
    check(ops.adamw.default, (p, g, m, s, factors, *options, 0.9, 0.99, 1e-8))
    d, numerator, dlr = (torch.full((), 1e-6, dtype=torch.float64, device=DEVICE) for _ in range(3))
    dots_K, l1_K = torch.rand(2, 5, device=DEVICE).unbind()
    check(ops.dlion_estimate.default, (d, numerator, dots_K, l1_K, dlr, options[4], 0.99))
    check(ops.square_sums.default, (g,))
    check(ops.norm_of_sums.default, (torch.rand(5, dtype=torch.float64, device=DEVICE),))


@pytest.mark.parametrize(
    "change, name, fields",
    [*BAD_OPERANDS, ({"exp_avgs": torch.zeros(4, 6, device="meta")}, "operand-devices", {})],
)
def test_unusable_operands_are_refused(change, name, fields):
    valid = {key: torch.zeros(4, 6, device=DEVICE) for key in ("params", "grads", "exp_avgs")}
    change = {k: v if v.is_meta else v.to(DEVICE) for k, v in change.items()}
    with refused(name, ValueError, op="lion", **fields):
        lion_triton(**{key: [tensor] for key, tensor in (valid | change).items()}, lr=1e-3)


def test_empty_lists_do_nothing():
    d = torch.zeros((), dtype=torch.float64, device=DEVICE)
    lion_triton([], [], [], lr=1e-3)
    adamw_triton([], [], [], [], [], lr=1e-3)
    assert [len(x) for x in dlion_triton([], [], [], [], d, lr=1.0)] == [0, 0]
    with refused("no-gradients", ValueError):
        gradient_norm_triton([])
