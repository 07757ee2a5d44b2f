"""Convert the names of weights in diffusers to their names in the original Stable Diffusion layout.

    down_blocks.0.resnets.0.conv1.weight            model.diffusion_model.input_blocks.1.0.in_layers.2.weight
    encoder.down_blocks.0.resnets.0.norm1.weight    first_stage_model.encoder.down.0.block.0.norm1.weight
    text_model.final_layer_norm.weight              cond_stage_model.transformer.text_model.final_layer_norm.weight

The original UNet numbers its blocks consecutively. A downsampler is a block of its own, and an upsampler is the last module of
a block. The decoder of the original VAE counts its levels from the highest resolution, and its attention uses 1x1 convolutions.
All other differences are only other words. Source: Rombach et al. 2022, the released code's `openaimodel.py` and `model.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fastsd.model.unet import UNetConfig

PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer."}
EMA = "model_ema."

_TOP = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_MID = {"resnets.0": "0.", "attentions.0": "1.", "resnets.1": "2."}
_VAE = {
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", ".resnets.": ".block.", "downsamplers.0": "downsample",
    "upsamplers.0": "upsample", "down_blocks.": "down.",
}  # fmt: skip
_OTHER_PREFIXES = {  # of ComfyUI and of merging tools -> ours
    "text_encoders.clip_l.transformer.": PREFIX["text_encoder"], "cond_stage_model.clip_l.transformer.": PREFIX["text_encoder"],
    "clip_l.transformer.": PREFIX["text_encoder"], "text_encoders.clip_l.": "cond_stage_model.", "vae.": PREFIX["vae"],
}  # fmt: skip
_OTHER_ATTENTION = {  # of old scripts that convert from diffusers: they renamed the attention of a VAE, but not its layers
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v",
    "proj_attn": "proj_out", "group_norm": "norm",
}  # fmt: skip
_DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def original_names(component: str, config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return the original name, without the prefix, of each of a component's tensors by its diffusers name.

    Args:
        component: "unet", "vae" or "text_encoder". `config` is its config.json.
    """
    if component == "unet":
        cfg = UNetConfig.from_diffusers(config)
        return {name: _unet_name(name, cfg) for name in names}
    if component == "vae":
        return {name: _vae_name(name, len(config.get("block_out_channels", (64,)))) for name in names}
    return {name: name for name in names}


def usual_name(name: str) -> str:
    """Return the usual name, in the original layout, of a tensor of a single file, with its prefix."""
    prefix = next((prefix for prefix in _OTHER_PREFIXES if name.startswith(prefix)), None)
    if prefix:
        name = _OTHER_PREFIXES[prefix] + name.removeprefix(prefix)
    match = re.fullmatch(r"(.*(?:en|de)coder\.mid\.attn_1\.)(.+)\.(weight|bias)", name)
    return f"{match[1]}{_OTHER_ATTENTION.get(match[2], match[2])}.{match[3]}" if match else name


def _unet_name(name: str, cfg: UNetConfig) -> str:
    stem, _, leaf = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?([a-z]+)\.(\d+)\.(.+)", name)
    assert match, name

    direction, level, kind, index, tail = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        layer, _, leaf = tail.partition(".")
        tail = f"{_RESNET[layer]}.{leaf}"
    if direction == "mid":
        return f"middle_block.{_MID[f'{kind}.{index}']}{tail}"

    blocks_per_level = cfg.layers_per_block + 1
    if direction == "down":
        number = 1 + level * blocks_per_level + (cfg.layers_per_block if kind == "downsamplers" else index)
        return f"input_blocks.{number}." + {"resnets": "0.", "attentions": "1."}.get(kind, "0.op.") + tail.removeprefix("conv.")
    if kind == "upsamplers":
        attends = cfg.attention[len(cfg.attention) - 1 - level]
        return f"output_blocks.{level * blocks_per_level + cfg.layers_per_block}.{2 if attends else 1}.{tail}"
    return f"output_blocks.{level * blocks_per_level + index}." + {"resnets": "0.", "attentions": "1."}[kind] + tail


def _vae_name(name: str, levels: int) -> str:
    for current, original in _VAE.items():
        name = name.replace(current, original)
    return re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)


def ema_name(original: str) -> str:
    """Return the name of a UNet weight's EMA. `original` is the weight's original name without the prefix."""
    return f"{EMA}diffusion_model{original.replace('.', '')}"


def current_vae_name(name: str) -> str:
    """Return the name of a VAE weight in diffusers since 0.17. Older versions have other names for the attention's layers."""
    match = re.fullmatch(r"(.+\.attentions\.\d+\.)(query|key|value|proj_attn)(\..+)", name)
    return f"{match[1]}{_DEPRECATED[match[2]]}{match[3]}" if match else name
