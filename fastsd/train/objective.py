"""Floor 2: what is learned - to tell the noise from the noised latents.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        loss = mean |eps_theta(x_t, t, text) - eps|^2

(Ho et al. 2020, equations 4 and 14.)  Noise and timestep are functions of (seed, sample position): see
`fastsd_kernels.noise`.  Shapes: B images, C latent channels, H x W positions, L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsd_kernels import noise


def alphas_cumprod(scheduler: dict[str, Any]) -> Tensor:
    """abar_t of a diffusers scheduler config: fp32 (timesteps,)."""
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(scheduler).alphas_cumprod.float()


class Objective:
    """Noise prediction with uniform timesteps and a plain mean square.

    Args:
        alphas_cumprod: abar_t, fp32 (T,), on the training device.
        seed: of noise and timesteps.
    """

    def __init__(self, alphas_cumprod: Tensor, seed: int) -> None:
        self.signal, self.noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.seed = seed

    def noised(self, latents_BCHW: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled latents and their sample positions -> (x_t fp32, t int64 (B,), target fp32)."""
        t_B = noise.integers(self.seed, noise.Purpose.TIMESTEP, positions_B, len(self.signal))
        eps_BCHW = noise.normal(self.seed, noise.Purpose.NOISE, positions_B, tuple(latents_BCHW.shape[1:]))
        signal, level = self.signal[t_B][:, None, None, None], self.noise[t_B][:, None, None, None]
        return signal * latents_BCHW + level * eps_BCHW, t_B, eps_BCHW

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Mean square over everything, in fp32: 0-dim."""
        return torch.nn.functional.mse_loss(prediction_BCHW.float(), target_BCHW)
