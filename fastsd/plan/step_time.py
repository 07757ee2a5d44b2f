"""The predicted time of a step on a card: a range, from the operations that `operations.py` records.

    product     its tiles in waves over the card's SMs, at a share of the rate that large matmuls reach; at least its bytes
    attention   its FLOPs at the rate predicted for the kernels (`attention_rates.json`)
    pass        its bytes, at a share of the bandwidth that copies reach
    all         a fixed time per launch, too

Operations run one after another. The host is not counted (a step is one CUDA graph), nor is the data loader (it works ahead).
Nothing is fitted to a step. `bench/predictions.py` compares with what others have published.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from fastsd.plan.operations import Operation
from fastsd_kernels.cards import CARDS, Card


class Shares(NamedTuple):
    """Shares of a card that a step uses.

    Attributes:
        product: share of `Card.bf16`, `tf32` or `fp32` that a product with whole waves of tiles reaches.
        copy: share of `Card.copy` that a pass reaches.
        launch: seconds per launch, within a CUDA graph.
    """

    product: float
    copy: float
    launch: float


# The ends of the range. Products: cuDNN's convolutions and cuBLAS' matmuls of these sizes, against matmuls of 8192. Launches:
# the gap between two kernels of a graph, and what a kernel takes to fill an empty GPU.
SLOW, FAST = Shares(0.72, 0.85, 3.0e-6), Shares(0.92, 1.0, 1.5e-6)
# The card whose rates those of an architecture follow, by units and clock, until they are predicted themselves.
_NEAREST = {80: "A100", 86: "3090", 89: "4090", 90: "H200", 120: "5090"}
# Least and most of the predicted rate that attention reaches. Against published figures, the predictions are within a tenth on
# GeForce, where tensor cores are the limit, and 1.2 to 2 times too fast on A100 and H100.
_ATTENTION, _ATTENTION_OF_ARCHITECTURE = (0.9, 1.1), dict.fromkeys((80, 90), (0.5, 0.83))
# Rows and columns of a tile, and its rate relative to the largest, which loads the fewest numbers per product.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.97), (128, 64, 0.88), (64, 128, 0.88), (64, 64, 0.75))
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # of the inner dimension, with the sums of the parts added up
_SHORTEST = 512  # inner dimension of a part


def step_seconds(operations: Mapping[Operation, int], card: Card, precision: str) -> tuple[float, float]:
    """Predict the seconds of a step, as (fewest, most)."""
    totals: Counter[bool] = Counter()
    for operation, count in operations.items():
        for slow in (False, True):
            totals[slow] += count * _seconds(operation, card, precision, SLOW if slow else FAST)  # type: ignore[assignment]
    return totals[False], totals[True]


def _seconds(operation: Operation, card: Card, precision: str, shares: Shares) -> float:
    memory = operation.bytes / (shares.copy * card.copy * card.bandwidth * 1e9)
    launch = operation.launches * shares.launch
    if operation.kind == "pass":
        return memory + launch
    if operation.kind == "attention":
        return operation.flops / _attention_rate(operation, card, precision)[shares is FAST] + launch
    rate = 1e12 * (card.bf16 if operation.narrow else card.tf32 if precision == "tf32" else card.fp32)
    return max(_product_seconds(operation.sizes, rate, card.sms, card.bandwidth * 1e9) / shares.product, memory) + launch


@cache
def _product_seconds(sizes: tuple[int, ...], rate: float, sms: int, bandwidth: float) -> float:
    """Return the seconds of products (count, M, N, K) at `rate` FLOP/s, with the best tile and split of K."""
    count, rows, columns, inner = sizes
    best = float("inf")
    for tile_rows, tile_columns, relative in _TILES:
        for split in _SPLITS:
            if split > 1 and inner < split * _SHORTEST:
                break
            waves = ceil(count * ceil(rows / tile_rows) * ceil(columns / tile_columns) * split / sms)
            flops = 2 * tile_rows * tile_columns * ceil(inner / split)
            sums = 8 * split * count * rows * columns if split > 1 else 0  # bytes, written and read again in fp32
            best = min(best, waves * flops * sms / (rate * relative) + sums / bandwidth)
    return best


def _attention_rate(operation: Operation, card: Card, precision: str) -> tuple[float, float]:
    """Return the least and most FLOP/s, from the head size in the table that is nearest."""
    mode = "bf16" if operation.narrow else "tf32" if precision == "tf32" else "fp32"
    table, other = _attention_rates()[mode], card if card.name in _attention_rates()[mode] else CARDS[_NEAREST[card.sm]]
    _, queries, keys, width = operation.sizes
    rows = table[other.name]
    nearest = min(rows, key=lambda size: abs(int(size) - width))
    kind = "forward" if operation.group == "attention" else "backward"
    rate = 1e12 * float(rows[nearest][kind if queries == keys else f"{kind}, text"])
    # fp32 attention multiplies with fp16 on tensor cores (`attention_precision` in `train/precision.py`).
    unit = "bf16" if mode == "fp32" else mode
    rate *= min(getattr(card, unit) / getattr(other, unit), card.sms * card.ghz / (other.sms * other.ghz))
    low, high = _ATTENTION_OF_ARCHITECTURE.get(card.sm, _ATTENTION)
    return low * rate, high * rate


@cache
def _attention_rates() -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name("attention_rates.json").read_text()))


@cache
def _workspaces() -> dict[str, Any]:
    return dict(json.loads(Path(__file__).with_name("cudnn_workspace.json").read_text()))


def workspace_bytes(precision: str, images: float, card: Card | None = None) -> int:
    """Return the most memory that a convolution of a step takes in cuDNN, at 512 px; None = on any card.

    Args:
        images: images per forward; of other sizes, as many as have these positions at 512 px.
    """
    table = _workspaces()
    rows = [table[precision][card.name]] if card else list(table[precision].values())
    column = next((i for i, n in enumerate(table["images"]) if n >= images), None)
    if column is None:
        return int(max(row[-1] for row in rows) * images / table["images"][-1])
    return int(max(row[column] for row in rows))
