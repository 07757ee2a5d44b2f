"""Sample grids and validation between the training steps of a run. Neither changes anything that training reads."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from fastsd.config.schema import Config
from fastsd.console import Console
from fastsd.data.validation_split import ValidationSplits
from fastsd.errors import out_of_memory
from fastsd.model.model import Model
from fastsd.run.cost import CostRecorder
from fastsd.run.position import Position
from fastsd.run.report import TrainReport
from fastsd.run.validation import Validation, ValidationRow
from fastsd.sampling.generate import BATCH
from fastsd.sampling.grid import read_prompts, sample_grid, save_grid
from fastsd.train.step import Step

Result = TypeVar("Result")


@dataclass
class Evaluation:
    """Draws samples and runs validation in the run's current stage."""

    config: Config
    model: Model
    sets: ValidationSplits
    validation: Validation
    position: Position
    report: TrainReport
    cost: CostRecorder

    def sample(self, step: Step) -> None:
        """Draw the config's sample grid with the current weights."""
        config, progress = self.config, self.position.progress
        size = config.sample.size or config.data.resolution
        started_at = time.monotonic()

        def draw(batch: int) -> tuple[Image.Image | None, int]:
            images = len(read_prompts(config.sample)) * config.sample.images
            return sample_grid(self.model, config.sample, size, batch), images

        grid, images = _attempt(draw, BATCH, "sampling", step, self.report.console) or (None, 0)
        if grid is None:
            return
        self.cost.sample_seconds = (time.monotonic() - started_at) / images
        stage = config.stage_name(progress.stage)
        path = Path(config.run) / "samples" / f"{stage}-{progress.step:08d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            save_grid(grid, path, stage, progress.step)
        except OSError as error:
            return self.report.console.warn(f"samples not written to {path}: {error.strerror}; training continues")
        self.report.images(path, progress.step, grid)

    def validate(self, step: Step) -> None:
        """Measure the config's validation sets with the current weights, and with the EMA weights if there are any."""
        if self.sets.measured:
            progress, console = self.position.progress, self.report.console
            stage = self.config.stage_name(progress.stage)

            def measure(batch: int) -> list[ValidationRow]:
                return self.validation.rows(step.components.values(), batch)

            rows = _attempt(measure, self.config.validate_.batch, "validation", step, console) or []
            if rows:
                self.report.validation(
                    [{"step": progress.step, "images": progress.images, "stage": stage, **row} for row in rows]
                )


def _attempt(work: Callable[[int], Result], batch: int, task: str, step: Step, console: Console) -> Result | None:
    """Call `work` with a number of images per forward. Return None, after a warning, if it fails: training does not need it.

    If memory runs out, try again with one image per forward, and then also without the memory of the step's CUDA graphs.
    """
    for images, free in ((batch, False), (1, False), (1, True)):
        if free:
            step.free_graphs()
        try:
            return work(images)
        except Exception as error:
            if out_of_memory(error) is None:
                reason = str(error) or type(error).__name__
                console.warn(f"{task} failed ({reason.splitlines()[0]}); it is skipped, training continues")
                return None
        gc.collect()  # the error has ended, and with it the tensors that its traceback refers to
    console.warn(f"out of memory for {task}, even with one image at a time; {task} is skipped, training continues")
    return None
