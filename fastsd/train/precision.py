"""Choice of the device and of the Ops table, and the numerical switches of PyTorch.

fp32   IEEE fp32: TF32 is off for matmuls and for convolutions, whose defaults in PyTorch differ
tf32   TF32 for matmuls and convolutions
bf16   components compute in bf16, and the optimizer updates their exact fp32 masters (see `trainable.py`)

Norm statistics, softmax, loss and optimizer arithmetic are fp32 in all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastsd.errors import UserError
from fastsd.model.unet import UNet
from fastsd_kernels import REFERENCE, TRITON, Ops, fastest
from fastsd_kernels.cpu_optimizers import problem as cpu_problem
from fastsd_kernels.launch import INTERPRETED

COMPUTE_DTYPE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
_FP32_MODE = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee"}


def choose_device(name: str) -> torch.device:
    """Return a torch device by name. "auto" is cuda if available, otherwise cpu.

    A GPU with a number becomes the current one, on which graphs are captured, kernels start and events are recorded.

    Raises:
        UserError: the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    if kernels == "triton":
        assert TRITON is not None
        return TRITON
    # "auto" never chooses Triton's interpreter: it runs kernels on a CPU, hundreds of times slower.
    return REFERENCE if kernels == "reference" else fastest(device)


def describe_ops(ops: Ops) -> str:
    """Return the name of the table, and the reason if it is not the fastest one."""
    reason = cpu_problem() if ops is REFERENCE and not torch.cuda.is_available() else None
    return f"{ops.name} ({reason}: optimizer steps are several times slower)" if reason else ops.name


@contextmanager
def precision_switches(precision: str, unet: UNet | None = None, *, deterministic: bool = True) -> Iterator[str]:
    """Set PyTorch's switches as `set_precision` does, and restore them at the end. Yield a description of the settings."""
    before = []
    for owner, name, _ in _switches(precision, deterministic=deterministic):
        with suppress(RuntimeError):  # an old name cannot be read if the caller has set only new ones
            before.append((owner, name, getattr(owner, name)))
    try:
        yield set_precision(precision, unet, deterministic=deterministic)
    finally:
        for switch in before:
            setattr(*switch)


def set_precision(precision: str, unet: UNet | None = None, *, deterministic: bool = True) -> str:
    """Set PyTorch's switches and the UNet's attention precision for its device. Return a short description of the settings.

    Args:
        precision: "fp32", "tf32" or "bf16".
        deterministic: use the same cuDNN algorithms in every run, for exact resume; False = time them and use the fastest.
    """
    fp32_mode = _FP32_MODE[precision]
    for switch in _switches(precision, deterministic=deterministic):
        setattr(*switch)
    settings = f"{precision} (fp32 matmuls and convolutions: {fp32_mode}{'' if deterministic else ', cuDNN benchmark mode'})"
    if unet is None:
        return settings
    device = unet.conv_in.weight.device
    attention = fp32_mode
    if fp32_mode == "ieee" and device.type == "cuda" and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0)):
        # As exact as fp32 to within a rounding, and faster, because these GPUs' tensor cores far outrun their fp32 units.
        attention = "tf32x3"
    unet.set_attention_precision(attention)
    return f"{settings[:-1]}, attention: {attention})"


def _switches(precision: str, *, deterministic: bool) -> list[tuple[object, str, object]]:
    """Return PyTorch's switches as (object, attribute, value)."""
    backends: Any = torch.backends
    cudnn, mkldnn, fp32_mode = backends.cudnn, backends.mkldnn, _FP32_MODE[precision]
    products = backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn
    return [
        # The old names first, because setting them changes some of the new ones. PyTorch refuses to read an old name that
        # disagrees with the new ones, and its compiler reads them.
        *((owner, "allow_tf32", fp32_mode == "tf32") for owner in (backends.cuda.matmul, cudnn)),
        *((product, "fp32_precision", fp32_mode) for product in products),
        # If a bf16 matmul is split over K, its partial sums stay fp32.
        (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (cudnn, "deterministic", deterministic),
        (cudnn, "benchmark", not deterministic),
    ]
