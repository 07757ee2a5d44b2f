"""Timing of contenders that take turns, so that what the machine does meanwhile happens to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsd.bench.counters import host_waits, rise, seconds
from fastsd.train.graph import WARM_UP

if TYPE_CHECKING:
    from fastsd.bench.baselines import Contender

Turn = tuple[Callable[[], object], Callable[[], AbstractContextManager[None]]]


def in_turns(contenders: Mapping[str, Turn], rounds: int, device: torch.device) -> list[tuple[str, float]]:
    """Time (call, what must hold meanwhile) of each contender once a round, one after another.

    A GPU gets several calls a turn, for in training the host runs ahead of it.

    Returns:
        (name, seconds of one call) in the order in which they ran.
    """
    repeats = 4 if device.type == "cuda" else 1
    order = []
    for _ in range(rounds):
        for name, (call, turn) in contenders.items():
            with turn():
                order.append((name, seconds(call, device, repeats)))
    return order


def first_steps(contender: Contender, device: torch.device) -> dict[str, Any]:
    """Warm a contender up and count what one of its steps takes, as a row of figures. None: cannot be seen from outside.

    The peak is what it holds and what comes on top: on a GPU in the first steps, which make state and record a graph, on a CPU
    in the second.
    """
    blind = device.type == "cpu" and contender.name == "compiled"
    row: dict[str, Any] = {"name": contender.name}
    losses: list[Tensor] = []

    def step(times: int = 1) -> None:
        losses.extend(contender.step() for _ in range(times))

    with contender.turn():
        if device.type == "cuda":
            held = contender.held()
            peak = held + rise(lambda: step(WARM_UP + 2), device)
            waits, launches = host_waits(step, device)
        else:
            step()
            held = contender.held()
            peak = held if blind else held + rise(step, device)
            waits, launches = (Counter(), 0) if blind else host_waits(step, device, contender.on_host())
    seen = {"host_waits": dict(waits), "launches": launches, "peak_gb": peak / 1e9}
    row |= dict.fromkeys(seen) if blind else seen
    return row | {"held_gb": contender.held() / 1e9, "first_loss": losses[0].item()}
