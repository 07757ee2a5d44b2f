"""Our bf16 attention, predicted from machine code, beside an estimate of PyTorch's SDPA: forward and backward, with no GPU.

    python bench/attention_estimate.py [--card 4090] [--batch 8] [--head-dim 40 ...]

Nothing here is measured on these cards. Ours counts each tensor's bytes once: if no cache serves the sums of dq at d40, it is
up to 300 us longer on an RTX 4090 (`attention_backward.py`). On GeForce, SDPA is FlashAttention-2. Its estimate:

- Work: 2 products forward and 5 backward, with D padded to 64, 96 or 192, and keys to tiles of 128 or (d160) 64.
- Rate: published for an RTX A5000, d64, in TFLOP/s (github.com/gpu-mode/ring-attention, issue 10): forward 82; backward 75 at
  4096 queries, 63 at 1024, 53 at 512. Its tensor cores do twice GeForce's FLOP a clock, all else of an SM is the same. So
  1/rate^4 is divided into a share of the tensor cores and of the rest. This gives 0.97 of a 3090's forward rate, or 73 TFLOP/s,
  where 69 to 75 are published. Other head sizes are taken to be as efficient, which favours SDPA.
- Programs: forward one for 128 queries, backward one for a tile of keys, whose rounds over the SMs are counted.
- Memory: each tensor once. The longer one of both counts, and the constant of a launch: one forward, three backward.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from math import ceil

import torch

from fastsd_kernels import workload
from fastsd_kernels.attention import attention_backward, attention_forward
from fastsd_kernels.cards import CARDS, Card
from fastsd_kernels.launch import meta, recording
from fastsd_kernels.prediction import LAUNCH_US, Predictor
from fastsd_kernels.sass import Compiled, compile_launch, specialise

_PADDED = {40: 64, 80: 96, 160: 192}
_FORWARD, _BACKWARD = 81.7, {4096: 74.8, 1024: 62.5, 512: 52.9}


def rate(card: Card, published: float) -> float:
    """Return TFLOP/s on a card of a kernel with this published rate on an RTX A5000."""
    a5000 = CARDS["A5000"]
    share = (a5000.sms * a5000.ghz / 1e3) / published  # SM cycles per FLOP, in units that cancel
    rest = share**4 - a5000.tensor**-4
    return card.sms * card.ghz / 1e3 / (card.tensor**-4 + rest) ** 0.25


def sdpa(card: Card, kind: workload.Attention, batch: int) -> float:
    """Return the estimated microseconds of SDPA, forward and backward."""
    heads, width = batch * kind.heads, _PADDED[kind.head_dim]
    tile = 64 if kind.head_dim == 160 else 128
    keys = ceil(kind.keys / tile) * tile
    product = 2e-6 * heads * kind.queries * keys * width  # MFLOP
    backward = _BACKWARD[max(n for n in (512, 1024, 4096) if n <= max(512, kind.queries))]
    number = 2e-3 * heads * kind.head_dim / (card.bandwidth * card.copy)
    us = 0.0
    for products, launches, published, programs, numbers in (
        (2, 1, _FORWARD, heads * ceil(kind.queries / 128), 2 * kind.queries + 2 * kind.keys),
        (5, 3, backward, heads * keys // tile, 4 * kind.queries + 4 * kind.keys),
    ):
        idle = ceil(programs / card.sms) * card.sms / programs
        us += max(products * product / rate(card, published) * idle, numbers * number) + launches * LAUNCH_US
    return us


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
