"""Tile sizes of the attention kernels for every GPU, in one table. The kernels and their terms are in `attention.py`.

A row applies to head sizes up to its own. Unless it names an architecture, it suits sm_80, 86, 89 and 120: they share one
kind of tensor core instruction (mma), and tiles fit the 99 KB of shared memory that the smallest of them has. Where several
tiles of "tf32" fit, the one with the shortest time predicted from its machine code was taken; none is measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from fastsd_kernels.launch import architecture


class AttentionTile(NamedTuple):
    """Tile sizes of a kernel, and its launch options."""

    rows: int  # queries of a tile
    keys: int  # keys of a tile
    warps: int
    stages: int  # of the pipeline that loads the next tile while this one is processed; 1: no pipeline
    widest: int = 128  # columns of the widest slice of D
    hold: bool = True  # the program's own tile stays in registers; otherwise it is read again with every tile that streams past
    registers: int | None = None  # limit per thread. Without it the assembler may spill to fit one more block on an SM


HEAD_DIMS = (48, 96, 160, 256)

# (kernel, largest head size, bf16 or fp32's precision, architecture or 0 for any): tile.  Criteria, the most important first:
# no spills; two blocks on an SM (at most 128 registers a thread at 8 warps, 49 KB a block) or else one large one; long tiles.
_TILES: dict[tuple[str, int, str, int], AttentionTile] = {
    # bf16: a held tile of 128 rows halves the traffic of the streamed ones. D = 160 lacks registers, so its tiles are
    # shorter, and have 4 warps of 16 rows: with 8, half of them would repeat the products of the other half.
    ("forward", 48, "bf16", 0): AttentionTile(128, 64, 8, 3),
    ("forward", 96, "bf16", 0): AttentionTile(128, 64, 8, 3),
    ("forward", 160, "bf16", 0): AttentionTile(128, 32, 8, 2),
    ("forward", 256, "bf16", 0): AttentionTile(64, 32, 8, 1, 64, hold=False),
    ("dq", 48, "bf16", 0): AttentionTile(128, 64, 8, 2),
    ("dq", 96, "bf16", 0): AttentionTile(128, 64, 8, 2),
    ("dq", 160, "bf16", 0): AttentionTile(64, 32, 4, 2),
    ("dq", 256, "bf16", 0): AttentionTile(32, 32, 8, 1, 64, hold=False),
    ("dkdv", 48, "bf16", 0): AttentionTile(64, 128, 8, 2),
    ("dkdv", 96, "bf16", 0): AttentionTile(32, 128, 8, 2),
    ("dk", 160, "bf16", 0): AttentionTile(32, 64, 4, 2),
    ("dk", 256, "bf16", 0): AttentionTile(32, 32, 8, 1, 64, hold=False),
    ("dv", 160, "bf16", 0): AttentionTile(64, 64, 4, 2),
    ("dv", 256, "bf16", 0): AttentionTile(32, 32, 8, 1, 64, hold=False),
    # wgmma reads the streamed operand from shared memory, not registers: longer tiles fit.
    ("forward", 48, "bf16", 90): AttentionTile(128, 128, 8, 2),
    ("forward", 96, "bf16", 90): AttentionTile(128, 128, 8, 2),
    # tf32: operands take twice the registers of bf16. Rounded tiles lie in shared memory a second time, so at D = 160 dq and dk
    # stream. 4 warps of 16 rows each: with 8 warps, half of them would repeat the other half's products of a tile of 64.
    ("forward", 48, "tf32", 0): AttentionTile(64, 32, 4, 2, 32),
    ("forward", 96, "tf32", 0): AttentionTile(64, 16, 4, 2, 16),
    ("forward", 160, "tf32", 0): AttentionTile(64, 16, 4, 2, 32),
    ("forward", 256, "tf32", 0): AttentionTile(64, 16, 8, 1, 32, hold=False),
    ("dq", 48, "tf32", 0): AttentionTile(64, 32, 4, 2, 16),
    ("dq", 96, "tf32", 0): AttentionTile(64, 32, 4, 2, 16),
    ("dq", 160, "tf32", 0): AttentionTile(64, 16, 4, 2, 16, hold=False),
    ("dq", 256, "tf32", 0): AttentionTile(32, 16, 8, 1, 16, hold=False),
    ("dkdv", 48, "tf32", 0): AttentionTile(16, 64, 4, 2, 16, registers=255),
    ("dkdv", 96, "tf32", 0): AttentionTile(32, 64, 4, 2, 16, registers=255),
    ("dk", 160, "tf32", 0): AttentionTile(16, 64, 4, 2, 32, hold=False),
    ("dk", 256, "tf32", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    ("dv", 160, "tf32", 0): AttentionTile(16, 64, 4, 2, 32),
    ("dv", 256, "tf32", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    # sm_80 has the shared memory to hold both.
    ("dq", 160, "tf32", 80): AttentionTile(64, 32, 4, 2, 16),
    ("dk", 160, "tf32", 80): AttentionTile(32, 64, 4, 2, 32),
    # wgmma reads the streamed operand from shared memory: longer tiles fit, and at D = 160 held ones.
    ("forward", 48, "tf32", 90): AttentionTile(64, 64, 4, 2, 32, registers=168),
    ("forward", 96, "tf32", 90): AttentionTile(128, 32, 8, 2, 32),
    ("forward", 160, "tf32", 90): AttentionTile(128, 64, 8, 2, 32),
    ("dq", 48, "tf32", 90): AttentionTile(64, 64, 4, 2, 16),
    ("dq", 96, "tf32", 90): AttentionTile(128, 64, 8, 2, 32),
    ("dq", 160, "tf32", 90): AttentionTile(128, 32, 8, 1, 32),
    ("dkdv", 48, "tf32", 90): AttentionTile(32, 64, 4, 2, 32),
    ("dkdv", 96, "tf32", 90): AttentionTile(32, 128, 8, 2, 32),
    ("dk", 160, "tf32", 90): AttentionTile(32, 128, 8, 1, 32),
    ("dv", 160, "tf32", 90): AttentionTile(32, 64, 4, 1, 32),
    # tf32x3: every operand has two parts, and the compiler keeps both parts of a held tile for the whole loop.
    ("forward", 48, "tf32x3", 0): AttentionTile(64, 32, 4, 2, 16),
    ("forward", 96, "tf32x3", 0): AttentionTile(64, 16, 4, 2, 16),
    ("forward", 160, "tf32x3", 0): AttentionTile(64, 32, 8, 2, 16, hold=False),
    ("forward", 256, "tf32x3", 0): AttentionTile(64, 16, 8, 1, 16, hold=False),
    ("dq", 48, "tf32x3", 0): AttentionTile(64, 32, 8, 2, 16, hold=False),
    ("dq", 96, "tf32x3", 0): AttentionTile(64, 32, 8, 2, 16, hold=False),
    ("dq", 160, "tf32x3", 0): AttentionTile(64, 32, 8, 2, 16, hold=False),
    ("dq", 256, "tf32x3", 0): AttentionTile(32, 16, 8, 1, 16, hold=False),
    ("dkdv", 48, "tf32x3", 0): AttentionTile(16, 64, 4, 2, 16, hold=False),
    ("dk", 96, "tf32x3", 0): AttentionTile(32, 64, 8, 2, 16, hold=False),
    ("dk", 160, "tf32x3", 0): AttentionTile(16, 32, 4, 2, 32, hold=False),
    ("dk", 256, "tf32x3", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    ("dv", 96, "tf32x3", 0): AttentionTile(32, 64, 4, 2, 16),
    ("dv", 160, "tf32x3", 0): AttentionTile(16, 32, 8, 2, 16),
    ("dv", 256, "tf32x3", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    # ieee: a thread holds one slice of its rows of one operand and of its columns of the other. If it computes 16 numbers of
    # the result, it does about five multiply-adds per load from shared memory. With more it spills, with fewer it waits.
    ("forward", 48, "ieee", 0): AttentionTile(64, 64, 8, 1, 32, registers=255),
    ("forward", 96, "ieee", 0): AttentionTile(64, 64, 8, 1, 16),
    ("forward", 160, "ieee", 0): AttentionTile(64, 32, 8, 1, 16),
    ("forward", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
    ("dq", 48, "ieee", 0): AttentionTile(64, 32, 4, 2, 16),
    ("dq", 96, "ieee", 0): AttentionTile(64, 32, 8, 2, 16),
    ("dq", 160, "ieee", 0): AttentionTile(32, 32, 8, 1, 32),
    ("dq", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
    ("dkdv", 48, "ieee", 0): AttentionTile(32, 64, 8, 2, 16, registers=255),
    ("dkdv", 48, "ieee", 86): AttentionTile(32, 64, 8, 2, 16, registers=128),  # two blocks on an SM; other GPUs spill at 128
    ("dkdv", 48, "ieee", 89): AttentionTile(32, 64, 8, 2, 16, registers=128),
    ("dkdv", 96, "ieee", 0): AttentionTile(32, 32, 4, 2, 128),
    ("dk", 160, "ieee", 0): AttentionTile(32, 32, 8, 2, 32),
    ("dk", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
    ("dv", 160, "ieee", 0): AttentionTile(32, 32, 8, 1, 32),
    ("dv", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
}


def choose_tile(
    kernel: str, head_dim: int, keys: int, dtype: torch.dtype, precision: str, device: torch.device
) -> AttentionTile:
    """Return the tile of "forward", "dq", "dk", "dv" or "dkdv". It has fewer keys if padding would add over a quarter.

    A warp of a tensor core kernel computes at least 16 rows of its result. Further warps would repeat the products of others:
    if the result has a row per key, a tile with fewer keys has fewer warps, and fewer queries. Predicted for dk and dv of 4096
    queries and 77 keys, D = 40, batch 8, bf16 on an RTX 4090: 81 us with 2 warps, 273 us with 8.
    """
    size, kind = _row(head_dim, dtype, precision)
    general = _TILES[kernel, size, kind, 0]
    tile = _TILES.get((kernel, size, kind, architecture(device)), general)
    width, rows, warps = tile.keys, tile.rows, tile.warps
    while width > 16 and triton.cdiv(keys, width) * width > 1.25 * keys:
        width //= 2
    # tf32x3, and the tiles that wgmma was given, lack the registers for it.
    if width < tile.keys and kernel in ("dk", "dv", "dkdv") and kind in ("bf16", "tf32") and tile == general:
        rows, warps = min(rows, width), min(warps, width // 16)
    return tile._replace(rows=rows, keys=width, warps=warps)


def one_kernel_for_keys(head_dim: int, dtype: torch.dtype, precision: str) -> bool:
    """Return True if dk and dv fit one kernel. If not, each has its own and P is computed once more."""
    size, kind = _row(head_dim, dtype, precision)
    return ("dkdv", size, kind, 0) in _TILES


def _row(head_dim: int, dtype: torch.dtype, precision: str) -> tuple[int, str]:
    size = next(size for size in HEAD_DIMS if head_dim <= size)
    return size, precision if dtype == torch.float32 else "bf16"


def slices(head_dim: int, widest: int, least: int) -> tuple[tuple[int, int], ...]:
    """Return (first column, width) of each slice of D: powers of two from `widest` to `least`; the last may reach beyond D."""
    cut: list[tuple[int, int]] = []
    first = 0
    while first < head_dim:
        width = max(least, min(widest, 1 << (head_dim - first).bit_length() - 1))
        cut.append((first, width))
        first += width
    return tuple(cut)
