"""Triggers after a step for logging, validation, sampling and saving: intervals, chosen steps, and requests by the user."""

from __future__ import annotations

from fastsd.run.run import Run
from fastsd.train.schedule import Interval, points


class Triggers:
    """Reports after each step of a stage which actions are due. Each method must be called exactly once per step."""

    def __init__(self, run: Run, index: int) -> None:
        stage, epoch = run.config.stage[index], run.data.epochs[index]
        self.run, self.points = run, points(stage, epoch)
        measured = run.config.validate_.every if run.data.sets.measured else 0
        self._log, self._sample, self._checkpoint, self._validation = (
            Interval(key, amount, stage.batch, epoch, run.position.elapsed())
            for key, amount in (
                ("log.every", run.config.log.every), ("sample_every", stage.sample_every),
                ("checkpoint_every", stage.checkpoint_every), ("validate.every", measured),
            )
        )  # fmt: skip

    def log(self) -> bool:
        return self._is(self._log)

    def validation(self) -> bool:
        return self._is(self._validation)

    def sample(self) -> bool:
        return self._is(self._sample) | self._asked("sample")

    def checkpoint(self) -> bool:
        return self._is(self._checkpoint)

    def kept(self) -> bool:
        """Return True if a checkpoint to retain is due: `checkpoint_at` lists this step, or the user requests one now."""
        return (self.run.position.progress.stage_step in self.points) | self._asked("checkpoint")

    def _is(self, every: Interval) -> bool:
        return every.due(self.run.position.progress.stage_step, self.run.position.elapsed())

    def _asked(self, action: str) -> bool:
        """Return True if the user has put a file trigger.WHAT into the run's folder, and delete that file."""
        try:
            (self.run.folder / f"trigger.{action}").unlink()
        except OSError:  # missing, or not deletable: such a file would trigger every step
            return False
        return True
