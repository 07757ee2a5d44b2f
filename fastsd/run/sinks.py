"""Programs that show a run's log while it grows: TensorBoard and Weights & Biases."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fastsd.config.schema import LogTable
from fastsd.errors import UserError
from fastsd.terminal.console import Console


class Sink(Protocol):
    """Receives scalars and sample grids. Any method may raise any exception, because disks fill up and networks fail."""

    name: str

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def image(self, name: str, image: Image.Image, step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes event files. PyTorch's writer does so in a thread, which ends with a traceback when the disk is full."""

    name = "TensorBoard"

    def __init__(self, run: Path, step: int) -> None:
        self._folder, self._next_step = run / "tensorboard", step + 1
        self._path: Path | None = None
        with suppress(OSError):  # the first row will say it
            self._write(self._next_step, [])

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(step, [scalar(name, value) for name, value in values.items()])

    def image(self, name: str, image: Image.Image, step: int) -> None:
        from torch.utils.tensorboard.summary import image as summary

        self._write(step, [summary(name, np.asarray(image), dataformats="HWC")])

    def _write(self, step: int, summaries: list[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries]
        if self._path is None:
            self._folder.mkdir(exist_ok=True)
            self._path = self._folder / f"events.out.tfevents.{time.time_ns()}"
            # TensorBoard hides what earlier files have for this step and later ones.
            start = Event(step=self._next_step, session_log=SessionLog(status=SessionLog.START))
            events = [Event(file_version="brain.Event:2"), start, *events]
        records = BytesIO()
        for event in events:
            RecordWriter(records).write(event.SerializeToString())
        try:
            with open(self._path, "ab", buffering=0) as file:
                if file.write(records.getbuffer()) < len(records.getbuffer()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:  # half a record ends a file, so the next row begins another
            self._path, self._next_step = None, step + 1
            raise

    def close(self) -> None:
        """Do nothing: all rows are written."""


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

    def scalars(self, values: Mapping[str, float], step: int) -> None:
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
