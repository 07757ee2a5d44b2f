"""Token ids of every caption of a view, made once: DIR/tokens/VIEW-TOKENIZER.safetensors, an ordinary safetensors file.

Its tensors are offsets (int64, n + 1) and ids (16 bits, or 32 for a vocabulary that needs them; unsigned, whatever the
header calls them).  Sample i has ids[offsets[i] : offsets[i + 1]]: the ids of each of its captions, uncut and without
those that begin and end a sequence, each followed by END, the largest number there is.  The file belongs to one view by
its sha256 and to one tokenizer by `tokenizer_hash`.  `fastsd/data/building/tokenize_captions.py` writes it.

Shapes: n samples, L tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastsd.data.cache import LatentCache
from fastsd.data.rows import Frozen, damaged, read_header
from fastsd.errors import UserError
from fastsd.model.text_encoder import assemble, tokenizer_hash

TOKENS_FORMAT = "tokens-1"
HEADER_BYTES = 4096  # bytes kept for the header, whose size is known before what it says is


class Tokens:
    """The token ids of a cache's captions, mapped. Threads may share it.

    Args:
        cache: whose captions they are.
        tokenizer: the one they must come from.
        window: tokens the text encoder takes at once, those that begin and end a sequence among them.
        chunks: windows a caption may fill.

    Raises:
        UserError: they are missing, damaged, or of another state of the view.
    """

    def __init__(self, cache: LatentCache, tokenizer: Any, window: int, chunks: int = 1) -> None:
        key = tokenizer_hash(tokenizer)
        self.path, self.window, self.chunks, self._tokenizer = tokens_path(cache, key), window, chunks, tokenizer
        self._file = Frozen(self.path, TOKENS_FORMAT, {"offsets": np.int64, "ids": id_dtype(tokenizer)})
        self._metadata, self._ids = self._file.metadata, self._file.arrays["ids"]
        if (self._metadata.get("view"), self._metadata.get("tokenizer")) != (cache.sha256, key):
            raise damaged(self.path, "belongs to captions as they were before")
        offsets = self._file.arrays["offsets"]
        if len(offsets) != len(cache) + 1 or offsets[-1] != len(self._ids):
            raise damaged(self.path, "has parts that do not fit together")
        if not self.is_sound():
            raise damaged(self.path, "does not match its sha256")
        self._end = np.iinfo(self._ids.dtype).max

    def row(self, sample: int, variant: int) -> Tensor:
        """Token ids of a caption as the text encoder takes them: int64 (L,). Raises UserError where they are damaged."""
        first, last = self._file.cut("offsets", sample, sample + 2).tolist()
        ids = self._file.cut("ids", first, last)
        ends = [-1, *np.flatnonzero(ids == self._end).tolist()]
        own = ids[ends[variant] + 1 : ends[variant + 1]] if variant + 1 < len(ends) else None
        if own is None or len(ids) != last - first or own.max(initial=0) >= len(self._tokenizer):
            raise damaged(self.path, f"is damaged at sample {sample}")
        return assemble(self._tokenizer, [own.tolist()], self.window, self.chunks)[0]

    def over_length(self) -> int:
        """Captions that the text encoder will not see whole."""
        over, last = 0, -1
        for first in range(0, len(self._ids), 1 << 22):
            ends = first + np.flatnonzero(self._ids[first : first + (1 << 22)] == self._end)
            over += int((np.diff(ends, prepend=last) - 1 > self.chunks * (self.window - 2)).sum())
            last = ends[-1] if len(ends) else last
        return over

    def is_sound(self) -> bool:
        """Whether every byte is the one that was written; reads the file once."""
        with open(self.path, "rb") as file:
            return content_hash(file) == self._metadata.get("sha256")


def unsound(path: Path) -> str:
    """What is wrong with a file of token ids, whichever tokenizer's; "" if it is as it was written. Reads it once."""
    try:
        metadata = read_header(path, TOKENS_FORMAT)[1]
        with open(path, "rb") as file:
            return "" if content_hash(file) == metadata.get("sha256") else "does not match its sha256"
    except (UserError, OSError) as error:
        return str(error).removeprefix(f"{path} ").partition(";")[0]


def view_of(path: Path) -> str:
    """sha256 of the view a file of token ids belongs to; "" where it cannot be read."""
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


def content_hash(file: Any) -> str:
    file.seek(HEADER_BYTES)
    return hashlib.file_digest(file, "sha256").hexdigest()
