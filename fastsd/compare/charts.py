"""Charts of `fastsd compare`. A run has the same colour in all of them; the x axis is the number of images trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from fastsd.compare.numbers import validation_label
from fastsd.compare.runs import RunData, column
from fastsd.run.folder import LogRow

WIDTH, DPI = 12.0, 150  # inches and dots per inch: 1800 px, which look sharp on a page that is 1200 px wide
POINTS = 3000  # most points of a curve
BANDS = 10  # most panels of timestep bands; if there are more bands, neighbours are averaged
DASHES = ("-", "--", ":", "-.")
INK = "#222222"


def thin(x: np.ndarray, y: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to about `limit` points that look the same. The lowest and highest point of each interval are kept."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y
    indices = [np.array([0, len(x) - 1])]
    edges = np.linspace(0, len(x), limit // 2 + 1).astype(int)
    for start, end in pairwise(edges):
        indices.append(start + np.array([y[start:end].argmin(), y[start:end].argmax()]))
    kept = np.unique(np.concatenate(indices))
    return x[kept], y[kept]


def loss_chart(runs: Sequence[RunData]) -> Figure:
    """Plot the training loss, as logged (faint) and smoothed (bold). Lines mark where stages start."""
    figure, (axes,) = _panels(1, 4.8)
    losses = []
    for run in runs:
        raw = run.log_column("loss")
        _plot_stages(axes, run, raw, alpha=0.22, linewidth=0.7)
        _plot_stages(axes, run, run.smoothed_loss(), linewidth=1.9)
        losses.append(raw[np.isfinite(raw)])
    values = np.concatenate(losses)
    if len(values):  # percentiles, so that a single spike does not flatten the curves
        bottom, top = np.percentile(values, [0.3, 99.7])
        margin = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
    axes.set_ylabel("training loss")
    _mark_stage_starts(axes, runs)
    return _add_legend(figure, runs)


def validation_chart(runs: Sequence[RunData]) -> Figure | None:
    """Plot each validation loss ± one standard error, dashed for EMA weights. Return None if nothing was measured."""
    sets = list(dict.fromkeys(name for run in runs for name, _ in run.validations()))
    if not sets:
        return None
    figure, panels = _panels(len(sets), 4.4)
    for axes, image_set in zip(panels, sets, strict=True):
        for run in runs:
            for name, weights in run.validations():
                if name == image_set:
                    rows = run.validation_rows((name, weights))
                    dash = "-" if weights == "raw" else "--"
                    _plot_with_errors(axes, run, rows, column(rows, "loss"), column(rows, "se"), dash)
        axes.set_title(f"{image_set.replace('_', '-')} images", fontsize=11)
        _mark_stage_starts(axes, runs, show_names=len(sets) == 1)
    panels[0].set_ylabel("validation loss")
    has_ema = any(weights != "raw" for run in runs for _, weights in run.validations())
    return _add_legend(figure, runs, [("raw weights", "-"), ("EMA", "--")] if has_ema else [])


def band_chart(runs: Sequence[RunData]) -> Figure | None:
    """Plot the first validation loss in one panel for each timestep band. Return None if nothing was measured."""
    validation = next((validation for run in runs for validation in run.validations()), None)
    if validation is None:
        return None
    rows_by_run = {run.label: [row for row in run.validation_rows(validation) if _bands(row)] for run in runs}
    count = max((len(_bands(row)) for rows in rows_by_run.values() for row in rows), default=0)
    if not count:
        return None
    across = min(count, 5)
    figure, panels = _panels(count, 2.9 * -(-count // across), across)
    for band, axes in enumerate(panels):
        for run in runs:
            rows = [row for row in rows_by_run[run.label] if band < len(_bands(row))]
            if rows:
                start, end, *_ = _bands(rows[-1])[band]
                axes.set_title(f"t {start:g} to {end:g}", fontsize=10)
                values = np.array([_bands(row)[band][2:] for row in rows])
                _plot_with_errors(axes, run, rows, values[:, 0], values[:, 1])
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{validation_label(validation)} loss by timestep", fontsize=11)
    return _add_legend(figure, runs)


def rate_chart(runs: Sequence[RunData]) -> Figure:
    """Plot lr. For D-Lion, also plot d and d * lr. Each trained component has its own dash style."""
    suffixes = list(dict.fromkeys(key[2:] for run in runs for row in run.log for key in row if key[:3] in ("lr", "lr_")))
    dash_by_suffix = {suffix: DASHES[i % len(DASHES)] for i, suffix in enumerate(suffixes)}
    readers: dict[str, Callable[[RunData, str], np.ndarray]] = {"lr": lambda run, suffix: run.log_column(f"lr{suffix}")}
    if any(key[:2] in ("d", "d_") for run in runs for row in run.log for key in row):
        readers["d"] = lambda run, suffix: run.log_column(f"d{suffix}")
        readers["d · lr"] = lambda run, suffix: run.log_column(f"d{suffix}") * run.log_column(f"lr{suffix}")
    figure, panels = _panels(len(readers), 3.8)
    for axes, (name, read) in zip(panels, readers.items(), strict=True):
        curves = []
        for run in runs:
            for suffix, dash in dash_by_suffix.items():
                curves.append(read(run, suffix))
                _plot_stages(axes, run, curves[-1], linewidth=1.7, linestyle=dash)
        _use_log_scale_if_wide(axes, np.concatenate(curves))
        axes.set_xlim(panels[0].get_xlim())
        axes.set_title(name, fontsize=11)
        _mark_stage_starts(axes, runs, show_names=False)
    dashes = [(suffix[1:].replace("_", " ") or "first component", dash) for suffix, dash in dash_by_suffix.items()]
    return _add_legend(figure, runs, dashes if len(suffixes) > 1 else [])


def _bands(row: LogRow) -> list[list[float]]:
    """Return [start, end, loss, standard error] of a row's timestep bands. Of more than `BANDS`, neighbours are averaged."""
    bands: list[list[float]] = row.get("bands") or []
    size = -(-len(bands) // BANDS)
    if size < 2:
        return bands
    groups = [np.array(bands[i : i + size], dtype=float) for i in range(0, len(bands), size)]
    errors = [np.sqrt((group[:, 3] ** 2).sum()) / len(group) for group in groups]
    return [[group[0, 0], group[-1, 1], group[:, 2].mean(), error] for group, error in zip(groups, errors, strict=True)]


def _plot_stages(axes: Axes, run: RunData, y: np.ndarray, **style: Any) -> None:
    """Plot a curve over the images trained. It has a gap where a stage starts; a single point is drawn as a dot."""
    x, stages = run.log_column("images"), run.stages()
    for rows in stages:
        points = thin(x[rows], y[rows], POINTS // len(stages))
        axes.plot(*points, color=run.colour, marker="." if len(points[0]) == 1 else "", **style)


def _plot_with_errors(
    axes: Axes, run: RunData, rows: Sequence[LogRow], y: np.ndarray, error: np.ndarray, dash: str = "-"
) -> None:
    points: dict[str, Any] = {"marker": "o", "capsize": 2.5} if len(rows) <= 40 else {"marker": "", "capsize": 0}
    style: dict[str, Any] = {"color": run.colour, "linestyle": dash, "linewidth": 1.6, "markersize": 3.5, "elinewidth": 0.9}
    axes.errorbar(column(rows, "images"), y, error, **points, **style)


def _panels(count: int, height: float, across: int | None = None) -> tuple[Figure, list[Axes]]:
    across = across or count
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(-(-count // across), across, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.set_visible(True)
        axes.set_xlabel("images trained")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#e8e8e8", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    return figure, panels[:count]


def _mark_stage_starts(axes: Axes, runs: Sequence[RunData], *, show_names: bool = True) -> None:
    """Draw a line where each stage starts. It is grey if all runs have the same starts, otherwise in the run's colour."""
    starts_per_run = [run.stage_starts() for run in runs]
    shared = all(starts == starts_per_run[0] for starts in starts_per_run)
    for run, starts in zip(runs[:1] if shared else runs, starts_per_run, strict=False):
        colour = "#888888" if shared else run.colour
        for name, images in starts if len(starts) > 1 else []:
            if images:
                axes.axvline(images, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.8, zorder=0)
            if show_names and shared:
                axes.text(images, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=8.5, color="#555555", va="bottom")


def _use_log_scale_if_wide(axes: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    if len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))


def _add_legend(figure: Figure, runs: Sequence[RunData], dashes: Sequence[tuple[str, str]] = ()) -> Figure:
    """Add a legend below the figure, which explains the colours of runs and the dash styles. Return the figure."""
    handles = [Line2D([], [], color=run.colour, linewidth=2.4, label=run.label.replace("$", r"\$")) for run in runs]
    handles += [Line2D([], [], color="#555555", ls=dash, label=name) for name, dash in dashes]
    longest = max(len(str(handle.get_label())) for handle in handles)
    lines = -(-len(handles) // max(1, 150 // (longest + 8)))
    across = -(-len(handles) // lines)  # all lines of the legend become about equally long
    figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=9)
    return figure
