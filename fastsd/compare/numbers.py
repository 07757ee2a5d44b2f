"""Tables of numbers about runs, as text that the page lays out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsd.compare.runs import SMOOTHING_WINDOW, RunData, column
from fastsd.run.live_line import duration
from fastsd.run.settings import ABSENT, differences
from fastsd.terminal.texts import size_text

HASHES = {"order": "image order", "timesteps": "timesteps", "noise": "noise"}
PER = 1000  # a slope is the change over this number of images
MIN_POINTS = 3  # least number of points for a fit

Words = list[str | RunData]  # the cells of a row; a run is shown as its label in its colour


@dataclass(frozen=True)
class Table:
    """Rows of text under a head, with a note on how to read them. `key` is the table's name in JSON; "" = its title."""

    title: str
    note: str
    head: Sequence[str | RunData]
    rows: list[Words]
    key: str = ""


@dataclass(frozen=True)
class Line:
    """A least-squares line: its slope, the slope's standard error (nan for two points), its values at the first and last x."""

    slope: float
    error: float
    first: float
    last: float


@dataclass(frozen=True)
class Pixels:
    """Distance between pictures of equal prompt and seed: mean |difference| (at most 255), PSNR in dB, number of pictures."""

    mean: float
    psnr: float
    count: int


def fit(x: np.ndarray, y: np.ndarray) -> Line | None:
    """Fit a line through points. Return None if there are fewer than two different x."""
    centred = x - x.mean() if len(x) else x
    if len(x) < 2 or not centred.any():
        return None
    slope = float(centred @ y / (centred @ centred))
    mean = float(y.mean())
    residuals = y - mean - slope * centred
    error = math.sqrt(residuals @ residuals / (len(x) - 2) / (centred @ centred)) if len(x) > 2 else math.nan
    return Line(slope, error, mean + slope * float(centred[0]), mean + slope * float(centred[-1]))


def ends(x: np.ndarray, y: np.ndarray) -> tuple[Line | None, Line | None]:
    """Fit a line to the first fifth of the finite points and one to the last fifth, at least `MIN_POINTS` points each."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    count = max(len(x) // 5, MIN_POINTS)
    return fit(x[:count], y[:count]), fit(x[-count:], y[-count:])


def overview(runs: Sequence[RunData], baseline: RunData) -> Table:
    validations = _validations(runs)
    rows: list[Words] = []
    for run in runs:
        last_row = run.log[-1]
        status = "finished" if run.finished else "unfinished"
        status += ", baseline" if run is baseline and len(runs) > 1 else ""
        counts = [f"{last_row['step']:,}", f"{last_row['images']:,}", _number(last_row.get("epoch"), ".2f")]
        losses = [_number(_final_smoothed_loss(run), ".5f"), *(_last_validation(run, pair) for pair in validations)]
        rows.append([run, status, *counts, *losses])
    loss_heads = [f"{validation_label(pair)} loss" for pair in validations]
    head = ["run", "status", "steps", "images", "epochs", "smoothed loss", *loss_heads]
    note = f"Values at the end of each run. The smoothed loss is a moving average over {SMOOTHING_WINDOW:.0%} of the log rows."
    return Table("Runs", note, head, rows)


def settings(runs: Sequence[RunData]) -> Table:
    rows: list[Words] = [[key, *row] for key, row in differences([run.config for run in runs]).items()]
    note = "All other settings are equal." if rows else "All settings are equal."
    return Table("Settings that differ", note, ["setting", *runs], rows)


def trends(runs: Sequence[RunData]) -> Table:
    """Build a table with the start, the end and the slopes of the training loss and of each validation loss."""
    rows: list[Words] = []
    for run in runs:
        first_line, last_line = ends(run.log_column("images"), run.log_column("loss"))
        start = first_line.first if first_line else math.nan
        end = last_line.last if last_line else math.nan
        rows.append([run, "training", *_trend(start, end, first_line, last_line)])
    for pair in _validations(runs):
        for run in runs:
            if validation_rows := run.validation_rows(pair):
                losses = column(validation_rows, "loss")
                trend = _trend(losses[0], losses[-1], *ends(column(validation_rows, "images"), losses))
                rows.append([run, validation_label(pair), *trend])
    note = (
        f"Slopes are per {PER:,} images, ± standard error, of lines fitted to the first and last fifth of the points. Start "
        "and end are the ends of these lines for the training loss, and measured values for validation losses."
    )
    head = ["run", "loss", "start", "end", "change", "slope at start", "slope at end"]
    return Table("Start, end and slope", note, head, rows)


def agreement(runs: Sequence[RunData], baseline: RunData) -> Table:
    """Compare the training data of each run with the baseline's, by the hashes in log rows of equal step."""
    rows: list[Words] = []
    baseline_rows = {row["step"]: row for row in baseline.log}
    for run in runs:
        if run is not baseline:
            row_pairs = [(row, baseline_rows[row["step"]]) for row in run.log if row["step"] in baseline_rows]
            rows.append([run, *(_agreement_text(row_pairs, key) for key in HASHES)])
    note = "Compared with the baseline by the hashes in log rows of equal step."
    return Table("Equality of training data", note, ["run", *HASHES.values()], rows, key="Did they see the same?")


def _agreement_text(row_pairs: Sequence[tuple[Any, Any]], key: str) -> str:
    logged = [(a, b) for a, b in row_pairs if a.get(key) is not None and b.get(key) is not None]
    if not logged:
        return "not logged" if row_pairs else "no common steps"
    differing_step = next((a["step"] for a, b in logged if a[key] != b[key]), None)
    if differing_step is None:
        return f"equal in all {len(logged):,} common rows"
    return f"first difference at step {differing_step:,}"


