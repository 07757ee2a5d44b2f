"""Measure time, host waits, launches, memory and FLOPs of a function, and the peak rates of the device.

    host waits    the host needs a device value before it continues: a scalar read back, a tensor copied to the host, an
                  operation with an output shape that depends on input values. Also counted on a CPU, where nothing waits,
                  because the same code waits on a GPU
    launches      kernels on a GPU; on a CPU, operations that compute something
    memory        peak rise during the call; also an estimate by arithmetic, before any memory is allocated
    FLOPs         of the requested matmuls and convolutions; recomputed ones count once

On a CPU, calls are intercepted, which does not work for compiled code. Only explicit copies to the host count there: `.cpu()`,
`.to("cpu")`, `.numpy()`, `.tolist()`. On a GPU, PyTorch's sync debug mode counts the waits and its profiler the kernels.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.config.optimizers import ORIGINALS
from fastsd.config.schema import StageTable
from fastsd.model.unet import UNetConfig
from fastsd.train.memory import LiveBytes
from fastsd.train.optim import optimizer_class
from fastsd.train.precision import COMPUTE_DTYPE

SCALAR, COPY, SHAPE, ANY = "scalar read back", "copy to the host", "shape from data", "wait"
_SCALAR_OPS = {"_local_scalar_dense", "equal", "allclose"}
_SHAPE_OPS = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"}
PACKAGES = ("torch", "triton", "diffusers", "transformers", *ORIGINALS)
_COPY_METHODS = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}
# Bytes saved for backward per image, for SD1.5's shape at 64 x 64 latents in fp32; measured with `fastsd bench memory`.
SAVED_BYTES = {"none": 1009e6, "ff": 640e6, "block": 73e6}
DIFFUSERS_SAVED_BYTES = {"none": 1871e6, "ff": 1871e6, "block": 309e6}
WORKSPACE = 0.5e9  # bytes for PyTorch, its libraries and the largest operation


class _OperationCounter(TorchDispatchMode):
    """Counts operations that compute, and operations that make the host wait."""

    def __init__(self, waits: Counter[str], on_host: Iterable[Tensor]) -> None:
        super().__init__()
        self.waits, self.launches = waits, 0
        self._on_host = {tensor.untyped_storage()._cdata for tensor in on_host}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = kind_of_wait(func, args, kwargs)
        if kind and not (kind == SCALAR and args[0].untyped_storage()._cdata in self._on_host):
            self.waits[kind] += 1
        if not func.is_view and not func._schema.name.startswith("aten::empty"):
            self.launches += 1
        return func(*args, **kwargs)


def kind_of_wait(func: Any, args: Any, kwargs: Any) -> str | None:
    """Return the kind of wait that a dispatched operation causes if its operands are on a GPU: a scalar, a shape or none."""
    name = func._schema.name.removeprefix("aten::")
    if name in _SCALAR_OPS:
        return SCALAR
    return SHAPE if _indexes_by_mask(name, args) or (name in _SHAPE_OPS and kwargs.get("output_size") is None) else None


def _indexes_by_mask(name: str, args: Any) -> bool:
    """Return True if the host must count a mask's elements for an indexing call. Filling with one number needs no count."""
    if name not in ("index", "index_put", "index_put_") or (len(args) > 2 and args[2].numel() == 1):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


class _CopyCounter(TorchFunctionMode):
    """Counts copies to the host. On a CPU these do not dispatch an operation."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPY_METHODS or (func is Tensor.to and "cpu" in (*args[1:2], kwargs.get("device"))):
            self.waits[COPY] += 1
        return func(*args, **kwargs)


def host_waits(run: Callable[[], object], device: torch.device, on_host: Iterable[Tensor] = ()) -> tuple[Counter[str], int]:
    """Count the host's waits in `run()` by kind, and the launches. On a CPU, `run` must not call compiled code.

    Args:
        on_host: tensors that are in main memory on every machine; reading their values is not a wait.
    """
    waits: Counter[str] = Counter()
    if device.type == "cuda":
        _count_sync_warnings(run, waits)
        return waits, _count_kernels(run)
    with _OperationCounter(waits, on_host) as operations, _CopyCounter(waits):
        run()
    return +waits, operations.launches


def _count_sync_warnings(run: Callable[[], object], waits: Counter[str]) -> None:
    """Count the warnings of PyTorch's sync debug mode, which warns of every wait."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught_warnings)
    if count:
        waits[ANY] = count


