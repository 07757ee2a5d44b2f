"""Checkpoints: complete, verified, and loadable by other tools as a diffusers folder.

    RUN/checkpoints/step-00001000/       a diffusers folder (unet, text_encoder, vae, tokenizer, scheduler), plus
        state.safetensors  state.json    the optimizer state, the progress of the run, and whether retention may delete it
        run.json                         the config
        copies.json  manifest.json       a second copy of the small files; sha256 of every file, written last

A checkpoint is written to a temporary folder, flushed and renamed, so it exists either completely or not at all. Weights
that have not changed are hard links to the previous checkpoint, and nothing else is shared. Old checkpoints
are deleted only after a new one is committed. Read next: `restore.py`, for files that are damaged.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsd import __version__
from fastsd.config.schema import ModelTable
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.adapters import ADAPTERS, MADE_BY, Averages, load_merged, write_adapters
from fastsd.model.formats.load import component_state_dict, write_component, write_rest
from fastsd.model.model import Model
from fastsd.run.restore import MANIFEST, WEIGHTS, read_manifest, read_small, restore, verify, write_manifest
from fastsd.storage import (
    TensorFile,
    copy_file,
    link_or_copy,
    make_folder,
    new_folder,
    remove_folder,
    remove_leftovers,
    replace_file,
    sha256_of,
    write_bytes,
    write_safetensors,
    write_text,
)

STATE, TENSORS, CONFIG = "state.json", "state.safetensors", "run.json"
ROLLBACK = "rollback.json"  # the fields of `RunProgress` that a rollback to a checkpoint has changed
_ROLLBACK_KEYS = ("images", "passed_over", "rolled_back_stage")
TRAINING_FILES = (STATE, TENSORS, CONFIG, ADAPTERS, MADE_BY)  # files of a checkpoint that a base model does not have
STATE_KEYS = {"micro_batch_size": "micro", "micro_batch_setting": "micro_asked"}  # fields whose key in state.json differs


@dataclass(frozen=True)
class RunProgress:
    """The progress of a run in its current stage and in total."""

    stage: int = 0  # index of the current stage
    stage_step: int = 0  # steps done in the stage
    step: int = 0  # steps done in the run
    images: int = 0  # position in the run's order of images: those trained on, and those passed over
    stage_images: int = 0  # the value of `images` at the stage's start
    stage_done: bool = False
    healthy: bool = True  # neither were steps being skipped, nor had the loss blown up (see `loss_health.py`)
    validation_due: bool = False  # whether a validation follows the step, after its checkpoint
    samples_due: bool = False  # the same for samples
    micro_batch_size: int = 0  # images per forward: chosen for `micro_batch_setting`, or reduced when memory ran out
    micro_batch_setting: int | str = 0  # `micro_batch` in the config
    seconds: float = 0.0  # time that the stage has run
    passed_over: int = 0  # images that a rollback has passed over (see `rollback.py`)
    rolled_back_stage: int = -1  # index of the stage of the last rollback
    base_key: str = ""  # of the base, if a stage has it as teacher (see `teacher.py`)
    carried: int = 0  # steps of earlier stages that passed on their optimizer state and EMA
    # Settings that were changed in the middle of a stage: {"step", "stage", "key", "before", "after"}
    changes: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, Any] = field(default_factory=dict)  # digests of log files, by name (see `report.py`)
    costs: list[dict[str, Any]] = field(default_factory=list)  # the complete stages, as in cost.json

    @property
    def first_averaged(self) -> int:
        """Steps of the run before the first stage whose averages the current stage continues."""
        return self.step - self.stage_step - self.carried


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """List the committed checkpoints in a folder, oldest first."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))


