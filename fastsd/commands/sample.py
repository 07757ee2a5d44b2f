"""`fastsd sample`: generate images with any model, and a grid of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fastsd.config.config_errors import sentence
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.console import STDOUT
from fastsd.errors import UserError
from fastsd.run.folder import resolve_model
from fastsd.sampling.generate import generate, load_to_sample
from fastsd.sampling.grid import grid, read_prompts, save_grid
from fastsd.storage import new_file

Options = TypeVar("Options", ModelTable, SampleTable)


def sample(source: dict[str, Any], settings: Mapping[str, object], out: Path, precision: str, device: str) -> None:
    """Generate images with a model, and write OUT/NNN-seed.png and OUT/grid.png. Raises UserError for invalid options."""
    table = _from_options(SampleTable, settings)
    prompts = read_prompts(table)
    if not prompts:
        raise UserError("sample-no-prompt", "no prompts found; give --prompt TEXT, or --prompts FILE with one prompt per line")
    source = {**source, "base": resolve_model(source["base"])}
    model = load_to_sample(_from_options(ModelTable, source), device, precision)
    size = table.size or model.unet.cfg.sample_size * model.vae.downscale
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]

    images = generate(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], table, size)
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, (_, seed)) in enumerate(zip(images, pairs, strict=True)):
        with new_file(out / f"{i:03d}-{seed}.png") as temporary:
            image.save(temporary, "PNG")
    save_grid(grid(images, table.images, prompts, table.seed), out / "grid.png")
    STDOUT.echo(f"{len(images)} images and grid.png written to {out}")


def _from_options(table: type[Options], settings: Mapping[str, object]) -> Options:
    """Build a config table from command line options. Raises a UserError that names an invalid option."""
    try:
        return table.model_validate(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        advice = sentence(problem).rpartition("; ")[2]
        raise UserError("sample-option", f"--{option} is {problem['input']!r}; {advice}") from None
