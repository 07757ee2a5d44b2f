"""Forward, recomputation and backward of the differentiable operations, each as a separate function.

An operation of `Ops` saves for backward all that it needs itself. A layer that joins a norm and a convolution saves less: only
the norm's input. Its backward rebuilds the norm's output, which is the convolution's input. Such a layer is an autograd
function of its own (`fastsd/model/recompute.py`) and calls the functions of this file.

Nothing here is differentiable.  Shapes: B images, C channels, H x W positions, N tokens, L keys, F features.
Read next: `group_norm.py`, which has a function for each of the three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd_kernels.attention import attention_op, attention_packed_backward_op, require_supported
from fastsd_kernels.geglu import geglu_backward_in_place_op, geglu_reference, geglu_triton
from fastsd_kernels.group_norm import group_norm_apply_op, group_norm_backward_op, group_norm_op
from fastsd_kernels.group_norm_statistics import add_statistics_op, channels_last
from fastsd_kernels.layer_norm import (
    layer_norm_apply_op,
    layer_norm_backward_in_place_op,
    layer_norm_op,
    layer_norm_residual_op,
)
from fastsd_kernels.ops import Destination, ForwardBackwardOps, Images, Partials, Shift

Gradient = Tensor | None


def _attention_reference(q: Tensor, k: Tensor, v: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cpu:  # a GPU's backends save different tensors, so the backward repeats the forward
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), q.new_empty(0)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return o.transpose(1, 2), lse


def _attention_backward_reference(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, precision: str, *, self_attention: bool
) -> tuple[Tensor, Tensor]:
    if q.is_cpu:
        heads = [x.transpose(1, 2) for x in (do, q, k, v, o)]
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, lse, dropout_p=0.0, is_causal=False
        )
    else:
        with torch.enable_grad():
            q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
            gradients = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), do.transpose(1, 2))
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    if self_attention:
        return torch.stack((dq, dk, dv), dim=2), q.new_empty(0)
    return dq, torch.stack((dk, dv), dim=2)


def _group_norm_reference(
    images: Images,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Shift,
    *,
    silu: bool,
    partials: Partials = (),
) -> tuple[Tensor, Tensor, Tensor]:
    x = _add_shift(_join(images), shift)
    y, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)
    return F.silu(y) if silu else y, mean, rstd


def _group_norm_recompute_reference(
    images: Images,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Shift,
    *,
    silu: bool,
) -> Tensor:
    return _group_norm_reference(images, weight, bias, groups, eps, shift, silu=silu)[0]


def _group_norm_backward_reference(
    dy: Tensor,
    images: Images,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Shift,
    *,
    silu: bool,
    through: Tensor | None,
    output: bool,
    into: Destination | None = None,
) -> tuple[Images, Gradient, Gradient, Shift, Tensor | None]:
    x, y = _add_shift(_join(images), shift), None
    if silu or output:
        y = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)[0]
        if silu:
            dy = torch.ops.aten.silu_backward(dy, y)
            F.silu(y, inplace=True)
    dy = dy.contiguous(memory_format=torch.channels_last if x.is_cpu else torch.contiguous_format)
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        dy, x, mean, rstd, weight, *_sizes(x), groups, [True, True, True]
    )
    dshift = None if shift is None else dx.sum((2, 3))
    dweight, dbias = _accumulate(into, dweight, dbias)
    if through is not None:
        dx += through
    return dx.split([image.shape[1] for image in images], dim=1), dweight, dbias, dshift, y if output else None


def _join(images: Images) -> Tensor:
    return torch.cat(images, dim=1) if len(images) > 1 else images[0]


def _add_statistics_reference(h: Tensor, bias: Tensor | None, residual: Tensor | None) -> tuple[Tensor, None]:
    if bias is not None:
        h = h + bias[:, None, None]
    return h if residual is None else h + residual, None


def _add_shift(x: Tensor, shift: Shift) -> Tensor:
    """Return x + shift in the memory order that PyTorch's kernel reads: channels last on a CPU only."""
    x = x if shift is None else x + shift[:, :, None, None]
    return x.contiguous(memory_format=torch.channels_last if x.is_cpu else torch.contiguous_format)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = x if residual is None else x + residual
    y, mean, rstd = torch.native_layer_norm(s, s.shape[-1:], weight, bias, eps)
    return y, s, mean, rstd


