"""Optimizers against lion-pytorch, dadaptation and torch: 300 steps side by side, then state, skipping and bad input.

The sign of a value that is zero up to rounding may differ between two correct implementations, and that coordinate then
differs by 2 lr permanently. The references keep the original's order of operations and roundings, so no sign may differ.
Parameters and state are therefore compared bit by bit at every step. Only d may differ, by at most 1e-13 relative, because
upstream adds the sums of the tensors one by one in Python.

For tensors above 2**18 elements or in channels_last, the sums <u, s> and |s| have another fp32 order than upstream, and a
growing d amplifies the rounding. With such tensors, both start every step from upstream's d and numerator. Parameters and
state must again be bit-equal, and the error of d against fp64 sums may be at most twice upstream's.
"""

import dadaptation
import lion_pytorch
import pytest
import torch
from sentences import refused
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.storage import TensorFile, write_safetensors
from fastsd.train.optim import AdamW, DLion, Lion, flat_state, load_flat_state
from fastsd_kernels.arena import join_master
from fastsd_kernels.optim import bf16_with_masters

SHAPES = [(32, 16, 3, 3), (64, 48), (77,), (1,), (5, 3), ()]
NAMES = [f"layer{i}.weight" for i in range(len(SHAPES))]
OURS = {"lion": Lion, "dlion": DLion, "adamw": AdamW}
ORIGINALS = {
    "lion": lambda params, **kw: lion_pytorch.Lion(params, **kw),
    "dlion": lambda params, **kw: dadaptation.DAdaptLion(params, **kw),
    "adamw": lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread: more threads do not speed up small tensors, and slow them down on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noisy_bowl(seed, shapes=SHAPES):
    """Return parameters and a function that sets noisy gradients for a step. It uses the parameters, so errors feed back."""
    gen = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(0.1 * torch.randn(shape, generator=gen)) for shape in shapes]
    targets = [torch.randn(shape, generator=gen) for shape in shapes]

    def set_grads(params, step):
        gen = torch.Generator().manual_seed(1000 * seed + step)
        for p, target in zip(params, targets, strict=True):
            noise = torch.randn(p.shape, generator=gen)
            p.grad = 1e-3 * (p.detach() - target) + 1e-3 * noise

    return params, set_grads


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def bits(optimizer, names=NAMES):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = flat_state(optimizer, names) | dict(zip(names, params, strict=True))
    return {k: t.detach().contiguous().flatten().view(torch.uint8).clone() for k, t in tensors.items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed, weight_decay", [(0, 0.0), (1, 0.02)])
@pytest.mark.parametrize("name, lr", [("lion", 3e-4), ("dlion", 1.0), ("adamw", 3e-3)])
def test_300_steps_are_bit_equal_to_the_original(name, lr, seed, weight_decay):
    params, set_grads = noisy_bowl(seed)
    twins = copies(params)
    ours = OURS[name](params, lr=lr, weight_decay=weight_decay)
    original = ORIGINALS[name](twins, lr=lr, weight_decay=weight_decay)
    start, d_error = [p.detach().clone() for p in params], 0.0
    for step in range(300):
        # Warm-up, one step with lr 0 in the middle, then a lower rate.
        current_lr = 0.0 if step == 150 else lr * min(1, (step + 1) / 40) * (0.3 if step > 200 else 1)
        for optimizer, its_params in ((ours, params), (original, twins)):
            optimizer.param_groups[0]["lr"] = current_lr
            set_grads(its_params, step)
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True)), step
        if name == "dlion":
            d_error = max(d_error, abs(ours.d() / original.param_groups[0]["d"] - 1))

    for p, q in zip(params, twins, strict=True):
        assert all(torch.equal(ours.state[p][k], original.state[q][k]) for k in ours.slots)
    largest_move = max((p - p0).abs().max().item() for p, p0 in zip(params, start, strict=True))
    print(f"{name} wd {weight_decay}: error 0, d relative error {d_error:.1e}, largest move {largest_move:.3f}")
    assert largest_move > 0.005
    assert d_error < 1e-13
    if name == "dlion":
        assert ours.d() > 10 * 1e-6  # the estimate has grown


