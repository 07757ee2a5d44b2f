"""The text encoder. transformers' CLIPTextModel and CLIPTokenizer, with clip skip, for captions of any length.

What a CLIP encoder reads at once is its window, the length of its position table: 77 tokens for SD1.5's, begin and end among
them, 248 for Long-CLIP's. Longer captions are read in chunks, each a window of its own with its begin and end, and the UNet
attends to the states of all of them in a row, as ComfyUI and A1111 do. `stretch` makes a longer window of a short one.

Shapes: B captions, W tokens of a window, L = chunks W tokens, D context width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import UserError


class TextEncoder:
    """A CLIP text model, its tokenizer, and which layer's states the UNet reads.

    Args:
        module: transformers' CLIPTextModel.
        tokenizer: transformers' CLIPTokenizer.
        clip_skip: 0 = the last layer; n = the n-th before it, followed by the final layer norm.
        tokenizer_folder: its files, which are copied beside an exported model as they are.
        chunks: windows that a caption may fill.

    Attributes:
        window, length, width: W, L and D.

    Raises:
        UserError: clip_skip leaves no layer.
    """

    def __init__(self, module: Any, tokenizer: Any, clip_skip: int, tokenizer_folder: Path, chunks: int = 1) -> None:
        layers = module.config.num_hidden_layers
        if clip_skip >= layers:
            raise UserError(
                f"model.clip_skip is {clip_skip} and the text encoder has {layers} layers; choose 0 to {layers - 1}"
            )
        self.module, self.tokenizer, self.clip_skip = module.eval(), tokenizer, clip_skip
        self.tokenizer_folder, self.chunks = tokenizer_folder, chunks
        self.window: int = module.config.max_position_embeddings
        self.width: int = module.config.hidden_size

    @property
    def length(self) -> int:
        return self.chunks * self.window

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> token ids int64 (B, L) on the CPU, cut or padded to what the encoder takes."""
        return assemble(self.tokenizer, ids_of(self.tokenizer, captions), self.window, self.chunks)

    def encode(self, token_ids_BL: Tensor) -> Tensor:
        """Token ids -> context states (B, L, D), differentiable."""
        ids = token_ids_BL.reshape(-1, self.window)
        if self.clip_skip == 0:
            states = self.module(ids).last_hidden_state
        else:
            every = self.module(ids, output_hidden_states=True).hidden_states
            states = self.final_layer_norm(every[-(self.clip_skip + 1)])
        return states.reshape(len(token_ids_BL), -1, self.width)

    def used_parameters(self) -> set[str]:
        """Names of the module's parameters that `encode` depends on."""
        names = {name for name, _ in self.module.named_parameters()}
        depth = self.module.config.num_hidden_layers
        skipped = [f"layers.{i}." for i in range(depth - self.clip_skip, depth)]
        return {name for name in names if not any(layer in name for layer in skipped)}

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def final_layer_norm(self) -> torch.nn.Module:
        # transformers before 5 keeps the layers one level down.
        return getattr(self.module, "text_model", self.module).final_layer_norm


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, uncut, without those that begin and end a sequence."""
    # Always the same way: told to cut or pad in one call, a tokenizer would change under another thread's.
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []


def assemble(tokenizer: Any, ids_B: Sequence[Sequence[int]], window: int, chunks: int = 1) -> Tensor:
    """What `ids_of` gives -> int64 (B, chunks W): each window begins, holds as many ids as fit, ends, and is padded."""
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    room = window - 2
    rows = [
        [begin, *ids[first : first + room], end, *[padding] * (room - max(len(ids) - first, 0))]
        for ids in ids_B
        for first in range(0, chunks * room, room)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, chunks * window)


@torch.no_grad()
def stretch(module: Any, tokens: int = 248, keep: int = 20) -> None:
    """Give a CLIP text model a longer window: its first `keep` positions stay, the others are stretched over the rest.

    Position j >= keep reads the old table at keep + (j - keep) (W - keep) / (tokens - keep), between two entries linearly, and
    beyond the last one on the line through the last two. From 77 to 248 that is a factor of 4. The states of long captions mean
    little before some training.

    Raises:
        ValueError: no more tokens than there are.

    Source: Zhang et al. 2024, "Long-CLIP: unlocking the long-text capability of CLIP", section 3.2, knowledge-preserved
    stretching, and its released code for what lies beyond the last entry.
    """
    embeddings = getattr(module, "text_model", module).embeddings
    old = embeddings.position_embedding.weight
    count = len(old)
    if tokens <= count:
        raise ValueError(f"tokens is {tokens} and the encoder has {count} positions; give more")
    place = torch.arange(tokens, dtype=torch.float64)
    place = torch.where(place < keep, place, keep + (place - keep) * (count - keep) / (tokens - keep))
    low = place.long().clamp(max=count - 2)
    part = (place - low)[:, None].to(old.device)
    new = old[low].double() * (1 - part) + old[low + 1].double() * part
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(new.to(old.dtype), freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(tokens, device=old.device)[None], persistent=False)
    module.config.max_position_embeddings = tokens


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides a tokenizer's ids: 64 hex digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # transformers before 5 has CLIP's in Python
        said = {"vocab": tokenizer.get_vocab(), "merges": list(tokenizer.bpe_ranks)}
    else:
        said = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # left from an earlier call
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
