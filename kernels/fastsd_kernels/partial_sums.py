"""Sums over the rows of partial sums, with which kernels end: gradients of biases and of the norms' weights.

    y_C = sum over K of x_KC        rounded once, to the dtype of the gradient

Kernels write one row of sums per program, in fp32. One launch adds the rows in a fixed order, without atomics, so that the bits
are equal in every run. K is at most a few thousand; a program reads all rows of its columns.
The sums may go straight into the memory in which gradients are accumulated, and are then added there before rounding.
Rejected: `x.sum(0).to(dtype)`, two launches in bf16, and a third to accumulate.  One launch for the sums of all layers, at the
end of the backward: it saves 108 launches of a micro-batch of SD1.5, 0.2 ms at most, but keeps all partial sums until then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import launch
from fastsd_kernels.ops import Destination


@triton.jit(do_not_specialize=["n_rows"])
def _merge_rows(
    x_ptr, first_ptr, second_ptr, third_ptr, n_rows, n_cols, n_first,
    VECTORS: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add the rows of x. The first `n_first` sums go to one vector, as many to another, and the others to a third."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    col_mask = cols < n_cols
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        sums += tl.load(x_ptr + rows.to(tl.int64) * n_cols + cols, (rows < n_rows) & col_mask, other=0.0)
    # In two steps: the interpreter adds the rows of a tile one after the other, which would lose more digits than a GPU's tree.
    total = tl.sum(tl.sum(tl.reshape(sums, [8, ROWS // 8, COLS]), axis=1), axis=0)[None, :]
    _store(first_ptr + cols, total, cols < n_first, ADD)
    if VECTORS > 1:
        _store(second_ptr + cols - n_first, total, (cols >= n_first) & (cols < 2 * n_first), ADD)
    if VECTORS > 2:
        _store(third_ptr + cols - 2 * n_first, total, (cols >= 2 * n_first) & col_mask, ADD)


@triton.jit
def _store(y_ptrs, total, mask, ADD: tl.constexpr):
    if ADD:
        total += tl.load(y_ptrs, mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, rounded(total, y_ptrs.dtype.element_ty), mask)


# 32 columns are 128 bytes, a whole transaction.  A thread has 16 numbers: four loads of 16 bytes are in flight.
_TILE = {"ROWS": 64, "COLS": 32, "num_warps": 4}


def column_sums(x_KC: Tensor, vectors: int, dtype: torch.dtype, into: Destination | None = None) -> list[Tensor]:
    """Sum fp32 (K, C), contiguous, over K. The sums are up to three vectors of equal length, each of them contiguous.

    Args:
        into: the vectors' memory; without it, new vectors of `dtype` are made.
    """
    n_rows, n_cols = x_KC.shape
    outs, add = into or ([x_KC.new_empty(n_cols // vectors, dtype=dtype) for _ in range(vectors)], False)
    if n_cols:
        flags = {"VECTORS": vectors, "ADD": add}
        grid = (triton.cdiv(n_cols, _TILE["COLS"]),)
        launch(
            _merge_rows, grid, x_KC, outs[0], outs[vectors > 1], outs[-1], n_rows, n_cols, n_cols // vectors, **flags, **_TILE
        )
    return outs
