"""GroupNorm over channels-last images, with an optional shift added first and an optional SiLU after.

    xhat = (x + shift - mean_g) * rstd_g        rstd_g = 1 / sqrt(var_g + eps)
    z = xhat * weight + bias        y = z, or with SiLU z * sigmoid(z)

    dz = dy, or with SiLU dy * sigmoid(z) * (1 + z * (1 - sigmoid(z)))        u = dz * weight
    dx = rstd_g * (u - mean_g(u) - xhat * mean_g(u * xhat))        d shift = sum over positions of dx
    d weight = sum over images and positions of dz * xhat        d bias = the same of dz

Means and variances run over the P positions and C/G channels of one image's group, in fp32 whatever the dtype.

Shapes: B images, C channels, G groups, P = H*W positions; memory is channels last, that is (B, P, C).  fp32 or bf16; weight,
bias and shift (B, C), the time embedding of a residual block, may be fp32 beside a bf16 x.  mean and rstd are fp32 (B, G).
The image may be two tensors, x and a skip connection, whose channels follow each other; nothing concatenates or splits them.
Bytes moved, without partial sums: forward 2 reads and 1 write of x, or 1 read if x comes with its partial statistics; backward
2 reads of x and dy, 1 write of dx.  A gradient of x from elsewhere is read and added to dx ("through").
Saved for backward: x, shift, mean, rstd.  y is never saved: the backward writes it again where it reads x anyway, over dy, for
the convolution's weight gradient. Without a backward of the norm, `group_norm_apply` does. Both have the forward's bits.

A group is 4 to 80 channels wide and P positions long: too narrow for 16-byte loads, too long for one program.  So tiles
are cut without regard to groups, 64 channels (which divides every C of the workload) by 16 to 128 positions, and sum over
positions only; a small second kernel merges their sums per channel into those of a group:

    forward     _statistics      (x) -> mean and squared deviations of each tile's channels (`group_norm_statistics.py`)
                _merge           -> mean, rstd of each group
                _apply           (x) -> y
    backward    _sums            (x, dy) -> sums of dz, dz * xhat and xhat over each tile's positions
                _merge_sums      -> the two means of each group, the sums of each channel, d shift
                _input_gradient  (x, dy) -> dx, y

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
from fastsd_kernels.group_norm_statistics import add_statistics, channels_last, group_norm_statistics
from fastsd_kernels.group_norm_tiles import (
    backwards,
    channels,
    chunks_and_tile,
    columns,
    grid,
    load_shifted,
    merging_tile,
    offsets,
    positions_of,
    sum_chunks,
    tile_number,
)
from fastsd_kernels.interpreter import rounded
from fastsd_kernels.launch import DTYPES, custom_op, launch, meta, require_device
from fastsd_kernels.ops import Calls, GroupNorm, Op, Shift
from fastsd_kernels.partial_sums import column_sums

Sizes = tuple[int, int, int]  # positions, channels, channels of x


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
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * z))


@triton.jit
def _output(xhat, weight, bias, SILU: tl.constexpr):
    y = xhat * weight + bias
    if SILU:
        y *= _sigmoid(y)
    return y


@triton.jit
def _apply(
    x_ptr, skip_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, n_positions, n_channels, n_first,
    SILU: tl.constexpr, SHIFT: tl.constexpr, SKIP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    i_image, i_chunk, i_block = tile_number(backwards(), n_positions, n_channels, n_first, ROWS, COLS)
    cols, col_mask, in_skip, x_cols, x_width = columns(i_block, n_channels, n_first, COLS)
    x_start, x_offs, row_mask = offsets(i_image, i_chunk, n_positions, x_width, x_cols, ROWS)
    start, offs, _ = offsets(i_image, i_chunk, n_positions, n_channels, cols, ROWS)
    if SKIP:
        x_ptr = tl.where(in_skip, skip_ptr, x_ptr)
    mask = row_mask & col_mask
    mean, rstd, weight, bias = channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH)
    x = load_shifted(x_ptr + x_start + x_offs, shift_ptr, mask, i_image, n_channels, cols, col_mask, SHIFT)
    y = _output((x - mean) * rstd, weight, bias, SILU)
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
    dy_ptr, x_ptr, skip_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, shift_ptr, partial_ptr, n_positions, n_channels, n_first,
    SILU: tl.constexpr, SHIFT: tl.constexpr, SKIP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write partial (B, chunks, 2 or 3, C): sums of dz, dz * xhat and, for d shift, xhat over a tile's positions."""
    i_image, i_chunk, i_block = tile_number(tl.program_id(0), n_positions, n_channels, n_first, ROWS, COLS)
    cols, col_mask, in_skip, x_cols, x_width = columns(i_block, n_channels, n_first, COLS)
    x_start, x_offs, row_mask = offsets(i_image, i_chunk, n_positions, x_width, x_cols, ROWS)
    start, offs, _ = offsets(i_image, i_chunk, n_positions, n_channels, cols, ROWS)
    if SKIP:
        x_ptr = tl.where(in_skip, skip_ptr, x_ptr)
    mask = row_mask & col_mask
    mean, rstd, weight, bias = channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH)
    dy = tl.load(dy_ptr + start + offs, mask, other=0.0).to(tl.float32)
    x = load_shifted(x_ptr + x_start + x_offs, shift_ptr, mask, i_image, n_channels, cols, col_mask, SHIFT)
    xhat = (x - mean) * rstd
    dz = _gradient_of_z(dy, xhat, weight, bias, SILU)  # zero beyond the mask, as dy is

    i_tile = i_image.to(tl.int64) * tl.cdiv(n_positions, ROWS) + i_chunk
    partial_ptrs = partial_ptr + i_tile * (3 if SHIFT else 2) * n_channels + cols
    tl.store(partial_ptrs, tl.sum(dz, axis=0, keep_dims=True), col_mask)
    tl.store(partial_ptrs + n_channels, tl.sum(dz * xhat, axis=0, keep_dims=True), col_mask)
    if SHIFT:
        xhat = tl.where(row_mask, xhat, 0.0)
        tl.store(partial_ptrs + 2 * n_channels, tl.sum(xhat, axis=0, keep_dims=True), col_mask)


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
    dz = sum_chunks(partial_ptrs, stride, n_chunks, col_mask, CHUNKS, COLS)
    dz_xhat = sum_chunks(partial_ptrs + n_channels, stride, n_chunks, col_mask, CHUNKS, COLS)
    total_ptrs = total_ptr + i_image * 2 * n_channels + cols
    tl.store(total_ptrs, dz_xhat, col_mask)
    tl.store(total_ptrs + n_channels, dz, col_mask)

    weight = tl.load(weight_ptr + cols, col_mask, other=0.0).to(tl.float32)
    u_mean = tl.sum(dz * weight) / elements
    u_xhat_mean = tl.sum(dz_xhat * weight) / elements
    tl.store(u_mean_ptr + i_image * n_groups + i_group, u_mean)
    tl.store(u_xhat_mean_ptr + i_image * n_groups + i_group, u_xhat_mean)
    if SHIFT:
        xhat = sum_chunks(partial_ptrs + 2 * n_channels, stride, n_chunks, col_mask, CHUNKS, COLS)
        rstd = tl.load(rstd_ptr + i_image * n_groups + i_group)
        dshift = rstd * (dz * weight - n_positions * u_mean - xhat * u_xhat_mean)
        tl.store(dshift_ptr + i_image * n_channels + cols, rounded(dshift, dshift_ptr.dtype.element_ty), col_mask)


