"""Tile sizes of the GroupNorm kernels. The kernels and their terms are in `group_norm.py`."""

from __future__ import annotations

import triton
from torch import Tensor

# {positions of a tile: warps}, for every dtype and architecture: only bandwidth matters here.  A tile is 64 channels
# wide, a cache line of bf16; 32 elements a thread keep four 16-byte loads of each bf16 operand in flight (eight of fp32).
_TILES = {128: 8, 64: 4, 32: 2, 16: 1}
_COLS = 64
# The longest tile that cuts an image into this many programs is used: few partial sums for large images (128 positions at
# 64 x 64), enough programs for small ones (16 at 8 x 8).  The batch size is ignored, so an image's sums keep their order.
_PROGRAMS = 64
# Elements of a tile of partial sums: a group's channels, padded to a power of two, by as many chunks as fit.
_MERGED = 1024


def plan(x: Tensor, groups: int) -> tuple[tuple[int, int], int, tuple[int], dict[str, int], dict[str, int]]:
    """Return (positions, channels), the chunks of an image, grid and tile of kernels that read x, the tile of merging ones."""
    images, channels, positions = len(x), x.shape[1], x.shape[2] * x.shape[3]
    width, blocks = channels // groups, triton.cdiv(channels, _COLS)
    rows = next((r for r in _TILES if blocks * triton.cdiv(positions, r) >= _PROGRAMS), min(_TILES))
    tile = {"ROWS": rows, "COLS": _COLS, "num_warps": _TILES[rows]}
    cols = triton.next_power_of_2(width)
    merge = {"WIDTH": width, "CHUNKS": max(1, _MERGED // cols), "COLS": cols, "num_warps": 4}
    chunks = triton.cdiv(positions, rows)
    return (positions, channels), chunks, (images * chunks * blocks,), tile, merge
