"""Floor 2: what is learned - to tell the noise from the noised latents.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        loss = mean |eps_theta(x_t, t, text) - eps|^2

(Ho et al. 2020, equations 4 and 14.)  Noise and timestep are functions of (seed, sample position): see
`fastsd_kernels.noise`.  Shapes: B images, C latent channels, H x W positions, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import REFERENCE, Ops, noise


def alphas_cumprod(scheduler: dict[str, Any]) -> Tensor:
    """abar_t of a diffusers scheduler config: fp32 (timesteps,)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler).alphas_cumprod.float()


class Objective:
    """Noise prediction with uniform timesteps and a plain mean square.

    Args:
        alphas_cumprod: abar_t, fp32 (T,), on the training device.
        seed: of noise and timesteps.
        ops: the implementation that draws the noise.
    """

    def __init__(self, alphas_cumprod: Tensor, seed: int, ops: Ops = REFERENCE) -> None:
        self.signal, self.level = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.seed, self.ops = seed, ops

    def noised(self, latents_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents and their sample positions -> (x_t fp32, t int64 (B,), target fp32)."""
        t_B = noise.integers(self.seed, noise.Purpose.TIMESTEP, positions_B, len(self.signal))
        x_BCHW, target_BCHW = self.ops.noised(latents_BCHW, positions_B, t_B, self.signal, self.level, self.seed)
        return x_BCHW, t_B, target_BCHW

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Mean square over everything, in fp32: 0-dim."""
        return torch.nn.functional.mse_loss(prediction_BCHW.float(), target_BCHW)
