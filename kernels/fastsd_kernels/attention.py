"""Multi-head attention in the layout the projections produce.

    o = softmax(q k^T / sqrt(D)) v        for every image and head

Shapes: B images, N queries, L keys, H heads, D head size.  q, k, v and o are (B, N, H, D): what a linear layer gives, seen
as heads, with no permute and no copy.  q, k and v may be strided views of one fused projection.
Bytes moved at best: q, k, v read once, o written once; the N x L scores never leave the chip.  Saved for backward: q, k, v, o
and one number per query, lse = log2 of the softmax's denominator.

Forward (Dao 2023, "FlashAttention-2", algorithm 1): a program holds a tile of queries and streams the keys past it; m is the
running maximum of a row, in log2 units so that the hardware's exp2 serves as it is.

Backward, with P = exp2(q k^T scale - lse), dP = do v^T, delta = rowsum(o do), dS = P (dP - delta):

    dq = dS k / sqrt(D)        one program a tile of queries, streams keys; writes delta on the way
    dk = dS^T q / sqrt(D)      one program a tile of keys, streams queries
    dv = P^T do

Two kernels recompute P and dP twice: 7 matmuls. For long sequences, one kernel with 5 is faster (`attention_backward.py`).
Where few keys leave the GPU idle, programs share the queries and write partial sums that a second kernel adds in order.

A head size is cut into slices (`head_tile.py`), powers of two, narrow at the end: 40 = 32 + 8.  One padded tile of 64 would
run 60 % more multiply-adds; a matmul contracts at least 16, so only sums over D pad the last slice to 16.  Over a training step
of SD1.5 the padding, of slices and of tiles of keys, costs 2.2 %.  Narrow slices also bound the registers: plain fp32 dots
hold their whole operands, and tf32x3 holds each in two parts.  Where two held tiles still do not fit 255 registers (dq
and dk of tf32x3, and of tf32 at D = 160), `HOLD` is off and both operands of q k^T and do v^T stream through in columns of 16.
"fp16x3" replaces fp32 multiply-adds, which wait for shared memory, by three products of tensor cores at twice their rate
(`head_tile.py`).  By emulation of tensor cores, its errors are 0.3 to 1.6 times those of "ieee".

Rejected: dk and dv in one kernel at D = 160 in fp32 (over 368 B of spills); strides as plain arguments (a head's
stride of 40 is no multiple of 16, and loads fall to 4 bytes); held tiles for tf32x3 (up to 950 B of spills at D = 80); the
resident tile as the right operand (1.5 times the tensor instructions, and spills); TF32 operands as they are (cut: -7e-4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastsd_kernels import workload
from fastsd_kernels.attention_backward import add_copies, one_pass
from fastsd_kernels.attention_tiles import choose_tile, launch_options, one_kernel_for_keys, one_pass_tile, queries_of_a_split
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
    streamed_product,
    strides,
    tile_and_head,
    zero_head,
)
from fastsd_kernels.interpreter import operand, rounded
from fastsd_kernels.launch import custom_op, launch, meta, require_device
from fastsd_kernels.ops import Attention, Calls, Op

PRECISIONS = ("ieee", "fp16x3", "tf32", "tf32x3")


def attention_reference(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, precision: str = "ieee") -> Tensor:
    """Attention with scale 1/sqrt(D), through PyTorch's scaled_dot_product_attention.

    Args:
        q_BNHD: queries (B, N, H, D).
        k_BLHD, v_BLHD: keys and values (B, L, H, D).
        precision: one of `PRECISIONS`, for fp32 inputs on a GPU. PyTorch follows its own setting, so it is only checked.

    Returns:
        (B, N, H, D) in the dtype of q.

    Raises:
        ValueError: shapes that do not fit together, or an unknown precision.

    Source: Vaswani et al. 2017, equation 1.
    """
    _check(q_BNHD, k_BLHD, v_BLHD, precision)
    o_BHND = F.scaled_dot_product_attention(q_BNHD.transpose(1, 2), k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2))
    return o_BHND.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"attention: precision is {precision!r}; use {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: shapes are q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "use (B, N, H, D) for q and (B, L, H, D) for k and v"
        )


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, H, N, L, scale,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head, o_image, o_row, o_head,
    D: tl.constexpr, SUM_D: tl.constexpr, OUT_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B H query tiles). `scale` is log2(e) / sqrt(D); EVEN: L is a multiple of KEYS."""
    i_tile, i_head = tile_and_head(N, ROWS)
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    q_ptrs = head_pointer(q_ptr, i_head, q_image, q_head, H) + rows * (q_row * 8)
    k_ptr = head_pointer(k_ptr, i_head, k_image, k_head, H)
    v_ptr = head_pointer(v_ptr, i_head, v_image, v_head, H)
    if HOLD:
        q = load_operand(q_ptrs, row_mask, SUM_D, D, PRECISION)

    o = zero_head(ROWS, OUT_D)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, L, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_mask = None if EVEN else keys < L
        k_ptrs = k_ptr + keys * (k_row * 8)
        if HOLD:
            s = product(q, load_operand(k_ptrs, key_mask, SUM_D, D, PRECISION), PRECISION)
        else:
            s = streamed_product(q_ptrs, row_mask, k_ptrs, keys < L, D, PRECISION)
        if not EVEN:
            s = tl.where(keys[None, :] < L, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        # TF32 weights are rounded before they are added up, so that o is exactly a mean of v.
        p = operand(tl.exp2(s * scale - new_top[:, None]), tl.float32, PRECISION)
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(p, 1)
        top = new_top
        v = load_operand(v_ptr + keys * (v_row * 8), key_mask, OUT_D, D, PRECISION)
        o = add_product(scale_head(o, keep[:, None]), rounded(p, v_ptr.dtype.element_ty), v, PRECISION)

    o_ptrs = head_pointer(o_ptr, i_head, o_image, o_head, H) + rows * (o_row * 8)
    store_head(o_ptrs, row_mask, scale_head(o, 1 / total[:, None]), OUT_D, D)
    tl.store(lse_ptr + i_head * N + rows, top + tl.log2(total), mask=row_mask)


@triton.jit(do_not_specialize=SIZES)
def _backward_q(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, H, N, L, scale, sm_scale,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head, o_image, o_row, o_head,
    do_image, do_row, do_head, dq_image, dq_row, dq_head,
    D: tl.constexpr, SUM_D: tl.constexpr, OUT_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, HOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B H query tiles). Writes dq and delta. `sm_scale` is 1 / sqrt(D); EVEN: L is a multiple of KEYS."""
    i_tile, i_head = tile_and_head(N, ROWS)
    rows = i_tile * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    q_ptrs = head_pointer(q_ptr, i_head, q_image, q_head, H) + rows * (q_row * 8)
    do_ptrs = head_pointer(do_ptr, i_head, do_image, do_head, H) + rows * (do_row * 8)
    o_ptrs = head_pointer(o_ptr, i_head, o_image, o_head, H) + rows * (o_row * 8)
    k_ptr = head_pointer(k_ptr, i_head, k_image, k_head, H)
    v_ptr = head_pointer(v_ptr, i_head, v_image, v_head, H)
    if HOLD:
        q = load_operand(q_ptrs, row_mask, SUM_D, D, PRECISION)
    do = load_operand(do_ptrs, row_mask, SUM_D, D, PRECISION)
    # From rounded numbers, as dP: most of what rounding changes in dP is the same for all keys, and dP - delta cancels it.
    delta = row_dots(load_head(o_ptrs, row_mask, SUM_D, D), do, PRECISION)
    stat_offs = i_head * N + rows
    tl.store(delta_ptr + stat_offs, delta, mask=row_mask)
    lse = tl.load(lse_ptr + stat_offs, mask=row_mask, other=0.0)

    dq = zero_head(ROWS, OUT_D)
    for start in range(0, L, KEYS):
        keys = start + tl.arange(0, KEYS)
        key_mask = None if EVEN else keys < L
        k_ptrs = k_ptr + keys * (k_row * 8)
        v_ptrs = v_ptr + keys * (v_row * 8)
        if HOLD:
            k = load_operand(k_ptrs, key_mask, SUM_D, D, PRECISION)
            s = product(q, k, PRECISION)
            dp = product(do, load_operand(v_ptrs, key_mask, SUM_D, D, PRECISION), PRECISION)
        else:
            s = streamed_product(q_ptrs, row_mask, k_ptrs, keys < L, D, PRECISION)
            dp = streamed_product(do_ptrs, row_mask, v_ptrs, keys < L, D, PRECISION)
            k = load_operand(k_ptrs, key_mask, OUT_D, D, PRECISION)
        ds = tl.exp2(s * scale - lse[:, None]) * (dp - delta[:, None])
        if not EVEN:
            # A key beyond L has s = 0, and exp2(-lse) may be infinite: 0 times it would be NaN.
            ds = tl.where(keys[None, :] < L, ds, 0.0)
        k = cut_for_output(k, k_ptrs, key_mask, OUT_D, D, PRECISION)
        dq = add_product(dq, operand(ds, k_ptr.dtype.element_ty, PRECISION), k, PRECISION)

    dq_ptrs = head_pointer(dq_ptr, i_head, dq_image, dq_head, H) + rows * (dq_row * 8)
    store_head(dq_ptrs, row_mask, scale_head(dq, sm_scale), OUT_D, D)


@triton.jit(do_not_specialize=SIZES)
def _backward_kv(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, H, N, L, scale, sm_scale, chunk,
    q_image, q_row, q_head, k_image, k_row, k_head, v_image, v_row, v_head, do_image, do_row, do_head,
    dk_split, dk_image, dk_row, dk_head, dv_split, dv_image, dv_row, dv_head,
    D: tl.constexpr, SUM_D: tl.constexpr, OUT_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    EVEN: tl.constexpr, HOLD: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B H key tiles, splits of `chunk` queries). Scores lie keys by queries here. EVEN: N is a multiple of ROWS."""
    i_tile, i_head = tile_and_head(L, KEYS)
    keys = i_tile * KEYS + tl.arange(0, KEYS)
    key_mask = keys < L
    k_ptrs = head_pointer(k_ptr, i_head, k_image, k_head, H) + keys * (k_row * 8)
    v_ptrs = head_pointer(v_ptr, i_head, v_image, v_head, H) + keys * (v_row * 8)
    q_ptr = head_pointer(q_ptr, i_head, q_image, q_head, H)
    do_ptr = head_pointer(do_ptr, i_head, do_image, do_head, H)
    lse_ptr += i_head * N
    delta_ptr += i_head * N
    if HOLD:
        k = load_operand(k_ptrs, key_mask, SUM_D, D, PRECISION)
        if WITH_K:
            v = load_operand(v_ptrs, key_mask, SUM_D, D, PRECISION)

    dk = zero_head(KEYS, OUT_D)
    dv = zero_head(KEYS, OUT_D)
    first = tl.program_id(1) * chunk
    for start in range(first, min(first + chunk, N), ROWS):
        rows = start + tl.arange(0, ROWS)
        row_mask = None if EVEN else rows < N
        q_ptrs = q_ptr + rows * (q_row * 8)
        do_ptrs = do_ptr + rows * (do_row * 8)
        if HOLD:
            q = load_operand(q_ptrs, row_mask, SUM_D, D, PRECISION)
            s = product(k, q, PRECISION)
        else:
            s = streamed_product(k_ptrs, key_mask, q_ptrs, rows < N, D, PRECISION)
        # exp2(s - inf) = 0: a query beyond N adds nothing.
        lse = tl.load(lse_ptr + rows, mask=row_mask, other=None if EVEN else float("inf"))
        p = tl.exp2(s * scale - lse[None, :])
        if HOLD or WITH_V:
            do = load_operand(do_ptrs, row_mask, SUM_D, D, PRECISION)
        if WITH_V:
            do_out = cut_for_output(do, do_ptrs, row_mask, OUT_D, D, PRECISION)
            dv = add_product(dv, operand(p, do_ptr.dtype.element_ty, PRECISION), do_out, PRECISION)
        if WITH_K:
            if HOLD:
                dp = product(v, do, PRECISION)
            else:
                dp = streamed_product(v_ptrs, key_mask, do_ptrs, rows < N, D, PRECISION)
                q = load_operand(q_ptrs, row_mask, OUT_D, D, PRECISION)
            delta = tl.load(delta_ptr + rows, mask=row_mask, other=None if EVEN else 0.0)
            ds = p * (dp - delta[None, :])
            q = cut_for_output(q, q_ptrs, row_mask, OUT_D, D, PRECISION)
            dk = add_product(dk, operand(ds, q_ptr.dtype.element_ty, PRECISION), q, PRECISION)

    if WITH_K:
        dk_ptr = head_pointer(dk_ptr, i_head, dk_image, dk_head, H) + tl.program_id(1).to(tl.int64) * (dk_split * 8)
        store_head(dk_ptr + keys * (dk_row * 8), key_mask, scale_head(dk, sm_scale), OUT_D, D)
    if WITH_V:
        dv_ptr = head_pointer(dv_ptr, i_head, dv_image, dv_head, H) + tl.program_id(1).to(tl.int64) * (dv_split * 8)
        store_head(dv_ptr + keys * (dv_row * 8), key_mask, dv, OUT_D, D)


def _aligned(x: Tensor) -> Tensor:
    """Return x itself if its rows of D are contiguous and other strides multiples of 8, else a contiguous copy."""
    return x if x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) else x.contiguous()


