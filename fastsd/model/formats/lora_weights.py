"""Read a model's adapters from a LoRA file, and write them to one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.lora_files import PEFT_CONFIG, LoraFile, fold_alpha, peft_config, read_lora, write_kohya, write_peft
from fastsd.model.lora import ADAPTER_NAME, NamedTensors, adapted_layers, lora_state_dict
from fastsd.model.model import Model
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
    lora = LoraFile(dict(source), {}) if isinstance(source, Mapping) else read_lora(source)
    place = "lora" if isinstance(source, Mapping) else str(source)
    targets = lora_state_dict(model)
    check_names(targets, lora.tensors, place, "set rank, targets, conv and text_encoder in model.lora as in the file")

    for module, alpha in _alphas_by_module(model).items():
        stored_alpha = lora.alphas.get(module, alpha)
        if not math.isclose(alpha, stored_alpha, rel_tol=1e-6):
            rank, advice = lora.ranks[module], "give a LoRA with one alpha for all layers"
            if len({*lora.alphas.values()}) == 1:
                advice = f"set model.lora.alpha to {stored_alpha:g}"
            elif lora.alphas == lora.ranks:
                advice = "remove model.lora.alpha"
            raise UserError(
                "lora-other-alpha",
                f"{place}: alpha / rank of {module} is {stored_alpha / rank:g}, but model.lora makes it "
                f"{alpha / rank:g}; {advice}",
            )
    for name, target in targets.items():
        target.copy_(lora.tensors[name])
