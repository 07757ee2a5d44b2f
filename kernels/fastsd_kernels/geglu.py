"""GEGLU: a gated linear unit with an exact (erf) GELU.

    y = value * gelu(gate)        x = [value | gate] along the last dimension, value first
    gelu(g) = g * (1 + erf(g / sqrt 2)) / 2

Shapes: any leading dimensions, 2F features in, F out.  Bytes moved at best: forward 2F read, F written a row.
The tanh approximation is another function; models trained with erf need erf.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu_reference(x_2F: Tensor) -> Tensor:
    """GEGLU of the last dimension: (..., 2F) -> (..., F), value first, gate second.

    Raises:
        ValueError: the last dimension is odd.

    Source: Shazeer 2020, "GLU variants improve transformer", equation 6.
    """
    if x_2F.shape[-1] % 2:
        raise ValueError(f"geglu: the last dimension of {tuple(x_2F.shape)} is odd; it must hold a value and a gate half")
    value, gate = x_2F.chunk(2, dim=-1)
    return value * F.gelu(gate)
