"""Floor 1: one `.safetensors` file in the original Stable Diffusion layout, read as diffusers' names and configs.

The names are translated by diffusers' own conversion functions; widths and depths are read off the shapes. What shapes
cannot tell - heads, norm groups - is SD1.5's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsd.errors import UserError
from fastsd.model.unet import UNetConfig
from fastsd.storage import read_safetensors

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
Loaded = tuple[dict[str, Any], dict[str, Tensor]]


def unet(path: Path) -> Loaded:
    """The UNet of a single file: (diffusers config, state dict by diffusers' names).

    Raises:
        UserError: there is none in the file, or it is another model family's.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = read_safetensors(path)
    if any(name.startswith("conditioner.") for name in state):
        raise UserError(f"{path}: an SDXL model; give one of the SD1.5 family")
    if any(name.startswith("cond_stage_model.model.") for name in state):
        raise UserError(f"{path}: an SD2 model; give one of the SD1.5 family")
    state = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
    if f"{UNET}input_blocks.0.0.weight" not in state:
        raise UserError(f"{path}: no UNet in the original SD layout ({UNET}...) in it; give a whole SD1.5 model file")
    config = _unet_config(state, path).to_diffusers()
    return config, convert_ldm_unet_checkpoint(state, config)


def _unet_config(state: dict[str, Tensor], path: Path) -> UNetConfig:
    widths, attention, layers, per_level = [], [], 0, []
    blocks = sorted({int(m[1]) for name in state if (m := re.match(rf"{re.escape(UNET)}input_blocks\.(\d+)\.", name))})
    for i in blocks[1:]:
        block = f"{UNET}input_blocks.{i}"
        if f"{block}.0.op.weight" in state:
            per_level.append(layers)
            layers = 0
            continue
        if layers == 0:
            widths.append(state[f"{block}.0.out_layers.3.weight"].shape[0])
            attention.append(f"{block}.1.proj_in.weight" in state)
        layers += 1
    per_level.append(layers)
    if len(set(per_level)) != 1:
        raise UserError(f"{path}: its levels have {per_level} blocks; an SD1.5 UNet has the same number in each")
    context = next((t.shape[1] for name, t in state.items() if name.endswith("attn2.to_k.weight")), None)
    if context is None:
        raise UserError(f"{path}: its UNet has no cross-attention; give an SD1.5 model")
    return UNetConfig(
        in_channels=state[f"{UNET}input_blocks.0.0.weight"].shape[1],
        out_channels=state[f"{UNET}out.2.weight"].shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=per_level[0],
        attention=tuple(attention),
        cross_attention_dim=context,
    )


def vae(path: Path) -> Loaded:
    """The VAE of a single file, whole model or VAE alone, original or diffusers' names: (config, state dict)."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    state = read_safetensors(path)
    state = {name.removeprefix(VAE): t for name, t in state.items() if name.startswith((VAE, *_VAE_TOPS))}
    if "encoder.conv_in.weight" not in state or "post_quant_conv.weight" not in state:
        raise UserError(f"{path}: no AutoencoderKL in it; give a VAE file or a whole SD1.5 model file")
    theirs = "encoder.down_blocks" if any(n.startswith("encoder.down_blocks") for n in state) else "encoder.down"
    conv1 = "{}.{}.resnets.{}.conv1.weight" if theirs.endswith("blocks") else "{}.{}.block.{}.conv1.weight"
    widths: list[int] = []
    while (name := conv1.format(theirs, len(widths), 0)) in state:
        widths.append(state[name].shape[0])
    layers = 0
    while conv1.format(theirs, 0, layers) in state:
        layers += 1
    config = {
        "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths), "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": layers, "latent_channels": state["post_quant_conv.weight"].shape[1], "norm_num_groups": 32,
    }  # fmt: skip
    return config, state if theirs.endswith("blocks") else convert_ldm_vae_checkpoint(state, config)


_VAE_TOPS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def text_encoder(path: Path) -> Loaded:
    """The CLIP text encoder of a single file: (transformers config, state dict by transformers' names)."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint

    state = convert_ldm_clip_checkpoint(read_safetensors(path, TEXT))
    position = state.get("text_model.embeddings.position_embedding.weight")
    if position is None:
        raise UserError(f"{path}: no CLIP text encoder ({TEXT}...) in it; give a whole SD1.5 model file")
    layers = {int(m[1]) for name in state if (m := re.match(r"text_model\.encoder\.layers\.(\d+)\.", name))}
    config = {
        "model_type": "clip_text_model", "vocab_size": state["text_model.embeddings.token_embedding.weight"].shape[0],
        "hidden_size": position.shape[1], "max_position_embeddings": position.shape[0], "num_hidden_layers": len(layers),
        "intermediate_size": state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_attention_heads": max(1, position.shape[1] // 64), "hidden_act": "quick_gelu", "projection_dim": 768,
    }  # fmt: skip
    return config, state
