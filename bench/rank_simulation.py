"""Simulation of what ranks send in a step: ports, hops and pieces, where `fastsd/plan/communication.py` has one formula.

Each rank computes chunk after chunk, and issues the operations of `GradientSums`. An operation begins on a rank when it is
issued there and the one before has ended there. It is a sequence of pieces: a piece needs the sender's port and the
receiver's, takes its bytes at their rate, and arrives a hop later; what has not arrived cannot be passed on.

    all-to-all      N - 1 pieces to the others in turn
    all-gather      ring of N - 1 steps
    all-reduce      ring of 2 (N - 1) steps, in which a machine's last rank sends through its network card; or, with a power of
                    two of machines, halving and doubling between them in 2 log2(M) steps (Thakur, Rabenseifner and Gropp
                    2005), which send as little and wait as rarely as the trees of NCCL do

With several GPUs per machine, these share out the sums of their machine before, in a ring, and collect the results after. Each
rank then has a network card of its own, and slices of the tensor follow each other through all steps. NCCL takes trees where it
expects them to be faster, and counts on 0.92 of a ring's rate (its `tuning.h`): the 126 hops of a ring of 64 GPUs on InfiniBand
take longer than the bytes of a chunk. On slower networks, the bytes decide, and a ring is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import log2

from fastsd.plan.communication import BASE, StepTime
from fastsd.plan.links import Cluster

SLICES = 16  # of a tensor that passes through a tree
TREE_RATE = 0.92  # of a ring's, as NCCL expects it


class Ranks:
    """The ranks of a cluster. `free_at` is when each has ended its last operation."""

    def __init__(self, cluster: Cluster, *, fast: bool) -> None:
        self.cluster, self.count = cluster, cluster.gpus
        self.free_at = [0.0] * self.count
        self._out, self._in = [0.0] * self.count, [0.0] * self.count
        self._local, self._fast = cluster.gpus // cluster.machines, fast

    def _send(self, source: int, target: int, size: float, at: float) -> float:
        """Send a piece as soon as possible from `at` on. Return when it has arrived."""
        link = self.cluster.link
        if source // self._local != target // self._local:
            assert self.cluster.network is not None
            link = self.cluster.network
        start = max(at, self._out[source], self._in[target])
        end = start + size / (1e9 * (link.high if self._fast else link.low))
        self._out[source] = self._in[target] = end
        return end + link.hop

    def _begin(self, issued: Sequence[float]) -> list[float]:
        return [max(pair) + BASE for pair in zip(issued, self.free_at, strict=True)]

    def all_to_all(self, size: float, issued: Sequence[float]) -> None:
        starts = self._begin(issued)
        self.free_at = list(starts)
        for step in range(1, self.count):
            for source in range(self.count):
                target = (source + step) % self.count
                arrived = self._send(source, target, size / self.count, max(starts[source], starts[target]))
                self.free_at[target] = max(self.free_at[target], arrived)
                self.free_at[source] = max(self.free_at[source], self._out[source])

    def ring(self, size: float, issued: Sequence[float], rounds: int) -> None:
        has = starts = self._begin(issued)
        for _ in range(rounds * (self.count - 1)):
            arrived = [0.0] * self.count
            for source in range(self.count):
                target = (source + 1) % self.count
                arrived[target] = self._send(source, target, size / self.count, max(has[source], starts[target]))
            has = arrived
        self.free_at = [max(pair) for pair in zip(has, self._out, strict=True)]

    def halving(self, size: float, issued: Sequence[float]) -> None:
        """All-reduce. In step k, ranks that differ in bit k exchange half of what is left, later twice of what is added up."""
        has = self._begin(issued)
        distances = [1 << bit for bit in range(self.count.bit_length() - 1)]
        halves = [size / (2 * distance) for distance in distances]
        for distance, piece in [*zip(distances, halves, strict=True), *zip(distances[::-1], halves[::-1], strict=True)]:
            has = [self._send(r ^ distance, r, piece, max(has[r], has[r ^ distance])) for r in range(self.count)]
        self.free_at = has

    def tree(self, size: float, issued: Sequence[float]) -> None:
        """All-reduce in slices: a ring in each machine, halving and doubling between the machines, a ring in each machine."""
        local, (_, machines, link, network) = self._local, self.cluster
        assert network is not None
        share = size / SLICES / local
        inside = [(1, share)] * (local - 1)
        halves = [(local << bit, share / (2 << bit)) for bit in range(machines.bit_length() - 1)]
        steps = [*inside, *halves, *halves[::-1], *inside]
        rates = [1e9 * (connection.high if self._fast else connection.low) for connection in (link, network)]
        ports = [[[0.0] * self.count for _ in range(2)] for _ in range(2)]  # of the network and not, out and in
        starts = self._begin(issued)
        pieces = [(at, number, 0, rank) for rank, at in enumerate(starts) for number in range(SLICES)]
        heapify(pieces)
        while pieces:  # the earliest first
            at, number, step, rank = heappop(pieces)
            distance, length = steps[step]
            through = distance >= local
            target = rank ^ distance if through else rank // local * local + (rank + 1) % local
            outward, inward = ports[through]
            start = max(at, starts[target], outward[rank], inward[target])
            outward[rank] = inward[target] = end = start + length / (rates[through] / (local if through else 1))
            arrived = end + (network if through else link).hop
            self.free_at[target] = max(self.free_at[target], arrived)
            if step + 1 < len(steps):
                heappush(pieces, (arrived, number, step + 1, target))

    def all_reduce(self, size: float, issued: Sequence[float]) -> None:
        gpus, machines, link, network = self.cluster
        assert network is not None
        if machines & (machines - 1):
            return self.ring(size, issued, 2)
        if self._local == 1:
            return self.halving(size, issued)
        rate = min(1e9 * (connection.high if self._fast else connection.low) for connection in (link, network))
        transfer = 2 * size * (gpus - 1) / gpus / rate
        ring = 2 * ((gpus - machines) * link.hop + (machines - 1) * network.hop)
        tree = 2 * ((self._local - 1) * link.hop + log2(machines) * network.hop)
        faster = transfer / TREE_RATE + tree < transfer + ring
        self.tree(size, issued) if faster else self.ring(size, issued, 2)


def simulate(
    chunks: Sequence[tuple[float, int]],
    after: float,
    cluster: Cluster,
    *,
    fast: bool,
    add_rate: float = 500e9,
    delays: Sequence[float] = (),
) -> StepTime:
    """Simulate a step that ends with the backward's last operation and the wait for all sums.

    Args:
        chunks: seconds of computation before each chunk is complete, and its bytes.
        after: seconds from the last chunk to the end of the backward.
        add_rate: bytes/s of a chunk with which a rank adds its pieces. Its backward is late by this time.
        delays: by how much each rank computes longer, as a share; empty = not at all.
    """
    ranks, count = Ranks(cluster, fast=fast), cluster.gpus
    factors = [1 + delay for delay in delays or [0.0] * count]
    now, ready = 0.0, []
    for seconds, size in chunks:
        now += seconds
        ready.append(([now * factor for factor in factors], size))
    ends = [(now + after) * factor for factor in factors]
    if cluster.machines > 1:
        for issued, size in ready:
            ranks.all_reduce(size, issued)
    else:
        previous, late = 0, 0.0
        for complete, size in [*ready, (ends, 0)]:
            issued = [at + late for at in complete]
            if previous:  # its pieces are added when the next chunk is complete, or the backward has ended
                added = [max(at, free) + previous / add_rate for at, free in zip(issued, ranks.free_at, strict=True)]
                ranks.ring(previous, added, 1)
                late += previous / add_rate
            if size:
                ranks.all_to_all(size, issued)
            previous = size
        ends = [at + late for at in ends]
    ranks.ring(4 * count, ends, 1)  # the loss
    finished = max(*ends, *ranks.free_at)
    return StepTime(finished, finished - max(ends))
