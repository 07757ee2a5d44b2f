"""GEGLU: a gated linear unit with an exact (erf) GELU.  The shortest kernel file; all others have its order.

    y = value * gelu(gate)        x = [value | gate] along the last dimension, value first
    gelu(g) = g * cdf(g)          cdf(g) = (1 + erf(g / sqrt 2)) / 2

    d value = dy * gelu(gate)
    d gate  = dy * value * (cdf(gate) + gate * pdf(gate))        pdf(g) = exp(-g^2 / 2) / sqrt(2 pi)

Shapes: N rows (any leading dimensions), 2F features in, F out.  fp32 or bf16 in memory, fp32 inside.
Bytes moved per row are minimal: forward 2F read, F written; backward 3F read, 2F written.  Only x is saved for backward.

A feed-forward's backward also needs y, for the weight gradient of its second linear, and the column sums of dx, the bias
gradient of its first.  `geglu_backward_in_place` has both from the same pass: y overwrites dy (F more written, in place of a
pass of 2F read and F written), and each program writes the sums of its rows in fp32 (in place of a pass of 2F read).

A program owns columns of the output, walks down its rows in tiles, and reads the two tiles of x a tile comes from.  Tiles are
as wide as a power of two that divides every F of the workload, so no lane idles there and each thread moves 16 bytes at a
time.  Rejected: one program a row, whose tile is the next power of two above F (1280 -> 2048: three lanes in eight idle), and
the tanh approximation, which is another function: models trained with erf need erf.

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
from fastsd_kernels.partial_sums import column_sums


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


@triton.jit(do_not_specialize=["rows_per_program"])
def _backward(
    dy_ptr, x_ptr, dx_ptr, partial_ptr, n_rows, n_cols, dy_stride, x_stride, rows_per_program,
    OUTPUT: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_cols, COLS)
    i_program = tl.program_id(0) // n_blocks
    cols = tl.program_id(0) % n_blocks * COLS + tl.arange(0, COLS)[None, :]
    col_mask = cols < n_cols
    dvalue_sums = tl.zeros([ROWS, COLS], tl.float32)
    dgate_sums = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(i_program * rows_per_program, min((i_program + 1) * rows_per_program, n_rows), ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        mask = (rows < n_rows) & col_mask
        rows = rows.to(tl.int64)
        x_ptrs = x_ptr + rows * x_stride + cols
        dy_ptrs = dy_ptr + rows * dy_stride + cols
        dy = tl.load(dy_ptrs, mask, other=0.0).to(tl.float32)
        value = tl.load(x_ptrs, mask, other=0.0).to(tl.float32)
        gate = tl.load(x_ptrs + n_cols, mask, other=0.0).to(tl.float32)

        cdf = _cdf(gate)
        pdf = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        dvalue = dy * gate * cdf
        dgate = dy * value * (cdf + gate * pdf)
        dx_ptrs = dx_ptr + rows * (2 * n_cols) + cols
        tl.store(dx_ptrs, rounded(dvalue, dx_ptr.dtype.element_ty), mask)
        tl.store(dx_ptrs + n_cols, rounded(dgate, dx_ptr.dtype.element_ty), mask)
        if OUTPUT:  # a thread overwrites the numbers that it has read, and no others
            tl.store(dy_ptrs, rounded(value * gate * cdf, dy_ptr.dtype.element_ty), mask)
        if SUMS:
            dvalue_sums += dvalue
            dgate_sums += dgate

    if SUMS:
        partial_ptrs = partial_ptr + i_program * 2 * n_cols + cols
        tl.store(partial_ptrs, tl.sum(dvalue_sums, axis=0, keep_dims=True), col_mask)
        tl.store(partial_ptrs + n_cols, tl.sum(dgate_sums, axis=0, keep_dims=True), col_mask)


# (rows, columns, warps) of a tile, for every architecture: only bandwidth matters.
_TILES = {
    # 256 divides 1280, 2560 and 5120.  8 rows make 16 elements a thread: two 16-byte loads of each operand in flight.
    torch.bfloat16: (8, 256, 4),
    # Twice the bytes an element: half the rows for the same bytes in flight.
    torch.float32: (4, 256, 4),
}
# A backward with sums aims for this many programs.  None has fewer rows, unless there are no more: it writes 8F bytes of sums.
_PROGRAMS, _FEWEST_ROWS = 4096, 32


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
    return _launch_backward(as_rows(dy_F), x_2F, output=False, sums=False)[0]


def geglu_backward_in_place(
    dy_F: Tensor, x_2F: Tensor, output: bool, sums: bool, memory: list[Tensor], add: bool
) -> tuple[Tensor, Tensor]:
    """Return dx (..., 2F) and, with `sums`, its sum over all rows (2F), otherwise an empty tensor.

    Args:
        dy_F: (..., F), contiguous. With `output`, y overwrites it.
        memory: one tensor (2F) into which the sum is written, or added if `add`, instead of being returned; or none.
    """
    assert dy_F.is_contiguous()
    dx, partial = _launch_backward(as_rows(dy_F), x_2F, output=output, sums=sums)
    new = [] if partial is None else column_sums(partial, 1, x_2F.dtype, (memory, add) if memory else None)
    return dx, new[0] if new and not memory else x_2F.new_empty(0)


def _launch_backward(dy: Tensor, x_2F: Tensor, *, output: bool, sums: bool) -> tuple[Tensor, Tensor | None]:
    x, n_cols = as_rows(x_2F), x_2F.shape[-1] // 2
    rows, cols, warps = _TILES[x.dtype]
    blocks = triton.cdiv(n_cols, cols)
    rows_per_program = rows
    if sums:
        rows_per_program = max(triton.next_power_of_2(triton.cdiv(len(x) * blocks, _PROGRAMS)), _FEWEST_ROWS)
    programs = triton.cdiv(len(x), rows_per_program)
    dx = x.new_empty(x_2F.shape)
    partial = x.new_empty(programs, 2 * n_cols, dtype=torch.float32) if sums else None
    if dx.numel():
        operands = dy, x, dx, partial, len(x), n_cols, dy.stride(0), x.stride(0), rows_per_program
        launch(_backward, (programs * blocks,), *operands, OUTPUT=output, SUMS=sums, ROWS=rows, COLS=cols, num_warps=warps)
    return dx, partial


def as_rows(x: Tensor) -> Tensor:
    """Return x as a matrix (N, F) with dense rows: a view if strides allow, rows any distance apart, otherwise a copy.

    The output of a linear layer, or a slice of it, becomes a view.  An expanded gradient (that of a sum) is copied.
    """
    matrix = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


geglu_op = custom_op("geglu")(geglu_forward)
geglu_backward_op = custom_op("geglu_backward")(geglu_backward)
geglu_backward_in_place_op = custom_op("geglu_backward_in_place", mutates_args=("dy_F", "memory"))(geglu_backward_in_place)
geglu_op.register_fake(lambda x_2F: x_2F.new_empty(*x_2F.shape[:-1], x_2F.shape[-1] // 2))
geglu_backward_op.register_fake(lambda dy_F, x_2F: x_2F.new_empty(x_2F.shape))


@geglu_backward_in_place_op.register_fake
def _(dy_F: Tensor, x_2F: Tensor, output: bool, sums: bool, memory: list[Tensor], add: bool) -> tuple[Tensor, Tensor]:
    return x_2F.new_empty(x_2F.shape), x_2F.new_empty(x_2F.shape[-1] if sums and not memory else 0)


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
            geglu_backward_in_place(y, x, True, True, [], False)
            geglu_backward_in_place(y, x, True, True, [meta(2 * kind.features)], True)
            yield f"{kind.features} features", mode


OP: Op[Geglu] = Op(
    name="geglu",
    reference=geglu_reference,
    triton=geglu_triton,
    calls=_calls,
    bytes=lambda kind, size: 8 * kind.rows * kind.features * size,  # forward 2F read, F written; backward 3F and 2F
)
