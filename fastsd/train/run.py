"""Floor 3: a run - its folder, its model, its cache, where it stands - opened anew or from its newest checkpoint.

Read next: `fastsd/train/loop.py`, which moves it forward.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastsd.config import Config, StageTable, dump_config, parse_config
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Loader
from fastsd.data.states import States
from fastsd.data.tokens import Tokens
from fastsd.errors import UserError
from fastsd.model.files import Model, load_model
from fastsd.model.shapes import Shapes
from fastsd.plan import SCRATCH, plan_stage
from fastsd.sample import check_samples, sample_grid
from fastsd.storage import replace_file
from fastsd.train import checkpoint
from fastsd.train.checkpoint import Progress
from fastsd.train.optim import flat_state, load_flat_state
from fastsd.train.precision import choose_device, choose_ops, describe_ops, set_precision
from fastsd.train.report import Report, free_memory, memory_gb
from fastsd.train.step import PARTS, Step, StepResult

# A change in one of these would make the rest of the run another run's.
FIXED = ("model", "data", "seed")
FIXED_IN_STAGE = ("train", "batch", "optimizer", "d0", "betas", "decoupled_weight_decay")
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
        self.lock = _lock(self.folder)
        self.device = choose_device(config.device)
        self.ops = choose_ops(config.kernels, self.device)
        notes: list[str] = []
        found = checkpoint.newest(self.folder / "checkpoints", notes.append)
        notes += _compare_with_start(self.folder / "config.json", config, found[1] if found else None)
        self.progress = found[1] if found else Progress()
        self.saved: Mapping[str, Tensor] = checkpoint.load_state(found[0]) if found else {}
        table = config.model
        if found:
            # The checkpoint is a whole model; the base need not be there any more.
            table = table.model_copy(update={"base": str(found[0]), "vae": "", "tokenizer": "", "vae_scaling_factor": None})
        self.model: Model = load_model(table, self.ops)
        check_samples(self.model, config)
        self.cache = LatentCache.open(config.cache.dir, view_name(config, self.model.vae.hash))
        notes += _compare_images(self.folder / "images.json", self.cache, resumed=found is not None)
        self.tokens: Tokens | None = None
        try:
            self.tokens = Tokens(self.cache, self.model.text.tokenizer, self.model.text.length)
        except UserError as error:
            notes.append(f"captions are tokenized on the way: {error}")
        self.states = States(config.cache, self.cache, self.model.text) if config.cache.hidden_states else None
        # What the step needs: with states that are cached, no text encoder.
        self.resident = [self.model.unet, self.model.vae.module] + ([] if self.states else [self.model.text.module])
        # An epoch of each stage; they differ only where stages divide captions into tags differently.
        self.images = [self.loader(index).images for index in range(len(config.stage))]
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

    def total_steps(self) -> int:
        return sum(stage.steps(images) for stage, images in zip(self.config.stage, self.images, strict=True))

    def finished(self, index: int) -> bool:
        """Whether a stage needs no more steps. The last one can be made longer, for its end keeps the optimizer's state."""
        here = self.progress
        longer = here.stage_step < self.config.stage[index].steps(self.images[index]) and "skipped" in self.saved
        return here.stage > index or (here.stage == index and here.stage_done and not longer)

    def start_stage(self, index: int) -> Step:
        """Make the stage's parts and optimizers, with the state of the checkpoint if the run was in the middle of it."""
        stage = self.config.stage[index]
        resumed = self.progress.stage == index and self.progress.stage_step > 0
        if not resumed:
            images = self.progress.images
            self.progress = replace(self.progress, stage=index, stage_step=0, stage_images=images, stage_done=False)
        self.model.unet.checkpointing = stage.checkpointing
        said = set_precision(stage.precision, self.model.unet, self.config.deterministic)
        self.report.say(f"{self.config.stage_name(index)}: {said}")
        step = Step(
            self.model, stage, stage.steps(self.images[index]), self.config.seed, self._micro(index, resumed),
            graph=self.config.cuda_graph, states=self.states is not None, warn=self.report.warn,
        )  # fmt: skip
        if resumed:
            for name, optimizer in step.optimizers.items():
                part, saved = step.parts[name], _Below(self.saved, f"{name}|")
                load_flat_state(optimizer, part.names, saved, part.layout.views)
                for key, average in part.ema_state().items():
                    if f"{name}@ema/{key}" in self.saved:  # else it was switched on just now
                        average.copy_(self.saved[f"{name}@ema/{key}"])
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
        )  # fmt: skip

    def count(self, step: Step, result: StepResult) -> None:
        """One step is done."""
        images = self.progress.images + step.stage.batch
        self.progress = replace(
            self.progress, stage_step=self.progress.stage_step + 1, step=self.progress.step + 1, images=images,
            micro=step.micro, micro_asked=step.stage.micro_batch,
        )  # fmt: skip
        self.changed.update(step.optimizers)
        loss, weight = self.smooth
        finite = torch.isfinite(result.loss)
        loss.copy_(torch.where(finite, SMOOTHING * loss + (1 - SMOOTHING) * result.loss.double(), loss))
        weight.copy_(torch.where(finite, SMOOTHING * weight + (1 - SMOOTHING), weight))

    def save(self, step: Step, done: bool) -> bool:
        """Commit a checkpoint. False, and a line that says why, when the disk would not take it."""
        self.progress = replace(self.progress, stage_done=done)
        state: dict[str, Tensor] = {"loss": self.smooth[0], "weight": self.smooth[1]}
        if not done or self.progress.stage == len(self.config.stage) - 1:
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
            path = checkpoint.save(folder, self.progress, self.model, weights, self.changed, state)
        except OSError as error:
            self.report.warn(
                f"checkpoint at step {self.progress.step} not saved: {error.strerror or error} ({folder}); "
                "training goes on, the last checkpoint stands; free space on that disk"
            )
            return False
        self.changed = set()
        self.report.saved()
        if done:
            self._remember_stage_end(path.name)
        checkpoint.retain(folder, step.stage.keep_checkpoints, self._stage_ends())
        return True

    def _stage_ends(self) -> set[str]:
        path = self.folder / "stage-ends.json"
        return set(json.loads(path.read_text())) if path.exists() else set()

    def _remember_stage_end(self, name: str) -> None:
        replace_file(self.folder / "stage-ends.json", json.dumps(sorted(self._stage_ends() | {name})))

    def sample(self, index: int, step: Step) -> None:
        """Draw the config's grid with the weights as they are. Touches nothing that training reads."""
        size = self.config.sample.size or self.config.data.resolution
        try:
            image = sample_grid(self.model, self.config.sample, size)
        except torch.OutOfMemoryError:
            # A recorded step keeps its memory between steps; it can be recorded anew.
            self.report.warn(
                "no memory for samples beside the CUDA graph: recording it again after them; cuda_graph = false avoids it"
            )
            step.clear_graphs()
            image = sample_grid(self.model, self.config.sample, size)
        if image is not None:
            path = self.folder / "samples" / f"{self.config.stage_name(index)}-{self.progress.step:08d}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                image.save(path)
            except OSError as error:
                return self.report.warn(f"samples not written: {error.strerror} ({path}); training goes on")
            self.report.images(path, self.progress.step, image)

    def export(self) -> Path:
        """The newest checkpoint's model as RUN/model, a diffusers folder for any tool; its averages as RUN/model-ema."""
        newest, target = checkpoint.checkpoints(self.folder / "checkpoints")[-1], self.folder / "model"
        checkpoint.export(newest, target, self.model)
        state = checkpoint.load_state(newest)
        averages = {part: found for part in PARTS if len(found := _Below(state, f"{part}@ema/"))}
        if averages:
            checkpoint.export(newest, self.folder / "model-ema", self.model, averages)
        return target

    def header(self) -> dict[str, str]:
        """What a person checks before walking away."""
        config, meta, vae = self.config, self.cache.meta, self.model.vae
        trained = {part for stage in config.stage for part in stage.train}
        counts = {part: sum(p.numel() for p in self.model.part(part).parameters()) for part in sorted(trained)}
        stages = [f"{config.stage_name(i)}: {_said(s)}, {s.steps(self.images[i])} steps" for i, s in enumerate(config.stage)]
        epochs = " or ".join(str(images) for images in dict.fromkeys(self.images))
        epoch = f", {epochs} an epoch" if epochs != str(len(self.cache)) else ""
        at = f", resumed at step {self.progress.step}" if self.progress.step else ""
        rejected = f", {meta.rejected} rejected" if meta.rejected else ""
        empty = f", {meta.empty_captions} empty captions" if meta.empty_captions else ""
        states = ", and the text encoder's states" if self.states else ""
        sizes = len({group.shape for group in self.cache.groups})
        shapes = f" in {sizes} sizes" if sizes > 1 else ""
        return {
            "run": f"{self.folder} ({self.total_steps()} steps{at})",
            "kernels": f"{describe_ops(self.ops)} on {_device_name(self.device)}, {memory_gb(self.device):.1f} GB in use",
            "base": config.model.base,
            "vae": f"{config.model.vae or config.model.base}, {vae.channels} channels, factor {vae.scaling_factor:g}",
            "images": f"{len(self.cache)} at {config.data.resolution} px{shapes}{epoch}{empty}",
            "cache": f"{meta.cached} of {meta.images} images cached{rejected}{states} ({config.cache.dir})",
            "trained": ", ".join(f"{part} {count:,}" for part, count in counts.items()) + " parameters",
            "stages": "\n".join(stages),
        }

    def close(self) -> None:
        self.report.close()
        self.cache.close()
        if self.states:
            self.states.close()
        self.lock.close()


