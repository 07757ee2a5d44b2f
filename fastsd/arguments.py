"""Types of the arguments and options that several commands of the command line have. Read next: `cli.py`."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option


class Precision(StrEnum):
    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


class Dtype(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Form(StrEnum):
    diffusers = "diffusers"
    single_file = "single-file"
    lora_kohya = "lora-kohya"
    lora_peft = "lora-peft"


def text(value: str) -> str:
    """Expand `~` and environment variables in a path on the command line, as in a config. Hub ids stay as they are."""
    from fastsd.config.paths import expanded

    try:
        return expanded(os.fspath(value))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def path(value: str) -> Path:
    """Make a path of a text on the command line."""
    return Path(text(value))


ConfigPath = Annotated[Path, Argument(parser=path, metavar="CONFIG", help="Config file in TOML format; configs/ has examples.")]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[key=value ...]", help="Config values to replace, for example stage.0.batch=8.")
]
BaseModel = Annotated[str, Argument(parser=text, metavar="BASE", help="Base model: diffusers folder, single file or hub id.")]
AnyModel = Annotated[
    str, Argument(parser=text, metavar="MODEL", help="Diffusers folder, single file, hub id, run folder or checkpoint.")
]
NewFolder = Annotated[Path, Argument(parser=path, metavar="OUT", help="Output: a diffusers folder that does not exist yet.")]
StagePrecision = Annotated[
    Precision | None, Option("--precision", help="Compute precision for all stages (default: per config).")
]
ComputePrecision = Annotated[Precision, Option("--precision", help="Compute precision.")]
Device = Annotated[str, Option(help="Compute device: auto, cpu, cuda or cuda:N.")]
ScalingFactor = Annotated[float | None, Option("--vae-scaling-factor", help="Scaling factor of the VAE (default: as stored).")]
Tokenizer = Annotated[str, Option(parser=text, help="Tokenizer folder or hub id, for a model that is a single file.")]
JsonFile = Annotated[
    Path | None, Option("--json", parser=path, metavar="FILE", help="JSON file to write the results to as well.")
]
BenchWords = Annotated[
    list[str] | None,
    Argument(
        metavar="[WHAT] [CONFIG] [key=value ...]",
        help="What to measure: step, memory, kernels, optim, loader or cache (default: step).",
    ),
]
