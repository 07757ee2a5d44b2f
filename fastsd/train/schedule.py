"""What follows a schedule - the learning rate of a step, the decay of the average, and when something is due."""

from __future__ import annotations

import math

from fastsd.config.schema import StageTable
from fastsd.config.stages import Amount, parse_amount, steps_of
from fastsd.errors import UserError


def learning_rate(stage: StageTable, step: int, total: int, part: str) -> float:
    """lr of a part in step `step` (from 0) of `total`: a linear warm-up, full at its last step, then the schedule.

    With x the share of a cycle that is done, from 0 to below 1, and a cycle one of restarts + 1 equal parts of what follows
    the warm-up:

        linear   1 - x
        cosine   (1 + cos(pi x)) / 2
        rex      (1 - x) / (1 - x / 2)

    from 1 at the first step of a cycle to `lr_floor`, which it would reach one step after its last.

    Source: Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", equation 5; Chen, Wolfe and
    Kyrillidis 2022, "REX: revisiting budgeted training with an improved schedule", section 3.
    """
    warmup, rate = stage.warmup_steps(total), stage.rate_of(part)
    if step < warmup:
        return rate * (step + 1) / warmup
    if stage.schedule == "constant":
        return rate
    done = (step - warmup) / max(total - warmup, 1) * (stage.restarts + 1)
    x = min(done, stage.restarts + 1 - 1e-9) % 1
    left = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "rex": (1 - x) / (1 - x / 2)}[stage.schedule]
    return rate * (stage.lr_floor + (1 - stage.lr_floor) * left)


def check_length(stage: StageTable, name: str, epoch: int) -> int:
    """The steps of a stage with so many images an epoch. Raises UserError for a warm-up that is longer."""
    total = stage.steps(epoch)
    if stage.warmup_steps(total) > total:
        raise UserError(
            f"stage {name!r}: warmup is {stage.warmup:g} steps and until {stage.until!r} comes to {total}, with {epoch} images "
            "an epoch; shorten it, or write a share: 0.1"
        )
    return total


def ema_decay(stage: StageTable, step: int) -> float:
    """Decay of the average in step `step` (from 0) since it began: average = decay average + (1 - decay) weights.

    0 for the first `ema_after` steps, for the average to be the weights; then `ema`, at most 1 - (1 + n)^-ema_power in the
    n-th step (from 1) with a warm-up.

    Source: the warm-up of timm's and diffusers' averages; a power of 2/3 suits a million steps, 3/4 some ten thousand.
    """
    after = step - stage.ema_after
    if after < 0:
        return 0.0
    return min(stage.ema, 1 - (2 + after) ** -stage.ema_power) if stage.ema_power else stage.ema


class Every:
    """When something is due that a stage does every so many steps, epochs, images or seconds.

    Args:
        key, amount: what a config says, see `fastsd.config.stages.parse_amount`; 0 = never.
        batch: images a step.
        epoch: images an epoch.
        seconds: how long the stage has run.
    """

    def __init__(self, key: str, amount: Amount, batch: int, epoch: int, seconds: float = 0.0) -> None:
        self._batch, self._images, self._seconds, self._last = batch, 0.0, 0.0, seconds
        if amount != 0:
            number, unit = parse_amount(key, amount)
            if unit == "seconds":
                self._seconds = number
            else:
                self._images = number * {"steps": batch, "epochs": epoch, "images": 1}[unit]

    def due(self, step: int, seconds: float) -> bool:
        """Whether step number `step` of the stage (from 1), done after `seconds` of it, has reached or passed a multiple."""
        if self._images:
            return int(step * self._batch / self._images + 1e-9) > int((step - 1) * self._batch / self._images + 1e-9)
        if self._seconds and seconds - self._last >= self._seconds:
            self._last = seconds
            return True
        return False


def points(stage: StageTable, epoch: int) -> set[int]:
    """The steps of a stage, from 1, after which `checkpoint_at` wants a checkpoint."""
    return {steps_of("checkpoint_at", point, stage.batch, epoch) or 0 for point in stage.checkpoint_at}
