"""Floor 0: the operations a step is made of, each as a function with one signature and several implementations.

`Ops` is a frozen table of them. REFERENCE is plain PyTorch: the truth in tests, and the path on a machine without a GPU.
TRITON is the table of fused kernels; it is None until every entry of it is built, and nothing falls back in silence.
A model is handed one table when it is made.  Read next: any one op's file, they share one order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastsd_kernels.attention import attention_reference
from fastsd_kernels.geglu import geglu_reference
from fastsd_kernels.group_norm import group_norm_reference
from fastsd_kernels.layer_norm import layer_norm_reference


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation, differentiable. Signatures are those of the references."""

    name: str
    attention: Callable[..., Tensor]  # (q_BNHD, k_BLHD, v_BLHD, *, precision="ieee") -> o_BNHD
    group_norm: Callable[..., Tensor]  # (x_BCHW, weight, bias, groups, eps, *, silu=False, shift_BC=None) -> y_BCHW
    layer_norm: Callable[..., Tensor]  # (x, weight, bias, eps) -> y
    geglu: Callable[..., Tensor]  # (x_2F) -> y_F


REFERENCE = Ops(
    name="reference",
    attention=attention_reference,
    group_norm=group_norm_reference,
    layer_norm=layer_norm_reference,
    geglu=geglu_reference,
)
TRITON: Ops | None = None

__all__ = ["REFERENCE", "TRITON", "Ops"]
