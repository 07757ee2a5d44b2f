"""Saving of a run: which tensors a checkpoint holds, when they are written, and which checkpoints are retained.

Read next: `fastsd/run/checkpoint.py`, which writes a checkpoint so that a crash loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread

from torch import Tensor

from fastsd.config.schema import Config, dump_config
from fastsd.config.stages import COMPONENTS
from fastsd.data.validation_split import ValidationSplits
from fastsd.model.formats.adapters import Averages
from fastsd.model.formats.write import DTYPE
from fastsd.model.model import Model
from fastsd.model.weights import ADAPTER
from fastsd.run import checkpoint
from fastsd.run.checkpoint import RunProgress
from fastsd.run.cost import CostRecorder
from fastsd.run.loss_health import LossHealth
from fastsd.run.position import Position
from fastsd.run.report import TrainReport
from fastsd.run.smoothed_loss import SmoothedLoss
from fastsd.run.snapshots import SNAPSHOTS, remove_later, write_snapshot
from fastsd.storage import replace_file
from fastsd.terminal.texts import size_text
from fastsd.train.memory import main_memory
from fastsd.train.ranks import ALONE, Ranks, RanksOutOfMemory
from fastsd.train.step import Step
from fastsd.train.trainable import host_copy

_RESERVE = 2 << 30  # bytes of main memory that stay free beside the copies


@dataclass
class Content:
    """The tensors of a checkpoint, as `checkpoint.save` takes them."""

    weights: Mapping[str, Callable[[], Mapping[str, Tensor]]]
    changed: set[str]
    state: Mapping[str, Tensor]
    adapters: Averages | None


@dataclass
class Saving:
    """Writes the checkpoints of a run in a thread, while training goes on. Ranks other than 0 write none.

    Everything that a checkpoint holds is first copied to main memory. If there is no room for the copies, training waits. It
    also waits for a run's first checkpoint and at the end of a stage. A crash during the writing costs only that checkpoint.

    Attributes:
        state: tensors, read lazily, from which the next stage to start loads its optimizer state: those of the checkpoint that
            the run resumed from, or of the end of a stage whose successor has state = "carry". Empty once they are loaded.
        sets: the images of validation, which each checkpoint keeps.
        changed: components whose weights differ from those in the newest checkpoint.
        kept: names of checkpoints that are never deleted, besides those that say so themselves.
    """

    config: Config
    model: Model
    position: Position
    smoothed: SmoothedLoss
    health: LossHealth
    report: TrainReport
    cost: CostRecorder
    state: Mapping[str, Tensor]
    sets: ValidationSplits
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.folder = Path(self.config.run)
        self.changed: set[str] = set()
        files = [self.folder / name for name in ("kept.json", "stage-ends.json")]
        self.kept: set[str] = {name for path in files for name in _read_names(path)}
        self._saved_step = self.position.progress.step if self.state else None
        if self.ranks.main:
            remove_later(self.folder, self.position.progress.step)
        self._writer: Thread | None = None
        self._error: Exception | None = None  # a bug, which ended the thread
        self._warned = False
        self._warned_health = False

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:  # which asks for an end at once
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writer:
            self._writer.join()
            self._writer = None
            if self._error:
                raise self._error

    @property
    def is_saved(self) -> bool:
        """True if the latest step has a checkpoint. If it is being written, wait for it."""
        self.finish()
        return self._saved_step == self.position.progress.step

    def save(self, step: Step, *, keep: bool, wait: bool = False) -> None:
        """Write a checkpoint of the latest step. If this fails, warn and go on.

        Args:
            keep: True if the checkpoint must never be deleted.
            wait: True to return only when it is written.
        """
        self.finish()
        complete = self.position.progress.stage_done
        optimizers = not complete or self._continues(self.position.progress)
        try:
            step_state = step.state_dict(optimizers=optimizers) if self.ranks.main or step.sharded else {}
        except RanksOutOfMemory as error:
            return self._warn(self.position.progress, self.changed, str(error))
        if not self.ranks.main:
            self._saved_step, self.changed = self.position.progress.step, set()
            if self._passes_on(self.position.progress):
                self.state = checkpoint.load_state(self.folder / "checkpoints" / self.ranks.text())
            return
        if complete:
            self.position.progress = replace(self.position.progress, costs=self.cost.of_complete_stage(self.position.progress))
        progress, components = replace(self.position.progress, healthy=self._check_health()), step.components
        # `dict` returns no weights: of a component that the step does not use, the checkpoint takes those of the model.
        weights: dict[str, Callable[[], Mapping[str, Tensor]]] = dict.fromkeys(COMPONENTS, dict)
        weights |= {name: component.state for name, component in components.items()}
        state = self.smoothed.state_dict() | self.health.state_dict() | self.sets.state_dict() | step_state
        adapters = {name: component.state(ADAPTER) for name, component in components.items()} if self.model.lora else None
        content = Content(weights, self.changed, state, adapters)
        self.changed = set()
        try:
            self.report.flush()
        except OSError as error:
            return self._warn(progress, content.changed, error.strerror or str(error))

        progress = replace(progress, logs=self.report.digests())
        args = progress, content, step.stage.keep_checkpoints
        # What was gathered in main memory for this checkpoint. The other state is small, and changes with the next step.
        private = {name for name, tensor in step_state.items() if step.sharded and tensor.ndim and "/" in name}
        first = not checkpoint.checkpoints(self.folder / "checkpoints")
        waits = wait or first or progress.stage_done or not content.changed <= components.keys()
        if waits or not self._has_room(content, private):
            self._write(*args, keep=keep)
        else:
            content.weights = {name: partial(dict, components[name].state(copy=True)) for name in content.changed}
            content.weights = weights | content.weights
            content.state = {name: tensor if name in private else host_copy(tensor) for name, tensor in state.items()}
            if adapters:
                content.adapters = {name: components[name].state(ADAPTER, copy=True) for name in adapters}
            self._writer = Thread(target=self._write_in_thread, args=args, kwargs={"keep": keep}, daemon=True)
            self._writer.start()

    def snapshot(self, step: Step) -> None:
        """Store the averages after the latest step, for `fastsd average`. If this fails, warn and go on."""
        progress = self.position.progress
        try:
            state = step.average_state() if self.ranks.main or step.sharded else {}
            if self.ranks.main:
                dtype = DTYPE[step.stage.ema_snapshot_dtype]
                write_snapshot(self.folder, state, dtype, progress.step, progress.first_averaged)
        except (OSError, RanksOutOfMemory) as error:
            reason = getattr(error, "strerror", None) or error
            self.report.console.warn(
                f"averages after step {progress.step} not stored in {self.folder / SNAPSHOTS}: {reason}; "
                "training continues, and averages of other lengths will be less exact"
            )

    def _check_health(self) -> bool:
        """Return True if the run is healthy. Warn the first time that it is not."""
        problem = self.health.problem()
        if problem and not self._warned_health:
            self.report.console.warn(
                f"checkpoint at step {self.position.progress.step} is not healthy, because {problem}; the last healthy one is "
                "kept until there is another"
            )
        self._warned_health = problem is not None
        return problem is None

    def _continues(self, progress: RunProgress) -> bool:
        """Return True if a complete stage's optimizer state may be needed: by an extension of it, or by the next stage."""
        later_stages = self.config.stage[progress.stage + 1 :]
        return not later_stages or later_stages[0].state == "carry"

    def _passes_on(self, progress: RunProgress) -> bool:
        """Return True if the optimizer state of a complete stage goes to the next one."""
        return progress.stage_done and progress.stage + 1 < len(self.config.stage) and self._continues(progress)

    def _has_room(self, content: Content, private: Set[str]) -> bool:
        """Return True if main memory has room for copies of all but `private` state. Warn the first time that it has not."""
        parameters = [parameter for name in content.changed for parameter in self.model.component(name).parameters()]
        needed = sum(4 * parameter.numel() for parameter in parameters)  # in fp32
        needed += sum(t.numel() * t.element_size() for name, t in content.state.items() if name not in private)
        free = max(0, main_memory() - _RESERVE)
        if needed > free and not self._warned:
            self._warned = True
            self.report.console.warn(
                f"training waits while a checkpoint is written, because its copy needs {size_text(needed)} of main memory, "
                f"and {size_text(free)} is free"
            )
        return needed <= free

    def _write_in_thread(self, progress: RunProgress, content: Content, keep_checkpoints: int, *, keep: bool) -> None:
        try:
            self._write(progress, content, keep_checkpoints, keep=keep)
        except Exception as error:
            self._error = error

    def _write(self, progress: RunProgress, content: Content, keep_checkpoints: int, *, keep: bool) -> None:
        try:
            args = (
                self.folder / "checkpoints",
                progress,
                self.model,
                content.weights,
                content.changed,
                content.state,
                content.adapters,
            )
            path = checkpoint.save(*args, config=dump_config(self.config), keep=keep)
        except OSError as error:
            return self._warn(progress, content.changed, error.strerror or str(error))
        self._saved_step = progress.step
        self.report.saved()
        if progress.stage_done:
            if self._passes_on(progress):
                self.state = checkpoint.load_state(path)
                self.ranks.text(path.name)
            self.cost.record(progress, self.report.console)
        self.retain(keep_checkpoints)

    def _warn(self, progress: RunProgress, changed: set[str], reason: str) -> None:
        self.changed = self.changed | changed
        self.report.console.warn(
            f"checkpoint at step {progress.step} not saved to {self.folder / 'checkpoints'}: {reason}; "
            "training continues and earlier checkpoints are kept"
        )

    def keep_for_good(self, name: str) -> None:
        """Keep a checkpoint that turned out to be the end of a stage after it was written."""
        self.kept.add(name)
        replace_file(self.folder / "kept.json", json.dumps(sorted(self.kept)))

    def retain(self, keep_checkpoints: int) -> None:
        """Delete old checkpoints, also those that an interrupted run has left."""
        checkpoint.retain(self.folder / "checkpoints", keep_checkpoints, self.kept)


def _read_names(path: Path) -> list[str]:
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
