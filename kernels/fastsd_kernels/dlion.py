"""D-Lion: Lion with the step size d lr, where d is estimated from the steps taken (D-Adaptation).

    dlr = d lr                          sb = sqrt(b2)
    p = p (1 - dlr wd)
    u = sign(b1 m + (1 - b1) g)         p = p - dlr u
    m = b2 m + (1 - b2) dlr g
    num = dlr <u, s>                    with s before its own update
    s = sb s + (1 - sb) dlr u           l1 = |s|_1
    NW = sb NW + (1 - sb) num           d = max(d, NW / ((1 - sb) l1))      from the next step on

num and l1 are sums over all parameters that share d, so a step has two parts: `dlion_reference`, the elementwise pass,
returns partial sums; `dlion_estimate_reference` computes d from those of all lists.  d never falls, and stays constant
while l1 = 0 or lr = 0.

Layout: lists of fp32 tensors as in `lion.py`; p, g, m, s fp32.  Bytes moved per element: 28, for p, m, s, g read and p, m, s
written, and nothing else of that size; options as in `arena.py`.

d and NW are 0-dim fp64 on the device.  Upstream keeps them in Python floats and rounds to fp32 only the factors made of
them (1 - dlr wd, dlr, (1 - b2) dlr, (1 - sb) dlr); with d in fp32 those differ by a rounding, d drifts from upstream's,
and a coordinate with a sign that depends on the last bit goes the other way.  A few fp64 scalars a step cost nothing on a GPU.
Partial sums are fp32, one per tensor or per chunk of a big tensor, and are added in fp64 in a fixed order.  Where every tensor
is contiguous and fits one chunk, p, m and s have upstream's bits on a CPU; elsewhere the two sums round differently, and
come closer to fp64's than one long sum does.

The kernel adds up 16384 consecutive elements a program: 8 to a lane in fp32, then the lanes as a tree, so a partial sum of
|s| is off by 1e-6 at most.  The total of 52k of them is off by less than 1e-8, because one program at the end adds them in
fp64.  The order of the sum depends only on the elements' places, not on the GPU, so d is the same on all GPUs.
Given the same d, elementwise results have the reference's bits; d itself differs from the reference's in the eighth digit.

Read next: `adamw.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import cpu_optimizers
from fastsd_kernels.arena import (
    TILES,
    averages_layout,
    chunks,
    finite,
    finite_or_unchanged,
    fma,
    load,
    load_gradient,
    load_parameter,
    masters,
    operands,
    pair_sum,
    should_step,
    sign,
    step_calls,
    store_parameter,
    unless_found_inf,
)
from fastsd_kernels.launch import custom_op, launch, meta, require_device
from fastsd_kernels.ops import Calls, DLion, DLionEstimate, Op, StepOptions


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
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]:
    """The elementwise pass of one step, in place on `params`, `exp_avgs` and `s`.

    Args:
        params, grads, exp_avgs, s: fp32, equal shapes at equal places. Gradients may be bf16 and are only read.
        d: 0-dim fp64, the estimate of the last step; not changed here.
        lr: factor of d, usually 1; a float or a 0-dim tensor on the device.
        betas: (b1 of the update, b2 of the momentum and of s).
        weight_decay: multiplies d lr.
        options: see `StepOptions`.

    Returns:
        (dots_K, l1_K): fp32 partial sums of <u, s> and |s|_1, for `dlion_estimate_reference`.

    Source: Defazio and Mishchenko 2023, "Learning-rate-free learning by D-Adaptation"; its Lion is DAdaptLion of the
    package dadaptation 3.2.
    """
    beta1, beta2 = betas
    sb = beta2**0.5
    decay, step, m_gain, s_gain = step_factors(d, lr, beta2, weight_decay).unbind()
    dots: list[Tensor] = []
    l1: list[Tensor] = []
    with masters(params, grads, **options) as (params, grads):
        for p, g, m, r in chunks(params, grads, exp_avgs, s):
            n = len(p)
            with finite_or_unchanged(p, m, r, **options):
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


def step_factors(d: Tensor, lr: float | Tensor, beta2: float, weight_decay: float) -> Tensor:
    """Return fp32 (1 - dlr wd, -dlr, (1 - b2) dlr, (1 - sb) dlr), each rounded once."""
    dlr = d * lr
    return torch.stack((1 - dlr * weight_decay, -dlr, (1 - beta2) * dlr, (1 - beta2**0.5) * dlr)).float()


@torch.no_grad()
def dlion_estimate_reference(
    d: Tensor,
    numerator_weighted: Tensor,
    dots_K: Tensor,
    l1_K: Tensor,
    *,
    lr: float | Tensor,
    beta2: float = 0.99,
    found_inf: Tensor | None = None,
) -> None:
    """The scalar part of one step, in place on `d` and `numerator_weighted` (0-dim fp64).

    Args:
        dots_K, l1_K: the partial sums of all lists that share d, in a fixed order.
        lr, beta2, found_inf: as given to `dlion_reference` in this step.

    Source: as `dlion_reference`.
    """
    sb = beta2**0.5
    dlr = d * lr
    l1 = l1_K.double().sum()
    weighted = sb * numerator_weighted + (1 - sb) * (dlr * dots_K.double()).sum()
    # False where all gradients were zero, and where the sums of huge numbers overflow.
    moved = (l1 > 0) & torch.isfinite(weighted)
    d_hat = weighted / ((1 - sb) * l1)
    with unless_found_inf(found_inf, [d, numerator_weighted]):
        # A comparison, not maximum(): a d_hat that is not a number must not become d.
        d.copy_(torch.where(moved & (dlr > 0) & (d_hat > d) & torch.isfinite(d_hat), d_hat, d))
        numerator_weighted.copy_(torch.where(moved, weighted, numerator_weighted))


@triton.jit
def _step_span(operands, options, betas, start, stop, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, EMAS: tl.constexpr):
    """Step elements start .. stop, in whole blocks unless BOUNDED. Returns their <u, s> and |s|_1."""
    p_ptr, g_ptr, m_ptr, s_ptr, factors_ptr = operands
    master_lo_ptr, _, _, scale_ptr, found_inf_ptr, _, _ = options
    beta1, one_minus_beta1, beta2, sb = betas
    decay, step = tl.load(factors_ptr), tl.load(factors_ptr + 1)
    m_gain, s_gain = tl.load(factors_ptr + 2), tl.load(factors_ptr + 3)
    steps = should_step(found_inf_ptr)
    offs = tl.arange(0, BLOCK)
    dots = tl.zeros([BLOCK], tl.float32)
    l1 = tl.zeros([BLOCK], tl.float32)

    while start < stop:
        if BOUNDED:
            mask = offs < stop - start
        else:
            mask = None
        if steps:
            p = load_parameter(p_ptr, master_lo_ptr, start, offs, mask)
            g = load_gradient(g_ptr, scale_ptr, start, offs, mask)
            m = load(m_ptr, start, offs, mask)
            s = load(s_ptr, start, offs, mask)
            update = sign(fma(g, one_minus_beta1, m * beta1))
            dots += update * s
            new_p, new_m, new_s = p * decay + update * step, fma(g, m_gain, m * beta2), s * sb + update * s_gain
            is_finite = finite(new_p) & finite(new_m) & finite(new_s)
            s = tl.where(is_finite, new_s, s)
            l1 += tl.abs(s)
            tl.store(s_ptr + start + offs, s, mask)
            tl.store(m_ptr + start + offs, tl.where(is_finite, new_m, m), mask)
            store_parameter(tl.where(is_finite, new_p, p), is_finite, p_ptr, options, start, offs, mask, EMAS)
        start += BLOCK
    return pair_sum(dots), pair_sum(l1)


@triton.jit(do_not_specialize=["n", "ema_stride"])
def _dlion(
    p_ptr, g_ptr, m_ptr, s_ptr, factors_ptr, master_lo_ptr, ema_ptr, ema_gain_ptr, scale_ptr, found_inf_ptr, overflow_ptr,
    sums_ptr, beta1, one_minus_beta1, beta2, sb, n, ema_stride,
    BLOCK: tl.constexpr, TIMES: tl.constexpr, EMAS: tl.constexpr,
):  # fmt: skip
    i_span = tl.program_id(0)
    start = i_span.to(tl.int64) * (BLOCK * TIMES)  # an arena may pass 2^31 elements
    stop = start + BLOCK * TIMES
    operands = p_ptr, g_ptr, m_ptr, s_ptr, factors_ptr
    options = master_lo_ptr, ema_ptr, ema_gain_ptr, scale_ptr, found_inf_ptr, overflow_ptr, ema_stride
    betas = beta1, one_minus_beta1, beta2, sb
    if stop <= n:
        dot, l1 = _step_span(operands, options, betas, start, stop, BOUNDED=False, BLOCK=BLOCK, EMAS=EMAS)
    else:
        # Narrow blocks: single elements need an address each, and registers for 8 of them in every stream run out.
        dot, l1 = _step_span(operands, options, betas, start, n, BOUNDED=True, BLOCK=BLOCK // 2, EMAS=EMAS)
    tl.store(sums_ptr + i_span, dot)
    tl.store(sums_ptr + tl.num_programs(0) + i_span, l1)


@triton.jit(do_not_specialize=["n"])
def _estimate(
    d_ptr, nw_ptr, dots_ptr, l1_ptr, dlr_ptr, found_inf_ptr, sb: tl.float64, one_minus_sb: tl.float64, n, BLOCK: tl.constexpr
):
    dots = tl.zeros([BLOCK], tl.float64)
    l1 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        dots += tl.load(dots_ptr + offs, offs < n, other=0.0)
        l1 += tl.load(l1_ptr + offs, offs < n, other=0.0)
    if should_step(found_inf_ptr):
        l1_sum = tl.sum(l1)
        d, dlr = tl.load(d_ptr), tl.load(dlr_ptr)
        numerator = sb * tl.load(nw_ptr) + one_minus_sb * (dlr * tl.sum(dots))
        if (l1_sum > 0) & (tl.abs(numerator) < float("inf")):
            d_hat = numerator / (one_minus_sb * l1_sum)
            # A comparison, not a maximum: a d_hat that is not a number must not become d.
            tl.store(d_ptr, tl.where((dlr > 0) & (d_hat > d) & (d_hat < float("inf")), d_hat, d))
            tl.store(nw_ptr, numerator)


def dlion_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    s: Tensor,
    factors: Tensor,
    master_lo: Tensor | None,
    ema: Tensor | None,
    ema_gain: Tensor | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    overflow: Tensor | None,
    beta1: float,
    beta2: float,
) -> Tensor:
    """Step tensors of one dense layout in place, in one launch. Return partial sums (2, K) of <u, s> and |s|_1."""
    n, tile = p.numel(), TILES["dlion"]
    programs = triton.cdiv(n, tile.span)
    sums_2K = p.new_empty(2, programs, dtype=torch.float32)
    operands = p, g, m, s, factors, master_lo, ema, ema_gain, scale, found_inf, overflow, sums_2K
    betas = beta1, 1 - beta1, beta2, beta2**0.5
    ema_stride, count = averages_layout(ema)
    if n:
        launch(_dlion, (programs,), *operands, *betas, n, ema_stride, **tile.options(TIMES=tile.times, EMAS=count))
    return sums_2K


def dlion_estimate(
    d: Tensor, numerator: Tensor, dots_K: Tensor, l1_K: Tensor, dlr: Tensor, found_inf: Tensor | None, beta2: float
) -> None:
    """Update d and numerator in place, in one launch of one program. They and dlr are 0-dim fp64."""
    tile, sb = TILES["tail"], beta2**0.5
    launch(_estimate, (1,), d, numerator, dots_K, l1_K, dlr, found_inf, sb, 1 - sb, len(dots_K), **tile.options())


_step_op = custom_op("dlion", mutates_args=("p", "m", "s", "master_lo", "ema", "overflow"))(dlion_step)
_estimate_op = custom_op("dlion_estimate", mutates_args=("d", "numerator"))(dlion_estimate)


_step_op.register_fake(lambda p, *_: p.new_empty(2, -(-p.numel() // TILES["dlion"].span), dtype=torch.float32))
_estimate_op.register_fake(lambda *_: None)


@torch.no_grad()
def dlion_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    s: Sequence[Tensor],
    d: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]:
    """`dlion_reference` with one launch per tensor; an arena is a list of one. In a captured graph a float lr is constant.

    Returns one pair of sums per 16384 elements of a tensor.

    Raises:
        ValueError: a dtype that `dlion_reference` does not name, tensors of one parameter that differ in shape or strides or
            have gaps, or a device that runs no kernels.
    """
    rows = operands("dlion", params, grads, exp_avgs, s, device_scalars=(d, lr), **options)
    factors = step_factors(d, lr, betas[1], weight_decay)
    sums = [_step_op(p, g, m, r, factors, *extra, *betas) for (p, g, m, r), extra in rows]
    sums_2K = torch.cat(sums, dim=1) if len(sums) > 1 else sums[0] if sums else d.new_zeros(2, 0, dtype=torch.float32)
    dots_K, l1_K = sums_2K.unbind()
    return dots_K, l1_K


@torch.no_grad()
def dlion_estimate_triton(
    d: Tensor,
    numerator_weighted: Tensor,
    dots_K: Tensor,
    l1_K: Tensor,
    *,
    lr: float | Tensor,
    beta2: float = 0.99,
    found_inf: Tensor | None = None,
) -> None:
    """`dlion_estimate_reference` as one launch of one program. It takes the joined sums of several lists.

    Raises:
        ValueError: tensors on a device that runs no kernels, or on more than one.
    """
    require_device("dlion", d, numerator_weighted, dots_K, l1_K, found_inf, lr if isinstance(lr, Tensor) else None)
    _estimate_op(d, numerator_weighted, dots_K.contiguous(), l1_K.contiguous(), d * lr, found_inf, beta2)


@torch.no_grad()
def dlion_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    s: Sequence[Tensor],
    d: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **options: Unpack[StepOptions],
) -> tuple[Tensor, Tensor]:
    """`dlion_reference` in one pass.

    Returns:
        (dots_K, l1_K): fp64, one pair of sums per tensor that is not empty, for `dlion_estimate_reference`.

    Raises:
        ValueError: as `lion_cpu`.
    """
    rows = cpu_optimizers.operands("dlion", params, grads, exp_avgs, s, scalars=(d, lr), **options)
    factors = step_factors(d, lr, betas[1], weight_decay)
    constants = betas[0], 1 - betas[0], betas[1], betas[1] ** 0.5
    dots_K, l1_K = cpu_optimizers.call("dlion", rows, factors, constants, **options).unbind()
    return dots_K, l1_K


def _estimate_calls() -> Calls:
    d, sums_K = meta(dtype=torch.float64), meta(1 << 16)
    dlion_estimate(d, d, sums_K, sums_K, d, meta(dtype=torch.bool), 0.99)
    yield "tail", "fp64"


OP: Op[DLion] = Op(
    name="dlion",
    reference=dlion_reference,
    triton=dlion_triton,
    cpu=dlion_cpu,
    calls=lambda: step_calls(lambda p, g, m, options: dlion_step(p, g, m, m, meta(4), *options, 0.9, 0.99)),
    bytes=lambda count, gradient_size: count * (24 + gradient_size),
)
ESTIMATE: Op[DLionEstimate] = Op(
    name="dlion_estimate",
    reference=dlion_estimate_reference,
    triton=dlion_estimate_triton,
    calls=_estimate_calls,
    bytes=lambda sums, _: 8 * sums,
)
