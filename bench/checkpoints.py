"""Measure how long training stands still for a checkpoint, at full size, on any machine.

    python bench/checkpoints.py [--folder DIR] [--optimizer lion] [--small] [--json FILE]

A random SD1.5 trains on 64 px images, so that memory is left for the copies.  First training waits while checkpoints are
written, as it does without room for copies; then it goes on.  Each run writes its first checkpoint before the measured ones.
Needs 20 GB of memory for Lion or 27 GB for D-Lion, and 35 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

CONFIG = """
run = "{run}"
[model]
base = "base"
[data]
folders = ["images"]
resolution = 64
[cache]
dir = "cache"
[log]
every = 1
[export]
single_file = false
[[stage]]
train = ["unet"]
until = 7
batch = 1
optimizer = "{optimizer}"
lr = 1e-6
checkpoint_every = 2
keep_checkpoints = 1
"""


def measure(config: Any, *, waits: bool) -> dict[str, Any]:
    """Train, and return the seconds of the checkpoints at steps 4 and 6: until training goes on, and until they are written."""
    from fastsd.run import checkpoint, saving
    from fastsd.run.loop import train
    from fastsd.run.saving import Saving

    still, writing, original_save, original_write = [], [], Saving.save, checkpoint.save

    def save(self: Saving, *args: Any, **options: Any) -> None:
        self.finish()  # of the checkpoint before, which has had two steps of time
        begin = time.perf_counter()
        original_save(self, *args, **options)
        still.append(time.perf_counter() - begin)

    def write(*args: Any, **options: Any) -> Path:
        begin = time.perf_counter()
        path = original_write(*args, **options)
        writing.append(time.perf_counter() - begin)
        return path

    with mock.patch.object(Saving, "save", save), mock.patch.object(checkpoint, "save", write):
        if waits:
            with mock.patch.object(saving, "main_memory", lambda: 0):
                train(config, export=False)
        else:
            train(config, export=False)
    newest = checkpoint.checkpoints(Path(config.run) / "checkpoints")[-1]
    size = sum(file.stat().st_size for name in ("unet", "state.safetensors") for file in _files(newest / name))
    return {
        "still_s": round(statistics.mean(still[1:3]), 2),
        "written_after_s": round(statistics.mean(writing[1:3]), 2),
        "gb": round(size / 1e9, 2),
    }


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary folder)")
    parser.add_argument("--optimizer", default="lion")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    import torch
    from full_size import make_base
    from plan_check import SMALL

    from fastsd.bench.counters import stamp
    from fastsd.commands.cache import cache
    from fastsd.config.schema import load_config
    from fastsd.demo.world import write_dataset

    with tempfile.TemporaryDirectory(prefix="fastsd-checkpoints-") as temporary:
        folder = arguments.folder or Path(temporary)
        make_base(folder / "base", shapes=SMALL[0] if arguments.small else None)
        write_dataset(folder / "images", 8, seed=0)
        figures = {}
        for name, waits in (("training waits", True), ("training goes on", False)):
            text = CONFIG.format(run=name.replace(" ", "-"), optimizer=arguments.optimizer)
            (folder / "job.toml").write_text(text)
            overrides = [f'{key}="{folder / path}"' for key, path in (("model.base", "base"), ("cache.dir", "cache"))]
            overrides += [f'data.folders=["{folder / "images"}"]', f'run="{folder / name.replace(" ", "-")}"']
            config = load_config(folder / "job.toml", overrides)
            cache(config)
            figures[name] = measure(config, waits=waits)
    metadata = {"config": f"SD1.5, random weights, 64 px, batch 1, fp32, {arguments.optimizer}", **stamp(torch.device("cpu"))}
    text = json.dumps({"stamp": metadata, "figures": figures}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
