"""Saving of a run: which tensors a checkpoint holds, and which checkpoints are retained.

Read next: `fastsd/run/checkpoint.py`, which writes a checkpoint so that a crash loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastsd.config.schema import Config, dump_config
from fastsd.config.stages import COMPONENTS
from fastsd.model.model import Model
from fastsd.model.weights import ADAPTER
from fastsd.run import checkpoint
from fastsd.run.cost import CostRecorder
from fastsd.run.position import Position
from fastsd.run.report import TrainReport
from fastsd.run.smoothed_loss import SmoothedLoss
from fastsd.train.step import Step


@dataclass
class Saving:
    """Writes the checkpoints of a run.

    Attributes:
        state: tensors, read lazily, from which the next stage to start loads its optimizer state: those of the checkpoint that
            the run resumed from, or of the end of a stage whose successor has state = "carry". Empty once they are loaded.
        changed: components whose weights differ from those in the newest checkpoint.
        kept: names of checkpoints of older versions that are never deleted. Newer ones say so themselves.
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
        files = [self.folder / name for name in ("kept.json", "stage-ends.json")]
        self.kept: set[str] = {name for path in files for name in _read_names(path)}

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
            args = folder, progress, self.model, weights, self.changed, state, adapters
            path = checkpoint.save(*args, config=dump_config(self.config), keep=done or keep)
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
        if done:
            try:
                self.cost.record(progress)
            except OSError as error:
                console.warn(f"cost of the stage not written to {self.folder}: {error.strerror}; training continues")
        self.retain(step.stage.keep_checkpoints)
        return True

    def retain(self, keep_checkpoints: int) -> None:
        """Delete old checkpoints, also those that an interrupted run has left."""
        checkpoint.retain(self.folder / "checkpoints", keep_checkpoints, self.kept)


def _read_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
