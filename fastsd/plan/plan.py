"""Memory, time and disk space of a job, planned from the config alone, without a GPU.

No formulas model the step. The plan runs the real training step on tensors with shapes but no data, counts memory as it is
allocated and freed (`train/memory.py`), and records the operations (`gpu_specs.py`). Trying one micro-batch takes a second
at any size, so no result is extrapolated from another.

    weights, gradients, state, EMA    tensors listed by `Step.owners`
    activations                       allocated in the forward and alive when it ends
    working memory                    needed at the peak of the step, beyond all of these

`RESERVED` is a constant for memory no tensor shows: the CUDA context, libraries, and their scratch within an operation.
Read next: `fastsd/train/step.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.config.schema import Config, DataTable, StageTable
from fastsd.config.stages import ENDLESS, parse_amount
from fastsd.data.loader import Batch
from fastsd.data.sources import folders
from fastsd.errors import UserError
from fastsd.model.select import changed_components
from fastsd.model.shapes import Shapes, empty_model, materialize, read_shapes
from fastsd.plan.disk import export_bytes
from fastsd.plan.gpu_specs import GPU_SPECS, MATMUL_SHARE, MEMORY_SHARE, GpuSpec, Recorder, StepOperations, find_gpu
from fastsd.sampling.generate import BATCH
from fastsd.storage import replace_file
from fastsd.train.memory import LiveBytes
from fastsd.train.optim import flat_state
from fastsd.train.step import Step
from fastsd_kernels import REFERENCE, TRITON, Ops
from fastsd_kernels.launch import recording

GIB = 1 << 30
# Memory that no tensor shows: the CUDA context with its kernels and library handles, and scratch, which covers the workspace
# of convolutions and the fragmentation of the allocator. Not measured here.
CONTEXT, SCRATCH = int(0.5 * GIB), int(0.7 * GIB)
RESERVED = CONTEXT + SCRATCH
LEVELS = ("none", "ff", "block")


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of a stage at one micro-batch, in bytes, and its operations.

    Attributes:
        owners: memory that lives as long as the stage, by owner.
        kept: activations alive when the forward of one micro-batch ends.
        working: needed at the peak of the step, beyond `owners` and `kept`.
        sampling: needed to draw samples between steps, beyond `owners`.
    """

    micro: int
    owners: dict[str, int]
    kept: int
    working: int
    sampling: int
    work: StepOperations

    @property
    def step(self) -> int:
        return sum(self.owners.values()) + self.kept + self.working

    @property
    def total(self) -> int:
        return sum(self.owners.values()) + max(self.kept + self.working, self.sampling)


class StagePlan:
    """Plan of one stage at any micro-batch and checkpointing level. Created by `plan_stage`."""

    def __init__(
        self, shapes: Shapes, stage: StageTable, resolution: int, device_bytes: int, ops: Ops | None, states: bool
    ) -> None:  # fmt: skip
        self.shapes, self.stage, self.device_bytes, self.states = shapes, stage, device_bytes, states
        self.ops, self.side = ops or TRITON or REFERENCE, shapes.side(resolution)
        self._rehearsals: dict[bool, _Rehearsal] = {}
        self._needs: dict[tuple[int, str], MemoryEstimate] = {}

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batches that this stage may have, smallest first."""
        batch = self.stage.batch
        return [n for n in range(1, batch + 1) if batch % n == 0 and (n == batch or not self.stage.fused_backward)]

    @property
    def trained(self) -> list[str]:
        """Components of the model that the stage changes."""
        self.need(self.stage.batch)
        return changed_components(self._rehearsals[True].trained)

    def need(self, micro: int, checkpointing: str | None = None) -> MemoryEstimate:
        """Return memory and operations of a step with a micro-batch of `micro` images, found by running it without data."""
        level = checkpointing or self.stage.checkpointing
        if (micro, level) not in self._needs:
            whole_batch = micro == self.stage.batch
            if whole_batch not in self._rehearsals:
                rehearsal = _Rehearsal(self.shapes, self.stage, self.side, self.ops, 0 if whole_batch else 1, self.states)
                self._rehearsals[whole_batch] = rehearsal
            self._needs[micro, level] = self._rehearsals[whole_batch].step(micro, level)
        return self._needs[micro, level]

    def largest_micro_batch(self, bytes: int | None = None, checkpointing: str | None = None) -> int:
        """Find the largest micro-batch with which the stage fits.

        Args:
            bytes: limit for all tensors of the run together, weights included; None = `device_bytes`.
            checkpointing: checkpointing level; None = the stage's.

        Returns:
            A divisor of the batch; 0 if not even the smallest micro-batch fits.
        """
        room = self.device_bytes if bytes is None else bytes
        *candidates, whole_batch = self.micro_batches
        # The whole batch comes first. It may need less than half of it, because accumulated bf16 gradients are fp32.
        if self.need(whole_batch, checkpointing).total <= room:
            return whole_batch
        fits = 0
        while candidates:
            middle = len(candidates) // 2
            if self.need(candidates[middle], checkpointing).total <= room:
                fits, candidates = candidates[middle], candidates[middle + 1 :]
            else:
                candidates = candidates[:middle]
        return fits

    def images_per_second(self, card: GpuSpec, micro: int, checkpointing: str | None = None) -> float:
        """Estimate the training speed, see `gpu_specs.py`."""
        work = self.need(micro, checkpointing).work
        return self.stage.batch / work.seconds(card, self.stage.precision, self.stage.batch // micro)

    def files(self) -> tuple[dict[str, int], int]:
        """Return the bytes of each component of the model in fp32, and of the stage's optimizer state and EMA, as written."""
        self.need(self.stage.batch)
        rehearsal = self._rehearsals[True]
        parts = {name: sum(4 * p.numel() for p in module.parameters()) for name, module in rehearsal.modules.items()}
        return parts, rehearsal.owners["optimizer state"] + rehearsal.owners["EMA"]


