"""GEGLU: a gated linear unit with an exact (erf) GELU.  The shortest kernel file; all others have its order.

    y = value * gelu(gate)        x = [value | gate] along the last dimension, value first
    gelu(g) = g * cdf(g)          cdf(g) = (1 + erf(g / sqrt 2)) / 2

    d value = dy * gelu(gate)
    d gate  = dy * value * (cdf(gate) + gate * pdf(gate))        pdf(g) = exp(-g^2 / 2) / sqrt(2 pi)

Shapes: N rows (any leading dimensions), 2F features in, F out.  fp32 or bf16 in memory, fp32 inside.
Bytes moved per row are minimal: forward 2F read, F written; backward 3F read, 2F written.  Only x is saved for backward.

A program owns a tile of rows and columns of the output and reads the two tiles of x it comes from.  Tiles are as wide as
a power of two that divides every F of the workload, so no lane idles there and each thread moves 16 bytes at a time.
Rejected: one program a row, whose tile is the next power of two above F (1280 -> 2048: three lanes in eight idle), and the
tanh approximation, which is another function: models trained with erf need erf.

Read next: `layer_norm.py`, where rows are reduced.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import workload
from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import DTYPES, custom_op, launch, meta, require_device
from fastsd_kernels.ops import Calls, Geglu, Op


def geglu_reference(x_2F: Tensor) -> Tensor:
    """GEGLU of the last dimension: (..., 2F) -> (..., F), value first, gate second.

    Raises:
        ValueError: the last dimension is odd.

    Source: Shazeer 2020, "GLU variants improve transformer", equation 6.
    """
    _check(x_2F)
    value, gate = x_2F.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _check(x_2F: Tensor) -> None:
    if x_2F.ndim == 0 or x_2F.shape[-1] % 2:
        raise ValueError(f"geglu: x is {tuple(x_2F.shape)}; the last dimension must be even, half values and half gates")


@triton.jit
def _cdf(g):
    return 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)


@triton.jit
def _forward(x_ptr, y_ptr, n_rows, n_cols, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    n_blocks = tl.cdiv(n_cols, COLS)
    rows = tl.program_id(0) // n_blocks * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % n_blocks * COLS + tl.arange(0, COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    rows = rows.to(tl.int64)  # rows * stride may pass 2^31

    x_ptrs = x_ptr + rows * x_stride + cols
    value = tl.load(x_ptrs, mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptrs + n_cols, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * n_cols + cols, rounded(value * gate * _cdf(gate), y_ptr.dtype.element_ty), mask)


@triton.jit
def _backward(dy_ptr, x_ptr, dx_ptr, n_rows, n_cols, dy_stride, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    n_blocks = tl.cdiv(n_cols, COLS)
    rows = tl.program_id(0) // n_blocks * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(0) % n_blocks * COLS + tl.arange(0, COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    rows = rows.to(tl.int64)

    x_ptrs = x_ptr + rows * x_stride + cols
    dy = tl.load(dy_ptr + rows * dy_stride + cols, mask, other=0.0).to(tl.float32)
    value = tl.load(x_ptrs, mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptrs + n_cols, mask, other=0.0).to(tl.float32)

    cdf = _cdf(gate)
    pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dx_ptrs = dx_ptr + rows * (2 * n_cols) + cols
    tl.store(dx_ptrs, rounded(dy * gate * cdf, dx_ptr.dtype.element_ty), mask)
    tl.store(dx_ptrs + n_cols, rounded(dy * value * (cdf + gate * pdf), dx_ptr.dtype.element_ty), mask)


# (rows, columns, warps) of a tile, for every architecture: only bandwidth matters.
_TILES = {
    # 256 divides 1280, 2560 and 5120.  8 rows make 16 elements a thread: two 16-byte loads of each operand in flight.
    torch.bfloat16: (8, 256, 4),
    # Twice the bytes an element: half the rows for the same bytes in flight.
    torch.float32: (4, 256, 4),
}


def geglu_forward(x_2F: Tensor) -> Tensor:
    """Return y (..., F), contiguous, from x (..., 2F)."""
    x, n_cols = as_rows(x_2F), x_2F.shape[-1] // 2
    y = x.new_empty(*x_2F.shape[:-1], n_cols)
    rows, cols, warps = _TILES[x.dtype]
    grid = (triton.cdiv(len(x), rows) * triton.cdiv(n_cols, cols),)
    if y.numel():
        launch(_forward, grid, x, y, len(x), n_cols, x.stride(0), ROWS=rows, COLS=cols, num_warps=warps)
    return y


def geglu_backward(dy_F: Tensor, x_2F: Tensor) -> Tensor:
    """Return dx (..., 2F), contiguous, from dy (..., F) and x (..., 2F)."""
    dy, x, n_cols = as_rows(dy_F), as_rows(x_2F), x_2F.shape[-1] // 2
    dx = x.new_empty(x_2F.shape)
    rows, cols, warps = _TILES[x.dtype]
    grid = (triton.cdiv(len(x), rows) * triton.cdiv(n_cols, cols),)
    strides = dy.stride(0), x.stride(0)
    if dx.numel():
        launch(_backward, grid, dy, x, dx, len(x), n_cols, *strides, ROWS=rows, COLS=cols, num_warps=warps)
    return dx


def as_rows(x: Tensor) -> Tensor:
    """Return x as a matrix (N, F) with dense rows: a view if strides allow, rows any distance apart, otherwise a copy.

    The output of a linear layer, or a slice of it, becomes a view.  An expanded gradient (that of a sum) is copied.
    """
    matrix = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


geglu_op = custom_op("geglu")(geglu_forward)
geglu_backward_op = custom_op("geglu_backward")(geglu_backward)
geglu_op.register_fake(lambda x_2F: x_2F.new_empty(*x_2F.shape[:-1], x_2F.shape[-1] // 2))
geglu_backward_op.register_fake(lambda dy_F, x_2F: x_2F.new_empty(x_2F.shape))


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy_F: Tensor) -> Tensor:
    return geglu_backward_op(dy_F, *ctx.saved_tensors)


geglu_op.register_autograd(_differentiate, setup_context=_save)


def geglu_triton(x_2F: Tensor) -> Tensor:
    """`geglu_reference` as one kernel each way, for fp32 or bf16. The result is contiguous and differentiable once.

    Raises:
        ValueError: the last dimension is odd, a dtype without a kernel, or tensors on a device that runs no kernels.
    """
    _check(x_2F)
    require_device("geglu", x_2F)
    if x_2F.dtype not in _TILES:
        raise ValueError(f"geglu: x is {x_2F.dtype}; use float32 or bfloat16")
    return geglu_op(x_2F)


def _calls() -> Calls:
    for kind in workload.GEGLU:
        for mode, dtype in DTYPES.items():
            x, y = (meta(workload.BATCH * kind.rows, width * kind.features, dtype=dtype) for width in (2, 1))
            geglu_forward(x)
            geglu_backward(y, x)
            yield f"{kind.features} features", mode


OP: Op[Geglu] = Op(
    name="geglu",
    reference=geglu_reference,
    triton=geglu_triton,
    calls=_calls,
    bytes=lambda kind, size: 8 * kind.rows * kind.features * size,  # forward 2F read, F written; backward 3F and 2F
)
