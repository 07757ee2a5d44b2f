"""Restart of a run: a lock that admits one trainer per folder, and checks for changes since the last start."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from fastsd.config.keys import Key, keys_with
from fastsd.config.schema import Config, StageTable, dump_config, parse_config
from fastsd.config.stages import ENDLESS, parse_amount
from fastsd.data.cache import LatentCache
from fastsd.data.masks import mask_hash
from fastsd.errors import UserError
from fastsd.run import checkpoint
from fastsd.run.checkpoint import RunProgress
from fastsd.run.folder import read_table
from fastsd.run.position import Position
from fastsd.run.teacher import check_teachers
from fastsd.storage import TEMPORARY, replace_file
from fastsd.train.ranks import Ranks

# Changing one of these settings would turn the rest of the run into a different run.
SPLITS = ("data", "validate.held_out", "validate.seed", "validate.by")  # the settings that validation images depend on
FIXED = ("model", "seed", *SPLITS)


def lock(folder: Path) -> AbstractContextManager[object]:
    """Lock RUN/lock until the context exits or the process ends. Two trainers in one folder would corrupt each other's logs."""
    try:
        return FileLock(folder / "lock", fallback_to_soft=False).acquire(blocking=False)
    except Timeout:
        raise UserError(
            "run-locked", f"run is {str(folder)!r}, which another fastsd is training; wait for it or choose another folder"
        ) from None
    except OSError as error:
        advice = "choose a folder that is writable and on a file system with locks"
        raise UserError(
            "run-not-lockable", f"run is {str(folder)!r}, which cannot be locked ({error.strerror}); {advice}"
        ) from None


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise UserError if a run's folder is not the same for all ranks. Rank 0 has made and locked it."""
    if ranks.world == 1:
        return
    mark = folder / ranks.text(f"{TEMPORARY}start-{time.time_ns()}")  # a new name: network disks remember missing ones
    if ranks.main:
        for earlier in folder.glob(f"{TEMPORARY}start-*"):
            earlier.unlink(missing_ok=True)
        mark.touch()
    ranks.wait()
    hosts = ranks.gathered(b"" if mark.exists() else platform.node().encode())
    if ranks.main:
        mark.unlink(missing_ok=True)
    for rank, host in enumerate(hosts):
        if host:
            raise UserError(
                "ranks-not-shared",
                f"run is {str(folder)!r}, which rank {rank} on {host.decode()} does not have in common with rank 0; choose a "
                "folder on a file system that all machines share",
            )


def compare_with_start(
    path: Path, config: Config, progress: RunProgress | None, newest: Path | None = None, *, back: bool = False
) -> list[str]:
    """Raise UserError for changes that would break the run. Return warnings about other changes since the last start.

    Args:
        path: RUN/config.json, which the last start wrote. If it is damaged, the config in the checkpoint takes its place.
        newest: the checkpoint that the run resumes from.
        back: True if the run goes back to it. Then its config counts, and what was changed later does not.
    """
    if progress is None:
        return []
    saved = read_config(newest / checkpoint.CONFIG) if newest else None
    warnings, start = list[str](), saved if back and saved else read_config(path)
    if start is None:
        start = saved
        source = "the checkpoint's copy is used" if start else "changes of settings since the last start are not noticed"
        warnings.append(f"{path} is missing or damaged; {source}")
        if start is None:
            return warnings
    start, moved = _at_places_of(config, start)
    warnings += [f"{change} since the run was started, and the run goes on from its checkpoint" for change in moved]
    old, new = (json.loads(dump_config(table)) for table in (start, config))
    new_run = "undo the change, or start a new run with run=FOLDER"
    for key in FIXED:
        before, after = _value(start, key), _value(config, key)
        if before != after:
            change = _describe_change(key, before, after)
            raise UserError("run-other-start", f"{path.parent}: {change} since the run was started; {new_run}")

    current_stage, fixed_keys = progress.stage, keys_with(StageTable, Key.FIXED)
    # A complete stage can have another name. Its length is compared in `compare_with_end`.
    lasting_keys = {*StageTable.model_fields} - {*keys_with(StageTable, Key.NO_EFFECT), "name", "until"}
    names = [config.stage_name(i) for i in range(len(config.stage))]
    for i, name in enumerate(map(start.stage_name, range(min(len(start.stage), current_stage + 1)))):
        if name in names and names.index(name) != i:
            advice = _advice("put new stages behind it", path.parent, i)
            place = f"stage {name!r} is number {i + 1} of the run and {names.index(name) + 1} of the config"
            raise UserError("run-stage-moved", f"{path.parent}: {place}; {advice}")
    for i, (old_stage, new_stage) in enumerate(zip(old["stage"], new["stage"], strict=False)):
        for key in old_stage:
            if old_stage[key] != new_stage[key]:
                change = _describe_change(f"stage.{i}.{key}", old_stage[key], new_stage[key])
                is_complete = i < current_stage or (progress.stage_done and i < len(new["stage"]) - 1 and key in lasting_keys)
                if i <= current_stage and (is_complete or (i == current_stage and key in fixed_keys and progress.stage_step)):
                    stage = None if key in fixed_keys else config.stage[i]
                    advice = _advice("undo the change", path.parent, i, stage)
                    raise UserError("run-other-stage", f"{path.parent}: {change} after training had begun; {advice}")
                warnings.append(f"{change} since the last start")
    if len(new["stage"]) <= current_stage:
        advice = _advice("undo the change", path.parent, len(new["stage"]))
        raise UserError(
            "run-fewer-stages",
            f"{path.parent}: the run is in stage {current_stage + 1}, but the config has only {len(new['stage'])}; {advice}",
        )
    return warnings


