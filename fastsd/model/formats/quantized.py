"""Read weights in fp8 as bf16 or fp32.

Every number in fp8, e4m3 or e5m2, is also a number in bf16. ComfyUI stores "scaled" fp8 as well: a weight is the tensor
`<layer>.weight` times the number `<layer>.scale_weight`, or `weight_scale` in newer files. The product is rounded to fp32.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fastsd.errors import UserError
from fastsd.storage import FP8, Stored, Tensors, as_tensor

_SCALES = (".scale_weight", ".weight_scale")
# Entries of ComfyUI beside the scales: the scales of activations, which only compute in fp8 needs, and marks of the format.
_OTHERS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def dequantize(path: Path, tensors: Tensors, notes: list[str]) -> Tensors:
    """Return the tensors of a file, with those in fp8 as bf16, or as fp32 if they have a scale. The others are unchanged.

    Raises:
        UserError: a scale is not one positive number, or it belongs to no tensor.
    """
    scales = {name.removesuffix(end) + ".weight": name for name in tensors for end in _SCALES if name.endswith(end)}
    result = {name: tensor for name, tensor in tensors.items() if not name.endswith((*_SCALES, *_OTHERS))}
    counts = {torch.bfloat16: 0, torch.float32: 0}
    for name, tensor in result.items():
        if _is_fp8(tensor) or (name in scales and tensor.dtype.is_floating_point):
            result[name] = _widened(tensor, _scale(path, scales[name], tensors[scales[name]]) if name in scales else None)
            counts[result[name].dtype] += 1
    if lost := next((scale for name, scale in scales.items() if name not in result), None):
        raise UserError("scale-of-no-tensor", f"{path}: {lost} belongs to no weight; download the file again")
    if counts[torch.bfloat16]:
        notes.append(f"{path.name}: {counts[torch.bfloat16]} tensors in fp8 read as bf16")
    if counts[torch.float32]:
        notes.append(f"{path.name}: {counts[torch.float32]} tensors in scaled fp8 read as fp32")
    return result


def _is_fp8(tensor: Tensor | Stored) -> bool:
    return (tensor.encoded if isinstance(tensor, Stored) else tensor.dtype) in FP8.values()


def _scale(path: Path, name: str, tensor: Tensor | Stored) -> float:
    value = as_tensor(tensor).float().item() if tensor.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise UserError(
            "scale-not-a-number", f"{path}: {name} is not one number above 0; give a model in fp16, bf16, fp32 or plain fp8"
        )
    return value


def _widened(tensor: Tensor | Stored, scale: float | None) -> Tensor | Stored:
    dtype = torch.bfloat16 if scale is None else torch.float32
    if isinstance(tensor, Stored):
        return replace(tensor, dtype=dtype, encoded=tensor.encoded or tensor.dtype, scale=scale)
    return tensor.to(dtype) if scale is None else tensor.to(dtype) * scale
