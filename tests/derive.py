"""The workload of a UNet, read off the module itself: it runs on meta tensors and every op and layer notes its shapes."""

from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from fastsd.model.unet import UNet, UNetConfig
from fastsd_kernels import REFERENCE
from fastsd_kernels import workload as w


def derive(cfg: UNetConfig, side: int, tokens: int = 77) -> dict[str, Counter]:
    """{"attention" | "group_norm" | "layer_norm" | "geglu" | "conv" | "linear" | "parameters": Counter of kinds}."""
    found: dict[str, Counter] = {
        k: Counter() for k in ("attention", "group_norm", "layer_norm", "geglu", "conv", "linear", "parameters")
    }

    def attention(q, k, v, *, precision="ieee"):
        found["attention"][w.Attention(q.shape[1], k.shape[1], q.shape[2], q.shape[3])] += 1
        return REFERENCE.attention(q, k, v)

    def group_norm(x, weight, bias, groups, eps, *, silu=False, shift_BC=None):
        found["group_norm"][w.GroupNorm(x.shape[1], x.shape[2], groups, eps, silu, shift_BC is not None)] += 1
        return REFERENCE.group_norm(x, weight, bias, groups, eps, silu=silu, shift_BC=shift_BC)

    def layer_norm(x, weight, bias, eps):
        found["layer_norm"][w.LayerNorm(x.shape[1], x.shape[2], eps)] += 1
        return REFERENCE.layer_norm(x, weight, bias, eps)

    def geglu(x):
        found["geglu"][w.Geglu(x.shape[1], x.shape[2] // 2)] += 1
        return REFERENCE.geglu(x)

    def conv(module, inputs, output):
        kind = w.Conv(module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], output.shape[2])
        found["conv"][kind] += 1

    def linear(module, inputs, output):
        rows = inputs[0].shape[1] if inputs[0].ndim == 3 else 1
        found["linear"][w.Linear(rows, module.in_features, module.out_features)] += 1

    with torch.device("meta"):
        recording = replace(
            REFERENCE, name="recording", attention=attention, group_norm=group_norm, layer_norm=layer_norm, geglu=geglu
        )
        unet = UNet(cfg, recording)
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(conv)
            elif isinstance(module, nn.Linear):
                module.register_forward_hook(linear)
        unet(
            torch.empty(1, cfg.in_channels, side, side),
            torch.zeros(1, dtype=torch.long),
            torch.empty(1, tokens, cfg.cross_attention_dim),
        )
    found["parameters"].update(p.numel() for p in unet.parameters())
    return found
