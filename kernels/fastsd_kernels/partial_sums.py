"""Sums over the rows of partial sums, with which kernels end: gradients of biases and of the norms' weights.

    y_C = sum over K of x_KC        rounded once, to the dtype of the gradient

Kernels write one row of sums per program, in fp32. One launch adds the rows in a fixed order, without atomics, so that the bits
are equal in every run. K is at most a few thousand; a program reads all rows of its columns.
Rejected: `x.sum(0).to(dtype)`, two launches in bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import launch


@triton.jit(do_not_specialize=["n_rows"])
def _merge_rows(x_ptr, y_ptr, n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    col_mask = cols < n_cols
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        sums += tl.load(x_ptr + rows.to(tl.int64) * n_cols + cols, (rows < n_rows) & col_mask, other=0.0)
    tl.store(y_ptr + cols, rounded(tl.sum(sums, axis=0, keep_dims=True), y_ptr.dtype.element_ty), col_mask)


# 32 columns are 128 bytes, a whole transaction.  A thread has 16 numbers: four loads of 16 bytes are in flight.
_TILE = {"ROWS": 64, "COLS": 32, "num_warps": 4}


def column_sums(x_KC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums over K of fp32 (K, C), contiguous, as (C,) in `dtype`."""
    n_rows, n_cols = x_KC.shape
    y = x_KC.new_empty(n_cols, dtype=dtype)
    if n_cols:
        launch(_merge_rows, (triton.cdiv(n_cols, _TILE["COLS"]),), x_KC, y, n_rows, n_cols, **_TILE)
    return y
