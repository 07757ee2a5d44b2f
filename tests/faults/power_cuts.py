"""Power cuts at the calls of a run, of a start in its middle, and of a start after its end, which exports the model again.

After each cut, the newest whole checkpoint is at least the newest that was once safe, checkpoints that must stay are there, and
so are the log rows up to the checkpoint. Some of the disks are written and trained to the end.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from functools import lru_cache

from jobs import JOBS, Workshop
from power_loss import VARIANTS, Disk, Files, read_trace, write_files

from fastsd.run.checkpoint import name_of

STARTS = ("first start", "restart", "export")
RESUMED = 0.002  # share of the disks that are trained to the end, beside the last one of each start


def power_cuts(shop: Workshop, stride: int, rng: random.Random, names: Iterable[str] = JOBS) -> Iterator[str]:
    """Cut the power at every `stride`-th call. Yield "" for each disk that has lost nothing, otherwise the reason."""
    for name in names:
        for start in STARTS:
            for reason in _cuts(shop, name, start, stride, rng):
                yield reason and f"{name}, {start}: {reason}"


def _cuts(shop: Workshop, name: str, start: str, stride: int, rng: random.Random) -> Iterator[str]:
    before = {"restart": lambda: shop.killed(name), "export": lambda: shop.reference(name).copy}.get(start, lambda: None)()
    shop.restore(name, before)
    disk, trace = Disk(before, shop.run.name), shop.outside / "trace"
    outcome = shop.start(name, trace=trace)
    assert outcome.code == 0, outcome.text
    calls = read_trace(trace)
    trace.unlink()
    paths = [path for path in (*shop.run.glob("model*"), *shop.run.glob("model*/**/*")) if path.is_file()]
    exported = {path.relative_to(shop.run).as_posix(): path.read_bytes() for path in paths}
    logs = {name: (shop.run / name).read_bytes() for name in ("log.jsonl", "validation.jsonl") if (shop.run / name).exists()}

    safe, staying, phase = -1, set[int](), rng.randrange(stride)
    for number, call in enumerate(calls):
        disk.apply(call)
        if call.name == "fsync" and call.path == f"{shop.run.name}/checkpoints":  # a checkpoint is reported as saved
            safe = max(safe, *whole_checkpoints(disk.after_power_cut("kept", rng)))
        if number % stride != phase and number < len(calls) - 1:
            continue
        lost = disk.after_power_cut("lost", rng)
        whole = whole_checkpoints(lost)
        safe, staying = max(safe, *whole, -1), staying | {step for step, stays in whole.items() if stays}
        for variant in VARIANTS:
            files = lost if variant == "lost" else disk.after_power_cut(variant, rng)
            reason = _loss(files, safe, staying, logs)
            if not reason and (rng.random() < RESUMED or (number == len(calls) - 1 and variant == "lost")):
                shop.restore(name)
                write_files(files, shop.run)
                reason = shop.ends_equal(name)
            yield reason and f"call {number + 1} of {len(calls)}, {variant}: {reason}"
    missing = sorted(path for path in exported if lost.get(path) != exported[path])
    yield f"the exported {missing[0]} is not on the disk at the end" if missing else ""


def whole_checkpoints(files: Files) -> dict[int, bool]:
    """Return the steps of the checkpoints that match their manifest, and whether they must stay."""
    whole = {}
    for folder in {name.split("/")[1] for name in files if name.startswith("checkpoints/step-")}:
        path = f"checkpoints/{folder}/"
        try:
            manifest = json.loads(files[f"{path}manifest.json"])
            if all(sha256(files[path + name]) == digest for name, digest in manifest.items()):
                whole[int(folder.removeprefix("step-"))] = json.loads(files[f"{path}state.json"])["keep"]
        except (KeyError, ValueError):
            continue
    return whole


@lru_cache(4096)
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rows_until(log: bytes, step: int) -> list[bytes]:
    """Return the complete rows of a log up to a step."""
    rows = []
    for line in log.splitlines(keepends=True):
        try:
            rows += [line] if line.endswith(b"\n") and json.loads(line)["step"] <= step else []
        except (ValueError, TypeError, KeyError):
            continue
    return rows


def _loss(files: Files, safe: int, staying: set[int], logs: Files) -> str:
    """Return "" if a disk has lost nothing, otherwise the reason."""
    whole = whole_checkpoints(files)
    newest = max(whole, default=-1)
    if newest < safe:
        return f"the newest whole checkpoint is {newest}, but {safe} was safe"
    if missing := staying - whole.keys():
        return f"checkpoint {min(missing)}, which must stay, is gone or damaged"
    if halves := {name.split("/")[1] for name in files if name.startswith("checkpoints/step-")} - {
        name_of(step) for step in whole
    }:
        return f"{min(halves)} is half there"
    for name, log in logs.items():
        step = newest - (name == "validation.jsonl")  # a restart measures again what was due at the newest checkpoint
        if rows_until(files.get(name, b""), step) != rows_until(log, step):
            return f"rows of {name} up to checkpoint {newest} are lost"
    return ""
