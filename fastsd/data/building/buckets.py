"""Buckets: the size that an image is resized to, and the size that is cropped from it.

Keys and rules are those of kohya's sd-scripts (`BucketManager`), so images get the same buckets as there:

    buckets        Every width from min to max in steps has a bucket, with the greatest height that keeps width x height
                   within resolution^2. There are also these buckets with width and height swapped, and the square. An image
                   goes to the bucket with the nearest width / height (on a tie, the first in sorted order). It is resized, up
                   or down, until it just covers this bucket.
    no_upscale     No bucket is predefined and no image is enlarged. An image of more than resolution^2 pixels shrinks to that
                   area, with one side a multiple of the step. Each side of the crop is the side of the image, rounded down to
                   a multiple of the step. min and max have no effect, as in sd-scripts.
    none           There is one bucket, the square.

The bucket with the nearest width / height need not have the nearest height / width. If an image is turned by 90 degrees, its
new bucket may therefore differ from its old bucket turned by 90 degrees.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

from fastsd.config.schema import BucketTable, DataTable
from fastsd.data.sources.image import Rejected

Size = tuple[int, int]  # width, height in pixels


class Place(NamedTuple):
    """The `resized` size of an image as displayed, and the `size` of the crop, which is not larger."""

    resized: Size
    size: Size


class Buckets:
    """The buckets of a resolution.

    Args:
        resolution: R in pixels. No predefined bucket has more than R x R pixels.
        table: `data.buckets`; None = one bucket of R x R pixels.

    Attributes:
        sizes: the predefined buckets, sorted. There are none with `no_upscale`.
    """

    def __init__(self, resolution: int, table: BucketTable | None) -> None:
        self.sizes: list[Size] = [(resolution, resolution)] if table is None else []
        self._area = resolution**2
        self._step = table.step if table else resolution
        if table and not table.no_upscale:
            self.sizes = _predefined_sizes(resolution, table)

    def place(self, width: int, height: int) -> Place:
        """Choose the resize and crop of an image that has this size when it is displayed.

        Raises:
            Rejected: the image is too small for a bucket, and `no_upscale` forbids enlarging it.
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

        # The side that becomes a multiple of the step is the one that keeps the aspect ratio better.
        if error(wide, self._round_down(wide / ratio)) < error(self._round_down(high * ratio), high):
            return wide, _round(wide / ratio)
        return _round(high * ratio), high

    def _round_down(self, side: float) -> int:
        """Round to a pixel, then down to a multiple of the step."""
        return _round(side) // self._step * self._step


def planned_side(data: DataTable, step: int) -> int:
    """Return the side in px of a square that has at least the pixels of the largest images, whatever their shapes.

    Args:
        step: the model needs sides of squares that are multiples of it. With buckets, the side is rounded up to one.
    """
    if data.buckets is None:
        return data.resolution
    largest = max(
        (width * height for width, height in Buckets(data.resolution, data.buckets).sizes), default=data.resolution**2
    )
    return math.ceil(math.sqrt(largest) / step) * step


def crop_position(rule: str, content: bytes, crop: int) -> tuple[float, float]:
    """Return the position of a crop in the resized image: fractions (left, top) of the space that the crop leaves free.

    Args:
        rule: data.crop.
        content: sha256 of the image file, which determines the position of random crops.
        crop: index of the crop.
    """
    if rule == "centre":
        return 0.5, 0.5
    hashed = hashlib.sha256(content + crop.to_bytes(4, "little")).digest()
    x, y = (int.from_bytes(hashed[i : i + 4], "little") / (2**32 - 1) for i in (0, 4))
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