def baseline_differences(runs: Sequence[RunData], baseline: RunData, pixels: Mapping[str, Pixels]) -> Table:
    """Build a table with each run's final values minus those of the baseline. `pixels` is keyed by run label."""
    validations = [pair for pair in _validations(runs) if baseline.validation_rows(pair)]
    rows: list[Words] = []
    for run in runs:
        if run is not baseline:
            distance = pixels.get(run.label)
            losses = [_number(_final_smoothed_loss(run) - _final_smoothed_loss(baseline), "+.5f")]
            losses += [_validation_difference(run, baseline, pair) for pair in validations]
            pixel_cells = [ABSENT] * 3
            if distance:
                pixel_cells = [f"{distance.mean:.2f} of 255", _psnr(distance.psnr), str(distance.count)]
            rows.append([run, *losses, *pixel_cells])
    note = "Final values of each run minus those of the baseline."
    if validations:
        note += (
            " ± is the standard error of the difference, paired by image if both runs measured the same images, noise and "
            "timesteps; otherwise it combines the standard errors of both."
        )
    loss_heads = ["smoothed loss", *(f"{validation_label(pair)} loss" for pair in validations)]
    head = ["run", *loss_heads, "mean pixel difference", "PSNR", "samples compared"]
    return Table("Difference from the baseline", f"{note} Samples are compared at equal prompt and seed.", head, rows)


def costs(runs: Sequence[RunData]) -> Table:
    rows: list[Words] = []
    for run in runs:
        cost, stages = run.cost, run.cost["stages"]
        parameters = " / ".join(dict.fromkeys(_number(stage.get("trained"), ",") for stage in stages)) or ABSENT
        training = [parameters, *_time_and_memory(run, stages), _number(_median_speed(run), ".3g")]
        export = [_size(cost.get("file_bytes")), _number(cost.get("sample_seconds"), ".3g", " s")]
        rows.append([run, *training, *export])
    estimated = any("≈" in str(word) for row in rows for word in row)
    note = f"Totals over all stages.{' ≈ marks estimates from the log of a run that has no cost.json.' if estimated else ''}"
    head = ["run", "trained parameters", "training time", "peak memory", "images/s", "exported file", "time per sample"]
    return Table("Cost", note, head, rows)


def _time_and_memory(run: RunData, stages: Sequence[Any]) -> tuple[str, str]:
    prefix = "" if stages else "≈ "
    if stages:
        seconds = sum(stage.get("seconds") or 0 for stage in stages)
        memory = max(stage.get("memory_gb") or 0 for stage in stages)
    else:
        rates = {row["step"]: row.get("images_per_second") for row in run.timing}
        seconds, images_before = 0.0, 0
        for row in run.log:
            rate = rates.get(row["step"])
            seconds += (row["images"] - images_before) / rate if rate else 0
            images_before = row["images"]
        memory = max(column(run.timing, "memory_gb"), default=0.0)
    training_time = prefix + duration(seconds) if seconds else ABSENT
    return training_time, prefix + size_text(memory * 1e9) if memory > 0 else ABSENT


def _median_speed(run: RunData) -> float:
    """Return the median of the images per second in the run's log."""
    rates = column(run.timing, "images_per_second")
    rates = rates[np.isfinite(rates)]
    return float(np.median(rates)) if len(rates) else math.nan


def validation_label(pair: tuple[str, str]) -> str:
    """Return the displayed name of a validation loss. `pair` is its (set, weights)."""
    name, weights = pair
    return name.replace("_", "-") + ("" if weights == "raw" else f" {weights.upper()}")


def _validations(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(pair for run in runs for pair in run.validations()))


def _last_validation(run: RunData, pair: tuple[str, str]) -> str:
    rows = run.validation_rows(pair)
    return f"{rows[-1]['loss']:.5f} ± {rows[-1]['se']:.2g}" if rows else ABSENT


def _validation_difference(run: RunData, baseline: RunData, pair: tuple[str, str]) -> str:
    rows = run.validation_rows(pair)
    if not rows:
        return ABSENT
    row, baseline_row = rows[-1], baseline.validation_rows(pair)[-1]
    error = math.hypot(row["se"], baseline_row["se"])
    same_items = row.get("items") and row["items"] == baseline_row.get("items")
    if same_items and None not in row["each"] + baseline_row["each"]:
        image_differences = np.subtract(row["each"], baseline_row["each"])
        error = image_differences.std(ddof=1) / math.sqrt(len(image_differences)) if len(image_differences) > 1 else 0.0
    return f"{row['loss'] - baseline_row['loss']:+.5f} ± {error:.2g}"


def _trend(start: float, end: float, first_line: Line | None, last_line: Line | None) -> list[str]:
    slopes = [f"{line.slope * PER:+#.3g}{_error(line.error * PER)}" if line else ABSENT for line in (first_line, last_line)]
    return [_number(start, ".5f"), _number(end, ".5f"), _number(end - start, "+.5f"), *slopes]


def _error(error: float) -> str:
    return f" ± {error:#.2g}" if math.isfinite(error) else ""


def _final_smoothed_loss(run: RunData) -> float:
    values = run.smoothed_loss()
    values = values[np.isfinite(values)]
    return float(values[-1]) if len(values) else math.nan


def _number(value: Any, spec: str, unit: str = "") -> str:
    is_finite = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:{spec}}{unit}" if is_finite else ABSENT


def _size(num_bytes: Any) -> str:
    return size_text(num_bytes) if isinstance(num_bytes, int) else ABSENT


def _psnr(psnr: float) -> str:
    return f"{psnr:.1f} dB" if math.isfinite(psnr) else "equal"
