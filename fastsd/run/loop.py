"""The training loop. `train` calls everything a run does, in the order in which it happens."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType

from fastsd.config.schema import Config
from fastsd.console import STDOUT, Console
from fastsd.errors import Stopped, UserError
from fastsd.run.export import bytes_of, export_newest
from fastsd.run.header import header
from fastsd.run.log import Log
from fastsd.run.profiler import Profiler
from fastsd.run.run import Run, open_run
from fastsd.run.stage_start import start_stage
from fastsd.run.triggers import Triggers
from fastsd.train.precision import precision_switches


def train(config: Config, console: Console = STDOUT, *, export: bool = True) -> None:
    """Train all stages of a config, from the start or from the newest checkpoint, and export the model if `export` is True.

    Raises:
        UserError: the user must change something; saved checkpoints stay intact.
        Stopped: a stop signal arrived; a checkpoint is written first.
    """
    with open_run(config, console) as run, stop_signal() as received_signals:
        run.report.header(header(run))
        for warning in run.warnings:
            run.console.warn(warning)
        for index in range(run.position.progress.stage, len(config.stage)):
            if not run.position.finished(index):
                precision = config.stage[index].precision
                with precision_switches(precision, run.model.unet, deterministic=config.deterministic) as switches:
                    train_stage(run, index, switches, received_signals)
        if export:
            export_run(run)


def train_stage(run: Run, index: int, switches: str, received_signals: list[int]) -> None:
    """Train one stage to its end. After each step, profile, log, validate, sample and save a checkpoint if they are due."""
    stage, position = run.config.stage[index], run.position
    train_step = start_stage(run, index, switches)
    log, triggers = Log(run, train_step, index), Triggers(run, index)
    initial = position.progress
    end_image = initial.stage_images + train_step.total * stage.batch

    if initial.step == 0:
        run.evaluation.validate(train_step)
        if stage.sample_every:
            run.evaluation.sample(train_step)

    loader = run.data.loader(index, initial.stage_images)
    profiler = Profiler(run.folder, run.console)
    with closing(profiler), loader.stream(initial.images, end_image, stage.batch) as batches:
        for batch in batches:
            result = train_step(batch, position.progress.stage_step)
            run.advance(train_step, result)
            done, due = position.at_end(index), triggers.after_step()
            with log.paused():
                profiler.after_step(position.progress.step, requested=due.profile)

            if due.log or done:
                log.row(result, batch, batches)

            if due.validation or done:
                log.flush()
                with log.paused():
                    run.evaluation.validate(train_step)

            if due.samples or done:
                with log.paused():
                    run.evaluation.sample(train_step)

            if due.checkpoint or done or received_signals:
                log.flush()
                with log.paused():
                    saved = run.saving.save(train_step, done=done, keep=due.permanent)
                if received_signals and not done:
                    raise Stopped(f"{run.folder}: stopped at step {position.progress.step}")
                if done and not saved:
                    raise UserError(
                        "stage-end-not-saved",
                        f"{run.folder}: end of stage {index + 1} not saved, see the warning above; fix that and run again",
                    )

            if done:
                break
    train_step.release()


def export_run(run: Run) -> None:
    """Write the newest checkpoint's model for other tools. Raises UserError if it cannot be written."""
    try:
        model = export_newest(run.config, run.model, run.console)
        run.cost.record(run.position.progress, file_bytes=bytes_of(model))
    except OSError as error:
        raise UserError(
            "model-not-written",
            f"{run.folder}: training is complete, but the model could not be exported ({error.strerror or error}); "
            "fix that and run the same command again",
        ) from error


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """Yield a list to which SIGINT or SIGTERM is added, so that the loop saves and stops. A second signal stops at once."""
    received_signals: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received_signals:
            raise KeyboardInterrupt
        received_signals.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        old_handlers = {number: signal.signal(number, on_signal) for number in signals}
    except ValueError:  # not in the main thread: the caller handles signals
        yield received_signals
        return
    try:
        yield received_signals
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
