"""Adapters that change what a model predicts."""

import torch

from fastsd.config.schema import LoraTable
from fastsd.model.model import Model


def move(model: Model, size: float = 0.1) -> None:
    """Fill `up` with random numbers. It starts at zero, where an adapter changes nothing."""
    generator = torch.Generator().manual_seed(1)
    for module in (model.unet, model.text.module):
        for name, p in module.named_parameters():
            if ".lora_B." in name:
                p.data = size * torch.randn(p.shape, generator=generator)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a result."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


BOTH = LoraTable(
    rank=3, alpha=4.5, conv=2, text_encoder=True, targets=["attention", "feed_forward", "proj_in", "conv_shortcut"]
)
