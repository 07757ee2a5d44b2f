"""Lion: the sign of an interpolated momentum is the update.

    p = p (1 - lr wd)
    u = sign(b1 m + (1 - b1) g)        p = p - lr u
    m = b2 m + (1 - b2) g

Layout: lists of fp32 tensors of any shape and strides; p, g, m of one parameter lie at the same place in their lists.
Kernels need dense ones.  p may be bf16 with low halves, and g may be bf16: see `arena.py`.
Bytes moved per element: 20, for p, m, g read and p, m written; 18 with g in bf16; 8 more for each EMA.  In
PyTorch each line above is one or two operations, in lion-pytorch's order, so on a CPU the result has its bits.  The
kernel has the reference's bits.

Read next: `dlion.py`, Lion that finds its own step size.
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
    scalars,
    should_step,
    sign,
    step_calls,
    store_parameter,
)
from fastsd_kernels.launch import custom_op, launch, meta
from fastsd_kernels.ops import Lion, Op, StepOptions


@torch.no_grad()
def lion_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **options: Unpack[StepOptions],
) -> None:
    """One step of Lion, in place on `params` and `exp_avgs`.

    Args:
        params, grads, exp_avgs: fp32, equal shapes at equal places. Gradients may be bf16 and are only read.
        lr: step size in units of the parameter; a float or a 0-dim fp32 tensor on the device.
        betas: (b1 of the update, b2 of the momentum).
        weight_decay: multiplies lr.
        options: see `StepOptions`.

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2; lion-pytorch 0.2.5.
    """
    beta1, beta2 = betas
    with masters(params, grads, **options) as (params, grads):
        for p, g, m in chunks(params, grads, exp_avgs):
            with finite_or_unchanged(p, m, **options):
                update = torch._foreach_mul(m, beta1)
                torch._foreach_add_(update, g, alpha=1 - beta1)
                torch._foreach_sign_(update)
                # A sign times lr is exact, so this rounds as lion-pytorch's single p.add_(u, alpha=-lr) does.
                torch._foreach_mul_(update, -lr)
                if weight_decay:
                    torch._foreach_mul_(p, 1 - lr * weight_decay)
                torch._foreach_add_(p, update)
                torch._foreach_mul_(m, beta2)
                torch._foreach_add_(m, g, alpha=1 - beta2)


@triton.jit
def _tile(p_ptr, g_ptr, m_ptr, factors_ptr, options, betas, start, offs, mask, EMAS: tl.constexpr):
    master_lo_ptr, _, _, scale_ptr, found_inf_ptr, _, _ = options
    beta1, one_minus_beta1, beta2, one_minus_beta2 = betas
    if should_step(found_inf_ptr):
        decay, step = tl.load(factors_ptr), tl.load(factors_ptr + 1)
        p = load_parameter(p_ptr, master_lo_ptr, start, offs, mask)
        g = load_gradient(g_ptr, scale_ptr, start, offs, mask)
        m = load(m_ptr, start, offs, mask)
        update = sign(fma(g, one_minus_beta1, m * beta1))
        new_p, new_m = p * decay + update * step, fma(g, one_minus_beta2, m * beta2)
        is_finite = finite(new_p) & finite(new_m)
        tl.store(m_ptr + start + offs, tl.where(is_finite, new_m, m), mask)
        store_parameter(tl.where(is_finite, new_p, p), is_finite, p_ptr, options, start, offs, mask, EMAS)


@triton.jit(do_not_specialize=["n", "ema_stride"])
def _lion(
    p_ptr, g_ptr, m_ptr, factors_ptr, master_lo_ptr, ema_ptr, ema_gain_ptr, scale_ptr, found_inf_ptr, overflow_ptr,
    beta1, one_minus_beta1, beta2, one_minus_beta2, n, ema_stride,
    BLOCK: tl.constexpr, EMAS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK  # an arena may pass 2^31 elements
    offs = tl.arange(0, BLOCK)
    options = master_lo_ptr, ema_ptr, ema_gain_ptr, scale_ptr, found_inf_ptr, overflow_ptr, ema_stride
    betas = beta1, one_minus_beta1, beta2, one_minus_beta2
    if start + BLOCK <= n:
        _tile(p_ptr, g_ptr, m_ptr, factors_ptr, options, betas, start, offs, None, EMAS)
    else:
        _tile(p_ptr, g_ptr, m_ptr, factors_ptr, options, betas, start, offs, offs < n - start, EMAS)


def lion_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    factors: Tensor,
    master_lo: Tensor | None,
    ema: Tensor | None,
    ema_gain: Tensor | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    overflow: Tensor | None,
    beta1: float,
    beta2: float,
) -> None:
    """Step tensors of one dense layout in place, in one launch. factors: fp32 (1 - lr wd, -lr)."""
    n, tile = p.numel(), TILES["lion"]
    operands = p, g, m, factors, master_lo, ema, ema_gain, scale, found_inf, overflow
    betas = beta1, 1 - beta1, beta2, 1 - beta2
    ema_stride, count = averages_layout(ema)
    if n:
        launch(_lion, (triton.cdiv(n, tile.span),), *operands, *betas, n, ema_stride, **tile.options(EMAS=count))


_lion_op = custom_op("lion", mutates_args=("p", "m", "master_lo", "ema", "overflow"))(lion_step)
_lion_op.register_fake(lambda *_: None)


@torch.no_grad()
def lion_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **options: Unpack[StepOptions],
) -> None:
    """`lion_reference` with one launch per tensor; an arena is a list of one. In a captured graph a float lr is constant.

    Raises:
        ValueError: a dtype that `lion_reference` does not name, tensors of one parameter that differ in shape or strides or
            have gaps, or a device that runs no kernels.
    """
    rows = operands("lion", params, grads, exp_avgs, device_scalars=(lr,), **options)
    if rows:
        factors = scalars(params[0].device, 1 - lr * weight_decay, -lr)
    for (p, g, m), extra in rows:
        _lion_op(p, g, m, factors, *extra, *betas)


@torch.no_grad()
def lion_cpu(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    **options: Unpack[StepOptions],
) -> None:
    """`lion_reference` in one pass.

    Raises:
        ValueError: a dtype that `lion_reference` does not name, tensors of one parameter that differ in shape or strides or
            have gaps, a tensor that is not on the CPU, or kernels that cannot be used (`problem`).
    """
    rows = cpu_optimizers.operands("lion", params, grads, exp_avgs, scalars=(lr,), **options)
    factors = scalars(torch.device("cpu"), 1 - lr * weight_decay, -lr)
    constants = betas[0], 1 - betas[0], betas[1], 1 - betas[1]
    cpu_optimizers.call("lion", rows, factors, constants, **options)


OP: Op[Lion] = Op(
    name="lion",
    reference=lion_reference,
    triton=lion_triton,
    cpu=lion_cpu,
    calls=lambda: step_calls(lambda p, g, m, options: lion_step(p, g, m, meta(4), *options, 0.9, 0.99)),
    bytes=lambda count, gradient_size: count * (16 + gradient_size),
)
