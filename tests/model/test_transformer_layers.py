"""The layers of transformers and resnets: each gradient is the same alone and among others, and no pass is made twice."""

from collections import Counter

import pytest
import torch
from environment import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from unets import CFG

from fastsd.model import recompute
from fastsd.model.gradient_sink import GradientSink, destination_of
from fastsd.model.matmul import LayerTensors
from fastsd.model.recompute import Image, NormTensors
from fastsd.model.unet import TransformerBlock
from fastsd_kernels import REFERENCE, TRITON

WIDTH, EPS = 16, 1e-5
OPS = pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=lambda ops: ops.name)
pytestmark = pytest.mark.kernels


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


NORM = {"x": (2, 5, WIDTH), "residual": (2, 5, WIDTH), "norm_weight": (WIDTH,), "norm_bias": (WIDTH,), "x_bias": (WIDTH,)}
IMAGE = {name: NORM[name] for name in ("norm_weight", "norm_bias")} | {"x": (2, WIDTH, 3, 4)}
FIRST = {"weight1": (8 * WIDTH, WIDTH), "bias1": (8 * WIDTH,)}
SECOND = {"weight2": (WIDTH, 4 * WIDTH), "bias2": (WIDTH,)}


def feed_forward(ops, keep_hidden):
    def run(x, residual, norm_weight, norm_bias, x_bias, weight1, bias1, weight2, bias2):
        layers = LayerTensors(weight1, bias1), LayerTensors(weight2, bias2)
        norm = NormTensors(norm_weight, norm_bias)
        return recompute.feed_forward(
            ops.forward_backward, EPS, x, residual, norm, layers, keep_hidden=keep_hidden, x_bias=x_bias
        )

    return run, NORM | FIRST | SECOND


def layer_norm_linear(ops, added):
    def run(x, residual, norm_weight, norm_bias, x_bias, weight1, bias1):
        norm, layer = NormTensors(norm_weight, norm_bias), LayerTensors(weight1, bias1)
        y, s = recompute.layer_norm_linear(ops.forward_backward, EPS, x, residual if added else None, norm, layer, x_bias)
        assert torch.equal(s, x + residual if added else x)
        return torch.cat([y, s if added else s + residual], dim=-1)

    return run, NORM | FIRST


def group_norm_linear(ops, option):
    def run(x, norm_weight, norm_bias, weight1, bias1):
        norm, layer = NormTensors(norm_weight, norm_bias), LayerTensors(weight1, bias1)
        y, residual = recompute.group_norm_linear(ops.forward_backward, 4, EPS, Image(channels_last(x)), norm, layer)
        return torch.cat([y.flatten(1), residual.flatten(1)], dim=1)

    return run, IMAGE | FIRST


def norm_conv(ops, with_shortcut):
    def run(x, norm_weight, norm_bias, shift, weight1, bias1, weight2, bias2):
        norm, conv = NormTensors(norm_weight, norm_bias), LayerTensors(weight1, bias1)
        shortcut = LayerTensors(weight2, bias2) if with_shortcut else None
        images = Image(channels_last(x[:, :8])), Image(channels_last(x[:, 8:]))
        y, passed = recompute.norm_conv(ops.forward_backward, 4, EPS, *images, shift, norm, conv, shortcut)
        return y + passed if with_shortcut else y + (weight2.sum() + bias2.sum())

    conv = {"weight1": (8, WIDTH, 3, 3), "bias1": (8,), "weight2": (8, WIDTH, 1, 1), "bias2": (8,)}
    return run, IMAGE | {"shift": (2, WIDTH)} | conv


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


LAYERS = {
    "group norm, linear": (group_norm_linear, None),
    "group norm, convolution": (norm_conv, False),
    "group norm, convolution, shortcut": (norm_conv, True),
    "feed-forward": (feed_forward, True),
    "feed-forward without hidden": (feed_forward, False),
    "layer norm, linear": (layer_norm_linear, False),
    "sum, layer norm, linear": (layer_norm_linear, True),
}


