"""Read the prompts of a config, and arrange the images it requests in a sample grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastsd.config.schema import Config, SampleTable
from fastsd.errors import UserError
from fastsd.model.model import Model
from fastsd.sampling.generate import BATCH, check_size, check_steps, generate
from fastsd.storage import new_file

GRID_CHUNK = "fastsd"  # key of the PNG text chunk that describes a grid


def check_samples(model: Model, config: Config) -> str:
    """Return a description of the config's sample grid. Raises UserError if the model cannot draw it."""
    table, size = config.sample, config.sample.size or config.data.resolution
    prompts = read_prompts(table)
    check_size(model, size)
    check_steps(model, table)
    return f"{len(prompts)} prompts x {table.images} at {size} px"


def read_prompts(table: SampleTable) -> list[str]:
    """Return the listed prompts of a config, followed by those of its file. Raises UserError if the file cannot be read."""
    prompts = list(table.prompts)
    if table.prompts_file:
        try:
            lines = Path(table.prompts_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"sample.prompts_file is {table.prompts_file!r}, which cannot be read ({error})"
            raise UserError("prompts-unreadable", f"{problem}; give a UTF-8 text file") from None
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts


def sample_grid(model: Model, table: SampleTable, size: int, batch: int = BATCH) -> Image.Image | None:
    """Draw the sample grid of a config: one row per prompt, one column per seed. Return None if there are no prompts."""
    prompts = read_prompts(table)
    if not prompts:
        return None
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]
    images = generate(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], table, size, batch)
    return grid(images, table.images, prompts, table.seed)


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str], seed: int = 0) -> Image.Image:
    """Arrange images in rows of `columns`, with a caption below each row. `seed` is the seed of the first column.

    For each image, the result's `info["cells"]` has a dict with "prompt", "seed" and "box": [left, top, right, bottom] in px.
    """
    width, height = images[0].size
    font_size, gap = max(14, height // 18), max(4, width // 32)
    row_height = height + gap + 2 * font_size
    font = ImageFont.load_default(size=font_size)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * row_height + gap), "white")
    pen, cells = ImageDraw.Draw(sheet), sheet.info.setdefault("cells", [])

    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + r * row_height
        for c, image in enumerate(row):
            left = gap + c * (width + gap)
            sheet.paste(image, (left, top))
            cells.append({"box": [left, top, left + width, top + height], "prompt": caption, "seed": seed + c})
        text = _shorten(caption, font, sheet.width - 2 * gap)
        pen.text((gap, top + height + font_size // 3), text, fill="black", font=font)
    return sheet


def save_grid(sheet: Image.Image, path: Path, stage: str = "", step: int = 0) -> None:
    """Save a grid as a PNG. Its text chunk `fastsd` holds the stage, the step and `info["cells"]` as JSON.

    Raises:
        OSError: the disk is full or the folder is not writable; an older file with this name stays intact.
    """
    metadata = PngInfo()
    metadata.add_text(GRID_CHUNK, json.dumps({"stage": stage, "step": step, "cells": sheet.info["cells"]}))
    with new_file(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=metadata)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
