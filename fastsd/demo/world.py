"""The miniature world of `fastsd demo`: captioned pictures of coloured shapes, and a judge without a neural network.

The world is small enough for a model that trains on a CPU within minutes, but makes the same demands as the real one:
the caption's two words (a colour, a shape) must steer the picture, and the colours are right only if UNet and VAE agree
on the latent space.
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
    "red": (216, 40, 44),
    "orange": (246, 144, 30),
    "yellow": (248, 220, 56),
    "green": (44, 160, 72),
    "cyan": (56, 200, 222),
    "blue": (38, 82, 204),
    "purple": (124, 50, 166),
    "pink": (246, 132, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
BACKGROUND = (244, 241, 235)
TEMPLATES = (
    "{a} {colour} {shape}",
    "a picture of {a} {colour} {shape}",
    "{colour} {shape}, simple shape",
    "a drawing of {a} {colour} {shape}",
)

# Drawing happens at this multiple of the final size and is averaged down, which antialiases every edge.
_SUPERSAMPLING = 4
# The ring's hole, and the star's inner corners, relative to the outer radius; the cross's half arm width.
_RING_HOLE, _STAR_WAIST, _CROSS_ARM = 0.55, 0.45, 0.3
_LARGEST_TURN = 8.0
# Degrees after which a shape looks the same again; the judge tries turns up to it.
_PERIOD = {"circle": 1, "square": 90, "triangle": 120, "star": 72, "cross": 90, "ring": 1}


def _outline(shape: str, radius: float, turn: float) -> np.ndarray:
    """Return the corners (n, 2) of a polygonal shape about the origin, y pointing down as in pictures."""
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
        flat = np.concatenate([corners * 1j**k for k in range(4)]) * np.exp(1j * math.radians(turn)) * radius
        return np.stack([flat.real, flat.imag], axis=1)
    else:
        raise ValueError(f"shape is {shape!r}, which has no corners; use square, triangle, star or cross")
    angles = steps * (2 * math.pi / len(steps)) + math.radians(turn)
    return radius * reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _coverage(shape: str, size: int, centre: tuple[float, float], radius: float, turn: float) -> Image.Image:
    """Draw the share of each pixel that the shape covers, as an 8-bit picture."""
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
        pen.polygon([tuple(p) for p in ((_outline(shape, radius, turn) + (x, y)) * k).tolist()], fill=255)
    return canvas.resize((size, size), Image.Resampling.BOX)


def draw(colour: str, shape: str, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw one picture: the shape in its colour, at a random place, size and turn, on the light background."""
    radius = rng.uniform(0.27, 0.31) * size
    centre = (rng.uniform(0.46, 0.54) * size, rng.uniform(0.46, 0.54) * size)
    coverage = _coverage(shape, size, centre, radius, rng.uniform(-_LARGEST_TURN, _LARGEST_TURN))
    picture = Image.new("RGB", (size, size), BACKGROUND)
    picture.paste(COLOURS[colour], (0, 0), coverage)
    return picture


def _fill(template: str, colour: str, shape: str) -> str:
    return template.format(a="an" if colour[0] in "aeiou" else "a", colour=colour, shape=shape)


def caption(colour: str, shape: str, rng: np.random.Generator) -> str:
    """Return a caption that names both, in one of a few wordings."""
    return _fill(TEMPLATES[rng.integers(len(TEMPLATES))], colour, shape)


def combinations() -> list[tuple[str, str]]:
    """Return every (colour, shape), in an order in which any few neighbours differ in both."""
    return [(colour, SHAPES[(i + j) % len(SHAPES)]) for j in range(len(SHAPES)) for i, colour in enumerate(COLOURS)]


def prompts() -> list[tuple[str, str, str]]:
    """Return (colour, shape, prompt) for every combination. Models are judged by these."""
    return [(c, s, _fill(TEMPLATES[i % len(TEMPLATES)], c, s)) for i, (c, s) in enumerate(combinations())]


def write_dataset(folder: Path, count: int, seed: int) -> None:
    """Write `count` pictures (every fifth a JPEG) with a caption file each. All combinations are equally frequent."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    every = combinations()
    for i in range(count):
        colour, shape = every[i % len(every)]
        picture = draw(colour, shape, rng)
        if i % 5 == 4:
            picture.save(folder / f"{i:05d}.jpg", quality=95, subsampling=0)
        else:
            picture.save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(caption(colour, shape, rng) + "\n", encoding="utf-8")


# Distances in RGB (0..255): a background pixel's from the background, a shape's colour from the named one, and the mean
# of the shape's own pixels from their median.  The named colours lie at least 80 apart.
_BACKGROUND_TOLERANCE, _COLOUR_TOLERANCE, _SPREAD_TOLERANCE = 45.0, 48.0, 40.0
_SMALLEST_SHARE, _LARGEST_SHARE = 0.04, 0.5
_LEAST_OVERLAP = 0.76
_GRID = 28


def _normalised(coverage: np.ndarray) -> np.ndarray:
    """Move the shape to the middle, scale it to unit area, sample it on a fixed grid and flatten it."""
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
def _templates() -> tuple[tuple[str, ...], np.ndarray]:
    """Return every shape at every turn, normalised: names and a matrix with one row each."""
    turned = [(shape, float(turn)) for shape in SHAPES for turn in range(0, _PERIOD[shape], 6)]
    rows = [
        _normalised(np.asarray(_coverage(shape, 64, (32.0, 32.0), 20.0, turn), dtype=np.float64) / 255)
        for shape, turn in turned
    ]
    return tuple(shape for shape, _ in turned), np.stack(rows)


def judge(image: Image.Image) -> tuple[str | None, str | None]:
    """Return the (colour, shape) that a picture shows, from its pixels alone; None for an unknown one.

    The frame must be background.  The pixels that differ from it are the shape: their median gives the colour, and their
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
    # Edge pixels are mixtures; those far from the background are the shape's own colour.
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
    # Faint ripples of the background, as a VAE leaves them, are not part of the shape.
    shape_vector = _normalised(np.where(coverage > 0.15, coverage, 0.0))
    names, templates = _templates()
    overlap = np.minimum(templates, shape_vector).sum(axis=1) / np.maximum(templates, shape_vector).sum(axis=1)
    best = int(overlap.argmax())
    return colour, names[best] if overlap[best] >= _LEAST_OVERLAP else None


def picture(
    columns: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str], scale: int = 2, across: int = 3
) -> Image.Image:
    """Draw one panel for each (title, samples), side by side: enlarged samples in rows of `across`, each with a caption."""
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
            place = (x + tile / 2, y + tile + 3)
            pen.multiline_text(place, lines, font=caption_font, fill=(84, 86, 98), anchor="ma", align="center")
    return sheet
