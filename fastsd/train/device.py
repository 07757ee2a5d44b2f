"""Choice of the device and of the Ops table, and proof that kernels start there.

A job that was meant for a GPU must not run on the CPU in silence, and a kernel that cannot be compiled must not end a run in
a traceback.  So `choose_device` says in one line why "auto" found no GPU, with the command that helps, and `choose_ops` starts
one small kernel before it returns TRITON.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from fastsd.errors import UserError
from fastsd.terminal.console import STDOUT, Console
from fastsd_kernels import REFERENCE, TRITON, Ops, fastest
from fastsd_kernels.cpu_optimizers import problem as cpu_problem
from fastsd_kernels.launch import ARCHITECTURES, INTERPRETED

CUDA_WHEELS = "cu130"  # the builds of torch that have code for all `ARCHITECTURES`


def choose_device(name: str, console: Console = STDOUT) -> torch.device:
    """Return a torch device by name. "auto" is cuda if available, otherwise cpu, with a warning that says what is missing.

    A GPU with a number becomes the current one, on which graphs are captured, kernels start and events are recorded.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _bounded(torch.device("cuda"))
        console.warn(f'running on the CPU: {_missing_gpu()}; choose the device "cpu" to hide this line')
        return torch.device("cpu")
    if name.split(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UserError("gpu-missing", f'device is {name!r}, but {_missing_gpu()}; without a GPU, use "cpu"')
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            "device-unavailable", f'device is {name!r}, which is not available ({reason}); use "auto" or "cpu"'
        ) from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return _bounded(device)


def _missing_gpu() -> str:
    """Say why PyTorch has no CUDA device, and what to do."""
    card = _installed_card()
    version = torch.__version__.split("+")[0]
    if torch.version.cuda is None:
        if not card:
            return f"no NVIDIA GPU found, and torch {torch.__version__} is built without CUDA"
        index = f"https://download.pytorch.org/whl/{CUDA_WHEELS}"
        return (
            f"torch {torch.__version__} is built without CUDA and cannot use the {card}; run "
            f'`pip install "torch=={version}+{CUDA_WHEELS}" --extra-index-url {index}`'
        )
    if not card:
        return "no NVIDIA GPU found; install NVIDIA's driver, and check that `nvidia-smi` lists the GPU"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r} and hides the {card}; unset it"
    try:
        torch.cuda.init()
        reason = "it has no CUDA device"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    needed = f"update NVIDIA's driver to one for CUDA {torch.version.cuda}"
    return f"torch {torch.__version__} cannot use the {card} ({reason}); {needed}"


def _installed_card() -> str | None:
    """Return the name of the first NVIDIA GPU that the driver knows, whatever PyTorch can use."""
    query = "nvidia-smi", "--query-gpu=name", "--format=csv,noheader"
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        return names.splitlines()[0] if names else None
    except (OSError, subprocess.SubprocessError):
        pass
    # Containers often have the driver's library only.
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count, name = ctypes.c_int(), ctypes.create_string_buffer(100)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return None
        return None if driver.cuDeviceGetName(name, 100, 0) else name.value.decode(errors="replace")
    except (OSError, AttributeError):
        return None


def _bounded(device: torch.device) -> torch.device:
    """Keep PyTorch within the memory that is free where the driver would move more than that to main memory.

    Windows' driver, also below WSL, does not fail when the GPU is full: it goes on, slowly. With a limit,
    PyTorch fails first, and fastsd reduces the micro-batch.
    """
    if device.type == "cuda" and (sys.platform == "win32" or "microsoft" in platform.release().lower()):
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((free + torch.cuda.memory_reserved(device)) / total, device)
    return device


def choose_ops(kernels: str, device: torch.device) -> Ops:
    """Return the Ops table for a value of the config key `kernels`. Raises UserError for kernels that cannot run here."""
    can_run = TRITON is not None and (device.type == "cuda" or INTERPRETED)
    if kernels == "triton" and not can_run:
        reason = "is not installed" if TRITON is None else f"needs an NVIDIA GPU and device is {device}"
        raise UserError("triton-cannot-run", f'kernels is "triton", but Triton {reason}; use "auto" or "reference"')
    if kernels == "auto" and TRITON is None and device.type == "cuda":
        raise UserError(
            "triton-missing",
            "Triton is not installed, and training on a GPU is much slower without it; run `pip install triton` (on Windows"
            ' `pip install triton-windows`), or set kernels = "reference"',
        )
    # "auto" never chooses Triton's interpreter: it runs kernels on a CPU, hundreds of times slower.
    ops = REFERENCE if kernels == "reference" else TRITON if kernels == "triton" else fastest(device)
    assert ops is not None
    if ops is TRITON and device.type == "cuda":
        _start_kernel(ops, device)
    return ops


def _start_kernel(ops: Ops, device: torch.device) -> None:
    """Compile and run one small kernel. Raises UserError if this GPU is too old or Triton cannot start kernels here."""
    major, minor = torch.cuda.get_device_capability(device)
    name, oldest = torch.cuda.get_device_name(device), min(ARCHITECTURES)
    if torch.version.hip or 10 * major + minor < oldest:
        generation = "is no NVIDIA GPU" if torch.version.hip else f"has compute capability {major}.{minor}"
        raise UserError(
            "gpu-unsupported",
            f"device is {device}, {name}, which {generation}; the kernels need an NVIDIA GPU of compute capability "
            f'{oldest / 10} or newer (RTX 30, 40 or 50, A100, H100), or set kernels = "reference", which is much slower',
        )
    try:
        ops.geglu(torch.ones(1, 16, device=device))
        torch.cuda.synchronize(device)
    except Exception as error:
        problem, advice = _kernel_problem(error)
        raise UserError("kernel-start", f"Triton cannot start a kernel on {device}, {name}: {problem}; {advice}") from error


def _kernel_problem(error: Exception) -> tuple[str, str]:
    """Return what keeps Triton from starting a kernel, and what to do."""
    # Triton compiles its launcher in C at the first start of a kernel.
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    if "C compiler" in str(error):
        return "there is no C compiler", f"install one, for example with `sudo apt install gcc {python}-dev`"
    if isinstance(error, subprocess.CalledProcessError):
        if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
            return "Python's header files are missing", f"install them, for example with `sudo apt install {python}-dev`"
        compiler = error.cmd[0] if isinstance(error.cmd, list) else error.cmd
        return f"{compiler} failed with exit status {error.returncode}", "see its messages above"
    if "libcuda.so" in str(error):
        return (
            "the linker does not know the driver's libcuda.so.1",
            "run `sudo ldconfig`, or set TRITON_LIBCUDA_PATH to its folder",
        )
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", "set TRITON_CACHE_DIR to a folder with space that you may write to"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0], 'update NVIDIA\'s driver, or set kernels = "reference" to train without kernels, much slower'


def describe_ops(ops: Ops) -> str:
    """Return the name of the table, and the reason if it is not the fastest one."""
    reason = cpu_problem() if ops is REFERENCE and not torch.cuda.is_available() else None
    return f"{ops.name} ({reason}: optimizer steps are several times slower)" if reason else ops.name
