"""Prompts and sample grids: the images a config requests, arranged in rows with captions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastsd.config.schema import Config, SampleTable
from fastsd.errors import UserError
from fastsd.model.model import Model
from fastsd.sampling.generate import check_size, check_steps, generate
from fastsd.storage import TEMPORARY

GRID_CHUNK = "fastsd"  # key of the PNG text chunk that describes a grid


def check_samples(model: Model, config: Config) -> str:
    """Return a description of the config's sample grid. Raises UserError before training if it could not be drawn."""
    table, size = config.sample, config.sample.size or config.data.resolution
    prompts = read_prompts(table)
    check_size(model, size)
    check_steps(model, table)
    return f"{len(prompts)} prompts x {table.images} at {size} px"


def read_prompts(table: SampleTable) -> list[str]:
    """Return the prompts of a config: the list, then the lines of the file. Raises UserError if the file cannot be read."""
    prompts = list(table.prompts)
    if table.prompts_file:
        try:
            lines = Path(table.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problem = f"sample.prompts_file is {table.prompts_file!r}, which cannot be read ({error})"
            raise UserError("prompts-unreadable", f"{problem}; give a UTF-8 text file") from None
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts


def sample_grid(model: Model, table: SampleTable, size: int) -> Image.Image | None:
    """Draw the fixed grid of a config, one row per prompt and one column per seed. Return None without prompts."""
    prompts = read_prompts(table)
    if not prompts:
        return None
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]
    images = generate(model, [p for p, _ in pairs], [s for _, s in pairs], table, size)
    return grid(images, table.images, prompts, table.seed)


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str], seed: int = 0) -> Image.Image:
    """Arrange images in rows of `columns`, each with its caption below. `seed` is the seed of the first column.

    The result's `info["cells"]` holds {"box": [left, top, right, bottom] in px, "prompt", "seed"} for each image.
    """
    width, height = images[0].size
    text, gap = max(14, height // 18), max(4, width // 32)
    font = ImageFont.load_default(size=text)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap + 2 * text) + gap), "white")
    draw, cells = ImageDraw.Draw(sheet), sheet.info.setdefault("cells", [])

    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + r * (height + gap + 2 * text)
        for c, image in enumerate(row):
            left = gap + c * (width + gap)
            sheet.paste(image, (left, top))
            cells.append({"box": [left, top, left + width, top + height], "prompt": caption, "seed": seed + c})
        draw.text((gap, top + height + text // 3), _shorten(caption, font, sheet.width - 2 * gap), fill="black", font=font)
    return sheet


def save_grid(sheet: Image.Image, path: Path, stage: str = "", step: int = 0) -> None:
    """Save a grid as a PNG. Its text chunk `fastsd` holds the stage, the step and `info["cells"]` as JSON.

    Raises:
        OSError: the disk is full or the folder is not writable; an older file with this name stays intact.
    """
    metadata, temporary = PngInfo(), path.with_name(TEMPORARY + path.name)
    metadata.add_text(GRID_CHUNK, json.dumps({"stage": stage, "step": step, "cells": sheet.info["cells"]}))
    sheet.save(temporary, "PNG", pnginfo=metadata)
    os.replace(temporary, path)


def _shorten(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
