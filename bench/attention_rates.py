"""Predict the rates of attention for `fastsd plan`, from the kernels' machine code (`kernel_times.py`). Nothing is measured.

    python bench/attention_rates.py [--card 4090 H200 ...] [--precision bf16 ...]     update fastsd/plan/attention_rates.json

It compiles for minutes. Cards that are not in the file get the rates of the nearest one in it (`fastsd/plan/step_time.py`).

TFLOP/s by precision, card and head size: the FLOPs that are needed (2 matmuls forward, 5 backward) over the predicted time of
all launches, less the time between launches. "text" is attention to 77 tokens. Batch 8.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from kernel_times import PRECISIONS, Row, predict_step

import fastsd_kernels.attention
from fastsd.storage import replace_file
from fastsd_kernels.cards import CARDS
from fastsd_kernels.prediction import LAUNCH_US

TABLE = Path(__file__).parents[1] / "fastsd/plan/attention_rates.json"
BATCH, TEXT = 8, 77  # images, tokens
FILES = [file.stem for file in Path(fastsd_kernels.attention.__file__).parent.glob("attention*.py")]
Rates = dict[str, dict[str, dict[str, dict[str, float]]]]


def rates(rows: list[Row]) -> Rates:
    """Return TFLOP/s by precision, card, head size and kind."""
    flops: dict[tuple[str, ...], int] = defaultdict(int)
    microseconds: dict[tuple[str, ...], float] = defaultdict(float)
    for row in rows:
        sizes = [[int(n) for n in shape.split("x")] for shape in row.shape.split()]
        # A kernel that adds partial sums has (copies, batch * heads, rows, size) first, and the gradient last.
        (batch, queries, heads, size), keys = sizes[0], sizes[-1][1]
        kind = ("forward" if row.kernel.startswith("forward") else "backward") + (", text" if keys == TEXT else "")
        key = row.precision, CARDS[row.card].name, str(size), kind
        microseconds[key] += row.count * (row.us - LAUNCH_US)
        if kind.startswith("forward"):
            needed = row.count * 4 * batch * heads * queries * keys * size
            flops[key] += needed
            flops[(*key[:-1], kind.replace("forward", "backward"))] += needed * 5 // 2
    table: Rates = {}
    for (precision, card, size, kind), total in flops.items():
        rate = total / microseconds[precision, card, size, kind] / 1e6
        table.setdefault(precision, {}).setdefault(card, {}).setdefault(size, {})[kind] = float(f"{rate:.3g}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", nargs="+", choices=CARDS, default=list(CARDS), metavar="CARD", help=", ".join(CARDS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    options = parser.parse_args()
    table: Rates = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for precision in options.precision:
        for name in options.card:
            new = rates(predict_step([name], precision, [BATCH], FILES))
            table.setdefault(precision, {}).update(new[precision])
            _write(table)


def _write(table: Rates) -> None:
    text = ",\n".join(
        f'  "{precision}": {{\n' + ",\n".join(f'    "{card}": {json.dumps(row)}' for card, row in cards.items()) + "\n  }"
        for precision, cards in table.items()
    )
    replace_file(TABLE, f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
