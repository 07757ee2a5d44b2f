"""AdamW: Adam with weight decay decoupled from the gradient.

    p = p (1 - lr wd)
    m = m + (1 - b1)(g - m)             v = b2 v + (1 - b2) g^2
    p = p - lr / (1 - b1^t)  m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Layout: lists of fp32 tensors as in `lion.py`; t is one 0-dim fp32 count per parameter, on the device (an arena passes a
list of one).  Bytes moved per element: 28, for p, m, v, g read and p, m, v written; options as in `arena.py`.  The bias
corrections are computed in fp64 and rounded once, as torch.optim.AdamW computes them in Python floats; on a CPU the result
has its bits.

The kernel has the reference's bits in m and v where b1 > 1/2 (below, PyTorch's lerp starts from the other end and may round
differently), and in p where PyTorch rounds its square root as IEEE 754 demands.  On a CPU with AVX-512 it does not: one root
in five is off in the last bit.  The kernel's roots and quotients are those of IEEE 754; tl.sqrt and / would be approximate.

Read next: `gradient_norm.py`, where the factor `scale` and the flag `found_inf` come from.
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
    step_calls,
    store_parameter,
    unless_found_inf,
)
from fastsd_kernels.launch import custom_op, launch, meta
from fastsd_kernels.ops import AdamW, Op, StepOptions


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
    **options: Unpack[StepOptions],
) -> None:
    """One step of AdamW, in place on `params`, `exp_avgs`, `exp_avg_sqs` and `steps`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: fp32, equal shapes at equal places. Gradients may be bf16 and are only read.
        steps: 0-dim fp32, the steps each parameter has had; raised by one before use.
        lr: step size in units of the parameter; a float or a 0-dim fp32 tensor on the device.
        betas: decay of (first, second moment).
        eps: added to the root of the second moment, in units of the gradient.
        weight_decay: multiplies lr.
        options: see `StepOptions`.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2; torch.optim.AdamW.
    """
    if not params:
        return
    beta1, beta2 = betas
    step_sizes, corrections2 = corrections(steps, lr, betas, options.get("found_inf"))
    with masters(params, grads, **options) as (params, grads):
        for p, g, m, v, step_size, correction2 in chunks(
            params, grads, exp_avgs, exp_avg_sqs, step_sizes.unbind(), corrections2.unbind()
        ):
            with finite_or_unchanged(p, m, v, **options):
                torch._foreach_lerp_(m, g, 1 - beta1)
                torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, g, g, 1 - beta2)
                denom = torch._foreach_sqrt(v)
                torch._foreach_div_(denom, correction2)
                torch._foreach_add_(denom, eps)
                if weight_decay:
                    torch._foreach_mul_(p, 1 - lr * weight_decay)
                torch._foreach_addcdiv_(p, torch._foreach_mul(m, step_size), denom)


def corrections(
    steps: Sequence[Tensor], lr: float | Tensor, betas: tuple[float, float], found_inf: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Count the step, then return fp32 (P,): the step sizes -lr / (1 - b1^t) and the second corrections sqrt(1 - b2^t)."""
    with unless_found_inf(found_inf, steps):
        torch._foreach_add_(list(steps), 1)
        step_P = torch.stack(list(steps)).double()
    return (-lr / (1 - betas[0] ** step_P)).float(), (1 - betas[1] ** step_P).sqrt().float()


@triton.jit
def _tile(p_ptr, g_ptr, m_ptr, v_ptr, factors_ptr, options, betas, eps, start, offs, mask, EMAS: tl.constexpr):
    master_lo_ptr, _, _, scale_ptr, found_inf_ptr, _, _ = options
    one_minus_beta1, beta2, one_minus_beta2 = betas
    if should_step(found_inf_ptr):
        decay, step_size, correction2 = tl.load(factors_ptr), tl.load(factors_ptr + 1), tl.load(factors_ptr + 2)
        p = load_parameter(p_ptr, master_lo_ptr, start, offs, mask)
        g = load_gradient(g_ptr, scale_ptr, start, offs, mask)
        m = load(m_ptr, start, offs, mask)
        v = load(v_ptr, start, offs, mask)
        new_m = fma(g - m, one_minus_beta1, m)
        new_v = fma(g * one_minus_beta2, g, v * beta2)
        denom = tl.div_rn(tl.sqrt_rn(new_v), correction2) + eps
        new_p = p * decay + tl.div_rn(new_m * step_size, denom)
        is_finite = finite(new_p) & finite(new_m) & finite(new_v)
        tl.store(m_ptr + start + offs, tl.where(is_finite, new_m, m), mask)
        tl.store(v_ptr + start + offs, tl.where(is_finite, new_v, v), mask)
        store_parameter(tl.where(is_finite, new_p, p), is_finite, p_ptr, options, start, offs, mask, EMAS)


