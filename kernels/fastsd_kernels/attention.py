"""Multi-head attention in the layout the projections produce.

    o = softmax(q k^T / sqrt(D)) v        for every image and head

Shapes: B images, N queries, L keys, H heads, D head size.  q, k, v and o are (B, N, H, D): what a linear layer gives, seen
as heads, with no permute and no copy.  q, k and v may be strided views of one fused projection.
Bytes moved at best: q, k, v read once, o written once; the N x L scores never leave the chip.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PRECISIONS = ("ieee", "tf32", "tf32x3")


def attention_reference(q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, *, precision: str = "ieee") -> Tensor:
    """Attention with scale 1/sqrt(D), through PyTorch's scaled_dot_product_attention.

    Args:
        q_BNHD: queries (B, N, H, D).
        k_BLHD, v_BLHD: keys and values (B, L, H, D).
        precision: "ieee", "tf32" or "tf32x3", for fp32 inputs on a GPU. PyTorch follows its own global setting, so here it
            is checked and otherwise without effect.

    Returns:
        (B, N, H, D) in the dtype of q.

    Raises:
        ValueError: shapes that do not fit together, or an unknown precision.

    Source: Vaswani et al. 2017, equation 1.
    """
    _check(q_BNHD, k_BLHD, v_BLHD, precision)
    o_BHND = F.scaled_dot_product_attention(q_BNHD.transpose(1, 2), k_BLHD.transpose(1, 2), v_BLHD.transpose(1, 2))
    return o_BHND.transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"attention: precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "q must be (B, N, H, D), k and v (B, L, H, D)"
        )
