"""The workload of a UNet, derived from the module: it runs on meta tensors, and the shapes of ops and matmuls are counted."""

from collections import Counter
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastsd.model.unet import UNet, UNetConfig
from fastsd_kernels import REFERENCE
from fastsd_kernels import workload as w


class Matmuls(TorchFunctionMode):
    """Counts convolutions and linear layers. A linear layer over an image is a 1x1 convolution.

    Attributes:
        skip: the channels of the skip connection of the last concatenated image.
    """

    skip = 0

    def __init__(self, counts: dict[str, Counter]):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is F.conv2d:
            outputs, inputs, kernel, _ = args[1].shape
            stride = (kwargs or {}).get("stride", args[3] if len(args) > 3 else 1)
            stride = stride if isinstance(stride, int) else stride[0]
            self.counts["conv"][w.Conv(inputs, outputs, kernel, stride, output.shape[2])] += 1
        elif function is torch.cat and args[0][0].ndim == 4:
            self.skip = args[0][1].shape[1]
        elif function is F.linear and args[0].ndim == 4:
            self.counts["conv"][w.Conv(args[0].shape[3], output.shape[3], 1, 1, output.shape[2])] += 1
        elif function is F.linear:
            rows = args[0].shape[1] if args[0].ndim == 3 else 1
            self.counts["linear"][w.Linear(rows, args[0].shape[-1], output.shape[-1])] += 1
        return output


def derive(cfg: UNetConfig, side: int, tokens: int = 77) -> dict[str, Counter]:
    """Count the kinds of work in one forward of a UNet, as in the tables of `workload`."""
    counts: dict[str, Counter] = {
        k: Counter() for k in ("attention", "group_norm", "layer_norm", "geglu", "conv", "linear", "parameters")
    }
    reference = REFERENCE.forward_backward

    def attention(q, k, v, precision):
        counts["attention"][w.Attention(q.shape[1], k.shape[1], q.shape[2], q.shape[3])] += 1
        return reference.attention(q, k, v, precision)

    def group_norm(images, weight, bias, groups, eps, shift, *, silu, partials):
        (x,), skip = images, matmuls.skip
        counts["group_norm"][w.GroupNorm(x.shape[1], x.shape[2], groups, eps, silu, shift is not None, skip)] += 1
        matmuls.skip = 0
        return reference.group_norm(images, weight, bias, groups, eps, shift, silu=silu)

    def layer_norm(x, weight, bias, eps, residual):
        counts["layer_norm"][w.LayerNorm(x.shape[1], x.shape[2], eps)] += 1
        return reference.layer_norm(x, weight, bias, eps, residual)

    def geglu(x):
        counts["geglu"][w.Geglu(x.shape[1], x.shape[2] // 2)] += 1
        return reference.geglu(x)

    recording = replace(reference, attention=attention, group_norm=group_norm, layer_norm=layer_norm, geglu=geglu)
    matmuls = Matmuls(counts)
    with torch.device("meta"), matmuls:
        unet = UNet(cfg, replace(REFERENCE, name="recording", forward_backward=recording))
        unet(
            torch.empty(1, cfg.in_channels, side, side),
            torch.zeros(1, dtype=torch.long),
            torch.empty(1, tokens, cfg.cross_attention_dim),
        )
    counts["parameters"].update(p.numel() for p in unet.parameters())
    return counts
