"""Replay of one scheduler of an SM: the cycles that its warps need for a path through machine code.

A warp issues its next instruction when the stall count of the one before has passed, the scoreboards that it waits for are
clear, and the instruction's pipe accepts it. The scheduler issues one instruction a cycle, first for the warp that issued
last. Pipes are those of a scheduler; what an SM has once (shared memory, L1) counts as a quarter. `_cost` has each pipe's
rate, from the throughputs in the CUDA programming guide, and the latency that a scoreboard adds to it.

Not modelled: conflicts of registers' and shared memory's banks, hits in the instruction cache, L1's hits, atomics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from fastsd_kernels.cards import MULTIPROCESSORS, Card
from fastsd_kernels.sass import Instruction
from fastsd_kernels.warp_path import words

# Cycles of work that may wait in front of a pipe while the warp goes on. Memory pipes have long queues (160 cycles are ten
# 128-bit accesses to shared memory on each scheduler); arithmetic pipes take an instruction when they are free.
PIPES = {"tensor": 0, "fma": 0, "alu": 0, "special": 12, "fp64": 64, "shared": 48, "l1": 160, "issue": 0}
_SHARED_LATENCY, _SHUFFLE_LATENCY, _SPECIAL_LATENCY, _TENSOR_LATENCY = 24, 20, 18, 18
# Of L2 and of device memory, without load; published for GA100, AD102 and GH100: 200 to 300 and 470 to 600.
L2_LATENCY, DEVICE_LATENCY = 270, 550
_LOCAL_LATENCY = 30  # of L1, where spills stay
_CONSTANT_LATENCY, _REGISTER_LATENCY, _UNIFORM_LATENCY = 20, 30, 12
_BARRIER = 18  # from the last arrival to the first instruction after it
_BLOCK_START, _WARP_START = 40.0, 3.0  # between the starts of blocks and of warps on a scheduler
# Share of a tensor core's rate that mma.sync reaches: on sm_90 only wgmma reaches all of it.  Source: Luo et al. 2024,
# "Benchmarking and dissecting the NVIDIA Hopper GPU architecture via microbenchmarking", table 8.
_MMA_SHARE = {90: 0.62}
_LEAST_WGMMA = 16.0  # cycles; assumed. A wgmma of few columns takes as long as one that reads 64 rows from shared memory

_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "POPC", "FLO", "BREV"}
_FP64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
_FMA = {"FFMA": 1, "FMUL": 1, "FADD": 1, "FFMA32I": 1, "FFMA2": 2, "FMUL2": 2, "FADD2": 2}
_HALF_RATE_FMA = {"IMAD", "HFMA2", "HADD2", "HMUL2"}  # in 64 lanes of an SM before sm_120
_INTEGER = {"IADD3", "VIADD", "LOP3", "MOV", "LEA", "SHF", "ISETP", "IMNMX", "VIMNMX", "SEL"}
_SHARED = {"LDS", "LDSM", "STS", "STSM", "ATOMS"}
_GLOBAL = {"LDG", "LDGSTS", "STG", "LD", "ST", "LDL", "STL"}
_CONTROL = {"NOP", "BRA", "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "WARPGROUPSET", "MEMBAR", "WARPSYNC", "EXIT", "BSSY",
            "BSYNC", "CALL", "RET", "YIELD", "R2UR", "FENCE", "ERRBAR", "CCTL", "ELECT", "SYNCS", "VOTE", "CS2R"}  # fmt: skip


class Cost(NamedTuple):
    """The pipe of an instruction, the cycles that it occupies it, and the latency beyond them."""

    pipe: str
    cycles: float
    latency: float


def cost(card: Card, x: Instruction) -> Cost:
    """Return what an instruction costs on one scheduler of a card."""
    sm, opcode = MULTIPROCESSORS[card.sm], x.opcode
    if opcode in ("HMMA", "QMMA", "OMMA", "HGMMA"):
        return _matmul(card, x)
    if opcode in _FMA:
        return Cost("fma", _FMA[opcode] * 128 / sm.fp32, 0)
    if opcode in _HALF_RATE_FMA:
        return Cost("fma", 1 if card.sm == 120 else 2, 0)
    if opcode in _FP64:
        return Cost("fp64", 128 / sm.fp64, 20)
    if opcode in _SPECIAL:
        return Cost("special", 128 / sm.special, _SPECIAL_LATENCY)
    if opcode in _SHARED:
        # An SM serves 128 bytes a cycle. "[RZ]": padding that the assembler adds.
        return Cost("issue", 0, 0) if x.guard == "@!PT" else Cost("shared", 4 * words(x), _SHARED_LATENCY)
    if opcode == "SHFL":
        return Cost("shared", 4, _SHUFFLE_LATENCY)
    if opcode in _GLOBAL:
        return Cost("l1", 4 * max(1, words(x)), _LOCAL_LATENCY if opcode in ("LDL", "STL") else DEVICE_LATENCY)
    if opcode in ("S2R", "S2UR"):
        return Cost("issue", 0, _REGISTER_LATENCY)
    if opcode in ("LDC", "LDCU", "ULDC"):
        return Cost("issue", 0, _CONSTANT_LATENCY)
    if opcode in _CONTROL or opcode.startswith("U"):
        return Cost("issue", 0, _UNIFORM_LATENCY)
    return Cost("alu", 128 / (sm.integer if opcode in _INTEGER else 64), 0)


def flops(x: Instruction) -> int:
    """Return the FLOPs of a tensor-core instruction, those of one warp."""
    if x.opcode == "HGMMA":
        rows, columns, contracted = (int(n) for n in re.findall(r"\d+", x.name.split(".")[1]))
        return 2 * rows * columns * contracted // 4  # a warp computes a quarter of the rows
    shape = re.search(r"\.16(\d)(\d+)", x.name)  # 16816 is 16 rows, 8 columns, 16 contracted
    return 2 * 16 * int(shape[1]) * int(shape[2]) if shape else 0


def _matmul(card: Card, x: Instruction) -> Cost:
    rate = card.tensor / 4 * (0.5 if "TF32" in x.name else 1)
    if x.opcode != "HGMMA":
        return Cost("tensor", flops(x) / (rate * _MMA_SHARE.get(card.sm, 1)), _TENSOR_LATENCY)
    rows, columns, contracted = (int(n) for n in re.findall(r"\d+", x.name.split(".")[1]))
    size = 4 if "TF32" in x.name else 2
    # Operands in shared memory are read at 128 bytes a cycle; that of the rows may be in registers.
    reads = columns * contracted * size + (0 if re.match(r"\s*R\d+,\s*R\d+", x.operands) else rows * contracted * size)
    return Cost("tensor", max(flops(x) / rate, reads / 128, _LEAST_WGMMA), _TENSOR_LATENCY)


class _Step(NamedTuple):
    """An instruction as the replay sees it."""

    pipe: str | None
    cycles: float
    latency: float
    stall: int
    sets: int
    frees: int
    waits: int
    kind: str  # of the instructions that need more than the above, otherwise ""
    pending: int  # groups of asynchronous work that a wait leaves unfinished


def _step(card: Card, x: Instruction, global_latency: float) -> _Step:
    pipe, cycles, latency = cost(card, x)
    if latency == DEVICE_LATENCY:
        latency = global_latency
    kind, pending = {"LDGSTS": "copy", "LDGDEPBAR": "commit"}.get(x.opcode, ""), 0
    if x.opcode == "HGMMA" and "gsb" in x.operands:  # the last one of a group
        kind = "wgmma"
    elif x.name.startswith("BAR.SYNC"):
        kind = "barrier"
    elif x.opcode == "DEPBAR" or x.name.startswith("WARPGROUP.DEPBAR"):
        kind = "copies" if x.opcode == "DEPBAR" else "products"
        pending = int(number[1], 16) if (number := re.search(r", 0x([0-9a-f]+)", x.operands)) else 0
    return _Step(None if pipe == "issue" else pipe, cycles, latency, max(1, x.stall), x.sets, x.frees, x.waits, kind, pending)


class _Warp:
    """A warp's position in the path, and when what it waits for is done."""

    def __init__(self, start: float) -> None:
        self.position = 0
        self.ready = start  # the earliest cycle for the next instruction
        self.boards = [0.0] * 8  # scoreboards; the last two stand for "none"
        self.copying = 0.0  # when the copies that no group has yet are done
        self.copies: list[float] = []  # when each group of copies is done
        self.products: list[float] = []  # when each group of wgmma is done


