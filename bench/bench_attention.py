"""Attention, forward and backward, compared with each of PyTorch's backends on the same views.

A case that a backend does not support is skipped with the backend's message.  The memory-efficient backend always computes
fp32 as three TF32 products; "math" follows PyTorch's setting.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import DTYPES, Bench, Case, Operands, forward_and_backward, fp32_matmuls, label
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsd_kernels import attention, workload
from fastsd_kernels.attention import attention_triton

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
PEERS = {
    "bf16": tuple(BACKENDS),
    "tf32": ("sdpa math",),
    "ieee": ("sdpa efficient", "sdpa math"),
    "fp16x3": (),
    "tf32x3": (),
}
CASES = [
    pytest.param(kind, mode, implementation, id=f"{label(kind)} {mode} {implementation}".replace(" ", "-"))
    for mode, peers in PEERS.items()
    for kind in workload.ATTENTION
    for implementation in ("triton", *peers)
]


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            views = q_BNHD.transpose(1, 2), k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2)
            return F.scaled_dot_product_attention(*views).transpose(1, 2)

    return attend


@pytest.mark.parametrize("kind, mode, implementation", CASES)
def bench_attention(kind: workload.Attention, mode: str, implementation: str, bench: Bench) -> None:
    dtype = DTYPES["bf16" if mode == "bf16" else "fp32"]
    query_shape = bench.batch, kind.queries, kind.heads, kind.head_dim
    key_shape = bench.batch, kind.keys, kind.heads, kind.head_dim

    def make() -> Operands:
        inputs = tuple(bench.tensor(*shape, dtype=dtype) for shape in (query_shape, key_shape, key_shape))
        return inputs, (bench.tensor(*query_shape, dtype=dtype),)

    if implementation == "triton":
        precision = "ieee" if mode == "bf16" else mode
        function = lambda q, k, v: attention_triton(q, k, v, precision=precision)  # noqa: E731
    else:
        function = _sdpa(BACKENDS[implementation])
    num_bytes = bench.batch * attention.OP.bytes(kind, dtype.itemsize)
    # The forward has 2 matmuls, the backward 5. Recomputed matmuls count once.
    flops = bench.batch * kind.flops * 7 // 2
    count = workload.ATTENTION[kind]
    case = Case("attention", label(kind), count, implementation, mode, num_bytes, flops)
    with fp32_matmuls(mode):
        if implementation != "triton":
            _skip_unsupported(function, make)
        bench.differentiated(case, function, make)


def _skip_unsupported(function: Callable[..., Tensor], make: Callable[[], Operands]) -> None:
    """Skip the benchmark if the backend does not support the forward or backward, or runs out of memory."""
    inputs, upstream = make()
    try:
        forward_and_backward(function, [(tuple(x.requires_grad_() for x in inputs), upstream)])
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    except RuntimeError as error:
        pytest.skip(f"refused: {str(error).splitlines()[0]}")
