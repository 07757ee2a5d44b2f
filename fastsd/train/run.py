"""Floor 3: a run - its folder, its model, its cache, where it stands - opened anew or from its newest checkpoint.

Read next: `fastsd/train/loop.py`, which moves it forward.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from fastsd.config import Config, StageTable, dump_config
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.held_out import choose_sets
from fastsd.data.loader import Loader
from fastsd.data.states import States
from fastsd.data.tokens import Tokens
from fastsd.errors import UserError
from fastsd.model.adapted import load_to_train
from fastsd.model.files import Model
from fastsd.model.select import changed_parts, reinitialise, selected, size_of
from fastsd.model.shapes import Shapes
from fastsd.model.weights import ADAPTER
from fastsd.plan import SCRATCH, plan_stage
from fastsd.sample import check_samples, read_prompts, sample_grid, save_grid
from fastsd.stages import ENDLESS, PARTS
from fastsd.storage import replace_file
from fastsd.train import checkpoint
from fastsd.train.checkpoint import Progress
from fastsd.train.export import bytes_of, export
from fastsd.train.optim import flat_state, load_flat_state
from fastsd.train.precision import choose_device, choose_ops, describe_ops, set_precision
from fastsd.train.report import Report, free_memory, memory_gb
from fastsd.train.restart import compare_images, compare_with_start, lock
from fastsd.train.schedule import check_length
from fastsd.train.step import Step, StepResult
from fastsd.train.validation import Validation

_STATE = {"reset": "begins anew", "carry": "carried over from the stage before"}
Result = TypeVar("Result")
SMOOTHING = 0.99  # of the smoothed loss: about the last 100 steps


class Run:
    """Everything that outlives a stage.

    Args:
        config: the resolved config.
        console: where the report goes.

    Raises:
        UserError: whatever must be changed before training can start or go on.
    """

    def __init__(self, config: Config, console: Console) -> None:
        self.config, self.folder = config, Path(config.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder)
        self.device = choose_device(config.device)
        self.ops = choose_ops(config.kernels, self.device)
        notes: list[str] = []
        found = checkpoint.newest(self.folder / "checkpoints", notes.append)
        notes += compare_with_start(self.folder / "config.json", config, found[1] if found else None)
        self.progress = found[1] if found else Progress()
        self.saved: Mapping[str, Tensor] = checkpoint.load_state(found[0]) if found else {}
        table = config.model
        if found:
            # The checkpoint is a whole model; the base need not be there any more.
            table = table.model_copy(update={"base": str(found[0]), "vae": "", "tokenizer": "", "vae_scaling_factor": None})
        self.model: Model = load_to_train(table, self.ops, config.seed, found[0] if found else None)
        notes += self.model.notes
        check_samples(self.model, config)
        self.cache = LatentCache.open(config.cache.dir, view_name(config, self.model.vae.hash))
        notes += compare_images(self.folder / "images.json", self.cache, resumed=found is not None)
        self.tokens: Tokens | None = None
        try:
            self.tokens = Tokens(self.cache, self.model.text.tokenizer, self.model.text.window, self.model.text.chunks)
        except UserError as error:
            notes.append(f"captions are tokenized on the way: {error}")
        self.states = States(config.cache, self.cache, self.model.text) if config.cache.hidden_states else None
        # What the step needs: with states that are cached, no text encoder.
        self.resident = [self.model.unet, self.model.vae.module] + ([] if self.states else [self.model.text.module])
        self.sets = choose_sets(self.cache, config)
        # An epoch of each stage; they differ only where stages divide captions into tags differently.
        self.images = [self.loader(index).images for index in range(len(config.stage))]
        names = [config.stage_name(index) for index in range(len(config.stage))]
        self.steps = [check_length(*of) for of in zip(config.stage, names, self.images, strict=True)]
        self.trained = [self._parameters(index) for index in range(len(config.stage))]
        self.validation = Validation(self.model, self.loader(0), self.sets, config.validate_)
        for module in self.resident:
            module.to(self.device)
        replace_file(self.folder / "config.json", dump_config(config))
        saved_at = found[0].stat().st_mtime if found else None
        self.report = Report(self.folder, config.log, self.progress.step, saved_at, console)
        self.notes = notes
        self.smooth = [
            self.saved.get(key, torch.zeros((), dtype=torch.float64)).to(self.device, copy=True) for key in ("loss", "weight")
        ]
        self.changed: set[str] = set()
        # Names of the checkpoints that stay: stage ends, and those that were asked for. stage-ends.json is of older versions.
        noted = [self.folder / name for name in ("kept.json", "stage-ends.json")]
        self.kept: set[str] = {name for path in noted if path.exists() for name in json.loads(path.read_text())}
        self.sample_seconds: float | None = None  # an image, last measured
        self.started = time.monotonic()

    def _parameters(self, index: int) -> int:
        """How many numbers a stage trains. Raises UserError for a part that is none."""
        stage, said = self.config.stage[index], f"stage {self.config.stage_name(index)!r}"
        selected(self.model, stage.reinit, f"{said}: reinit")
        return size_of(self.model, selected(self.model, stage.train, f"{said}: train"))

    def seconds_left(self, speed: float) -> float:
        """Of all stages, at a speed in steps a second."""
        here, left = self.progress, 0.0
        for index in range(here.stage, len(self.steps)):
            begun, limit = index == here.stage, self.config.stage[index].seconds
            if limit is not None:
                left += max(limit - (self.elapsed() if begun else 0), 0)
            else:
                left += (self.steps[index] - (here.stage_step if begun else 0)) / speed
        return left

    def elapsed(self) -> float:
        """Seconds that the stage has run, over all starts."""
        return self.progress.seconds + time.monotonic() - self.started

    def at_end(self, index: int) -> bool:
        """Whether the stage that runs has all its steps, or its time."""
        limit = self.config.stage[index].seconds
        return self.progress.stage_step >= self.steps[index] or (limit is not None and self.elapsed() >= limit)

    def finished(self, index: int) -> bool:
        """Whether a stage needs no more steps. The last one can be made longer, for its end keeps the optimizer's state."""
        here = self.progress
        longer = index == len(self.steps) - 1 and not self.at_end(index) and "skipped" in self.saved
        return here.stage > index or (here.stage == index and here.stage_done and not longer)

    def start_stage(self, index: int) -> Step:
        """Make the stage's parts and optimizers, with the state of the checkpoint if the run was in the middle of it, or of
        the stage before if that is carried over."""
        stage, name, here = self.config.stage[index], self.config.stage_name(index), self.progress
        resumed = here.stage == index and here.stage_step > 0
        if not resumed:
            carried = here.carried + here.stage_step if stage.state == "carry" else 0
            self.progress = replace(
                here, stage=index, stage_step=0, stage_images=here.images, stage_done=False, seconds=0.0, carried=carried
            )
        self.started = time.monotonic()
        self.model.unet.checkpointing = stage.checkpointing
        said = set_precision(stage.precision, self.model.unet, self.config.deterministic)
        state = f"; optimizer state: {_STATE[stage.state]}" if index else ""
        self.report.say(f"{name}: {said}{state}")
        if stage.reinit and not resumed:
            drawn = reinitialise(self.model, stage.reinit, self.config.seed, f"stage {name!r}: reinit")
            self.changed.update(entry.split(".")[0] for entry in stage.reinit)
            self.report.say(f"{name}: {drawn:,} parameters start from new random weights ({', '.join(stage.reinit)})")
        step = Step(
            self.model, stage, self.steps[index], self.config.seed, self._micro(index, resumed),
            graph=self.config.cuda_graph, states=self.states is not None, carried=self.progress.carried, warn=self.report.warn,
        )  # fmt: skip
        if resumed or stage.state == "carry":
            for part_name, optimizer in step.optimizers.items():
                part, saved = step.parts[part_name], _Below(self.saved, f"{part_name}|")
                load_flat_state(optimizer, part.names, saved, part.layout.views)
                for key, average in part.ema_state().items():
                    if f"{part_name}@ema/{key}" in self.saved:  # else it was switched on just now
                        average.copy_(self.saved[f"{part_name}@ema/{key}"])
        if resumed:
            step.skipped.copy_(self.saved["skipped"])
        self.saved = {}
        return step

    def _micro(self, index: int, resumed: bool) -> int:
        """Images a forward: as the config says, or what was found for it before, so that a resumed run has the same sums."""
        stage, here = self.config.stage[index], self.progress
        if resumed and here.micro and here.micro_asked == stage.micro_batch:
            return here.micro
        if stage.micro_batch != "auto":
            return stage.micro
        # What is free, and what the model holds of it already: the plan counts the model, too.
        scratch = SCRATCH if self.device.type == "cuda" else 0
        held = sum(p.numel() * p.element_size() for module in self.resident for p in module.parameters())
        room = free_memory(self.device) - scratch + held
        planned = plan_stage(
            Shapes.of(self.model), stage, self.config.data.resolution, room, self.ops, states=self.states is not None
        ).largest_micro_batch()
        if planned == 0:
            raise UserError(
                f"stage {self.config.stage_name(index)!r} does not fit with one image a forward into {room / 1e9:.1f} GB on "
                f"{self.device}; see `fastsd plan` for checkpointing, precisions and optimizers that do"
            )
        self.report.say(f"micro-batch {planned}: the most that fits {room / 1e9:.1f} GB by plan; the first steps will show")
        return planned

    def loader(self, index: int) -> Loader:
        return Loader(
            self.cache, self.model.text.tokenize, self.config.seed, self.config.stage[index],
            data=self.config.data, origin=self.progress.stage_images, tokens=self.tokens, states=self.states,
            left_out=self.sets.left_out,
        )  # fmt: skip

    def count(self, step: Step, result: StepResult) -> None:
        """One step is done."""
        now = time.monotonic()
        self.progress = replace(
            self.progress, stage_step=self.progress.stage_step + 1, step=self.progress.step + 1,
            images=self.progress.images + step.stage.batch, micro=step.micro, micro_asked=step.stage.micro_batch,
            seconds=self.progress.seconds + now - self.started,
        )  # fmt: skip
        self.started = now
        self.changed.update(changed_parts(step.trained))
        loss, weight = self.smooth
        finite = torch.isfinite(result.loss)
        loss.copy_(torch.where(finite, SMOOTHING * loss + (1 - SMOOTHING) * result.loss.double(), loss))
        weight.copy_(torch.where(finite, SMOOTHING * weight + (1 - SMOOTHING), weight))

    def save(self, step: Step, done: bool, keep: bool = False) -> bool:
        """Commit a checkpoint; with `keep`, one that stays. False, and a line on why, when the disk would not take it."""
        self.progress = replace(self.progress, stage_done=done)
        state: dict[str, Tensor] = {"loss": self.smooth[0], "weight": self.smooth[1]}
        following = self.config.stage[self.progress.stage + 1 :]
        if not done or not following or following[0].state == "carry":
            state["skipped"] = step.skipped
            for name, optimizer in step.optimizers.items():
                own = flat_state(optimizer, step.parts[name].names, step.parts[name].layout.views)
                state.update({f"{name}|{key}": tensor for key, tensor in own.items()})
        for name, part in step.parts.items():
            state.update({f"{name}@ema/{key}": tensor for key, tensor in part.ema_state().items()})
        # A part that the step does without is as it was loaded: nothing takes the place of its weights.
        weights = dict.fromkeys(PARTS, dict) | {name: part.state for name, part in step.parts.items()}
        folder = self.folder / "checkpoints"
        try:
            self.report.flush()
            adapters = {name: part.state(ADAPTER) for name, part in step.parts.items()} if self.model.lora else None
            path = checkpoint.save(folder, self.progress, self.model, weights, self.changed, state, adapters)
        except OSError as error:
            self.report.warn(
                f"checkpoint at step {self.progress.step} not saved: {error.strerror or error} ({folder}); "
                "training goes on, the last checkpoint stands; free space on that disk"
            )
            return False
        self.changed = set()
        self.report.saved()
        if done and following and following[0].state == "carry":
            self.saved = checkpoint.load_state(path)
        self.kept |= {path.name} if done or keep else set()
        try:
            replace_file(self.folder / "kept.json", json.dumps(sorted(self.kept)))
            if done:
                self._note_cost()
        except OSError as error:
            self.report.warn(
                f"{path.name} is saved, but not noted in {self.folder} ({error.strerror}); free space on that disk"
            )
        checkpoint.retain(folder, step.stage.keep_checkpoints, self.kept)
        return True

    def _note_cost(self, **more: Any) -> None:
        """Note what the run took, and its last stage, in RUN/cost.json: for `fastsd compare`."""
        here, path = self.progress, self.folder / "cost.json"
        cost = json.loads(path.read_text()) if path.exists() else {"stages": []}
        took = {
            "name": self.config.stage_name(here.stage), "trained": self.trained[here.stage], "steps": here.stage_step,
            "images": here.images - here.stage_images, "seconds": here.seconds, "memory_gb": memory_gb(self.device),
        }  # fmt: skip
        if here.stage_step and not more:
            cost["stages"] = [stage for stage in cost["stages"] if stage["name"] != took["name"]] + [took]
        if self.sample_seconds:
            cost["sample_seconds"] = self.sample_seconds
        replace_file(path, json.dumps(cost | more, indent=2))

    def asked(self, what: str) -> bool:
        """Whether someone has put a file trigger.WHAT into the run's folder; it is taken away."""
        try:
            (self.folder / f"trigger.{what}").unlink()
        except OSError:  # there is none, or one that cannot be taken away and would ask at every step
            return False
        return True

    def sample(self, index: int, step: Step) -> None:
        """Draw the config's grid with the weights as they are. Touches nothing that training reads."""
        size, start = self.config.sample.size or self.config.data.resolution, time.monotonic()
        image = self._beside(step, "samples", lambda: sample_grid(self.model, self.config.sample, size))
        if image is not None:
            self.sample_seconds = (time.monotonic() - start) / (
                len(read_prompts(self.config.sample)) * self.config.sample.images
            )
            path = self.folder / "samples" / f"{self.config.stage_name(index)}-{self.progress.step:08d}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                save_grid(image, path, self.config.stage_name(index), self.progress.step)
            except OSError as error:
                return self.report.warn(f"samples not written: {error.strerror} ({path}); training goes on")
            self.report.images(path, self.progress.step, image)

    def validate(self, index: int, step: Step) -> None:
        """Measure the config's sets with the weights as they are, and with their averages. Touches nothing that is trained."""
        if self.sets.measured:
            here, stage = self.progress, self.config.stage_name(index)
            rows = self._beside(step, "validation", lambda: self.validation.rows(step.parts.values()))
            self.report.validation([{"step": here.step, "images": here.images, "stage": stage, **row} for row in rows])

    def _beside(self, step: Step, what: str, work: Callable[[], Result]) -> Result:
        """Do what needs memory beside that of a recorded step, which keeps it between steps but can be recorded anew."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self.report.warn(f"no memory for {what} beside the CUDA graph: recording it again; cuda_graph = false avoids it")
        step.clear_graphs()
        return work()

    def export(self) -> None:
        """The newest checkpoint's model for any tool, see `fastsd/train/export.py`."""
        self._note_cost(file_bytes=bytes_of(export(self.config, self.model, self.report.say)))

    def header(self) -> dict[str, str]:
        """What a person checks before walking away."""
        config, meta, vae = self.config, self.cache.meta, self.model.vae
        lengths = [
            f"{steps} steps" if steps < ENDLESS else str(s.until) for s, steps in zip(config.stage, self.steps, strict=True)
        ]
        stages = [
            f"{config.stage_name(i)}: {_said(s)}, {self.trained[i]:,} parameters, {lengths[i]}"
            for i, s in enumerate(config.stage)
        ]
        epochs = " or ".join(str(images) for images in dict.fromkeys(self.images))
        epoch = f", {epochs} an epoch" if epochs != str(len(self.cache)) else ""
        at = f", resumed at step {self.progress.step}" if self.progress.step else ""
        rejected = f", {meta.rejected} rejected" if meta.rejected else ""
        empty = f", {meta.empty_captions} empty captions" if meta.empty_captions else ""
        states = ", and the text encoder's states" if self.states else ""
        sizes = len({group.shape for group in self.cache.groups})
        shapes = f" in {sizes} sizes" if sizes > 1 else ""
        return {
            "run": f"{self.folder} ({', '.join(lengths)}{at})",
            "kernels": f"{describe_ops(self.ops)} on {_device_name(self.device)}, {memory_gb(self.device):.1f} GB in use",
            "base": config.model.base,
            "vae": f"{config.model.vae or config.model.base}, {vae.channels} channels, factor {vae.scaling_factor:g}",
            "images": f"{len(self.cache)} at {config.data.resolution} px{shapes}{epoch}{empty}",
            "cache": f"{meta.cached} of {meta.images} images cached{rejected}{states} ({config.cache.dir})",
            "stages": "\n".join(stages),
        } | ({"validation": f"{self.validation}, every {config.validate_.every}"} if self.sets.measured else {})

    def close(self) -> None:
        self.report.close()
        self.cache.close()
        if self.states:
            self.states.close()
        self.lock.close()


def _said(stage: StageTable) -> str:
    """A stage in half a line."""
    rates = "/".join(f"{stage.rate_of(part):g}" for part in (stage.lr if isinstance(stage.lr, dict) else [""]))
    forward = f" ({stage.micro_batch} a forward)" if stage.micro_batch else ""
    return f"{'+'.join(stage.train)} {stage.optimizer} lr {rates} {stage.precision}, batch {stage.batch}{forward}"


class _Below(Mapping[str, Tensor]):
    """The entries of a mapping under a prefix, by the rest of their names; nothing is read ahead."""

    def __init__(self, whole: Mapping[str, Tensor], prefix: str) -> None:
        self._whole, self._prefix = whole, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._whole[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@contextlib.contextmanager
def open_run(config: Config, console: Console) -> Iterator[Run]:
    run = Run(config, console)
    try:
        yield run
    finally:
        run.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