def _layer_norm_recompute_reference(s: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.native_layer_norm(s, s.shape[-1:], weight, bias, eps)[0]


def _layer_norm_backward_reference(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ds: Tensor | None,
    *,
    output: bool,
    sums: bool = False,
    into: Destination | None = None,
) -> tuple[Tensor, Gradient, Gradient, Gradient, Tensor | None]:
    gradients = torch.ops.aten.native_layer_norm_backward(dy, s, s.shape[-1:], mean, rstd, weight, bias, [True, True, True])
    dx, dweight, dbias = gradients
    y = _layer_norm_recompute_reference(s, mean, rstd, weight, bias, eps) if output else None
    dx = dx if ds is None else dx + ds
    vectors = _accumulate(into, dweight, dbias, *([dx.flatten(0, -2).sum(0)] if sums else []))
    return dx, vectors[0], vectors[1], vectors[2] if sums else None, y


def _geglu_backward_reference(
    dy_F: Tensor, x_2F: Tensor, *, output: bool, sums: bool, into: Destination | None = None
) -> tuple[Tensor, Tensor | None, Gradient]:
    value, gate = x_2F.chunk(2, dim=-1)
    dx_2F = torch.empty_like(x_2F)
    dvalue, dgate = dx_2F.chunk(2, dim=-1)
    y = F.gelu(gate)
    torch.mul(dy_F, y, out=dvalue)
    if output:
        y *= value
    torch.ops.aten.gelu_backward.grad_input(dy_F * value, gate, grad_input=dgate)
    (dx_sums,) = _accumulate(into, dx_2F.flatten(0, -2).sum(0)) if sums else (None,)
    return dx_2F, y if output else None, dx_sums


def _accumulate(into: Destination | None, *gradients: Tensor) -> tuple[Gradient, ...]:
    """Return the gradients, or write them into memory and return None for each."""
    if into is None:
        return gradients
    memory, add = into
    for target, gradient in zip(memory, gradients, strict=True):
        target.add_(gradient) if add else target.copy_(gradient)
    return (None,) * len(gradients)


def _attention_triton(q: Tensor, k: Tensor, v: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    require_supported(q, k, v, precision)
    return attention_op(q, k, v, precision)


def _attention_backward_triton(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, precision: str, *, self_attention: bool
) -> tuple[Tensor, Tensor]:
    return attention_packed_backward_op(do, q, k, v, o, lse, precision, self_attention)


def _two(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return two of at most two tensors, None for those that do not exist."""
    first, second, *_ = (*tensors, None, None)
    return first, second


def _group_norm_triton(
    images: Images,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Shift,
    *,
    silu: bool,
    partials: Partials = (),
) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_op(images[0], weight, bias, groups, eps, silu, shift, _two(images)[1], *_two(partials))


def _group_norm_recompute_triton(
    images: Images,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Shift,
    *,
    silu: bool,
) -> Tensor:
    return group_norm_apply_op(images[0], _two(images)[1], mean, rstd, weight, bias, groups, silu, shift)


def _group_norm_backward_triton(
    dy: Tensor,
    images: Images,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    shift: Shift,
    *,
    silu: bool,
    through: Tensor | None,
    output: bool,
    into: Destination | None = None,
) -> tuple[Images, Gradient, Gradient, Shift, Tensor | None]:
    dy = channels_last(dy)
    y = dy if output else None
    norm = mean, rstd, weight, bias, groups, silu, shift
    memory, add = into or ((None, None), False)
    operands = dy, images[0], _two(images)[1], *norm, through, y, *memory, add
    dx, dskip, dweight, dbias, dshift = group_norm_backward_op(*operands)
    gradients = (dweight, dbias) if into is None else (None, None)
    return (dx, dskip)[: len(images)], *gradients, None if shift is None else dshift, y


def _layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if residual is not None:
        return layer_norm_residual_op(x, residual, weight, bias, eps)
    y, mean, rstd = layer_norm_op(x, weight, bias, eps)
    return y, x, mean, rstd


def _layer_norm_recompute_triton(s: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return layer_norm_apply_op(s, mean, rstd, weight, bias)


def _layer_norm_backward_triton(
    dy: Tensor,
    s: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ds: Tensor | None,
    *,
    output: bool,
    sums: bool = False,
    into: Destination | None = None,
) -> tuple[Tensor, Gradient, Gradient, Gradient, Tensor | None]:
    memory, add = into or ([], False)
    dx, *vectors = layer_norm_backward_in_place_op(dy, s, mean, rstd, weight, bias, ds, output, sums, memory, add)
    dweight, dbias, dx_sum = (vector if vector.numel() else None for vector in vectors)
    return dx, dweight, dbias, dx_sum, dy if output else None


def _geglu_backward_triton(
    dy_F: Tensor, x_2F: Tensor, *, output: bool, sums: bool, into: Destination | None = None
) -> tuple[Tensor, Tensor | None, Gradient]:
    memory, add = into or ([], False)
    dx, dx_sums = geglu_backward_in_place_op(dy_F, x_2F, output, sums, memory, add)
    return dx, dy_F if output else None, dx_sums if sums and into is None else None


REFERENCE_FORWARD_BACKWARD = ForwardBackwardOps(
    attention=_attention_reference,
    attention_backward=_attention_backward_reference,
    group_norm=_group_norm_reference,
    group_norm_recompute=_group_norm_recompute_reference,
    group_norm_backward=_group_norm_backward_reference,
    add_statistics=_add_statistics_reference,
    layer_norm=_layer_norm_reference,
    layer_norm_recompute=_layer_norm_recompute_reference,
    layer_norm_backward=_layer_norm_backward_reference,
    geglu=geglu_reference,
    geglu_backward=_geglu_backward_reference,
    fused=False,
)
TRITON_FORWARD_BACKWARD = ForwardBackwardOps(
    attention=_attention_triton,
    attention_backward=_attention_backward_triton,
    group_norm=_group_norm_triton,
    group_norm_recompute=_group_norm_recompute_triton,
    group_norm_backward=_group_norm_backward_triton,
    add_statistics=add_statistics_op,
    layer_norm=_layer_norm_triton,
    layer_norm_recompute=_layer_norm_recompute_triton,
    layer_norm_backward=_layer_norm_backward_triton,
    geglu=geglu_triton,
    geglu_backward=_geglu_backward_triton,
    fused=True,
)
