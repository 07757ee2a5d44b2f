"""LayerNorm over the last dimension. An optional residual is added first, and their sum is also returned.

    s = x + residual        rounded to the dtype of x; without a residual s is x
    y = xhat * weight + bias        xhat = (s - mean) * rstd        rstd = 1 / sqrt(var + eps)

    dx = d residual = ds + rstd * (u - mean_F(u) - xhat * mean_F(u * xhat))        u = dy * weight
    d weight = sum_N(dy * xhat)        d bias = sum_N(dy)        on demand sum_N(dx), the bias gradient of the linear before

mean and var run over one row's F numbers, in fp32 whatever the dtype.

Shapes: N rows (any leading dimensions), F features.  x, residual and y are fp32 or bf16; weight and bias may be fp32
beside a bf16 x.  mean and rstd are fp32, one of each per row.
Bytes moved at best: forward 1 read and 1 write of x (with a residual 2 and 2); backward x and dy (and ds) read, dx
written, and 8F bytes by each of up to a few hundred programs: its sums for the gradients of weight and bias, in fp32.
Saved for backward: s, mean, rstd, weight.  y is never saved: `layer_norm_apply` rebuilds it, bit for bit.
A linear after the norm needs y for its weight gradient, and dy comes first.  So `layer_norm_backward_in_place` also rebuilds
y, and overwrites dy with it: one more write, in place of a pass that reads s and writes y.

A tile holds whole rows, so mean and variance are taken in two passes over registers: E[x^2] - mean^2 would lose all
digits where mean >> std.  In the backward a program walks down its share of rows with two sums per feature in registers, writes
them once, and `column_sums` adds those of all programs in a fixed order: no atomics, equal bits in every run.
Rejected: the weight gradients in a separate kernel, which reads x and dy again.

Read next: `group_norm.py`, where no tile holds all the elements of a mean.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import workload
from fastsd_kernels.geglu import as_rows
from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import DTYPES, custom_op, launch, meta, require_device
from fastsd_kernels.ops import Calls, LayerNorm, Op
from fastsd_kernels.partial_sums import column_sums


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor | None = None) -> Any:
    """LayerNorm of the last dimension.

    Args:
        x: (..., F).
        weight, bias: (F,).
        eps: added to the variance, in units of x squared.
        residual: (..., F), added to x before the norm.

    Returns:
        y (..., F) in the dtype of x; with a residual (y, s), where s is the sum that was normalised, in the dtype of x.

    Raises:
        ValueError: weight or bias do not match the last dimension, or residual does not match x.

    Source: Ba, Kiros and Hinton 2016, equation 4.
    """
    _check(x, weight, bias, residual)
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    s = (x + residual).to(x.dtype)
    return F.layer_norm(s, x.shape[-1:], weight, bias, eps), s


def _check(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    if x.ndim == 0 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"layer_norm: x is {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
            "use (..., F), (F,) and (F,)"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"layer_norm: residual is {tuple(residual.shape)}; use the shape of x, {tuple(x.shape)}")


@triton.jit
def _scale(centred, rstd, weight, bias):
    """Compute the last step of forward, apply and backward. They share this function, so they round alike."""
    return centred * rstd * weight + bias


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, s_ptr, mean_ptr, rstd_ptr,
    n_rows, n_cols, x_stride, residual_stride, eps,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    row_mask, col_mask = rows < n_rows, cols < n_cols
    mask = row_mask & col_mask
    rows = rows.to(tl.int64)  # rows * stride may pass 2^31

    x = tl.load(x_ptr + rows * x_stride + cols, mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + rows * residual_stride + cols, mask, other=0.0).to(tl.float32)
        s = rounded(x, s_ptr.dtype.element_ty)
        tl.store(s_ptr + rows * n_cols + cols, s, mask)
        x = s.to(tl.float32)  # the norm is of the returned sum, after rounding

    mean = tl.sum(x, axis=1, keep_dims=True) / n_cols
    centred = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / n_cols + eps)
    tl.store(mean_ptr + rows, mean, row_mask)
    tl.store(rstd_ptr + rows, rstd, row_mask)

    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(tl.float32)
    y = _scale(centred, rstd, weight, bias)
    tl.store(y_ptr + rows * n_cols + cols, rounded(y, y_ptr.dtype.element_ty), mask)


@triton.jit
def _apply(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, n_rows, n_cols, x_stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    row_mask, col_mask = rows < n_rows, cols < n_cols
    mask = row_mask & col_mask
    rows = rows.to(tl.int64)

    x = tl.load(x_ptr + rows * x_stride + cols, mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + rows, row_mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, row_mask, other=0.0)
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(tl.float32)
    y = _scale(x - mean, rstd, weight, bias)
    tl.store(y_ptr + rows * n_cols + cols, rounded(y, y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows_per_program"])
def _backward(
    dy_ptr, ds_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, dx_ptr, partial_ptr,
    n_rows, n_cols, dy_stride, ds_stride, x_stride, rows_per_program,
    RESIDUAL: tl.constexpr, OUTPUT: tl.constexpr, VECTORS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    cols = tl.arange(0, COLS)[None, :]
    col_mask = cols < n_cols
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    if OUTPUT:
        bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, COLS], tl.float32)
    dbias = tl.zeros([ROWS, COLS], tl.float32)
    dx_sum = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(i_program * rows_per_program, min((i_program + 1) * rows_per_program, n_rows), ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        row_mask = rows < n_rows
        mask = row_mask & col_mask
        rows = rows.to(tl.int64)
        dy_ptrs = dy_ptr + rows * dy_stride + cols
        dy = tl.load(dy_ptrs, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * x_stride + cols, mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, row_mask, other=0.0)

        # Beyond the mask xhat is not zero. But dy is zero there, so every product that is summed is zero too.
        xhat = (x - mean) * rstd
        u = dy * weight
        u_mean = tl.sum(u, axis=1, keep_dims=True) / n_cols
        u_xhat_mean = tl.sum(u * xhat, axis=1, keep_dims=True) / n_cols
        dx = rstd * (u - u_mean - xhat * u_xhat_mean)
        if RESIDUAL:
            dx += tl.load(ds_ptr + rows * ds_stride + cols, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows * n_cols + cols, rounded(dx, dx_ptr.dtype.element_ty), mask)
        if OUTPUT:  # a thread overwrites the numbers that it has read, and no others
            tl.store(dy_ptrs, rounded(_scale(x - mean, rstd, weight, bias), dy_ptr.dtype.element_ty), mask)
        dweight += dy * xhat
        dbias += dy
        if VECTORS == 3:  # beyond the rows rstd is zero, and so is dx
            dx_sum += dx

    partial_ptrs = partial_ptr + i_program * VECTORS * n_cols + cols
    tl.store(partial_ptrs, tl.sum(dweight, axis=0, keep_dims=True), col_mask)
    tl.store(partial_ptrs + n_cols, tl.sum(dbias, axis=0, keep_dims=True), col_mask)
    if VECTORS == 3:
        tl.store(partial_ptrs + 2 * n_cols, tl.sum(dx_sum, axis=0, keep_dims=True), col_mask)


# {columns of a tile: (rows, warps)}, for every dtype and architecture: only bandwidth matters here.  A tile is as wide as the
# smallest power of two from 512 that is at least F.  A thread has 16 elements: two 16-byte loads of a bf16 operand (four of
# fp32) are in flight.  The backward holds six numbers per element in up to 168 registers: an SM holds three blocks of 4 warps.
_TILES = {
    512: (4, 4),  # F = 320: small programs, because many of them on an SM hide each other's waits
    1024: (2, 4),  # F = 640
    2048: (1, 4),  # F = 1280
    4096: (1, 8),
    8192: (1, 16),
}
# The backward aims for this many programs, which fill a GPU and leave few sums to add. None takes more than this many rows.
_PROGRAMS, _MOST_ROWS = 256, 64


def _tile(n_cols: int) -> dict[str, int]:
    cols = max(min(_TILES), triton.next_power_of_2(n_cols))
    rows, warps = _TILES[cols]
    return {"ROWS": rows, "COLS": cols, "num_warps": warps}


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return (y, s, mean, rstd): y and s are like x but contiguous, mean and rstd fp32 (...). Without a residual s is None."""
    rows, tile = as_rows(x), _tile(x.shape[-1])
    addend = None if residual is None else as_rows(residual)
    weight, bias = weight.contiguous(), bias.contiguous()
    y = x.new_empty(x.shape)
    s = None if residual is None else x.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if x.numel():
        grid = (triton.cdiv(len(rows), tile["ROWS"]),)
        operands = rows, addend, weight, bias, y, s, mean, rstd
        strides = rows.stride(0), 0 if addend is None else addend.stride(0)
        launch(_forward, grid, *operands, *rows.shape, *strides, eps, RESIDUAL=addend is not None, **tile)
    return y, s, mean, rstd


