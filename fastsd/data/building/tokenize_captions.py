"""Tokenize a view's captions once. `fastsd/data/tokens.py` defines the file layout."""

from __future__ import annotations

import contextlib
import os
from itertools import chain
from typing import Any

import numpy as np
import torch

from fastsd.data.cache import LatentCache
from fastsd.data.tokens import HEADER_BYTES, TOKENS_FORMAT, Tokens, content_hash, id_dtype, tokens_path
from fastsd.errors import UserError
from fastsd.model.text_encoder import ids_of, tokenizer_hash
from fastsd.storage import TEMPORARY, flush_folder, safetensors_header

_CHUNK = 1024  # samples whose captions are tokenized together


def write_tokens(cache: LatentCache, tokenizer: Any) -> None:
    """Tokenize all captions of a cache, unless that has been done. Only one process at a time may call this.

    Args:
        tokenizer: transformers' CLIPTokenizer.

    Raises:
        OSError: the disk does not accept the file. No part of it is left behind.
    """
    with contextlib.suppress(UserError):
        Tokens(cache, tokenizer, 2)
        return

    key = tokenizer_hash(tokenizer)
    path = tokens_path(cache, key)
    temporary = path.with_name(TEMPORARY + path.name)
    path.parent.mkdir(exist_ok=True)
    try:
        with open(temporary, "w+b") as file:
            id_count = _write_content(file, cache, tokenizer)
            signed_dtype = {2: torch.int16, 4: torch.int32}[id_dtype(tokenizer)().itemsize]
            metadata = {"fastsd": TOKENS_FORMAT, "view": cache.sha256, "tokenizer": key, "sha256": content_hash(file)}
            shapes = {"offsets": (torch.int64, (len(cache) + 1,)), "ids": (signed_dtype, (id_count,))}
            header = safetensors_header(shapes, metadata, align=HEADER_BYTES)
            assert len(header) == HEADER_BYTES
            file.seek(0)
            file.write(header)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def _write_content(file: Any, cache: LatentCache, tokenizer: Any) -> int:
    """Write both tensors chunk by chunk. Return the number of token ids, including END."""
    dtype, samples, done = id_dtype(tokenizer), len(cache), 0
    end, ids_start = np.iinfo(dtype).max, HEADER_BYTES + 8 * (samples + 1)
    file.seek(HEADER_BYTES)
    file.write(bytes(8))
    for first in range(0, samples, _CHUNK):
        variants = cache.variants(range(first, min(first + _CHUNK, samples)))
        rows = ids_of(tokenizer, list(chain.from_iterable(variants)))
        ids = np.fromiter(chain.from_iterable((*row, end) for row in rows), dtype)
        row_ends = np.cumsum([len(row) + 1 for row in rows], dtype=np.int64)
        sample_ends = row_ends[np.cumsum([len(texts) for texts in variants]) - 1]
        file.seek(HEADER_BYTES + 8 * (first + 1))
        file.write(done + sample_ends)
        file.seek(ids_start + done * ids.itemsize)
        file.write(ids)
        done += len(ids)
    return done
