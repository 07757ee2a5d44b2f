"""What a model tells of its making - in a folder as fastsd.json, in a single file as metadata.

The keys of a file's metadata are those of the Stability AI Model Metadata Standard 1.0.0 (`modelspec.`), with the values that
kohya's sd-scripts give them; in a LoRA also kohya's own (`ss_`), for the tools that look for these; and the summary
(`fastsd.`), from which a folder made of the file gets its fastsd.json again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

SUMMARY = "fastsd.json"
PREFIX = "fastsd."


class _Told(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class StageSummary(_Told):
    """A stage as it ran. `settings`: what else differed from the defaults."""

    name: str
    train: list[str]
    optimizer: str
    lr: float | dict[str, float]
    precision: str
    batch: int
    steps: int | None = None
    images: int | None = None
    settings: dict[str, str] = {}


class Loss(_Told):
    """What was measured of a set of images with one kind of weights, first and last; `se` is the standard error of the last."""

    set: str
    weights: str
    first_step: int
    first: float
    step: int
    last: float
    se: float


class Samples(_Told):
    """The picture of samples that was drawn last."""

    step: int
    prompts: list[str]
    sampler: str
    steps: int
    guidance: float


class Adapters(_Told):
    """`[model.lora]`, its alpha filled in."""

    rank: int
    alpha: float
    targets: list[str]
    conv: int = 0
    text_encoder: bool = False


class Summary(_Told):
    """What was made, from what, and how; each of it may be unknown.

    Attributes:
        version, date: of fastsd; of the checkpoint, ISO 8601 in UTC.
        weights: "raw" or "ema", their average.
        base, vae: hub ids, or the last words of paths. `vae_factor`: what was trained with.
        clip_skip, chunks, resolution (px), seed, precision: as in the config; every stage's precision.
        steps, images: trained and seen, over all stages. `dataset`: images that there were.
        settings: others of the run that differ from the defaults.
        note: anything else there is to say, in sentences.
    """

    version: str = ""
    title: str = ""
    date: str = ""
    author: str = ""
    license: str = ""
    weights: str = ""
    base: str = ""
    vae: str = ""
    vae_factor: float | None = None
    clip_skip: int | None = None
    chunks: int = 1
    resolution: int | None = None
    seed: int | None = None
    precision: str = ""
    steps: int | None = None
    images: int | None = None
    dataset: int | None = None
    stages: list[StageSummary] = []
    settings: dict[str, str] = {}
    validation: list[Loss] = []
    samples: Samples | None = None
    lora: Adapters | None = None
    note: str = ""

    def table(self) -> dict[str, Any]:
        """What is known, as JSON has it."""
        return self.model_dump(mode="json", exclude_defaults=True)


def read_summary(folder: Path) -> Summary | None:
    """The summary in a diffusers folder; None where there is none that can be read."""
    try:
        return Summary.model_validate_json((folder / SUMMARY).read_bytes())
    except (OSError, ValidationError):
        return None


def summary_in(metadata: Mapping[str, str]) -> Summary | None:
    """The summary in the metadata of a single file; None where there is none that can be read."""
    told = {key: metadata[f"{PREFIX}{key}"] for key in Summary.model_fields if f"{PREFIX}{key}" in metadata}
    try:
        return Summary.model_validate({key: json.loads(value) for key, value in told.items()}) if told else None
    except (ValueError, RecursionError):  # pydantic's error is a ValueError, too
        return None


def metadata_of(
    summary: Summary | None, scheduler: Mapping[str, Any], resolution: int, *, title: str = "", lora: bool = False
) -> dict[str, str]:  # fmt: skip
    """The metadata of a single file. The same arguments give the same bytes.

    Args:
        summary: of the model, if it has one.
        scheduler: its scheduler_config.json.
        resolution: px, of a model whose summary does not tell it.
        title: of a model whose summary does not tell it.
        lora: the file holds adapters alone.
    """
    told = summary or Summary()
    side, title = told.resolution or resolution, told.title or title
    # Counted from 1, as other tools count clip skip.
    layer = "" if told.clip_skip is None else str(told.clip_skip + 1)
    spec = {
        "sai_model_spec": "1.0.0",
        "architecture": "stable-diffusion-v1/lora" if lora else "stable-diffusion-v1",
        "implementation": "diffusers" if lora else "https://github.com/Stability-AI/generative-models",
        "title": title, "date": told.date, "author": told.author, "license": told.license, "resolution": f"{side}x{side}",
        "prediction_type": "v" if scheduler.get("prediction_type") == "v_prediction" else "epsilon", "encoder_layer": layer,
    }  # fmt: skip
    kohya = {
        "base_model_version": "sd_v1", "v2": False, "network_module": "networks.lora", "sd_model_name": told.base,
        "output_name": title, "clip_skip": layer, "seed": told.seed, "steps": told.steps,
    }  # fmt: skip
    return {
        **{f"modelspec.{key}": value for key, value in spec.items() if value},
        **{f"ss_{key}": str(value) for key, value in kohya.items() if lora and value not in (None, "")},
        **{f"{PREFIX}{key}": json.dumps(value, sort_keys=True) for key, value in told.table().items()},
    }
