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

The tensors of a matmul are a `Layer`: weight, bias and, for a low-rank adapter, down, shape (R, F_in), or (R, C, 3, 3) for a
convolution, and up, shape (F_out, R). Then y = weight x + bias + up (down x). down x is recomputed too, so the adapter's
activations are not saved. A fused weight of n projections has n ups. Each is None or maps its part of down x to its part of y.
A linear computes the adapter's product first, and the large matmul adds to it before rounding. Adding the product to a bf16
result would lose a quarter of a relative change of 1/600, and two thirds of a change of 1/2000. A convolution cannot start
from another result, so it adds the adapter's product last.

Shapes: B images, C channels, H x W positions, N tokens, F features, R the sum of the ranks of all adapters of one weight;
x_BCHW is channels last, so its tokens are a view.
Read next: `kernels/fastsd_kernels/forward_backward.py`, the operations that these functions call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from fastsd_kernels.forward_backward import ForwardBackwardOps

Gradient = Tensor | None
Layer = Sequence[Any]  # tensors or None: weight, bias, down, up; a fused weight has one up per projection
Gradients = tuple[Gradient, ...]  # one per tensor of a `Layer`


def tokens(x_BCHW: Tensor) -> Tensor:
    """View (B, C, H, W) channels last as (B, N, C)."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def image(x_BNC: Tensor, size: torch.Size) -> Tensor:
    """View (B, N, C) as (B, C, H, W) channels last."""
    return x_BNC.unflatten(1, size).permute(0, 3, 1, 2)


def _join(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat([x, skip], dim=1)


def _to_nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


def _to_nhwc(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1)


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _reads_input(needs: Sequence[bool]) -> bool:
    """Return True if the needed gradients of a layer require its input. All but the bias gradient do."""
    return needs[0] or any(needs[2:])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, *ups: Any) -> Tensor:
    """Compute x weight^T + bias + (x down^T) up^T over the last dimension."""
    if down is None:
        return F.linear(x, weight, bias)
    rows = _as_rows(x)
    reduced = F.linear(rows, down)
    if len(ups) == 1:
        y = F.linear(reduced, ups[0], bias)
    else:
        assert bias is None
        y = rows.new_empty(len(rows), len(weight))
        for y_block, reduced_block, up in _blocks(y, reduced, ups):
            if up is None:
                y_block.zero_()
            else:
                torch.mm(reduced_block, up.t(), out=y_block)
    return torch.addmm(y, rows, weight.t(), out=y).unflatten(0, x.shape[:-1])


def _linear_backward(
    dy: Tensor, x: Tensor | None, layer: Layer, need_x: bool, needs: Sequence[bool]
) -> tuple[Gradient, Gradients]:
    """Return dx and the layer's gradients for `_linear`, None if not needed. x may be None if `_reads_input` is False."""
    weight, _, down, *ups = layer
    dy_rows = _as_rows(dy)
    x_rows = None if x is None else _as_rows(x)
    dx = dweight = ddown = None
    dups: list[Gradient] = [None] * len(ups)
    if down is not None:
        dreduced = dy_rows.new_empty(len(dy_rows), len(down))
        for dy_block, dreduced_block, up in _blocks(dy_rows, dreduced, ups):
            if up is not None:
                torch.mm(dy_block, up, out=dreduced_block)
        if need_x:
            dx = dreduced @ down
            torch.addmm(dx, dy_rows, weight, out=dx)
        if needs[2] and x_rows is not None:
            ddown = dreduced.t() @ x_rows
        if any(needs[3:]) and x_rows is not None:
            blocks = _blocks(dy_rows, x_rows @ down.t(), ups)
            dups = [None if up is None else dy_block.t() @ reduced_block for dy_block, reduced_block, up in blocks]
    elif need_x:
        dx = dy_rows @ weight
    if needs[0] and x_rows is not None:
        dweight = dy_rows.t() @ x_rows
    dbias = dy_rows.sum(0) if needs[1] else None
    return None if dx is None else dx.unflatten(0, dy.shape[:-1]), (dweight, dbias, ddown, *dups)


