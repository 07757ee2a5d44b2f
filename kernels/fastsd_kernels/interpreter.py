"""Rounding to bf16 and dots of bf16 that give the same result in Triton's interpreter as on a GPU.

The interpreter truncates fp32 to bf16 instead of rounding it, and multiplies the bits of bf16 as integers. Compiled code is
not affected: there both functions are the plain operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsd_kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round fp32 x to `dtype`, to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        upper = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """Return sums + a b in fp32. bf16, "tf32" and "tf32x3" use tensor cores; "ieee" is for fp32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)
