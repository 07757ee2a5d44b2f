"""Triggers after a step for logging, validation, sampling and saving: intervals, chosen steps, and requests by the user."""

from __future__ import annotations

from fastsd.run.run import Run
from fastsd.train.schedule import Interval, points


class Triggers:
    """Reports after each step of a stage which actions are due. Each method must be called exactly once per step."""

    def __init__(self, run: Run, index: int) -> None:
        stage, epoch = run.config.stage[index], run.data.epochs[index]
        self.run, self.points = run, points(stage, epoch)

        def interval(key: str, amount: int | str) -> Interval:
            return Interval(key, amount, stage.batch, epoch, run.position.elapsed())

        self._log = interval("log.every", run.config.log.every)
        self._sample = interval("sample_every", stage.sample_every)
        self._checkpoint = interval("checkpoint_every", stage.checkpoint_every)
        self._validation = interval("validate.every", run.config.validate_.every if run.data.sets.measured else 0)

    def log(self) -> bool:
        return self._due(self._log)

    def validation(self) -> bool:
        return self._due(self._validation)

    def sample(self) -> bool:
        return self._due(self._sample) | self._requested("sample")

    def checkpoint(self) -> bool:
        return self._due(self._checkpoint)

    def keep(self) -> bool:
        """Return True if a checkpoint to retain is due: `checkpoint_at` lists this step, or the user requests one now."""
        return (self.run.position.progress.stage_step in self.points) | self._requested("checkpoint")

    def _due(self, every: Interval) -> bool:
        return every.due(self.run.position.progress.stage_step, self.run.position.elapsed())

    def _requested(self, action: str) -> bool:
        """Return True if the user has put a file trigger.ACTION into the run's folder, and delete that file."""
        try:
            (self.run.folder / f"trigger.{action}").unlink()
        except OSError:  # missing, or not deletable: such a file would trigger every step
            return False
        return True
