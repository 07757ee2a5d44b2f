"""Specifications of GPUs, and estimates of the time that a GPU needs for operations. Used by `fastsd plan`.

    seconds of an operation = max(FLOPs / (MATMUL_SHARE * rate), bytes / (MEMORY_SHARE * bandwidth))

An operation reads its operands once and writes its results once. Operations run one after another. The host's overhead is
ignored (a step is one CUDA graph), and so is the data loader (it works ahead).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass

import torch

from fastsd.errors import UserError
from fastsd.plan.operations import Operation

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


def step_seconds(operations: Counter[Operation], card: GpuSpec, precision: str) -> float:
    """Estimate the seconds of a step by the formula above."""
    return sum(_seconds(operation, card, precision) * count for operation, count in operations.items())


def _seconds(operation: Operation, card: GpuSpec, precision: str) -> float:
    rate = card.bf16 if operation.narrow else card.tf32 if precision == "tf32" else card.fp32
    if operation.kind == "attention" and not operation.narrow:
        rate = max(rate, card.tf32 / 3)  # fp32 attention uses the faster of two methods, see `set_precision`
    return max(operation.flops / (MATMUL_SHARE * rate * 1e12), operation.bytes / (MEMORY_SHARE * card.bandwidth * 1e9))
