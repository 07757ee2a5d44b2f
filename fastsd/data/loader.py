"""Load batches: the samples at given positions of the run, with their captions and token ids.

A run numbers its samples p = 0, 1, 2, ... over all stages.  The seed and p alone decide which image stands at p (`order.py`),
which of its stored versions (crops and mirror images) is loaded, and how its caption is edited (`captions.py`).  A batch
therefore does not depend on earlier batches.  No remainder of an epoch is lost, a resumed run needs only p, and each of several
workers loads its own part of the same global batch.

Shapes: B samples, C x H x W latents, L tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import DataTable, StageTable
from fastsd.data.cache import LatentCache
from fastsd.data.captions import captions_for, select
from fastsd.data.masks import open_masks
from fastsd.data.order import Order
from fastsd.data.rows import can_pin
from fastsd.data.text_embeddings import TextEmbeddings
from fastsd.data.tokens import Tokens
from fastsd.model.text_encoder import pad
from fastsd_kernels.noise import Purpose, integers

PREFETCH = 8  # batches that are ready or in preparation before the step asks for them
_WORKERS = 2  # batches prepared at a time: one waits for the disk while the other is tokenized
_Tensor = TypeVar("_Tensor", Tensor, Tensor | None)
_MEMO_CAPTIONS = 1 << 16  # captions with memoised token ids


@dataclass(frozen=True)
class Batch:
    """The input of one step, on the CPU (pinned if there is a GPU).

    Attributes:
        latents_BCHW: the raw posterior mean, unscaled, in the cache's dtype.
        token_ids_BL: int64.
        positions_B: global sample positions, int64. All random numbers of a sample depend on its position.
        captions: the tokenized text, after edits and dropout.
        text_embeds_BLD: text embeddings in the cache's dtype; None = they are not cached.
        samples_B: indices in the cache of the samples of all workers, int64.
        weight_B: the factor of each sample's loss, fp32; None = all are 1.
        mask_B1HW: uint8, 255 where the loss counts in full; None = everywhere.
    """

    latents_BCHW: Tensor
    token_ids_BL: Tensor
    positions_B: Tensor
    captions: list[str]
    text_embeds_BLD: Tensor | None = None
    samples_B: Tensor | None = None
    weight_B: Tensor | None = None
    mask_B1HW: Tensor | None = None


class Loader:
    """Loads the batches of a stage.

    Args:
        cache: the samples.
        tokenize: maps a list of captions to token ids, int64 (B, L). L may depend on the captions, see `pad`.
        seed: the seed of the run.
        stage: has the batch size and the caption edits, see `captions_for`.
        data: has repeats and weights of folders, the filter by tag, and the keys of image weights and masks; None = every
            image occurs once and counts in full.
        origin: global position at which the stage starts.
        rank, world: every global batch has `world` equal parts, and this worker loads part number `rank`.
        tokens: token ids of the cache's captions; None = tokenize all captions here.
        text_embeddings: text embeddings of the captions; None = the step runs the text encoder.
        left_out: samples that no batch may contain, see `validation_split.py`.

    Raises:
        UserError: the filter leaves no image, or the masks are missing or damaged.
    """

    def __init__(
        self,
        cache: LatentCache,
        tokenize: Callable[[list[str]], Tensor],
        seed: int,
        stage: StageTable,
        *,
        data: DataTable | None = None,
        origin: int = 0,
        rank: int = 0,
        world: int = 1,
        tokens: Tokens | None = None,
        text_embeddings: TextEmbeddings | None = None,
        left_out: np.ndarray | None = None,
    ) -> None:
        assert 0 <= rank < world
        self.cache, self.stage, self.seed, self.rank, self.world = cache, stage, seed, rank, world
        self._tokenize, self._tokens, self._text_embeddings = tokenize, tokens, text_embeddings
        self._memo: dict[str, Tensor] = {}
        self._memo_lock = threading.Lock()
        self._has_weights = bool(data and data.weight_key)
        self._masks = open_masks(cache) if data and data.masks else None
        self._first_G = torch.tensor([group.first for group in cache.groups])
        loss_weights = [data.roots[group.root].loss_weight if data else 1.0 for group in cache.groups]
        self._weight_G = torch.tensor(loss_weights) if any(weight != 1 for weight in loss_weights) else None
        selected = select(cache, tuple(data.include), tuple(data.exclude), stage.tag_separator) if data else None
        if left_out is not None and len(left_out):
            samples = np.arange(len(cache)) if selected is None else selected
            selected = samples[np.isin(samples, left_out, invert=True)]
        roots = data.roots if data else ()
        self._order = Order(cache.groups, roots, seed, batch=stage.batch, origin=origin, selected=selected)

    def unused_samples(self, steps: int) -> int:
        """Count the samples that a stage of `steps` steps cannot reach, because their shape has too few for a batch."""
        return self._order.unused_samples(steps)

    @property
    def images(self) -> int:
        """Number of images per epoch, with the folders' `repeats` and `weight`."""
        return self._order.epoch

    def batch(self, position: int, count: int) -> Batch:
        """Load this worker's part of the samples at global positions [position, position + count), all of one shape.

        With several shapes, the positions must lie within one batch of the stage.

        Raises:
            ValueError: `count` is not divisible by the number of workers.
            UserError: the cache is damaged.
        """
        if count % self.world:
            raise ValueError(f"batch is {count}, not divisible by {self.world} workers; use a multiple of {self.world}")
        positions_B = torch.arange(position, position + count)
        index_B = self._order.batch(position, count)

        variants_B = self.cache.variants(index_B)
        captions = captions_for(variants_B, positions_B, self.stage, self.seed)
        # The index of each caption among the variants of its sample, or -1 if the caption was edited or dropped.
        pairs = zip(captions, variants_B, strict=True)
        variant_index_B = [variants.index(caption) if caption in variants else -1 for caption, variants in pairs]
        token_ids_BL = self._token_ids(captions, variant_index_B, index_B)  # L is that of the whole batch for every worker

        worker_count = count // self.world
        share = slice(self.rank * worker_count, (self.rank + 1) * worker_count)
        samples_B, positions_B, index_B, token_ids_BL = index_B, positions_B[share], index_B[share], token_ids_BL[share]
        captions, variant_index_B = captions[share], variant_index_B[share]
        has_versions = self.cache.versions > 1
        version_B = integers(self.seed, Purpose.VERSION, positions_B, self.cache.versions) if has_versions else None
        latents = self.cache.get(index_B, version_B)["latents"]
        text_embeds_BLD = None
        if self._text_embeddings is not None:
            assert not any(caption for caption, variant in zip(captions, variant_index_B, strict=True) if variant < 0)
            text_embeds_BLD = self._text_embeddings.get(index_B, variant_index_B, token_ids_BL.shape[1])

        token_ids_BL, weight_B = _pin(token_ids_BL), _pin(self._weights(index_B))
        mask_B1HW = _pin(self._masks.get(index_B, version_B, latents.shape[-2:])) if self._masks else None
        return Batch(latents, token_ids_BL, _pin(positions_B), captions, text_embeds_BLD, samples_B, weight_B, mask_B1HW)

    def _weights(self, index_B: Tensor) -> Tensor | None:
        """Return the loss factor of each sample: the factor of its folder times the sample's own factor."""
        sample_weight_B = self.cache.weights(index_B) if self._has_weights else None
        if self._weight_G is None:
            return sample_weight_B
        folder_weight_B = self._weight_G[torch.searchsorted(self._first_G, index_B, right=True) - 1]
        return folder_weight_B if sample_weight_B is None else folder_weight_B * sample_weight_B

    def load_unaugmented(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Load samples of one shape without randomness: their first versions and first captions.

        Returns:
            Raw latents (B, C, H, W), and token ids (B, L) or, if they are cached, text embeddings (B, L, D).
        """
        first_variants = [0] * len(samples)
        latents_BCHW = self.cache.get(samples)["latents"]
        if self._text_embeddings is not None:
            return latents_BCHW, self._text_embeddings.get(samples, first_variants)
        ids_BL = self._token_ids(self.cache.captions(samples), first_variants, torch.from_numpy(samples))
        return latents_BCHW, _pin(ids_BL)

    def stream(self, start: int, stop: int, step: int) -> Stream:
        """Prefetch batches of `step` samples from position `start` up to `stop`. The last one may be smaller."""
        return Stream(lambda position: self.batch(position, min(step, stop - position)), range(start, stop, step))

    def _token_ids(self, captions: list[str], variant_index_B: list[int], index_B: Tensor) -> Tensor:
        ids_by_slot: dict[int, Tensor] = {}
        if self._tokens is not None:
            for i, (variant, index) in enumerate(zip(variant_index_B, index_B.tolist(), strict=True)):
                if variant >= 0:
                    ids_by_slot[i] = self._tokens.row(index, variant)
        missing_slots = [i for i in range(len(captions)) if i not in ids_by_slot]
        ids_by_slot.update(zip(missing_slots, self._tokenized([captions[i] for i in missing_slots]), strict=True))
        return pad([ids_by_slot[i] for i in range(len(captions))])

    def _tokenized(self, captions: list[str]) -> list[Tensor]:
        with self._memo_lock:  # also because not every tokenizer is thread-safe
            if len(self._memo) + len(captions) > _MEMO_CAPTIONS:
                self._memo = {}
            unknown = [caption for caption in dict.fromkeys(captions) if caption not in self._memo]
            # Each alone, because the length of its row would otherwise depend on the others.
            self._memo.update((caption, self._tokenize([caption])[0]) for caption in unknown)
            return [self._memo[caption] for caption in captions]


class Stream(Iterator[Batch]):
    """Iterates over batches that background threads prepare. `waited` counts the seconds that the consumer has waited.

    `next` raises the exception of a thread. The threads stop at `close`, at the end of a `with` block, and when the stream is
    deleted.
    """

    def __init__(self, load: Callable[[int], Batch], positions: range):
        self.waited = 0.0
        self._load, self._positions = load, iter(positions)
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="fastsd-loader")
        self._ahead: deque[Future[Batch]] = deque()
        for _ in range(PREFETCH):
            self._prefetch_next()

    def __next__(self) -> Batch:
        if not self._ahead:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            batch = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self.waited += time.perf_counter() - start
        self._prefetch_next()
        return batch

    def _prefetch_next(self) -> None:
        for position in self._positions:
            self._ahead.append(self._pool.submit(self._load, position))
            return

    def close(self) -> None:
        self._positions = iter(())
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _pin(tensor: _Tensor) -> _Tensor:
    return tensor.pin_memory() if tensor is not None and can_pin() else tensor
