"""Floor 2: the trainable parts of a model - compute weights, exact fp32 masters, gradients.

In fp32 and tf32 a part's parameters are its masters. In bf16 the module is cast down and the fp32 originals stay beside
it: gradients are added up there in fp32, the optimizer steps them, and the result is rounded into the module. So changing
precision between stages loses no bit, and a frozen part comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastsd.train.precision import COMPUTE_DTYPE


class Part:
    """One module of a model during a stage.

    Args:
        name: "unet" or "text_encoder".
        module: its fp32 module, on the training device.
        trained: whether the stage's optimizer steps it; otherwise no gradient is ever made.
        precision: "fp32", "tf32" or "bf16".
    """

    def __init__(self, name: str, module: nn.Module, trained: bool, precision: str) -> None:
        self.name, self.module, self.trained = name, module, trained
        self.names = [name for name, _ in module.named_parameters()]
        self.weights: list[Tensor] = list(module.parameters())
        self.cast = COMPUTE_DTYPE[precision] != torch.float32
        self.masters: list[Tensor] = [weight.detach().clone() for weight in self.weights] if self.cast else self.weights
        if self.cast:
            # In place of the data only: the parameters stay the same objects.
            for weight in self.weights:
                weight.data = weight.data.to(COMPUTE_DTYPE[precision])
        module.requires_grad_(trained)

    def collect_gradients(self) -> None:
        """Add what the last backward left in the bf16 weights to the masters' gradients (fp32: they are there already)."""
        if not self.cast:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            if weight.grad is not None:
                gradient = weight.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                weight.grad = None

    def gradients(self) -> list[Tensor]:
        return [master.grad for master in self.masters if master.grad is not None]

    def zero_gradients(self) -> None:
        for master in self.masters:
            master.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the stepped masters into the bf16 weights."""
        if self.cast:
            torch._foreach_copy_(self.weights, self.masters)

    def state(self) -> dict[str, Tensor]:
        """The exact fp32 weights by the module's parameter names."""
        return dict(zip(self.names, self.masters, strict=True))

    def release(self) -> None:
        """End the stage: the module holds its exact fp32 weights again, and no gradients."""
        if self.cast:
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.data = master
        for weight in self.weights:
            weight.grad = None


def gradient_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm over all gradients, 0-dim fp32 on their device; not finite if any gradient is not."""
    return torch.stack(torch._foreach_norm(list(gradients))).norm()
