"""UNets of SD1.5's structure: one at full size, without data, and a small one."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsd.model.shapes import materialize
from fastsd.model.unet import UNetConfig
from fastsd.train.memory import saved_for_backward_bytes


def full_size(make, data: bool = False, dtype: torch.dtype = torch.float32, side: int = 64, width: int = 768) -> int:
    """Return the bytes that a UNet, by default of SD1.5's size, saves for the backward of one image, by default of 512 px.

    Tensors have no values unless `data` is True.
    """
    with torch.device("meta"):
        unet = make().to(dtype)
    with contextlib.nullcontext() if data else FakeTensorMode():
        materialize(unet, torch.device("cpu"))
        x, context = torch.zeros(1, 4, side, side, dtype=dtype), torch.zeros(1, 77, width, dtype=dtype)
        return saved_for_backward_bytes(lambda: unet(x, torch.zeros(1), context), unet)


CFG = UNetConfig(
    block_out_channels=(16, 16),
    attention=(False, True),
    layers_per_block=1,
    heads=2,
    cross_attention_dim=16,
    norm_groups=4,
    sample_size=4,
)
