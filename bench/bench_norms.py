"""GroupNorm, LayerNorm and GEGLU, forward and backward, against PyTorch on the same tensors.

Images and their gradients are channels last.  PyTorch's GroupNorm is timed twice: "pytorch" keeps the output layout of
F.group_norm, "pytorch channels last" converts it to the layout that the next convolution needs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import DTYPES, Bench, Case, Operands, label
from torch import Tensor

from fastsd_kernels import workload
from fastsd_kernels.geglu import geglu_reference, geglu_triton
from fastsd_kernels.group_norm import group_norm_reference, group_norm_triton
from fastsd_kernels.layer_norm import layer_norm_reference, layer_norm_triton


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

    size = bench.batch * kind.channels * kind.side**2 * dtype.itemsize
    op = "group_norm+silu" if kind.silu else "group_norm"
    # Twice x in, y out; twice x and dy in, dx out.  If each pass read once: x in, y out; x and dy in, dx out.
    case = Case(op, label(kind), workload.GROUP_NORM[kind], implementation, mode, 8 * size, bytes_once=5 * size)
    bench.differentiated(case, function, make)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("kind, mode, implementation", _cases(workload.LAYER_NORM, "triton", "pytorch", "compiled"))
def bench_layer_norm(kind: workload.LayerNorm, mode: str, implementation: str, residual: bool, bench: Bench) -> None:
    dtype, shape = DTYPES[mode], (bench.batch, kind.rows, kind.features)
    norm = layer_norm_triton if implementation == "triton" else layer_norm_reference
    if implementation == "compiled":
        norm = _compiled(norm)

    def function(weight: Tensor, bias: Tensor, x: Tensor, other: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return norm(x, weight, bias, kind.eps, residual=other)

    def make() -> Operands:
        images = [bench.tensor(*shape, dtype=dtype) for _ in range(4 if residual else 2)]
        inputs, upstream = images[: len(images) // 2], images[len(images) // 2 :]
        return tuple(bench.tensor(kind.features, dtype=dtype) for _ in range(2)) + tuple(inputs), tuple(upstream)

    size = bench.batch * kind.rows * kind.features * dtype.itemsize
    op = "layer_norm+residual" if residual else "layer_norm"
    # x in, y out; x, dy in, dx out.  A residual is read too, and s is written; ds is read.
    count = workload.LAYER_NORM[kind]
    case = Case(op, label(kind), count, implementation, mode, (8 if residual else 5) * size)
    bench.differentiated(case, function, make)


@pytest.mark.parametrize("kind, mode, implementation", _cases(workload.GEGLU, "triton", "pytorch", "compiled"))
def bench_geglu(kind: workload.Geglu, mode: str, implementation: str, bench: Bench) -> None:
    dtype, shape = DTYPES[mode], (bench.batch, kind.rows)
    function = geglu_triton if implementation == "triton" else geglu_reference
    if implementation == "compiled":
        function = _compiled(function)

    def make() -> Operands:
        return (bench.tensor(*shape, 2 * kind.features, dtype=dtype),), (bench.tensor(*shape, kind.features, dtype=dtype),)

    # 2F in, F out; 3F in, 2F out.
    size = 8 * bench.batch * kind.rows * kind.features * dtype.itemsize
    bench.differentiated(Case("geglu", label(kind), workload.GEGLU[kind], implementation, mode, size), function, make)


def _compiled(function):
    torch._dynamo.reset()  # forget the previous kind: one compilation per shape, as in a step
    return torch.compile(function, dynamic=False)
