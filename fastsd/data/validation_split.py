"""Choose the images for validation.

The held-out split is never trained on.  The stabilised split consists of training images that are measured in the same way: it
shows the training loss without its sampling noise.

Each image has a random key, a function of validate.seed and the xxh3 of its stored latents.  The images with the smallest keys
are held out.  The images with the next smallest keys stay in training and are measured as well.  The path and the captions of
an image therefore do not matter, and a new image displaces another only if its key is smaller.  Copies of an image have the
same key: all are held out together, and only one is measured.  With validate.by = "number", the key depends on the sample's
number instead.  Two data sets with the same order of samples, such as one data set at two resolutions, are then validated on
the same samples, noise and timesteps, but copies are not detected.

Shapes: N samples of the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastsd.config.schema import Config, ValidateTable
from fastsd.data.cache import LatentCache
from fastsd.data.captions import select
from fastsd.errors import UserError
from fastsd_kernels.noise import Purpose, philox

_CHUNK = 1 << 16  # samples whose keys are drawn together


@dataclass(frozen=True)
class ValidationSplits:
    """The splits of a cache, as sample numbers.

    Attributes:
        measured: the samples of "held_out" and "stabilised", int64, sorted by key, without copies. Empty splits are absent.
        left_out: the held-out samples and all their copies, int64, sorted. No stage may train on them.
    """

    measured: dict[str, np.ndarray]
    left_out: np.ndarray


def choose_splits(cache: LatentCache, config: Config) -> ValidationSplits:
    """Choose the splits of `[validate]` among the images that data.include and data.exclude leave in the first stage.

    Raises:
        UserError: there are too few images.
    """
    table, data = config.validate_, config.data
    counts = {"held_out": table.held_out, "stabilised": table.stabilised}
    if not any(counts.values()):
        return ValidationSplits({}, np.empty(0, np.int64))
    key_N = _keys(cache, table)
    selected = select(cache, tuple(data.include), tuple(data.exclude), config.stage[0].tag_separator)
    keys, indices = np.unique(key_N if selected is None else key_N[selected], return_index=True)
    samples = indices if selected is None else selected[indices]
    _check_sizes(counts, len(samples))
    measured, start = {}, 0
    for name, count in counts.items():
        if count:
            measured[name] = samples[start : start + count]
        start += count
    return ValidationSplits(measured, np.flatnonzero(np.isin(key_N, keys[: table.held_out])))


def identities(cache: LatentCache, table: ValidateTable, first: int, last: int) -> np.ndarray:
    """Return what identifies samples [first, last), int64: content hashes or sample numbers."""
    return cache.checks(first, last) if table.by == "content" else np.arange(first, last)


def _keys(cache: LatentCache, table: ValidateTable) -> np.ndarray:
    """Draw the key of each sample, int64 (N,): 62 random bits, the same for equal identities."""
    block, keys = torch.zeros(1, dtype=torch.int64), [np.empty(0, np.int64)]
    for first in range(0, len(cache), _CHUNK):
        identity_B = torch.tensor(identities(cache, table, first, min(first + _CHUNK, len(cache))))
        words = philox(table.seed, Purpose.HELD_OUT, identity_B, block)[:, 0]
        keys.append((words[:, 0] << 30 ^ words[:, 1]).numpy())
    return np.concatenate(keys)


def _check_sizes(sizes: dict[str, int], images: int) -> None:
    half, remaining = images // 2, images - sizes["held_out"]
    if sizes["held_out"] > half:
        raise UserError(
            "held-out-size",
            f"validate.held_out is {sizes['held_out']}, more than half of the {images} distinct images; lower it to {half} "
            "or below",
        )
    if sizes["stabilised"] > remaining:
        raise UserError(
            "stabilised-size",
            f"validate.stabilised is {sizes['stabilised']}, but only {remaining} distinct images are trained on; "
            f"lower it to {remaining} or below",
        )
