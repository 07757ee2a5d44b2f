"""The path of one warp through machine code: which instructions it executes, and how often.

Loops of the machine code are matched with those of the source (`ttir.py`), which gives their turns. At a branch that depends
on anything else, a warp takes the side that moves more data or multiplies more, and of equal sides the shorter. So it enters
tiles instead of skipping them, takes a kernel's fast path for whole tiles, and avoids subroutines for denormal numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastsd_kernels.sass import Instruction
from fastsd_kernels.ttir import Loop

_ACCESSES = {"LDG": 1, "STG": 1, "LDGSTS": 1, "LDS": 1, "STS": 1, "LDSM": 1, "STSM": 1, "UTMALDG": 32, "UBLKCP": 32}
_WIDTHS = {"64": 2, "128": 4, "256": 8, "4": 4, "2": 2, "U8": 0.25, "S8": 0.25, "U16": 0.5, "S16": 0.5}
_LONGEST = 4_000_000  # instructions of a path
_CALL_COST = 1_000_000  # more than any path without a call


def words(instruction: Instruction) -> float:
    """Return the 32-bit words that a thread moves in one access to memory."""
    return next((_WIDTHS[flag] for flag in instruction.name.split(".")[1:] if flag in _WIDTHS), 1)


class _Region(NamedTuple):
    """A loop of the machine code with the turns of its match."""

    header: int
    ends: frozenset[int]  # branches back to the header
    body: frozenset[int]
    turns: int


class Flow:
    """The control flow of machine code, with the loops of the launch.

    Raises:
        ValueError: a loop of the machine code that cannot be matched with one of the source, or an indirect branch.
    """

    def __init__(self, instructions: Sequence[Instruction], loops: Sequence[Loop]) -> None:
        self.instructions = instructions
        self._index = {x.address: i for i, x in enumerate(instructions)}
        # The assembler also writes a CALL that never returns for a branch.
        self._subroutines = {x.target for x in instructions if x.opcode == "CALL"}
        self._next = [self._successors(i) for i in range(len(instructions))]
        returns = {i for i, x in enumerate(instructions) if x.opcode == "RET"}
        self._subroutines = {
            target
            for target in self._subroutines
            if target is not None and returns & _reach(self._next, self._index[target], without=None)
        }
        self._next = [self._successors(i) for i in range(len(instructions))]
        self.regions = self._match(_natural_loops(self._next), loops)
        self._inner: list[_Region | None] = [None] * len(instructions)  # the innermost loop of each instruction
        self._times = [1] * len(instructions)
        for region in self.regions:  # outer loops first
            for i in region.body:
                self._inner[i] = region
                self._times[i] *= region.turns
        self._worth = self._longest()

    def _successors(self, i: int) -> tuple[int, ...]:
        """Return the next instruction and the branch's target, where a warp may go there."""
        x = self.instructions[i]
        following = (i + 1,) if i + 1 < len(self.instructions) else ()
        if x.opcode == "BRX":
            raise ValueError(f"an indirect branch at {x.address:#x}")
        if x.opcode in ("EXIT", "RET"):
            return following if x.guard else ()
        if x.target is None or ".DIV" in x.name or (x.opcode == "CALL" and x.target in self._subroutines):
            return following  # a subroutine returns to the next instruction; .DIV: a branch for warps that diverged
        target = (self._index[x.target],) if x.target != x.address else ()  # a kernel ends in an endless branch
        uniform = x.guard or x.operands.count(",")  # "BRA UP0, 0x..." has its predicate among the operands
        return following + target if uniform and target != following else target

    def _match(self, bodies: dict[int, tuple[set[int], set[int]]], loops: Sequence[Loop]) -> list[_Region]:
        regions: list[_Region] = []
        # A warp of a kernel with wgmma or TMA waits for a barrier in memory in a loop of a few instructions: one turn.
        spins = {h for h, (_, body) in bodies.items() if len(body) < 8 and any(self._waits(i) for i in body)}
        regions += [_Region(h, frozenset(bodies[h][0]), frozenset(bodies[h][1]), 1) for h in spins]

        def pair(headers: list[int], loops: Sequence[Loop]) -> None:
            outer = [h for h in headers if not any(h in bodies[o][1] and h != o for o in headers)]
            if len(outer) < len(loops):  # the compiler may have unrolled those whose turns it knows
                loops = [loop for loop in loops if not loop.unrollable]
            if len(outer) != len(loops):
                raise ValueError(f"{len(outer)} loops of the machine code, {len(loops)} of the source")
            for header, loop in zip(outer, loops, strict=True):
                ends, body = bodies[header]
                regions.append(_Region(header, frozenset(ends), frozenset(body), loop.turns))
                pair([h for h in headers if h in body and h != header], loop.inner)

        pair(sorted(bodies.keys() - spins), loops)
        return sorted(regions, key=lambda region: -len(region.body))

    def _waits(self, i: int) -> bool:
        return self.instructions[i].opcode == "SYNCS"

    def _longest(self) -> list[tuple[float, int]]:
        """Return (work, -instructions) of the best path from each instruction to the end, without branches back."""
        worth: list[tuple[float, int] | None] = [None] * len(self._next)
        for start in range(len(self._next)):
            stack = [start]
            while stack:
                i = stack[-1]
                ahead = [j for j in self._next[i] if not self._goes_back(i, j)]
                missing = [j for j in ahead if worth[j] is None]
                if worth[i] is None and missing:
                    stack += missing
                    continue
                stack.pop()
                if worth[i] is None:
                    work, length = max((w for j in ahead if (w := worth[j])), default=(0.0, 0))
                    x = self.instructions[i]
                    cost = _CALL_COST if x.target in self._subroutines else 1
                    gain = 256 if "MMA" in x.name else _ACCESSES.get(x.opcode, 0) * words(x)
                    worth[i] = work + self._times[i] * gain, length - self._times[i] * cost
        return [w for w in worth if w is not None]

    def _goes_back(self, i: int, j: int) -> bool:
        return any(j == region.header and i in region.ends for region in self.regions)

    @property
    def outermost(self) -> list[_Region]:
        return [r for r in self.regions if not any(r.header in other.body and other is not r for other in self.regions)]

    def path(self, limits: Mapping[int, int]) -> list[int]:
        """Return the indices of the instructions that a warp executes, in order. Loops with a limit take no more turns."""
        indices: list[int] = []
        turns: Counter[int] = Counter()  # finished, of the loops that the warp is in
        i: int | None = 0
        while i is not None:
            indices.append(i)
            if len(indices) > _LONGEST:
                raise ValueError(f"a path of over {_LONGEST} instructions")
            region, ahead = self._inner[i], self._next[i]
            if region is not None:
                last_turn = turns[region.header] + 1 >= min(region.turns, limits.get(region.header, region.turns))
                if last_turn and self.instructions[i].opcode == "EXIT" and self._ends_program(region):
                    break
                if i in region.ends and not (last_turn and len(ahead) > 1):
                    turns[region.header] += 1
                    i = region.header
                    continue
                ahead = self._ahead(region, i, ahead, last_turn=last_turn)
            i = max(ahead, key=lambda j: self._worth[j]) if ahead else None
            if region is not None and i not in region.body:
                turns[region.header] = 0
        return indices

    def _ahead(self, region: _Region, i: int, ahead: tuple[int, ...], *, last_turn: bool) -> tuple[int, ...]:
        """Return the successors that a warp may go to: out of the loop in its last turn only, by its last exit."""
        inside = tuple(j for j in ahead if j in region.body and j != region.header)
        if i in region.ends:  # in the last turn
            return tuple(j for j in ahead if j != region.header)
        leaves = last_turn and len(inside) < len(ahead) and i == self._exit(region)
        if not inside or (leaves and not self._leaves_at_end(region)):
            return tuple(j for j in ahead if j not in region.body) or ahead
        return inside

    def _ends_program(self, region: _Region) -> bool:
        """Return True if no branch leads out of a loop, so that only the program's exit does."""
        return all(j in region.body for i in region.body for j in self._next[i])

    def _leaves_at_end(self, region: _Region) -> bool:
        return any(len(self._next[i]) > 1 for i in region.ends)

    def _exit(self, region: _Region) -> int:
        """Return the last branch out of a loop that is left in the middle."""
        return max(i for i in region.body if any(j not in region.body for j in self._next[i]))

    def executed(self) -> Counter[int]:
        """Return how often a warp executes each instruction, by index."""
        limits = {region.header: 2 for region in self.outermost}
        counts = total = Counter(self.path(limits))
        for region in self.outermost:
            if region.turns > 2:
                one_less = Counter(self.path(limits | {region.header: 1}))
                total = total + Counter({i: (n - one_less[i]) * (region.turns - 2) for i, n in counts.items()})
        return total


def _natural_loops(successors: Sequence[tuple[int, ...]]) -> dict[int, tuple[set[int], set[int]]]:
    """Return {header: (branches back to it, body)} of every natural loop: a back edge leads to a block that dominates it."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for i, ahead in enumerate(successors):
        for j in ahead:
            predecessors[j].append(i)
    reachable = _reach(successors, 0, without=None)
    loops: dict[int, tuple[set[int], set[int]]] = {}
    for i, ahead in enumerate(successors):
        for header in ahead:
            if header >= i or i not in reachable or i in _reach(successors, 0, without=header):
                continue
            ends, body = loops.setdefault(header, (set(), {header}))
            ends.add(i)
            stack = [i]
            while stack:
                j = stack.pop()
                if j not in body:
                    body.add(j)
                    stack += predecessors[j]
    return loops


def _reach(successors: Sequence[tuple[int, ...]], start: int, without: int | None) -> set[int]:
    reached: set[int] = set()
    stack = [start] if start != without else []
    while stack:
        i = stack.pop()
        if i not in reached:
            reached.add(i)
            stack += [j for j in successors[i] if j != without]
    return reached
