"""Sample grids and validation between the training steps of a run. Neither changes anything that training reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from fastsd.config.schema import Config
from fastsd.console import Console
from fastsd.data.validation_split import ValidationSplits
from fastsd.model.model import Model
from fastsd.run.cost import CostRecorder
from fastsd.run.position import Position
from fastsd.run.report import TrainReport
from fastsd.run.validation import Validation
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
        grid = _with_graph_memory(step, "sampling", self.report.console, lambda: sample_grid(self.model, config.sample, size))
        if grid is None:
            return
        images = len(read_prompts(config.sample)) * config.sample.images
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
            rows = _with_graph_memory(step, "validation", console, lambda: self.validation.rows(step.components.values()))
            self.report.validation([{"step": progress.step, "images": progress.images, "stage": stage, **row} for row in rows])


def _with_graph_memory(step: Step, task: str, console: Console, work: Callable[[], Result]) -> Result:
    """Run `work` while the step's CUDA graphs keep their memory. If memory runs out, free the graphs and run it again."""
    try:
        return work()
    except torch.OutOfMemoryError:
        console.warn(f"out of memory for {task}; the CUDA graph is freed and recorded again, cuda_graph = false avoids this")
    step.free_graphs()
    return work()
