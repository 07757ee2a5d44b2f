"""The settings that `fastsd init` chooses for a card."""

from dataclasses import replace

import pytest
from plan_check import SMALL

from fastsd.config.stages import StageTable
from fastsd.plan.fitting import ENOUGH, fitting_stage
from fastsd.plan.plan import LEVELS, plan_stage

pytestmark = pytest.mark.slow

LION = {"optimizer": "lion", "lr": 1e-5}
CANDIDATES = [
    StageTable(train=["unet"], until=1, batch=2, precision="bf16", **keys)
    for keys in ({}, LION, LION | {"fused_backward": True})
]


def test_the_first_candidate_that_fits_is_chosen(monkeypatch):
    """Its checkpointing level is the first with enough images per forward, and its micro-batch is the largest there."""
    shapes = replace(SMALL[0], unet=replace(SMALL[0].unet, block_out_channels=(32, 64), attention=(True, False)))
    plans = [plan_stage(shapes, stage, 64, 0) for stage in CANDIDATES]

    def reused(shapes, stage, resolution, device_bytes, card):
        plan = plans[CANDIDATES.index(stage)]
        plan.device_bytes = device_bytes
        return plan

    monkeypatch.setattr("fastsd.plan.fitting.plan_stage", reused)
    least = [min(plan.need(n, level).total for n in plan.micro_batches for level in LEVELS) for plan in plans]
    assert least == sorted(least, reverse=True)
    assert fitting_stage(shapes, CANDIDATES, 64, least[-1] - 1) is None
    for number, room in [*enumerate(least), (0, 1 << 40)]:
        stage = fitting_stage(shapes, CANDIDATES, 64, room)
        settings = {"micro_batch": stage.micro_batch, "checkpointing": stage.checkpointing}
        assert stage == CANDIDATES[number].model_copy(update=settings)
        sizes = {level: plans[number].largest_micro_batch(room, level) for level in LEVELS}
        assert stage.micro_batch == sizes[stage.checkpointing] > 0
        earlier = [sizes[level] for level in LEVELS[: LEVELS.index(stage.checkpointing)]]
        assert all(size < min(ENOUGH, max(sizes.values())) for size in earlier)
    assert stage.checkpointing == "none" and stage.micro_batch == 2
