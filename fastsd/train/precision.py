"""The numerical switches of PyTorch.

fp32   IEEE fp32: TF32 is off for matmuls and for convolutions, whose defaults in PyTorch differ
tf32   TF32 for matmuls and convolutions
bf16   components compute in bf16, and the optimizer updates their exact fp32 masters (see `trainable.py`)

Norm statistics, softmax, loss and optimizer arithmetic are fp32 in all three.

IEEE fp32 says how products are computed, not in which order they are summed.  For fp32, cuDNN's first choices on a 3090 or
4090 are mostly Winograd algorithms (none on a 5090): they transform tiles with additions, so their error is larger than that
of a direct sum, and they take up to 0.7 GiB of workspace at 32 images.  `bench/gpu.py` measures both.  Without enough memory
for it, cuDNN takes another algorithm with other bits, without an error.  `step.py` treats that as out of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from fastsd.model.unet import UNet

COMPUTE_DTYPE = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
_FP32_MODE = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee"}


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
    attention = attention_precision(precision, unet.conv_in.weight.device)
    unet.set_attention_precision(attention)
    return f"{settings[:-1]}, attention: {attention})"


def attention_precision(precision: str, device: torch.device) -> str:
    """Return how the UNet's attention multiplies fp32 on a device: "ieee", "fp16x3", "tf32" or "tf32x3"."""
    fp32_mode = _FP32_MODE[precision]
    if fp32_mode == "ieee" and device.type == "cuda":
        # As exact as fp32 to within a rounding, and faster: tensor cores outrun fp32 units, which also wait for shared memory.
        return "fp16x3"
    return fp32_mode


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
