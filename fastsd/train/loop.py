"""Floor 3: the main loop. Everything a run does passes through `train`, in this order, every step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastsd.config import Config
from fastsd.data.loader import Batch, Stream
from fastsd.errors import Stopped, UserError
from fastsd.train.report import memory_gb
from fastsd.train.run import Run, open_run
from fastsd.train.schedule import Every, learning_rate, points
from fastsd.train.step import Step, StepResult
from fastsd.train.watch import DWatch

MAX_SKIPPED_ROWS = 3  # log rows in a row without one finite gradient: the run is dead


def train(config: Config, console: Console | None = None, *, export: bool = True) -> None:
    """Train all stages of a config, from the start or from where the run stands, and export the model, if that is wanted.

    Raises:
        UserError: something the user must change; what was saved stands.
        Stopped: after a checkpoint, when asked to stop.
    """
    with open_run(config, console or Console()) as run, stop_signal() as stop:
        run.report.header(run.header())
        for note in run.notes:
            run.report.warn(note)
        for index in range(run.progress.stage, len(config.stage)):
            if not run.finished(index):
                train_stage(run, index, stop)
        if export:
            try:
                run.export()
            except OSError as error:
                raise UserError(
                    f"{run.folder}: all is trained and saved, but the model could not be written ({error.strerror or error}); "
                    "free space on that disk, and the same line again writes it"
                ) from error


def train_stage(run: Run, index: int, stop: list[int]) -> None:
    stage, step = run.config.stage[index], run.start_stage(index)
    end = run.progress.stage_images + step.total * stage.batch
    log, due = Log(run, step, index), Due(run, index)
    if run.progress.step == 0:
        run.validate(index, step)
        if stage.sample_every:
            run.sample(index, step)
    with run.loader(index).stream(run.progress.images, end, stage.batch) as batches:
        for batch in batches:
            result = step(batch, run.progress.stage_step)
            run.count(step, result)
            done = run.at_end(index)
            if due.log() or done:
                log.row(result, batch, batches)
            if due.validation() or done:
                log.flush()
                with log.paused():
                    run.validate(index, step)
            if due.sample() or done:
                with log.paused():
                    run.sample(index, step)
            keep = due.kept()
            if due.checkpoint() or keep or done or stop:
                log.flush()
                with log.paused():
                    saved = run.save(step, done, keep)
                if stop and not done:
                    raise Stopped(f"{run.folder}: stopped at step {run.progress.step}")
                if done and not saved:
                    raise UserError(f"{run.folder}: the end of stage {index + 1} could not be saved; free space, run again")
            if done:
                break
    step.release()


class Due:
    """What a step of a stage is followed by."""

    def __init__(self, run: Run, index: int) -> None:
        stage, epoch = run.config.stage[index], run.images[index]
        self.run, self.points = run, points(stage, epoch)
        measured = run.config.validate_.every if run.sets.measured else 0
        self._log, self._sample, self._checkpoint, self._validation = (
            Every(key, amount, stage.batch, epoch, run.elapsed())
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
        return self._is(self._sample) | self.run.asked("sample")

    def checkpoint(self) -> bool:
        return self._is(self._checkpoint)

    def kept(self) -> bool:
        """A checkpoint that stays: `checkpoint_at` names it, or someone asks for it now."""
        return (self.run.progress.stage_step in self.points) | self.run.asked("checkpoint")

    def _is(self, every: Every) -> bool:
        return every.due(self.run.progress.stage_step, self.run.elapsed())


class Readback:
    """Numbers on their way from the device: copied behind the work that makes them, read when they have long arrived."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.names = list(values)
        there = torch.stack([value.double() for value in values.values()])
        self.here = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.is_cuda)
        self.here.copy_(there, non_blocking=True)
        self.arrived = torch.cuda.Event() if there.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self) -> dict[str, float]:
        if self.arrived:
            self.arrived.synchronize()
        return dict(zip(self.names, self.here.tolist(), strict=True))


class Log:
    """Log rows, written one interval late: by then the device has long finished, so reading it waits for nothing."""

    def __init__(self, run: Run, step: Step, index: int) -> None:
        self.run, self.step, self.name = run, step, run.config.stage_name(index)
        self.pending: tuple[dict[str, Any], Readback, dict[str, float]] | None = None
        self.mark = (time.perf_counter(), run.progress.step, 0.0)
        self.last_skipped, self.dead_rows = int(step.skipped), 0
        self.guards = {part: DWatch(part, step.stage, run.report.rows(self.name)) for part in step.d()}

    def row(self, result: StepResult, batch: Batch, batches: Stream) -> None:
        self.flush()
        run, now = self.run, time.perf_counter()
        loss, weight = run.smooth
        known: dict[str, Any] = {
            "step": run.progress.step, "stage": self.name, "stage_step": run.progress.stage_step,
            "images": run.progress.images, "epoch": run.progress.images / run.images[run.progress.stage],
            **self.step.seen(batch),
        }  # fmt: skip
        for i, part in enumerate(self.step.optimizers):  # one lr and one d a trained part; the line shows the first
            lr = learning_rate(self.step.stage, run.progress.stage_step - 1, self.step.total, part)
            known[f"lr_{part}" if i else "lr"] = lr
        device = {
            "loss": result.loss, "loss_smooth": loss / weight, "grad_norm": result.grad_norm, "skipped": result.skipped,
        }  # fmt: skip
        for i, (part, d) in enumerate(self.step.d().items()):
            device[f"d_{part}" if i else "d"] = d
        started, steps, waited = self.mark
        seconds = max(now - started, 1e-9)
        speed = (run.progress.step - steps) / seconds
        timing = {
            "stage_steps": self.step.total, "seconds": run.elapsed(), "images_per_second": speed * self.step.stage.batch,
            "data_wait": (batches.waited - waited) / seconds, "memory_gb": memory_gb(run.device),
            "eta": run.seconds_left(speed),
        }  # fmt: skip
        self.pending = (known, Readback(device), timing)
        self.mark = (now, run.progress.step, batches.waited)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what is not training out of images per second."""
        start = time.perf_counter()
        yield
        self.mark = (self.mark[0] + time.perf_counter() - start, *self.mark[1:])

    def flush(self) -> None:
        """Read and write the row that is waiting."""
        if self.pending is None:
            return
        known, device, timing = self.pending
        self.pending = None
        read: dict[str, Any] = device.read()
        skipped = int(read["skipped"])
        self.run.report.row({**known, **read, "skipped": skipped}, timing)
        self._watch(skipped, known["step"])
        for i, guard in enumerate(self.guards.values()):
            for warning in guard.row(known["stage_step"], read[f"d_{guard.part}" if i else "d"]):
                self.run.report.warn(warning)

    def _watch(self, skipped: int, step: int) -> None:
        fresh = skipped - self.last_skipped
        self.last_skipped = skipped
        if fresh:
            self.run.report.warn(f"{fresh} steps before step {step} had a gradient that is not finite and were skipped")
        self.dead_rows = self.dead_rows + 1 if fresh >= self.run.config.log.every else 0
        if self.dead_rows == MAX_SKIPPED_ROWS:
            raise UserError(
                f"{self.run.folder}: no finite gradient for {fresh * self.dead_rows} steps up to step {step}; "
                "lower lr (or d0), or use precision fp32, and run again from the last checkpoint"
            )


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that gets the signal's number on Ctrl-C or a polite kill: the loop saves and stops. A second one stops at once."""
    stop: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {kind: signal.signal(kind, ask) for kind in kinds}
    except ValueError:  # not in the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
