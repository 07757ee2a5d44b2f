"""Fill one cache by several machines that share no locks, kill one of them, and compare the result with that of one machine.

    python bench/cache_machines.py [--images 2000] [--out FILE]
    python bench/cache_machines.py --kills 10 --seeds 5 --images 400 [--cases processes machines] [--out FILE]

Machines are processes with names of their own. In each, every lock and every SQLite database of the cache fails that is not
in the machine's own folder. The encoder is a stub with a delay, so figures are counts, not speeds.

    two        2 machines
    killed     4 machines, one of them killed by SIGKILL at a random moment

`--kills N` kills one of 4 processes of one machine, and one of 2 machines, N times each, at moments from their start to the end
of the cache. The others must end with the content that one process makes. If the last one was killed, it is started again.
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
from collections.abc import Iterator
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
from fastsd.errors import UserError

LOST_SECONDS = 1.0  # of the kills, so that others wait less. A machine that is taken for lost too early costs work only.
SHAPES = {"processes": [""] * 4, "machines": ["a", "b"]}  # of the kills: names of the machines of each process


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


def work(root: str, name: str, delay: float, lost_seconds: float) -> None:
    torch.set_num_threads(1)
    beats.BEAT_SECONDS, beats.LOST_SECONDS = lost_seconds / 20, lost_seconds
    if name:
        refuse_foreign_locks(root, name)
    settings, vae = config(Path(root), batch=16), StubVae(delay=delay)
    with joined(Path(settings.cache.dir), name, view_name(settings, vae.hash), print) as division:
        build_cache(settings, vae, division=division)
        division.finish()
    Path(root, f"{name or os.getpid()}.json").write_text(json.dumps(vae.encoded))


def content(root: Path) -> tuple[dict[str, str], list[list[str]], torch.Tensor]:
    latents = LatentCache.open(root / "cache")
    samples = range(len(latents))
    return latents.content_hashes(), latents.variants(samples), latents.get(samples)["latents"]


def case(root: Path, names: str, killed: str, seed: int) -> dict[str, object]:
    """Fill a cache by machines, and kill one of them after its first shard."""
    context = multiprocessing.get_context("spawn")
    processes = {name: context.Process(target=work, args=(str(root), name, 0.05, 10.0)) for name in names}
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
    rows, distinct = counted_rows(root)
    encoded = {path.stem: json.loads(path.read_text()) for path in sorted(root.glob("?.json"))}
    damaged, orphans = len(verify(root / "cache")), prune(root / "cache").shards
    outcome = {"rows": rows, "distinct": distinct, "damaged": damaged, "shards of the killed machine deleted": orphans}
    return {"machines": len(names), "killed": killed, "shards when killed": after, "encoded": encoded, **outcome}


def counted_rows(root: Path) -> tuple[int, int]:
    """Return the number of latents in the cache, and of different ones."""
    with Store.open(root / "cache") as store:
        rows, distinct = store.db.execute("SELECT COUNT(*), COUNT(DISTINCT content) FROM latent").fetchone()
    return int(rows), int(distinct)


def remove_cache(root: Path) -> None:
    shutil.rmtree(root / "cache")
    for path in root.glob("*.json"):
        path.unlink()


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return first[:2] == second[:2] and torch.equal(first[2], second[2])


def killed_once(root: Path, names: list[str], victim: int, moment: float) -> tuple[bool, bool, float]:
    """Fill a cache by processes with the names of their machines, of which one is killed after `moment` seconds.

    Returns:
        (killed before it had ended, had to be started again, seconds until all had ended).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem])  # so that a start takes no seconds
    processes = [context.Process(target=work, args=(str(root), name, 0.05, LOST_SECONDS)) for name in names]
    started = time.monotonic()
    for process in processes:
        process.start()
    processes[victim].join(moment)
    killed = processes[victim].is_alive()
    processes[victim].kill()
    for process in processes:
        process.join()
    seconds = time.monotonic() - started
    failed = [process.exitcode for i, process in enumerate(processes) if process.exitcode and (i != victim or not killed)]
    assert not failed, failed
    try:
        LatentCache.open(root / "cache")
    except UserError:  # no process was left to make the last step
        again = context.Process(target=work, args=(str(root), names[victim], 0.0, LOST_SECONDS))
        again.start()
        again.join()
        return killed, True, seconds
    return killed, False, seconds


def kill_many(
    root: Path, expected: tuple[Any, ...], images: int, kills: int, seed: int, cases: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kill processes until there were so many kills of each case."""
    beats.LOST_SECONDS = LOST_SECONDS  # deleting orphans waits for machines that do not say that they have ended
    for case_name in cases:
        names = SHAPES[case_name]
        for _ in range(2):  # the first start imports PyTorch
            remove_cache(root)
            *_, duration = killed_once(root, names, 0, 600)
        generator, counts = random.Random(seed), {"kills": 0, "started again": 0, "lost": 0, "double": 0, "damaged": 0}
        counts |= {"other content": 0, "orphan shards deleted": 0}
        moments: list[float] = []
        while len(moments) < kills:
            remove_cache(root)
            moment = generator.uniform(0, duration)
            killed, again, _ = killed_once(root, names, generator.randrange(len(names)), moment)
            if killed:
                rows, distinct = counted_rows(root)
                moments.append(round(moment, 2))
                counts["kills"] += 1
                counts["started again"] += again
                counts["lost"] += images - distinct
                counts["double"] += rows - distinct
                counts["damaged"] += len(verify(root / "cache"))
                counts["other content"] += not same(content(root), expected)
                counts["orphan shards deleted"] += prune(root / "cache").shards
                assert not verify(root / "cache") and same(content(root), expected)
        yield (
            f"{len(names)} {case_name}, seed {seed}",
            {**counts, "lost after": LOST_SECONDS, "seconds without a kill": round(duration, 1), "moments": sorted(moments)},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="so many times the kills, with seeds from --seed on")
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    for i in range(options.images):
        draw(root / f"images/{i:05}.png", i, f"picture {i}")
    build_cache(config(root, batch=16), StubVae())
    expected = content(root)
    results: dict[str, object] = {}
    for seed in range(options.seed, options.seed + options.seeds) if options.kills else ():
        for case_name, counts in kill_many(root, expected, options.images, options.kills, seed, options.cases):
            results[case_name] = counts
            print(case_name, json.dumps(counts), flush=True)
            write(options.out, options.images, results)
    for name, machines, killed in (("two", "ab", ""), ("killed", "abcd", "c")) if not options.kills else ():
        remove_cache(root)
        outcome = case(root, machines, killed, options.seed)
        rows, distinct = int(str(outcome["rows"])), int(str(outcome["distinct"]))
        results[name] = {
            **outcome,
            "lost": options.images - distinct,
            "double": rows - distinct,
            "same content and order": same(content(root), expected),
        }
        print(name, json.dumps(results[name]))
    shutil.rmtree(root)
    write(options.out, options.images, results)


def write(path: Path | None, images: int, results: dict[str, object]) -> None:
    """Write the results so far, if there is a path."""
    if path:
        path.write_text(json.dumps({"stamp": stamp(torch.device("cpu")), "images": images, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
