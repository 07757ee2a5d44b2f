"""Triggers after a step for logging, validation, sampling and saving: intervals, chosen steps, and requests by the user."""

from __future__ import annotations

from fastsd.run.run import Run
from fastsd.train.schedule import Interval, points


class Triggers:
    """Tells after each step of a stage which actions are due. Call each method exactly once per step."""

    def __init__(self, run: Run, index: int) -> None:
        stage, epoch = run.config.stage[index], run.data.epochs[index]
        self.run, self.points = run, points(stage, epoch)

        def interval(key: str, amount: int | str) -> Interval:
            return Interval(key, amount, stage.batch, epoch, run.position.elapsed())

        self._log_interval = interval("log.every", run.config.log.every)
        self._sample_interval = interval("sample_every", stage.sample_every)
        self._checkpoint_interval = interval("checkpoint_every", stage.checkpoint_every)
        self._validation_interval = interval("validate.every", run.config.validate_.every if run.data.sets.measured else 0)

    def log_due(self) -> bool:
        return self._due(self._log_interval)

    def validation_due(self) -> bool:
        return self._due(self._validation_interval)

    def samples_due(self) -> bool:
        return self._due(self._sample_interval) | self._requested("sample")

    def checkpoint_due(self) -> bool:
        return self._due(self._checkpoint_interval)

    def permanent_checkpoint_due(self) -> bool:
        """Return True if a checkpoint to keep for good is due: at a step in `checkpoint_at`, or if the user requests one."""
        return (self.run.position.progress.stage_step in self.points) | self._requested("checkpoint")

    def _due(self, interval: Interval) -> bool:
        return interval.due(self.run.position.progress.stage_step, self.run.position.elapsed())

    def _requested(self, action: str) -> bool:
        """Return True if the user has put a file trigger.ACTION into the run's folder, and delete that file."""
        try:
            (self.run.folder / f"trigger.{action}").unlink()
        except OSError:  # The file is missing. Or it cannot be deleted: then it would trigger every step, so it is ignored.
            return False
        return True
