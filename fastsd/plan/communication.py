"""Messages of ranks in a step, and the time for which they wait: the communication model of `fastsd plan --gpus`.

    compute   ==== forward ====|======= backward =======|                 |= update =|
    network                          [c0][c1]  [c2][c3] [c4][c5][last]
                                                        |-- exposed time --|

**Which messages, and when.** Nothing is assumed. The rehearsal runs the real step and `GradientSums` with `RehearsedRanks`,
which send nothing, but record each collective operation and what the step computes before it. So the chunks, their order and
the place in the backward at which each is sent are those of the code, as are the buffers in memory.

**Bytes.** Of a tensor of S bytes, a rank of N sends S (N - 1) / N in an all-to-all, an all-gather (S being the gathered tensor)
and a reduce-scatter, and 2 S (N - 1) / N in an all-reduce: the least that suffices (Patarasuk and Yuan 2009).

**Time of a message.** These bytes at the rate of the slowest connection, and latency: NCCL's base time and its time per hop
(`links.py`). Within a machine, all GPUs send at once, in a ring N - 1 times after each other; an all-to-all is one hop. Between
M machines, a ring enters and leaves each machine once, whatever the number of its GPUs, so the network of a machine carries
as many bytes as one GPU sends. The latency is that of trees over the machines (Sanders, Speck and Traeff 2009, "Two-tree
algorithms"), which NCCL takes where they are faster; where it takes rings, bytes take so much longer that hops hardly count.

**Time of a step.** Messages travel one after another, in their order. Message i is ready when the computation before it is
done, at r_i. With the time d_j of each, all have arrived at

    F = max over i of (r_i + d_i + d_(i+1) + ... + d_n)

because the last idle moment of the connection ends with some r_i, after which it never rests. The step waits for F before the
update: its exposed time is F - B, B being the end of the backward, if that is positive. `arrival` computes F in one pass.
What is sent after the update, such as weights, is exposed in full, by the same rule. Nothing is fitted. `bench/scaling.py`
compares F with a simulation of the ranks' ports, hops and copies.

On one machine, the ranks add received pieces before they send the sums. These additions count twice: in d_i, because the
connection waits for them, and as computation, because they take its memory bandwidth.

**Not counted.** Slower kernels while NCCL uses some SMs; ranks that are late; other traffic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, log2
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd.plan.links import Cluster
from fastsd.plan.operations import Operation
from fastsd.plan.step_time import step_seconds
from fastsd.train.ranks import Ranks
from fastsd_kernels.cards import Card

BASE = 8.4e-6  # seconds that NCCL takes for any collective operation (`tuning.h`, ring)


class Message(NamedTuple):
    """One collective operation.

    Attributes:
        operation: its name in torch.distributed.
        size: bytes of the whole tensor, of which each rank has a piece.
        hidden: True if it starts before the backward has ended.
    """

    operation: str
    size: int
    hidden: bool

    def sent_bytes(self, ranks: int) -> int:
        """Return the bytes that each rank sends."""
        return self.rounds * self.size * (ranks - 1) // ranks

    @property
    def rounds(self) -> int:
        """Number of times that a ring passes each piece on, so that all ranks have it."""
        return 2 if self.operation == "all_reduce" else 1

    def seconds(self, cluster: Cluster, *, fast: bool) -> float:
        """Return the time from its start until all ranks have received it."""
        gpus, machines, link, network = cluster
        local, sent = gpus // machines, self.sent_bytes(gpus)
        rate = 1e9 * (link.high if fast else link.low)
        hops = 1 if self.operation.startswith("all_to_all") else self.rounds * (local - 1)
        transfer, latency = sent / rate, BASE + hops * link.hop
        if network is not None:
            through = sent
            if self.operation.startswith("all_to_all"):  # no ring: each GPU sends to every GPU of the others
                through = local * self.size * (gpus - local) // gpus
            transfer = max(transfer, through / (1e9 * (network.high if fast else network.low)))
            latency += self.rounds * ceil(log2(machines)) * network.hop
        return transfer + latency


class Wait(NamedTuple):
    """All messages so far must have arrived: before the step goes on, or, if `hidden`, before what is sent next."""

    hidden: bool = False


class Segment(NamedTuple):
    """Operations of a step, and the event that follows them."""

    operations: Counter[Operation]
    event: Message | Wait


class StepTime(NamedTuple):
    """A step of several ranks, in seconds: all of it, and the part in which the GPUs wait for messages."""

    seconds: float
    exposed: float

    @property
    def efficiency(self) -> float:
        """Share of the step in which a GPU computes."""
        return 1 - self.exposed / self.seconds


def arrival(messages: Iterable[tuple[float, float]]) -> float:
    """Return when the last message has arrived, from the time at which each is ready and the seconds that it takes."""
    end = 0.0
    for ready, seconds in messages:
        end = max(end, ready) + seconds
    return end


class StepTimes(NamedTuple):
    """A step predicted at both ends: the fewest seconds on the fastest connection, and the most on the slowest.

    Less computation on a slower connection leaves more to wait for. So `efficiency`, (least, highest), and `waits` in seconds,
    (least, most), combine the fewest seconds of computation with the slowest connection, and the most with the fastest.
    """

    fastest: StepTime
    slowest: StepTime
    efficiency: tuple[float, float]
    waits: tuple[float, float]

    @classmethod
    def of(
        cls, compute: tuple[float, float], segments: Sequence[Segment], card: Card, precision: str, cluster: Cluster
    ) -> StepTimes:
        """Predict a step.

        Args:
            compute: fewest and most seconds of all operations of the step, from `step_seconds`.
            segments: of the step's end, from its last forward on.
        """
        pairs = [step_seconds(segment.operations, card, precision) for segment in segments]
        events = [segment.event for segment in segments]

        def predicted(slow: int, *, fast: bool) -> StepTime:
            return waited(compute[slow], [pair[slow] for pair in pairs], events, cluster, fast=fast)

        worst, best = predicted(0, fast=False), predicted(1, fast=True)
        ranges = (worst.efficiency, best.efficiency), (best.exposed, worst.exposed)
        return cls(predicted(0, fast=True), predicted(1, fast=False), *ranges)


def waited(
    compute: float, seconds: Sequence[float], events: Sequence[Message | Wait], cluster: Cluster, *, fast: bool
) -> StepTime:
    """Return the time of a step that computes `compute` seconds, of which `seconds` lie before each event."""
    now = compute - sum(seconds)  # the operations before and after the segments; where they are makes no difference
    exposed, messages, sums = 0.0, [], False
    for passed, event in zip(seconds, events, strict=True):
        # What is computed after a hidden wait is sums of received pieces: they follow the message before, not the backward.
        start, now = now + (0.0 if sums else passed), now + passed
        if isinstance(event, Message):
            messages.append((start, now - start + event.seconds(cluster, fast=fast)))
        sums = event == Wait(hidden=True)
        if event == Wait():
            waited = max(0.0, arrival(messages) - now)
            now, exposed = now + waited, exposed + waited
    return StepTime(compute + exposed, exposed)


class _Done:
    """Stands for a collective operation that has ended."""

    def wait(self) -> None:
        pass


@dataclass(frozen=True)
class RehearsedRanks(Ranks):
    """Ranks that send nothing and report each event of `Segment` to `record`."""

    record: Callable[[Message | Wait], None] = field(default=lambda _: None, compare=False)

    def finish(self, works: Sequence[Any]) -> None:
        self.record(Wait(hidden=_in_backward()))  # in the backward, only the stream that sends waits

    def _start(self, operation: str, *tensors: Tensor) -> Any:
        size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        self.record(Message(operation, size, _in_backward()))
        return _Done()

    def _combined(self, values: Tensor, operation: str) -> Tensor:
        self._start("all_reduce", values)
        self.finish([])
        return values


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
