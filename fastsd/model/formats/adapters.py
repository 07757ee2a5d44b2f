"""Load and write models with adapters, to train the adapters or to merge them into the weights for other tools.

A checkpoint of a run with adapters contains the unchanged base model and two more files:

    lora.safetensors    the adapters, in the format that diffusers' `load_lora_weights` reads
    lora.json           the settings `[model.lora]` and `clip_skip` with which the adapters were trained

Read next: `fastsd/model/lora.py`. It is imported only if there are adapters, because importing peft takes a second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastsd.config.schema import LoraTable, ModelTable
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model
from fastsd.model.model import Model
from fastsd.model.weights import classic_text_name
from fastsd.storage import write_text
from fastsd_kernels import REFERENCE, Ops

ADAPTERS, MADE_BY = "lora.safetensors", "lora.json"
AdapterTensors = Mapping[str, Mapping[str, Tensor]]  # component -> parameter name -> tensor
Averages = AdapterTensors  # the EMA of the parameters


def load_to_train(table: ModelTable, ops: Ops = REFERENCE, seed: int = 0, checkpoint: Path | None = None) -> Model:
    """Load a model and add the adapters of `table.lora`, with values from a checkpoint, from `table.lora.file`, or new ones.

    If there is no checkpoint to continue and `table.base` has adapters of its own, these are merged into its weights.

    Raises:
        UserError: as `load_model`; also if a target matches no layer, or a file holds other adapters.
    """
    model = load_model(table, ops) if checkpoint else load_merged(table, ops)
    if table.lora is not None:
        from fastsd.model.formats.lora_weights import load_lora
        from fastsd.model.lora import add_lora

        add_lora(model, table.lora, seed)
        if checkpoint or table.lora.file:
            load_lora(model, checkpoint / ADAPTERS if checkpoint else _lora_file(table.lora.file))
    return model


def _lora_file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            "lora-file-missing", f"model.lora.file is {name!r}, which does not exist; give a LoRA file or remove the key"
        )
    return path


def load_merged(table: ModelTable, ops: Ops = REFERENCE, averages: Averages | None = None) -> Model:
    """Load a model. If `table.base` is a checkpoint with adapters, merge them into its weights.

    Args:
        averages: used in place of the stored adapters and weights.

    Raises:
        UserError: as `load_model`; also if the adapters are damaged.
    """
    model = load_model(table, ops)
    settings_path = Path(table.base).expanduser() / MADE_BY
    if not settings_path.is_file():
        use_averages(model, averages or {})
        return model
    from fastsd.model.formats.lora_weights import load_lora
    from fastsd.model.lora import add_lora, merge_lora

    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    # The clip_skip of the training decides which layers have adapters, whatever clip_skip the caller asks for.
    requested_clip_skip = model.text.clip_skip
    model.text.clip_skip = settings["clip_skip"]
    add_lora(model, LoraTable(**settings["lora"]), seed=0)
    load_lora(model, settings_path.with_name(ADAPTERS))
    use_averages(model, averages or {})
    merge_lora(model)
    model.text.clip_skip = requested_clip_skip
    return model


@torch.no_grad()
def use_averages(model: Model, averages: Averages) -> None:
    """Replace parameters of a loaded model by their averages."""
    for component, tensors in averages.items():
        parameters = {classic_text_name(name): tensor for name, tensor in model.component(component).named_parameters()}
        for name, tensor in tensors.items():  # of any version of transformers
            parameters[classic_text_name(name)].copy_(tensor)


def write_lora_file(
    path: Path, model: Model, tensors: AdapterTensors, names: str = "kohya", metadata: Mapping[str, str] | None = None
) -> str:
    """Write the adapters for other tools, with the values in `tensors`. Return the file's sha256.

    Args:
        names: as in `lora_weights.write_lora`.
        metadata: entries for the file's header.
    """
    from fastsd.model.formats.lora_weights import write_lora

    return write_lora(path, model, tensors, names, metadata)


def write_adapters(folder: Path, model: Model, tensors: AdapterTensors) -> dict[str, str]:
    """Write the adapters and their settings into a checkpoint, with the exact values in `tensors`. Return the files' sha256."""
    assert model.lora is not None
    settings = {"lora": model.lora.model_dump(), "clip_skip": model.text.clip_skip}
    return {
        ADAPTERS: write_lora_file(folder / ADAPTERS, model, tensors, "checkpoint"),
        MADE_BY: write_text(folder / MADE_BY, json.dumps(settings, indent=2) + "\n"),
    }
