"""Prompts and grids - which images a config asks for, laid out in rows with their captions."""

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

GRID_CHUNK = "fastsd"  # the text chunk of a grid's PNG that says what it shows


def check_samples(model: Model, config: Config) -> str:
    """Find what would stop a sample grid before training starts; returns what the grid will be. Raises UserError."""
    table, size = config.sample, config.sample.size or config.data.resolution
    prompts = read_prompts(table)
    check_size(model, size)
    check_steps(model, table)
    return f"{len(prompts)} prompts x {table.images} at {size} px"


def read_prompts(table: SampleTable) -> list[str]:
    """The prompts of a config: those in the list, then the lines of the file. Raises UserError if it cannot be read."""
    prompts = list(table.prompts)
    if table.prompts_file:
        try:
            lines = Path(table.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sample.prompts_file is {table.prompts_file!r}: cannot be read ({error})") from None
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts


def sample_grid(model: Model, table: SampleTable, size: int) -> Image.Image | None:
    """The fixed grid of a config: a row a prompt, a column a seed. None without prompts."""
    prompts = read_prompts(table)
    if not prompts:
        return None
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]
    images = generate(model, [p for p, _ in pairs], [s for _, s in pairs], table, size)
    return grid(images, table.images, prompts, table.seed)


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str], seed: int = 0) -> Image.Image:
    """Images in rows of `columns`, each row's caption under it.

    Its `info["cells"]` holds {"box": [left, top, right, bottom] in px, "prompt", "seed"} of each; `seed` is the first column's.
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
        draw.text((gap, top + height + text // 3), _fit(caption, font, sheet.width - 2 * gap), fill="black", font=font)
    return sheet


def save_grid(sheet: Image.Image, path: Path, stage: str = "", step: int = 0) -> None:
    """Write a grid as a PNG whose text chunk `fastsd` says in JSON what it shows: stage, step and `info["cells"]`.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file of the name stands as it was.
    """
    said, temporary = PngInfo(), path.with_name(TEMPORARY + path.name)
    said.add_text(GRID_CHUNK, json.dumps({"stage": stage, "step": step, "cells": sheet.info["cells"]}))
    sheet.save(temporary, "PNG", pnginfo=said)
    os.replace(temporary, path)


def _fit(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
