"""Scheduler configs of rectified flows, whose x_s = (1 - s) x_0 + s eps with s in [0, 1] has no noise schedule.

The UNet is told t = T s, with T = `num_train_timesteps`. `FlowMatchEulerDiscreteScheduler` of diffusers lacks attributes that
`StableDiffusionPipeline` reads. So the config of a model names DPM++, which that pipeline loads and samples flows with.
Sampling has s -> k s / (1 + (k - 1) s) in place of equal steps; k is the shift (Esser et al. 2024, "Scaling rectified flow
transformers", equation 23).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLOW = "flow_prediction"  # diffusers' name
TIMESTEPS = 1000


def timesteps_of(scheduler: Mapping[str, Any]) -> int:
    """Return the number of timesteps of a scheduler config, of a flow or not."""
    return int(scheduler.get("num_train_timesteps", TIMESTEPS))


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Return True for the scheduler config of a flow, also one whose class samples nothing else."""
    return scheduler.get("prediction_type") == FLOW or str(scheduler.get("_class_name", "")).startswith("FlowMatch")


def shift_of(scheduler: Mapping[str, Any]) -> float:
    """Return the shift of a flow's scheduler config, of any class."""
    return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)


def flow_scheduler(scheduler: Mapping[str, Any], shift: float | None = None) -> dict[str, Any]:
    """Return the scheduler config of a flow with as many timesteps as another config. Without a shift, it keeps a flow's."""
    config: dict[str, Any] = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": FLOW, "use_flow_sigmas": True}
    config["num_train_timesteps"] = timesteps_of(scheduler)
    return config | {"flow_shift": shift or (shift_of(scheduler) if is_flow(scheduler) else 1.0)}


def shifted(s: Any, shift: float) -> Any:
    """Compute k s / (1 + (k - 1) s) for a number or a tensor in [0, 1]."""
    return shift * s / (1 + (shift - 1) * s)
