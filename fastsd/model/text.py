"""Floor 1: the text encoder. transformers' CLIPTextModel and CLIPTokenizer, with clip skip.

Shapes: B captions, L tokens (the position table's length, 77 for SD1.5), D context width.
"""

from __future__ import annotations

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
        return self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids

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
    def final_layer_norm(self) -> torch.nn.Module:
        # transformers before 5 keeps the layers one level down.
        return getattr(self.module, "text_model", self.module).final_layer_norm
