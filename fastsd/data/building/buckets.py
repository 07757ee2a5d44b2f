"""Buckets: the size an image is resized to, and the size that is cropped from it.

Keys and rules are those of kohya's sd-scripts (`BucketManager`), so a data set falls into the same buckets here:

    buckets        every width from min to max in steps, with the greatest height that keeps width x height within
                   resolution^2; the same with width and height swapped; and the square. An image goes to the bucket nearest
                   in width / height (on a tie, the first in sorted order) and is resized, up or down, until it just covers it.
    no_upscale     no image is enlarged and no bucket is predefined. Images of more than resolution^2 pixels shrink to that
                   area, with one side a multiple of the step. The crop is each side rounded down to the step. min and max
                   have no effect, as in sd-scripts.
    none           one bucket, the square.

The nearest width / height is not always the nearest height / width. An image turned by 90 degrees may therefore go to a
bucket that is not its former bucket turned by 90 degrees.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

from fastsd.config.schema import BucketTable
from fastsd.data.sources.image import Rejected

Size = tuple[int, int]  # width, height in pixels


class Place(NamedTuple):
    """Resize and crop of an image as displayed: `resized` covers `size`, which is cropped from it."""

    resized: Size
    size: Size


class Buckets:
    """The buckets of a resolution.

    Args:
        resolution: R, in pixels; no predefined bucket has more than R x R pixels.
        table: `data.buckets`; None = only the R x R square.

    Attributes:
        sizes: the predefined buckets, sorted; empty with `no_upscale`.
    """

    def __init__(self, resolution: int, table: BucketTable | None) -> None:
        self.sizes: list[Size] = [(resolution, resolution)] if table is None else []
        self._area = resolution**2
        self._step = table.step if table else resolution
        if table and not table.no_upscale:
            self.sizes = _predefined_sizes(resolution, table)

    def place(self, width: int, height: int) -> Place:
        """Choose the resize and crop for an image of this size, as displayed.

        Raises:
            Rejected: the image is too small or too narrow for a bucket, and `no_upscale` forbids enlarging it.
        """
        if not self.sizes:
            resized = self._shrink(width, height)
            bucket = self._round_down(resized[0]), self._round_down(resized[1])
            if not all(bucket):
                raise Rejected(f"{width} x {height} pixels, too small for a {self._step} px bucket without enlarging")
            return Place(resized, bucket)
        ratio = width / height
        bucket = (width, height)
        if bucket not in self.sizes:
            bucket = min(self.sizes, key=lambda size: abs(size[0] / size[1] - ratio))
        scale = bucket[1] / height if ratio > bucket[0] / bucket[1] else bucket[0] / width
        return Place((_round(width * scale), _round(height * scale)), bucket)

    def _shrink(self, width: int, height: int) -> Size:
        if width * height <= self._area:
            return width, height
        ratio = width / height
        ideal = math.sqrt(self._area * ratio)
        wide, high = self._round_down(ideal), self._round_down(self._area / ideal)

        def error(width: int, height: int) -> float:
            return abs(width / height - ratio) if height else math.inf

        # One side becomes a multiple of the step: the side that brings the bucket nearer to the image's aspect ratio.
        if error(wide, self._round_down(wide / ratio)) < error(self._round_down(high * ratio), high):
            return wide, _round(wide / ratio)
        return _round(high * ratio), high

    def _round_down(self, side: float) -> int:
        """Round to a pixel, then down to a multiple of the step."""
        return _round(side) // self._step * self._step


def crop_position(rule: str, content: bytes, crop: int) -> tuple[float, float]:
    """Return the position of a crop in the resized image, as fractions of the free room from the left and from the top.

    Args:
        rule: data.crop.
        content: sha256 of the image file, which determines its random crops.
        crop: index of the crop.
    """
    if rule == "centre":
        return 0.5, 0.5
    words = hashlib.sha256(content + crop.to_bytes(4, "little")).digest()
    x, y = (int.from_bytes(words[i : i + 4], "little") / (2**32 - 1) for i in (0, 4))
    return x, y


def _round(side: float) -> int:
    return int(side + 0.5)


def _predefined_sizes(resolution: int, table: BucketTable) -> list[Size]:
    def side(limit: int) -> int:
        return min(table.max, limit // table.step * table.step)

    widths = range(table.min, table.max + 1, table.step)
    upright = {(width, side(resolution**2 // width)) for width in widths}
    upright = {size for size in upright if size[1] >= table.min}
    return sorted({(side(resolution),) * 2} | upright | {(height, width) for width, height in upright})
