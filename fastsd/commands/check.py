"""`fastsd check`: find everything that can be wrong with a config before the long run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from copy import deepcopy
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from fastsd.config.conversion import clip_skip_note
from fastsd.config.schema import Config
from fastsd.config.stages import COMPONENTS, ENDLESS
from fastsd.data.building import build, lists
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.captions import several_captions
from fastsd.data.loader import Loader
from fastsd.data.sources import folders
from fastsd.data.sources.unused import UnusedFiles
from fastsd.data.text_embeddings import TextEmbeddings
from fastsd.data.tokens import Tokens
from fastsd.data.validation_split import choose_splits
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_to_train
from fastsd.model.model import Model
from fastsd.model.select import changed_components, parameter_count, selected
from fastsd.plan.disk import run_bytes
from fastsd.run.export import check_export
from fastsd.run.license import license_note
from fastsd.run.restart import saved_splits
from fastsd.run.teacher import check_teachers
from fastsd.run.training_data import rare_shapes
from fastsd.run.validation import Validation
from fastsd.sampling.grid import check_samples
from fastsd.sampling.prompts import notes_on_prompts
from fastsd.terminal.console import STDOUT, Console
from fastsd.terminal.texts import size_text
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.optim import optimizer_class
from fastsd.train.schedule import check_length
from fastsd.train.stage_notes import stage_notes


def check_file(load: Callable[[], Config], console: Console = STDOUT) -> None:
    """Check the config that `load` reads. Unknown keys and wrong values of stages are problems, and the rest is checked too.

    Raises:
        UserError: as `check`; other errors in the config leave nothing to check.
    """
    try:
        config, invalid = load(), ""
    except UserError as error:
        usable = _usable(error.table) if error.table else None
        if usable is None:
            raise
        config, invalid = usable, str(error)
    check(config, console, invalid)


def _usable(table: dict[str, Any]) -> Config | None:
    """Return a config without the unknown keys and the wrong values of stages, or None if that is invalid too.

    Other tables are not checked with defaults: these might be wrong in other ways than what the user has written.
    """
    table = deepcopy(table)
    try:
        return Config.model_validate(table, strict=True)
    except ValidationError as error:
        for item in error.errors():
            place = item["loc"] if item["type"] == "extra_forbidden" else item["loc"][:3]
            if item["type"] == "missing" or (item["type"] != "extra_forbidden" and (place[0] != "stage" or len(place) < 3)):
                return None
            with suppress(KeyError, IndexError, TypeError):  # of two values of one key, the second is gone with it
                del reduce(getitem, place[:-1], cast("Any", table))[place[-1]]
    with suppress(ValidationError):
        return Config.model_validate(table, strict=True)
    return None


def check(config: Config, console: Console = STDOUT, invalid: str = "") -> None:
    """Check everything a run needs and print the results. One error lists all problems.

    Args:
        invalid: problems of the config itself, one a line.

    Raises:
        UserError: there are problems; each has one sentence.
    """
    problems = invalid.splitlines()
    for problem in problems:
        console.echo(f"error config: {problem}")
    is_cached: list[bool] = []

    def attempt(title: str, inspect: Callable[[], str]) -> None:
        try:
            console.echo(f"ok    {title}: {inspect()}")
        except UserError as error:
            if error.code == "no-view":  # a step that is to come, not a problem
                console.echo(f"next  {title}: {error}")
                is_cached.append(False)
                return
            reasons = str(error).split("\n")
            problems.extend(reasons)
            console.echo("\n".join([f"error {title}: {reasons[0]}", *(f"      {reason}" for reason in reasons[1:])]))

    models: list[Model] = []
    images_per_epoch: list[int] = []  # empty until it is known, like `models`
    attempt("device", lambda: _device(config, console))
    notes, warnings = list[str](), list[str]()
    attempt("images", lambda: _images(config, images_per_epoch, notes, warnings))
    attempt("model", lambda: _model(config, models))
    if any(stage.teacher for stage in config.stage):
        attempt("teacher", lambda: _teacher(config))
    if models:
        attempt("cache", lambda: _cache(config, models[0], images_per_epoch, notes, warnings))
        if all(is_cached) and (config.validate_.held_out or config.validate_.stabilised):
            attempt("validation", lambda: _validation(config, models[0], images_per_epoch))
        attempt("export", lambda: _export(config, models[0]))
        attempt("samples", lambda: _samples(models[0], config, warnings))
    for i in range(len(config.stage)):
        attempt(config.stage_name(i), partial(_stage, config, i, models, images_per_epoch, warnings))
    notes += [clip_skip_note(config.model.clip_skip)] if config.model.clip_skip else []
    notes += filter(None, [license_note(config)])
    for note in notes:
        console.echo(f"note  {note}")
    for warning in (models[0].notes if models else []) + warnings:
        console.warn(warning)
    attempt("run folder", lambda: _disk_space(config, models, images_per_epoch))

    if problems:
        unique = list(dict.fromkeys(problems))
        if console.is_terminal:
            raise UserError("check-problems-shown", f"problems named above: {len(unique)}")
        raise UserError("check-problems", "\n".join(unique))


def _device(config: Config, console: Console) -> str:
    device = choose_device(config.device, console)
    return f"{device}, kernels {choose_ops(config.kernels, device).name}"


def _images(config: Config, images_per_epoch: list[int], notes: list[str], warnings: list[str]) -> str:
    unused = UnusedFiles()
    images, repeated = folders.count(config.data, unused.add)
    notes += unused.lines()
    warnings += unused.warnings()
    images_per_epoch.append(repeated)
    per_epoch = f", {repeated} per epoch" if repeated != images else ""
    return f"{images} in {', '.join(root.path for root in config.data.roots)}{per_epoch}"


def _model(config: Config, models: list[Model]) -> str:
    model = load_to_train(config.model, seed=config.seed)
    models.append(model)
    step = model.vae.downscale * model.unet.cfg.downscale
    build.check_resolution(config, model.vae.downscale, step)
    if not config.data.buckets:  # bucket sides may be odd in latents: the UNet upsamples to its skip connections' sizes
        build.check_resolution(config, step, component="UNet")
    parameters = sum(p.numel() for p in model.unet.parameters())
    return f"{config.model.base}, UNet {parameters:,} parameters, VAE {model.vae.latent_space}"


def _teacher(config: Config) -> str:
    check_teachers(config)
    return config.model.base


def _export(config: Config, model: Model) -> str:
    check_export(config, model)
    return "a diffusers folder" + (f" and a single file in {config.export.dtype}" if config.export.single_file else "")


def _samples(model: Model, config: Config, warnings: list[str]) -> str:
    description = check_samples(model, config)
    warnings += notes_on_prompts(model.text, config.sample)
    return description


def _stage(config: Config, index: int, models: list[Model], images_per_epoch: list[int], warnings: list[str]) -> str:
    stage, name = config.stage[index], config.stage_name(index)
    trained_size = ""
    if models:
        selected(models[0], stage.reinit, f"stage {name!r}: reinit")
        trained = selected(models[0], stage.train, f"stage {name!r}: train")
        trained_size = f" ({parameter_count(models[0], trained):,} parameters)"
    steps = check_length(stage, name, images_per_epoch[0]) if images_per_epoch else None
    if models:
        warnings += stage_notes(stage, name, steps or ENDLESS, models[0].scheduler)
    amount = steps if steps and steps < ENDLESS else stage.until
    length = f"{amount} steps" if isinstance(amount, int) else amount
    images = "1 image" if stage.batch == 1 else f"{stage.batch} images"
    return f"{stage.optimizer} on {'+'.join(stage.train)}{trained_size}, {length} with {images} per step"


def _cache(config: Config, model: Model, images_per_epoch: list[int], notes: list[str], warnings: list[str]) -> str:
    with closing(LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))) as latents:
        folder = Path(config.cache.dir)
        notes += filter(None, [several_captions(latents)])
        warnings += filter(None, [lists.enlarged(folder, latents.name)])
        args = latents, model.text.tokenize, config.seed
        loaders = [Loader(*args, stage, data=config.data) for stage in config.stage]
        warnings += filter(None, (rare_shapes(config, index, loader) for index, loader in enumerate(loaders)))
        if changes := lists.changes(config.data, folder, latents.name):
            warnings.append(str(changes))
        elif not lists.list_path(folder, latents.name).exists():
            warnings.append(
                f"cache.dir {folder} does not know its files; run `fastsd cache CONFIG` once, so that changes are noticed"
            )
        with suppress(UserError):  # captions are then tokenized during training, which says so
            text = model.text
            warnings += filter(None, [Tokens(latents, text.tokenizer, text.window, text.chunks, text.cut).truncation()])
        if config.cache.hidden_states:
            TextEmbeddings(config.cache, latents, model.text).close()
        images_per_epoch[:] = [loaders[0].images]
        return f"{latents.meta.cached} of {latents.meta.images} images cached in {config.cache.dir}"


def _validation(config: Config, model: Model, images_per_epoch: list[int]) -> str:
    with closing(LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))) as latents:
        sets = choose_splits(latents, config, saved_splits(config))
        loader_args = latents, model.text.tokenize, config.seed, config.stage[0]
        loader = Loader(*loader_args, data=config.data, left_out=sets.left_out)
        images_per_epoch[:] = [loader.images]
        return f"{Validation(model, loader, sets, config.validate_)}, every {config.validate_.every}"


def _disk_space(config: Config, models: list[Model], images_per_epoch: list[int]) -> str:
    """Check that the disk has space for all files of the run that exist at once."""
    folder = Path(config.run).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not models:
        return f"{size_text(free)} free"
    model = models[0]
    modules = {name: model.component(name) for name in COMPONENTS} | {"vae": model.vae.module}
    fp32_bytes = {name: sum(p.numel() for p in module.parameters()) * 4 for name, module in modules.items()}

    sizes, averages, lengths, changed = list[int](), list[int](), list[tuple[int, float] | None](), list[list[str]]()
    for stage in config.stage:
        trained = dict[str, set[str]]()
        with suppress(UserError):  # `_stage` has reported the error
            trained = selected(model, stage.train, "train")
        averages.append(4 * len(stage.averages) * parameter_count(model, trained))
        changed.append(changed_components(trained))
        state = 4 * len(optimizer_class(stage.optimizer).slots) * parameter_count(model, trained)
        sizes.append(sum(fp32_bytes[name] for name in changed[-1]) + state + averages[-1])
        steps = stage.steps(images_per_epoch[0]) if images_per_epoch else ENDLESS
        lengths.append((steps, 0.0) if steps < ENDLESS else None)

    epoch = images_per_epoch[0] if images_per_epoch else 0
    needed = run_bytes(config, fp32_bytes, sizes, averages, changed[0], lengths, epoch)["total"]
    if needed > free:
        raise UserError(
            "run-disk-space",
            f"run is {config.run!r}: its checkpoints, exported models and samples need about {size_text(needed)}, but the "
            f"disk has {size_text(free)} free; free up space, lower keep_checkpoints, keep fewer for good (keep_every), or "
            "set export.single_file = false",
        )
    return f"{config.run}; its files need about {size_text(needed)} of {size_text(free)} free"
