"""Start of a stage: create its step, and load the state of the checkpoint or of the previous stage."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

from fastsd.config.stages import COMPONENTS
from fastsd.data.building.buckets import planned_side
from fastsd.errors import UserError, out_of_memory
from fastsd.model.select import reinitialise
from fastsd.model.shapes import Shapes
from fastsd.plan.gpu_specs import gpu_of
from fastsd.plan.plan import SCRATCH, plan_stage
from fastsd.plan.rehearsal import moved_by
from fastsd.run.flow_fit import fit_to_teacher
from fastsd.run.report import free_memory
from fastsd.run.run import Run
from fastsd.run.teacher import base_key, check_unchanged, load_teacher
from fastsd.terminal.texts import size_text
from fastsd.train.flow import Teacher
from fastsd.train.step import Step

_STATE_TEXT = {"reset": "reset", "carry": "carried over from the previous stage"}


def start_stage(run: Run, index: int, switches: str) -> Step:
    """Create the step of a stage, and load the optimizer state into it: that of the checkpoint if the run was in the middle of
    the stage, or that of the previous stage if the config carries it over. `switches` describes the precision, for a message.

    Raises:
        UserError: the stage does not fit into the device's memory.
    """
    config, stage, name = run.config, run.config.stage[index], run.config.stage_name(index)
    resumed = run.position.begin(index)
    run.model.unet.checkpointing = stage.checkpointing
    state = f"; optimizer state: {_STATE_TEXT[stage.state]}" if index else ""
    run.console.echo(f"{name}: {switches}{state}")

    if stage.reinit and not resumed:
        count = reinitialise(run.model, stage.reinit, config.seed, f"stage {name!r}: reinit")
        run.saving.changed.update(entry.split(".")[0] for entry in stage.reinit)
        run.console.echo(f"{name}: {count:,} parameters reinitialised ({', '.join(stage.reinit)})")

    teacher = _load_teacher(run, name) if stage.teacher else None
    micro_batch_size = _micro_batch_size(run, index, resumed=resumed)
    with run.ranks.needing_memory(f"at the start of stage {name!r}"):
        if teacher and index == 0 and not resumed:
            fit_to_teacher(run, teacher)
        with run.ranks.allocating():
            step = _create_step(run, index, micro_batch_size, teacher)
    if step.teacher:
        copied = sum(tensor.nbytes for tensor in step.teacher.copied)
        run.console.echo(f"{name}: the teacher takes {size_text(copied)} beside the weights that it shares with the model")
    if resumed or stage.state == "carry":
        step.load_state_dict(run.saving.state)
    if not resumed:
        step.skipped.zero_()
        run.health.begin(carried=stage.state == "carry")
    run.saving.state = {}
    return step


def evaluate_end(run: Run, index: int) -> None:
    """Draw the samples and measure the validation at the end of a complete stage, if a kill has prevented them.

    If memory runs out, they are skipped, and the model stays as it is.
    """
    if index != run.position.progress.stage or not (missing := run.evaluation.missing()):
        return
    modules = [run.model.component(name) for name in COMPONENTS]
    weights = [(weight, weight.device, weight.data.cpu()) for module in modules for weight in module.parameters()]
    try:
        with run.ranks.allocating():
            step = _create_step(run, index, run.position.progress.micro_batch_size, evaluates_only=True)
            step.load_averages(run.saving.state)
    except Exception as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
    else:
        for evaluate in missing:
            evaluate(step)
        step.release()
        return
    gc.collect()  # the error has ended, and with it the tensors that its traceback refers to
    for weight, device, exact in weights:
        weight.data = exact.to(device)
    name = run.config.stage_name(index)
    run.console.warn(f"out of memory for what is to be evaluated at the end of stage {name!r} ({problem}); it is skipped")


def _load_teacher(run: Run, name: str) -> Teacher:
    table = run.config.model
    teacher = load_teacher(table, run.ops, run.console)
    key, saved = base_key(table, teacher.unet), run.position.progress.base_key
    check_unchanged(table, name, saved, key)
    run.position.progress = replace(run.position.progress, base_key=key)
    return teacher


def _create_step(
    run: Run, index: int, micro_batch_size: int, teacher: Teacher | None = None, *, evaluates_only: bool = False
) -> Step:
    config, carried = run.config, run.position.progress.carried
    cached_text = run.data.text_embeddings is not None
    args = run.model, config.stage[index], run.position.steps[index], config.seed, micro_batch_size
    return Step(
        *args,
        graph=config.cuda_graph,
        cached_text=cached_text,
        carried_steps=carried,
        ranks=run.ranks,
        teacher=teacher,
        warn=run.console.warn,
        evaluates_only=evaluates_only,
    )


def _micro_batch_size(run: Run, index: int, *, resumed: bool) -> int:
    """Return the images per forward. A resumed run keeps its previous micro-batch, so that it computes the same sums."""
    stage, progress = run.config.stage[index], run.position.progress
    if resumed and progress.micro_batch_size and progress.micro_batch_setting == stage.micro_batch:
        return progress.micro_batch_size
    if stage.micro_batch != "auto":
        return stage.micro_batch_size
    # The plan counts the model too, so the memory of the resident modules is available to it.
    scratch = SCRATCH if run.device.type == "cuda" else 0
    resident_bytes = sum(p.numel() * p.element_size() for module in run.resident for p in module.parameters())
    available = free_memory(run.device) - scratch + resident_bytes
    cached_text, card = run.data.text_embeddings is not None, gpu_of(run.device)
    shapes = Shapes.of(run.model)
    size = planned_side(run.config.data, shapes.step), available
    options: dict[str, Any] = {"cached_text": cached_text, "card": card, "ranks": run.ranks}
    if stage.teacher:
        options["moved"] = moved_by(run.config.stage[:index])
    plan = plan_stage(shapes, stage, *size, run.ops, **options)
    micro_batch_size = run.ranks.least(plan.largest_micro_batch())

    if micro_batch_size == 0:
        raise UserError(
            "stage-does-not-fit",
            f"stage {run.config.stage_name(index)!r} does not fit into {size_text(available)} on {run.device}, even with "
            f"micro-batch 1; run {run.ranks.plan_command} to find checkpointing, precision and optimizer settings that fit",
        )
    run.console.echo(f"micro-batch {micro_batch_size}: the largest that is estimated to fit into {size_text(available)}")
    return micro_batch_size
