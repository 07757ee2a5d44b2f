"""Memory, counted - what autograd keeps for a backward, and how many bytes live at the worst moment and whose.

Both count storages, not tensors: views are free. They work on real, meta and fake tensors alike, so that a plan (`plan.py`)
and a measurement are one code. On a GPU the peak as it was is `torch.cuda.max_memory_allocated`; the scratch that a library
takes and gives back within one operation shows there only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_for_backward(run: Callable[[], object], *modules: nn.Module) -> int:
    """Bytes of all different storages that autograd stores while `run()` executes, those of the modules' parameters left out.

    What a checkpointed function stores while it is computed again is not counted, its inputs are.
    """
    parameters = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    # Held until the end: a freed storage's address may become another one's.
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            found[storage._cdata] = storage
        # Not the tensor itself: an output that is saved would hold the node that holds it, for ever.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in found.values())


class LiveBytes(TorchDispatchMode):
    """Follows every storage born on one device inside the `with` block, from birth to death.

    Args:
        device: others are not counted.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once, since the start or `restart`.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.now = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # address -> storage, its number
        self._sizes: list[int] = []  # bytes by number
        self._events: list[int] = []  # n: number n was born; -n - 1: it died
        self._peak_event = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _gives_back(func):
            self.count(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)))
        return result

    def count(self, *tensors: Tensor) -> None:
        """Follow these, too: tensors from before the block. Those of other devices, and what is followed already, are left."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == self.device and storage._cdata not in self._alive:
                self._born(storage)

    def restart(self) -> None:
        """Begin the peak anew."""
        self.peak, self._peak_event = self.now, len(self._events)

    def at_peak(self, owners: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
        """Bytes alive at the peak by owner, and "other": what belongs to none of the tensors named, which must still live."""
        whose = {
            self._alive[tensor.untyped_storage()._cdata][1]: owner
            for owner, tensors in owners.items()
            for tensor in tensors
            if tensor.untyped_storage()._cdata in self._alive
        }
        split = {**dict.fromkeys(owners, 0), "other": 0}
        for event in self._events[: self._peak_event]:
            number = event if event >= 0 else -event - 1
            split[whose.get(number, "other")] += self._sizes[number] if event >= 0 else -self._sizes[number]
        return split

    def _born(self, storage: torch.UntypedStorage) -> None:
        address, number = storage._cdata, len(self._sizes)
        self._alive[address] = weakref.ref(storage, lambda _: self._died(address)), number
        self._sizes.append(storage.nbytes())
        self._events.append(number)
        self.now += self._sizes[number]
        if self.now > self.peak:
            self.restart()

    def _died(self, address: int) -> None:
        _, number = self._alive.pop(address)
        self._events.append(-number - 1)
        self.now -= self._sizes[number]


@cache
def _gives_back(func: Any) -> bool:
    """Whether all results are views of operands, or operands written in place: not new, though maybe from before the block."""
    return all(value.alias_info for value in func._schema.returns)
