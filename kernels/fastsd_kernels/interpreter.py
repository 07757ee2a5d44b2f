"""Rounding of operands and dots that give the same result in Triton's interpreter as on a GPU.

The interpreter truncates fp32 to bf16 instead of rounding it, multiplies the bits of bf16 as integers, and multiplies fp32
exactly whatever the precision. Compiled code is not affected: there each function is the plain operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastsd_kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round fp32 x to `dtype`, to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        upper = tl.where(x != x, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Round fp32 x to what `dot` multiplies: to bf16, or for "tf32" to 10 bits of mantissa, to nearest, ties away from zero.

    Tensor cores ignore the other 13 bits of an fp32 operand. Without rounding, every product would be too small by 7e-4.
    """
    if PRECISION != "tf32" or dtype != tl.float32:
        return rounded(x, dtype)
    elif _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(tl.abs(x) < float("inf"), bits + 0x1000 & -0x2000, bits).to(tl.float32, bitcast=True)
    else:
        # Not pure: else the compiler moves it to the other side of shared memory, and each warp rounds all of a streamed tile.
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def fp16_factor(top):
    """Return a power of two that takes fp32 `top` to 2^14 .. 2^15, just below fp16's largest number, and its inverse."""
    exponent = top.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(268 - exponent, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp16_pair(x):
    """Return fp32 x rounded to fp16, and the rest of it in fp16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _read_by_tensor_cores(x, PRECISION: tl.constexpr):
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & -0x2000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """Return sums + a b in fp32. bf16, fp16, "tf32" and "tf32x3" use tensor cores; "ieee" is for fp32.

    For "tf32", a and b must have been rounded by `operand`.
    """
    if _INTERPRETED:
        return tl.dot(_read_by_tensor_cores(a, PRECISION), _read_by_tensor_cores(b, PRECISION), sums)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)
