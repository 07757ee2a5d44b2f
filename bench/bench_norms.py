"""GroupNorm, LayerNorm and GEGLU, forward and backward, compared with PyTorch on the same tensors.

Images and their gradients are channels last.  PyTorch's GroupNorm is timed twice: "pytorch" keeps the output layout of
F.group_norm, and "pytorch channels last" converts the output to the layout that the next convolution needs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import DTYPES, Bench, Case, Operands, label
from torch import Tensor

from fastsd_kernels import geglu, group_norm, workload
from fastsd_kernels.geglu import geglu_reference, geglu_triton
from fastsd_kernels.group_norm import group_norm_reference, group_norm_triton
from fastsd_kernels.layer_norm import layer_norm_bytes, layer_norm_reference, layer_norm_triton


def _cases(table: dict, *implementations: str) -> list:
    return [
        pytest.param(kind, mode, implementation, id=f"{label(kind)} {mode} {implementation}".replace(" ", "-"))
        for mode in DTYPES
        for kind in table
        for implementation in implementations
    ]


def _plain_group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool, shift_BC: Tensor | None
) -> Tensor:
    y = F.group_norm(x if shift_BC is None else x + shift_BC[:, :, None, None], groups, weight, bias, eps)
    return F.silu(y) if silu else y


@pytest.mark.parametrize(
    "kind, mode, implementation", _cases(workload.GROUP_NORM, "triton", "pytorch", "pytorch channels last", "compiled")
)
def bench_group_norm(kind: workload.GroupNorm, mode: str, implementation: str, bench: Bench) -> None:
    dtype, shape = DTYPES[mode], (bench.batch, kind.channels, kind.side, kind.side)
    norm = {
        "triton": group_norm_triton,
        "pytorch": _plain_group_norm,
        "pytorch channels last": group_norm_reference,
        "compiled": _compiled(group_norm_reference) if implementation == "compiled" else None,
    }[implementation]

    def function(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None = None) -> Tensor:
        return norm(x, weight, bias, kind.groups, kind.eps, silu=kind.silu, shift_BC=shift)

    def make() -> Operands:
        x, dy = (bench.tensor(*shape, dtype=dtype, channels_last=True) for _ in range(2))
        shift = (bench.tensor(*shape[:2], dtype=dtype),) if kind.shift else ()
        return (x, bench.tensor(kind.channels, dtype=dtype), bench.tensor(kind.channels, dtype=dtype), *shift), (dy,)

    num_bytes = bench.batch * group_norm.OP.bytes(kind, dtype.itemsize)
    op = "group_norm+silu" if kind.silu else "group_norm"
    # With single reads of x and dy, 5 images instead of 8.
    bytes_once = num_bytes * 5 // 8
    case = Case(op, label(kind), workload.GROUP_NORM[kind], implementation, mode, num_bytes, bytes_once=bytes_once)
    bench.differentiated(case, function, make)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind, mode, implementation", _cases(workload.LAYER_NORM, "triton", "pytorch", "compiled"))
def bench_layer_norm(kind: workload.LayerNorm, mode: str, implementation: str, residual: bool, bench: Bench) -> None:
    dtype, shape = DTYPES[mode], (bench.batch, kind.rows, kind.features)
    norm = layer_norm_triton if implementation == "triton" else layer_norm_reference
    if implementation == "compiled":
        norm = _compiled(norm)

    def function(weight: Tensor, bias: Tensor, x: Tensor, summand: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return norm(x, weight, bias, kind.eps, residual=summand)

    def make() -> Operands:
        count = 2 if residual else 1
        inputs = [bench.tensor(*shape, dtype=dtype) for _ in range(count)]
        upstream = [bench.tensor(*shape, dtype=dtype) for _ in range(count)]
        weights = [bench.tensor(kind.features, dtype=dtype) for _ in range(2)]
        return (*weights, *inputs), tuple(upstream)

    num_bytes = bench.batch * layer_norm_bytes(kind, dtype.itemsize, residual=residual)
    op = "layer_norm+residual" if residual else "layer_norm"
    case = Case(op, label(kind), workload.LAYER_NORM[kind], implementation, mode, num_bytes)
    bench.differentiated(case, function, make)


@pytest.mark.parametrize("kind, mode, implementation", _cases(workload.GEGLU, "triton", "pytorch", "compiled"))
def bench_geglu(kind: workload.Geglu, mode: str, implementation: str, bench: Bench) -> None:
    dtype, shape = DTYPES[mode], (bench.batch, kind.rows)
    function = geglu_triton if implementation == "triton" else geglu_reference
    if implementation == "compiled":
        function = _compiled(function)

    def make() -> Operands:
        return (bench.tensor(*shape, 2 * kind.features, dtype=dtype),), (bench.tensor(*shape, kind.features, dtype=dtype),)

    num_bytes = bench.batch * geglu.OP.bytes(kind, dtype.itemsize)
    bench.differentiated(Case("geglu", label(kind), workload.GEGLU[kind], implementation, mode, num_bytes), function, make)


def _compiled(function):
    torch._dynamo.reset()  # forget the previous kind, because a step compiles once per shape
    return torch.compile(function, dynamic=False)
