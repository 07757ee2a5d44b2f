"""Choose the images for validation.

The held-out split is never trained on.  The stabilised split consists of training images that are measured in the same way: it
shows the training loss without its sampling noise.

Each image has a random key, a function of validate.seed and the xxh3 of its stored latents.  The images with the smallest keys
are held out.  The images with the next smallest keys stay in training and are measured as well.  The path and the captions of
an image therefore do not matter.  Copies of an image have the same key: all are held out together, and only one is measured.
With validate.by = "number", the key depends on the sample's number instead.  Two data sets with the same order of samples, such
as one data set at two resolutions, are then validated on the same samples, noise and timesteps, but copies are not detected.

A run chooses once, at its first start.  Its checkpoints keep the chosen images (`ValidationSplits.state_dict`), and later
starts look them up by the xxh3 of their latents.  So a trained image never becomes held out, a new image never enters a split,
and a split becomes smaller if an image has left the cache.

Shapes: N samples of the cache, n of a split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import Config, ValidateTable
from fastsd.data.cache import LatentCache
from fastsd.data.captions import select
from fastsd.errors import UserError
from fastsd_kernels.noise import Purpose, philox

_CHUNK = 1 << 16  # samples whose keys are drawn together
_PREFIX, _SAMPLES = "validation/", "validation_samples"  # names of the tensors in a checkpoint


@dataclass(frozen=True)
class ValidationSplits:
    """The splits of a cache, as sample numbers.

    Attributes:
        measured: the samples of "held_out" and "stabilised", int64, sorted by key, without copies. Empty splits are absent.
        left_out: the held-out samples and all their copies, int64, sorted. No stage may train on them.
        identity: for each measured sample, the number that determines its noise and timesteps.
        images: split -> int64 (n, 3): identity, xxh3 and sample number of all its images, also of those that are missing.
        samples: number of samples in the cache.
        notes: messages to the user, one line each.
    """

    measured: dict[str, np.ndarray]
    left_out: np.ndarray
    identity: dict[int, int]
    images: dict[str, np.ndarray] = field(default_factory=dict)
    samples: int = 0
    notes: list[str] = field(default_factory=list)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by which `choose_splits` finds the same images again."""
        tensors = {f"{_PREFIX}{name}": torch.from_numpy(images_n3) for name, images_n3 in self.images.items()}
        return tensors | ({_SAMPLES: torch.tensor(self.samples)} if tensors else {})


def choose_splits(cache: LatentCache, config: Config, state: Mapping[str, Tensor] | None = None) -> ValidationSplits:
    """Choose the splits of `[validate]` among the images that data.include and data.exclude leave in the first stage.

    Args:
        state: has the `state_dict` of an earlier choice, whose images are kept. A larger `validate.stabilised` adds to them.

    Raises:
        UserError: there are too few images, or all images of the earlier choice are missing.
    """
    table, data = config.validate_, config.data
    counts = {"held_out": table.held_out, "stabilised": table.stabilised}
    if not any(counts.values()):
        return ValidationSplits({}, np.empty(0, np.int64), {})
    check_N = np.array(cache.checks(0, len(cache)))
    selected = select(cache, tuple(data.include), tuple(data.exclude), config.stage[0].tag_separator)
    candidates = np.arange(len(cache)) if selected is None else selected
    identity_N = check_N if table.by == "content" else np.arange(len(cache))
    state = state or {}
    names = [name for name, count in counts.items() if count and f"{_PREFIX}{name}" in state]
    images = {name: state[f"{_PREFIX}{name}"].numpy()[: counts[name]].copy() for name in names}
    notes = _look_up(images, check_N, candidates, int(state[_SAMPLES])) if images else []
    if any(count > len(images.get(name, ())) for name, count in counts.items()):
        images = _add(images, counts, check_N, identity_N, candidates, table)

    measured = {name: numbers for name, images_n3 in images.items() if len(numbers := images_n3[images_n3[:, 2] >= 0, 2])}
    left_out = np.flatnonzero(_are_in(identity_N, images["held_out"], table)) if table.held_out else np.empty(0, np.int64)
    identity = {number: identity for images_n3 in images.values() for identity, _, number in images_n3.tolist()}
    return ValidationSplits(measured, left_out, identity, images, len(cache), notes)


def _are_in(identity_N: np.ndarray, images_n3: np.ndarray, table: ValidateTable) -> np.ndarray:
    """Tell which samples are in a split, bool (N,): by content with all copies, or by number."""
    return np.isin(identity_N, images_n3[:, 1 if table.by == "content" else 2])


