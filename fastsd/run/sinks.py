"""Programs that show a run's log while it grows: TensorBoard and Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from fastsd.config.schema import LogTable
from fastsd.console import Console
from fastsd.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Sink(Protocol):
    """Receives scalars and sample grids. Any method may raise any exception, because disks fill up and networks fail."""

    name: str

    def scalars(self, values: Mapping[str, object], step: int) -> None: ...
    def image(self, name: str, image: Image.Image, step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        self._folder = str(run / "tensorboard")
        self._writer: SummaryWriter | None = None
        self._open(step + 1)

    def _open(self, step: int) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=step)
        return self._writer

    def scalars(self, values: Mapping[str, object], step: int) -> None:
        try:
            for name, value in values.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._open(step).add_scalar(name, value, step)
        except OSError:  # it has ended the writer's thread, so the next row needs another writer
            self._writer = None
            raise

    def image(self, name: str, image: Image.Image, step: int) -> None:
        self._open(step).add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer:
            self._writer.close()


class WeightsAndBiases:
    name = "Weights & Biases"

    def __init__(self, run: Path, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "wandb-missing", f'log.wandb is {project!r}, but wandb is not installed; pip install "fastsd[wandb]"'
            ) from None
        self._run = wandb.init(project=project, name=run.name, dir=str(run), id=run.name, resume="allow")

    def scalars(self, values: Mapping[str, object], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Do nothing. Log rows arrive one interval late, and wandb would drop those that are older than the image."""

    def close(self) -> None:
        self._run.finish()


def open_sinks(run: Path, table: LogTable, step: int, console: Console) -> list[Sink]:
    """Open the sinks of a config for a run that has done `step` steps. One that cannot be opened is left out, with a warning.

    Raises:
        UserError: wandb is not installed.
    """
    openers: list[tuple[str, Callable[[], Sink]]] = []
    if table.tensorboard:
        openers.append((TensorBoard.name, partial(TensorBoard, run, step)))
    if table.wandb:
        openers.append((WeightsAndBiases.name, partial(WeightsAndBiases, run, table.wandb)))
    sinks = []
    for name, open_sink in openers:
        try:
            sinks.append(open_sink())
        except UserError:
            raise
        except Exception as error:
            console.warn(f"{name} not opened: {type(error).__name__}: {error}; training continues without it")
    return sinks
