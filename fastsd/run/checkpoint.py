"""Checkpoints - whole, verified, and loadable by every tool.

    RUN/checkpoints/step-00001000/       a diffusers folder (unet, text_encoder, vae, tokenizer, scheduler) ...
        state.safetensors  state.json    ... with the optimizers' state and where the run stands beside it
        manifest.json                    sha256 of every file, written last

A checkpoint appears by a rename after everything in it was flushed, so it is there whole or not at all. Files that did
not change since the last one are hard links to it. Retention runs only after a commit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fastsd import __version__
from fastsd.config.schema import ModelTable
from fastsd.config.stages import PARTS
from fastsd.errors import UserError
from fastsd.model.formats.adapters import ADAPTERS, MADE_BY, Averages, load_merged, write_adapters
from fastsd.model.formats.load import part_state_dict, write_part, write_rest
from fastsd.model.model import Model
from fastsd.storage import (
    TensorFile,
    link_or_copy,
    new_folder,
    remove_leftovers,
    sha256_of,
    write_safetensors,
    write_text,
)  # fmt: skip

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "state.safetensors"
OWN = (STATE, TENSORS, ADAPTERS, MADE_BY)  # what is no part of the base model in a checkpoint


@dataclass(frozen=True)
class Progress:
    """Where a run stands: stage number, steps done in it, steps and images done in all, images at the stage's start.

    `micro` is the images a forward of this stage, found for `micro_asked` or fallen to when memory ran out.  `seconds`: how
    long the stage has run.  `carried`: steps of stages before it whose optimizer state and average go on in it.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    images: int = 0
    stage_images: int = 0
    stage_done: bool = False
    micro: int = 0
    micro_asked: int | str = 0
    seconds: float = 0.0
    carried: int = 0


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def save(
    folder: Path,
    progress: Progress,
    model: Model,
    weights: Mapping[str, Callable[[], Mapping[str, Tensor]]],
    changed: set[str],
    state: Mapping[str, Tensor],
    adapters: Averages | None = None,
) -> Path:
    """Commit a checkpoint and return its folder.

    Args:
        folder: RUN/checkpoints.
        weights: part name -> gives its exact fp32 weights by parameter name.
        changed: parts that differ from the last checkpoint's; the others' files are linked from it.
        state: all other tensors (optimizers, smoothed loss).
        adapters: part -> its exact adapters by parameter name, of a model that has some.

    Raises:
        OSError: the disk is full or the folder cannot be written; the older checkpoints stand as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = checkpoints(folder)
    last = _manifest(earlier[-1]) if earlier else None
    target = folder / name_of(progress.step)
    with new_folder(target) as new:
        manifest: dict[str, str] = {}
        for part in weights:
            if last and part not in changed:
                manifest.update(_link(last, earlier[-1], new, {name for name in last if name.startswith(f"{part}/")}))
            else:
                manifest.update(write_part(new, model, part, part_state_dict(model, part, weights[part]())))
        if last:
            other = {name for name in last if name.split("/")[0] not in (*weights, *OWN)}
            manifest.update(_link(last, earlier[-1], new, other))
        else:
            manifest.update(write_rest(new, model))
        if adapters is not None:
            manifest |= write_adapters(new, model, adapters)
        manifest[TENSORS] = write_safetensors(new / TENSORS, state)
        manifest[STATE] = write_text(new / STATE, json.dumps({"fastsd": __version__, **asdict(progress)}, indent=2))
        write_text(new / MANIFEST, json.dumps(manifest, indent=2, sort_keys=True))
    return target


def _link(manifest: dict[str, str], source: Path, target: Path, names: set[str]) -> dict[str, str]:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source / name, target / name)
    return {name: manifest[name] for name in names}


def retain(folder: Path, keep: int, also: set[str]) -> None:
    """Delete all but the newest `keep` checkpoints and those named in `also`."""
    for path in checkpoints(folder)[:-keep]:
        if path.name not in also:
            shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, Progress] | None:
    """The newest checkpoint whose manifest holds, or None if there never was one.

    Says so when it must fall back; a damaged one is renamed, so that nothing is linked to it.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    remove_leftovers(folder)
    found = checkpoints(folder)
    for i, path in reversed(list(enumerate(found))):
        problem = verify(path)
        if problem is None:
            for damaged in found[i + 1 :]:
                aside = damaged.with_name(f"damaged-{damaged.name}")
                shutil.rmtree(aside, ignore_errors=True)
                damaged.rename(aside)
            values = json.loads((path / STATE).read_text())
            values.pop("fastsd")
            return path, Progress(**values)
        say(f"checkpoint {path.name} is damaged ({problem}); falling back to the one before it")
    if found:
        raise UserError(f"{folder}: none of its {len(found)} checkpoints is whole; start a new run with run=FOLDER")
    return None


def verify(path: Path) -> str | None:
    """None if every file of a checkpoint is as its manifest says, else what is wrong."""
    manifest = _manifest(path)
    if manifest is None:
        return f"no readable {MANIFEST}"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != digest:
            return f"{name} has another sha256 than its manifest says"
    return None


def _manifest(path: Path) -> dict[str, str] | None:
    try:
        return json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def load_state(path: Path) -> TensorFile:
    """The state tensors of a checkpoint, each read when asked for: they can be twice the size of the model."""
    return TensorFile(path / TENSORS)


def averages_of(path: Path) -> dict[str, dict[str, Tensor]]:
    """The averaged weights in a checkpoint: part -> tensors by parameter name, each a view of the mapped file."""
    found = dict[str, dict[str, Tensor]]()
    state = load_state(path) if (path / TENSORS).exists() else {}  # a model without a run has none
    for name in state:
        part, _, parameter = name.partition("@ema/")
        if parameter:
            found.setdefault(part, {})[parameter] = state[name]
    return found


def export(checkpoint: Path, target: Path, model: Model, averages: Averages, finish: Callable[[Path], None]) -> None:
    """A checkpoint's model without its training state, as a diffusers folder of its own, with adapters merged into its weights.

    What is as in the checkpoint is a hard link.

    Args:
        averages: part name -> tensors by parameter name that take the place of the checkpoint's.
        finish: writes what else belongs into the folder, before it appears.
    """
    manifest = _manifest(checkpoint)
    assert manifest is not None, checkpoint
    merged = model if model.lora is None else load_merged(ModelTable(base=str(checkpoint)), averages=averages)
    adapted = PARTS[: 0 if model.lora is None else 1 + model.lora.text_encoder]
    written = {*averages, *adapted}
    with new_folder(target) as new:
        _link(manifest, checkpoint, new, {name for name in manifest.keys() - set(OWN) if name.split("/")[0] not in written})
        for part in written:
            tensors = averages.get(part) if model.lora is None else None
            write_part(new, merged, part, part_state_dict(merged, part, tensors))
        finish(new)
