"""Optimizers against lion-pytorch, dadaptation and torch: 300 steps side by side, then state, skipping and bad input.

A sign of something that is zero to rounding may differ between two correct implementations, and then that coordinate
differs by 2 lr for good. The references keep their peer's order of operations and roundings, so no sign may differ:
parameters and state are compared bit by bit at every step, with no tolerance. Only d, whose sums over tensors upstream
adds one by one in Python, may differ in the last digits of fp64 (1e-13 relative).
Tensors above 2**18 elements or in channels_last sum <u, s> and |s| in another fp32 order than upstream, and while d
grows it multiplies its own rounding. There both start every step from upstream's d and numerator: parameters and state
must again be bit-equal, and d may be at most twice as far as upstream's from the d whose sums are taken in fp64.
"""

import dadaptation
import lion_pytorch
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.storage import TensorFile, write_safetensors
from fastsd.train.optim import AdamW, DLion, Lion, flat_state, load_flat_state

SHAPES = [(32, 16, 3, 3), (64, 48), (77,), (1,), (5, 3), ()]
NAMES = [f"layer{i}.weight" for i in range(len(SHAPES))]
OURS = {"lion": Lion, "dlion": DLion, "adamw": AdamW}
PEERS = {
    "lion": lambda params, **kw: lion_pytorch.Lion(params, **kw),
    "dlion": lambda params, **kw: dadaptation.DAdaptLion(params, **kw),
    "adamw": lambda params, **kw: torch.optim.AdamW(params, foreach=False, **kw),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and lose much where a machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(seed, shapes=SHAPES):
    """Parameters, and a gradient function of them and a step: a noisy bowl, so that trajectories feed back."""
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


@pytest.mark.parametrize("seed, weight_decay", [(0, 0.0), (1, 0.02)])
@pytest.mark.parametrize("name, lr", [("lion", 3e-4), ("dlion", 1.0), ("adamw", 3e-3)])
def test_bit_equal_to_peer(name, lr, seed, weight_decay):
    params, set_grads = problem(seed)
    twins = copies(params)
    ours, peer = (
        OURS[name](params, lr=lr, weight_decay=weight_decay),
        PEERS[name](twins, lr=lr, weight_decay=weight_decay),
    )
    start, d_error = [p.detach().clone() for p in params], 0.0
    for step in range(300):
        # Warm-up from one step's worth, a stop in the middle, then a lower rate.
        now = 0.0 if step == 150 else lr * min(1, (step + 1) / 40) * (0.3 if step > 200 else 1)
        for optimizer, its in ((ours, params), (peer, twins)):
            optimizer.param_groups[0]["lr"] = now
            set_grads(its, step)
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True)), step
        if name == "dlion":
            theirs = peer.param_groups[0]["d"]
            d_error = max(d_error, abs(ours.d() / theirs - 1))
    for p, q in zip(params, twins, strict=True):
        assert all(torch.equal(ours.state[p][k], peer.state[q][k]) for k in ours.slots)
    moved = max((p - p0).abs().max().item() for p, p0 in zip(params, start, strict=True))
    print(f"{name} wd {weight_decay}: error 0, d relative error {d_error:.1e}, largest move {moved:.3f}")
    assert moved > 0.005
    assert d_error < 1e-13
    if name == "dlion":
        assert ours.d() > 10 * 1e-6  # the estimate has been at work


