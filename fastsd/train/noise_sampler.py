"""Sampling of the noise that is mixed with latents: standard normal, or modified as a stage asks.

The modifications that a stage enables are applied in this order, each to the result of the previous one:

    1. immiscible          draw several standard normal noises and choose the one nearest to the image
    2. pyramid_noise       add coarser noises and rescale the sum to unit standard deviation
    3. noise_offset        add one number per channel
    4. input_perturbation  add more standard normal noise to the input only; the target stays the result of 1 to 3

Every number comes from the counter-based generator keyed by (seed, sample position), so the noise of an image is the same in
any batch.  Shapes: B images, K noises to choose from, C latent channels, H x W positions.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsd.config.keys import NOISE, defaults, keys_with
from fastsd.config.stages import StageTable
from fastsd_kernels import Ops
from fastsd_kernels.noise import Purpose


class NoiseSampler:
    """The noise sampler of a stage.

    Attributes:
        plain: True if the noise is unmodified standard normal noise, which `Ops.add_noise` generates itself.
    """

    def __init__(self, stage: StageTable, seed: int, ops: Ops) -> None:
        self.seed, self.ops = seed, ops
        # Only keys that are declared as NOISE can be read here, so no other key can modify the noise.
        plain_settings = defaults(StageTable, keys_with(StageTable, NOISE))
        self.settings = SimpleNamespace(**{key: getattr(stage, key) for key in plain_settings})
        self.plain = vars(self.settings) == plain_settings

    def __call__(self, latents_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draw noise for fp32 latents at their sample positions: (eps to predict, eps in the input), both fp32 (B, C, H, W).

        Input perturbation adds gamma xi with standard normal xi (Ning et al. 2023, "Input perturbation reduces exposure bias
        in diffusion models", algorithm 1).  A noise offset adds sigma n_c, constant over a channel (Guttenberg 2023,
        "Diffusion with offset noise").
        """
        settings = self.settings
        channels, height, width = latents_BCHW.shape[1:]
        eps_BCHW = self._nearest(latents_BCHW, positions_B)
        if settings.pyramid_noise:
            eps_BCHW = self._add_pyramid(eps_BCHW, positions_B)
        if settings.noise_offset:
            eps_BCHW = eps_BCHW + settings.noise_offset * self._draw(Purpose.OFFSET, positions_B, channels, 1, 1)
        if not settings.input_perturbation:
            return eps_BCHW, eps_BCHW
        perturbation_BCHW = self._draw(Purpose.PERTURBATION, positions_B, channels, height, width)
        return eps_BCHW, eps_BCHW + settings.input_perturbation * perturbation_BCHW

    def _draw(self, purpose: Purpose, positions_B: Tensor, *shape: int) -> Tensor:
        return self.ops.normal(self.seed, purpose, positions_B, shape)

    def _nearest(self, latents_BCHW: Tensor, positions_B: Tensor) -> Tensor:
        """Draw `immiscible` standard normal noises, the first of them plain, and choose the one nearest to the latents in L2.

        Source: Li et al. 2025, "Improved immiscible diffusion", in the k-nearest form, where each image has its own noises.
        Rejected: Li et al. 2024, "Immiscible diffusion". It assigns noises within a batch, so noise depends on the batch.
        """
        shape = tuple(latents_BCHW.shape[1:])
        more = self.settings.immiscible - 1
        plain_BCHW = self._draw(Purpose.NOISE, positions_B, *shape)
        if not more:
            return plain_BCHW
        all_BKCHW = torch.cat((plain_BCHW[:, None], self._draw(Purpose.IMMISCIBLE, positions_B, more, *shape)), dim=1)
        # In fp64, the order of summation, which depends on the batch size on a GPU, cannot change the choice.
        distance_BK = (all_BKCHW - latents_BCHW[:, None]).square().flatten(2).sum(2, dtype=torch.float64)
        return all_BKCHW[torch.arange(len(all_BKCHW), device=all_BKCHW.device), distance_BK.argmin(1)]

    def _add_pyramid(self, eps_BCHW: Tensor, positions_B: Tensor) -> Tensor:
        """Add strength^i times noise at 1 / 2^i of the size, stretched bilinearly, for i = 1, 2, ... down to a side of 1.

        The sum is divided by its theoretical standard deviation over images and positions, a function of size and strength.
        If it were divided by the standard deviation of the sample, it would not be normal and would depend on the batch.

        Source: Whitaker 2023, "Multi-resolution noise for diffusion model training", where each factor is random in [2, 4).
        """
        strength = self.settings.pyramid_noise
        channels, height, width = eps_BCHW.shape[1:]
        sides = [(height >> i, width >> i) for i in range(1, min(height, width).bit_length())]
        counts = [channels * h * w for h, w in sides]
        levels = self._draw(Purpose.PYRAMID, positions_B, sum(counts)).split(counts, dim=1)
        variance = 1.0
        for i, (level, (h, w)) in enumerate(zip(levels, sides, strict=True), start=1):
            coarse_BCHW = level.unflatten(1, (channels, h, w))
            stretched_BCHW = F.interpolate(coarse_BCHW, size=(height, width), mode="bilinear")
            eps_BCHW = eps_BCHW + strength**i * stretched_BCHW
            variance += strength ** (2 * i) * _stretched_variance(h, height) * _stretched_variance(w, width)
        return eps_BCHW / math.sqrt(variance)


@cache
def _stretched_variance(count: int, stretched: int) -> float:
    """Return the mean variance of `stretched` positions interpolated linearly from `count` standard normal numbers."""
    total = 0.0
    for i in range(stretched):
        source = min(max((i + 0.5) * count / stretched - 0.5, 0.0), count - 1.0)
        weight = source % 1
        total += weight**2 + (1 - weight) ** 2  # the variance of a weighted sum
    return total / stretched
