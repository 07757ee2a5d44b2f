"""The VAE: diffusers' AutoencoderKL, our own layers for encoding, and its latent space.

Latents are shifted and scaled before the UNet sees them, and back before decoding (`latent_space.py`).

Shapes: B images of H x W pixels, multiples of the downscale; C latent channels; latents are (B, C, h, w).
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from fastsd.model.latent_space import LatentSpace
from fastsd.model.vae_encoder import VaeEncoder
from fastsd_kernels import REFERENCE, Ops


class Vae:
    """An AutoencoderKL of any number of latent channels, and its latent space.

    Args:
        module: diffusers' AutoencoderKL. Its weights are converted to channels last.
        name: the origin of the VAE, for display.
        ops: the implementations used for encoding. Decoding uses diffusers.

    Attributes:
        hash: sha256 of the encoder's shapes and its weights (as fp32). Two VAEs with the same hash give the same latents.
        channels, downscale: the number of latent channels, and of pixels per latent position along a side.
        latent_space: the shifts and factors between raw latents and what the UNet sees.
    """

    def __init__(self, module: Any, name: str, ops: Ops = REFERENCE) -> None:
        self.module = module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.name = name
        self.encoder = VaeEncoder(module, ops)
        self.channels: int = module.config.latent_channels
        self.downscale: int = 2 ** (len(module.config.block_out_channels) - 1)
        self.latent_space = LatentSpace.of(module.config, name)
        self.hash: str = _encoder_hash(module)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Vae:
        self.module.to(device=device, dtype=dtype, memory_format=torch.channels_last)
        return self

    def set_latent_space(self, space: LatentSpace) -> None:
        """Shift and scale latents otherwise from now on. The encoder, and with it the hash, stays as it is."""
        self.latent_space = space
        self.module.register_to_config(**space.settings())

    @property
    def scaling_factor(self) -> float:
        return self.latent_space.factor

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def moments(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B, 3, H, W) in [-1, 1] to the posterior's mean and log variance.

        Returns:
            (mean, log variance), each (B, C, h, w), raw (unscaled), fp32, on the VAE's device. Log variances lie in [-30, 20].

        Raises:
            ValueError: a side is not a multiple of the downscale.

        Source: Rombach et al. 2022, appendix G.
        """
        if any(side % self.downscale for side in images_B3HW.shape[2:]):
            raise ValueError(f"images are {tuple(images_B3HW.shape)}; their sides must be multiples of {self.downscale}")
        images = images_B3HW.to(self.device, self.dtype, memory_format=torch.channels_last)
        mean, logvar = self.encoder(images)
        return mean.float(), logvar.float()

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Encode images as `moments` does, and return only the mean."""
        return self.moments(images_B3HW)[0]

    def encode_fp32(self, images_B3HW: Tensor) -> Tensor:
        """Encode images in fp32, whatever the VAE's own precision is. The rare image that overflows needs this."""
        dtype = self.dtype
        try:
            self.module.to(torch.float32)
            return self.encode(images_B3HW)
        finally:
            self.module.to(dtype)

    def encoder_weights(self) -> dict[str, Tensor]:
        """Return the weights on which latents depend, by name."""
        return _weights(self.module, "encoder.", "quant_conv.")

    @property
    def decoder_hash(self) -> str:
        """sha256 of the decoder's shapes and weights, as `hash` is of the encoder's."""
        return _weights_hash(self.module, "decoder.", "post_quant_conv.")

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Decode scaled latents to images (B, 3, H, W) in [-1, 1], fp32. To limit memory, decode one image at a time."""
        raw = self.unscale(latents_BCHW.float()).to(self.device, self.dtype)
        return torch.cat([self.module.decode(raw[i : i + 1]).sample.float() for i in range(len(raw))]).clamp(-1, 1)

    def scale(self, raw_BCHW: Tensor) -> Tensor:
        """Shift and scale raw latents for the UNet."""
        return self.latent_space.scale(raw_BCHW)

    def unscale(self, latents_BCHW: Tensor) -> Tensor:
        return self.latent_space.unscale(latents_BCHW)


def _encoder_hash(module: Any) -> str:
    return _weights_hash(module, "encoder.", "quant_conv.")


def _weights_hash(module: Any, *prefixes: str) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(module, *prefixes).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights(module: Any, *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in module.state_dict().items() if name.startswith(prefixes)}
