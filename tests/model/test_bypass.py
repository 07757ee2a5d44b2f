"""Test that a wider VAE's latents reach the last convolution exactly, in the features that the base needs least."""

import pytest
import torch

from fastsd.model import align, bypass
from fastsd.model.unet import UNet, UNetConfig

SHAPE = UNetConfig(
    block_out_channels=(48, 16), attention=(True, False), layers_per_block=1, heads=2, cross_attention_dim=16, norm_groups=8
)


def schedule() -> align.Schedule:
    return align.Schedule.of(torch.linspace(0.999, 0.005, 1000), "epsilon")


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE).requires_grad_(False)


@pytest.fixture
def pairs() -> align.Pairs:
    """x are the first 4 channels of y. Both have a mean."""
    y = torch.randn(16, 10, 8, 8, generator=torch.Generator().manual_seed(1)) + torch.linspace(-1, 1, 10)[:, None, None]
    return align.Pairs(y[:, :4], y)


def last_features(unet: UNet, *args: torch.Tensor) -> torch.Tensor:
    features = []
    handle = unet.up_blocks[-1].attentions[-1].register_forward_hook(lambda _, __, image: features.append(image.x_BCHW))
    unet(*args)
    handle.remove()
    return features[0]


def test_latents_reach_the_last_features_exactly(unet, pairs):
    """With 48 >= 9 x 4 + 10 features, the base loses nothing in the first convolution."""
    base = align.edge_layers(unet)
    layers = align.fold_into_edges(base | bypass.last_layers(unet), align.fit_kernel(pairs, schedule()))
    groups = [2, 5]
    carried = bypass.carry(layers, base, pairs, schedule(), groups, SHAPE.norm_groups)
    mean_y = pairs.centres()[-1]
    y_t, t, context = torch.randn(2, 10, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    align.put(unet, carried)
    features = last_features(unet, y_t, t, context).unflatten(1, (8, 6))
    read = features[:, groups].flatten(1, 2)
    expected = y_t - (schedule().signal * mean_y).float()[:, None, None]
    assert (read[:, :10] - expected).abs().max() <= 2e-5
    assert not read[:, 10:].any()
    change = carried["conv_in.weight"] - layers["conv_in.weight"]
    assert (base["conv_in.weight"].flatten(1).T @ change[:, :, 1, 1]).abs().max() <= 1e-6 * change.abs().max()
    assert change[:, :, 1, 1].any() and change[:, :, 0].abs().max() <= 1e-6 * change.abs().max()


def test_other_fits_restore_the_layers(unet, pairs):
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    layers = align.edge_layers(unet) | bypass.last_layers(unet)
    align.put(unet, bypass.carry(layers, layers, align.Pairs(*2 * [torch.randn(8, 4, 8, 8)]), schedule(), [0], 8))
    assert not torch.equal(unet.conv_norm_out.bias, before["conv_norm_out.bias"])
    align.put(unet, layers)
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())


def test_the_groups_that_the_targets_need_least_are_spared():
    """Targets are a linear function of the features of some groups, so the other groups are spared, noise or none."""
    generator = torch.Generator().manual_seed(2)
    rows, weights = torch.randn(4000, 9 * 16, generator=generator), torch.randn(9 * 16, 3, generator=generator)
    weights *= torch.tensor([1.0, 0.1, 2.0, 0.3]).repeat_interleave(9 * 4)[:, None]
    targets = rows @ weights + 0.1 * torch.randn(4000, 3, generator=generator)
    moments = align.Moments(9 * 16 + 3)
    moments.add(torch.cat([rows, targets], dim=1))
    assert bypass.spare_groups(moments, 16, 4, 1) == [1]
    assert bypass.spare_groups(moments, 16, 4, 2) == [1, 3]


def test_an_increase_is_that_of_the_error():
    rows, targets = torch.randn(200, 6).double(), torch.randn(200, 2).double()
    gone = torch.tensor([False, True, False, True, True, False])

    def error(columns: torch.Tensor) -> float:
        solution = torch.linalg.lstsq(rows[:, columns], targets).solution
        return (rows[:, columns] @ solution - targets).square().sum().item()

    inverse = torch.linalg.inv(rows.T @ rows)
    increase = bypass._increase(inverse, inverse @ rows.T @ targets, gone)
    assert increase == pytest.approx(error(~gone) - error(torch.ones(6, dtype=torch.bool)), rel=1e-9)


@pytest.mark.parametrize("channels, groups", [(4, 1), (16, 2), (32, 4), (160, 16), (161, 0)])
def test_number_of_groups_of_sd15(channels, groups):
    assert bypass.groups_for(UNetConfig(), channels) == groups