def _said(stage: StageTable) -> str:
    """A stage in half a line."""
    rates = "/".join(f"{stage.rate_of(part):g}" for part in stage.train)
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


def _lock(folder: Path) -> Any:
    """Hold RUN/lock for as long as the file object lives: two trainers in one folder would ruin each other's logs."""
    file = open(folder / "lock", "a")  # noqa: SIM115 - held open on purpose
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"run is {str(folder)!r}, in which another fastsd is training; wait for it or name another") from None
    return file


def _compare_with_start(path: Path, config: Config, progress: Progress | None) -> list[str]:
    """Refuse what would break the run, note what changed otherwise since its last start."""
    if progress is None or not path.exists():
        return []
    # Read as a config: keys that were not there at the time have their defaults.
    old = json.loads(dump_config(parse_config(json.loads(path.read_text(encoding="utf-8")), str(path))))
    new = json.loads(dump_config(config))
    advice = "put it back, or start a new run with run=FOLDER"
    for table in FIXED:
        if old[table] != new[table]:
            raise UserError(f"{path.parent} was started with another {_difference(table, old[table], new[table])}; {advice}")
    notes = []
    here = progress.stage
    for i, (was, now) in enumerate(zip(old["stage"], new["stage"], strict=False)):
        for key in was:
            if was[key] != now[key]:
                difference = _difference(f"stage.{i}.{key}", was[key], now[key])
                if i < here or (i == here and key in FIXED_IN_STAGE and progress.stage_step):
                    raise UserError(f"{path.parent} has already trained with another {difference}; {advice}")
                notes.append(f"changed since the last start: {difference}")
    if len(new["stage"]) <= here:
        raise UserError(f"{path.parent} is in stage {here + 1} and the config has {len(new['stage'])}; {advice}")
    return notes


def _compare_images(path: Path, latents: LatentCache, resumed: bool) -> list[str]:
    """Note what the order of a run depends on, and say so where it is not that of the last start any more."""
    now = {"samples": len(latents), "view": latents.sha256}
    was = json.loads(path.read_text(encoding="utf-8")) if resumed and path.exists() else now
    replace_file(path, json.dumps(now))
    if was["samples"] != now["samples"]:
        changed = f"the cache had {was['samples']} images at the last start and has {now['samples']}"
        return [f"{changed}: from here on the order is another"]
    return [] if was == now else ["captions or images have changed in the cache since the last start"]


def _difference(place: str, was: Any, now: Any) -> str:
    if isinstance(was, dict):
        key = next(key for key in was if was[key] != now.get(key))
        return _difference(f"{place}.{key}", was[key], now.get(key))
    return f"{place}: {was!r}, now {now!r}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} ({torch.get_num_threads()} threads)"
