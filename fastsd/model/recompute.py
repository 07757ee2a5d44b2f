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

With `fused` operations (on a GPU), a pass over memory does more than one thing. The norm reads x and skip as two images; its
backward adds the gradient of a residual to that of x, and writes the norm's output over its gradient. The norm or sum after a
convolution adds its bias, and a sum also takes the next norm's statistics (`Image.partial`). Other operations concatenate the
skip twice, and never save the concatenation.

No gradient of a frozen weight is computed. All layers are as exact as plain ones: a recomputed tensor has the bits of the
forward.

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
from fastsd.model.gradient_sink import destination_of
from fastsd.model.matmul import NO_NEEDS, UNFUSED, Gradient, Gradients, LayerTensors, Needs, unpack
from fastsd_kernels.ops import Destination, ForwardBackwardOps, Images


class NormTensors(NamedTuple):
    weight: Tensor
    bias: Tensor


def tokens(x_BCHW: Tensor) -> Tensor:
    """View (B, C, H, W) channels last as (B, N, C)."""
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def image(x_BNC: Tensor, size: torch.Size) -> Tensor:
    """View (B, N, C) as (B, C, H, W) channels last."""
    return x_BNC.unflatten(1, size).permute(0, 3, 1, 2)


class Image(NamedTuple):
    """An image, and its partial statistics (`fastsd_kernels.group_norm_statistics`), if the pass that wrote it took them."""

    x_BCHW: Tensor
    partial: Tensor | None = None


def _images(ops: ForwardBackwardOps, x: Tensor, skip: Tensor | None) -> Images:
    """Return x and the skip as the norm reads them: as two images, or concatenated."""
    return (x,) if skip is None else (x, skip) if ops.fused else (torch.cat([x, skip], dim=1),)


def _shape_of(images: Images) -> Tensor:
    """Return a tensor in the shape of the concatenated images, without memory of its own."""
    return images[0] if len(images) == 1 else images[0][:, :1].expand(-1, sum(image.shape[1] for image in images), -1, -1)


def _destination(needed: Sequence[bool], *vectors: Tensor | None) -> Destination | None:
    """Return where the gradients of the vectors go, or None if they are returned to autograd, or not all of them are needed."""
    needed_vectors = [vector for vector, needs in zip(vectors, needed, strict=True) if needs and vector is not None]
    return destination_of(*needed_vectors) if len(needed_vectors) == len(vectors) else None


def _norm_sums(needed: Sequence[bool], weight: Tensor, bias: Tensor, x_bias: Tensor | None) -> dict[str, Any]:
    """Return which sums a LayerNorm's backward computes, and their destination. `needed` is that of x_bias, weight and bias."""
    sums, *norm = needed
    vectors = (weight, bias, x_bias) if sums else (weight, bias)
    return {"sums": sums, "into": _destination((*norm, *([sums] if sums else [])), *vectors)}


