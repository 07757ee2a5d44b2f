"""The samplers: diffusers' schedulers, from any start and with any number of steps.

T is the number of timesteps that a model was trained with, N that of the sampling steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import UserError
from fastsd.model.flow_schedule import flow_scheduler, is_flow, timesteps_of

SAMPLERS = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}  # fmt: skip
FLOW_SAMPLERS = {
    "euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
}  # fmt: skip


def class_of(name: str, config: Mapping[str, Any]) -> str:
    """Return the name of diffusers' class for a sampler of a model with this scheduler config.

    Raises:
        UserError: the sampler does not sample such models.
    """
    flow = is_flow(config)
    usable = FLOW_SAMPLERS if flow else SAMPLERS
    if name not in usable:
        kind = "a flow" if flow else "no flow"
        raise UserError(
            "sampler-of-flow", f"the sampler is {name!r} and the model is {kind}; use {', '.join(map(repr, usable))}"
        )
    return usable[name]


def make_sampler(name: str, config: dict[str, Any], steps: int, device: torch.device) -> Any:
    """Create a diffusers scheduler by its short name, with the noise schedule and prediction type of a scheduler config.

    A flow's timesteps are diffusers' own, which DPM++ rounds down to whole numbers.

    Other timesteps are, too, wherever these work. With "leading" spacing, they are a whole number floor(T / N) apart and
    count up from 0, so above T / 2 steps they would begin at timestep N, far below the noise that images start from, and at
    N = T beyond the table. DPM++ leads with N + 1 timesteps, and at N = T its "linspace" spacing has one timestep twice, whose
    step of length 0 is a division by 0. In these cases the spacing is "trailing": T / N apart, down from the last timestep.
    """
    import diffusers

    scheduler_class = getattr(diffusers, class_of(name, config))
    if is_flow(config):
        scheduler = scheduler_class(num_train_timesteps=timesteps_of(config), **sampler_options(name, config))
        scheduler.set_timesteps(steps, device=device)
        scheduler.set_begin_index(0)  # not searched by timestep: many steps with a shift have some timesteps twice
        return scheduler
    scheduler = scheduler_class.from_config(config, **sampler_options(name, config))
    total = scheduler.config.num_train_timesteps
    leads = scheduler.config.timestep_spacing == "leading" and total // (steps + (name == "dpm++")) < 2
    if leads or steps == total:
        scheduler.register_to_config(timestep_spacing="trailing")
    scheduler.set_timesteps(steps, device=device)
    return scheduler


def sampler_options(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sampler's scheduler needs besides the model's scheduler config, or for a flow, besides its timesteps."""
    if is_flow(config):
        flow = flow_scheduler(config)
        keys = ("prediction_type", "use_flow_sigmas", "flow_shift")
        return {key: flow[key] for key in keys} if name == "dpm++" else {"shift": flow["flow_shift"]}
    # Latents are not bounded by 1, but DDIM clips by default if the config does not mention clipping.
    return {"clip_sample": False} if name == "ddim" else {}


def begin_at(scheduler: Any, start: int) -> None:
    """Make a sampler start at any timestep, with steps as long as when it starts from pure noise.

    In contrast, diffusers' image-to-image starts at one of the sampler's own timesteps, which may be far from `start`.
    """
    total, steps = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    if _samples_flow(scheduler):
        return _begin_flow_at(scheduler, start / total)
    # Up to T / 2 steps, DDIM supports no other length than a whole number. Above, that would be 1, and N steps too many.
    length = total // steps if 2 * steps <= total else total / steps
    timesteps = (start - torch.arange(int(start / length) + 1, dtype=torch.float64) * length).round().long()
    scheduler.timesteps = timesteps.to(scheduler.timesteps)
    if hasattr(scheduler, "sigmas"):
        abar = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), scheduler.sigmas[-1:]])


def _begin_flow_at(scheduler: Any, s: float) -> None:
    """Keep of a flow's steps those below s, and make s the first."""
    later = scheduler.sigmas[1:-1]
    sigmas = torch.cat([later.new_tensor([s]), later[later < s]])
    scheduler.timesteps = (sigmas * scheduler.config.num_train_timesteps).to(scheduler.timesteps)
    scheduler.sigmas = torch.cat([sigmas, scheduler.sigmas[-1:]])


def add_noise(scheduler: Any, latents_BCHW: Tensor, eps_BCHW: Tensor) -> Tensor:
    """Add the noise of the first step of a sampler to scaled latents."""
    if _samples_flow(scheduler):
        s = float(scheduler.sigmas[0])
        return (1 - s) * latents_BCHW + s * eps_BCHW
    noisy_BCHW: Tensor = scheduler.add_noise(latents_BCHW, eps_BCHW, scheduler.timesteps[:1].expand(len(latents_BCHW)))
    return noisy_BCHW


def _samples_flow(scheduler: Any) -> bool:
    return is_flow({"_class_name": type(scheduler).__name__, **scheduler.config})


def step_lengths(scheduler: Any) -> list[int]:
    """Return the value of `num_inference_steps` for each step of DDIM above T / 2 steps, otherwise none.

    DDIM takes each step to the timestep t - floor(T / num_inference_steps). The timesteps are 1 or 2 apart there.
    """
    total, steps = scheduler.config.num_train_timesteps, scheduler.num_inference_steps
    if hasattr(scheduler, "sigmas") or 2 * steps <= total:
        return []
    timesteps = [*scheduler.timesteps.tolist(), -1]
    return [total // (t - following) for t, following in pairwise(timesteps)]
