"""`optimizers.c`, compiled at first use and called through ctypes: Lion, D-Lion, AdamW and the gradient norm on a CPU.

The functions that call it are in the operations' files.  Layouts and errors are those of the Triton kernels.  Elementwise
results have the reference's bits, with AdamW's two exceptions (`adamw.py`).  A step is one call for a whole list of tensors,
on as many threads as PyTorch uses (`torch.set_num_threads`); their number changes no bit.

The library is stored in $XDG_CACHE_HOME/fastsd, or ~/.cache/fastsd.  Its name has two digests: one of source, flags, compiler
and instruction set, so another CPU has another file, and one of its own bytes, so a damaged file is detected and rebuilt.
It is written under a temporary name and renamed, so processes may start at the same time.  PyTorch's own loader of extensions
would need ninja, a C++ compiler and headers that nothing here uses.

A machine without a compiler is not an error: `problem` returns the reason, and REFERENCE is used instead.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from fastsd_kernels.arena import EMA_DECAY, averages_layout, dense, ema_gains, layout_error, memory_order, require_dtypes
from fastsd_kernels.ops import StepOptions

_SOURCE = Path(__file__).with_name("optimizers.c")
# The last two flags change no result. They let the compiler vectorise roots and turn comparisons into selects.
_FLAGS = ["-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# The first set that works is used. A compiler without OpenMP (Apple's) makes single-threaded kernels.
_MACHINES = [["-march=native", "-fopenmp"], ["-march=native"], ["-mcpu=native"]]

_SPAN, _WORDS = 16384, 12  # elements of a span and words of a `Row`, as in optimizers.c
_POINTER = ctypes.c_void_p
_Operands = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # p, g, m, s, master_lo, ema


class _Options(ctypes.Structure):
    """The struct `Options` of optimizers.c."""

    _fields_ = [
        ("scale", _POINTER),
        ("ema_gains", _POINTER),
        ("found_inf", _POINTER),
        ("overflow", _POINTER),
        ("threads", ctypes.c_int32),
    ]


def problem() -> str | None:
    """Return None if the kernels are usable, otherwise a short reason. Compiles them on first use; the result is cached."""
    return _library_or_reason()[1]


@cache
def _library_or_reason() -> tuple[ctypes.CDLL | None, str | None]:
    """Return (library, None) or (None, reason)."""
    try:
        configured = shlex.split(os.environ.get("CC", ""))
        compiler = next((c for c in (configured, ["cc"], ["gcc"], ["clang"]) if c and shutil.which(c[0])), None)
    except ValueError as error:  # an unclosed quotation
        return None, f"$CC is not a valid command: {error}"
    if compiler is None:
        return None, "no C compiler found: tried $CC, cc, gcc and clang"
    reason = ""
    for machine in _MACHINES:
        try:
            return _load([*compiler, *_FLAGS, *machine]), None
        except (OSError, RuntimeError) as error:
            reason = f"{_SOURCE.name} cannot be compiled or loaded: {error}"
    return None, reason


def _load(command: list[str]) -> ctypes.CDLL:
    """Load the library that this command builds, from the cache if it is there."""
    # The macros name the compiler's version and every extension of the instruction set that `native` means.
    macros = _output([*command, "-dM", "-E", "-x", "c", os.devnull])
    key = _digest(_SOURCE.read_bytes() + repr(command).encode() + macros)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsd"
    for path in folder.glob(f"optimizers-{key}-*.so"):
        if path.stem.endswith(_digest(path.read_bytes())):
            return _open_library(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built_path = Path(scratch) / "optimizers.so"
        _output([*command, "-shared", str(_SOURCE), "-o", str(built_path), "-lm"])
        library = _open_library(built_path)  # raises before a library that cannot be loaded is stored
        built_path.replace(folder / f"optimizers-{key}-{_digest(built_path.read_bytes())}.so")
    return library


def _output(command: list[str]) -> bytes:
    """Return the output of a compiler. Raises RuntimeError with the first line that mentions an error."""
    process = subprocess.run(command, capture_output=True)
    if process.returncode:
        lines = process.stderr.decode(errors="replace").splitlines() or [
            f"{command[0]} failed with status {process.returncode}"
        ]
        raise RuntimeError(next((line for line in lines if "error" in line), lines[0]).strip())
    return process.stdout


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:32]


def _open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for op in ("lion", "dlion", "adamw", "gradient_norm"):
        function = getattr(library, f"fastsd_{op}")
        function.argtypes = [_POINTER, ctypes.c_int64, ctypes.POINTER(_Options), _POINTER, _POINTER, _POINTER]
        function.restype = None
    return library


def library(op: str) -> ctypes.CDLL:
    library, reason = _library_or_reason()
    if library is None:
        raise ValueError(f"{op}: the CPU kernels are not available ({reason}); use REFERENCE")
    return library


def require_cpu(op: str, *tensors: object) -> None:
    """Raise ValueError unless all tensors among the arguments are on the CPU."""
    other_devices = {str(t.device) for t in tensors if isinstance(t, Tensor) and not t.is_cpu}
    if other_devices:
        raise ValueError(
            f"{op}: tensors are on {', '.join(sorted(other_devices))}; the CPU kernels need all tensors on the CPU"
        )


def operands(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *states: Sequence[Tensor],
    scalars: Sequence[float | Tensor],
    **options: Unpack[StepOptions],
) -> list[_Operands]:
    """Group the tensors of each parameter, and check them as `arena.operands` does, here for tensors on a CPU."""
    require_cpu(op, *scalars, *(options.get(key) for key in ("found_inf", "overflow", "scale", "ema_decay")))
    masters_lo, emas, absent = options.get("masters_lo"), options.get("emas"), (None,) * len(params)
    two_states = states if len(states) == 2 else (states[0], absent)
    rows = list(zip(params, grads, *two_states, masters_lo or absent, emas or absent, strict=True))
    for p, g, m, s, master_lo, ema in rows:
        shape, stride = p.shape, p.stride()
        fp32_states = m, s, *(() if ema is None else ema)
        for t in (p, g, master_lo, *fp32_states):
            if t is None:
                continue
            if not t.is_cpu:
                require_cpu(op, t)
            if t.shape == shape and t.stride() == stride and (t is not p or p.is_contiguous()):
                continue
            if not dense(t) or memory_order(t) != memory_order(p):
                raise layout_error(op, t, p)
        require_dtypes(op, p, g, master_lo, *fp32_states)
    return rows


def call(
    op: str,
    operands: Sequence[tuple[Tensor | None, ...]],
    factors: Tensor | None,
    constants: Sequence[float],
    **options: Unpack[StepOptions],
) -> Tensor:
    """Call C once for all P tensors, in place. factors: fp32 (F,) or (P, F). Returns fp64 sums (2, P without empty tensors)."""
    words: list[int] = []
    address, step = (0, 0) if factors is None else (factors.data_ptr(), factors.stride(0) * 4 if factors.ndim == 2 else 0)
    spans = 0
    for i, (p, g, *extras) in enumerate(operands):
        assert g is not None
        n = g.numel()
        if n:
            words += (0 if t is None else t.data_ptr() for t in (p, g, *extras))
            words += (*averages_layout(extras[-1]), address + i * step)
            words += (g.dtype == torch.bfloat16, n, spans)
            spans += -(-n // _SPAN)
    count = len(words) // _WORDS
    sums_2P = torch.empty(2, count, dtype=torch.float64)
    if not count:
        return sums_2P

    # C gets addresses, so these must live until the call is over.
    scale, found_inf, overflow = options.get("scale"), options.get("found_inf"), options.get("overflow")
    scale = None if scale is None else scale.float()
    emas = options.get("emas")
    gains = ema_gains(emas, options.get("ema_decay", EMA_DECAY)) if emas else None
    found_inf = None if found_inf is None else found_inf != 0
    scratch_2K = torch.empty(2, spans, dtype=torch.float64)
    addresses = (0 if t is None else t.data_ptr() for t in (scale, gains, found_inf, overflow))
    c_options = _Options(*addresses, torch.get_num_threads())
    rows, floats = (ctypes.c_uint64 * len(words))(*words), (ctypes.c_float * len(constants))(*constants)

    function = getattr(library(op), f"fastsd_{op}")
    function(rows, count, ctypes.byref(c_options), floats, scratch_2K.data_ptr(), sums_2P.data_ptr())
    # PyTorch has not seen the writes; a backward over a graph that holds these tensors must detect them.
    written = (t for p, _, *extras in operands for t in (p, *extras))
    torch.autograd.graph.increment_version([t for t in written if t is not None])
    return sums_2P
