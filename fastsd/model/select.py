"""Which parameters an entry of `train` or `reinit` means, and new weights for those that start again.

    "unet", "text_encoder"      the whole part
    "lora"                      the adapters of both
    "unet.cross_attention"      a group, see GROUPS
    "unet.up_blocks.3", "unet.*.attn2.to_v.*", "text_encoder.layers.11"
                                names as diffusers and transformers have them: whole components, with * for any text

Read next: `fastsd/train/step.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
import xxhash
from torch import Tensor

from fastsd.config.stages import PARTS
from fastsd.errors import UserError
from fastsd.model.model import Model
from fastsd.model.weights import ADAPTER, diffusers_names, plain_name
from fastsd_kernels.noise import Purpose, uniform

# Regular expressions, found anywhere in a name.
GROUPS: dict[str, dict[str, str]] = {
    "unet": {
        "attention": r"\.attn[12]\.", "self_attention": r"\.attn1\.", "cross_attention": r"\.attn2\.",
        "feed_forward": r"\.ff\.", "resnets": r"\.resnets\.", "transformers": r"\.attentions\.",
        "norms": r"(^|\.)(conv_)?norm(\d|_out)?\.", "time": r"time_emb", "in": r"^down_blocks\.", "mid": r"^mid_block\.",
        "out": r"^up_blocks\.",
    },
    "text_encoder": {
        "attention": r"\.self_attn\.", "feed_forward": r"\.mlp\.", "norms": r"layer_?norm", "embeddings": r"^embeddings\.",
        "tokens": r"token_embedding", "positions": r"position_embedding",
    },
}  # fmt: skip


def matches(part: str, pattern: str, name: str) -> bool:
    """Whether a pattern (an entry without the part) means the parameter that diffusers or transformers call `name`."""
    if part == "text_encoder":  # as of transformers 5; before, layers lie two levels down
        name = name.removeprefix("text_model.").removeprefix("encoder.")
    if group := GROUPS[part].get(pattern):
        return re.search(group, name) is not None
    if "*" in pattern:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    return f".{pattern}." in f".{name}."


def selected(model: Model, entries: Iterable[str], where: str) -> dict[str, set[str]]:
    """The parameters that entries mean: part -> their names in its module. Parts without any are left out.

    Args:
        where: what holds the entries, for the sentence, for example "stage 'unet': train".

    Raises:
        UserError: an entry that means nothing, a layer that clip_skip leaves out, or a piece of a matrix that is one here.
    """
    found: dict[str, set[str]] = {part: set() for part in PARTS}
    for entry in entries:
        part, _, pattern = entry.partition(".")
        if entry == "lora":
            for each in PARTS:
                found[each] |= {name for name in model.trainable(each) if ADAPTER in name}
        else:
            found[part] |= _of_part(model, part, pattern, f"{where} names {entry!r}")
    return {part: names for part, names in found.items() if names}


def _of_part(model: Model, part: str, pattern: str, said: str) -> set[str]:
    usable = {name for name in model.trainable(part) if ADAPTER not in name}
    if not pattern:
        return usable
    names = set()
    for name, _ in model.part(part).named_parameters():
        if ADAPTER in name:
            continue
        pieces = diffusers_names(name) if part == "unet" else [plain_name(name)]
        hit = [matches(part, pattern, piece) for piece in pieces]
        if any(hit) and not all(hit):
            others = " and ".join(piece.split(".")[-2] for piece in pieces)
            raise UserError(f"{said}, and {others} are one matrix here; name them together, or the group unet.attention")
        if any(hit):
            names.add(name)
    if not names:
        groups = ", ".join(f"{part}.{group}" for group in GROUPS[part])
        raise UserError(f"{said}, which is no parameter of it; groups are {groups}; names are those of diffusers")
    if not names & usable:
        raise UserError(
            f"{said}, which model.clip_skip {model.text.clip_skip} leaves out; lower clip_skip, or name other layers"
        )
    return names & usable


def changed_parts(names: Mapping[str, Iterable[str]]) -> list[str]:
    """The parts whose own weights what `selected` gives would change: not those of which it has adapters only."""
    return [part for part, found in names.items() if any(ADAPTER not in name for name in found)]


def size_of(model: Model, names: Mapping[str, Iterable[str]]) -> int:
    """How many numbers what `selected` gives comes to."""
    sizes = {part: {name: p.numel() for name, p in model.part(part).named_parameters()} for part in names}
    return sum(sizes[part][name] for part in names for name in names[part])


@torch.no_grad()
def reinitialise(model: Model, entries: Iterable[str], seed: int, where: str) -> int:
    """Draw the weights that entries mean anew, as PyTorch's layers begin; returns how many numbers.

    Norms become 1, biases of norms 0; other weights and biases are uniform within 1 / sqrt(fan in), embeddings normal with
    0.02. A function of (seed, the parameter's name).

    Raises:
        UserError: as `selected`.

    Source: PyTorch's Linear and Conv2d (kaiming_uniform with a = sqrt(5)); CLIP's embeddings (Radford et al. 2021).
    """
    total = 0
    for part, names in selected(model, entries, where).items():
        parameters = dict(model.part(part).named_parameters())
        for name in sorted(names):
            _draw(parameters, name, seed)
            total += parameters[name].numel()
    return total


def _draw(parameters: dict[str, torch.nn.Parameter], name: str, seed: int) -> None:
    tensor, (stem, _, leaf) = parameters[name], name.rpartition(".")
    weight = parameters[f"{stem}.weight"]
    if weight.ndim == 1:
        tensor.fill_(1.0 if leaf == "weight" else 0.0)
        return
    numbers = uniform_like(tensor, seed, Purpose.REINIT, name)
    if "embedding" in stem and "time" not in stem:
        tensor.copy_(0.02 * math.sqrt(2) * torch.erfinv(numbers))
    else:
        tensor.copy_(numbers / math.sqrt(math.prod(weight.shape[1:])))


def uniform_like(tensor: Tensor, seed: int, purpose: Purpose, name: str) -> Tensor:
    """Uniforms in (-1, 1) of a tensor's shape, fp64 on the CPU, in its logical order: a function of (seed, purpose, name)."""
    key = torch.tensor([xxhash.xxh3_64_intdigest(name.encode()) >> 1])
    return (2 * uniform(seed, purpose, key, tensor.numel())[0] - 1).view(tensor.shape)
