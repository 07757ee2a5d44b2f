"""Layers that save the input of a norm or a gate for backward, instead of its output.

A convolution or linear after a norm needs the norm's output for its weight gradient, and the norm needs its own input. One
pass over memory computes the output from the input. Each function here therefore joins a norm (or GEGLU, attention,
nearest-neighbour upsampling) with the matmul after it, saves its own input, and recomputes the matmul's input in the
backward. SD1.5's UNet at 512 px then has 252 M numbers per image saved for backward, against 468 M in diffusers.

    norm_conv           [x, skip] -> GroupNorm + SiLU -> conv 3x3, and the 1x1 shortcut of [x, skip]  saves x, skip
    group_norm_linear   GroupNorm -> linear                                                           saves x
    layer_norm_linear   x + residual -> LayerNorm -> linear                                           saves the sum
    attention_linear    q, k, v -> attention -> linear                                                saves q, k, v, o
    feed_forward        x + residual -> LayerNorm -> linear -> GEGLU -> linear, added                 saves the sum, hidden
    upsample_conv       nearest neighbour -> conv 3x3                                                 saves the small x
    linear              x -> linear with an adapter                                                   saves x

A concatenation with a skip is computed twice and never saved. No gradient of a frozen weight is computed. All layers are as
exact as plain ones: a recomputed tensor equals that of the forward bit for bit.

Shapes: B images, C channels, H x W positions, N tokens, F features; x_BCHW is channels last, so its tokens are a view.
Read next: `fastsd/model/matmul.py` and `kernels/fastsd_kernels/forward_backward.py`, which these functions call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastsd.model import matmul
from fastsd.model.matmul import UNFUSED, Gradient, Gradients, LayerTensors, Needs, unpack
from fastsd_kernels.ops import ForwardBackwardOps


class NormTensors(NamedTuple):
    weight: Tensor
    bias: Tensor


def tokens(x_BCHW: Tensor) -> Tensor:
    """View (B, C, H, W) channels last as (B, N, C)."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def image(x_BNC: Tensor, size: torch.Size) -> Tensor:
    """View (B, N, C) as (B, C, H, W) channels last."""
    return x_BNC.unflatten(1, size).permute(0, 3, 1, 2)


