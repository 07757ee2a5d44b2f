"""Compile the kernels of a run's stages before training.

The file kernels.json in the run's folder has the kernels of each stage (`compilation.py`) by a hash of all that they depend on,
so a restart does not record them again.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

import fastsd
import fastsd_kernels
from fastsd.config.keys import LIGHT, defaults, keys_with
from fastsd.config.stages import StageTable
from fastsd.model.shapes import Shapes
from fastsd.run.compilation import compile_kernels, kernels_of, warn_not_compiled
from fastsd.run.folder import read_table
from fastsd.run.launches import StageRecorder
from fastsd.run.run import Run
from fastsd.sampling.generate import BATCH
from fastsd.sampling.prompts import batches_of, images_of
from fastsd.storage import replace_file
from fastsd.terminal.console import work
from fastsd.train.precision import attention_precision
from fastsd_kernels import TRITON
from fastsd_kernels.launch import INTERPRETED, architecture

FILE = "kernels.json"


def compile_stages(run: Run, index: int, micro_batch_size: int) -> None:
    """Compile the Triton kernels of a stage and, at the start of a run, of all later stages.

    The micro-batch of a later stage may still be unknown. This stage's is then assumed. If it turns out to be another, the
    start of that stage compiles the few kernels that depend on it.

    Args:
        micro_batch_size: images per forward in this stage.
    """
    if run.ops is not TRITON or INTERPRETED:
        return
    if run.ranks.local_rank:
        run.ranks.wait()  # the others take the kernels from Triton's cache
    remembered = _read(run.folder / FILE)
    kernels: dict[str, list[str]] = {}
    for i, stage in enumerate(run.config.stage[index:], index):
        known_size = math.gcd(stage.batch, micro_batch_size) if stage.micro_batch == "auto" else stage.micro_batch_size
        recorder = _recorder(run, stage, micro_batch_size if i == index else known_size)
        key = hashlib.sha256(f"{recorder} {_sources()} {torch.__version__}".encode()).hexdigest()
        if key not in kernels:
            kernels[key] = remembered.get(key) or _record(run, i, recorder)
    if kernels.keys() - remembered.keys() and run.ranks.main:
        with suppress(OSError):  # then the next start records the launches again
            replace_file(run.folder / FILE, json.dumps(kernels, indent=0))
    compile_kernels([kernel for stage_kernels in kernels.values() for kernel in stage_kernels], run.console)
    if not run.ranks.local_rank:
        run.ranks.wait()


def _recorder(run: Run, stage: StageTable, micro_batch_size: int) -> StageRecorder:
    config, model = run.config, run.model
    comparable = stage.model_copy(update={**defaults(StageTable, keys_with(StageTable, LIGHT)), "until": 1})
    images, downscale = images_of(config.sample, config.data.resolution), model.vae.downscale
    sampled = set()
    for numbers in batches_of(images, BATCH):
        first = images[numbers[0]]
        batch = len(numbers) * (1 if first.guidance == 1 else 2)
        sampled.add((batch, model.unet.cfg.in_channels, first.height // downscale, first.width // downscale))
    return StageRecorder(
        stage=comparable,
        micro_batch_size=micro_batch_size,
        shapes=Shapes.of(model),
        scheduler=model.scheduler,
        architecture=architecture(run.device),
        attention=attention_precision(stage.precision, run.device),
        cached_text=run.data.text_embeddings is not None,
        trained=tuple(sorted({group.shape for group in run.data.latents.groups})),
        sampled=tuple(sorted(sampled)),
        validated=tuple(sorted(run.evaluation.validation.shapes)),
    )


def _record(run: Run, index: int, recorder: StageRecorder) -> list[str]:
    try:
        with work(f"recording the kernels of {run.config.stage_name(index)}"):
            return kernels_of(recorder.launches())
    except Exception as error:  # a run does not depend on it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warn_not_compiled(run.console, f"those of {run.config.stage_name(index)}", reason)
        return []


@cache
def _sources() -> str:
    """Hash the source code of fastsd."""
    folders = [Path(str(package.__file__)).parent for package in (fastsd, fastsd_kernels)]
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _read(path: Path) -> dict[str, list[str]]:
    """Read the kernels by their hashes. What is damaged is left out, and recorded again."""
    table = read_table(path) or {}
    return {key: kernels for key, kernels in table.items() if isinstance(kernels, list) and kernels and _all_text(kernels)}


def _all_text(values: list[object]) -> bool:
    return all(isinstance(value, str) for value in values)