def save(
    folder: Path,
    progress: RunProgress,
    model: Model,
    weights: Mapping[str, Callable[[], Mapping[str, Tensor]]],
    changed: set[str],
    state: Mapping[str, Tensor],
    adapters: Averages | None = None,
    *,
    config: str = "{}",
    keep: bool = False,
) -> Path:
    """Commit a checkpoint and return its folder.

    Args:
        folder: RUN/checkpoints.
        weights: component name -> function that returns its exact fp32 weights by parameter name.
        changed: components that differ from the previous checkpoint. The weights of the others become hard links to its files.
        state: all other tensors: optimizer state, EMA weights and statistics of the loss.
        adapters: component name -> its exact adapters by parameter name, if the model has adapters.
        config: the run's config as JSON.
        keep: True if `retain` must never delete the checkpoint.

    Raises:
        OSError: the disk is full or the folder is not writable. Earlier checkpoints stay intact.
    """
    make_folder(folder)
    earlier = checkpoints(folder)
    earlier_manifest = (read_manifest(earlier[-1]) if earlier else None) or {}
    target = folder / name_of(progress.step)
    with new_folder(target) as new:
        manifest: dict[str, str] = {}
        for component in weights:
            names = {name for name in earlier_manifest if name.startswith(f"{component}/") and component not in changed}
            hashes = _take(earlier_manifest, names, earlier[-1], new) if names else None
            if hashes is None:
                state_dict = component_state_dict(model, component, weights[component]())
                hashes = write_component(new, model, component, state_dict)
            manifest |= hashes
        names = {name for name in earlier_manifest if name.split("/")[0] not in (*weights, *TRAINING_FILES)}
        hashes = _take(earlier_manifest, names, earlier[-1], new) if names else None
        manifest |= write_rest(new, model) if hashes is None else hashes
        if adapters is not None:
            manifest |= write_adapters(new, model, adapters)

        manifest[TENSORS] = write_safetensors(new / TENSORS, state)
        values = {STATE_KEYS.get(name, name): value for name, value in asdict(progress).items()}
        manifest[STATE] = write_text(new / STATE, json.dumps({"fastsd": __version__, "keep": keep, **values}, indent=2))
        manifest[CONFIG] = write_text(new / CONFIG, config)
        write_manifest(new, manifest)
    return target


def _take(manifest: dict[str, str], names: set[str], source: Path, target: Path) -> dict[str, str] | None:
    """Take files over from a checkpoint: weights as hard links, small files as copies. Return None if one cannot be read."""
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(WEIGHTS):
                link_or_copy(source / name, target / name)
            else:
                write_bytes(target / name, read_small(source, name, manifest[name]))
    except OSError:
        for name in names:
            (target / name).unlink(missing_ok=True)  # whoever wrote into a hard link would change the earlier checkpoint
        return None
    return {name: manifest[name] for name in names}


def retain(folder: Path, keep: int, names: set[str]) -> None:
    """Delete all checkpoints except the newest `keep`, the last healthy one, those saved with `keep=True`, those in `names`."""
    healthy = last_healthy(folder)
    for path in checkpoints(folder)[:-keep]:
        state = _read_table(path / STATE)
        # Nobody knows whether a checkpoint with a damaged state must stay, so it is not deleted.
        if state and not state.get("keep") and path != healthy and path.name not in names:
            remove_folder(path)


def last_healthy(folder: Path) -> Path | None:
    """Return the newest checkpoint that was healthy when it was saved, or None."""
    for path in reversed(checkpoints(folder)):
        state = _read_table(path / STATE)
        if state and state.get("healthy", True):
            return path
    return None


