"""Our bf16 attention, predicted from machine code, beside an estimate of PyTorch's SDPA: forward and backward, with no GPU.

    python bench/attention_estimate.py [--card 4090] [--batch 8] [--head-dim 40 ...]

Nothing here is measured on these cards. Ours counts each tensor's bytes once: if no cache serves the sums of dq at d40, it is
up to 300 us longer on an RTX 4090 (`attention_backward.py`).

On GeForce, SDPA is FlashAttention-2, whose source PyTorch builds (pytorch/pytorch, pull request 146372). Its facts, from
flash-attn 2.8.3, for cards with 99 KB of shared memory, without mask or dropout:

- `static_switch.h` pads D to 64, 96 or 192. `flash_fwd_launch_template.h` and `flash_bwd_launch_template.h` have the tiles
  (`_TILES`). A forward has a program for each tile of queries; a backward one for each tile of keys, alone on its SM.
- A backward is three kernels. The first reads o and do, and writes zeros to dq in fp32, D padded; the second adds to dq with
  atomics; the third rounds dq.

Its rates are published for an RTX 4090 in fp16 (apache/tvm, tl_doc/flash_perf.md), in TFLOP/s. Forward with 512 and 2048
tokens: 155.6 and 168.1 at D = 64, 153.1 and 169.3 at 128, 143.9 and 156.2 at 256. Backward with 2048 tokens: 124.8 at 64 and
124.6 at 128.

- Forward: the rates for both lengths are explained by a program's start that takes as long as 56 to 75 keys. 56 is used. What
  remains is 0.970, 0.977 and 0.901 of the rate of large matmuls. D = 96 and 192 take the means of their neighbours.
- Backward: its bytes at the rate of a copy, and 5 products at 0.82 of the matmul rate, for 64 and for 128. What a program
  loads and stores once (k, v, dk, dv) is not overlapped. The same sum gives an RTX A5000's published rates for 512, 1024, 2048
  and 4096 tokens (github.com/gpu-mode/ring-attention, issue 10) from that for 8192 within 3 %. D = 96 and 192 take 0.82, too,
  which favours SDPA: at 192, tiles are not loaded ahead.
- The shares hold for other GeForce cards, because their SMs have the same rates. They give 72 for an RTX 3090's forward at
  D = 64, where 69 to 75 are published.
- Launches: one forward, three backward. Slower masked loops, where D or the number of keys is padded, are not counted, nor is
  what it costs to give SDPA's gradients the same bits in every run, which ours have.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from math import ceil
from typing import NamedTuple

import torch

from fastsd_kernels import workload
from fastsd_kernels.attention import attention_backward, attention_forward
from fastsd_kernels.cards import CARDS, Card
from fastsd_kernels.launch import meta, recording
from fastsd_kernels.prediction import LAUNCH_US, Predictor
from fastsd_kernels.sass import Compiled, compile_launch, specialise


class Tiles(NamedTuple):
    """FlashAttention-2's tiles for a head size, and the forward's share of the matmul rate."""

    columns: int
    forward: tuple[int, int]  # queries and keys
    backward: tuple[int, int]
    share: float


_TILES = {
    40: Tiles(64, (128, 128), (64, 128), 0.970),
    80: Tiles(96, (128, 64), (64, 128), 0.974),
    160: Tiles(192, (128, 64), (64, 64), 0.939),
}
_START = 56  # keys; the time from a program's start to its first product and from the last one to its end
_BACKWARD_SHARE = 0.82


def sdpa(card: Card, kind: workload.Attention, batch: int) -> float:
    """Return the estimated microseconds of SDPA, forward and backward."""
    tiles, heads, D = _TILES[kind.head_dim], batch * kind.heads, kind.head_dim
    copy_rate = card.bandwidth * card.copy * 1e3  # bytes a microsecond
    rate = card.ghz * card.tensor * 1e3  # FLOP a microsecond and SM
    (rows, keys), (back_rows, back_keys) = tiles.forward, tiles.backward

    rounds = ceil(heads * ceil(kind.queries / rows) / card.sms)
    matmuls = rounds * 2 * 2 * rows * (ceil(kind.keys / keys) * keys + _START) * tiles.columns / (rate * tiles.share)
    forward = max(matmuls, heads * 4 * D * (kind.queries + kind.keys) / copy_rate)

    rounds = ceil(heads * ceil(kind.keys / back_keys) / card.sms)
    queries = ceil(kind.queries / back_rows) * back_rows
    matmuls = rounds * 5 * 2 * back_keys * queries * tiles.columns / (rate * _BACKWARD_SHARE)
    # o, do and dq in bf16, dq in fp32 written and read; k, v, dk and dv.
    numbers = kind.queries * (6 * D + 8 * tiles.columns) + kind.keys * 8 * D
    return forward + matmuls + heads * numbers / copy_rate + 4 * LAUNCH_US


def ours(card: Card, kind: workload.Attention, batch: int, predictor: Predictor, compiled: dict[str, Compiled]) -> float:
    """Return the predicted microseconds of all our launches, forward and backward."""
    q, k = (meta(batch, n, kind.heads, kind.head_dim, dtype=torch.bfloat16) for n in (kind.queries, kind.keys))
    with recording(card.sm) as launches:
        o, lse = attention_forward(q, k, k, "ieee")
        attention_backward(o, q, k, k, o, lse, "ieee")
    us = 0.0
    for launch in launches:
        compilation = specialise(launch, card.sm)
        if compilation.key not in compiled:
            compiled[compilation.key] = compile_launch(compilation)
        us += predictor.predict(card, compilation.key, compiled[compilation.key], launch).us
    return us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--card", choices=("3090", "4090", "5090"), default="4090")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=(40, 80, 160), default=[40, 80, 160])
    options = parser.parse_args()
    card, predictor, compiled = CARDS[options.card], Predictor(), dict[str, Compiled]()
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    print(f"{card.name}, {options.batch} images, bf16, us     ours, predicted   SDPA, estimated   ratio")
    for kind, count in workload.ATTENTION.items():
        if kind.head_dim in options.head_dim:
            times = ours(card, kind, options.batch, predictor, compiled), sdpa(card, kind, options.batch)
            name = f"{kind.queries}x{kind.keys} d{kind.head_dim}"
            print(f"{name:28} {times[0]:15.0f} {times[1]:17.0f} {times[1] / times[0]:9.2f}", flush=True)
            for i, us in enumerate(times):
                sums[kind.head_dim][i] += count * us
    for head_dim, (predicted, estimated) in sums.items():
        print(f"d{head_dim}, all of a step {predicted:22.0f} {estimated:17.0f} {estimated / predicted:9.2f}", flush=True)


if __name__ == "__main__":
    main()