def test_lion_with_decoupled_weight_decay_equals_the_original():
    params, set_grads = noisy_bowl(2)
    twins = copies(params)
    ours = Lion(params, lr=1e-3, weight_decay=0.01, decoupled_weight_decay=True)
    original = lion_pytorch.Lion(twins, lr=1e-3, weight_decay=0.01, decoupled_weight_decay=True)
    for step in range(50):
        for optimizer, its_params in ((ours, params), (original, twins)):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            set_grads(its_params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_dlion_with_big_and_channels_last_tensors_equals_the_original():
    params, set_grads = noisy_bowl(3, [(700, 701), (32, 16, 3, 3), (11,)])
    params[1] = torch.nn.Parameter(params[1].detach().to(memory_format=torch.channels_last))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, original = DLion(params, weight_decay=0.01), dadaptation.DAdaptLion(twins, weight_decay=0.01)
    sb, errors = 0.99**0.5, [(0.0, 0.0)]
    for step in range(25):
        set_grads(twins, step)
        for p, q in zip(params, twins, strict=True):
            p.grad = q.grad
        signs, s_old = [], []
        for p in params:
            state = ours.state.get(p) or {"exp_avg": torch.zeros_like(p), "s": torch.zeros_like(p)}
            signs.append(state["exp_avg"].mul(0.9).add(p.grad, alpha=0.1).sign().double())
            s_old.append(state["s"].double())
        d, numerator = ours.d(), ours.shared["numerator_weighted"].item()
        ours.step()
        original.step()
        dot = sum((u * s).sum().item() for u, s in zip(signs, s_old, strict=True))
        l1 = sum(ours.state[p]["s"].double().abs().sum().item() for p in params)
        exact = max(d, (sb * numerator + (1 - sb) * d * dot) / ((1 - sb) * l1))
        original_group = original.param_groups[0]
        errors.append((abs(ours.d() / exact - 1), abs(original_group["d"] / exact - 1)))
        for key, value in ours.shared.items():
            value.fill_(original_group[key])

    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][k], original.state[q][k]) for k in ours.slots)
    our_error, original_error = (max(column) for column in zip(*errors, strict=True))
    print(f"big tensors: error 0; d of one step against fp64 sums: {our_error:.1e}, upstream {original_error:.1e}")
    assert original_group["d"] > 2e-6
    assert our_error <= max(2 * original_error, 1e-7)


@pytest.mark.parametrize("name", OURS)
def test_found_inf_changes_no_byte(name):
    params, set_grads = noisy_bowl(4)
    with torch.no_grad():
        params[0].flatten()[:8] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, -0.0, 1.0, -1.0, 3e38])
    optimizer = OURS[name](params, weight_decay=0.1)
    fresh = bits(optimizer)
    set_grads(params, 0)
    optimizer.step(found_inf=torch.tensor(True))
    assert_same_bits(bits(optimizer), fresh)

    optimizer.step(found_inf=torch.tensor(False))
    for p in params:
        for value in optimizer.state[p].values():
            if value.ndim:
                value.flatten()[0] = -0.0
    before = bits(optimizer)
    for p, poison in zip(params, (torch.nan, torch.inf, -torch.inf, torch.nan, 0.0, -0.0), strict=True):
        p.grad = torch.full_like(p, poison)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert_same_bits(bits(optimizer), before)
    set_grads(params, 1)
    optimizer.step(found_inf=torch.tensor(0.0))
    after = bits(optimizer)
    assert not any(torch.equal(after[n], before[n]) for n in NAMES)


@pytest.mark.parametrize("name", OURS)
def test_an_absurd_update_is_reported_and_moves_no_d(name):
    absurd = {"lion": {"lr": 1e38}, "dlion": {"d0": 1e38}, "adamw": {"lr": 1e38}}
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer, reported = OURS[name]([parameter], **absurd[name]), []
    for _ in range(8):
        d = optimizer.step_size.clone() if name == "dlion" else None
        optimizer.update(torch.ones(3))
        reported.append(bool(optimizer.finish()))
        tensors = [parameter, *(t for state in optimizer.state.values() for t in state.values())]
        assert all(t.isfinite().all() for t in tensors)
        assert not (reported[-1] and name == "dlion") or torch.equal(d, optimizer.step_size)
    assert reported[-1]
    parameter.data.zero_()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.update(torch.zeros(3))
    assert not optimizer.finish()  # the flag belongs to one step


