"""Predictions beside published times, to judge `fastsd_kernels.prediction`. A part of `kernel_times.py --published`.

The kernel is a plain forward of FlashAttention-2 (Dao 2023, algorithm 1), as Triton's users write it; it is no part of fastsd.
Published rates are of such kernels in Triton, or in CUDA where the row says so: 32 heads of 4 images, 4096 tokens, not causal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastsd_kernels.cards import CARDS
from fastsd_kernels.launch import Launch, meta
from fastsd_kernels.prediction import Predictor
from fastsd_kernels.sass import compile_launch, specialise

HEADS, TOKENS = 128, 4096


class Published(NamedTuple):
    """Published TFLOP/s of a forward, and the tiles (rows, keys, warps, stages) that its authors may have used."""

    card: str
    head_dim: int
    low: float
    high: float
    source: str
    tiles: tuple[tuple[int, int, int, int], ...]


PUBLISHED = (
    Published("3090", 64, 69, 75, "flash-attention-triton, README", ((128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3))),
    Published("A5000", 64, 82, 82, "FlashAttention-2 in CUDA", ((128, 64, 4, 3), (128, 32, 4, 3))),
    Published("A100", 64, 143, 147, "Triton, pull request 1917", ((128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3))),
    Published("A100", 64, 175, 190, "FlashAttention-2 in CUDA", ((128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3))),
    Published("H100", 64, 268, 268, "Triton, issue 5437", ((128, 64, 4, 3), (128, 128, 8, 3))),
    Published("H100", 128, 389, 487, "FlashAttention-3, figure 5", ((128, 64, 8, 3), (128, 128, 8, 3))),
)


@triton.jit
def flash_attention(
    q_ptr, k_ptr, v_ptr, o_ptr, n_tokens, scale,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (query tiles, heads). Tensors are (heads, tokens, D); `scale` is log2(e) / sqrt(D)."""
    head = tl.program_id(1).to(tl.int64) * n_tokens * D
    cols = tl.arange(0, D)
    q_offs = head + (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * D + cols[None, :]
    kv_offs = head + tl.arange(0, KEYS)[:, None] * D + cols[None, :]
    q = tl.load(q_ptr + q_offs)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, D), tl.float32)
    for _ in range(0, n_tokens, KEYS):
        scores = tl.dot(q, tl.trans(tl.load(k_ptr + kv_offs))) * scale
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.sum(weights, 1)
        o = tl.dot(weights.to(v_ptr.dtype.element_ty), tl.load(v_ptr + kv_offs), o * keep[:, None])
        top = new_top
        kv_offs += KEYS * D
    tl.store(o_ptr + q_offs, (o / total[:, None]).to(o_ptr.dtype.element_ty))


def rate(card: str, head_dim: int, tile: tuple[int, int, int, int]) -> float:
    """Return the predicted TFLOP/s of the forward with a tile."""
    rows, keys, warps, stages = tile
    x = meta(HEADS, TOKENS, head_dim, dtype=torch.float16)
    options = {"D": head_dim, "ROWS": rows, "KEYS": keys, "num_warps": warps, "num_stages": stages}
    launch = Launch(flash_attention, (TOKENS // rows, HEADS), (x, x, x, x, TOKENS, 0.1), options)
    compilation = specialise(launch, CARDS[card].sm)
    p = Predictor().predict(CARDS[card], compilation.key, compile_launch(compilation), launch)
    return 4 * HEADS * TOKENS**2 * head_dim / p.us / 1e6


def compare() -> None:
    """Print predicted and published rates. The best of the tiles counts, as in the published figures."""
    for row in PUBLISHED:
        best = max(rate(row.card, row.head_dim, tile) for tile in row.tiles)
        ratio = f"{best / row.high:.2f} to {best / row.low:.2f}" if row.high > row.low else f"{best / row.low:.2f}"
        published = f"{row.low:g}-{row.high:g}" if row.high > row.low else f"{row.low:g}"
        name = f"{row.card:5} D = {row.head_dim:3}"
        print(f"{name}  predicted {best:5.0f} TFLOP/s, published {published:7} ({row.source}): {ratio} times", flush=True)
