"""`fastsd average`: an average of the weights of any length, made of those that a run has stored.

A stage with `ema = { sigma_rel = [0.05, 0.10] }` keeps averages of these lengths, and stores snapshots of them. A sum of the
snapshots is the average of another length, as if the run had kept it (`fastsd/train/averages.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastsd.config.stages import LONGEST
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_to_train
from fastsd.model.formats.load import table_of
from fastsd.model.formats.model_summary import read_summary
from fastsd.model.formats.write import check_folder_name
from fastsd.run.checkpoint import CONFIG, averages_of, load_state, read_progress
from fastsd.run.export import write_outputs
from fastsd.run.folder import resolve_model
from fastsd.run.model_card import summarize
from fastsd.run.restart import read_config
from fastsd.run.snapshots import averaged_of, snapshots
from fastsd.storage import make_folder
from fastsd.terminal.console import STDOUT, Console, counted
from fastsd.train.averages import Profile, combine
from fastsd_kernels import REFERENCE

AVERAGES = "averages"  # folder in RUN
LARGEST_ERROR = 0.05  # of the profile, see `combine`
Component = Mapping[str, Tensor]


class StoredAverage(NamedTuple):
    """An average on the disk. `read` returns its tensors by component and parameter name."""

    profile: Profile
    read: Callable[[], Mapping[str, Component]]


def average(name: str, sigma_rel: float, out: Path | None = None, console: Console = STDOUT) -> None:
    """Write the average of a relative length as the files of an export: a folder, a single file, and the adapters of a LoRA.

    Args:
        name: a run (its newest checkpoint), or one of its checkpoints. The average ends at the checkpoint's step.
        sigma_rel: relative length, above 0 and at most `LONGEST`.
        out: folder to write; None = RUN/averages/model-ema-LENGTH.

    Raises:
        UserError: the length is out of range or cannot be made of what is stored; `name` has no such averages; OUT is in use.
    """
    if not 0 < sigma_rel <= LONGEST:
        raise UserError(
            "average-length",
            f"--sigma-rel is {sigma_rel:g}; use a number above 0 and at most {LONGEST}, that of a uniform average",
        )
    checkpoint = Path(resolve_model(name)).resolve()
    run, config = checkpoint.parent.parent, read_config(checkpoint / CONFIG)
    if config is None:
        raise UserError("average-no-run", f"{name}: is no run and no checkpoint of one; give the folder of a run")
    config = config.model_copy(update={"run": str(run)})
    stored, problems = _stored_averages(run, checkpoint, name)
    for problem in problems:
        console.warn(problem)
    steps = max(entry.profile.steps for entry in stored)
    factors, error = combine([entry.profile for entry in stored], Profile(steps, sigma_rel))
    if error > LARGEST_ERROR:
        raise _unreachable(run, sigma_rel, stored, error)

    kind = f"ema-{sigma_rel:g}"
    folder = _folder(run, kind, out)
    used = sum(factor != 0 for factor in factors)
    note = (
        f"An average of the relative length {sigma_rel:g} over {steps:,.0f} steps, made of {used} stored averages; its profile "
        f"differs from the exact one by {error:.2%}."
    )
    console.echo(note)
    averages = _sum(stored, factors)
    summary = summarize(run, checkpoint, kind).model_copy(update={"note": note})
    model = load_to_train(table_of(str(checkpoint), config.model), REFERENCE, config.seed, checkpoint)
    make_folder(folder.parent)
    write_outputs(config, checkpoint, model, summary, folder, folder.with_name(f"lora-{kind}.safetensors"), averages, console)


def _stored_averages(run: Path, checkpoint: Path, name: str) -> tuple[list[StoredAverage], list[str]]:
    """List the averages of one series: those of a checkpoint, and of the snapshots before it. Also return warnings."""
    progress = read_progress(checkpoint)
    current = averaged_of(load_state(checkpoint), progress.first_averaged)
    if not current or not any(averaged.steps for averaged in current.values()):
        raise UserError(
            "average-none-kept",
            f"{name}: {checkpoint.name} has no averages of relative lengths; set ema = {{ sigma_rel = [0.05, 0.10] }} in a "
            "stage, and train it",
        )
    start = min(averaged.start for averaged in current.values())
    tensors = averages_of(checkpoint)
    stored = [
        StoredAverage(averaged.profile, lambda key=key: tensors[key])  # type: ignore[misc]
        for key, averaged in current.items()
        if averaged.start == start
    ]
    newest_steps = max(entry.profile.steps for entry in stored)
    readable, problems = snapshots(run)
    for snapshot in readable:
        for key, averaged in snapshot.averaged.items():
            if averaged.start == start and 0 < averaged.steps < newest_steps:
                stored.append(StoredAverage(averaged.profile, lambda at=snapshot, key=key: at.tensors(key)))  # type: ignore[misc]
    return stored, problems


def _unreachable(run: Path, sigma_rel: float, stored: Sequence[StoredAverage], error: float) -> UserError:
    """Return the error of a length that what is stored does not give. It names the nearest length that it does give."""
    profiles = [entry.profile for entry in stored]
    steps = max(profile.steps for profile in profiles)
    lengths = {f"{profile.sigma_rel:g}" for profile in profiles if profile.steps == steps} | {
        f"{n / 1000:g}" for n in range(1, 289)
    }
    near = sorted(lengths, key=lambda length: abs(float(length) - sigma_rel))
    nearest = next(length for length in near if combine(profiles, Profile(steps, float(length)))[1] <= LARGEST_ERROR)
    if all(profile.steps == steps for profile in profiles):
        return UserError(
            "average-without-snapshots",
            f"{run}: has no snapshots of its averages, so there is no length {sigma_rel:g}; use --sigma-rel {nearest}, or "
            "train with ema_snapshots above 0",
        )
    return UserError(
        "average-unreachable",
        f"{run}: the {sum(profile.steps < steps for profile in profiles)} averages in snapshots do not give the length "
        f"{sigma_rel:g}, because its profile would be wrong by {error:.0%}; the nearest length within {LARGEST_ERROR:.0%} is "
        f"{nearest}",
    )


def _folder(run: Path, kind: str, out: Path | None) -> Path:
    if out is None:
        return run / AVERAGES / f"model-{kind}"
    check_folder_name(out)
    if out.exists() and read_summary(out) is None:
        raise UserError("average-out-exists", f"--out is {str(out)!r}, which exists and is not an average; choose a new folder")
    return out


def _sum(stored: Sequence[StoredAverage], factors: Sequence[float]) -> dict[str, dict[str, Tensor]]:
    """Return the sum of the stored averages by component and parameter name, added in fp64, in fp32."""
    terms = [(factor, entry.read()) for entry, factor in zip(stored, factors, strict=True) if factor]
    names = [(component, name) for component, tensors in terms[0][1].items() for name in tensors]
    averages = dict[str, dict[str, Tensor]]()
    for component, name in counted("averaging", names, "tensors"):
        total = torch.zeros(terms[0][1][component][name].shape, dtype=torch.float64)
        for factor, tensors in terms:
            total.add_(tensors[component][name].double(), alpha=factor)
        averages.setdefault(component, {})[name] = total.float()
    return averages
