"""Test the alignment with another VAE: exact cases of each fit, known maps, and UNets with folded edge layers."""

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
MAP = torch.tensor([[0.9, 0.6, 0.1, 0.0], [-0.7, 0.8, 0.0, 0.2], [0.1, 0.0, 1.2, -0.3], [0.0, 0.2, 0.4, 0.7]])


def latents(channels: int = 4, count: int = 24) -> torch.Tensor:
    """Return smooth latents with a different mean and scale in each channel."""
    noise = torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    smooth = torch.nn.functional.interpolate(noise, scale_factor=2, mode="bilinear")
    return smooth * torch.linspace(0.6, 1.4, channels)[:, None, None] + torch.linspace(-0.5, 0.7, channels)[:, None, None]


def apply_map(matrix: torch.Tensor, z_BCHW: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cd,bdhw->bchw", matrix, z_BCHW)


def schedule(prediction: str = "epsilon") -> align.Schedule:
    return align.Schedule.of(torch.linspace(0.999, 0.005, 1000), prediction)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(SHAPE).requires_grad_(False)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_rotation_is_exact_at_every_timestep(unet, prediction):
    Q = torch.linalg.qr(MAP)[0]
    y = latents()
    fit = align.fit_orthogonal(align.Pairs(apply_map(Q, y), y), schedule(prediction))
    context, y_t = torch.randn(6, 5, 16), torch.randn(6, 4, 8, 8)
    t = torch.tensor([0, 1, 250, 500, 750, 999])
    expected = apply_map(Q.T, unet(apply_map(Q, y_t), t, context))
    align.put(unet, align.fold_into_edges(align.edge_layers(unet), fit))
    assert (unet(y_t, t, context) - expected).abs().max() <= 1e-5


def test_plain_fit_of_equal_channels_changes_no_bit(unet):
    edges = align.edge_layers(unet)
    folded = align.fold_into_edges(edges, align.fit_plain(4, 4))
    assert all(torch.equal(tensor, edges[name]) for name, tensor in folded.items())


def test_known_maps_are_recovered():
    y, c = latents(), torch.tensor([0.5, -0.3, 0.2, 0.1])
    pairs = align.Pairs(apply_map(MAP, y) + c[:, None, None], y)
    fit = align.fit_affine(pairs, schedule())
    assert (fit.to_x[4::9, 4::9] - MAP).abs().max() <= 1e-3
    assert (fit.offset[4::9] / schedule().signal - c).abs().max() <= 1e-3
    assert (fit.to_y - torch.linalg.inv(MAP)).abs().max() <= 1e-3
    assert pairs.r2(fit) == pytest.approx([1.0] * 4, abs=1e-6)
    Q = align.fit_orthogonal(pairs, schedule()).to_x[4::9, 4::9]
    assert torch.allclose(Q @ Q.T, torch.eye(4).double(), atol=1e-12)
    assert all(r2 < 1 for r2 in pairs.r2(align.fit_orthogonal(pairs, schedule())))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_folded_layers_equal_the_formula(prediction):
    """Check conv_in'(y) = conv_in(A y + E[a] c) inside the border, conv_out' = A^-1 conv_out, and for v plus E[b] A^-1 c."""
    y, c = latents(), torch.tensor([0.5, -0.3, 0.2, 0.1])
    means = schedule(prediction)
    fit = align.fit_affine(align.Pairs(apply_map(MAP, y) + c[:, None, None], y), means)
    unet = UNet(SHAPE).requires_grad_(False).double()
    features = torch.randn(2, 16, 8, 8).double()
    A, back = fit.to_x[4::9, 4::9], fit.to_y
    offset = fit.offset[4::9]
    expected_in = unet.conv_in(apply_map(A, y.double()) + offset[:, None, None])
    expected_out = apply_map(back, unet.conv_out(features))
    align.put(unet, align.fold_into_edges(align.edge_layers(unet), fit))
    inside = np.s_[..., 1:-1, 1:-1]
    assert torch.allclose(unet.conv_in(y.double())[inside], expected_in[inside], atol=1e-9)
    shift = means.noise * back @ (offset / means.signal) if prediction == "v_prediction" else torch.zeros(4)
    assert torch.allclose(unet.conv_out(features), expected_out + shift[:, None, None], atol=1e-9)


@pytest.mark.parametrize("channels", [2, 6])
def test_other_channel_counts(unet, channels):
    """In a plain fit, shared channels do not change and the others start at zero. Other fits give a rectangular map."""
    edges, shared = align.edge_layers(unet), min(channels, 4)
    y_t, t, context = torch.randn(2, channels, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 16)
    x_t = torch.zeros(2, 4, 8, 8)
    x_t[:, :shared] = y_t[:, :shared]
    expected = unet(x_t, t, context)
    align.put(unet, align.fold_into_edges(edges, align.fit_plain(4, channels)))
    prediction = unet(y_t, t, context)
    assert torch.allclose(prediction[:, :shared], expected[:, :shared], atol=1e-6) and not prediction[:, shared:].any()
    assert unet.cfg.in_channels == unet.cfg.out_channels == channels
    y = latents(channels)
    pairs = align.Pairs(apply_map(torch.linspace(-1, 1, 4 * channels).reshape(4, channels) ** 3, y), y)
    for fit in (align.fit_orthogonal, align.fit_affine, align.fit_kernel):
        align.put(unet, align.fold_into_edges(edges, fit(pairs, schedule())))
        assert unet(y_t, t, context).isfinite().all()


def test_a_wider_map_keeps_the_noise_white_and_is_the_closest():
    """y holds x stretched by 3, beside directions of little variance. Q Q^T = 1, and no small rotation of Q comes closer."""
    generator = torch.Generator().manual_seed(3)
    x, rest = latents(4).double(), 0.05 * torch.randn(12, 8 * len(latents(4)), 8, generator=generator).double()
    rest = rest.view(12, len(x), 8, 8).transpose(0, 1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator).double())[0]
    pairs = align.Pairs(x, apply_map(rotation, torch.cat([3 * x, rest], dim=1)))
    fit = align.fit_orthogonal(pairs, schedule())
    Q, (xy, yy, *_) = fit.to_x[4::9, 4::9], pairs.centres()
    assert torch.allclose(Q @ Q.T, torch.eye(4).double(), atol=1e-9)
    assert min(pairs.r2(fit)) > 0.98
    U, _, V = torch.linalg.svd(xy, full_matrices=False)
    assert max(pairs.r2(align._pointwise(U @ V, fit.c, schedule()))) < 0  # the cross-covariance alone gives 3 x

    def error(turned):
        return ((turned @ yy * turned).sum() - 2 * (turned * xy).sum()).item()

    for _ in range(20):
        skew = torch.randn(16, 16, generator=generator).double()
        assert error(Q @ torch.linalg.matrix_exp(0.01 * (skew - skew.T))) > error(Q)