def _blocks(y: Tensor, reduced: Tensor, ups: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield the columns of y and of down x, and up, of each projection. The last two are None if it has no adapter."""
    reduced_blocks = iter(reduced.chunk(sum(up is not None for up in ups), dim=1))
    for y_block, up in zip(y.chunk(len(ups), dim=1), ups, strict=True):
        yield y_block, None if up is None else next(reduced_blocks), up


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor | None, up: Tensor | None) -> Tensor:
    """Compute a 3x3 convolution with padding 1. Its adapter is a 3x3 convolution with down and a 1x1 convolution with up."""
    y = F.conv2d(x, weight, bias, padding=1)
    if down is not None and up is not None:
        y += _to_nchw(F.linear(_to_nhwc(F.conv2d(x, down, padding=1)), up))
    return y


def _conv_backward(dy: Tensor, x: Tensor, layer: Layer, need_x: bool, needs: Sequence[bool]) -> tuple[Gradient, Gradients]:
    """Return dx and the layer's gradients for `_conv`, None if not needed. Unless `_reads_input`, only x's shape matters."""
    weight, _, down, up = layer
    dx, dweight, dbias = _conv3_backward(dy, x, weight, [need_x, needs[0], needs[1]])
    if down is None or up is None:
        return dx, (dweight, dbias, None, None)
    dreduced = _to_nchw(_to_nhwc(dy) @ up)
    dx_adapter, ddown, _ = _conv3_backward(dreduced, x, down, [need_x, needs[2], False])
    if dx is not None and dx_adapter is not None:
        dx += dx_adapter
    dup = _as_rows(_to_nhwc(dy)).t() @ _as_rows(_to_nhwc(F.conv2d(x, down, padding=1))) if needs[3] else None
    return dx, (dweight, dbias, ddown, dup)


def _conv3_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Gradient, Gradient, Gradient]:
    """Return (dx, dweight, dbias) of a 3x3 convolution with padding 1."""
    geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
    return torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *geometry, needs)


class NormConv(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, groups: int, eps: float, x: Tensor, skip: Any, shift: Any, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer. `tensors` are those of the norm, of the convolution and, if there is one, of the shortcut."""
        norm_weight, norm_bias, *layers = tensors
        joined = _join(x, skip)
        y, mean, rstd = ops.group_norm(joined, norm_weight, norm_bias, groups, eps, True, shift)
        shortcut = _to_nchw(_linear(_to_nhwc(joined), *_as_linear(layers[4:]))) if layers[4:] else None
        ctx.save_for_backward(x, skip, shift, mean, rstd, norm_weight, norm_bias, *layers)
        ctx.ops, ctx.groups, ctx.eps = ops, groups, eps
        return _conv(y, *layers[:4]), shortcut

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dshortcut: Gradient) -> tuple[Gradient, ...]:
        x, skip, shift, mean, rstd, norm_weight, norm_bias, *layers = ctx.saved_tensors
        _, _, _, need_x, need_skip, need_shift, need_norm, _, *needs = ctx.needs_input_grad

        need_y = need_x or need_skip or need_shift or need_norm
        joined = _join(x, skip)
        norm = norm_weight, norm_bias, ctx.groups, ctx.eps, True, shift
        y = ctx.ops.group_norm_recompute(joined, mean, rstd, *norm) if _reads_input(needs[:4]) else joined
        dy, gradients = _conv_backward(dout, y, layers[:4], need_y, needs[:4])
        del y
        dx = dskip = dnorm_weight = dnorm_bias = dshift = None
        if need_y:
            dx, dnorm_weight, dnorm_bias, dshift = ctx.ops.group_norm_backward(dy, joined, mean, rstd, *norm)
        if dshortcut is not None and layers[4:]:
            dx_shortcut, (dmatrix, *other_gradients) = _linear_backward(
                _to_nhwc(dshortcut), _to_nhwc(joined), _as_linear(layers[4:]), need_y, needs[4:]
            )
            gradients += (None if dmatrix is None else dmatrix.view_as(layers[4]), *other_gradients)
            if dx is not None and dx_shortcut is not None:
                dx = dx + _to_nchw(dx_shortcut)
        if dx is not None and skip is not None:
            dx, dskip = dx.split([x.shape[1], skip.shape[1]], dim=1)
        return None, None, None, dx, dskip, dshift, dnorm_weight, dnorm_bias, *gradients


