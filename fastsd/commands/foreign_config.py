"""Read the config of another trainer: one flat table of settings, and the folders of its datasets or concepts.

sd-scripts: TOML, whose tables only group keys; the datasets in it or in the file that `dataset_config` names, as `[general]`,
`[[datasets]]` and `[[datasets.subsets]]`, where the inner settings replace the outer.  OneTrainer: JSON with nested tables; its
concepts and samples in it or in a file.  EveryDream2: JSON, and the file that `optimizer_config` names.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd.config.conversion import Rules
from fastsd.config.onetrainer_keys import (
    CONCEPT,
    EVERYDREAM,
    EVERYDREAM_DEFAULTS,
    ONETRAINER,
    ONETRAINER_DEFAULTS,
    ONETRAINER_LORA_DEFAULTS,
)
from fastsd.config.other_trainers import KOHYA, KOHYA_DEFAULTS, KOHYA_LORA_DEFAULTS, arguments_of, kohya_trains_text
from fastsd.errors import UserError

_SUBSET_KEYS = ("image_dir", "num_repeats", "is_reg")  # of a subset of sd-scripts, read here
_CONCEPT_KEYS = ("path", "enabled", "type", "balancing", "loss_weight")  # of a concept of OneTrainer, read here


@dataclass
class Foreign:
    """The config of another trainer.

    Attributes:
        settings: key -> value; keys of tables have dotted names.
        defaults: what the trainer uses for keys that are missing.
        expanded: keys of `settings` whose entries are settings as well, or that are read here.
        concept_settings: the settings of OneTrainer's concepts.
        values: dotted keys of our config -> value, and what it comes from: the folders and prompts.
        without_equal: reason -> settings without an equal.
        notes: sentences about what is left to do.
    """

    trainer: str
    rules: Rules
    settings: dict[str, Any]
    defaults: dict[str, Any]
    expanded: set[str] = field(default_factory=set)
    concept_rules: Rules = field(default_factory=dict)
    concept_settings: dict[str, Any] = field(default_factory=dict)
    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    without_equal: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_foreign(path: Path) -> Foreign:
    """Read a config of sd-scripts, OneTrainer or EveryDream2.

    Raises:
        UserError: the file is missing, is neither TOML nor JSON, or is not a config of these trainers.
    """
    raw = _read(path)
    if not isinstance(raw, Mapping):
        raise UserError("convert-config-list", f"{path}: contains a list, not settings; give the trainer's config file")
    if "stage" in raw:
        raise UserError("convert-config-own", f"{path} is a config of fastsd already; use it as it is")
    if path.suffix.lower() == ".json" and raw.keys() & {"LoRA_type", "max_resolution", "num_cpu_threads_per_process"}:
        raise UserError(
            "convert-config-gui",
            f"{path} has the settings of kohya's GUI, under its names; give the .toml file that the GUI writes into output_dir "
            "when it trains",
        )
    scores = {
        reader: len(keys & rules.keys())
        for reader, rules, keys in (
            (_kohya, KOHYA, _sections(raw).keys() | ({"dataset_config"} & raw.keys())),
            (_onetrainer, ONETRAINER, raw.keys()),
            (_everydream, EVERYDREAM, raw.keys()),
        )
    }
    if "datasets" in raw:
        return _kohya(path, raw)
    reader = max(scores, key=lambda candidate: scores[candidate])
    if not scores[reader]:
        raise UserError(
            "convert-config-unknown",
            f"{path}: no key of sd-scripts, OneTrainer or EveryDream2 is in it; give the trainer's config file",
        )
    return reader(path, raw)


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise UserError("convert-config-missing", f"{path} does not exist; give the trainer's config file") from None
    except (ValueError, OSError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise UserError("convert-config-unreadable", f"{path} cannot be read as {kind} ({error}); fix the file") from None


def _sections(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file of sd-scripts, whose tables only group them."""
    settings: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict) and key not in ("general", "network_args", "optimizer_args"):
            settings |= value
        elif key not in ("general", "datasets"):
            settings[key] = value
    return settings


