"""GroupNorm over channels-last images, with an optional shift added first and an optional SiLU after.

    y = silu?( (x + shift - mean_g) / sqrt(var_g + eps) * weight + bias )

mean_g and var_g run over the H*W positions and C/groups channels of one image's group, in fp32 whatever the dtype.
The shift is the time embedding of a residual block: one number per image and channel.

Shapes: B images, C channels, H x W positions; memory is channels last, so a position's channels are neighbours.
Bytes moved at best: forward 2 reads and 1 write of x, backward 2 reads of x and dy and 1 write of dx.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_reference(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = False,
    shift_BC: Tensor | None = None,
) -> Tensor:
    """GroupNorm, channels last in and out.

    Args:
        x_BCHW: (B, C, H, W), channels_last.
        weight, bias: (C,).
        groups: must divide C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) to the result.
        shift_BC: (B, C), added to every position of an image before the statistics are taken.

    Returns:
        (B, C, H, W), channels_last, in the dtype of x.

    Raises:
        ValueError: groups do not divide C, or a shape that does not fit.

    Source: Wu and He 2018, equation 1.
    """
    channels = x_BCHW.shape[1]
    if x_BCHW.ndim != 4 or channels % groups or weight.shape != (channels,):
        raise ValueError(f"group_norm: x {tuple(x_BCHW.shape)}, weight {tuple(weight.shape)}, {groups} groups do not fit")
    if shift_BC is not None:
        if shift_BC.shape != x_BCHW.shape[:2]:
            raise ValueError(f"group_norm: shift is {tuple(shift_BC.shape)}; it must be {tuple(x_BCHW.shape[:2])}")
        x_BCHW = x_BCHW + shift_BC[:, :, None, None]
    y = F.group_norm(x_BCHW, groups, weight, bias, eps)
    if silu:
        y = F.silu(y)
    # PyTorch's CUDA kernel returns the other layout.
    return y.contiguous(memory_format=torch.channels_last)
