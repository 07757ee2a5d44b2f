"""Numeric health of a stage: spikes of the loss, steps skipped in a row, and a loss that has blown up.

Everything is updated on the device after each step, so the host never waits for it:

    mean, variance      of about the last 100 losses.  A loss above mean + 6 sqrt(variance) is a spike
    recent              mean of about the last 20 losses
    long_run            mean of about the last 10,000 losses.  The loss has blown up if recent > 2 long_run

Losses of skipped steps are left out, because they may be infinite or NaN.  A spike enters its own statistics clipped to the
threshold: unclipped, it would hide the next ones; left out, a loss that moves to a higher level for good would count as a spike
in every step.  The long-run mean takes a loss clipped to twice its value for the same reasons: it takes thousands of steps to
get used to a loss that has blown up, but it does.  Early on, a mean is that of all losses so far.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SPIKE = 6.0  # standard deviations
BLOWN_UP = 2.0
WARM_UP = 50  # losses of a stage before one is judged
_FIELDS = ("losses", "mean", "variance", "recent", "long_run", "spikes", "skipped_in_row", "skipped")


class LossHealth:
    """Health of the current stage."""

    def __init__(self, device: torch.device) -> None:
        self._state = torch.zeros(len(_FIELDS), dtype=torch.float64, device=device)

    def begin(self, *, carried: bool) -> None:
        """Begin a stage: with counters of zero and, unless the state of the previous one is `carried` over, no losses."""
        self._state[_FIELDS.index("spikes") if carried else 0 :] = 0

    def update(self, loss: Tensor, skipped: Tensor) -> None:
        """Add a step. `skipped` is the number of steps skipped so far."""
        losses, mean, variance, recent, long_run, spikes, skipped_in_row, skipped_before = self._state.unbind()
        loss, skipped = loss.double(), skipped.double()
        skip = skipped > skipped_before
        used = torch.isfinite(loss) & ~skip
        judged = losses >= WARM_UP
        weight = 1 / (losses + 1)
        weight_100, weight_20, weight_10000 = (weight.clamp(min=1 / count) for count in (100, 20, 10_000))

        threshold = torch.where(judged, mean + SPIKE * variance.sqrt(), torch.inf)
        change = torch.minimum(loss, threshold) - mean
        # One loss alone never counts as blown up: ten times the long-run mean raises `recent` by less than half of it.
        recent_loss = torch.where(judged, torch.minimum(loss, 10 * long_run), loss)
        long_loss = torch.where(judged, torch.minimum(loss, BLOWN_UP * long_run), loss)
        new = (
            losses + 1,
            mean + weight_100 * change,
            (1 - weight_100) * (variance + weight_100 * change * change),
            recent + weight_20 * (recent_loss - recent),
            long_run + weight_10000 * (long_loss - long_run),
            spikes + (loss > threshold),
        )
        kept = self._state[: len(new)]
        in_row = torch.where(skip, skipped_in_row + 1, 0.0)
        self._state.copy_(torch.cat((torch.where(used, torch.stack(new), kept), torch.stack((in_row, skipped)))))

    def scalars(self) -> dict[str, Tensor]:
        """Return the number of spikes, and of the latest steps that were all skipped, 0-dim on the device."""
        return {"spikes": self._state[5], "skipped_in_row": self._state[6]}

    def problem(self) -> str | None:
        """Return None if the run is healthy, otherwise a short description of the problem. Waits for the device."""
        losses, _, _, recent, long_run, _, skipped_in_row, _ = self._state.tolist()
        if skipped_in_row:
            return "steps are being skipped"
        if losses >= WARM_UP and recent > BLOWN_UP * long_run:
            return f"the loss is about {recent:.3g}, and its long-run mean {long_run:.3g}"
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return {"loss_health": self._state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state. A checkpoint of an older version has none, so the statistics start again."""
        if "loss_health" in state:
            self._state.copy_(state["loss_health"])
        elif "skipped" in state:
            self._state[-1] = state["skipped"].double()
