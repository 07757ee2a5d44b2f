"""Sums of the gradients of all ranks, in chunks that are sent while the backward still computes the others.

    arena      [ chunk 0 | chunk 1 | ... | chunk n-1 ]      of `CHUNK` bytes, each with one piece for each rank
    backward   gradients arrive from the last parameter to the first
    sums       chunk n-1, n-2, ..., 0, each as soon as it is complete and its predecessors are on their way

All ranks send the chunks in this order.  Of each chunk, a rank receives its piece from all ranks, adds them in the order of the
ranks, and sends the sum to all.  With N ranks, each sends 2 (N - 1) / N times the bytes of its gradients, as much as the best
all-reduce (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms").  But the order of the additions is that of one
process that accumulates N micro-batches, whatever library and connections the machine has.  The bits are equal, too, except
where a matmul adds to the sums before it has added up all rows of its own result.

Between machines, that would send each rank's gradients through the network, where an all-reduce sends those of a machine once.
So with several machines, chunks are all-reduced.  Then a run that is repeated has the same bits as long as the library chooses
the same order, and one with another number of ranks differs in the last bits.

Sums are in fp32, also in bf16 stages, as for micro-batches.  A rank with several micro-batches adds them first, and sends after
the last.  With sharded state (`shards.py`), no sums are sent to the others: the rank whose piece it is has them in its arena,
where the rest keeps the gradients of this rank's own images.  Between machines, chunks are reduce-scattered then.

A chunk is complete when it has had as many gradients as in the first backward of the stage, after which all chunks
are sent at once: the layers that a clip_skip leaves out have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsd.train import shards
from fastsd.train.ranks import Ranks
from fastsd.train.trainable import TrainableComponent

if TYPE_CHECKING:
    from torch.distributed import Work


class GradientSums:
    """Sums the gradient arenas of a stage over all ranks.

    Args:
        components: the trained components. Their backwards run in this order.

    Attributes:
        early: number of chunks of the last step that were sent before its backward had ended.
    """

    def __init__(self, ranks: Ranks, components: Sequence[TrainableComponent]) -> None:
        self.ranks, self.early = ranks, 0
        self._ordered = ranks.world == ranks.local_world
        self._sharded = any(component.shards for component in components)
        self._chunks: list[Tensor] = []
        self._rests: list[Tensor] = []  # elements that cannot be divided between the ranks, fewer than there are ranks
        for component in components:
            self._divide(component)
        largest = max((len(chunk) for chunk in self._chunks), default=0)
        device = self._chunks[0].device
        self._received = [torch.empty(largest, device=device) for _ in range(2 * (self._ordered or self._sharded))]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._expected: list[int] | None = None  # gradients of each chunk in one backward
        self._arrived: list[int] = []
        self._works: list[Work] | None = None  # of the chunks sent so far; None outside of the last micro-batch's backward

    def _divide(self, component: TrainableComponent) -> None:
        assert component.gradients is not None
        flat, world = component.gradients.flat, self.ranks.world
        size, rest = shards.CHUNK // flat.element_size() // world * world, len(flat) % world
        if component.shards:
            size = component.shards.chunk
        first, chunks = len(self._chunks), flat[rest:].split(size)
        self._chunks += reversed(chunks)
        self._rests += [flat[:rest]] if rest else []
        for i, weight in enumerate(component.weights):
            start, end = component.layout.span(i)
            lowest, highest = (max(at - rest, 0) // size for at in (start, end - 1))
            numbers = range(first + len(chunks) - 1 - highest, first + len(chunks) - lowest)
            weight.register_post_accumulate_grad_hook(partial(self._arrive, numbers))

    @property
    def sent_bytes(self) -> float:
        """Bytes of gradients that each rank sends in a step."""
        elements = sum(map(len, self._chunks + self._rests))
        return (1 if self._sharded else 2) * (self.ranks.world - 1) / self.ranks.world * 4 * elements

    def begin(self) -> None:
        """Begin the backward of a step's last micro-batch."""
        self._arrived, self._works = [0] * len(self._chunks), []

    def discard(self) -> None:
        """Forget the sums of a step that has ended with an error."""
        self._works = None

    def _arrive(self, chunks: range, _: Tensor) -> None:
        if self._works is None:
            return
        for chunk in chunks:
            self._arrived[chunk] += 1
        while self._expected and (sent := len(self._works)) < len(self._chunks) and self._arrived[sent] >= self._expected[sent]:
            self._send()

    def finish(self, loss: Tensor) -> Tensor:
        """Sum what is left after the backward. Return the sum of the ranks' losses; with sharded state, this rank's loss."""
        assert self._works is not None
        assert self._expected in (None, self._arrived), "a gradient has arrived after its chunk was sent"
        if not self._sharded:  # allocated before anything changes, so that `abandon` can follow when memory runs out here
            numbers = torch.cat([*self._rests, loss.view(1)])
            received = numbers.new_empty(self.ranks.world * len(numbers))
        self.early, self._expected = len(self._works), self._arrived
        for _ in self._chunks[len(self._works) :]:
            self._send()
        if self._received:
            self._add_received()
        works, self._works = self._works, None
        if self._sharded:
            self._join()
            return loss
        works.append(self.ranks.gather(received, numbers))
        self.ranks.finish(works)
        self._join()
        sums: list[Tensor] = list(self._added(received).split([*map(len, self._rests), 1]))
        for rest, added in zip(self._rests, sums, strict=False):
            rest.copy_(added)
        return sums[-1].view(())

    def abandon(self) -> None:
        """Take part in the sums of a step that this rank cannot complete, so that no other rank waits. All discard them."""
        expected, self._expected = self._expected, None
        if self._works is None:
            self.begin()
        self.finish(self._chunks[0].new_zeros(()))
        self._expected = expected

    def _added(self, received: Tensor) -> Tensor:
        """Add the tensors received from all ranks to the first of them, in the order of the ranks, and return it."""
        tensors: tuple[Tensor, ...] = received.view(self.ranks.world, -1).unbind()
        for tensor in tensors[1:]:
            tensors[0].add_(tensor)
        return tensors[0]

    def _send(self) -> None:
        """Start to sum the next chunk."""
        assert self._works is not None
        number = len(self._works)
        chunk = self._chunks[number]
        with self._beside_backward():
            if not self._received:
                self._works.append(self.ranks.sum_(chunk))
                return
            if number:
                self._add_received()
            if number > 1 and not self._sharded:
                self.ranks.finish(self._works[number - 2 : number - 1])  # its sums were sent from the memory that is used next
            received = self._received[number % 2][: len(chunk)]
            if self._ordered:
                self._works.append(self.ranks.exchange(received, chunk))
            else:
                self._works.append(self.ranks.scatter_sum(received[: len(chunk) // self.ranks.world], chunk))

    def _add_received(self) -> None:
        """Add the pieces that the latest chunk's exchange has received, and start to send the sums, or keep them."""
        assert self._works is not None
        number = len(self._works) - 1
        chunk = self._chunks[number]
        received, length = self._received[number % 2][: len(chunk)], len(chunk) // self.ranks.world
        with self._beside_backward():
            self.ranks.finish(self._works[-1:])
            sums = self._added(received) if self._ordered else received[:length]
            if self._sharded:
                chunk[self.ranks.rank * length :][:length].copy_(sums)
            else:
                self._works[-1] = self.ranks.gather(chunk, sums)

    def _join(self) -> None:
        """On a GPU, let the stream of the backward wait for that of the sums, also in a capture, which ends in the former."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextmanager
    def _beside_backward(self) -> Iterator[None]:
        """On a GPU, work in a stream of its own, so that the backward does not wait for other ranks."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
