"""Load models from any supported place, and write them back component by component.

A model can be a diffusers folder, a hub id, or one `.safetensors` file in the original Stable Diffusion layout. Its VAE may
come from another model. Models are written as diffusers folders with the classic names, which every version and tool reads.
Nothing here unpickles: a model that has only `.bin` or `.ckpt` weights is refused with an error that names them.
Read next: `fastsd/model/formats/model_source.py`, which finds models, and `fastsd/model/formats/write.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from fastsd.config.schema import ModelTable
from fastsd.errors import UserError
from fastsd.model.flow_schedule import flow_scheduler, is_flow
from fastsd.model.formats.model_source import ComponentFiles, find_tokenizer, locate, open_file, read_component, read_scheduler
from fastsd.model.formats.single_file_layout import CONFIGS
from fastsd.model.formats.write import write_component as write_tensors
from fastsd.model.formats.write import write_pipeline
from fastsd.model.latent_space import SHIFTS, LatentSpace
from fastsd.model.model import SD15_SCHEDULER as SD15_SCHEDULER
from fastsd.model.model import Model, usable_scheduler
from fastsd.model.shapes import check_text_to_image, materialize
from fastsd.model.text_encoder import TextEncoder
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.vae import Vae
from fastsd.model.weights import (
    ADAPTER,
    classic_text_name,
    copy_tensors,
    diffusers_state_dict,
    empty_component,
    load_diffusers_unet,
    plain_name,
)
from fastsd_kernels import REFERENCE, Ops

CPU = torch.device("cpu")


def load_model(table: ModelTable, ops: Ops = REFERENCE) -> Model:
    """Load a base model in fp32 on the CPU. If the config names a VAE, it replaces the base model's own.

    Raises:
        UserError: the model cannot be found or reached, it is of another kind, or its components do not fit together.
    """
    base = locate(table.base, "model.base", table.revision)
    notes = list[str]()
    unet = _load_unet(base, ops, notes)
    check_text_to_image(unet.cfg, table.base)
    text = load_text(table, base, notes)
    vae = load_vae(table, base)

    check_vae_channels(vae.name, vae.channels, table.base, unet.cfg.in_channels)
    if text.width != unet.cfg.cross_attention_dim:
        raise UserError(
            "text-width",
            f"model.base is {table.base}: the text encoder has width {text.width}, but the UNet expects "
            f"{unet.cfg.cross_attention_dim}; choose a base model with matching components",
        )

    scheduler, scheduler_notes = _load_scheduler(base, table)
    return Model(table.base, unet, text, vae, scheduler, notes + scheduler_notes)


def check_vae_channels(vae: str, channels: int, base: str, in_channels: int) -> None:
    """Raise UserError unless a VAE has as many latent channels as the UNet of a base takes."""
    if channels != in_channels:
        raise UserError(
            "vae-channels",
            f"model.vae: {vae} has {channels} latent channels, but the UNet of {base} takes {in_channels}; choose a VAE with "
            f"{in_channels}, or run `fastsd swap-vae {quote(base)} {quote(vae)} OUT` and set model.base to OUT",
        )


def table_of(base: str, config: ModelTable) -> ModelTable:
    """Describe a model of the same family as a config's base: it has its own VAE, and what it does not store is as in `config`.

    A folder stores everything but the settings of captions and adapters. A file lacks a tokenizer. If another program wrote it,
    it also lacks the prediction type, the noise schedule and the VAE's scaling factor.
    """
    revision = config.revision if base == config.base else ""
    changes: dict[str, Any] = {"base": base, "revision": revision, "vae": "", "tokenizer": ""}
    stored: dict[str, Any] = {"prediction": "", "zero_snr": None, "vae_scaling_factor": None, "flow_shift": None}
    path = Path(base).expanduser()
    if path.is_file():
        changes["tokenizer"] = config.tokenizer or ("" if Path(config.base).expanduser().is_file() else config.base)
        if path.suffix == ".safetensors" and CONFIGS not in open_file(path).metadata:
            stored = {"vae_scaling_factor": None} if config.vae else {}  # the config's factor is that of its model.vae
    return config.model_copy(update=changes | stored)


def _open_component(base: Path, name: str, notes: list[str] | None = None) -> ComponentFiles | None:
    """Return a component of a located model, or None if a single file lacks it. Notes on ignored files go to `notes`."""
    return open_file(base).read(name, [] if notes is None else notes) if base.is_file() else read_component(base, name, notes)


def _load_unet(base: Path, ops: Ops, notes: list[str]) -> UNet:
    component = _open_component(base, "unet", notes)
    assert component is not None  # `File.read` refuses a file without a UNet
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_diffusers(component.config, component.config_file), ops)
    materialize(unet, CPU)
    load_diffusers_unet(unet, component.tensors, component.place)
    return unet


def load_text(table: ModelTable, base: Path, notes: list[str] | None = None) -> TextEncoder:
    """Load the text encoder and tokenizer of a located base model. A line on an encoder from elsewhere is added to `notes`."""
    tokenizer, tokenizer_folder = load_tokenizer(table, base)
    component = _open_component(base, "text_encoder")
    if component is None and (tokenizer_folder.parent / "text_encoder").is_dir():
        component = read_component(tokenizer_folder.parent, "text_encoder")
        if notes is not None:
            notes.append(f"the text encoder is from {tokenizer_folder.parent}, because {base.name} has none")
    if component is None:
        raise UserError(
            "single-file-text-encoder",
            f"model.base is {base}, a single file without a text encoder; set model.tokenizer to a diffusers folder with "
            "tokenizer/ and text_encoder/",
        )
    module = empty_component("text_encoder", component.config, component.config_file)
    materialize(module, CPU)
    _fill_position_ids(module)
    targets = {classic_text_name(name): tensor for name, tensor in module.state_dict().items()}
    copy_tensors(targets, component.tensors, component.place)
    return TextEncoder(module, tokenizer, table.clip_skip, tokenizer_folder, table.chunks, table.cut)


def load_tokenizer(table: ModelTable, base: Path | None = None) -> tuple[Any, Path]:
    """Load a config's tokenizer without the text encoder. Return transformers' CLIPTokenizer and the folder of its files.

    Raises:
        UserError: there is no tokenizer, or it does not load.
    """
    from transformers import CLIPTokenizer

    base = base or locate(table.base, "model.base", table.revision)
    folder = find_tokenizer(base, table.tokenizer, "model.tokenizer")
    if folder is None and base.is_file() and not table.tokenizer:
        raise UserError(
            "single-file-tokenizer",
            f"model.base is {base}, a single file without a tokenizer; "
            'set model.tokenizer to a folder or hub id with one, for example "openai/clip-vit-large-patch14"',
        )
    if folder is None:
        source = table.tokenizer or base
        raise UserError(
            "no-tokenizer", f"{source}: no CLIP tokenizer (vocab.json, merges.txt); set model.tokenizer to a folder with them"
        )
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True), folder
    except Exception as error:  # the libraries raise many types of errors, and tokenizers plain `Exception`s
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError("tokenizer-broken", f"{folder}: the tokenizer cannot be loaded ({reason}); download it again") from None


def _fill_position_ids(module: torch.nn.Module) -> None:
    # This buffer is not in the state dict, so after `materialize` nothing else gives it values.
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]))


def load_vae(table: ModelTable, base: Path | None = None, ops: Ops = REFERENCE) -> Vae:
    """Load a config's VAE in fp32 on the CPU: `model.vae`, or the base model's own."""
    name = table.vae or table.base
    source = locate(table.vae, "model.vae") if table.vae else base or locate(table.base, "model.base", table.revision)
    component = _open_component(source, "vae")
    if component is None:
        advice = "set model.vae to another model" if table.vae else "set model.vae to a model that has one"
        raise UserError("no-vae", f"{source}: no AutoencoderKL found; {advice}")

    config = dict(component.config)
    if table.vae and source.is_file() and table.vae_scaling_factor is None and "scaling_factor" not in config:
        raise UserError(
            "vae-factor-unknown",
            f"model.vae is {source}, a single file without a scaling factor; set "
            "model.vae_scaling_factor (0.13025 for SDXL's VAE, 0.18215 for SD1.5's)",
        )
    if table.vae_scaling_factor is not None:
        config["scaling_factor"] = table.vae_scaling_factor
        if source.is_file() and "shift_factor" in config:
            config["shift_factor"] = SHIFTS.get(table.vae_scaling_factor, config["shift_factor"])

    module = empty_component("vae", config, component.config_file)
    LatentSpace.of(config, component.config_file)
    materialize(module, CPU)
    copy_tensors(module.state_dict(), component.tensors, component.place)
    return Vae(module, name, ops)


def scheduler_of(base: Path) -> tuple[dict[str, Any], bool]:
    """Return the scheduler config of a located model, and whether it says what the UNet predicts. If not, it has "epsilon"."""
    if base.is_file():
        file = open_file(base)
        return file.scheduler(), file.states_prediction
    return read_scheduler(base), (base / "scheduler" / "scheduler_config.json").exists()


def _load_scheduler(base: Path, table: ModelTable) -> tuple[dict[str, Any], list[str]]:
    """Return the base model's scheduler config, updated with the settings in `table`, and notes for the user."""
    notes = list[str]()
    config, stated = scheduler_of(base)
    if is_flow(config) or table.prediction == "flow":
        return _flow_scheduler(config, table, stated=stated)
    if table.flow_shift is not None:
        raise UserError(
            "flow-shift-without-flow",
            f'model.flow_shift is set, but {table.base} is not a flow; set model.prediction = "flow", or remove flow_shift',
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise _other_prediction(base, prediction)

    if table.prediction and table.prediction != prediction:
        config["prediction_type"] = table.prediction
        if stated:
            notes.append(
                f'model.prediction is "{table.prediction}", but the base was trained for {prediction}: the UNet has to adapt, '
                "so the loss starts high"
            )

    if table.zero_snr is not None:
        config["rescale_betas_zero_snr"] = table.zero_snr
    if config.get("rescale_betas_zero_snr") and (table.prediction or prediction) == "epsilon":
        raise UserError(
            "zero-snr-epsilon",
            f"model: the noise schedule of {table.base} ends in pure noise (zero SNR), which epsilon cannot express; set "
            'model.prediction = "v_prediction" or model.zero_snr = false',
        )
    return usable_scheduler(config), notes


def _flow_scheduler(config: dict[str, Any], table: ModelTable, *, stated: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the scheduler config of a flow, which the base is or is to become, and notes for the user."""
    if is_flow(config) and (table.prediction not in ("", "flow") or table.zero_snr is not None):
        key = "zero_snr" if table.zero_snr is not None else "prediction"
        raise UserError(
            "base-is-flow", f"model.{key} is set, but {table.base} is a flow, which has no noise schedule; remove {key}"
        )
    if is_flow(config):
        return flow_scheduler(config, table.flow_shift), []
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise _other_prediction(table.base, prediction)
    trained_for = prediction if stated else "epsilon or v_prediction, which it does not say"
    note = (
        f'model.prediction is "flow", but the base was trained for {trained_for}: the UNet has to adapt; a first stage with '
        'teacher = "base" teaches it the flow that the base already knows'
    )
    return flow_scheduler(config, table.flow_shift), [note]


def _other_prediction(base: object, prediction: object) -> UserError:
    return UserError(
        "scheduler-prediction",
        f"{base}: prediction_type is {prediction!r}; use a base model with epsilon, v_prediction or flow_prediction",
    )


def component_state_dict(model: Model, component: str, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return a component's tensors without adapters, named as in its file. `tensors` (masters, EMA) replace parameters."""
    if component == "unet":
        return diffusers_state_dict(model.unet, tensors=tensors)
    state = {**model.text.module.state_dict(), **(tensors or {})}
    return {classic_text_name(plain_name(name)): t.detach() for name, t in state.items() if ADAPTER not in name}


def write_component(folder: Path, model: Model, component: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Write one trainable component into a diffusers folder. Return each file's sha256 by its relative name."""
    if component == "unet":
        return write_tensors(folder, component, model.unet.cfg.to_diffusers(), state)
    config = {**model.text.module.config.to_dict(), "architectures": ["CLIPTextModel"]}
    return write_tensors(folder, component, config, state, dtype="fp32")


def write_rest(folder: Path, model: Model) -> dict[str, str]:
    """Write VAE, tokenizer, scheduler and model_index.json, which training never changes. Return each file's sha256 by name."""
    config = json.loads(model.vae.module.to_json_string())
    hashes = write_pipeline(folder, model.scheduler, model.text.tokenizer_folder)
    return hashes | write_tensors(folder, "vae", config, model.vae.module.state_dict())
