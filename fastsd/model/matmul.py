"""The matmuls of a layer: a linear or a 3x3 convolution with an optional low-rank adapter, forward and backward.

    y = weight x + bias + up (down x)

Without an adapter, y = weight x + bias. down has the shape (R, F_in), or (R, C, 3, 3) for a convolution, and up (F_out, R). The
backward recomputes down x, so the adapter's activations are not saved. A fused weight of n projections has n ups. Each is None
or maps its part of down x to its part of y. A linear computes the adapter's product first, and the large matmul adds to it
before rounding. Adding the product to a bf16 result would lose a quarter of a relative change of 1/600, and two thirds of a
change of 1/2000. A convolution cannot start from another result, so it adds the adapter's product last.

Nothing here is differentiable: `fastsd/model/recompute.py` has the autograd functions.
Shapes: B images, C channels, H x W positions, F features, R the sum of the ranks of all adapters of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsd.model import conv_as_matmul
from fastsd.model.gradient_sink import sink_of
from fastsd_kernels.ops import Images

Gradient = Tensor | None
Gradients = tuple[Gradient, ...]  # one per tensor of a layer, in the order of `LayerTensors.flat`


class LayerTensors(NamedTuple):
    """The tensors of a matmul. Without an adapter, down and all ups are None."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    ups: tuple[Tensor | None, ...] = (None,)

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return the tensors one by one, because autograd does not look into tuples. `unpack` is the inverse."""
        return *self[:3], *self.ups


class Needs(NamedTuple):
    """For each tensor of a layer, True if its gradient is needed."""

    weight: bool
    bias: bool
    down: bool
    ups: tuple[bool, ...]

    @property
    def input(self) -> bool:
        """True if the gradients require the layer's input. All but the bias gradient do."""
        return self.weight or self.down or any(self.ups)


UNFUSED = 4  # tensors of a layer with one up
NO_NEEDS = Needs(False, False, False, (False,))  # of such a layer, where only the gradient of its input is needed
Unpacked = TypeVar("Unpacked", LayerTensors, Needs)


def unpack(kind: type[Unpacked], values: Sequence[Any]) -> Unpacked:
    weight, bias, down, *ups = values
    return kind(weight, bias, down, tuple(ups))


def to_nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


def to_nhwc(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1)


def _as_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def linear(x: Tensor, layer: LayerTensors) -> Tensor:
    """Compute x weight^T + bias + (x down^T) up^T over the last dimension."""
    weight, bias, down, ups = layer
    if down is None:
        return F.linear(x, weight, bias)
    rows = _as_rows(x)
    reduced = F.linear(rows, down)
    if len(ups) == 1:
        assert ups[0] is not None
        y = F.linear(reduced, ups[0], bias)
    else:
        assert bias is None
        y = rows.new_empty(len(rows), len(weight))
        for y_block, reduced_block, up in _blocks(y, reduced, ups):
            if up is None or reduced_block is None:
                y_block.zero_()
            else:
                torch.mm(reduced_block, up.t(), out=y_block)
    return torch.addmm(y, rows, weight.t(), out=y).unflatten(0, x.shape[:-1])


def linear_backward(
    dy: Tensor, x: Tensor | None, layer: LayerTensors, needs: Needs, *, need_x: bool
) -> tuple[Gradient, Gradients]:
    """Return dx and the layer's gradients for `linear`, None if not needed. x may be None if `needs.input` is False.

    A gradient whose tensor has a sink (`gradient_sink.py`) is written there, and None is returned for it.
    """
    dx, dreduced = linear_input_gradient(dy, layer, need_x=need_x)
    return dx, linear_gradients(dy, x, layer, needs, dreduced)