@pytest.mark.parametrize("name", OURS)
def test_found_inf_false_equals_no_flag(name):
    params, set_grads = noisy_bowl(5)
    twins = copies(params)
    a, b = OURS[name](params, weight_decay=0.1), OURS[name](twins, weight_decay=0.1)
    for step in range(10):
        set_grads(params, step)
        set_grads(twins, step)
        a.step()
        b.step(found_inf=torch.tensor(False))
    assert_same_bits(bits(a), bits(b))


@pytest.mark.parametrize("method", ["state_dict", "flat_state"])
@pytest.mark.parametrize("name", OURS)
def test_resume_is_bit_equal(name, method, tmp_path):
    params, set_grads = noisy_bowl(6)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    uninterrupted = OURS[name](params, weight_decay=0.01)
    for step in range(20):
        set_grads(params, step)
        uninterrupted.step()
    twins = copies(params)
    resumed = OURS[name](twins, weight_decay=0.01)
    if method == "state_dict":
        resumed.load_state_dict(uninterrupted.state_dict())
    else:
        write_safetensors(tmp_path / "state.safetensors", flat_state(uninterrupted, NAMES))
        load_flat_state(resumed, NAMES, TensorFile(tmp_path / "state.safetensors"))
    assert_same_bits(bits(uninterrupted), bits(resumed))
    for step in range(20, 40):
        for optimizer, its_params in ((uninterrupted, params), (resumed, twins)):
            set_grads(its_params, step)
            optimizer.step()
    assert_same_bits(bits(uninterrupted), bits(resumed))


@pytest.mark.parametrize("name", OURS)
def test_parameters_without_gradient_are_skipped_like_the_original(name):
    params, set_grads = noisy_bowl(7)
    twins = copies(params)
    ours, original = OURS[name](params, lr=1e-2, weight_decay=0.1), ORIGINALS[name](twins, lr=1e-2, weight_decay=0.1)
    ours.step()
    for step in range(12):
        for optimizer, its_params in ((ours, params), (original, twins)):
            set_grads(its_params, step)
            for i, p in enumerate(its_params):
                if (i + step) % 3 == 0 or (i == 1 and step < 6):
                    p.grad = None
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_dlion_groups_share_d_and_zero_gradients_keep_it():
    params, set_grads = noisy_bowl(8)
    twins = copies(params)
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    twin_groups = [{"params": twins[:2]}, {"params": twins[2:], "weight_decay": 0.1}]
    ours, original = DLion(groups), dadaptation.DAdaptLion(twin_groups)
    for step in range(-2, 30):
        for optimizer, its_params in ((ours, params), (original, twins)):
            set_grads(its_params, step + 2)
            for p in its_params:
                p.grad *= step >= 0
            optimizer.step()
        if step < 0:
            assert ours.d() == 1e-6
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    ours.param_groups[1]["lr"] = 0.5
    with refused("optimizer-option", ValueError, optimizer="DLion", option="lr", value=0.5, requirement="1.0"):
        ours.step()


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("found_inf", [None, torch.tensor(False)])
@pytest.mark.parametrize("name", OURS)
def test_step_reads_nothing_back(name, found_inf):
    params, set_grads = noisy_bowl(9)
    optimizer = OURS[name](params, weight_decay=0.01)
    for step in range(3):
        set_grads(params, step)
        with NoReadBack():
            optimizer.step(found_inf=found_inf)


@pytest.mark.parametrize("name", OURS)
def test_lr_may_be_a_device_tensor(name):
    params, set_grads = noisy_bowl(10)
    twins = copies(params)
    lr = 2.0**-10
    a, b = OURS[name](params, lr=lr, weight_decay=0.5), OURS[name](twins, lr=lr, weight_decay=0.5)
    b.param_groups[0]["lr"] = torch.tensor(lr)
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        a.step()
        with NoReadBack():
            b.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "make, optimizer, option, value",
    [
        (lambda p: Lion(p, lr=-1.0), "Lion", "lr", -1.0),
        (lambda p: Lion(p, lr=0.0, decoupled_weight_decay=True), "Lion", "lr", 0.0),
        (lambda p: Lion(p, betas=(0.9, 1.0)), "Lion", "betas", (0.9, 1.0)),
        (lambda p: DLion(p, weight_decay=-0.1), "DLion", "weight_decay", -0.1),
        (lambda p: DLion(p, d0=0.0), "DLion", "d0", 0.0),
        (lambda p: DLion(p, lr=float("nan")), "DLion", "lr", "nan"),
        (lambda p: DLion([{"params": p[:1]}, {"params": p[1:], "betas": (0.8, 0.9)}]), "DLion", "betas", (0.8, 0.9)),
        (lambda p: AdamW(p, eps=-1e-8), "AdamW", "eps", -1e-8),
        (lambda p: AdamW([p[0], torch.zeros(2, dtype=torch.bfloat16)]), "AdamW", "parameter dtype", torch.bfloat16),
    ],
)
def test_bad_hyper_parameters_are_refused(make, optimizer, option, value):
    with refused("optimizer-option", ValueError, optimizer=optimizer, option=option, value=value) as error:
        make(noisy_bowl(0)[0])
    assert "\n" not in str(error.value)


