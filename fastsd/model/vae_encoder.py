"""The VAE's encoder on an `Ops` table: our own layers with the weights of diffusers' AutoencoderKL.

`VaeEncoder` looks up the submodules of the diffusers module at each call, so moving or casting that module affects the encoder
too. It is for inference only: sums are computed in place, and tensors are freed after their last use.

    x = conv_in(image)
    each level       x = short(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))         short: a 1x1 convolution if widths differ
                     x = conv(x, zeros to the right and below), stride 2              not after the last level
    mid block        a sum as above, x = x + attention(norm(x)), a sum as above
    mean, logvar = quant_conv(conv_out(silu(norm_out(x))))

cuDNN adds a convolution's bias in a separate pass over the output. The Triton table avoids that pass: there, the stored x lacks
a bias `pending`, one number per channel, which the next norm adds as it reads x. Only sums and convolutions lie between a
convolution and a norm. A sum adds the `pending` of both terms. A convolution turns `pending` into another constant per channel,
provided that its padding holds -pending, which represents zero. With other tables `pending` is None, because there the
convolution adds its bias at no cost.

Shapes: B images, C channels, H x W positions; all activations are channels last.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.errors import UserError
from fastsd_kernels import Ops
from fastsd_kernels.attention import attention_reference

# The range to which diffusers' DiagonalGaussianDistribution clamps log variances.
LOGVAR_BOUNDS = (-30.0, 20.0)
_LARGEST_HEAD = 256  # limit of the attention kernels; the VAEs of SD and SDXL have one head of 512
_BLOCK = "DownEncoderBlock2D"  # the only supported type

# A bias that is still to be added to each channel of a tensor, fp32 (C,), or None.
PendingBias = Tensor | None


class VaeEncoder:
    """The encoder and quant_conv of a diffusers AutoencoderKL.

    Args:
        module: the AutoencoderKL. Its config defines widths, depths, groups, and whether it has a quant_conv and attention.
        ops: the implementations of norm and attention.

    Raises:
        UserError: the config has blocks or an activation that the VAEs of Stable Diffusion do not have.
    """

    def __init__(self, module: Any, ops: Ops) -> None:
        self.module, self.ops = module, ops
        self._defers_bias = ops.name == "triton"
        other_blocks = sorted({*module.config.down_block_types} - {_BLOCK})
        if other_blocks or module.config.act_fn != "silu":
            mismatch = ", ".join(other_blocks) or f"act_fn {module.config.act_fn}"
            raise UserError(
                "vae-blocks", f"model.vae: the config has {mismatch}, but only {_BLOCK} with silu is supported; use another VAE"
            )

    def __call__(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Encode channels-last images with the weights' dtype and device. Return the mean and the clamped log variance."""
        encoder = self.module.encoder
        x, pending = self._conv(encoder.conv_in, images_B3HW)
        for block in encoder.down_blocks:
            downsamples = block.downsamplers is not None
            for resnet in block.resnets:
                x, pending = self._resnet(resnet, x, pending, pad=downsamples and resnet is block.resnets[-1])
            if downsamples:
                x, pending = self._conv(block.downsamplers[0].conv, x, pending)

        middle = encoder.mid_block
        x, pending = self._resnet(middle.resnets[0], x, pending)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                self._attend(attention, x, pending)
            x, pending = self._resnet(resnet, x, pending)

        x = encoder.conv_out(self._norm(encoder.conv_norm_out, x, pending))
        if self.module.quant_conv is not None:
            x = self.module.quant_conv(x)
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_BOUNDS)

    def _conv(self, conv: nn.Conv2d, x: Tensor, pending: PendingBias = None) -> tuple[Tensor, PendingBias]:
        """Convolve x + pending. If x has padding, it must hold -pending, which represents zero."""
        if not self._defers_bias or conv.bias is None:
            return conv(x), None
        y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding)
        bias = conv.bias.float()
        return y, bias if pending is None else bias + conv.weight.float().sum((2, 3)) @ pending

    def _norm(self, norm: nn.GroupNorm, x: Tensor, pending: PendingBias, *, silu: bool = True) -> Tensor:
        if x.is_cpu and x.dtype == torch.float32 and not self._defers_bias:
            return _group_norm_by_slabs(x, norm, silu=silu)
        shift = None if pending is None else pending.expand(len(x), -1)
        return self.ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, shift_BC=shift)

    def _resnet(self, resnet: Any, x: Tensor, pending: PendingBias, *, pad: bool = False) -> tuple[Tensor, PendingBias]:
        """Apply a resnet. With `pad`, the result has one more row and column for the convolution of stride 2 that follows."""
        h, h_pending = self._conv(resnet.conv1, self._norm(resnet.norm1, x, pending))
        h = self._norm(resnet.norm2, h, h_pending)  # this statement frees the norm's input before the convolution
        h, h_pending = self._conv(resnet.conv2, h)
        if resnet.conv_shortcut is not None:
            x, pending = self._conv(resnet.conv_shortcut, x, pending)
        pending = None if pending is None or h_pending is None else pending + h_pending
        return (_add_with_padding(h, x, pending) if pad else h.add_(x)), pending

    def _attend(self, attention: Any, x: Tensor, pending: PendingBias) -> None:
        """Add self-attention over all positions to x, in place."""
        B, C, H, W = x.shape
        normed = self._norm(attention.group_norm, x, pending, silu=False).permute(0, 2, 3, 1).reshape(B, H * W, C)
        linears = attention.to_q, attention.to_k, attention.to_v
        q, k, v = (linear(normed).unflatten(2, (attention.heads, -1)) for linear in linears)
        # Head sizes that the kernels do not support use the reference, which is PyTorch's attention.
        head_size = q.shape[3]
        attend = self.ops.attention if head_size <= _LARGEST_HEAD and head_size % 8 == 0 else attention_reference
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        out = attention.to_out[0](attend(q, k, v, precision=precision).reshape(B, H * W, C))
        x.add_(out.view(B, H, W, C).permute(0, 3, 1, 2))


