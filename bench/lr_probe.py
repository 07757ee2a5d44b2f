"""Compare the learning rate of `fastsd lr-probe` with the best one of a sweep of Lion, on the demo's job.

    python bench/lr_probe.py [--steps 400] [--batch 32] [--out bench/results/lr-probe-cpu.json]

The sweep trains with Lion at six rates for the same number of steps, with the same images, noise and order. The best rate
has the lowest final validation loss, which is measured on held-out images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from plain_swap import plain_swap

from fastsd.bench.counters import stamp
from fastsd.commands.cache import cache
from fastsd.commands.lr_probe import lr_probe
from fastsd.config.schema import Config, load_config
from fastsd.demo import demo
from fastsd.run.loop import train
from fastsd.storage import replace_file
from fastsd.terminal.console import Console

OVERRIDES = [
    "sample.prompts=[]", "log.tensorboard=false", "stage.sample_every=0", "validate.held_out=64", "validate.every=100000",
    "validate.per_band=4",
]  # fmt: skip
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def train_lion(config: Config, lr: float, steps: int) -> float:
    """Train `steps` steps with Lion and return the validation loss."""
    stage = config.stage[0].model_copy(update={"optimizer": "lion", "lr": lr, "until": steps, "checkpoint_every": steps})
    config = config.model_copy(update={"run": f"{config.run}-{lr:g}", "stage": [stage]})
    train(config, Console(file=StringIO()))
    rows = [json.loads(line) for line in (Path(config.run) / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows[-1]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lr-probe-cpu.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo._lay_out(Path(folder), Console(file=StringIO()))
        config = load_config(Path(folder) / "demo.toml", [*plain_swap(Path(folder)), f"stage.0.batch={args.batch}", *OVERRIDES])
        cache(config, Console(file=StringIO()))
        (probe,) = lr_probe(config, args.steps)
        losses = {f"{lr:g}": train_lion(config, lr, args.steps) for lr in RATES}
    best = float(min(losses, key=losses.__getitem__))
    result: dict[str, Any] = {"what": "fastsd lr-probe beside a sweep of Lion on the demo's first stage"}
    result |= {"steps": args.steps, "batch": args.batch, "plateau": probe.plateau, "settled": probe.settled, "lr": probe.rate}
    result |= {"validation_loss": losses, "best": best, "factor": max(probe.rate / best, best / probe.rate)}
    result["stamp"] = stamp(torch.device("cpu"))
    replace_file(args.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
