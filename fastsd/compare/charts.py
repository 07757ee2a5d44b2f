"""Charts of `fastsd compare` and `fastsd watch`. A run has the same colour in all of them; the x axis is the images trained.

A chart is drawn in two widths: panels are beside each other in a wide one, and below each other in a narrow one, for phones.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from fastsd.compare.numbers import validation_label
from fastsd.compare.runs import RunData, column
from fastsd.run.folder import LogRow
from fastsd.run.validation import band_label

WIDE, NARROW = 12.0, 4.2  # inches, at about 100 px per inch on a page
DPI = 150  # of the PNG files
TEXT = 10.0  # points of the smallest text, so that it has at least 11 px on a page
POINTS = 3000  # most points of a curve
BANDS = 10  # most panels of timestep bands; if there are more bands, neighbours are averaged
DASHES = ("-", "--", ":", "-.")
INK, GRID, MARK = "#222222", "#e8e8e8", "#888888"  # a page replaces these by its own in dark mode


Chart = Callable[..., Figure | None]  # (runs, width in inches)


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


def loss_chart(runs: Sequence[RunData], width: float = WIDE) -> Figure:
    """Plot the training loss, as logged (faint) and smoothed (bold). Lines mark where stages start."""
    figure, (axes,) = _panels(1, 4.8, width)
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
    _mark_stage_starts(figure, axes, runs)
    return _add_legend(figure, runs)


def validation_chart(runs: Sequence[RunData], width: float = WIDE) -> Figure | None:
    """Plot each validation loss ± one standard error, dashed for EMA weights. Return None if nothing was measured."""
    sets = list(dict.fromkeys(name for run in runs for name, _ in run.validations()))
    if not sets:
        return None
    figure, panels = _panels(len(sets), 4.4, width)
    for axes, image_set in zip(panels, sets, strict=True):
        for run in runs:
            for name, weights in run.validations():
                if name == image_set:
                    rows = run.validation_rows((name, weights))
                    dash = "-" if weights == "raw" else "--"
                    _plot_with_errors(axes, run, rows, column(rows, "loss"), column(rows, "se"), dash)
        axes.set_title(f"{image_set.replace('_', '-')} images", fontsize=11)
        _mark_stage_starts(figure, axes, runs, show_names=len(sets) == 1)
    panels[0].set_ylabel("validation loss")
    has_ema = any(weights != "raw" for run in runs for _, weights in run.validations())
    return _add_legend(figure, runs, [("raw weights", "-"), ("EMA", "--")] if has_ema else [])


def band_chart(runs: Sequence[RunData], width: float = WIDE) -> Figure | None:
    """Plot the first validation loss in one panel for each timestep band. Return None if nothing was measured."""
    validation = next((validation for run in runs for validation in run.validations()), None)
    if validation is None:
        return None
    rows_by_run = {run.label: [row for row in run.validation_rows(validation) if _bands(row)] for run in runs}
    count = max((len(_bands(row)) for rows in rows_by_run.values() for row in rows), default=0)
    if not count:
        return None
    figure, panels = _panels(count, 2.9, width, across=5)
    for band, axes in enumerate(panels):
        for run in runs:
            rows = [row for row in rows_by_run[run.label] if band < len(_bands(row))]
            if rows:
                start, end, *_ = _bands(rows[-1])[band]
                axes.set_title(f"t {band_label(int(start), int(end))}", fontsize=TEXT)
                values = np.array([_bands(row)[band][2:] for row in rows])
                _plot_with_errors(axes, run, rows, values[:, 0], values[:, 1])
    figure.suptitle(f"{validation_label(validation)} loss by timestep", fontsize=11)
    return _add_legend(figure, runs)


def rate_chart(runs: Sequence[RunData], width: float = WIDE) -> Figure:
    """Plot lr. For D-Lion, also plot d and d * lr. Each trained component has its own dash style."""
    suffixes = list(dict.fromkeys(key[2:] for run in runs for row in run.log for key in row if key[:3] in ("lr", "lr_")))
    dash_by_suffix = {suffix: DASHES[i % len(DASHES)] for i, suffix in enumerate(suffixes)}
    readers: dict[str, Callable[[RunData, str], np.ndarray]] = {"lr": lambda run, suffix: run.log_column(f"lr{suffix}")}
    if any(key[:2] in ("d", "d_") for run in runs for row in run.log for key in row):
        readers["d"] = lambda run, suffix: run.log_column(f"d{suffix}")
        readers["d · lr"] = lambda run, suffix: run.log_column(f"d{suffix}") * run.log_column(f"lr{suffix}")
    figure, panels = _panels(len(readers), 3.8, width)
    for axes, (name, read) in zip(panels, readers.items(), strict=True):
        curves = []
        for run in runs:
            for suffix, dash in dash_by_suffix.items():
                curves.append(read(run, suffix))
                _plot_stages(axes, run, curves[-1], linewidth=1.7, linestyle=dash)
        _use_log_scale_if_wide(axes, np.concatenate(curves))
        axes.set_xlim(panels[0].get_xlim())
        axes.set_title(name, fontsize=11)
        _mark_stage_starts(figure, axes, runs, show_names=False)
    dashes = [(suffix[1:].replace("_", " ") or "first component", dash) for suffix, dash in dash_by_suffix.items()]
    return _add_legend(figure, runs, dashes if len(suffixes) > 1 else [])


def svg(figure: Figure, description: str) -> str:
    """Return a chart as an SVG element whose texts are texts. Its ink, grid and marks have the colours of the page."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    element = file.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>", "", element[element.index("<svg ") :], flags=re.DOTALL)
    # In HTML, an SVG element needs no namespaces, and fits its width without a size.
    size = re.sub(r' (?:width|height|xmlns|xmlns:xlink)="[^"]*"', "", element[: element.index(">")])
    label = html.escape(description, quote=True)
    element = size.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1) + element[element.index(">") :]
    for colour, name in ((INK, "ink"), (GRID, "grid"), (MARK, "mark"), ("#000000", "ink")):
        element = element.replace(colour, f"var(--{name})")
    return element


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


