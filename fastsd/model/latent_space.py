"""The one place that turns a VAE's raw latents into what the UNet sees, and back.

Every channel c is shifted and scaled on its own:

    z_c = (raw_c - shift_c) * scale_c                raw_c = z_c / scale_c + shift_c

    config.json of the VAE                       shift_c           scale_c
    scaling_factor                               0                 scaling_factor                    SD1.5, SDXL
    scaling_factor, shift_factor                 shift_factor      scaling_factor                    SD3, Flux.1
    scaling_factor, latents_mean, latents_std    latents_mean[c]   scaling_factor / latents_std[c]   diffusers' SDXL pipeline

Flux.2's statistics are brought into the third form when its VAE is read (`formats/flux2_vae.py`). The factor belongs to the VAE
(0.18215 for SD1.5, 0.13025 for SDXL). Using another VAE's factor gives wrong colours.

Shapes: B images, C latent channels of h x w positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import UserError

SD15_SCALING_FACTOR = 0.18215
SHIFTS = {0.3611: 0.1159, 1.5305: 0.0609}  # of Flux.1's and SD3's VAE, by their factors


@dataclass(frozen=True)
class LatentSpace:
    """The constants of a VAE's latents. `mean` and `std` are empty, or have one number per channel; then `shift` is 0."""

    factor: float = SD15_SCALING_FACTOR
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any], place: str) -> LatentSpace:
        """Read the constants from a VAE's config.

        Raises:
            UserError: naming `place`, the constants are not valid, or contradict each other.
        """
        factor = SD15_SCALING_FACTOR if config.get("scaling_factor") is None else config["scaling_factor"]
        shift = 0.0 if config.get("shift_factor") is None else config["shift_factor"]
        if not all(_is_number(value) for value in (factor, shift)) or not factor:
            raise UserError(
                "vae-factor",
                f"{place}: scaling_factor is {factor!r}, shift_factor is {shift!r}; give finite numbers, factor not 0",
            )
        mean, std = (_statistics(config, name, place) for name in ("latents_mean", "latents_std"))
        if bool(mean) != bool(std):
            present, missing = ("latents_mean", "latents_std") if mean else ("latents_std", "latents_mean")
            raise UserError("vae-statistics-half", f"{place}: has {present} but no {missing}; give both or neither")
        if mean and shift:
            raise UserError(
                "vae-shift-and-mean",
                f"{place}: has shift_factor {shift:g} and latents_mean, which both shift the latents; remove one of them",
            )
        return cls(factor, shift, mean, std)

    @property
    def is_scaled_only(self) -> bool:
        """True if one factor describes the space, the only constant that diffusers' StableDiffusionPipeline reads."""
        return not self.shift and not self.std

    def scale(self, raw_BCHW: Tensor) -> Tensor:
        """Scale raw latents for the UNet, in their own dtype and on their device."""
        shift, scale = self._constants(raw_BCHW)
        return (raw_BCHW - shift) * scale

    def unscale(self, latents_BCHW: Tensor) -> Tensor:
        """Return the raw latents of what the UNet sees."""
        shift, scale = self._constants(latents_BCHW)
        return latents_BCHW / scale + shift

    def _constants(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        if not self.std:
            return self.shift, self.factor
        scales = tuple(self.factor / std for std in self.std)
        return _channels(self.mean, like.device, like.dtype), _channels(scales, like.device, like.dtype)

    def per_channel(self, channels: int) -> tuple[Tensor, Tensor]:
        """Return shift and scale of each channel, fp64 (C)."""
        if not self.std:
            shift, scale = (torch.full((channels,), value, dtype=torch.float64) for value in (self.shift, self.factor))
            return shift, scale
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return mean, self.factor / std

    def overall_factor(self, std_C: Sequence[float]) -> float:
        """Return the single factor that would give raw latents with these deviations the same overall deviation."""
        if not self.std:
            return self.factor
        scaled = (value * self.factor / std for value, std in zip(std_C, self.std, strict=True))
        return math.sqrt(math.fsum(value**2 for value in scaled) / math.fsum(value**2 for value in std_C))

    def settings(self) -> dict[str, Any]:
        """Return the keys of config.json that describe the space."""
        statistics = {"latents_mean": list(self.mean) or None, "latents_std": list(self.std) or None}
        return {"scaling_factor": self.factor, "shift_factor": self.shift or None, **statistics}

    def __str__(self) -> str:
        text = f"scaling factor {self.factor:g}" + (f", shift {self.shift:g}" if self.shift else "")
        return text + (", mean and deviation of each channel" if self.std else "")


@lru_cache(maxsize=64)
def _channels(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return one number per channel, (C, 1, 1). Cached, so that a step copies nothing to its device."""
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)[:, None, None]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _statistics(config: Mapping[str, Any], name: str, place: str) -> tuple[float, ...]:
    """Return a VAE's `latents_mean` or `latents_std`, or () if the config has none."""
    values = config.get(name)
    if values is None:
        return ()
    channels = config.get("latent_channels", 4)
    if not isinstance(values, list | tuple) or len(values) != channels:
        count = len(values) if isinstance(values, list | tuple) else repr(values)
        raise UserError(
            "vae-statistics-length",
            f"{place}: {name} has {count} values, but there are {channels} latent channels; give {channels}",
        )
    for channel, value in enumerate(values):
        if not _is_number(value) or (name == "latents_std" and value <= 0):
            expected = "a number above 0" if name == "latents_std" else "a finite number"
            raise UserError("vae-statistics-value", f"{place}: {name} is {value!r} in channel {channel}; give {expected}")
    return tuple(map(float, values))
