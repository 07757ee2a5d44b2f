"""Memory, time and disk space of a job, planned from the config alone, without a GPU.

No formulas model the step. The plan runs the real training step on tensors with shapes but no data, counts memory as it is
allocated and freed (`train/memory.py`), and records the operations (`operations.py`), of which `step_time.py` predicts the
time. Planning one micro-batch takes a second at any size, so no result is extrapolated from another.

    weights, gradients, state, EMA    tensors listed by `Step.tensors_by_role`
    activations                       allocated in the forward and alive when it ends
    working memory                    needed at the peak of the step, beyond all of these, with the workspace of convolutions

cuDNN's workspace is what its heuristics choose for each card (`bench/cudnn_workspace.py`). `RESERVED` is a constant for memory
no tensor shows: the CUDA context, libraries, and gaps between tensors.
Read next: `fastsd/plan/rehearsal.py`, `fastsd/train/step.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastsd.config.keys import LIGHT, defaults, keys_with
from fastsd.config.schema import Config, DataTable, StageTable
from fastsd.config.stages import ENDLESS, parse_amount
from fastsd.data.building.buckets import planned_side
from fastsd.data.sources import folders
from fastsd.errors import UserError
from fastsd.model.select import changed_components
from fastsd.model.shapes import Shapes, read_shapes
from fastsd.model.text_encoder import chunk_limit, context_lengths
from fastsd.plan.communication import Segment, StepTimes
from fastsd.plan.disk import print_disk, run_bytes
from fastsd.plan.figures import duration_text, range_text
from fastsd.plan.gpu_specs import find_gpu
from fastsd.plan.large_data import describe_data, print_data
from fastsd.plan.links import Cluster
from fastsd.plan.operations import Operation
from fastsd.plan.rehearsal import MemoryEstimate, Rehearsal, moved_by
from fastsd.plan.several_gpus import columns, describe_ranks, lines_of
from fastsd.plan.step_time import step_seconds, workspace_bytes
from fastsd.storage import replace_file
from fastsd.terminal.console import STDOUT, Console, counted, work
from fastsd.train.ranks import ALONE, Ranks, check_stage
from fastsd_kernels import REFERENCE, TRITON, Ops
from fastsd_kernels.cards import CARDS, Card

GIB = 1 << 30
# Memory that no tensor shows: the CUDA context with its kernels and library handles, and scratch, which covers the gaps of the
# allocator and the workspace of matmuls. These values are not measured.
CONTEXT, SCRATCH = int(0.5 * GIB), int(0.3 * GIB)
RESERVED = CONTEXT + SCRATCH
LEVELS = ("none", "ff", "block")


class StagePlan:
    """Plan of one stage at any micro-batch size and checkpointing level. Created by `plan_stage`."""

    def __init__(
        self,
        shapes: Shapes,
        stage: StageTable,
        resolution: int,
        device_bytes: int,
        ops: Ops | None,
        *,
        cached_text: bool,
        card: Card | None,
        cluster: Cluster | None = None,
        moved: Sequence[str] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.moved = tuple(moved)
        self.shapes, self.stage, self.device_bytes, self.cached_text = shapes, stage, device_bytes, cached_text
        self.card, self.cluster, self.ranks = card, cluster, ranks or (cluster.ranks if cluster else ALONE)
        self.images = self.ranks.share(stage.batch)  # of a batch, on one GPU
        self.ops, self.side = ops or TRITON or REFERENCE, shapes.side(resolution)
        shapes.check_heads(self.ops)
        self._rehearsals: dict[bool, Rehearsal] = {}
        self._needs: dict[tuple[int, str], MemoryEstimate] = {}
        self._pairs: dict[tuple[int, str], MemoryEstimate] = {}  # steps with two micro-batches

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batch sizes that this stage may have, smallest first."""
        images = self.images
        return [n for n in range(1, images + 1) if images % n == 0 and (n == images or not self.stage.fused_backward)]

    @property
    def trained(self) -> list[str]:
        """Components of the model that the stage changes."""
        self.need(self.images)
        return changed_components(self._rehearsals[True].trained)

    def need(self, micro_batch_size: int, checkpointing: str | None = None) -> MemoryEstimate:
        """Return the memory and operations of a step with this micro-batch size. It is run once on tensors without data."""
        level = checkpointing or self.stage.checkpointing
        if (micro_batch_size, level) not in self._needs:
            whole_batch = micro_batch_size == self.images
            if whole_batch not in self._rehearsals:
                micro_batch = 0 if whole_batch else 1
                settings = self.shapes, self.stage, self.side, self.ops, micro_batch
                options: dict[str, Any] = {"cached_text": self.cached_text, "ranks": self.ranks, "moved": self.moved}
                self._rehearsals[whole_batch] = Rehearsal(*settings, **options, schedule=self.cluster is not None)
            with work(f"rehearsing micro-batch {micro_batch_size}, checkpointing {level}"):
                self._needs[micro_batch_size, level] = self._rehearsals[whole_batch].step(micro_batch_size, level)
        need = self._needs[micro_batch_size, level]
        if self.ops is not TRITON:  # on a CPU
            return need
        images = micro_batch_size * (self.side / 64) ** 2
        return replace(need, working=need.working + workspace_bytes(self.stage.precision, images, self.card))

    def operations(self, micro_batch_size: int, checkpointing: str | None = None) -> Counter[Operation]:
        """Return how often each operation runs in a whole step."""
        level = checkpointing or self.stage.checkpointing
        operations = Counter(self.need(micro_batch_size, level).operations)
        later = self.images // micro_batch_size - 1
        if later:
            # The first micro-batch writes the gradients, the others add to them.
            if (micro_batch_size, level) not in self._pairs:
                self._pairs[micro_batch_size, level] = self._rehearsals[False].step(micro_batch_size, level, 2)
            second = self._pairs[micro_batch_size, level].operations.copy()
            second.subtract(operations)
            operations.update({op: later * count for op, count in second.items()})
        return operations

    def segments(self, micro_batch_size: int, checkpointing: str | None = None) -> tuple[Segment, ...]:
        """Return the end of a step, divided by what it sends to other ranks. Empty for one rank."""
        self.operations(micro_batch_size, checkpointing)
        level = checkpointing or self.stage.checkpointing
        return self._pairs.get((micro_batch_size, level), self.need(micro_batch_size, level)).segments

    def largest_micro_batch(self, bytes: int | None = None, checkpointing: str | None = None) -> int:
        """Find the largest micro-batch size with which the stage fits.

        Args:
            bytes: limit for all tensors of the run together, weights included; None = `device_bytes`.
            checkpointing: checkpointing level; None = the stage's.

        Returns:
            A divisor of the batch; 0 if not even the smallest micro-batch fits.
        """
        room = self.device_bytes if bytes is None else bytes
        *candidates, whole_batch = self.micro_batches
        # Try the whole batch first. It may need less memory than half the batch, because accumulated bf16 gradients are fp32.
        if self.need(whole_batch, checkpointing).total <= room:
            return whole_batch
        largest = 0
        while candidates:
            middle = len(candidates) // 2
            if self.need(candidates[middle], checkpointing).total <= room:
                largest, candidates = candidates[middle], candidates[middle + 1 :]
            else:
                candidates = candidates[:middle]
        return largest

    def images_per_second(self, card: Card, micro_batch_size: int, checkpointing: str | None = None) -> tuple[float, float]:
        """Predict the training speed of all GPUs as in `step_time.py`, as (slowest, fastest)."""
        if self.cluster:
            times = self.step_times(card, micro_batch_size, checkpointing)
            fewest, most = times.fastest.seconds, times.slowest.seconds
        else:
            fewest, most = step_seconds(self.operations(micro_batch_size, checkpointing), card, self.stage.precision)
        return self.stage.batch / most, self.stage.batch / fewest

    def step_times(self, card: Card, micro_batch_size: int, checkpointing: str | None = None) -> StepTimes:
        """Predict a step of several GPUs as in `communication.py`."""
        assert self.cluster is not None
        compute = step_seconds(self.operations(micro_batch_size, checkpointing), card, self.stage.precision)
        return StepTimes.of(compute, self.segments(micro_batch_size, checkpointing), card, self.stage.precision, self.cluster)

    def otherwise_sharded(self) -> StagePlan | None:
        """Return a plan with the other value of `shard_state`. None for one GPU."""
        if self.cluster is None or self.cluster.gpus == 1:
            return None
        other = copy(self)
        other.stage = self.stage.model_copy(update={"shard_state": not self.stage.shard_state})
        other._rehearsals, other._needs, other._pairs = {}, {}, {}
        return other

    def files(self) -> tuple[dict[str, int], int, int]:
        """Return the bytes of each component in fp32, of the stage's optimizer state, and of its averages."""
        self.need(self.images)
        rehearsal = self._rehearsals[True]
        component_bytes = {name: sum(4 * p.numel() for p in module.parameters()) for name, module in rehearsal.modules.items()}
        return component_bytes, rehearsal.owners["optimizer state"], rehearsal.owners["EMA"]


