"""Read a single file in the original Stable Diffusion layout, under diffusers' names.

Such a file has no configs. Widths and depths follow from the shapes of the tensors. The numbers of heads and norm groups do
not, so they are assumed to be SD1.5's. Files written by fastsd have their configs in the header.
Read next: `fastsd/model/formats/model_source.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.errors import UserError
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.formats.original_names import EMA, PREFIX, current_vae_name, ema_name, original_names
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.unet import UNetConfig
from fastsd.model.weights import classic_text_name, expected_tensors
from fastsd.storage import Tensors

CONFIGS = "fastsd.configs"  # header key of {component or "scheduler": its config.json}
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"  # empty tensors that mark these settings for other tools
_VAE_TOPS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Settings that do not follow from any tensor.
_VAE_CONFIG = {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "norm_num_groups": 32}
# The VAE of Flux.1 (ae.safetensors). Only SD3's has the same shapes.
_FLUX1 = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_TEXT_CONFIG = {
    "model_type": "clip_text_model", "architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
# Prefix of names -> another family, and the prefixes that prove it to be SD1.5's all the same: then these are leftovers.
_UNET_OR_VAE = (PREFIX["unet"] + "input_blocks.", PREFIX["vae"], "encoder.")
_OTHER_FAMILIES = {
    "conditioner.": ("an SDXL", (PREFIX["text_encoder"],)), "model.diffusion_model.label_emb.": ("an SDXL", ()),
    "cond_stage_model.model.": ("an SD2", (PREFIX["text_encoder"],)),
    "model.diffusion_model.joint_blocks.": ("an SD3", _UNET_OR_VAE),
    "model.diffusion_model.double_blocks.": ("a Flux", _UNET_OR_VAE), "double_blocks.": ("a Flux", _UNET_OR_VAE),
    "control_model.": ("a ControlNet", _UNET_OR_VAE),
    "lora_unet_": ("a LoRA", _UNET_OR_VAE), "lora_te": ("a LoRA", _UNET_OR_VAE),
}  # fmt: skip
# Tensors that tools leave in a component, although its output does not depend on them: the other half of a whole CLIP, and
# the loss and the averages with which a VAE was trained. A UNet has none.
_UNUSED = {
    "text_encoder": re.compile(r"(?:text_projection|logit_scale|visual_projection|vision_model)(?:\.|$)|.*position_ids$"),
    "vae": re.compile(r"(?:loss|model_ema)\."),
    "unet": re.compile(r"(?!)"),
}

# A layer of a text encoder, under any name.
_TEXT_LAYER = re.compile(
    r"(?:cond_stage|conditioner|text_?enc|text_?model|clip|te\d?[._]|transformer\.).*(?:layers?|resblocks|blocks?)\.\d+\."
)


def read_component(
    path: Path, tensors: Tensors, metadata: Mapping[str, str], component: str, notes: list[str], *, ema: bool = False
) -> tuple[dict[str, Any], Tensors] | None:
    """Return a component's config, and its tensors by diffusers' or transformers' names. Return None if the file lacks it.

    The file may hold only a VAE, with the original names or with diffusers'. With `ema`, the UNet's weights are their EMA.

    Raises:
        UserError: the file is of another model family, or the component is incomplete.
    """
    for name in tensors:
        for prefix, (family, proofs) in _OTHER_FAMILIES.items():
            if name.startswith(prefix) and not any(other.startswith(proofs) for other in tensors):
                raise UserError("other-family", f"{path} is {family} file ({name}); give a model of the SD1.5 family")

    prefix = PREFIX[component]
    contents = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state: Tensors = {name: tensor for name, tensor in contents.items() if not is_unused(component, name)}
    if component == "vae" and not state:
        state = {name: tensor for name, tensor in tensors.items() if name.startswith(_VAE_TOPS)}
    if not state:
        unknown = next((name for name in tensors if _TEXT_LAYER.match(name)), None) if component == "text_encoder" else None
        if unknown:
            raise UserError(
                "single-file-text-names",
                f"{path}: has a text encoder with unknown names ({unknown}); rename its tensors to {prefix}text_model..., "
                "or remove them to use another text encoder",
            )
        return None

    config = configs(path, metadata).get(component) or _FROM_SHAPES[component](state, path)
    if component == "vae" and any(name.startswith("encoder.down_blocks.") for name in state):
        return config, {current_vae_name(name): tensor for name, tensor in state.items()}
    if component == "text_encoder":
        return config, {classic_text_name(name): tensor for name, tensor in state.items()}

    targets = expected_tensors(component, config, str(path))
    original_by_name = original_names(component, config, targets)
    if component == "unet":
        state = _unet_weights(path, tensors, state, original_by_name, notes, ema=ema)
    converted = {name: state[original] for name, original in original_by_name.items() if original in state}
    # The original VAE's attention has the same numbers in the shape of 1x1 convolutions.
    converted |= {name: t.view(targets[name].shape) for name, t in converted.items() if t.shape == (*targets[name].shape, 1, 1)}
    return config, converted | {name: state[name] for name in state.keys() - set(original_by_name.values())}


def _unet_weights(
    path: Path, tensors: Tensors, unet: Tensors, original_by_name: Mapping[str, str], notes: list[str], *, ema: bool
) -> Tensors:
    """Return the UNet's weights, or their EMA if `ema` is set."""
    ema_names = {original: name for original in original_by_name.values() if (name := ema_name(original)) in tensors}
    if ema_names:
        notes.append(f"unet: {len(ema_names)} EMA tensors " + ("used" if ema else "ignored; --ema uses them"))
    elif ema:
        raise UserError("single-file-no-ema", f"{path}: has no EMA weights; omit --ema")
    return {original: tensors[name] for original, name in ema_names.items()} if ema else unet


