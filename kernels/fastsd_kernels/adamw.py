"""AdamW: Adam with weight decay apart from the gradient.

    p = p (1 - lr wd)
    m = m + (1 - b1)(g - m)             v = b2 v + (1 - b2) g^2
    p = p - lr / (1 - b1^t)  m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Layout: lists of fp32 tensors as in `lion.py`; t is one 0-dim fp32 count a parameter, on the device (an arena passes a
list of one).  Bytes moved at best, per element: p, m, v, g read, p, m, v written: 28.  The bias corrections are taken
in fp64 and rounded once, as torch.optim.AdamW takes them in Python floats; on a CPU the result has its bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd_kernels.lion import pieces, unless


@torch.no_grad()
def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    skip: Tensor | None = None,
) -> None:
    """One step of AdamW, in place on `params`, `exp_avgs`, `exp_avg_sqs` and `steps`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: fp32, equal shapes at equal places. Gradients are only read.
        steps: 0-dim fp32, the steps each parameter has had; raised by one before use.
        lr: step size in units of the parameter; a float or a 0-dim fp32 tensor on the device.
        betas: decay of (first, second moment).
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: multiplies lr.
        skip: 0-dim bool or float on the device; nonzero leaves every byte as it was, whatever the gradients hold.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2; torch.optim.AdamW.
    """
    if not params:
        return
    beta1, beta2 = betas
    with unless(skip, steps):
        torch._foreach_add_(list(steps), 1)
        step_P = torch.stack(list(steps)).double()
    sizes = (-lr / (1 - beta1**step_P)).float().unbind()
    roots = (1 - beta2**step_P).sqrt().float().unbind()
    for p, g, m, v, size, root in pieces(params, grads, exp_avgs, exp_avg_sqs, sizes, roots):
        with unless(skip, p, m, v):
            torch._foreach_lerp_(m, g, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, g, g, 1 - beta2)
            denom = torch._foreach_sqrt(v)
            torch._foreach_div_(denom, root)
            torch._foreach_add_(denom, eps)
            if weight_decay:
                torch._foreach_mul_(p, 1 - lr * weight_decay)
            torch._foreach_addcdiv_(p, torch._foreach_mul(m, size), denom)
