"""The one function that starts kernels: it runs a kernel on its device, or records the launch for the atlas.

`launch` runs a kernel. Inside `recording(target)` nothing runs: each launch is stored with the very arguments it would have
run with, so the atlas compiles the shipped code and cannot drift from it. Tensors may then be on the meta device.
`architecture` returns the GPU that tiles are chosen for, and `custom_op` registers a kernel's launch with torch.
Read next: `geglu.py`, the shortest kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
import triton
from torch import Tensor

from fastsd_kernels.no_triton import AVAILABLE

P = ParamSpec("P")
R = TypeVar("R")

# The architectures the tables are written for: 3090 is 86, 4090 is 89, 5090 is 120; 80 is A100, 90 is H100 and H200.
ARCHITECTURES = (80, 86, 89, 90, 120)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The function of each operator by its full name. Torch calls it on tensors with data only.
OPERATORS: dict[str, Callable[..., Any]] = {}
# CUDA's limits of a grid's dimensions.
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
# TRITON_INTERPRET=1 runs kernels on CPU tensors, slowly and exactly; Triton reads it when a kernel is defined.
INTERPRETED: bool = AVAILABLE and triton.knobs.runtime.interpret


class Launch(NamedTuple):
    """One recorded launch. `options` holds the constexpr arguments by name and Triton's (num_warps, num_stages, ...)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[object, ...]
    options: dict[str, Any]


class _Recorder:
    """State of `recording`: the target and the recorded launches, or None outside of it."""

    target: int | None = None
    launches: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run `kernel[grid](*arguments, **options)` on the device of its first tensor, or record it inside `recording`.

    Raises:
        ValueError: a grid that CUDA refuses, on any device. What grows with the input belongs into the first dimension.
    """
    if any(n > limit for n, limit in zip(grid, _LARGEST_GRID, strict=False)):
        raise ValueError(
            f"{kernel.__name__}: the grid is {' x '.join(map(str, grid))} programs, but a GPU takes at most "
            f"{' x '.join(map(str, _LARGEST_GRID))}; split the input"
        )
    if _Recorder.launches is not None:
        _Recorder.launches.append(Launch(kernel, grid, arguments, options))
        return
    if not INTERPRETED:
        cache_key(kernel)
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    if device.type == "cuda":
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def cache_key(kernel: Any) -> str:
    """Return the key of a kernel's source in Triton's cache. Called before a kernel is first used, it fixes the key.

    Triton's own depends on what ran before: it counts a function's global constants only if the function already has a key.
    Here functions get their keys before their callers, so that every process looks for a kernel at the same place.
    """
    if kernel.hash is None:
        for name in kernel.fn.__code__.co_names:
            function = kernel.fn.__globals__.get(name)
            if isinstance(function, triton.JITFunction) and function is not kernel:
                cache_key(function)
    return cast(str, kernel.cache_key)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without data, to record a launch with."""
    return torch.empty(shape, dtype=dtype, device="meta")


class CustomOp(Protocol[P, R]):
    """The type of torch's custom operators, which torch leaves untyped."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def register_fake(self, fake: Callable[P, R]) -> object: ...
    def register_autograd(self, backward: Callable[..., object], *, setup_context: Callable[..., None]) -> None: ...


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[P, R]], CustomOp[P, R]]:
    """Register a function as the operator "fastsd::<name>" (`torch.library.custom_op`).

    It takes all arguments by position, because a keyword costs 2 us of host time per call.
    """

    def register(function: Callable[P, R]) -> CustomOp[P, R]:
        OPERATORS[f"fastsd::{name}"] = function
        return cast("CustomOp[P, R]", torch.library.custom_op(f"fastsd::{name}", function, mutates_args=mutates_args))

    return register


@contextmanager
def recording(target: int) -> Iterator[list[Launch]]:
    """Record launches instead of running them, as on a GPU of compute capability `target` (89 is 8.9). Yields their list."""
    before = _Recorder.target, _Recorder.launches
    _Recorder.target, _Recorder.launches = target, []
    try:
        yield _Recorder.launches
    finally:
        _Recorder.target, _Recorder.launches = before


def architecture(device: torch.device) -> int:
    """Return the `ARCHITECTURES` entry to choose tiles for: the device's own, or the nearest that needs no more than it has."""
    if _Recorder.target is not None:
        return _Recorder.target
    if device.type != "cuda":
        return 86  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    if capability in ARCHITECTURES:
        return capability
    return 120 if capability > 120 else 90 if capability > 90 else 86


def require_device(op: str, *tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors (None left out) are on one device on which kernels run."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) != 1:
        raise ValueError(f"{op}: tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device")
    (device,) = devices
    if device.type != "cuda" and not INTERPRETED and _Recorder.launches is None:
        raise ValueError(
            f"{op}: tensors are on {device} and Triton kernels need an NVIDIA GPU; use REFERENCE, or set TRITON_INTERPRET=1 "
            "before the start to run the kernels in Triton's slow interpreter"
        )
