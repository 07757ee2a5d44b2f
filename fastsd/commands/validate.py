"""`fastsd validate`: measure the loss of any model on the validation images of a config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote

from fastsd.config.schema import Config
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Loader
from fastsd.data.text_embeddings import TextEmbeddings
from fastsd.data.validation_split import ValidationSplits, choose_splits
from fastsd.errors import UserError, out_of_memory
from fastsd.model.formats.adapters import load_merged
from fastsd.model.formats.load import table_of
from fastsd.model.model import Model
from fastsd.model.vae import Vae
from fastsd.run.folder import resolve_model
from fastsd.run.restart import saved_splits
from fastsd.run.validation import Validation, ValidationRow, format_table
from fastsd.storage import replace_file
from fastsd.terminal.console import STDOUT, Console
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd.train.trainable import compute_weight


def validate(name: str, config: Config, json_file: Path | None = None, console: Console = STDOUT) -> list[ValidationRow]:
    """Measure a model on the validation sets of a config, in the precision of its last stage, and print a table.

    For a run's checkpoint the result equals, to the last bit, what the run itself measured in that precision. The images are
    those that the checkpoint's run has measured since its start. For another model, they are those of the config's run, if it
    has a checkpoint.

    Args:
        name: a diffusers folder, hub id, single file, run (its newest checkpoint) or checkpoint. The config's own base uses
            the config's VAE, as at the start of a run. Any other model uses its own VAE.
        config: has the data, the cache, [validate], and those [model] settings that the model does not store.
        json_file: a file to write the rows to as well.

    Raises:
        UserError: the config has no validation images, or no latents of the model's VAE; or as `load_model`.
    """
    table = config.validate_
    if not (table.held_out or table.stabilised):
        raise UserError(
            "validate-nothing", "validate.held_out and validate.stabilised are both 0; add for example validate.stabilised=16"
        )
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(
            "json-folder-missing",
            f"--json is {str(json_file)!r}, but its folder does not exist; create it or name another file",
        )
    device, precision = choose_device(config.device, console), config.stage[-1].precision
    base = resolve_model(name)
    model_table = config.model if _same_model(base, config.model.base) else table_of(base, config.model)
    model = load_merged(model_table, choose_ops(config.kernels, device))

    vae_name = model_table.vae or base
    model.unet.to(device)
    with (
        latents_of(vae_name, config, model.vae) as latents,
        _text_embeddings(config, latents, model, console) as text_embeds,
        precision_switches(precision, model.unet, deterministic=config.deterministic) as switches,
    ):
        for module in [model.unet] + ([] if text_embeds else [model.text.module]):
            for parameter in module.to(device).parameters():
                parameter.data = compute_weight(parameter.data, COMPUTE_DTYPE[precision])
        loader = Loader(latents, model.text.tokenize, config.seed, config.stage[0], text_embeddings=text_embeds)
        splits = _splits(base, latents, config)
        validation = Validation(model, loader, splits, table)
        for note in splits.notes:
            console.warn(note)
        console.echo(f"{base}, {switches}\n{validation}")
        try:
            rows = validation.rows()
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            raise UserError(
                "validate-memory", f"validate.batch is {table.batch}, which needs too much memory; lower it"
            ) from None

    console.echo(format_table(rows))
    if json_file:
        replace_file(json_file, json.dumps({"model": base, "precision": precision, "rows": rows}, indent=1) + "\n")
    return rows


def _splits(base: str, latents: LatentCache, config: Config) -> ValidationSplits:
    """Return the images that the run of a checkpoint measures, or those of the config's run, or those it would choose."""
    try:
        return choose_splits(latents, config, saved_splits(config, Path(base)))
    except UserError as error:
        if error.code != "validation-images-missing":
            raise
        splits = choose_splits(latents, config)  # latents of another VAE, and another number of them
        return replace(splits, notes=[f"other images than in the run: {error}"])


def _same_model(name: str, other: str) -> bool:
    return name == other or (os.path.exists(name) and os.path.exists(other) and os.path.samefile(name, other))


@contextmanager
def latents_of(name: str, config: Config, vae: Vae) -> Iterator[LatentCache]:
    """Open the latents of a config's images from a VAE. `name` is the model's. Raises UserError if they are not cached."""
    view = view_name(config, vae.hash)
    if not (Path(config.cache.dir) / "views" / f"{view}.safetensors").is_file():
        scaling = f" model.vae_scaling_factor={vae.scaling_factor:g}" if Path(name).is_file() else ""
        raise UserError(
            "validate-no-latents",
            f"cache.dir is {config.cache.dir}, which has no latents of these images from the VAE of {name}; run `fastsd cache "
            f"CONFIG model.vae={quote(name)}{scaling}` first",
        )
    with closing(LatentCache.open(config.cache.dir, view)) as latents:
        yield latents


@contextmanager
def _text_embeddings(config: Config, latents: LatentCache, model: Model, console: Console) -> Iterator[TextEmbeddings | None]:
    """Open the cached text embeddings that a run of the config would read. Yield None if another encoder computed them."""
    text_embeddings = None
    if config.cache.hidden_states:
        try:
            text_embeddings = TextEmbeddings(config.cache, latents, model.text)
        except UserError as error:
            console.warn(f"captions are encoded during validation: {error}")
    try:
        yield text_embeddings
    finally:
        if text_embeddings:
            text_embeddings.close()
