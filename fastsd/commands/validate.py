"""`fastsd validate` - the loss of any model on the images that a config measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastsd.config.schema import Config, ModelTable
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Loader
from fastsd.data.text_embeddings import States
from fastsd.data.validation_split import choose_sets
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_merged
from fastsd.model.model import Model
from fastsd.model.vae import Vae
from fastsd.run.folder import model_named
from fastsd.run.validation import Row, Validation, in_a_table
from fastsd.storage import replace_file
from fastsd.train.precision import COMPUTE_DTYPE, choose_device, choose_ops, set_precision
from fastsd.train.trainable import computed


def validate(name: str, config: Config, json_file: Path | None = None, console: Console | None = None) -> list[Row]:
    """Measure a model on the sets of a config, in the precision of its last stage, and print a table.

    A run's checkpoint comes out, to the last bit, as the run itself has measured it in that precision.

    Args:
        name: MODEL - diffusers folder, hub id, single file, a run (its newest checkpoint) or a checkpoint. The config's own
            base is measured as a run begins with it, any other model with the VAE that it has.
        config: its data, cache and [validate]; of its [model] what the model itself does not say.
        json_file: where the rows go, too.

    Raises:
        UserError: the config measures nothing, there are no latents of the model's VAE, or what `load_model` raises.
    """
    console, table = console or Console(), config.validate_
    if not (table.held_out or table.stabilised):
        raise UserError(
            "validate.held_out and validate.stabilised are 0, so there is nothing to measure; add for example "
            "validate.stabilised=256 to the line"
        )
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json is {str(json_file)!r}, and that folder is not there; make it, or name another")
    device, precision, base = choose_device(config.device), config.stage[-1].precision, model_named(name)
    model = load_merged(_table(base, config.model), choose_ops(config.kernels, device))
    with latents_of(base, config, model.vae) as latents, _states(config, latents, model, console) as states:
        for module in [model.unet] + ([] if states else [model.text.module]):
            for parameter in module.to(device).parameters():
                parameter.data = computed(parameter.data, COMPUTE_DTYPE[precision])
        said = set_precision(precision, model.unet, config.deterministic)
        loader = Loader(latents, model.text.tokenize, config.seed, config.stage[0], states=states)
        validation = Validation(model, loader, choose_sets(latents, config), table)
        _say(console, f"{base}, {said}\n{validation}")
        try:
            rows = validation.rows()
        except torch.OutOfMemoryError:
            raise UserError(f"out of memory with validate.batch {table.batch}; lower it") from None
    _say(console, in_a_table(rows))
    if json_file:
        replace_file(json_file, json.dumps({"model": base, "precision": precision, "rows": rows}, indent=1) + "\n")
    return rows


def _table(base: str, table: ModelTable) -> ModelTable:
    """What loads the model: the config's base as the config says, others with their own VAE. A folder says all but how captions
    are read; a file has no tokenizer, and does not say what it predicts or its VAE's factor."""
    if base == table.base:
        return table
    own: dict[str, Any] = {"base": base, "vae": "", "revision": ""}
    if Path(base).is_file():
        factor = None if table.vae else table.vae_scaling_factor  # of the config's VAE, which may be another
        return table.model_copy(update=own | {"tokenizer": table.tokenizer or table.base, "vae_scaling_factor": factor})
    return table.model_copy(update=own | {"tokenizer": "", "prediction": "", "zero_snr": None, "vae_scaling_factor": None})


@contextmanager
def latents_of(base: str, config: Config, vae: Vae) -> Iterator[LatentCache]:
    """The latents of a config's images by the VAE of a model. Raises UserError: there are none."""
    view = view_name(config, vae.hash)
    if not (Path(config.cache.dir) / "views" / f"{view}.safetensors").is_file():
        raise UserError(
            f"cache.dir {config.cache.dir} holds no latents of these images by the VAE of {base}; run `fastsd cache CONFIG "
            f"model.vae={base}` first"
        )
    with closing(LatentCache.open(config.cache.dir, view)) as latents:
        yield latents


@contextmanager
def _states(config: Config, latents: LatentCache, model: Model, console: Console) -> Iterator[States | None]:
    """The states that a run of the config would read, if they are this text encoder's."""
    states = None
    if config.cache.hidden_states:
        try:
            states = States(config.cache, latents, model.text)
        except UserError as error:
            _say(console, f"captions are encoded here: {error}")
    try:
        yield states
    finally:
        if states:
            states.close()


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
