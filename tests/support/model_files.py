"""Model files, and ways to damage them."""

import json
import shutil

from fastsd.model.weights import diffusers_state_dict
from fastsd.storage import write_safetensors


def single_file(path, model):
    """Write a model as a single file in the original layout, with the VAE's attention weights as 1x1 convolutions."""
    unet = diffusers_state_dict(model.unet)
    names = original_names(unet, model.unet.cfg)
    tensors = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in unet.items()}
    levels = len(model.vae.module.config.block_out_channels)
    for name, tensor in model.vae.module.state_dict().items():
        is_projection = "attentions" in name and tensor.ndim == 2
        tensors[f"first_stage_model.{original_vae_name(name, levels)}"] = tensor[:, :, None, None] if is_projection else tensor
    for name, tensor in model.text.module.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    write_safetensors(path, tensors)


def spoil(folder, target, change):
    """Copy a folder, apply `change` to the copy and return its path."""
    shutil.copytree(folder, target)
    change(target)
    return str(target)


def edit_json(name, **values):
    """Return a `change` for `spoil` that sets values in a JSON file."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def original_names(names, cfg):
    """Map diffusers' UNet names to those of the original layout. The rules are independent of fastsd's converter."""
    layers = cfg.layers_per_block
    levels = len(cfg.block_out_channels)
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    top = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
           "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    out = {}
    for name in names:
        stem, leaf = name.rsplit(".", 1)
        parts = name.split(".")
        if stem in top:
            out[name] = f"{top[stem]}.{leaf}"
        elif parts[0] == "mid_block":
            index = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(parts[1:3])]
            rest = ".".join(parts[3:]) if parts[1] == "attentions" else f"{resnet[parts[3]]}.{leaf}"
            out[name] = f"middle_block.{index}.{rest}"
        elif parts[0] == "down_blocks":
            level, kind, i = int(parts[1]), parts[2], int(parts[3])
            index = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else i)
            rest = {"resnets": f"0.{resnet.get(parts[4])}.{leaf}", "attentions": "1." + ".".join(parts[4:]),
                    "downsamplers": f"0.op.{leaf}"}[kind]  # fmt: skip
            out[name] = f"input_blocks.{index}.{rest}"
        else:
            level, kind, i = int(parts[1]), parts[2], int(parts[3])
            attends = cfg.attention[levels - 1 - level]
            index = level * (layers + 1) + (layers if kind == "upsamplers" else i)
            rest = {"resnets": f"0.{resnet.get(parts[4])}.{leaf}", "attentions": "1." + ".".join(parts[4:]),
                    "upsamplers": f"{2 if attends else 1}.conv.{leaf}"}[kind]  # fmt: skip
            out[name] = f"output_blocks.{index}.{rest}"
    return out


def original_vae_name(name, levels):
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm").replace("conv_norm_out", "norm_out")
    for ours, original in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        name = name.replace(f"mid_block.attentions.0.{ours}", f"mid.attn_1.{original}")
    for i in range(levels):
        name = name.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
    name = name.replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
