"""Sharded state: each rank keeps the optimizer state, the EMA and the low halves of 1/N of the weights, and updates only these.

    arena    [ chunk 0 | chunk 1 | ... | chunk n-1 ]          of `CHUNK` bytes of fp32
    chunk    [ piece of rank 0 | ... | piece of rank N-1 ]    of whole blocks of `BLOCK` elements

Every rank has all weights and computes gradients of its own images.  Of each chunk it receives the sum of its piece only
(`gradient_sums.py`), updates that piece, and sends the new weights to the others: in bf16 their high halves.  So a step sends
as many bytes as without shards in fp32, and three quarters of them in bf16.  This is ZeRO-1 (Rajbhandari et al. 2020, "ZeRO:
memory optimizations toward training trillion parameter models").  A rank has a piece of each chunk, not a stretch of the arena,
because the chunks arrive one after another, and all links shall be busy with each of them.

Checkpoints are those of one process.  Rank 0 gathers one chunk after another and keeps the whole in main memory.  Read next:
`sharded_updates.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd.train.ranks import Ranks

CHUNK = 64 << 20  # bytes: large enough for the full rate of a link, and a fiftieth of SD1.5's gradients
BLOCK = 16384  # elements that one program of an optimizer's kernel adds up


def sharded_size(elements: int, world: int) -> int:
    """Return the elements of an arena that one of `world` ranks keeps."""
    return -(-elements // (world * BLOCK)) * BLOCK


class Shards:
    """Division of an arena between ranks. Methods that talk to other ranks must be called by all of them.

    Args:
        size: elements of the arena, which N ranks divide into whole blocks.

    Attributes:
        chunk: elements of each chunk but the last.
        chunks, pieces: their places in the arena, and those of this rank's pieces.
        blocks: number of blocks of each piece.
    """

    def __init__(self, size: int, ranks: Ranks) -> None:
        unit = ranks.world * BLOCK
        assert size % unit == 0
        self.size, self.ranks = size, ranks
        self.chunk = max(CHUNK // 4 // unit, 1) * unit
        self.chunks = [slice(start, min(start + self.chunk, size)) for start in range(0, size, self.chunk)]
        self.pieces: list[slice] = []
        for chunk in self.chunks:
            length = (chunk.stop - chunk.start) // ranks.world
            start = chunk.start + ranks.rank * length
            self.pieces.append(slice(start, start + length))
        self.blocks = [(piece.stop - piece.start) // BLOCK for piece in self.pieces]

    def of(self, arena: Tensor) -> list[Tensor]:
        """Return this rank's pieces of a tensor in the arena's layout, as views."""
        return [arena[piece] for piece in self.pieces]

    def write(self, tensors: Sequence[Tensor], start: int, values: Tensor) -> None:
        """Write values that lie at `start` in the arena, as far as they are in this rank's pieces."""
        stop = start + len(values)
        for place, piece in zip(self.pieces, tensors, strict=True):
            first, last = max(place.start, start), min(place.stop, stop)
            if first < last:
                piece[first - place.start : last - place.start].copy_(values[first - start : last - start])

    def empty(self, *count: int, dtype: torch.dtype = torch.float32, everywhere: bool = False) -> Tensor:
        """Allocate (*count, size) elements where `whole` gathers them: in main memory, or without data."""
        return torch.empty(*count, self.size, dtype=dtype, device="cpu" if everywhere or self.ranks.main else "meta")

    def whole(self, tensors: Sequence[Tensor], *, everywhere: bool = False, out: Tensor | None = None) -> Tensor:
        """Gather the pieces of all ranks in main memory, on rank 0 or `everywhere`. Others get a tensor without data.

        Args:
            out: tensor of `empty` to write to; None = a new one.

        Raises:
            RanksOutOfMemory: memory has run out on a rank. All ranks raise it.
        """
        keeps = everywhere or self.ranks.main
        with self.ranks.allocating():
            whole = self.empty(dtype=tensors[0].dtype, everywhere=everywhere) if out is None else out
            received = tensors[0].new_empty(self.chunk)
        for chunk, piece in zip(self.chunks, tensors, strict=True):
            gathered = received[: chunk.stop - chunk.start]
            self.ranks.finish([self.ranks.gather(gathered, piece)])
            if keeps:
                whole[chunk].copy_(gathered)
        return whole
