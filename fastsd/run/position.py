"""Position of a run: its current stage, the steps done, and the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fastsd.config.stages import StageTable
from fastsd.run.checkpoint import RunProgress
from fastsd.train.step import Step


class Position:
    """Position of a run in its stages.

    Args:
        progress: progress in the newest checkpoint, or a new one.
        stages: stages of the config.
        steps: number of steps of each stage; `ENDLESS` for a stage that ends by time.
        extendable: True if the checkpoint holds optimizer state, so that a finished last stage can be extended.

    Attributes:
        progress: current progress, as a checkpoint stores it.
    """

    def __init__(self, progress: RunProgress, stages: Sequence[StageTable], steps: Sequence[int], *, extendable: bool) -> None:
        self.progress, self.stages, self.steps = progress, stages, steps
        self._has_state = extendable
        self._updated_at = time.monotonic()  # the time of the last update of `progress.seconds`

    def finished(self, index: int) -> bool:
        """Return True if the stage is complete and the config does not extend it. Only the last stage can be extended."""
        progress = self.progress
        extended = self.extendable and not self.at_end(index)
        return progress.stage > index or (progress.stage == index and progress.stage_done and not extended)

    @property
    def extendable(self) -> bool:
        """True if the current stage can go on after its end."""
        return self.progress.stage == len(self.steps) - 1 and self._has_state

    def at_end(self, index: int) -> bool:
        """Return True if the current stage, number `index`, has done all its steps or used up its time.

        That is the time up to its latest step, so it is the same on all ranks and after a restart.
        """
        limit = self.stages[index].seconds
        return self.progress.stage_step >= self.steps[index] or (limit is not None and self.progress.seconds >= limit)

    def begin(self, index: int) -> bool:
        """Enter a stage. Return True if the run was already in the middle of it."""
        current, stage = self.progress, self.stages[index]
        resumed = current.stage == index and current.stage_step > 0
        if not resumed:
            carried = current.carried + current.stage_step if stage.state == "carry" else 0
            new = replace(current, stage=index, stage_step=0, stage_images=current.images, seconds=0.0, carried=carried)
            self.progress = replace(new, stage_done=False, validation_due=False, samples_due=False)
        self._updated_at = time.monotonic()
        return resumed

    def advance(self, step: Step) -> None:
        """Count one optimizer step."""
        old, now = self.progress, time.monotonic()
        new = replace(old, stage_step=old.stage_step + 1, step=old.step + 1, images=old.images + step.stage.batch)
        new = replace(new, micro_batch_size=step.micro_batch_size, micro_batch_setting=step.stage.micro_batch)
        self.progress = replace(new, seconds=old.seconds + now - self._updated_at)
        self._updated_at = now

    def mark(self, *, done: bool, validation: bool, samples: bool) -> None:
        """Record what follows the latest step: the end of its stage, a validation, samples."""
        self.progress = replace(self.progress, stage_done=done, validation_due=validation, samples_due=samples)

    def end_at_checkpoint(self) -> bool:
        """Complete the current stage if it ends at the newest checkpoint, because `until` was lowered to that step."""
        progress = self.progress
        if progress.stage_done or not progress.stage_step or progress.stage_step != self.steps[progress.stage]:
            return False
        self.mark(done=True, validation=True, samples=True)
        return True

    def elapsed(self) -> float:
        """Return the seconds the current stage has run, over all starts."""
        return self.progress.seconds + time.monotonic() - self._updated_at

    def seconds_left(self, steps_per_second: float, stages: int | None = None) -> float:
        """Estimate the seconds until all stages are complete, or the next `stages`, at the given speed."""
        progress = self.progress
        total = 0.0
        for index in range(progress.stage, len(self.steps))[:stages]:
            is_current, limit = index == progress.stage, self.stages[index].seconds
            if limit is not None:
                total += max(limit - (self.elapsed() if is_current else 0), 0)
            else:
                total += (self.steps[index] - (progress.stage_step if is_current else 0)) / steps_per_second
        return total
