"""Names of LoRA tensors in every tool that makes LoRAs for SD1.5.

    unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight           current diffusers, and fastsd internally
    base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight     peft
    unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight    diffusers before peft
    lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight         kohya's sd-scripts
    lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight                 with the original layout's names
    lora_unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight         OneTrainer, also `unet.middle_...`
    diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_down.weight           ComfyUI

`lora_A` is the down matrix and `lora_B` the up matrix. In kohya's names, an underscore separates both words and modules. Since
the modules of SD1.5 are known, each name has only one reading.
"""

from __future__ import annotations

import re
from functools import cache

import torch

from fastsd.model.formats.original_names import original_names
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import diffusers_state_dict

# Every linear layer and convolution, prefixed with its component. `\.` stands only where it separates modules.
_MODULES = r"""
    unet\.(?:
        conv_(?:in|out) | time_embedding\.linear_[12]
      | (?:(?:down|up)_blocks\.\d+|mid_block)\.(?:
            resnets\.\d+\.(?:conv[12]|conv_shortcut|time_emb_proj)
          | (?:down|up)samplers\.0\.conv
          | attentions\.\d+\.(?:
                proj_(?:in|out)
              | transformer_blocks\.0\.(?:attn[12]\.to_(?:[qkv]|out\.0)|ff\.net\.(?:0\.proj|2)))))
  | text_encoder\.text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])
"""
_DOTTED = re.compile(_MODULES, re.VERBOSE)
_UNDERSCORED = re.compile(_MODULES.replace(r"\.", "(_)"), re.VERBOSE)
_PREFIXES = {"lora_unet_": "unet_", "lora_te_": "text_encoder_"}  # kohya's prefix -> component and an underscore
# Prefixes of OneTrainer and its OMI format, of ComfyUI, and of SimpleTuner's LyCORIS files -> kohya's prefix. The names that
# follow are diffusers' or the original layout's. Before diffusers' names, `unet.` is diffusers' own prefix.
_DOTTED_PREFIXES = {
    "OneTrainer": {
        "lora_unet.": "lora_unet_", "lora_te.": "lora_te_", "clip_l.": "lora_te_",
        **{f"unet.{block}": f"lora_unet_{block}" for block in ("input_", "middle_", "output_", "time_embed.", "out.")},
    },
    "ComfyUI": {"diffusion_model.": "lora_unet_", "text_encoders.clip_l.transformer.": "lora_te_"},
    "SimpleTuner": {"lycoris_": "lora_unet_"},
}  # fmt: skip
_TENSOR = re.compile(r"(.+?)(?:\.(alpha)|[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight)")
_RENAMES = {  # names of other tools and versions -> current names; applied in this order
    r"^base_model\.model\.": "", r"^text_encoder\.encoder\.": "text_encoder.text_model.encoder.", r"\.processor\.": ".",
    r"self_attn\.to_(q|k|v|out)$": r"self_attn.\1_proj", r"\.to_out$": ".to_out.0",
}  # fmt: skip

# Tensors that a plain LoRA for SD1.5 does not have: kind -> pattern of the name. The first match counts.
_UNSUPPORTED = {
    "LoHa weights": r"\.hada_",
    "LoKr weights": r"\.lokr_",
    "DoRA weights": r"dora_scale|lora_magnitude_vector",
    "OFT weights": r"\boft_",
    "Tucker-decomposed weights": r"\.lora_mid\.",
    "full weight differences": r"\.diff(?:_b)?$",
    "ControlNet weights": r"controlnet|lllite",
    "Flux or SD3 weights": r"^transformer\.|^lora_transformer_|(?:double|single|joint)_(?:transformer_)?blocks|^lora_te3_",
    "SDXL weights": r"^lora_te[12][_.]|^text_encoder_2\.|\bclip_g\.|transformer_blocks[._][1-9]|add_embedding|label_emb",
    "weights of a full model": r"^(?:model\.diffusion_model|cond_stage_model|first_stage_model)\.",
}
# Those of them that `merge.py` reads.
MERGEABLE = ("LoHa weights", "LoKr weights", "DoRA weights", "Tucker-decomposed weights", "full weight differences")