def _join(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat([x, skip], dim=1)


class NormConv(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, groups: int, eps: float, x: Tensor, skip: Any, shift: Any, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer. `tensors` are those of the norm, of the convolution and, if there is one, of the shortcut."""
        norm_weight, norm_bias, *layers = tensors
        conv, matrix = _conv_and_shortcut(layers)
        joined = _join(x, skip)
        y, mean, rstd = ops.group_norm(joined, norm_weight, norm_bias, groups, eps, shift, silu=True)
        shortcut = None if matrix is None else matmul.to_nchw(matmul.linear(matmul.to_nhwc(joined), matrix))
        ctx.save_for_backward(x, skip, shift, mean, rstd, norm_weight, norm_bias, *layers)
        ctx.ops, ctx.groups, ctx.eps = ops, groups, eps
        return matmul.conv(y, conv), shortcut

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dshortcut: Gradient) -> tuple[Gradient, ...]:
        x, skip, shift, mean, rstd, norm_weight, norm_bias, *layers = ctx.saved_tensors
        _, _, _, need_x, need_skip, need_shift, need_norm, _, *needs = ctx.needs_input_grad
        (conv, matrix), conv_needs = _conv_and_shortcut(layers), unpack(Needs, needs[:UNFUSED])

        need_y = need_x or need_skip or need_shift or need_norm
        joined = _join(x, skip)
        norm = norm_weight, norm_bias, ctx.groups, ctx.eps, shift
        y = ctx.ops.group_norm_recompute(joined, mean, rstd, *norm, silu=True) if conv_needs.input else joined
        dy, gradients = matmul.conv_backward(dout, y, conv, conv_needs, need_x=need_y)
        del y
        dx = dskip = dnorm_weight = dnorm_bias = dshift = None
        if need_y:
            dx, dnorm_weight, dnorm_bias, dshift = ctx.ops.group_norm_backward(dy, joined, mean, rstd, *norm, silu=True)
        if dshortcut is not None and matrix is not None:
            operands = matmul.to_nhwc(dshortcut), matmul.to_nhwc(joined), matrix, unpack(Needs, needs[UNFUSED:])
            dx_shortcut, (dmatrix, *other_gradients) = matmul.linear_backward(*operands, need_x=need_y)
            gradients += (None if dmatrix is None else dmatrix.view_as(layers[UNFUSED]), *other_gradients)
            if dx is not None and dx_shortcut is not None:
                dx = dx + matmul.to_nchw(dx_shortcut)
        if dx is not None and skip is not None:
            dx, dskip = dx.split([x.shape[1], skip.shape[1]], dim=1)
        return None, None, None, dx, dskip, dshift, dnorm_weight, dnorm_bias, *gradients


def _conv_and_shortcut(layers: Sequence[Any]) -> tuple[LayerTensors, LayerTensors | None]:
    """Unpack a convolution and, if there is one, a shortcut, whose weight becomes that of a linear."""
    shortcut = layers[UNFUSED:]
    return unpack(LayerTensors, layers[:UNFUSED]), matmul.as_linear(unpack(LayerTensors, shortcut)) if shortcut else None


class GroupNormLinear(Function):
    @staticmethod
    def forward(ctx: Any, ops: ForwardBackwardOps, groups: int, eps: float, x: Tensor, *tensors: Any) -> Tensor:
        norm_weight, norm_bias, *layer = tensors
        y, mean, rstd = ops.group_norm(x, norm_weight, norm_bias, groups, eps, None, silu=False)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, *layer)
        ctx.ops, ctx.groups, ctx.eps = ops, groups, eps
        return matmul.linear(tokens(y), unpack(LayerTensors, layer))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        x, mean, rstd, norm_weight, norm_bias, *layer = ctx.saved_tensors
        _, _, _, need_x, need_norm, _, *layer_needs = ctx.needs_input_grad
        needs, norm = unpack(Needs, layer_needs), (norm_weight, norm_bias, ctx.groups, ctx.eps, None)
        y = tokens(ctx.ops.group_norm_recompute(x, mean, rstd, *norm, silu=False)) if needs.input else None
        dy, gradients = matmul.linear_backward(dout, y, unpack(LayerTensors, layer), needs, need_x=need_x or need_norm)
        dx = dnorm_weight = dnorm_bias = None
        if dy is not None:
            dy = image(dy, x.shape[2:])
            dx, dnorm_weight, dnorm_bias, _ = ctx.ops.group_norm_backward(dy, x, mean, rstd, *norm, silu=False)
        return None, None, None, dx, dnorm_weight, dnorm_bias, *gradients


class LayerNormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, eps: float, x: Tensor, residual: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        norm_weight, norm_bias, *layer = tensors
        y, s, mean, rstd = ops.layer_norm(x, norm_weight, norm_bias, eps, residual)
        ctx.save_for_backward(s, mean, rstd, norm_weight, norm_bias, *layer)
        ctx.ops, ctx.eps, ctx.added = ops, eps, residual is not None
        return matmul.linear(y, unpack(LayerTensors, layer)), s

    @staticmethod
    def backward(ctx: Any, dout: Tensor, ds: Tensor) -> tuple[Gradient, ...]:
        s, mean, rstd, norm_weight, norm_bias, *tensors = ctx.saved_tensors
        layer, needs = unpack(LayerTensors, tensors), unpack(Needs, ctx.needs_input_grad[6:])
        need_y = any(ctx.needs_input_grad[2:6])
        norm = s, mean, rstd, norm_weight, norm_bias, ctx.eps
        dy, dreduced = matmul.linear_input_gradient(dout, layer, need_x=need_y)
        dx = dnorm_weight = dnorm_bias = y = None
        if dy is not None:
            dx, dnorm_weight, dnorm_bias, y = ctx.ops.layer_norm_backward(dy, *norm, ds, output=needs.input)
        elif needs.input:
            y = ctx.ops.layer_norm_recompute(*norm)
        gradients = matmul.linear_gradients(dout, y, layer, needs, dreduced)
        return None, None, dx, dx if ctx.added else None, dnorm_weight, dnorm_bias, *gradients


class AttentionLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, precision: str, heads: int, q: Tensor, kv: Tensor | None, *layer: Any
    ) -> Tensor:
        qkv = _split_heads(q, kv, heads)
        o, lse = ops.attention(*qkv, precision)
        ctx.save_for_backward(q, kv, o, lse, *layer)
        ctx.ops, ctx.precision, ctx.heads = ops, precision, heads
        return matmul.linear(o.flatten(2), unpack(LayerTensors, layer))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        q, kv, o, lse, *layer = ctx.saved_tensors
        _, _, _, need_q, need_kv, *needs = ctx.needs_input_grad
        need_o = need_q or need_kv
        do, gradients = matmul.linear_backward(
            dout, o.flatten(2), unpack(LayerTensors, layer), unpack(Needs, needs), need_x=need_o
        )
        dq = dkv = None
        if do is not None:
            do = do.unflatten(-1, (ctx.heads, -1))
            qkv = _split_heads(q, kv, ctx.heads)
            dq, dkv = ctx.ops.attention_backward(do, *qkv, o, lse, ctx.precision, self_attention=kv is None)
            dq, dkv = dq.flatten(2), None if kv is None else dkv.flatten(2)
        return None, None, None, dq, dkv, *gradients


def _split_heads(q: Tensor, kv: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """View packed q, k, v (B, N, 3C), or q (B, N, C) and packed k, v (B, L, 2C), as separate q, k, v (B, N, heads, D)."""
    if kv is None:
        q, k, v = q.unflatten(-1, (3, heads, -1)).unbind(2)
    else:
        q, (k, v) = q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (2, heads, -1)).unbind(2)
    return q, k, v


class FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, eps: float, keep_hidden: bool, x: Tensor, residual: Tensor, *tensors: Any
    ) -> Tensor:
        """Apply the layer. `tensors` are those of the norm, of the first linear and of the second linear."""
        norm_weight, norm_bias, *layers = tensors
        first, second = unpack(LayerTensors, layers[:UNFUSED]), unpack(LayerTensors, layers[UNFUSED:])
        y, s, mean, rstd = ops.layer_norm(x, norm_weight, norm_bias, eps, residual)
        hidden = matmul.linear(y, first)
        saved_hidden = hidden if keep_hidden else None
        ctx.save_for_backward(s, mean, rstd, saved_hidden, norm_weight, norm_bias, *layers)
        ctx.ops, ctx.eps = ops, eps
        return s + matmul.linear(ops.geglu(hidden), second)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        s, mean, rstd, hidden, norm_weight, norm_bias, *layers = ctx.saved_tensors
        need_y, needs = any(ctx.needs_input_grad[3:7]), ctx.needs_input_grad[7:]
        first, second = unpack(LayerTensors, layers[:UNFUSED]), unpack(LayerTensors, layers[UNFUSED:])
        first_needs, second_needs = unpack(Needs, needs[:UNFUSED]), unpack(Needs, needs[UNFUSED:])
        norm = s, mean, rstd, norm_weight, norm_bias, ctx.eps
        y = None
        if hidden is None:
            y = ctx.ops.layer_norm_recompute(*norm)
            hidden = matmul.linear(y, first)

        need_gated = need_y or first_needs.input or first_needs.bias
        dgated, dreduced = matmul.linear_input_gradient(dout, second, need_x=need_gated)
        gated = dhidden = dbias = None
        if dgated is not None:
            rest = {"output": second_needs.input, "sums": first_needs.bias}
            dhidden, gated, dbias = ctx.ops.geglu_backward(dgated, hidden, **rest)
            del dgated
        elif second_needs.input:
            gated = ctx.ops.geglu(hidden)
        del hidden
        second_gradients = matmul.linear_gradients(dout, gated, second, second_needs, dreduced)
        del gated

        dx = dnorm_weight = dnorm_bias = None
        first_gradients: Gradients = (None,) * 4
        if dhidden is not None:
            dy, dreduced = matmul.linear_input_gradient(dhidden, first, need_x=need_y)
            if dy is not None:
                output = first_needs.input and y is None
                dx, dnorm_weight, dnorm_bias, rebuilt = ctx.ops.layer_norm_backward(dy, *norm, dout, output=output)
                y = rebuilt if y is None else y
            elif first_needs.input and y is None:
                y = ctx.ops.layer_norm_recompute(*norm)
            first_gradients = matmul.linear_gradients(dhidden, y, first, first_needs, dreduced, dbias=dbias)
        return None, None, None, dx, dx, dnorm_weight, dnorm_bias, *first_gradients, *second_gradients


class UpsampleConv(Function):
    @staticmethod
    def forward(ctx: Any, size: torch.Size, x: Tensor, *layer: Any) -> Tensor:
        ctx.save_for_backward(x, *layer)
        ctx.size = size
        return matmul.conv(F.interpolate(x, size=size, mode="nearest"), unpack(LayerTensors, layer))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        x, *layer = ctx.saved_tensors
        _, need_x, *needs = ctx.needs_input_grad
        upsampled = F.interpolate(x, size=ctx.size, mode="nearest")
        dupsampled, gradients = matmul.conv_backward(
            dout, upsampled, unpack(LayerTensors, layer), unpack(Needs, needs), need_x=need_x
        )
        dx = torch.ops.aten.upsample_nearest2d_backward(dupsampled, ctx.size, x.shape) if need_x else None
        return None, dx, *gradients


class Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *layer: Any) -> Tensor:
        ctx.save_for_backward(x, *layer)
        return matmul.linear(x, unpack(LayerTensors, layer))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
        x, *layer = ctx.saved_tensors
        need_x, *needs = ctx.needs_input_grad
        dx, gradients = matmul.linear_backward(dy, x, unpack(LayerTensors, layer), unpack(Needs, needs), need_x=need_x)
        return dx, *gradients


def norm_conv(
    ops: ForwardBackwardOps,
    groups: int,
    eps: float,
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    norm: NormTensors,
    conv: LayerTensors,
    shortcut: LayerTensors | None,
) -> tuple[Tensor, Tensor | None]:
    """Return conv(silu(norm([x, skip] + shift))), and shortcut([x, skip]) or None."""
    layers = conv.flat() if shortcut is None else (*conv.flat(), *shortcut.flat())
    return NormConv.apply(ops, groups, eps, x, skip, shift, *norm, *layers)


def group_norm_linear(
    ops: ForwardBackwardOps, groups: int, eps: float, x: Tensor, norm: NormTensors, layer: LayerTensors
) -> Tensor:
    return GroupNormLinear.apply(ops, groups, eps, x, *norm, *layer.flat())


def layer_norm_linear(
    ops: ForwardBackwardOps, eps: float, x: Tensor, residual: Tensor | None, norm: NormTensors, layer: LayerTensors
) -> tuple[Tensor, Tensor]:
    """Return linear(norm(x + residual)), and x + residual. Without a residual the second is x.

    Other uses of x should read the second result. Their gradient is then added by the norm's backward.
    """
    return LayerNormLinear.apply(ops, eps, x, residual, *norm, *layer.flat())


def attention_linear(
    ops: ForwardBackwardOps, precision: str, heads: int, q: Tensor, kv: Tensor | None, layer: LayerTensors
) -> Tensor:
    """Return linear(attention). q and kv are packed as in `_split_heads`."""
    return AttentionLinear.apply(ops, precision, heads, q, kv, *layer.flat())


def feed_forward(
    ops: ForwardBackwardOps,
    eps: float,
    x: Tensor,
    residual: Tensor,
    norm: NormTensors,
    layers: tuple[LayerTensors, LayerTensors],
    *,
    keep_hidden: bool,
) -> Tensor:
    first, second = layers
    return FeedForward.apply(ops, eps, keep_hidden, x, residual, *norm, *first.flat(), *second.flat())


def upsample_conv(size: torch.Size, x: Tensor, layer: LayerTensors) -> Tensor:
    return UpsampleConv.apply(size, x, *layer.flat())


def linear(x: Tensor, layer: LayerTensors) -> Tensor:
    return Linear.apply(x, *layer.flat())
