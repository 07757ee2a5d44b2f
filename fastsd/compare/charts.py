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

WIDTH, DPI = 12.0, 150  # inches, dots per inch: 1800 px, sharp where a page shows 1200
POINTS = 3000  # of a curve, at most
BANDS = 10  # panels of timestep bands, at most; neighbouring bands are averaged if there are more
DASHES = ("-", "--", ":", "-.")
INK = "#222222"


def thin(x: np.ndarray, y: np.ndarray, limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to about `limit` points that look the same: the lowest and the highest point of each stretch."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= limit:
        return x, y
    kept = [np.array([0, len(x) - 1])]
    edges = np.linspace(0, len(x), limit // 2 + 1).astype(int)
    for start, end in pairwise(edges):
        kept.append(start + np.array([y[start:end].argmin(), y[start:end].argmax()]))
    order = np.unique(np.concatenate(kept))
    return x[order], y[order]


def loss_chart(runs: Sequence[RunData]) -> Figure:
    """Plot the training loss, raw (faint) and smoothed, with the borders of stages."""
    figure, (axes,) = _panels(1, 4.8)
    losses = []
    for run in runs:
        raw = run.log_column("loss")
        _by_stage(axes, run, raw, alpha=0.22, linewidth=0.7)
        _by_stage(axes, run, run.smoothed_loss(), linewidth=1.9)
        losses.append(raw[np.isfinite(raw)])
    values = np.concatenate(losses)
    if len(values):  # one spike must not flatten the rest
        bottom, top = np.percentile(values, [0.3, 99.7])
        margin = 0.06 * (top - bottom) or 0.1 * abs(top) or 1.0
        axes.set_ylim(bottom - margin, top + margin)
    axes.set_ylabel("training loss")
    _borders(axes, runs)
    return _finish(figure, runs)


def validation_chart(runs: Sequence[RunData]) -> Figure | None:
    """Plot the loss of each validation set ± one standard error, dashed for EMA weights. None if nothing was measured."""
    sets = list(dict.fromkeys(name for run in runs for name, _ in run.validations()))
    if not sets:
        return None
    figure, panels = _panels(len(sets), 4.4)
    for axes, name in zip(panels, sets, strict=True):
        for run in runs:
            for validation in run.validations():
                if validation[0] == name:
                    rows = run.validation_rows(validation)
                    _with_errors(
                        axes, run, rows, column(rows, "loss"), column(rows, "se"), "-" if validation[1] == "raw" else "--"
                    )
        axes.set_title(f"{name.replace('_', '-')} images", fontsize=11)
        _borders(axes, runs, names=len(sets) == 1)
    panels[0].set_ylabel("validation loss")
    averaged = any(weights != "raw" for run in runs for _, weights in run.validations())
    return _finish(figure, runs, [("raw weights", "-"), ("EMA", "--")] if averaged else [])


def band_chart(runs: Sequence[RunData]) -> Figure | None:
    """Plot the loss of the first measured set in one panel for each timestep band. None if nothing was measured."""
    validation = next((validation for run in runs for validation in run.validations()), None)
    curves = {run.label: [row for row in run.validation_rows(validation) if _bands(row)] for run in runs} if validation else {}
    count = max((len(_bands(row)) for rows in curves.values() for row in rows), default=0)
    if not count or validation is None:
        return None
    across = min(count, 5)
    figure, panels = _panels(count, 2.9 * -(-count // across), across)
    for number, axes in enumerate(panels):
        for run in runs:
            rows = [row for row in curves[run.label] if number < len(_bands(row))]
            if rows:
                first, last, *_ = _bands(rows[-1])[number]
                axes.set_title(f"t {first:g} to {last:g}", fontsize=10)
                values = np.array([_bands(row)[number][2:] for row in rows])
                _with_errors(axes, run, rows, values[:, 0], values[:, 1])
        axes.tick_params(labelsize=8)
    figure.suptitle(f"{validation_label(validation)} loss by timestep", fontsize=11)
    return _finish(figure, runs)


def rate_chart(runs: Sequence[RunData]) -> Figure:
    """Plot lr and, for D-Lion, d and d*lr. Each trained component has its own dash style."""
    suffixes = list(dict.fromkeys(key[2:] for run in runs for row in run.log for key in row if key[:3] in ("lr", "lr_")))
    with_d = any(key[:2] in ("d", "d_") for run in runs for row in run.log for key in row)
    kinds: list[tuple[str, Callable[[RunData, str], np.ndarray]]] = [("lr", lambda run, suffix: run.log_column(f"lr{suffix}"))]
    if with_d:
        kinds.append(("d", lambda run, suffix: run.log_column(f"d{suffix}")))
        kinds.append(("d · lr", lambda run, suffix: run.log_column(f"d{suffix}") * run.log_column(f"lr{suffix}")))
    figure, panels = _panels(len(kinds), 3.8)
    for axes, (name, values) in zip(panels, kinds, strict=True):
        curves = []
        for run in runs:
            for i, suffix in enumerate(suffixes):
                curves.append(values(run, suffix))
                _by_stage(axes, run, curves[-1], linewidth=1.7, linestyle=DASHES[i % len(DASHES)])
        _log_if_wide(axes, np.concatenate(curves))
        axes.set_xlim(panels[0].get_xlim())
        axes.set_title(name, fontsize=11)
        _borders(axes, runs, names=False)
    dashes = [(suffix[1:].replace("_", " ") or "first component", DASHES[i % 4]) for i, suffix in enumerate(suffixes)]
    return _finish(figure, runs, dashes if len(suffixes) > 1 else [])


def _bands(row: LogRow) -> list[list[float]]:
    """Return [from, to, loss, se] of each band of a row. More than `BANDS` bands are averaged with their neighbours."""
    bands: list[list[float]] = row.get("bands") or []
    size = -(-len(bands) // BANDS)
    if size < 2:
        return bands
    groups = [np.array(bands[i : i + size], dtype=float) for i in range(0, len(bands), size)]
    return [[g[0, 0], g[-1, 1], g[:, 2].mean(), np.sqrt((g[:, 3] ** 2).sum()) / len(g)] for g in groups]


def _by_stage(axes: Axes, run: RunData, y: np.ndarray, **style: Any) -> None:
    """Plot a curve over images, with a gap where a stage starts and a dot for a single point."""
    x, stages = run.log_column("images"), run.stages()
    for rows in stages:
        points = thin(x[rows], y[rows], POINTS // len(stages))
        axes.plot(*points, color=run.colour, marker="." if len(points[0]) == 1 else "", **style)


def _with_errors(axes: Axes, run: RunData, rows: Sequence[LogRow], y: np.ndarray, error: np.ndarray, line: str = "-") -> None:
    points: dict[str, Any] = {"marker": "o", "capsize": 2.5} if len(rows) <= 40 else {"marker": "", "capsize": 0}
    style: dict[str, Any] = {"color": run.colour, "linestyle": line, "linewidth": 1.6, "markersize": 3.5, "elinewidth": 0.9}
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


def _borders(axes: Axes, runs: Sequence[RunData], names: bool = True) -> None:
    """Draw a line where a stage starts: grey if all runs share the borders, otherwise in the run's colour."""
    borders_per_run = [run.stage_starts() for run in runs]
    shared = all(borders == borders_per_run[0] for borders in borders_per_run)
    for run, borders in zip(runs[:1] if shared else runs, borders_per_run, strict=False):
        colour = "#888888" if shared else run.colour
        for name, images in borders if len(borders) > 1 else []:
            if images:
                axes.axvline(images, color=colour, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.8, zorder=0)
            if names and shared:
                axes.text(images, 1.01, name, transform=axes.get_xaxis_transform(), fontsize=8.5, color="#555555", va="bottom")


def _log_if_wide(axes: Axes, values: np.ndarray) -> None:
    above = values[values > 0]
    if len(above) and above.max() > 30 * above.min():
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))


def _finish(figure: Figure, runs: Sequence[RunData], dashes: Sequence[tuple[str, str]] = ()) -> Figure:
    """Add one legend below the whole figure, with the runs' names and the meaning of dash styles."""
    handles = [Line2D([], [], color=run.colour, linewidth=2.4, label=run.label.replace("$", r"\$")) for run in runs]
    handles += [Line2D([], [], color="#555555", ls=dash, label=name) for name, dash in dashes]
    longest = max(len(str(handle.get_label())) for handle in handles)
    lines = -(-len(handles) // max(1, 150 // (longest + 8)))
    across = -(-len(handles) // lines)  # makes all lines of the legend about equally long
    figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=9)
    return figure
