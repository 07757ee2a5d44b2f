"""The norm of all gradients and a flag for gradients that are not finite, in one pass before a step changes any state.

    norm = sqrt(sum g^2)          found_inf = not all g finite

Layout: fp32 or bf16 tensors, dense; a list of one arena is one launch and a tail.  Bytes moved: every gradient once, 4 or 2 an
element.  Everything stays on the device: `found_inf` and `clip_scale(norm, ...)` go into the optimizers as they are.

fp32 squares overflow above 1.8e19, but finite gradients must not give an infinite sum.  So each lane has two sums, one of
ordinary squares and one of huge numbers' squares scaled by 2^-160, neither of which can overflow for finite numbers:
|g| < 2^50 gives less than 2^14 2^100, and |g| < 2^128 gives less than 2^14 2^96.  A program joins them in fp64.  So the total
is finite if and only if every gradient is, and no flag needs a pass of its own.  Below 1e-19 squares vanish, as in PyTorch's
norm.  fp64 throughout would be simpler, but at 1/64 of fp32's rate on a GeForce it would take as long as the reading.

The order of the sums depends only on the elements' places: a program has 16384, a lane 8 of them; the lanes are added as a
tree, and the programs in fp64.  The reference, all in fp64, differs in the last digit or two at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import cpu_optimizers, workload
from fastsd_kernels.arena import TILES, chunks, dense, load, pair_sum, require_dtype
from fastsd_kernels.launch import DTYPES, custom_op, launch, meta, require_device
from fastsd_kernels.ops import Calls, GradientNorm, Op

Merge = Callable[[Tensor], Tensor]


@torch.no_grad()
def gradient_norm_reference(grads: Sequence[Tensor], *, merge: Merge | None = None) -> tuple[Tensor, Tensor]:
    """Compute the L2 norm of all gradients.

    Args:
        grads: at least one tensor, fp32 or bf16, on one device.
        merge: called with this process's partial sums of squares, fp64 (K,), and returns those of all processes that share the
            gradients; None = there are no others.

    Returns:
        norm: 0-dim fp32. It is infinite if it exceeds fp32, even if all gradients are finite.
        found_inf: 0-dim bool, True if any gradient is not finite. The optimizers take it as `found_inf`.
    """
    squares = [g.double().square().sum() for (chunk,) in chunks(grads) for g in chunk]
    total = _merged(torch.stack(squares), merge).sum()
    return total.sqrt().float(), ~torch.isfinite(total)


def _merged(sums_K: Tensor, merge: Merge | None) -> Tensor:
    return sums_K if merge is None else merge(sums_K)


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """Return the `scale` with which an optimizer clips gradients of this norm to `max_norm`: 0-dim fp32."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@triton.jit
def _square_sum(g_ptr, start, stop, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the squares of elements start .. stop in fp64, in whole blocks unless BOUNDED."""
    offs = tl.arange(0, BLOCK)
    usual = tl.zeros([BLOCK], tl.float32)
    huge = tl.zeros([BLOCK], tl.float32)
    while start < stop:
        if BOUNDED:
            mask = offs < stop - start
        else:
            mask = None
        g = load(g_ptr, start, offs, mask).to(tl.float32)
        large = tl.abs(g) > 1125899906842624.0  # 2^50; false for NaN
        usual_g = tl.where(large, 0.0, g)
        huge_g = tl.where(large, g * 8.271806125530277e-25, 0.0)  # 2^-80
        usual += usual_g * usual_g
        huge += huge_g * huge_g
        start += BLOCK
    return pair_sum(usual).to(tl.float64) + pair_sum(huge).to(tl.float64) * 1.461501637330903e48  # 2^160


@triton.jit(do_not_specialize=["n"])
def _squares(g_ptr, sums_ptr, n, BLOCK: tl.constexpr, TIMES: tl.constexpr):
    i_span = tl.program_id(0)
    start = i_span.to(tl.int64) * (BLOCK * TIMES)  # an arena may pass 2^31 elements
    stop = start + BLOCK * TIMES
    if stop <= n:
        total = _square_sum(g_ptr, start, stop, BOUNDED=False, BLOCK=BLOCK)
    else:
        total = _square_sum(g_ptr, start, n, BOUNDED=True, BLOCK=BLOCK)
    tl.store(sums_ptr + i_span, total)


@triton.jit(do_not_specialize=["n"])
def _norm(sums_ptr, norm_ptr, found_inf_ptr, n, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        sums += tl.load(sums_ptr + offs, offs < n, other=0.0)
    total = tl.sum(sums)
    tl.store(norm_ptr, tl.sqrt(total).to(tl.float32))
    tl.store(found_inf_ptr, (total < float("inf")) == 0)  # false for NaN, too


def square_sums(g: Tensor) -> Tensor:
    """Return partial sums of a dense tensor's squares in memory order, fp64 (K,)."""
    n, tile = g.numel(), TILES["gradient_norm"]
    sums_K = g.new_empty(triton.cdiv(n, tile.span), dtype=torch.float64)
    if n:
        launch(_squares, (len(sums_K),), g, sums_K, n, **tile.options(TIMES=tile.times))
    return sums_K


def norm_of_sums(sums_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return (norm, found_inf) from all partial sums, in one launch of one program."""
    tile = TILES["tail"]
    norm, found_inf = sums_K.new_empty((), dtype=torch.float32), sums_K.new_empty((), dtype=torch.bool)
    launch(_norm, (1,), sums_K, norm, found_inf, len(sums_K), **tile.options())
    return norm, found_inf


_squares_op = custom_op("square_sums")(square_sums)
_norm_op = custom_op("norm_of_sums")(norm_of_sums)
_squares_op.register_fake(lambda g: g.new_empty(-(-g.numel() // TILES["gradient_norm"].span), dtype=torch.float64))
_norm_op.register_fake(lambda sums_K: (sums_K.new_empty((), dtype=torch.float32), sums_K.new_empty((), dtype=torch.bool)))


@torch.no_grad()
def gradient_norm_triton(grads: Sequence[Tensor], *, merge: Merge | None = None) -> tuple[Tensor, Tensor]:
    """`gradient_norm_reference` with one launch per tensor and one for the total.

    Raises:
        ValueError: no gradients, a dtype other than fp32 and bf16, or a device that runs no kernels.
    """
    if not grads:
        raise ValueError("gradient_norm: the list of gradients is empty; pass at least one")
    require_device("gradient_norm", *grads)
    for g in grads:
        require_dtype("gradient_norm", "gradient", g, torch.float32, torch.bfloat16)
    # Only a gradient with gaps or repeats, which no backward leaves in a parameter, is copied.
    sums = [_squares_op(g if dense(g) else g.contiguous()) for g in grads]
    return _norm_op(_merged(sums[0] if len(sums) == 1 else torch.cat(sums), merge))


@torch.no_grad()
def gradient_norm_cpu(grads: Sequence[Tensor], *, merge: Merge | None = None) -> tuple[Tensor, Tensor]:
    """`gradient_norm_reference` in one pass.

    Raises:
        ValueError: no gradients, a dtype other than fp32 and bf16, a tensor that is not on the CPU, or kernels that cannot be
            used (`problem`).
    """
    if not grads:
        raise ValueError("gradient_norm: the list of gradients is empty; pass at least one")
    cpu_optimizers.require_cpu("gradient_norm", *grads)
    for g in grads:
        require_dtype("gradient_norm", "gradient", g, torch.float32, torch.bfloat16)
    # Only a gradient with gaps or repeats is copied; no backward leaves such a gradient in a parameter.
    grads = [g if dense(g) else g.contiguous() for g in grads]
    rows = [(None, g, None, None, None, None) for g in grads]
    total = _merged(cpu_optimizers.call("gradient_norm", rows, None, ())[0], merge).sum()
    return total.sqrt().float(), ~torch.isfinite(total)


def _calls() -> Calls:
    for mode, dtype in DTYPES.items():
        norm_of_sums(square_sums(meta(sum(size * count for size, count in workload.PARAMETERS.items()), dtype=dtype)))
        yield f"{mode} gradients", mode


OP: Op[GradientNorm] = Op(
    name="gradient_norm",
    reference=gradient_norm_reference,
    triton=gradient_norm_triton,
    cpu=gradient_norm_cpu,
    calls=_calls,
    bytes=lambda count, gradient_size: count * gradient_size,
)