def test_a_kernel_fits_noisy_latents_better_than_a_rotation():
    """The error is measured on the fitted pairs, over timesteps and noise, both at the border and inside."""
    y = latents(count=48)
    x = apply_map(MAP, y) + 0.3 * torch.roll(y, 1, 3) + 0.2
    pairs, abar = align.Pairs(x, y), torch.linspace(0.999, 0.005, 1000).double()
    fits = [fit(pairs, schedule()) for fit in (align.fit_orthogonal, align.fit_kernel)]
    Q, errors = fits[0].to_x[4::9, 4::9], torch.zeros(2)
    for i, t in enumerate(range(25, 1000, 50)):
        e = torch.randn(y.shape, generator=torch.Generator().manual_seed(i)).double()
        a, b = abar[t].sqrt(), (1 - abar[t]).sqrt()
        x_t, y_t = align.patches(a * x + b * apply_map(Q, e)), align.patches(a * y + b * e)
        errors += torch.stack([(x_t - y_t @ fit.to_x.T - fit.offset).square().mean() for fit in fits])
    assert errors[1] < 0.9 * errors[0]


def test_refitting_lowers_the_error_of_the_last_convolution(unet):
    edges = align.edge_layers(unet)
    features, target = torch.randn(8, 16, 8, 8), torch.randn(8, 4, 8, 8)
    target += 0.3 * unet.conv_out(features)
    rows = torch.cat([align.patches(features), target.permute(0, 2, 3, 1).reshape(-1, 4)], dim=1)
    moments = align.Moments(rows.shape[1])
    for batch in rows.split(100):
        moments.add(batch)
    assert torch.allclose(moments.covariance, torch.cov(rows.T.double(), correction=0), atol=1e-5)
    before = (unet.conv_out(features) - target).square().mean()
    align.put(unet, align.refit_last(edges, moments))
    assert (unet.conv_out(features) - target).square().mean() < before
    align.put(unet, align.reading_features(edges))
    assert torch.equal(unet.conv_out(features), features)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("fit_pairs, stretch", [(align.fit_orthogonal, [1.0] * 4), (align.fit_affine, [1.2, 0.85, 1.1, 0.9])])
def test_a_fitted_unet_draws_with_the_other_vae_without_training(fit_pairs, stretch):
    """The other VAE is the base's. Its quant_conv and post_quant_conv rotate, stretch and move the latents."""
    model = load_model(ModelTable(base=str(MODELS / "base")))
    base_vae, module, stretch = model.vae, relative(model.vae.module), torch.tensor(stretch)
    module.quant_conv.weight[:4] *= stretch[:, None, None, None]
    module.quant_conv.bias[:4] *= stretch
    module.post_quant_conv.weight /= stretch[:, None, None]
    module.register_to_config(scaling_factor=base_vae.scaling_factor / STRETCH)
    new_vae, rng = Vae(module, "turned"), np.random.default_rng(5)
    pictures = to_tensor([world.draw(*pair, rng) for pair in world.combinations()[:24]])
    pairs = align.Pairs(*(vae.scale(vae.encode(pictures)) for vae in (base_vae, new_vae)))
    means = align.Schedule.of(alphas_cumprod(model.scheduler), "epsilon")
    fit, cos, sin = fit_pairs(pairs, means), math.cos(TURN), math.sin(TURN)
    back = torch.block_diag(*[torch.tensor([[cos, sin], [-sin, cos]])] * 2)
    c = -back @ torch.tensor(OFFSET) * base_vae.scaling_factor / STRETCH
    assert (fit.to_x[4::9, 4::9] - back / stretch).abs().max() <= 2e-5
    assert (fit.offset[4::9] / means.signal - c).abs().max() <= 2e-5

    def correct_share() -> float:
        prompts = world.prompts()[:10]
        images = generate(model, [prompt for *_, prompt in prompts], [0] * 10, SampleTable(steps=12, guidance=2.0), 64)
        return sum(world.judge(image) == (color, shape) for image, (color, shape, _) in zip(images, prompts, strict=True)) / 10

    before = correct_share()
    model.vae = new_vae
    assert correct_share() <= 0.25
    align.put(model.unet, align.fold_into_edges(align.edge_layers(model.unet), fit))
    assert correct_share() >= before >= 0.9