def linear_input_gradient(dy: Tensor, layer: LayerTensors, *, need_x: bool) -> tuple[Gradient, Gradient]:
    """Return dx, None if not needed, and the gradient of down x, None without an adapter.

    The norm or gate before the linear can then rebuild x in the pass that reads dx, and `linear_gradients` comes after it.
    """
    weight, _, down, ups = layer
    dy_rows = _as_rows(dy)
    dx = dreduced = None
    if down is not None:
        dreduced = dy_rows.new_empty(len(dy_rows), len(down))
        for dy_block, dreduced_block, up in _blocks(dy_rows, dreduced, ups):
            if up is not None and dreduced_block is not None:
                torch.mm(dy_block, up, out=dreduced_block)
        if need_x:
            dx = dreduced @ down
            torch.addmm(dx, dy_rows, weight, out=dx)
    elif need_x:
        dx = dy_rows @ weight
    return None if dx is None else dx.unflatten(0, dy.shape[:-1]), dreduced


def linear_gradients(dy: Tensor, x: Tensor | None, layer: LayerTensors, needs: Needs, dreduced: Gradient) -> Gradients:
    """Return the layer's gradients. `dreduced` is from `linear_input_gradient`."""
    weight, bias, down, ups = layer
    dy_rows = _as_rows(dy)
    x_rows = None if x is None else _as_rows(x)
    dweight = dbias = ddown = None
    dups: list[Gradient] = [None] * len(ups)
    if dreduced is not None and down is not None and x_rows is not None:
        if needs.down:
            ddown = _product(down, dreduced, x_rows)
        if any(needs.ups):
            blocks = _blocks(dy_rows, x_rows @ down.t(), ups)
            dups = [None if reduced_block is None else dy_block.t() @ reduced_block for dy_block, reduced_block, _ in blocks]
    if needs.weight and x_rows is not None:
        dweight = _product(weight, dy_rows, x_rows)
    if needs.bias and bias is not None:
        dbias = _sum(bias, dy_rows)
    return dweight, dbias, ddown, *dups


def _product(weight: Tensor, dy_rows: Tensor, x_rows: Tensor) -> Gradient:
    """Return the gradient of a linear's weight, or None if it went to a sink."""
    sink = sink_of(weight)
    if sink is None:
        return dy_rows.t() @ x_rows
    sink.add_product(dy_rows.t(), x_rows)
    return None


def _sum(bias: Tensor, dy_rows: Tensor) -> Gradient:
    """Return the gradient of a linear's bias, or None if it went to a sink."""
    sink = sink_of(bias)
    if sink is None:
        return dy_rows.sum(0)
    sink.add_sum(dy_rows)
    return None


def _blocks(y: Tensor, reduced: Tensor, ups: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Yield the columns of y and of down x, and up, of each projection. The last two are None if it has no adapter."""
    reduced_blocks = iter(reduced.chunk(sum(up is not None for up in ups), dim=1))
    for y_block, up in zip(y.chunk(len(ups), dim=1), ups, strict=True):
        yield y_block, None if up is None else next(reduced_blocks), up


def conv(x: Tensor, layer: LayerTensors) -> Tensor:
    """Compute a 3x3 convolution with padding 1. Its adapter is a 3x3 convolution with down and a 1x1 convolution with up."""
    weight, bias, down, (up,) = layer
    y = _conv3(x, weight, bias)
    if down is not None and up is not None:
        y += to_nchw(F.linear(to_nhwc(_conv3(x, down, None)), up))
    return y


def conv_backward(dy: Tensor, x: Tensor, layer: LayerTensors, needs: Needs, *, need_x: bool) -> tuple[Gradient, Gradients]:
    """Return dx and the layer's gradients for `conv`, None if not needed. Unless `needs.input`, only x's shape matters."""
    weight, _, down, (up,) = layer
    dx, dweight, dbias = _conv3_backward(dy, x, weight, [need_x, needs.weight, needs.bias])
    if down is None or up is None:
        return dx, (dweight, dbias, None, None)
    dreduced = to_nchw(to_nhwc(dy) @ up)
    dx_adapter, ddown, _ = _conv3_backward(dreduced, x, down, [need_x, needs.down, False])
    if dx is not None and dx_adapter is not None:
        dx += dx_adapter
    dup = _as_rows(to_nhwc(dy)).t() @ _as_rows(to_nhwc(_conv3(x, down, None))) if any(needs.ups) else None
    return dx, (dweight, dbias, ddown, dup)


def _conv3(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute a 3x3 convolution with padding 1."""
    if conv_as_matmul.prefers_columns(x, weight):
        return conv_as_matmul.output(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=1)


def _conv3_backward(dy: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Gradient, Gradient, Gradient]:
    """Return (dx, dweight, dbias) of a 3x3 convolution with padding 1."""
    dx = conv_as_matmul.input_gradient(dy, weight) if needs[0] and conv_as_matmul.prefers_columns(x, weight) else None
    by_matmul = needs[1] and conv_as_matmul.prefers_matmul_gradient(x, weight)
    dweight = conv_as_matmul.weight_gradient(dy, x, weight) if by_matmul else None
    dbias = dy.sum((0, 2, 3)) if needs[2] and by_matmul else None
    missing = [need and gradient is None for need, gradient in zip(needs, (dx, dweight, dbias), strict=True)]
    if any(missing):
        geometry = [1, 1], [1, 1], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
        others = torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *geometry, missing)
        dx, dweight, dbias = (
            other if needed else gradient for other, needed, gradient in zip(others, missing, (dx, dweight, dbias), strict=True)
        )
    return dx, dweight, dbias


