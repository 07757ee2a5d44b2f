"""Floor 2: the learning rate of a step."""

from __future__ import annotations

from fastsd.config import StageTable


def learning_rate(stage: StageTable, step: int, total: int, part: str) -> float:
    """lr of a part in step `step` (from 0) of `total`: a linear warm-up, full at its last step, then constant."""
    warmup = stage.warmup_steps(total)
    rate = stage.rate_of(part)
    return rate * min(1.0, (step + 1) / warmup) if warmup else rate
