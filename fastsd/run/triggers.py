"""What a step is followed by - at every so many steps, at chosen ones, or because someone asks for it."""

from __future__ import annotations

from fastsd.run.run import Run
from fastsd.train.schedule import Every, points


class Due:
    """Tells after each step of a stage what is due. Each method must be called once a step."""

    def __init__(self, run: Run, index: int) -> None:
        stage, epoch = run.config.stage[index], run.data.epochs[index]
        self.run, self.points = run, points(stage, epoch)
        measured = run.config.validate_.every if run.data.sets.measured else 0
        self._log, self._sample, self._checkpoint, self._validation = (
            Every(key, amount, stage.batch, epoch, run.position.elapsed())
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
        """True for a checkpoint that stays: `checkpoint_at` names it, or someone asks for it now."""
        return (self.run.position.progress.stage_step in self.points) | self._asked("checkpoint")

    def _is(self, every: Every) -> bool:
        return every.due(self.run.position.progress.stage_step, self.run.position.elapsed())

    def _asked(self, what: str) -> bool:
        """True if someone has put a file trigger.WHAT into the run's folder; it is taken away."""
        try:
            (self.run.folder / f"trigger.{what}").unlink()
        except OSError:  # there is none, or one that cannot be taken away and would ask at every step
            return False
        return True
