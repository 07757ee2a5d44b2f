"""Predict the speed of several GPUs, beside a simulation and beside what others have published. Nothing is measured.

    python bench/scaling.py              print the tables
    python bench/scaling.py --write      write results/scaling.json and the tables in docs/several-gpus.md

The first table trains SD1.5's UNet at 512 px in bf16 with Lion. The second has our step with the images per GPU of MLPerf's
results for Stable Diffusion 2 (the same UNet at the same size), and the efficiency of both: images/s per GPU relative to 8 GPUs
of the same round. Speeds are throughputs in MLPerf's logs. Their steps are fp16 with other kernels and other ways of summing
gradients, so the decline of the speed can be compared, its size less. The network of each is taken to be that of NVIDIA's Eos.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from predictions import SHAPES, rounded
from rank_simulation import simulate

from fastsd.config.schema import StageTable
from fastsd.plan.communication import Message
from fastsd.plan.links import LINKS, Cluster, Link
from fastsd.plan.plan import StagePlan, plan_stage
from fastsd.plan.step_time import step_seconds
from fastsd.storage import replace_file
from fastsd_kernels.cards import CARDS, Card

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "bench/results/scaling.json", ROOT / "docs/several-gpus.md"
START, END = "<!-- scaling: written by bench/scaling.py -->\n", "<!-- end of scaling -->\n"
INFINIBAND = Link("8 x 400 Gb/s InfiniBand", 330, 384, 14e-6, network=True)  # of a machine: one card for each GPU


class Published(NamedTuple):
    """A result of MLPerf Training: images/s of all GPUs, the median of its ten runs."""

    version: str
    submission: str
    card: str
    gpus: int
    batch: int
    speed: float


# fmt: off
PUBLISHED = [
    Published("v3.1", "Dell, XE9680x8H100-SXM-80GB",              "H100",    8,  512,   938.5),
    Published("v3.1", "NVIDIA, eos_n8_ngc23.09_nemo_mm",          "H100",   64, 2048,  6775.2),
    Published("v3.1", "NVIDIA, eos_n64_ngc23.09_nemo_mm",         "H100",  512, 2048, 23781.6),
    Published("v3.1", "NVIDIA, eos_n128_ngc23.09_nemo_mm",        "H100", 1024, 2048, 28045.3),
    Published("v4.1", "NVIDIA, eos_ngc24.09_nemo",                "H100",    8,  256,  1098.8),
    Published("v4.1", "NVIDIA, eos_n8_ngc24.09_nemo",             "H100",   64, 1024,  7967.9),
    Published("v4.1", "NVIDIA, eos_n64_ngc24.09_nemo",            "H100",  512, 2048, 39326.9),
    Published("v5.0", "Dell, 1xXE9680Lx8H200-SXM-141GB",          "H200",    8,  256,  1147.0),
    Published("v5.0", "Dell, 2xXE9680Lx8H200-SXM-141GB",          "H200",   16,  512,  2272.9),
    Published("v5.0", "HPE, Cray-XD670-H200-SXM5-141GB_n4_24.09", "H200",   32, 1024,  4467.8),
    Published("v5.0", "Google, h200_n8_nemo",                     "H200",   64,  256,  5119.8),
]
# fmt: on


@cache
def rehearsed(machines: int, images: int, optimizer: str) -> StagePlan:
    """Plan a step of two ranks with so many images each, in one forward. More ranks differ by a few bytes per message."""
    keys = {"train": ["unet"], "until": 1, "optimizer": optimizer, "lr": 1e-4, "precision": "bf16"}
    stage = StageTable.model_validate({**keys, "batch": 2 * images, "micro_batch": images})
    return plan_stage(SHAPES, stage, 512, 0, cached_text=True, cluster=Cluster(2, machines, LINKS["pcie4"], LINKS["100gbe"]))


def planned(cluster: Cluster, images: int, optimizer: str = "lion") -> StagePlan:
    """Plan a step with this number of images per GPU and forward."""
    plan = copy(rehearsed(min(2, cluster.machines), images, optimizer))
    plan.cluster, plan.stage = cluster, plan.stage.model_copy(update={"batch": images * cluster.gpus})
    return plan


def simulated(plan: StagePlan, card: Card, images: int, *, fast: bool) -> float:
    """Return the seconds of a step in the simulation, which takes from the plan how long the backward computes for a chunk."""
    assert plan.cluster is not None
    chunks, before = [], 0.0
    for operations, event in plan.segments(images):
        before += step_seconds(operations, card, "bf16")[not fast]
        if isinstance(event, Message) and event.operation in ("all_to_all_single", "all_reduce"):
            chunks.append((before, event.size))
            before = 0.0
    compute = step_seconds(plan.operations(images), card, "bf16")[not fast]
    # Additions of received pieces are operations of the plan already. 3 bytes move for each that is added.
    rate = card.copy * card.bandwidth * 1e9 / 3
    added = sum(size for _, size in chunks) / rate if plan.cluster.machines == 1 else 0.0
    head = compute - sum(seconds for seconds, _ in chunks) - before
    chunks = [(max(0.0, seconds - added / len(chunks)), size) for seconds, size in chunks]
    return head + simulate(chunks, before, plan.cluster, fast=fast, add_rate=rate).seconds


def grid_rows(images: int = 8) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of GPUs, connection and card."""
    for gpus in (2, 8, 64):
        machines, network = (1, None) if gpus <= 8 else (gpus // 8, LINKS["100gbe"])
        yield _row(images, "4090", Cluster(gpus, machines, LINKS["pcie4"], network))
        yield _row(images, "H200", Cluster(gpus, machines, LINKS["nvlink4"], network))
        if machines > 1:
            yield _row(images, "H200", Cluster(gpus, machines, LINKS["nvlink4"], INFINIBAND))
        else:
            for card in ("4090", "H200"):
                yield _row(images, card, Cluster(gpus, gpus, LINKS["100gbe"], LINKS["100gbe"]))


def _row(images: int, name: str, cluster: Cluster) -> dict[str, Any]:
    plan, card = planned(cluster, images), CARDS[name]
    times = plan.step_times(card, images)
    row = {"gpus": cluster.gpus, "machines": cluster.machines, "connection": cluster.text, "card": card.name, "images": images}
    row |= {"efficiency": list(times.efficiency), "waits": list(times.waits)}
    others = [simulated(plan, card, images, fast=fast) for fast in (True, False)]
    return row | {"error": [times.fastest.seconds / others[0] - 1, times.slowest.seconds / others[1] - 1]}


def published_rows() -> list[dict[str, Any]]:
    """Return a row for each published result, with our prediction."""
    rows: list[dict[str, Any]] = []
    for result in PUBLISHED:
        images, machines = result.batch // result.gpus, result.gpus // 8
        plan = planned(Cluster(result.gpus, machines, LINKS["nvlink4"], INFINIBAND if machines > 1 else None), images, "adamw")
        card = CARDS[result.card]
        speeds, times = plan.images_per_second(card, images), plan.step_times(card, images)
        rows.append(result._asdict() | {"images": images, "published": result.speed / result.gpus})
        rows[-1] |= {"predicted": [speed / result.gpus for speed in speeds], "communication": list(times.efficiency)}
        first = next(row for row in rows if row["version"] == result.version)
        rows[-1]["published efficiency"] = rows[-1]["published"] / first["published"]
        rows[-1]["predicted efficiency"] = [a / b for a, b in zip(rows[-1]["predicted"], first["predicted"], strict=True)]
    return rows


def tables(report: dict[str, Any]) -> str:
    """Return the tables of the docs."""
    lines = ["| GPUs | connection | card | predicted efficiency | waits in a step, ms |", "|---|---|---|---|---|"]
    for row in report["grid"]:
        text = row["connection"].partition(" GPUs in ")[2]
        waits = _span([1000 * seconds for seconds in row["waits"]])
        lines.append(f"| {row['gpus']} | {text} | {row['card']} | {_percent(row['efficiency'])} | {waits} |")
    lines += [
        "",
        "| MLPerf | submission | GPUs x images | images/s per GPU | predicted | efficiency | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["published"]:
        size = f"{row['gpus']} x {row['images']}"
        cells = [row["version"], row["submission"], size, f"{row['published']:.1f}", _span(row["predicted"])]
        cells += [f"{100 * row['published efficiency']:.0f} %", _percent(row["predicted efficiency"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _span(pair: list[float]) -> str:
    return "-".join(f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in pair)


def _percent(pair: list[float]) -> str:
    low, high = sorted(round(100 * value) for value in pair)
    return f"{low} %" if low == high else f"{low}-{high} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the results and the tables of the docs")
    arguments = parser.parse_args()
    published = published_rows()
    report = rounded({"grid": list(grid_rows()), "published": published})
    print(tables(report))
    errors = [abs(error) for row in report["grid"] for error in row["error"]]
    print(f"closed form against the simulation: at most {100 * max(errors):.1f} % of a step")
    if arguments.write:
        lists = {name: ",\n".join(f"    {json.dumps(row)}" for row in rows) for name, rows in report.items()}
        replace_file(RESULTS, "{\n" + ",\n".join(f'  "{name}": [\n{rows}\n  ]' for name, rows in lists.items()) + "\n}\n")
        before, after = DOCS.read_text().split(START)[0], DOCS.read_text().split(END)[1]
        replace_file(DOCS, before + START + tables(report) + END + after)


if __name__ == "__main__":
    main()
