"""The layers of a transformer block: each gradient is the same alone and among others, and no pass is made twice."""

from collections import Counter

import pytest
import torch
from environment import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from unets import CFG

from fastsd.model import recompute
from fastsd.model.matmul import LayerTensors
from fastsd.model.recompute import NormTensors
from fastsd.model.unet import TransformerBlock
from fastsd_kernels import REFERENCE, TRITON

WIDTH, EPS = 16, 1e-5
OPS = pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=lambda ops: ops.name)
pytestmark = pytest.mark.kernels


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


NORM = {"x": (2, 5, WIDTH), "residual": (2, 5, WIDTH), "norm_weight": (WIDTH,), "norm_bias": (WIDTH,)}
FIRST = {"weight1": (8 * WIDTH, WIDTH), "bias1": (8 * WIDTH,)}
SECOND = {"weight2": (WIDTH, 4 * WIDTH), "bias2": (WIDTH,)}


def feed_forward(ops, keep_hidden):
    def run(x, residual, norm_weight, norm_bias, weight1, bias1, weight2, bias2):
        layers = LayerTensors(weight1, bias1), LayerTensors(weight2, bias2)
        norm = NormTensors(norm_weight, norm_bias)
        return recompute.feed_forward(ops.forward_backward, EPS, x, residual, norm, layers, keep_hidden=keep_hidden)

    return run, NORM | FIRST | SECOND


def layer_norm_linear(ops, added):
    def run(x, residual, norm_weight, norm_bias, weight1, bias1):
        norm, layer = NormTensors(norm_weight, norm_bias), LayerTensors(weight1, bias1)
        y, s = recompute.layer_norm_linear(ops.forward_backward, EPS, x, residual if added else None, norm, layer)
        assert torch.equal(s, x + residual if added else x)
        return torch.cat([y, s if added else s + residual], dim=-1)

    return run, NORM | FIRST


LAYERS = {
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
    for name in values:
        for names in ({name}, values.keys() - {name}):
            partial = gradients(names)
            assert partial.keys() == names and all(torch.equal(partial[key], expected[key]) for key in names), names


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
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
    # Without the hidden layer, it is computed again from the norm's output; the last norm then has no need to give it.
    recomputed = 0 if keep_hidden else 1
    assert calls["layer_norm_apply"] == recomputed and calls["layer_norm_backward"] == recomputed
    assert calls["layer_norm_backward_in_place"] == 3 - recomputed
    assert calls["geglu"] == 0 and calls["geglu_backward_in_place"] == 1
    # The norms add the gradients of the residual stream. The sums are of three biases: both outputs and the second linear.
    assert calls["add"] == calls["add_"] == 0 and calls["sum"] == 3
