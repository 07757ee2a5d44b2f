"""Machine code of a recorded launch: registers, spills, shared memory and the instruction mix, with no GPU present.

Triton ships NVIDIA's assembler and disassembler, so `compile_launch` gives the machine code that a user's GPU would run, and
`read` counts what matters in it. The atlas consists of these counts.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastsd_kernels.launch import Launch

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# An instruction's address, guard, name and operands, and on the next line the high half of its code.
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);[^\n]*\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
_WIDTH = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


class Instruction(NamedTuple):
    """One instruction with the assembler's control bits, by which it is issued."""

    address: int
    name: str  # with its modifiers
    operands: str
    guard: str  # the predicate, or ""
    stall: int  # cycles until the warp may issue its next instruction
    sets: int  # the scoreboard that is set until the result is there; 7: none
    frees: int  # the scoreboard that is set until the operands are read; 7: none
    waits: int  # mask of the scoreboards that must be clear before
    target: int | None  # the address that a branch leads to

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


class Code(NamedTuple):
    """The machine code of one kernel. Counts are of instructions as written, not as run."""

    registers: int  # a thread
    stack: int  # bytes of local memory a thread: spills, and arrays not held in registers
    shared: int  # bytes a block
    loads: dict[str, int]  # global loads by width in bits; "async": straight into shared memory
    tensor: int  # tensor-core instructions
    wgmma: int  # of them, those of four warps together (HGMMA on sm_90)
    fma: int  # fp32 fused multiply-adds, packed ones counted twice
    loop: int  # instructions of the longest loop
    loop_fma: int  # fused multiply-adds among them
    rounded: int  # conversions to TF32, in PTX


class Compiled(NamedTuple):
    """A compiled launch: counts of its machine code, the code, and Triton's intermediate representation."""

    code: Code
    instructions: list[Instruction]
    ttir: str
    warps: int  # of a block


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


def compile_launch(compilation: Compilation) -> Compiled:
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
    instructions = decode(sass)
    code = read(usage, instructions, compiled.metadata.shared, compiled.asm["ptx"].count("cvt.rna.tf32"))
    return Compiled(code, instructions, compiled.asm["ttir"], compiled.metadata.num_warps)


def decode(sass: str) -> list[Instruction]:
    """Decode the listing of one kernel. The control bits are bits 105 to 121 of an instruction's 128.

    Source: Jia et al. 2018, "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", section 2.
    """
    instructions = []
    for match in _INSTRUCTION.finditer(sass):
        address, guard, name, operands, word = match.groups()
        bits = int(word, 16) >> 41
        jumps = name.split(".")[0] in ("BRA", "CALL") and re.search(r"0x([0-9a-f]+)", operands)
        target = int(jumps[1], 16) if jumps else None
        control = bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63
        instructions.append(Instruction(int(address, 16), name, operands, (guard or "").strip(), *control, target))
    return instructions


def read(usage: str, instructions: list[Instruction], shared: int, rounded: int) -> Code:
    """Read the counts from cuobjdump's listings. `shared` is the launch's request; the listing has only its static part."""
    registers, stack, static = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED"))  # type: ignore[index]
    loops = [(x.target, x.address) for x in instructions if x.opcode == "BRA" and x.target is not None and x.target < x.address]
    longest = max(([x.name for x in instructions if first <= x.address <= last] for first, last in loops), key=len, default=[])
    names = [x.name for x in instructions]
    tensor, wgmma = sum(map(_is_tensor, names)), sum(name.startswith("HGMMA") for name in names)
    shared = max(shared, static)
    return Code(registers, stack, shared, _loads(names), tensor, wgmma, _fma(names), len(longest), _fma(longest), rounded)


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