def layer_norm_apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rebuild y with the bits of the forward, from the saved x (or s), mean and rstd."""
    rows, tile = as_rows(x), _tile(x.shape[-1])
    y = x.new_empty(x.shape)
    grid = (triton.cdiv(len(rows), tile["ROWS"]),)
    weight, bias = weight.contiguous(), bias.contiguous()
    if x.numel():
        launch(_apply, grid, rows, mean, rstd, weight, bias, y, *rows.shape, rows.stride(0), **tile)
    return y


def layer_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, ds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias). x is the normalised input; with a residual it is s, and dx the gradient of both summands.

    Args:
        ds: the gradient of s from its other uses, added to dx.
    """
    dx, partial = _launch_backward(as_rows(dy), x, mean, rstd, weight, None, ds, 2)
    dweight, dbias = column_sums(partial, 2, weight.dtype)
    return dx, dweight, dbias


def layer_norm_backward_in_place(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    ds: Tensor | None,
    output: bool,
    sums: bool,
    memory: list[Tensor],
    add: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and, with `sums`, the sum of dx over all rows. A vector that is not returned is empty.

    Args:
        dy: contiguous. With `output`, y overwrites it, with the bits of the forward.
        memory: tensors (F) into which these vectors are written, or added if `add`, instead of being returned; or none.
    """
    assert dy.is_contiguous()
    dx, partial = _launch_backward(as_rows(dy), x, mean, rstd, weight, bias if output else None, ds, 2 + sums)
    new = column_sums(partial, 2 + sums, weight.dtype, (memory, add) if memory else None)
    dweight, dbias, dx_sum, *_ = *([] if memory else new), *(weight.new_empty(0) for _ in range(3))
    return dx, dweight, dbias, dx_sum


def _launch_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None, ds: Tensor | None, vectors: int
) -> tuple[Tensor, Tensor]:
    """Return dx and partial sums (programs, vectors * F) from rows dy. With a bias, y overwrites dy."""
    rows, tile = as_rows(x), _tile(x.shape[-1])
    ds_rows = None if ds is None else as_rows(ds)
    n_rows, n_cols = rows.shape
    rows_per_program = min(max(triton.next_power_of_2(triton.cdiv(n_rows, _PROGRAMS)), tile["ROWS"]), _MOST_ROWS)
    programs = triton.cdiv(n_rows, rows_per_program)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(programs, vectors * n_cols, dtype=torch.float32)
    if x.numel():
        parameters = weight.contiguous(), None if bias is None else bias.contiguous()
        operands = dy, ds_rows, rows, mean, rstd, *parameters, dx, partial
        sizes = *rows.shape, dy.stride(0), 0 if ds_rows is None else ds_rows.stride(0), rows.stride(0), rows_per_program
        flags = {"RESIDUAL": ds_rows is not None, "OUTPUT": bias is not None, "VECTORS": vectors}
        launch(_backward, (programs,), *operands, *sizes, **flags, **tile)
    return dx, partial


@custom_op("layer_norm")
def layer_norm_op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = layer_norm_forward(x, weight, bias, eps)
    return y, mean, rstd


@custom_op("layer_norm_residual")
def layer_norm_residual_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, s, mean, rstd = layer_norm_forward(x, weight, bias, eps, residual)
    assert s is not None
    return y, s, mean, rstd


layer_norm_apply_op = custom_op("layer_norm_apply")(layer_norm_apply)
layer_norm_backward_op = custom_op("layer_norm_backward")(layer_norm_backward)
layer_norm_backward_in_place_op = custom_op("layer_norm_backward_in_place", mutates_args=("dy", "memory"))(
    layer_norm_backward_in_place
)
layer_norm_apply_op.register_fake(lambda x, *_: x.new_empty(x.shape))


@layer_norm_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@layer_norm_residual_op.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), mean, rstd


@layer_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, ds: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@layer_norm_backward_in_place_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    ds: Tensor | None,
    output: bool,
    sums: bool,
    memory: list[Tensor],
    add: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = 0 if memory else len(weight)
    return x.new_empty(x.shape), weight.new_empty(size), weight.new_empty(size), weight.new_empty(size * sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *layer_norm_backward_op(dy, *ctx.saved_tensors), None


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, _ = inputs
    _, s, mean, rstd = output
    ctx.save_for_backward(s, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate_residual(ctx: Any, dy: Tensor, ds: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
    s, mean, rstd, weight = ctx.saved_tensors
    dx, dweight, dbias = layer_norm_backward_op(dy, s, mean, rstd, weight, ds)
    return dx, dx, dweight, dbias, None


layer_norm_op.register_autograd(_differentiate, setup_context=_save)
layer_norm_residual_op.register_autograd(_differentiate_residual, setup_context=_save_residual)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, residual: Tensor | None = None) -> Any:
    """`layer_norm_reference` as one kernel each way, for F up to 8192, fp32 or bf16. y is contiguous, differentiable once.

    Raises:
        ValueError: as the reference; or F is over 8192, x is neither fp32 nor bf16, or the device runs no kernels.
    """
    _check(x, weight, bias, residual)
    require_device("layer_norm", x, weight, bias, residual)
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"layer_norm: x is {x.dtype}; use float32 or bfloat16")
    if x.shape[-1] > max(_TILES):
        raise ValueError(f"layer_norm: x has {x.shape[-1]} features; use {max(_TILES)} or fewer")
    if residual is None:
        return layer_norm_op(x, weight, bias, eps)[0]
    y, s, _, _ = layer_norm_residual_op(x, residual, weight, bias, eps)
    return y, s


def layer_norm_bytes(kind: workload.LayerNorm, size: int, *, residual: bool = False) -> int:
    """Return `Op.bytes`. The forward reads x and writes y; the backward reads x and dy and writes dx. A residual adds 3."""
    return (8 if residual else 5) * kind.rows * kind.features * size


def _calls() -> Calls:
    for kind in workload.LAYER_NORM:
        for mode, dtype in DTYPES.items():
            x, w = meta(workload.BATCH * kind.rows, kind.features, dtype=dtype), meta(kind.features, dtype=dtype)
            _, _, mean, rstd = layer_norm_forward(x, w, w, kind.eps)
            layer_norm_forward(x, w, w, kind.eps, x)
            layer_norm_apply(x, mean, rstd, w, w)
            for output in (True, False):
                layer_norm_backward_in_place(x, x, mean, rstd, w, w, x, output, True, [], False)
            layer_norm_backward_in_place(x, x, mean, rstd, w, w, x, True, True, [meta(kind.features) for _ in range(3)], True)
            yield f"{kind.features} features", mode


OP: Op[LayerNorm] = Op(
    name="layer_norm",
    reference=layer_norm_reference,
    triton=layer_norm_triton,
    calls=_calls,
    bytes=layer_norm_bytes,
)