def plan_stage(
    shapes: Shapes, stage: StageTable, resolution: int, device_bytes: int, ops: Ops | None = None, states: bool = False
) -> StagePlan:  # fmt: skip
    """Plan one stage.

    Args:
        shapes: shapes of the model, from `Shapes.of(model)` or `read_shapes(table)`.
        resolution: image size in px per side.
        device_bytes: limit for all tensors of the run together: the card's memory minus `RESERVED`; or, in a process that
            already has a CUDA context, free memory plus that of its own tensors, minus `SCRATCH`.
        ops: the ops the step will use; None = `TRITON` on a GPU, or `REFERENCE` on a CPU if Triton is missing.
        states: True if text embeddings are cached, so that the text encoder takes no memory.

    Raises:
        UserError: the model does not support the resolution.
    """
    return StagePlan(shapes, stage, resolution, device_bytes, ops, states)


class _Rehearsal:
    """The step of a stage on tensors without data.

    Args:
        micro: `micro_batch` as in a config. The whole batch at once (0) needs other gradients than accumulation does.
        states: True if batches contain text embeddings.

    Attributes:
        modules: modules of the model by component name.
        owners: bytes that live as long as the stage, by owner.
        trained: components that the stage changes -> names of the parameters it trains.
    """

    def __init__(self, shapes: Shapes, stage: StageTable, side: int, ops: Ops, micro: int, states: bool) -> None:
        self._side, self._states = side, states
        # Meta tensors replace the tensors of a GPU. The reference ops for a CPU inspect their tensors, which must therefore
        # appear to be on the CPU. This needs PyTorch's fake tensors and takes five times as long.
        self._device = torch.device("meta" if ops is TRITON else "cpu")
        self._without_data = _ToMainMemory() if ops is TRITON else FakeTensorMode()
        self._live, self._recorder = LiveBytes(self._device), Recorder()
        self._forwards: list[int] = []  # bytes alive at the end of each UNet forward
        self._updates: list[int] = []  # index of the operation at which each update starts
        self._model = empty_model(shapes, _traceable(ops, self._mark))
        self.modules = {"unet": self._model.unet, "text_encoder": self._model.text.module, "vae": self._model.vae.module}
        with self._tracing():
            for name, module in self.modules.items():
                if not (states and name == "text_encoder"):
                    materialize(module, self._device)
            self._step = Step(self._model, stage.model_copy(update={"micro_batch": micro}), total=1, seed=0, states=states)
            for name, optimizer in self._step.optimizers.items():  # allocates the state, which is lazy
                part = self._step.parts[name]
                flat_state(optimizer, part.names, part.layout.views)
        self.trained = self._step.trained
        self.owners = self._owned()
        # Memory outside the owners: some small tables, and on a CPU also data that frozen components keep in main memory.
        self._others = self._live.now - sum(self.owners.values())
        self._sampling = self._sample()
        self._model.unet.register_forward_hook(lambda *_: self._forwards.append(self._live.now))

    def step(self, micro: int, checkpointing: str) -> MemoryEstimate:
        """Run one forward, backward and update with `micro` images."""
        self._model.unet.checkpointing, self._step.micro = checkpointing, micro
        self._recorder.operations, self._updates, self._forwards = [], [], []
        with self._without_data:
            channels, text = self._model.unet.cfg.in_channels, self._model.text
            latents = torch.empty(micro, channels, self._side, self._side, dtype=torch.float16)
            ids, positions = (torch.empty(micro, *shape, dtype=torch.int64) for shape in ((text.length,), ()))
            context = torch.empty(micro, text.length, text.width, dtype=torch.float16) if self._states else None
        with self._tracing(), self._recorder:
            self._live.restart()
            before = self._live.now
            self._step(Batch(latents, ids, positions, [], context), 0)
        forward, operations = self._forwards[0], self._recorder.operations
        # A step fused with the backward has one micro-batch and no separate update.
        update = len(operations) if self._step.stage.fused_backward else self._updates[0]
        return MemoryEstimate(
            micro, self.owners, forward - before, self._live.peak - forward + self._others, self._sampling,
            StepOperations(operations[:update], operations[update:]),
        )  # fmt: skip

    def _sample(self) -> int:
        """Return the peak bytes of drawing a full batch of guided samples, beyond those alive before. Decodes one by one."""
        model, count = self._model, 2 * BATCH
        with self._tracing(), torch.no_grad():
            self._live.restart()
            before = self._live.now
            latents = torch.empty(count, model.unet.cfg.in_channels, self._side, self._side, device=self._device)
            if self._states:  # the text encoder runs in main memory
                context = torch.empty(count, model.text.length, model.text.width, device=self._device)
            else:
                context = model.text.encode(torch.empty(count, model.text.length, dtype=torch.int64, device=self._device))
            model.unet(latents, torch.empty(count, device=self._device), context)
            model.vae.decode(latents[:1])
        return self._live.peak - before

    def _owned(self) -> dict[str, int]:
        step_owners, owners = self._step.tensors_by_role(), {}
        for name, part in self._step.parts.items():
            status = "trained" if part.trained else "frozen"
            owners[f"weights of the {name.replace('_', ' ')}, {status}"] = part.tensors_by_role()["weights"]
        owners["VAE, for samples"] = [p.data for p in self.modules["vae"].parameters()]
        owners |= {"gradients": step_owners["gradients"], "optimizer state": step_owners["state"], "EMA": step_owners["ema"]}
        return {owner: sum(t.untyped_storage().nbytes() for t in tensors) for owner, tensors in owners.items()}

    def _mark(self) -> None:
        self._updates.append(len(self._recorder.operations))

    @contextmanager
    def _tracing(self) -> Iterator[None]:
        # 86 selects the tiles of an RTX 3090. The kernels need some choice; the counts do not depend on it.
        with recording(86), self._without_data, self._live:
            yield