@triton.jit
def _input_gradient(
    dy_ptr, x_ptr, skip_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, shift_ptr, u_mean_ptr, u_xhat_mean_ptr,
    through_ptr, dx_ptr, dskip_ptr, y_ptr, n_positions, n_channels, n_first,
    SILU: tl.constexpr, SHIFT: tl.constexpr, SKIP: tl.constexpr, THROUGH: tl.constexpr, OUTPUT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write dx, which with THROUGH includes another gradient of x, and with OUTPUT y, whose memory may be that of dy."""
    i_image, i_chunk, i_block = tile_number(backwards(), n_positions, n_channels, n_first, ROWS, COLS)
    cols, col_mask, in_skip, x_cols, x_width = columns(i_block, n_channels, n_first, COLS)
    x_start, x_offs, row_mask = offsets(i_image, i_chunk, n_positions, x_width, x_cols, ROWS)
    start, offs, _ = offsets(i_image, i_chunk, n_positions, n_channels, cols, ROWS)
    if SKIP:
        x_ptr = tl.where(in_skip, skip_ptr, x_ptr)
        dx_ptr = tl.where(in_skip, dskip_ptr, dx_ptr)
    mask = row_mask & col_mask
    mean, rstd, weight, bias = channels(i_image, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n_channels, cols, col_mask, WIDTH)
    groups = i_image * (n_channels // WIDTH) + cols // WIDTH
    u_mean = tl.load(u_mean_ptr + groups, col_mask, other=0.0)
    u_xhat_mean = tl.load(u_xhat_mean_ptr + groups, col_mask, other=0.0)
    dy = tl.load(dy_ptr + start + offs, mask, other=0.0).to(tl.float32)
    x = load_shifted(x_ptr + x_start + x_offs, shift_ptr, mask, i_image, n_channels, cols, col_mask, SHIFT)
    xhat = (x - mean) * rstd
    u = _gradient_of_z(dy, xhat, weight, bias, SILU) * weight
    dx = rstd * (u - u_mean - xhat * u_xhat_mean)
    if THROUGH:
        dx += tl.load(through_ptr + x_start + x_offs, mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + x_start + x_offs, rounded(dx, dx_ptr.dtype.element_ty), mask)
    if OUTPUT:
        tl.debug_barrier()  # every thread has read dy
        tl.store(y_ptr + start + offs, rounded(_output(xhat, weight, bias, SILU), y_ptr.dtype.element_ty), mask)


def empty_joined(x: Tensor, skip: Tensor | None) -> Tensor:
    """Return an empty image, channels last, with the channels of x and of the skip."""
    B, C, H, W = x.shape
    width = C if skip is None else C + skip.shape[1]
    return torch.empty(B, width, H, W, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _image(x: Tensor, skip: Tensor | None, shift: Shift) -> tuple[tuple[Tensor, Tensor | None, Shift], Sizes, int]:
    """Return x, skip and shift as kernels read them, the sizes (positions, channels, channels of x), and the chunks."""
    n_channels = x.shape[1] if skip is None else x.shape[1] + skip.shape[1]
    operands = channels_last(x), None if skip is None else channels_last(skip), None if shift is None else shift.contiguous()
    return operands, (positions_of(x), n_channels, x.shape[1]), chunks_and_tile(positions_of(x))[0]


def group_norm_apply(
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    shift: Shift,
) -> Tensor:
    """Return y, channels last, from [x, skip] and its statistics: the last step of a forward, and all of a recomputation."""
    (x, skip, shift), sizes, chunks = _image(x, skip, shift)
    y = empty_joined(x, skip)
    flags = _flags(sizes, groups, silu, skip, shift)
    if x.numel():
        programs = grid(len(x), chunks, *_widths(sizes))
        launch(_apply, programs, x, skip, mean, rstd, weight.contiguous(), bias.contiguous(), shift, y, *sizes, **flags)
    return y


def _widths(sizes: Sizes) -> tuple[int, int]:
    return sizes[2], sizes[1] - sizes[2]


def _flags(sizes: Sizes, groups: int, silu: bool, skip: Tensor | None, shift: Shift) -> dict[str, Any]:
    flags = {"SILU": silu, "SHIFT": shift is not None, "SKIP": skip is not None, "WIDTH": sizes[1] // groups}
    return flags | chunks_and_tile(sizes[0])[1]


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    skip: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    silu: bool,
    shift: Shift,
    through: Tensor | None,
    y: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    add: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dskip, dweight, dbias, dshift), dx and dskip channels last. dskip and dshift are empty if there are none.

    Args:
        dy: (B, C, H, W) in any layout.
        through: added to dx; only without a skip.
        y: channels last. The norm's output is written to it. It may be dy itself.
        dweight, dbias: written, or added to if `add`. Empty tensors are returned in their place.
    """
    dy, ((x, skip, shift), sizes, chunks) = channels_last(dy), _image(x, skip, shift)
    images, n_channels, with_shift = len(x), sizes[1], shift is not None
    partial = x.new_empty(images, chunks, 3 if with_shift else 2, n_channels, dtype=torch.float32)
    total = x.new_empty(images, 2 * n_channels, dtype=torch.float32)
    means = torch.empty_like(mean), torch.empty_like(mean)
    gradients = empty_joined(x, None), None if skip is None else empty_joined(skip, None)
    dshift = x.new_empty(0) if shift is None else torch.empty_like(shift)
    assert through is None or skip is None
    through = None if through is None else channels_last(through)
    operands = dy, x, skip, mean, rstd, weight.contiguous(), bias.contiguous(), shift
    flags, programs = _flags(sizes, groups, silu, skip, shift), grid(images, chunks, *_widths(sizes))
    if x.numel():
        launch(_sums, programs, *operands, partial, *sizes, **flags)
        merged = partial, rstd, operands[5], *means, total, dshift
        launch(
            _merge_sums, (groups * images,), *merged, *sizes[:2], chunks, SHIFT=with_shift, **merging_tile(n_channels, groups)
        )
        outputs = *means, through, *gradients, y
        # Five operands of half a tile leave registers for a second program.
        flags |= {"THROUGH": through is not None, "OUTPUT": y is not None, "ROWS": flags["ROWS"] // 2}
        programs = grid(images, triton.cdiv(sizes[0], flags["ROWS"]), *_widths(sizes))
        launch(_input_gradient, programs, *operands, *outputs, *sizes, **flags)
    dx, dskip = gradients
    memory = None if dweight is None or dbias is None else ([dweight, dbias], add)
    sums = column_sums(total, 2, weight.dtype, memory)
    new_dweight, new_dbias = sums if memory is None else (x.new_empty(0), x.new_empty(0))
    return dx, x.new_empty(0) if dskip is None else dskip, new_dweight, new_dbias, dshift


group_norm_apply_op = custom_op("group_norm_apply")(group_norm_apply)
group_norm_backward_op = custom_op("group_norm_backward", mutates_args=("y", "dweight", "dbias"))(group_norm_backward)
group_norm_apply_op.register_fake(lambda x, skip, *_: empty_joined(x, skip))


@custom_op("group_norm")
def group_norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    shift: Shift,
    skip: Tensor | None,
    partial: Tensor | None,
    skip_partial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = group_norm_statistics(x, skip, partial, skip_partial, shift, groups, eps)
    return group_norm_apply(x, skip, mean, rstd, weight, bias, groups, silu, shift), mean, rstd


group_norm_op.register_fake(
    lambda x, weight, bias, groups, eps, silu, shift, skip, *_: (
        empty_joined(x, skip),
        *(x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2)),
    )
)
group_norm_backward_op.register_fake(
    lambda dy, x, skip, mean, rstd, weight, bias, groups, silu, shift, through, y, dweight, *_: (
        empty_joined(x, None),
        x.new_empty(0) if skip is None else empty_joined(skip, None),
        *(weight.new_empty(len(weight) if dweight is None else 0) for _ in range(2)),
        x.new_empty(0) if shift is None else shift.new_empty(shift.shape),
    )
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.groups, _, ctx.silu, shift, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, shift)
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx: Any, dy: Tensor, *statistics: None) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, shift = ctx.saved_tensors
    norm = mean, rstd, weight, bias, ctx.groups, ctx.silu, shift
    dx, _, dweight, dbias, dshift = group_norm_backward_op(dy, x, None, *norm, *(None,) * 4, False)
    return dx, dweight, dbias, None, None, None, None if shift is None else dshift, None, None, None


