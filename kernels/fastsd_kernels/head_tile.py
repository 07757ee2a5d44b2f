# mypy: disable-error-code="assignment"
"""Building blocks of the attention kernels: tiles of one head, cut into slices of its D columns.

A head tile is a tuple of 2-D tiles, one per slice. `SLICES` holds (first column, width) of each slice, and the last slice may
reach beyond D.  `row_ptrs` point at column 0 of a tile's rows.  Slices are known at compile time: the loops over them unroll.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsd_kernels.interpreter import dot, operand, rounded

# Strides in units of 8 elements allow 128-bit loads. More divisors would only multiply the variants to compile.
_TENSORS, _AXES = ("q", "k", "v", "o", "do", "dq", "dk", "dv"), ("split", "image", "row", "head")
SIZES = ["chunk", *(f"{name}_{axis}" for name in _TENSORS for axis in _AXES)]


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
    operands = ()
    for i in tl.static_range(len(tiles)):
        operands = operands + (operand(tiles[i], tiles[i].dtype, PRECISION),)
    return operands


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
def cut_for_output(tiles, row_ptrs, row_mask, SLICES: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return the head tile `tiles` cut into SLICES. A slice of 8, which `tiles` have padded to 16, is loaded again."""
    cut = ()
    for i in tl.static_range(len(SLICES)):
        if SLICES[i][1] == tiles[i].shape[1]:
            cut = cut + (tiles[i],)
        else:
            tile = _load_slice(row_ptrs, row_mask, SLICES[i][0], SLICES[i][1], D)
            cut = cut + (operand(tile, tile.dtype, PRECISION),)
    return cut


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
def row_dots(a, b):
    dots = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        dots += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return dots


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a b^T of two head tiles, summed over D: one tile of scores."""
    scores = dot(a[0], tl.trans(b[0]), tl.zeros((a[0].shape[0], b[0].shape[0]), tl.float32), PRECISION)
    for i in tl.static_range(1, len(a)):
        scores = dot(a[i], tl.trans(b[i]), scores, PRECISION)
    return scores


@triton.jit
def streamed_product(a_ptrs, a_mask, b_ptrs, b_mask, D: tl.constexpr, PRECISION: tl.constexpr):
    """Return the `product` of two head tiles that are still in memory, 16 columns at a time."""
    cols = tl.arange(0, 16)[None, :]
    scores = tl.zeros((a_ptrs.shape[0], b_ptrs.shape[0]), tl.float32)
    for first in range(0, D, 16):
        inside = cols < D - first
        a = tl.load(a_ptrs[:, None] + first + cols, mask=a_mask[:, None] & inside, other=0.0)
        b = tl.load(b_ptrs[:, None] + first + cols, mask=b_mask[:, None] & inside, other=0.0)
        a, b = operand(a, a.dtype, PRECISION), operand(b, b.dtype, PRECISION)
        scores = dot(a, tl.trans(b), scores, PRECISION)
    return scores


@triton.jit
def add_product(sums, weights, tiles, PRECISION: tl.constexpr):
    """Return the head tile sums + weights tiles, summed over the rows of the head tile `tiles`."""
    added = ()
    for i in tl.static_range(len(tiles)):
        added = added + (dot(weights, tiles[i], sums[i], PRECISION),)
    return added
