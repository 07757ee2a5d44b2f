"""Predict the speed of training on cards that are not here, beside what others have published. Nothing is measured.

    python bench/predictions.py              print both tables
    python bench/predictions.py --write      write results/predictions.json and the table in the README

The first table is the reference job (`configs/xlsd.toml`, first stage: 1,000,000 steps of 32 images at 512 px with D-Lion), in
each precision, with the most images per forward that `fastsd plan` fits into the card. The second predicts our step with the
settings of published runs of other programs. They have other kernels, so a ratio of 1 is not expected, but its size is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastsd.config.schema import StageTable, load_config
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes
from fastsd.model.unet import UNetConfig
from fastsd.plan.plan import GIB, RESERVED, plan_stage
from fastsd.storage import replace_file
from fastsd_kernels.cards import CARDS

ROOT = Path(__file__).parents[1]
RESULTS, README = ROOT / "bench/results/predictions.json", ROOT / "README.md"
START, END = "<!-- predictions: written by bench/predictions.py -->\n", "<!-- end of predictions -->\n"
SHAPES = Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
SHOWN, PRECISIONS = ("3090", "4090", "5090", "A100", "H200"), ("bf16", "tf32", "fp32")


class Peer(NamedTuple):
    """A published run of this UNet at 512 px with cached latents: images/s per GPU, least and most."""

    program: str
    card: str
    precision: str
    images: int  # per forward and step
    checkpointing: str
    published: tuple[float, float]


# fmt: off
PEERS = [
    Peer("MLPerf v5.0, HPE",         "H200", "bf16", 64, "none",  (149.5, 149.5)),
    Peer("MLPerf v4.1, NVIDIA",      "H200", "bf16", 32, "none",  (139.5, 139.5)),
    Peer("MLPerf v4.1, NVIDIA",      "H100", "bf16", 32, "none",  (135.7, 135.7)),
    Peer("MLPerf v4.0, NVIDIA",      "L40S", "bf16", 16, "none",  (30.8, 30.8)),
    Peer("MosaicML",                 "A100", "bf16", 32, "none",  (36, 37)),
    Peer("ppbrown/ai-training",      "4090", "bf16", 64, "block", (28.4, 28.4)),
    Peer("OneTrainer",               "4090", "bf16", 16, "none",  (22, 33)),
    Peer("OneTrainer",               "4090", "fp32", 4,  "none",  (11.6, 11.6)),
]
# fmt: on


def reference_rows(precisions: Sequence[str] = PRECISIONS) -> list[dict[str, Any]]:
    """Return a row per card and precision."""
    rows, first = [], load_config(ROOT / "configs/xlsd.toml").stage[0]
    for precision in precisions:
        stage = first.model_copy(update={"precision": precision})
        plan = plan_stage(SHAPES, stage, 512, 0)
        for name in SHOWN:
            card = CARDS[name]
            plan.card = card
            images = plan.largest_micro_batch(int(card.memory * GIB) - RESERVED)
            slowest, fastest = plan.images_per_second(card, images)
            total = stage.steps(1) * stage.batch / 86400
            row = {
                "card": card.name,
                "precision": precision,
                "images_per_forward": images,
                "images_per_second": [slowest, fastest],
            }
            rows.append(row | {"days": [total / fastest, total / slowest]})
    return sorted(rows, key=lambda row: [CARDS[name].name for name in SHOWN].index(row["card"]))


def peer_rows() -> list[dict[str, Any]]:
    """Return a row per published run, with the ratios of the predictions to what was published."""
    rows = []
    for peer in PEERS:
        keys = {"train": ["unet"], "until": 1, "optimizer": "adamw", "lr": 1e-4, "batch": peer.images}
        stage = StageTable.model_validate({**keys, "precision": peer.precision, "checkpointing": peer.checkpointing})
        plan = plan_stage(SHAPES, stage, 512, 0, cached_text=True)
        speeds = plan.images_per_second(CARDS[peer.card], peer.images)
        ratios = [speed / published for speed, published in zip(speeds, peer.published[::-1], strict=True)]
        rows.append({**peer._asdict(), "images_per_second": speeds, "ratios": ratios})
    return rows


def rounded(report: Any) -> Any:
    """Return a report as JSON keeps it, with four digits."""
    return json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.4g}"))


def table(report: dict[str, Any]) -> str:
    """Return the README's table."""
    lines = ["| card | precision | images per forward | predicted images/s | predicted days | published by others, images/s |"]
    lines.append("|---|---|---|---|---|---|")
    for row in report["reference job"]:
        peers = [p for p in report["peers"] if CARDS[p["card"]].name == row["card"] and p["precision"] == row["precision"]]
        others = "; ".join(f"{p['program']} {_span(p['published'])} ({_with(p)})" for p in peers)
        speed, days = _span(row["images_per_second"]), _span(row["days"])
        lines.append(f"| {row['card']} | {row['precision']} | {row['images_per_forward']} | {speed} | {days} | {others} |")
    return "\n".join(lines) + "\n"


def _with(peer: dict[str, Any]) -> str:
    return f"{peer['images']} images" + (", checkpointing" if peer["checkpointing"] != "none" else "")


def _span(pair: list[float]) -> str:
    low, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in pair)
    return low if low == high else f"{low}-{high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results and the README's table")
    arguments = parser.parse_args()
    report = rounded({"reference job": reference_rows(), "peers": peer_rows()})
    print(table(report))
    print("| program | card | precision | images | published | predicted | ratio |\n|---|---|---|---|---|---|---|")
    for row in report["peers"]:
        cells = row["program"], CARDS[row["card"]].name, row["precision"], _with(row)
        print("| " + " | ".join((*cells, *(_span(row[key]) for key in ("published", "images_per_second", "ratios")))) + " |")
    if arguments.write:
        lists = {name: ",\n".join(f"    {json.dumps(row)}" for row in rows) for name, rows in report.items()}
        replace_file(RESULTS, "{\n" + ",\n".join(f'  "{name}": [\n{rows}\n  ]' for name, rows in lists.items()) + "\n}\n")
        before, after = README.read_text().split(START)[0], README.read_text().split(END)[1]
        replace_file(README, before + START + table(report) + END + after)


if __name__ == "__main__":
    main()
