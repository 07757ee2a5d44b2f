"""The training loop. `train` calls everything a run does, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from fastsd.config.schema import Config
from fastsd.console import STDOUT, Console
from fastsd.data.loader import Batch, Stream
from fastsd.errors import Stopped, UserError
from fastsd.run.export import bytes_of, export_newest
from fastsd.run.header import header
from fastsd.run.log import Log
from fastsd.run.profiler import Profiler
from fastsd.run.run import Run, open_run
from fastsd.run.signals import stop_signal
from fastsd.run.stage_kernels import compile_stages
from fastsd.run.stage_start import start_stage
from fastsd.run.triggers import Triggers
from fastsd.train.precision import precision_switches
from fastsd.train.step import Step


def train(config: Config, console: Console = STDOUT, *, export: bool = True) -> None:
    """Train all stages of a config, from the start or from the newest checkpoint, and export the model if `export` is True.

    Raises:
        UserError: the user must change something; saved checkpoints stay intact.
        Stopped: a stop signal arrived; a checkpoint is written first.
    """
    with open_run(config, console) as run, stop_signal(run.folder) as received_signals:
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
    compile_stages(run, index, train_step.micro_batch_size, received_signals)
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
        for batch in _saved_if_unreadable(run, train_step, log, batches):
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
                    raise _stopped(run, saved=saved)
                if done and not saved:
                    raise UserError(
                        "stage-end-not-saved",
                        f"{run.folder}: end of stage {index + 1} not saved, see the warning above; fix that and run again",
                    )

            if done:
                break
    train_step.release()


def _saved_if_unreadable(run: Run, train_step: Step, log: Log, batches: Stream) -> Iterator[Batch]:
    """Yield the batches. If the cache cannot be read, save a checkpoint before the error ends the run."""
    try:
        yield from batches
    except UserError:
        log.flush()
        run.saving.save(train_step, done=False, keep=False)
        raise


def _stopped(run: Run, *, saved: bool) -> Exception:
    step = run.position.progress.step
    if saved:
        return Stopped(f"{run.folder}: stopped at step {step}")
    return UserError("stop-not-saved", f"{run.folder}: stopped at step {step}, which is not saved, see the warning above")


def export_run(run: Run) -> None:
    """Write the newest checkpoint's model for other tools. Raises UserError if it cannot be written."""
    run.saving.retain(run.config.stage[-1].keep_checkpoints)  # a kill may have come between the last save and this
    try:
        model = export_newest(run.config, run.model, run.console)
        run.cost.record(run.position.progress, file_bytes=bytes_of(model))
    except OSError as error:
        raise UserError(
            "model-not-written",
            f"{run.folder}: training is complete, but the model could not be exported ({error.strerror or error}); "
            "fix that and run the same command again",
        ) from error
