"""Log rows. Device values are collected after a step and read one log interval later, without waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsd.data.loader import Batch, Stream
from fastsd.model.shapes import forward_flops
from fastsd.plan.gpu_specs import gpu_of
from fastsd.run.dlion_monitor import DLionMonitor
from fastsd.run.folder import LogRow
from fastsd.run.report import memory_gb
from fastsd.run.rollback import StepsSkipped
from fastsd.run.run import Run
from fastsd.train.schedule import learning_rate
from fastsd.train.step import Step, StepResult

MAX_SKIPPED_ROWS = 3  # log rows; if all steps of so many rows were skipped, the run goes back to its last healthy checkpoint


class DeferredScalars:
    """Device scalars, copied asynchronously behind the kernels that compute them and read later without waiting."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        device_values = torch.stack([value.double() for value in values.values()])
        self.host_values = torch.empty(device_values.shape, dtype=device_values.dtype, pin_memory=device_values.is_cuda)
        self.host_values.copy_(device_values, non_blocking=True)
        self.copied = torch.cuda.Event() if device_values.is_cuda else None
        if self.copied:
            self.copied.record()

    def read(self) -> dict[str, float]:
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.host_values.tolist(), strict=True))


class Log:
    """Writes log rows one interval late. By then the device has finished, so reading its values does not wait."""

    def __init__(self, run: Run, step: Step, index: int) -> None:
        self.run, self.step, self.name = run, step, run.config.stage_name(index)
        self.pending: tuple[LogRow, DeferredScalars, dict[str, float]] | None = None
        self.mfu_per_speed = _mfu_per_speed(run, step)
        self.mark = (time.perf_counter(), run.position.progress.step, 0.0)  # time, step and data wait at the last row
        self.last_skipped, self.last_canary_errors = int(step.skipped), 0
        self.monitors = [DLionMonitor(component, step.stage, run.report.rows(self.name)) for component in step.d()]

    def row(self, result: StepResult, batch: Batch, batches: Stream) -> None:
        """Write the previous row, and start to copy the values of the row for this step."""
        self.flush()
        run, progress, now = self.run, self.run.position.progress, time.perf_counter()
        values: LogRow = {"step": progress.step, "stage": self.name, "stage_step": progress.stage_step}
        values |= {"images": progress.images, "epoch": progress.images / run.data.epochs[progress.stage]}
        values |= self.step.batch_fingerprints(batch)
        for i, component in enumerate(self.step.optimizers):  # one lr and d per component; those of the first have no suffix
            lr = learning_rate(self.step.stage, progress.stage_step - 1, self.step.total, component)
            values[f"lr_{component}" if i else "lr"] = lr

        scalars = {"loss": result.loss, "loss_smooth": run.smoothed.value()}
        scalars |= {"grad_norm": result.grad_norm, "skipped": result.skipped, **run.health.scalars()}
        for i, (component, d) in enumerate(self.step.d().items()):
            scalars[f"d_{component}" if i else "d"] = d
        if self.step.stage.canary_every:
            scalars["canary_errors"] = self.step.canary_errors

        last_time, last_step, last_waited = self.mark
        seconds = max(now - last_time, 1e-9)
        speed = (progress.step - last_step) / seconds
        timing = {"stage_steps": self.step.total, "seconds": run.position.elapsed()}
        timing |= {"images_per_second": speed * self.step.stage.batch, "data_wait": (batches.waited - last_waited) / seconds}
        if self.mfu_per_speed:
            timing["mfu"] = self.mfu_per_speed * timing["images_per_second"]
        timing |= {"memory_gb": memory_gb(run.device), "eta": run.position.seconds_left(speed)}
        timing["stage_eta"] = run.position.seconds_left(speed, stages=1)
        self.pending = (values, DeferredScalars(scalars), timing)
        self.mark = (now, progress.step, batches.waited)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the `with` block from images per second."""
        started_at = time.perf_counter()
        yield
        self.mark = (self.mark[0] + time.perf_counter() - started_at, *self.mark[1:])

    def flush(self) -> None:
        """Read the values of the pending row and write it."""
        if self.pending is None:
            return
        values, deferred, timing = self.pending
        self.pending = None
        scalars = deferred.read()
        if "canary_errors" in scalars:  # training does not determine it, so it is not part of the row
            timing["canary_errors"] = scalars.pop("canary_errors")
            self._check_canary(int(timing["canary_errors"]), values["step"])
        skipped, in_row = int(scalars["skipped"]), int(scalars.pop("skipped_in_row"))
        self.run.report.row({**values, **scalars, "skipped": skipped, "spikes": int(scalars["spikes"])}, timing)
        self._check_skipped(skipped, in_row, values)
        for i, monitor in enumerate(self.monitors):
            for warning in monitor.row(values["stage_step"], scalars[f"d_{monitor.component}" if i else "d"]):
                self.run.console.warn(warning)

    def _check_skipped(self, skipped: int, in_row: int, values: LogRow) -> None:
        newly_skipped, step = skipped - self.last_skipped, values["step"]
        self.last_skipped = skipped
        if newly_skipped:
            reason = "because gradients or updates were not finite"
            self.run.console.warn(f"skipped {newly_skipped} steps up to step {step}, {reason}")
        if in_row >= MAX_SKIPPED_ROWS * self.run.config.log.every:
            raise StepsSkipped(step - in_row + 1, step, values["images"])

    def _check_canary(self, errors: int, step: int) -> None:
        if errors > self.last_canary_errors:
            self.run.console.warn(
                f"gradients that were computed twice differ in {errors - self.last_canary_errors} steps up to step {step}: the "
                "device makes errors; check its temperature, clocks and memory"
            )
        self.last_canary_errors = errors


def _mfu_per_speed(run: Run, step: Step) -> float | None:
    """Return the model-FLOP utilisation at one image per second. None if the peak of the device is unknown.

    A step counts as three forwards of the UNet, whatever is trained or recomputed.  Source: PaLM (arXiv:2204.02311)
    """
    gpu = gpu_of(run.device)
    if gpu is None:
        return None
    peak = {"fp32": gpu.fp32, "tf32": gpu.tf32, "bf16": gpu.bf16}[step.stage.precision]
    flops = 3 * forward_flops(run.model.unet.cfg, run.config.data.resolution // run.model.vae.downscale)
    return flops / (peak * 1e12 * run.ranks.world)
