"""Memory counters: bytes saved for backward, and live bytes at the peak with their owners.

Both count storages, not tensors, so a view costs nothing.  They work on real, meta and fake tensors alike, so a plan
(`plan.py`) and a measurement share one implementation.  Only `torch.cuda.max_memory_allocated` gives the true peak on a GPU,
with the scratch memory that a library allocates and frees within one operation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_for_backward_bytes(run: Callable[[], object], *modules: nn.Module) -> int:
    """Count the bytes of distinct storages that autograd saves while `run()` executes, without the modules' parameters.

    The inputs of a checkpointed function are counted, but not the tensors that its recomputation saves.
    """
    parameters = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    # Hold every storage until the end, because the address of a freed one may be reused.
    saved_storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved_storages[storage._cdata] = storage
        # Detach, because a saved output would form a reference cycle with its autograd node.
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved_storages.values())


def main_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of main memory that are free for this process. In a container, its limit counts.

    Source: Linux, "Control Group v2". What the kernel caches of inactive files is free when it is needed.
    """
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, no limit ("max"), or another system
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["inactive_file"]))
    return max(0, free)


def count_failed_allocations(device: torch.device) -> int:
    """Count the allocations that have failed on a GPU, also those after which a library found another way.

    With `deterministic = False`, cuDNN tries algorithms that need more memory than there is, and nothing is promised.
    """
    if device.type != "cuda" or not torch.backends.cudnn.deterministic:
        return 0
    return int(torch.cuda.memory_stats_as_nested_dict(device).get("num_ooms", 0))


class DirectMode(TorchDispatchMode):
    """A dispatch mode that PyTorch calls directly. It imports its compiler for others, and calls them through it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class LiveBytes(DirectMode):
    """Context manager that tracks every storage allocated on one device inside the block until it is freed.

    Args:
        device: the device to count; storages on other devices are ignored.

    Attributes:
        now: live bytes.
        peak: maximum of `now` since the start or the last `restart`.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.device(device)
        self.now = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}  # address -> (storage, its number)
        self._sizes: list[int] = []  # bytes by number
        self._events: list[int] = []  # n: storage number n was allocated; -n - 1: it was freed
        self._peak_event = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _returns_aliases(func):
            results = (result,) if isinstance(result, Tensor) else tree_leaves(result)
            self.count(*(leaf for leaf in results if isinstance(leaf, Tensor)))
        return result

    def count(self, *tensors: Tensor) -> None:
        """Also track these tensors, from before the block. Tensors on other devices or already tracked are skipped."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.device == self.device and tensor not in self:
                self._track(storage)

    def __contains__(self, tensor: Tensor) -> bool:
        """Return True if the tensor's storage is tracked."""
        return tensor.untyped_storage()._cdata in self._alive

    def restart(self) -> None:
        """Reset the peak to the bytes that are live now."""
        self.peak, self._peak_event = self.now, len(self._events)

    def at_peak(self, owners: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
        """Return the live bytes at the peak by owner, and the rest as "other". The tensors in `owners` must still be alive."""
        owner_by_number = {
            self._alive[tensor.untyped_storage()._cdata][1]: owner
            for owner, tensors in owners.items()
            for tensor in tensors
            if tensor in self
        }
        bytes_by_owner = {**dict.fromkeys(owners, 0), "other": 0}
        for event in self._events[: self._peak_event]:
            number = event if event >= 0 else -event - 1
            bytes_by_owner[owner_by_number.get(number, "other")] += self._sizes[number] if event >= 0 else -self._sizes[number]
        return bytes_by_owner

    def _track(self, storage: torch.UntypedStorage) -> None:
        address, number = storage._cdata, len(self._sizes)
        self._alive[address] = weakref.ref(storage, lambda _: self._untrack(address)), number
        self._sizes.append(storage.nbytes())
        self._events.append(number)
        self.now += self._sizes[number]
        if self.now > self.peak:
            self.restart()

    def _untrack(self, address: int) -> None:
        _, number = self._alive.pop(address)
        self._events.append(-number - 1)
        self.now -= self._sizes[number]


@cache
def _returns_aliases(func: Any) -> bool:
    """Return True if all results are views of operands or modified operands: their storages may be older than the block."""
    return all(value.alias_info for value in func._schema.returns)
