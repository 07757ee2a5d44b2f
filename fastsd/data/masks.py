"""Masks of the image areas to learn, built once: DIR/masks/VIEW.safetensors, an ordinary safetensors file.

A mask lies beside its image.  It is white (255) where the loss counts and black where it does not.  It has the aspect ratio of
the displayed image, gets the same resize, crop and mirroring, and is averaged over each cell of the latents.  An image without
a mask counts in full.  If a mask is unusable, its image is rejected, because training on all of it would contradict the mask.

The file contains the tensors keys (uint8, n * 32, zeros = no mask), offsets (int64, n * crops + 1) and cells (uint8).  The mask
of crop c of sample i is cells[offsets[i * crops + c] : offsets[i * crops + c + 1]].  These bytes are a zlib-compressed uint8
(h, w), or empty.  A mask is mirrored when it is read for mirrored latents.  The metadata has the sha256 of the view.

Shapes: n samples, of which B in a batch, h x w cells of their latents.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsd.data import cache
from fastsd.data.rows import OUTDATED, Sealed, damage_error, read_header

KEY_BYTES = 32


class MasksFile(Sealed):
    """The file that holds the masks of a view."""

    FORMAT, HASHED_KEYS = "masks-1", ("view",)
    TENSORS = {"keys": np.uint8, "offsets": np.int64, "cells": np.uint8}


class Masks:
    """The memory-mapped masks of a cache's samples. Thread-safe.

    Raises:
        UserError: the masks are missing, damaged, or belong to another state of the view.
    """

    def __init__(self, latents: cache.LatentCache) -> None:
        self.path = mask_path(latents.path.parent.parent, latents.name)
        self._file = MasksFile(self.path)
        self._crops, self._mirrors = latents.meta.crops, 1 + latents.meta.flip
        if self._file.metadata["view"] != latents.sha256:
            raise damage_error(self.path, OUTDATED)

    @property
    def count(self) -> int:
        """Number of samples with a mask."""
        return int(self._file.arrays["keys"].reshape(-1, KEY_BYTES).any(1).sum())

    def get(self, samples: cache.Positions, versions: cache.Positions | None, shape: Sequence[int]) -> Tensor:
        """Read the masks of a batch: uint8 (B, 1, h, w), 255 = learned in full.

        Args:
            samples: B cache indices of samples of one shape.
            versions: the version of each sample, as in `LatentCache.get`; None = the first version.
            shape: (h, w) of the latents.

        Raises:
            UserError: the file is damaged.
        """
        masks_B1HW = torch.full((len(samples), 1, *shape), 255, dtype=torch.uint8)
        version_B = np.zeros(len(samples), np.int64) if versions is None else np.asarray(versions)
        entry_B = np.asarray(samples) * self._crops + version_B // self._mirrors
        for cells_HW, entry, mirrored in zip(masks_B1HW[:, 0], entry_B.tolist(), version_B % self._mirrors, strict=True):
            first, last = self._file.cut("offsets", entry, entry + 2).tolist()
            if first < last:
                cells = inflate(self._file.cut("cells", first, last).tobytes(), shape)
                if cells is None:
                    raise damage_error(self.path, f"is damaged at sample {entry // self._crops}")
                cells_HW.copy_(cells.flip(1) if mirrored else cells)
        return masks_B1HW


open_masks = lru_cache(maxsize=2)(Masks)  # all stages of a run open the same masks


def inflate(deflated: bytes, shape: Sequence[int]) -> Tensor | None:
    """Decompress cells to uint8 (h, w). Return None if zlib's checksum or the number of cells shows damage."""
    try:
        return torch.frombuffer(bytearray(zlib.decompress(deflated)), dtype=torch.uint8).view(shape)
    except (zlib.error, RuntimeError, ValueError):
        return None


def mask_path(folder: Path, view: str) -> Path:
    return folder / "masks" / f"{view}.safetensors"


def mask_hash(latents: cache.LatentCache) -> str:
    """Return the sha256 of a view's masks, or "" if the view has no masks. Raises UserError if the file is damaged."""
    path = mask_path(latents.path.parent.parent, latents.name)
    return read_header(path, MasksFile.FORMAT)[1].get("sha256", "") if path.exists() else ""


def mask_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "masks").glob("*.safetensors") if not path.name.startswith("."))