class _ToMainMemory(TorchDispatchMode):
    """Allows tensors without data to be copied to main memory. The copies take no memory, since main memory is not planned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
        return func(*args, **kwargs)


def _traceable(ops: Ops, mark: Callable[[], None]) -> Ops:
    """Return a variant of `ops` that accepts tensors without data and calls `mark` where the update starts."""
    if ops.name == "cpu" and TRITON is not None:
        # Ops that pass addresses cannot be traced. The Triton ops also work in place and need almost no extra memory.
        ops = replace(ops, gradient_norm=TRITON.gradient_norm, lion=TRITON.lion, dlion=TRITON.dlion, adamw=TRITON.adamw,
                      dlion_estimate=TRITON.dlion_estimate)  # fmt: skip

    def gradient_norm(*args: Any, **kwargs: Any) -> Any:
        mark()
        return ops.gradient_norm(*args, **kwargs)

    return replace(ops, gradient_norm=gradient_norm)


def plan(
    config: Config, vram: float | None = None, card: str = "", path: Path | None = None, say: Callable[[str], None] = print
) -> None:  # fmt: skip
    """Print memory, estimated speed and disk space of every stage. Implements `fastsd plan`.

    Args:
        vram: memory of the card in GiB; None = that of `card`, or 24.
        card: a name in `gpu_specs.CARDS`; "" = estimates for all of them.
        path: file to which all results are also written as JSON; None = no file.

    Raises:
        UserError: the user must change something. A stage that does not fit is a result, not an error.
    """
    cards = [find_gpu(card)] if card else GPU_SPECS
    vram = vram if vram is not None else cards[0].memory if card else 24.0
    if not 0 < vram < math.inf:
        raise UserError("vram", f"--vram is {vram:g}; give the card's memory in GB, for example 24")
    shapes, notes = read_shapes(config.model)
    ops = REFERENCE if config.kernels == "reference" else TRITON or REFERENCE
    images = _count(config.data)
    report: dict[str, Any] = {
        "vram_gib": vram, "reserved_gib": RESERVED / GIB, "notes": notes, "kernels": ops.name,
        "resolution": config.data.resolution, "images": images, "stages": [],
    }  # fmt: skip
    remark = "" if ops is TRITON else ", as on a CPU: they take more memory than kernels for a GPU"
    say("shapes     " + ("\n           ".join(notes) or f"those of {config.model.base}"))
    say(f"kernels    {ops.name}{remark}")
    say(f"memory     {vram:g} GB, of which {RESERVED / GIB:.1f} are set aside for the CUDA context, libraries, their scratch")
    say(f"speed      an estimate: every operation at {MATMUL_SHARE} of a card's matmul rate or {MEMORY_SHARE} of its bandwidth")
    say(f"images     {images or 'not found: data.folders cannot be read here'}")
    plans: list[StagePlan] = []
    for i, stage in enumerate(config.stage):
        # Stages that differ only in these settings are planned once.
        neutral = {"name": "", "until": 1, "lr": 1.0, "micro_batch": 0, "warmup": 0, "caption_dropout": 0.0, "max_tags": 0,
                   "sample_every": 0, "checkpoint_every": 1, "keep_checkpoints": 1}  # fmt: skip
        comparable = stage.model_copy(update=neutral)
        existing = next((plan for plan in plans if plan.stage == comparable), None)
        room, states = int(vram * GIB) - RESERVED, config.cache.hidden_states
        plans.append(existing or plan_stage(shapes, comparable, config.data.resolution, room, ops, states))
        entry = _describe(plans[-1], stage, config.stage_name(i), cards, images)
        report["stages"].append(entry)
        _say_stage(entry, vram, say)
    report["disk"] = _disk(config, shapes, plans, images)
    _say_disk(report["disk"], say)
    if path:
        try:
            replace_file(path, json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                "json-unwritable", f"--json is {str(path)!r}: cannot be written ({error.strerror}); name another file"
            ) from None


def _count(data: DataTable) -> int | None:
    """Count the images per epoch, before filtering by tag. Return None if the folders cannot be read."""
    try:
        return folders.count(data)[1]
    except UserError:
        return None


def _describe(plan: StagePlan, stage: StageTable, name: str, cards: list[GpuSpec], images: int | None) -> dict[str, Any]:
    """Describe one stage as JSON, with sizes in bytes and times in seconds."""
    largest = plan.largest_micro_batch()
    micro = stage.micro_batch_size if stage.micro_batch != "auto" else largest or plan.micro_batches[0]
    need = plan.need(micro)
    unit = parse_amount("until", stage.until)[1]
    steps = stage.steps(images or 1) if images or unit != "epochs" else None
    steps = None if steps == ENDLESS else steps  # the stage ends by time
    levels = {}
    for level in LEVELS:
        level_largest = plan.largest_micro_batch(checkpointing=level)
        level_need = plan.need(level_largest or plan.micro_batches[0], level)
        levels[level] = {
            "largest_micro_batch": level_largest, "activations_an_image": level_need.kept // level_need.micro,
            "flops_an_image": level_need.work.flops // level_need.micro, "total": level_need.total + RESERVED,
        }  # fmt: skip
    speeds = {card.name: plan.images_per_second(card, micro) for card in cards}
    return {
        "name": name, "train": stage.train, "optimizer": stage.optimizer, "precision": stage.precision, "batch": stage.batch,
        "micro_batch": micro, "checkpointing": stage.checkpointing, "fused_backward": stage.fused_backward, "steps": steps,
        "memory": {**need.owners, "activations": need.kept, "working memory": need.working, "reserved": RESERVED},
        "sampling": need.sampling, "total": need.total + RESERVED, "fits": need.total <= plan.device_bytes,
        "largest_micro_batch": largest, "levels": levels, "images_per_second": speeds,
        "seconds": {card: steps and steps * stage.batch / speed for card, speed in speeds.items()},
    }  # fmt: skip


def _say_stage(entry: dict[str, Any], vram: float, say: Callable[[str], None]) -> None:
    micro, batch = entry["micro_batch"], entry["batch"]
    fused = ", stepped in the backward" if entry["fused_backward"] else ""
    say(f"\n{entry['name']}: {'+'.join(entry['train'])}, {entry['optimizer']}, {entry['precision']}, checkpointing "
        f"{entry['checkpointing']}{fused}, batch {batch} = {batch // micro} x {micro}")  # fmt: skip
    words = {
        "activations": f"activations kept for the backward, {micro} x {entry['memory']['activations'] / micro / GIB:.2f}",
        "working memory": "working memory at the worst moment of a step",
        "reserved": "CUDA context, libraries, their scratch",
    }
    rows = [(words.get(owner, owner), size) for owner, size in entry["memory"].items() if size]
    extra = entry["total"] - sum(size for _, size in rows)
    for owner, size in [*rows, *([("more while samples are drawn", extra)] if extra else []), ("total", entry["total"])]:
        say(f"  {size / GIB:9.2f} GiB  {owner}")
    say("  checkpointing   GiB an image   TFLOP an image   largest micro-batch")
    for level, row in entry["levels"].items():
        activations, flops = row["activations_an_image"] / GIB, row["flops_an_image"] / 1e12
        say(f"  {level:<13}   {activations:12.3f}   {flops:14.2f}   {row['largest_micro_batch'] or 'none fits':>19}")
    speeds, seconds = entry["images_per_second"], entry["seconds"]
    if entry["steps"] is None:
        steps, seconds = "1,000,000 images", {card: 1e6 / speed for card, speed in speeds.items()}
    else:
        steps = f"{entry['steps']:,} steps"
    width = max(len(steps), len("estimate"))
    say(f"  {'estimate':<{width}}" + "".join(f"{card:>10}" for card in speeds))
    say(f"  {'images/s':<{width}}" + "".join(f"{speed:10.1f}" for speed in speeds.values()))
    say(f"  {steps:<{width}}" + "".join(f"{_duration(duration):>10}" for duration in seconds.values()))
    say("  " + _verdict(entry, vram))


def _verdict(entry: dict[str, Any], vram: float) -> str:
    largest, card = entry["largest_micro_batch"], f"{vram:g} GB"
    if entry["fits"]:
        return f"fits {card}: micro-batch up to {largest}"
    if largest:
        return f"does not fit {card} at micro-batch {entry['micro_batch']}: set micro_batch = {largest}"
    levels = {level: row for level, row in entry["levels"].items() if row["largest_micro_batch"]}
    if levels:
        level, row = next(iter(levels.items()))
        return f'does not fit {card}: set checkpointing = "{level}" and micro_batch = {row["largest_micro_batch"]}'
    smallest_total = min(row["total"] for row in entry["levels"].values())
    return f"does not fit {card} at any micro-batch: the least it needs is {smallest_total / GIB:.1f} GiB"


def _disk(config: Config, shapes: Shapes, plans: list[StagePlan], images: int | None) -> dict[str, Any]:
    """Return the bytes on the disk, at the end of the run or at its peak."""
    numbers = shapes.unet.in_channels * plans[0].side ** 2
    if config.cache.hidden_states:  # for one caption per image
        numbers += shapes.chunks * shapes.text.get("max_position_embeddings", 77) * shapes.unet.cross_attention_dim
    cached = numbers * {"fp16": 2, "bf16": 2, "fp32": 4}[config.cache.dtype]
    model, _ = plans[0].files()
    # Frozen components are hard links to files written once. One more checkpoint exists until the oldest is deleted.
    checkpoint_sizes = [sum(model[component] for component in plan.trained) + plan.files()[1] for plan in plans]
    peak = max(size * (stage.keep_checkpoints + 1) for size, stage in zip(checkpoint_sizes, config.stage, strict=True))
    ends = sum(model[component] for plan in plans[:-1] for component in plan.trained)
    return {
        "cache_an_image": cached, "cache": images and images * cached, "a_checkpoint": checkpoint_sizes,
        "checkpoints": sum(model.values()) + peak + ends, "model": sum(model.values()), "export": export_bytes(config, model),
    }  # fmt: skip


def _say_disk(disk: dict[str, Any], say: Callable[[str], None]) -> None:
    per_image, largest = disk["cache_an_image"], max(disk["a_checkpoint"])
    cache = disk["cache"] or per_image * 1_000_000
    scope = "" if disk["cache"] else " for a million images"
    say(f"\ndisk       {cache / 1e9:.1f} GB cache{scope}, {per_image / 1024:g} KiB an image")
    say(f"           {disk['checkpoints'] / 1e9:.1f} GB checkpoints at most, up to {largest / 1e9:.1f} GB each, the rest links")
    say(f"           {disk['model'] / 1e9:.1f} GB finished model, links to the last checkpoint: no more until it is copied")
    say(f"           {disk['export'] / 1e9:.1f} GB the same for other tools, in single files, and what else is no link")


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
