"""A VAE's alignment: what each fit keeps exactly, maps that are known found again, and the way there and back in a UNet."""

import math

import numpy as np
import pytest
import torch

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.demo import world
from fastsd.demo.demo import MODELS
from fastsd.demo.models import OFFSET, STRETCH, TURN, relative, to_tensor
from fastsd.model import align
from fastsd.model.formats.load import load_model
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.vae import Vae
from fastsd.sampling.generate import generate
from fastsd.train.objective import alphas_cumprod

SHAPE = UNetConfig(
    block_out_channels=(16, 32), attention=(True, False), layers_per_block=1, heads=2, cross_attention_dim=16, norm_groups=4
)
KNOWN = torch.tensor([[0.9, 0.6, 0.1, 0.0], [-0.7, 0.8, 0.0, 0.2], [0.1, 0.0, 1.2, -0.3], [0.0, 0.2, 0.4, 0.7]])


def latents(channels: int = 4, count: int = 24) -> torch.Tensor:
    """Smooth, unlike in their channels, away from zero."""
    noise = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, scale_factor=2, mode="bilinear")
    return smooth * torch.linspace(0.6, 1.4, channels)[:, None, None] + torch.linspace(-0.5, 0.7, channels)[:, None, None]


def mapped(matrix: torch.Tensor, z_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cd,bdhw->bchw", matrix, z_BCHW)


def schedule(prediction: str = "epsilon") -> align.Schedule:
    return align.Schedule.of(torch.linspace(0.999, 0.005, 1000), prediction)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE).requires_grad_(False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_turn_is_exact_at_every_timestep(unet, prediction):
    Q = torch.linalg.qr(KNOWN)[0]
    y = latents()
    fit = align.fit_orthogonal(align.Pairs(mapped(Q, y), y), schedule(prediction))
    context, y_t = torch.randn(6, 5, 16), torch.randn(6, 4, 8, 8)
    t = torch.tensor([0, 1, 250, 500, 750, 999])
    wanted = mapped(Q.T, unet(mapped(Q, y_t), t, context))
    align.put(unet, align.fold_into_edges(align.edge_layers(unet), fit))
    assert (unet(y_t, t, context) - wanted).abs().max() <= 1e-5


def test_plain_changes_no_bit(unet):
    edges = align.edge_layers(unet)
    folded = align.fold_into_edges(edges, align.fit_plain(4, 4))
    assert all(torch.equal(tensor, edges[name]) for name, tensor in folded.items())


def test_known_maps_are_found():
    y, c = latents(), torch.tensor([0.5, -0.3, 0.2, 0.1])
    pairs = align.Pairs(mapped(KNOWN, y) + c[:, None, None], y)
    fit = align.fit_affine(pairs, schedule())
    assert (fit.into[4::9, 4::9] - KNOWN).abs().max() <= 1e-3
    assert (fit.offset[4::9] / schedule().signal - c).abs().max() <= 1e-3
    assert (fit.back - torch.linalg.inv(KNOWN)).abs().max() <= 1e-3
    assert pairs.r2(fit) == pytest.approx([1.0] * 4, abs=1e-6)
    Q = align.fit_orthogonal(pairs, schedule()).into[4::9, 4::9]
    assert torch.allclose(Q @ Q.T, torch.eye(4).double(), atol=1e-12)
    assert all(worse < 1 for worse in pairs.r2(align.fit_orthogonal(pairs, schedule())))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_fold_is_the_formula(prediction):
    """conv_in'(y) = conv_in(A y + E[a] c) inside the border, conv_out' = A^-1 conv_out, for v with E[b] A^-1 c beside."""
    y, c = latents(), torch.tensor([0.5, -0.3, 0.2, 0.1])
    means = schedule(prediction)
    fit = align.fit_affine(align.Pairs(mapped(KNOWN, y) + c[:, None, None], y), means)
    unet = UNet(SHAPE).requires_grad_(False).double()
    features = torch.randn(2, 16, 8, 8).double()
    A, back = fit.into[4::9, 4::9], fit.back
    offset = fit.offset[4::9]
    first, last = unet.conv_in(mapped(A, y.double()) + offset[:, None, None]), mapped(back, unet.conv_out(features))
    align.put(unet, align.fold_into_edges(align.edge_layers(unet), fit))
    inside = np.s_[..., 1:-1, 1:-1]
    assert torch.allclose(unet.conv_in(y.double())[inside], first[inside], atol=1e-9)
    shift = means.level * back @ (offset / means.signal) if prediction == "v_prediction" else torch.zeros(4)
    assert torch.allclose(unet.conv_out(features), last + shift[:, None, None], atol=1e-9)


@pytest.mark.parametrize("channels", [2, 6])
def test_other_channel_counts(unet, channels):
    """The shared channels stay as they are, the others begin at zero; with images the map is rectangular."""
    edges, fewer = align.edge_layers(unet), min(channels, 4)
    y_t, t, context = torch.randn(2, channels, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    x_t = torch.zeros(2, 4, 8, 8)
    x_t[:, :fewer] = y_t[:, :fewer]
    wanted = unet(x_t, t, context)
    align.put(unet, align.fold_into_edges(edges, align.fit_plain(4, channels)))
    found = unet(y_t, t, context)
    assert torch.allclose(found[:, :fewer], wanted[:, :fewer], atol=1e-6) and not found[:, fewer:].any()
    assert unet.cfg.in_channels == unet.cfg.out_channels == channels
    y = latents(channels)
    pairs = align.Pairs(mapped(torch.linspace(-1, 1, 4 * channels).reshape(4, channels) ** 3, y), y)
    for find in (align.fit_orthogonal, align.fit_affine, align.fit_kernel):
        align.put(unet, align.fold_into_edges(edges, find(pairs, schedule())))
        assert unet(y_t, t, context).isfinite().all()


def test_a_kernel_is_nearer_than_a_turn_to_noised_latents():
    """On the pairs it is fitted to, over timesteps and noise; at the border and inside."""
    y = latents(count=48)
    x = mapped(KNOWN, y) + 0.3 * torch.roll(y, 1, 3) + 0.2
    pairs, abar = align.Pairs(x, y), torch.linspace(0.999, 0.005, 1000).double()
    fits = [find(pairs, schedule()) for find in (align.fit_orthogonal, align.fit_kernel)]
    Q, errors = fits[0].into[4::9, 4::9], torch.zeros(2)
    for i, t in enumerate(range(25, 1000, 50)):
        e = torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).double()
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        x_t, y_t = align.patches(a * x + b * mapped(Q, e)), align.patches(a * y + b * e)
        errors += torch.stack([(x_t - y_t @ fit.into.T - fit.offset).square().mean() for fit in fits])
    assert errors[1] < 0.9 * errors[0]


def test_the_last_convolution_is_never_worse_than_it_was(unet):
    edges = align.edge_layers(unet)
    features, target = torch.randn(8, 16, 8, 8), torch.randn(8, 4, 8, 8)
    target += 0.3 * unet.conv_out(features)
    rows = torch.cat([align.patches(features), target.permute(0, 2, 3, 1).reshape(-1, 4)], dim=1)
    moments = align.Moments(rows.shape[1])
    for part in rows.split(100):
        moments.add(part)
    assert torch.allclose(moments.covariance, torch.cov(rows.T.double(), correction=0), atol=1e-5)
    before = (unet.conv_out(features) - target).square().mean()
    align.put(unet, align.refit_last(edges, moments))
    assert (unet.conv_out(features) - target).square().mean() < before
    align.put(unet, align.reading_features(edges))
    assert torch.equal(unet.conv_out(features), features)


@torch.no_grad()
@pytest.mark.parametrize("find, stretch", [(align.fit_orthogonal, [1.0] * 4), (align.fit_affine, [1.2, 0.85, 1.1, 0.9])])
def test_a_known_pair_of_vaes_draws_right_at_once(find, stretch):
    """The base's VAE turned, stretched and moved in its quant_conv and post_quant_conv: the map is found, colours are right."""
    model = load_model(ModelTable(base=str(MODELS / "base")))
    own, module, stretch = model.vae, relative(model.vae.module), torch.tensor(stretch)
    module.quant_conv.weight[:4] *= stretch[:, None, None, None]
    module.quant_conv.bias[:4] *= stretch
    module.post_quant_conv.weight /= stretch[:, None, None]
    module.register_to_config(scaling_factor=own.scaling_factor / STRETCH)
    new, rng = Vae(module, "turned"), np.random.default_rng(5)
    pictures = to_tensor([world.draw(*pair, rng) for pair in world.combinations()[:24]])
    pairs = align.Pairs(*(vae.scale(vae.encode(pictures)) for vae in (own, new)))
    means = align.Schedule.of(alphas_cumprod(model.scheduler), "epsilon")
    fit, cos, sin = find(pairs, means), math.cos(TURN), math.sin(TURN)
    back = torch.block_diag(*[torch.tensor([[cos, sin], [-sin, cos]])] * 2)
    c = -back @ torch.tensor(OFFSET) * own.scaling_factor / STRETCH
    assert (fit.into[4::9, 4::9] - back / stretch).abs().max() <= 2e-5
    assert (fit.offset[4::9] / means.signal - c).abs().max() <= 2e-5

    def share() -> float:
        asked = world.prompts()[:10]
        images = generate(model, [p for *_, p in asked], [0] * 10, SampleTable(steps=12, guidance=2.0), 64)
        return sum(world.judge(i) == (c, s) for i, (c, s, _) in zip(images, asked, strict=True)) / 10

    before = share()
    model.vae = new
    assert share() <= 0.25
    align.put(model.unet, align.fold_into_edges(align.edge_layers(model.unet), fit))
    assert share() >= before >= 0.9
