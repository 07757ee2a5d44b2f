"""Mean and rstd of GroupNorm's groups, from sums of tiles; they may come from the pass that adds up the norm's input.

    partial = mean and sum of squared deviations of each channel over a chunk of positions, of x + shift
    mean, rstd = the partials of a group's channels and of all chunks, merged by Chan's formula

A residual block ends with h + bias + residual, where h is a convolution without bias.  `add_statistics` writes this sum and the
partials of what it wrote, so the norms that read the sum later (the next layer's, and that of the up block, if the sum is a
skip connection too) do not read it for their statistics.  The partials are those of `partial_statistics`, bit for bit.

Shapes: B images, C channels, G groups, K chunks, P = H*W positions; memory is channels last.  partial is fp32 (B, K, 2, C).
Bytes moved: `partial_statistics` 1 read; `add_statistics` 2 reads (1 without a residual) and 1 write.
Read next: `group_norm.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels.group_norm_tiles import (
    chunks_and_tile,
    columns,
    grid,
    load_shifted,
    merging_tile,
    offsets,
    positions_of,
    tile_number,
)
from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import custom_op, launch
from fastsd_kernels.ops import Shift


@triton.jit
def _statistics(
    x_ptr, shift_ptr, residual_ptr, out_ptr, partial_ptr, n_positions, n_channels,
    SHIFT: tl.constexpr, RESIDUAL: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write partial of x + shift, or with STORE out = x + shift + residual, where the shift is one for all images (C,)."""
    i_program = tl.program_id(0)
    i_image, i_chunk, i_block = tile_number(i_program, n_positions, n_channels, n_channels, ROWS, COLS)
    cols, col_mask, _, _, _ = columns(i_block, n_channels, n_channels, COLS)
    start, offs, row_mask = offsets(i_image, i_chunk, n_positions, n_channels, cols, ROWS)
    mask = row_mask & col_mask
    i_shift = 0 if STORE else i_image
    x = load_shifted(x_ptr + start + offs, shift_ptr, mask, i_shift, n_channels, cols, col_mask, SHIFT)
    if RESIDUAL:
        x += tl.load(residual_ptr + start + offs, mask, other=0.0).to(tl.float32)
    if STORE:
        x = rounded(x, out_ptr.dtype.element_ty)
        tl.store(out_ptr + start + offs, x, mask)
        x = x.to(tl.float32)
    count = tl.minimum(n_positions - i_chunk * ROWS, ROWS)
    mean = tl.sum(tl.where(row_mask, x, 0.0), axis=0, keep_dims=True) / count
    centred = tl.where(row_mask, x - mean, 0.0)
    i_tile = i_image.to(tl.int64) * tl.cdiv(n_positions, ROWS) + i_chunk
    partial_ptrs = partial_ptr + i_tile * 2 * n_channels + cols
    tl.store(partial_ptrs, mean, col_mask)
    tl.store(partial_ptrs + n_channels, tl.sum(centred * centred, axis=0, keep_dims=True), col_mask)


@triton.jit
def _load_partial(partial_ptr, skip_partial_ptr, i_row, n_channels, n_first, cols, mask, SKIP: tl.constexpr):
    """Load rows of partials (B * K * 2, C) at `cols`, of which the first n_first are in the first tensor."""
    values = tl.load(partial_ptr + i_row * n_first + cols, mask & (cols < n_first), other=0.0)
    if SKIP:
        skip_ptrs = skip_partial_ptr + i_row * (n_channels - n_first) + cols - n_first
        values += tl.load(skip_ptrs, mask & (cols >= n_first), other=0.0)
    return values