@triton.jit(do_not_specialize=["n", "ema_stride"])
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, factors_ptr, master_lo_ptr, ema_ptr, ema_gain_ptr, scale_ptr, found_inf_ptr, overflow_ptr,
    one_minus_beta1, beta2, one_minus_beta2, eps, n, ema_stride,
    BLOCK: tl.constexpr, EMAS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK  # an arena may pass 2^31 elements
    offs = tl.arange(0, BLOCK)
    options = master_lo_ptr, ema_ptr, ema_gain_ptr, scale_ptr, found_inf_ptr, overflow_ptr, ema_stride
    betas = one_minus_beta1, beta2, one_minus_beta2
    if start + BLOCK <= n:
        _tile(p_ptr, g_ptr, m_ptr, v_ptr, factors_ptr, options, betas, eps, start, offs, None, EMAS)
    else:
        _tile(p_ptr, g_ptr, m_ptr, v_ptr, factors_ptr, options, betas, eps, start, offs, offs < n - start, EMAS)


def adamw_step(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    factors: Tensor,
    master_lo: Tensor | None,
    ema: Tensor | None,
    ema_gain: Tensor | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
    overflow: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Step tensors of one dense layout in place, in one launch. factors: fp32 (1 - lr wd, -lr / (1 - b1^t), sqrt(1 - b2^t))."""
    n, tile = p.numel(), TILES["adamw"]
    operands = p, g, m, v, factors, master_lo, ema, ema_gain, scale, found_inf, overflow
    betas = 1 - beta1, beta2, 1 - beta2
    ema_stride, count = averages_layout(ema)
    if n:
        launch(_adamw, (triton.cdiv(n, tile.span),), *operands, *betas, eps, n, ema_stride, **tile.options(EMAS=count))


_adamw_op = custom_op("adamw", mutates_args=("p", "m", "v", "master_lo", "ema", "overflow"))(adamw_step)
_adamw_op.register_fake(lambda *_: None)


@torch.no_grad()
def adamw_triton(
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
    **options: Unpack[StepOptions],
) -> None:
    """`adamw_reference` with one launch per tensor; an arena is a list of one. In a captured graph a float lr is constant.

    Raises:
        ValueError: a dtype that `adamw_reference` does not name, tensors of one parameter that differ in shape or strides or
            have gaps, or a device that runs no kernels.
    """
    rows = operands("adamw", params, grads, exp_avgs, exp_avg_sqs, device_scalars=(lr, *steps), **options)
    if not rows:
        return
    step_sizes, corrections2 = corrections(steps, lr, betas, options.get("found_inf"))
    for ((p, g, m, v), extra), step_size, correction2 in zip(rows, step_sizes.unbind(), corrections2.unbind(), strict=True):
        factors = scalars(step_size.device, 1 - lr * weight_decay, step_size, correction2)
        _adamw_op(p, g, m, v, factors, *extra, *betas, eps)


@torch.no_grad()
def adamw_cpu(
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
    **options: Unpack[StepOptions],
) -> None:
    """`adamw_reference` in one pass.

    Raises:
        ValueError: as `lion_cpu`, or the number of step counts differs from that of parameters.
    """
    rows = cpu_optimizers.operands("adamw", params, grads, exp_avgs, exp_avg_sqs, scalars=(lr, *steps), **options)
    if len(steps) != len(rows):
        raise ValueError(f"adamw: {len(rows)} parameters and {len(steps)} step counts; pass one step count per parameter")
    if not rows:
        return
    cpu_optimizers.library("adamw")  # before a step is counted
    step_sizes_P, corrections2_P = corrections(steps, lr, betas, options.get("found_inf"))
    decay = scalars(step_sizes_P.device, 1 - lr * weight_decay)
    factors = torch.stack((decay.expand_as(step_sizes_P), step_sizes_P, corrections2_P), dim=1)
    constants = 1 - betas[0], betas[1], 1 - betas[1], eps
    cpu_optimizers.call("adamw", rows, factors, constants, **options)


OP: Op[AdamW] = Op(
    name="adamw",
    reference=adamw_reference,
    triton=adamw_triton,
    cpu=adamw_cpu,
    calls=lambda: step_calls(lambda p, g, m, options: adamw_step(p, g, m, m, meta(4), *options, 0.9, 0.99, 1e-8)),
    bytes=lambda count, gradient_size: count * (24 + gradient_size),
)
