"""Attention in "tf32": its operands are rounded to TF32, not cut, and its errors are at most twice those of PyTorch's rule.

The interpreter reads operands as tensor cores do: it ignores the low 13 bits. So an operand that is not rounded is seen here.
"""

import pytest
import torch
from budget import FACTOR

from fastsd_kernels.attention import attention_triton

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def to_tf32(x):
    """Round fp32 x to 10 bits of mantissa, to nearest, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def matmul(a, b):
    """PyTorch's rule for TF32: operands rounded to nearest, sums in fp32. In fp64 the product is exact."""
    return a @ b if a.dtype == torch.float64 else to_tf32(a) @ to_tf32(b)


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


@pytest.mark.parametrize("head_dim, queries, keys", [(40, 256, 128), (80, 128, 77), (160, 128, 77), (168, 64, 33)])
def test_error_and_bias_are_those_of_rounded_operands(head_dim, queries, keys):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, queries, head_dim), (4, keys, head_dim), (4, keys, head_dim), (4, queries, head_dim)
    # Positive means: without them, operands that are all cut give errors of both signs, which cancel.
    q, k, v, do = (torch.randn(shape, generator=generator) + 1 for shape in shapes)
    truth = attention_and_gradients(*(x.double() for x in (q, k, v, do)))
    pytorch = attention_and_gradients(q, k, v, do)
    leaves = [x.to(DEVICE).transpose(0, 1)[None].detach().requires_grad_() for x in (q, k, v)]
    o = attention_triton(*leaves, precision="tf32")
    results = o, *torch.autograd.grad(o, leaves, do.to(DEVICE).transpose(0, 1)[None])
    for name, result, exact, other in zip(("o", "dq", "dk", "dv"), results, truth, pytorch, strict=True):
        (error, bias), (pytorch_error, pytorch_bias) = (
            error_and_bias(x, exact) for x in (result[0].transpose(0, 1).cpu(), other)
        )
        print(f"d{head_dim} {name}: error {error:.1e}/{pytorch_error:.1e}, bias {bias:+.1e}/{pytorch_bias:+.1e}")
        assert error <= FACTOR * pytorch_error, name
        # Where PyTorch's bias happens to be zero, a hundredth of the error is small, too.
        assert abs(bias) <= FACTOR * max(abs(pytorch_bias), pytorch_error / 100), name
