"""The state of an optimizer as named tensors, as a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastsd_kernels.optim import FastOptimizer

Views = Callable[[Tensor], list[Tensor]]


def flat_state(optimizer: FastOptimizer, names: Sequence[str], views: Views | None = None) -> dict[str, Tensor]:
    """Return the optimizer state as named tensors, for safetensors.

    Args:
        names: names of the parameters in the order of `optimizer.param_groups`, or of the parameters in an arena.
        views: splits a tensor in the layout of an arena into one view per name; None = the parameter is not an arena.

    Returns:
        "<slot>/<name>" for each slot of the optimizer, fp32 in the parameter's shape, and zeros if the parameter never had a
        gradient. D-Lion also has "d" and "numerator_weighted", fp64 0-dim, and AdamW "step", fp32, one number per parameter or
        arena. Only "step" is a copy: write or clone the other tensors before the next step.

    Raises:
        ValueError: `names` has duplicates or does not match the number of parameters.
    """
    states = [optimizer._state_of(p) for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}
    for slot in optimizer.slots:
        slot_tensors = [state[slot] for state in states] if views is None else views(states[0][slot])
        if len(set(names)) != len(slot_tensors) or len(names) != len(slot_tensors):
            counts = f"{len(set(names))} distinct names for {len(slot_tensors)} parameters"
            raise ValueError(f"optimizer state: {counts}; give one name per parameter")
        tensors |= {f"{slot}/{name}": tensor for name, tensor in zip(names, slot_tensors, strict=True)}
    return tensors | optimizer.extra_state()


@torch.no_grad()
def load_flat_state(
    optimizer: FastOptimizer, names: Sequence[str], tensors: Mapping[str, Tensor], views: Views | None = None
) -> None:
    """Restore the state bit by bit from the tensors of `flat_state`, on any device. An error leaves it unchanged.

    Raises:
        ValueError: an entry is missing, unexpected, or of another shape or dtype; or `names` is invalid as in `flat_state`.
    """
    expected = flat_state(optimizer, names, views)
    advice = f"load a state of {optimizer.name} for the same parameters"
    entries = {"missing": expected.keys() - tensors.keys(), "unexpected": tensors.keys() - expected.keys()}
    for problem, keys in entries.items():
        if keys:
            raise ValueError(f"optimizer state: {min(keys)!r} is {problem} ({len(keys)} {problem} in total); {advice}")
    for key, target in expected.items():
        loaded = tensors[key]
        if loaded.shape != target.shape or loaded.dtype != target.dtype:
            actual, needed = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (loaded, target))
            raise ValueError(f"optimizer state: {key!r} is {actual}, expected {needed}; {advice}")
    for key, target in expected.items():
        target.copy_(tensors[key])
    optimizer.load_extra_state(tensors)
