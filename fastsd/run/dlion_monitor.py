"""Warnings about D-Lion's d, which never decreases: if it is too small nothing is trained, if too large the model is ruined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastsd.config.stages import StageTable

GROWTH_DEADLINE = 200  # steps by which d should have grown above d0
PLATEAU = 100  # a plateau lasts at least this many steps without growth, or a fifth of the steps so far if that is more
RISE = 1.1  # factor that counts as growth; growth after a plateau triggers a warning


class DLionMonitor:
    """Follows the d of one component through a stage's log rows and returns warnings for the user.

    Args:
        component: its name.
        stage: config of the stage, for its `d0`.
        rows: the rows the stage has logged so far.
    """

    def __init__(self, component: str, stage: StageTable, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.component, self.stage = component, stage
        self._warned_no_growth = False
        self._plateau = (0, 0.0)  # the step at which d last grew by RISE, and its value there
        for row in rows:
            self.row(row["stage_step"], row.get(f"d_{component}", row.get("d")) or 0.0)

    def row(self, step: int, d: float) -> list[str]:
        """Return the warnings for step number `step` of the stage. Each event is reported once."""
        warnings = []
        if step >= GROWTH_DEADLINE and d <= self.stage.d0 and not self._warned_no_growth:
            self._warned_no_growth = True
            warnings.append(
                f"d of {self.component} is still d0 = {self.stage.d0:g} after {step} steps, so almost nothing is trained; "
                "start a new run with d0 ten times larger, or with optimizer lion and a fixed lr"
            )
        plateau_start, plateau_d = self._plateau
        if d > RISE * plateau_d:
            length = step - plateau_start
            if plateau_d > self.stage.d0 and length >= max(PLATEAU, step / 5):
                warnings.append(
                    f"d of {self.component} rose from {plateau_d:.3g} to {d:.3g} at step {step} after a plateau of {length} "
                    "steps, so D-Lion may diverge; watch the loss, or resume from an earlier checkpoint "
                    f"with d_max = {plateau_d:.1g} or freeze_d_after"
                )
            self._plateau = (step, d)
        return warnings
