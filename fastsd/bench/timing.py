"""Time candidates in turn, so that disturbances of the machine affect all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastsd.bench.baselines import Candidate
from fastsd.bench.counters import host_waits, rise, seconds
from fastsd.terminal.console import counted, work
from fastsd.train.graph import WARM_UP

TimedCall = tuple[Callable[[], object], Callable[[], AbstractContextManager[None]]]


def in_turns(candidates: Mapping[str, TimedCall], rounds: int, device: torch.device) -> list[tuple[str, float]]:
    """Time each candidate, a (call, context manager) pair, once per round, one after another.

    A GPU gets several calls per turn, because in training the host runs ahead of it.

    Returns:
        (name, seconds of one call) in the order in which the turns ran.
    """
    repeats = 4 if device.type == "cuda" else 1
    order = []
    for _ in counted("timing", range(rounds), "rounds"):
        for name, (call, turn) in candidates.items():
            with turn():
                order.append((name, seconds(call, device, repeats)))
    return order


def first_steps(candidate: Candidate, device: torch.device) -> dict[str, Any]:
    """Warm up a candidate and measure one of its steps. Return a row of results, in which None means not measurable.

    The peak is the memory that the candidate holds plus the rise during a step. On a GPU it is measured during the first steps,
    which allocate state and record a graph, and on a CPU during the second step.
    """
    opaque = device.type == "cpu" and candidate.name == "compiled"
    row: dict[str, Any] = {"name": candidate.name}
    losses: list[Tensor] = []

    def step(times: int = 1) -> None:
        losses.extend(candidate.step() for _ in range(times))

    with work(f"first steps of {candidate.name}"), candidate.turn():
        if device.type == "cuda":
            held = candidate.held()
            peak = held + rise(lambda: step(WARM_UP + 2), device)
            waits, launches = host_waits(step, device)
        else:
            step()
            held = candidate.held()
            peak = held if opaque else held + rise(step, device)
            waits, launches = (Counter(), 0) if opaque else host_waits(step, device, candidate.on_host())
    figures = {"host_waits": dict(waits), "launches": launches, "peak_gb": peak / 1e9}
    row |= dict.fromkeys(figures) if opaque else figures
    return row | {"held_gb": candidate.held() / 1e9, "first_loss": losses[0].item()}
