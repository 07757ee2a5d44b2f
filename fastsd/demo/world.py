"""The miniature world of `fastsd demo`: captioned pictures of coloured shapes, and a judge without a neural network.

The world is small enough for a model that trains on a CPU within minutes, but it makes the same demands as the real world. The
caption's colour and shape must steer the picture, and the colours are right only if UNet and VAE agree on the latent space.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 40, 44), "orange": (246, 144, 30), "yellow": (248, 220, 56), "green": (44, 160, 72),
    "cyan": (56, 200, 222), "blue": (38, 82, 204), "purple": (124, 50, 166), "pink": (246, 132, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUND = (244, 241, 235)
TEMPLATES = (
    "{a} {colour} {shape}",
    "a picture of {a} {colour} {shape}",
    "{colour} {shape}, simple shape",
    "a drawing of {a} {colour} {shape}",
)

_SUPERSAMPLING = 4  # shapes are drawn at this multiple of the final size and averaged, which antialiases their edges
# Relative to the outer radius: the ring's hole, the star's inner corners, and half the width of the cross's arms.
_RING_HOLE, _STAR_WAIST, _CROSS_ARM = 0.55, 0.45, 0.3
_LARGEST_TURN = 8.0  # degrees
# A shape looks the same again after a turn by so many degrees. The judge tries smaller turns.
_PERIOD = {"circle": 1, "square": 90, "triangle": 120, "star": 72, "cross": 90, "ring": 1}


def _outline(shape: str, radius: float, turn: float) -> np.ndarray:
    """Return the corners (n, 2) of a polygonal shape around the origin. y points down, as in pictures."""
    if shape == "square":
        steps, reach = np.arange(4) + 0.5, np.full(4, 1.2)
    elif shape == "triangle":
        steps, reach = np.arange(3) - 0.75, np.full(3, 1.2)
    elif shape == "star":
        steps, reach = np.arange(10) - 2.5, np.tile([1.2, 1.2 * _STAR_WAIST], 5)
    elif shape == "cross":
        arm = _CROSS_ARM
        quarter = np.array([(1.1, -arm), (1.1, arm), (arm, arm)])
        corners = quarter[:, 0] + 1j * quarter[:, 1]
        turned = np.concatenate([corners * 1j**k for k in range(4)]) * np.exp(1j * math.radians(turn)) * radius
        return np.stack([turned.real, turned.imag], axis=1)
    else:
        raise ValueError(f"shape is {shape!r}, which has no corners; use square, triangle, star or cross")
    angles = steps * (2 * math.pi / len(steps)) + math.radians(turn)
    return radius * reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _coverage(shape: str, size: int, centre: tuple[float, float], radius: float, turn: float) -> Image.Image:
    """Draw an 8-bit picture of a shape. A pixel's value is the share of it that the shape covers."""
    k = _SUPERSAMPLING
    canvas = Image.new("L", (size * k, size * k))
    pen = ImageDraw.Draw(canvas)
    x, y = centre
    if shape in ("circle", "ring"):
        pen.ellipse([(x - radius) * k, (y - radius) * k, (x + radius) * k, (y + radius) * k], fill=255)
        if shape == "ring":
            r = radius * _RING_HOLE
            pen.ellipse([(x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k], fill=0)
    else:
        corners = (_outline(shape, radius, turn) + (x, y)) * k
        pen.polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    return canvas.resize((size, size), Image.Resampling.BOX)


def draw(colour: str, shape: str, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw a shape in a colour, at a random position, size and turn, on the light background."""
    radius = rng.uniform(0.27, 0.31) * size
    centre = (rng.uniform(0.46, 0.54) * size, rng.uniform(0.46, 0.54) * size)
    coverage = _coverage(shape, size, centre, radius, rng.uniform(-_LARGEST_TURN, _LARGEST_TURN))
    picture = Image.new("RGB", (size, size), BACKGROUND)
    picture.paste(COLOURS[colour], (0, 0), coverage)
    return picture


def _fill(template: str, colour: str, shape: str) -> str:
    return template.format(a="an" if colour[0] in "aeiou" else "a", colour=colour, shape=shape)


def caption(colour: str, shape: str, rng: np.random.Generator) -> str:
    """Return a caption that names the colour and the shape, in a random one of a few wordings."""
    return _fill(TEMPLATES[rng.integers(len(TEMPLATES))], colour, shape)


def combinations() -> list[tuple[str, str]]:
    """Return every (colour, shape), in an order in which both vary among any few neighbours."""
    return [(colour, SHAPES[(i + j) % len(SHAPES)]) for j in range(len(SHAPES)) for i, colour in enumerate(COLOURS)]


def prompts() -> list[tuple[str, str, str]]:
    """Return (colour, shape, prompt) for every combination. Models are judged by these prompts."""
    return [(c, s, _fill(TEMPLATES[i % len(TEMPLATES)], c, s)) for i, (c, s) in enumerate(combinations())]


def write_dataset(folder: Path, count: int, seed: int) -> None:
    """Write `count` pictures with caption files; every fifth is a JPEG. All combinations are equally frequent."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pairs = combinations()
    for i in range(count):
        colour, shape = pairs[i % len(pairs)]
        picture = draw(colour, shape, rng)
        # A kill leaves no half file. Nothing is flushed, because the next demo draws the pictures again.
        temporary = folder / ".tmp-picture"
        if i % 5 == 4:
            picture.save(temporary, "JPEG", quality=95, subsampling=0)
            temporary.replace(folder / f"{i:05d}.jpg")
        else:
            picture.save(temporary, "PNG")
            temporary.replace(folder / f"{i:05d}.png")
        temporary.write_text(caption(colour, shape, rng) + "\n", encoding="utf-8")
        temporary.replace(folder / f"{i:05d}.txt")


# Largest distances in RGB (0 to 255) that the judge accepts. The distance between any two named colours is at least 80.
_BACKGROUND_TOLERANCE = 45.0  # between the background and the frame of a picture
_COLOUR_TOLERANCE = 48.0  # between a shape's colour and a named colour
_SPREAD_TOLERANCE = 40.0  # between a shape's pixels and their median, on average
_SMALLEST_SHARE, _LARGEST_SHARE = 0.04, 0.5  # of the picture that a shape covers
_LEAST_OVERLAP = 0.76  # between a picture's shape and the most similar shape
_GRID = 28  # side of the grid on which shapes are compared


def _normalised(coverage: np.ndarray) -> np.ndarray:
    """Move a shape to the middle, scale it to unit area, and sample it on a fixed grid. Return the flattened grid."""
    height, width = coverage.shape
    area = coverage.sum()
    y = (coverage.sum(axis=1) @ np.arange(height)) / area
    x = (coverage.sum(axis=0) @ np.arange(width)) / area
    steps = np.linspace(-1.1, 1.1, _GRID) * math.sqrt(area)
    rows, columns = np.clip(y + steps, 0, height - 1.001), np.clip(x + steps, 0, width - 1.001)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None], (columns - left)[None, :]
    upper = coverage[np.ix_(top, left)] * (1 - right) + coverage[np.ix_(top, left + 1)] * right
    lower = coverage[np.ix_(top + 1, left)] * (1 - right) + coverage[np.ix_(top + 1, left + 1)] * right
    return (upper * (1 - down) + lower * down).ravel()


@cache
def _reference_shapes() -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of all shapes at all turns, and a matrix with a row for each normalised shape."""
    turned = [(shape, float(turn)) for shape in SHAPES for turn in range(0, _PERIOD[shape], 6)]
    rows = [
        _normalised(np.asarray(_coverage(shape, 64, (32.0, 32.0), 20.0, turn), dtype=np.float64) / 255)
        for shape, turn in turned
    ]
    return tuple(shape for shape, _ in turned), np.stack(rows)


def judge(image: Image.Image) -> tuple[str | None, str | None]:
    """Return the (colour, shape) that a picture shows, from its pixels alone. None stands for an unknown colour or shape.

    The frame must be background. The pixels that differ from the background are the shape. Their median is the colour. Their
    coverage, scaled to unit area, is compared with every shape at every turn (soft intersection over union).
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    if np.linalg.norm(np.median(frame, axis=0) - BACKGROUND) > _BACKGROUND_TOLERANCE:
        return None, None
    distance = np.linalg.norm(pixels - BACKGROUND, axis=2)
    inside = distance > 1.5 * _BACKGROUND_TOLERANCE
    if not _SMALLEST_SHARE < inside.mean() < _LARGEST_SHARE:
        return None, None
    # Pixels at edges mix two colours. Pixels far from the background have the shape's colour.
    core = pixels[inside & (distance > 0.8 * np.median(distance[inside]))]
    middle = np.median(core, axis=0)
    if np.linalg.norm(core - middle, axis=1).mean() > _SPREAD_TOLERANCE:
        return None, None
    colour_distances = {name: float(np.linalg.norm(middle - rgb)) for name, rgb in COLOURS.items()}
    colour = min(colour_distances, key=lambda name: colour_distances[name])
    if colour_distances[colour] > _COLOUR_TOLERANCE:
        return None, None
    span = middle - BACKGROUND
    coverage = np.clip((pixels - BACKGROUND) @ span / (span @ span), 0, 1)
    # A VAE leaves faint ripples in the background, which are not part of the shape.
    shape_vector = _normalised(np.where(coverage > 0.15, coverage, 0.0))
    names, references = _reference_shapes()
    overlap = np.minimum(references, shape_vector).sum(axis=1) / np.maximum(references, shape_vector).sum(axis=1)
    best = int(overlap.argmax())
    return colour, names[best] if overlap[best] >= _LEAST_OVERLAP else None


def picture(columns: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Draw a panel for each (title, samples). A panel has samples, twice as large, with captions, in rows of two."""
    scale, across = 2, 2
    tile = max(image.width for _, images in columns for image in images) * scale
    gap, margin, head, foot = 10, 28, 54, 38
    rows = -(-len(captions) // across)
    panel = across * tile + (across + 1) * gap
    step = tile + foot
    size = (len(columns) * panel + (len(columns) + 1) * margin, 2 * margin + head + rows * step + gap)
    sheet = Image.new("RGB", size, (250, 250, 252))
    pen = ImageDraw.Draw(sheet)
    title_font, caption_font = ImageFont.load_default(size=22), ImageFont.load_default(size=12)
    for number, (title, images) in enumerate(columns):
        left = margin + number * (panel + margin)
        box = (left, margin, left + panel, size[1] - margin)
        pen.rounded_rectangle(box, radius=14, fill=(255, 255, 255), outline=(216, 218, 226), width=1)
        pen.text((left + panel / 2, margin + head / 2), title, font=title_font, fill=(32, 34, 44), anchor="mm")
        for i, (image, text) in enumerate(zip(images, captions, strict=True)):
            x = left + gap + (i % across) * (tile + gap)
            y = margin + head + (i // across) * step
            sheet.paste(image.convert("RGB").resize((tile, tile), Image.Resampling.BICUBIC), (x, y))
            pen.rectangle((x, y, x + tile - 1, y + tile - 1), outline=(222, 222, 226))
            lines = textwrap.fill(text, max(1, int(tile / caption_font.getlength("n"))))
            position = (x + tile / 2, y + tile + 3)
            pen.multiline_text(position, lines, font=caption_font, fill=(84, 86, 98), anchor="ma", align="center")
    return sheet
