"""Schedules: the learning rate of a step, the decay of the EMA, and the steps after which recurring actions are due."""

from __future__ import annotations

import math

from fastsd.config.stages import Amount, StageTable, parse_amount, steps_of
from fastsd.errors import UserError


def learning_rate(stage: StageTable, step: int, total: int, component: str) -> float:
    """Compute the lr of a component in step `step` (from 0) of `total`.

    A linear warm-up reaches the full lr at its last step.  The steps after it are divided into restarts + 1 equal cycles.
    If x in [0, 1) is the completed fraction of a cycle, the schedules are

        linear   1 - x
        cosine   (1 + cos(pi x)) / 2
        rex      (1 - x) / (1 - bend x)        bend 1/2

    scaled so that they fall from 1 at the first step of a cycle to `lr_floor`, one step after its last.

    Source: Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts", equation 5; Chen, Wolfe and
    Kyrillidis 2022, "REX: revisiting budgeted training with an improved schedule", section 3.
    """
    warmup, rate = stage.warmup_steps(total), stage.rate_of(component)
    if step < warmup:
        return rate * (step + 1) / warmup
    if stage.schedule == "constant":
        return rate
    cycles = (step - warmup) / max(total - warmup, 1) * (stage.restarts + 1)
    x = min(cycles, stage.restarts + 1 - 1e-9) % 1
    rex = (1 - x) / (1 - stage.rex_bend * x)
    remaining = {"linear": 1 - x, "cosine": (1 + math.cos(math.pi * x)) / 2, "rex": rex}[stage.schedule]
    return rate * (stage.lr_floor + (1 - stage.lr_floor) * remaining)


def check_length(stage: StageTable, name: str, epoch: int) -> int:
    """Return the number of steps of a stage with `epoch` images per epoch. Raises UserError if the warm-up is longer."""
    total = stage.steps(epoch)
    if stage.warmup_steps(total) > total:
        raise UserError(
            "warmup-too-long",
            f"stage {name!r}: warmup is {stage.warmup:g} steps, but the stage has only {total} (until is {stage.until!r}, with "
            f"{epoch} images per epoch); lower warmup, or give a fraction such as 0.1",
        )
    return total


def ema_decay(stage: StageTable, step: int) -> float:
    """Compute the EMA decay in step `step` (from 0) since the EMA started: EMA = decay EMA + (1 - decay) weights.

    The decay is 0 for the first `ema_after` steps, in which the EMA equals the weights.  After them it is `ema`, and with a
    warm-up at most 1 - (1 + n)^-ema_power in the n-th step (from 1).

    Source: the EMA warm-up of timm and diffusers.  A power of 2/3 suits a million steps, and 3/4 some ten thousand.  diffusers
    copies the weights in the first step, and is one step behind after it.
    """
    averaged_steps = step - stage.ema_after
    assert isinstance(stage.ema, float)
    if averaged_steps < 0:
        return 0.0
    return min(stage.ema, 1 - (2 + averaged_steps) ** -stage.ema_power) if stage.ema_power else stage.ema


class Interval:
    """A recurring trigger of a stage, with an interval in steps, epochs, images or seconds.

    Args:
        key, amount: a config key and its value (see `fastsd.config.stages.parse_amount`); 0 = never.
        batch: images per step.
        epoch: images per epoch.
        seconds: seconds that the stage has already run.
    """

    def __init__(self, key: str, amount: Amount, batch: int, epoch: int, seconds: float = 0.0) -> None:
        self._batch, self._last_due = batch, seconds
        self._interval_images = self._interval_seconds = 0.0
        if amount != 0:
            number, unit = parse_amount(key, amount)
            if unit == "seconds":
                self._interval_seconds = number
            else:
                self._interval_images = number * {"steps": batch, "epochs": epoch, "images": 1}[unit]

    @classmethod
    def part(cls, stage: StageTable, total: int, count: int, seconds: float = 0.0) -> Interval:
        """Return the interval that divides a stage of `total` steps into `count` equal parts, by time if it ends by time."""
        interval = cls("until", 0, stage.batch, 1, seconds)
        if count and stage.seconds is None:
            interval._interval_images = total * stage.batch / count
        elif count and stage.seconds is not None:
            interval._interval_seconds = stage.seconds / count
        return interval

    def count(self, steps: int) -> int:
        """Return how many of the first `steps` steps complete an interval; 0 for an interval in seconds."""
        return int(steps / max(self._interval_images / self._batch, 1.0) + 1e-9) if self._interval_images else 0

    def due(self, step: int, seconds: float) -> bool:
        """Return True if step `step` of the stage (from 1), which ended after `seconds`, completes an interval."""
        if self._interval_images:
            intervals_before = int((step - 1) * self._batch / self._interval_images + 1e-9)
            return int(step * self._batch / self._interval_images + 1e-9) > intervals_before
        if self._interval_seconds and seconds - self._last_due >= self._interval_seconds:
            self._last_due = seconds
            return True
        return False


def points(stage: StageTable, epoch: int) -> set[int]:
    """Return the steps of a stage (from 1) after which `checkpoint_at` asks for a checkpoint."""
    return {steps_of("checkpoint_at", point, stage.batch, epoch) or 0 for point in stage.checkpoint_at}
