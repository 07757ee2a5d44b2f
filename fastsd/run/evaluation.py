"""Sample grids and validation between the training steps of a run. Neither changes anything that training reads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from fastsd.config.schema import Config
from fastsd.data.validation_split import ValidationSplits
from fastsd.errors import out_of_memory
from fastsd.model.model import Model
from fastsd.run.cost import CostRecorder
from fastsd.run.position import Position
from fastsd.run.report import TrainReport
from fastsd.run.signals import StopSignals
from fastsd.run.validation import Validation, ValidationRow
from fastsd.sampling.generate import BATCH
from fastsd.sampling.grid import sample_grid, save_grid
from fastsd.sampling.prompts import images_of
from fastsd.storage import make_folder
from fastsd.terminal.console import Console
from fastsd.train.ranks import ALONE, Ranks
from fastsd.train.step import Step

Result = TypeVar("Result")


@dataclass
class Evaluation:
    """Draws samples and runs validation in the run's current stage, on rank 0. The other ranks do nothing."""

    config: Config
    model: Model
    sets: ValidationSplits
    validation: Validation
    position: Position
    report: TrainReport
    cost: CostRecorder
    ranks: Ranks = ALONE

    def missing(self) -> Sequence[Callable[[Step], None]]:
        """Return the evaluations that were due after the newest checkpoint, but have no results because the run was ended."""
        validation, samples = self.ranks.decided((self._lacks_validation(), self._lacks_samples()))
        return [self.validate] * validation + [self.sample] * samples

    def _lacks_validation(self) -> bool:
        progress = self.position.progress
        rows = len(self.sets.measured) * (1 + (self.config.stage[progress.stage].ema > 0))
        due = self.ranks.main and progress.validation_due and rows > 0
        return due and not self.report.has_validation(progress.step, rows)

    def _lacks_samples(self) -> bool:
        due = self.ranks.main and self.position.progress.samples_due
        return due and bool(self.config.sample.prompts or self.config.sample.prompts_file) and not self._grid_path()[0].exists()

    def sample(self, step: Step, stop: StopSignals | None = None) -> None:
        """Draw the config's sample grid, with the current weights or with the EMA weights. A signal ends the drawing."""
        if self.config.sample.weights == "ema":
            step.collect_averages()
        if not self.ranks.main:
            return
        config, progress = self.config, self.position.progress
        size = config.sample.size or config.data.resolution
        path, weights = self._grid_path()
        started_at = time.monotonic()

        def draw(batch: int) -> tuple[Image.Image | None, int]:
            with ExitStack() as stack:
                for component in step.components.values() if weights == "ema" else ():
                    if component.ema is not None:
                        stack.enter_context(component.averaged())
                images = len(images_of(config.sample, size))
                return sample_grid(self.model, config.sample, size, batch), images

        grid, images = _attempt(draw, BATCH, "sampling", step, self.report.console, stop) or (None, 0)
        if grid is None:
            return
        self.cost.sample_seconds = (time.monotonic() - started_at) / images
        try:
            make_folder(path.parent)
            save_grid(grid, path, config.stage_name(progress.stage), progress.step, weights)
        except OSError as error:
            return self.report.console.warn(f"samples not written to {path}: {error.strerror}; training continues")
        self.report.images(path, progress.step, grid)

    def _grid_path(self) -> tuple[Path, str]:
        """Return the path of the current step's grid, and the kind of weights that draw it."""
        progress = self.position.progress
        averaged = self.config.sample.weights == "ema" and self.config.stage[progress.stage].ema > 0
        name = f"{self.config.stage_name(progress.stage)}{'-ema' if averaged else ''}-{progress.step:08d}.png"
        return Path(self.config.run) / "samples" / name, "ema" if averaged else "model"

    def validate(self, step: Step, stop: StopSignals | None = None) -> None:
        """Measure the config's validation sets with the current weights, and with the EMA weights if there are any.

        A signal ends the measurement without a result.
        """
        if self.sets.measured:
            step.collect_averages()
        if self.sets.measured and self.ranks.main:
            progress, console = self.position.progress, self.report.console
            stage = self.config.stage_name(progress.stage)

            def measure(batch: int) -> list[ValidationRow]:
                return self.validation.rows(step.components.values(), batch)

            rows = _attempt(measure, self.config.validate_.batch, "validation", step, console, stop) or []
            if rows:
                self.report.validation(
                    [{"step": progress.step, "images": progress.images, "stage": stage, **row} for row in rows]
                )


class _Interrupted(Exception):
    """A signal has asked the run to stop. What it interrupts is repeated when the run continues."""


def _attempt(
    work: Callable[[int], Result], batch: int, task: str, step: Step, console: Console, stop: StopSignals | None = None
) -> Result | None:
    """Call `work` with a number of images per forward. Return None, after a warning, if it fails: training does not need it.

    If memory runs out, try again with one image per forward, and then also without the memory of the step's CUDA graphs.
    """

    def check(*_: object) -> None:
        if stop:
            raise _Interrupted

    for images, free in ((batch, False), (1, False), (1, True)):
        if free:
            step.free_graphs()
        hook = step.model.unet.register_forward_pre_hook(check)
        try:
            return work(images)
        except _Interrupted:
            return None
        except Exception as error:
            if out_of_memory(error) is None:
                reason = str(error) or type(error).__name__
                console.warn(f"{task} failed ({reason.splitlines()[0]}); it is skipped, training continues")
                return None
        finally:
            hook.remove()
        gc.collect()  # the error has ended, and with it the tensors that its traceback refers to
    console.warn(f"out of memory for {task}, even with one image at a time; {task} is skipped, training continues")
    return None
