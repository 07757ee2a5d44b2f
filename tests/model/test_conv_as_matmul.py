"""Wide 3x3 convolutions on a CPU: the errors of output and gradients, and which of them are matmuls."""

import pytest
import torch
import torch.nn.functional as F
from budget import check_budget
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.model.matmul import LayerTensors, Needs, conv, conv_backward
from fastsd.model.recompute import upsample_conv

CHANNELS_LAST = torch.channels_last


class Operations(TorchDispatchMode):
    """Collect the names of the operations that PyTorch executes."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def inputs(images, channels, features, height, width, dtype=torch.float32):
    """Return x, weight and bias. Gradients of channels-last tensors are channels last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(images, channels, height, width, generator=generator)
    weight = torch.randn(features, channels, 3, 3, generator=generator) / 50
    bias = torch.randn(features, generator=generator)
    return x.to(dtype, memory_format=CHANNELS_LAST), weight.to(dtype, memory_format=CHANNELS_LAST), bias.to(dtype)


def layer(x, weight, bias):
    """Apply a convolution of the UNet, with its backward. Upsampling to the size of x changes nothing."""
    return upsample_conv(x.shape[2:], x, LayerTensors(weight, bias))


def pytorch_conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 256, 320, 8, 8), (3, 320, 256, 3, 5), (1, 272, 256, 1, 9), (2, 256, 272, 5, 7), (3, 256, 256, 18, 19)]
)
def test_errors_are_within_the_budget(shape, dtype):
    """All from columns, then the weight gradient from columns, then the weight gradient from taps (in fp32)."""
    x, weight, bias = inputs(*shape, dtype=dtype)
    check_budget(str(shape), layer, pytorch_conv, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize(
    "shape, dtype, forward, dx, dweight",
    [
        ((1, 256, 256, 8, 8), torch.float32, False, False, False),
        ((1, 256, 256, 8, 8), torch.bfloat16, False, False, False),
        ((1, 256, 256, 8, 9), torch.float32, True, True, False),
        ((1, 256, 256, 16, 16), torch.bfloat16, True, True, False),
        ((1, 256, 256, 16, 17), torch.float32, True, True, False),  # from taps
        ((1, 256, 256, 16, 17), torch.bfloat16, True, True, True),
        ((1, 256, 255, 4, 4), torch.float32, True, True, True),
        ((1, 4, 256, 4, 4), torch.float32, True, True, True),
    ],
)
def test_convolutions_that_remain(shape, dtype, forward, dx, dweight):
    """True if oneDNN's convolution computes it. Each gradient is computed only if it is needed."""
    x, weight, bias = inputs(*shape, dtype=dtype)
    tensors = LayerTensors(weight, bias)
    with Operations() as operations:
        y = conv(x, tensors)
    assert ("convolution" in operations.names) == forward
    for remains, need_x, need_weight in ((dx, True, False), (dweight, False, True), (dx or dweight, True, True)):
        for need_bias in (False, True):
            with Operations() as operations:
                needs = Needs(need_weight, need_bias, False, (False,))
                gradients = conv_backward(torch.ones_like(y), x, tensors, needs, need_x=need_x)
            computed = gradients[0] is not None, gradients[1][0] is not None, gradients[1][1] is not None
            assert computed == (need_x, need_weight, need_bias)
            # A bias gradient without that of the weight comes with the convolution's other gradients.
            assert ("convolution_backward" in operations.names) == (remains or (need_bias and not need_weight))


def test_layouts_of_results():
    """Output and gradients are channels last for upstream gradients in either layout, so no layer converts them."""
    x, weight, bias = inputs(2, 256, 256, 5, 6)
    tensors, needs = LayerTensors(weight, bias), Needs(True, True, False, (False,))
    y = conv(x, tensors)
    last, first = (conv_backward(dy, x, tensors, needs, need_x=True) for dy in (y, y.contiguous()))
    for tensor in (y, last[0], last[1][0], first[0], first[1][0]):
        assert tensor.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(last[0], first[0]) and torch.equal(last[1][0], first[1][0])