@OPS
@pytest.mark.parametrize("make, option", LAYERS.values(), ids=LAYERS)
def test_frozen_tensors_change_no_other_gradient(ops, make, option):
    run, shapes = make(ops, option)
    values = tensors(**shapes)

    def gradients(names):
        leaves = {name: value.clone().requires_grad_(name in names) for name, value in values.items()}
        out = run(**leaves)
        (out * torch.arange(out.numel(), device=DEVICE).view_as(out).cos()).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    expected = gradients(values)
    assert expected.keys() == values.keys()
    if "x_bias" in expected:
        torch.testing.assert_close(expected["x_bias"], expected["x"].flatten(0, -2).sum(0))
    for name in values:
        for names in ({name}, values.keys() - {name}):
            partial = gradients(names)
            assert partial.keys() == names and all(torch.equal(partial[key], expected[key]) for key in names), names


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.rebuilt = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.rebuilt[name] += next((argument for argument in args if isinstance(argument, bool)), False)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("keep_hidden", [True, False])
def test_a_blocks_backward_makes_no_pass_twice(keep_hidden):
    block = TransformerBlock(WIDTH, CFG, TRITON).to(DEVICE)
    block.keep_hidden = keep_hidden
    values = tensors(x=NORM["x"], context=(2, 3, CFG.cross_attention_dim), upstream=NORM["x"])
    out = block(values["x"].requires_grad_(), values["context"])
    with Count() as count:
        out.backward(values["upstream"])
    calls = count.calls
    # Without the hidden layer, it is computed again from the norm's output; the last norm then has no need to rebuild it.
    assert calls["layer_norm_apply"] == (0 if keep_hidden else 1)
    assert calls["layer_norm_backward_in_place"] == 3
    assert count.rebuilt["layer_norm_backward_in_place"] == (3 if keep_hidden else 2)
    assert calls["geglu"] == 0 and calls["geglu_backward_in_place"] == count.rebuilt["geglu_backward_in_place"] == 1
    # The norms add the gradients of the residual stream. They sum the biases of both outputs. PyTorch sums the
    # bias of the second linear.
    assert calls["add"] == calls["add_"] == 0 and calls["sum"] == 1


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, option", LAYERS.values(), ids=LAYERS)
def test_gradients_of_vectors_go_to_their_sinks(make, option, ops, dtype):
    """The sums of two backwards in fp32 sinks equal the sums of what autograd returns without sinks."""
    run, shapes = make(ops, option)
    leaves = {name: value.to(dtype).requires_grad_() for name, value in tensors(**shapes).items()}
    names = ["norm_weight", "norm_bias", *(["bias1"] if make is feed_forward else []), *({"x_bias"} & leaves.keys())]
    vectors = [leaves[name] for name in names]

    def backward():
        out = run(**leaves)
        (out * torch.arange(out.numel(), device=DEVICE).view_as(out).cos().to(dtype)).sum().backward()

    backward()
    expected = [2 * vector.grad.float() for vector in vectors]
    for leaf in leaves.values():
        leaf.grad = None
    sinks = [GradientSink(vector, torch.full_like(vector, torch.nan, dtype=torch.float32)) for vector in vectors]
    for _ in range(2):
        backward()
    assert all(vector.grad is None for vector in vectors)
    for sink, exact in zip(sinks, expected, strict=True):
        assert (sink.memory - exact).norm() <= (1e-6 if dtype == torch.float32 else 2**-8) * exact.norm()


def test_a_vector_that_is_ahead_of_the_other_is_summed_apart():
    weight, bias = torch.ones(8), torch.zeros(8)
    first = GradientSink(weight, torch.empty(8))
    assert destination_of(weight, bias) is None  # only one has a sink
    second = GradientSink(bias, torch.empty(8))
    first.add(torch.ones(8))
    assert destination_of(weight, bias) is None and second.empty
    second.add(torch.ones(8))
    assert destination_of(weight, bias) == ([first.memory, second.memory], True)
