"""Latents of any VAE: scale and shift, statistics per channel, Flux.2's, and folders that other programs read."""

import json
import math

import pytest
import torch
from model_files import original_vae_name
from sentences import refused, says
from tiny import make_wide_model, tiny_vae, wide_vae

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.model.formats import fold_vae
from fastsd.model.formats.flux2_vae import pooled
from fastsd.model.formats.load import load_model, load_vae
from fastsd.model.formats.model_source import open_source
from fastsd.model.formats.write import write_single_file
from fastsd.model.latent_space import SD15_SCALING_FACTOR, LatentSpace
from fastsd.model.vae import Vae
from fastsd.sampling.generate import denoise
from fastsd.storage import TensorFile, write_safetensors

MEAN, STD = [0.5, -1.0, 0.25, 3.0], [2.0, 0.5, 1.0, 4.0]
STATISTICS = {"latents_mean": MEAN, "latents_std": STD}
# Settings of config.json -> shift and scale of each channel.
SPACES = {
    "SD1.5": ({"scaling_factor": 0.18215}, [0.0] * 4, [0.18215] * 4),
    "SD3": ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, [0.0609] * 4, [1.5305] * 4),
    "statistics": ({"scaling_factor": 0.5} | STATISTICS, MEAN, [0.25, 1.0, 0.5, 0.125]),
}


@pytest.fixture
def sixteen(tmp_path):
    """Return the folder of a model with 16 latent channels, a scale and a shift."""
    make_wide_model(tmp_path / "sixteen")
    return tmp_path / "sixteen"


@pytest.mark.parametrize("kind", SPACES)
def test_latents_are_shifted_and_scaled_by_channel(kind):
    config, shift, scale = SPACES[kind]
    space = LatentSpace.of(config, "")
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.stack([(raw[:, c] - shift[c]) * scale[c] for c in range(4)], dim=1)
    assert torch.allclose(space.scale(raw), expected, rtol=0, atol=1e-12)
    assert torch.allclose(space.unscale(space.scale(raw)), raw, rtol=0, atol=1e-12)
    assert [values.tolist() for values in space.per_channel(4)] == [shift, scale]
    assert LatentSpace.of(space.settings(), "") == space and space.is_scaled_only == (kind == "SD1.5")


def test_one_factor_keeps_the_bits():
    raw = torch.randn(2, 4, 8, 8)
    space = LatentSpace.of({"scaling_factor": 0.13025}, "")
    assert torch.equal(space.scale(raw), raw * 0.13025) and torch.equal(space.unscale(raw), raw / 0.13025)


