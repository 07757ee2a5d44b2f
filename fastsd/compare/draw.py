"""Samples that `compare` draws itself, from finished models or checkpoints, also with other sampling settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from fastsd.compare.pictures import sheet
from fastsd.compare.runs import RunData, read_grids
from fastsd.config.config_errors import sentence
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats.load import table_of
from fastsd.model.model import Model
from fastsd.run.checkpoint import checkpoints
from fastsd.run.folder import Grid
from fastsd.run.settings import combinations, setting_text
from fastsd.sampling.generate import draw, load_to_sample
from fastsd.sampling.grid import sample_grid, save_grid
from fastsd.sampling.prompts import images_of, read_prompts
from fastsd.terminal.console import Console, counted

KEYS = ("clip_skip", "guidance", "guidance_rescale", "height", "negative", "sampler", "seed", "size", "steps", "width")


@dataclass(frozen=True)
class Setting:
    """The settings of one column of samples. If `clip_skip` is None, each run's own value applies."""

    label: str
    table: SampleTable
    clip_skip: int | None


@dataclass(frozen=True)
class DrawSource:
    """A model to sample: a run's finished model, or one of its checkpoints."""

    label: str
    run: RunData
    folder: Path

    def load(self, clip_skip: int | None) -> Model:
        table = table_of(str(self.folder), self.run.config.model)
        return load_to_sample(table if clip_skip is None else table.model_copy(update={"clip_skip": clip_skip}))


def read_settings(words: Sequence[str], baseline: RunData) -> list[Setting]:
    """Return a `Setting` for each combination of the values in `words`. Other values are those of the baseline's [sample].

    Raises:
        UserError: a key is not a sampling setting, a value is not valid, or there are no prompts.
    """
    config, settings = baseline.config, []
    prompts = read_prompts(config.sample)
    if not prompts:
        raise UserError("draw-no-prompts", f"{baseline.folder} has no sample.prompts; choose a --baseline that has some")
    for combination in combinations(words):
        values = {key.removeprefix("sample.").removeprefix("model."): value for key, (_, value) in combination.items()}
        unknown = next((key for key in values if key not in KEYS), None)
        if unknown:
            advice = f"choose from {', '.join(KEYS)}"
            raise UserError("draw-unknown-key", f"--draw has the key {unknown!r}, which is not a sampling setting; {advice}")
        clip_skip = values.pop("clip_skip", None)
        try:
            # A prompt's own settings give way to those that are compared.
            sides = {"width": 0, "height": 0} if "size" in values else {}
            plain = [prompt.model_dump(exclude={*values, *sides}, exclude_none=True) for prompt in prompts]
            sample = config.sample.model_dump() | {"prompts": plain, "prompts_file": ""}
            table = SampleTable.model_validate(sample | sides | values)
            if clip_skip is not None:
                ModelTable.model_validate({"base": "x", "clip_skip": clip_skip})
        except ValidationError as error:
            raise UserError("draw-value", f"--draw: {sentence(error.errors()[0])}") from None
        label = "\n".join(f"{key.split('.')[-1]} {setting_text(value)}" for key, (_, value) in combination.items())
        settings.append(Setting(label, table, clip_skip))
    return settings


def finished_models(runs: Sequence[RunData]) -> list[DrawSource]:
    """Return each run's RUN/model, or its newest checkpoint if the run is unfinished. Raises UserError if it has neither."""
    folders = [run.folder / "model" if run.finished else sources_of(run)[-1].folder for run in runs]
    return [DrawSource(run.label, run, folder) for run, folder in zip(runs, folders, strict=True)]


def sources_of(run: RunData) -> list[DrawSource]:
    """Return a run's checkpoints, oldest first. Raises UserError if it has none."""
    paths = checkpoints(run.folder / "checkpoints")
    if not paths:
        raise UserError(
            "draw-no-checkpoint", f"{run.folder} has no checkpoint; leave the run out, or wait for its first checkpoint"
        )
    return [DrawSource(f"step {int(path.name.removeprefix('step-')):,}", run, path) for path in paths]


def draw_settings(sources: Sequence[DrawSource], settings: Sequence[Setting]) -> Iterator[tuple[str, Image.Image]]:
    """Yield each prompt with a sheet. The sheet has a row for each model and a column for each setting, at one seed."""
    prompts = read_prompts(settings[0].table)
    images_by_source = [(source.label, _draw(source, settings)) for source in counted("models", sources)]
    for i, prompt in enumerate(prompts):
        rows = [(label, [images[i] for images in by_setting]) for label, by_setting in images_by_source]
        yield prompt.prompt, sheet([setting.label for setting in settings], rows)


def _draw(source: DrawSource, settings: Sequence[Setting]) -> list[list[Image.Image]]:
    """Return the images of a model by setting and prompt. It is loaded once per clip skip, which is a setting of the model."""
    images: dict[int, list[Image.Image]] = {}
    for clip_skip in dict.fromkeys(setting.clip_skip for setting in settings):
        model = source.load(clip_skip)
        for i, setting in enumerate(settings):
            if setting.clip_skip == clip_skip:
                table = setting.table.model_copy(update={"images": 1})
                images[i] = draw(model, images_of(table, source.run.config.data.resolution), table)
    return [images[i] for i in range(len(settings))]


def draw_checkpoints(run: RunData, table: SampleTable, folder: Path, console: Console) -> list[Grid]:
    """Draw the sample grid of `table` with each saved checkpoint of a run, and save it as `folder`/STAGE-STEP.png."""
    folder.mkdir(parents=True)
    stages = run.stage_starts("step")
    for source in counted(f"checkpoints of {run.label}", sources_of(run)):
        step = int(source.folder.name.removeprefix("step-"))
        stage = next((name for name, start in reversed(stages) if start < step), stages[0][0])
        console.echo(f"drawing {run.label}, {source.label}")
        picture = sample_grid(source.load(None), table, table.size or run.config.data.resolution)
        assert picture is not None, "read_settings has checked that there are prompts"
        save_grid(picture, folder / f"{stage}-{step:08d}.png", stage, step)
    return read_grids(folder)
