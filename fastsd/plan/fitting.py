"""The settings of a stage that fit a card, chosen from `plan.py`'s own figures. Used by `fastsd init`."""

from __future__ import annotations

from collections.abc import Iterable

from fastsd.config.stages import StageTable
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import LEVELS, plan_stage
from fastsd_kernels.cards import Card

ENOUGH = 4  # images per forward; on an RTX 3090, as many at "none" are predicted to be as fast as twice as many at "ff"


def fitting_stage(
    shapes: Shapes, candidates: Iterable[StageTable], resolution: int, device_bytes: int, card: Card | None = None
) -> StageTable | None:
    """Return the first of `candidates` that fits, with its largest micro-batch. Arguments are as of `plan_stage`.

    The checkpointing level is the first that leaves room for `ENOUGH` images per forward, or for the most.

    Returns:
        The candidate with `micro_batch` and `checkpointing` set; None if no candidate fits.
    """
    for stage in candidates:
        plan = plan_stage(shapes, stage.model_copy(update={"until": 1}), resolution, device_bytes, card=card)
        if not plan.largest_micro_batch(checkpointing=LEVELS[-1]):  # the least memory
            continue
        largest = {level: plan.largest_micro_batch(checkpointing=level) for level in LEVELS}
        fewest = min(ENOUGH, max(largest.values()))
        level = next(level for level, size in largest.items() if size >= fewest)
        return stage.model_copy(update={"micro_batch": largest[level], "checkpointing": level})
    return None
