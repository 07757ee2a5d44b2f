"""Token ids of every caption of a view, built once: DIR/tokens/VIEW-TOKENIZER.safetensors, an ordinary safetensors file.

The file contains the tensors offsets (int64, n + 1) and ids.  The ids have 16 bits, or 32 if the vocabulary needs them.  They
are unsigned, although the header declares them as signed.  Sample i has ids[offsets[i] : offsets[i + 1]].  These are the ids of
all its captions, untruncated and without start and end tokens.  After each caption follows END, the largest number of the
dtype.  The metadata has the sha256 of the view and the `tokenizer_hash`.

`fastsd/data/building/tokenize_captions.py` writes these files.

Shapes: n samples, L tokens.
"""

from __future__ import annotations

import hashlib
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastsd.config.schema import Chunks, Cut
from fastsd.data.cache import LatentCache
from fastsd.data.rows import OUTDATED, Frozen, damage_error, read_header
from fastsd.errors import UserError
from fastsd.model.text_encoder import COMMA_TOKENS, assemble, chunk_limit, divide, tokenizer_hash

TOKENS_FORMAT = "tokens-1"
HEADER_BYTES = 4096  # size of the header, which is written last because it contains the sha256 of the data


class Tokens:
    """The memory-mapped token ids of a cache's captions. Thread-safe.

    Args:
        cache: the cache with the captions.
        tokenizer: the tokenizer that must have produced the token ids.
        window: number of tokens that the text encoder takes at once, including start and end token.
        chunks, cut: how a caption is divided into windows, see `ModelTable`.

    Raises:
        UserError: the token ids are missing, damaged, or belong to another state of the view.
    """

    def __init__(self, cache: LatentCache, tokenizer: Any, window: int, chunks: Chunks = 1, cut: Cut = "tokens") -> None:
        key = tokenizer_hash(tokenizer)
        self.path, self._tokenizer = tokens_path(cache, key), tokenizer
        self.window, self.chunks, self.cut = window, chunks, cut
        self._file = Frozen(self.path, TOKENS_FORMAT, {"offsets": np.int64, "ids": id_dtype(tokenizer)})
        self._metadata, self._ids = self._file.metadata, self._file.arrays["ids"]
        if (self._metadata.get("view"), self._metadata.get("tokenizer")) != (cache.sha256, key):
            raise damage_error(self.path, OUTDATED)
        offsets = self._file.arrays["offsets"]
        if len(offsets) != len(cache) + 1 or offsets[-1] != len(self._ids):
            raise damage_error(self.path, "has tensors of inconsistent lengths")
        if not self.is_sound():
            raise damage_error(self.path, "does not match its sha256")
        self._end = np.iinfo(self._ids.dtype).max

    def row(self, sample: int, variant: int) -> Tensor:
        """Return the token ids of a caption, ready for the text encoder: int64 (L,). Raises UserError on damage."""
        start, stop = self._file.cut("offsets", sample, sample + 2).tolist()
        ids = self._file.cut("ids", start, stop)
        ends = [-1, *np.flatnonzero(ids == self._end).tolist()]
        caption_ids = ids[ends[variant] + 1 : ends[variant + 1]] if variant + 1 < len(ends) else None
        if caption_ids is None or len(ids) != stop - start or caption_ids.max(initial=0) >= len(self._tokenizer):
            raise damage_error(self.path, f"is damaged at sample {sample}")
        return assemble(self._tokenizer, [caption_ids.tolist()], self.window, self.chunks, self.cut)[0]

    def truncation(self) -> str:
        """Return a sentence on the captions that are truncated for the text encoder, or "" if there are none."""
        truncated, last_end = 0, -1
        capacity, limit = self.window - 2, chunk_limit(self.chunks)
        for first in range(0, len(self._ids), 1 << 22):
            ends = first + np.flatnonzero(self._ids[first : first + (1 << 22)] == self._end)
            starts = np.append(last_end, ends[:-1]) + 1 if len(ends) else ends
            too_long = ends - starts > limit * capacity
            truncated += int(too_long.sum())
            if self.cut != "tokens":  # then windows may end early, by less than COMMA_TOKENS
                undecided = ~too_long & (ends - starts > limit * max(capacity - COMMA_TOKENS, 1))
                for start, end in zip(starts[undecided].tolist(), ends[undecided].tolist(), strict=True):
                    ids = self._ids[start:end].tolist()
                    truncated += len(divide(self._tokenizer, ids, capacity, self.cut)) > limit
            last_end = ends[-1] if len(ends) else last_end
        room = f"{capacity} tokens" if limit == 1 else f"{limit} chunks of {capacity} tokens"
        return f"{truncated} captions do not fit into {room} and are truncated; see model.chunks" if truncated else ""

    def is_sound(self) -> bool:
        """Return True if all bytes match their sha256. This reads the whole file."""
        with open(self.path, "rb") as file:
            return content_hash(file) == self._metadata.get("sha256")


def find_damage(path: Path) -> str:
    """Describe the damage of a file of token ids, or return "" if it is intact. This reads the whole file."""
    try:
        metadata = read_header(path, TOKENS_FORMAT)[1]
        with open(path, "rb") as file:
            return "" if content_hash(file) == metadata.get("sha256") else "does not match its sha256"
    except (UserError, OSError) as error:
        return str(error).removeprefix(f"{path} ").partition(";")[0]


def view_hash(path: Path) -> str:
    """Return the sha256 of the view to which a file of token ids belongs, or "" if the file cannot be read."""
    try:
        return read_header(path, TOKENS_FORMAT)[1].get("view", "")
    except UserError:
        return ""


def token_files(folder: Path) -> list[Path]:
    return sorted((folder / "tokens").glob("*.safetensors"))


def tokens_path(cache: LatentCache, key: str) -> Path:
    return cache.path.parent.parent / "tokens" / f"{cache.path.stem}-{key[:16]}.safetensors"


def id_dtype(tokenizer: Any) -> type[np.unsignedinteger]:
    return np.uint16 if len(tokenizer) < 1 << 16 else np.uint32


def content_hash(file: BufferedIOBase) -> str:
    file.seek(HEADER_BYTES)
    return hashlib.file_digest(file, "sha256").hexdigest()
