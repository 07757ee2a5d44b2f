"""Memory is counted right: by hand in small, and the UNet at full size beside diffusers', as data and without."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from unets import full_size

from fastsd.model.unet import UNet, UNetConfig
from fastsd.train.memory import LiveBytes, saved_for_backward_bytes

KIB = 256  # fp32 numbers


def test_what_autograd_keeps_is_counted_once():
    linear, x = nn.Linear(64, 32), torch.randn(10, 64)
    # The input (for the weight's gradient), not the weight; the result of the relu, which is seen by two.
    assert saved_for_backward_bytes(lambda: linear(x).relu().exp().relu(), linear) == 4 * (10 * 64 + 3 * 10 * 32)
    # Both factors are views of one storage.
    y = torch.randn(8, 16, requires_grad=True)
    assert saved_for_backward_bytes(lambda: y[:4] * y[4:]) == y.untyped_storage().nbytes()
    assert saved_for_backward_bytes(lambda: y.detach().exp()) == 0
    with torch.no_grad():
        assert saved_for_backward_bytes(lambda: linear(x), linear) == 0


def test_kept_storages_are_told_apart_after_one_is_freed():
    x = torch.randn(1000, requires_grad=True)

    def run():
        for _ in range(3):  # each is freed before the next, which may get its address
            (x * 2).exp()

    assert saved_for_backward_bytes(run) == 3 * 4000


def test_live_bytes_by_hand():
    with LiveBytes("cpu") as live:
        a = torch.empty(KIB)
        assert (live.now, live.peak) == (1024, 1024)
        b = a + 1
        view = b.view(2, -1)[0]
        del b
        assert live.now == 2048  # the view holds the storage
        view.add_(1)
        torch.add(a, 1, out=a)
        assert live.now == 2048  # nothing new was born
        del view
        assert (live.now, live.peak) == (1024, 2048)
        temporary = (a * 2).sum()
        assert live.now == 1024 + 4
        del temporary
        c = torch.empty(2 * KIB, dtype=torch.bfloat16)
        d = torch.zeros(4 * KIB)
        del d
    assert live.peak == 2048 + 4096
    assert live.at_peak({"first": [a], "second": [c, c.view(2, -1)]}) == {"first": 1024, "second": 1024, "other": 4096}
    live.restart()
    assert live.peak == live.now == 2048
    del a, c
    assert live.now == 0  # the end of the block does not lose sight of them


def test_tensors_from_before_are_not_new():
    old, other = torch.zeros(KIB), torch.zeros(KIB)
    with LiveBytes("cpu") as live:
        old.add_(1)
        old.view(2, -1).mul_(2)
        old[:10].exp_()
        assert live.now == 0
        live.count(other, other[:5])
        assert live.now == 1024
        kept = old + other
    assert live.at_peak({"kept": [kept], "counted": [other], "old": [old]}) == {
        "kept": 1024,
        "counted": 1024,
        "old": 0,
        "other": 0,
    }


def test_a_backward_by_hand():
    """Linear, relu, linear: at the worst moment live both activations kept, their gradients, and those of the weights."""
    width, rows = 64, 100
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False))
    weights, activation = 4 * width * width, 4 * rows * width
    with LiveBytes("cpu") as live:
        x = torch.randn(rows, width)
        y = model(x)
        assert live.now == 3 * activation  # x, the relu's output, y
        y.backward(torch.ones_like(y))
        del y
        assert live.now == activation + 2 * weights
    # x, hidden, y, dy; dhidden of the second linear, and of the relu; the second weight's gradient.
    assert live.peak == 6 * activation + weights


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_without_data_the_count_is_the_same(device):
    def run(device: str) -> tuple[int, int, int]:
        with LiveBytes(device) as live, torch.device(device):
            model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
            x = torch.ones(2, 4, 16, 16)
            kept = saved_for_backward_bytes(lambda: model(x), model)
            model(x).square().mean().backward()
        return kept, live.now, live.peak

    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        found = run(device)
    assert found == run("cpu")


def ours(level: str):
    return lambda: UNet(UNetConfig.sd15(), checkpointing=level)


def theirs() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(UNetConfig.sd15().to_diffusers())


def test_the_full_size_unet_keeps_half_of_diffusers(whole_machine):
    for make in (theirs, ours("none")):  # without data the same bytes, in a second instead of many
        assert full_size(make, data=True, side=16) == full_size(make, side=16)
    diffusers, none, ff, block = (full_size(make) for make in (theirs, *map(ours, ("none", "ff", "block"))))
    print(f"kept for one image at 512 px, MB: diffusers {diffusers / 1e6:.0f}, none {none / 1e6:.0f} ({none / diffusers:.3f}), "
          f"ff {ff / 1e6:.0f} ({ff / diffusers:.3f}), block {block / 1e6:.0f}")  # fmt: skip
    assert none <= 1.03e9
    assert none <= 0.55 * diffusers
    assert ff <= 0.36 * diffusers
    assert block < 0.1 * none
    for level, wide in (("none", none), ("ff", ff), ("block", block)):
        assert full_size(ours(level), dtype=torch.bfloat16) == pytest.approx(wide / 2, rel=0.01)
