"""Readers for the files in a run's folder. They also work during training, after a kill, and with files of older versions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastsd.errors import UserError
from fastsd.run.checkpoint import checkpoints
from fastsd.sampling.grid import GRID_CHUNK


def resolve_model(name: str) -> str:
    """Return the newest checkpoint of a run, or any other `name` unchanged. Raises UserError if the run has no checkpoint."""
    folder = Path(name) / "checkpoints"
    if not folder.is_dir():
        return name
    checkpoint_paths = checkpoints(folder)
    if not checkpoint_paths:
        raise UserError("no-checkpoint", f"{name}: the run has no checkpoint yet; wait for one, or give a model")
    return str(checkpoint_paths[-1])


LogRow = dict[str, Any]
Cell = tuple[str, int]  # prompt, with those settings that it has itself, and seed
CellBox = tuple[int, int, int, int]  # left, top, right, bottom in px
PNG_END = b"IEND\xaeB`\x82"
WHOLE_SHEET: Cell = ("", 0)  # the only cell of a grid without stored cell positions


@dataclass(frozen=True)
class Grid:
    """A sample grid image, the positions of its cells, and the kind of weights that drew it, "model" or an average."""

    path: Path
    stage: str
    step: int
    cells: dict[Cell, CellBox]
    weights: str = "model"

    def whole(self) -> Image.Image:
        with Image.open(self.path) as sheet:
            return sheet.convert("RGB")

    def cut(self) -> dict[Cell, Image.Image]:
        sheet = self.whole()
        return {cell: sheet.crop(box) for cell, box in self.cells.items()}


def read_rows(path: Path, needed: dict[str, type | tuple[type, ...]]) -> list[LogRow]:
    """Read the complete rows of a JSONL file that have the `needed` keys and types. A kill may have truncated the last row."""
    rows: list[LogRow] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), value_type) for key, value_type in needed.items()):
            rows.append(row)
    return rows


def read_table(path: Path) -> LogRow | None:
    """Read the table in a JSON file. Return None if the file is missing or invalid."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


def read_costs(run: Path) -> dict[str, Any]:
    """Read RUN/cost.json. "stages" lists the rows that can be read, also if the file is damaged."""
    cost = read_table(run / "cost.json") or {}
    stages = cost.get("stages")
    rows = stages if isinstance(stages, list) else []
    return cost | {"stages": [row for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)]}


def grid_files(folder: Path) -> list[tuple[Path, str, int]]:
    """List the files in a folder that are named like sample grids, as (path, stage, step)."""
    matches = [(path, re.fullmatch(r"(?!\.)(.+)-(\d+)\.png", path.name)) for path in folder.glob("*.png")]
    return [(path, match[1], int(match[2])) for path, match in matches if match]


def step_of(path: Path) -> int:
    """Return the step in the name of a file or folder, such as step-00000120.json; 0 if it is not one that a run writes."""
    match = re.fullmatch(r"step-(\d+)", path.stem)
    return int(match[1]) if match else 0


def read_grid(path: Path, stage: str, step: int) -> Grid | None:
    """Read a sample grid. Return None if the file is incomplete or missing."""
    try:
        if not path.read_bytes().endswith(PNG_END):
            return None
        with Image.open(path) as sheet:
            return _grid(path, stage, step, sheet)
    except (OSError, SyntaxError):  # Pillow raises SyntaxError for a broken PNG
        return None


def _grid(path: Path, stage: str, step: int, sheet: Image.Image) -> Grid:
    try:
        metadata = json.loads(sheet.info[GRID_CHUNK])
        weights = str(metadata.get("weights", "model"))
        cells = {
            (str(cell.get("label") or cell["prompt"]), int(cell["seed"])): tuple(map(int, cell["box"]))
            for cell in metadata["cells"]
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        cells, weights = {}, "model"
    return Grid(path, stage, step, cells or {WHOLE_SHEET: (0, 0, *sheet.size)}, weights)  # type: ignore[arg-type]