def _panels(count: int, height: float, width: float, across: int = 3) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels of this height in inches, at most `across` in a row of a wide figure."""
    across = min(count, across) if width == WIDE else 1
    rows = -(-count // across)
    figure = Figure(figsize=(width, height * rows if width == WIDE else 2.8 * rows + 0.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, across, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.set_visible(True)
        axes.set_xlabel("images trained")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    return figure, panels[:count]


def _mark_stage_starts(figure: Figure, axes: Axes, runs: Sequence[RunData], *, show_names: bool = True) -> None:
    """Draw a line where each stage starts. It is grey if all runs have the same starts, otherwise in the run's colour."""
    starts_per_run = [run.stage_starts() for run in runs]
    shared = all(starts == starts_per_run[0] for starts in starts_per_run)
    for run, starts in zip(runs[:1] if shared else runs, starts_per_run, strict=False):
        colour = MARK if shared else run.colour
        per_inch = max(column(run.log, "images")[-1] for run in runs) / figure.get_size_inches()[0]
        free_from = 0.0  # a name that would overlap the one before it is left out
        for name, images in starts if len(starts) > 1 else []:
            if images:
                axes.axvline(images, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.8, zorder=0)
            if show_names and shared and images >= free_from:
                axes.text(images, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=TEXT, color=MARK, va="bottom")
                free_from = images + (0.09 * len(name) + 0.1) * per_inch


def _use_log_scale_if_wide(axes: Axes, values: np.ndarray) -> None:
    positive = values[values > 0]
    if len(positive) and positive.max() > 30 * positive.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # exponents in small type would be too small
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))


def _add_legend(figure: Figure, runs: Sequence[RunData], dashes: Sequence[tuple[str, str]] = ()) -> Figure:
    """Add a legend below the figure, which explains the colours of runs and the dash styles. Return the figure."""
    handles = [Line2D([], [], color=run.colour, linewidth=2.4, label=run.label.replace("$", r"\$")) for run in runs]
    handles += [Line2D([], [], color=MARK, ls=dash, label=name) for name, dash in dashes]
    longest = max(len(str(handle.get_label())) for handle in handles)
    width, height = figure.get_size_inches()
    lines = -(-len(handles) // max(1, int(11.5 * width) // (longest + 8)))
    across = -(-len(handles) // lines)  # all lines of the legend become about equally long
    figure.set_size_inches(width, height + 0.22 * lines)  # so that a long legend takes nothing from the panels
    figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=TEXT)
    return figure