def _as_linear(layer: Layer) -> Layer:
    """View the weight of a 1x1 convolution as that of a linear."""
    return layer[0].flatten(1), *layer[1:]


class GroupNormLinear(Function):
    @staticmethod
    def forward(ctx: Any, ops: ForwardBackwardOps, groups: int, eps: float, x: Tensor, *tensors: Any) -> Tensor:
        norm_weight, norm_bias, *layer = tensors
        y, mean, rstd = ops.group_norm(x, norm_weight, norm_bias, groups, eps, False, None)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, *layer)
        ctx.ops, ctx.groups, ctx.eps = ops, groups, eps
        return _linear(tokens(y), *layer)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        x, mean, rstd, norm_weight, norm_bias, *layer = ctx.saved_tensors
        _, _, _, need_x, need_norm, _, *needs = ctx.needs_input_grad
        norm = norm_weight, norm_bias, ctx.groups, ctx.eps, False, None
        y = tokens(ctx.ops.group_norm_recompute(x, mean, rstd, *norm)) if _reads_input(needs) else None
        dy, gradients = _linear_backward(dout, y, layer, need_x or need_norm, needs)
        dx = dnorm_weight = dnorm_bias = None
        if dy is not None:
            dy = image(dy, x.shape[2:])
            dx, dnorm_weight, dnorm_bias, _ = ctx.ops.group_norm_backward(dy, x, mean, rstd, *norm)
        return None, None, None, dx, dnorm_weight, dnorm_bias, *gradients


class LayerNormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, eps: float, x: Tensor, residual: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        norm_weight, norm_bias, *layer = tensors
        y, s, mean, rstd = ops.layer_norm(x, norm_weight, norm_bias, eps, residual)
        ctx.save_for_backward(s, mean, rstd, norm_weight, norm_bias, *layer)
        ctx.ops, ctx.eps, ctx.added = ops, eps, residual is not None
        return _linear(y, *layer), s if residual is not None else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor, ds: Gradient) -> tuple[Gradient, ...]:
        s, mean, rstd, norm_weight, norm_bias, *layer = ctx.saved_tensors
        _, _, need_x, need_residual, need_norm, _, *needs = ctx.needs_input_grad
        need_y = need_x or need_residual or need_norm
        y = ctx.ops.layer_norm_recompute(s, mean, rstd, norm_weight, norm_bias, ctx.eps) if _reads_input(needs) else None
        dy, gradients = _linear_backward(dout, y, layer, need_y, needs)
        dx = dnorm_weight = dnorm_bias = None
        if dy is not None:
            dx, dnorm_weight, dnorm_bias = ctx.ops.layer_norm_backward(dy, s, mean, rstd, norm_weight, norm_bias, ds)
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
        return _linear(o.flatten(2), *layer)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        q, kv, o, lse, *layer = ctx.saved_tensors
        _, _, _, need_q, need_kv, *needs = ctx.needs_input_grad
        do, gradients = _linear_backward(dout, o.flatten(2), layer, need_q or need_kv, needs)
        dq = dkv = None
        if do is not None:
            do = do.unflatten(-1, (ctx.heads, -1))
            dq, dkv = ctx.ops.attention_backward(do, *_split_heads(q, kv, ctx.heads), o, lse, ctx.precision, kv is None)
            dq, dkv = dq.flatten(2), None if kv is None else dkv.flatten(2)
        return None, None, None, dq, dkv, *gradients


