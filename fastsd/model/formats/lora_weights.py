"""Read a model's adapters from a LoRA file, and write them to one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fastsd.config.conversion import toml_value
from fastsd.config.schema import LoraTable
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.lora_files import (
    PEFT_CONFIG,
    LoraFile,
    fold_alpha,
    kernel_side,
    peft_config,
    read_lora,
    write_kohya,
    write_peft,
)
from fastsd.model.lora import ADAPTER_NAME, NamedTensors, adaptable_layers, adapted_layers, lora_state_dict
from fastsd.model.model import Model
from fastsd.model.select import matches
from fastsd.model.weights import check_names


def _alphas_by_module(model: Model) -> dict[str, float]:
    """Return the alpha of each adapted module. The keys are `<component>.<module>`, as in files."""
    return {
        f"{component}.{module}": float(layer.lora_alpha[ADAPTER_NAME])
        for component in COMPONENTS
        for _, layer in adapted_layers(model, component)
        for module in layer.target.modules
    }


def write_lora(
    path: Path,
    model: Model,
    tensors: NamedTensors | None = None,
    names: str = "checkpoint",
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write the result of `lora_state_dict(model, tensors)` into one .safetensors file. Return its sha256.

    Args:
        names: "kohya" for kohya's names, "peft" for diffusers' names with alpha folded in (`fold_alpha`), or "checkpoint" for
            diffusers' names with the exact values, and alpha in the header.
        metadata: entries for the file's header.
    """
    lora = LoraFile(lora_state_dict(model, tensors), _alphas_by_module(model))
    lora = fold_alpha(lora, str(path)) if names == "peft" else lora
    lora = replace(lora, metadata={PEFT_CONFIG: peft_config(lora), **(metadata or {})})
    return {"kohya": write_kohya, "peft": write_peft, "checkpoint": write_peft}[names](path, lora)


def load_lora(model: Model, source: Path | Mapping[str, Tensor]) -> None:
    """Copy the values of adapters into the adapters of a model. If one of them does not fit, nothing is copied.

    Args:
        source: a file that `read_lora` can read, or a result of `lora_state_dict`.

    Raises:
        UserError: the file is not a LoRA, or its layers, a rank or an alpha differ from the model's.
    """
    assert model.lora is not None
    lora = LoraFile(dict(source), {}) if isinstance(source, Mapping) else _without_skipped(model, read_lora(source), source)
    place = "lora" if isinstance(source, Mapping) else str(source)
    targets = lora_state_dict(model)
    advice = _advice(model, model.lora, lora)
    check_names(targets, lora.tensors, place, advice)

    for module, alpha in _alphas_by_module(model).items():
        stored_alpha = lora.alphas.get(module, alpha)
        if not math.isclose(alpha, stored_alpha, rel_tol=1e-6):
            rank = lora.ranks[module]
            raise UserError(
                "lora-other-alpha",
                f"{place}: alpha / rank of {module} is {stored_alpha / rank:g}, but model.lora makes it "
                f"{alpha / rank:g}; {advice}",
            )
    for name, target in targets.items():
        target.copy_(lora.tensors[name])


def _without_skipped(model: Model, lora: LoraFile, path: Path) -> LoraFile:
    """Leave out the adapters of layers that `clip_skip` skips. sd-scripts makes them, but never uses or trains them."""
    modules = [module for module in lora.alphas if module.startswith("text_encoder.")]
    if not modules or not model.text.clip_skip:
        return lora
    end = model.text.module.config.num_hidden_layers - model.text.clip_skip
    skipped = {module for module in modules if (match := re.search(r"\.layers\.(\d+)\.", module)) and int(match[1]) >= end}
    if skipped:
        model.notes.append(f"{path}: adapters of layers that clip_skip {model.text.clip_skip} leaves out are not loaded")
    return replace(
        lora,
        tensors={name: tensor for name, tensor in lora.tensors.items() if name.rsplit(".lora_", 1)[0] not in skipped},
        alphas={module: alpha for module, alpha in lora.alphas.items() if module not in skipped},
    )


def _advice(model: Model, table: LoraTable, lora: LoraFile) -> str:
    """Say which settings of `table` to change, so that the model's adapters are those of the file."""
    linears, convs = ([m for m in lora.alphas if (kernel_side(m) == 3) == is_3x3] for is_3x3 in (False, True))
    if any(len({values[m] for m in modules}) > 1 for values in (lora.ranks, lora.alphas) for modules in (linears, convs)):
        return "give a LoRA with one rank and alpha for its 3x3 convolutions, and one for its other layers"

    changes: dict[str, object] = {}
    rank, alpha, conv_alpha = table.rank, table.alpha, table.conv_alpha
    if linears:
        rank, stored_alpha = lora.ranks[linears[0]], lora.alphas[linears[0]]
        changes |= {"rank": rank} if rank != table.rank else {}
        if not math.isclose(stored_alpha, alpha or rank, rel_tol=1e-6):
            changes["alpha"] = alpha = stored_alpha
    if lora.alphas and table.conv != (conv := lora.ranks[convs[0]] if convs else 0):
        changes["conv"] = conv
    if convs and not math.isclose(lora.alphas[convs[0]], conv_alpha or alpha or conv, rel_tol=1e-6):
        changes["conv_alpha"] = lora.alphas[convs[0]]
    has_text = any(module.startswith("text_encoder.") for module in lora.alphas)
    changes |= {"text_encoder": has_text} if lora.alphas and has_text != table.text_encoder else {}
    targets = _targets_of(model, list(lora.alphas))
    return (
        f"set {' and '.join(f'{key} = {toml_value(value)}' for key, value in (changes | targets).items())} in model.lora"
        if changes or targets
        else "set rank, targets, conv and text_encoder in model.lora as in the file"
    )


def _targets_of(model: Model, modules: list[str]) -> dict[str, object]:
    """Return the setting `targets` that gives these modules adapters, or {} if it need not change or cannot name them."""

    def by_kind(names: Iterable[str]) -> dict[tuple[str, bool], set[str]]:
        kinds: dict[tuple[str, bool], set[str]] = {}
        for name in names:
            kinds.setdefault((name.split(".")[0], kernel_side(name) == 3), set()).add(name)
        return kinds

    stored, adapted = by_kind(modules), by_kind(_alphas_by_module(model))
    if all(adapted.get(kind, names) == names for kind, names in stored.items()):
        return {}  # the kinds of layers that differ depend on `conv` and `text_encoder`
    endings = sorted({re.split(r"\.\d+\.(?=[a-z])", module)[-1].removesuffix(".0") for module in modules})
    selected = {
        f"{component}.{layer}"
        for component in dict.fromkeys(component for component, _ in stored)
        for layer in adaptable_layers(model, component)
        if any(matches(component, ending, f"{layer}.weight") for ending in endings)
    }
    return {"targets": endings} if selected == set(modules) else {}
