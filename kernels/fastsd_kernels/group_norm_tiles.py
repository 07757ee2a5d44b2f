"""Tiles of the GroupNorm kernels: their sizes, and where a program's tile lies. The kernels are in `group_norm.py`.

An image is one tensor, or x and a skip connection: two tensors whose channels follow each other. A tile lies in one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# {positions of a tile: warps}, for every dtype and architecture: only bandwidth matters here.  A tile is 64 channels
# wide, a cache line of bf16; 32 elements a thread keep four 16-byte loads of each bf16 operand in flight (eight of fp32).
_TILES = {128: 8, 64: 4, 32: 2, 16: 1}
_COLS = 64
# The longest tile that cuts the positions into this many chunks is used: few partial sums for large images (128 positions at
# 64 x 64), enough programs for small ones (16 at 8 x 8).  Neither the batch size nor the channels count: an image's sums keep
# their order, and the sums of x and of a skip connection, from different kernels, belong to the same chunks.
_CHUNKS = 4
# Elements of a tile of partial sums: a group's channels, padded to a power of two, by as many chunks as fit.
_MERGED = 1024


def chunks_and_tile(positions: int) -> tuple[int, dict[str, int]]:
    """Return the number of chunks that an image's positions are cut into, and the tile of kernels that read the image."""
    rows = next((r for r in _TILES if triton.cdiv(positions, r) >= _CHUNKS), min(_TILES))
    return triton.cdiv(positions, rows), {"ROWS": rows, "COLS": _COLS, "num_warps": _TILES[rows]}


def grid(images: int, chunks: int, *widths: int) -> tuple[int]:
    """Return the grid of a kernel with a program for each tile of images, whose tensors have these numbers of channels."""
    return (images * chunks * sum(triton.cdiv(width, _COLS) for width in widths),)


def merging_tile(channels: int, groups: int) -> dict[str, int]:
    """Return the tile of kernels that merge the sums of chunks into those of a group."""
    cols = triton.next_power_of_2(channels // groups)
    return {"WIDTH": channels // groups, "CHUNKS": max(1, _MERGED // cols), "COLS": cols, "num_warps": 4}


def positions_of(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


@triton.jit
def tile_number(i_program, n_positions, n_channels, n_first, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the numbers of a program's image, chunk of positions and block of channels. A chunk's blocks follow each other."""
    n_blocks = tl.cdiv(n_first, COLS) + tl.cdiv(n_channels - n_first, COLS)
    i_tile, n_chunks = i_program // n_blocks, tl.cdiv(n_positions, ROWS)
    return i_tile // n_chunks, i_tile % n_chunks, i_program % n_blocks


@triton.jit
def columns(i_block, n_channels, n_first, COLS: tl.constexpr):
    """Return a tile's channels (1, COLS), their mask, True if they are the skip's, their numbers in it, and its width."""
    first_blocks = tl.cdiv(n_first, COLS)
    in_skip = i_block >= first_blocks
    cols = (i_block - tl.where(in_skip, first_blocks, 0)) * COLS + tl.arange(0, COLS)[None, :]
    width = tl.where(in_skip, n_channels - n_first, n_first)
    return cols + tl.where(in_skip, n_first, 0), cols < width, in_skip, cols, width


@triton.jit
def offsets(i_image, i_chunk, n_positions, width, cols, ROWS: tl.constexpr):
    """Return a tile's start in a tensor of `width` channels, its offsets and the mask of its positions (ROWS, 1)."""
    rows = tl.arange(0, ROWS)[:, None]
    # Only the start may lie beyond 2^31.
    start = (i_image.to(tl.int64) * n_positions + i_chunk * ROWS) * width
    return start, rows * width + cols, rows < n_positions - i_chunk * ROWS


@triton.jit
def backwards():
    """Return the program's index, counted from the last: the previous kernel's last reads may still be in the L2 cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def load_shifted(ptrs, shift_ptr, mask, i_image, n_channels, cols, col_mask, SHIFT: tl.constexpr):
    """Load x + shift over a tile. The shift is added first: where it cancels x, x - mean + shift would lose what is left."""
    x = tl.load(ptrs, mask, other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift_ptr + i_image * n_channels + cols, col_mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH: tl.constexpr):
    """Load (mean, rstd, weight, bias) of each channel. A group has WIDTH channels."""
    groups = i_image * (n_channels // WIDTH) + cols // WIDTH
    mean = tl.load(mean_ptr + groups, col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + groups, col_mask, other=0.0)
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def sum_chunks(ptrs, stride, n_chunks, col_mask, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    """Return the sums of columns over chunks, (1, COLS)."""
    total = tl.zeros([CHUNKS, COLS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        total += tl.load(ptrs + chunks * stride, (chunks < n_chunks) & col_mask, other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)
