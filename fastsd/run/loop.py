"""The training loop. `train` calls everything a run does, in the order in which it happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from fastsd.config.schema import Config
from fastsd.errors import Stopped, UserError
from fastsd.run.export import bytes_of, export_newest
from fastsd.run.header import header
from fastsd.run.log import Log
from fastsd.run.run import Run, open_run
from fastsd.run.stage_start import start_stage
from fastsd.run.triggers import Triggers


def train(config: Config, console: Console | None = None, *, export: bool = True) -> None:
    """Train all stages of a config, from the start or from the newest checkpoint, and export the model if `export` is True.

    Raises:
        UserError: the user must change something; saved checkpoints stay intact.
        Stopped: a stop signal arrived; a checkpoint is written first.
    """
    with open_run(config, console or Console()) as run, stop_signal() as stop:
        run.report.header(header(run))
        for warning in run.warnings:
            run.report.warn(warning)
        for index in range(run.position.progress.stage, len(config.stage)):
            if not run.position.finished(index):
                train_stage(run, index, stop)
        if export:
            export_run(run)


def train_stage(run: Run, index: int, stop: list[int]) -> None:
    """Train one stage to its end. After each step, write a log row, validate, sample and save a checkpoint if they are due."""
    stage, step, position = run.config.stage[index], start_stage(run, index), run.position
    log, due, start = Log(run, step, index), Triggers(run, index), position.progress
    end = start.stage_images + step.total * stage.batch

    if start.step == 0:
        run.evaluation.validate(step)
        if stage.sample_every:
            run.evaluation.sample(step)
    with run.data.loader(index, start.stage_images).stream(start.images, end, stage.batch) as batches:
        for batch in batches:
            result = step(batch, position.progress.stage_step)
            run.advance(step, result)
            done = position.at_end(index)
            if due.log() or done:
                log.row(result, batch, batches)
            if due.validation() or done:
                log.flush()
                with log.paused():
                    run.evaluation.validate(step)
            if due.sample() or done:
                with log.paused():
                    run.evaluation.sample(step)
            keep = due.keep()
            if due.checkpoint() or keep or done or stop:
                log.flush()
                with log.paused():
                    saved = run.saving.save(step, done, keep)
                if stop and not done:
                    raise Stopped(f"{run.folder}: stopped at step {position.progress.step}")
                if done and not saved:
                    raise UserError(
                        "stage-end-not-saved",
                        f"{run.folder}: end of stage {index + 1} not saved, see the warning above; fix that and run again",
                    )
            if done:
                break
    step.release()


def export_run(run: Run) -> None:
    """Write the newest checkpoint's model for other tools. Raises UserError if it cannot be written."""
    try:
        model = export_newest(run.config, run.model, run.report.print)
        run.cost.record(run.position.progress, file_bytes=bytes_of(model))
    except OSError as error:
        raise UserError(
            "model-not-written",
            f"{run.folder}: training is complete, but the model could not be exported ({error.strerror or error}); "
            "fix that and run the same command again",
        ) from error


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Yield a list that receives the number of a SIGINT or SIGTERM: the loop then saves and stops. A second stops at once."""
    stop: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM)
    try:
        old_handlers = {kind: signal.signal(kind, on_signal) for kind in kinds}
    except ValueError:  # not in the main thread: the caller handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for kind, handler in old_handlers.items():
            signal.signal(kind, handler)
