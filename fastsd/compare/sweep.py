"""`fastsd sweep CONFIG key=a,b,c ...`: train runs that differ only in these keys, one after the other.

The same command continues a stopped sweep. It skips finished runs and resumes an interrupted one.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd.commands.cache import cache
from fastsd.compare.compare import compare
from fastsd.config.schema import Config, dump_config, load_config
from fastsd.data.cache import LatentCache, view_name
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_to_train
from fastsd.run.checkpoint import STATE, checkpoints
from fastsd.run.loop import train
from fastsd.run.settings import combinations, safe_name, setting_text, short_names
from fastsd.sampling.grid import check_samples
from fastsd.storage import replace_file
from fastsd.terminal.console import STDOUT, Console, counted


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        name: that of its folder, such as "lr=1e-05,clip_skip=1".
        values: values of the swept keys.
        words: path and overrides that give `config` on a command line.
    """

    name: str
    values: dict[str, Any]
    config: Config
    words: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.config.run)


def sweep(
    path: Path, words: Sequence[str], precision: str | None = None, baseline: str = "", console: Console = STDOUT
) -> None:
    """Train a run for each combination of values. RUN/sweep.json lists the values by folder; RUN/report.html compares the runs.

    Args:
        path: the config; its `run` is the folder of the sweep.
        words: `key=a,b,c` sweeps a key; `key=value` sets one value in all runs.
        precision: replaces the precision of every stage.
        baseline: name of the run to compare the others with; "" = the run with the config's own values, or the first run.

    Raises:
        UserError: words, configs or models are invalid (raised before any training), or runs failed (raised at the end).
    """
    variants = plan_sweep(path, words, precision)
    baseline_variant = _baseline(variants, baseline, path, words, precision)
    root = baseline_variant.folder.parent
    console.echo(f"{len(variants)} runs in {root}, baseline {baseline_variant.name}")
    for variant in variants:
        values = ", ".join(f"{key} = {setting_text(value)}" for key, value in variant.values.items())
        console.echo(f"  {variant.name}: {values}")

    _prepare(variants, precision, console)
    root.mkdir(parents=True, exist_ok=True)
    values_by_name = {variant.name: variant.values for variant in variants}
    record = {"config": str(path), "baseline": baseline_variant.name, "runs": values_by_name}
    replace_file(root / "sweep.json", json.dumps(record, indent=2) + "\n")

    failed = _train_all(variants, precision, console)
    logged = [v for v in variants if (log := v.folder / "log.jsonl").is_file() and log.stat().st_size]
    if logged:
        compared_with = baseline_variant if baseline_variant in logged else logged[0]
        compare([v.folder for v in logged], root / "report.html", str(compared_with.folder), console=console)
    if failed:
        raise UserError("sweep-runs-failed", "\n".join(f"{name} failed: {why}" for name, why in failed.items()))


def plan_sweep(path: Path, words: Sequence[str], precision: str | None = None) -> list[Variant]:
    """Return the runs of a sweep. The values of the last key vary fastest.

    Raises:
        UserError: no key has several values, a key is unknown, a value is invalid or given twice, or two runs would be equal
            or share a folder.
    """
    all_combinations = combinations(words)
    swept = [key for key in all_combinations[0] if len({setting_text(c[key][1]) for c in all_combinations}) > 1]
    if not swept:
        raise UserError(
            "sweep-no-values", "no key has several values; sweep at least one, for example stage.caption_dropout=0.04,0.1"
        )
    if "run" in swept:
        raise UserError("sweep-several-folders", "run has several values; give one folder, in which each run gets a subfolder")
    short_keys = short_names(swept)
    problems: list[str] = []
    variants: list[Variant] = []
    for combination in all_combinations:
        try:
            overrides = [f"{key}={text}" for key, (text, _) in combination.items()]
            config = load_config(path, overrides, precision)
        except UserError as error:
            problems += str(error).split("\n")
            continue
        name = ",".join(f"{short_keys[key]}={safe_name(setting_text(combination[key][1]))}" for key in swept)
        folder = str(Path(config.run) / name)
        command_words = [str(path), *overrides, f"run={folder}"]
        values = {key: combination[key][1] for key in swept}
        variants.append(Variant(name, values, config.model_copy(update={"run": folder}), command_words))
    if problems:
        raise UserError("sweep-configs", "\n".join(dict.fromkeys(problems)))
    by_name: dict[str, Variant] = {}
    by_settings: dict[str, Variant] = {}
    for variant in variants:
        other = by_name.setdefault(variant.name.casefold(), variant)
        if other is not variant:
            pair = " and ".join(str(v.values) for v in (other, variant))
            raise UserError(
                "sweep-shared-folder",
                f"{pair} would share the folder {variant.folder}; sweep one of them separately with run=FOLDER",
            )
        other = by_settings.setdefault(_settings(variant.config), variant)
        if other is not variant:
            raise UserError("sweep-same-run", f"{other.name} and {variant.name} are the same run; leave one out")
    return variants


