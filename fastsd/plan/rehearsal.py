"""Run a training step on tensors without data to find the memory and operations it needs. Used by `plan.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from fastsd.config.schema import StageTable
from fastsd.data.loader import Batch
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.select import selected
from fastsd.model.shapes import Shapes, empty_model, materialize
from fastsd.model.vae_encoder import VaeEncoder
from fastsd.plan.communication import Message, RehearsedRanks, Segment, Wait
from fastsd.plan.operations import Operation, Recorder
from fastsd.sampling.generate import BATCH
from fastsd.train.flow import Teacher
from fastsd.train.memory import DirectMode, LiveBytes
from fastsd.train.ranks import ALONE, Ranks
from fastsd.train.step import Step
from fastsd_kernels import REFERENCE, TRITON, Ops
from fastsd_kernels.launch import Launch, recording


def empty_teacher(shapes: Shapes, ops: Ops, device: torch.device, moved: Collection[str] = ()) -> Teacher:
    """Build the teacher of a stage without data. The weights that neither the stage nor an earlier one trains are the model's.

    Args:
        moved: names of the UNet's weights that earlier stages train.
    """
    unet = empty_model(replace(shapes, lora=None), ops).unet
    materialize(unet, device)
    return Teacher(unet, SD15_SCHEDULER, moved=moved)


def moved_by(stages: Iterable[StageTable]) -> tuple[str, ...]:
    """Return the entries of `train` and `reinit` with which stages change weights, each once."""
    return tuple(dict.fromkeys(entry for stage in stages for entry in (*stage.train, *stage.reinit)))


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory in bytes and operations of a step with one micro-batch size.

    Attributes:
        owners: memory that lives as long as the stage, by owner.
        activations: activations alive when the forward of one micro-batch ends.
        working: memory needed at the peak of the step, beyond `owners` and `activations`.
        sampling: memory needed to draw samples between steps, beyond `owners`.
        operations: how often each operation runs in a step with one micro-batch.
        segments: of the step, divided by what it sends to other ranks. Empty for one rank.
    """

    micro_batch_size: int
    owners: dict[str, int]
    activations: int
    working: int
    sampling: int
    operations: Counter[Operation]
    segments: tuple[Segment, ...] = ()

    @property
    def flops(self) -> int:
        """FLOPs of one micro-batch."""
        return sum(operation.flops * count for operation, count in self.operations.items())

    @property
    def step(self) -> int:
        return sum(self.owners.values()) + self.activations + self.working

    @property
    def total(self) -> int:
        return sum(self.owners.values()) + max(self.activations + self.working, self.sampling)


