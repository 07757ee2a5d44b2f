"""A whole model - UNet, text encoder, VAE - and the settings of its noise schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fastsd.config.schema import LoraTable
from fastsd.model.text_encoder import TextEncoder
from fastsd.model.unet import UNet
from fastsd.model.vae import Vae

SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip


@dataclass
class Model:
    """Everything that makes an image: the parts, and the settings of the noise schedule, as diffusers has them.

    Attributes:
        notes: what a user should know of it, a sentence each.
        lora: the adapters that it has (`fastsd/model/lora.py`).
    """

    name: str
    unet: UNet
    text: TextEncoder
    vae: Vae
    scheduler: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    lora: LoraTable | None = None

    @property
    def prediction(self) -> str:
        """What the UNet tells of x_t: "epsilon" or "v_prediction"."""
        return self.scheduler.get("prediction_type", "epsilon")

    def part(self, name: str) -> torch.nn.Module:
        """The trainable module called "unet" or "text_encoder"."""
        return self.unet if name == "unet" else self.text.module

    def trainable(self, name: str) -> set[str]:
        """Names of a part's parameters that the prediction depends on: clip_skip leaves out the last layers."""
        return {name for name, _ in self.unet.named_parameters()} if name == "unet" else self.text.used_parameters()
