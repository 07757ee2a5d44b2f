"""Tile sizes of the attention kernels for every GPU, in one table. The kernels and their terms are in `attention.py`.

A row applies to head sizes up to its own. Unless it names an architecture, it suits sm_80, 86, 89 and 120: they share one
kind of tensor core instruction (mma), and tiles fit the 99 KB of shared memory that the smallest of them has. Where several
tiles of "tf32" fit, the one with the shortest time predicted from its machine code was taken; none is measured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from fastsd_kernels.launch import Launch, architecture


class AttentionTile(NamedTuple):
    """Tile sizes of a kernel, and its launch options."""

    rows: int  # queries of a tile
    keys: int  # keys of a tile
    warps: int
    stages: int  # of the pipeline that loads the next tile while this one is processed; 1: no pipeline
    widest: int = 128  # columns of the widest slice of D
    hold: bool = True  # the program's own tile stays in registers; otherwise it is read again with every tile that streams past
    narrowest: int = 8  # columns of the narrowest slice of an output
    registers: int | None = None  # limit per thread. Without it the assembler may spill to fit one more block on an SM


HEAD_DIMS = (48, 96, 160, 256)
# Multiply-adds with padding of columns and keys, over those needed, at most. 77 keys are 80 in tiles of 16, 96 in tiles of 32.
MOST_WORK = 1.3

# (kernel, largest head size, bf16 or fp32's precision, architecture or 0 for any): tile.  Criteria, the most important first:
# no spills; two blocks on an SM (at most 128 registers a thread at 8 warps, 49 KB a block) or else one large one; long tiles.
_TILES: dict[tuple[str, int, str, int], AttentionTile] = {
    # bf16: 64 rows in 4 warps. Two or three such blocks on an SM wait for each other less than the warps of one block with 128
    # rows, which outweighs the second reading of the streamed tiles from the L2 cache. With 16 queries and slices of 32, dk and
    # dv fit one kernel at D = 160, and waits for its short tiles are hidden by a third stage.
    ("forward", 48, "bf16", 0): AttentionTile(64, 64, 4, 3),
    ("forward", 96, "bf16", 0): AttentionTile(64, 32, 4, 3),
    ("forward", 160, "bf16", 0): AttentionTile(64, 16, 4, 3),
    ("forward", 256, "bf16", 0): AttentionTile(64, 32, 8, 1, 64, hold=False),
    ("dq", 48, "bf16", 0): AttentionTile(64, 64, 4, 3),
    ("dq", 96, "bf16", 0): AttentionTile(64, 64, 4, 2),
    ("dq", 160, "bf16", 0): AttentionTile(64, 32, 4, 2),
    ("dq", 256, "bf16", 0): AttentionTile(32, 32, 8, 1, 64, hold=False),
    ("dkdv", 48, "bf16", 0): AttentionTile(64, 64, 4, 2),
    ("dkdv", 96, "bf16", 0): AttentionTile(32, 64, 4, 3),
    ("dkdv", 160, "bf16", 0): AttentionTile(16, 64, 4, 3, 32),
    ("dk", 256, "bf16", 0): AttentionTile(32, 32, 8, 1, 64, hold=False),
    ("dv", 256, "bf16", 0): AttentionTile(32, 32, 8, 1, 64, hold=False),
    # Tiles of one pass for all gradients, for cards whose memory keeps up with their tensor cores (`attention_backward.py`).
    ("dqdkdv", 48, "bf16", 86): AttentionTile(32, 128, 4, 2),
    ("dqdkdv", 48, "bf16", 89): AttentionTile(32, 128, 4, 2),
    ("dqdkdv", 48, "bf16", 120): AttentionTile(32, 128, 4, 2),
    # wgmma multiplies 64 rows in 4 warps. Three or four such blocks on an SM hide more latency than a larger one.
    ("forward", 48, "bf16", 90): AttentionTile(64, 64, 4, 3),
    ("forward", 96, "bf16", 90): AttentionTile(64, 64, 4, 2),
    ("dq", 48, "bf16", 90): AttentionTile(64, 64, 4, 3),
    ("dq", 96, "bf16", 90): AttentionTile(64, 64, 4, 2),
    ("dkdv", 48, "bf16", 90): AttentionTile(64, 64, 4, 3, narrowest=16),
    ("dkdv", 96, "bf16", 90): AttentionTile(64, 64, 4, 3),
    # tf32: operands take twice the registers of bf16. Rounded tiles lie in shared memory a second time, so at D = 160 dq and dk
    # stream. 4 warps of 16 rows each: with 8 warps, half of them would repeat the other half's products of a tile of 64.
    ("forward", 48, "tf32", 0): AttentionTile(64, 32, 4, 2, 32),
    ("forward", 96, "tf32", 0): AttentionTile(64, 16, 4, 2, 16),
    ("forward", 160, "tf32", 0): AttentionTile(64, 16, 4, 2, 32),
    ("forward", 256, "tf32", 0): AttentionTile(64, 16, 8, 1, 32, hold=False),
    ("dq", 48, "tf32", 0): AttentionTile(64, 32, 4, 2, 16, registers=255),
    ("dq", 96, "tf32", 0): AttentionTile(64, 32, 4, 2, 16),
    ("dq", 160, "tf32", 0): AttentionTile(64, 16, 4, 2, 16, hold=False),
    ("dq", 256, "tf32", 0): AttentionTile(32, 16, 8, 1, 16, hold=False),
    ("dkdv", 48, "tf32", 0): AttentionTile(16, 64, 4, 2, 16),
    ("dkdv", 96, "tf32", 0): AttentionTile(32, 64, 4, 2, 16, registers=255),
    ("dk", 160, "tf32", 0): AttentionTile(16, 64, 4, 2, 32, hold=False),
    ("dk", 256, "tf32", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    ("dv", 160, "tf32", 0): AttentionTile(16, 64, 4, 2, 32),
    ("dv", 256, "tf32", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    # sm_80 has the shared memory to hold both.
    ("dq", 160, "tf32", 80): AttentionTile(64, 32, 4, 2, 16),
    ("dk", 160, "tf32", 80): AttentionTile(32, 64, 4, 2, 32),
    # wgmma reads the streamed operand from shared memory: longer tiles fit, and at D = 160 held ones.
    ("forward", 48, "tf32", 90): AttentionTile(64, 32, 4, 2, 32),
    ("forward", 96, "tf32", 90): AttentionTile(128, 32, 8, 2, 32),
    ("forward", 160, "tf32", 90): AttentionTile(128, 64, 8, 2, 32),
    ("dq", 48, "tf32", 90): AttentionTile(64, 64, 4, 2, 16),
    ("dq", 96, "tf32", 90): AttentionTile(128, 64, 8, 2, 32),
    ("dq", 160, "tf32", 90): AttentionTile(128, 32, 8, 1, 32),
    ("dkdv", 48, "tf32", 90): AttentionTile(32, 64, 4, 3, 16),
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
    # fp16x3: an operand has two parts of 16 bits. Streamed tiles have at most 32 rows, because tensor cores cut their sums.
    ("forward", 48, "fp16x3", 0): AttentionTile(64, 32, 4, 2, 32),
    ("dq", 48, "fp16x3", 0): AttentionTile(64, 32, 4, 2, 32, registers=168),
    ("dkdv", 48, "fp16x3", 0): AttentionTile(32, 64, 4, 2, 16, registers=255),
    ("dkdv", 48, "fp16x3", 120): AttentionTile(16, 64, 4, 2, 32),  # the other tile spills there
    ("forward", 96, "fp16x3", 0): AttentionTile(64, 16, 4, 2, 16),
    ("dq", 96, "fp16x3", 0): AttentionTile(64, 16, 4, 1, 16),
    ("dkdv", 96, "fp16x3", 0): AttentionTile(16, 64, 4, 2, 16),
    ("forward", 160, "fp16x3", 0): AttentionTile(64, 16, 4, 2, 32),
    ("dq", 160, "fp16x3", 0): AttentionTile(64, 16, 4, 1, 32),
    ("dk", 160, "fp16x3", 0): AttentionTile(16, 64, 4, 2, 32, hold=False),
    ("dv", 160, "fp16x3", 0): AttentionTile(16, 64, 4, 2, 32),
    ("forward", 256, "fp16x3", 0): AttentionTile(64, 16, 8, 1, 16, hold=False),
    ("dq", 256, "fp16x3", 0): AttentionTile(32, 16, 8, 1, 16, hold=False),
    ("dk", 256, "fp16x3", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    ("dv", 256, "fp16x3", 0): AttentionTile(16, 32, 8, 1, 16, hold=False),
    # sm_90: wgmma reads its right operand from shared memory, which leaves registers for longer tiles and slices.
    ("forward", 48, "fp16x3", 90): AttentionTile(64, 32, 4, 3, 32),
    ("dq", 48, "fp16x3", 90): AttentionTile(64, 32, 4, 3, 32),
    ("dkdv", 48, "fp16x3", 90): AttentionTile(32, 64, 4, 3, 32),
    ("forward", 96, "fp16x3", 90): AttentionTile(64, 32, 4, 3, 32),
    ("dq", 96, "fp16x3", 90): AttentionTile(64, 32, 4, 3, 32),
    ("dkdv", 96, "fp16x3", 90): AttentionTile(32, 64, 4, 3, 32),
    ("forward", 160, "fp16x3", 90): AttentionTile(64, 32, 4, 1, 32),
    ("dk", 160, "fp16x3", 90): AttentionTile(16, 64, 4, 1, 32),
    ("dv", 160, "fp16x3", 90): AttentionTile(32, 64, 4, 2, 32),
    # ieee: a thread holds one slice of its rows of one operand and of its columns of the other. If it computes 16 numbers of
    # the result, it does about five multiply-adds per load from shared memory. With more it spills, with fewer it waits: so it
    # does on 8 columns of dq, dk and dv.
    ("forward", 48, "ieee", 0): AttentionTile(64, 64, 8, 1, 32, registers=255),
    ("forward", 96, "ieee", 0): AttentionTile(64, 64, 8, 1, 16),
    ("forward", 160, "ieee", 0): AttentionTile(64, 32, 8, 1, 16),
    ("forward", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
    ("dq", 48, "ieee", 0): AttentionTile(64, 32, 4, 2, 16, narrowest=16),
    ("dq", 96, "ieee", 0): AttentionTile(64, 32, 8, 2, 16),
    ("dq", 160, "ieee", 0): AttentionTile(32, 32, 8, 1, 32),
    ("dq", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
    ("dkdv", 48, "ieee", 0): AttentionTile(32, 64, 8, 2, 16, narrowest=16, registers=255),
    # Two blocks on an SM; other GPUs spill at 128.
    ("dkdv", 48, "ieee", 86): AttentionTile(32, 64, 8, 2, 16, narrowest=16, registers=128),
    ("dkdv", 48, "ieee", 89): AttentionTile(32, 64, 8, 2, 16, narrowest=16, registers=128),
    ("dkdv", 96, "ieee", 0): AttentionTile(32, 32, 4, 2, 128),
    ("dk", 160, "ieee", 0): AttentionTile(32, 32, 8, 2, 32),
    ("dk", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
    ("dv", 160, "ieee", 0): AttentionTile(32, 32, 8, 1, 32),
    ("dv", 256, "ieee", 0): AttentionTile(32, 32, 8, 1, 16, hold=False),
}


def choose_tile(
    kernel: str, head_dim: int, queries: int, keys: int, dtype: torch.dtype, precision: str, device: torch.device
) -> AttentionTile:
    """Return the tile of "forward", "dq", "dk", "dv" or "dkdv". It is shorter where it would multiply over `MOST_WORK`.

    A warp of a tensor core kernel computes at least 16 rows of its result. Further warps would repeat the products of others,
    so a tile that is cut on the side of the result's rows has fewer warps. On sm_90 it keeps the 64 rows of wgmma: for dk and
    dv of 77 keys that is predicted faster than mma with less padding.
    """
    size, kind = _row(head_dim, dtype, precision)
    tile = _TILES.get((kernel, size, kind, architecture(device)), _TILES[kernel, size, kind, 0])
    least = 64 if architecture(device) == 90 else 16
    # Columns are padded, too: 40 to 48 where they are summed over.
    columns = sum(width for _, width in slices(head_dim, tile.widest, 16)) / head_dim
    width = _cut(tile.keys, keys, MOST_WORK / columns)
    if kind not in ("bf16", "tf32", "fp16x3"):  # tf32x3 lacks the registers for fewer warps
        return tile._replace(keys=width)
    if kernel in ("forward", "dq"):
        rows = _cut(tile.rows, queries, MOST_WORK, least)
        return tile._replace(rows=rows, keys=width, warps=min(tile.warps, rows // 16))
    width = _cut(tile.keys, keys, MOST_WORK / columns, least)
    if width == tile.keys:
        return tile
    return tile._replace(rows=max(16, tile.rows * width // tile.keys), keys=width, warps=min(tile.warps, width // 16))


def _cut(length: int, total: int, limit: float, least: int = 16) -> int:
    """Return the longest tile, from `least` to `length`, whose padding makes `total` at most `limit` times as long."""
    while length > least and triton.cdiv(total, length) * length > limit * total:
        length //= 2
    return length


def queries_of_a_split(tile: AttentionTile, queries: int, programs: int, dtype: torch.dtype) -> int:
    """Return how many queries a program streams for dk and dv, if without splits there are so many programs."""
    # So many fill a GPU. The sums of a split with fewer than 128 queries cost more than it saves.
    splits = min(triton.cdiv(512 if tile.warps > 1 else 1024, programs), triton.cdiv(queries, 128))
    # Time falls with splits as queries / splits, and the bytes of the sums grow as programs * splits. By predicted times, they
    # balance here; a query of fp32 takes about three times as long.
    splits = max(1, min(splits, math.isqrt((1 if dtype == torch.bfloat16 else 3) * queries // programs)))
    return int(triton.cdiv(triton.cdiv(queries, tile.rows), splits) * tile.rows)


def launch_options(tile: AttentionTile, head_dim: int, dtype: torch.dtype, precision: str) -> dict[str, object]:
    """Return the constants of a kernel that has this tile, and its launch options."""
    widths = {"SUM_D": slices(head_dim, tile.widest, 16), "OUT_D": slices(head_dim, tile.widest, tile.narrowest)}
    precision = precision if dtype == torch.float32 else "ieee"  # it does not matter, so bf16 is compiled only once
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    return {"D": head_dim, **widths, "ROWS": tile.rows, "KEYS": tile.keys, "HOLD": tile.hold, "PRECISION": precision, **options}


def one_pass_tile(head_dim: int, keys: int, dtype: torch.dtype, precision: str, device: torch.device) -> AttentionTile | None:
    """Return the tile of the kernel for all gradients, or None where two kernels are faster: with less than 8 tiles of keys."""
    tile = _TILES.get(("dqdkdv", *_row(head_dim, dtype, precision), architecture(device)))
    return tile if tile and keys >= 8 * tile.keys else None


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


def needed_flops(launch: Launch, rows: int = 1) -> int:
    """Return the FLOPs that a launch's results need: of the scores, of dP for dq and dk, and of each result.

    An operand of two parts needs three times as many. Results have whole tiles of `rows`; nothing else is padded.
    """
    operands = dict(zip((parameter.name for parameter in launch.kernel.params), launch.arguments, strict=False))
    if "q_ptr" not in operands:
        return 0  # it adds copies of dq
    q, k = operands["q_ptr"], operands["k_ptr"]
    assert isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor)
    results = operands.keys() & {"o_ptr", "dq_ptr", "dk_ptr", "dv_ptr"} - ({"o_ptr"} if "do_ptr" in operands else set())
    results -= {f"d{x.lower()}_ptr" for x in "KV" if not launch.options.get(f"WITH_{x}", True)}
    products = 1 + bool(results & {"dq_ptr", "dk_ptr"}) + len(results)
    (B, N, H, D), L = q.shape, k.shape[1]
    if results & {"dk_ptr", "dv_ptr"}:
        L = triton.cdiv(L, rows) * rows
    else:
        N = triton.cdiv(N, rows) * rows
    if str(launch.options.get("PRECISION")).endswith("x3"):
        products *= 3
    return 2 * products * B * H * N * L * D
