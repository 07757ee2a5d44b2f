"""The trainable parts of a model, each in flat allocations - arenas - of which its parameters are views.

    weights     fp32, tf32: 4 bytes a parameter.  bf16: a bf16 high half, which the forward uses as it is, and a 16-bit low
                half; together they are the exact fp32 master (`fastsd_kernels/arena.py`)
    gradient    of the weights' dtype; fp32 also in bf16 where micro-batches are added up
    state       the optimizer's, in the same layout
    ema         fp32, if there is one

One launch steps a part. Each parameter's gradient is taken as soon as autograd has it: copied into the arena by the first
micro-batch, added by the others, so nothing is ever zeroed; or stepped at once, and then there is no gradient arena.
Changing precision between stages loses no bit, and a frozen part comes back as it was. Read next: `fastsd/train/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fastsd.train.optim import FastOptimizer
from fastsd.train.precision import COMPUTE_DTYPE
from fastsd_kernels.arena import join_master, split_master

ALIGN = 128  # elements: every parameter starts on a 256-byte boundary even in bf16, as matmul libraries like it


class Layout:
    """Where each tensor of a list lies in one flat tensor. The gaps between them are never anything but zero.

    Attributes:
        size: elements of the flat tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._places: list[tuple[torch.Size, tuple[int, ...], int]] = []
        self.size = 0
        for tensor in tensors:
            self._places.append((tensor.shape, torch.empty_like(tensor, device="meta").stride(), self.size))
            self.size += -(-tensor.numel() // ALIGN) * ALIGN

    def view(self, flat: Tensor, i: int) -> Tensor:
        return flat.as_strided(*self._places[i])

    def views(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(*place) for place in self._places]


def computed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a stage computes with in place of fp32 weights: themselves, or their high halves."""
    return weight if dtype == torch.float32 else split_master(weight)[0]


class Part:
    """One module of a model during a stage.

    Args:
        name: "unet" or "text_encoder".
        module: its fp32 module, on the training device.
        trained: names of the parameters that the stage's optimizer steps; for the others no gradient is ever made.
        precision: "fp32", "tf32" or "bf16".
        accumulates: whether a step has several micro-batches.
        arena: whether gradients are collected; if not, `on_gradient` must be set.
        ema: whether to keep an average of the weights.

    Attributes:
        high: the flat weights that the module computes with, or None if nothing is trained.
        low: their low halves in bf16, else None.
        gradient, ema: flat, or None.
        on_gradient: called with (number of the parameter, its gradient) instead of collecting it.
        fresh: whether the next gradients are the first of a step.
    """

    def __init__(
        self, name: str, module: nn.Module, trained: set[str], precision: str, *, accumulates: bool = False, arena: bool = True,
        ema: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.module, self.dtype = name, module, COMPUTE_DTYPE[precision]
        parameters = dict(module.named_parameters())
        self.names = [name for name in parameters if name in trained]
        self.weights = [parameters[name] for name in self.names]
        self.layout = Layout(self.weights)
        self.high: Tensor | None = None
        self.low: Tensor | None = None
        self.gradient: Tensor | None = None
        self._gradients: list[Tensor] = []
        self.ema: Tensor | None = None
        self.on_gradient: Callable[[int, Tensor], None] = self._collect
        self.fresh = True
        # Exact weights of frozen parameters whose low halves wait in main memory.
        self._frozen = {key: parameter for key, parameter in parameters.items() if key not in trained}
        self._frozen_lows: dict[str, Tensor] = {}
        module.requires_grad_(False)
        with torch.no_grad():
            self._freeze()
            if self.weights:
                self._gather(ema)
        if self.weights:
            assert self.high is not None
            if arena:
                wide = self.dtype == torch.float32 or accumulates
                self.gradient = torch.zeros_like(self.high, dtype=torch.float32 if wide else self.dtype)
                self._gradients = self.layout.views(self.gradient)
        self._hooks = [
            weight.requires_grad_().register_post_accumulate_grad_hook(partial(self._arrived, i))
            for i, weight in enumerate(self.weights)
        ]

    def _freeze(self) -> None:
        if self.dtype == torch.float32:
            return
        for name, parameter in self._frozen.items():
            high, low = split_master(parameter.data)
            parameter.data, self._frozen_lows[name] = high, low.cpu()

    def _gather(self, ema: bool) -> None:
        """Move the trained parameters into arenas, one by one: no more than one exists twice."""
        device = self.weights[0].device
        self.high = torch.zeros(self.layout.size, dtype=self.dtype, device=device)
        self.low = torch.zeros_like(self.high, dtype=torch.int16) if self.dtype != torch.float32 else None
        self.ema = torch.zeros_like(self.high, dtype=torch.float32) if ema else None
        for i, weight in enumerate(self.weights):
            view = self.layout.view(self.high, i)
            if self.ema is not None:
                self.layout.view(self.ema, i).copy_(weight.data)
            if self.low is None:
                view.copy_(weight.data)
            else:
                high, low = split_master(weight.data)
                view.copy_(high)
                self.layout.view(self.low, i).copy_(low)
            # In place of the data only: the parameters stay the same objects.
            weight.data = view

    @property
    def trained(self) -> bool:
        return bool(self.weights)

    def optimize(self, make: Callable[..., FastOptimizer]) -> FastOptimizer:
        """The optimizer of this part's arena; `make` takes parameter groups."""
        assert self.high is not None
        lows = [] if self.low is None else [self.low]
        emas = [] if self.ema is None else [self.ema]
        return make([{"params": [self.high], "lows": lows, "emas": emas}])

    def _arrived(self, i: int, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        self.on_gradient(i, gradient)

    def _collect(self, i: int, gradient: Tensor) -> None:
        if self.fresh:
            self._gradients[i].copy_(gradient)
        else:
            self._gradients[i].add_(gradient)

    def widen(self) -> None:
        """From now on a step has several micro-batches: bf16 gradients are to be added up in fp32."""
        if self.gradient is not None and self.gradient.dtype != torch.float32:
            assert self.high is not None
            self.gradient, self._gradients = None, []
            self.gradient = torch.zeros_like(self.high, dtype=torch.float32)
            self._gradients = self.layout.views(self.gradient)

    def owners(self) -> dict[str, list[Tensor]]:
        """The tensors on the device that live as long as the stage: "weights", "gradients", "ema"."""
        frozen = [parameter.data for parameter in self._frozen.values()]
        weights = [t for t in (self.high, self.low) if t is not None]
        return {
            "weights": weights + frozen,
            "gradients": [] if self.gradient is None else [self.gradient],
            "ema": [] if self.ema is None else [self.ema],
        }

    def state(self, only: str = "") -> dict[str, Tensor]:
        """The exact fp32 weights by the module's parameter names, of which `only` is a part."""
        tensors = {name: self._exact(name) for name in self._frozen if only in name}
        if self.high is not None:
            highs = self.layout.views(self.high)
            lows = self.layout.views(self.low) if self.low is not None else [None] * len(highs)
            for name, high, low in zip(self.names, highs, lows, strict=True):
                if only in name:
                    tensors[name] = high if low is None else join_master(high.cpu(), low.cpu())
        return tensors

    def ema_state(self) -> dict[str, Tensor]:
        """The averages, fp32 views by parameter name; empty without an EMA."""
        return {} if self.ema is None else dict(zip(self.names, self.layout.views(self.ema), strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Compute with the averages for a while, in the place of the weights, which wait in main memory and come back as they
        were, bit for bit."""
        assert self.high is not None and self.ema is not None
        weights = torch.empty_like(self.high, device="cpu").copy_(self.high)
        try:
            for view, average in zip(self.layout.views(self.high), self.layout.views(self.ema), strict=True):
                view.copy_(computed(average, self.dtype))
            yield
        finally:
            self.high.copy_(weights)

    def _exact(self, name: str) -> Tensor:
        data = self._frozen[name].data
        return join_master(data.cpu(), self._frozen_lows[name]) if name in self._frozen_lows else data

    def release(self) -> None:
        """End the stage: the module holds its exact fp32 weights again, and no gradients."""
        for hook in self._hooks:
            hook.remove()
        exact = self.state()
        for name, parameter in self.module.named_parameters():
            parameter.data = exact[name].to(parameter.device)
            parameter.grad = None
