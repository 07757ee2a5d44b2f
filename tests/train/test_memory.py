"""Memory counters against counts by hand, and the bytes that the full-size UNet and diffusers' save for backward."""

import contextlib
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from unets import CFG, full_size

from fastsd.model.unet import UNet, UNetConfig
from fastsd.train.memory import LiveBytes, saved_for_backward_bytes

KIB_OF_FP32 = 256  # numbers


def test_saved_storages_are_counted_once():
    linear, x = nn.Linear(64, 32), torch.randn(10, 64)
    # The input, but not the weight, and the result of the relu, which two operations save.
    assert saved_for_backward_bytes(lambda: linear(x).relu().exp().relu(), linear) == 4 * (10 * 64 + 3 * 10 * 32)
    # Both factors are views of one storage.
    y = torch.randn(8, 16, requires_grad=True)
    assert saved_for_backward_bytes(lambda: y[:4] * y[4:]) == y.untyped_storage().nbytes()
    assert saved_for_backward_bytes(lambda: y.detach().exp()) == 0
    with torch.no_grad():
        assert saved_for_backward_bytes(lambda: linear(x), linear) == 0


def test_storages_with_a_reused_address_are_both_counted():
    x = torch.randn(1000, requires_grad=True)

    def run():
        for _ in range(3):  # each storage is freed before the next, which may get its address
            (x * 2).exp()

    assert saved_for_backward_bytes(run) == 3 * 4000


def test_live_bytes_match_a_count_by_hand():
    with LiveBytes("cpu") as live:
        a = torch.empty(KIB_OF_FP32)
        assert (live.now, live.peak) == (1024, 1024)
        b = a + 1
        view = b.view(2, -1)[0]
        del b
        assert live.now == 2048  # the view holds the storage
        view.add_(1)
        torch.add(a, 1, out=a)
        assert live.now == 2048  # no new storage
        del view
        assert (live.now, live.peak) == (1024, 2048)
        temporary = (a * 2).sum()
        assert live.now == 1024 + 4
        del temporary
        c = torch.empty(2 * KIB_OF_FP32, dtype=torch.bfloat16)
        d = torch.zeros(4 * KIB_OF_FP32)
        del d

    assert live.peak == 2048 + 4096
    assert live.at_peak({"first": [a], "second": [c, c.view(2, -1)]}) == {"first": 1024, "second": 1024, "other": 4096}
    live.restart()
    assert live.peak == live.now == 2048
    del a, c
    assert live.now == 0  # storages are tracked beyond the end of the block


def test_tensors_from_before_the_block_are_not_counted():
    old, other = torch.zeros(KIB_OF_FP32), torch.zeros(KIB_OF_FP32)
    with LiveBytes("cpu") as live:
        old.add_(1)
        old.view(2, -1).mul_(2)
        old[:10].exp_()
        assert live.now == 0
        live.count(other, other[:5])
        assert live.now == 1024
        total = old + other
    owners = live.at_peak({"sum": [total], "counted": [other], "old": [old]})
    assert owners == {"sum": 1024, "counted": 1024, "old": 0, "other": 0}


def test_peak_of_a_backward_matches_a_count_by_hand():
    """At the peak of linear, relu, linear, both saved activations, their gradients and a weight gradient are live."""
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
    # x, hidden, y, dy, the gradients of the relu's output and input, and the gradient of the second weight.
    assert live.peak == 6 * activation + weights


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_do_not_need_data(device):
    def run(device: str) -> tuple[int, int, int]:
        with LiveBytes(device) as live, torch.device(device):
            model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
            x = torch.ones(2, 4, 16, 16)
            saved = saved_for_backward_bytes(lambda: model(x), model)
            model(x).square().mean().backward()
        return saved, live.now, live.peak

    with contextlib.nullcontext() if device == "meta" else FakeTensorMode():
        counts = run(device)
    assert counts == run("cpu")


SD15 = UNetConfig.sd15()


def unet_maker(level: str, cfg: UNetConfig = SD15):
    return lambda: UNet(cfg, checkpointing=level)


def diffusers_unet(cfg: UNetConfig = SD15) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(cfg.to_diffusers())


def test_a_count_without_data_is_the_same():
    for make in (partial(diffusers_unet, CFG), *(unet_maker(level, CFG) for level in ("none", "ff", "block"))):
        sizes = {"side": CFG.sample_size, "width": CFG.cross_attention_dim}
        assert full_size(make, data=True, **sizes) == full_size(make, **sizes) > 0


@pytest.mark.slow
def test_full_size_unet_saves_half_the_bytes_of_diffusers():
    diffusers, none, ff, block = (full_size(make) for make in (diffusers_unet, *map(unet_maker, ("none", "ff", "block"))))
    for level, size in (("diffusers", diffusers), ("none", none), ("ff", ff), ("block", block)):
        print(f"saved for one image at 512 px, {level}: {size / 1e6:.0f} MB ({size / diffusers:.3f})")
    assert none <= 1.03e9
    assert none <= 0.55 * diffusers
    assert ff <= 0.36 * diffusers
    assert block < 0.1 * none
    for level, fp32_bytes in (("none", none), ("ff", ff), ("block", block)):
        assert full_size(unet_maker(level), dtype=torch.bfloat16) == pytest.approx(fp32_bytes / 2, rel=0.01)
