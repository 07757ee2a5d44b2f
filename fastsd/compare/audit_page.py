"""The page of an audit: figures, a histogram, and images beside their reconstructions and differences.

Pictures are reduced to `WIDEST` pixels. Below each lies its worst tile, enlarged without smoothing, which has every pixel.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from torch import Tensor

from fastsd.compare import charts
from fastsd.compare.numbers import Table, Words
from fastsd.compare.page import Section, chart, data_uri, page, table_section
from fastsd.compare.runs import COLOURS
from fastsd.data.building.round_trip import GAIN, LOSS, MEASURES, TILE, WORST, Audit, Result, largest
from fastsd.data.sources.image import Rejected
from fastsd.sampling.generate import to_image
from fastsd.terminal.console import work

WIDEST = 384  # px, longest side of a picture
ENLARGED = 256  # px, longest side of an enlarged tile
_BRIGHTEST = 96  # the factor of the differences gives the largest error of an image at most this brightness
_BINS = 60  # at most, in the histogram
_FRAME, _FRAME_EDGE = "#ff9500", "#000000"
_WORST_NOTE = "Sorted by the {0}{1}. A frame marks the tile with the largest {0}, which lies enlarged below."
_FRAME_NOTE = "A frame marks the tile with the largest difference."
_PHRASES = dict(zip(MEASURES, ("error", "fine error"), strict=True))
_TileErrors = Callable[[np.ndarray], np.ndarray]  # (V, R, S) -> (R, S)
_Gallery = tuple[str, str, str, int, _TileErrors]  # title, note, order, number of images, errors that choose the tile


class AuditPage:
    """A page on the images of an audit.

    Args:
        labels: names of the VAEs.
        errors: both errors of all images by all VAEs, (V, 2, N).
        limit: number of images on the page.
        by: the measure that sorts the images and chooses the tiles.
    """

    def __init__(self, images: Audit, labels: Sequence[str], errors_V2N: np.ndarray, limit: int, by: str) -> None:
        self.images, self.labels, self.errors, self.limit, self.by = images, labels, errors_V2N, limit, by
        self.factor = 2 ** max(0, math.floor(math.log2(_BRIGHTEST / max(float(errors_V2N[:, 0].max()), 0.1))))

    def html(self) -> str:
        title = f"{self.labels[0]} against {self.labels[1]}" if len(self.labels) > 1 else self.labels[0]
        galleries = self._galleries()
        with work("drawing", sum(min(limit, self.errors.shape[2]) for *_, limit, _ in galleries), "images") as self._drawing:
            sections = [self._gallery(*gallery) for gallery in galleries]
        return page(f"Audit of {title}", [table_section(self._figures()), self._histogram(), *sections])

    def _galleries(self) -> list[_Gallery]:
        """Return the sections with images. With two VAEs, half of the limit is for images that are better with either."""
        if len(self.labels) == 1:
            return [("Worst images", _WORST_NOTE.format(_PHRASES[self.by], ""), WORST, self.limit, _first_errors)]
        galleries: list[_Gallery] = []
        quarter = -(-self.limit // 4)
        for order, sign in ((GAIN, 1), (LOSS, -1)):
            better, worse = self.labels[::sign]
            note = f"Images with a smaller {_PHRASES[self.by]} than with {worse}, largest difference first. {_FRAME_NOTE}"
            galleries.append((f"Better with {better}", note, order, quarter, _differences(sign)))
        rest = max(self.limit - 2 * quarter, 1)
        note = _WORST_NOTE.format(_PHRASES[self.by], f" with {self.labels[0]}")
        return [*galleries, ("Worst images", note, WORST, rest, _first_errors)]

    def _figures(self) -> Table:
        note = (
            "Error: mean absolute difference of pixels from 0 to 255. Fine: its part in details of one to three pixels, such "
            "as small letters and thin lines; --by fine sorts by it."
        )
        total, several = self.errors.shape[2], len(self.labels) > 1
        rows: list[Words] = []
        for label, errors_2N, others_2N in zip(self.labels, self.errors, self.errors[::-1], strict=True):
            for name, values_N, others_N in zip(("error", "fine"), errors_2N, others_2N, strict=True):
                row: Words = [f"{label}, {name}" if several else name, *(f"{value(values_N):.2f}" for _, value in _STATISTICS)]
                rows.append([*row, f"{(values_N < others_N).mean():.0%}"] if several else row)
        head = ["", *(name for name, _ in _STATISTICS), *(["images that are better"] if several else [])]
        return Table(f"{total:,} images", note, head, rows)

    def _histogram(self) -> Section:
        def draw(width: float) -> Figure:
            figure = Figure(figsize=(width, 3.2), dpi=charts.DPI, layout="constrained")
            axes = figure.subplots()
            for label, errors_N, colour in zip(self.labels, values_VN, COLOURS, strict=False):
                axes.hist(errors_N, edges, histtype="stepfilled", color=colour, alpha=0.25)
                axes.hist(errors_N, edges, histtype="step", color=colour, linewidth=1.6, label=label.replace("$", r"\$"))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(phrase)
            axes.set_ylabel("images")
            axes.grid(color=charts.GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=charts.INK)
            if len(self.labels) > 1:
                axes.legend(frameon=False, fontsize=charts.TEXT)
            return figure

        values_VN, phrase = self.errors[:, MEASURES.index(self.by)], _PHRASES[self.by]
        bins = min(_BINS, 8 + math.isqrt(self.errors.shape[2]))
        edges = np.linspace(0, values_VN.max() or 1, bins + 1).tolist()
        return Section("Distribution", f"How many images have which {phrase}.", chart(draw, f"number of images by {phrase}"))

    def _gallery(self, title: str, note: str, order: str, limit: int, tile_errors: _TileErrors) -> Section:
        entries = []
        for number, result in enumerate(self.images.results(order, self.by, limit), 1):
            if order in (GAIN, LOSS) and (result.gain if order == GAIN else -result.gain) <= 0:
                break
            entries.append(self._entry(number, result, tile_errors))
            self._drawing.add()
        return Section(title, note if entries else "There are none.", "".join(entries))

    def _entry(self, number: int, result: Result, tile_errors: _TileErrors) -> str:
        """Return the HTML of an image: its name, its errors, and a column of two pictures for each of its versions."""
        several = len(self.labels) > 1
        texts = []
        for label, distortion in zip(self.labels, result.distortions, strict=True):
            errors = f"error {distortion.error:.2f}, fine {distortion.fine:.2f}"
            texts.append(f"{label}: {errors}" if several else errors)
        if several:
            texts.insert(0, f"gain {result.gain:+.2f}")
        row, column = largest(tile_errors(result.tiles))
        box = column * TILE, row * TILE, min((column + 1) * TILE, result.size[0]), min((row + 1) * TILE, result.size[1])
        values = " and ".join(f"{value:.1f}" for value in result.tiles[:, row, column])
        texts.append(f"tile at {box[0]}, {box[1]}: {values}")
        name = html.escape(result.image.name)
        try:
            figures = self._columns(result, box)
        except Rejected as error:  # the file has changed since it was measured
            figures = f"<p>{html.escape(error.reason)}</p>"
        numbers = html.escape("; ".join(texts))
        return f'<article class="trip"><h3><span>{number}</span> {name}</h3><p>{numbers}</p>\n{figures}</article>\n'

    def _columns(self, result: Result, box: tuple[int, int, int, int]) -> str:
        pixels = self.images.pixels(result.image)
        original = Image.fromarray(pixels.transpose(1, 2, 0))
        pictures = [("original", original)]
        differences = []
        for index, label in enumerate(self.labels):
            decoded = self.images.reconstruct(result.image, pixels, index).cpu()
            name = label if len(self.labels) > 1 else "reconstruction"
            pictures.append((name, to_image(decoded)))
            caption = f"difference × {self.factor}" + (f", {label}" if len(self.labels) > 1 else "")
            differences.append((caption, self._difference(pixels, decoded)))
        figures = [_figure(image, caption, box, result.image.name) for caption, image in (*pictures, *differences)]
        return f'<div class="strip" style="--columns: {len(figures)}" tabindex="0">{"".join(figures)}</div>'

    def _difference(self, pixels_3HW: np.ndarray, decoded_3HW: Tensor) -> Image.Image:
        difference = ((decoded_3HW + 1) * 127.5 - torch.from_numpy(pixels_3HW)).abs() * self.factor
        return to_image(difference.clamp(max=255) / 127.5 - 1)


_STATISTICS: list[tuple[str, Callable[[np.ndarray], float]]] = [
    ("median", lambda values: float(np.median(values))),
    ("mean", lambda values: float(values.mean())),
    ("95 % are below", lambda values: float(np.percentile(values, 95))),
    ("worst", lambda values: float(values.max())),
]


def _first_errors(tiles_VRS: np.ndarray) -> np.ndarray:
    first_RS: np.ndarray = tiles_VRS[0]
    return first_RS


def _differences(sign: int) -> _TileErrors:
    return lambda tiles_VRS: sign * (tiles_VRS[1] - tiles_VRS[0])


def _figure(image: Image.Image, caption: str, box: tuple[int, int, int, int], name: str) -> str:
    """Return the HTML of a picture with a frame around a tile, and of this tile."""
    scale = min(1.0, WIDEST / max(image.size))
    reduced = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top, right, bottom = (round(side * scale) for side in box)
    pen = ImageDraw.Draw(reduced)
    pen.rectangle((left, top, right - 1, bottom - 1), outline=_FRAME_EDGE, width=4)
    pen.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=_FRAME, width=2)
    tile = image.crop(box)
    factor = max(1, ENLARGED // max(tile.size))
    enlarged = tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.NEAREST)
    pictures = ((reduced, f"{caption} of {name}"), (enlarged, f"tile, {caption}"))
    images = "".join(f'<img src="{data_uri(picture)}" alt="{html.escape(alt, quote=True)}">' for picture, alt in pictures)
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{images}</figure>"
