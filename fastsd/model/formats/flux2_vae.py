"""Read Flux.2's VAE as an AutoencoderKL with a mean and a deviation per channel.

Flux.2 (diffusers' AutoencoderKLFlux2) cuts its C = 32 latent channels into patches of p x p positions, which gives p^2 C
channels, and normalises these by the running statistics of a batch norm: mean m and variance v + eps, at index p^2 c + i for
phase i of channel c. The patches serve a transformer's token count. A UNet downsamples by itself, so here it sees the C
channels at the VAE's own resolution. Their statistics over all positions follow exactly from those of the n = p^2 phases:

    mean_c = sum_i m_ci / n        std_c^2 = sum_i (v_ci + eps) / n + sum_i (m_ci - mean_c)^2 / n        (law of total variance)

Approximate: phases of a channel whose statistics differ are not equalised, as Flux.2 does. One factor per channel can be folded
into a 1x1 convolution, so diffusers' StableDiffusionPipeline and single files can hold this space. A phase's cannot.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsd.errors import UserError
from fastsd.storage import Tensors, as_tensor

CLASS = "AutoencoderKLFlux2"
_MEAN, _VARIANCE = "bn.running_mean", "bn.running_var"
_OWN_KEYS = ("batch_norm_eps", "batch_norm_momentum", "patch_size", "decoder_block_out_channels")


def as_autoencoder_kl(config: dict[str, Any], tensors: Tensors, place: str) -> tuple[dict[str, Any], Tensors]:
    """Return the config and tensors of the AutoencoderKL that Flux.2's VAE is, apart from its batch norm.

    Raises:
        UserError: naming `place`, the statistics are missing or do not fit the config, or the decoder has widths of its own.
    """
    if (widths := config.get("decoder_block_out_channels")) not in (None, config.get("block_out_channels")):
        raise UserError(
            "flux2-decoder", f"{place}: decoder_block_out_channels is {widths}, unlike the encoder's; give Flux.2's full VAE"
        )
    missing = [name for name in (_MEAN, _VARIANCE) if name not in tensors]
    if missing:
        raise UserError(
            "flux2-statistics", f"{place}: has no {missing[0]}, which Flux.2 normalises latents with; download the VAE again"
        )
    channels, (rows, columns) = config.get("latent_channels", 32), config.get("patch_size", (2, 2))
    means, variances = (as_tensor(tensors[name]).double() for name in (_MEAN, _VARIANCE))
    if not means.shape == variances.shape == (channels * rows * columns,):
        raise UserError(
            "flux2-statistics-shape",
            f"{place}: {_MEAN} and {_VARIANCE} have {means.numel()} and {variances.numel()} values, but {channels} latent "
            f"channels in patches of {rows} x {columns} have {channels * rows * columns}; download the VAE again",
        )
    mean_C, std_C = pooled(means, variances + config.get("batch_norm_eps", 1e-4), channels)
    settings = {"_class_name": "AutoencoderKL", "scaling_factor": 1.0, "shift_factor": None}
    settings |= {"latents_mean": mean_C.tolist(), "latents_std": std_C.tolist()}
    kept = {key: value for key, value in config.items() if key not in _OWN_KEYS}
    return kept | settings, {name: tensor for name, tensor in tensors.items() if not name.startswith("bn.")}


def pooled(means: Tensor, variances: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each channel (C) from the means and variances of its phases (C * phases)."""
    means_CI, variances_CI = means.view(channels, -1), variances.view(channels, -1)
    return means_CI.mean(1), (variances_CI.mean(1) + means_CI.var(1, correction=0)).sqrt()