def plan_stage(
    shapes: Shapes,
    stage: StageTable,
    resolution: int,
    device_bytes: int,
    ops: Ops | None = None,
    *,
    cached_text: bool = False,
    card: Card | None = None,
    cluster: Cluster | None = None,
    moved: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> StagePlan:
    """Plan one stage.

    Args:
        shapes: shapes of the model, from `Shapes.of(model)` or `read_shapes(table)`.
        resolution: image size in px per side.
        device_bytes: limit for all tensors of the run together: the card's memory minus `RESERVED`; or, in a process that
            already has a CUDA context, free memory plus that of its own tensors, minus `SCRATCH`.
        ops: the ops the step will use; None = `TRITON` on a GPU, or `REFERENCE` on a CPU if Triton is missing.
        cached_text: True if text embeddings are cached, so that the text encoder takes no memory.
        card: whose workspace of convolutions is planned for; None = the card that takes most.
        cluster: the GPUs that share each batch, of which one is planned; None = one GPU.
        moved: entries of `train` and `reinit` of earlier stages (see `moved_by`). A teacher does not share these weights.
        ranks: the rank that is planned, if the times of several are of no interest; None = the first of `cluster`.

    Raises:
        UserError: the model does not support the resolution.
    """
    options: dict[str, Any] = {"cached_text": cached_text, "card": card, "cluster": cluster, "moved": moved, "ranks": ranks}
    return StagePlan(shapes, stage, resolution, device_bytes, ops, **options)


def plan(
    config: Config,
    vram: float | None = None,
    card: str = "",
    path: Path | None = None,
    console: Console = STDOUT,
    *,
    cluster: Cluster | None = None,
) -> None:
    """Print memory, estimated speed and disk space of every stage. Implements `fastsd plan`.

    Args:
        vram: memory of the card in GiB; None = that of `card`, or 24.
        card: the name of a card in `fastsd_kernels/cards.py`; "" = predictions for all of them.
        path: file to which all results are also written as JSON; None = no file.
        cluster: the GPUs that train together, of which one is planned; None = one GPU.

    Raises:
        UserError: an argument or the config is invalid. A stage that does not fit is a result, not an error.
    """
    cards = [find_gpu(card)] if card else list(CARDS.values())
    vram = vram if vram is not None else cards[0].memory if card else 24.0
    if not 0 < vram < math.inf:
        raise UserError("vram-invalid", f"--vram is {vram:g}; give the memory of the card in GiB, for example 24")
    for i, stage in enumerate(config.stage):
        check_stage(stage, config.stage_name(i), cluster.ranks if cluster else ALONE)
    shapes, warnings = read_shapes(config.model)
    ops = REFERENCE if config.kernels == "reference" else TRITON or REFERENCE
    images, resolution = _count_images(config.data), planned_side(config.data, shapes.step)
    report: dict[str, Any] = {"vram_gib": vram, "reserved_gib": RESERVED / GIB, "notes": warnings, "kernels": ops.name}
    report |= {"resolution": config.data.resolution, "images": images, "stages": []}
    remark = "" if ops is TRITON else " (CPU kernels, which need more memory than GPU kernels)"
    console.echo("shapes     " + ("\n           ".join(warnings) or f"from {config.model.base}"))
    console.echo(f"kernels    {ops.name}{remark}")
    console.echo(f"memory     {vram:g} GiB, including {RESERVED / GIB:.1f} GiB reserved for the CUDA context and libraries")
    console.echo("speed      predicted from each operation's products, bytes and launches, not measured; slowest-fastest")
    lengths = context_lengths(shapes.text.get("max_position_embeddings", 77), shapes.chunks)
    report["text_lengths"] = lengths
    if len(lengths) > 1:
        console.echo(
            f'text       {lengths[-1]} tokens: with model.chunks = "auto", a batch has {", ".join(map(str, lengths[:-1]))} or '
            f"{lengths[-1]}, and the longest is planned for"
        )
    console.echo(f"images     {images or 'unknown, data.folders cannot be read'}")
    if cluster:
        console.echo(f"ranks      {cluster.text}; memory is that of one GPU, speed that of all")

    plans: list[StagePlan] = []  # stages that differ only in light keys share a plan
    for i, stage in enumerate(counted("planning", config.stage, "stages")):
        comparable = stage.model_copy(update={**defaults(StageTable, keys_with(StageTable, LIGHT)), "until": 1})
        moved = moved_by(config.stage[:i]) if stage.teacher else ()
        existing = next((plan for plan in plans if (plan.stage, plan.moved) == (comparable, moved)), None)
        room, cached_text = int(vram * GIB) - RESERVED, config.cache.hidden_states
        settings: dict[str, Any] = {"cached_text": cached_text, "card": cards[0] if card else None, "moved": moved}
        plans.append(existing or plan_stage(shapes, comparable, resolution, room, ops, **settings, cluster=cluster))
        entry = _describe(plans[-1], stage, config.stage_name(i), cards, images)
        report["stages"].append(entry)
        _print_stage(entry, vram, console)

    report["disk"] = _disk(config, shapes, plans, report["stages"], images)
    print_disk(report["disk"], console)
    if cluster:
        speeds = [entry["images_per_second"] for entry in report["stages"]]
        size = plans[0].side, report["disk"]["cache_an_image"]
        report["data"] = describe_data(config, shapes, *size, speeds, cards, cluster.gpus, ops)
        print_data(report["data"], console)
    if path:
        try:
            replace_file(path, json.dumps(report, indent=2) + "\n")
        except OSError as error:
            problem = f"--json is {str(path)!r}, which cannot be written ({error.strerror})"
            raise UserError("json-unwritable", f"{problem}; name another file") from None


def _count_images(data: DataTable) -> int | None:
    """Count the images per epoch, before filtering by tag. Return None if the folders cannot be read."""
    try:
        return folders.count(data)[1]
    except UserError:
        return None


def _describe(plan: StagePlan, stage: StageTable, name: str, cards: list[Card], images: int | None) -> dict[str, Any]:
    """Describe one stage as JSON, with sizes in bytes and times in seconds."""
    largest = plan.largest_micro_batch()
    micro_batch_size = largest or plan.micro_batches[0]
    if stage.micro_batch != "auto":
        micro_batch_size = max((n for n in plan.micro_batches if n <= stage.micro_batch_size), default=stage.micro_batch_size)
    need = plan.need(micro_batch_size)
    unit = parse_amount("until", stage.until)[1]
    steps = stage.steps(images or 1) if images or unit != "epochs" else None
    steps = None if steps == ENDLESS else steps  # the stage ends by time
    levels = {}
    for level in LEVELS:
        level_largest = plan.largest_micro_batch(checkpointing=level)
        level_need = plan.need(level_largest or plan.micro_batches[0], level)
        per_image = {"activations_an_image": level_need.activations, "flops_an_image": level_need.flops}
        levels[level] = {"largest_micro_batch": level_largest, "total": level_need.total + RESERVED}
        levels[level] |= {key: value // level_need.micro_batch_size for key, value in per_image.items()}

    speeds = {card.name: plan.images_per_second(card, micro_batch_size) for card in cards}
    images_trained = steps and steps * stage.batch
    seconds = {card: images_trained and [images_trained / speed for speed in pair[::-1]] for card, pair in speeds.items()}
    settings = ("train", "optimizer", "precision", "batch", "checkpointing", "fused_backward")
    entry = {key: getattr(stage, key) for key in settings}
    entry |= {"name": name, "micro_batch": micro_batch_size, "steps": steps}
    entry["memory"] = {**need.owners, "activations": need.activations, "working memory": need.working, "reserved": RESERVED}
    entry |= {"sampling": need.sampling, "total": need.total + RESERVED, "fits": need.total <= plan.device_bytes}
    if plan.cluster and plan.cluster.gpus > 1:
        times = {card.name: plan.step_times(card, micro_batch_size) for card in cards}
        entry["ranks"] = describe_ranks(plan.segments(micro_batch_size), times, plan.cluster, plan.images)
        if other := plan.otherwise_sharded():
            totals = [p.need(micro_batch_size).total + RESERVED for p in (plan, other)]
            entry["ranks"]["sharded"], entry["ranks"]["unsharded"] = totals[
                :: 1 if getattr(stage, "shard_state", False) else -1
            ]
    return entry | {"largest_micro_batch": largest, "levels": levels, "images_per_second": speeds, "seconds": seconds}


def _print_stage(entry: dict[str, Any], vram: float, console: Console) -> None:
    size, batch, ranks = entry["micro_batch"], entry["batch"], entry.get("ranks")
    settings = ["+".join(entry["train"]), entry["optimizer"], entry["precision"], f"checkpointing {entry['checkpointing']}"]
    settings += ["fused backward"] if entry["fused_backward"] else []
    forwards = f"{ranks['gpus']} GPUs x {ranks['images'] // size} x {size}" if ranks else f"{batch // size} x {size}"
    console.echo(f"\n{entry['name']}: {', '.join(settings)}, batch {batch} = {forwards}")
    labels = {
        "activations": f"activations saved for backward, {size} x {entry['memory']['activations'] / size / GIB:.2f}",
        "working memory": "working memory at the peak of a step",
        "reserved": "CUDA context and libraries",
    }
    rows = [(labels.get(owner, owner), size) for owner, size in entry["memory"].items() if size]
    extra = entry["total"] - sum(size for _, size in rows)
    for owner, size in [*rows, *([("additional while sampling", extra)] if extra else []), ("total", entry["total"])]:
        console.echo(f"  {size / GIB:9.2f} GiB  {owner}")

    console.echo("  checkpointing   GiB per image   TFLOP per image   largest micro-batch")
    for level, row in entry["levels"].items():
        activations, flops = row["activations_an_image"] / GIB, row["flops_an_image"] / 1e12
        console.echo(f"  {level:<13}   {activations:13.3f}   {flops:15.2f}   {row['largest_micro_batch'] or 'none fits':>19}")

    speeds, seconds = entry["images_per_second"], entry["seconds"]
    if entry["steps"] is None:
        steps, seconds = "1,000,000 images", {card: [1e6 / speed for speed in pair[::-1]] for card, pair in speeds.items()}
    else:
        steps = f"{entry['steps']:,} steps"
    width = max(len(steps), 14) if ranks else 0
    console.echo(f"  {'predicted':<12}{'images/s':>12}   {steps:<{width}}" + columns(ranks))
    for card, pair in speeds.items():
        duration = duration_text(*seconds[card])
        console.echo(f"  {card:<12}{range_text(pair):>12}   {duration:<{width}}" + columns(ranks, card))
    if ranks:
        for line in lines_of(ranks):
            console.echo("  " + line)
    console.echo("  " + _verdict(entry, vram))


def _verdict(entry: dict[str, Any], vram: float) -> str:
    largest, card = entry["largest_micro_batch"], f"{vram:g} GiB"
    if entry["fits"]:
        return f"fits {card}: micro-batch up to {largest}"
    if largest:
        return f"does not fit {card} at micro-batch {entry['micro_batch']}: set micro_batch = {largest}"
    levels = {level: row for level, row in entry["levels"].items() if row["largest_micro_batch"]}
    if levels:
        level, row = next(iter(levels.items()))
        return f'does not fit {card}: set checkpointing = "{level}" and micro_batch = {row["largest_micro_batch"]}'
    smallest_total = min(row["total"] for row in entry["levels"].values())
    return f"does not fit {card} at any micro-batch: it needs at least {smallest_total / GIB:.1f} GiB"


def _disk(
    config: Config, shapes: Shapes, plans: list[StagePlan], stages: list[dict[str, Any]], images: int | None
) -> dict[str, Any]:
    """Return the bytes on the disk of the cache and of the run's files. `stages` are the stages as JSON."""
    elements = shapes.unet.in_channels * plans[0].side ** 2
    if config.cache.hidden_states:  # for one caption per image, which has all chunks
        elements += (
            chunk_limit(shapes.chunks) * shapes.text.get("max_position_embeddings", 77) * shapes.unet.cross_attention_dim
        )
    bytes_per_image = elements * {"fp16": 2, "bf16": 2, "fp32": 4}[config.cache.dtype]
    component_bytes, *_ = plans[0].files()
    sizes = [sum(component_bytes[component] for component in plan.trained) + sum(plan.files()[1:]) for plan in plans]
    averages = [plan.files()[2] for plan in plans]
    lengths = [_length(stage, entry, images) for stage, entry in zip(config.stage, stages, strict=True)]
    disk: dict[str, Any] = {
        "cache_an_image": bytes_per_image,
        "cache": images and images * bytes_per_image,
        "a_checkpoint": sizes,
    }
    disk |= run_bytes(config, component_bytes, sizes, averages, plans[0].trained, lengths, images or 0)
    disk["written_a_day"] = None
    if disk["written"] is not None:
        days = [
            sum(stage.seconds or entry["seconds"][card][i] for stage, entry in zip(config.stage, stages, strict=True)) / 86400
            for card in stages[0]["seconds"]
            for i in (0, 1)
        ]
        if max(days) > 1:
            disk["written_a_day"] = [disk["written"] / max(days), disk["written"] / min(days)]
    return disk


def _length(stage: StageTable, entry: dict[str, Any], images: int | None) -> tuple[int, float] | None:
    """Return the largest number of steps and of seconds that a stage may have, on any of the cards.

    Return None if the length or an interval is in epochs and the number of images is unknown.
    """
    amounts = [stage.until, stage.sample_every, stage.checkpoint_every, stage.keep_every, *stage.checkpoint_at]
    if not images and any(amount != 0 and parse_amount("", amount)[1] == "epochs" for amount in amounts):
        return None
    speeds = [speed for pair in entry["images_per_second"].values() for speed in pair]
    if stage.seconds is not None:
        return math.ceil(stage.seconds * max(speeds) / stage.batch), stage.seconds
    return entry["steps"], entry["steps"] * stage.batch / min(speeds)
