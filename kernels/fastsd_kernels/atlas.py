"""The atlas: the machine code of every shipped configuration of every kernel for every target, with no GPU present.

    python -m fastsd_kernels.atlas [--target sm_89 ...] [--op attention ...] [--json FILE]

The calls of each op's record run on meta tensors of the workload's shapes inside `recording(target)`. Every distinct launch is
compiled as Triton would compile it there, and its machine code is read. So all figures are those of the shipped code, and
tile tables cannot disagree with them. Columns:

    regs      registers a thread
    stack     bytes of local memory a thread: spills, and arrays the compiler could not keep in registers
    in loop   local loads and stores inside loops
    shared    bytes of shared memory a block
    loads     global loads by width in bits; "async" is cp.async or TMA, straight into shared memory
    tensor    tensor-core instructions
    fma       fp32 fused multiply-adds, and their share of the longest loop's instructions

A row over the limits (`_problems`) is marked, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastsd_kernels import RECORDS
from fastsd_kernels.cards import MULTIPROCESSORS
from fastsd_kernels.launch import ARCHITECTURES, INTERPRETED, recording
from fastsd_kernels.sass import Code, compile_launch, specialise

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
    problems: list[str]


OPS = {op.name: op for op in RECORDS}


def survey(op: str, target: int, remainder: int = 0, divisor: int = 1) -> list[Entry]:
    """Compile those distinct configurations of one op for sm_`target` whose number is `remainder` modulo `divisor`."""
    entries: dict[str, Entry] = {}
    with recording(target) as launches:
        for kind, mode in OPS[op].calls():
            for launch in launches:
                compilation = specialise(launch, target)
                if compilation.key not in entries:
                    entry = Entry(op, kind, mode, launch.kernel.__name__, target, launch.options, None, [])
                    entries[compilation.key] = entry
                    if len(entries) % divisor == remainder:
                        code = compile_launch(compilation)
                        entries[compilation.key] = entry._replace(code=code, problems=_problems(entry, code))
            launches.clear()
    return [entry for entry in entries.values() if entry.code is not None]


def _problems(entry: Entry, code: Code) -> list[str]:
    problems = []
    # Attention on large heads may spill outside its loops: it is 2 % of attention's work.
    allowed = 64 if entry.op == "attention" and entry.options["D"] > 80 else 0
    if code.stack > allowed or code.spills_in_loop:
        problems.append(f"stack {code.stack}, {code.spills_in_loop} in loops")
    limit = MULTIPROCESSORS[entry.target].block_shared
    if code.shared > limit:
        problems.append(f"shared {code.shared} > {limit}")
    if entry.kernel not in _SMALL and not code.loads.keys() & {"128", "async"}:
        problems.append("narrow loads only")
    if entry.op == "attention" and (code.tensor == 0) != (entry.mode == "ieee"):
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
    counts = f"{code.registers:4} {code.stack:5} {code.spills_in_loop:7} {code.shared:6} {code.tensor:6} {code.fma:5}"
    name = f"sm_{entry.target:<3} {entry.op:14} {entry.kernel:15} {entry.kind:26} {entry.mode:11}"
    return (
        f"{name} {counts} {fma_share:>4}  {loads:26} {tile}{'  OVER: ' + '; '.join(entry.problems) if entry.problems else ''}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
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
    print(f"target {'op':14} {'kernel':15} {'kind':26} {'mode':11} regs stack in loop shared tensor   fma loop  loads")
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