def compare_with_end(folder: Path, config: Config, position: Position, newest: Path | None) -> None:
    """Raise UserError if the run is beyond the end that the config gives to its current stage, or cannot get there.

    A complete stage that is to go on needs its teacher, as `check_teachers` says.

    Args:
        newest: the checkpoint that the run resumes from.
    """
    progress, index = position.progress, position.progress.stage
    stage, saved = config.stage[index], read_config(newest / checkpoint.CONFIG) if newest else None
    unchanged = saved is None or parse_amount("until", saved.stage[index].until) == parse_amount("until", stage.until)
    if not progress.stage_step or (progress.stage_done and unchanged):
        return
    name, until = config.stage_name(index), f"until is {stage.until!r}"
    if not _is_before_end(progress, stage, position.steps[index]):
        length = f"{progress.stage_step} steps" if stage.seconds is None else f"{math.ceil(progress.seconds)} seconds"
        until += f", {position.steps[index]} steps" if parse_amount("until", stage.until)[1] in ("epochs", "images") else ""
        advice = _advice(f'set it to at least "{length}"', folder, index, stage, position.steps[index], complete=True)
        raise UserError("stage-beyond-end", f"{folder}: stage {name!r} has trained {length}, but {until}; {advice}")
    if progress.stage_done and not position.at_end(index) and not position.extendable:
        reason = "is complete, and only a last stage that kept its optimizer state can go on"
        advice = _advice("undo the change", folder, index, stage, position.steps[index])
        raise UserError("stage-complete", f"{folder}: stage {name!r} {reason}, but {until}; {advice}")
    if progress.stage_done and not position.finished(index):
        check_teachers(config, index)  # the complete stage goes on, and needs its teacher again


def _advice(
    change: str, folder: Path, index: int, stage: StageTable | None = None, steps: int = ENDLESS, *, complete: bool = False
) -> str:
    """Return what the user can do: change a setting, or go back to the newest checkpoint before stage number `index`.

    Args:
        stage: if it is given, checkpoints in the middle of the stage are as good, up to its new end.
        steps: number of steps of the stage.
        complete: True if they may also be at the stage's end, from which it can go on.
    """
    for path in reversed(checkpoint.checkpoints(folder / "checkpoints")):
        with suppress(OSError, ValueError, TypeError):
            earlier = checkpoint.read_progress(path)
            is_inside = stage and earlier.stage == index and (complete or not earlier.stage_done)
            if earlier.stage < index or (stage and is_inside and _is_before_end(earlier, stage, steps)):
                return f"{change}, or go back with `fastsd train CONFIG --from {path.name}`"
    return f"{change}, or start a new run with run=FOLDER"


def _is_before_end(progress: RunProgress, stage: StageTable, steps: int) -> bool:
    return (
        progress.stage_step <= min(steps, stage.steps(ENDLESS)) if stage.seconds is None else progress.seconds <= stage.seconds
    )


def read_config(path: Path) -> Config | None:
    """Read a config as JSON. Keys which an older version did not write get their defaults. Return None if it is damaged."""
    table = read_table(path)
    with suppress(UserError):
        return parse_config(table, str(path)) if table is not None else None
    return None


def compare_images(path: Path, latents: LatentCache, config: Config, *, resumed: bool) -> list[str]:
    """Record the state of the cache that a run depends on. Return warnings about changes since the last start.

    Args:
        path: RUN/images.json. Beside it lies the config of the last start.

    Raises:
        UserError: the data are in other folders than at the last start, and their images or captions differ.
    """
    after = {"samples": len(latents), "view": latents.sha256, "weights": latents.weight_hash, "masks": mask_hash(latents)}
    after |= latents.content_hashes()
    recorded = read_table(path) if resumed else None
    before = after | (recorded or {})
    # An older version has recorded only the hash of the view.
    contents = (
        {"captions": "captions", "latents": "latents"} if "captions" in (recorded or after) else {"view": "captions or images"}
    )
    contents |= {"weights": "weights", "masks": "masks"}
    changed = [name for key, name in contents.items() if before[key] != after[key]]

    start = read_config(path.with_name("config.json")) if resumed and changed and changed[0].startswith("captions") else None
    if start and not _has_folders(config, start):
        old, new = ([root.path for root in table.data.roots] for table in (start, config))
        problem = f"{path.parent}: {_describe_change('data.folders', old, new)} since the run was started"
        advice = "undo the change, or start a new run with run=FOLDER"
        raise UserError("run-other-images", f"{problem}, and their images or captions differ; {advice}")
    replace_file(path, json.dumps(after))
    if recorded is None:
        lost = f"{path} is missing or damaged; changes of the cache since the last start are not noticed"
        return [lost] if resumed else []
    if before["samples"] != after["samples"]:
        counts = f"{before['samples']} to {after['samples']} images"
        return [f"the cache changed from {counts} since the last start; the order of images differs from here on"]
    if not changed:
        return []
    description = ", ".join(changed[:-1]) + " and " * (len(changed) > 1) + changed[-1]
    return [f"{description} in the cache have changed since the last start"]