def test_lion_decoupled_weight_decay():
    params, set_grads = problem(2)
    twins = copies(params)
    ours = Lion(params, lr=1e-3, weight_decay=0.01, decoupled_weight_decay=True)
    peer = lion_pytorch.Lion(twins, lr=1e-3, weight_decay=0.01, decoupled_weight_decay=True)
    for step in range(50):
        for optimizer, its in ((ours, params), (peer, twins)):
            optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
            set_grads(its, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_dlion_big_and_channels_last_tensors():
    params, set_grads = problem(3, [(700, 701), (32, 16, 3, 3), (11,)])
    params[1] = torch.nn.Parameter(params[1].detach().to(memory_format=torch.channels_last))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours, peer = DLion(params, weight_decay=0.01), dadaptation.DAdaptLion(twins, weight_decay=0.01)
    sb, errors = 0.99**0.5, [(0.0, 0.0)]
    for step in range(25):
        set_grads(twins, step)
        for p, q in zip(params, twins, strict=True):
            p.grad = q.grad
        signs, s_old = [], []
        for p in params:
            own = ours.state.get(p) or {"exp_avg": torch.zeros_like(p), "s": torch.zeros_like(p)}
            signs.append(own["exp_avg"].mul(0.9).add(p.grad, alpha=0.1).sign().double())
            s_old.append(own["s"].double())
        d, numerator = ours.d(), ours.shared["numerator_weighted"].item()
        ours.step()
        peer.step()
        dot = sum((u * s).sum().item() for u, s in zip(signs, s_old, strict=True))
        l1 = sum(ours.state[p]["s"].double().abs().sum().item() for p in params)
        exact = max(d, (sb * numerator + (1 - sb) * d * dot) / ((1 - sb) * l1))
        theirs = peer.param_groups[0]
        errors.append((abs(ours.d() / exact - 1), abs(theirs["d"] / exact - 1)))
        for key, value in ours.shared.items():
            value.fill_(theirs[key])
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(ours.state[p][k], peer.state[q][k]) for k in ours.slots)
    our_error, their_error = (max(column) for column in zip(*errors, strict=True))
    print(f"big tensors: error 0; d of one step against fp64 sums: {our_error:.1e}, upstream {their_error:.1e}")
    assert theirs["d"] > 2e-6
    assert our_error <= max(2 * their_error, 1e-7)


@pytest.mark.parametrize("name", OURS)
def test_skip_leaves_every_byte(name):
    params, set_grads = problem(4)
    with torch.no_grad():
        params[0].flatten()[:8] = torch.tensor([-0.0, 0.0, 1e-42, -1e-42, -0.0, 1.0, -1.0, 3e38])
    optimizer = OURS[name](params, weight_decay=0.1)
    fresh = bits(optimizer)
    set_grads(params, 0)
    optimizer.step(skip=torch.tensor(True))
    assert_same_bits(bits(optimizer), fresh)
    optimizer.step(skip=torch.tensor(False))
    for p in params:
        for value in optimizer.state[p].values():
            if value.ndim:
                value.flatten()[0] = -0.0
    before = bits(optimizer)
    for p, poison in zip(params, (torch.nan, torch.inf, -torch.inf, torch.nan, 0.0, -0.0), strict=True):
        p.grad = torch.full_like(p, poison)
    optimizer.step(skip=torch.tensor(1.0))
    assert_same_bits(bits(optimizer), before)
    set_grads(params, 1)
    optimizer.step(skip=torch.tensor(0.0))
    after = bits(optimizer)
    assert not any(torch.equal(after[n], before[n]) for n in NAMES)


@pytest.mark.parametrize("name", OURS)
def test_skip_false_is_no_skip(name):
    params, set_grads = problem(5)
    twins = copies(params)
    a, b = OURS[name](params, weight_decay=0.1), OURS[name](twins, weight_decay=0.1)
    for step in range(10):
        set_grads(params, step)
        set_grads(twins, step)
        a.step()
        b.step(skip=torch.tensor(False))
    assert_same_bits(bits(a), bits(b))


@pytest.mark.parametrize("how", ["state_dict", "flat_state"])
@pytest.mark.parametrize("name", OURS)
def test_resume_is_bit_equal(name, how, tmp_path):
    params, set_grads = problem(6)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    straight = OURS[name](params, weight_decay=0.01)
    for step in range(20):
        set_grads(params, step)
        straight.step()
    twins = copies(params)
    resumed = OURS[name](twins, weight_decay=0.01)
    if how == "state_dict":
        resumed.load_state_dict(straight.state_dict())
    else:
        write_safetensors(tmp_path / "state.safetensors", flat_state(straight, NAMES))
        load_flat_state(resumed, NAMES, TensorFile(tmp_path / "state.safetensors"))
    assert_same_bits(bits(straight), bits(resumed))
    for step in range(20, 40):
        for optimizer, its in ((straight, params), (resumed, twins)):
            set_grads(its, step)
            optimizer.step()
    assert_same_bits(bits(straight), bits(resumed))


