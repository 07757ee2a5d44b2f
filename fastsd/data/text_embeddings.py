"""Text embeddings of every caption of a view, encoded once: an option for training with a frozen text encoder.

    DIR/shards/S.safetensors      one tensor "states" (n, L, D), n <= 4096 and no more than 512 MiB; with chunks = "auto",
                                  captions with different numbers of windows are in different shards
    DIR/states/V-K.safetensors    the places of the embeddings of every caption of view V; frozen, training maps this file

K identifies the text encoder, `cache.dtype` and `cache.precision`.  Variant j of sample i is entry offsets[i] + j of the index.
The last entry, offsets[-1], is "", which replaces dropped captions.  offsets are int64 (samples + 1).

`fastsd/data/building/embed_captions.py` writes these files.

Shapes: B captions, L tokens, D width of a text embedding.
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
from fastsd.data.cache import DTYPES, LatentCache, TextEmbeddingsIndex
from fastsd.data.rows import OUTDATED, STATES, Rows, can_pin, damage_error
from fastsd.model.text_encoder import TextEncoder, pad, tokenizer_hash


class TextEmbeddings(Rows):
    """Random access to the text embeddings of a cache's captions. Thread-safe.

    Args:
        table: has the folder of the cache, and `dtype` and `precision` of the text embeddings.
        latents: the cache with the captions.
        text: the text encoder, in fp32, that must have produced the text embeddings.

    Raises:
        UserError: the text embeddings are missing, damaged, or belong to another state of the view.
    """

    def __init__(self, table: CacheTable, latents: LatentCache, text: TextEncoder) -> None:
        metadata = shard_metadata(table, text)
        index = open_index(latents, space_name(table, metadata))
        super().__init__(Path(table.dir), index, DTYPES[table.dtype], metadata)

    def get(self, samples: cache.Positions, variants: cache.Positions, length: int = 0) -> Tensor:
        """Read text embeddings in the stored dtype to the CPU, (B, L, D), pinned if there is a GPU.

        Args:
            samples: B cache indices of samples.
            variants: index of the caption of each sample; -1 = "".
            length: L, see `pad`.

        Raises:
            UserError: a shard is missing or damaged.
        """
        variant_B = np.asarray(variants)
        entry_B = self._index.take("offsets", np.asarray(samples)) + variant_B
        entry_B = np.where(variant_B < 0, self._index.arrays["offsets"][-1], entry_B)
        length_B = np.array([self._index.shards[shard][1][0] for shard in self._index.take("shard", entry_B).tolist()])
        if (length_B == (length or length_B[0])).all():
            return self._read(entry_B)
        rows: dict[int, Tensor] = {}
        for row_length in np.unique(length_B):
            slots = np.flatnonzero(length_B == row_length)
            rows.update(zip(slots.tolist(), self._read(entry_B[slots]), strict=True))
        text_embeds_BLD = pad([rows[slot] for slot in range(len(entry_B))], length)
        return text_embeds_BLD.pin_memory() if can_pin() else text_embeds_BLD


def shard_metadata(table: CacheTable, text: TextEncoder) -> dict[str, str]:
    """Return the metadata that identifies the origin of the text embeddings in a shard."""
    return {"fastsd": STATES, "encoder": encoder_hash(text), "precision": table.precision}


def encoder_hash(text: TextEncoder) -> str:
    """Return the sha256 of all that determines text embeddings: fp32 weights, architecture, clip skip, tokenizer."""
    config, used_names = text.module.config, text.used_parameters()
    architecture = [config.num_hidden_layers, config.num_attention_heads, config.hidden_act, config.layer_norm_eps, text.window]
    architecture += [text.chunks] if text.chunks != 1 else []
    architecture += [text.cut] if text.cut != "tokens" else []
    sha = hashlib.sha256(json.dumps([architecture, text.clip_skip, tokenizer_hash(text.tokenizer)]).encode())
    for name, tensor in sorted(text.module.named_parameters()):
        if name in used_names:
            assert tensor.dtype == torch.float32, "the hash needs the exact fp32 weights"
            # Only some versions of transformers have the prefix.
            sha.update(f"{name.removeprefix('text_model.')} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()


def space_name(table: CacheTable, metadata: dict[str, str]) -> str:
    return cache.digest(metadata, table.dtype)[:16]


def index_path(latents: LatentCache, space: str) -> Path:
    return latents.path.parent.parent / "states" / f"{latents.name}-{space}.safetensors"


def open_index(latents: LatentCache, space: str) -> TextEmbeddingsIndex:
    path = index_path(latents, space)
    index = TextEmbeddingsIndex(path)
    if (index.metadata["view"], index.metadata["space"]) != (latents.sha256, space):
        raise damage_error(path, OUTDATED)
    return index
