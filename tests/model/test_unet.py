"""The UNet against diffusers' in output, every gradient and every weight; and the workload table against the UNet."""

import gc

import pytest
import torch
from derive import derive

from fastsd.errors import UserError
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import diffusers_names, diffusers_state_dict, load_diffusers_unet
from fastsd_kernels import workload

TINY = UNetConfig(
    block_out_channels=(16, 32, 48),
    attention=(True, True, False),
    layers_per_block=1,
    heads=4,
    cross_attention_dim=24,
    norm_groups=8,
    sample_size=16,
)


def theirs_and_ours(cfg, side, batch, tokens=77):
    """Run diffusers' UNet, then ours with its weights, on one input: (outputs, gradients by name) of both."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(cfg.to_diffusers())
    x = torch.randn(batch, cfg.in_channels, side, side)
    t = torch.tensor([3, 997, 500])[:batch]
    context = torch.randn(batch, tokens, cfg.cross_attention_dim)
    cotangent = torch.randn(batch, cfg.out_channels, side, side)
    weights = theirs.state_dict()

    y = theirs(x, t, context).sample
    (y * cotangent).sum().backward()
    expected = y.detach(), {name: p.grad for name, p in theirs.named_parameters()}
    del theirs, y
    gc.collect()

    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(cfg.to_diffusers()))
    load_diffusers_unet(ours.to_empty(device="cpu"), weights)
    back = diffusers_state_dict(ours)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())  # there and back, bit-equal
    y = ours(x, t, context)
    (y * cotangent).sum().backward()
    return expected, (y.detach(), diffusers_state_dict(ours, grad=True))


def check(expected, found, count):
    (y, gradients), (our_y, our_gradients) = expected, found
    error = ((y - our_y).norm() / y.norm()).item()
    assert our_gradients.keys() == gradients.keys() and len(gradients) == count
    errors = {name: ((our_gradients[name] - g).norm() / g.norm()).item() for name, g in gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"output {error:.2e}, worst gradient {errors[worst]:.2e} ({worst})")
    assert error <= 1e-5
    assert errors[worst] <= 1e-4


@pytest.mark.parametrize("side, tokens", [(16, 77), (8, 5), (12, 154)])
def test_small_unet_equals_diffusers(side, tokens):
    check(*theirs_and_ours(TINY, side, 3, tokens), count=326)


@pytest.mark.parametrize(
    "side, cfg",
    [
        (64, UNetConfig(block_out_channels=(8,), attention=(True,), layers_per_block=2, heads=1, cross_attention_dim=8,
                   norm_groups=4)),
        (8, UNetConfig(block_out_channels=(8, 16), attention=(False, True), layers_per_block=3, heads=2, cross_attention_dim=8,
                   norm_groups=2, in_channels=16, out_channels=16)),
    ],
)  # fmt: skip
def test_other_widths_and_depths_equal_diffusers(side, cfg):
    expected, found = theirs_and_ours(cfg, side, 2)
    check(expected, found, count=len(expected[1]))


def test_full_size_unet_equals_diffusers(whole_machine):
    check(*theirs_and_ours(UNetConfig.sd15(), 16, 1), count=686)


def test_recomputation_changes_no_gradient():
    torch.manual_seed(0)
    unet = UNet(TINY)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 24)
    gradients = []
    for level in ("none", "ff", "block"):
        unet.checkpointing = level
        unet.zero_grad()
        unet(x, t, context).square().mean().backward()
        gradients.append({name: g.clone() for name, g in diffusers_state_dict(unet, grad=True).items()})
    for other in gradients[1:]:
        assert all(torch.equal(gradients[0][name], other[name]) for name in gradients[0])


def test_the_workload_is_the_unets():
    found = derive(UNetConfig.sd15(), side=64)
    assert found["attention"] == workload.ATTENTION
    assert found["group_norm"] == workload.GROUP_NORM
    assert found["layer_norm"] == workload.LAYER_NORM
    assert found["geglu"] == workload.GEGLU
    assert found["conv"] == workload.CONV
    assert found["linear"] == workload.LINEAR
    assert found["parameters"] == workload.PARAMETERS
    assert len({(k.channels, k.side, k.eps) for k in workload.GROUP_NORM}) == 18
    assert pytest.approx(0.803e12, rel=1e-3) == workload.FORWARD_FLOPS


def test_names_of_sd15():
    with torch.device("meta"):
        unet = UNet(UNetConfig.sd15())
    names = [piece for name, _ in unet.named_parameters() for piece in diffusers_names(name)]
    assert len(names) == len(set(names)) == 686
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_weights_that_do_not_fit_are_refused_whole():
    unet = UNet(TINY)
    good = {name: torch.zeros_like(tensor) for name, tensor in diffusers_state_dict(unet).items()}
    before = {name: tensor.clone() for name, tensor in diffusers_state_dict(unet).items()}
    name = "mid_block.attentions.0.proj_in.weight"
    for bad, words in [
        ({k: v for k, v in good.items() if k != name}, f"missing, the first is {name}"),
        ({**good, "extra.weight": torch.zeros(1)}, "not part of this model"),
        ({**good, name: torch.zeros(2, 2)}, r"has shape \(2, 2\)"),
    ]:
        with pytest.raises(UserError, match=words):
            load_diffusers_unet(unet, bad)
    assert all(torch.equal(tensor, before[k]) for k, tensor in diffusers_state_dict(unet).items())


@pytest.mark.parametrize(
    "change", [{"use_linear_projection": True}, {"attention_head_dim": [5, 10, 20]}, {"class_embed_type": "timestep"},
               {"_class_name": "UNet2DModel"}, {"down_block_types": ["AttnDownBlock2D"] * 3}]
)  # fmt: skip
def test_other_kinds_of_unet_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        UNetConfig.from_diffusers({**TINY.to_diffusers(), **change})
