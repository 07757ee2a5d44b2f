"""The text encoder: transformers' CLIPTextModel and CLIPTokenizer, with clip skip, for captions of any length.

A CLIP encoder reads one window at a time. Including the begin and end tokens, a window is as long as the position table: 77
tokens for SD1.5, 248 for Long-CLIP. Longer captions are read in chunks. Each chunk has a window and begin and end tokens.
The UNet attends to the text embeddings of all chunks in a row. `stretch` lengthens the window.

    chunks = n        every caption has n windows; those that it does not fill are empty, as in sd-scripts
    chunks = "auto"   a caption has as many windows as it fills, up to `AUTO_CHUNKS`, as in ComfyUI and A1111

With "auto", the captions of a batch may have different numbers of windows. `pad` repeats all windows of a caption until they
are as many as those of the others. Every key of the UNet's attention then occurs equally often, so softmax weights are shared
among equal keys and the output is that of the caption alone, except for rounding. With empty windows instead, the output would
depend on the other captions of the batch. ComfyUI repeats in the same way if a prompt and its negative prompt differ in length.
A1111 runs the two separately.

`cut` is the rule for the end of a window that a caption fills (`_end`).

Shapes: B captions, W tokens in a window, L tokens of all windows of a caption, D the width of the text embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsd.config.schema import Chunks, Cut
from fastsd.errors import UserError

# The largest number of windows with chunks = "auto". Batches then have 1, 2, 3 or 6 windows, and each of these lengths is
# captured as a CUDA graph. With 4, a batch would have up to 12, and the UNet of SD1.5 9 % more operations instead of 4 %.
AUTO_CHUNKS = 3
COMMA_TOKENS = 20  # the number of tokens before the end of a window in which cut = "commas" looks for a comma, as in A1111
LONG_WORD = 8  # cut = "words" cuts a word of at least this many tokens, as ComfyUI


def _causal_attention(
    module: Any, q_BHWD: Tensor, k_BHWD: Tensor, v_BHWD: Tensor, mask: object, scaling: float, **options: object
) -> tuple[Tensor, None]:
    """Attend to a token and those before it, with the same operations in every call. For transformers.

    Some versions of transformers build a mask, which selects another kernel, only while a CUDA graph is captured. On a GPU,
    PyTorch's fused kernels sum the gradient of queries in an order that changes from run to run if there are few images or
    many tokens. So the mask is ignored, and a GPU computes plain matmuls and a softmax, in fp32 also for bf16. At 77 tokens
    that is a small share of the text encoder's time.

    Returns:
        (B, W, H, D) and None for the attention weights, as transformers expects.
    """
    with sdpa_kernel(SDPBackend.MATH) if q_BHWD.is_cuda else nullcontext():
        o_BHWD = F.scaled_dot_product_attention(q_BHWD, k_BHWD, v_BHWD, is_causal=True, scale=scaling)
    return o_BHWD.transpose(1, 2).contiguous(), None


class TextEncoder:
    """A CLIP text model, its tokenizer, and the choice of the layer that the UNet reads.

    Args:
        module: transformers' CLIPTextModel.
        tokenizer: transformers' CLIPTokenizer.
        clip_skip: the layer to read: 0 = the last one; n = the n-th one before it, followed by the final layer norm.
        tokenizer_folder: the folder of the tokenizer's files, which are copied unchanged into an exported model.
        chunks: number of windows of every caption, or "auto".
        cut: where a window ends.

    Attributes:
        window, width: W and D.

    Raises:
        UserError: `clip_skip` leaves no layer.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        clip_skip: int,
        tokenizer_folder: Path,
        chunks: Chunks = 1,
        cut: Cut = "tokens",
    ) -> None:
        layers = module.config.num_hidden_layers
        if clip_skip >= layers:
            raise UserError(
                "clip-skip", f"clip_skip is {clip_skip}, but the text encoder has {layers} layers; use 0 to {layers - 1}"
            )
        self.module, self.tokenizer, self.clip_skip = module.eval(), tokenizer, clip_skip
        from transformers import AttentionInterface

        AttentionInterface.register("fastsd_causal", _causal_attention)
        module.set_attn_implementation("fastsd_causal")
        self.tokenizer_folder, self.chunks, self.cut = tokenizer_folder, chunks, cut
        self.window: int = module.config.max_position_embeddings
        self.width: int = module.config.hidden_size

    @property
    def lengths(self) -> list[int]:
        return context_lengths(self.window, self.chunks)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Tokenize captions to int64 token ids (B, L) on the CPU. L is one of `lengths`."""
        return assemble(self.tokenizer, ids_of(self.tokenizer, captions), self.window, self.chunks, self.cut)

    def encode(self, token_ids_BL: Tensor) -> Tensor:
        """Encode token ids (B, L) to text embeddings (B, L, D). Differentiable."""
        ids = token_ids_BL.reshape(-1, self.window)
        if self.clip_skip == 0:
            text_embeds = self.module(ids).last_hidden_state
        else:
            hidden_states = self.module(ids, output_hidden_states=True).hidden_states
            text_embeds = self.final_layer_norm(hidden_states[-(self.clip_skip + 1)])
        return text_embeds.reshape(len(token_ids_BL), -1, self.width)

    def used_parameters(self) -> set[str]:
        """Return the names of the module's parameters that `encode` depends on."""
        names = {name for name, _ in self.module.named_parameters()}
        layers = self.module.config.num_hidden_layers
        skipped = [f"layers.{i}." for i in range(layers - self.clip_skip, layers)]
        return {name for name in names if not any(layer in name for layer in skipped)}

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def final_layer_norm(self) -> torch.nn.Module:
        # Before version 5, transformers nests the layers one level deeper.
        return getattr(self.module, "text_model", self.module).final_layer_norm


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return all token ids of each text, without the begin and end tokens."""
    # Never truncate or pad here, because these options change the tokenizer's state, which other threads share.
    return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []


def assemble(tokenizer: Any, ids_B: Sequence[Sequence[int]], window: int, chunks: Chunks = 1, cut: Cut = "tokens") -> Tensor:
    """Pack ids from `ids_of` into int64 (B, L). A window holds a begin token, ids, an end token and padding."""
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    capacity = window - 2
    rows = []
    for ids in ids_B:
        windows = divide(tokenizer, ids, capacity, cut)[: chunk_limit(chunks)]
        if chunks != "auto":
            windows += [[]] * (chunks - len(windows))
        rows.append([id for row in windows for id in (begin, *row, end, *[padding] * (capacity - len(row)))])
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad(tensors) if tensors else torch.empty(0, window * (1 if chunks == "auto" else chunks), dtype=torch.int64)


def chunk_limit(chunks: Chunks) -> int:
    """Return the largest number of different windows that a caption may have."""
    return AUTO_CHUNKS if chunks == "auto" else chunks


def context_lengths(window: int, chunks: Chunks) -> list[int]:
    """Return all L that a batch may have, smallest first."""
    if chunks != "auto":
        return [chunks * window]
    largest = math.lcm(*range(1, AUTO_CHUNKS + 1))
    return [count * window for count in range(1, largest + 1) if largest % count == 0]


def pad(rows: Sequence[Tensor], length: int = 0) -> Tensor:
    """Stack token ids or text embeddings (L_i, ...) to (B, L, ...). A row shorter than L is repeated.

    Args:
        length: L, a multiple of all L_i; 0 = their least common multiple.
    """
    length = length or math.lcm(*map(len, rows))
    return torch.stack([row.repeat(length // len(row), *[1] * (row.ndim - 1)) for row in rows])


def divide(tokenizer: Any, ids: Sequence[int], capacity: int, cut: Cut) -> list[Sequence[int]]:
    """Divide the ids of a caption into windows of at most `capacity`. Without ids there is one empty window."""
    windows, start = list[Sequence[int]](), 0
    while start < len(ids) or not windows:
        end = _end(tokenizer, ids, start, start + capacity, cut)
        windows.append(ids[start:end])
        start = end
    return windows


def _end(tokenizer: Any, ids: Sequence[int], start: int, full: int, cut: Cut) -> int:
    """Return the index at which the window from `start` ends, at most `full`.

    "tokens"   the window is full.
    "commas"   it ends after the last comma among its last `COMMA_TOKENS` tokens, unless the next token is a comma. A1111 does
               this by default (its setting `comma_padding_backtrack`).
    "words"    a word of fewer than `LONG_WORD` tokens that does not fit begins the next window. Versions of ComfyUI that
               tokenize word by word do this; for them a word ends at a space, here also at punctuation, as for the tokenizer.
    """
    if cut == "tokens" or full >= len(ids):
        return full
    comma, ends = _borders(tokenizer)
    if cut == "commas":
        recent = range(full - 1, max(start, full - COMMA_TOKENS) - 1, -1)
        return full if ids[full] == comma else next((i + 1 for i in recent if ids[i] == comma), full)
    word_start = next((i for i in range(full, start, -1) if ids[i - 1] in ends), start)
    word_end = next((i + 1 for i in range(full, len(ids)) if ids[i] in ends), len(ids))
    return word_start if word_start > start and word_end - word_start < LONG_WORD else full


@lru_cache(maxsize=2)
def _borders(tokenizer: Any) -> tuple[int | None, frozenset[int]]:
    """Return the id of a comma, and the ids that end a word."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    return vocabulary.get(",</w>"), frozenset(id for text, id in vocabulary.items() if text.endswith("</w>") or id in special)


