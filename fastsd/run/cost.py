"""RUN/cost.json: the cost of a run's stages, for `fastsd compare` and the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastsd.config.schema import Config
from fastsd.run.checkpoint import RunProgress
from fastsd.run.folder import read_costs
from fastsd.run.report import memory_gb
from fastsd.storage import replace_file
from fastsd.terminal.console import Console


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

    def of_complete_stage(self, progress: RunProgress) -> list[dict[str, Any]]:
        """Return `progress.costs` with the current stage, over all starts. `changes` are those of its settings."""
        name, index = self.config.stage_name(progress.stage), progress.stage
        images = progress.stage_step * self.config.stage[index].batch
        cost = {"name": name, "trained": self.parameter_counts[index], "steps": progress.stage_step, "images": images}
        cost |= {"seconds": progress.seconds, "memory_gb": memory_gb(self.device)}
        if changes := [change for change in progress.changes if change["stage"] == index]:
            cost["changes"] = [{key: value for key, value in change.items() if key != "stage"} for change in changes]
        return [other for other in progress.costs if other["name"] != name] + [cost]

    def record(self, progress: RunProgress, console: Console, **totals: int) -> None:
        """Write the file again from a checkpoint's `costs`, with `totals` of the whole run. If this fails, warn and go on."""
        cost = read_costs(self.path.parent)
        # An older version has written stages that are not in its checkpoints.
        names = {self.config.stage_name(index) for index in range(progress.stage + progress.stage_done)}
        stages = {row["name"]: row for row in cost["stages"] if row["name"] in names}
        cost["stages"] = list((stages | {row["name"]: row for row in progress.costs}).values())
        if self.sample_seconds:
            cost["sample_seconds"] = self.sample_seconds
        if not (self.path.parent / "model").is_dir():
            cost.pop("file_bytes", None)
        try:
            replace_file(self.path, json.dumps(cost | totals, indent=2))
        except OSError as error:
            console.warn(f"cost of the stages not written to {self.path.parent}: {error.strerror}; training continues")
