"""Saving of a run: which tensors a checkpoint holds, and which checkpoints are retained.

Read next: `fastsd/run/checkpoint.py`, which writes a checkpoint so that a crash loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastsd.config.schema import Config
from fastsd.config.stages import COMPONENTS
from fastsd.model.model import Model
from fastsd.model.weights import ADAPTER
from fastsd.run import checkpoint
from fastsd.run.cost import CostRecorder
from fastsd.run.position import Position
from fastsd.run.report import TrainReport
from fastsd.run.smoothed_loss import SmoothedLoss
from fastsd.storage import replace_file
from fastsd.train.step import Step


@dataclass
class Saving:
    """Writes the checkpoints of a run.

    Attributes:
        state: tensors, read lazily, from which the next stage to start loads its optimizer state: those of the checkpoint that
            the run resumed from, or of the end of a stage whose successor has state = "carry". Empty once they are loaded.
        changed: components whose weights differ from those in the newest checkpoint.
        kept: names of the checkpoints that are never deleted: ends of stages, and requested ones.
    """

    config: Config
    model: Model
    position: Position
    smoothed: SmoothedLoss
    report: TrainReport
    cost: CostRecorder
    state: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.folder = Path(self.config.run)
        self.changed: set[str] = set()
        files = [self.folder / name for name in ("kept.json", "stage-ends.json")]  # older versions wrote the second
        self.kept: set[str] = {name for path in files if path.exists() for name in json.loads(path.read_text())}

    def save(self, step: Step, *, done: bool, keep: bool) -> bool:
        """Commit a checkpoint. Return False, after a warning, if it cannot be written.

        Args:
            done: True if the stage is complete.
            keep: True if the checkpoint must never be deleted.
        """
        self.position.mark_done(done=done)
        progress, console = self.position.progress, self.report.console
        folder = self.folder / "checkpoints"
        later_stages = self.config.stage[progress.stage + 1 :]
        carried = bool(later_stages) and later_stages[0].state == "carry"
        state = self.smoothed.state_dict() | step.state_dict(optimizers=not done or not later_stages or carried)
        components = step.components
        # `dict` returns no weights: of a component that the step does not use, the checkpoint takes those of the model.
        weights = dict.fromkeys(COMPONENTS, dict) | {name: component.state for name, component in components.items()}
        try:
            self.report.flush()
            adapters = {name: component.state(ADAPTER) for name, component in components.items()} if self.model.lora else None
            path = checkpoint.save(folder, progress, self.model, weights, self.changed, state, adapters)
        except OSError as error:
            console.warn(
                f"checkpoint at step {progress.step} not saved to {folder}: {error.strerror or error}; "
                "training continues and earlier checkpoints are kept"
            )
            return False

        self.changed = set()
        self.report.saved()
        if done and carried:
            self.state = checkpoint.load_state(path)
        self.kept |= {path.name} if done or keep else set()
        try:
            replace_file(self.folder / "kept.json", json.dumps(sorted(self.kept)))
            if done:
                self.cost.record(progress)
        except OSError as error:
            console.warn(f"{path.name} saved, but not recorded in {self.folder}: {error.strerror}; training continues")
        checkpoint.retain(folder, step.stage.keep_checkpoints, self.kept)
        return True
