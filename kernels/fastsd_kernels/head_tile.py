# mypy: disable-error-code="assignment"
"""Building blocks of the attention kernels: tiles of one head, cut into slices of its D columns.

A head tile is a tuple of 2-D tiles, one per slice. `SLICES` holds (first column, width) of each slice, and the last slice may
reach beyond D.  `row_ptrs` point at column 0 of a tile's rows.  Slices are known at compile time: the loops over them unroll.

An operand of matmuls is a head tile. In "fp16x3" it is (high, low, factor, 1 / factor): two head tiles in fp16 whose sum is the
rows times their factor, a power of two that puts the largest number of a row just below fp16's largest. So each of the two has
11 of fp32's 24 bits, whatever the size of the numbers, and three products give what fp32 multiply-adds give (Ootomo and Yokota
2022, "Recovering single precision accuracy from Tensor Cores"). Tensor cores cut their sums instead of rounding them, so sums
of more than one slice, and of more than one tile, are added outside of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels.interpreter import dot, fp16_factor, fp16_pair, operand, rounded

# Strides in units of 8 elements allow 128-bit loads. More divisors would only multiply the variants to compile.
_TENSORS, _AXES = ("q", "k", "v", "o", "do", "dq", "dk", "dv"), ("split", "image", "row", "head")
SIZES = ["chunk", *(f"{name}_{axis}" for name in _TENSORS for axis in _AXES)]


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return all strides but the last of each tensor, in units of 8 elements, as the kernels take them."""
    return tuple(stride // 8 for x in tensors for stride in x.stride()[:-1])


@triton.jit
def tile_and_head(n_rows, ROWS: tl.constexpr):
    """Return the number of the program's tile of ROWS and that of its head, counted over all images (int64)."""
    n_tiles = tl.cdiv(n_rows, ROWS)
    return tl.program_id(0) % n_tiles, (tl.program_id(0) // n_tiles).to(tl.int64)


@triton.jit
def head_pointer(ptr, i_head, image_stride, head_stride, H):
    """Return the pointer to an image's head."""
    return ptr + i_head // H * (image_stride * 8) + i_head % H * (head_stride * 8)


@triton.jit
def load_head(row_ptrs, row_mask, SLICES: tl.constexpr, D: tl.constexpr):
    """Load a head tile, with zeros where row_mask is false or beyond D. If row_mask is None, all rows exist."""
    tiles = ()
    for i in tl.static_range(len(SLICES)):
        tiles = tiles + (_load_slice(row_ptrs, row_mask, SLICES[i][0], SLICES[i][1], D),)
    return tiles


@triton.jit
def load_operand(row_ptrs, row_mask, SLICES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Load a head tile as an operand of `product` and `add_product`."""
    tiles = load_head(row_ptrs, row_mask, SLICES, D)
    if PRECISION == "fp16x3":
        top = tl.max(tl.abs(tiles[0]), 1)
        for i in tl.static_range(1, len(tiles)):
            top = tl.maximum(top, tl.max(tl.abs(tiles[i]), 1))
        factor, inverse = fp16_factor(top)
        return _split_head(tiles, factor, inverse)
    else:
        return _rounded_head(tiles, PRECISION)


@triton.jit
def _rounded_head(tiles, PRECISION: tl.constexpr):
    operands = ()
    for i in tl.static_range(len(tiles)):
        operands = operands + (operand(tiles[i], tiles[i].dtype, PRECISION),)
    return operands


@triton.jit
def _split_head(tiles, factor, inverse):
    high = ()
    low = ()
    for i in tl.static_range(len(tiles)):
        pair = fp16_pair(tiles[i] * factor[:, None])
        high = high + (pair[0],)
        low = low + (pair[1],)
    return high, low, factor, inverse


@triton.jit
def _load_slice(row_ptrs, row_mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = row_ptrs[:, None] + cols[None, :]
    if row_mask is None:
        if FIRST + WIDTH <= D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=cols[None, :] < D, other=0.0)
    else:
        if FIRST + WIDTH <= D:
            return tl.load(ptrs, mask=row_mask[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=row_mask[:, None] & (cols[None, :] < D), other=0.0)


@triton.jit
def cut_for_output(operands, row_ptrs, row_mask, SLICES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return an operand cut into SLICES. A slice of 8, which was padded to 16 to be summed over, is loaded again."""
    LAST: tl.constexpr = len(SLICES) - 1
    tiles = operands[0] if PRECISION == "fp16x3" else operands
    if SLICES[LAST][1] == tiles[LAST].shape[1]:
        return operands
    else:
        last = _load_slice(row_ptrs, row_mask, SLICES[LAST][0], SLICES[LAST][1], D)
        if PRECISION == "fp16x3":
            high, low, factor, inverse = operands
            pair = fp16_pair(last * factor[:, None])
            return high[:LAST] + (pair[0],), low[:LAST] + (pair[1],), factor, inverse
        else:
            return tiles[:LAST] + (operand(last, last.dtype, PRECISION),)


@triton.jit
def store_head(row_ptrs, row_mask, tiles, SLICES: tl.constexpr, D: tl.constexpr):
    for i in tl.static_range(len(SLICES)):
        cols = SLICES[i][0] + tl.arange(0, SLICES[i][1])
        mask = row_mask[:, None] & (cols[None, :] < D)
        tl.store(row_ptrs[:, None] + cols[None, :], rounded(tiles[i], row_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def zero_head(ROWS: tl.constexpr, SLICES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(SLICES)):
        tiles = tiles + (_zero(ROWS, SLICES[i][1]),)
    return tiles


@triton.jit
def _zero(ROWS: tl.constexpr, COLS: tl.constexpr):
    return tl.zeros((ROWS, COLS), tl.float32)


@triton.jit
def scale_head(tiles, factor):
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled


@triton.jit
def row_dots(a, b, PRECISION: tl.constexpr):
    """Return the dot products of the rows of a head tile and of an operand."""
    if PRECISION == "fp16x3":
        high, low, _, inverse = b
        dots = tl.sum(a[0] * (high[0].to(tl.float32) + low[0].to(tl.float32)), 1)
        for i in tl.static_range(1, len(a)):
            dots += tl.sum(a[i] * (high[i].to(tl.float32) + low[i].to(tl.float32)), 1)
        return dots * inverse
    else:
        dots = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
        for i in tl.static_range(1, len(a)):
            dots += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
        return dots


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a b^T of two operands, summed over D: one tile of scores."""
    if PRECISION == "fp16x3":
        scores = _split_product(a[0][0], a[1][0], tl.trans(b[0][0]), tl.trans(b[1][0]))
        for i in tl.static_range(1, len(a[0])):
            scores += _split_product(a[0][i], a[1][i], tl.trans(b[0][i]), tl.trans(b[1][i]))
        return scores * a[3][:, None] * b[3][None, :]
    else:
        scores = dot(a[0], tl.trans(b[0]), _zero(a[0].shape[0], b[0].shape[0]), PRECISION)
        for i in tl.static_range(1, len(a)):
            scores = dot(a[i], tl.trans(b[i]), scores, PRECISION)
        return scores


@triton.jit
def streamed_product(a_ptrs, a_mask, b_ptrs, b_mask, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return the `product` of two head tiles that are still in memory, 16 columns at a time."""
    cols = tl.arange(0, 16)[None, :]
    scores = _zero(a_ptrs.shape[0], b_ptrs.shape[0])
    for first in range(0, D, 16):
        inside = cols < D - first
        a = tl.load(a_ptrs[:, None] + first + cols, mask=a_mask[:, None] & inside, other=0.0)
        b = tl.load(b_ptrs[:, None] + first + cols, mask=b_mask[:, None] & inside, other=0.0)
        if PRECISION == "fp16x3":
            a_factor, a_inverse = fp16_factor(tl.max(tl.abs(a), 1))
            b_factor, b_inverse = fp16_factor(tl.max(tl.abs(b), 1))
            a_pair, b_pair = fp16_pair(a * a_factor[:, None]), fp16_pair(b * b_factor[:, None])
            added = _split_product(a_pair[0], a_pair[1], tl.trans(b_pair[0]), tl.trans(b_pair[1]))
            scores += added * a_inverse[:, None] * b_inverse[None, :]
        else:
            a, b = operand(a, a.dtype, PRECISION), operand(b, b.dtype, PRECISION)
            scores = dot(a, tl.trans(b), scores, PRECISION)
    return scores


@triton.jit
def add_product(sums, weights, operands, PRECISION: tl.constexpr):
    """Return the head tile sums + weights operands, summed over the rows of the operand."""
    added = ()
    if PRECISION == "fp16x3":
        high, low, _, inverse = operands
        weights = weights * inverse[None, :]
        factor, inverse = fp16_factor(tl.max(tl.abs(weights), 1))
        pair = fp16_pair(weights * factor[:, None])
        for i in tl.static_range(len(high)):
            added = added + (sums[i] + _split_product(pair[0], pair[1], high[i], low[i]) * inverse[:, None],)
    else:
        for i in tl.static_range(len(operands)):
            added = added + (dot(weights, operands[i], sums[i], PRECISION),)
    return added


@triton.jit
def _split_product(a_high, a_low, b_high, b_low):
    small = dot(a_low, b_high, _zero(a_low.shape[0], b_high.shape[1]), "ieee")
    return dot(a_high, b_high, dot(a_high, b_low, small, "ieee"), "ieee")
