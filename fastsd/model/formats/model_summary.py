"""A summary of a model's training, stored as fastsd.json in a folder and as metadata in a single file.

The metadata of a file has the keys of the Stability AI Model Metadata Standard 1.0.0 (`modelspec.`), with the values that
kohya's sd-scripts write. A LoRA also has kohya's own keys (`ss_`), for tools that look for them. The summary itself has the
keys `fastsd.`. A folder that is made from the file gets its fastsd.json from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fastsd.config.schema import Chunks, Cut
from fastsd.model.flow_schedule import FLOW

SUMMARY = "fastsd.json"
PREFIX = "fastsd."


class _SummaryTable(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Change(_SummaryTable):
    """A setting that was changed in the middle of a stage, after a step of the run."""

    step: int
    key: str
    before: str
    after: str


class StageSummary(_SummaryTable):
    """A stage as it ran. `settings` are those of its other settings that differ from the defaults. All are those of its last
    step, and `changes` has earlier ones."""

    name: str
    train: list[str]
    optimizer: str
    lr: float | dict[str, float]
    precision: str
    batch: int
    steps: int | None = None
    images: int | None = None
    settings: dict[str, str] = {}
    changes: list[Change] = []


class Loss(_SummaryTable):
    """The first and the last loss of a set of images with one kind of weights. `se` is the standard error of the last one."""

    set: str
    weights: str
    first_step: int
    first: float
    step: int
    last: float
    se: float


class Samples(_SummaryTable):
    """The settings of the last grid of samples. `prompts` have settings of their own; `weights` are "model" or an average."""

    step: int
    prompts: list[str]
    sampler: str
    steps: int
    guidance: float
    weights: str = "model"
    negative: str = ""
    guidance_rescale: float = 0.0
    width: int | None = None
    height: int | None = None


class Adapters(_SummaryTable):
    """The settings of `[model.lora]`, with alpha filled in, and the names in the LoRA's file, "kohya" or "peft"."""

    rank: int
    alpha: float
    targets: list[str]
    conv: int = 0
    conv_alpha: float | None = None
    text_encoder: bool = False
    names: str = "kohya"


class ModelSummary(_SummaryTable):
    """A model's origin and training. Any field may be unknown.

    Attributes:
        version, date: the version of fastsd; the date of the checkpoint, ISO 8601 in UTC.
        weights: "raw", "ema" (exponential moving average of the weights), or "ema-0.05" (one of that relative length).
        base, vae: a hub id; or for a path, the title of the model there or the path's last element.
        vae_factor: the scaling factor in training.
        clip_skip, chunks, cut, resolution (px), seed: as in the config. `precision` lists that of every stage.
        steps, images: steps trained and images seen in all stages. `dataset` is the number of images available.
        settings: other settings of the run that differ from the defaults.
        note: further remarks, in sentences.
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
    chunks: Chunks = 1
    cut: Cut = "tokens"
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
        """Return the known fields as JSON values."""
        return self.model_dump(mode="json", exclude_defaults=True)


def weights_text(weights: str, ema: str = "EMA") -> str:
    """Describe a kind of weights: "raw", "ema", or "ema-0.05" for an average of that relative length."""
    return "as trained" if weights == "raw" else ema + weights.removeprefix("ema").replace("-", " of length ")


def read_summary(folder: Path) -> ModelSummary | None:
    """Read the summary in a diffusers folder. Return None if it is missing or unreadable."""
    try:
        return ModelSummary.model_validate_json((folder / SUMMARY).read_bytes())
    except (OSError, ValidationError):
        return None


def summary_in(metadata: Mapping[str, str]) -> ModelSummary | None:
    """Read the summary in the metadata of a single file. Return None if it is missing or unreadable."""
    fields = {key: metadata[f"{PREFIX}{key}"] for key in ModelSummary.model_fields if f"{PREFIX}{key}" in metadata}
    try:
        return ModelSummary.model_validate({key: json.loads(value) for key, value in fields.items()}) if fields else None
    except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError
        return None


def metadata_of(
    summary: ModelSummary | None, scheduler: Mapping[str, Any], resolution: int, *, title: str = "", lora: bool = False
) -> dict[str, str]:
    """Return the metadata of a single file. Equal arguments give equal bytes.

    Args:
        summary: the model's summary, if it has one.
        scheduler: the model's scheduler_config.json.
        resolution: the side of an image in px, used if the summary has no resolution.
        title: the title, used if the summary has none.
        lora: True if the file holds adapters only.
    """
    info = summary or ModelSummary()
    resolution, title = info.resolution or resolution, info.title or title
    encoder_layer = "" if info.clip_skip is None else str(info.clip_skip + 1)  # other tools count from 1
    architecture = "stable-diffusion-v1/lora" if lora else "stable-diffusion-v1"
    implementation = "diffusers" if lora else "https://github.com/Stability-AI/generative-models"
    prediction = {"v_prediction": "v", FLOW: "flow"}.get(scheduler.get("prediction_type", ""), "epsilon")

    spec = {"sai_model_spec": "1.0.0", "architecture": architecture, "implementation": implementation, "title": title}
    spec |= {"date": info.date, "author": info.author, "license": info.license, "resolution": f"{resolution}x{resolution}"}
    spec |= {"prediction_type": prediction, "encoder_layer": encoder_layer}
    kohya = {"base_model_version": "sd_v1", "v2": False, "network_module": "networks.lora", "sd_model_name": info.base}
    kohya |= {"output_name": title, "clip_skip": encoder_layer, "seed": info.seed, "steps": info.steps}
    return {
        **{f"modelspec.{key}": value for key, value in spec.items() if value},
        **{f"ss_{key}": str(value) for key, value in kohya.items() if lora and value not in (None, "")},
        **{f"{PREFIX}{key}": json.dumps(value, sort_keys=True) for key, value in info.table().items()},
    }
