"""Fill one cache by several machines that share no locks, kill one of them, and compare the result with that of one machine.

    python bench/cache_machines.py [--images 2000] [--out FILE]

Machines are processes with names of their own. In each, every lock and every SQLite database of the cache fails that is not
in the machine's own folder. The encoder is a stub with a delay, so figures are counts, not speeds.

    two        2 machines
    killed     4 machines, one of them killed by SIGKILL at a random moment
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from caching import StubVae, config, draw

from fastsd.bench.counters import stamp
from fastsd.data.building import beats
from fastsd.data.building.build import build_cache
from fastsd.data.building.machines import joined
from fastsd.data.building.store import Store
from fastsd.data.building.upkeep import prune, verify
from fastsd.data.cache import LatentCache, view_name


def refuse_foreign_locks(root: str, name: str) -> None:
    """Make all locks and databases in the cache fail, except those in the folder of the machine `name`."""
    shared, inside = os.path.join(root, "cache", ""), os.path.join(root, "cache/machines", name)

    def only_inside(function: Any) -> Any:
        def checked(first: Any, *arguments: Any, **options: Any) -> Any:
            path = os.fsdecode(getattr(first, "name", first))
            if path.startswith(shared) and not path.startswith((f"{inside}/", f"{inside}.lock", f"{inside}.join")):
                raise OSError(37, f"No locks available for {path}")
            return function(first, *arguments, **options)

        return checked

    fcntl.flock, fcntl.lockf, sqlite3.connect = map(only_inside, (fcntl.flock, fcntl.lockf, sqlite3.connect))


def work(root: str, name: str, delay: float) -> None:
    torch.set_num_threads(1)
    beats.BEAT_SECONDS, beats.LOST_SECONDS = 0.5, 10.0
    refuse_foreign_locks(root, name)
    settings, vae = config(Path(root), batch=16), StubVae(delay=delay)
    with joined(Path(settings.cache.dir), name, view_name(settings, vae.hash), print) as division:
        build_cache(settings, vae, division=division)
        division.finish()
    Path(root, f"{name}.json").write_text(json.dumps(vae.encoded))


def content(root: Path) -> tuple[dict[str, str], list[list[str]], torch.Tensor]:
    latents = LatentCache.open(root / "cache")
    samples = range(len(latents))
    return latents.content_hashes(), latents.variants(samples), latents.get(samples)["latents"]


def case(root: Path, names: str, killed: str, seed: int) -> dict[str, object]:
    """Fill a cache by machines, and kill one of them after its first shard."""
    context = multiprocessing.get_context("spawn")
    processes = {name: context.Process(target=work, args=(str(root), name, 0.05)) for name in names}
    for process in processes.values():
        process.start()
    after = 0
    if killed:
        shards = root / "cache/shards"
        while not (shards.is_dir() and any(shards.iterdir())):
            time.sleep(0.05)
        time.sleep(random.Random(seed).uniform(0, 3))
        os.kill(processes[killed].pid or 0, signal.SIGKILL)
        after = len(list(root.glob("cache/exchange/*/results/rows/rows-*")))
    for process in processes.values():
        process.join()
    with Store.open(root / "cache") as store:
        rows, distinct = store.db.execute("SELECT COUNT(*), COUNT(DISTINCT content) FROM latent").fetchone()
    encoded = {path.stem: json.loads(path.read_text()) for path in sorted(root.glob("?.json"))}
    damaged, orphans = len(verify(root / "cache")), prune(root / "cache").shards
    outcome = {"rows": rows, "distinct": distinct, "damaged": damaged, "shards of the killed machine deleted": orphans}
    return {"machines": len(names), "killed": killed, "shards when killed": after, "encoded": encoded, **outcome}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    for i in range(options.images):
        draw(root / f"images/{i:05}.png", i, f"picture {i}")
    build_cache(config(root, batch=16), StubVae())
    hashes, captions, latents = content(root)
    results: dict[str, object] = {}
    for name, machines, killed in (("two", "ab", ""), ("killed", "abcd", "c")):
        shutil.rmtree(root / "cache")
        for path in root.glob("?.json"):
            path.unlink()
        outcome = case(root, machines, killed, options.seed)
        same_hashes, same_captions, same_latents = content(root)
        same = same_hashes == hashes and same_captions == captions and torch.equal(same_latents, latents)
        rows, distinct = int(str(outcome["rows"])), int(str(outcome["distinct"]))
        results[name] = {
            **outcome,
            "lost": options.images - distinct,
            "double": rows - distinct,
            "same content and order": same,
        }
        print(name, json.dumps(results[name]))
    shutil.rmtree(root)
    if options.out:
        options.out.write_text(
            json.dumps({"stamp": stamp(torch.device("cpu")), "images": options.images, **results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
