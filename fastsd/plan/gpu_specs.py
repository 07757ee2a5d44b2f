"""Specifications of GPUs, and estimates of the time that a GPU needs for operations. Used by `fastsd plan`.

    seconds of an operation = max(FLOPs / (MATMUL_SHARE * rate), bytes / (MEMORY_SHARE * bandwidth))

An operation reads its operands once and writes its results once. Operations run one after another. The host's overhead is
ignored (a step is one CUDA graph), and so is the data loader (it works ahead).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastsd.errors import UserError

# Efficiency of a whole step. Convolutions, matmuls and attention reach a share of the matmul rate below, and all other
# operations a share of the bandwidth. Chosen, not measured. For SD1.5 in bf16 at 512 px they predict 163 images/s on an
# H200 (best entry of MLPerf v5.0: 149.5), and 26.5 with checkpointing on an RTX 4090 (a user of another trainer: 28.4).
MATMUL_SHARE, MEMORY_SHARE = 0.6, 0.8


@dataclass(frozen=True)
class GpuSpec:
    """One type of GPU: `memory` in GiB, `bandwidth` in GB/s (data sheet), and rates of dense matmuls in TFLOP/s."""

    name: str
    memory: float
    bandwidth: float
    bf16: float
    tf32: float
    fp32: float


# Matmul rates are measured with large matmuls on RTX 4090, RTX 5090 and H200 (bf16 also on RTX 3090). H100 is the chip of H200
# with other memory. The rest are from data sheets. A100's are reduced by a seventh, which large matmuls lose on H200.
# fmt: off
GPU_SPECS = [
    GpuSpec("RTX 3090",  24,  936,  77,  35.7, 35.7),
    GpuSpec("RTX 4090",  24, 1008, 178,  90,   58),
    GpuSpec("RTX 5090",  32, 1792, 253, 125,   83),
    GpuSpec("A100",      80, 2039, 267, 134,   17),
    GpuSpec("H100",      80, 3350, 853, 427,   48),
    GpuSpec("H200",     139, 4800, 853, 427,   48),
]
# fmt: on


def find_gpu(name: str) -> GpuSpec:
    """Find a card by a name such as "4090", "rtx-4090" or "RTX 4090". Raises UserError if it is unknown or ambiguous."""
    cards = {_letters_and_digits(card.name): card for card in GPU_SPECS}
    short_name = _letters_and_digits(name)
    matches = [card for full_name, card in cards.items() if short_name and full_name.endswith(short_name)]
    if len(matches) == 1:
        return matches[0]
    close = difflib.get_close_matches(short_name, cards, n=1)
    hint = f"did you mean {cards[close[0]].name}?" if close else "or give the memory with --vram"
    raise UserError("unknown-card", f"--card is {name!r}; choose from {', '.join(card.name for card in GPU_SPECS)}; {hint}")


def gpu_of(device: torch.device) -> GpuSpec | None:
    """Return the specification of a device in use. None for a CPU, and for a GPU of another type, such as a laptop's."""
    if device.type != "cuda":
        return None
    name = re.sub(r"^NVIDIA |GeForce |-SXM\d|[ -]\d+GB| HBM\w*", "", torch.cuda.get_device_name(device))
    return next((card for card in GPU_SPECS if card.name == name), None)


def _letters_and_digits(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


class Operation(NamedTuple):
    flops: int
    bytes: int
    narrow: bool  # operands in bf16
    attention: bool


@dataclass
class StepOperations:
    """Operations of one step: `accumulate` runs forward and backward for each micro-batch, `update` runs once per step."""

    accumulate: list[Operation] = field(default_factory=list)
    update: list[Operation] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """FLOPs of one micro-batch."""
        return sum(operation.flops for operation in self.accumulate)

    def seconds(self, card: GpuSpec, precision: str, micro_batches: int) -> float:
        """Estimate the seconds of a step with `micro_batches` micro-batches, by the formula above."""
        micro_batch_seconds = sum(_seconds(operation, card, precision) for operation in self.accumulate)
        return micro_batches * micro_batch_seconds + sum(_seconds(operation, card, precision) for operation in self.update)


def _seconds(operation: Operation, card: GpuSpec, precision: str) -> float:
    rate = card.bf16 if operation.narrow else card.tf32 if precision == "tf32" else card.fp32
    if operation.attention and not operation.narrow:
        rate = max(rate, card.tf32 / 3)  # fp32 attention uses the faster of two methods, see `set_precision`
    return max(operation.flops / (MATMUL_SHARE * rate * 1e12), operation.bytes / (MEMORY_SHARE * card.bandwidth * 1e9))


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# PyTorch has FLOP formulas only for its GPU attention.
_COUNTED_AS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class Recorder(TorchDispatchMode):
    """Records the operations of a `with` block, with PyTorch's FLOP formulas. Views and allocations are not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, indices, new = _signature(func)
        if (indices or new) and name not in _ALLOCATIONS:
            read = _tensors((args, kwargs))
            written = _tensors([args[index] for index in indices if index < len(args)]) + (_tensors(result) if new else [])
            formula = flop_registry.get(_COUNTED_AS.get(func.overloadpacket, func.overloadpacket))
            flops = formula(*args, **kwargs, out_val=result) if formula else 0
            num_bytes = sum(t.numel() * t.itemsize for t in (*read, *written))
            narrow = any(t.dtype == torch.bfloat16 for t in read)
            self.operations.append(Operation(flops, num_bytes, narrow, "attention" in name))
        return result


@cache
def _signature(func: Any) -> tuple[str, list[int], bool]:
    """Return an operation's name, the indices of the arguments it writes, and True if its results are no views."""
    indices = [i for i, argument in enumerate(func._schema.arguments) if argument.alias_info and argument.alias_info.is_write]
    return func.overloadpacket.__name__, indices, not any(value.alias_info for value in func._schema.returns)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
