"""LayerNorm over the last dimension.

    y = (x - mean) / sqrt(var + eps) * weight + bias        mean and var over one row's F numbers, in fp32

Shapes: any leading dimensions, F features.  Bytes moved at best: forward 1 read and 1 write of x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of the last dimension: (..., F) -> (..., F) in the dtype of x; weight and bias are (F,).

    Raises:
        ValueError: weight or bias do not match the last dimension.

    Source: Ba, Kiros and Hinton 2016, equation 4.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"layer_norm: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
