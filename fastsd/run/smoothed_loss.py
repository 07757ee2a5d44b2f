"""The smoothed loss of a run. It is updated on the device after every step, so the host never waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DECAY = 0.99  # averages over about the last 100 steps


class SmoothedLoss:
    """Exponential moving average of the finite losses. Dividing by the sum of weights corrects the bias at the start.

    Args:
        saved: tensors of a checkpoint, with or without the entries "loss" and "weight".
    """

    def __init__(self, saved: Mapping[str, Tensor], device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self._loss, self._weight = (saved.get(key, zero).to(device, copy=True) for key in ("loss", "weight"))

    def update(self, loss: Tensor) -> None:
        """Add the loss of a step. A loss that is not finite is ignored."""
        finite = torch.isfinite(loss)
        self._loss.copy_(torch.where(finite, DECAY * self._loss + (1 - DECAY) * loss.double(), self._loss))
        self._weight.copy_(torch.where(finite, DECAY * self._weight + (1 - DECAY), self._weight))

    def value(self) -> Tensor:
        """Return the average, 0-dim fp64 on the device. It is nan before the first finite loss."""
        return self._loss / self._weight

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store in a checkpoint."""
        return {"loss": self._loss, "weight": self._weight}
