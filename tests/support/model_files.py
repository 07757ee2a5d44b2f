"""Model files as other tools write them, and ways to damage them."""

import json
import shutil
from io import StringIO

import torch
from safetensors.torch import load_file
from tiny import make_tiny_model, tiny_vae

from fastsd.commands.convert import ConvertOptions, convert
from fastsd.model.latent_space import SD15_SCALING_FACTOR
from fastsd.model.unet import UNetConfig
from fastsd.model.weights import diffusers_state_dict
from fastsd.storage import write_safetensors
from fastsd.terminal.console import Console

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}  # fmt: skip


def make_small_sd15(folder):
    """Write a small model with SD1.5's numbers of heads and norm groups, and its scaling factor. Return it."""
    cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=64)
    model = make_tiny_model(folder, cfg)
    model.vae.module = tiny_vae(groups=32, width=32, factor=SD15_SCALING_FACTOR)
    model.vae.module.save_pretrained(folder / "vae")
    return model


def converted(name, out, to="", **options):
    """Convert a model, and return the printed text."""
    text = StringIO()
    convert(str(name), out, to, ConvertOptions(**options), Console(file=text, width=9999))
    return text.getvalue()


def states(folder):
    """Return the weights of a diffusers folder by component."""
    return {name: load_file(folder / file) for name, file in FILES.items()}


def assert_same(states, others):
    """Assert that each component has the same names and bits in both models."""
    for component, state in states.items():
        assert state.keys() == others[component].keys()
        assert all(torch.equal(tensor, others[component][name]) for name, tensor in state.items()), component


def original_layout(model):
    """Return the names in a single file of a model's tensors, by component and diffusers' name."""
    unet = original_names(diffusers_state_dict(model.unet), model.unet.cfg)
    names = {("unet", name): f"model.diffusion_model.{original}" for name, original in unet.items()}
    levels = len(model.vae.module.config.block_out_channels)
    for name in model.vae.module.state_dict():
        names["vae", name] = f"first_stage_model.{original_vae_name(name, levels)}"
    for name in model.text.module.state_dict():
        name = f"text_model.{name.removeprefix('text_model.')}"
        names["text_encoder", name] = f"cond_stage_model.transformer.{name}"
    return names


def single_file(path, model):
    """Write a model as a single file in the original layout, with the VAE's attention weights as 1x1 convolutions."""
    text = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in model.text.module.state_dict().items()}
    modules = {"unet": diffusers_state_dict(model.unet), "vae": model.vae.module.state_dict(), "text_encoder": text}
    tensors = {}
    for (component, name), original in original_layout(model).items():
        tensor = modules[component][name]
        is_projection = component == "vae" and "attentions" in name and tensor.ndim == 2
        tensors[original] = tensor[:, :, None, None] if is_projection else tensor
    write_safetensors(path, tensors)


def renamed(state, *replacements):
    """Return the tensors with `old` replaced by `new` in their names, for each pair in turn."""

    def new_name(name):
        for old, new in replacements:
            name = name.replace(old, new)
        return name

    return {new_name(name): tensor for name, tensor in state.items()}


def in_fp8(state, dtype, scale_name=""):
    """Return the weights of linears and convolutions in fp8, with the scales of a tool, and the values that they stand for."""
    tensors, values = {}, {}
    for name, tensor in state.items():
        if tensor.ndim < 2 or not name.startswith(("model.diffusion_model.", "cond_stage_model.")):
            tensors[name] = values[name] = tensor
            continue
        scale = (tensor.abs().max() / 100).reshape(1) if scale_name else torch.ones(1)
        tensors[name] = (tensor / scale).to(dtype)
        values[name] = tensors[name].float() * scale if scale_name else tensors[name].bfloat16()
        if scale_name:
            tensors[name.replace(".weight", scale_name)] = scale
            tensors[name.replace(".weight", ".scale_input")] = torch.ones(1)
    return tensors, values


def with_channels(model, folder, inputs, pipeline):
    """Copy a model as one of another pipeline, and widen the first convolution of its UNet."""
    shutil.copytree(model, folder)
    tensors = load_file(model / FILES["unet"])
    conv_in = tensors["conv_in.weight"]
    extra = torch.linspace(-1, 1, 32 * (inputs - 4) * 9).view(32, inputs - 4, 3, 3)
    write_safetensors(folder / FILES["unet"], tensors | {"conv_in.weight": torch.cat([conv_in, extra], 1)})
    edit_json("unet/config.json", in_channels=inputs)(folder)
    edit_json("model_index.json", _class_name=pipeline)(folder)
    return folder


def zero_snr_folder(model, folder, **settings):
    """Copy a model, with a zero-SNR v-prediction schedule in the copy that diffusers' PNDM does not support."""
    shutil.copytree(model, folder)
    zero_snr = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    edit_json("scheduler/scheduler_config.json", **(zero_snr | settings))(folder)
    return folder


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
