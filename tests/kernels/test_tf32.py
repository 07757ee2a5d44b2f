"""Attention in "tf32": its operands are rounded to TF32, not cut, and its errors are at most twice those of PyTorch's rule.

The interpreter reads operands as tensor cores do: it ignores the low 13 bits. So an operand that is not rounded is seen here.
"""

import precision_curves
import pytest
import torch
from budget import FACTOR
from precision_curves import round_to_tf32

from fastsd_kernels.attention import attention_triton

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matmul(a, b):
    """PyTorch's rule for TF32: operands rounded to nearest, sums in fp32. In fp64 the product is exact."""
    return a @ b if a.dtype == torch.float64 else round_to_tf32(a) @ round_to_tf32(b)


def attention_and_gradients(q, k, v, do):
    """Return o, dq, dk and dv from seven matmuls, for (H, N, D)."""
    scale = q.shape[-1] ** -0.5
    p = (matmul(q, k.mT) * scale).softmax(-1)
    o, dp = matmul(p, v), matmul(do, v.mT)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    return o, matmul(ds, k) * scale, matmul(ds.mT, q) * scale, matmul(p.mT, do)


def error_and_bias(result, truth):
    """Return the norm of the error, and the mean signed error along the truth: both relative to the truth."""
    difference = result.double() - truth
    return difference.norm() / truth.norm(), (difference * truth).sum() / truth.square().sum()


def kernels(q, k, v, do):
    """Return o, dq, dk and dv of the kernels for (H, N, D)."""
    q, k, v, do = (x.to(DEVICE).transpose(0, 1)[None] for x in (q, k, v, do))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attention_triton(*leaves, precision="tf32")
    return [x[0].transpose(0, 1).detach().cpu() for x in (o, *torch.autograd.grad(o, leaves, do))]


def inputs(head_dim, queries, keys):
    """Return q, k, v and do with means of 1: operands around 0 that are cut give errors of both signs, which cancel."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, rows, head_dim, generator=generator) + 1 for rows in (queries, keys, keys, queries)]


@pytest.mark.parametrize("head_dim, queries, keys", [(40, 256, 128), (80, 128, 77), (160, 128, 77), (168, 64, 33)])
def test_error_and_bias_are_those_of_rounded_operands(head_dim, queries, keys):
    operands = inputs(head_dim, queries, keys)
    truth = attention_and_gradients(*(x.double() for x in operands))
    results, pytorch = kernels(*operands), attention_and_gradients(*operands)
    for name, result, exact, other in zip(("o", "dq", "dk", "dv"), results, truth, pytorch, strict=True):
        (error, bias), (pytorch_error, pytorch_bias) = (error_and_bias(x, exact) for x in (result, other))
        print(f"d{head_dim} {name}: error {error:.1e}/{pytorch_error:.1e}, bias {bias:+.1e}/{pytorch_bias:+.1e}")
        assert error <= FACTOR * pytorch_error, name
        # Where PyTorch's bias happens to be zero, a hundredth of the error is small, too.
        assert abs(bias) <= FACTOR * max(abs(pytorch_bias), pytorch_error / 100), name


@pytest.mark.parametrize("head_dim, queries, keys", [(40, 128, 32), (160, 64, 16)])
def test_kernels_equal_the_emulation_of_loss_curves(head_dim, queries, keys):
    """They differ by the order of fp32 sums, which now and then rounds a P or dS to the other side."""
    operands = inputs(head_dim, queries, keys)
    q, k, v, do = (x[None] for x in operands)
    o, lse = precision_curves.attention(q, k, v)
    emulated = o, *precision_curves.attention_backward(do, q, k, v, o, lse, 0.0, False)
    truth = attention_and_gradients(*(x.double() for x in operands))
    for result, expected, exact in zip(kernels(*operands), emulated, truth, strict=True):
        assert (result - expected[0]).norm() < (expected[0] - exact).norm() / 4