def _at_places_of(config: Config, before: Config) -> tuple[Config, list[str]]:
    """Return an earlier config of a run with the paths of `config`, and descriptions of the paths of models that were moved.

    A run depends neither on how a path is written nor on where files lie: a checkpoint is a complete model, and
    `compare_images` compares the data. A model at another place that is not the old one moved keeps its old path.
    """
    lora, new_lora = before.model.lora, config.model.lora
    tables = (before.model, config.model)
    paths = {f"model.{key}": tuple(getattr(table, key) for table in tables) for key in ("base", "vae", "tokenizer")}
    if lora and new_lora:
        paths["model.lora.file"] = (lora.file, new_lora.file)
    moved = {key for key, (old, new) in paths.items() if old and os.path.exists(new) and not os.path.exists(old)}
    models = {key: new if key in moved or _is_same_place(old, new) else old for key, (old, new) in paths.items()}
    if lora and new_lora:
        lora = lora.model_copy(update={"file": models.pop("model.lora.file")})
    model = before.model.model_copy(update={key.removeprefix("model."): path for key, path in models.items()} | {"lora": lora})

    data, roots = before.data, before.data.roots
    if len(roots) == len(config.data.roots):
        folders = [old.model_copy(update={"path": new.path}) for old, new in zip(roots, config.data.roots, strict=True)]
        data = data.model_copy(update={"folders": config.data.folders if folders == config.data.roots else folders})
    changes = [_describe_change(key, *paths[key]) for key in sorted(moved)]
    return before.model_copy(update={"model": model, "data": data}), changes


def _has_folders(config: Config, other: Config) -> bool:
    """Return True if both configs name the same folders of data, however they are written."""
    old, new = ([root.path for root in table.data.roots] for table in (other, config))
    return len(old) == len(new) and all(map(_is_same_place, old, new))


def _is_same_place(old: str, new: str) -> bool:
    if old == new or "" in (old, new):
        return old == new
    with suppress(OSError):
        return os.path.abspath(old) == os.path.abspath(new) or os.path.samefile(old, new)
    return False


def changes_of(saved: Config | None, config: Config, progress: RunProgress) -> list[dict[str, Any]]:
    """List the settings of a checkpoint's stage with which its later steps will differ, as in `RunProgress.changes`."""
    if saved is None or not progress.stage_step:
        return []
    old, new = ({"cache.dtype": table.cache.dtype, **_settings(table.stage[progress.stage])} for table in (saved, config))
    if old["until"] is None or new["until"] is None:
        old["until"] = new["until"]
    changes = [{"key": key, "before": old[key], "after": new[key]} for key in new if old[key] != new[key]]
    return [{"step": progress.step, "stage": progress.stage, **change} for change in changes]


def trains_alike(before: StageTable, after: StageTable) -> bool:
    """Return True if a stage trains the same steps with either settings, as far as the shorter one goes."""
    (length, unit), (new_length, new_unit) = (parse_amount("until", stage.until) for stage in (before, after))
    return _settings(before) == _settings(after) and unit == new_unit and length <= new_length


def _settings(stage: StageTable) -> dict[str, Any]:
    """Return the settings that the steps of a stage depend on. Its length matters only if the learning rate follows it."""
    ignored = {*keys_with(StageTable, Key.NO_EFFECT), "name"}
    if stage.schedule == "constant" and not 0 < stage.warmup < 1:
        ignored.add("until")
    return {"until": None} | stage.model_dump(exclude=ignored) | {"lr": stage.lr or stage.rate_of("")}


def saved_splits(config: Config, *paths: Path) -> Mapping[str, Tensor]:
    """Open the state of a checkpoint whose run has the data and validation images of a config, or return {}.

    Args:
        paths: checkpoints, or other models, that are tried before those of the config's run.
    """
    for path in (*paths, *reversed(checkpoint.checkpoints(Path(config.run) / "checkpoints"))):
        saved = read_config(path / checkpoint.CONFIG)
        if not saved or not _has_folders(config, saved):
            continue
        saved, _ = _at_places_of(config, saved)
        if all(_value(saved, key) == _value(config, key) for key in SPLITS):
            with suppress(UserError):  # the file is missing or damaged
                return checkpoint.load_state(path)
    return {}


def _value(config: Config, key: str) -> Any:
    return reduce(getitem, key.split("."), config.model_dump(by_alias=True))


def _describe_change(key: str, before: Any, after: Any) -> str:
    if isinstance(before, dict):
        changed_key = next(name for name in before if before[name] != after.get(name))
        return _describe_change(f"{key}.{changed_key}", before[changed_key], after.get(changed_key))
    return f"{key} changed from {before!r} to {after!r}"
