"""The REFERENCE ops: their results compared with formulas in fp64, their layouts and their errors."""

import math

import pytest
import torch
from sentences import refused

from fastsd_kernels import REFERENCE, TRITON


def relative(result, truth):
    return ((result.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype, budget", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("n, keys, h, d", [(1, 77, 2, 40), (63, 63, 3, 8), (97, 1025, 1, 80)])
def test_attention(n, keys, h, d, dtype, budget):
    torch.manual_seed(0)
    qkv = torch.randn(2, keys, 3, h, d, dtype=dtype)
    q = torch.randn(2, n, h, d, dtype=dtype)
    k, v = qkv[:, :, 1], qkv[:, :, 2]  # strided views, as a fused projection gives
    o = REFERENCE.attention(q, k, v)
    scores = torch.einsum("bnhd,blhd->bhnl", q.double(), k.double()) / math.sqrt(d)
    truth = torch.einsum("bhnl,blhd->bnhd", scores.softmax(-1), v.double())
    assert o.shape == q.shape and o.dtype == dtype
    assert relative(o, truth) < budget


@pytest.mark.parametrize("dtype, budget", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm(silu, shifted, dtype, budget):
    torch.manual_seed(0)
    x = (torch.randn(2, 24, 5, 7) + 3).to(dtype).to(memory_format=torch.channels_last)
    w, b = torch.randn(24).to(dtype), torch.randn(24).to(dtype)
    shift = torch.randn(2, 24).to(dtype) if shifted else None
    y = REFERENCE.group_norm(x, w, b, 4, 1e-5, silu=silu, shift_BC=shift)
    z = x.double() + (shift.double()[:, :, None, None] if shifted else 0)
    groups = z.reshape(2, 4, -1)
    xhat = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    truth = xhat.reshape(z.shape) * w.double()[:, None, None] + b.double()[:, None, None]
    truth = truth * truth.sigmoid() if silu else truth
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert relative(y, truth) < budget


@pytest.mark.parametrize("dtype, budget", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_layer_norm_and_geglu(dtype, budget):
    torch.manual_seed(0)
    x = (torch.randn(3, 7, 40) * 2 + 1).to(dtype)
    w, b = torch.randn(40).to(dtype), torch.randn(40).to(dtype)
    z = x.double()
    truth = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert relative(REFERENCE.layer_norm(x, w, b, 1e-5), truth * w.double() + b.double()) < budget
    value, gate = z[..., :20], z[..., 20:]
    truth = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    assert relative(REFERENCE.geglu(x), truth) < budget
    tanh_geglu = value * torch.nn.functional.gelu(gate, approximate="tanh")
    assert relative(tanh_geglu, truth) > 1e-5  # the budget of fp32 rejects the approximate GELU


def test_unusable_inputs_are_refused():
    q = torch.zeros(1, 4, 2, 8)
    with refused("attention-precision", ValueError, precision="'fp8'"):
        REFERENCE.attention(q, q, q, precision="fp8")
    with refused("attention-shapes", ValueError):
        REFERENCE.attention(q, q[:, :, :1], q[:, :, :1])
    with refused("group-norm-shapes", ValueError, groups=4):
        REFERENCE.group_norm(torch.zeros(1, 6, 2, 2), torch.ones(6), torch.zeros(6), 4, 1e-5)
    with refused("group-norm-shift", ValueError):
        REFERENCE.group_norm(torch.zeros(1, 6, 2, 2), torch.ones(6), torch.zeros(6), 3, 1e-5, shift_BC=torch.zeros(1, 5))
    with refused("layer-norm-shapes", ValueError):
        REFERENCE.layer_norm(torch.zeros(2, 6), torch.ones(5), torch.zeros(5), 1e-5)
    with refused("geglu-odd", ValueError):
        REFERENCE.geglu(torch.zeros(2, 5))


def test_tables_are_named_and_immutable():
    assert REFERENCE.name == "reference"
    assert TRITON is None or TRITON.name == "triton"
    with pytest.raises(AttributeError):
        REFERENCE.attention = None
