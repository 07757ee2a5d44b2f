"""Warnings about D-Lion's d. It never decreases: with too small a d nothing is trained, and too large a d ruins the model."""

from __future__ import annotations

from collections.abc import Iterable

from fastsd.config.stages import StageTable
from fastsd.run.folder import LogRow

GROWTH_DEADLINE = 200  # steps by which d should have grown above d0
PLATEAU = 100  # shortest plateau, in steps without growth; a fifth of the steps so far if that is more
RISE = 1.1  # d has grown if it rose by this factor


class DLionMonitor:
    """Follows the d of one component through a stage's log rows and returns warnings for the user.

    Args:
        component: name of the component.
        stage: config of the stage, which sets `d0`.
        rows: rows that the stage has logged so far.
    """

    def __init__(self, component: str, stage: StageTable, rows: Iterable[LogRow] = ()) -> None:
        self.component, self.stage = component, stage
        self._warned_no_growth = False
        self._last_growth = (0, 0.0)  # the step at which d last grew by RISE, and d after it
        for row in rows:
            self.row(row["stage_step"], row.get(f"d_{component}", row.get("d")) or 0.0)

    def row(self, step: int, d: float) -> list[str]:
        """Return the warnings for `d` in step `step` of the stage. Each event is reported once."""
        warnings = []
        if step >= GROWTH_DEADLINE and d <= self.stage.d0 and not self._warned_no_growth:
            self._warned_no_growth = True
            warnings.append(
                f"d of {self.component} is still d0 = {self.stage.d0:g} after {step} steps, so almost nothing is trained; "
                "start a new run with d0 ten times larger, or with optimizer lion and a fixed lr"
            )
        plateau_start, plateau_d = self._last_growth
        if d > RISE * plateau_d:
            length = step - plateau_start
            if plateau_d > self.stage.d0 and length >= max(PLATEAU, step / 5):
                warnings.append(
                    f"d of {self.component} rose from {plateau_d:.3g} to {d:.3g} at step {step} after a plateau of {length} "
                    "steps, so D-Lion may diverge; watch the loss, or resume from an earlier checkpoint "
                    f"with d_max = {plateau_d:.1g} or freeze_d_after"
                )
            self._last_growth = (step, d)
        return warnings