@triton.jit
def _merge(
    partial_ptr, skip_partial_ptr, mean_ptr, rstd_ptr, n_positions, n_channels, n_first, n_chunks, eps,
    SKIP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of tiles into mean and rstd (B, G) of each group. COLS covers a group, ROWS is that of a tile."""
    n_groups = n_channels // WIDTH
    i_image, i_group = tl.program_id(0) // n_groups, tl.program_id(0) % n_groups
    cols = tl.arange(0, COLS)[None, :]
    col_mask = cols < WIDTH
    cols += i_group * WIDTH
    first_row = i_image.to(tl.int64) * n_chunks * 2
    elements = 1.0 * n_positions * WIDTH  # not in int32: it may pass 2^31

    total = tl.zeros([CHUNKS, COLS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        mask = (chunks < n_chunks) & col_mask
        rows = first_row + chunks * 2
        mean = _load_partial(partial_ptr, skip_partial_ptr, rows, n_channels, n_first, cols, mask, SKIP)
        total += mean * tl.minimum(n_positions - chunks * ROWS, ROWS)
    group_mean = tl.sum(total) / elements

    total = tl.zeros([CHUNKS, COLS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        mask = (chunks < n_chunks) & col_mask
        rows = first_row + chunks * 2
        deviation = _load_partial(partial_ptr, skip_partial_ptr, rows, n_channels, n_first, cols, mask, SKIP) - group_mean
        squares = _load_partial(partial_ptr, skip_partial_ptr, rows + 1, n_channels, n_first, cols, mask, SKIP)
        squares += deviation * deviation * tl.minimum(n_positions - chunks * ROWS, ROWS)
        total += tl.where(mask, squares, 0.0)
    variance = tl.sum(total) / elements

    tl.store(mean_ptr + i_image * n_groups + i_group, group_mean)
    tl.store(rstd_ptr + i_image * n_groups + i_group, tl.rsqrt(variance + eps))


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last memory: x itself if it has that layout, otherwise a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_partial(x: Tensor) -> Tensor:
    return x.new_empty(len(x), chunks_and_tile(positions_of(x))[0], 2, x.shape[1], dtype=torch.float32)


def _launch_statistics(x: Tensor, shift: Tensor | None, residual: Tensor | None, out: Tensor | None, partial: Tensor) -> None:
    chunks, tile = chunks_and_tile(positions_of(x))
    sizes = positions_of(x), x.shape[1]
    flags = {"SHIFT": shift is not None, "RESIDUAL": residual is not None, "STORE": out is not None}
    if x.numel():
        programs = grid(len(x), chunks, x.shape[1])
        launch(_statistics, programs, x, shift, residual, out, partial, *sizes, **flags, **tile)


def partial_statistics(x: Tensor, shift: Shift) -> Tensor:
    """Return partial (B, K, 2, C) of x + shift."""
    partial = empty_partial(x)
    _launch_statistics(channels_last(x), None if shift is None else shift.contiguous(), None, None, partial)
    return partial


def merge_statistics(
    partial: Tensor, skip_partial: Tensor | None, positions: int, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (mean, rstd), fp32 (B, G), of images of so many positions. The skip's channels follow those of the first."""
    n_first = partial.shape[3]
    n_channels = n_first if skip_partial is None else n_first + skip_partial.shape[3]
    images = len(partial)
    mean, rstd = (partial.new_empty(images, groups) for _ in range(2))
    chunks, tile = chunks_and_tile(positions)
    if partial.numel():
        operands = partial, skip_partial, mean, rstd, positions, n_channels, n_first, chunks, eps
        options = {"SKIP": skip_partial is not None, "ROWS": tile["ROWS"], **merging_tile(n_channels, groups)}
        launch(_merge, (groups * images,), *operands, **options)
    return mean, rstd


def add_statistics(h: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return out = h + bias (C,) + residual, in channels-last memory, and its partial statistics. h may have any layout."""
    h, residual = channels_last(h), None if residual is None else channels_last(residual)
    out, partial = torch.empty_like(h, memory_format=torch.channels_last), empty_partial(h)
    _launch_statistics(h, bias, residual, out, partial)
    return out, partial


def group_norm_statistics(
    x: Tensor, skip: Tensor | None, partial: Tensor | None, skip_partial: Tensor | None, shift: Shift, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (mean, rstd) of [x, skip] + shift, fp32 (B, G). Partial statistics that are None are computed from the image."""
    partial = partial_statistics(x, shift) if partial is None else partial
    if skip is not None and skip_partial is None:
        skip_partial = partial_statistics(skip, None)
    return merge_statistics(partial, skip_partial, positions_of(x), groups, eps)


add_statistics_op = custom_op("add_statistics")(add_statistics)


@add_statistics_op.register_fake
def _(h: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h, memory_format=torch.channels_last), empty_partial(h)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return None, None, None
    need_h, need_bias, need_residual = ctx.needs_input_grad
    dbias = dout.sum((0, 2, 3)) if need_bias else None
    return dout if need_h else None, dbias, dout if need_residual else None


add_statistics_op.register_autograd(_differentiate, setup_context=_save)
