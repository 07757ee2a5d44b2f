"""The predicted time of a launch on a card, from its machine code. Nothing is fitted to measurements of these kernels.

An SM holds as many blocks as registers, shared memory and warps allow (`blocks_per_sm`). `replay.py` gives the cycles of so
many blocks; further blocks follow in waves. Device memory and L2 are bounds of their own: each argument of a launch is read
or written once in device memory, each tile whenever it is loaded in L2. The three times are joined by a p-norm, because the
end of one load overlaps the next only in part: where two are equal, the launch takes 12 % longer than each.
"""

from __future__ import annotations

from collections import Counter
from math import ceil, inf, prod
from typing import NamedTuple

from fastsd_kernels.cards import MULTIPROCESSORS, Card
from fastsd_kernels.launch import Launch
from fastsd_kernels.replay import DEVICE_LATENCY, L2_LATENCY, cost, flops, replay
from fastsd_kernels.sass import Code, Compiled
from fastsd_kernels.ttir import Work, evaluate
from fastsd_kernels.warp_path import Flow, words

LAUNCH_US = 2.5  # from the end of one kernel to the first instruction of the next, in a CUDA graph
_NORM = 6.0
_TURNS = 8  # of an outermost loop that are replayed; the second half gives the time of a turn


class Prediction(NamedTuple):
    """Times in microseconds, of one launch."""

    us: float  # predicted, with LAUNCH_US
    floor_us: float  # of the busiest unit alone, with all SMs full
    busiest: str  # that unit
    shares: dict[str, float]  # of the predicted time that each unit is busy
    blocks: int  # on an SM
    waves: float
    executed: int  # FLOPs of tensor cores, or else of fused multiply-adds, of all warps
    per_load: float  # fused multiply-adds per number loaded from shared memory; 0 without such loads
    wgmma: float  # share of `executed` by HGMMA


