"""The way from the cache to the step: which sample is read at which position, its caption, its token ids.

A run counts its samples p = 0, 1, 2, ... over all stages.  Sample p is number `permutation(seed, epoch)[p % n]` of the
view, with epoch = p // n, so a batch is a pure function of (seed, p): it may lie across the end of an epoch, nothing is
lost to a remainder, and a resumed run needs to know no more than p.

Shapes: B samples, C x H x W latents, L tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastsd.config import StageTable
from fastsd.data.cache import LatentCache
from fastsd.data.captions import captions_for
from fastsd_kernels.noise import Purpose, permutation

PREFETCH = 3  # batches ready ahead of the step
_MEMO = 1 << 16  # captions whose token ids are kept


@dataclass(frozen=True)
class Batch:
    """What one step consumes, on the CPU (pinned when there is a GPU).

    latents_BCHW: raw posterior mean, unscaled, in the cache's dtype.  token_ids_BL: int64.  positions_B: int64 global
    sample positions, the key of all randomness.  captions: as tokenized, after edits and dropout.
    """

    latents_BCHW: Tensor
    token_ids_BL: Tensor
    positions_B: Tensor
    captions: list[str]


class Loader:
    """Batches of a cache in the order of a run.

    Args:
        cache: the samples.
        tokenize: list of captions -> int64 (B, L), the same L in every call.
        seed: the run's.
        stage: what happens to captions, see `captions_for`.
    """

    def __init__(self, cache: LatentCache, tokenize: Callable[[list[str]], Tensor], seed: int, stage: StageTable):
        self.cache = cache
        self.stage = stage
        self.seed = seed
        self._tokenize = tokenize
        self._memo: dict[str, Tensor] = {}
        # Two, because a batch may need the end of one epoch and the start of the next.
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, Purpose.ORDER, epoch, len(cache)))

    def indices(self, positions_B: Tensor) -> Tensor:
        """Global sample positions -> indices in the cache's view: int64 (B,)."""
        n = len(self.cache)
        index_B = torch.empty_like(positions_B)
        for epoch in torch.unique(positions_B // n).tolist():
            here = positions_B // n == epoch
            index_B[here] = self._order(epoch)[positions_B[here] % n]
        return index_B

    def batch(self, position: int, count: int) -> Batch:
        """The samples at global positions [position, position + count). Raises UserError for a damaged cache."""
        positions_B = torch.arange(position, position + count)
        index_B = self.indices(positions_B)
        captions = captions_for(self.cache.captions(index_B), positions_B, self.stage, self.seed)
        latents = self.cache.get(index_B)["latents"]
        return Batch(latents, _pinned(self._token_ids(captions)), _pinned(positions_B), captions)

    def stream(self, start: int, stop: int, step: int) -> Stream:
        """Batches of `step` samples from position `start` until `stop` (the last one may be shorter), made ahead."""
        return Stream(lambda at: self.batch(at, min(step, stop - at)), range(start, stop, step))

    def _token_ids(self, captions: list[str]) -> Tensor:
        if len(self._memo) + len(captions) > _MEMO:
            self._memo = {}
        # A local name: another thread may start a new memo, and this one must stay whole until the stack below.
        memo = self._memo
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in memo]
        if unknown:
            memo.update(zip(unknown, self._tokenize(unknown), strict=True))
        return torch.stack([memo[caption] for caption in captions])


class Stream(Iterator[Batch]):
    """Iterates over batches that a background thread prepares. `waited`: seconds the consumer has spent waiting.

    An exception in the thread is raised by `next`. `close` (or leaving a `with` block) stops the thread.
    """

    def __init__(self, make: Callable[[int], Batch], positions: range):
        self.waited = 0.0
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(PREFETCH)
        self._closed = threading.Event()
        # The thread knows the queue, not this object: a stream that is dropped without `close` still ends its thread.
        arguments = (make, positions, self._queue, self._closed)
        self._thread = threading.Thread(target=_produce, args=arguments, name="fastsd-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, Batch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        self._closed.set()
        while not self._queue.empty():  # a producer that waits for room wakes up and sees that it is over
            self._queue.get_nowait()
        self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()


def _produce(
    make: Callable[[int], Batch],
    positions: range,
    ready: queue.Queue[Batch | BaseException | None],
    closed: threading.Event,
) -> None:
    def hand_over(item: Batch | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    try:
        for position in positions:
            if closed.is_set():
                return
            hand_over(make(position))
        hand_over(None)
    except BaseException as error:  # whatever it is, it belongs to the consumer
        hand_over(error)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
