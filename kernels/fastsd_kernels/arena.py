"""Code that Lion, D-Lion and AdamW share: exact masters in two halves, the tile of elements, and lists of tensors.

An arena is one flat tensor that holds all parameters of a component; arenas of the same size hold gradients and state.  A
list of one arena is one launch.  Any dense tensors will do: a kernel walks memory and ignores shapes.

Masters in halves.  A bf16 parameter with a 16-bit remainder is an fp32 number, exactly:

    master_hi = (bits + 0x8000) >> 16           the nearest bf16, used by the forward directly
    master_lo = bits - (master_hi << 16)        int16, signed
    bits = (master_hi << 16) + master_lo

This holds for every finite number, also subnormal or -0.0, and for infinity.  The sum undoes a carry of the rounding into the
exponent, so even fp32 numbers above bf16's largest (3.39e38) come back, although their high half is infinity.  An exact tie,
one number in 2^17, rounds away from zero, where `bfloat16()` takes the even neighbour: 65537 fp32 numbers round to an even
bf16 and 16 bits distinguish 65536, so no encoding can do both.  All other numbers equal `bfloat16()`.  A NaN stays a NaN,
without its payload: rounded like a number, 0x7fffffff would carry into -0.0 and hide.

Options of all three (`StepOptions`), applied in the pass that has the element in registers:

    g = g * scale                                       ema_k = ema_k + (1 - ema_decay_k)(p - ema_k)        k = 1 .. K

No number becomes infinite or NaN.  Finite gradients can still give such an update: an absurd lr, a square that overflows.  An
element whose new weight or state would not be `finite` keeps its weight and state, an EMA that would not be keeps its value,
and the flag `overflow` is set for weights and state.  This costs no pass and no bytes: old and new values are in registers
together.  The bound is bf16's largest number, because the forward uses the high half of a master, which rounds to infinity
above it.  Lost: one store of the flag by a program or a thread, after a reduction, and old values read again where they are
needed; the assembler then keeps so much in registers that AdamW spills.

Roundings.  PyTorch rounds a + alpha b once, on a CPU and a GPU alike; so do `fma` here and everything the references
do.  Kernels start with enable_fp_fusion=False: the compiler may then fuse no other product into a sum, and elementwise
results have the reference's bits.  It costs nothing, because kernels wait for memory.  Scalars (lr, d, bias corrections) are
computed in a few 0-dim operations of PyTorch in fp64, on the device: in the kernel every program would wait for them on a
GeForce, where fp64 runs at 1/64 of the rate of fp32.

Read next: `lion.py`, the shortest of the three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Unpack

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import workload
from fastsd_kernels.launch import DTYPES, INTERPRETED, meta, require_device
from fastsd_kernels.ops import Calls, StepOptions

# Elements of one chunk. Four arrays and their scratch fit a shared CPU cache (2**16 and below starves the threads);
# on a GPU a chunk bounds the scratch only, and launches should be few.
_CHUNK_CPU = 1 << 18
_CHUNK_GPU = 1 << 26

EMA_DECAY = 0.9999
LARGEST = torch.finfo(torch.bfloat16).max  # the bound of `finite`, and of optimizers.c


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split fp32 numbers into master_hi (bf16) and master_lo (int16) of the same shape and strides. Inverts `join_master`."""
    bits = master.view(torch.int32)
    # The sum wraps for a NaN only; the conversion to int16 keeps the lower half.
    master_hi = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    nan = master.isnan()
    return torch.where(nan, torch.nan, master_hi), torch.where(nan, 0, bits.to(torch.int16))


def join_master(master_hi: Tensor, master_lo: Tensor) -> Tensor:
    """Return the exact fp32 numbers that master_hi (bf16) and master_lo (int16) represent."""
    return ((master_hi.view(torch.int16).int() << 16) + master_lo.int()).view(torch.float32)


