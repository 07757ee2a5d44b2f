"""Triggers after a step, such as for logging or saving: intervals, chosen steps, and requests by the user."""

from __future__ import annotations

from typing import NamedTuple

from fastsd.run.run import Run
from fastsd.train.schedule import Interval, points


class Due(NamedTuple):
    """The actions that are due after a step. A `permanent` checkpoint is never deleted. `snapshot` is of the averages."""

    log: bool
    validation: bool
    samples: bool
    checkpoint: bool
    permanent: bool
    snapshot: bool
    profile: bool


class Triggers:
    """Tells after each step of a stage which actions are due."""

    def __init__(self, run: Run, index: int) -> None:
        stage, epoch = run.config.stage[index], run.data.epochs[index]
        self.run, self.points = run, points(stage, epoch)
        amounts = {
            "log": ("log.every", run.config.log.every),
            "validation": ("validate.every", run.config.validate_.every if run.data.sets.measured else 0),
            "samples": ("sample_every", stage.sample_every),
            "checkpoint": ("checkpoint_every", stage.checkpoint_every),
            "permanent": ("keep_every", stage.keep_every),
        }
        seconds = run.position.elapsed()
        self._intervals = {name: Interval(*amount, stage.batch, epoch, seconds) for name, amount in amounts.items()}
        count = stage.ema_snapshots if stage.sigma_rel else 0
        self._intervals["snapshot"] = Interval.part(stage, run.position.steps[index], count, seconds)

    def after_step(self) -> Due:
        """Return the actions that are due after the latest step. Rank 0 deletes the files by which the user requested them."""
        step, seconds = self.run.position.progress.stage_step, self.run.position.elapsed()
        due = {name: interval.due(step, seconds) for name, interval in self._intervals.items()}
        actions = ("sample", "checkpoint", "profile") if self.run.ranks.main else ()
        requested = {action for action in actions if self._requested(action)}
        due["samples"] |= "sample" in requested
        due["permanent"] |= step in self.points or "checkpoint" in requested
        due["checkpoint"] |= due["permanent"]
        return Due(**due, profile="profile" in requested)

    def _requested(self, action: str) -> bool:
        """Return True if the user has put a file trigger.ACTION into the run's folder, and delete that file."""
        try:
            (self.run.folder / f"trigger.{action}").unlink()
        except OSError:  # The file is missing. Or it cannot be deleted: then it would trigger every step, so it is ignored.
            return False
        return True
