"""GPUs, streams, events and graphs of the stand-in for CUDA, see `cuda_stand_in.py`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsd.train.memory import LiveBytes

if TYPE_CHECKING:
    from cuda_stand_in import StandIn


class Gpu:
    """One GPU: its live storages, and the private pools of graphs."""

    def __init__(self, memory: int) -> None:
        self.memory = self.limit = memory
        self.live = LiveBytes("cpu")  # all storages on this GPU
        self.pools: list[Pool] = []
        self.failures = 0  # number of allocations beyond the limit

    def reserved(self) -> int:
        return self.live.now + sum(pool.size - pool.live.now for pool in self.pools)

    def allocate(self, tensor: Tensor, pool: Pool | None) -> None:
        size = tensor.untyped_storage().nbytes()
        rise = size if pool is None else max(0, pool.live.now + size - pool.size)
        if self.reserved() + rise > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB.")
        self.live.count(tensor)
        if pool is not None:
            pool.live.count(tensor)


class Pool:
    """Private memory of graphs. It keeps its peak as long as one of them lives, and after a capture that could not end."""

    def __init__(self) -> None:
        self.live, self.graphs = LiveBytes("cpu"), weakref.WeakSet[Graph]()
        self.name = ""  # after its first graph
        self.is_allocating = self.is_lost = False

    @property
    def size(self) -> int:
        return self.live.peak if self.graphs or self.is_lost else self.live.now

    def end(self) -> None:
        """Stand-in for `_cuda_endAllocateToPool`."""
        if not self.is_allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.is_allocating = False

    def release(self) -> None:
        """Stand-in for `_cuda_releasePool`."""
        assert self.is_lost, "the pool of a graph is released twice"
        self.is_lost = False


class Stream:
    stand_in: StandIn

    def __init__(self, device: Any = None, name: str = "side") -> None:
        self.name, self.device_index = name, self.stand_in.index(device)

    def wait_stream(self, other: Stream) -> None:
        self.stand_in.calls.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.stand_in.synchronize()


class Event:
    stand_in: StandIn

    def __init__(self, **options: bool) -> None:
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        self.stand_in.synchronize()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.time - self.time)


class _View:
    """Location of a tensor of a graph: the number of its storage, and its layout in it."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number, self.dtype = number, tensor.dtype
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.layout)


class Graph:
    """Records the operations of a capture on the capture's GPU.

    Like a CUDA graph, it keeps no tensor alive. It knows storages by number, and those it has allocated itself are filled with
    0xFF after the capture.
    """

    stand_in: StandIn

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, list[int | None]]] = []
        self.storages: list[weakref.ref[torch.UntypedStorage]] = []
        self.numbers: dict[int, int] = {}  # address of a storage -> its number
        self.allocated: set[int] = set()  # numbers of the storages from the pool
        self.overwritten: dict[int, Tensor] = {}  # number of a storage from outside -> its bytes before the capture
        self.private_pool: Pool
        self.index = len(self.stand_in.graphs)
        self.stand_in.graphs.append(weakref.ref(self))

    def number(self, tensor: Tensor, *, allocated: bool = False) -> int:
        storage = tensor.untyped_storage()
        if allocated or storage._cdata not in self.numbers:
            self.numbers[storage._cdata] = len(self.storages)
            self.storages.append(weakref.ref(storage))
        return self.numbers[storage._cdata]

    def before(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the arguments of an operation for its record, and save what it overwrites."""
        for tensor in _written(func, args, kwargs):
            number = self.number(tensor)
            if number not in self.allocated and number not in self.overwritten:
                self.overwritten[number] = _bytes(tensor.untyped_storage()).clone()
        return _with_replaced((args, kwargs), Tensor, self._recorded)

    def _recorded(self, tensor: Tensor) -> Any:
        if self.stand_in.place(tensor) is None:  # a launch copies a scalar of the host; pinned memory is read by the replay
            return tensor.clone() if tensor.dim() == 0 else tensor
        return _View(self.number(tensor), tensor)

    def after(self, func: Any, inputs: Any, results: list[Tensor], new: list[Tensor]) -> None:
        numbers = [self.number(tensor, allocated=True) if tensor in new else None for tensor in results]
        self.allocated.update(number for number in numbers if number is not None)
        if not func.is_view:
            self.operations.append((func, inputs, numbers))

    def end(self) -> None:
        """Undo what the operations did, because a capture executes nothing."""
        for number, content in self.overwritten.items():
            _bytes(self._storage(number)).copy_(content)
        for number in self.allocated:
            storage = self.storages[number]()
            if storage is not None:
                _bytes(storage).fill_(255)
        self.overwritten.clear()

    def _storage(self, number: int) -> torch.UntypedStorage:
        storage = self.storages[number]()
        assert storage is not None, "a graph uses memory from outside that was freed"
        return storage

    def replay(self) -> None:
        self.stand_in.calls.append(f"replay {self.index}")
        temporary: dict[int, torch.UntypedStorage] = {}  # storages that have been freed since they were allocated

        def tensor(view: _View) -> Tensor:
            return view.tensor(temporary[view.number] if view.number in temporary else self._storage(view.number))

        with self.stand_in.inactive(), torch.no_grad():
            for func, inputs, numbers in self.operations:
                args, kwargs = _with_replaced(inputs, _View, tensor)
                for result, number in zip(tensors_of(func(*args, **kwargs)), numbers, strict=True):
                    if number is not None:
                        storage = self.storages[number]()
                        if storage is None:
                            temporary[number] = result.untyped_storage()
                        else:
                            _bytes(storage).copy_(_bytes(result.untyped_storage()))

    def reset(self) -> None:
        self.private_pool.graphs.discard(self)

    def pool(self) -> Pool:
        return self.private_pool


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in the arguments or results of an operation. It is faster than PyTorch's pytree."""
    if isinstance(tree, Tensor):
        return [tree]
    tensors = []
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        if isinstance(item, Tensor):
            tensors.append(item)
        elif isinstance(item, (list, tuple, dict)):
            tensors += tensors_of(item)
    return tensors


def _with_replaced(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """Return the arguments of an operation with `function(leaf)` for every leaf of a kind."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([_with_replaced(item, kind, function) for item in tree])
    if isinstance(tree, dict):
        return {key: _with_replaced(item, kind, function) for key, item in tree.items()}
    return tree


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(i, argument.name) for i, argument in arguments if argument.alias_info and argument.alias_info.is_write]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation changes."""
    return tensors_of([args[i] if i < len(args) else kwargs.get(name) for i, name in _written_arguments(func)])
