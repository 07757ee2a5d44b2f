"""Floor 1: the text encoder. transformers' CLIPTextModel and CLIPTokenizer, with clip skip.

Shapes: B captions, L tokens (the position table's length, 77 for SD1.5), D context width.
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

    Raises:
        UserError: clip_skip leaves no layer.
    """

    def __init__(self, module: Any, tokenizer: Any, clip_skip: int, tokenizer_folder: Path) -> None:
        layers = module.config.num_hidden_layers
        if clip_skip >= layers:
            raise UserError(
                f"model.clip_skip is {clip_skip} and the text encoder has {layers} layers; choose 0 to {layers - 1}"
            )
        self.module, self.tokenizer, self.clip_skip = module.eval(), tokenizer, clip_skip
        self.tokenizer_folder = tokenizer_folder
        self.length: int = module.config.max_position_embeddings
        self.width: int = module.config.hidden_size

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> token ids int64 (B, L) on the CPU, cut or padded to the position table's length."""
        return assemble(self.tokenizer, ids_of(self.tokenizer, captions), self.length)

    def encode(self, token_ids_BL: Tensor) -> Tensor:
        """Token ids -> context states (B, L, D), differentiable."""
        if self.clip_skip == 0:
            return self.module(token_ids_BL).last_hidden_state
        states = self.module(token_ids_BL, output_hidden_states=True).hidden_states
        return self.final_layer_norm(states[-(self.clip_skip + 1)])

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


def assemble(tokenizer: Any, ids_B: Sequence[Sequence[int]], length: int) -> Tensor:
    """What `ids_of` gives -> int64 (B, length): begin, the ids as far as they fit, end, padding."""
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[begin, *ids[: length - 2], end, *[padding] * (length - 2 - len(ids))] for ids in ids_B]
    return torch.tensor(rows, dtype=torch.int64).view(-1, length)


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides a tokenizer's ids: 64 hex digits."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # transformers before 5 has CLIP's in Python
        said = {"vocab": tokenizer.get_vocab(), "merges": list(tokenizer.bpe_ranks)}
    else:
        said = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # left from an earlier call
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