class Rehearsal:
    """A stage's step on tensors without data.

    Args:
        micro_batch_size: `micro_batch` as in a config. 0 means the whole batch, which needs no accumulation.
        cached_text: True if batches contain text embeddings.
        ranks: this rank, and the number of those that share a batch.
        schedule: True if `segments` shall have the messages of ranks where a step sends them. This takes one more step.

    Attributes:
        modules: modules of the model by component name.
        owners: bytes that live as long as the stage, by owner.
        trained: names of the parameters that the stage trains, by component.
    """

    def __init__(
        self,
        shapes: Shapes,
        stage: StageTable,
        side: int,
        ops: Ops,
        micro_batch_size: int,
        *,
        cached_text: bool,
        ranks: Ranks = ALONE,
        moved: Sequence[str] = (),
        schedule: bool = True,
    ) -> None:
        self._side, self._cached_text = side, cached_text
        # Meta tensors replace the tensors of a GPU. The reference ops for a CPU inspect their tensors, which must therefore
        # appear to be on the CPU. This needs PyTorch's fake tensors and takes five times as long.
        self._device = torch.device("meta" if ops is TRITON else "cpu")
        self._without_data = WithoutData() if ops is TRITON else FakeTensorMode()
        self._live = LiveBytes(self._device)
        self._bytes_after_forward: list[int] = []  # bytes alive at the end of each UNet forward
        self._recorder = Recorder([])
        self._segments: list[Segment] = []

        self._model = empty_model(shapes, _traceable(ops))
        self.modules = {"unet": self._model.unet, "text_encoder": self._model.text.module, "vae": self._model.vae.module}
        with self._tracing():
            for name, module in self.modules.items():
                if not (cached_text and name == "text_encoder"):
                    materialize(module, self._device)
            stage = stage.model_copy(update={"micro_batch": micro_batch_size})
            teacher = None
            if stage.teacher or stage.timestep_shift != 1:  # the base's own prediction makes no other difference
                self._model.scheduler = flow_scheduler({})
            if stage.teacher:
                names = selected(self._model, moved, "train").get("unet", ())
                teacher = empty_teacher(shapes, self._model.unet.ops, self._device, names)
            ranks = RehearsedRanks(ranks.rank, ranks.world, ranks.local_rank, ranks.local_world, self._communicate)
            self._step = Step(self._model, stage, total=1, seed=0, cached_text=cached_text, teacher=teacher, ranks=ranks)
            for optimizer in self._step.optimizers.values():
                optimizer.allocate_state()
        if ranks.world > 1 and schedule:  # also the first backward, which shows how many gradients make a chunk complete
            self._run(1, "none", 1)

        self.trained = self._step.trained
        self.owners = self._bytes_by_owner()
        # Memory outside the owners: some small tables, and on a CPU also data that frozen components keep in main memory.
        self._unowned_bytes = self._live.now - sum(self.owners.values())
        self._sampling = self._sample()
        self._model.unet.register_forward_hook(lambda *_: self._bytes_after_forward.append(self._live.now))

    def _communicate(self, event: Message | Wait) -> None:
        self._segments.append(Segment(self._recorder.since_last(), event))

    def step(self, micro_batch_size: int, checkpointing: str, micro_batches: int = 1) -> MemoryEstimate:
        """Run one step of `micro_batches` forwards and backwards with `micro_batch_size` images each, and one update."""
        bytes_before, operations = self._run(micro_batch_size, checkpointing, micro_batches)
        forward_bytes = self._bytes_after_forward[0]
        working = self._live.peak - forward_bytes + self._unowned_bytes
        activations, segments = forward_bytes - bytes_before, tuple(self._segments)
        return MemoryEstimate(micro_batch_size, self.owners, activations, working, self._sampling, operations, segments)

    def _run(self, micro_batch_size: int, checkpointing: str, micro_batches: int) -> tuple[int, Counter[Operation]]:
        """Run a step. Return the bytes that were alive before, and the operations."""
        self._model.unet.checkpointing, self._step.micro_batch_size = checkpointing, micro_batch_size
        self._bytes_after_forward, self._segments = [], []
        count = micro_batches * micro_batch_size
        with self._without_data:
            channels, text = self._model.unet.cfg.in_channels, self._model.text
            latents = torch.empty(count, channels, self._side, self._side, dtype=torch.float16)
            length = text.lengths[-1]
            token_ids = torch.empty(count, length, dtype=torch.int64)
            positions = torch.empty(count, dtype=torch.int64)
            text_embeds = torch.empty(count, length, text.width, dtype=torch.float16) if self._cached_text else None
        with self._tracing() as launches, Recorder(launches) as recorder:
            self._recorder = recorder
            recorder.arenas = {arena.untyped_storage()._cdata for arena in self._step.tensors_by_role()["gradients"]}
            self._live.restart()
            bytes_before = self._live.now
            self._step(Batch(latents, token_ids, positions, [], text_embeds), 0)
        return bytes_before, recorder.operations

    def _sample(self) -> int:
        """Return the bytes by which drawing a full batch of guided samples raises memory. Samples are decoded one by one."""
        model, count = self._model, 2 * BATCH
        with self._tracing(), torch.no_grad():
            self._live.restart()
            bytes_before = self._live.now
            latents = torch.empty(count, model.unet.cfg.in_channels, self._side, self._side, device=self._device)
            length = model.text.lengths[-1]
            if self._cached_text:  # the text encoder runs in main memory
                text_embeds = torch.empty(count, length, model.text.width, device=self._device)
            else:
                text_embeds = model.text.encode(torch.empty(count, length, dtype=torch.int64, device=self._device))
            model.unet(latents, torch.empty(count, device=self._device), text_embeds)
            model.vae.decode(latents[:1])
        return self._live.peak - bytes_before

    def _bytes_by_owner(self) -> dict[str, int]:
        step_owners, owners = self._step.tensors_by_role(), {}
        for name, component in self._step.components.items():
            status = "trained" if component.trained else "frozen"
            owners[f"weights of the {name.replace('_', ' ')}, {status}"] = component.tensors_by_role()["weights"]
        owners["VAE, for samples"] = [p.data for p in self.modules["vae"].parameters()]
        owners |= {"gradients": step_owners["gradients"], "optimizer state": step_owners["state"], "EMA": step_owners["ema"]}
        if copied := step_owners.get("teacher"):
            owners["teacher, as far as it is trained"] = copied
        return {owner: sum(t.untyped_storage().nbytes() for t in tensors) for owner, tensors in owners.items()}

    @contextmanager
    def _tracing(self) -> Iterator[list[Launch]]:
        # 86 selects the tiles of an RTX 3090. The kernels need some choice; the counts hardly depend on it.
        with recording(86) as launches, self._without_data, self._live:
            yield launches


