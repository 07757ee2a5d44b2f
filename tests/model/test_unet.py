"""Compare the UNet's output, gradients and weights with those of diffusers, and the workload table with the UNet."""

import gc
from dataclasses import replace

import pytest
import torch
from derive import derive
from sentences import refused

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


def run_both(cfg, side, batch, tokens=77):
    """Run diffusers' UNet, then ours with its weights, on one input. Return each one's output and its gradients by name."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    baseline = UNet2DConditionModel.from_config(cfg.to_diffusers())
    x = torch.randn(batch, cfg.in_channels, side, side)
    t = torch.tensor([3, 997, 500])[:batch]
    context = torch.randn(batch, tokens, cfg.cross_attention_dim)
    cotangent = torch.randn(batch, cfg.out_channels, side, side)
    weights = baseline.state_dict()

    y = baseline(x, t, context).sample
    (y * cotangent).sum().backward()
    expected = y.detach(), {name: p.grad for name, p in baseline.named_parameters()}
    del baseline, y
    gc.collect()

    with torch.device("meta"):
        ours = UNet(UNetConfig.from_diffusers(cfg.to_diffusers()))
    load_diffusers_unet(ours.to_empty(device="cpu"), weights)
    our_weights = diffusers_state_dict(ours)
    assert our_weights.keys() == weights.keys()
    assert all(torch.equal(our_weights[name], tensor) for name, tensor in weights.items())  # a round trip keeps every bit
    y = ours(x, t, context)
    (y * cotangent).sum().backward()
    return expected, (y.detach(), diffusers_state_dict(ours, grad=True))


def assert_equal(expected, result, count):
    y, gradients = expected
    our_y, our_gradients = result
    error = ((y - our_y).norm() / y.norm()).item()
    assert our_gradients.keys() == gradients.keys() and len(gradients) == count
    errors = {name: ((our_gradients[name] - g).norm() / g.norm()).item() for name, g in gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    print(f"output {error:.2e}, worst gradient {errors[worst]:.2e} ({worst})")
    assert error <= 1e-5 and errors[worst] <= 1e-4


@pytest.mark.parametrize("side, tokens", [(16, 77), (8, 5), (12, 154)])
def test_small_unet_equals_diffusers(side, tokens):
    assert_equal(*run_both(TINY, side, 3, tokens), count=326)


OTHER_SIZES = [
    (64, {"block_out_channels": (8,), "attention": (True,), "layers_per_block": 2, "heads": 1, "cross_attention_dim": 8,
          "norm_groups": 4}),
    (8, {"block_out_channels": (8, 16), "attention": (False, True), "layers_per_block": 3, "heads": 2, "cross_attention_dim": 8,
         "norm_groups": 2, "in_channels": 16, "out_channels": 16}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("side, sizes", OTHER_SIZES)
def test_other_widths_and_depths_equal_diffusers(side, sizes):
    expected, result = run_both(UNetConfig(**sizes), side, 2)
    assert_equal(expected, result, count=len(expected[1]))


def test_unet_with_all_layers_of_sd15_equals_diffusers():
    """A quarter as wide. Two tests below compare the sizes of all layers and tensors."""
    narrow = replace(UNetConfig.sd15(), block_out_channels=(80, 160, 320, 320), cross_attention_dim=192, norm_groups=16)
    assert_equal(*run_both(narrow, 16, 1), count=686)


@pytest.mark.hours
def test_full_size_unet_equals_diffusers(whole_machine):
    assert_equal(*run_both(UNetConfig.sd15(), 16, 1), count=686)


def test_recomputation_changes_no_gradient():
    torch.manual_seed(0)
    unet = UNet(TINY)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 24)
    gradients_by_level = []
    for level in ("none", "ff", "block"):
        unet.checkpointing = level
        unet.zero_grad()
        unet(x, t, context).square().mean().backward()
        gradients_by_level.append({name: g.clone() for name, g in diffusers_state_dict(unet, grad=True).items()})
    first, *others = gradients_by_level
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_workload_table_equals_the_unets_operations():
    derived = derive(UNetConfig.sd15(), side=64)
    assert derived["attention"] == workload.ATTENTION
    assert derived["group_norm"] == workload.GROUP_NORM
    assert derived["layer_norm"] == workload.LAYER_NORM
    assert derived["geglu"] == workload.GEGLU
    assert derived["conv"] == workload.CONV
    assert derived["linear"] == workload.LINEAR
    assert derived["parameters"] == workload.PARAMETERS
    assert len({(k.channels, k.side, k.eps) for k in workload.GROUP_NORM}) == 18
    assert pytest.approx(0.803e12, rel=1e-3) == workload.FORWARD_FLOPS


def test_names_of_sd15():
    with torch.device("meta"):
        unet = UNet(UNetConfig.sd15())
    names = [file_name for name, _ in unet.named_parameters() for file_name in diffusers_names(name)]
    assert len(names) == len(set(names)) == 686
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964


def test_nothing_is_copied_from_weights_that_do_not_fit():
    unet = UNet(TINY)
    weights = {name: torch.zeros_like(tensor) for name, tensor in diffusers_state_dict(unet).items()}
    before = {name: tensor.clone() for name, tensor in diffusers_state_dict(unet).items()}
    name = "mid_block.attentions.0.proj_in.weight"
    for bad_weights, code, fields in [
        ({k: v for k, v in weights.items() if k != name}, "weights-names", {"kind": "missing", "name": name}),
        ({**weights, "extra.weight": torch.zeros(1)}, "weights-names", {"kind": "unexpected", "name": "extra.weight"}),
        ({**weights, name: torch.zeros(2, 2)}, "weights-shape", {"shape": (2, 2)}),
    ]:
        with refused(code, **fields):
            load_diffusers_unet(unet, bad_weights)
    assert all(torch.equal(tensor, before[k]) for k, tensor in diffusers_state_dict(unet).items())


OTHER_KINDS = [
    {"use_linear_projection": True}, {"attention_head_dim": [5, 10, 20]}, {"class_embed_type": "timestep"},
    {"_class_name": "UNet2DModel"}, {"down_block_types": ["AttnDownBlock2D"] * 3},
]  # fmt: skip


@pytest.mark.parametrize("change", OTHER_KINDS)
def test_other_kinds_of_unet_are_refused(change):
    with refused("sd2-unet" if "attention_head_dim" in change else "other-unet") as error:
        UNetConfig.from_diffusers({**TINY.to_diffusers(), **change})
    assert next(iter(change)) in str(error.value)
