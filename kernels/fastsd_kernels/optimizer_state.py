"""The state of an optimizer as named tensors, as a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastsd_kernels.optim import FastOptimizer

Views = Callable[[Tensor], list[Tensor]]
Whole = Callable[[list[Tensor]], Tensor]
Write = Callable[[list[Tensor], int, Tensor], None]


def _only(tensors: list[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


def _first(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def flat_state(
    optimizer: FastOptimizer, names: Sequence[str], views: Views | None = None, whole: Whole = _only
) -> dict[str, Tensor]:
    """Return the optimizer state as named tensors, for safetensors.

    Args:
        names: names of the parameters in the order of `optimizer.param_groups`, or of the parameters in an arena.
        views: splits a tensor in the layout of an arena into one view per name; None = the parameter is not an arena.
        whole: joins the tensors of all parameters to one in the layout of the arena, of which they are pieces.

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
        slot_tensors = [state[slot] for state in states] if views is None else views(whole([state[slot] for state in states]))
        if len(set(names)) != len(slot_tensors) or len(names) != len(slot_tensors):
            counts = f"{len(set(names))} distinct names for {len(slot_tensors)} parameters"
            raise ValueError(f"optimizer state: {counts}; give one name per parameter")
        tensors |= {f"{slot}/{name}": tensor for name, tensor in zip(names, slot_tensors, strict=True)}
    extras = optimizer.extra_state()
    # Pieces of an arena have made equally many steps.
    return tensors | (extras if views is None else {key: extra[:1] if extra.ndim else extra for key, extra in extras.items()})


@torch.no_grad()
def load_flat_state(
    optimizer: FastOptimizer,
    names: Sequence[str],
    tensors: Mapping[str, Tensor],
    views: Views | None = None,
    write: Write | None = None,
) -> None:
    """Restore the state bit by bit from the tensors of `flat_state`, on any device. An error leaves it unchanged.

    Args:
        optimizer, names, views: as for `flat_state`.
        write: called with the tensors of all parameters, the number of a name and its tensor, to write that tensor into the
            pieces of an arena; `views` then gives shapes only.

    Raises:
        ValueError: an entry is missing, unexpected, or of another shape or dtype; or `names` is invalid as in `flat_state`.
    """
    expected = flat_state(optimizer, names, views, _only if write is None else _first)
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
    if write is None:
        for key, target in expected.items():
            target.copy_(tensors[key])
        return optimizer.load_extra_state(tensors)
    states = [optimizer._state_of(p) for group in optimizer.param_groups for p in group["params"]]
    for slot in optimizer.slots:
        slot_tensors = [state[slot] for state in states]
        for i, name in enumerate(names):
            write(slot_tensors, i, tensors[f"{slot}/{name}"])
    optimizer.load_extra_state({key: tensors[key].expand_as(extra) for key, extra in optimizer.extra_state().items()})