def kohya_name(module: str) -> str:
    """Return kohya's name of a module: "unet.conv_in" -> "lora_unet_conv_in"."""
    underscored = module.replace(".", "_")
    kohya_prefix, component_prefix = next(pair for pair in _PREFIXES.items() if underscored.startswith(pair[1]))
    return kohya_prefix + underscored.removeprefix(component_prefix)


def kohya_module(name: str) -> str | None:
    """Return the module, with its component, that one of kohya's names stands for, or None if SD1.5 has no such module."""
    kohya_prefix, component_prefix = next(pair for pair in _PREFIXES.items() if name.startswith(pair[0]))
    underscored = component_prefix + name.removeprefix(kohya_prefix)
    match = _UNDERSCORED.fullmatch(underscored)
    if match is None:
        return _modules_by_original_name().get(name)
    characters = list(underscored)
    for start, _ in match.regs[1:]:
        if start >= 0:
            characters[start] = "."
    return "".join(characters)


@cache
def _modules_by_original_name() -> dict[str, str]:
    """Return SD1.5's UNet modules by the kohya names that are made from the original layout's names."""
    cfg = UNetConfig.sd15()
    with torch.device("meta"):
        names = [name for name in diffusers_state_dict(UNet(cfg)) if name.endswith(".weight")]
    modules = {}
    for name, original in original_names("unet", cfg.to_diffusers(), names).items():
        module = f"unet.{name.removesuffix('.weight')}"
        if _DOTTED.fullmatch(module):
            modules[kohya_name(f"unet.{original.removesuffix('.weight')}")] = module
    return modules


def parse_name(name: str) -> tuple[str, str] | None:
    """Return the module, with its component, and the role of a LoRA tensor: "A", "B" or "alpha". None if it is unknown."""
    layer, role = split_name(name) or ("", "")
    module = module_of(layer) if layer else None
    return (module, role) if module else None


def split_name(name: str) -> tuple[str, str] | None:
    """Return the layer, as its tool names it, and the role of a LoRA tensor. None for any other tensor."""
    match = _TENSOR.fullmatch(name)
    return match and (match[1], match[2] or {"down": "A", "up": "B"}.get(match[3], match[3]))


def module_of(name: str) -> str | None:
    """Return the module, with its component, that a layer's name in any tool stands for. None if SD1.5 has no such module."""
    kohya = kohya_form(name)
    return kohya_module(kohya) if kohya else _dotted_module(name)


def kohya_form(name: str) -> str | None:
    """Return a layer's name with kohya's prefix and underscores, or None if it has the names of diffusers or peft."""
    if name.startswith(tuple(_PREFIXES)):
        return name
    prefixes = {prefix: kohya for table in _DOTTED_PREFIXES.values() for prefix, kohya in table.items()}
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    return prefix and prefixes[prefix].replace(".", "_") + name.removeprefix(prefix).replace(".", "_")


def _dotted_module(name: str) -> str | None:
    for old, new in _RENAMES.items():
        name = re.sub(old, new, name)
    candidates = (prefix + name for prefix in ("", "unet.", "text_encoder.", "text_encoder.text_model."))
    return next((candidate for candidate in candidates if _DOTTED.fullmatch(candidate)), None)


def kind_of(name: str) -> str:
    """Return the naming scheme of a tensor's name: "kohya", "peft", "diffusers", "older diffusers", or another tool."""
    if name.startswith(tuple(_PREFIXES)):
        return "kohya"
    for tool, prefixes in _DOTTED_PREFIXES.items():
        if name.startswith(tuple(prefixes)):
            return tool
    if name.startswith("base_model.model."):
        return "peft"
    return "diffusers" if re.search(r"\.lora_[AB]\.", name) else "older diffusers"


def unsupported_kind(name: str) -> str | None:
    """Return the kind of a tensor that a plain LoRA for SD1.5 cannot have, such as "SDXL weights", or None for any other."""
    return next((kind for kind, pattern in _UNSUPPORTED.items() if re.search(pattern, name)), None)
