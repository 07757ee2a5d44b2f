"""An eye on D-Lion's d, which never falls: too small it trains nothing, too large it ruins the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastsd.config.stages import StageTable

STILL = 200  # steps within which d should have left d0
PLATEAU = 100  # steps without growth that make a plateau, or a fifth of those so far
RISE = 1.1  # growth after a plateau that is warned of


class DWatch:
    """Follows the d of one part through a stage's log rows and says what its user should know.

    Args:
        part: whose d it is.
        stage: its d0, and the guards to recommend.
        rows: of the log, what the stage has logged so far.
    """

    def __init__(self, part: str, stage: StageTable, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self.part, self.stage = part, stage
        self._told_still = False
        self._plateau = (0, 0.0)  # the step since when d has not grown by RISE, and its value then
        for row in rows:
            self.row(row["stage_step"], row.get(f"d_{part}", row.get("d")) or 0.0)

    def row(self, step: int, d: float) -> list[str]:
        """Warnings that step number `step` of the stage gives rise to, each of them once."""
        said = []
        if step >= STILL and d <= self.stage.d0 and not self._told_still:
            self._told_still = True
            said.append(
                f"d of {self.part} is still d0 = {self.stage.d0:g} after {step} steps, so next to nothing is trained: raise d0 "
                "tenfold, or use lion with an lr of your own"
            )
        since, level = self._plateau
        if d > RISE * level:
            length = step - since
            if level > self.stage.d0 and length >= max(PLATEAU, step / 5):
                said.append(
                    f"d of {self.part} rises again, from {level:.3g} to {d:.3g} in step {step}, after a plateau of {length} "
                    f"steps: D-Lion may run away; watch the loss, or go back and set d_max = {level:.1g} or freeze_d_after"
                )
            self._plateau = (step, d)
        return said
