"""Floor 1: layers that keep the input of a norm or a gate, not its output.

A convolution or linear after a norm needs the norm's output for its weight gradient, and the norm needs its own input: two
tensors, of which the second can be had from the first for one pass over memory. So each function here joins a norm (or
GEGLU, attention, nearest-neighbour growth) with the matmul behind it, keeps what lies before, and makes the matmul's input
again in the backward. At 512 px that is 252 M numbers an image for SD1.5's UNet, of 468 M in diffusers'.

    norm_conv           [x, skip] -> GroupNorm + SiLU -> conv 3x3, and the 1x1 shortcut of the same   keeps x, skip
    group_norm_linear   GroupNorm -> linear                                                           keeps x
    layer_norm_linear   x + residual -> LayerNorm -> linear                                           keeps the sum
    attention_linear    q, k, v -> attention -> linear                                                keeps q, k, v, o
    feed_forward        x + residual -> LayerNorm -> linear -> GEGLU -> linear, added                 keeps the sum, hidden
    upsample_conv       nearest neighbour -> conv 3x3                                                 keeps the small x

A concatenation of skips is made twice and kept never. A weight that is frozen costs no gradient.  All are as exact as the plain
layers: what is made again has the forward's bits.

Shapes: B images, C channels, H x W positions, N tokens, F features; x_BCHW is channels last, so its tokens are a view.
Read next: `kernels/fastsd_kernels/pieces.py`, what these functions call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastsd_kernels.pieces import Pieces

Gradient = Tensor | None


def tokens(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) channels last -> (B, N, C), a view."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def image(x_BNC: Tensor, size: torch.Size) -> Tensor:
    """(B, N, C) -> (B, C, H, W) channels last, a view."""
    return x_BNC.unflatten(1, size).permute(0, 3, 1, 2)


def _join(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat([x, skip], dim=1)


def _linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Gradient, Gradient, Gradient]:
    """(dx, dweight, dbias) of y = x weight^T + bias over the last dimension; None where not needed."""
    rows = dy.reshape(-1, dy.shape[-1])
    dx = (rows @ weight).unflatten(0, dy.shape[:-1]) if need_x else None
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight and x is not None else None
    return dx, dweight, rows.sum(0) if need_bias else None


def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Gradient, Gradient, Gradient]:
    """(dx, dweight, dbias) of a 3x3 convolution with padding 1."""
    sizes = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    return torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *sizes, [need_x, need_weight, need_bias])


class NormConv(Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: Pieces, groups: int, eps: float, x: Tensor, skip: Tensor | None, shift: Tensor | None,
        norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
        short_weight: Tensor | None, short_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        whole = _join(x, skip)
        y, mean, rstd = pieces.group_norm(whole, norm_weight, norm_bias, groups, eps, True, shift)
        short = None if short_weight is None else F.linear(whole.permute(0, 2, 3, 1), short_weight.flatten(1), short_bias)
        ctx.save_for_backward(x, skip, shift, mean, rstd, norm_weight, norm_bias, weight, short_weight)
        ctx.pieces, ctx.groups, ctx.eps = pieces, groups, eps
        return F.conv2d(y, weight, bias, padding=1), None if short is None else short.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dshort: Gradient) -> tuple[Gradient, ...]:
        x, skip, shift, mean, rstd, norm_weight, norm_bias, weight, short_weight = ctx.saved_tensors
        _, _, _, need_x, need_skip, need_shift, need_norm, _, need_weight, need_bias, need_short, need_short_bias = (
            ctx.needs_input_grad
        )
        need_y = need_x or need_skip or need_shift or need_norm
        whole = _join(x, skip)
        norm = norm_weight, norm_bias, ctx.groups, ctx.eps, True, shift
        y = ctx.pieces.group_norm_again(whole, mean, rstd, *norm) if need_weight else whole  # else only its shape is read
        dy, dweight, dbias = _conv_backward(dout, y, weight, need_y, need_weight, need_bias)
        del y
        dx = dskip = dnorm_weight = dnorm_bias = dshift = dshort_weight = dshort_bias = None
        if need_y:
            dx, dnorm_weight, dnorm_bias, dshift = ctx.pieces.group_norm_backward(dy, whole, mean, rstd, *norm)
        if dshort is not None and short_weight is not None:
            rows, matrix = dshort.permute(0, 2, 3, 1), short_weight.flatten(1)
            through, dshort_weight, dshort_bias = _linear_backward(
                rows, whole.permute(0, 2, 3, 1), matrix, need_y, need_short, need_short_bias
            )
            if dshort_weight is not None:
                dshort_weight = dshort_weight.view_as(short_weight)
            if dx is not None and through is not None:
                dx = dx + through.permute(0, 3, 1, 2)
        if dx is not None and skip is not None:
            dx, dskip = dx.split([x.shape[1], skip.shape[1]], dim=1)
        return (
            None, None, None, dx, dskip, dshift, dnorm_weight, dnorm_bias, dweight, dbias, dshort_weight, dshort_bias
        )  # fmt: skip


class GroupNormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: Pieces, groups: int, eps: float, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        weight: Tensor, bias: Tensor,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = pieces.group_norm(x, norm_weight, norm_bias, groups, eps, False, None)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        ctx.pieces, ctx.groups, ctx.eps = pieces, groups, eps
        return F.linear(tokens(y), weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        _, _, _, need_x, need_norm, _, need_weight, need_bias = ctx.needs_input_grad
        norm = norm_weight, norm_bias, ctx.groups, ctx.eps, False, None
        y = tokens(ctx.pieces.group_norm_again(x, mean, rstd, *norm)) if need_weight else None
        dy, dweight, dbias = _linear_backward(dout, y, weight, need_x or need_norm, need_weight, need_bias)
        dx = dnorm_weight = dnorm_bias = None
        if dy is not None:
            dy = image(dy, x.shape[2:])
            dx, dnorm_weight, dnorm_bias, _ = ctx.pieces.group_norm_backward(dy, x, mean, rstd, *norm)
        return None, None, None, dx, dnorm_weight, dnorm_bias, dweight, dbias


class LayerNormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: Pieces, eps: float, x: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y, s, mean, rstd = pieces.layer_norm(x, norm_weight, norm_bias, eps, residual)
        ctx.save_for_backward(s, mean, rstd, norm_weight, norm_bias, weight)
        ctx.pieces, ctx.eps, ctx.added = pieces, eps, residual is not None
        return F.linear(y, weight), s if residual is not None else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor, ds: Gradient) -> tuple[Gradient, ...]:
        s, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        _, _, need_x, need_residual, need_norm, _, need_weight = ctx.needs_input_grad
        need_y = need_x or need_residual or need_norm
        y = ctx.pieces.layer_norm_again(s, mean, rstd, norm_weight, norm_bias, ctx.eps) if need_weight else None
        dy, dweight, _ = _linear_backward(dout, y, weight, need_y, need_weight, False)
        dx = dnorm_weight = dnorm_bias = None
        if dy is not None:
            dx, dnorm_weight, dnorm_bias = ctx.pieces.layer_norm_backward(dy, s, mean, rstd, norm_weight, norm_bias, ds)
        return None, None, dx, dx if ctx.added else None, dnorm_weight, dnorm_bias, dweight


class AttentionLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: Pieces, precision: str, heads: int, q: Tensor, kv: Tensor | None, weight: Tensor, bias: Tensor
    ) -> Tensor:
        parts = _heads(q, kv, heads)
        o, lse = pieces.attention(*parts, precision)
        ctx.save_for_backward(q, kv, o, lse, weight)
        ctx.pieces, ctx.precision, ctx.heads = pieces, precision, heads
        return F.linear(o.flatten(2), weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        q, kv, o, lse, weight = ctx.saved_tensors
        _, _, _, need_q, need_kv, need_weight, need_bias = ctx.needs_input_grad
        do, dweight, dbias = _linear_backward(dout, o.flatten(2), weight, need_q or need_kv, need_weight, need_bias)
        dq = dkv = None
        if do is not None:
            do = do.unflatten(-1, (ctx.heads, -1))
            dq, dkv = ctx.pieces.attention_backward(do, *_heads(q, kv, ctx.heads), o, lse, ctx.precision, kv is None)
            dq, dkv = dq.flatten(2), None if kv is None else dkv.flatten(2)
        return None, None, None, dq, dkv, dweight, dbias


def _heads(q: Tensor, kv: Tensor | None, heads: int) -> tuple[Tensor, ...]:
    """q, k, v (B, N, heads, D) of one packed (B, N, 3C), or of q (B, N, C) and packed k, v (B, L, 2C): views."""
    if kv is None:
        return q.unflatten(-1, (3, heads, -1)).unbind(2)
    return q.unflatten(-1, (heads, -1)), *kv.unflatten(-1, (2, heads, -1)).unbind(2)


class FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: Pieces, eps: float, keep_hidden: bool, x: Tensor, residual: Tensor,
        norm_weight: Tensor, norm_bias: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor,
    ) -> Tensor:  # fmt: skip
        y, s, mean, rstd = pieces.layer_norm(x, norm_weight, norm_bias, eps, residual)
        hidden = F.linear(y, weight_1, bias_1)
        kept = hidden if keep_hidden else None
        ctx.save_for_backward(s, mean, rstd, kept, norm_weight, norm_bias, weight_1, bias_1, weight_2)
        ctx.pieces, ctx.eps = pieces, eps
        return s + F.linear(pieces.geglu(hidden), weight_2, bias_2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        s, mean, rstd, hidden, norm_weight, norm_bias, weight_1, bias_1, weight_2 = ctx.saved_tensors
        _, _, _, need_x, need_residual, need_norm, _, need_1, need_bias_1, need_2, need_bias_2 = ctx.needs_input_grad
        need_y = need_x or need_residual or need_norm
        y = ctx.pieces.layer_norm_again(s, mean, rstd, norm_weight, norm_bias, ctx.eps)
        if hidden is None:
            hidden = F.linear(y, weight_1, bias_1)
        gated = ctx.pieces.geglu(hidden) if need_2 else None
        dgated, dweight_2, dbias_2 = _linear_backward(
            dout, gated, weight_2, need_y or need_1 or need_bias_1, need_2, need_bias_2
        )
        del gated
        dx = dnorm_weight = dnorm_bias = dweight_1 = dbias_1 = None
        if dgated is not None:
            dhidden = ctx.pieces.geglu_backward(dgated, hidden)
            del dgated, hidden
            dy, dweight_1, dbias_1 = _linear_backward(dhidden, y, weight_1, need_y, need_1, need_bias_1)
            del dhidden, y
            if dy is not None:
                dx, dnorm_weight, dnorm_bias = ctx.pieces.layer_norm_backward(dy, s, mean, rstd, norm_weight, norm_bias, dout)
        return None, None, None, dx, dx, dnorm_weight, dnorm_bias, dweight_1, dbias_1, dweight_2, dbias_2


class UpsampleConv(Function):
    @staticmethod
    def forward(ctx: Any, height: int, width: int, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size = height, width
        return F.conv2d(F.interpolate(x, size=ctx.size, mode="nearest"), weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        x, weight = ctx.saved_tensors
        _, _, need_x, need_weight, need_bias = ctx.needs_input_grad
        large = F.interpolate(x, size=ctx.size, mode="nearest")
        dlarge, dweight, dbias = _conv_backward(dout, large, weight, need_x, need_weight, need_bias)
        dx = torch.ops.aten.upsample_nearest2d_backward(dlarge, ctx.size, x.shape) if need_x else None
        return None, None, dx, dweight, dbias


norm_conv = NormConv.apply
group_norm_linear = GroupNormLinear.apply
layer_norm_linear = LayerNormLinear.apply
attention_linear = AttentionLinear.apply
feed_forward = FeedForward.apply
upsample_conv = UpsampleConv.apply
