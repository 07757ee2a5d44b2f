"""The rule by which `fastsd init` chooses settings for a card. `tests/commands/test_init.py` compares them with the plan."""

from types import SimpleNamespace

import pytest

from fastsd.config.stages import StageTable
from fastsd.plan.fitting import fitting_stage

DLION, LION = (StageTable(train=["unet"], until=1, optimizer=name, lr=1e-5) for name in ("dlion", "lion"))


@pytest.mark.parametrize(
    "dlion, lion, chosen",
    [
        ((8, 16, 32), (32, 32, 32), ("dlion", 8, "none")),
        ((2, 4, 32), (32, 32, 32), ("dlion", 4, "ff")),
        ((0, 1, 2), (32, 32, 32), ("dlion", 2, "block")),
        ((1, 1, 1), (32, 32, 32), ("dlion", 1, "none")),
        ((0, 0, 0), (0, 2, 16), ("lion", 16, "block")),
    ],
)
def test_the_first_candidate_that_fits_is_chosen(dlion, lion, chosen, monkeypatch):
    """The level is the first that has room for four images per forward, or for the most."""
    sizes = {name: dict(zip(("none", "ff", "block"), row, strict=True)) for name, row in (("dlion", dlion), ("lion", lion))}

    def planned(shapes, stage, resolution, device_bytes, card):
        return SimpleNamespace(largest_micro_batch=lambda checkpointing: sizes[stage.optimizer][checkpointing])

    monkeypatch.setattr("fastsd.plan.fitting.plan_stage", planned)
    stage = fitting_stage(None, [DLION, LION], 512, 0)
    assert (stage.optimizer, stage.micro_batch, stage.checkpointing) == chosen
    sizes = {name: dict.fromkeys(("none", "ff", "block"), 0) for name in sizes}
    assert fitting_stage(None, [DLION, LION], 512, 0) is None
