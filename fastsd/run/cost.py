"""RUN/cost.json: the cost of a run's stages, for `fastsd compare` and the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastsd.config.schema import Config
from fastsd.run.checkpoint import RunProgress
from fastsd.run.folder import read_costs
from fastsd.run.report import memory_gb
from fastsd.storage import replace_file


class CostRecorder:
    """Records the steps, images, seconds and memory of each stage.

    Args:
        parameter_counts: number of parameters that each stage trains.

    Attributes:
        sample_seconds: seconds per sampled image in the most recent grid; None before the first grid.
    """

    def __init__(self, config: Config, parameter_counts: Sequence[int], device: torch.device) -> None:
        self.config, self.parameter_counts, self.device = config, parameter_counts, device
        self.path = Path(config.run) / "cost.json"
        self.sample_seconds: float | None = None

    def record(self, progress: RunProgress, **totals: int) -> None:
        """Record the cost of the current stage so far, or `totals` of the whole run. Raises OSError if the disk is full."""
        cost = read_costs(self.path.parent)
        if progress.stage_step and not totals:
            name = self.config.stage_name(progress.stage)
            images = progress.stage_step * self.config.stage[progress.stage].batch
            stage_cost = {"name": name, "trained": self.parameter_counts[progress.stage], "steps": progress.stage_step}
            stage_cost |= {"images": images, "seconds": progress.seconds, "memory_gb": memory_gb(self.device)}
            cost["stages"] = [other for other in cost["stages"] if other["name"] != name] + [stage_cost]
        if self.sample_seconds:
            cost["sample_seconds"] = self.sample_seconds
        replace_file(self.path, json.dumps(cost | totals, indent=2))
