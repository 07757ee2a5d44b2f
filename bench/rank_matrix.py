"""Train the demo's UNet on 1, 2 and 4 ranks, and compare the results: inputs, weights, repetitions, sharded state.

    python bench/rank_matrix.py [--steps 50] [--folder DIR] [--json FILE] [--only lion ...]

Each case is trained by one process with the whole batch and with micro-batches of one rank's share, which have the same partial
sums as ranks; and by 2 and 4 ranks with and without sharded state, each twice.  Ranks are processes on the CPU, which talk
through gloo.  All cases of one number of ranks share a process group, a model and a cache.  A row of the table has

    inputs      the samples, timesteps and noise of each step are those of one process
    micro       largest difference of a weight from one process with micro-batches of a rank's share
    whole       the same from one process with whole batches
    repeats     a second run has the same bits, also of the optimizer state
    shards      weights with sharded state are those without it, to the last bit
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any

BATCH, WORLDS = 4, (1, 2, 4)
CHUNK = 4 << 20  # bytes, so that the demo's UNet has three chunks
CONFIG = f"""
[data]
resolution = 64
[log]
every = 1
tensorboard = false
[[stage]]
name = "one"
train = ["unet"]
batch = {BATCH}
"""
OPTIMIZERS = {
    "lion": ["stage.optimizer=lion", "stage.lr=1e-5"],
    "dlion": ["stage.optimizer=dlion"],
    "adamw": ["stage.optimizer=adamw", "stage.lr=1e-5"],
}
CASES = {
    f"{name} {precision}": [*keys, f"stage.precision={precision}"]
    for name, keys in OPTIMIZERS.items()
    for precision in ("fp32", "bf16")
}
CASES["adamw fp32, LoRA"] = ["stage.optimizer=adamw", "stage.lr=1e-3", 'stage.train=["lora"]', "model.lora={rank=4}"]
CASES["lion fp32, buckets"] = [*OPTIMIZERS["lion"], "data.buckets={ min = 32, max = 96, step = 16 }"]
NAMES = {1: ["whole", "micro 2", "micro 4"], **{n: ["plain", "plain again", "shards", "shards again"] for n in WORLDS[1:]}}


def runs_of(case: str, world: int) -> dict[str, list[str]]:
    """Return the overrides of each run of a case on a number of ranks, by the name of the run."""
    settings = {"whole": [], "micro 2": [f"stage.micro_batch={BATCH // 2}"], "micro 4": [f"stage.micro_batch={BATCH // 4}"]}
    settings |= {name: [f"stage.shard_state={str('shards' in name).lower()}"] for name in NAMES[2]}
    return {f"{case}/{world} {name}": [*CASES[case], *settings[name]] for name in NAMES[world]}


def train_runs(folder: Path, steps: int, cases: list[str]) -> None:
    """Train all runs for the number of ranks that torchrun has started, as one of them."""
    from fastsd.config.schema import load_config
    from fastsd.run.loop import train
    from fastsd.terminal.console import Console
    from fastsd.train import shards
    from fastsd.train.ranks import joined_ranks

    shards.CHUNK = CHUNK
    with joined_ranks() as ranks:
        for case in cases:
            for name, keys in runs_of(case, ranks.world).items():
                start = time.perf_counter()
                config = load_config(folder / "job.toml", [*keys, f"stage.until={steps}", f'run="{folder / "runs" / name}"'])
                train(config, Console(file=StringIO()), export=False, ranks=ranks)
                if ranks.main:
                    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def prepare(folder: Path, cases: list[str]) -> None:
    """Write images, config and caches."""
    from fastsd.commands.cache import cache
    from fastsd.config.schema import load_config
    from fastsd.demo.demo import MODELS
    from fastsd.demo.world import write_dataset
    from fastsd.terminal.console import Console

    write_dataset(folder / "images", 64, seed=1)
    for i, path in enumerate(sorted((folder / "images").rglob("*.png"))):  # other shapes, which buckets keep
        from PIL import Image

        if i % 3:
            with Image.open(path) as image:
                resized = image.resize((96, 64) if i % 3 == 1 else (64, 96))
            resized.save(path)
    head = f'run = "{folder / "run"}"\n[model]\nbase = "{MODELS / "base"}"\n[cache]\ndir = "{folder / "cache"}"\n'
    sample = "[sample]\nprompts = []\n"
    (folder / "job.toml").write_text(
        head + sample + CONFIG.replace("[data]\n", f'[data]\nfolders = ["{folder / "images"}"]\n') + "until = 1\n"
    )
    for case in cases:
        cache(load_config(folder / "job.toml", CASES[case]), Console(file=StringIO()))


def tensors_of(run: Path, *, weights: bool) -> dict[str, Any]:
    """Return the weights that a run has trained, or all tensors of its last checkpoint."""
    from safetensors.torch import load_file

    last = sorted((run / "checkpoints").iterdir())[-1]
    files = [path for path in sorted(last.rglob("*.safetensors")) if not weights or path.name != "state.safetensors"]
    return {f"{path.relative_to(last)}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def inputs_of(run: Path) -> list[list[Any]]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [[row[key] for key in ("step", "images", "order", "timesteps", "noise")] for row in rows]


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    assert first.keys() == second.keys()
    return max((tensor.double() - second[name].double()).abs().max().item() for name, tensor in first.items() if tensor.numel())


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(bool((tensor == second[name]).all()) for name, tensor in first.items())


def compare(folder: Path, case: str) -> list[dict[str, Any]]:
    """Return the rows of a case."""
    runs = folder / "runs" / case
    whole = tensors_of(runs / "1 whole", weights=True)
    rows = []
    for world in WORLDS[1:]:
        micro = tensors_of(runs / f"1 micro {world}", weights=True)
        plain = tensors_of(runs / f"{world} plain", weights=True)
        for name in ("plain", "shards"):
            run, again = runs / f"{world} {name}", runs / f"{world} {name} again"
            weights = tensors_of(run, weights=True)
            row = {
                "case": case,
                "ranks": world,
                "sharded": name == "shards",
                "inputs": inputs_of(run) == inputs_of(runs / "1 whole"),
            }
            row |= {"micro": difference(weights, micro), "whole": difference(weights, whole)}
            row["repeats"] = same(tensors_of(run, weights=False), tensors_of(again, weights=False))
            row["shards"] = same(weights, plain)
            rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'case':20} ranks state     inputs micro     whole     repeats shards")
    for row in rows:
        flags = ["yes" if row[key] else "NO" for key in ("inputs", "repeats", "shards")]
        state = "sharded" if row["sharded"] else "whole"
        numbers = f"{row['micro']:<9.1e} {row['whole']:<9.1e}"
        print(f"{row['case']:20} {row['ranks']:<5} {state:9} {flags[0]:6} {numbers} {flags[1]:7} {flags[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--train", action="store_true", help="be one of the ranks (used by the script itself)")
    arguments = parser.parse_args()
    if arguments.train:
        return train_runs(arguments.folder, arguments.steps, arguments.only)

    import torch

    from fastsd.bench.counters import stamp

    with tempfile.TemporaryDirectory(prefix="fastsd-ranks-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        prepare(folder, arguments.only)
        options = ["--folder", str(folder), "--steps", str(arguments.steps), "--only", *arguments.only]
        processes = []
        for world in WORLDS:
            words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
            words += ["--master-port", str(free_port()), __file__, "--train", *options]
            processes.append(subprocess.Popen(words, env={"OMP_NUM_THREADS": "1", **os.environ}))
        if sum(process.wait() for process in processes):
            sys.exit(1)
        rows = [row for case in arguments.only for row in compare(folder, case)]
    seconds = round(time.perf_counter() - start)
    print_table(rows)
    metadata = {"config": f"the demo's UNet, 64 px, batch {BATCH}, {arguments.steps} steps", **stamp(torch.device("cpu"))}
    if arguments.json:
        arguments.json.write_text(json.dumps({"stamp": metadata, "seconds": seconds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
