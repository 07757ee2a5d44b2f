"""Read a run's logs and samples. The run may still train, may have been killed, or may come from an older version."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastsd.config.schema import Config, parse_config
from fastsd.errors import UserError
from fastsd.run.folder import Grid, LogRow, grid_files, read_costs, read_grid, read_rows
from fastsd.run.settings import short_names
from fastsd.terminal.console import counted

SMOOTHING_WINDOW = 0.04  # share of a run's log rows that a smoothed loss averages

VALIDATION_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int, "images": int, "set": str, "weights": str, "loss": (int, float), "se": (int, float),
}  # fmt: skip
# Colours that most people can distinguish, with a contrast of at least 3 on light and dark pages. They repeat after ten runs.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#1b97b5", "#9a4fb5", "#8c564b", "#7a7a7a", "#e0457b",
)  # fmt: skip


@dataclass
class RunData:
    """A run's config, logs and samples. Incomplete rows of the .jsonl files are left out."""

    folder: Path
    label: str
    colour: str
    config: Config
    log: list[LogRow]
    timing: list[LogRow]
    validation: list[LogRow]
    cost: LogRow
    grids: list[Grid] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return (self.folder / "model").is_dir()

    def log_column(self, key: str) -> np.ndarray:
        """Return a column of the log as float64. Rows without the key have nan."""
        return column(self.log, key)

    def epoch(self, step: int) -> float:
        """Return the number of epochs done at a step, interpolated between log rows."""
        steps, epochs = (np.concatenate([[0.0], self.log_column(key)]) for key in ("step", "epoch"))
        return float(np.interp(step, steps, epochs))

    def stage_starts(self, count: str = "images") -> list[tuple[str, int]]:
        """Return each logged stage's name, and the images (or steps, by `count`) that were done before it."""
        starts = [rows.start for rows in self.stages()]
        return [(self.log[start]["stage"], self.log[start - 1][count] if start else 0) for start in starts]

    def stages(self) -> list[slice]:
        """Return the slice of the log that belongs to each stage."""
        starts = [i for i, row in enumerate(self.log) if not i or row["stage"] != self.log[i - 1]["stage"]]
        return [slice(*pair) for pair in pairwise([*starts, len(self.log)])]

    def smoothed_loss(self) -> np.ndarray:
        """Return the loss, smoothed twice by a moving average over `SMOOTHING_WINDOW` of the rows. Stages are not mixed."""
        loss = self.log_column("loss")
        half = max(3, round(len(loss) * SMOOTHING_WINDOW / 2))
        for rows in self.stages():
            finite = np.isfinite(loss[rows])
            loss[rows][finite] = _average(_average(loss[rows][finite], half), half)
        return loss

    def validations(self) -> list[tuple[str, str]]:
        """Return each pair (set, weights) that validation measured, in a fixed order."""
        order = ["held_out", "stabilised", "raw", "ema"]
        pairs = {(row["set"], row["weights"]) for row in self.validation}
        return sorted(pairs, key=lambda pair: [(order.index(word) if word in order else len(order), word) for word in pair])

    def validation_rows(self, pair: tuple[str, str]) -> list[LogRow]:
        return [row for row in self.validation if (row["set"], row["weights"]) == pair]


def _average(y: np.ndarray, half: int) -> np.ndarray:
    """Average each value with up to `half` neighbours on either side."""
    sums, index = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (sums[end] - sums[start]) / (end - start)


def column(rows: Sequence[LogRow], key: str) -> np.ndarray:
    values = [row.get(key) for row in rows]
    return np.array([value if isinstance(value, (int, float)) else np.nan for value in values], dtype=np.float64)


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read the runs in these folders. Each gets a unique label and a colour.

    Raises:
        UserError: no folder is given, or a folder is not a run, has no log row yet, or is given twice.
    """
    if not folders:
        raise UserError("compare-no-runs", "no runs given; give run folders, for example runs/a runs/b")
    paths = [folder.resolve() for folder in folders]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise UserError("compare-run-twice", f"{folders[i]} is given twice; give each run once")
    labels = short_names([path.as_posix() for path in paths])
    return [
        read_run(folder, labels[path.as_posix()], COLOURS[i % len(COLOURS)])
        for i, (folder, path) in enumerate(counted("reading", list(zip(folders, paths, strict=True)), "runs"))
    ]


def read_run(folder: Path, label: str, colour: str) -> RunData:
    """Read the run in a folder. Raises UserError if it is not a run, or has no log row yet."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("compare-no-run", f"{folder} has no config.json; give the folder of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(
            "compare-config-unreadable",
            f"{path}: cannot be read as JSON ({error}); delete it and resume the run, which writes it again",
        ) from None
    config = parse_config(raw, str(path))
    log = read_rows(folder / "log.jsonl", {"step": int, "images": int, "stage": str})
    if not log:
        interval = f"{config.log.every} steps (log.every)"
        raise UserError("compare-no-rows", f"{folder / 'log.jsonl'} has no rows yet; wait for the first, after {interval}")
    timing = read_rows(folder / "timing.jsonl", {"step": int})
    validation = read_rows(folder / "validation.jsonl", VALIDATION_TYPES)
    cost, grids = read_costs(folder), read_grids(folder / "samples")
    return RunData(folder, label, colour, config, log, timing, validation, cost, grids)


def read_grids(folder: Path) -> list[Grid]:
    """Read the sample grids STAGE-STEP.png in a folder, sorted by step. Incomplete files are left out."""
    grids = [grid for path, stage, step in grid_files(folder) if (grid := read_grid(path, stage, step))]
    return sorted(grids, key=lambda grid: (grid.step, grid.path.name))