@contextmanager
def masters(
    params: Sequence[Tensor], grads: Sequence[Tensor], **options: Unpack[StepOptions]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Yield fp32 parameters and scaled fp32 gradients for a reference to step, and apply the step's options around it."""
    masters_lo, emas = options.get("masters_lo"), options.get("emas")
    scale, found_inf = options.get("scale"), options.get("found_inf")
    fp32_params = params if masters_lo is None else [join_master(*halves) for halves in zip(params, masters_lo, strict=True)]
    fp32_grads = [g.float() for g in grads]
    yield fp32_params, fp32_grads if scale is None else [g * scale for g in fp32_grads]
    if masters_lo is not None:
        with unless_found_inf(found_inf, params, masters_lo):
            for *halves, master in zip(params, masters_lo, fp32_params, strict=True):
                for half, new in zip(halves, split_master(master), strict=True):
                    half.copy_(new)
    for k, gain in enumerate(ema_gains(emas, options.get("ema_decay", EMA_DECAY)).unbind() if emas else ()):
        averages = [ema[k] for ema in emas or ()]
        with finite_or_unchanged(averages, found_inf=found_inf):
            change = torch._foreach_sub(list(fp32_params), averages)
            torch._foreach_mul_(change, gain)
            torch._foreach_add_(averages, change)


def chunks(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Cut parallel lists of tensors into chunks, each a list per input list.

    A chunk holds about 2**18 elements a list on a CPU, 2**26 elsewhere: several small tensors or a section of a big one, as
    1-D views in memory order. The cut depends on shapes only, so sums taken chunk by chunk have a fixed order. Tensors of one
    row that differ in strides, or have gaps, are not cut and keep their shape. A one-element tensor (a factor of its
    parameter) is repeated for every section of a big neighbour.
    """
    if not lists[0]:
        return
    limit = _CHUNK_CPU if lists[0][0].is_cpu else _CHUNK_GPU
    chunk: list[tuple[Tensor, ...]] = []
    chunk_size = 0
    for row in zip(*lists, strict=True):
        for section in _sections(row, row[0].numel(), limit):
            if chunk and chunk_size + section[0].numel() > limit:
                yield [list(column) for column in zip(*chunk, strict=True)]
                chunk, chunk_size = [], 0
            chunk.append(section)
            chunk_size += section[0].numel()
    yield [list(column) for column in zip(*chunk, strict=True)]


def _sections(row: tuple[Tensor, ...], size: int, limit: int) -> Iterator[tuple[Tensor, ...]]:
    full = [t for t in row if t.numel() == size]
    shape, stride = full[0].shape, full[0].stride()
    span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if span != size or any(t.stride() != stride or t.shape != shape for t in full):
        return iter([row])
    flat = [t.as_strided((size,), (1,)) if t.numel() == size else t for t in row]
    if size <= limit:
        return iter([tuple(flat)])
    count = -(-size // limit)
    return zip(*(torch.split(t, limit) if t.numel() == size else (t,) * count for t in flat), strict=True)


@contextmanager
def unless_found_inf(found_inf: Tensor | None, *lists: Sequence[Tensor]) -> Iterator[None]:
    """Restore the bytes of `lists` after the block if the device flag `found_inf` is nonzero, without reading it on the host.

    Copies and selects rather than multiplying by zero, which would keep a NaN and turn -0.0 into 0.0.
    """
    if found_inf is None:
        yield
        return
    tensors = [t for column in lists for t in column]
    copies = [t.clone() for t in tensors]
    yield
    undo = found_inf != 0
    for old, new in zip(copies, tensors, strict=True):
        torch.where(undo, old, new, out=new)


@contextmanager
def finite_or_unchanged(*lists: Sequence[Tensor], **options: Unpack[StepOptions]) -> Iterator[None]:
    """Undo the block for elements that it has made infinite or NaN, in all of the parallel `lists`, and set `overflow`.

    As in `unless_found_inf`, nothing changes if `found_inf` is nonzero.
    """
    found_inf, overflow = options.get("found_inf"), options.get("overflow")
    copies = [[t.clone() for t in column] for column in lists]
    yield
    for old_row, new_row in zip(zip(*copies, strict=True), zip(*lists, strict=True), strict=True):
        finite = torch.stack([new.abs() <= LARGEST for new in new_row]).all(dim=0)
        keep = finite if found_inf is None else finite & (found_inf == 0)
        for old, new in zip(old_row, new_row, strict=True):
            torch.where(keep, new, old, out=new)
        if overflow is not None:
            overflow |= ~finite.all() if found_inf is None else ~finite.all() & (found_inf == 0)


_INTERPRETED = tl.constexpr(INTERPRETED)
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def fma(a, b, c):
    """Return a b + c in fp32, rounded once."""
    if _INTERPRETED:
        # The interpreter's tl.fma rounds twice. fp64 holds the product; its sum rounds again about once in 2^29.
        b = tl.where(c == c, b, b)  # a kernel's float argument is a Python float there
        product = a.to(tl.float64) * b.to(tl.float64)
        return (product + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def sign(x):
    return (x > 0).to(tl.float32) - (x < 0).to(tl.float32)


@triton.jit
def pair_sum(x):
    """Sum a block of up to 2^16 elements: add neighbours, then pairs of neighbours, and so on.

    The order does not depend on the threads. tl.sum first adds a thread's elements, and these depend on the width of other
    operands.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x)


@triton.jit
def finite(x):
    return tl.abs(x) <= _LARGEST  # false for NaN


@triton.jit
def should_step(found_inf_ptr):
    """Return False if the step's gradients are not finite."""
    if found_inf_ptr is None:
        return True
    else:
        return tl.load(found_inf_ptr) == 0


@triton.jit
def load(ptr, start, offs, mask):
    """Load a tile: `start` elements (int64) and then `offs` from ptr. Zeros where mask is False.

    The mask is None in all tiles but an arena's last: bounds that are not a multiple of 16 would break up wide accesses.
    """
    if mask is None:
        return tl.load(ptr + start + offs)
    else:
        return tl.load(ptr + start + offs, mask, other=0.0)


@triton.jit
def load_gradient(g_ptr, scale_ptr, start, offs, mask):
    g = load(g_ptr, start, offs, mask).to(tl.float32)
    if scale_ptr is not None:
        g = g * tl.load(scale_ptr)
    return g


@triton.jit
def load_parameter(p_ptr, master_lo_ptr, start, offs, mask):
    p = load(p_ptr, start, offs, mask)
    if master_lo_ptr is not None:
        master_hi = p.to(tl.int16, bitcast=True).to(tl.int32) << 16
        p = (master_hi + load(master_lo_ptr, start, offs, mask).to(tl.int32)).to(tl.float32, bitcast=True)
    return p


@triton.jit
def store_parameter(p, is_finite, p_ptr, options, start, offs, mask, EMAS: tl.constexpr):
    """Store the parameters of a tile and update their EMAs. Set the flag `overflow` if `is_finite` is not true of all."""
    master_lo_ptr, ema_ptr, ema_gain_ptr, _, _, overflow_ptr, ema_stride = options
    if master_lo_ptr is None:
        tl.store(p_ptr + start + offs, p, mask)
    else:
        bits = p.to(tl.int32, bitcast=True)
        nan = p != p
        master_hi = tl.where(nan, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16)
        tl.store(p_ptr + start + offs, master_hi.to(tl.bfloat16, bitcast=True), mask)
        tl.store(master_lo_ptr + start + offs, tl.where(nan, 0, bits).to(tl.int16), mask)
    for k in tl.static_range(EMAS):
        ema = load(ema_ptr, start, offs, mask)
        new_ema = ema + tl.load(ema_gain_ptr + k) * (p - ema)
        tl.store(ema_ptr + start + offs, tl.where(finite(new_ema), new_ema, ema), mask)
        ema_ptr += ema_stride  # a pointer, because K arenas may pass 2^31 elements
    if overflow_ptr is not None:
        overflows = is_finite == 0
        if mask is not None:
            overflows = overflows & mask
        # All that write the flag write the same, so they need no atomics. In a healthy step none does.
        tl.store(overflow_ptr + offs * 0, True, overflows)


# Kernels do not specialise on the number of elements: only the last tile could gain, and a fused backward would compile twice.
class OptimizerTile(NamedTuple):
    """Sizes of a kernel: `block` elements at a time, `times` in a row, by `warps` warps with up to `registers` a thread."""

    block: int
    warps: int
    times: int
    registers: int

    @property
    def span(self) -> int:
        """Elements of one program."""
        return self.block * self.times

    def options(self, **more: int) -> dict[str, int]:
        """Return the options of a launch. Only `fma` fuses: see "Roundings" above."""
        return {"BLOCK": self.block, "num_warps": self.warps, "maxnreg": self.registers, "enable_fp_fusion": False} | more


# The tile of each kernel, and so the order of a sum, is the same for every architecture, dtype and size.  2048 elements for 8
# warps are 8 a thread: 128 bits of bf16 or int16, twice 128 of fp32.  Without a limit of registers the assembler spills some
# bytes to fit one more block on an SM, although two are more than enough: they keep 64 KB of loads in flight.
TILES = {
    # Nothing is carried from element to element: short programs, and the scheduler keeps many in flight.
    "lion": OptimizerTile(2048, 8, 1, 96),
    "adamw": OptimizerTile(2048, 8, 1, 128),
    # Two sums are carried: 8 tiles add up in registers, so 16384 elements need one reduction and 8 written bytes.
    "dlion": OptimizerTile(2048, 8, 8, 128),
    "gradient_norm": OptimizerTile(2048, 8, 8, 96),
    # One program reads 2 x 52k partial sums of SD1.5's UNet in 13 rounds.
    "tail": OptimizerTile(4096, 16, 1, 128),
}


class TensorOptions(NamedTuple):
    """Optional operands of one launch, in the order in which ops and kernels take them."""

    master_lo: Tensor | None
    ema: Tensor | None  # K averages along a leading dimension
    ema_gain: Tensor | None  # fp32 (K,), 1 - decay
    scale: Tensor | None
    found_inf: Tensor | None
    overflow: Tensor | None


def scalars(device: torch.device, *values: float | Tensor) -> Tensor:
    """Return numbers as one fp32 vector on the device, each rounded once. Nothing is copied from the host."""
    return torch.stack([v.float() if isinstance(v, Tensor) else torch.full((), v, device=device) for v in values])


def ema_gains(emas: Sequence[Tensor], decay: float | Tensor) -> Tensor:
    """Return 1 - decay of each of the K averages, fp32 (K,). Raises ValueError unless there are K decays."""
    gains = scalars(emas[0].device, 1 - decay).flatten()
    if any(len(ema) != len(gains) for ema in emas):
        raise ValueError(f"ema_decay has {len(gains)} numbers for {len(emas[0])} averages; give one each")
    return gains


def averages_layout(ema: Tensor | None) -> tuple[int, int]:
    """Return the elements from one average of a parameter to the next, 0 where there is no next, and the number of averages."""
    return (0, 0) if ema is None else (ema.stride(0) if len(ema) > 1 else 0, len(ema))


def operands(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *states: Sequence[Tensor],
    device_scalars: Sequence[float | Tensor] = (),
    **options: Unpack[StepOptions],
) -> list[tuple[tuple[Tensor, ...], TensorOptions]]:
    """Group each parameter with its gradient, states and options. All are checked before anything is launched.

    Raises:
        ValueError: a wrong dtype, tensors of one parameter that differ in shape or strides or have gaps, or are on several
            devices.
    """
    if not params:
        return []
    masters_lo, emas = options.get("masters_lo"), options.get("emas")
    flags = options.get("scale"), options.get("found_inf"), options.get("overflow")
    ema_decay = options.get("ema_decay", EMA_DECAY)
    scalar_tensors = [t for t in (*flags, ema_decay, *device_scalars) if isinstance(t, Tensor)]
    gains = ema_gains(emas, ema_decay) if emas else None
    absent = (None,) * len(params)
    result = []
    for p, g, *state, master_lo, ema in zip(params, grads, *states, masters_lo or absent, emas or absent, strict=True):
        fp32_states = [*state, *(() if ema is None else ema)]
        require_device(op, p, g, master_lo, *fp32_states, *scalar_tensors)
        require_dtypes(op, p, g, master_lo, *fp32_states)
        for t in (p, g, master_lo, *fp32_states):
            if t is not None and (not dense(t) or memory_order(t) != memory_order(p)):
                raise layout_error(op, t, p)
        result.append(((p, g, *state), TensorOptions(master_lo, ema, gains, *flags)))
    return result


def step_calls(step: Callable[[Tensor, Tensor, Tensor, TensorOptions], object]) -> Calls:
    """Yield the calls of an optimizer's record. `step` takes arenas p, g and state, and the options."""
    n = sum(size * count for size, count in workload.PARAMETERS.items())
    state, scalar, flag = meta(n), meta(), meta(dtype=torch.bool)
    for mode, gradients in (("fp32", "fp32"), ("bf16 halves", "bf16"), ("bf16 halves", "fp32")):
        p = meta(n, dtype=DTYPES["fp32" if mode == "fp32" else "bf16"])
        master_lo = None if mode == "fp32" else meta(n, dtype=torch.int16)
        for count, scale in ((0, None), (0, scalar), (1, None), (1, scalar), (2, None), (4, scalar)):
            ema, gains = (meta(count, n), meta(count)) if count else (None, None)
            options = TensorOptions(master_lo, ema, gains, scale, flag, flag)
            step(p, meta(n, dtype=DTYPES[gradients]), state, options)
            names = ("", "EMA", "2 EMAs", "", "4 EMAs")[count], "scale" if scale is not None else ""
            extras = [name for name in names if name]
            yield " and ".join([f"{gradients} gradients", *extras]), mode


def require_dtypes(op: str, p: Tensor, g: Tensor, master_lo: Tensor | None, *states: Tensor | None) -> None:
    """Raise ValueError unless a parameter's tensors have the dtypes of `StepOptions`."""
    require_dtype(op, "parameter", p, torch.float32 if master_lo is None else torch.bfloat16)
    require_dtype(op, "gradient", g, torch.float32, torch.bfloat16)
    for t in states:
        if t is not None:
            require_dtype(op, "state", t, torch.float32)
    if master_lo is not None:
        require_dtype(op, "master_lo", master_lo, torch.int16)


def require_dtype(op: str, role: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless the tensor has one of the dtypes."""
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {role} dtype is {str(tensor.dtype).removeprefix('torch.')}; use {expected}")


def layout_error(op: str, t: Tensor, p: Tensor) -> ValueError:
    return ValueError(
        f"{op}: tensor has shape {tuple(t.shape)} and strides {t.stride()}, its parameter {tuple(p.shape)} and {p.stride()}; "
        "use equal shapes and one dense layout"
    )


def dense(t: Tensor) -> bool:
    """Return True if a tensor's elements are a stretch of memory without gaps, in any order."""
    expected = 1
    for step, n in sorted(zip(t.stride(), t.shape, strict=True)):
        if n > 1 and step != expected:
            return t.numel() == 0
        expected *= n
    return True


def memory_order(t: Tensor) -> tuple[torch.Size, list[int]]:
    # The stride of a dimension of one element means nothing.
    return t.shape, [step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1]
