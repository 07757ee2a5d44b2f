"""Compare our VAE encoder with diffusers' on every table, and test its hash, precision, memory use and benchmark."""

import copy
import hashlib
import json
from collections import Counter
from dataclasses import replace

import gpu
import pytest
import torch
import vae as vae_bench
from sentences import refused, says

from fastsd.model.shapes import SD15_VAE
from fastsd.model.vae import Vae
from fastsd.model.vae_encoder import LOGVAR_BOUNDS, VaeEncoder
from fastsd.train.memory import LiveBytes
from fastsd_kernels import REFERENCE, TRITON
from fastsd_kernels import workload as w


def norm_like_the_kernel(x, weight, bias, groups, eps, *, silu=False, shift_BC=None):
    """Normalise in fp32, whatever the dtypes are. Only the result is rounded."""
    shift = 0 if shift_BC is None else shift_BC[:, :, None, None]
    return REFERENCE.group_norm(x.float() + shift, weight.float(), bias.float(), groups, eps, silu=silu).to(x.dtype)


# Biases are deferred as with the Triton table, but the norms are PyTorch's.
DEFERRED = replace(REFERENCE, name="triton", group_norm=norm_like_the_kernel)
# The settings of SDXL's config that differ from SD1.5's. The layers are the same.
SDXL = {"scaling_factor": 0.13025, "force_upcast": True, "sample_size": 1024}
SETTINGS = {
    "attention": {},
    "no quant_conv": {"use_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "16 channels": {"latent_channels": 16, "layers_per_block": 1},
    "one level": {"block_out_channels": [16], "norm_num_groups": 2},
    "four levels": {"block_out_channels": [8, 16, 16, 24], "layers_per_block": 1},
    "head of 12": {"block_out_channels": [8, 12]},
}


def build(**settings):
    """Return diffusers' AutoencoderKL with SD1.5's config and `settings`. All weights are random, even norms and biases."""
    from diffusers import AutoencoderKL

    levels = len(settings.get("block_out_channels", SD15_VAE["block_out_channels"]))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    torch.manual_seed(0)
    module = AutoencoderKL.from_config({**SD15_VAE, **blocks, **settings}).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def small(**settings):
    return build(**{"block_out_channels": [8, 16, 16], "norm_num_groups": 4, **settings})


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def diffusers_moments(module, images):
    """Return the mean and the log variance that diffusers computes."""
    posterior = module.encode(images).latent_dist
    return posterior.mean, posterior.logvar


def error(tensor, truth):
    return ((tensor.double() - truth.double()).norm() / truth.double().norm()).item()


def assert_close(tensors, truth, bound=1e-5):
    errors = [error(*pair) for pair in zip(tensors, truth, strict=True)]
    assert max(errors) <= bound, errors


@pytest.fixture(scope="module")
def full():
    return build()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, shape", [({}, (1, 3, 64, 64)), ({}, (3, 3, 32, 64)), (SDXL, (1, 3, 64, 64))], ids=["sd", "sd-oblong", "sdxl"]
)
def test_full_width_equals_diffusers(full, config, shape):
    module = copy.deepcopy(full)
    module.register_to_config(**config)
    images = pictures(*shape)
    truth = diffusers_moments(full, images)
    vae = Vae(module, "full")
    with torch.inference_mode():
        mean, logvar = vae.moments(images)
    assert_close((mean, logvar), truth)
    assert torch.equal(mean, vae.encode(images)) and mean.shape == (shape[0], 4, shape[2] // 8, shape[3] // 8)
    assert vae.scaling_factor == config.get("scaling_factor", 0.18215) and vae.downscale == 8


@pytest.mark.parametrize(
    "name, ops",
    [*((name, ops) for name in SETTINGS for ops in (REFERENCE, DEFERRED)), ("four levels", TRITON)],
    ids=lambda value: value if isinstance(value, str) else {id(DEFERRED): "deferred"}.get(id(value), value.name),
)
def test_every_config_on_every_table_equals_diffusers(name, ops):
    module = small(**SETTINGS[name])
    images = pictures(*((1, 3, 8, 16) if ops is TRITON else (3, 3, 24, 40)))  # kernels are interpreted
    truth = diffusers_moments(module, images)
    assert_close(Vae(copy.deepcopy(module), name, ops).moments(images), truth)
    half = module.to(torch.bfloat16)
    expected = diffusers_moments(half, images.bfloat16())
    for ours, baseline, exact in zip(Vae(half, name, ops).moments(images), expected, truth, strict=True):
        assert ours.dtype == torch.float32
        assert error(ours, exact) <= 2 * error(baseline, exact)


def test_bf16_at_full_width_is_as_close_as_diffusers(full):
    images = pictures(1, 3, 32, 32)
    truth = diffusers_moments(full, images)[0]
    half = copy.deepcopy(full).to(torch.bfloat16)
    baseline = diffusers_moments(half, images.bfloat16())[0]
    assert error(Vae(half, "full").encode(images), truth) <= 2 * error(baseline, truth)


def test_norms_of_large_images_stay_exact():
    """If fp32 sums ran over all positions one by one, the error would exceed this bound."""
    module = small(block_out_channels=[8], layers_per_block=1, mid_block_add_attention=False)
    images = pictures(1, 3, 512, 520) + 2
    truth = diffusers_moments(copy.deepcopy(module).double(), images.double())
    assert_close(Vae(module, "large").moments(images), truth, 2e-6)


def test_logvar_is_clamped_as_in_diffusers():
    module = small()
    module.quant_conv.weight.mul_(300)
    images = pictures(2, 3, 16, 16)
    logvar = Vae(copy.deepcopy(module), "wild").moments(images)[1]
    assert (logvar.min(), logvar.max()) == LOGVAR_BOUNDS
    assert_close([logvar], [diffusers_moments(module, images)[1]])


def test_images_in_any_layout_and_dtype():
    module, images = small(), pictures(2, 3, 16, 24)
    vae = Vae(module, "any")
    expected = vae.encode(images)
    transposed = images.transpose(2, 3).contiguous().transpose(2, 3)
    for variant in (images.contiguous(memory_format=torch.channels_last), images.double(), transposed):
        assert_close([vae.encode(variant)], [expected])


def test_sides_must_be_multiples_of_the_downscale():
    with refused("image-sides", ValueError, downscale=4):
        Vae(small(), "odd").encode(pictures(1, 3, 16, 18))


ATTENTION_BLOCK = "AttnDownEncoderBlock2D"


@pytest.mark.parametrize(
    "settings, mismatch",
    [({"down_block_types": ["DownEncoderBlock2D", ATTENTION_BLOCK]}, ATTENTION_BLOCK), ({"act_fn": "relu"}, "act_fn relu")],
)
def test_another_kind_of_vae_is_refused(settings, mismatch):
    with refused("vae-blocks", mismatch=mismatch) as error:
        Vae(small(block_out_channels=[8, 16], **settings), "other")
    assert "\n" not in str(error.value)


def test_encoder_shares_the_weights_of_the_module():
    module = small()
    state = {name: tensor.data_ptr() for name, tensor in module.state_dict().items() if tensor.ndim != 4}
    vae = Vae(module, "shared")
    assert vae.module is module and not any(isinstance(value, torch.Tensor) for value in vars(vae.encoder).values())
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items() if tensor.ndim != 4} == state
    before = vae.encode(pictures(1, 3, 16, 16))
    module.quant_conv.bias.add_(1)
    assert torch.allclose(vae.encode(pictures(1, 3, 16, 16)), before + 1, atol=1e-5)