def attention_forward(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return o (B, N, H, D), contiguous, and lse (B, H, N), fp32 in log2 units."""
    q, k, v = map(_aligned, (q_BNHD, k_BLHD, v_BLHD))
    (B, N, H, D), L = q.shape, k.shape[1]
    o, lse = q.new_empty((B, N, H, D)), q.new_empty((B, H, N), dtype=torch.float32)
    tile = choose_tile("forward", D, N, L, q.dtype, precision, q.device)
    options = launch_options(tile, D, q.dtype, precision) | {"EVEN": L % tile.keys == 0}
    sizes = H, N, L, math.log2(math.e) / D**0.5, *strides(q, k, v, o)
    launch(_forward, (triton.cdiv(N, tile.rows) * B * H,), q, k, v, o, lse, *sizes, **options)
    return o, lse


def attention_backward(
    do_BNHD: Tensor,
    q_BNHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    o_BNHD: Tensor,
    lse_BHN: Tensor,
    precision: str,
    into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv: the tensors `into`, with strides that q, k and v may have, or new contiguous ones."""
    do, q, k, v = map(_aligned, (do_BNHD, q_BNHD, k_BLHD, v_BLHD))
    dq, dk, dv = into or (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    (B, N, H, D), L, delta = q.shape, k.shape[1], torch.empty_like(lse_BHN)
    tile = one_pass_tile(D, L, q.dtype, precision, q.device)
    if tile and one_pass(tile, do, q, k, v, o_BNHD, lse_BHN, precision, (dq, dk, dv)):
        return dq, dk, dv
    tile = choose_tile("dq", D, N, L, q.dtype, precision, q.device)
    operands = q, k, v, o_BNHD, do, dq, lse_BHN, delta
    sizes = H, N, L, math.log2(math.e) / D**0.5, 1 / D**0.5, *strides(q, k, v, o_BNHD, do, dq)
    options = launch_options(tile, D, q.dtype, precision) | {"EVEN": L % tile.keys == 0}
    launch(_backward_q, (triton.cdiv(N, tile.rows) * B * H,), *operands, *sizes, **options)
    fused = one_kernel_for_keys(D, q.dtype, precision)
    for kind, outs in (("dkdv", [dk, dv]),) if fused else (("dk", [dk]), ("dv", [dv])):
        _key_gradients(kind, outs, do, q, k, v, lse_BHN, delta, precision)
    if L == 1:
        # The softmax of one score is always 1. dP - delta would leave a rounding error.
        dq.zero_()
        dk.zero_()
    return dq, dk, dv


def _key_gradients(
    kernel: str, outs: list[Tensor], do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, precision: str
) -> None:
    """Write "dk", "dv" or both ("dkdv") to `outs`, in one launch."""
    (B, N, H, D), L = q.shape, k.shape[1]
    tile = choose_tile(kernel, D, N, L, q.dtype, precision, q.device)
    key_tiles = triton.cdiv(L, tile.keys)
    chunk = queries_of_a_split(tile, N, key_tiles * B * H, q.dtype)
    splits = triton.cdiv(N, chunk)
    # A single split is written to the gradient itself; several are added up in fp32 first.
    sums = [q.new_empty((splits, B * H, L, D), dtype=torch.float32) for _ in outs] if splits > 1 else []
    partial = [x.unflatten(1, (B, H)).transpose(2, 3) for x in sums] or [out[None] for out in outs]
    dk, dv = partial[0], partial[-1]
    operands = q, k, v, do, dk, dv, lse, delta
    sizes = H, N, L, math.log2(math.e) / D**0.5, 1 / D**0.5, chunk, *strides(q, k, v, do, dk, dv)
    options = launch_options(tile, D, q.dtype, precision) | {
        "EVEN": N % tile.rows == 0,
        "WITH_K": "dk" in kernel,
        "WITH_V": "dv" in kernel,
    }
    launch(_backward_kv, (key_tiles * B * H, splits), *operands, *sizes, **options)
    for copies, out in zip(sums, outs, strict=False):
        add_copies(copies, out, options["OUT_D"], 1, splits)


attention_op = custom_op("attention")(attention_forward)
attention_op.register_fake(lambda q, *_: (q.new_empty(q.shape), q.new_empty((*q.shape[::2], q.shape[1]), dtype=torch.float32)))


@custom_op("attention_backward")
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(do, q, k, v, o, lse, precision)


attention_backward_op.register_fake(lambda do, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)))