def replay(
    card: Card, instructions: Sequence[Instruction], path: Sequence[int], warps: int, together: int, latency: float
) -> float:
    """Return the cycles in which `warps` warps of one scheduler run along a path; barriers join groups of `together` warps.

    Args:
        path: indices of instructions.
        latency: of global loads, in cycles.
    """
    table = [_step(card, x, latency) for x in instructions]
    steps = [table[i] for i in path]
    states = [_Warp(_WARP_START * w + _BLOCK_START * (w // together)) for w in range(warps)]
    order = list(states)  # the one that issued last comes first
    group = {id(state): w // together for w, state in enumerate(states)}
    waiting: dict[int, list[_Warp]] = {}
    free = dict.fromkeys(PIPES, 0.0)
    now = end = 0.0
    while order:
        best, best_time = None, float("inf")
        for state in order:
            time, pipe = state.ready, steps[state.position].pipe
            if pipe is not None and (accepts := free[pipe] - PIPES[pipe]) > time:
                time = accepts
            if time <= now:
                best, best_time = state, now
                break
            if time < best_time:
                best, best_time = state, time
        assert best is not None
        step, state, issued = steps[best.position], best, best_time
        begins = issued
        if step.pipe is not None:
            begins = max(issued, free[step.pipe])
            free[step.pipe] = begins + step.cycles
        done = begins + step.cycles + step.latency
        if step.sets < 6:
            state.boards[step.sets] = max(state.boards[step.sets], done)
        if step.frees < 6:
            state.boards[step.frees] = max(state.boards[step.frees], begins + step.cycles + 6)
        now = issued + 1
        state.position += 1
        state.ready = issued + step.stall
        if order[0] is not state:
            order.remove(state)
            order.insert(0, state)
        if step.kind:
            _special(step, state, issued, done)
        if state.position == len(steps):
            order.remove(state)
            end = max(end, done, state.ready)
        else:
            _wait(steps[state.position], state)
            if step.kind == "barrier":
                order.remove(state)
                _arrive(waiting.setdefault(group[id(state)], []), state, together, order, issued)
    return end


def _special(step: _Step, state: _Warp, issued: float, done: float) -> None:
    """Keep track of asynchronous work."""
    if step.kind == "copy":
        state.copying = max(state.copying, done)
    elif step.kind == "commit":
        state.copies.append(max(state.copying, issued))
        state.copying = 0.0
        state.boards[step.sets] = 0.0  # it counts groups, and only a DEPBAR waits for it
    elif step.kind == "wgmma":
        state.products.append(done)


def _wait(step: _Step, state: _Warp) -> None:
    """Move a warp's time to when its next instruction has what it needs."""
    waits = step.waits
    if waits:
        for board in range(6):
            if waits >> board & 1 and state.boards[board] > state.ready:
                state.ready = state.boards[board]
    groups = {"copies": state.copies, "products": state.products}.get(step.kind)
    if groups is not None and len(groups) > step.pending:
        state.ready = max(state.ready, groups[-1 - step.pending])


def _arrive(arrived: list[_Warp], state: _Warp, together: int, order: list[_Warp], issued: float) -> None:
    """Let a warp wait at a barrier, or release all of its group."""
    arrived.append(state)
    if len(arrived) == together:
        for member in arrived:
            member.ready = max(member.ready, issued + _BARRIER)
        order[:0] = arrived
        arrived.clear()
