"""Disk space of a run, and the bytes that it writes until it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fastsd.config.schema import Config
from fastsd.config.stages import ENDLESS, StageTable, parse_amount
from fastsd.errors import UserError
from fastsd.model.formats.write import DTYPE
from fastsd.sampling.prompts import images_of
from fastsd.terminal.console import Console
from fastsd.terminal.texts import size_text
from fastsd.train.schedule import Interval, points

ROW, TENSORBOARD_ROW = 600, 800  # bytes of a row of log.jsonl and timing.jsonl together, and of the same row in TensorBoard


def run_bytes(
    config: Config,
    component_bytes: Mapping[str, int],
    checkpoint_bytes: Sequence[int],
    average_bytes: Sequence[int],
    changed: Sequence[str],
    lengths: Sequence[tuple[int, float] | None],
    epoch: int,
) -> dict[str, Any]:
    """Return the bytes of a run's files on the disk, by kind.

    They are upper limits of a healthy run, except that small files are not counted.

    Args:
        component_bytes: bytes of each component of the model in fp32.
        checkpoint_bytes: bytes that a checkpoint of each stage adds to those before it. Frozen components are hard links.
        average_bytes: bytes of each stage's averages of the weights in fp32.
        changed: components that the first stage trains.
        lengths: steps and seconds of each stage, or None if they are unknown; then only its end has a checkpoint that stays.
        epoch: images per epoch, if a length is known.

    Returns:
        "permanent" (the number of checkpoints that stay, of each stage), "checkpoints", "snapshots", "exports", "samples",
        "logs", "total"; and "written", the bytes written over the whole run, or None if a length is unknown.
    """
    model, kept, peak, written, grids, rows, snapshots = sum(component_bytes.values()), 0, 0, 0, 0, 0, 0
    permanent_counts = []
    for stage, size, averages, length in zip(config.stage, checkpoint_bytes, average_bytes, lengths, strict=True):
        steps, seconds = length or (1, 0.0)
        times = partial(_times, stage, epoch, steps, seconds)
        permanent = 1 + times("keep_every") + sum(step < steps for step in (points(stage, epoch) if length else ()))
        saved = permanent + times("checkpoint_every")
        # The last one, which stays, is written before the oldest of the newest `keep_checkpoints` is deleted.
        peak = max(peak, kept + (permanent + stage.keep_checkpoints) * size)
        kept, written = kept + permanent * size, written + saved * size
        permanent_counts.append(permanent)
        snapshots += snapshot_bytes(stage, averages, steps if length else ENDLESS)
        grids += 1 + times("sample_every") + (stage.sample_every != 0)
        rows += steps // config.log.every + 1

    exports, copies = export_bytes(config, component_bytes), 1 + config.log.tensorboard
    samples, logs = grids * grid_bytes(config) * copies, rows * (ROW + TENSORBOARD_ROW * config.log.tensorboard)
    checkpoints = peak + model - sum(component_bytes[name] for name in changed)
    disk = {"checkpoints": checkpoints, "snapshots": snapshots, "exports": exports, "samples": samples, "logs": logs}
    written += checkpoints - peak + snapshots + exports + samples + logs
    total = {"total": sum(disk.values()), "written": written if all(lengths) else None}
    return {"permanent": permanent_counts} | disk | total


def snapshot_bytes(stage: StageTable, averages: int, steps: int) -> int:
    """Return the bytes of a stage's snapshots of its averages, which have `averages` bytes in fp32."""
    count = min(stage.ema_snapshots, steps) if stage.sigma_rel else 0
    return count * averages * DTYPE[stage.ema_snapshot_dtype].itemsize // 4


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
    return int(model * (1 + share)) * (1 + len(config.stage[-1].averages))


def grid_bytes(config: Config) -> int:
    """Return the bytes of a sample grid's pixels. Compressed, they are about two thirds."""
    try:
        images = images_of(config.sample, config.data.resolution)
    except UserError:  # `fastsd check` reports it
        images = images_of(config.sample.model_copy(update={"prompts_file": ""}), config.data.resolution)
    return 3 * sum(image.width * image.height for image in images)


def print_disk(disk: Mapping[str, Any], console: Console) -> None:
    """Print the bytes on the disk, from the JSON of a plan."""
    per_image, sizes = disk["cache_an_image"], disk["a_checkpoint"]
    cache = disk["cache"] or per_image * 1_000_000
    scope = "" if disk["cache"] else " for 1,000,000 images"
    console.echo(f"\ndisk       {size_text(cache)} cache{scope}, {per_image / 1024:g} KiB per image")
    lines = [
        f"{size_text(disk['checkpoints'])} checkpoints at most: {sum(disk['permanent'])} stay, besides the newest; "
        f"up to {size_text(max(sizes))} each",
        *([f"{size_text(disk['snapshots'])} snapshots of averages"] if disk["snapshots"] else []),
        f"{size_text(disk['exports'])} exports: diffusers folders and single files",
        f"{size_text(disk['samples'])} sample grids and {size_text(disk['logs'])} logs",
        f"{size_text(disk['total'])} in all, without the cache"
        + (" and what depends on the number of images, which is unknown" if disk["written"] is None else ""),
    ]
    if disk["written"] is not None:
        lines.append(f"{size_text(disk['written'])} are written until the run ends")
    if disk["written_a_day"]:
        slowest, fastest = map(size_text, disk["written_a_day"])
        lines[-1] += f", predicted {slowest} to {fastest} a day; compare this with the endurance (TBW) of the SSD"
    console.echo("\n".join(f"           {line}" for line in lines))
