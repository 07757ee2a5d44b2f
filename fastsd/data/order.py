"""The order of samples: the sample at a position is a pure function of (data, seed, stage, position), without iteration.

Every shape b has its own endless sequence of samples.  One epoch of this sequence has L_b = sum_f L_fb slots, and L_fb of them
belong to folder f.  permutation(seed, (epoch, b)) puts the slots of an epoch in order.  Slot o of folder f in epoch e is turn
number e * L_fb + o of the folder.  The turns of a folder cycle through its images: all images occur before one occurs again.

    one shape        Position p of the run is position p of the sequence, for any batch size.
    several shapes   A batch has one shape.  Epoch E of a stage contains the batches floor(E L_b / batch) up to
                     floor((E + 1) L_b / batch) of each sequence b, all in the order permutation(seed, E).
                     Samples that do not fill a batch are carried into the next epoch.  A shape with fewer samples
                     than a batch therefore does not occur in every epoch.

Shapes: B positions, S shapes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import FolderTable
from fastsd.data.cache import Group
from fastsd_kernels.noise import Purpose, permuted

_BLOCK = 1024  # positions computed at once: permuting one position costs nearly as much as permuting a hundred
_CACHED_BLOCKS = 64  # blocks in memory, half a megabyte
_KEY_STRIDE = 1 << 40  # between the permutation keys of two shapes, more than any run has epochs


@dataclass(frozen=True)
class _Segment:
    """The samples of one folder and one shape in the order of an epoch."""

    number: int
    root: int
    first: int  # index of its first sample in the view, or in the selection if there is one
    count: int
    length: int = 0  # number of positions in an epoch


class Order:
    """The order of a stage.

    In a folder without a weight, each image occurs `repeats` times per epoch.  The folders with weights have as many positions
    as images, and share these positions in proportion to their weights.  For example, a folder with weight 3 and 100 images
    and a folder with weight 1 and 300 images share 400 positions.  The first folder gets 300 positions, so each of its images
    occurs three times per epoch.  The second gets 100 positions, so a third of its images occur in an epoch.  Within a folder,
    each shape gets positions in proportion to its images, rounded, but at least one.

    Args:
        groups: the samples, in groups of one shape and folder.
        shares: has `repeats` and `weight` of each folder; () = every image occurs once.
        seed: the seed of the run.
        batch: the batch size of the stage.
        origin: global position at which the stage starts.  With several shapes, sequence b continues at origin * L_b / L.
            If the previous stage ended within an epoch, it may have read a few batches more or fewer of a shape.
        selected: sorted indices of the samples to use; None = all.

    `epoch` is the number of positions in an epoch, L = sum_b L_b.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        shares: Sequence[FolderTable],
        seed: int,
        *,
        batch: int,
        origin: int = 0,
        selected: np.ndarray | None = None,
    ) -> None:
        self.seed, self.batch_size, self.origin, self._selected = seed, batch, origin, selected
        shapes: dict[tuple[int, ...], list[_Segment]] = {}
        for number, group in enumerate(groups):
            first, end = group.first, group.first + group.count
            if selected is not None:
                first, end = np.searchsorted(selected, (first, end)).tolist()
            if end > first:
                shapes.setdefault(tuple(group.shape), []).append(_Segment(number, group.root, first, end - first))
        assert shapes, "no samples"
        self._shapes = _with_lengths(list(shapes.values()), shares)
        self._lengths = [sum(segment.length for segment in segments) for segments in self._shapes]
        self.epoch = sum(self._lengths)
        self._block = lru_cache(_CACHED_BLOCKS)(self._make_block)
        self._slots = lru_cache(2)(self._make_slots)

    def unused_samples(self, steps: int) -> int:
        """Count the samples whose shape has no batch within the epoch in which a stage of `steps` steps ends."""
        if len(self._shapes) == 1:
            return 0
        last_epoch = max(0, steps * self.batch_size - 1) // self.epoch
        batches = self._batches(last_epoch + 1)
        shapes = zip(self._shapes, batches, strict=True)
        return sum(segment.count for segments, number in shapes if not number for segment in segments)

    def batch(self, position: int, count: int) -> Tensor:
        """Return the indices of the samples at global positions [position, position + count): int64 (count,).

        With several shapes, the positions must lie within one batch of the stage.
        """
        shape, start = (0, position) if len(self._shapes) == 1 else self._locate(position, count)
        size = self._block_size(shape)
        numbers = range(start // size, (start + count - 1) // size + 1)
        blocks = torch.cat([self._block(shape, number) for number in numbers])
        return blocks[start - numbers[0] * size :][:count]

    def _locate(self, position: int, count: int) -> tuple[int, int]:
        """Return the shape of a batch, and the position of `position` in the sequence of that shape."""
        batch, row = divmod(position - self.origin, self.batch_size)
        assert batch >= 0 and row + count <= self.batch_size, f"[{position}, {position + count}) is not within a batch"
        # Before epoch E there are E * self.epoch / batch_size batches, less at most one for each shape.
        low_epoch = batch * self.batch_size // self.epoch
        high_epoch = (batch + len(self._shapes) + 1) * self.batch_size // self.epoch + 2
        epoch = low_epoch + bisect_right(range(low_epoch, high_epoch), batch, key=lambda number: sum(self._batches(number))) - 1
        batches_before = self._batches(epoch)
        epoch_batches = [end - start for start, end in zip(batches_before, self._batches(epoch + 1), strict=True)]
        slot = self._slot(self.origin + sum(batches_before) * self.batch_size, sum(epoch_batches), batch - sum(batches_before))
        shape = 0
        while slot >= epoch_batches[shape]:
            slot -= epoch_batches[shape]
            shape += 1
        shape_origin = self.origin * self._lengths[shape] // self.epoch
        return shape, shape_origin + (batches_before[shape] + slot) * self.batch_size + row

    def _batches(self, epoch: int) -> list[int]:
        """Return how many batches of each shape come before an epoch: S numbers."""
        return [epoch * length // self.batch_size for length in self._lengths]

    def _slot(self, position: int, count: int, index: int) -> int:
        return self._slots(position, count, index // _BLOCK)[index % _BLOCK]

    def _make_slots(self, position: int, count: int, block: int) -> list[int]:
        index_B = torch.arange(block * _BLOCK, min(count, (block + 1) * _BLOCK))
        return permuted(self.seed, Purpose.BATCHES, position, count, index_B).tolist()

    def _block_size(self, shape: int) -> int:
        # A full block of a shape with very few samples would need the permutations of hundreds of epochs.
        return min(max(self._lengths[shape], 64), _BLOCK)

    def _make_block(self, shape: int, number: int) -> Tensor:
        """Compute the sample indices of one block of a shape's sequence."""
        size, length = self._block_size(shape), self._lengths[shape]
        position_B = torch.arange(number * size, (number + 1) * size)
        epoch_B = position_B // length
        slot_B = position_B % length
        for epoch in epoch_B.unique().tolist():
            in_epoch_B = epoch_B == epoch
            key = shape * _KEY_STRIDE + epoch
            slot_B[in_epoch_B] = permuted(self.seed, Purpose.ORDER, key, length, slot_B[in_epoch_B])
        index_B = torch.empty_like(slot_B)
        start = 0
        for segment in self._shapes[shape]:
            in_segment_B = (slot_B >= start) & (slot_B < start + segment.length)
            turn_B = (epoch_B[in_segment_B] * segment.length + slot_B[in_segment_B] - start) % segment.count
            if segment.length % segment.count:  # otherwise all images occur equally often in an epoch, for any order of turns
                turn_B = permuted(self.seed, Purpose.ROTATION, segment.number, segment.count, turn_B)
            index_B[in_segment_B] = segment.first + turn_B
            start += segment.length
        return index_B if self._selected is None else torch.from_numpy(self._selected[index_B])


def _with_lengths(shapes: list[list[_Segment]], shares: Sequence[FolderTable]) -> list[list[_Segment]]:
    """Return the segments with their `length`, the number of positions in an epoch."""
    images_by_root: dict[int, int] = {}
    for segment in (segment for segments in shapes for segment in segments):
        images_by_root[segment.root] = images_by_root.get(segment.root, 0) + segment.count
    shares = shares or [FolderTable(path="")] * (max(images_by_root) + 1)
    weights = {root: weight for root in images_by_root if (weight := shares[root].weight) is not None}
    weighted_images = sum(images_by_root[root] for root in weights)

    def length(segment: _Segment) -> int:
        if segment.root not in weights:
            return segment.count * shares[segment.root].repeats
        fraction = weights[segment.root] / sum(weights.values())
        return max(round(weighted_images * fraction * segment.count / images_by_root[segment.root]), 1)

    return [[replace(segment, length=length(segment)) for segment in segments] for segments in shapes]
