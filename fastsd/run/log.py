"""Log rows. Device values are collected after a step and read one log interval later, without waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsd.data.loader import Batch, Stream
from fastsd.errors import UserError
from fastsd.run.dlion_monitor import DLionMonitor
from fastsd.run.report import memory_gb
from fastsd.run.run import Run
from fastsd.train.schedule import learning_rate
from fastsd.train.step import Step, StepResult

MAX_SKIPPED_ROWS = 3  # consecutive log rows without a finite gradient after which the run stops with an error


class DeferredScalars:
    """Device scalars, copied asynchronously behind the kernels that compute them and read later without waiting."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        device_values = torch.stack([value.double() for value in values.values()])
        self.here = torch.empty(device_values.shape, dtype=device_values.dtype, pin_memory=device_values.is_cuda)
        self.here.copy_(device_values, non_blocking=True)
        self.arrived = torch.cuda.Event() if device_values.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self) -> dict[str, float]:
        if self.arrived:
            self.arrived.synchronize()
        return dict(zip(self.names, self.here.tolist(), strict=True))


class Log:
    """Writes log rows one interval late. By then the device has finished, so reading its values does not wait."""

    def __init__(self, run: Run, step: Step, index: int) -> None:
        self.run, self.step, self.name = run, step, run.config.stage_name(index)
        self.pending: tuple[dict[str, Any], DeferredScalars, dict[str, float]] | None = None
        self.mark = (time.perf_counter(), run.position.progress.step, 0.0)
        self.last_skipped, self.dead_rows = int(step.skipped), 0
        self.guards = {part: DLionMonitor(part, step.stage, run.report.rows(self.name)) for part in step.d()}

    def row(self, result: StepResult, batch: Batch, batches: Stream) -> None:
        self.flush()
        run, progress, now = self.run, self.run.position.progress, time.perf_counter()
        values: dict[str, Any] = {
            "step": progress.step, "stage": self.name, "stage_step": progress.stage_step,
            "images": progress.images, "epoch": progress.images / run.data.epochs[progress.stage],
            **self.step.batch_fingerprints(batch),
        }  # fmt: skip
        for i, part in enumerate(self.step.optimizers):  # one lr and d per component; the console shows the first
            lr = learning_rate(self.step.stage, progress.stage_step - 1, self.step.total, part)
            values[f"lr_{part}" if i else "lr"] = lr
        scalars = {
            "loss": result.loss, "loss_smooth": run.smoothed.value(), "grad_norm": result.grad_norm, "skipped": result.skipped,
        }  # fmt: skip
        for i, (part, d) in enumerate(self.step.d().items()):
            scalars[f"d_{part}" if i else "d"] = d
        started, steps, waited = self.mark
        seconds = max(now - started, 1e-9)
        speed = (progress.step - steps) / seconds
        timing = {
            "stage_steps": self.step.total, "seconds": run.position.elapsed(), 
            "images_per_second": speed * self.step.stage.batch,
            "data_wait": (batches.waited - waited) / seconds, "memory_gb": memory_gb(run.device),
            "eta": run.position.seconds_left(speed),
        }  # fmt: skip
        self.pending = (values, DeferredScalars(scalars), timing)
        self.mark = (now, progress.step, batches.waited)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the `with` block from images per second."""
        start = time.perf_counter()
        yield
        self.mark = (self.mark[0] + time.perf_counter() - start, *self.mark[1:])

    def flush(self) -> None:
        """Read the values of the pending row and write it."""
        if self.pending is None:
            return
        values, readback, timing = self.pending
        self.pending = None
        scalars: dict[str, Any] = readback.read()
        skipped = int(scalars["skipped"])
        self.run.report.row({**values, **scalars, "skipped": skipped}, timing)
        self._watch(skipped, values["step"])
        for i, guard in enumerate(self.guards.values()):
            for warning in guard.row(values["stage_step"], scalars[f"d_{guard.part}" if i else "d"]):
                self.run.report.warn(warning)

    def _watch(self, skipped: int, step: int) -> None:
        fresh = skipped - self.last_skipped
        self.last_skipped = skipped
        if fresh:
            self.run.report.warn(f"{fresh} steps before step {step} had a gradient that is not finite and were skipped")
        self.dead_rows = self.dead_rows + 1 if fresh >= self.run.config.log.every else 0
        if self.dead_rows == MAX_SKIPPED_ROWS:
            raise UserError(
                "no-finite-gradient",
                f"{self.run.folder}: no finite gradient for {fresh * self.dead_rows} steps up to step {step}; "
                "lower lr (or d0), or use precision fp32, and run again from the last checkpoint",
            )