def _read_table(path: Path) -> dict[str, Any]:
    """Read the table in a JSON file. It is empty if the file is missing or damaged."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def read_progress(path: Path) -> RunProgress:
    """Read the progress of a run at an intact checkpoint."""
    values = json.loads((path / STATE).read_text())
    for other_key in ("fastsd", "keep"):
        values.pop(other_key, None)
    fields = {key: field for field, key in STATE_KEYS.items()}
    rollback = _read_table(path / ROLLBACK)
    if all(isinstance(rollback.get(key), int) for key in _ROLLBACK_KEYS):
        values |= {key: rollback[key] for key in _ROLLBACK_KEYS}
    return RunProgress(**{fields.get(key, key): value for key, value in values.items()})


def pass_over(path: Path, images: int, stage: int) -> RunProgress:
    """Record that a rollback in stage number `stage` to a checkpoint passes over `images` images. Return the new progress."""
    progress = read_progress(path)
    values = progress.images + images, progress.passed_over + images, stage
    replace_file(path / ROLLBACK, json.dumps(dict(zip(_ROLLBACK_KEYS, values, strict=True))))
    return read_progress(path)


def newest(folder: Path, base: ModelTable | None = None) -> tuple[Path, RunProgress, list[str]] | None:
    """Return the newest intact checkpoint, its progress and warnings, or None if the folder has no checkpoints.

    Damaged files of a checkpoint are restored if there is another copy of them. Later checkpoints, which cannot be restored,
    are renamed, so that nothing links to them. Each has a warning.

    Args:
        base: the model that the run started from.

    Raises:
        UserError: there are checkpoints, but all of them are damaged; or a copy exists, but cannot be written.
    """
    remove_leftovers(folder)
    checkpoint_paths, warnings = checkpoints(folder), list[str]()
    for i, path in reversed(list(enumerate(checkpoint_paths))):
        problem = verify(path)
        restored = [] if problem is None else _restore(path, base)
        if restored is not None:
            for damaged in checkpoint_paths[i + 1 :]:
                renamed_path = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(renamed_path, ignore_errors=True)
                try:
                    damaged.rename(renamed_path)
                except OSError as error:
                    reason = f"is damaged and cannot be renamed ({error.strerror})"
                    raise UserError("checkpoint-stuck", f"{damaged}: {reason}; delete it, and run again") from None
            return path, read_progress(path), warnings + restored
        warnings.append(f"checkpoint {path.name} is damaged ({problem}); using the previous one")
    if checkpoint_paths:
        raise UserError(
            "checkpoints-damaged",
            f"{folder}: all {len(checkpoint_paths)} checkpoints are damaged; start a new run with run=FOLDER",
        )
    return None


def open_checkpoint(path: Path, base: ModelTable | None = None) -> tuple[Path, RunProgress, list[str]]:
    """Return what `newest` returns for one checkpoint, which need not be the newest.

    Raises:
        UserError: it is damaged.
    """
    problem = verify(path)
    restored = [] if problem is None else _restore(path, base)
    if restored is None:
        raise UserError("named-checkpoint-damaged", f"{path} is damaged ({problem}); go back to another checkpoint")
    return path, read_progress(path), restored


def _restore(path: Path, base: ModelTable | None) -> list[str] | None:
    run = path.parent.parent
    others = [*sorted(path.parent.glob("*step-*"), reverse=True), *run.glob("set-aside-*/checkpoints/step-*")]
    others += run.glob("model*")
    return restore(path, others, partial(_write_base, base))


def _write_base(table: ModelTable | None, folder: Path, names: Collection[str]) -> str:
    """Write those components and small files of the base model that occur in `names`. Return the model's name.

    A checkpoint has the same bytes, unless the run has changed them.
    """
    if table is None or any(name in TRAINING_FILES for name in names):
        return ""
    try:
        model = load_merged(table)
    except (UserError, OSError):
        return ""
    components = {name.split("/")[0] for name in names}
    for component in components & {*COMPONENTS}:
        write_component(folder, model, component, component_state_dict(model, component))
    if components - {*COMPONENTS}:
        folder.mkdir(exist_ok=True)
        write_rest(folder, model)
    return f"the base model {table.base}"


def load_state(path: Path) -> TensorFile:
    """Open the state tensors of a checkpoint. They are read lazily, because they can be twice the size of the model."""
    return TensorFile(path / TENSORS)


def averages_of(path: Path) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Return the averages in a checkpoint, the shortest first.

    They are by name, for example "ema-0.05", and then component name -> tensors by parameter name, views of the mapped file.
    """
    state = load_state(path) if (path / TENSORS).exists() else {}  # a model folder without a run has no state file
    averages = by_average(state)
    return {name: averages[name] for name in sorted(averages, key=lambda name: float(name.partition("-")[2] or 0))}


def by_average(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Group tensors with names such as "unet@ema-0.05/conv_in.weight" by average and component. Others are ignored."""
    averages = dict[str, dict[str, dict[str, Tensor]]]()
    for name in tensors:
        component, _, rest = name.partition("@")
        average, _, parameter = rest.partition("/")
        if parameter:
            averages.setdefault(average, {}).setdefault(component, {})[parameter] = tensors[name]
    return averages


def shortest_average(path: Path) -> dict[str, dict[str, Tensor]]:
    """Return the average in a checkpoint that commands take where they take one. It is empty if there is none."""
    return next(iter(averages_of(path).values()), {})


def export(checkpoint: Path, target: Path, model: Model, averages: Averages, finish: Callable[[Path], None]) -> None:
    """Write a checkpoint's model as a separate diffusers folder, without training state and with adapters merged.

    Files that are the same as in the checkpoint are copied: whatever edits the model cannot damage the checkpoint.

    Args:
        averages: component name -> tensors by parameter name that replace those of the checkpoint.
        finish: called with the temporary folder, to write more files into it before it is renamed to `target`.

    Raises:
        OSError: the disk is full, the folder is not writable, or a file of the checkpoint is damaged; a start may restore it.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise OSError(errno.EIO, f"{checkpoint / MANIFEST} is damaged")
    merged = model if model.lora is None else load_merged(ModelTable(base=str(checkpoint)), averages=averages)
    adapted = () if model.lora is None else COMPONENTS[: 1 + model.lora.text_encoder]
    written = {*averages, *adapted}
    copied_files = [name for name in manifest if name not in TRAINING_FILES and name.split("/")[0] not in written]
    with new_folder(target) as new:
        for name in copied_files:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(checkpoint / name, new / name)
            if sha256_of(new / name) != manifest[name]:
                raise OSError(errno.EIO, f"{checkpoint / name} is damaged")
        for component in written:
            tensors = averages.get(component) if model.lora is None else None
            write_component(new, merged, component, component_state_dict(merged, component, tensors))
        finish(new)