@pytest.mark.parametrize("name", OURS)
def test_parameters_without_gradient_are_skipped_as_the_peer_does(name):
    params, set_grads = problem(7)
    twins = copies(params)
    ours, peer = OURS[name](params, lr=1e-2, weight_decay=0.1), PEERS[name](twins, lr=1e-2, weight_decay=0.1)
    ours.step()
    for step in range(12):
        for optimizer, its in ((ours, params), (peer, twins)):
            set_grads(its, step)
            for i, p in enumerate(its):
                if (i + step) % 3 == 0 or (i == 1 and step < 6):
                    p.grad = None
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_dlion_groups_share_d_and_zero_gradients_leave_it():
    params, set_grads = problem(8)
    twins = copies(params)
    split = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    theirs = [{"params": twins[:2]}, {"params": twins[2:], "weight_decay": 0.1}]
    ours, peer = DLion(split), dadaptation.DAdaptLion(theirs)
    for step in range(-2, 30):
        for optimizer, its in ((ours, params), (peer, twins)):
            set_grads(its, step + 2)
            for p in its:
                p.grad *= step >= 0
            optimizer.step()
        if step < 0:
            assert ours.d() == 1e-6
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    ours.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"lr is 0\.5; give 1\.0 in every group"):
        ours.step()


class NoReadBack(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("skip", [None, torch.tensor(False)])
@pytest.mark.parametrize("name", OURS)
def test_step_reads_nothing_back(name, skip):
    params, set_grads = problem(9)
    optimizer = OURS[name](params, weight_decay=0.01)
    for step in range(3):
        set_grads(params, step)
        with NoReadBack():
            optimizer.step(skip=skip)


@pytest.mark.parametrize("name", OURS)
def test_lr_on_the_device(name):
    params, set_grads = problem(10)
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
    "make, words",
    [
        (lambda p: Lion(p, lr=-1.0), "Lion: lr is -1.0; give"),
        (lambda p: Lion(p, lr=0.0, decoupled_weight_decay=True), "Lion: lr is 0.0; give more than 0"),
        (lambda p: Lion(p, betas=(0.9, 1.0)), "Lion: betas is"),
        (lambda p: DLion(p, weight_decay=-0.1), "DLion: weight_decay is -0.1; give"),
        (lambda p: DLion(p, d0=0.0), "DLion: d0 is 0.0; give"),
        (lambda p: DLion(p, lr=float("nan")), "DLion: lr is nan; give"),
        (lambda p: DLion([{"params": p[:1]}, {"params": p[1:], "betas": (0.8, 0.9)}]), "DLion: betas is"),
        (lambda p: AdamW(p, eps=-1e-8), "AdamW: eps is -1e-08; give"),
        (lambda p: AdamW([p[0], torch.zeros(2, dtype=torch.bfloat16)]), "AdamW: parameter dtype is torch.bfloat16"),
    ],
)
def test_bad_hyper_parameters(make, words):
    with pytest.raises(ValueError) as error:
        make(problem(0)[0])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_flat_state_changes_nothing():
    optimizer = DLion(problem(0)[0])
    good = {k: t.clone() + 1 for k, t in flat_state(optimizer, NAMES).items()}
    before = bits(optimizer)
    lacking = {k: t for k, t in good.items() if k != "d"}
    for tensors, words in (
        (lacking, "lacks 'd'"),
        (good | {"s/other": torch.zeros(1)}, "unexpected 's/other'"),
        (good | {"s/layer2.weight": torch.zeros(78)}, r"'s/layer2.weight' is \(78,\) float32, needs \(77,\) float32"),
        (good | {"d": torch.zeros(())}, r"'d' is \(\) float32, needs \(\) float64"),
    ):
        with pytest.raises(ValueError, match=words):
            load_flat_state(optimizer, NAMES, tensors)
        assert_same_bits(bits(optimizer), before)
    with pytest.raises(ValueError, match="5 distinct names for 6 parameters"):
        flat_state(optimizer, NAMES[:-1])