def test_hash_depends_only_on_the_encoder():
    module = small()
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    assert Vae(module, "a").hash == Vae(module, "b", TRITON).hash == digest.hexdigest()
    module.decoder.conv_out.bias.add_(1)
    assert Vae(module, "c").hash == digest.hexdigest()
    module.quant_conv.bias.add_(1)
    assert Vae(module, "d").hash != digest.hexdigest()


def test_encodes_in_fp32_without_changing_the_precision():
    module, images = small(), pictures(2, 3, 16, 16)
    vae = Vae(module, "half").to("cpu", torch.bfloat16)
    exact = copy.deepcopy(module).float()
    latents = vae.encode_fp32(images)
    assert_close([latents], [diffusers_moments(exact, images)[0]])
    assert vae.dtype == torch.bfloat16 and error(vae.encode(images), latents) > 1e-4
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in vae.module.encoder.parameters() if p.ndim == 4)


def test_memory_is_three_images_of_the_widest_level():
    """The three are both terms of a sum and the output of a convolution. diffusers' encoder needs five."""
    module, images = small(layers_per_block=2, mid_block_add_attention=False), pictures(2, 3, 64, 64)
    image_bytes = 2 * 8 * 64 * 64 * 4
    vae = Vae(copy.deepcopy(module), "memory")
    peaks = []
    for encode in (vae.encode, module.encode):
        with torch.no_grad(), LiveBytes(torch.device("cpu")) as live:
            encode(images)
        peaks.append(live.peak / image_bytes)
    assert peaks[0] <= 3.5 and peaks[1] >= 4.9