def _look_up(images: dict[str, np.ndarray], check_N: np.ndarray, candidates: np.ndarray, samples: int) -> list[str]:
    """Update the sample numbers of images, with -1 for a missing one. Return notes about changes. `samples` is the old N."""
    all_checks = np.concatenate([images_n3[:, 1] for images_n3 in images.values()])
    copies = np.flatnonzero(np.isin(check_N, all_checks))
    if not len(copies):  # another dtype or device has encoded the same images into other bytes
        if samples != len(check_N):
            raise UserError(
                "validation-images-missing",
                f"none of the run's {len(all_checks)} validation images is in the cache, which had {samples} samples and has "
                f"{len(check_N)}; restore the images and cache.dtype, or start a new run with run=FOLDER",
            )
        for images_n3 in images.values():
            images_n3[:, 1] = np.where(images_n3[:, 2] >= 0, check_N[images_n3[:, 2]], images_n3[:, 1])
        return ["the latents in the cache were encoded anew; the run's validation images are recognized by their numbers"]

    # Of several copies, the one at the old number is preferred, then the first that the filters select.
    preferred = [*copies[::-1].tolist(), *np.intersect1d(copies, candidates)[::-1].tolist()]
    number_of = {int(check_N[number]): number for number in preferred}
    notes = []
    for name, images_n3 in images.items():
        for image in images_n3:
            if not (0 <= image[2] < len(check_N) and check_N[image[2]] == image[1]):
                image[2] = number_of.get(int(image[1]), -1)
        missing = int((images_n3[:, 2] < 0).sum())
        if missing:
            title, left = name.replace("_", "-"), len(images_n3) - missing
            notes.append(f"{missing} of the run's {len(images_n3)} {title} images are not in the cache; {left} are measured")
    return notes


def _add(
    images: dict[str, np.ndarray],
    counts: Mapping[str, int],
    check_N: np.ndarray,
    identity_N: np.ndarray,
    candidates: np.ndarray,
    table: ValidateTable,
) -> dict[str, np.ndarray]:
    """Fill the splits up to `counts` with the images whose keys are the smallest."""
    for images_n3 in images.values():
        candidates = candidates[~_are_in(identity_N, images_n3, table)[candidates]]
    _, indices = np.unique(_keys(identity_N, table.seed)[candidates], return_index=True)
    numbers, start, filled = candidates[indices], 0, dict[str, np.ndarray]()
    lengths = {name: len(images.get(name, ())) for name in counts}
    _check_sizes({name: count - lengths[name] for name, count in counts.items()}, lengths["stabilised"], len(numbers))
    for name in [name for name, count in counts.items() if count]:
        number_n = numbers[start : start + counts[name] - lengths[name]]
        start += len(number_n)
        added_n3 = np.stack([identity_N[number_n], check_N[number_n], number_n], axis=1)
        filled[name] = np.concatenate([images[name], added_n3]) if name in images else added_n3
    return filled


def _keys(identity_N: np.ndarray, seed: int) -> np.ndarray:
    """Draw the key of each sample, int64 (N,): 62 random bits, the same for equal identities."""
    block, keys = torch.zeros(1, dtype=torch.int64), [np.empty(0, np.int64)]
    for first in range(0, len(identity_N), _CHUNK):
        words = philox(seed, Purpose.HELD_OUT, torch.from_numpy(identity_N[first : first + _CHUNK]), block)[:, 0]
        keys.append((words[:, 0] << 30 ^ words[:, 1]).numpy())
    return np.concatenate(keys)


def _lower_too(stabilised: int, limit: int) -> str:
    return f", and validate.stabilised to {limit} or below" if stabilised > limit else ""


def _check_sizes(added: dict[str, int], kept: int, images: int) -> None:
    """Check that `images` distinct images suffice for the images to add. `kept` stabilised images are there already."""
    half, limit = images // 2, images - added["held_out"] + kept
    if added["held_out"] > half:
        raise UserError(
            "held-out-size",
            f"validate.held_out is {added['held_out']}, more than half of the {images} distinct images; lower it to {half} "
            f"or below{_lower_too(added['stabilised'] + kept, images - half + kept)}",
        )
    if added["stabilised"] + kept > limit:
        raise UserError(
            "stabilised-size",
            f"validate.stabilised is {added['stabilised'] + kept}, but only {limit} distinct images are trained on; "
            f"lower it to {limit} or below",
        )
