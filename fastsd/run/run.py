"""A run: its folder, model, data and position, opened from the newest checkpoint if there is one.

Read next: `fastsd/run/loop.py`, which trains it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsd.config.schema import Config, dump_config
from fastsd.model.formats.adapters import load_to_train
from fastsd.model.formats.load import table_of
from fastsd.model.model import Model
from fastsd.model.select import changed_components, parameter_count, selected
from fastsd.model.shapes import Shapes
from fastsd.run import checkpoint
from fastsd.run.checkpoint import RunProgress
from fastsd.run.cost import CostRecorder
from fastsd.run.evaluation import Evaluation
from fastsd.run.export import check_export
from fastsd.run.folder_changes import noticed_changes
from fastsd.run.loss_health import LossHealth
from fastsd.run.position import Position
from fastsd.run.report import SilentReport, TrainReport
from fastsd.run.restart import (
    changes_of,
    check_shared,
    compare_images,
    compare_with_end,
    compare_with_start,
    lock,
    read_config,
)
from fastsd.run.rewind import checkpoint_named, finish_setting_aside, go_back
from fastsd.run.saving import Saving
from fastsd.run.smoothed_loss import SmoothedLoss
from fastsd.run.teacher import base_key, check_teachers
from fastsd.run.training_data import TrainingData
from fastsd.run.validation import Validation
from fastsd.sampling.grid import check_samples
from fastsd.sampling.prompts import notes_on_prompts
from fastsd.storage import make_folder, replace_file
from fastsd.terminal.console import Console, work
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.ranks import ALONE, Ranks, check_stage, local_device
from fastsd.train.schedule import check_length
from fastsd.train.stage_notes import stage_notes
from fastsd.train.step import Step, StepResult
from fastsd_kernels import Ops


@dataclass
class Run:
    """State of a run that outlives its stages.

    Attributes:
        position: current stage and progress.
        saving: writes the checkpoints.
        evaluation: draws samples and runs validation.
        cost: seconds, steps and memory of each stage.
        parameter_counts: number of parameters that each stage trains.
        warnings: messages to the user about this start, one line each.
        ranks: the processes that train this run.
    """

    config: Config
    folder: Path
    device: torch.device
    ops: Ops
    model: Model
    data: TrainingData
    position: Position
    smoothed: SmoothedLoss
    health: LossHealth
    saving: Saving
    evaluation: Evaluation
    cost: CostRecorder
    report: TrainReport
    parameter_counts: list[int]
    warnings: list[str]
    ranks: Ranks = ALONE

    @property
    def console(self) -> Console:
        return self.report.console

    @property
    def resident(self) -> list[nn.Module]:
        """The modules on the training device, without the text encoder if text embeddings are cached."""
        return [self.model.unet, self.model.vae.module] + ([] if self.data.text_embeddings else [self.model.text.module])

    def advance(self, step: Step, result: StepResult) -> None:
        """Record one optimizer step: the progress, the changed components and the loss."""
        self.position.advance(step)
        self.saving.changed.update(changed_components(step.trained))
        self.smoothed.update(result.loss)
        self.health.update(result.loss, result.skipped)


@contextmanager
def open_run(config: Config, console: Console, start: str = "", ranks: Ranks = ALONE) -> Iterator[Run]:
    """Open the run of a config, and lock its folder until the context exits.

    Args:
        start: name of the checkpoint to go back to; "" = resume from the newest.
        ranks: the processes that train the run. All ranks go on from the checkpoint that rank 0 chooses.

    Raises:
        UserError: the user must change something before training can start or continue.
    """
    for index, stage in enumerate(config.stage):
        check_stage(stage, config.stage_name(index), ranks)
    folder = Path(config.run)
    with ExitStack() as stack:
        stack.enter_context(_locked(folder, console, ranks))
        device = choose_device(local_device(config.device, ranks), console)
        ranks.hear_hosts_first(device)
        ops = choose_ops(config.kernels, device)
        back = checkpoint_named(folder, start, config, console) if start and ranks.main else None
        newest, saved_progress, warnings = _choose_checkpoint(folder, config, back, ranks)
        if ranks.main:
            warnings += compare_with_start(folder / "config.json", config, saved_progress, newest, back=back is not None)
        progress = saved_progress or RunProgress()
        check_teachers(config, progress.stage + progress.stage_done)
        saved: Mapping[str, Tensor] = checkpoint.load_state(newest) if newest else {}

        model = _load_model(config, ops, newest)
        warnings += model.notes
        if newest is None and any(stage.teacher for stage in config.stage):
            progress = replace(progress, base_key=base_key(config.model, model.unet))
        warnings += notes_on_prompts(model.text, config.sample, chunks_fixed=newest is not None)
        with work("opening the cache"):
            data = stack.enter_context(closing(TrainingData(config, model, saved, ranks)))
        if ranks.main:
            warnings += compare_images(folder / "images.json", data.latents, config, resumed=newest is not None)
        warnings += data.warnings
        names = [config.stage_name(index) for index in range(len(config.stage))]
        steps = [check_length(*args) for args in zip(config.stage, names, data.epochs, strict=True)]
        stages = zip(config.stage, names, steps, strict=True)
        warnings += [note for args in stages for note in stage_notes(*args, model.scheduler)]
        counts = [_count_parameters(config, index, model) for index in range(len(config.stage))]
        validation = Validation(model, data.loader(0), data.sets, config.validate_)

        position = Position(progress, config.stage, steps, extendable="skipped" in saved)
        if ranks.main:
            compare_with_end(folder, config, position, newest)
        cost, ends_here = CostRecorder(config, counts, device), position.end_at_checkpoint()
        if ends_here:
            position.progress = replace(position.progress, costs=cost.of_complete_stage(position.progress))
        elif newest and not position.finished(progress.stage):
            changes = changes_of(read_config(newest / checkpoint.CONFIG), config, progress)
            position.progress = replace(progress, changes=progress.changes + changes)

        if back:
            go_back(folder, back, progress.step, console)
        if ranks.main:
            replace_file(folder / "config.json", dump_config(config))
        saved_at = newest.stat().st_mtime if newest else None
        report = (TrainReport if ranks.main else SilentReport)(
            folder, config.log, progress.step, saved_at, console, progress.logs
        )
        stack.enter_context(closing(report))
        with _memory_to_open(device, ranks):
            smoothed, health = SmoothedLoss(device), LossHealth(device)
            smoothed.load_state_dict(saved)
            health.load_state_dict(saved)
        if newest and ranks.main:
            cost.record(position.progress, console)
        saving = Saving(config, model, position, smoothed, health, report, cost, saved, data.sets, ranks)
        stack.enter_context(saving)
        if newest and ends_here and ranks.main:
            saving.keep_for_good(newest.name)
        evaluation = Evaluation(config, model, data.sets, validation, position, report, cost, ranks)
        args = config, folder, device, ops, model, data, position, smoothed, health, saving, evaluation, cost, report, counts
        run = Run(*args, warnings, ranks)
        if ranks.main:
            stack.enter_context(noticed_changes(config, data.latents.name, console))
        with _memory_to_open(device, ranks):
            nn.ModuleList(run.resident).to(device)
        yield run


@contextmanager
def _locked(folder: Path, console: Console, ranks: Ranks) -> Iterator[None]:
    """Make and lock the folder of a run, which all ranks must see."""
    with ExitStack() as stack:
        if ranks.main:
            make_folder(folder)
            stack.enter_context(lock(folder))
            if earlier := finish_setting_aside(folder):
                console.echo(f"finished setting aside what the run recorded after the step it went back to: {earlier}")
        check_shared(folder, ranks)
        yield


@contextmanager
def _memory_to_open(device: torch.device, ranks: Ranks) -> Iterator[None]:
    with ranks.needing_memory(f"when the run was opened on {device}"), ranks.allocating():
        yield


def _choose_checkpoint(
    folder: Path, config: Config, back: Path | None, ranks: Ranks
) -> tuple[Path | None, RunProgress | None, list[str]]:
    """Return the checkpoint that all ranks go on from, its progress, and warnings. Rank 0 chooses and restores it."""
    opened = None
    if back:
        opened = checkpoint.open_checkpoint(back, config.model)
    elif ranks.main:
        opened = checkpoint.newest(folder / "checkpoints", config.model)
    name = ranks.text(opened[0].name if opened else "")
    if not name:
        return None, None, []
    path = folder / "checkpoints" / name
    return opened or (path, checkpoint.read_progress(path), [])


def _load_model(config: Config, ops: Ops, newest: Path | None) -> Model:
    """Load the model of the newest checkpoint, or the base. Raises UserError if it cannot be trained, exported or sampled."""
    # A checkpoint is a complete model, so the base is no longer needed.
    model = load_to_train(table_of(str(newest), config.model) if newest else config.model, ops, config.seed, newest)
    Shapes.of(model).check_heads(ops)
    check_export(config, model)
    check_samples(model, config)
    return model


def _count_parameters(config: Config, index: int, model: Model) -> int:
    """Count the parameters that a stage trains. Raises UserError for a name that matches no parameter."""
    stage, location = config.stage[index], f"stage {config.stage_name(index)!r}"
    selected(model, stage.reinit, f"{location}: reinit")
    return parameter_count(model, selected(model, stage.train, f"{location}: train"))