def test_workload_table_has_every_norm_of_the_encoder():
    from diffusers import AutoencoderKL

    calls = Counter()

    def group_norm(x, weight, bias, groups, eps, *, silu=False, shift_BC=None):
        calls[w.GroupNorm(x.shape[1], x.shape[2], groups, eps, silu, shift_BC is not None)] += 1
        return x

    with torch.device("meta"), torch.no_grad():
        module = AutoencoderKL.from_config(SD15_VAE)
        VaeEncoder(module, replace(DEFERRED, group_norm=group_norm))(torch.empty(1, 3, 512, 512))
    assert calls == w.VAE_ENCODER_GROUP_NORM


def record(**changes):
    """Return a record of the benchmark on a GPU."""
    ms = {"median": 40.0, "min": 39.0, "max": 41.0}
    figures = {"img_per_s": 200.0, "tflop_per_s": 223.0, "share_of_matmul": 0.42, "peak_gb": 1.6, "error": 1e-2, "ms": ms}
    kind = {"op": "vae", "kind": "batch 8, 512 px", "mode": "bf16", "implementation": "fastsd", "small": False, "gpu": True}
    return {**kind, **figures, "times": 1.0, **changes}


def test_goals_of_the_encoder():
    def met(*records):
        return {verdict.goal: verdict.met for verdict in vae_bench.vae_verdicts(records)}

    gain, share = "VAE bf16, encoding over diffusers", "VAE bf16, share of a matmul's rate"
    assert met() == {gain.replace("bf16", "fp32"): None, gain: None, share: None}
    baseline = record(implementation="diffusers", times=2.1, kind="batch 8, 512 px")
    assert (met(record(), baseline)[gain], met(record(), baseline)[share]) == (True, True)
    assert met(record(), baseline, record(implementation="diffusers", times=1.9, kind="batch 1, 512 px"))[gain] is False
    assert met(record(share_of_matmul=0.3), baseline)[share] is False
    assert met(record(small=True), {**baseline, "small": True})[gain] is None
    # On a CPU it must not be slower, and no share is required.
    assert met(record(gpu=False), {**baseline, "gpu": False, "times": 1.1}) == {gain.replace("bf16", "fp32"): None, gain: True}


@pytest.mark.slow
def test_small_benchmark_within_a_gpu_visit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "read_stamp", lambda: {"gpu": "Some GPU", "date": "today"})

    def run(groups, end, **_):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        ((script, *arguments),) = groups
        assert script == "bench/vae.py"
        return vae_bench.main([*arguments, "--resolution", "64"]), 1.0

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--out", str(tmp_path), "--only", "vae", "--small"]) == 0
    result = json.loads((tmp_path / "vae-some-gpu.json").read_text())
    names = [(r["mode"], r["implementation"]) for r in result["records"]]
    assert names == [(mode, name) for mode in ("bf16", "fp32") for name in ("fastsd", "diffusers", "channels last")]
    assert all(r["small"] and r["img_per_s"] > 0 and r["tflop_per_image"] > 0 for r in result["records"])
    assert says(capsys.readouterr().out, "verdict-open")


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(vae_bench.Vae, "encode", lambda vae, images: vae.moments(images)[1])
    assert vae_bench.main(["--small", "--resolution", "32", "--rounds", "1", "--precision", "fp32"]) == 1
    assert "AssertionError" in capsys.readouterr().out
