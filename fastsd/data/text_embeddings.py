"""The text encoder's states of every caption of a view, encoded once: an option for training with that encoder frozen.

    DIR/shards/S.safetensors      one tensor "states" (n, L, D), n <= 4096 and no more than 512 MiB
    DIR/states/V-K.safetensors    frozen: where the states of every caption of view V lie; training maps this file

K stands for the encoder, `cache.dtype` and `cache.precision`.  Variant j of sample i is entry offsets[i] + j of the index; the
last entry, offsets[-1], is "", for captions that drop out.  offsets are int64 (samples + 1).

They are made by `fastsd/data/building/embed_captions.py`.

Shapes: B captions, L tokens, D context width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import CacheTable
from fastsd.data import cache
from fastsd.data.cache import DTYPES, LatentCache, StatesIndex
from fastsd.data.rows import STATES, Rows, damaged
from fastsd.model.text_encoder import TextEncoder, tokenizer_hash


class States(Rows):
    """Random access to the states of a cache's captions. Threads may share it.

    Args:
        table: `dtype` and `precision` of the states.
        latents: whose captions they are.
        text: whose states they must be; in fp32.

    Raises:
        UserError: they are missing, damaged, or of another state of the view.
    """

    def __init__(self, table: CacheTable, latents: LatentCache, text: TextEncoder) -> None:
        about = shard_metadata(table, text)
        index = open_index(latents, space_name(table, about))
        super().__init__(Path(table.dir), index, DTYPES[table.dtype], about)

    def get(self, samples: cache.Positions, variants: cache.Positions) -> Tensor:
        """(B, L, D) in the stored dtype, on the CPU (pinned when there is a GPU).

        Args:
            samples: B indices as of the cache.
            variants: which caption of each, -1 for "".

        Raises:
            UserError: a shard is missing, or its bytes are not those that were written.
        """
        variant_B = np.asarray(variants)
        entry_B = self._index.take("offsets", np.asarray(samples)) + variant_B
        return self._read(np.where(variant_B < 0, self._index.arrays["offsets"][-1], entry_B))


def shard_metadata(table: CacheTable, text: TextEncoder) -> dict[str, str]:
    """What the shards say of whose states they hold."""
    return {"fastsd": STATES, "encoder": encoder_hash(text), "precision": table.precision}


def encoder_hash(text: TextEncoder) -> str:
    """sha256 of all that decides the states of a caption: weights as fp32, shape, clip skip, tokenizer. 64 hex digits."""
    config, used = text.module.config, text.used_parameters()
    shape = [config.num_hidden_layers, config.num_attention_heads, config.hidden_act, config.layer_norm_eps, text.window]
    shape += [text.chunks] if text.chunks > 1 else []
    sha = hashlib.sha256(json.dumps([shape, text.clip_skip, tokenizer_hash(text.tokenizer)]).encode())
    for name, tensor in sorted(text.module.named_parameters()):
        if name in used:
            assert tensor.dtype == torch.float32, "the hash is that of the exact weights"
            # Not every version of transformers has the prefix.
            sha.update(f"{name.removeprefix('text_model.')} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def space_name(table: CacheTable, about: dict[str, str]) -> str:
    return cache.digest(about, table.dtype)[:16]


def index_path(latents: LatentCache, space: str) -> Path:
    return latents.path.parent.parent / "states" / f"{latents.name}-{space}.safetensors"


def open_index(latents: LatentCache, space: str) -> StatesIndex:
    path = index_path(latents, space)
    index = StatesIndex(path)
    if (index.metadata["view"], index.metadata["space"]) != (latents.sha256, space):
        raise damaged(path, "belongs to captions as they were before")
    return index