def _baseline(variants: list[Variant], name: str, path: Path, words: Sequence[str], precision: str | None) -> Variant:
    """Return the run called `name`. If `name` is empty, return the run with the config's own values, or the first run."""
    if name:
        match = next((variant for variant in variants if variant.name == name), None)
        if match is None:
            names = ", ".join(variant.name for variant in variants)
            raise UserError(
                "unknown-baseline-run", f"--baseline is {name!r}, which is not one of the runs; choose from {names}"
            )
        return match
    fixed = [word for word in words if word.partition("=")[0].strip() not in variants[0].values]
    try:
        settings = _settings(load_config(path, fixed, precision))
    except UserError:  # the config is not valid without the swept values
        return variants[0]
    return next((variant for variant in variants if _settings(variant.config) == settings), variants[0])


def _settings(config: Config) -> str:
    return dump_config(config.model_copy(update={"run": ""}))


def _prepare(variants: Sequence[Variant], precision: str | None, console: Console) -> None:
    """Load every model once, to report errors before the first run, and build missing caches.

    A run with a checkpoint is skipped, because it has passed this check before.
    """
    problems: list[str] = []
    uncached: dict[str, Config] = {}  # one config for each missing cache view or set of text embeddings
    for variant in counted("checking runs", variants):
        config = variant.config
        if checkpoints(variant.folder / "checkpoints"):
            continue
        console.name_config(variant.words, precision)
        try:
            model = load_to_train(config.model)
            check_samples(model, config)
        except UserError as error:
            problems.append(console.copyable(str(error)))
            continue
        try:
            view = view_name(config, model.vae.hash)
            with closing(LatentCache.open(config.cache.dir, view)):
                pass
            if config.cache.hidden_states:  # this encoder's text embeddings may be missing
                uncached[f"{view} {config.model.model_dump_json()}"] = config
        except UserError:
            uncached[f"{config.cache.model_dump_json()} {view}"] = config
    if problems:
        raise UserError("sweep-jobs", "\n".join(dict.fromkeys(problems)))
    for config in uncached.values():
        cache(config, console)


def _train_all(variants: Sequence[Variant], precision: str | None, console: Console) -> dict[str, str]:
    """Train the unfinished runs. Return the error message of each failed run by its name."""
    failed = {}
    for i, variant in enumerate(variants, 1):
        console.echo(f"\n[{i}/{len(variants)}] {variant.name}")
        if _finished(variant):
            console.echo("already finished")
            continue
        console.name_config(variant.words, precision)
        try:
            train(variant.config, console)
        except UserError as error:
            failed[variant.name] = console.copyable(str(error))
            console.echo(f"failed: {error}\ncontinuing with the next run")
        # The next run needs the memory of this run, and measures its own peak.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return failed


def _finished(variant: Variant) -> bool:
    """Return True if a run with exactly this config has exported its model. The model is not loaded."""
    checkpoint_paths = checkpoints(variant.folder / "checkpoints")
    if not checkpoint_paths or not (variant.folder / "model").is_dir():
        return False
    try:
        same = (variant.folder / "config.json").read_text(encoding="utf-8") == dump_config(variant.config)
        state = json.loads((checkpoint_paths[-1] / STATE).read_text(encoding="utf-8"))
        return same and state["stage_done"] and state["stage"] == len(variant.config.stage) - 1
    except (OSError, ValueError, KeyError):
        return False