class Kernel:
    """A compiled kernel with the loops of one launch. Its times on cards are remembered."""

    def __init__(self, compiled: Compiled, work: Work) -> None:
        self.compiled = compiled
        self.flow = Flow(compiled.instructions, work.loops)
        self.executed = self.flow.executed()
        # Of the bytes that are loaded, those that lie in device memory have its latency.
        share = min(1, work.device / (work.loaded + work.stored))
        self._latency = L2_LATENCY + share * (DEVICE_LATENCY - L2_LATENCY)
        self._cycles: dict[tuple[int, int, int], float] = {}

    def cycles(self, card: Card, blocks: int) -> float:
        """Return the cycles of `blocks` blocks that run at the same time on an SM."""
        together = max(1, self.compiled.warps // 4)
        warps = ceil(max(1, ceil(blocks * self.compiled.warps / 4)) / together) * together  # whole blocks
        key = card.sm, card.tensor, warps
        if key not in self._cycles:
            limits = {region.header: _TURNS for region in self.flow.outermost}
            cycles = total = self._replay(card, limits, warps, together)
            for region in self.flow.outermost:
                if region.turns > _TURNS:
                    shorter = self._replay(card, limits | {region.header: _TURNS // 2}, warps, together)
                    total += (region.turns - _TURNS) * (cycles - shorter) / (_TURNS // 2)
            self._cycles[key] = total
        return self._cycles[key]

    def _replay(self, card: Card, limits: dict[int, int], warps: int, together: int) -> float:
        return replay(card, self.compiled.instructions, self.flow.path(limits), warps, together, self._latency)

    def busy(self, card: Card) -> Counter[str]:
        """Return the cycles of each pipe of a scheduler for one warp."""
        busy: Counter[str] = Counter()
        for i, count in self.executed.items():
            pipe, cycles, _ = cost(card, self.compiled.instructions[i])
            busy[pipe] += count * cycles  # type: ignore[assignment]
            busy["issue"] += count
        return busy

    def counts(self) -> Counter[str]:
        """Return a warp's tensor-core FLOPs, and a lane's multiply-adds, words loaded from shared memory, local accesses."""
        counts: Counter[str] = Counter()
        for i, count in self.executed.items():
            x = self.compiled.instructions[i]
            if x.opcode.endswith("MMA"):
                counts["HGMMA" if x.opcode == "HGMMA" else "HMMA"] += count * flops(x)
            elif x.opcode in ("FFMA", "FFMA2"):
                counts["fma"] += count * (2 if x.opcode == "FFMA2" else 1)
            elif x.opcode == "LDS":
                counts["loaded"] += count * words(x)  # type: ignore[assignment]
            elif x.opcode in ("LDL", "STL"):
                counts["local"] += count
        return counts

    @property
    def local_share(self) -> float:
        """The share of a warp's instructions that are loads and stores of local memory."""
        return self.counts()["local"] / sum(self.executed.values())

    @property
    def mma_share(self) -> float:
        """The share of the tensor-core FLOPs by mma, not wgmma; 0 without any."""
        counts = self.counts()
        return counts["HMMA"] / (counts["HMMA"] + counts["HGMMA"] or 1)


def executed_flops(kernel: Kernel, launch: Launch) -> int:
    """Return the matmul FLOPs that all warps execute: those of tensor cores, or else of fused multiply-adds."""
    counts, warps = kernel.counts(), prod(launch.grid) * kernel.compiled.warps
    return warps * (counts["HMMA"] + counts["HGMMA"] or 64 * counts["fma"])


def blocks_per_sm(card: Card, code: Code, warps: int) -> int:
    """Return the blocks of `warps` warps that an SM holds. Registers are allocated by 256 a warp, for 4 warps at once."""
    sm = MULTIPROCESSORS[card.sm]
    by_registers = sm.registers // (ceil(code.registers / 8) * 8 * 32) // 4 * 4 // warps
    by_shared = sm.shared // (ceil((code.shared + 1024) / 128) * 128)
    return min(by_registers, by_shared, sm.blocks, sm.warps // warps)


class Predictor:
    """Predicts launches; kernels are remembered by `Compilation.key` and their loops."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[str, str], Kernel] = {}

    def kernel(self, key: str, compiled: Compiled, work: Work) -> Kernel:
        """Return the kernel with the loops of one launch. Raises ValueError for loops that cannot be matched."""
        name = key, str(work.loops)
        if name not in self._kernels:
            self._kernels[name] = Kernel(compiled, work)
        return self._kernels[name]

    def predict(self, card: Card, key: str, compiled: Compiled, launch: Launch) -> Prediction:
        """Predict the time of a launch. Raises ValueError as `ttir.evaluate` and `warp_path.Flow`."""
        work = evaluate(compiled.ttir, launch)
        return predict(card, self.kernel(key, compiled, work), launch, work)


def predict(card: Card, kernel: Kernel, launch: Launch, work: Work) -> Prediction:
    """Predict the time of a launch with the given work."""
    programs, warps = prod(launch.grid), kernel.compiled.warps
    most = blocks_per_sm(card, kernel.compiled.code, warps)
    if most == 0:
        return Prediction(inf, inf, "does not fit", {}, 0, inf, 0, 0, 0)
    share = ceil(programs / card.sms)  # blocks of the SM that has the most
    resident = min(most, share)
    full, rest = divmod(share, resident)
    cycles = full * kernel.cycles(card, resident) + (kernel.cycles(card, rest) if rest else 0)
    us = 1 / (card.ghz * 1e3)
    times = {
        "device": work.device / (card.bandwidth * card.copy * 1e3),
        "l2": (work.loaded + work.stored) * us / (card.l2_rate * card.sms),
    }
    expected = sum(t**_NORM for t in (cycles * us, *times.values())) ** (1 / _NORM)
    times |= {pipe: busy * us * programs * warps / (card.sms * 4) for pipe, busy in kernel.busy(card).items()}
    busiest = max(times, key=lambda unit: times[unit])
    shares = {unit: time / expected for unit, time in times.items()}
    counts = kernel.counts()
    return Prediction(
        expected + LAUNCH_US,
        times[busiest],
        busiest,
        shares,
        resident,
        programs / (card.sms * resident),
        executed_flops(kernel, launch),
        counts["fma"] / counts["loaded"] if counts["loaded"] else 0,
        1 - kernel.mma_share if counts["HGMMA"] else 0,
    )
