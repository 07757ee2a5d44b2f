"""GroupNorm over channels-last images, with an optional shift added first and an optional SiLU after.

    xhat = (x + shift - mean_g) * rstd_g        rstd_g = 1 / sqrt(var_g + eps)
    z = xhat * weight + bias        y = z, or with SiLU z * sigmoid(z)

    dz = dy, or with SiLU dy * sigmoid(z) * (1 + z * (1 - sigmoid(z)))        u = dz * weight
    dx = rstd_g * (u - mean_g(u) - xhat * mean_g(u * xhat))        d shift = sum over positions of dx
    d weight = sum over images and positions of dz * xhat        d bias = the same of dz

Means and variances run over the P positions and C/G channels of one image's group, in fp32 whatever the dtype.

Shapes: B images, C channels, G groups, P = H*W positions; memory is channels last, that is (B, P, C).  fp32 or bf16; weight,
bias and shift (B, C), the time embedding of a residual block, may be fp32 beside a bf16 x.  mean and rstd are fp32 (B, G).
Bytes moved, without partial sums: forward 2 reads and 1 write of x, backward 2 reads of x and dy and 1 write of dx.
Saved for backward: x, shift, mean, rstd.  y is never saved: `group_norm_apply` rebuilds it, bit for bit.

A group is 4 to 80 channels wide and P positions long: too narrow for 16-byte loads, too long for one program.  So tiles
are cut without regard to groups, 64 channels (which divides every C of the workload) by 16 to 128 positions, and sum over
positions only; a small second kernel merges their sums per channel into those of a group:

    forward     _statistics      (x) -> mean and squared deviations of each tile's channels
                _merge           -> mean, rstd of each group
                _apply           (x) -> y
    backward    _sums            (x, dy) -> sums of dz, dz * xhat and xhat over each tile's positions
                _merge_sums      -> the two means of each group, the sums of each channel, d shift
                _input_gradient  (x, dy) -> dx

A tile takes deviations from its own mean, in registers, and tiles merge by Chan's formula.  Nothing computes
E[x^2] - mean^2, which loses all digits where mean >> std.  Every order of summation is fixed, and an image's numbers do
not depend on the images beside it.  d shift is computed from the sums of each channel; xhat is summed only for this.
Rejected: tiles of whole groups (loads of 4 and 8 bytes at C/G = 10, 20, 30, 60); adding the shift to the means of channels
(the fewest operations, but a shift that cancels a large mean leaves noise); a sum of dx in its own kernel for d shift
(one more set of partial sums, and a launch to add them).  Not built: one program for a whole small image.

Read next: `attention.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import workload
from fastsd_kernels.group_norm_tiles import plan
from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import DTYPES, custom_op, launch, meta, require_device
from fastsd_kernels.ops import Calls, GroupNorm, Op, Shift


def group_norm_reference(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = False, shift_BC: Tensor | None = None
) -> Tensor:
    """GroupNorm, channels last in and out.

    Args:
        x_BCHW: (B, C, H, W), channels_last.
        weight, bias: (C,).
        groups: must divide C.
        eps: added to the variance.
        silu: apply x * sigmoid(x) to the result.
        shift_BC: (B, C), added to every position of an image before the statistics are taken.

    Returns:
        (B, C, H, W), channels_last, in the dtype of x.

    Raises:
        ValueError: groups do not divide C, or a shape that does not fit.

    Source: Wu and He 2018, equation 1.
    """
    _check(x_BCHW, weight, bias, groups, shift_BC)
    if shift_BC is not None:
        x_BCHW = x_BCHW + shift_BC[:, :, None, None]
    y = F.group_norm(x_BCHW, groups, weight, bias, eps)
    # PyTorch's CUDA kernel returns the other layout.
    return (F.silu(y) if silu else y).contiguous(memory_format=torch.channels_last)


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int, shift: Shift) -> None:
    if x.ndim != 4 or groups < 1 or x.shape[1] % groups or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        raise ValueError(
            f"group_norm: x is {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, with {groups} groups; "
            "use (B, C, H, W), (C,), (C,) and a divisor of C"
        )
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"group_norm: shift is {tuple(shift.shape)}; use {tuple(x.shape[:2])}")


@triton.jit
def _image_and_chunk(i_program, n_positions, n_channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the numbers of a program's image and chunk of positions. Programs of the same chunk follow each other."""
    i_tile, n_chunks = i_program // tl.cdiv(n_channels, COLS), tl.cdiv(n_positions, ROWS)
    return i_tile // n_chunks, i_tile % n_chunks


