"""The smoothed loss of a run. It is updated on the device after every step, so the host never waits for it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DECAY = 0.99  # averages over about the last 100 steps


class SmoothedLoss:
    """Exponential moving average of the finite losses. Dividing by the sum of weights corrects the bias at the start."""

    def __init__(self, device: torch.device) -> None:
        self._loss, self._weight = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    def update(self, loss: Tensor) -> None:
        """Add the loss of a step. A loss that is not finite is ignored."""
        finite = torch.isfinite(loss)
        self._loss.copy_(torch.where(finite, DECAY * self._loss + (1 - DECAY) * loss.double(), self._loss))
        self._weight.copy_(torch.where(finite, DECAY * self._weight + (1 - DECAY), self._weight))

    def value(self) -> Tensor:
        """Return the average, 0-dim fp64 on the device. It is nan before the first finite loss."""
        return self._loss / self._weight

    def state_dict(self) -> dict[str, Tensor]:
        return {"loss": self._loss, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            if name in state:  # missing at the start of a run
                tensor.copy_(state[name])
