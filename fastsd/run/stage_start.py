"""Start of a stage: create its step, load the state of the checkpoint or of the previous stage, and compile its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastsd.config.keys import LIGHT, defaults, keys_with
from fastsd.config.stages import StageTable
from fastsd.errors import Stopped, UserError
from fastsd.model.select import reinitialise
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import SCRATCH, plan_stage
from fastsd.run.compilation import compile_kernels, warn_not_compiled
from fastsd.run.launches import stage_launches
from fastsd.run.report import free_memory
from fastsd.run.run import Run
from fastsd.train.step import Step
from fastsd_kernels import TRITON
from fastsd_kernels.launch import INTERPRETED, Launch

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

    cached_text = run.data.text_embeddings is not None
    carried = run.position.progress.carried
    args = run.model, stage, run.position.steps[index], config.seed, _micro_batch_size(run, index, resumed=resumed)
    step = Step(*args, graph=config.cuda_graph, cached_text=cached_text, carried_steps=carried, warn=run.console.warn)

    if resumed or stage.state == "carry":
        step.load_state_dict(run.saving.state)
    if not resumed:
        step.skipped.zero_()
    run.saving.state = {}
    return step


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
    cached_text = run.data.text_embeddings is not None
    plan = plan_stage(Shapes.of(run.model), stage, run.config.data.resolution, available, run.ops, cached_text=cached_text)
    micro_batch_size = plan.largest_micro_batch()

    if micro_batch_size == 0:
        raise UserError(
            "stage-does-not-fit",
            f"stage {run.config.stage_name(index)!r} does not fit into {available / 1e9:.1f} GB on {run.device}, even with "
            "micro-batch 1; run `fastsd plan` to find checkpointing, precision and optimizer settings that fit",
        )
    run.console.echo(f"micro-batch {micro_batch_size}: the largest that is estimated to fit into {available / 1e9:.1f} GB")
    return micro_batch_size


def compile_stages(run: Run, index: int, micro_batch_size: int, stop: Sequence[int]) -> None:
    """Compile the Triton kernels of a stage and, at the start of a run, of all later stages.

    The micro-batch of a later stage may still be unknown. This stage's is then assumed. If it turns out to be another, the
    start of that stage compiles the few kernels that depend on it.

    Args:
        micro_batch_size: images per forward in this stage.
        stop: signals received; the first one ends the compilation.

    Raises:
        Stopped: a signal arrived.
    """
    if run.ops is not TRITON or INTERPRETED:
        return
    launches: list[Launch] = []
    for i, stage in enumerate(run.config.stage[index:], index):
        known_size = math.gcd(stage.batch, micro_batch_size) if stage.micro_batch == "auto" else stage.micro_batch_size
        size = micro_batch_size if i == index else known_size
        comparable = stage.model_copy(update={**defaults(StageTable, keys_with(StageTable, LIGHT)), "until": 1})
        if (comparable, size) not in run.recorded:
            run.recorded.append((comparable, size))
            launches += _stage_launches(run, i, size)
    compile_kernels(launches, run.console, stop)
    if stop:
        raise Stopped(f"{run.folder}: stopped at step {run.position.progress.step}")


def _stage_launches(run: Run, index: int, micro_batch_size: int) -> list[Launch]:
    shapes = {group.shape for group in run.data.latents.groups}
    cached_text = run.data.text_embeddings is not None
    args = run.config, run.config.stage[index], run.model, run.device, micro_batch_size, shapes, run.evaluation.validation
    try:
        return stage_launches(*args, cached_text=cached_text)
    except Exception as error:  # a run does not depend on it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn_not_compiled(run.console, f"those of {run.config.stage_name(index)}", reason)
        return []