@triton.jit
def _tile(i_program, i_image, i_chunk, n_positions, n_channels, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the tile's start in memory, its offsets and channels (1, COLS), each followed by its mask."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = i_program % tl.cdiv(n_channels, COLS) * COLS + tl.arange(0, COLS)[None, :]
    # Only the start may lie beyond 2^31.
    start = (i_image.to(tl.int64) * n_positions + i_chunk * ROWS) * n_channels
    return start, rows * n_channels + cols, rows < n_positions - i_chunk * ROWS, cols, cols < n_channels


@triton.jit
def _backwards():
    """Return the program's index, counted from the last: the previous kernel's last reads may still be in the L2 cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def _load(x_ptr, shift_ptr, start, offs, mask, i_image, n_channels, cols, col_mask, SHIFT: tl.constexpr):
    """Load x + shift over a tile. The shift is added first: where it cancels x, x - mean + shift would lose what is left."""
    x = tl.load(x_ptr + start + offs, mask, other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift_ptr + i_image * n_channels + cols, col_mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def _channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH: tl.constexpr):
    """Load (mean, rstd, weight, bias) of each channel. A group has WIDTH channels."""
    groups = i_image * (n_channels // WIDTH) + cols // WIDTH
    mean = tl.load(mean_ptr + groups, col_mask, other=0.0)
    rstd = tl.load(rstd_ptr + groups, col_mask, other=0.0)
    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, col_mask, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def _statistics(
    x_ptr, shift_ptr, partial_ptr, n_positions, n_channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Write partial (B, chunks, 2, C): mean and sum of squared deviations of each channel over a tile's positions."""
    i_program = tl.program_id(0)
    i_image, i_chunk = _image_and_chunk(i_program, n_positions, n_channels, ROWS, COLS)
    start, offs, row_mask, cols, col_mask = _tile(i_program, i_image, i_chunk, n_positions, n_channels, ROWS, COLS)
    x = _load(x_ptr, shift_ptr, start, offs, row_mask & col_mask, i_image, n_channels, cols, col_mask, SHIFT)
    count = tl.minimum(n_positions - i_chunk * ROWS, ROWS)
    mean = tl.sum(tl.where(row_mask, x, 0.0), axis=0, keep_dims=True) / count
    centred = tl.where(row_mask, x - mean, 0.0)
    i_tile = i_program // tl.cdiv(n_channels, COLS)
    partial_ptrs = partial_ptr + i_tile.to(tl.int64) * 2 * n_channels + cols
    tl.store(partial_ptrs, mean, col_mask)
    tl.store(partial_ptrs + n_channels, tl.sum(centred * centred, axis=0, keep_dims=True), col_mask)


@triton.jit
def _merge(
    partial_ptr, mean_ptr, rstd_ptr, n_positions, n_channels, n_chunks, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Merge the statistics of tiles into mean and rstd (B, G) of each group. COLS covers a group, ROWS is that of a tile."""
    n_groups = n_channels // WIDTH
    i_image, i_group = tl.program_id(0) // n_groups, tl.program_id(0) % n_groups
    cols = tl.arange(0, COLS)[None, :]
    col_mask = cols < WIDTH
    stride = 2 * n_channels
    partial_ptrs = partial_ptr + i_image.to(tl.int64) * n_chunks * stride + i_group * WIDTH + cols
    elements = 1.0 * n_positions * WIDTH  # not in int32: it may pass 2^31

    total = tl.zeros([CHUNKS, COLS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        mask = (chunks < n_chunks) & col_mask
        mean = tl.load(partial_ptrs + chunks * stride, mask, other=0.0)
        total += mean * tl.minimum(n_positions - chunks * ROWS, ROWS)
    group_mean = tl.sum(total) / elements

    total = tl.zeros([CHUNKS, COLS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        mask = (chunks < n_chunks) & col_mask
        offs = chunks * stride
        deviation = tl.load(partial_ptrs + offs, mask, other=0.0) - group_mean
        squares = tl.load(partial_ptrs + n_channels + offs, mask, other=0.0)
        squares += deviation * deviation * tl.minimum(n_positions - chunks * ROWS, ROWS)
        total += tl.where(mask, squares, 0.0)
    variance = tl.sum(total) / elements

    tl.store(mean_ptr + i_image * n_groups + i_group, group_mean)
    tl.store(rstd_ptr + i_image * n_groups + i_group, tl.rsqrt(variance + eps))


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def _apply(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, n_positions, n_channels,
    SILU: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i_program = _backwards()
    i_image, i_chunk = _image_and_chunk(i_program, n_positions, n_channels, ROWS, COLS)
    start, offs, row_mask, cols, col_mask = _tile(i_program, i_image, i_chunk, n_positions, n_channels, ROWS, COLS)
    mask = row_mask & col_mask
    mean, rstd, weight, bias = _channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH)
    x = _load(x_ptr, shift_ptr, start, offs, mask, i_image, n_channels, cols, col_mask, SHIFT)
    y = (x - mean) * (rstd * weight) + bias
    if SILU:
        y *= _sigmoid(y)
    tl.store(y_ptr + start + offs, rounded(y, y_ptr.dtype.element_ty), mask)


@triton.jit
def _gradient_of_z(dy, xhat, weight, bias, SILU: tl.constexpr):
    if SILU:
        z = xhat * weight + bias
        s = _sigmoid(z)
        dy *= s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit
def _sums(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, shift_ptr, partial_ptr, n_positions, n_channels,
    SILU: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write partial (B, chunks, 2 or 3, C): sums of dz, dz * xhat and, for d shift, xhat over a tile's positions."""
    i_program = tl.program_id(0)
    i_image, i_chunk = _image_and_chunk(i_program, n_positions, n_channels, ROWS, COLS)
    start, offs, row_mask, cols, col_mask = _tile(i_program, i_image, i_chunk, n_positions, n_channels, ROWS, COLS)
    mask = row_mask & col_mask
    mean, rstd, weight, bias = _channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH)
    dy = tl.load(dy_ptr + start + offs, mask, other=0.0).to(tl.float32)
    xhat = (_load(x_ptr, shift_ptr, start, offs, mask, i_image, n_channels, cols, col_mask, SHIFT) - mean) * rstd
    dz = _gradient_of_z(dy, xhat, weight, bias, SILU)  # zero beyond the mask, as dy is

    i_tile = i_program // tl.cdiv(n_channels, COLS)
    partial_ptrs = partial_ptr + i_tile.to(tl.int64) * (3 if SHIFT else 2) * n_channels + cols
    tl.store(partial_ptrs, tl.sum(dz, axis=0, keep_dims=True), col_mask)
    tl.store(partial_ptrs + n_channels, tl.sum(dz * xhat, axis=0, keep_dims=True), col_mask)
    if SHIFT:
        xhat = tl.where(row_mask, xhat, 0.0)
        tl.store(partial_ptrs + 2 * n_channels, tl.sum(xhat, axis=0, keep_dims=True), col_mask)


@triton.jit
def _sum_chunks(ptrs, stride, n_chunks, col_mask, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    total = tl.zeros([CHUNKS, COLS], tl.float32)
    for first in range(0, n_chunks, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)[:, None]
        total += tl.load(ptrs + chunks * stride, (chunks < n_chunks) & col_mask, other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def _merge_sums(
    partial_ptr, rstd_ptr, weight_ptr, u_mean_ptr, u_xhat_mean_ptr, total_ptr, dshift_ptr, n_positions, n_channels, n_chunks,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write mean(u) and mean(u * xhat) (B, G), total (B, 2, C) with sums of dz * xhat and dz, and d shift (B, C)."""
    n_groups = n_channels // WIDTH
    i_image, i_group = tl.program_id(0) // n_groups, tl.program_id(0) % n_groups
    cols = tl.arange(0, COLS)[None, :]
    col_mask = cols < WIDTH
    cols += i_group * WIDTH
    elements = 1.0 * n_positions * WIDTH  # not in int32: it may pass 2^31
    stride = (3 if SHIFT else 2) * n_channels
    partial_ptrs = partial_ptr + i_image.to(tl.int64) * n_chunks * stride + cols
    dz = _sum_chunks(partial_ptrs, stride, n_chunks, col_mask, CHUNKS, COLS)
    dz_xhat = _sum_chunks(partial_ptrs + n_channels, stride, n_chunks, col_mask, CHUNKS, COLS)
    total_ptrs = total_ptr + i_image * 2 * n_channels + cols
    tl.store(total_ptrs, dz_xhat, col_mask)
    tl.store(total_ptrs + n_channels, dz, col_mask)

    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    u_mean = tl.sum(dz * weight) / elements
    u_xhat_mean = tl.sum(dz_xhat * weight) / elements
    tl.store(u_mean_ptr + i_image * n_groups + i_group, u_mean)
    tl.store(u_xhat_mean_ptr + i_image * n_groups + i_group, u_xhat_mean)
    if SHIFT:
        xhat = _sum_chunks(partial_ptrs + 2 * n_channels, stride, n_chunks, col_mask, CHUNKS, COLS)
        rstd = tl.load(rstd_ptr + i_image * n_groups + i_group)
        dshift = rstd * (dz * weight - n_positions * u_mean - xhat * u_xhat_mean)
        tl.store(dshift_ptr + i_image * n_channels + cols, rounded(dshift, dshift_ptr.dtype.element_ty), col_mask)


@triton.jit
def _input_gradient(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, shift_ptr, u_mean_ptr, u_xhat_mean_ptr, dx_ptr,
    n_positions, n_channels,
    SILU: tl.constexpr, SHIFT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i_program = _backwards()
    i_image, i_chunk = _image_and_chunk(i_program, n_positions, n_channels, ROWS, COLS)
    start, offs, row_mask, cols, col_mask = _tile(i_program, i_image, i_chunk, n_positions, n_channels, ROWS, COLS)
    mask = row_mask & col_mask
    mean, rstd, weight, bias = _channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH)
    groups = i_image * (n_channels // WIDTH) + cols // WIDTH
    u_mean = tl.load(u_mean_ptr + groups, col_mask, other=0.0)
    u_xhat_mean = tl.load(u_xhat_mean_ptr + groups, col_mask, other=0.0)
    dy = tl.load(dy_ptr + start + offs, mask, other=0.0).to(tl.float32)
    xhat = (_load(x_ptr, shift_ptr, start, offs, mask, i_image, n_channels, cols, col_mask, SHIFT) - mean) * rstd
    u = _gradient_of_z(dy, xhat, weight, bias, SILU) * weight
    dx = rstd * (u - u_mean - xhat * u_xhat_mean)
    tl.store(dx_ptr + start + offs, rounded(dx, dx_ptr.dtype.element_ty), mask)


def _channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last memory: x itself if it has that layout, otherwise a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _empty_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), groups, dtype=torch.float32), x.new_empty(len(x), groups, dtype=torch.float32)


def group_norm_statistics(x: Tensor, shift: Shift, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return (mean, rstd) of x + shift, fp32 (B, G)."""
    x, shift = _channels_last(x), None if shift is None else shift.contiguous()
    sizes, chunks, grid, tile, merge = plan(x, groups)
    images = len(x)
    partial = x.new_empty(images, chunks, 2, x.shape[1], dtype=torch.float32)
    mean, rstd = _empty_statistics(x, groups)
    if x.numel():
        launch(_statistics, grid, x, shift, partial, *sizes, SHIFT=shift is not None, **tile)
        launch(_merge, (groups * images,), partial, mean, rstd, *sizes, chunks, eps, ROWS=tile["ROWS"], **merge)
    return mean, rstd


def group_norm_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, shift: Shift
) -> Tensor:
    """Return y, channels last, from x and its statistics. This is the last step of a forward, and all of a recomputation."""
    x, shift = _channels_last(x), None if shift is None else shift.contiguous()
    sizes, _, grid, tile, merge = plan(x, groups)
    y = _empty_like(x)
    flags = {"SILU": silu, "SHIFT": shift is not None, "WIDTH": merge["WIDTH"]}
    if x.numel():
        launch(_apply, grid, x, mean, rstd, weight.contiguous(), bias.contiguous(), shift, y, *sizes, **flags, **tile)
    return y


def group_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, shift: Shift
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dshift) from dy in any layout. dx is channels last. Without a shift dshift is empty."""
    dy, x, shift = _channels_last(dy), _channels_last(x), None if shift is None else shift.contiguous()
    sizes, chunks, grid, tile, merge = plan(x, groups)
    images = len(x)
    partial = x.new_empty(images, chunks, 2 if shift is None else 3, x.shape[1], dtype=torch.float32)
    total = x.new_empty(images, 2, x.shape[1], dtype=torch.float32)
    means = torch.empty_like(mean), torch.empty_like(mean)
    dx = _empty_like(x)
    dshift = x.new_empty(0) if shift is None else torch.empty_like(shift)
    operands = dy, x, mean, rstd, weight.contiguous(), bias.contiguous(), shift
    flags = {"SILU": silu, "SHIFT": shift is not None, "WIDTH": merge["WIDTH"]}
    if x.numel():
        launch(_sums, grid, *operands, partial, *sizes, **flags, **tile)
        sums = partial, rstd, weight.contiguous(), *means, total, dshift
        launch(_merge_sums, (groups * images,), *sums, *sizes, chunks, SHIFT=shift is not None, **merge)
        launch(_input_gradient, grid, *operands, *means, dx, *sizes, **flags, **tile)
    return dx, total[:, 0].sum(0).to(weight.dtype), total[:, 1].sum(0).to(bias.dtype), dshift


group_norm_apply_op = custom_op("group_norm_apply")(group_norm_apply)
group_norm_backward_op = custom_op("group_norm_backward")(group_norm_backward)
group_norm_apply_op.register_fake(lambda x, *_: _empty_like(x))


@custom_op("group_norm")
def group_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, shift: Shift
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = group_norm_statistics(x, shift, groups, eps)
    return group_norm_apply(x, mean, rstd, weight, bias, groups, silu, shift), mean, rstd


group_norm_op.register_fake(lambda x, weight, bias, groups, *_: (_empty_like(x), *_empty_statistics(x, groups)))


@group_norm_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, shift: Shift
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dshift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    return (
        _empty_like(x),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        dshift,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu, shift = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, shift)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, shift = ctx.saved_tensors
    grads = group_norm_backward_op(dy, x, mean, rstd, weight, bias, ctx.groups, ctx.silu, shift)
    return *grads[:3], None, None, None, None if shift is None else grads[3]


group_norm_op.register_autograd(_differentiate, setup_context=_save)


def group_norm_triton(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = False, shift_BC: Tensor | None = None
) -> Tensor:
    """`group_norm_reference` with three launches forward, and three and two small sums backward. Differentiable once.

    Raises:
        ValueError: as the reference, a dtype without a kernel, or tensors on a device that runs no kernels.
    """
    _check(x_BCHW, weight, bias, groups, shift_BC)
    require_device("group_norm", x_BCHW, weight, bias, shift_BC)
    if x_BCHW.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"group_norm: x is {x_BCHW.dtype}; use float32 or bfloat16")
    # An image in another layout is converted here, once: the backward saves and reads the copy.
    return group_norm_op(_channels_last(x_BCHW), weight, bias, groups, eps, silu, shift_BC)[0]


def _calls() -> Calls:
    for kind in (*workload.GROUP_NORM, *workload.VAE_ENCODER_GROUP_NORM):
        for mode, dtype in DTYPES.items():
            x = meta(workload.BATCH, kind.channels, kind.side, kind.side, dtype=dtype).to(memory_format=torch.channels_last)
            shifts = torch.float32 if kind in workload.VAE_ENCODER_GROUP_NORM else dtype  # sums of biases, stored in fp32
            w, shift = meta(kind.channels, dtype=dtype), meta(len(x), kind.channels, dtype=shifts) if kind.shift else None
            mean, rstd = group_norm_statistics(x, shift, kind.groups, kind.eps)
            group_norm_apply(x, mean, rstd, w, w, kind.groups, kind.silu, shift)
            if kind in workload.GROUP_NORM:
                group_norm_backward(x, x, mean, rstd, w, w, kind.groups, kind.silu, shift)
            yield f"{kind.channels}c {kind.side}px{' shifted' if kind.shift else ''}", mode


OP: Op[GroupNorm] = Op(
    name="group_norm",
    reference=group_norm_reference,
    triton=group_norm_triton,
    calls=_calls,
    bytes=lambda kind, size: 8 * kind.channels * kind.side**2 * size,  # forward 3 images, backward 5
)
