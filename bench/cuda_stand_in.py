"""A stand-in for CUDA: code that asks for a GPU runs on the CPU, for tests of behaviour, not of speed or rounding.

    with StandIn() as gpu: ...                                  in a test
    python bench/cuda_stand_in.py [-m] SCRIPT ARGUMENT ...      a script or module in a process with one GPU

Tensors on the GPU are CPU tensors whose storages the stand-in has registered.  A function mode answers `tensor.device` and
turns requests for a GPU into the CPU's.  A dispatch mode registers the outputs of operations on GPU tensors.  As on a GPU:

    capture     executes nothing; a replay runs the recorded operations on the memory of the capture
    memory      storages count until they are freed; a private pool keeps its peak while a graph lives; a limit is enforced.
                Storages are not rounded up, nothing is cached, and libraries use no scratch memory
    waits       a scalar read back, a shape from data, or a blocking copy is counted, warned of, or refused, as
                `set_sync_debug_mode` says, and is an error during a capture
    devices     operations on several devices are refused, and a graph contains those on its own GPU only

Python code inside PyTorch's own functions and custom operators sees CPU tensors.  Triton kernels need TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before kernels are defined, and before PyTorch starts threads, which small tensors only slow down
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}

import torch
import torch.nn.functional as F
from stand_in_graphs import Event, Gpu, Graph, Pool, Stream, tensors_of
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastsd.bench.counters import COPY, kind_of_wait
from fastsd.train import device as devices
from fastsd.train import graph
from fastsd.train.memory import LiveBytes
from fastsd_kernels import REFERENCE

MEMORY = 24 << 30  # bytes of an RTX 4090
_AS_BEFORE = object()  # the device of an operation's outputs is that of its inputs
_COPIES = {"aten::copy_", "aten::_to_copy"}
# These may have operands on several devices.
_MIXED = {*_COPIES, "aten::index", "aten::index_put", "aten::index_put_", "aten::_has_compatible_shallow_copy_type"}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray}
_GETTERS: dict[Any, Callable[[torch.device], object]] = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    Tensor.is_cpu.__get__: lambda device: device.type == "cpu",
    Tensor.get_device: lambda device: -1 if device.index is None else device.index,
}
_HOST_READS = {Tensor.numpy, Tensor.__array__}


class _Thread(threading.local):
    """State of one thread."""

    target: Any = _AS_BEFORE  # of the function that runs: the number of a GPU, or None for main memory


class StandIn:
    """Context manager that replaces `torch.cuda` by GPUs in main memory.

    Attributes:
        calls: the calls of streams and graphs in their order.
        waits: number of times the host waited, by kind.
        capture_options: the options of each capture.
        capture_error: raised at the end of the next capture.
    """

    def __init__(self, count: int = 1, memory: int = MEMORY) -> None:
        self.gpus = [Gpu(memory) for _ in range(count)]
        self.pinned = LiveBytes("cpu")
        self.calls: list[str] = []
        self.waits: Counter[str] = Counter()
        self.graphs: list[weakref.ref[Graph]] = []
        self.capture_options: list[dict[str, Any]] = []
        self.capture_error: Exception | None = None
        self.capturing: Graph | None = None
        self.capture_device = 0
        self.invalid = False  # the capture has failed
        self.sync_mode, self.current = "default", 0
        self.thread = _Thread()
        # Classes, because annotations name them.
        self.classes = {name: type(name, (base,), {"stand_in": self}) for name, base in _CLASSES.items()}
        self.streams = [self.classes["Stream"](i, "current") for i in range(count)]
        self.stack = ExitStack()

    def __enter__(self) -> StandIn:
        for name, function in _torch_cuda(self).items():
            self.stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for name, method in (("_cuda_endAllocateToPool", Pool.end), ("_cuda_releasePool", Pool.release)):
            call = lambda device, pool, method=method: method(pool)  # noqa: E731
            self.stack.enter_context(mock.patch.object(torch._C, name, call, create=True))
        record = lambda tensor, stream: self.calls.append(f"{tuple(tensor.shape)} used by {stream.name}")  # noqa: E731
        self.stack.enter_context(mock.patch.object(Tensor, "record_stream", record))  # it refuses a stand-in of a stream
        library = torch.library.Library("aten", "IMPL")
        self.stack.callback(library._destroy)
        for name, function in (("mm.dtype_out", _wide_mm), ("addmm.dtype_out", _wide_addmm)):
            library.impl(name, function, "CPU")
        self._enter_modes_elsewhere()
        self.stack.enter_context(mock.patch.object(devices, "fastest", lambda device: REFERENCE))
        # PyTorch's profiler would report an error for each operation.
        profile = partial(torch.profiler.profile, activities=[torch.profiler.ProfilerActivity.CPU])
        replaced = lambda *, activities=None, **options: profile(**options)  # noqa: E731
        self.stack.enter_context(mock.patch.object(torch.profiler, "profile", replaced))
        self.stack.enter_context(_Functions(self))
        self.stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def _enter_modes_elsewhere(self) -> None:
        """Activate the function mode in other threads, and in backward functions and hooks, which autograd calls without it."""

        def with_mode(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                active = any(isinstance(mode, _Functions) for mode in _get_current_function_mode_stack())
                with nullcontext() if active else _Functions(self):
                    return function(*args, **kwargs)

            return call

        self.stack.enter_context(mock.patch.object(threading.Thread, "run", with_mode(threading.Thread.run)))
        hooks = torch.autograd.graph.saved_tensors_hooks
        init = hooks.__init__
        set_hooks = lambda hooks, pack, unpack: init(hooks, with_mode(pack), with_mode(unpack))  # noqa: E731
        self.stack.enter_context(mock.patch.object(hooks, "__init__", set_hooks))
        register, node = Tensor.register_post_accumulate_grad_hook, torch.autograd.function.BackwardCFunction
        replace = lambda tensor, hook: register(tensor, with_mode(hook))  # noqa: E731
        self.stack.enter_context(mock.patch.object(Tensor, "register_post_accumulate_grad_hook", replace))
        for name in {"apply", "apply_boxed"} & vars(node).keys():
            self.stack.enter_context(mock.patch.object(node, name, with_mode(getattr(node, name))))

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """Run operations as PyTorch does, without any dispatch mode: a mode that only passes them on takes most of the time."""
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            yield

    def place(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's GPU, or None if it is in main memory or has no data."""
        for i, gpu in enumerate(self.gpus):  # faster than a generator, for every operand of every operation
            if tensor in gpu.live:
                return i
        return None

    def device_of(self, tensor: Tensor) -> torch.device:
        place = self.place(tensor)
        return tensor.device if place is None else torch.device("cuda", place)

    def index(self, device: Any = None) -> int:
        """Return the number of a GPU: the current one if `device` has none."""
        if isinstance(device, int):
            return device
        number = None if device is None else torch.device(device).index
        if number is not None and number >= len(self.gpus):
            raise RuntimeError("CUDA error: invalid device ordinal")
        return self.current if number is None else number

    def pin(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            pinned = tensor.clone()
            self.pinned.count(pinned)
            return pinned

    def wait(self, kind: str) -> None:
        if self.capturing:
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.sync_mode in ("error", 2):
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.sync_mode in ("warn", 1):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        self.waits[kind] += 1

    def synchronize(self, device: Any = None) -> None:
        """Wait for all work. The sync debug mode does not report such an explicit wait, but a capture does not permit it."""
        if self.capturing:
            self.wait("synchronize")

    def function(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function of PyTorch, which may ask for a device."""
        if func in _GETTERS:
            return _GETTERS[func](self.device_of(args[0]))
        if func in _HOST_READS and self.place(args[0]) is not None:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host")
        if func is Tensor.tolist and self.place(args[0]) is not None:
            self.wait(COPY)
        if func is F.scaled_dot_product_attention:  # it creates a mask beside its operands
            with self.outputs_on(self.place(args[0])):
                return func(*args, **kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return self.to(args[0], torch.device("cpu" if func is Tensor.cpu else "cuda"), **kwargs)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.pin_memory:
            return self.pin(args[0])
        if func is Tensor.is_pinned:
            return args[0] in self.pinned
        if func is Tensor.__deepcopy__ and self.place(args[0]) is not None:
            copied = func(*args, **kwargs)
            self.gpus[self.place(args[0]) or 0].allocate(copied, None)
            return copied
        if kwargs.pop("pin_memory", False):
            return self.pin(func(*args, **kwargs))
        device = kwargs.get("device")
        if device is None or getattr(func, "__name__", "") == "_parse_to":
            return func(*args, **kwargs)
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type == "cuda" and func in _FROM_HOST:
            return self.to(func(*args, **{**kwargs, "device": "cpu"}), device)
        on_gpu = device.type == "cuda"
        with self.outputs_on(self.index(device) if on_gpu else None):
            return func(*args, **{**kwargs, "device": "cpu" if on_gpu else device})

    @contextmanager
    def outputs_on(self, place: int | None) -> Iterator[None]:
        before, self.thread.target = self.thread.target, place
        try:
            yield
        finally:
            self.thread.target = before

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        other = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("other", None)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        device = self.device_of(other) if other is not None else device
        return self.to(tensor, device, dtype=dtype, non_blocking=non_blocking, memory_format=memory_format, copy=copy)

    def to(self, tensor: Tensor, device: torch.device | None, copy: bool = False, **options: Any) -> Tensor:
        """Copy a tensor to a device, in another dtype if there is one in `options`, unless it is so already."""
        source = self.place(tensor)
        options = {key: value for key, value in options.items() if value is not None}
        if device is None or device.type not in ("cpu", "cuda"):
            return tensor.to(*([] if device is None else [device]), copy=copy, **options)
        target = self.index(device) if device.type == "cuda" else None
        if source == target and tensor.device.type == "cpu":
            return tensor.to(copy=copy, **options)
        with self.outputs_on(target):
            return tensor.to("cpu", copy=True, **options)

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a dispatched operation, register its outputs, and record it during a capture."""
        inputs = tensors_of((args, kwargs))
        places = [self.place(tensor) for tensor in inputs]
        on_gpus = {place for place in places if place is not None}
        if not on_gpus and self.thread.target in (_AS_BEFORE, None):
            return func(*args, **kwargs)
        place = next(iter(on_gpus), None) if self.thread.target is _AS_BEFORE else self.thread.target
        self._check(func, inputs, places, on_gpus)
        kind = kind_of_wait(func, args, kwargs) if on_gpus else None
        name = func._schema.name
        ends = {place, *places} if name == "aten::_to_copy" else set(places)
        if name in _COPIES and None in ends and len(ends) > 1:
            non_blocking = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            pinned = all(tensor in self.pinned for tensor, end in zip(inputs, places, strict=True) if end is None)
            kind = COPY if not non_blocking or (self.capturing and not pinned) else None
        if kind:
            self.wait(kind)

        graph = self.capturing if {place, *on_gpus} & {self.capture_device} else None
        record = graph.before(func, args, kwargs) if graph else ([], None)
        result = func(*args, **kwargs)
        results = tensors_of(result)
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        new: list[Tensor] = []
        if place is not None:
            for tensor in results:
                if tensor.untyped_storage()._cdata not in input_storages and tensor.device.type == "cpu":
                    self.gpus[place].allocate(tensor, graph.private_pool if graph else None)
                    new.append(tensor)
        if graph:
            graph.after(func, record, results, _Identities(new))
        return result

    def _check(self, func: Any, inputs: list[Tensor], places: list[int | None], on_gpus: set[int]) -> None:
        """Refuse operands on several devices. Scalars may lie in main memory."""
        on_host = [tensor for tensor, place in zip(inputs, places, strict=True) if place is None and tensor.dim()]
        if (len(on_gpus) > 1 and func._schema.name not in _COPIES) or (on_gpus and on_host and func._schema.name not in _MIXED):
            devices = ", ".join(sorted({*(f"cuda:{i}" for i in on_gpus), *(str(tensor.device) for tensor in on_host)}))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {devices} in {func}")

    @contextmanager
    def capture(self, graph: Graph, pool: Pool | None = None, stream: Stream | None = None, **options: Any) -> Iterator[None]:
        """Stand-in for `torch.cuda.graph`."""
        self.calls.append("capture")
        self.capture_options.append(
            {"pool": pool.name or None if pool else None, "stream": stream.name if stream else None, **options}
        )
        graph.private_pool = pool or Pool()
        graph.private_pool.name = graph.private_pool.name or f"pool of {graph.index}"
        self.capture_device = stream.device_index if stream else self.current
        graph.private_pool.graphs.add(graph)
        gpu = self.gpus[self.capture_device]
        if graph.private_pool not in gpu.pools:
            gpu.pools.append(graph.private_pool)
        self.capturing, self.invalid = graph, False
        graph.private_pool.is_allocating = graph.private_pool.is_lost = True
        before, self.streams[self.capture_device] = self.streams[self.capture_device], stream or self.streams[0]
        try:
            yield
        finally:
            self.capturing = None
            with self.inactive():
                graph.end()
            error, self.capture_error = self.capture_error, None
            if self.invalid:
                error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
            if error:
                raise error
            graph.private_pool.is_allocating = graph.private_pool.is_lost = False
            self.streams[self.capture_device] = before


_CLASSES: dict[str, Any] = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph}


def _wide_mm(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """Multiply bf16 matrices into an fp32 one, which PyTorch does on GPUs only."""
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _wide_addmm(
    x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
) -> Tensor:
    return torch.addmm(x, a.to(dtype), b.to(dtype), beta=beta, alpha=alpha, out=out)


class _Identities(list[Tensor]):
    """A list whose `in` compares identities."""

    def __contains__(self, tensor: object) -> bool:
        return any(tensor is other for other in self)


class _Functions(TorchFunctionMode):
    def __init__(self, stand_in: StandIn) -> None:
        super().__init__()
        self.stand_in = stand_in

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.stand_in.function(func, args, dict(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, stand_in: StandIn) -> None:
        super().__init__()
        self.stand_in = stand_in

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise, PyTorch imports its compiler, which takes over a second, and calls this through it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # backward calls this with the function mode active
            return self.stand_in.operation(func, args, kwargs or {})


def _torch_cuda(gpu: StandIn) -> dict[str, Any]:
    """Return the functions of `torch.cuda` that are replaced."""
    name = "NVIDIA GeForce RTX 4090"

    @contextmanager
    def stream(used: Stream) -> Iterator[None]:
        gpu.calls.append(f"enter {used.name}")
        before, gpu.streams[used.device_index] = gpu.streams[used.device_index], used
        try:
            yield
        finally:
            gpu.streams[used.device_index] = before
            gpu.calls.append(f"leave {used.name}")

    @contextmanager
    def device(chosen: Any) -> Iterator[None]:
        before, gpu.current = gpu.current, gpu.index(chosen)
        try:
            yield
        finally:
            gpu.current = before

    def properties(device: Any = None) -> SimpleNamespace:
        memory = gpu.gpus[gpu.index(device)].memory
        # A small cache, because benchmarks fill it again and again.
        sizes = {"total_memory": memory, "multi_processor_count": 128, "L2_cache_size": 1 << 20}
        return SimpleNamespace(name=name, major=8, minor=9, **sizes)

    def limit(fraction: float, device: Any = None) -> None:
        chosen = gpu.gpus[gpu.index(device)]
        chosen.limit = int(fraction * chosen.memory)

    def on(function: Callable[[Gpu], Any]) -> Callable[..., Any]:
        return lambda device=None: function(gpu.gpus[gpu.index(device)])

    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: len(gpu.gpus),
        "is_bf16_supported": lambda *_: True, "manual_seed_all": lambda seed: None, "device": device,
        "current_device": lambda: gpu.current, "set_device": lambda device: setattr(gpu, "current", gpu.index(device)),
        "get_device_name": lambda device=None: name, "get_device_capability": lambda device=None: (8, 9),
        "get_device_properties": properties, "synchronize": gpu.synchronize,
        **gpu.classes, "stream": stream, "current_stream": lambda device=None: gpu.streams[gpu.index(device)],
        "graph": gpu.capture, "graph_pool_handle": Pool, "is_current_stream_capturing": lambda: gpu.capturing is not None,
        "empty_cache": lambda: gpu.calls.append("empty cache"),
        "mem_get_info": on(lambda gpu: (gpu.memory - gpu.reserved(), gpu.memory)),
        "memory_allocated": on(lambda gpu: gpu.live.now), "max_memory_allocated": on(lambda gpu: gpu.live.peak),
        "memory_stats_as_nested_dict": on(lambda gpu: {"num_ooms": gpu.failures}),
        "memory_reserved": on(Gpu.reserved), "max_memory_reserved": on(lambda gpu: max(gpu.live.peak, gpu.reserved())),
        "reset_peak_memory_stats": on(lambda gpu: gpu.live.restart()), "set_per_process_memory_fraction": limit,
        "set_sync_debug_mode": lambda mode: setattr(gpu, "sync_mode", mode), "get_sync_debug_mode": lambda: gpu.sync_mode,
    }  # fmt: skip


def main(words: list[str]) -> None:
    """Run a script or a module with one GPU, as `python` does."""
    graph.WARM_UP = 1  # eager steps prepare a GPU's allocator and libraries, and here are none
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    with StandIn():
        if is_module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
