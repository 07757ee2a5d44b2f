# mypy: disable-error-code="assignment"
"""The backward of self-attention over long sequences with 5 matmuls, where `attention.py` needs 7.

Shapes, symbols and formulas are those of `attention.py`.  A program holds a tile of keys and streams the queries, as there; so
dk and dv are sums in its registers, and P and dP are computed once.  dq is a sum over all tiles of keys:

    dq = sum over tiles of keys of dS k / sqrt(D)

A program takes several tiles in turn and adds each tile's part to a copy of dq (fp32) that it alone writes: it reads the rows,
adds, and writes them back.  A second kernel adds the few copies of a head in order.  So every sum has one order: results
have the same bits every time, without atomics or waiting.

Bytes moved: each tile of keys reads and writes dq, 8 N D bytes a head, and reads q, do and o, 6 N D in bf16.  The L2 cache
serves a part of them.  For a batch of 8 at N = 4096 and D = 40, dq alone is 2.7 GB, for which the memory of an RTX 4090 needs
as long as its tensor cores for the matmuls.  Predicted for this case, with the addition of the copies, in us; the first number
if the cache serves all of dq, the second if none:

                  this        dq and dkdv
    RTX 3090    7560-7570       9000
    RTX 4090    3330-3780       3990
    RTX 5090    3050-3100       3340

The tensor cores of sm_80 and sm_90 are four to eight times faster while their memory is not: there this kernel would wait.

Rejected (predicted for the same case): one copy of dq and programs that take turns on its tiles by a counter, because that
deadlocks unless all programs of a head run at once; a copy for each tile of keys (1.3 GB); tiles of 64 keys, twice the traffic
of dq (2990 us from the cache, 5990 from memory); D = 80 (N = 1024: 375 and 59 for the copies, where two kernels take 460).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels.attention_tiles import AttentionTile, launch_options
from fastsd_kernels.head_tile import (
    SIZES,
    add_product,
    cut_for_output,
    head_pointer,
    load_head,
    load_operand,
    product,
    row_dots,
    scale_head,
    store_head,
    strides,
    zero_head,
)
from fastsd_kernels.interpreter import operand
from fastsd_kernels.launch import architecture, launch

# Programs that run at once on the cards each row is for: RTX 3090, 4090 and 5090, two on a multiprocessor.
_PROGRAMS = {86: 164, 89: 256, 120: 340}
# Copies of dq in fp32 that a launch may take. Where few heads leave a GPU idle, two kernels have more programs.
_MOST_COPIES = 8


@triton.jit(do_not_specialize=[*SIZES, "tiles", "units"])
def _backward(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, H, N, L, scale, sm_scale, tiles, units,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head, o_image, o_row, o_head,
    do_image, do_row, do_head, dk_image, dk_row, dk_head, dv_image, dv_row, dv_head,
    D: tl.constexpr, SUM_D: tl.constexpr, OUT_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs), each with `tiles` of all `units`, the tiles of keys of all heads. dq is (copies, B H, N, D), fp32.

    EVEN: N is a multiple of ROWS and L of KEYS.
    """
    n_tiles = tl.cdiv(L, KEYS)
    first = tl.program_id(0) * tiles
    for unit in range(first, min(first + tiles, units)):
        i_tile = unit % n_tiles
        i_head = (unit // n_tiles).to(tl.int64)
        keys = i_tile * KEYS + tl.arange(0, KEYS)
        key_mask = keys < L
        k_ptrs = head_pointer(k_ptr, i_head, k_image, k_head, H) + keys * (k_row * 8)
        v_ptrs = head_pointer(v_ptr, i_head, v_image, v_head, H) + keys * (v_row * 8)
        k = load_operand(k_ptrs, key_mask, SUM_D, D, PRECISION)
        v = load_operand(v_ptrs, key_mask, SUM_D, D, PRECISION)
        dk = zero_head(KEYS, OUT_D)
        dv = zero_head(KEYS, OUT_D)

        # The compiler lets warps share a product's rows only, if it is linked to another one; they would repeat each other's
        # rows of dq. So the loop computes nothing for dq that other products need, too: not even a row number or a mask.
        i_copy = tl.program_id(0) - i_head * n_tiles // tiles
        copy_ptr = dq_ptr + (i_copy * (units // n_tiles) + i_head) * N * D
        dq_ptrs = _pointers(copy_ptr, ROWS, SUM_D, D)
        left = _rows_left(N, ROWS, SUM_D)
        inside = _column_masks(D, ROWS, SUM_D)
        # The first of a head's tiles finds no sums to add to.
        summed = _column_masks(tl.where((unit > first) & (i_tile > 0), D, 0), ROWS, SUM_D)
        tl.debug_barrier()  # the sums of the last tile are there, whichever thread wrote them

        q_head_ptr = head_pointer(q_ptr, i_head, q_image, q_head, H)
        o_head_ptr = head_pointer(o_ptr, i_head, o_image, o_head, H)
        do_head_ptr = head_pointer(do_ptr, i_head, do_image, do_head, H)
        for start in range(0, N, ROWS):
            rows = start + tl.arange(0, ROWS)
            row_mask = None if EVEN else rows < N
            q_ptrs = q_head_ptr + rows * (q_row * 8)
            do_ptrs = do_head_ptr + rows * (do_row * 8)
            q = load_operand(q_ptrs, row_mask, SUM_D, D, PRECISION)
            s = product(k, q, PRECISION)
            # exp2(s - inf) = 0: a query beyond N adds nothing.
            lse = tl.load(lse_ptr + i_head * N + rows, mask=row_mask, other=None if EVEN else float("inf"))
            p = tl.exp2(s * scale - lse[None, :])
            do = load_operand(do_ptrs, row_mask, SUM_D, D, PRECISION)
            dp = product(v, do, PRECISION)
            # From rounded numbers, as in `attention.py`.
            delta = row_dots(load_head(o_head_ptr + rows * (o_row * 8), row_mask, SUM_D, D), do, PRECISION)
            do_out = cut_for_output(do, do_ptrs, row_mask, OUT_D, D, PRECISION)
            dv = add_product(dv, operand(p, do_ptr.dtype.element_ty, PRECISION), do_out, PRECISION)
            ds = p * (dp - delta[None, :])
            if not EVEN:
                # A key beyond L has s = 0, and exp2(-lse) may be infinite: 0 times it would be NaN.
                ds = tl.where(key_mask[:, None], ds, 0.0)
            ds = operand(ds, q_ptr.dtype.element_ty, PRECISION)
            dk = add_product(dk, ds, cut_for_output(q, q_ptrs, row_mask, OUT_D, D, PRECISION), PRECISION)
            dq = add_product(zero_head(ROWS, SUM_D), tl.trans(ds), k, PRECISION)
            for i in tl.static_range(len(SUM_D)):
                exists = left[i][:, None] > i
                sums = tl.load(dq_ptrs[i], mask=summed[i] if EVEN else summed[i] & exists, other=0.0)
                tl.store(dq_ptrs[i], sums + dq[i] * sm_scale, mask=inside[i] if EVEN else inside[i] & exists)
            dq_ptrs = _advance(dq_ptrs, ROWS * D)
            left = _advance(left, -ROWS)

        dk_ptrs = head_pointer(dk_ptr, i_head, dk_image, dk_head, H) + keys * (dk_row * 8)
        store_head(dk_ptrs, key_mask, scale_head(dk, sm_scale), OUT_D, D)
        dv_ptrs = head_pointer(dv_ptr, i_head, dv_image, dv_head, H) + keys * (dv_row * 8)
        store_head(dv_ptrs, key_mask, dv, OUT_D, D)


@triton.jit
def _pointers(head_ptr, ROWS: tl.constexpr, SLICES: tl.constexpr, D: tl.constexpr):
    """Return pointers to the first ROWS of a head of contiguous rows, a tile for each slice."""
    tiles = ()
    for i in tl.static_range(len(SLICES)):
        cols = SLICES[i][0] + tl.arange(0, SLICES[i][1])
        tiles = tiles + (head_ptr + (tl.arange(0, ROWS) * D)[:, None] + cols[None, :],)
    return tiles


@triton.jit
def _rows_left(N, ROWS: tl.constexpr, SLICES: tl.constexpr):
    """Return the number of rows from each row on, for each slice: i more for slice i, so that no two are the same value."""
    numbers = ()
    for i in tl.static_range(len(SLICES)):
        numbers = numbers + (N - tl.arange(0, ROWS) + i,)
    return numbers


@triton.jit
def _column_masks(n_cols, ROWS: tl.constexpr, SLICES: tl.constexpr):
    masks = ()
    for i in tl.static_range(len(SLICES)):
        cols = SLICES[i][0] + tl.arange(0, SLICES[i][1])
        masks = masks + (tl.broadcast_to(cols[None, :] < n_cols, (ROWS, SLICES[i][1])),)
    return masks


@triton.jit
def _advance(tiles, step):
    moved = ()
    for i in tl.static_range(len(tiles)):
        moved = moved + (tiles[i] + step,)
    return moved


@triton.jit(do_not_specialize=[*SIZES, "tiles", "n_tiles"])
def _add_copies(
    sums_ptr, dq_ptr, H, N, tiles, n_tiles, dq_image, dq_row, dq_head,
    D: tl.constexpr, OUT_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (B H tiles of ROWS queries). Adds the copies of dq that `_backward` made."""
    row_tiles = tl.cdiv(N, ROWS)
    i_head = (tl.program_id(0) // row_tiles).to(tl.int64)
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    ptrs = sums_ptr + i_head * N * D + rows * D
    copy_stride = (tl.num_programs(0) // row_tiles).to(tl.int64) * N * D
    first, last = i_head * n_tiles // tiles, ((i_head + 1) * n_tiles - 1) // tiles
    dq = load_head(ptrs, row_mask, OUT_D, D)
    for _ in range(first, last):
        ptrs += copy_stride
        dq = _add(dq, load_head(ptrs, row_mask, OUT_D, D))
    dq_ptrs = head_pointer(dq_ptr, i_head, dq_image, dq_head, H) + rows * (dq_row * 8)
    store_head(dq_ptrs, row_mask, dq, OUT_D, D)


@triton.jit
def _add(a, b):
    sums = ()
    for i in tl.static_range(len(a)):
        sums = sums + (a[i] + b[i],)
    return sums


def one_pass(
    tile: AttentionTile,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    precision: str,
    gradients: tuple[Tensor, ...],
) -> bool:
    """Write dq, dk and dv to `gradients` and return True, or return False if it would take over `_MOST_COPIES` copies of dq.

    All tensors have the layout that `attention_backward` requires.
    """
    (B, N, H, D), L, (dq, dk, dv) = q.shape, k.shape[1], gradients
    n_tiles = triton.cdiv(L, tile.keys)
    units = B * H * n_tiles
    tiles = triton.cdiv(units, _PROGRAMS[architecture(q.device)])
    # A head has a copy from each program that takes some of its tiles. This repeats after `tiles` heads.
    copies = 1 + max(((i + 1) * n_tiles - 1) // tiles - i * n_tiles // tiles for i in range(min(B * H, tiles)))
    if copies > _MOST_COPIES:
        return False
    sums = q.new_empty((copies, B * H, N, D), dtype=torch.float32)
    options = launch_options(tile, D, q.dtype, precision) | {"EVEN": N % tile.rows == 0 and L % tile.keys == 0}
    del options["HOLD"]  # the program's tile lies in shared memory
    sizes = H, N, L, math.log2(math.e) / D**0.5, 1 / D**0.5, tiles, units, *strides(q, k, v, o, do, dk, dv)
    launch(_backward, (triton.cdiv(units, tiles),), q, k, v, o, do, sums, dk, dv, lse, *sizes, **options)
    add_copies(sums, dq, options["OUT_D"], tiles, n_tiles)
    return True


def add_copies(sums: Tensor, out: Tensor, slices: object, tiles: int, n_tiles: int) -> None:
    """Add the copies (copies, B H, N, D), fp32, to out (B, N, H, D). A copy has `tiles` of the `n_tiles` of each head."""
    B, N, H, D = out.shape
    rows = min(64 if D > 96 else 128, triton.next_power_of_2(N))
    grid = (triton.cdiv(N, rows) * B * H,)
    launch(_add_copies, grid, sums, out, H, N, tiles, n_tiles, *strides(out), D=D, OUT_D=slices, ROWS=rows, num_warps=4)
