"""Sample grids: the images that a config requests, in rows of one prompt each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastsd.config.schema import Config, SampleTable
from fastsd.model.model import Model
from fastsd.sampling.generate import BATCH, check_images, draw
from fastsd.sampling.prompts import ImageSettings, images_of
from fastsd.sampling.samplers import class_of
from fastsd.storage import new_file

GRID_CHUNK = "fastsd"  # key of the PNG text chunk that describes a grid


def check_samples(model: Model, config: Config) -> str:
    """Return a description of the config's sample grid. Raises UserError if the model cannot draw it."""
    images = images_of(config.sample, config.data.resolution)
    if images:
        class_of(config.sample.sampler, model.scheduler)
    check_images(model, images)
    sizes = {f"{image.width} x {image.height}" if image.width != image.height else str(image.width): None for image in images}
    sizes = sizes or {str(config.sample.size or config.data.resolution): None}
    return f"{len(images) // config.sample.images} prompts x {config.sample.images} at {', '.join(sizes)} px"


def sample_grid(model: Model, table: SampleTable, size: int, batch: int = BATCH) -> Image.Image | None:
    """Draw the sample grid of a config: one row per prompt, one column per seed. Return None if there are no prompts.

    `size` is the width and height of the images for which the config has none.
    """
    images = images_of(table, size)
    return grid(draw(model, images, table, batch), images, table.images) if images else None


def grid(drawn: Sequence[Image.Image], images: Sequence[ImageSettings], columns: int) -> Image.Image:
    """Arrange drawn images in rows of `columns`, which have one size, with the label of its first image below each row.

    For each image, the result's `info["cells"]` has a dict with "box", [left, top, right, bottom] in px, and its settings.
    """
    width, height = max(image.width for image in drawn), max(image.height for image in drawn)
    font_size, gap = max(14, height // 18), max(4, width // 32)
    font = ImageFont.load_default(size=font_size)
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    sheet_width = max(columns * (row[0].width + gap) for row in rows) + gap
    sheet_height = sum(row[0].height + gap + 2 * font_size for row in rows) + gap
    sheet = Image.new("RGB", (sheet_width, sheet_height), "white")
    pen, cells, top = ImageDraw.Draw(sheet), sheet.info.setdefault("cells", []), gap

    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            left = gap + c * (image.width + gap)
            sheet.paste(image, (left, top))
            settings = {key: value for key, value in asdict(images[r * columns + c]).items() if key != "label" or value}
            cells.append({"box": [left, top, left + image.width, top + image.height], **settings})
        bottom, first = top + row[0].height, images[r * columns]
        text = _shorten(first.label or first.prompt, font, sheet.width - 2 * gap)
        pen.text((gap, bottom + font_size // 3), text, fill="black", font=font)
        top = bottom + gap + 2 * font_size
    return sheet


def save_grid(sheet: Image.Image, path: Path, stage: str = "", step: int = 0, weights: str = "model") -> None:
    """Save a grid as a PNG. Its text chunk `fastsd` holds the stage, step, kind of weights and `info["cells"]` as JSON.

    Raises:
        OSError: the disk is full or the folder is not writable; an older file with this name stays intact.
    """
    metadata = PngInfo()
    metadata.add_text(GRID_CHUNK, json.dumps({"stage": stage, "step": step, "weights": weights, "cells": sheet.info["cells"]}))
    with new_file(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=metadata)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