@torch.no_grad()
def stretch(module: Any, tokens: int = 248, keep: int = 20) -> None:
    """Lengthen the window of a CLIP text model to `tokens`. Keep the first `keep` positions and stretch the others.

    Position j >= keep reads the old table at keep + (j - keep) (W - keep) / (tokens - keep). Between two entries, the table is
    interpolated linearly. Beyond the last entry, it is extrapolated along the line through the last two. From 77 to 248 tokens,
    the other positions are stretched by a factor of 4. The text embeddings of long captions are of little use before training.

    Raises:
        ValueError: `tokens` is not larger than the number of positions.

    Source: Zhang et al. 2024, "Long-CLIP: unlocking the long-text capability of CLIP", section 3.2, knowledge-preserved
    stretching; its released code for the extrapolation beyond the last entry.
    """
    embeddings = getattr(module, "text_model", module).embeddings
    old = embeddings.position_embedding.weight
    count = len(old)
    if tokens <= count:
        raise ValueError(f"tokens is {tokens}, but the encoder already has {count} positions; give a larger number")
    position = torch.arange(tokens, dtype=torch.float64)
    old_position = torch.where(position < keep, position, keep + (position - keep) * (count - keep) / (tokens - keep))
    left = old_position.long().clamp(max=count - 2)
    fraction = (old_position - left)[:, None].to(old.device)
    new = old[left].double() * (1 - fraction) + old[left + 1].double() * fraction
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(new.to(old.dtype), freeze=False)
    embeddings.register_buffer("position_ids", torch.arange(tokens, device=old.device)[None], persistent=False)
    module.config.max_position_embeddings = tokens


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the sha256 (64 hex digits) of the state that determines a tokenizer's ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # before version 5, transformers implements CLIP's tokenizer in Python
        state = {"vocab": tokenizer.get_vocab(), "merges": list(tokenizer.bpe_ranks)}
    else:
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # other callers may have set these
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
