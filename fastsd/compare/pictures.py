"""Sheets of samples: over checkpoints, runs side by side, differences from a baseline, and animations."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastsd.compare.numbers import Pixels
from fastsd.compare.runs import RunData
from fastsd.run.folder import WHOLE_SHEET, Cell, Grid

SheetRow = tuple[str, Sequence[Image.Image | None]]  # label and pictures

WIDTH, HEIGHT = 1200, 1700  # px: largest sheet, unless its cells would be narrower than CELL[0]
CELL = (72, 260)  # px: narrowest cell, and widest cell unless its picture is wider
MARGIN, GAP, HEAD = 170, 6, 58  # px: labels at the left, between cells, column heads
COLUMNS, ROWS = 12, 12  # of a sheet, at most; of more checkpoints, evenly spaced ones are shown
FRAMES, FRAME_WIDTH = 60, 640  # of an animation, at most
INK, GREY = "#222222", "#666666"


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib and has more letters than Pillow's own font."""
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def sheet(heads: Sequence[str], rows: Sequence[SheetRow], colours: Sequence[str] = ()) -> Image.Image:
    """Lay out pictures in rows under column heads, with a label left of each row and a colour bar over each column."""
    shown = [image for _, images in rows for image in images if image]
    narrowest, widest = CELL[0], max([CELL[1], *(image.width for image in shown)])
    ratio = max((image.height / image.width for image in shown), default=1.0)
    available = min((WIDTH - MARGIN) // len(heads) - GAP, round(((HEIGHT - HEAD) // len(rows) - GAP) / ratio))
    cell_width = max(narrowest, min(widest, available))
    cell_height = round(cell_width * ratio)

    page = Image.new("RGB", (MARGIN + len(heads) * (cell_width + GAP), HEAD + len(rows) * (cell_height + GAP)), "white")
    pen = ImageDraw.Draw(page)
    for c, head in enumerate(heads):
        left = MARGIN + c * (cell_width + GAP)
        if colours:
            pen.rectangle((left, HEAD - 7, left + cell_width - 1, HEAD - 4), fill=colours[c])
        pen.multiline_text(
            (left, HEAD - 10), _wrapped(head, 11, cell_width, 3), font=font(11), fill=INK, anchor="ld", spacing=2
        )
    for r, (label, images) in enumerate(rows):
        top = HEAD + r * (cell_height + GAP)
        text = _wrapped(label, 12, MARGIN - 16, max(1, cell_height // 16))
        pen.multiline_text((0, top + cell_height / 2), text, font=font(12), fill=INK, anchor="lm", spacing=3)
        for c, image in enumerate(images):
            left = MARGIN + c * (cell_width + GAP)
            if image is None:
                pen.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), fill="#f4f4f4")
            else:
                page.paste(_fitted(image, cell_width, cell_height), (left, top))
    return page


def over_checkpoints(run: RunData) -> Image.Image:
    """Lay out a run's samples: a row for each prompt and seed, a column for each checkpoint."""
    chosen = [run.grids[i] for i in _spread(len(run.grids), COLUMNS)]
    cut = [grid.cut() for grid in chosen]
    rows = [(_label(cell, cut), [cells.get(cell) for cells in cut]) for cell in _cells(cut)]
    heads = [f"{grid.stage}\nstep {grid.step:,}\nepoch {round(run.epoch(grid.step), 1):g}" for grid in chosen]
    return sheet(heads, rows)


def side_by_side(runs: Sequence[RunData]) -> Image.Image | None:
    """Lay out the last samples of every run: a row for each prompt and seed, a column for each run. None without samples."""
    cut = [run.grids[-1].cut() if run.grids else {} for run in runs]
    rows = [(_label(cell, cut), [cells.get(cell) for cells in cut]) for cell in _cells(cut)]
    return sheet([run.label for run in runs], rows, [run.colour for run in runs]) if rows else None


def pixel_differences(runs: Sequence[RunData], baseline: RunData) -> tuple[dict[str, Pixels], Image.Image | None, int]:
    """Compare each run's last samples with the baseline's, pixel by pixel.

    Returns:
        Distances by a run's label; a sheet of the baseline's pictures beside |difference| x factor; the factor. The sheet is
        None and the factor 1 if no other run has a picture of equal prompt, seed and size.
    """
    baseline_images = baseline.grids[-1].cut() if baseline.grids else {}
    baseline_images.pop(WHOLE_SHEET, None)
    differences: dict[str, dict[Cell, np.ndarray]] = {}  # absolute, by run label
    for run in runs:
        if run is not baseline and run.grids:
            images = run.grids[-1].cut()
            common = [cell for cell in baseline_images if cell in images and images[cell].size == baseline_images[cell].size]
            differences[run.label] = {cell: np.abs(_pixels(images[cell]) - _pixels(baseline_images[cell])) for cell in common}
    differences = {label: by_cell for label, by_cell in differences.items() if by_cell}
    if not differences:
        return {}, None, 1
    levels = np.concatenate([d.ravel() for by_cell in differences.values() for d in by_cell.values()])
    factor = 2 ** max(0, math.floor(math.log2(255 / max(float(np.percentile(levels, 99)), 1.0))))

    others = [run for run in runs if run.label in differences]
    rows: list[SheetRow] = []
    for cell in _cells([baseline_images]):
        shown = [
            Image.fromarray((by_cell[cell] * factor).clip(0, 255).astype(np.uint8)) if cell in by_cell else None
            for by_cell in (differences[run.label] for run in others)
        ]
        rows.append((_label(cell, [baseline_images]), [baseline_images[cell], *shown]))
    heads = [baseline.label, *(f"|difference| × {factor}:\n{run.label}" for run in others)]
    picture = sheet(heads, rows, [baseline.colour, *(run.colour for run in others)])
    return {label: _distance(list(by_cell.values())) for label, by_cell in differences.items()}, picture, factor


def frames(grids: Sequence[Grid]) -> list[tuple[Grid, Image.Image]]:
    """Return a run's whole grids in one size, for a slider or an animation. More than `FRAMES` are thinned out evenly."""
    chosen = [grids[i] for i in _spread(len(grids), FRAMES)]
    sheets = [(grid, _narrowed(grid.whole())) for grid in chosen]
    size = (max(s.width for _, s in sheets), max(s.height for _, s in sheets))
    return [(grid, _fitted(picture, *size)) for grid, picture in sheets]


def write_gif(path: Path, label: str, pictures: Sequence[tuple[Grid, Image.Image]]) -> None:
    """Write an animation with stage, step and run above each frame. It pauses on the last frame."""
    pages = []
    for grid, picture in pictures:
        page = Image.new("RGB", (picture.width, picture.height + HEAD), "white")
        page.paste(picture, (0, HEAD))
        pen = ImageDraw.Draw(page)
        pen.text((6, 6), f"{grid.stage} {grid.step:,}", font=font(16, bold=True), fill=INK)
        pen.text((6, 32), _wrapped(label, 12, picture.width - 12, 1), font=font(12), fill=GREY)
        palette = page.quantize(method=Image.Quantize.MAXCOVERAGE)  # Pillow dithers only to a given palette
        pages.append(page.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    frame_duration = max(80, min(700, 9000 // len(pages)))
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=[frame_duration] * (len(pages) - 1) + [2500], loop=0)


def _distance(differences: Sequence[np.ndarray]) -> Pixels:
    every = np.concatenate([difference.ravel() for difference in differences]).astype(np.float64)
    square = float(np.square(every).mean())
    return Pixels(float(every.mean()), 10 * math.log10(255**2 / square) if square else math.inf, len(differences))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def _cells(cut: Sequence[dict[Cell, Image.Image]]) -> list[Cell]:
    """Choose at most `ROWS` rows: every prompt's first seed before any second seed. They are sorted by prompt."""
    every = list(dict.fromkeys(cell for cells in cut for cell in cells))
    prompts = list(dict.fromkeys(prompt for prompt, _ in every))
    rank = {cell: sum(other[0] == cell[0] for other in every[:i]) for i, cell in enumerate(every)}
    chosen = sorted(every, key=lambda cell: rank[cell])[:ROWS]
    return sorted(chosen, key=lambda cell: (prompts.index(cell[0]), rank[cell]))


def _label(cell: Cell, cut: Sequence[dict[Cell, Image.Image]]) -> str:
    """Return a prompt, with its seed if there are several seeds."""
    seeds = {seed for cells in cut for _, seed in cells}
    return cell[0] + (f"\n(seed {cell[1]})" if len(seeds) > 1 else "")


def _spread(count: int, limit: int) -> list[int]:
    """Return all `count` indices, or `limit` evenly spaced ones with the first and the last."""
    return list(range(count)) if count <= limit else np.linspace(0, count - 1, limit).round().astype(int).tolist()


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """Fit an image into a field of this size, as large as possible."""
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white")


def _narrowed(image: Image.Image) -> Image.Image:
    width = min(2 * image.width, FRAME_WIDTH)  # no more than twice as large: small pictures gain nothing
    return _fitted(image, width, max(1, round(image.height * width / image.width)))


def _wrapped(text: str, size: int, width: int, lines: int) -> str:
    """Wrap text to a width in px. The last of at most `lines` lines ends in "…" if there are more."""
    text = re.sub(r",(?=\S)", ", ", text)
    letters = max(4, int(width * len(text) / max(1.0, font(size).getlength(" ".join(text.split())))))
    every = [line for part in text.split("\n") for line in textwrap.wrap(part, letters, break_on_hyphens=True) or [""]]
    if len(every) > lines:
        every = [*every[: lines - 1], every[lines - 1][: letters - 1] + "…"]
    return "\n".join(every)
