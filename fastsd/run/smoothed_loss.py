"""The smoothed loss of a run, on its device: it is updated every step and nothing waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DECAY = 0.99  # an average over about the last 100 steps


class SmoothedLoss:
    """An exponential average of the finite losses, weighted so that its start counts no more than the rest.

    Args:
        saved: entries "loss" and "weight" of a checkpoint, or none of them.
    """

    def __init__(self, saved: Mapping[str, Tensor], device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self._loss, self._weight = (saved.get(key, zero).to(device, copy=True) for key in ("loss", "weight"))

    def update(self, loss: Tensor) -> None:
        """Take in the loss of a step; one that is not finite changes nothing."""
        finite = torch.isfinite(loss)
        self._loss.copy_(torch.where(finite, DECAY * self._loss + (1 - DECAY) * loss.double(), self._loss))
        self._weight.copy_(torch.where(finite, DECAY * self._weight + (1 - DECAY), self._weight))

    def value(self) -> Tensor:
        """The average, fp64 on the device; nan before the first finite loss."""
        return self._loss / self._weight

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {"loss": self._loss, "weight": self._weight}
