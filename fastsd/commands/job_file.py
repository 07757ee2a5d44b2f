"""The config that `fastsd init` writes: the keys that matter for a goal, each with its meaning. `init.py` finds the facts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastsd.config.conversion import toml_value
from fastsd.config.reference import entries
from fastsd.config.stages import StageTable

COLUMN = 35  # where comments start
_CAPTIONS = {"caption_dropout": 0.1}
_EPOCHS = {"until": "100e", "batch": 16, **_CAPTIONS, "grad_clip": 1.0, "sample_every": "10e", "checkpoint_every": "10e"}
_ADAMW = {"optimizer": "adamw", "lr": 1e-5}


@dataclass(frozen=True)
class Goal:
    """A kind of job.

    Attributes:
        title: ends the sentence "The goal is to ...".
        stage: keys of its stage.
        lion_lr: learning rate if the card has room for Lion only; 0 = the optimizer stays.
        validate_every: interval of the validation.
    """

    title: str
    stage: dict[str, Any]
    lion_lr: float
    validate_every: int | str


GOALS = {
    "vae": Goal(
        "retrain the UNet for another VAE",
        {"name": "unet", "train": ["unet"], "until": 1_000_000, "batch": 32, "optimizer": "dlion", **_CAPTIONS}
        | {"sample_every": 1000, "checkpoint_every": 1000},
        1e-5,
        5000,
    ),
    "finetune": Goal("fine-tune the UNet", {"name": "unet", "train": ["unet"], **_EPOCHS, **_ADAMW}, 2e-6, "10e"),
    "lora": Goal(
        "train a LoRA of the UNet",
        {"name": "lora", "train": ["lora"], **_EPOCHS, **_ADAMW, "lr": 1e-4, "schedule": "cosine"},
        0,
        "10e",
    ),
    "text-encoder": Goal(
        "fine-tune the text encoder",
        {"name": "text", "train": ["text_encoder"], "until": 250, "batch": 32, "optimizer": "lion", "lr": 3e-6, "warmup": 0.1}
        | {**_CAPTIONS, "sample_every": 10, "checkpoint_every": 10, "keep_checkpoints": 25},
        0,
        50,
    ),
}

MEANINGS = {
    "name": "of the stage, in the log and in overrides",
    "train": "the rest is frozen",
    "until": 'length: steps, "2e" (epochs) or "12h"; may be changed at every start',
    "precision": "fp32, tf32 or bf16; the weights are exact fp32 in all of them",
    "batch": "images per optimizer step",
    "micro_batch": "images per forward, the most that fit",
    "checkpointing": "recomputes activations to save memory: none, ff or block",
    "fused_backward": "updates weights during the backward, without memory for gradients",
    "optimizer": "dlion, which finds its step size, lion or adamw",
    "lr": "learning rate; a sweep compares several",
    "schedule": "decay of lr",
    "warmup": "of lr, as a share of the stage",
    "grad_clip": "largest gradient norm; 0 = no clipping",
    "caption_dropout": 'share of captions replaced by ""; guidance needs some',
    "sample_every": "interval of sample grids",
    "checkpoint_every": "interval of checkpoints",
    "keep_checkpoints": "newest checkpoints to keep",
}
_DEFAULTS = {entry.name: entry.default for entry in entries()}


def commands(config: str, run: str, plan_options: str, prompt: str) -> dict[str, str]:
    """Return the commands of a job with what each does, in their order."""
    config, run = shlex.quote(config), shlex.quote(run)
    return {
        f"fastsd plan {config} {plan_options}": "memory, speed, days and disk space",
        f"fastsd check {config}": "find every problem before the long run",
        f"fastsd cache {config}": "encode images into latents, once",
        f"fastsd train {config}": "train; the same command again resumes",
        f"fastsd watch {run}": "a page in the browser while it trains",
        f"fastsd sample {run} --prompt {shlex.quote(prompt)}": "draw with the result",
    }


def job_text(title: str, keys: dict[str, dict[str, tuple[Any, str]]], stage: StageTable, steps: dict[str, str]) -> str:
    """Return the text of a config.

    Args:
        title: the first comment.
        keys: by table, "" for the top, its keys with their values and meanings. A table may also have the key "" with a
            meaning of its own.
        stage: the stage; its keys that differ from the defaults are written.
        steps: the commands of the job, with what each does.
    """
    width = max(len(command) for command in list(steps)[:-1])
    lines = [f"# {title}", "#", *(f"#     {command:<{width}}   {purpose}" for command, purpose in steps.items())]
    lines += ["#", "# `fastsd config KEY` explains a key. `fastsd config` lists all of them."]
    for table, values in keys.items():
        heading = values.pop("", (None, ""))[1]
        if table:
            lines += ["", f"[{table}]".ljust(COLUMN) + f"# {heading}" if heading else f"[{table}]"]
        lines += [_line(f"{table}.{key}".removeprefix("."), *entry) for key, entry in values.items()]
    return "\n".join([*lines, "", "[[stage]]", *_stage_lines(stage)]) + "\n"


def _stage_lines(stage: StageTable) -> Iterator[str]:
    for key, meaning in MEANINGS.items():
        value = getattr(stage, key)
        if value != StageTable.model_fields[key].default or key in ("precision", "batch", "optimizer"):
            yield _line(f"stage.{key}", value, meaning)


def _line(name: str, value: Any, meaning: str) -> str:
    """Write a key with its meaning, and with its default if that is another value. A list of texts has a line for each."""
    default, text = _DEFAULTS[name], toml_value(value)
    comment = f"# {meaning}" + (f" (default {default})" if default not in ("", '""', "unset", "[]", text) else "")
    if isinstance(value, list) and len(value) > 1:
        start, *entries = [f"{name.rpartition('.')[2]} = [", *(f"    {toml_value(entry)}," for entry in value), "]"]
        return "\n".join([start.ljust(COLUMN) + comment, *entries])
    line = f"{name.rpartition('.')[2]} = {text}"
    return line.ljust(COLUMN) + comment if len(line) < COLUMN else f"{line}   {comment}"