def test_bad_flat_state_changes_nothing():
    optimizer = DLion(noisy_bowl(0)[0])
    valid = {k: t.clone() + 1 for k, t in flat_state(optimizer, NAMES).items()}
    before = bits(optimizer)
    without_d = {k: t for k, t in valid.items() if k != "d"}
    bad_entries = [
        (without_d, {"entry": "'d'", "problem": "missing"}),
        (valid | {"s/other": torch.zeros(1)}, {"entry": "'s/other'", "problem": "unexpected"}),
    ]
    bad_tensors = [
        (valid | {"s/layer2.weight": torch.zeros(78)}, {"entry": "'s/layer2.weight'", "tensor": "(78,) float32"}),
        (valid | {"d": torch.zeros(())}, {"entry": "'d'", "tensor": "() float32", "expected": "() float64"}),
    ]
    for name, cases in (("optimizer-state-entry", bad_entries), ("optimizer-state-tensor", bad_tensors)):
        for tensors, fields in cases:
            with refused(name, ValueError, **fields):
                load_flat_state(optimizer, NAMES, tensors)
            assert_same_bits(bits(optimizer), before)
    with refused("optimizer-state-names", ValueError, names=5, parameters=6):
        flat_state(optimizer, NAMES[:-1])


@pytest.mark.parametrize("name", OURS)
def test_bf16_parameters_with_masters_are_exact(name):
    torch.manual_seed(0)
    exact = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(33))]
    halves = [torch.nn.Parameter(p.detach().clone()) for p in exact]
    group = bf16_with_masters(halves)
    ours, masters = OURS[name]([group], lr=1e-3), OURS[name](exact, lr=1e-3)
    for _ in range(5):
        for p, half in zip(exact, halves, strict=True):
            assert half.dtype == torch.bfloat16
            half.grad = torch.randn_like(p).bfloat16()
            p.grad = half.grad.float()
        ours.step()
        masters.step()
    for p, half, low in zip(exact, halves, group["masters_lo"], strict=True):
        assert torch.equal(join_master(half.detach(), low), p.detach())


def test_adamw_counts_one_step_however_its_gradients_arrive():
    """A flat parameter may be updated view by view, as in a fused backward, and in other steps as a whole."""
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = AdamW([parameter], lr=1e-2)
    found_inf = torch.tensor(False)
    halves = [lambda flat: flat[:4], lambda flat: flat[4:]]
    for step, arrive_in_views in enumerate((True, False, True, True, False), start=1):
        if arrive_in_views:
            for half in halves:
                optimizer.update(torch.ones(4), select=half, found_inf=found_inf)
        else:
            optimizer.update(torch.ones(8), found_inf=found_inf)
        optimizer.finish(found_inf=found_inf)
        assert optimizer.extra_state()["step"].tolist() == [step]
    optimizer.update(torch.ones(4), select=halves[0], found_inf=torch.tensor(True))
    optimizer.finish(found_inf=torch.tensor(True))
    assert optimizer.extra_state()["step"].tolist() == [5]


@pytest.mark.parametrize("name", OURS)
def test_a_single_parameter_resumes(name):
    parameters = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    first, second = (OURS[name]([parameter], lr=1e-2) for parameter in parameters)
    parameters[0].grad = torch.arange(5.0)
    first.step()
    second.load_state_dict(first.state_dict())
    assert_same_bits(flat_state(first, ["w"]), flat_state(second, ["w"]))