def _group_norm_by_slabs(x: Tensor, norm: nn.GroupNorm, *, silu: bool) -> Tensor:
    """Compute `group_norm_reference` in fp32 on a CPU, for images that are too large for PyTorch's own implementation.

    PyTorch sums all positions of a group one by one in fp32. Each norm then has an error of 1e-5 at 512 x 512, and of 1e-4 at
    1024 x 1024. This function normalises S slabs of a few lines, and corrects for the statistics of the image before SiLU.
    """
    B, C, H, W = x.shape
    G, lines = norm.num_groups, math.gcd(H, 8)
    slabs = x.permute(0, 2, 3, 1).reshape(-1, lines, W, C).permute(0, 3, 1, 2)
    y, mean, rstd = torch.native_group_norm(slabs, None, None, len(slabs), C, lines * W, G, norm.eps)
    mean_BSG, rstd_BSG = mean.double().view(B, -1, G), rstd.double().view(B, -1, G)
    deviation = mean_BSG - mean_BSG.mean(1, keepdim=True)
    image_rstd = (rstd_BSG**-2 + deviation**2).mean(1, keepdim=True).rsqrt()  # includes eps, as each slab's rstd does

    def per_channel(x_BSG: Tensor) -> Tensor:
        return x_BSG.float().view(-1, G).repeat_interleave(C // G, 1)

    scale = per_channel(image_rstd / rstd_BSG) * norm.weight
    shift = per_channel(deviation * image_rstd) * norm.weight + norm.bias
    torch.addcmul(shift[:, :, None, None], y, scale[:, :, None, None], out=y)
    if silu:
        F.silu(y, inplace=True)
    return y.permute(0, 2, 3, 1).view(B, H, W, C).permute(0, 3, 1, 2)


def _add_with_padding(h: Tensor, x: Tensor, pending: PendingBias) -> Tensor:
    """Return h + x with one more row and column that represent zeros, so that padding needs no copy."""
    B, C, H, W = h.shape
    out = torch.empty(B, C, H + 1, W + 1, dtype=h.dtype, device=h.device, memory_format=torch.channels_last)
    zero = torch.zeros(C, dtype=h.dtype, device=h.device) if pending is None else -pending.to(h.dtype)
    out[:, :, H:] = out[:, :, :, W:] = zero[:, None, None]
    torch.add(h, x, out=out[:, :, :H, :W])
    return out
