"""Floor 0: the operations that a training step consists of. Each has one signature and several implementations.

`Ops` is a frozen table of them. REFERENCE is plain PyTorch: the truth in tests, and the path on a machine without a GPU.
TRITON is the table of fused kernels, or None where Triton is not installed (macOS).  CPU is REFERENCE with the optimizers
and the gradient norm in C, compiled at first use.  No fallback is silent: `fastest` chooses, and the table's name is printed.
A model gets one table when it is created.  Read next: `geglu.py`, the shortest kernel; all files share its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsd_kernels.adamw import adamw_reference, adamw_triton
from fastsd_kernels.attention import attention_reference, attention_triton
from fastsd_kernels.cpu_optimizers import adamw_cpu, dlion_cpu, gradient_norm_cpu, lion_cpu
from fastsd_kernels.cpu_optimizers import problem as cpu_problem
from fastsd_kernels.dlion import dlion_estimate_reference, dlion_estimate_triton, dlion_reference, dlion_triton
from fastsd_kernels.forward_backward import REFERENCE_FORWARD_BACKWARD, TRITON_FORWARD_BACKWARD, ForwardBackwardOps
from fastsd_kernels.geglu import geglu_reference, geglu_triton
from fastsd_kernels.gradient_norm import gradient_norm_reference, gradient_norm_triton
from fastsd_kernels.group_norm import group_norm_reference, group_norm_triton
from fastsd_kernels.layer_norm import layer_norm_reference, layer_norm_triton
from fastsd_kernels.lion import lion_reference, lion_triton
from fastsd_kernels.no_triton import AVAILABLE, remove_stand_in
from fastsd_kernels.noise import add_noise_reference, add_noise_triton, normal, normal_triton


@dataclass(frozen=True)
class Ops:
    """One implementation of every operation. The references document the signatures."""

    name: str
    # Operations of the model. They are differentiable.
    attention: Callable[..., Tensor]  # (q_BNHD, k_BLHD, v_BLHD, *, precision="ieee") -> o_BNHD
    group_norm: Callable[..., Tensor]  # (x_BCHW, weight, bias, groups, eps, *, silu=False, shift_BC=None) -> y_BCHW
    layer_norm: Callable[..., Any]  # (x, weight, bias, eps, *, residual=None) -> y, with a residual (y, x + residual)
    geglu: Callable[..., Tensor]  # (x_2F) -> y_F
    forward_backward: ForwardBackwardOps  # of the four above, for layers that save less for backward
    # Operations of the step. They work in place or have no gradient.
    normal: Callable[..., Tensor]  # (seed, purpose, positions_B, shape) -> standard normals (B, *shape)
    # (latents_BCHW, positions_B, t_B, signal_T, sigma_T, seed) -> (x_t, target)
    add_noise: Callable[..., tuple[Tensor, Tensor]]
    gradient_norm: Callable[..., tuple[Tensor, Tensor]]  # (grads, *, scale=None) -> (norm, found_inf)
    lion: Callable[..., None]  # (params, grads, exp_avgs, *, lr, betas, ...)
    dlion: Callable[..., tuple[Tensor, Tensor]]  # (params, grads, exp_avgs, s, d, *, lr, betas, ...) -> (dots_K, l1_K)
    dlion_estimate: Callable[..., None]  # (d, numerator_weighted, dots_K, l1_K, *, lr, beta2, found_inf)
    adamw: Callable[..., None]  # (params, grads, exp_avgs, exp_avg_sqs, steps, *, lr, betas, ...)


REFERENCE = Ops(
    name="reference",
    attention=attention_reference,
    group_norm=group_norm_reference,
    layer_norm=layer_norm_reference,
    geglu=geglu_reference,
    forward_backward=REFERENCE_FORWARD_BACKWARD,
    normal=normal,
    add_noise=add_noise_reference,
    gradient_norm=gradient_norm_reference,
    lion=lion_reference,
    dlion=dlion_reference,
    dlion_estimate=dlion_estimate_reference,
    adamw=adamw_reference,
)
TRITON: Ops | None = Ops(
    name="triton",
    attention=attention_triton,
    group_norm=group_norm_triton,
    layer_norm=layer_norm_triton,
    geglu=geglu_triton,
    forward_backward=TRITON_FORWARD_BACKWARD,
    normal=normal_triton,
    add_noise=add_noise_triton,
    gradient_norm=gradient_norm_triton,
    lion=lion_triton,
    dlion=dlion_triton,
    dlion_estimate=dlion_estimate_triton,
    adamw=adamw_triton,
)
if not AVAILABLE:
    TRITON = None
remove_stand_in()
# Usable if `cpu_optimizers.problem()` returns None; otherwise the functions in C raise ValueError.
CPU = replace(REFERENCE, name="cpu", gradient_norm=gradient_norm_cpu, lion=lion_cpu, dlion=dlion_cpu, adamw=adamw_cpu)


def fastest(device: torch.device) -> Ops:
    """Return the table for tensors on this device: TRITON on a GPU, CPU on a CPU, or REFERENCE if that table is not usable.

    On a CPU the first call may compile for a second, once per machine. `cpu_optimizers.problem()` says why CPU is not usable.
    """
    if device.type == "cuda" and TRITON is not None:
        return TRITON
    if device.type == "cpu" and cpu_problem() is None:
        return CPU
    return REFERENCE


__all__ = ["CPU", "REFERENCE", "TRITON", "Ops", "fastest"]