@custom_op("attention_packed_backward")
def attention_packed_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, precision: str, self_attention: bool
) -> tuple[Tensor, Tensor]:
    """Return gradients packed like the projections: (dqkv_BN3HD, empty) for `self_attention`, else (dq_BNHD, dkv_BL2HD)."""
    if self_attention:
        dqkv, empty = q.new_empty((*q.shape[:2], 3, *q.shape[2:])), q.new_empty(0)
        attention_backward(do, q, k, v, o, lse, precision, dqkv.unbind(2))
        return dqkv, empty
    dq, dkv = q.new_empty(q.shape), k.new_empty((*k.shape[:2], 2, *k.shape[2:]))
    attention_backward(do, q, k, v, o, lse, precision, (dq, *dkv.unbind(2)))
    return dq, dkv


@attention_packed_backward_op.register_fake
def _(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, precision: str, self_attention: bool
) -> tuple[Tensor, Tensor]:
    if self_attention:
        return q.new_empty((*q.shape[:2], 3, *q.shape[2:])), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty((*k.shape[:2], 2, *k.shape[2:]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.precision = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, do: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, o, lse = ctx.saved_tensors
    return *attention_backward_op(do, q, k, v, o, lse, ctx.precision), None


attention_op.register_autograd(_differentiate, setup_context=_save)


# Recomputation is not counted, as in PyTorch's formula for its own attention: 2 matmuls forward, 5 backward.
@register_flop_formula(torch.ops.fastsd.attention)
def _(q_shape: Sequence[int], k_shape: Sequence[int], *_: object, **options: object) -> int:
    (B, N, H, D), L = q_shape, k_shape[1]
    return 4 * B * H * N * L * D


@register_flop_formula([torch.ops.fastsd.attention_backward, torch.ops.fastsd.attention_packed_backward])
def _(do_shape: Sequence[int], q_shape: Sequence[int], k_shape: Sequence[int], *_: object, **options: object) -> int:
    (B, N, H, D), L = q_shape, k_shape[1]
    return 10 * B * H * N * L * D


def attention_triton(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, precision: str = "ieee") -> Tensor:
    """`attention_reference` as fused, deterministic kernels for bf16 or fp32 and any D that is a multiple of 8 up to 256.

    For fp32, `precision` selects the matmuls: "ieee" (fused multiply-adds), "tf32", or three products about as exact as ieee:
    "fp16x3" or "tf32x3". bf16 always uses bf16 tensor cores. Softmax and sums are fp32.
    q, k, v are read in place if their rows of D are contiguous and other strides multiples of 8, otherwise copied first.

    Raises:
        ValueError: as the reference; another dtype; empty tensors; a D that is no multiple of 8 or above 256; no GPU.
    """
    require_supported(q_BNHD, k_BLHD, v_BLHD, precision)
    return attention_op(q_BNHD, k_BLHD, v_BLHD, precision)[0]


def require_supported(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, precision: str) -> None:
    """Raise the ValueError of `attention_triton` if the inputs are not supported."""
    _check(q_BNHD, k_BLHD, v_BLHD, precision)
    if {q_BNHD.dtype, k_BLHD.dtype, v_BLHD.dtype} not in ({torch.float32}, {torch.bfloat16}):
        raise ValueError(
            f"attention: q, k, v are {q_BNHD.dtype}, {k_BLHD.dtype}, {v_BLHD.dtype}; use fp32 or bf16 for all three"
        )
    if q_BNHD.numel() == 0 or k_BLHD.numel() == 0:
        raise ValueError(f"attention: shapes are q {tuple(q_BNHD.shape)}, k {tuple(k_BLHD.shape)}; use no empty dimension")
    D = q_BNHD.shape[3]
    if D % 8 or D > 256:
        raise ValueError(f"attention: head size is {D}; use a multiple of 8 up to 256")
    require_device("attention", q_BNHD, k_BLHD, v_BLHD)


def _calls() -> Calls:
    for batch in (4 * workload.BATCH, 1):  # in the backward of a large batch, no programs share the queries
        for kind in workload.ATTENTION:
            for mode in ("bf16", "ieee", "tf32", "fp16x3"):
                dtype, precision = (torch.bfloat16, "ieee") if mode == "bf16" else (torch.float32, mode)
                q, k = (meta(batch, rows, kind.heads, kind.head_dim, dtype=dtype) for rows in (kind.queries, kind.keys))
                o, lse = attention_forward(q, k, k, precision)
                if mode != "ieee":  # samples from a model without a precision; fp32 trains in fp16x3
                    attention_backward(o, q, k, k, o, lse, precision)
                yield f"{kind.queries}x{kind.keys} d{kind.head_dim}", mode


OP: Op[Attention] = Op(
    name="attention",
    reference=attention_reference,
    triton=attention_triton,
    calls=_calls,
    # The forward reads q, k, v and writes o; the backward reads q, k, v, o, do and writes dq, dk, dv.
    bytes=lambda kind, size: 6 * (kind.queries + kind.keys) * kind.heads * kind.head_dim * size,
)
