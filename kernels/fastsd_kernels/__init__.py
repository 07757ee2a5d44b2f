"""Floor 0: the operations that a training step consists of. Each has one signature and several implementations.

`Ops` (`ops.py`) is a frozen table of them, built from the records with which their files end.  REFERENCE is plain PyTorch:
the truth in tests, and the path on a machine without a GPU.  TRITON is the table of fused kernels, or None where Triton is not
installed (macOS).  CPU is REFERENCE with the optimizers and the gradient norm in C, compiled at first use.  No fallback is
silent: `fastest` chooses, and the table's name is printed.  A model gets one table when it is created.
Read next: `geglu.py`, the shortest kernel; all files share its order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fastsd_kernels import adamw, attention, dlion, geglu, gradient_norm, group_norm, layer_norm, lion, noise
from fastsd_kernels.cpu_optimizers import problem as cpu_problem
from fastsd_kernels.forward_backward import REFERENCE_FORWARD_BACKWARD, TRITON_FORWARD_BACKWARD
from fastsd_kernels.no_triton import AVAILABLE, remove_stand_in
from fastsd_kernels.ops import Op, Ops

# The record of every field of `Ops`. A test compares the two.
RECORDS: tuple[Op[Any], ...] = (
    attention.OP,
    group_norm.OP,
    layer_norm.OP,
    geglu.OP,
    noise.NORMAL,
    noise.ADD_NOISE,
    gradient_norm.OP,
    lion.OP,
    dlion.OP,
    dlion.ESTIMATE,
    adamw.OP,
)
REFERENCE = Ops("reference", forward_backward=REFERENCE_FORWARD_BACKWARD, **{op.name: op.reference for op in RECORDS})
TRITON: Ops | None = Ops("triton", forward_backward=TRITON_FORWARD_BACKWARD, **{op.name: op.triton for op in RECORDS})
if not AVAILABLE:
    TRITON = None
remove_stand_in()
# Usable if `cpu_optimizers.problem()` returns None; otherwise the functions in C raise ValueError.
CPU = replace(REFERENCE, name="cpu", **{op.name: op.cpu for op in RECORDS if op.cpu is not None})


def fastest(device: torch.device) -> Ops:
    """Return the table for tensors on this device: TRITON on a GPU, CPU on a CPU, or REFERENCE if that table is not usable.

    On a CPU the first call may compile for a second, once per machine. `cpu_optimizers.problem()` says why CPU is not usable.
    """
    if device.type == "cuda" and TRITON is not None:
        return TRITON
    if device.type == "cpu" and cpu_problem() is None:
        return CPU
    return REFERENCE


__all__ = ["CPU", "REFERENCE", "TRITON", "Ops", "fastest"]
