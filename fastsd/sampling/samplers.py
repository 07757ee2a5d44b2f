"""The samplers: diffusers' schedulers, from any start and with any number of steps.

T is the number of timesteps that a model was trained with, N that of the sampling steps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

SAMPLERS = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}  # fmt: skip


def make_sampler(name: str, config: dict[str, Any], steps: int, device: torch.device) -> Any:
    """Create a diffusers scheduler by its short name, with the noise schedule and prediction type of a scheduler config.

    Its timesteps are diffusers' own wherever these work. With "leading" spacing, they are a whole number floor(T / N) apart and
    count up from 0, so above T / 2 steps they would begin at timestep N, far below the noise that images start from, and at
    N = T beyond the table. DPM++ leads with N + 1 timesteps, and at N = T its "linspace" spacing has one timestep twice, whose
    step of length 0 is a division by 0. In these cases the spacing is "trailing": T / N apart, down from the last timestep.
    """
    import diffusers

    scheduler = getattr(diffusers, SAMPLERS[name]).from_config(config, **sampler_options(name))
    total = scheduler.config.num_train_timesteps
    leads = scheduler.config.timestep_spacing == "leading" and total // (steps + (name == "dpm++")) < 2
    if leads or steps == total:
        scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def sampler_options(name: str) -> dict[str, bool]:
    """Return what a sampler's scheduler needs besides the model's scheduler config."""
    # Latents are not bounded by 1, but DDIM clips by default if the config does not mention clipping.
    return {"clip_sample": False} if name == "ddim" else {}


def begin_at(scheduler: Any, start: int) -> None:
    """Make a sampler start at any timestep, with steps as long as when it starts from pure noise.

    In contrast, diffusers' image-to-image starts at one of the sampler's own timesteps, which may be far from `start`.
    """
    total, steps = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    # Up to T / 2 steps, DDIM supports no other length than a whole number. Above, that would be 1, and N steps too many.
    length = total // steps if 2 * steps <= total else total / steps
    timesteps = (start - torch.arange(int(start / length) + 1, dtype=torch.float64) * length).round().long()
    scheduler.timesteps = timesteps.to(scheduler.timesteps)
    if hasattr(scheduler, "sigmas"):
        abar = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), scheduler.sigmas[-1:]])


def step_lengths(scheduler: Any) -> list[int]:
    """Return the value of `num_inference_steps` for each step of DDIM above T / 2 steps, otherwise none.

    DDIM takes each step to the timestep t - floor(T / num_inference_steps). The timesteps are 1 or 2 apart there.
    """
    total, steps = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    if hasattr(scheduler, "sigmas") or 2 * steps <= total:
        return []
    timesteps = [*scheduler.timesteps.tolist(), -1]
    return [total // (t - following) for t, following in pairwise(timesteps)]
