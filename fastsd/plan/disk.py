"""Disk space of a run, and the bytes that it writes until it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastsd.config.schema import Config
from fastsd.config.stages import StageTable, parse_amount
from fastsd.errors import UserError
from fastsd.model.formats.write import DTYPE
from fastsd.sampling.prompts import images_of
from fastsd.train.schedule import Interval, points

ROW, TENSORBOARD_ROW = 600, 800  # bytes of a row of log.jsonl and timing.jsonl together, and of the same row in TensorBoard


def run_bytes(
    config: Config,
    component_bytes: Mapping[str, int],
    checkpoint_bytes: Sequence[int],
    changed: Sequence[str],
    lengths: Sequence[tuple[int, float] | None],
    epoch: int,
) -> dict[str, Any]:
    """Return the bytes of a run's files on the disk, by kind.

    They are upper limits of a healthy run, except that small files are not counted.

    Args:
        component_bytes: bytes of each component of the model in fp32.
        checkpoint_bytes: bytes that a checkpoint of each stage adds to those before it. Frozen components are hard links.
        changed: components that the first stage trains.
        lengths: steps and seconds of each stage, or None if they are unknown; then only its end has a checkpoint that stays.
        epoch: images per epoch, if a length is known.

    Returns:
        "permanent" (the number of checkpoints that stay, of each stage), "checkpoints", "exports", "samples", "logs", "total";
        and "written", the bytes written over the whole run, or None if a length is unknown.
    """
    model, kept, peak, written, grids, rows = sum(component_bytes.values()), 0, 0, 0, 0, 0
    permanent_counts = []
    for stage, size, length in zip(config.stage, checkpoint_bytes, lengths, strict=True):
        steps, seconds = length or (1, 0.0)
        times = partial(_times, stage, epoch, steps, seconds)
        permanent = 1 + times("keep_every") + sum(step < steps for step in (points(stage, epoch) if length else ()))
        saved = permanent + times("checkpoint_every")
        # The last one, which stays, is written before the oldest of the newest `keep_checkpoints` is deleted.
        peak = max(peak, kept + (permanent + stage.keep_checkpoints) * size)
        kept, written = kept + permanent * size, written + saved * size
        permanent_counts.append(permanent)
        grids += 1 + times("sample_every") + (stage.sample_every != 0)
        rows += steps // config.log.every + 1

    exports, copies = export_bytes(config, component_bytes), 1 + config.log.tensorboard
    samples, logs = grids * grid_bytes(config) * copies, rows * (ROW + TENSORBOARD_ROW * config.log.tensorboard)
    checkpoints = peak + model - sum(component_bytes[name] for name in changed)
    disk = {"checkpoints": checkpoints, "exports": exports, "samples": samples, "logs": logs}
    written += checkpoints - peak + exports + samples + logs
    total = {"total": sum(disk.values()), "written": written if all(lengths) else None}
    return {"permanent": permanent_counts} | disk | total


def _times(stage: StageTable, epoch: int, steps: int, seconds: float, key: str) -> int:
    """Return how often an interval of a stage is completed before the stage's end."""
    amount = getattr(stage, key)
    number, unit = parse_amount(key, amount) if amount != 0 else (0.0, "")
    return int(seconds / number) if unit == "seconds" else Interval(key, amount, stage.batch, epoch).count(steps - 1)


def export_bytes(config: Config, component_bytes: Mapping[str, int]) -> int:
    """Return the bytes of RUN/model, RUN/model.safetensors and their EMA variants. LoRA files are not counted.

    Args:
        component_bytes: bytes of each component of the model in fp32.
    """
    model, share = sum(component_bytes.values()), DTYPE[config.export.dtype].itemsize / 4 * config.export.single_file
    return int(model * (1 + share)) * (1 + (config.stage[-1].ema > 0))


def grid_bytes(config: Config) -> int:
    """Return the bytes of a sample grid's pixels. Compressed, they are about two thirds."""
    try:
        images = images_of(config.sample, config.data.resolution)
    except UserError:  # `fastsd check` reports it
        images = images_of(config.sample.model_copy(update={"prompts_file": ""}), config.data.resolution)
    return 3 * sum(image.width * image.height for image in images)
