"""Floor 2: the one place that picks a device and an Ops table, and sets every numerical switch PyTorch has.

fp32   IEEE fp32 everywhere: TF32 off for matmuls and for convolutions, whose PyTorch defaults differ
tf32   TF32 in both
bf16   the parts compute in bf16, their exact fp32 masters are what the optimizer steps (see parts.py)
"""

from __future__ import annotations

import torch

from fastsd.config import Config
from fastsd.errors import UserError
from fastsd_kernels import REFERENCE, TRITON, Ops

COMPUTE_DTYPE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def choose_device(name: str) -> torch.device:
    """ "auto" or a torch device name -> the device. Raises UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f'device is {name!r}, which does not work here ({why}); use "auto", "cuda" or "cpu"') from None
    return device


def choose_ops(config: Config, device: torch.device) -> Ops:
    """The Ops table a config means. Raises UserError for kernels that cannot run here."""
    if config.kernels == "triton" and TRITON is None:
        raise UserError('kernels is "triton", whose table is not built in this version; use "auto" or "reference"')
    if config.kernels == "reference" or TRITON is None or device.type != "cuda":
        return REFERENCE
    return TRITON


def set_precision(precision: str) -> str:
    """Set PyTorch's switches for a stage's precision and say in one phrase what was set."""
    fp32 = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = fp32
    torch.backends.cudnn.conv.fp32_precision = fp32  # type: ignore[attr-defined]
    # Exact resume: the same algorithms whatever ran before.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return f"{precision} (fp32 matmuls and convolutions: {fp32})"