def _kohya(path: Path, raw: Mapping[str, Any]) -> Foreign:
    settings = _sections(raw)
    foreign = Foreign("sd-scripts", KOHYA, settings, dict(KOHYA_DEFAULTS))
    datasets = raw if "datasets" in raw else None
    if name := settings.get("dataset_config"):
        foreign.expanded.add("dataset_config")
        file = _beside(path, name)
        datasets = _read(file) if file else None
        if file is None:
            foreign.notes.append(f"dataset_config: {name} does not exist; set data.folders and the captions' settings yourself")
    if datasets:
        _read_datasets(foreign, datasets)
    else:
        _read_train_data_dir(foreign)

    if settings.get("network_module"):
        foreign.defaults |= KOHYA_LORA_DEFAULTS
    elif "no_train_text_encoder" not in settings:
        foreign.defaults["train_text_encoder"] = trains_text = kohya_trains_text(settings)
        if "train_text_encoder" not in settings:
            other = "fine_tune trains only the UNet" if trains_text else "train_db trains the text encoder as well"
            foreign.notes.append(f"stage.train: as in {'train_db' if trains_text else 'fine_tune'} of sd-scripts; {other}")
    if settings.get("max_train_epochs"):
        del foreign.defaults["max_train_steps"]
    if settings.get("loss_type") in ("huber", "smooth_l1"):
        foreign.defaults["huber_schedule"] = "snr"
    elif "huber_c" in settings:
        foreign.defaults["loss_type"] = "l2"
    for key in ("network_args", "optimizer_args"):
        if settings.get(key):
            foreign.expanded.add(key)
            settings |= arguments_of(key, settings[key])
    return foreign


def _beside(path: Path, name: str) -> Path | None:
    """Return the file that a config names: from the current folder, as its trainer reads it, or from the config's folder."""
    return next((file for file in (Path(name), path.parent / name, path.parent / Path(name).name) if file.is_file()), None)


def _read_datasets(foreign: Foreign, datasets: Mapping[str, Any]) -> None:
    subsets = []
    for dataset in datasets.get("datasets", []):
        common = datasets.get("general", {}) | {key: value for key, value in dataset.items() if key != "subsets"}
        subsets += [common | subset for subset in dataset.get("subsets", [])]
    folders, paths = [], set[str]()
    for subset in subsets:
        options: dict[str, Any] = {"repeats": int(subset["num_repeats"])} if subset.get("num_repeats", 1) != 1 else {}
        if subset.get("is_reg"):
            options["loss_weight"] = float(foreign.settings.get("prior_loss_weight", 1.0))
            foreign.without_equal.setdefault("they are repeated to the number of other images there", []).append(
                f"is_reg of {subset.get('image_dir', '?')}"
            )
        if subset.get("image_dir") in paths:
            foreign.without_equal.setdefault("a folder is listed once", []).append(f"another subset of {subset['image_dir']}")
        elif "image_dir" in subset:
            paths.add(subset["image_dir"])
            folders.append(_folder(subset["image_dir"], options))
    if folders:
        foreign.values["data.folders"] = folders, "image_dir and num_repeats of the subsets"
    shared = _shared(foreign, subsets, _SUBSET_KEYS, "subsets")
    if "batch_size" in shared:
        shared["train_batch_size"] = shared.pop("batch_size")
    foreign.settings |= shared


def _shared(foreign: Foreign, tables: list[dict[str, Any]], read: tuple[str, ...], title: str) -> dict[str, Any]:
    """Return the settings of the first of several tables. List those that differ in the others, because ours are for all."""
    first = tables[0] if tables else {}
    for key in dict.fromkeys(key for table in tables for key in table if key not in read):
        values = {str(table.get(key, "unset")) for table in tables}
        if len(values) > 1:
            line = f"{key}: {', '.join(sorted(values))}"
            foreign.without_equal.setdefault(f"the {title} differ; the first counts, or write one stage for each", []).append(
                line
            )
    return {key: value for key, value in first.items() if key not in read}


def _folder(path: str, options: Mapping[str, Any]) -> Any:
    return {"path": path, **options} if options else path


def _read_train_data_dir(foreign: Foreign) -> None:
    """Read the folders of DreamBooth: `train_data_dir` has folders `N_NAME`, whose images are repeated N times."""
    folders = []
    for key, options in (
        ("train_data_dir", {}),
        ("reg_data_dir", {"loss_weight": foreign.settings.get("prior_loss_weight", 1.0)}),
    ):
        root = Path(str(foreign.settings.get(key) or ""))
        if key not in foreign.settings or foreign.settings.get("in_json") or not root.is_dir():
            continue
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and (match := re.match(r"(\d+)_", folder.name)):
                repeats = {"repeats": int(match[1])} if int(match[1]) != 1 else {}
                folders.append(_folder(str(folder), repeats | options))
                foreign.expanded.add(key)
    if folders:
        foreign.values["data.folders"] = folders, "the folders N_NAME of train_data_dir"


