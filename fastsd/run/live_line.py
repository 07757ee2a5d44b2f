"""The line that a run shows for each log interval, and the names of its numbers in TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from fastsd.config.stages import ENDLESS
from fastsd.run.folder import LogRow
from fastsd.terminal.texts import size_text

SEPARATOR = " | "
# Numbers of a row that are the x axis of a chart, or belong to one moment.
_NO_CURVES = {"step", "stage_step", "stage_steps", "images", "seconds", "eta", "stage_eta"}


def live_line(values: LogRow, timing: Mapping[str, float], saved_at: float | None, width: int = 0) -> str:
    """Format a log row. Fields that do not fit into `width` characters are left out from the end; 0 = no limit.

    Args:
        values: row of log.jsonl.
        timing: row of timing.jsonl.
        saved_at: time of the newest checkpoint as in `time.time()`; None = no checkpoint.
    """
    total = f"/{timing['stage_steps']}" if timing["stage_steps"] < ENDLESS else ""
    tunes_lr = values.get("d") is not None
    fields = [
        f"{values['stage']} {values['stage_step']}{total}",
        *(f"{name} {values[name]}" for name in ("spikes", "skipped") if values[name]),
        f"canary errors {timing['canary_errors']:.0f}" if timing.get("canary_errors") else "",
        f"loss {values['loss']:.4f} ~{values['loss_smooth']:.4f}",
        _eta(timing),
        f"{timing['images_per_second']:.1f} img/s",
        f"d*lr {values['d'] * values['lr']:.3g}" if tunes_lr else f"lr {values['lr']:.3g}",
        "not saved yet" if saved_at is None else f"saved {duration(max(0.0, time.time() - saved_at))} ago",
        size_text(timing["memory_gb"] * 1e9),
        f"grad {values['grad_norm']:.3g}",
        f"wait {timing['data_wait']:.0%}",
        f"epoch {values['epoch']:.2f}",
        f"d {values['d']:.3g}" if tunes_lr else "",
        f"MFU {timing['mfu']:.0%}" if "mfu" in timing else "",
    ]
    line, *others = filter(None, fields)
    for field in others:
        if width and len(line) + len(SEPARATOR) + len(field) > width:
            break
        line += SEPARATOR + field
    return line[:width] if width else line


def _eta(timing: Mapping[str, float]) -> str:
    stage, job = duration(timing["stage_eta"]), duration(timing["eta"])
    return f"ETA {stage}" if timing["eta"] == timing["stage_eta"] else f"ETA {stage}, all {job}"


def legend(*, stages: int, tunes_lr: bool) -> str:
    """Explain the signs of a line."""
    eta = ", ETA = time left in the stage, all = in all stages" if stages > 1 else ""
    step_size = ", d*lr = step size of D-Lion, which finds d" if tunes_lr else ""
    return f"~ = smoothed loss{eta}{step_size}, wait = share of the time spent waiting for data"


def charts(values: LogRow, timing: Mapping[str, float]) -> dict[str, float]:
    """Name the numbers of a row as charts, in the groups train/ and speed/."""
    groups = {"train": values, "speed": timing}
    rows = ((f"{group}/{name}", name, value) for group, row in groups.items() for name, value in row.items())
    return {chart: value for chart, name, value in rows if isinstance(value, (int, float)) and name not in _NO_CURVES}


def duration(seconds: float) -> str:
    """Format seconds for reading: 42s, 7m05s, 3h12m, 5d04h."""
    if not math.isfinite(seconds):
        return "?"
    seconds = int(seconds)
    for size, unit, part_size, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part_size:02d}{part_unit}"
    return f"{seconds}s"
