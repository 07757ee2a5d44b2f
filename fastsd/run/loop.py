"""The training loop. `train` calls everything a run does, in the order in which it happens."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fastsd.config.schema import Config
from fastsd.data.loader import Batch, Stream
from fastsd.errors import Stopped, UserError
from fastsd.run.export import bytes_of, export_newest
from fastsd.run.header import header
from fastsd.run.log import Log
from fastsd.run.notify import notified_end, notify
from fastsd.run.profiler import Profiler
from fastsd.run.rollback import StepsSkipped, roll_back
from fastsd.run.run import Run, open_run
from fastsd.run.signals import StopSignals, stop_signals
from fastsd.run.stage_kernels import compile_stages
from fastsd.run.stage_start import evaluate_end, start_stage
from fastsd.run.triggers import Due, Triggers
from fastsd.terminal.console import STDOUT, Console
from fastsd.train.precision import precision_switches
from fastsd.train.ranks import ALONE, Ranks
from fastsd.train.step import Step


def train(config: Config, console: Console = STDOUT, *, export: bool = True, start: str = "", ranks: Ranks = ALONE) -> None:
    """Train all stages of a config, from the start or from the newest checkpoint, and export the model if `export` is True.

    Args:
        start: name of the checkpoint to go back to; "" = resume from the newest.
        ranks: the processes that train the run together. Each of them calls this function.

    Raises:
        UserError: the user must change something; saved checkpoints stay intact.
        Stopped: a stop signal arrived; a checkpoint is written first.
    """
    config, console = _visible(config, console, ranks)
    with stop_signals(Path(config.run)) as signals, notified_end(config, console):
        try:
            while not _train_once(config, console, signals, start, ranks, export=export):
                gc.collect()  # the exception's traceback refers to the old model
                start = ""
        except KeyboardInterrupt:
            if not signals:  # it is the caller's
                raise
            raise Stopped(f"{config.run}: stopped, {signals.describe()}") from None


def _visible(config: Config, console: Console, ranks: Ranks) -> tuple[Config, Console]:
    """Return what a rank prints and sends to: ranks other than 0 tell nobody anything."""
    if ranks.main:
        return config, console
    silent = config.log.model_copy(update={"tensorboard": False, "wandb": "", "notify": ""})
    return config.model_copy(update={"log": silent}), Console(quiet=True, force_terminal=False)


def _train_once(config: Config, console: Console, signals: StopSignals, start: str, ranks: Ranks, *, export: bool) -> bool:
    """Open a run and train it to its end. Return False if it has gone back to a checkpoint instead."""
    with open_run(config, console, start, ranks) as run:
        try:
            train_stages(run, signals)
        except StepsSkipped as failure:
            if ranks.main:
                roll_back(run, failure)
            ranks.wait()
            return False
        if export and ranks.main:
            export_run(run)
    return True


def train_stages(run: Run, signals: StopSignals) -> None:
    """Train the stages that are not complete yet."""
    run.report.header(header(run))
    for warning in run.warnings:
        run.console.warn(warning)
    config, unet = run.config, run.model.unet
    last = len(config.stage) - 1
    if run.position.finished(last):
        step, name = run.position.progress.step, config.stage_name(last)
        run.console.echo(f"already finished at step {step}; raise until of stage {name!r} to train on")
    for index in range(run.position.progress.stage, len(config.stage)):
        with precision_switches(config.stage[index].precision, unet, deterministic=config.deterministic) as switches:
            if run.position.finished(index):
                evaluate_end(run, index)
            else:
                train_stage(run, index, switches, signals)


def train_stage(run: Run, index: int, switches: str, signals: StopSignals) -> None:
    """Train one stage to its end. After each step, profile, log, save, validate and sample if they are due."""
    stage, position, ranks = run.config.stage[index], run.position, run.ranks
    train_step = start_stage(run, index, switches)
    compile_stages(run, index, train_step.micro_batch_size)
    log, triggers = Log(run, train_step, index), Triggers(run, index)
    initial = position.progress
    end_image = initial.images + (train_step.total - initial.stage_step) * stage.batch

    if initial.step == 0:
        run.evaluation.validate(train_step)
        if stage.sample_every:
            run.evaluation.sample(train_step)
    for evaluate in run.evaluation.missing():
        evaluate(train_step)

    loader = run.data.loader(index, initial.stage_images)
    profiler = Profiler(run.folder, run.console)
    with closing(profiler), loader.stream(initial.images, end_image, stage.batch) as batches, signals.deferred():
        for batch in _saved_if_unreadable(run, train_step, log, batches):
            result = train_step(batch, position.progress.stage_step)
            run.advance(train_step, result)
            done, *actions = ranks.decided((position.at_end(index), *triggers.after_step()))
            due = Due(*actions)
            position.mark(done=done, validation=due.validation or done, samples=due.samples or done)
            with log.paused():
                profiler.after_step(position.progress.step, requested=due.profile and ranks.main)

            if due.log or done:
                log.row(result, batch, batches)

            if due.snapshot:  # before the checkpoint, so that a run that goes on from there has it
                with log.paused():
                    run.saving.snapshot(train_step)

            if due.checkpoint or done:
                _check_ranks(run, train_step)
                _save(run, train_step, log, keep=due.permanent or done)
                if done and not run.saving.is_saved:
                    raise UserError(
                        "stage-end-not-saved",
                        f"{run.folder}: end of stage {index + 1} not saved, see the warning above; fix that and run again",
                    )

            if (due.validation or done) and not ranks.any_rank(signals):
                log.flush()
                with log.paused():
                    run.evaluation.validate(train_step, signals)

            if (due.samples or done) and not ranks.any_rank(signals):
                with log.paused():
                    run.evaluation.sample(train_step, signals)

            if ranks.any_rank(signals):
                raise _stopped(run, train_step, log)

            if done:
                notify(run.config, "stage", f"{run.folder}: stage {log.name} ended at step {position.progress.step}")
                break
    train_step.release()


def _check_ranks(run: Run, train_step: Step) -> None:
    """Raise UserError if the weights are not the same on all ranks."""
    differing = run.ranks.different(train_step.weights_checksum())
    if differing:
        names, others = " and ".join(map(str, differing)), "rank 0" if run.ranks.world == 2 else "the other ranks"
        step = run.position.progress.step
        raise UserError(
            "ranks-differ",
            f"step {step}: the weights of rank {names} differ from those of {others}, so hardware has made an error; nothing "
            "is saved, run the same command again to resume from the last checkpoint",
        )


def _save(run: Run, train_step: Step, log: Log, *, keep: bool = False, wait: bool = False) -> None:
    """Save a checkpoint, and the log rows up to it."""
    log.flush()
    with log.paused():
        run.saving.save(train_step, keep=keep, wait=wait)


def _saved_if_unreadable(run: Run, train_step: Step, log: Log, batches: Stream) -> Iterator[Batch]:
    """Yield the batches. If a rank cannot read the cache, save a checkpoint before its error ends the run on all."""
    while True:
        batch, error = None, None
        try:
            batch = next(batches, None)
        except UserError as problem:
            error = problem
        if shared := run.ranks.error(error):
            _save_at_end(run, train_step, log)
            raise shared
        if batch is None:
            return
        yield batch


def _save_at_end(run: Run, train_step: Step, log: Log) -> None:
    """Save a checkpoint, unless this step has one, before all ranks end."""
    (unsaved,) = run.ranks.decided([not run.saving.is_saved])
    if unsaved:
        _check_ranks(run, train_step)
        _save(run, train_step, log, wait=True)
    run.ranks.wait()  # when one rank ends, torchrun ends the others: rank 0 in the middle of its checkpoint


def _stopped(run: Run, train_step: Step, log: Log) -> Exception:
    """Save a checkpoint, unless this step has one, and return the exception that ends the run."""
    _save_at_end(run, train_step, log)
    step = run.position.progress.step
    if run.saving.is_saved:
        return Stopped(f"{run.folder}: stopped at step {step}")
    return UserError("stop-not-saved", f"{run.folder}: stopped at step {step}, which is not saved, see the warning above")


def export_run(run: Run) -> None:
    """Write the newest checkpoint's model for other tools. Raises UserError if it cannot be written."""
    run.saving.retain(run.config.stage[-1].keep_checkpoints)  # a kill may have come between the last save and this
    try:
        model = export_newest(run.config, run.model, run.console)
        run.cost.record(run.position.progress, run.console, file_bytes=bytes_of(model))
    except OSError as error:
        raise UserError(
            "model-not-written",
            f"{run.folder}: training is complete, but the model could not be exported ({error.strerror or error}); "
            "fix that and run the same command again",
        ) from error
