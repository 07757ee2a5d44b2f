"""D-Lion: Lion whose step size is d lr, with d estimated from the steps taken (D-Adaptation).

    dlr = d lr                          sb = sqrt(b2)
    p = p (1 - dlr wd)
    u = sign(b1 m + (1 - b1) g)         p = p - dlr u
    m = b2 m + (1 - b2) dlr g
    num = dlr <u, s>                    with s before its own update
    s = sb s + (1 - sb) dlr u           l1 = |s|_1
    NW = sb NW + (1 - sb) num           d = max(d, NW / ((1 - sb) l1))      from the next step on

num and l1 run over all parameters that share d, so a step has two parts: `dlion_reference`, the elementwise pass,
returns their partial sums; `dlion_estimate_reference` turns those of all lists into d.  d never falls, and stays as it
is while l1 = 0 or lr = 0.

Layout: lists of fp32 tensors as in `lion.py`; p, g, m, s fp32.  Bytes moved at best, per element: p, m, s, g read,
p, m, s written: 28.

d and NW are 0-dim fp64 on the device.  Upstream keeps them in Python floats and rounds to fp32 only the factors made of
them (1 - dlr wd, dlr, (1 - b2) dlr, (1 - sb) dlr); with d in fp32 those differ by a rounding, d drifts from upstream's,
and a coordinate whose sign hangs on the last bit goes the other way.  A few fp64 scalars a step cost nothing on a GPU.
Partial sums are fp32, one a tensor or a run of a big tensor, and added in fp64 in a fixed order.  Where every tensor
is contiguous and fits one run, p, m and s have upstream's bits on a CPU; elsewhere the two sums round differently, and
come closer to fp64's than one long sum does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsd_kernels.lion import pieces, unless


@torch.no_grad()
def dlion_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    s: Sequence[Tensor],
    d: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The elementwise pass of one step, in place on `params`, `exp_avgs` and `s`.

    Args:
        params, grads, exp_avgs, s: fp32, equal shapes at equal places. Gradients are only read.
        d: 0-dim fp64, the estimate of the last step; not changed here.
        lr: factor on d, 1 unless there is a reason; a float or a 0-dim tensor on the device.
        betas: (of the update, of momentum and s).
        weight_decay: multiplies d lr.
        skip: 0-dim bool or float on the device; nonzero leaves every byte as it was, whatever the gradients hold.

    Returns:
        (dots_K, l1_K): fp32 partial sums of <u, s> and |s|_1, for `dlion_estimate_reference`.

    Source: Defazio and Mishchenko 2023, "Learning-rate-free learning by D-Adaptation"; its Lion is DAdaptLion of the
    package dadaptation 3.2.
    """
    beta1, beta2 = betas
    sb = beta2**0.5
    dlr = d * lr
    factors_4 = torch.stack((1 - dlr * weight_decay, -dlr, (1 - beta2) * dlr, (1 - sb) * dlr)).float()
    decay, step, m_gain, s_gain = factors_4.unbind()
    dots: list[Tensor] = []
    l1: list[Tensor] = []
    for p, g, m, r in pieces(params, grads, exp_avgs, s):
        n = len(p)
        with unless(skip, p, m, r):
            update = torch._foreach_mul(m, beta1)
            torch._foreach_add_(update, g, alpha=1 - beta1)
            torch._foreach_sign_(update)
            if weight_decay:
                torch._foreach_mul_(p, decay)
            # addcmul with a 0-dim factor is add with a device-side alpha: one rounding on a CPU, as upstream's add_.
            torch._foreach_addcmul_(p, update, [step] * n)
            torch._foreach_mul_(m, beta2)
            torch._foreach_addcmul_(m, g, [m_gain] * n)
            dots += [torch.dot(x.flatten(), y.flatten()) for x, y in zip(update, r, strict=True)]
            torch._foreach_mul_(r, sb)
            torch._foreach_addcmul_(r, update, [s_gain] * n)
            # Not _foreach_norm: on a CPU its fp32 accumulation is off by a percent at a million elements.
            l1 += [x.sum() for x in torch._foreach_abs(r)]
    if not dots:
        return d.new_zeros(0, dtype=torch.float32), d.new_zeros(0, dtype=torch.float32)
    return torch.stack(dots), torch.stack(l1)


@torch.no_grad()
def dlion_estimate_reference(
    d: Tensor,
    numerator_weighted: Tensor,
    dots_K: Tensor,
    l1_K: Tensor,
    *,
    lr: float | Tensor,
    beta2: float = 0.99,
    skip: Tensor | None = None,
) -> None:
    """The scalar part of one step, in place on `d` and `numerator_weighted` (0-dim fp64).

    Args:
        dots_K, l1_K: the partial sums of all lists that share d, in a fixed order.
        lr, beta2, skip: as given to `dlion_reference` in this step.

    Source: as `dlion_reference`.
    """
    sb = beta2**0.5
    dlr = d * lr
    l1 = l1_K.double().sum()
    moved = l1 > 0
    weighted = sb * numerator_weighted + (1 - sb) * (dlr * dots_K.double()).sum()
    d_hat = weighted / ((1 - sb) * l1)
    with unless(skip, [d, numerator_weighted]):
        # A comparison, not maximum(): a d_hat that is not a number must not become d.
        d.copy_(torch.where(moved & (dlr > 0) & (d_hat > d), d_hat, d))
        numerator_weighted.copy_(torch.where(moved, weighted, numerator_weighted))
