"""Restores that leave out one thing. A comparison of runs that does not notice each of them is worthless."""

from collections.abc import Callable

import torch

from fastsd.data.loader import Loader
from fastsd.data.order import Order
from fastsd.train.step import Step


def without_random_position() -> None:
    """Start noise, timesteps and dropout again from the first position."""
    batch = Loader.batch

    def restarted(self: Loader, position: int, count: int):
        result = batch(self, position, count)
        self.__dict__.setdefault("first", position)
        object.__setattr__(result, "positions_B", result.positions_B - self.__dict__["first"])
        return result

    Loader.batch = restarted


def without_order() -> None:
    """Start again with the first samples of the order."""
    batch = Order.batch

    def restarted(self: Order, position: int, count: int):
        return batch(self, position - self.__dict__.setdefault("first", position), count)

    Order.batch = restarted


def without_scheduler() -> None:
    """Start the schedule of the learning rate again."""
    call = Step.__call__

    def restarted(self: Step, batch, stage_step: int):
        return call(self, batch, stage_step - self.__dict__.setdefault("first", stage_step))

    Step.__call__ = restarted


def without_tensors(suffix: str, value: Callable[[Step], float] | None = None) -> None:
    """Leave out the tensors of the optimizer state whose names contain `suffix`, or replace them by a value."""
    load = Step.load_state_dict

    def partial(self: Step, state):
        left = {key: state[key] for key in state if suffix not in key}
        if value:
            left |= {key: torch.full_like(state[key], value(self)) for key in state if suffix in key}
        load(self, left)

    Step.load_state_dict = partial


RESTORES = {
    "": lambda: None,
    "random position": without_random_position,
    "order": without_order,
    "scheduler": without_scheduler,
    "EMA": lambda: without_tensors("@ema/"),
    "D-Lion's d": lambda: without_tensors("|d", lambda step: step.stage.d0),
}


def apply(name: str) -> None:
    """Break the restores of this process."""
    RESTORES[name]()
