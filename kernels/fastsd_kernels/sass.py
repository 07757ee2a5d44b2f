"""Machine code of a recorded launch: registers, spills, shared memory and the instruction mix, with no GPU present.

Triton ships NVIDIA's assembler and disassembler, so `compile_launch` gives the machine code that a user's GPU would run, and
`read` counts what matters in it. The atlas consists of these counts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastsd_kernels.launch import Launch

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_WIDTH = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Code(NamedTuple):
    """The machine code of one kernel. Counts are of instructions as written, not as run."""

    registers: int  # a thread
    stack: int  # bytes of local memory a thread: spills, and arrays not held in registers
    spills_in_loop: int  # local loads and stores inside loops
    shared: int  # bytes a block
    loads: dict[str, int]  # global loads by width in bits; "async": straight into shared memory
    tensor: int  # tensor-core instructions
    fma: int  # fp32 fused multiply-adds, packed ones counted twice
    loop: int  # instructions of the longest loop
    loop_fma: int  # fused multiply-adds among them


class Compilation(NamedTuple):
    """A launch with Triton's specialisation of it. Equal keys compile to equal code."""

    launch: Launch
    target: int
    key: str
    source: ASTSource
    options: dict[str, Any]


def specialise(launch: Launch, target: int) -> Compilation:
    """Apply Triton's own specialisation (dtypes, divisibility by 16, constants) to a recorded launch for sm_`target`."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", target, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.options, "debug": False, "instrumentation_mode": ""}
    bound, specialisation, _ = binder(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialisation, None)
    key = f"{kernel.__name__} {target} {signature} {constants} {attributes} {options.hash()}"
    return Compilation(launch, target, key, ASTSource(kernel, signature, constants, attributes), options.__dict__)


def compile_launch(compilation: Compilation) -> Code:
    """Compile down to machine code and read it. Triton's exceptions pass through."""
    target = GPUTarget("cuda", compilation.target, 32)
    compiled = triton.compile(compilation.source, target=target, options=compilation.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([_CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return read(usage, sass, compiled.metadata.shared)


def read(usage: str, sass: str, shared: int) -> Code:
    """Read the counts from cuobjdump's two listings. `shared` is the launch's request; the listing has only its static part."""
    instructions = [(int(m[1], 16), m[2], m[3]) for m in _INSTRUCTION.finditer(sass)]
    registers, stack, static = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED"))  # type: ignore[index]
    loops = list(_loops(instructions))
    inside = {address for first, last in loops for address, _, _ in instructions if first <= address <= last}
    local = sum(op.split(".")[0] in ("LDL", "STL") for address, op, _ in instructions if address in inside)
    longest = max(([op for a, op, _ in instructions if first <= a <= last] for first, last in loops), key=len, default=[])
    names = [op for _, op, _ in instructions]
    tensor = sum(map(_is_tensor, names))
    shared = max(shared, static)
    return Code(registers, stack, local, shared, _loads(names), tensor, _fma(names), len(longest), _fma(longest))


def _loops(instructions: list[tuple[int, str, str]]) -> Iterator[tuple[int, int]]:
    """Yield (first, last) address of every backward branch's body, except the endless self-branch that pads a kernel."""
    for address, op, operands in instructions:
        if op.split(".")[0] == "BRA" and (match := re.search(r"0x([0-9a-f]+)", operands)):
            target = int(match[1], 16)
            if target < address:
                yield target, address


def _loads(names: list[str]) -> dict[str, int]:
    widths: Counter[str] = Counter()
    for name in names:
        kind, *flags = name.split(".")
        if kind == "LDG":
            widths[str(next((_WIDTH[flag] for flag in flags if flag in _WIDTH), 32))] += 1
        elif kind in ("LDGSTS", "UTMALDG", "UBLKCP"):
            widths["async"] += 1
    return dict(sorted(widths.items()))


def _is_tensor(name: str) -> bool:
    return re.match(r"(HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA)", name) is not None


def _fma(names: list[str]) -> int:
    return sum({"FFMA": 1, "FFMA2": 2}.get(name.split(".")[0], 0) for name in names)
