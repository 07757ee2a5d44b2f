"""3x3 convolutions with padding 1 as matmuls: the faster way for wide layers on a CPU.

oneDNN converts a convolution's weight to its own layout at every call, which takes longer than the products if positions are
few. Its weight gradient in channels last runs at a third to a half of the matmul rate with AVX2, and below it with AVX-512.
A matmul needs neither. There are two ways to one:

    columns   the 9 neighbours of each position side by side, (N, 9C), in one matmul. The copy is small if positions are few.
    taps      images in rows with zeros between lines and between images. The rows that a tap reads are then consecutive, so its
              operand is a view. Nine matmuls without a copy, each over (H + 1) (W + 1) / (H W) of the positions.

LOG.md has the times of all of SD1.5's shapes, from which the limits below come. The results do not depend on the processor
more than a matmul's do.

Shapes: B images, C input and F output channels, H x W positions, N = B H W; all images are channels last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many channels, a weight is converted in no time.
_WIDE = 256


def prefers_columns(x_BCHW: Tensor, weight_FC33: Tensor) -> bool:
    """Return True if output and input gradient are faster from columns: there are four channels to a position."""
    return _is_wide(x_BCHW, weight_FC33) and 4 * _positions(x_BCHW) <= min(weight_FC33.shape[:2])


def prefers_matmul_gradient(x_BCHW: Tensor, weight_FC33: Tensor) -> bool:
    """Return True if `weight_gradient` is faster than oneDNN: always in fp32, in bf16 from columns only."""
    return _is_wide(x_BCHW, weight_FC33) and (x_BCHW.dtype == torch.float32 or _has_few_positions(x_BCHW, weight_FC33))


def _is_wide(x_BCHW: Tensor, weight_FC33: Tensor) -> bool:
    return x_BCHW.is_cpu and min(weight_FC33.shape[:2]) >= _WIDE


def _has_few_positions(x_BCHW: Tensor, weight_FC33: Tensor) -> bool:
    return _positions(x_BCHW) <= min(weight_FC33.shape[:2])


def _positions(x_BCHW: Tensor) -> int:
    return x_BCHW.numel() // x_BCHW.shape[1]


def output(x_BCHW: Tensor, weight_FC33: Tensor, bias_F: Tensor | None) -> Tensor:
    """Compute the convolution (B, F, H, W) from columns."""
    return F.linear(_columns(x_BCHW), _matrix(weight_FC33), bias_F).permute(0, 3, 1, 2)


def input_gradient(dy_BFHW: Tensor, weight_FC33: Tensor) -> Tensor:
    """Compute dx (B, C, H, W): the gradients of the columns, which are then added to their positions in fp32."""
    B, _, H, W = dy_BFHW.shape
    dcolumns = (dy_BFHW.permute(0, 2, 3, 1) @ _matrix(weight_FC33)).unflatten(3, (3, 3, -1))
    dx = torch.zeros(B, H + 2, W + 2, weight_FC33.shape[1])
    for i in range(3):
        for j in range(3):
            dx[:, i : i + H, j : j + W] += dcolumns[:, :, :, i, j]
    return dx[:, 1:-1, 1:-1].to(dy_BFHW.dtype).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def weight_gradient(dy_BFHW: Tensor, x_BCHW: Tensor, weight_FC33: Tensor) -> Tensor:
    """Compute dweight (F, C, 3, 3), channels last, from columns if positions are few, else from taps."""
    dy_BHWF = dy_BFHW.permute(0, 2, 3, 1)
    dweight_F33C = torch.empty_like(weight_FC33, memory_format=torch.channels_last).permute(0, 2, 3, 1)
    if _has_few_positions(x_BCHW, weight_FC33):
        torch.mm(dy_BHWF.flatten(0, 2).t(), _columns(x_BCHW).flatten(0, 2), out=dweight_F33C.view(len(weight_FC33), -1))
        return dweight_F33C.permute(0, 3, 1, 2)

    B, C, H, W = x_BCHW.shape
    pitch = W + 1
    images = B * (H + 1) * pitch
    x_rows = x_BCHW.new_zeros(images + pitch + 1, C)  # a line of zeros before each image and after the last
    x_rows[:images].view(B, H + 1, pitch, C)[:, 1:, 1:] = x_BCHW.permute(0, 2, 3, 1)
    used = images - pitch - 1  # the rows after the last position are zeros
    dy_rows = F.pad(dy_BHWF, (0, 0, 0, 1, 0, 1)).flatten(0, 2)[:used].t()
    for i in range(3):
        for j in range(3):
            first = i * pitch + j
            torch.mm(dy_rows, x_rows[first : first + used], out=dweight_F33C[:, i, j])
    return dweight_F33C.permute(0, 3, 1, 2)


def _columns(x_BCHW: Tensor) -> Tensor:
    """Return the 9 neighbours of each position, (B, H, W, 9C)."""
    padded_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return padded_BHWC.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)


def _matrix(weight_FC33: Tensor) -> Tensor:
    """View a channels-last weight as (F, 9C)."""
    return weight_FC33.permute(0, 2, 3, 1).flatten(1)