group_norm_op.register_autograd(_differentiate, setup_context=_save)


def group_norm_triton(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool = False, shift_BC: Tensor | None = None
) -> Tensor:
    """`group_norm_reference` with three launches forward and five backward. Differentiable once.

    Raises:
        ValueError: as the reference, a dtype without a kernel, or tensors on a device that runs no kernels.
    """
    _check(x_BCHW, weight, bias, groups, shift_BC)
    require_device("group_norm", x_BCHW, weight, bias, shift_BC)
    if x_BCHW.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"group_norm: x is {x_BCHW.dtype}; use float32 or bfloat16")
    # An image in another layout is converted here, once: the backward saves and reads the copy.
    return group_norm_op(channels_last(x_BCHW), weight, bias, groups, eps, silu, shift_BC, None, None, None)[0]


def _calls() -> Calls:
    for kind in (*workload.GROUP_NORM, *workload.VAE_ENCODER_GROUP_NORM):
        for mode, dtype in DTYPES.items():
            _record(kind, dtype)
            yield f"{kind.channels}c {kind.side}px{' shifted' * kind.shift}{' of two' * (kind.skip > 0)}", mode


def _record(kind: workload.GroupNorm, dtype: torch.dtype) -> None:
    trained = kind in workload.GROUP_NORM
    x, skip = (
        meta(workload.BATCH, width, kind.side, kind.side, dtype=dtype).to(memory_format=torch.channels_last) if width else None
        for width in (kind.channels - kind.skip, kind.skip)
    )
    assert x is not None
    shifts = dtype if trained else torch.float32  # the encoder's are sums of biases, stored in fp32
    w, shift = meta(kind.channels, dtype=dtype), meta(len(x), kind.channels, dtype=shifts) if kind.shift else None
    mean, rstd = group_norm_statistics(x, skip, None, None, shift, kind.groups, kind.eps)
    y = group_norm_apply(x, skip, mean, rstd, w, w, kind.groups, kind.silu, shift)
    through = None if kind.shift or kind.skip or kind in workload.GROUP_NORM_WITHOUT_RESIDUAL else x
    if trained:
        norm = mean, rstd, w, w, kind.groups, kind.silu, shift
        group_norm_backward(y, x, skip, *norm, through, y, None, None, False)
        group_norm_backward(y, x, skip, *norm, through, y, meta(kind.channels), meta(kind.channels), True)
    if not kind.silu and trained:  # the sums before and after a transformer, and the first input of a level
        for bias, residual in ((w, x), (None, x), (w, None)):
            add_statistics(x, bias, residual)


OP: Op[GroupNorm] = Op(
    name="group_norm",
    reference=group_norm_reference,
    triton=group_norm_triton,
    calls=_calls,
    bytes=lambda kind, size: 8 * kind.channels * kind.side**2 * size,  # forward 3 images, backward 5
)
