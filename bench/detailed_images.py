"""Images like photographs, with a chosen amount of fine text and lines: what a VAE reconstructs worst."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SIZE = 9  # px of the letters


def photograph(seed: int, detail: float, width: int = 256, height: int = 256) -> Image.Image:
    """Draw a picture whose spectrum falls as that of photographs, with fine detail on a share of its area.

    Args:
        detail: share of the area, in bands that alternate between lines of small text and hairlines; 0 to 1.
    """
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** 2  # power of images: 1 / f^2, softened by a lens
    noise = rng.standard_normal((3, height, width))
    noise[1:] = 0.8 * noise[:1] + 0.6 * noise[1:]  # colours of a photograph vary together
    waves = np.fft.irfft2(np.fft.rfft2(noise) * amplitude, s=(height, width))
    waves = (waves - waves.mean((1, 2), keepdims=True)) / waves.std((1, 2), keepdims=True)
    pixels = (128 + 38 * waves).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels.transpose(1, 2, 0).copy())

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", _SIZE)
    pen, band = ImageDraw.Draw(image), _SIZE + 3
    bands = rng.permutation(height // band)
    for number, top in enumerate(bands[: round(detail * len(bands))] * band):
        ink = "black" if pixels[:, top : top + band].mean() > 128 else "white"
        if number % 3 == 2:
            for x in range(0, width, 3):
                pen.line((x, top, x + 4, top + band - 2), fill=ink)
        else:
            words = ["".join(rng.choice([*_LETTERS], rng.integers(2, 9))) for _ in range(width // 12)]
            pen.text((2, top), " ".join(words), font=font, fill=ink)
    return image


def write_photographs(folder: Path, details: list[float], sizes: tuple[tuple[int, int], ...] = ((256, 256),)) -> None:
    """Write one picture for each amount of detail, in turns of these sizes, with a caption that says the amount."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, detail in enumerate(details):
        photograph(number, detail, *sizes[number % len(sizes)]).save(folder / f"{number:04}.png")
        (folder / f"{number:04}.txt").write_text(f"photograph, detail {detail:.3f}")
