"""The atlas: the machine code of every shipped configuration of every kernel for every target, with no GPU present.

    python -m fastsd_kernels.atlas [--target sm_89 ...] [--op attention ...] [--json FILE]
    python -m fastsd_kernels.atlas --time [--help]       predicted times of a whole step's launches: `bench/kernel_times.py`

The calls of each op's record run on meta tensors of the workload's shapes inside `recording(target)`. Every distinct launch is
compiled as Triton would compile it there, and its machine code is read. So all figures are those of the shipped code, and
tile tables cannot disagree with them. Columns:

    regs      registers a thread
    stack     bytes of local memory a thread: spills, and arrays the compiler could not keep in registers
    local     per cent of the instructions that a warp executes that are local loads and stores
    shared    bytes of shared memory a block
    loads     global loads by width in bits; "async" is cp.async or TMA, straight into shared memory
    mma       tensor-core instructions of one warp
    wgmma     those of four warps together, on sm_90
    work      FLOPs that the tensor cores execute over those that the results need, at the worst shape
    fma       fp32 fused multiply-adds, and their share of the longest loop's instructions

A row over the limits (`_problems`) is marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastsd_kernels import RECORDS
from fastsd_kernels.attention_tiles import needed_flops
from fastsd_kernels.cards import MULTIPROCESSORS
from fastsd_kernels.launch import ARCHITECTURES, INTERPRETED, recording
from fastsd_kernels.prediction import Kernel, executed_flops
from fastsd_kernels.sass import Code, Compiled, compile_launch, specialise
from fastsd_kernels.ttir import evaluate

# FLOPs executed over needed. Tiles pad 40 columns to 48 and 77 keys to 80 or 96, which is up to 1.25. On sm_90, dk and dv of
# 77 keys need 128: wgmma computes 64 rows, and with mma and less padding they are predicted to take longer.
WORK_LIMIT = 1.3
# On sm_90, share of an attention kernel's FLOPs by mma. Only slices of 8 columns are: 8 of 40 in one product of two, or fewer.
MMA_LIMIT = 0.1
# Each local access takes an issue slot and four cycles of L1. Up to a fortieth of the instructions are in the noise of a
# prediction; above, a tile must be faster by more than they cost, which `--time` shows, and then the limit should say so.
LOCAL_LIMIT = 0.025
# Kernels that read only a few statistics or partial sums a program, or very little compared with what they compute.
_SMALL = ("_merge", "_merge_sums", "_estimate", "_norm", "_normal", "_add_noise")


class Entry(NamedTuple):
    """One compiled configuration."""

    op: str
    kind: str  # the first of the workload's kinds that needs it
    mode: str  # dtype, or precision of fp32
    kernel: str
    target: int
    options: dict[str, Any]  # constexpr arguments, warps, stages
    code: Code | None
    work: float  # matmul FLOPs executed over needed, at the worst of the workload's shapes; 0 without matmuls
    mma: float  # share of them by mma
    local: float  # share of the executed instructions that access local memory
    problems: list[str]


OPS = {op.name: op for op in RECORDS}


def survey(op: str, target: int, remainder: int = 0, divisor: int = 1) -> list[Entry]:
    """Compile those distinct configurations of one op for sm_`target` whose number is `remainder` modulo `divisor`."""
    entries: dict[str, Entry] = {}
    compiled: dict[str, Compiled] = {}
    with recording(target) as launches:
        for kind, mode in OPS[op].calls():
            for launch in launches:
                compilation = specialise(launch, target)
                key = compilation.key
                is_new = key not in entries
                if is_new:
                    entries[key] = Entry(op, kind, mode, launch.kernel.__name__, target, launch.options, None, 0, 0, 0, [])
                    if len(entries) % divisor == remainder:
                        compiled[key] = compile_launch(compilation)
                        entries[key] = entries[key]._replace(code=compiled[key].code)
                if key in compiled and (is_new or op == "attention"):
                    kernel = Kernel(compiled[key], evaluate(compiled[key].ttir, launch))
                    rows = 64 if compiled[key].code.wgmma else 1
                    needed = needed_flops(launch, rows) if op == "attention" and mode != "ieee" else 0
                    work = executed_flops(kernel, launch) / needed if needed else 0
                    work, local = max(work, entries[key].work), max(kernel.local_share, entries[key].local)
                    entries[key] = entries[key]._replace(work=work, mma=kernel.mma_share, local=local)
            launches.clear()
    return [entry._replace(problems=_problems(entry, entry.code)) for entry in entries.values() if entry.code is not None]


def _problems(entry: Entry, code: Code) -> list[str]:
    problems = []
    if entry.local > LOCAL_LIMIT:
        problems.append(f"{entry.local:.1%} of the executed instructions access local memory")
    if entry.work > WORK_LIMIT:
        problems.append(f"executes {entry.work:.2f} times the matmul work that it needs")
    if entry.target == 90 and entry.work and entry.mma > MMA_LIMIT:
        problems.append(f"executes {entry.mma:.0%} of its matmul work by mma, not wgmma")
    limit = MULTIPROCESSORS[entry.target].block_shared
    if code.shared > limit:
        problems.append(f"shared {code.shared} > {limit}")
    if entry.kernel not in _SMALL and not code.loads.keys() & {"128", "async"}:
        problems.append("narrow loads only")
    multiplies = entry.op == "attention" and "SUM_D" in entry.options  # another one only adds
    if multiplies and (code.tensor == 0) != (entry.mode == "ieee"):
        problems.append(f"{code.tensor} tensor-core instructions")
    return problems


def _line(entry: Entry) -> str:
    code = entry.code
    assert code is not None
    loads = " ".join(f"{width}:{count}" for width, count in code.loads.items())
    fma_share = f"{100 * code.loop_fma // code.loop}%" if code.loop else "-"
    tile = " ".join(
        f"{k.removeprefix('num_').lower()}={v}" for k, v in entry.options.items() if isinstance(v, int) and k != "D"
    )
    work = f"{entry.work:.2f}" if entry.work else "-"
    tensor = f"{code.tensor - code.wgmma:6} {code.wgmma:5} {work:>4}"
    counts = f"{code.registers:4} {code.stack:5} {entry.local:5.1%} {code.shared:6} {tensor} {code.fma:5}"
    name = f"sm_{entry.target:<3} {entry.op:14} {entry.kernel:15} {entry.kind:26} {entry.mode:11}"
    return (
        f"{name} {counts} {fma_share:>4}  {loads:26} {tile}{'  OVER: ' + '; '.join(entry.problems) if entry.problems else ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--time" in arguments:  # it records a step of the model, which lies above this package
        script = Path(__file__).parents[2] / "bench/kernel_times.py"
        return subprocess.run([sys.executable, script, *(x for x in arguments if x != "--time")]).returncode
    parser = argparse.ArgumentParser(prog="python -m fastsd_kernels.atlas", description="Compile every kernel for every GPU.")
    names = [f"sm_{target}" for target in ARCHITECTURES]
    parser.add_argument("--target", nargs="+", choices=names, default=names, metavar="sm_NN", help=", ".join(names))
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=", ".join(OPS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the entries to this file")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so Triton compiles nothing; unset it")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json is {str(options.json)!r}, but its folder does not exist; create it or name another file")
    print(f"target {'op':14} {'kernel':15} {'kind':26} {'mode':11} regs stack local shared    mma wgmma work   fma loop  loads")
    divisor = 4 * options.jobs  # short tasks, so that no process waits long for the last one
    tasks = [
        (op, int(sm[3:]), remainder, divisor) for sm in options.target for op in options.op for remainder in range(divisor)
    ]

    entries: list[Entry] = []
    # Not forked: a copy of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for new_entries in pool.map(survey, *zip(*tasks, strict=True)):
            entries += new_entries
            for entry in new_entries:
                print(_line(entry), flush=True)

    over = [entry for entry in entries if entry.problems]
    print(f"{len(entries)} configurations, {len(over)} over the limits")
    if options.json:
        rows = [{**entry._asdict(), "code": entry.code._asdict() if entry.code else None} for entry in entries]
        temporary = options.json.with_name(f".tmp-{options.json.name}")
        temporary.write_text(json.dumps(rows, indent=1))
        temporary.replace(options.json)  # a run that fails leaves the earlier file
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
