"""A complete model: UNet, text encoder, VAE, and the settings of the noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastsd.config.schema import LoraTable
from fastsd.model.flow_schedule import flow_scheduler, is_flow
from fastsd.model.text_encoder import TextEncoder
from fastsd.model.unet import UNet
from fastsd.model.vae import Vae

SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip
_ZERO_SNR_CLASSES = (  # diffusers' schedulers that read rescale_betas_zero_snr; the others ignore it
    "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler",
    "DPMSolverMultistepScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def usable_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler_config.json with which diffusers samples from the noise schedule that the config describes.

    With zero terminal SNR, samples must start at the last timestep (Lin et al. 2024, section 3.3), and the scheduler must be
    one that supports the schedule, which SD1.5's PNDM does not. A flow's is that of `flow_scheduler`. Other configs are
    returned as they are.
    """
    usable = dict(config)
    if is_flow(config):
        return flow_scheduler(config)
    if not config.get("rescale_betas_zero_snr"):
        return usable
    if config.get("_class_name") not in _ZERO_SNR_CLASSES:
        usable.pop("skip_prk_steps", None)  # only PNDM has it
        usable["_class_name"] = "DDIMScheduler"
    return usable | {"timestep_spacing": "trailing", "clip_sample": False}


@dataclass
class Model:
    """The components that generate an image, and the settings of the noise schedule in diffusers' form.

    Attributes:
        notes: messages for the user about this model, one sentence each.
        lora: the settings of the model's adapters (`fastsd/model/lora.py`), or None without adapters.
        precision: precision in which `generate` computes; "" = that of PyTorch's current switches, as in a run.
    """

    name: str
    unet: UNet
    text: TextEncoder
    vae: Vae
    scheduler: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    lora: LoraTable | None = None
    precision: str = ""

    @property
    def prediction(self) -> str:
        """The quantity that the UNet predicts from x_t: "epsilon", "v_prediction", or "flow" (eps - x_0)."""
        return "flow" if is_flow(self.scheduler) else self.scheduler.get("prediction_type", "epsilon")

    def component(self, name: str) -> torch.nn.Module:
        """Return the module of a trainable component, "unet" or "text_encoder"."""
        return self.unet if name == "unet" else self.text.module

    def trainable(self, name: str) -> set[str]:
        """Return the names of a component's parameters that affect the prediction. `clip_skip` excludes the last layers."""
        return set(dict(self.unet.named_parameters())) if name == "unet" else self.text.used_parameters()