def encoding_operations(shapes: Shapes, side: int, images: int, dtype: torch.dtype, ops: Ops) -> Counter[Operation]:
    """Return the operations with which the VAE encodes images, `side` being that of their latents."""
    device = torch.device("meta" if ops is TRITON else "cpu")
    without_data = WithoutData() if ops is TRITON else FakeTensorMode()
    vae = empty_model(shapes, ops).vae.module.requires_grad_(False)
    downscale = 2 ** (len(shapes.vae["block_out_channels"]) - 1)
    with recording(86) as launches, without_data, torch.no_grad():
        materialize(vae, device)
        vae.to(dtype, memory_format=torch.channels_last)
        pixels = torch.empty(images, 3, side * downscale, side * downscale, dtype=dtype, device=device)
        encoder = VaeEncoder(vae, _traceable(ops))
        with Recorder(launches) as recorder:
            encoder(pixels.contiguous(memory_format=torch.channels_last))
    return recorder.operations


_ATEN = torch.ops.aten
_IN_PLACE = {_ATEN.copy_.default, _ATEN.add_.Tensor, _ATEN.addmm_.default}
_OUT = {_ATEN.mm.out, _ATEN.addmm.out, _ATEN.sum.IntList_out}
_CONVOLUTIONS = {_ATEN.convolution.default, _ATEN.convolution_backward.default}
# Layouts of an operation's results, by the operation and the layouts of its arguments.
_layouts: dict[tuple[Any, ...], list[_Layout | None]] = {}


class _Layout(NamedTuple):
    """Layout of a new tensor, or of a view of the operation's first argument; `offset` counts from the argument's."""

    is_view: bool
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def tensor(self, args: Any) -> Tensor:
        if self.is_view:
            return torch.as_strided(args[0], self.shape, self.stride, args[0].storage_offset() + self.offset)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class WithoutData(DirectMode):
    """Corrects PyTorch's operations on tensors without data.

    Copies to main memory are allowed. They take no memory, because only the GPU's counts. Convolutions of channels-last images
    return such images, as cuDNN does.

    PyTorch runs an operation's decomposition in Python to get the layouts of its results. They are remembered, because a
    model has many equal layers, and a job many steps.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _IN_PLACE:
            return args[0]
        if func in _OUT:
            return kwargs["out"]
        key: list[Any] = [func]
        remembers = _add_layouts(key, (args, *kwargs.items()))
        if remembers and (layouts := _layouts.get(tuple(key))):
            results = [layout and layout.tensor(args) for layout in layouts]
            return results if _returns_list(func) else results[0] if len(results) == 1 else tuple(results)
        result = self._run(func, args, kwargs)
        if remembers:
            _layouts[tuple(key)] = _layouts_of(result, args)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _CONVOLUTIONS:
            results = func(*args, **kwargs)
            layout, images = torch.channels_last, [x for x in args[:3] if isinstance(x, Tensor) and x.ndim == 4]
            if not any(x.is_contiguous(memory_format=layout) for x in images):
                return results
            return tree_map(lambda x: x.to(memory_format=layout) if isinstance(x, Tensor) and x.ndim == 4 else x, results)
        if func is _ATEN._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros((), dtype=kwargs.get("dtype") or args[0].dtype).expand(args[0].shape)
        return func(*args, **kwargs)


def _add_layouts(key: list[Any], value: Any) -> bool:
    """Add to `key` all that layouts of results depend on. Return False if that is data in main memory."""
    if isinstance(value, Tensor):
        key += (value.shape, value.stride(), value.dtype)
        return value.is_meta
    if isinstance(value, (tuple, list)):
        key.append(len(value))
        return all(_add_layouts(key, member) for member in value)
    key += (type(value), value)  # 1, 1.0 and True are equal
    return True


def _layouts_of(result: Any, args: Any) -> list[_Layout | None]:
    """Return the layouts of an operation's results, or nothing unless each is a new tensor or a view of the first argument."""
    storages = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    layouts: list[_Layout | None] = []
    for x in result if isinstance(result, (tuple, list)) else (result,):
        if x is None:  # a gradient that is not needed
            layouts.append(None)
            continue
        if not isinstance(x, Tensor) or not x.is_meta or any(x is argument for argument in args):
            return []
        storage, base = x.untyped_storage(), args[0] if args and isinstance(args[0], Tensor) else None
        if storage._cdata not in storages and storage.nbytes() == x.numel() * x.itemsize:
            layouts.append(_Layout(False, x.shape, x.stride(), 0, x.dtype))
        elif base is not None and storage._cdata == base.untyped_storage()._cdata and x.dtype == base.dtype:
            layouts.append(_Layout(True, x.shape, x.stride(), int(x.storage_offset() - base.storage_offset()), x.dtype))
        else:
            return []
    return layouts


@cache
def _returns_list(func: Any) -> bool:
    return any(isinstance(value.type, torch.ListType) for value in func._schema.returns)


def _traceable(ops: Ops) -> Ops:
    """Return a variant of `ops` that accepts tensors without data."""
    if ops.name == "cpu" and TRITON is not None:
        # Ops that pass addresses cannot be traced. The Triton ops also work in place and need almost no extra memory.
        names = [field.name for field in fields(Ops) if getattr(ops, field.name) is not getattr(REFERENCE, field.name)]
        ops = replace(ops, **{name: getattr(TRITON, name) for name in names if name != "name"})
    return ops