def conv1(images: Images, layer: LayerTensors) -> Tensor:
    """Compute a 1x1 convolution. The channels of its input are those of the images, one after the other."""
    (image, block), *others = _blocks_of_weight(images, layer)
    y = linear(to_nhwc(image), block)
    for image, block in others:
        if block.down is None:
            _as_rows(y).addmm_(_as_rows(to_nhwc(image)), block.weight.t())
        else:
            y += linear(to_nhwc(image), block)
    return to_nchw(y)


def conv1_backward(
    dy: Tensor, images: Images, layer: LayerTensors, needs: Needs, dimages: Images | None, *, in_product: bool
) -> Gradients:
    """Add the gradients of the images to `dimages`, if it is not None, and return the layer's gradients for `conv1`.

    With `in_product`, the matmul adds: it saves a pass over memory and a rounding. `dimages` must then be channels last.
    """
    dy = to_nhwc(dy)
    several = len(images) > 1
    # The blocks of a matrix's columns need no copy.
    dweight = torch.empty_like(layer.weight) if several and needs.weight else None
    gradients: list[Gradients] = []
    start = 0
    for i, (image, block) in enumerate(_blocks_of_weight(images, layer)):
        accumulates = dimages is not None and in_product and block.down is None
        dx, dreduced = linear_input_gradient(dy, block, need_x=dimages is not None and not accumulates)
        if dimages is not None and dx is not None:
            dimages[i].add_(to_nchw(dx))
        elif dimages is not None:
            _as_rows(to_nhwc(dimages[i])).addmm_(_as_rows(dy), block.weight)
        block_needs = needs._replace(weight=needs.weight and not several, bias=needs.bias and i == 0)
        gradients.append(linear_gradients(dy, to_nhwc(image), block, block_needs, dreduced))
        if dweight is not None:
            columns = dweight.view(len(dweight), -1)[:, start : start + image.shape[1]]
            columns.addmm_(_as_rows(dy).t(), _as_rows(to_nhwc(image)), beta=0)
        start += image.shape[1]
    if not several:
        dweight, *others = gradients[0]
        return None if dweight is None else dweight.view_as(layer.weight), *others
    _, (dbias, _), ddowns, dups = zip(*gradients, strict=True)
    ddown = None if ddowns[0] is None else torch.cat(ddowns, dim=1)
    return dweight, dbias, ddown, None if dups[0] is None else dups[0] + dups[1]


def _blocks_of_weight(images: Images, layer: LayerTensors) -> Iterator[tuple[Tensor, LayerTensors]]:
    """Yield each image with the linear of its channels. The first linear has the bias."""
    start, weight, bias = 0, layer.weight.flatten(1), layer.bias
    for image in images:
        channels = slice(start, start := start + image.shape[1])
        down = None if layer.down is None else layer.down[:, channels]
        yield image, layer._replace(weight=weight[:, channels], bias=bias, down=down)
        bias = None
