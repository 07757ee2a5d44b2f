"""Restarting a run: a lock for one trainer per folder, and checks of what changed since the last start."""

from __future__ import annotations

import json
import os
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, TextIO

from fastsd.config.schema import Config, dump_config, parse_config
from fastsd.data.cache import LatentCache
from fastsd.data.masks import mask_hash
from fastsd.errors import UserError
from fastsd.run.checkpoint import RunProgress
from fastsd.storage import replace_file

# Changing one of these settings would turn the rest of the run into a different run.
FIXED = ("model", "data", "seed", "validate.held_out", "validate.seed", "validate.by")
FIXED_IN_STAGE = ("train", "state", "reinit", "batch", "optimizer", "d0", "betas", "decoupled_weight_decay")


def lock(folder: Path) -> TextIO:
    """Hold RUN/lock while the returned file object exists. Two trainers in one folder would corrupt each other's logs."""
    file = open(folder / "lock", "a")  # noqa: SIM115 - held open on purpose
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            "run-locked", f"run is {str(folder)!r}, in which another fastsd is training; wait for it or name another"
        ) from None
    return file


def compare_with_start(path: Path, config: Config, progress: RunProgress | None) -> list[str]:
    """Raise UserError for changes that would break the run. Return notes on other changes since the last start."""
    if progress is None or not path.exists():
        return []
    # Parsed as a config, so that keys added since then get their defaults.
    old = json.loads(dump_config(parse_config(json.loads(path.read_text(encoding="utf-8")), str(path))))
    new = json.loads(dump_config(config))
    advice = "put it back, or start a new run with run=FOLDER"
    for place in FIXED:
        was, now = (reduce(getitem, place.split("."), config) for config in (old, new))
        if was != now:
            raise UserError(
                "run-other-start", f"{path.parent} was started with another {_difference(place, was, now)}; {advice}"
            )
    notes = []
    current_stage = progress.stage
    for i, (was, now) in enumerate(zip(old["stage"], new["stage"], strict=False)):
        for key in was:
            if was[key] != now[key]:
                difference = _difference(f"stage.{i}.{key}", was[key], now[key])
                if i < current_stage or (i == current_stage and key in FIXED_IN_STAGE and progress.stage_step):
                    raise UserError("run-other-stage", f"{path.parent} has already trained with another {difference}; {advice}")
                notes.append(f"changed since the last start: {difference}")
    if len(new["stage"]) <= current_stage:
        raise UserError(
            "run-fewer-stages",
            f"{path.parent} is in stage {current_stage + 1} and the config has {len(new['stage'])}; {advice}",
        )
    return notes


def compare_images(path: Path, latents: LatentCache, resumed: bool) -> list[str]:
    """Record the state of the cache that a run depends on. Return notes on what changed since the last start."""
    now = {"samples": len(latents), "view": latents.sha256, "weights": latents.weight_hash, "masks": mask_hash(latents)}
    was = now | json.loads(path.read_text(encoding="utf-8")) if resumed and path.exists() else now
    replace_file(path, json.dumps(now))
    if was["samples"] != now["samples"]:
        changed = f"the cache had {was['samples']} images at the last start and has {now['samples']}"
        return [f"{changed}: from here on the order is another"]
    changed_keys = sorted(key for key in now if was[key] != now[key])
    if not changed_keys:
        return []
    description = "captions or images" if "view" in changed_keys else " and ".join(changed_keys)
    return [f"{description} have changed in the cache since the last start"]


def _difference(place: str, was: Any, now: Any) -> str:
    if isinstance(was, dict):
        key = next(key for key in was if was[key] != now.get(key))
        return _difference(f"{place}.{key}", was[key], now.get(key))
    return f"{place}: {was!r}, now {now!r}"
