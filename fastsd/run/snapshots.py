"""Snapshots of a run's averages, from which `fastsd average` makes averages of other lengths.

RUN/snapshots/step-00001000.safetensors     the power-function averages of a stage after a step of the run

A snapshot holds the averages in fewer bits ("COMPONENT@AVERAGE/KEY", as in a checkpoint), and in its metadata what each of them
averages, and a hash of both. A file that is damaged anywhere is left out of averages. A resumed run writes the same bits again,
so its start deletes the snapshots of later steps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from fastsd.errors import UserError
from fastsd.run.checkpoint import by_average
from fastsd.run.folder import step_of
from fastsd.storage import TEMPORARY, TensorFile, make_folder, new_file, write_safetensors
from fastsd.terminal.console import counted
from fastsd.train.averages import Profile

SNAPSHOTS = "snapshots"
_PROFILES, _HASH = "averages", "xxh3_128"  # keys of the metadata


class Averaged(NamedTuple):
    """The contents of an average: weights of the run's steps after `start`, of which it has counted `steps`."""

    start: int
    steps: float
    sigma_rel: float

    @property
    def profile(self) -> Profile:
        return Profile(self.steps, self.sigma_rel)


def averaged_of(state: Mapping[str, Tensor], first_step: int) -> dict[str, Averaged]:
    """Return what each power-function average in the state of a step holds, by name.

    Args:
        state: as `Step.state_dict` returns it, or a checkpoint's tensors.
        first_step: steps of the run before the first stage whose averages the current one continues.
    """
    names = [name.removesuffix("@steps") for name in state if name.endswith("@steps")]
    counts = {name: [int(state[f"{name}@{key}"]) for key in ("start", "steps")] for name in names}
    return {name: Averaged(first_step + start, steps, float(name.partition("-")[2])) for name, (start, steps) in counts.items()}


def path_of(run: Path, step: int) -> Path:
    return run / SNAPSHOTS / f"step-{step:08d}.safetensors"


def write_snapshot(run: Path, state: Mapping[str, Tensor], dtype: torch.dtype, step: int, first_step: int) -> Path:
    """Write the averages after a step of the run. Where the dtype cannot hold a number, all are written in fp32.

    Args:
        state: as `Step.average_state` returns it.
        first_step: as for `averaged_of`.

    Raises:
        OSError: the disk is full or the folder is not writable.
    """
    path, tensors = path_of(run, step), {name: tensor for name, tensor in state.items() if "/" in name}
    averaged = json.dumps({name: list(values) for name, values in averaged_of(state, first_step).items()})
    if any(tensor.abs().max() > torch.finfo(dtype).max for tensor in tensors.values()):
        dtype = torch.float32
    make_folder(path.parent)
    metadata = {_PROFILES: averaged, _HASH: _hash_of(averaged, tensors, dtype)}
    with new_file(path) as temporary:
        write_safetensors(temporary, tensors, metadata, dtype)
    return path


def _hash_of(averaged: str, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return a hash of a snapshot's contents, as they are if the tensors are stored in a dtype."""
    digest = xxhash.xxh3_128(averaged.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().to(dtype=dtype)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Snapshot(NamedTuple):
    """A stored snapshot: what each average holds, and the tensors by average and component, which are read when used."""

    path: Path
    averaged: dict[str, Averaged]

    def tensors(self, average: str) -> dict[str, dict[str, Tensor]]:
        return by_average(TensorFile(self.path))[average]


def snapshots(run: Path) -> tuple[list[Snapshot], list[str]]:
    """Return the snapshots of a run, oldest first, and a warning for each that is damaged. All of them are read."""
    complete, problems = list[Snapshot](), list[str]()
    for path in counted("checking", sorted((run / SNAPSHOTS).glob("step-*.safetensors")), "snapshots"):
        try:
            file = TensorFile(path)
            text = file.metadata[_PROFILES]
            if file.metadata.get(_HASH) not in (None, _hash_of(text, file)):  # earlier versions wrote none
                raise ValueError(path)
            table = json.loads(text)
            complete.append(Snapshot(path, {name: Averaged(*values) for name, values in table.items()}))
        except (OSError, UserError, ValueError, KeyError, TypeError):
            problems.append(f"{path} is damaged and left out; the average will be less exact")
    return complete, problems


def remove_later(run: Path, step: int) -> None:
    """Delete the snapshots after a step, which the run is about to repeat, and those that were not written to their end."""
    with contextlib.suppress(OSError):  # the run replaces them
        for path in (run / SNAPSHOTS).glob("*.safetensors"):
            if path.name.startswith(TEMPORARY) or step_of(path) > step:
                path.unlink()