@pytest.mark.parametrize("kind", SPACES)
def test_any_space_is_folded_into_the_weights(kind):
    settings, _, scale = SPACES[kind]
    vae = tiny_vae(seed=1)
    config = dict(vae.config) | settings
    folded_config, tensors = fold_vae.fold(config, vae.state_dict(), "")
    assert LatentSpace.of(folded_config, "") == LatentSpace()
    folded = tiny_vae()
    folded.load_state_dict(tensors)
    torch.manual_seed(0)
    space, z, image = LatentSpace.of(config, ""), torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        decoded, expected = folded.decode(z / SD15_SCALING_FACTOR).sample, vae.decode(space.unscale(z)).sample
        assert (decoded - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
        folded_posterior, posterior = folded.encode(image).latent_dist, vae.encode(image).latent_dist
    assert (folded_posterior.mean * SD15_SCALING_FACTOR - space.scale(posterior.mean)).abs().max() <= 1e-5
    for channel, factor in enumerate(scale):
        change = (folded_posterior.logvar - posterior.logvar)[:, channel] - 2 * math.log(factor / SD15_SCALING_FACTOR)
        assert change.abs().max() <= 1e-5
    assert fold_vae.unfold(folded_config, tensors, fold_vae.unfold_record(config, vae.state_dict()))[0] == config


def test_a_folder_of_16_channels_is_read_by_diffusers_and_restored_by_us(sixteen, tmp_path):
    """diffusers reads one factor and no shift, so both are folded. We read the VAE's own bits, so its cache stays valid."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(sixteen, safety_checker=None)
    assert pipeline.vae.config.scaling_factor == SD15_SCALING_FACTOR and not pipeline.vae.config.shift_factor
    model, wide = load_model(ModelTable(base=str(sixteen))), wide_vae()
    assert model.vae.latent_space == LatentSpace(1.5305, 0.0609) and model.vae.module.quant_conv is None
    assert model.vae.hash == Vae(wide_vae(), "").hash
    assert all(torch.equal(tensor, wide.state_dict()[name]) for name, tensor in model.vae.module.state_dict().items())
    z = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert (decoded - model.vae.decode(z)).abs().max() <= 1e-5
    write_single_file(open_source(str(sixteen)), tmp_path / "one.safetensors")
    assert fold_vae.UNFOLDED in TensorFile(tmp_path / "one.safetensors").metadata
    again = load_vae(ModelTable(base="", vae=str(tmp_path / "one.safetensors")))
    assert (again.hash, again.latent_space) == (model.vae.hash, model.vae.latent_space)


def test_diffusers_draws_our_image_from_16_channels(sixteen):
    import numpy as np
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from fastsd_kernels import noise

    model = load_model(ModelTable(base=str(sixteen)))
    table = SampleTable(steps=3, guidance=2.0, sampler="ddim")
    eps = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (16, 16, 16))
    folded_posterior = model.vae.decode(denoise(model, ["a red circle"], eps, [5], table))[0].permute(1, 2, 0) / 2 + 0.5
    pipeline = StableDiffusionPipeline.from_pretrained(sixteen, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_pretrained(sixteen, subfolder="scheduler")
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "width": 32, "height": 32, "output_type": "np"}
    posterior = pipeline("a red circle", latents=eps, **options).images[0]
    assert np.abs(folded_posterior.numpy() - posterior).max() <= 1e-4


def test_the_file_of_flux1_as_published(tmp_path):
    """Names and shapes are those of the original code: 1x1 convolutions in the attention, none beside the latents."""
    module = wide_vae(groups=32, width=32)
    state = {original_vae_name(name, 2): tensor for name, tensor in module.state_dict().items()}
    projections = {
        f"{part}.mid.attn_1.{name}.weight" for part in ("encoder", "decoder") for name in ("q", "k", "v", "proj_out")
    }
    assert projections < state.keys() and not any("quant_conv" in name for name in state)
    assert {"encoder.down.0.downsample.conv.weight", "decoder.up.1.upsample.conv.bias", "decoder.norm_out.bias"} < state.keys()
    state |= {name: state[name][:, :, None, None] for name in projections}
    write_safetensors(tmp_path / "ae.safetensors", state)
    table = ModelTable(base="", vae=str(tmp_path / "ae.safetensors"))
    vae = load_vae(table)
    assert vae.latent_space == LatentSpace(0.3611, 0.1159) and vae.channels == 16
    assert all(torch.equal(tensor, vae.module.state_dict()[name]) for name, tensor in module.state_dict().items())
    images, latents = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(vae.encode(images), module.encode(images).latent_dist.mean)
    decoded = module.decode(latents / 0.3611 + 0.1159).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(latents), decoded)
    assert load_vae(table.model_copy(update={"vae_scaling_factor": 1.5305})).latent_space == LatentSpace(1.5305, 0.0609)


@pytest.mark.parametrize("channels", [4, 32])
def test_other_files_without_these_convolutions_are_refused(channels, tmp_path):
    state = {original_vae_name(name, 2): tensor for name, tensor in wide_vae(channels).state_dict().items()}
    write_safetensors(tmp_path / "vae.safetensors", state)
    with refused("single-file-no-vae", path=tmp_path / "vae.safetensors"):
        load_vae(ModelTable(base="", vae=str(tmp_path / "vae.safetensors")))


def flux2_vae():
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(4)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 4)
    return vae


def test_flux2_is_an_autoencoder_with_statistics(tmp_path):
    flux = flux2_vae()
    flux.save_pretrained(tmp_path / "flux2")
    vae = load_vae(ModelTable(base="", vae=str(tmp_path / "flux2")))
    assert vae.channels == 32 and not vae.latent_space.is_scaled_only
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = flux.encode(image).latent_dist.mean
    assert torch.allclose(vae.encode(image), raw, atol=1e-5)
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.latent_space.mean, vae.latent_space.std))
    assert torch.allclose(vae.scale(raw), (raw - mean) / std, atol=1e-6)


def test_pooled_statistics_are_those_of_all_positions():
    z = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    z[:, :, ::2, 1::2] = 2 * z[:, :, ::2, 1::2] + 1
    patches = z.view(5, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(5, 12, 4, 4)  # as diffusers' Flux2Pipeline
    means, variances = patches.mean((0, 2, 3)), patches.var((0, 2, 3), correction=0)
    mean, std = pooled(means, variances, 3)
    assert torch.allclose(mean, z.mean((0, 2, 3))) and torch.allclose(std, z.transpose(0, 1).flatten(1).std(1, correction=0))


NAN = float("nan")
BAD_CONFIGS = {
    "half": ({"latents_mean": MEAN}, "vae-statistics-half", {"present": "latents_mean", "missing": "latents_std"}),
    "other half": ({"latents_std": STD}, "vae-statistics-half", {"present": "latents_std"}),
    "short mean": (STATISTICS | {"latents_mean": MEAN[:3]}, "vae-statistics-length", {"name": "latents_mean", "count": 3}),
    "long std": (STATISTICS | {"latents_std": [1.0] * 16}, "vae-statistics-length", {"name": "latents_std", "count": 16}),
    "number": (STATISTICS | {"latents_std": 1.0}, "vae-statistics-length", {"count": "1.0", "channels": 4}),
    "zero std": (STATISTICS | {"latents_std": [1.0, 1.0, 0.0, 1.0]}, "vae-statistics-value", {"value": "0.0", "channel": 2}),
    "negative": (
        STATISTICS | {"latents_std": [-1.0] * 4},
        "vae-statistics-value",
        {"channel": 0, "expected": "a number above 0"},
    ),
    "NaN mean": (STATISTICS | {"latents_mean": [0, NAN, 0, 0]}, "vae-statistics-value", {"value": "nan", "channel": 1}),
    "text": (STATISTICS | {"latents_mean": ["0"] * 4}, "vae-statistics-value", {"value": "'0'", "expected": "a finite number"}),
    "two shifts": (STATISTICS | {"shift_factor": 0.1}, "vae-shift-and-mean", {"shift": "0.1"}),
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_bad_space_gets_one_sentence(tmp_path, kind):
    settings, code, fields = BAD_CONFIGS[kind]
    tiny_vae().save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with refused(code, place=path, **fields):
        load_vae(ModelTable(base="", vae=str(tmp_path / "vae")))


def test_a_bad_flux2_vae_gets_one_sentence(tmp_path):
    from safetensors.torch import load_file, save_file

    flux2_vae().save_pretrained(tmp_path)
    weights, config = tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "config.json"
    state, settings, table = load_file(weights), config.read_text(), ModelTable(base="", vae=str(tmp_path))
    save_file(state | {"bn.running_var": torch.full((128,), NAN)}, weights)
    with refused("vae-statistics-value", name="latents_std", value="nan", channel=0):
        load_vae(table)
    save_file(state | {"bn.running_var": torch.ones(64)}, weights)
    with refused("flux2-statistics-shape", means=128, variances=64, channels=32, expected=128):
        load_vae(table)
    save_file({name: tensor for name, tensor in state.items() if not name.startswith("bn.")}, weights)
    with refused("flux2-statistics", place=config, name="bn.running_mean"):
        load_vae(table)
    config.write_text(json.dumps(json.loads(settings) | {"decoder_block_out_channels": [4, 4]}))
    with refused("flux2-decoder", widths="[4, 4]"):
        load_vae(table)


def test_no_fold_is_refused_with_a_shift(sixteen, tmp_path):
    source = open_source(str(sixteen))
    with refused("single-file-shift", place=sixteen / "vae" / "config.json", space="scaling factor 1.5305, shift 0.0609"):
        write_single_file(source, tmp_path / "one.safetensors", fold=False)
    assert not (tmp_path / "one.safetensors").exists()
    notes = write_single_file(source, tmp_path / "one.safetensors")
    assert says("\n".join(notes), "vae-folded", space="scaling factor 1.5305, shift 0.0609")
    assert says("\n".join(notes), "single-file-channels", channels=16)
