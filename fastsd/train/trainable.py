"""Arenas: flat allocations of a component's parameters, gradients and state. The parameters are views into them.

    weights     fp32, tf32: 4 bytes per parameter.  bf16: a bf16 high half, which the forward uses directly, and a 16-bit low
                half; together they are the exact fp32 master (`fastsd_kernels/arena.py`)
    gradient    in the dtype of the weights, but fp32 if a bf16 component accumulates micro-batches
    state       of the optimizer, in the same layout
    ema         averages of the weights, fp32, an arena for each

One launch updates a component. The matmuls of the UNet's linears write their gradients into the arena; every other gradient
is consumed as soon as autograd produces it. The first gradient of a step overwrites the arena and the others add to it, so
nothing is ever zeroed. A fused backward has no gradient arena: it updates the parameter at once. A change of precision
between stages loses no bit of any weight. No object here is part of a reference cycle, so the memory of a stage is free as
soon as its step is. Read next: `fastsd/train/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastsd.errors import out_of_memory
from fastsd.model.gradient_sink import GradientSink
from fastsd.train.optim import FastOptimizer
from fastsd.train.precision import COMPUTE_DTYPE
from fastsd.train.ranks import Ranks
from fastsd.train.shards import BLOCK, Shards
from fastsd_kernels import Ops
from fastsd_kernels.arena import join_master, split_master

ALIGN = 128  # elements, so that even in bf16 every parameter starts on a 256-byte boundary, as matmul libraries prefer


class Layout:
    """Positions of a list of tensors in one flat tensor. The gaps between them are always zero.

    Args:
        unit: number of elements of which the flat tensor has a multiple.

    Attributes:
        size: number of elements of the flat tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], unit: int = 1) -> None:
        self._locations: list[tuple[torch.Size, tuple[int, ...], int]] = []
        self.size = 0
        for tensor in tensors:
            self._locations.append((tensor.shape, torch.empty_like(tensor, device="meta").stride(), self.size))
            self.size += -(-tensor.numel() // ALIGN) * ALIGN
        self.size = -(-self.size // unit) * unit

    def span(self, i: int) -> tuple[int, int]:
        """Return the first element of tensor number i and the end of its elements."""
        shape, _, start = self._locations[i]
        return start, start + shape.numel()

    def view(self, flat: Tensor, i: int) -> Tensor:
        """Return tensor number i of a flat tensor. Of several flat tensors, stacked, return all its versions, stacked."""
        shape, strides, start = self._locations[i]
        *count, _ = flat.shape
        return flat.as_strided((*count, *shape), (*flat.stride()[:-1], *strides), flat.storage_offset() + start)

    def views(self, flat: Tensor) -> list[Tensor]:
        return [self.view(flat, i) for i in range(len(self._locations))]

    def without_data(self, _: Tensor) -> list[Tensor]:
        """Return fp32 tensors of the shapes of the views."""
        return [torch.empty(shape, device="meta") for shape, _, _ in self._locations]

    def in_memory_order(self, tensor: Tensor, i: int) -> tuple[int, Tensor]:
        """Return the first element of tensor number i, and its values as they lie in the flat tensor."""
        shape, stride, start = self._locations[i]
        values = tensor.new_empty(shape.numel())
        values.as_strided(shape, stride).copy_(tensor)
        return start, values


def compute_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert fp32 weights to the tensor that a stage computes with: unchanged for fp32, their high half for bf16."""
    return weight if dtype == torch.float32 else split_master(weight)[0]


def host_copy(tensor: Tensor, master_lo: Tensor | None = None) -> Tensor:
    """Return a contiguous copy in main memory. With `master_lo`, return the fp32 numbers that the two halves represent.

    A GPU joins and rearranges faster than the host, so this happens there if it has memory for one more tensor of that size.
    """
    try:
        joined = (tensor.detach() if master_lo is None else join_master(tensor.detach(), master_lo)).contiguous()
    except Exception as error:
        if tensor.is_cpu or out_of_memory(error) is None:
            raise
        return host_copy(tensor.cpu(), None if master_lo is None else master_lo.cpu())
    return joined.clone() if joined.data_ptr() == tensor.data_ptr() and joined.is_cpu else joined.cpu()


class GradientArena:
    """Sums of a component's gradients over the micro-batches of a step. Every parameter has a sink.

    Args:
        layout: the component's layout.
        weights: its flat weights.
        dtype: of the sums.

    Attributes:
        flat: the sums, in the component's layout.
    """

    def __init__(self, layout: Layout, weights: Tensor, dtype: torch.dtype) -> None:
        self._layout, self._weights = layout, weights
        self._allocate(dtype)

    def _allocate(self, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(self._layout.size, dtype=dtype, device=self._weights.device)
        self._sinks = list(map(GradientSink, self._layout.views(self._weights), self._layout.views(self.flat)))

    def begin(self) -> None:
        """Begin a step: its first gradients overwrite the sums."""
        for sink in self._sinks:
            sink.empty = True

    def receive(self, i: int, gradient: Tensor) -> None:
        """Add the gradient of parameter number i that autograd has produced."""
        self._sinks[i].add(gradient)

    def widen(self) -> None:
        """Switch to several micro-batches per step. From now on, bf16 gradients are accumulated in fp32."""
        if self.flat.dtype != torch.float32:
            del self.flat, self._sinks  # before the larger arena is allocated
            self._allocate(torch.float32)

    def release(self) -> None:
        """Return the gradients of later backwards to autograd."""
        self._sinks = []


class FusedUpdates:
    """Updates each parameter as soon as its gradient arrives, unless a gradient of the step was not finite.

    Attributes:
        found_inf: 0-dim bool on the device, true after the first loss or gradient of the step that is not finite.
        norms: norms of the step's gradients so far, 0-dim on the device.
    """

    found_inf: Tensor
    norms: list[Tensor]

    def __init__(self, ops: Ops, optimizers: dict[str, FastOptimizer], layouts: dict[str, Layout]) -> None:
        self.ops, self.optimizers, self.layouts = ops, optimizers, layouts

    def begin(self, loss: Tensor) -> None:
        """Start the backward of a step."""
        self.found_inf, self.norms = ~torch.isfinite(loss), []

    def receive(self, name: str, i: int, gradient: Tensor) -> None:
        """Update parameter number i of a component."""
        norm, found_inf = self.ops.gradient_norm([gradient])
        self.found_inf = self.found_inf | found_inf
        self.norms.append(norm)
        layout = self.layouts[name]
        self.optimizers[name].update(gradient, select=lambda flat: layout.view(flat, i), found_inf=self.found_inf)


class TrainableComponent:
    """One component of a model during a stage.

    Args:
        name: "unet" or "text_encoder".
        module: the component's fp32 module, on the training device.
        trained: names of the parameters that the optimizer updates. The others are frozen and have no gradient.
        precision: "fp32", "tf32" or "bf16".
        accumulates: True if a step has several micro-batches.
        arena: collect gradients in an arena. If False, `send_gradients` says who receives them.
        averages: names of the EMAs of the weights to maintain.
        sharing: the ranks between which low halves, EMAs and optimizer state are divided; None = this process has them all.

    Attributes:
        master_hi: the flat weights that the module computes with, or None if nothing is trained.
        master_lo: their flat low halves with bf16, otherwise None.
        gradients: the gradient arena, or None.
        ema: the flat EMA weights (K, size) of the K names in `averages`, or None.
        shards: the division of the arena between the ranks, or None. With shards, `pieces_lo` and `pieces_ema` (K, elements)
            have this rank's pieces of `master_lo` and `ema`, which are None unless they are collected.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        trained: set[str],
        precision: str,
        *,
        accumulates: bool = False,
        arena: bool = True,
        averages: Sequence[str] = (),
        sharing: Ranks | None = None,
    ) -> None:
        self.name, self.module, self.dtype = name, module, COMPUTE_DTYPE[precision]
        parameters = dict(module.named_parameters())
        self.names = [name for name in parameters if name in trained]
        self.weights = [parameters[name] for name in self.names]
        self.layout = Layout(self.weights, sharing.world * BLOCK if sharing else 1)
        self.shards = Shards(self.layout.size, sharing) if sharing and self.weights else None
        self.master_hi: Tensor | None = None
        self.master_lo: Tensor | None = None
        self.gradients: GradientArena | None = None
        self.averages = list(averages) if self.weights else []
        self.ema: Tensor | None = None
        self.pieces_lo: list[Tensor] = []
        self.pieces_ema: list[Tensor] = []
        self._average_everywhere = False
        self._hooks: list[RemovableHandle] = []

        # With bf16, the low halves of frozen parameters stay in main memory.
        self._frozen = {key: parameter for key, parameter in parameters.items() if key not in trained}
        self._frozen_lo: dict[str, Tensor] = {}
        module.requires_grad_(False)
        with torch.no_grad():
            self._split_frozen()
            if self.weights:
                self._move_to_arenas()
        for weight in self.weights:
            weight.requires_grad_()
        if self.master_hi is not None and arena:
            self.gradients = GradientArena(self.layout, self.master_hi, torch.float32 if accumulates else self.dtype)
            self.send_gradients(self.gradients.receive)

    def _split_frozen(self) -> None:
        if self.dtype == torch.float32:
            return
        for name, parameter in self._frozen.items():
            master_hi, master_lo = split_master(parameter.data)
            parameter.data, self._frozen_lo[name] = master_hi, master_lo.cpu()

    def _move_to_arenas(self) -> None:
        """Move the trained parameters into arenas one by one, so that at most one parameter exists twice at a time."""
        device = self.weights[0].device
        self.master_hi = torch.zeros(self.layout.size, dtype=self.dtype, device=device)
        halves, count = self.dtype != torch.float32, len(self.averages)
        if self.shards:
            shares = self.shards.of(self.master_hi)
            self.pieces_lo = [torch.zeros_like(share, dtype=torch.int16) for share in shares if halves]
            self.pieces_ema = [torch.zeros(count, len(share), device=device) for share in shares if count]
        else:
            self.master_lo = torch.zeros_like(self.master_hi, dtype=torch.int16) if halves else None
            self.ema = torch.zeros(count, self.layout.size, device=device) if count else None
        for i, weight in enumerate(self.weights):
            view = self.layout.view(self.master_hi, i)
            for k in range(count):
                self.load_average(k, i, weight.data)
            if not halves:
                view.copy_(weight.data)
            else:
                master_hi, master_lo = split_master(weight.data)
                view.copy_(master_hi)
                self._write(self.master_lo, self.pieces_lo, i, master_lo)
            # Replace only the data, because the parameters must stay the same objects.
            weight.data = view

    def _write(self, flat: Tensor | None, shares: list[Tensor], i: int, tensor: Tensor) -> None:
        """Write tensor number i into a flat tensor, if there is one, and into this rank's pieces."""
        if flat is not None:
            self.layout.view(flat, i).copy_(tensor)
        if shares:
            self.write_pieces(shares, i, tensor)

    def write_pieces(self, shares: list[Tensor], i: int, tensor: Tensor) -> None:
        """Write what this rank has of tensor number i into its pieces."""
        assert self.shards is not None
        self.shards.write(shares, *self.layout.in_memory_order(tensor, i))

    def load_average(self, k: int, i: int, tensor: Tensor) -> None:
        """Restore average number k of parameter number i."""
        self._write(None if self.ema is None else self.ema[k], [share[k] for share in self.pieces_ema], i, tensor)

    def pieces(self, flat: Tensor) -> list[Tensor]:
        """Return what this rank updates of a tensor in the layout of the arena."""
        return self.shards.of(flat) if self.shards else [flat]

    def collect_lows(self, *, everywhere: bool = False) -> None:
        """With shards, gather the low halves in main memory of rank 0, or `everywhere`, until the next step, on all ranks."""
        if self.shards and self.pieces_lo:
            self.master_lo = self.shards.whole(self.pieces_lo, everywhere=everywhere)

    def collect_averages(self, *, everywhere: bool = False) -> None:
        """Gather the EMAs in the same way, unless that has been done."""
        if self.shards and self.pieces_ema and (self.ema is None or everywhere > self._average_everywhere):
            self.ema = None  # freed before the memory for all ranks' copies is allocated
            with self.shards.ranks.allocating():
                ema = self.shards.empty(len(self.averages), everywhere=everywhere)
            for flat, *shares in zip(ema, *self.pieces_ema, strict=True):
                self.shards.whole(shares, everywhere=everywhere, out=flat)
            self.ema = ema
            self._average_everywhere = everywhere

    def drop_collected(self) -> None:
        """Free what was gathered."""
        if self.shards:
            self.master_lo = self.ema = None
            self._average_everywhere = False

    @property
    def trained(self) -> bool:
        return bool(self.weights)

    def optimize(self, make: Callable[..., FastOptimizer]) -> FastOptimizer:
        """Create the optimizer of this component's arena. `make` is called with parameter groups."""
        assert self.master_hi is not None
        lows = self.pieces_lo if self.master_lo is None else [self.master_lo]
        emas = self.pieces_ema if self.ema is None else [self.ema]
        return make([{"params": self.pieces(self.master_hi), "masters_lo": lows, "emas": emas}])

    def send_gradients(self, receive: Callable[[int, Tensor], None]) -> None:
        """Call `receive` with the number of a parameter and its gradient as soon as autograd has produced one."""

        def hook(i: int, weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:  # None: it went to the sink
                receive(i, gradient)

        self._hooks = [weight.register_post_accumulate_grad_hook(partial(hook, i)) for i, weight in enumerate(self.weights)]

    def tensors_by_role(self) -> dict[str, list[Tensor]]:
        """Return the device tensors that live as long as the stage, by role: "weights", "gradients" and "ema"."""
        frozen = [parameter.data for parameter in self._frozen.values()]
        lows, emas = ([self.master_lo], [self.ema]) if self.shards is None else (self.pieces_lo, self.pieces_ema)
        return {
            "weights": [t for t in (self.master_hi, *lows) if t is not None] + frozen,
            "gradients": [] if self.gradients is None else [self.gradients.flat],
            "ema": [t for t in emas if t is not None],
        }

    def state(self, containing: str = "", *, copy: bool = False) -> dict[str, Tensor]:
        """Return the exact fp32 weights by parameter name, of the parameters whose names contain `containing`.

        With `copy`, all are contiguous copies in main memory. Without it, some are views, which change with the next step.
        """
        tensors = {name: self._exact_weight(name) for name in self._frozen if containing in name}
        if copy:
            tensors = {name: host_copy(tensor) for name, tensor in tensors.items()}
        if self.master_hi is not None:
            highs = self.layout.views(self.master_hi)
            lows = self.layout.views(self.master_lo) if self.master_lo is not None else [None] * len(highs)
            for name, master_hi, master_lo in zip(self.names, highs, lows, strict=True):
                if containing not in name:
                    continue
                if copy:  # low halves that other ranks have sent lie in main memory
                    tensors[name] = host_copy(master_hi if master_lo is None else master_hi.to(master_lo.device), master_lo)
                else:
                    tensors[name] = master_hi if master_lo is None else join_master(master_hi.cpu(), master_lo.cpu())
        return tensors

    def ema_state(self) -> dict[str, Tensor]:
        """Return the EMA weights as fp32 views by "AVERAGE/PARAMETER". Empty without an EMA, or if it is not collected."""
        flats = [] if self.ema is None else zip(self.averages, self.ema, strict=True)
        views = {average: zip(self.names, self.layout.views(flat), strict=True) for average, flat in flats}
        return {f"{average}/{name}": view for average, named in views.items() for name, view in named}

    @contextmanager
    def averaged(self, average: str) -> Iterator[None]:
        """Use an average's weights inside the block, if the component has one of that name.

        The weights are kept in main memory, and then restored bit for bit.
        """
        if self.master_hi is None or self.ema is None or average not in self.averages:
            yield
            return
        ema = self.ema[self.averages.index(average)]
        saved_weights = torch.empty_like(self.master_hi, device="cpu").copy_(self.master_hi)
        try:
            for view, ema_view in zip(self.layout.views(self.master_hi), self.layout.views(ema), strict=True):
                view.copy_(compute_weight(ema_view, self.dtype))
            yield
        finally:
            self.master_hi.copy_(saved_weights)

    def _exact_weight(self, name: str) -> Tensor:
        data = self._frozen[name].data
        return join_master(data.cpu(), self._frozen_lo[name]) if name in self._frozen_lo else data

    def release(self) -> None:
        """End the stage on all ranks: restore the module's exact fp32 weights and drop its gradients."""
        for hook in self._hooks:
            hook.remove()
        if self.gradients is not None:
            self.gradients.release()
        self.collect_lows(everywhere=True)
        exact_weights = self.state()
        self.drop_collected()
        for name, parameter in self.module.named_parameters():
            parameter.data = exact_weights[name].to(parameter.device)
            parameter.grad = None