def _split_heads(q: Tensor, kv: Tensor | None, heads: int) -> tuple[Tensor, ...]:
    """View packed q, k, v (B, N, 3C), or q (B, N, C) and packed k, v (B, L, 2C), as separate q, k, v (B, N, heads, D)."""
    if kv is None:
        return q.unflatten(-1, (3, heads, -1)).unbind(2)
    return q.unflatten(-1, (heads, -1)), *kv.unflatten(-1, (2, heads, -1)).unbind(2)


class FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, eps: float, keep_hidden: bool, x: Tensor, residual: Tensor, *tensors: Any
    ) -> Tensor:
        """Apply the layer. `tensors` are those of the norm, of the first linear and of the second linear."""
        norm_weight, norm_bias, *layers = tensors
        y, s, mean, rstd = ops.layer_norm(x, norm_weight, norm_bias, eps, residual)
        hidden = _linear(y, *layers[:4])
        saved_hidden = hidden if keep_hidden else None
        ctx.save_for_backward(s, mean, rstd, saved_hidden, norm_weight, norm_bias, *layers)
        ctx.ops, ctx.eps = ops, eps
        return s + _linear(ops.geglu(hidden), *layers[4:])

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        s, mean, rstd, hidden, norm_weight, norm_bias, *layers = ctx.saved_tensors
        _, _, _, need_x, need_residual, need_norm, _, *needs = ctx.needs_input_grad
        need_y = need_x or need_residual or need_norm
        y: Any = None
        if hidden is None or _reads_input(needs[:4]):
            y = ctx.ops.layer_norm_recompute(s, mean, rstd, norm_weight, norm_bias, ctx.eps)
        if hidden is None:
            hidden = _linear(y, *layers[:4])

        gated = ctx.ops.geglu(hidden) if _reads_input(needs[4:]) else None
        dgated, second_gradients = _linear_backward(dout, gated, layers[4:], need_y or any(needs[:4]), needs[4:])
        del gated
        dx = dnorm_weight = dnorm_bias = None
        first_gradients: Gradients = (None,) * 4
        if dgated is not None:
            dhidden = ctx.ops.geglu_backward(dgated, hidden)
            del dgated, hidden
            dy, first_gradients = _linear_backward(dhidden, y, layers[:4], need_y, needs[:4])
            del dhidden, y
            if dy is not None:
                dx, dnorm_weight, dnorm_bias = ctx.ops.layer_norm_backward(dy, s, mean, rstd, norm_weight, norm_bias, dout)
        return None, None, None, dx, dx, dnorm_weight, dnorm_bias, *first_gradients, *second_gradients


class UpsampleConv(Function):
    @staticmethod
    def forward(ctx: Any, height: int, width: int, x: Tensor, *layer: Any) -> Tensor:
        ctx.save_for_backward(x, *layer)
        ctx.size = height, width
        return _conv(F.interpolate(x, size=ctx.size, mode="nearest"), *layer)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        x, *layer = ctx.saved_tensors
        _, _, need_x, *needs = ctx.needs_input_grad
        upsampled = F.interpolate(x, size=ctx.size, mode="nearest")
        dupsampled, gradients = _conv_backward(dout, upsampled, layer, need_x, needs)
        dx = torch.ops.aten.upsample_nearest2d_backward(dupsampled, ctx.size, x.shape) if need_x else None
        return None, None, dx, *gradients


class Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *layer: Any) -> Tensor:
        ctx.save_for_backward(x, *layer)
        return _linear(x, *layer)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
        x, *layer = ctx.saved_tensors
        need_x, *needs = ctx.needs_input_grad
        dx, gradients = _linear_backward(dy, x, layer, need_x, needs)
        return dx, *gradients


norm_conv = NormConv.apply
group_norm_linear = GroupNormLinear.apply
layer_norm_linear = LayerNormLinear.apply
attention_linear = AttentionLinear.apply
feed_forward = FeedForward.apply
upsample_conv = UpsampleConv.apply
linear = Linear.apply