def _count_kernels(run: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def rise(run: Callable[[], object], device: torch.device) -> int:
    """Return the peak rise of memory in bytes during `run()`: allocated memory on a GPU, live tensors on a CPU."""
    if device.type == "cpu":
        with LiveBytes(device) as live:
            run()
        return live.peak
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are available without taking any from other processes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Return the mean seconds of `repeats` consecutive calls, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class CandidateMemory:
    """Bytes a candidate holds between steps, and the rise on top of them within a step."""

    name: str
    held: float
    rise: float


def estimate_memory(
    cfg: UNetConfig, parameters: int, stage: StageTable, side: int, names: list[str], device: torch.device
) -> list[CandidateMemory]:
    """Estimate the memory of our step and the named baselines from the number of parameters and the size of the work."""
    bf16, gpu = stage.precision == "bf16", device.type == "cuda"
    scale = stage.micro_batch_size * (side / 64) ** 2 * cfg.block_out_channels[0] / 320 / (2 if bf16 else 1)
    gradient_bytes = 0 if stage.fused_backward else 2 if bf16 and stage.batch == stage.micro_batch_size else 4
    weight_and_state_bytes = 4 + 4 * len(optimizer_class(stage.optimizer).slots) + 4 * len(stage.averages)
    activations = SAVED_BYTES[stage.checkpointing] * scale
    # On a GPU our gradient arena and the activations of a CUDA graph stay allocated between turns.
    step_bytes = gradient_bytes * parameters + activations
    lasting = step_bytes if gpu else 0.0
    estimates = [CandidateMemory("fastsd", weight_and_state_bytes * parameters + lasting, step_bytes - lasting)]
    baseline_rise = parameters * (6 if bf16 else 4) + DIFFUSERS_SAVED_BYTES[stage.checkpointing] * scale
    shared_model_counted = False
    for name in names:
        states = len(optimizer_class(ORIGINALS.get(name, "adamw")).slots)
        bytes_per_parameter = 4 * states + (4 if name == "compiled" or not shared_model_counted else 0)
        shared_model_counted = shared_model_counted or name != "compiled"
        estimates.append(CandidateMemory(name, bytes_per_parameter * parameters, baseline_rise))
    return estimates


def peak_memory(estimates: list[CandidateMemory]) -> float:
    """Return the bytes at the peak: everything held, the largest rise of a step, and `WORKSPACE`."""
    return sum(estimate.held for estimate in estimates) + max(estimate.rise for estimate in estimates) + WORKSPACE


def matmul_rate(device: torch.device, precision: str, *, small: bool = False) -> float:
    """Return the best FLOP/s of five timings of a square matmul in `precision`, with PyTorch's current switches."""
    side = 256 if small else 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(COMPUTE_DTYPE[precision]) for _ in range(2))
    out = torch.empty_like(a)
    times = [seconds(lambda: torch.mm(a, b, out=out), device, 1 if device.type == "cpu" else 10) for _ in range(7)]
    return 2 * side**3 / min(times[2:])


def copy_rate(device: torch.device, *, small: bool = False) -> float:
    """Return the bytes read and written per second by a copy of 1 GiB (CPU: 64 MiB, `small`: 1 MiB), the median of five."""
    size = 1 << (18 if small else 24 if device.type == "cpu" else 28)
    source, target = (torch.ones(size, device=device) for _ in range(2))
    times = [seconds(lambda: target.copy_(source), device, 1 if device.type == "cpu" else 10) for _ in range(7)]
    return 2 * source.nbytes / statistics.median(times[2:])


def device_name(device: torch.device) -> str:
    """Return the device's product name. For a CPU, append the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = model_lines[0].partition(":")[2].strip() if model_lines else model
    return f"{model}, {torch.get_num_threads()} threads"


def stamp(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on besides its settings: device, versions, source commit and date."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return result.stdout.strip()

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    memory = gpu.total_memory if gpu else psutil.virtual_memory().total
    stamp: dict[str, Any] = {"device": device_name(device), "memory_gb": memory / 1e9, "python": platform.python_version()}
    stamp |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if gpu else None}
    stamp |= {name: version(name) for name in PACKAGES}
    stamp["commit"] = git("rev-parse", "--short", "HEAD")
    stamp["changed"] = bool(git("status", "--porcelain", "--", ".", "../kernels"))
    return stamp | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}


def put_times(row: dict[str, Any], order: list[tuple[str, float]], ours: dict[str, Any]) -> None:
    """Add a candidate's times, and the speedup of ours over it, to its row. Our own row must come first."""
    times_ms = [1e3 * call_seconds for name, call_seconds in order if name == row["name"]]
    row["ms"] = {"median": statistics.median(times_ms), "min": min(times_ms), "max": max(times_ms), "all": times_ms}
    row["times"] = row["ms"]["median"] / ours["ms"]["median"]


def milliseconds(row: dict[str, Any]) -> str:
    ms = row["ms"]
    return f"{ms['median']:.4g} ({ms['min']:.4g} - {ms['max']:.4g})"
