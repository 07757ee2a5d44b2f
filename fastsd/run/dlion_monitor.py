"""Warnings about D-Lion's d, which never decreases: if it is too small nothing is trained, if too large the model is ruined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastsd.config.stages import StageTable

STILL = 200  # steps by which d should have grown above d0
PLATEAU = 100  # a plateau lasts at least this many steps without growth, or a fifth of the steps so far if that is more
RISE = 1.1  # factor that counts as growth; growth after a plateau triggers a warning


class DLionMonitor:
    """Follows the d of one component through a stage's log rows and returns warnings for the user.

    Args:
        part: name of the component.
        stage: config of the stage, for its `d0`.
        rows: the rows the stage has logged so far.
    """

    def __init__(self, part: str, stage: StageTable, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.part, self.stage = part, stage
        self._told_still = False
        self._plateau = (0, 0.0)  # the step at which d last grew by RISE, and its value there
        for row in rows:
            self.row(row["stage_step"], row.get(f"d_{part}", row.get("d")) or 0.0)

    def row(self, step: int, d: float) -> list[str]:
        """Return the warnings for step number `step` of the stage. Each event is reported once."""
        warnings = []
        if step >= STILL and d <= self.stage.d0 and not self._told_still:
            self._told_still = True
            warnings.append(
                f"d of {self.part} is still d0 = {self.stage.d0:g} after {step} steps, so next to nothing is trained: raise d0 "
                "tenfold, or use lion with an lr of your own"
            )
        since, level = self._plateau
        if d > RISE * level:
            length = step - since
            if level > self.stage.d0 and length >= max(PLATEAU, step / 5):
                warnings.append(
                    f"d of {self.part} rises again, from {level:.3g} to {d:.3g} in step {step}, after a plateau of {length} "
                    f"steps: D-Lion may run away; watch the loss, or go back and set d_max = {level:.1g} or freeze_d_after"
                )
            self._plateau = (step, d)
        return warnings