def is_unused(component: str, name: str) -> bool:
    """Return True if a component's output does not depend on a tensor. `name` lacks the component's prefix."""
    return _UNUSED[component].match(name) is not None


def ignored(tensors: Tensors) -> list[str]:
    """Return the first words of the tensor names that no component reads, after its prefix, without repetition."""
    return list(dict.fromkeys(_label(name) for name in tensors if not _is_read(name)))


def _is_read(name: str) -> bool:
    for component, prefix in PREFIX.items():
        if name.startswith(prefix):
            return not is_unused(component, name.removeprefix(prefix)) or name.endswith("position_ids")
    return name.startswith((f"{EMA}diffusion_model", *_VAE_TOPS)) or name in (V_PREDICTION, ZERO_SNR)


def _label(name: str) -> str:
    prefixes = (*PREFIX.values(), EMA, "model.", "cond_stage_model.", "first_stage_model.")
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefix + name.removeprefix(prefix).split(".")[0]


def configs(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the configs of components and scheduler in a file's header. Only files that fastsd wrote have any."""
    try:
        stored = json.loads(metadata.get(CONFIGS, "{}"))
        return {str(component): dict(config) for component, config in stored.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            "header-configs", f"{path}: {CONFIGS} in the header is not a JSON object ({error}); export the file again"
        ) from None


def scheduler(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the scheduler_config.json of a file, with SD1.5's values for the settings that the file does not have."""
    if stored := configs(path, metadata).get("scheduler"):
        return stored
    if metadata.get("modelspec.prediction_type") == "flow":
        return flow_scheduler(SD15_SCHEDULER)
    settings = dict(SD15_SCHEDULER)
    if V_PREDICTION in tensors or metadata.get("modelspec.prediction_type") == "v":
        settings["prediction_type"] = "v_prediction"
    if ZERO_SNR in tensors:
        settings["rescale_betas_zero_snr"] = True
    return settings


def states_prediction(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Return True if a file says what its UNet predicts. Most files of other programs do not."""
    stored = configs(path, metadata).get("scheduler")
    return bool(stored) or V_PREDICTION in tensors or "modelspec.prediction_type" in metadata


def _unet_config(state: Tensors, path: Path) -> dict[str, Any]:
    if "input_blocks.0.0.weight" not in state or "out.2.weight" not in state:
        raise UserError(
            "single-file-no-whole-unet", f"{path}: no complete UNet in the original SD layout; give a complete SD1.5 model file"
        )

    widths, attention, layers, per_level = [], [], 0, []
    blocks = sorted({int(m[1]) for name in state if (m := re.match(r"input_blocks\.(\d+)\.", name))})
    for i in blocks[1:]:
        block = f"input_blocks.{i}"
        if f"{block}.0.op.weight" in state:
            per_level.append(layers)
            layers = 0
            continue
        if layers == 0:
            name = f"{block}.0.out_layers.3.weight"
            if name not in state:
                raise UserError(
                    "single-file-tensor-missing", f"{path}: {PREFIX['unet']}{name} is missing; give a complete SD1.5 model file"
                )
            widths.append(_dimension(state, name, 0, path))
            attention.append(f"{block}.1.proj_in.weight" in state)
        layers += 1

    per_level.append(layers)
    if len(set(per_level)) != 1 or not layers:
        raise UserError(
            "single-file-blocks",
            f"{path}: the UNet has {per_level} blocks per level, but SD1.5 has the same number in each; give an SD1.5 model",
        )

    to_k = next((name for name in state if name.endswith("attn2.to_k.weight")), None)
    if to_k is None:
        raise UserError("single-file-no-attention", f"{path}: the UNet has no cross-attention; give an SD1.5 model")
    return UNetConfig(
        in_channels=_dimension(state, "input_blocks.0.0.weight", 1, path),
        out_channels=_dimension(state, "out.2.weight", 0, path),
        block_out_channels=tuple(widths),
        layers_per_block=per_level[0],
        attention=tuple(attention),
        cross_attention_dim=_dimension(state, to_k, 1, path),
    ).to_diffusers()


def _vae_config(state: Tensors, path: Path) -> dict[str, Any]:
    has_convolutions = "quant_conv.weight" in state or "post_quant_conv.weight" in state
    last = "post_quant_conv.weight" if has_convolutions else "decoder.conv_in.weight"
    is_complete = {"encoder.conv_in.weight", last} <= state.keys()
    channels = _dimension(state, last, 1, path) if is_complete else 0
    if not is_complete or (not has_convolutions and channels != 16):
        raise UserError("single-file-no-vae", f"{path}: no complete AutoencoderKL; give a VAE or a complete SD1.5 model file")
    has_diffusers_names = any(name.startswith("encoder.down_blocks.") for name in state)
    conv1 = "encoder.down_blocks.{}.resnets.{}.conv1.weight" if has_diffusers_names else "encoder.down.{}.block.{}.conv1.weight"
    widths: list[int] = []
    while (name := conv1.format(len(widths), 0)) in state:
        widths.append(_dimension(state, name, 0, path))
    layers = 0
    while conv1.format(0, layers) in state:
        layers += 1
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths)}
    sizes = {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": channels}
    return _VAE_CONFIG | blocks | sizes | ({} if has_convolutions else _FLUX1)


def _text_config(state: Tensors, path: Path) -> dict[str, Any]:
    state = {classic_text_name(name): tensor for name, tensor in state.items()}
    names = ("embeddings.position_embedding", "embeddings.token_embedding", "encoder.layers.0.mlp.fc1")
    needed = [f"text_model.{name}.weight" for name in names]
    missing = next((name for name in needed if name not in state), None)
    if missing:
        raise UserError(
            "single-file-no-text-encoder", f"{path}: the CLIP text encoder has no {missing}; give a complete SD1.5 model file"
        )
    layers = {int(m[1]) for name in state if (m := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    window, vocabulary, inner = (_dimension(state, name, 0, path) for name in needed)
    width = _dimension(state, needed[0], 1, path)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": max(1, width // 64)}
    counts = {"vocab_size": vocabulary, "max_position_embeddings": window, "num_hidden_layers": len(layers)}
    return _TEXT_CONFIG | sizes | counts


_FROM_SHAPES = {"unet": _unet_config, "vae": _vae_config, "text_encoder": _text_config}


def _dimension(state: Tensors, name: str, dim: int, path: Path) -> int:
    shape = tuple(state[name].shape)
    if len(shape) <= dim:
        raise UserError("single-file-shape", f"{path}: {name} has shape {shape}; give a complete SD1.5 model file")
    return shape[dim]