class NormConv(Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: ForwardBackwardOps,
        groups: int,
        eps: float,
        residual: bool,
        x: Tensor,
        skip: Any,
        partial: Any,
        skip_partial: Any,
        shift: Any,
        *tensors: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer. `tensors` are those of the norm, of the convolution and, if there is one, of the shortcut."""
        norm_weight, norm_bias, *layers = tensors
        conv, shortcut = _conv_and_shortcut(layers)
        images = _images(ops, x, skip)
        norm = norm_weight, norm_bias, groups, eps, shift
        y, mean, rstd = ops.group_norm(images, *norm, silu=True, partials=(partial, skip_partial))
        ctx.save_for_backward(x, skip, shift, mean, rstd, norm_weight, norm_bias, *layers)
        ctx.ops, ctx.groups, ctx.eps = ops, groups, eps
        passed = matmul.conv1(images, shortcut) if shortcut is not None else x.view_as(x) if residual else None
        return matmul.conv(y, conv), passed

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dpassed: Gradient) -> tuple[Gradient, ...]:
        x, skip, shift, mean, rstd, norm_weight, norm_bias, *layers = ctx.saved_tensors
        need_y, needs = any(ctx.needs_input_grad[4:11]), ctx.needs_input_grad[11:]
        (conv, shortcut), conv_needs = _conv_and_shortcut(layers), unpack(Needs, needs[:UNFUSED])

        images, norm = _images(ctx.ops, x, skip), (norm_weight, norm_bias, ctx.groups, ctx.eps, shift)
        through = dpassed if shortcut is None else None
        y, dimages = _shape_of(images), None
        dx = dskip = dnorm_weight = dnorm_bias = dshift = None
        if need_y:
            dy, _ = matmul.conv_backward(dout, y, conv, NO_NEEDS, need_x=True)
            # dy becomes y, which the convolution's weight gradient needs.
            into = _destination(ctx.needs_input_grad[9:11], norm_weight, norm_bias)
            options = {"silu": True, "through": through, "output": conv_needs.input, "into": into}
            gradients = ctx.ops.group_norm_backward(dy, images, mean, rstd, *norm, **options)
            del dy
            dimages, dnorm_weight, dnorm_bias, dshift, output = gradients
            y = y if output is None else output
        elif conv_needs.input:
            y = ctx.ops.group_norm_recompute(images, mean, rstd, *norm, silu=True)
        _, gradients = matmul.conv_backward(dout, y, conv, conv_needs, need_x=False)
        del y
        if dpassed is not None and shortcut is not None:
            operands = dpassed, images, shortcut, unpack(Needs, needs[UNFUSED:]), dimages
            gradients += matmul.conv1_backward(*operands, in_product=ctx.ops.fused)
        if dimages is not None:
            dx, dskip = dimages if len(dimages) > 1 else (dimages[0], None)
            if skip is not None and dskip is None:
                dx, dskip = dx.split([x.shape[1], skip.shape[1]], dim=1)
        return None, None, None, None, dx, dskip, None, None, dshift, dnorm_weight, dnorm_bias, *gradients


def _conv_and_shortcut(layers: Sequence[Any]) -> tuple[LayerTensors, LayerTensors | None]:
    """Unpack a convolution and, if there is one, a shortcut."""
    shortcut = layers[UNFUSED:]
    return unpack(LayerTensors, layers[:UNFUSED]), unpack(LayerTensors, shortcut) if shortcut else None


class GroupNormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, groups: int, eps: float, x: Tensor, partial: Any, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        norm_weight, norm_bias, *layer = tensors
        y, mean, rstd = ops.group_norm((x,), norm_weight, norm_bias, groups, eps, None, silu=False, partials=(partial,))
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, *layer)
        ctx.ops, ctx.groups, ctx.eps = ops, groups, eps
        return matmul.linear(tokens(y), unpack(LayerTensors, layer)), x.view_as(x) if ops.fused else None

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dresidual: Gradient) -> tuple[Gradient, ...]:
        x, mean, rstd, norm_weight, norm_bias, *tensors = ctx.saved_tensors
        need_y = any(ctx.needs_input_grad[3:7])
        layer, needs = unpack(LayerTensors, tensors), unpack(Needs, ctx.needs_input_grad[7:])
        norm = norm_weight, norm_bias, ctx.groups, ctx.eps, None
        dx = dnorm_weight = dnorm_bias = y = None
        dy, dreduced = matmul.linear_input_gradient(dout, layer, need_x=need_y)
        if dy is not None:
            into = _destination(ctx.needs_input_grad[5:7], norm_weight, norm_bias)
            options = {"silu": False, "through": dresidual, "output": needs.input, "into": into}
            gradients = ctx.ops.group_norm_backward(image(dy, x.shape[2:]), (x,), mean, rstd, *norm, **options)
            del dy
            (dx,), dnorm_weight, dnorm_bias, _, y = gradients
        elif needs.input:
            y = ctx.ops.group_norm_recompute((x,), mean, rstd, *norm, silu=False)
        gradients = matmul.linear_gradients(dout, None if y is None else tokens(y), layer, needs, dreduced)
        return None, None, None, dx, None, dnorm_weight, dnorm_bias, *gradients


class LayerNormLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, ops: ForwardBackwardOps, eps: float, x: Tensor, residual: Any, x_bias: Any, *tensors: Any
    ) -> tuple[Tensor, Tensor]:
        norm_weight, norm_bias, *layer = tensors
        y, s, mean, rstd = ops.layer_norm(x, norm_weight, norm_bias, eps, residual)
        ctx.save_for_backward(s, mean, rstd, x_bias, norm_weight, norm_bias, *layer)
        ctx.ops, ctx.eps, ctx.added = ops, eps, residual is not None
        return matmul.linear(y, unpack(LayerTensors, layer)), s

    @staticmethod
    def backward(ctx: Any, dout: Tensor, ds: Tensor) -> tuple[Gradient, ...]:
        s, mean, rstd, x_bias, norm_weight, norm_bias, *tensors = ctx.saved_tensors
        layer, needs = unpack(LayerTensors, tensors), unpack(Needs, ctx.needs_input_grad[7:])
        need_y = any(ctx.needs_input_grad[2:7])
        norm = s, mean, rstd, norm_weight, norm_bias, ctx.eps
        dy, dreduced = matmul.linear_input_gradient(dout, layer, need_x=need_y)
        dx = dx_bias = dnorm_weight = dnorm_bias = y = None
        if dy is not None:
            options = {"output": needs.input, **_norm_sums(ctx.needs_input_grad[4:7], norm_weight, norm_bias, x_bias)}
            dx, dnorm_weight, dnorm_bias, dx_bias, y = ctx.ops.layer_norm_backward(dy, *norm, ds, **options)
        elif needs.input:
            y = ctx.ops.layer_norm_recompute(*norm)
        gradients = matmul.linear_gradients(dout, y, layer, needs, dreduced)
        return None, None, dx, dx if ctx.added else None, dx_bias, dnorm_weight, dnorm_bias, *gradients


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
        ctx: Any,
        ops: ForwardBackwardOps,
        eps: float,
        keep_hidden: bool,
        x: Tensor,
        residual: Tensor,
        x_bias: Any,
        *tensors: Any,
    ) -> Tensor:
        """Apply the layer. `tensors` are those of the norm, of the first linear and of the second linear."""
        norm_weight, norm_bias, *layers = tensors
        first, second = unpack(LayerTensors, layers[:UNFUSED]), unpack(LayerTensors, layers[UNFUSED:])
        y, s, mean, rstd = ops.layer_norm(x, norm_weight, norm_bias, eps, residual)
        hidden = matmul.linear(y, first)
        saved_hidden = hidden if keep_hidden else None
        ctx.save_for_backward(s, mean, rstd, saved_hidden, x_bias, norm_weight, norm_bias, *layers)
        ctx.ops, ctx.eps = ops, eps
        return s + matmul.linear(ops.geglu(hidden), second)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Gradient, ...]:
        s, mean, rstd, hidden, x_bias, norm_weight, norm_bias, *layers = ctx.saved_tensors
        need_y, needs = any(ctx.needs_input_grad[3:8]), ctx.needs_input_grad[8:]
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
            into = _destination([first_needs.bias], first.bias)
            options = {"output": second_needs.input, "sums": first_needs.bias, "into": into}
            dhidden, gated, dbias = ctx.ops.geglu_backward(dgated, hidden, **options)
            del dgated
        elif second_needs.input:
            gated = ctx.ops.geglu(hidden)
        del hidden
        second_gradients = matmul.linear_gradients(dout, gated, second, second_needs, dreduced)
        del gated

        dx = dx_bias = dnorm_weight = dnorm_bias = None
        first_gradients: Gradients = (None,) * 4
        if dhidden is not None:
            dy, dreduced = matmul.linear_input_gradient(dhidden, first, need_x=need_y)
            if dy is not None:
                options = _norm_sums(ctx.needs_input_grad[5:8], norm_weight, norm_bias, x_bias)
                options["output"] = first_needs.input and y is None
                dx, dnorm_weight, dnorm_bias, dx_bias, rebuilt = ctx.ops.layer_norm_backward(dy, *norm, dout, **options)
                y = rebuilt if y is None else y
            elif first_needs.input and y is None:
                y = ctx.ops.layer_norm_recompute(*norm)
            no_bias = first_needs._replace(bias=False)  # it is summed already
            dweight, _, *dadapter = matmul.linear_gradients(dhidden, y, first, no_bias, dreduced)
            first_gradients = dweight, dbias, *dadapter
        return None, None, None, dx, dx, dx_bias, dnorm_weight, dnorm_bias, *first_gradients, *second_gradients


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
        needs = unpack(Needs, ctx.needs_input_grad[1:])
        ctx.save_for_backward(x if needs.input else None, *layer)
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
    x: Image,
    skip: Image | None,
    shift: Tensor | None,
    norm: NormTensors,
    conv: LayerTensors,
    shortcut: LayerTensors | None,
    *,
    residual: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return conv(silu(norm([x, skip] + shift))), and shortcut([x, skip]), or x without a shortcut.

    With `residual`, x has a further use as the second result. The gradient of that is then added where dx is written.
    """
    layers = conv.flat() if shortcut is None else (*conv.flat(), *shortcut.flat())
    other, skip_partial = (None, None) if skip is None else skip
    images = x.x_BCHW, other, x.partial, skip_partial
    h, passed = NormConv.apply(ops, groups, eps, ops.fused and residual, *images, shift, *norm, *layers)
    return h, x.x_BCHW if passed is None else passed


def group_norm_linear(
    ops: ForwardBackwardOps, groups: int, eps: float, x: Image, norm: NormTensors, layer: LayerTensors
) -> tuple[Tensor, Tensor]:
    """Return linear(norm(x)), and x as in `norm_conv` with `residual`."""
    y, residual = GroupNormLinear.apply(ops, groups, eps, *x, *norm, *layer.flat())
    return y, x.x_BCHW if residual is None else residual


def add(ops: ForwardBackwardOps, h: Tensor, bias: Tensor | None, residual: Tensor | None) -> Image:
    """Return h + bias + residual."""
    return Image(*ops.add_statistics(h, bias, residual))


def without_bias(ops: ForwardBackwardOps, layer: LayerTensors) -> tuple[LayerTensors, Tensor | None]:
    """Return a convolution, and the bias that the next pass over its result has to add: None if the convolution adds it."""
    return (layer._replace(bias=None), layer.bias) if ops.fused else (layer, None)


def layer_norm_linear(
    ops: ForwardBackwardOps,
    eps: float,
    x: Tensor,
    residual: Tensor | None,
    norm: NormTensors,
    layer: LayerTensors,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return linear(norm(x + residual)), and x + residual. Without a residual the second is x.

    Other uses of x should read the second result. Their gradient is then added by the norm's backward.

    Args:
        x_bias: a bias that x contains already, detached. Its gradient is the sum of that of x, which the norm's backward has.
    """
    return LayerNormLinear.apply(ops, eps, x, residual, x_bias, *norm, *layer.flat())


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
    x_bias: Tensor | None = None,
) -> Tensor:
    """Return s + linear(geglu(linear(norm(s)))) with s = x + residual. `x_bias` is as in `layer_norm_linear`."""
    first, second = layers
    return FeedForward.apply(ops, eps, keep_hidden, x, residual, x_bias, *norm, *first.flat(), *second.flat())


def upsample_conv(size: torch.Size, x: Tensor, layer: LayerTensors) -> Tensor:
    return UpsampleConv.apply(size, x, *layer.flat())


def linear(x: Tensor, layer: LayerTensors) -> Tensor:
    return Linear.apply(x, *layer.flat())
