"""Sample grids and validation between the training steps of a run. Neither changes anything that training reads.

All ranks share the work: each makes some of the UNet calls that one process would make, with the same images. Rank 0 puts the
results together, and writes them. So values and images have the bits of one process.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
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
from fastsd.sampling.generate import BATCH, draw_share
from fastsd.sampling.grid import grid, save_grid
from fastsd.sampling.prompts import ImageSettings, batches_of, images_of
from fastsd.storage import make_folder
from fastsd.train.ranks import ALONE, Ranks, RanksOutOfMemory
from fastsd.train.step import Step

Result = TypeVar("Result")
_MEMORY, _SIGNAL = "out of memory", "a signal"  # reasons for which a rank does not complete its share


@dataclass
class Evaluation:
    """Draws samples and runs validation in the run's current stage. All ranks call the same methods in the same order."""

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
        rows = len(self.sets.measured) * (1 + len(self.config.stage[progress.stage].averages))
        due = self.ranks.main and progress.validation_due and rows > 0
        return due and not self.report.has_validation(progress.step, rows)

    def _lacks_samples(self) -> bool:
        due, sample = self.ranks.main and self.position.progress.samples_due, self.config.sample
        return due and bool(sample.prompts or sample.prompts_file) and not all(map(Path.exists, self._grid_paths()))

    def sample(self, step: Step, stop: StopSignals | None = None) -> None:
        """Draw the config's sample grid with the current weights, or one with each average. A signal ends the drawing."""
        for path, weights in self._grid_paths().items():
            self._draw(step, path, weights, stop)

    def _draw(self, step: Step, path: Path, weights: str, stop: StopSignals | None) -> None:
        config, progress = self.config, self.position.progress
        size = config.sample.size or config.data.resolution
        started_at = time.monotonic()

        def draw(batch: int) -> bytes:
            with ExitStack() as stack:
                for component in step.components.values():
                    stack.enter_context(component.averaged(weights))
                drawn = draw_share(self.model, images_of(config.sample, size), config.sample, batch, self.ranks)
            return b"".join(image.tobytes() for image in drawn.values())

        def arrange(shares: list[bytes], batch: int) -> tuple[Image.Image, int] | None:
            images = images_of(config.sample, size)
            return (grid(_collected(shares, images, batch), images, config.sample.images), len(images)) if images else None

        result = self._attempt(draw, arrange, BATCH, "sampling", step, stop, averaged=weights != "model")
        if result is None:
            return
        sheet, count = result
        self.cost.sample_seconds = (time.monotonic() - started_at) / count
        try:
            make_folder(path.parent)
            save_grid(sheet, path, config.stage_name(progress.stage), progress.step, weights)
        except OSError as error:
            return self.report.console.warn(f"samples not written to {path}: {error.strerror}; training continues")
        self.report.images(path, progress.step, sheet)

    def _grid_paths(self) -> dict[Path, str]:
        """Return the path of each grid of the current step, and the kind of weights that draws it."""
        progress, folder = self.position.progress, Path(self.config.run) / "samples"
        averages = self.config.stage[progress.stage].averages if self.config.sample.weights == "ema" else []
        suffixes = {f"-{average}": average for average in averages} or {"": "model"}
        stage = self.config.stage_name(progress.stage)
        return {folder / f"{stage}{suffix}-{progress.step:08d}.png": weights for suffix, weights in suffixes.items()}

    def validate(self, step: Step, stop: StopSignals | None = None) -> None:
        """Measure the config's validation sets with the current weights, and with each average if there are any.

        A signal ends the measurement without a result.
        """
        if not self.sets.measured:
            return
        progress = self.position.progress
        shape: tuple[int, ...] = ()
        kinds = ("raw", *self.config.stage[progress.stage].averages)

        def measure(batch: int) -> bytes:
            nonlocal shape
            values_WnV = self.validation.measure(step.components.values(), batch, self.ranks)
            shape = values_WnV.shape
            return values_WnV.numpy().tobytes()

        def summarize(shares: list[bytes], batch: int) -> list[ValidationRow]:
            tensors = [torch.frombuffer(bytearray(share), dtype=torch.float64).view(shape) for share in shares]
            # Each value is one rank's, and 0 of the others.
            return self.validation.summary(torch.stack(tensors).sum(dim=0), kinds)

        rows = self._attempt(measure, summarize, self.config.validate_.batch, "validation", step, stop, averaged=True)
        if rows:
            stage = self.config.stage_name(progress.stage)
            self.report.validation([{"step": progress.step, "images": progress.images, "stage": stage, **row} for row in rows])

    def _attempt(
        self,
        work: Callable[[int], bytes],
        combine: Callable[[list[bytes], int], Result],
        batch: int,
        task: str,
        step: Step,
        stop: StopSignals | None,
        *,
        averaged: bool,
    ) -> Result | None:
        """Do this rank's share of a task, and combine the shares on rank 0.

        If memory runs out on a rank, all try again with one image per forward, and then also without the memory of the step's
        CUDA graphs. Training does not need the task, so any other error is a warning.

        Args:
            work: called with a number of images per forward. It returns the rank's share.
            combine: called on rank 0 with the shares of all ranks, and with that number.
            averaged: True if the task needs the averages of all weights.

        Returns:
            The result of `combine`; None on other ranks, or if a rank has failed or been stopped.
        """
        console = self.report.console
        for images, free in ((batch, False), (1, False), (1, True)):
            if free:
                step.free_graphs()
            try:
                if averaged:
                    step.collect_averages()
            except RanksOutOfMemory:
                continue
            share, problem = _share(work, images, step, stop)
            if problem == _MEMORY:
                gc.collect()  # the error has ended, and with it the tensors that its traceback refers to
            replies = [data.split(b"\0", 1) for data in self.ranks.gathered(problem.encode() + b"\0" + share)]
            problems = [reason.decode() for reason, _ in replies if reason]
            if _SIGNAL in problems:
                return None
            if not problems and not self.ranks.main:
                return None
            if not problems:
                try:
                    return combine([data for _, data in replies], images)
                except Exception as error:
                    problems = [_reason(error)]
            if reasons := [problem for problem in problems if problem != _MEMORY]:
                console.warn(f"{task} failed ({reasons[0]}); it is skipped, training continues")
                return None
        console.warn(f"out of memory for {task}, even with one image at a time; {task} is skipped, training continues")
        return None


class _Interrupted(Exception):
    """A signal has asked the run to stop. What it interrupts is repeated when the run continues."""


def _share(work: Callable[[int], bytes], images: int, step: Step, stop: StopSignals | None) -> tuple[bytes, str]:
    """Return what `work` returns, and ""; or nothing, and why it has failed."""

    def check(*_: object) -> None:
        if stop:
            raise _Interrupted

    hook = step.model.unet.register_forward_pre_hook(check)
    try:
        return work(images), ""
    except _Interrupted:
        return b"", _SIGNAL
    except Exception as error:
        return b"", _MEMORY if out_of_memory(error) else _reason(error)
    finally:
        hook.remove()


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _collected(shares: list[bytes], images: list[ImageSettings], batch: int) -> list[Image.Image]:
    """Return the images in their order, from the shares that `draw_share` has drawn."""
    drawn: dict[int, Image.Image] = {}
    groups = batches_of(images, batch)
    for rank, share in enumerate(shares):
        start = 0
        for i in (number for numbers in groups[rank :: len(shares)] for number in numbers):
            size = images[i].width, images[i].height
            end = start + 3 * size[0] * size[1]
            drawn[i], start = Image.frombytes("RGB", size, share[start:end]), end
    return [drawn[i] for i in range(len(images))]
