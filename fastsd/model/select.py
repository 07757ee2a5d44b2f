"""Select parameters by the entries of `train` and `reinit`, and reinitialise selected parameters.

    "unet", "text_encoder"      the whole component
    "lora"                      the adapters of both components
    "unet.cross_attention"      a group, see `GROUPS`
    "unet.up_blocks.3", "unet.*.attn2.to_v.*", "text_encoder.layers.11"
                                names in diffusers and transformers: whole words between dots; * matches any text

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

from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.model import Model
from fastsd.model.weights import ADAPTER, diffusers_names, plain_name
from fastsd_kernels.noise import Purpose, uniform

# Group -> regular expression that matches anywhere in the names of its parameters.
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


def matches(component: str, pattern: str, name: str) -> bool:
    """Return True if a pattern (an entry without its component) selects the parameter `name` in diffusers or transformers."""
    if component == "text_encoder":  # before version 5, transformers nests the layers two levels deeper
        name = name.removeprefix("text_model.").removeprefix("encoder.")
    if group := GROUPS[component].get(pattern):
        return re.search(group, name) is not None
    if "*" in pattern:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    return f".{pattern}." in f".{name}."


def selected(model: Model, entries: Iterable[str], context: str) -> dict[str, set[str]]:
    """Return the names of the parameters that entries select, by component. Components without any are omitted.

    Args:
        context: the place of the entries in error messages, for example "stage 'unet': train".

    Raises:
        UserError: an entry selects nothing, only layers that `clip_skip` leaves out, or one projection of a fused weight.
    """
    selection: dict[str, set[str]] = {component: set() for component in COMPONENTS}
    for entry in entries:
        component, _, pattern = entry.partition(".")
        if entry == "lora":
            for lora_component in COMPONENTS:
                selection[lora_component] |= {name for name in model.trainable(lora_component) if ADAPTER in name}
        else:
            selection[component] |= _select_in(model, component, pattern, f"{context} names {entry!r}")
    return {component: names for component, names in selection.items() if names}


def _select_in(model: Model, component: str, pattern: str, context: str) -> set[str]:
    usable = {name for name in model.trainable(component) if ADAPTER not in name}
    if not pattern:
        return usable
    names = set()
    for name, _ in model.component(component).named_parameters():
        if ADAPTER in name:
            continue
        file_names = diffusers_names(name) if component == "unet" else [plain_name(name)]
        selects = [matches(component, pattern, file_name) for file_name in file_names]
        if any(selects) and not all(selects):
            layers = " and ".join(file_name.split(".")[-2] for file_name in file_names)
            raise UserError(
                "selected-within-fused",
                f"{context}, but {layers} are one matrix; use an entry that selects all of them, for example unet.attention",
            )
        if any(selects):
            names.add(name)

    if not names:
        groups = ", ".join(f"{component}.{group}" for group in GROUPS[component])
        raise UserError(
            "selected-nothing", f"{context}, which matches no parameter; use a group ({groups}) or a diffusers name"
        )
    if not names & usable:
        raise UserError(
            "selected-skipped", f"{context}, excluded by model.clip_skip {model.text.clip_skip}; lower it or name other layers"
        )
    return names & usable


def changed_components(names: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the components in which a selection (see `selected`) has parameters other than adapters."""
    return [component for component, parameters in names.items() if any(ADAPTER not in name for name in parameters)]


def parameter_count(model: Model, names: Mapping[str, Iterable[str]]) -> int:
    """Return the total number of elements in the parameters of a selection (see `selected`)."""
    sizes = {component: {name: p.numel() for name, p in model.component(component).named_parameters()} for component in names}
    return sum(sizes[component][name] for component in names for name in names[component])


@torch.no_grad()
def reinitialise(model: Model, entries: Iterable[str], seed: int, context: str) -> int:
    """Draw new values for selected parameters, as PyTorch initialises its layers. Return the number of values.

    Norms become 1 and their biases 0. Other weights and biases are uniform within 1 / sqrt(fan in). Embeddings are normal with
    standard deviation 0.02. The values are a function of (seed, the parameter's name).

    Raises:
        UserError: as `selected`.

    Source: PyTorch's Linear and Conv2d (kaiming_uniform with a = sqrt(5)); CLIP's embeddings (Radford et al. 2021).
    """
    total = 0
    for component, names in selected(model, entries, context).items():
        parameters = dict(model.component(component).named_parameters())
        for name in sorted(names):
            _draw(parameters, name, seed)
            total += parameters[name].numel()
    return total


def _draw(parameters: dict[str, torch.nn.Parameter], name: str, seed: int) -> None:
    tensor = parameters[name]
    stem, _, leaf = name.rpartition(".")
    weight = parameters[f"{stem}.weight"]
    if weight.ndim == 1:  # a norm
        tensor.fill_(1.0 if leaf == "weight" else 0.0)
        return
    numbers = uniform_like(tensor, seed, Purpose.REINIT, name)
    if "embedding" in stem and "time" not in stem:
        tensor.copy_(0.02 * math.sqrt(2) * torch.erfinv(numbers))
    else:
        tensor.copy_(numbers / math.sqrt(math.prod(weight.shape[1:])))


def uniform_like(tensor: Tensor, seed: int, purpose: Purpose, name: str) -> Tensor:
    """Return fp64 numbers in a tensor's shape and logical order, uniform in (-1, 1). (seed, purpose, name) determine them."""
    key = torch.tensor([xxhash.xxh3_64_intdigest(name.encode()) >> 1])
    return (2 * uniform(seed, purpose, key, tensor.numel())[0] - 1).view(tensor.shape)
