"""Sheets of samples, and animations. A sheet compares one run's checkpoints, several runs, or runs with a baseline."""

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
from fastsd.storage import new_file

SheetRow = tuple[str, Sequence[Image.Image | None]]  # label and pictures
SheetColumn = dict[Cell, Image.Image]  # pictures by (prompt, seed)

# Sizes are in px.
WIDTH, HEIGHT = 1200, 1700  # size of the largest sheet; only a sheet with the narrowest cells may exceed it
CELL = (72, 260)  # smallest and largest width of a cell; a wider picture makes its cell wider
MARGIN = 170  # width of the row labels
GAP = 6  # distance between cells
HEAD = 58  # height of the column heads
COLUMNS, ROWS = 12, 12  # a sheet shows at most so many checkpoints, evenly spaced, and so many pairs (prompt, seed)
FRAMES, FRAME_WIDTH = 60, 640  # most frames of an animation, and their largest width
INK, GREY = "#222222", "#666666"


def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans. It comes with matplotlib and has more letters than Pillow's own font."""
    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def sheet(heads: Sequence[str], rows: Sequence[SheetRow], colours: Sequence[str] = ()) -> Image.Image:
    """Lay out pictures in rows under column heads, with a label left of each row and a colour bar above each column."""
    all_images = [image for _, images in rows for image in images if image]
    ratio = max((image.height / image.width for image in all_images), default=1.0)
    width_per_column = (WIDTH - MARGIN) // len(heads) - GAP
    height_per_row = (HEIGHT - HEAD) // len(rows) - GAP
    available = min(width_per_column, round(height_per_row / ratio))
    widest = max([CELL[1], *(image.width for image in all_images)])
    cell_width = max(CELL[0], min(widest, available))
    cell_height = round(cell_width * ratio)

    size = (MARGIN + len(heads) * (cell_width + GAP), HEAD + len(rows) * (cell_height + GAP))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for c, head in enumerate(heads):
        left = MARGIN + c * (cell_width + GAP)
        if colours:
            pen.rectangle((left, HEAD - 7, left + cell_width - 1, HEAD - 4), fill=colours[c])
        text = _wrap(head, 11, cell_width, 3)
        pen.multiline_text((left, HEAD - 10), text, font=font(11), fill=INK, anchor="ld", spacing=2)
    for r, (label, images) in enumerate(rows):
        top = HEAD + r * (cell_height + GAP)
        text = _wrap(label, 12, MARGIN - 16, max(1, cell_height // 16))
        pen.multiline_text((0, top + cell_height / 2), text, font=font(12), fill=INK, anchor="lm", spacing=3)
        for c, image in enumerate(images):
            left = MARGIN + c * (cell_width + GAP)
            if image is None:
                pen.rectangle((left, top, left + cell_width - 1, top + cell_height - 1), fill="#f4f4f4")
            else:
                canvas.paste(_resize_and_pad(image, cell_width, cell_height), (left, top))
    return canvas


def over_checkpoints(run: RunData) -> Image.Image:
    """Lay out a run's samples, with a row for each prompt and seed and a column for each checkpoint."""
    chosen = [run.grids[i] for i in _spread(len(run.grids), COLUMNS)]
    columns = [grid.cut() for grid in chosen]
    pairs = _choose_pairs(columns)
    rows = [(_label(pair, columns), [images.get(pair) for images in columns]) for pair in pairs]
    heads = [f"{grid.stage}\nstep {grid.step:,}\nepoch {round(run.epoch(grid.step), 1):g}" for grid in chosen]
    return sheet(heads, rows)


def side_by_side(runs: Sequence[RunData]) -> Image.Image | None:
    """Lay out each run's last samples in a column, with a row for each prompt and seed. Return None if there are no samples."""
    columns = [run.grids[-1].cut() if run.grids else {} for run in runs]
    pairs = _choose_pairs(columns)
    if not pairs:
        return None
    rows = [(_label(pair, columns), [images.get(pair) for images in columns]) for pair in pairs]
    return sheet([run.label for run in runs], rows, [run.colour for run in runs])


def pixel_differences(runs: Sequence[RunData], baseline: RunData) -> tuple[dict[str, Pixels], Image.Image | None, int]:
    """Compare each run's last samples with the baseline's, pixel by pixel.

    Returns:
        The distances by run label, a sheet, and a factor. The sheet shows the baseline's pictures beside |difference| x factor.
        It is None, and the factor is 1, if no other run has a picture with the same prompt, seed and size.
    """
    baseline_images = baseline.grids[-1].cut() if baseline.grids else {}
    baseline_images.pop(WHOLE_SHEET, None)
    differences: dict[str, dict[Cell, np.ndarray]] = {}  # |difference| of each picture, by run label
    for run in runs:
        if run is baseline or not run.grids:
            continue
        images, by_pair = run.grids[-1].cut(), {}
        for pair, baseline_image in baseline_images.items():
            if pair in images and images[pair].size == baseline_image.size:
                by_pair[pair] = np.abs(_pixels(images[pair]) - _pixels(baseline_image))
        if by_pair:
            differences[run.label] = by_pair
    if not differences:
        return {}, None, 1

    values = np.concatenate([difference.ravel() for by_pair in differences.values() for difference in by_pair.values()])
    percentile = max(float(np.percentile(values, 99)), 1.0)
    factor = 2 ** max(0, math.floor(math.log2(255 / percentile)))

    others = [run for run in runs if run.label in differences]
    rows: list[SheetRow] = []
    for pair in _choose_pairs([baseline_images]):
        row_images: list[Image.Image | None] = [baseline_images[pair]]
        for run in others:
            pixels = differences[run.label].get(pair)
            row_images.append(None if pixels is None else Image.fromarray((pixels * factor).clip(0, 255).astype(np.uint8)))
        rows.append((_label(pair, [baseline_images]), row_images))
    heads = [baseline.label, *(f"|difference| × {factor}:\n{run.label}" for run in others)]
    picture = sheet(heads, rows, [baseline.colour, *(run.colour for run in others)])
    distances = {label: _distance(list(by_pair.values())) for label, by_pair in differences.items()}
    return distances, picture, factor


def frames(grids: Sequence[Grid]) -> list[tuple[Grid, Image.Image]]:
    """Return a run's grids in one size, for a slider or an animation. Of more than `FRAMES`, evenly spaced ones are chosen."""
    chosen = [grids[i] for i in _spread(len(grids), FRAMES)]
    sheets = [(grid, _resize_for_frame(grid.whole())) for grid in chosen]
    size = (max(image.width for _, image in sheets), max(image.height for _, image in sheets))
    return [(grid, _resize_and_pad(image, *size)) for grid, image in sheets]


def write_gif(path: Path, label: str, pictures: Sequence[tuple[Grid, Image.Image]]) -> None:
    """Write an animation with the stage, step and label of a run above each frame. It pauses on the last frame."""
    gif_frames = []
    for grid, picture in pictures:
        canvas = Image.new("RGB", (picture.width, picture.height + HEAD), "white")
        canvas.paste(picture, (0, HEAD))
        pen = ImageDraw.Draw(canvas)
        pen.text((6, 6), f"{grid.stage} {grid.step:,}", font=font(16, bold=True), fill=INK)
        pen.text((6, 32), _wrap(label, 12, picture.width - 12, 1), font=font(12), fill=GREY)
        palette = canvas.quantize(method=Image.Quantize.MAXCOVERAGE)  # Pillow dithers only if it is given a palette
        gif_frames.append(canvas.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG))
    milliseconds = max(80, min(700, 9000 // len(gif_frames)))
    durations = [milliseconds] * (len(gif_frames) - 1) + [2500]
    with new_file(path) as temporary:
        gif_frames[0].save(temporary, "GIF", save_all=True, append_images=gif_frames[1:], duration=durations, loop=0)


def _distance(differences: Sequence[np.ndarray]) -> Pixels:
    values = np.concatenate([difference.ravel() for difference in differences]).astype(np.float64)
    mean_square = float(np.square(values).mean())
    psnr = 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
    return Pixels(float(values.mean()), psnr, len(differences))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int16)


def _choose_pairs(columns: Sequence[SheetColumn]) -> list[Cell]:
    """Choose (prompt, seed) for at most `ROWS` rows, sorted by prompt. Second seeds are chosen after all first seeds."""
    pairs = list(dict.fromkeys(pair for images in columns for pair in images))
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    seed_rank = {pair: sum(earlier[0] == pair[0] for earlier in pairs[:i]) for i, pair in enumerate(pairs)}
    chosen = sorted(pairs, key=lambda pair: seed_rank[pair])[:ROWS]
    return sorted(chosen, key=lambda pair: (prompts.index(pair[0]), seed_rank[pair]))


def _label(pair: Cell, columns: Sequence[SheetColumn]) -> str:
    """Return the prompt. The seed is added if the columns have several seeds."""
    prompt, seed = pair
    seeds = {seed for images in columns for _, seed in images}
    return f"{prompt}\n(seed {seed})" if len(seeds) > 1 else prompt


def _spread(count: int, limit: int) -> list[int]:
    """Return all indices below `count`, or `limit` evenly spaced ones that include the first and the last."""
    return list(range(count)) if count <= limit else np.linspace(0, count - 1, limit).round().astype(int).tolist()


def _resize_and_pad(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize an image to the largest size that fits `width` x `height`, and pad it with white."""
    return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color="white")


def _resize_for_frame(image: Image.Image) -> Image.Image:
    width = min(2 * image.width, FRAME_WIDTH)  # enlarging an image more than twice would show no more detail
    return _resize_and_pad(image, width, max(1, round(image.height * width / image.width)))


def _wrap(text: str, size: int, width: int, lines: int) -> str:
    """Wrap text to a width in px and at most `lines` lines; "…" marks text that was cut off."""
    text = re.sub(r",(?=\S)", ", ", text)
    text_width = font(size).getlength(" ".join(text.split()))
    letters_per_line = max(4, int(width * len(text) / max(1.0, text_width)))
    wrapped: list[str] = []
    for paragraph in text.split("\n"):
        wrapped += textwrap.wrap(paragraph, letters_per_line, break_on_hyphens=True) or [""]
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: letters_per_line - 1] + "…"]
    return "\n".join(wrapped)
