"""Stages and batches for single steps."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsd.config.schema import StageTable
from fastsd.data.loader import Batch

OPTIMIZERS = {"lion": {"optimizer": "lion", "lr": 1e-3}, "adamw": {"optimizer": "adamw", "lr": 1e-3}, "dlion": {"d0": 1e-4}}


def batches(count: int, size: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (count, size, 77), generator=generator)
    latents = torch.randn(count, size, 4, 16, 16, generator=generator)
    positions = torch.arange(count * size).view(count, size)
    return [Batch(latents[i], ids[i], positions[i], [""] * size) for i in range(count)]


def stage_of(**settings) -> StageTable:
    return StageTable(**{"train": ["unet"], "until": 9, "batch": 4, **settings})


class Elsewhere(TorchDispatchMode):
    """Collects operations on tensors outside the step's device: a CUDA graph cannot contain a copy from or to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[object] = []
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.found.append(func)
        return result
