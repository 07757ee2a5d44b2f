"""`fastsd sample`: generate images with any model, and a grid of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fastsd.config.config_errors import sentence
from fastsd.config.schema import Config, ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats.adapters import Averages, load_merged, load_to_train, use_averages
from fastsd.model.formats.load import table_of
from fastsd.model.formats.merge import merge_loaded
from fastsd.model.model import Model
from fastsd.run.checkpoint import CONFIG, read_progress, shortest_average
from fastsd.run.folder import resolve_model
from fastsd.run.restart import read_config
from fastsd.sampling.generate import draw, prepare_to_sample
from fastsd.sampling.grid import grid, save_grid
from fastsd.sampling.prompts import images_of, notes_on_prompts, parse_prompt
from fastsd.storage import TEMPORARY, locked_folder, new_file
from fastsd.terminal.console import STDOUT, Console
from fastsd.train.device import choose_device, choose_ops

Options = TypeVar("Options", ModelTable, SampleTable)
Settings = Mapping[str, Any]  # keys of a config table; an option that is not given is None


@dataclass(frozen=True)
class SampleOptions:
    """Options of `sample` that no config has. "" = as in the run, or the default."""

    out: Path
    prompts: Sequence[str] = ()  # lines, with options as in a file of prompts
    precision: str = ""
    device: str = ""
    loras: Sequence[str] = ()  # LORA[:weight], merged into the weights in this order


def sample(name: str, model_settings: Settings, settings: Settings, options: SampleOptions, console: Console = STDOUT) -> None:
    """Generate images with a model, and write OUT/NNN-seed.png and OUT/grid.png, with numbers that are not in use.

    A run, or a checkpoint of it, is sampled with the run's settings: without options, the images are those of the run's own
    grid, to the last bit.

    Args:
        name: a diffusers folder, hub id, single file, run (its newest checkpoint) or checkpoint.
        model_settings, settings: keys of `[model]` and `[sample]`, in place of the run's.

    Raises:
        UserError: an option is invalid, OUT is a file, there are no prompts, or the model does not load.
    """
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError("sample-out-file", f"--out is {str(out)!r}, a file; give a folder")
    base = resolve_model(name)
    config = _run_config(Path(base), console)
    table = _sample_table(config, settings, options.prompts)
    if not images_of(table, 1):
        raise UserError("sample-no-prompt", "no prompts found; give --prompt TEXT, or --prompts FILE with one prompt per line")
    model = _load(base, config, model_settings, _averages(base, table, settings), options, console)
    for note in notes_on_prompts(model.text, table):
        console.warn(note)
    size = config.data.resolution if config else model.unet.cfg.sample_size * model.vae.downscale

    images = images_of(table, size)
    drawn = draw(model, images, table)
    out.mkdir(parents=True, exist_ok=True)
    with locked_folder(out):  # another call may write there too
        for path in out.glob(f"{TEMPORARY}*.png"):  # of a call that was killed
            path.unlink()
        numbers = [int(match[1]) for path in out.iterdir() if (match := re.fullmatch(r"(\d{3,})-\d+\.png", path.name))]
        first = max(numbers, default=-1) + 1
        for number, (image, image_settings) in enumerate(zip(drawn, images, strict=True), start=first):
            with new_file(out / f"{number:03d}-{image_settings.seed}.png") as temporary:
                image.save(temporary, "PNG")
        names = (f"grid{f'-{number}' if number > 1 else ''}.png" for number in count(1))
        path = next(out / name for name in names if not (out / name).exists())
        save_grid(grid(drawn, images, table.images), path, weights=table.weights)
    console.echo(f"{len(images)} images and {path.name} written to {out}")


def _run_config(checkpoint: Path, console: Console) -> Config | None:
    """Return the config with which a run wrote a checkpoint, or None for any other model."""
    path = checkpoint / CONFIG
    if not path.is_file():
        return None
    config = read_config(path)
    if config is None:
        console.warn(f"{path} cannot be read as a config; the samples have default settings instead of the run's")
    return config


def _sample_table(config: Config | None, settings: Settings, prompts: Sequence[str]) -> SampleTable:
    chosen = {key: value for key, value in settings.items() if value is not None}
    if prompts or "prompts_file" in chosen:
        chosen |= {"prompts": [parse_prompt(text, f"--prompt {text!r}").model_dump(exclude_none=True) for text in prompts]}
        chosen |= {"prompts_file": chosen.get("prompts_file", "")}
    if "size" in chosen:
        chosen = {"width": 0, "height": 0} | chosen
    return _from_options(SampleTable, (config.sample.model_dump() if config else {"images": 1}) | chosen)


def _averages(base: str, table: SampleTable, settings: Settings) -> Averages:
    """Return the EMA weights to draw with. They are empty if they are not asked for, or a stage of the run has none."""
    averages = shortest_average(Path(base)) if table.weights == "ema" else {}
    if settings.get("weights") == "ema" and not averages:
        raise UserError("sample-no-ema", f"{base}: has no EMA weights; omit --ema")
    return averages


def _load(
    base: str, config: Config | None, settings: Settings, averages: Averages, options: SampleOptions, console: Console
) -> Model:
    chosen = {key: value for key, value in settings.items() if value is not None}
    stored = table_of(base, config.model).model_dump() if config else {"base": base}
    table = _from_options(ModelTable, stored | chosen)
    device = choose_device(options.device or (config.device if config else "auto"), console)
    # On a GPU, "auto" is "triton", with which a CPU would be an error.
    ops = choose_ops("reference" if config and config.kernels == "reference" else "auto", device)
    precision, text_on_device = "fp32", True
    if config:
        stage = read_progress(Path(base)).stage
        precision, text_on_device = config.stage[stage].precision, not config.cache.hidden_states
        console.echo(f"{base}: with the settings of its run, {options.precision or precision}")
    if config and not options.loras and table.clip_skip == config.model.clip_skip:
        # As the run computes: adapters are not merged, which would round their sums differently.
        model = load_to_train(table, ops, config.seed, Path(base))
        use_averages(model, averages)
    else:
        model = load_merged(table, ops, averages)
    for note in merge_loaded(model, options.loras, "--lora") if options.loras else ():
        console.echo(note)
    return prepare_to_sample(model, device, options.precision or precision, text_on_device=text_on_device)


def _from_options(table: type[Options], settings: Settings) -> Options:
    """Build a config table from command line options. Raises a UserError that names an invalid option."""
    try:
        return table.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        advice = sentence(problem).rpartition("; ")[2]
        raise UserError("sample-option", f"--{option} is {problem['input']!r}; {advice}") from None