def _flat(raw: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in raw.items():
        settings |= _flat(value, f"{place}{key}.") if isinstance(value, dict) and value else {f"{place}{key}": value}
    return settings


def _onetrainer(path: Path, raw: Mapping[str, Any]) -> Foreign:
    settings = _flat({key: value for key, value in raw.items() if key not in ("concepts", "samples")})
    foreign = Foreign("OneTrainer", ONETRAINER, settings, dict(ONETRAINER_DEFAULTS), concept_rules=CONCEPT)
    if settings.get("training_method") == "LORA":
        foreign.defaults |= ONETRAINER_LORA_DEFAULTS
    if settings.get("masked_training"):
        foreign.defaults["unmasked_weight"] = 0.1
    for key, file_key, read in (
        ("concepts", "concept_file_name", _read_concepts),
        ("samples", "sample_definition_file_name", _read_samples),
    ):
        entries = raw.get(key)
        if not entries and settings.get(file_key):
            file = _beside(path, settings[file_key])
            entries = _read(file) if file else None
            if file is None:
                foreign.notes.append(f"{file_key}: {settings[file_key]} does not exist; give its {key} yourself")
        read(foreign, [entry for entry in entries or [] if entry.get("enabled", True)])
    return foreign


def _read_concepts(foreign: Foreign, concepts: list[dict[str, Any]]) -> None:
    folders, used = [], []
    for concept in concepts:
        path, kind = str(concept.get("path", "")), concept.get("type", "STANDARD")
        if kind != "STANDARD":
            reason = "use validate.held_out" if kind == "VALIDATION" else "only plain concepts are trained"
            foreign.without_equal.setdefault(reason, []).append(f"concept {path}, type {kind}")
            continue
        options: dict[str, Any] = {}
        balancing = float(concept.get("balancing", 1.0))
        if concept.get("balancing_strategy", "REPEATS") == "SAMPLES":
            options["weight"] = balancing
            foreign.without_equal.setdefault("weight is a share of an epoch, not a number of images", []).append(
                f"balancing = {balancing:g} samples of {path}"
            )
        elif balancing != 1:
            options["repeats"] = max(round(balancing), 1)
            if options["repeats"] != balancing:
                foreign.without_equal.setdefault("repeats are whole numbers", []).append(f"balancing = {balancing:g} of {path}")
        if concept.get("loss_weight", 1.0) != 1:
            options["loss_weight"] = concept["loss_weight"]
        folders.append(_folder(path, {key: value for key, value in options.items() if (key, value) != ("repeats", 1)}))
        used.append(_flat(concept))
    if folders:
        foreign.values["data.folders"] = folders, "path and balancing of the concepts"
    foreign.concept_settings = _shared(foreign, used, _CONCEPT_KEYS, "concepts")
    if foreign.concept_settings.get("text.enable_tag_shuffling"):
        foreign.concept_settings.setdefault("text.keep_tags_count", 1)


def _read_samples(foreign: Foreign, samples: list[dict[str, Any]]) -> None:
    if not samples:
        return
    prompts: list[dict[str, Any]] = [{"prompt": str(sample.get("prompt", ""))} for sample in samples]
    for sample_key, key in (
        ("negative_prompt", "negative"), ("width", "width"), ("height", "height"), ("diffusion_steps", "steps"),
        ("cfg_scale", "guidance"), ("seed", "seed"),
    ):  # fmt: skip
        values = [sample.get(sample_key) for sample in samples]
        if values[0] is not None and values.count(values[0]) == len(values):
            foreign.values[f"sample.{key}"] = values[0], f"{sample_key} of the samples"
        else:
            for prompt, value in zip(prompts, values, strict=True):
                prompt |= {key: value} if value is not None else {}
    entries = [prompt if len(prompt) > 1 else prompt["prompt"] for prompt in prompts]
    foreign.values["sample.prompts"] = entries, "prompts of the samples, with the settings that differ"
    unequal = [key for key in ("noise_scheduler", "random_seed") if any(sample.get(key) for sample in samples)]
    if unequal:
        foreign.without_equal["set sample.sampler and sample.seed, which are for all samples"] = unequal


def _everydream(path: Path, raw: Mapping[str, Any]) -> Foreign:
    settings = _flat(raw)
    foreign = Foreign("EveryDream2", EVERYDREAM, settings, dict(EVERYDREAM_DEFAULTS))
    if name := settings.get("optimizer_config"):
        if file := _beside(path, str(name)):
            foreign.expanded.add("optimizer_config")
            settings |= _flat({"optimizer_config": {key: value for key, value in _read(file).items() if key != "doc"}})
        else:
            foreign.notes.append(f"optimizer_config: {name} does not exist; set optimizer and lr yourself")
    if settings.get("optimizer_config.base.lr") is None and settings.get("lr") is None:
        foreign.defaults["lr"] = 1e-6
    return foreign
