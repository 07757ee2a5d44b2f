"""Checksums of tensors on a device, for checks of the hardware."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BITS = {2: torch.int16, 4: torch.int32}


def bit_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Add the bits of 16-bit and 32-bit numbers as whole numbers, of which the order of a sum changes nothing.

    Returns:
        0-dim int64 on the device of the tensors, of which there is at least one.
    """
    return torch.stack([tensor.view(_BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors]).sum()
