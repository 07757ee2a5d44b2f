"""Floor 3: what the command line does besides training - `fastsd cache`, `check` and `sample`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastsd.config import Config, ModelTable, SampleTable
from fastsd.data import build, sources, store
from fastsd.data.cache import LatentCache, view_name
from fastsd.errors import UserError
from fastsd.model.files import Model, load_model, load_vae
from fastsd.sample import check_samples, generate, grid, read_prompts
from fastsd.train.checkpoint import checkpoints
from fastsd.train.precision import COMPUTE_DTYPE, choose_device, choose_ops, set_precision

Options = TypeVar("Options", ModelTable, SampleTable)
PLAIN_SECONDS = 10  # between progress lines when the output is not a terminal


def cache(config: Config, console: Console | None = None) -> build.Counts:
    """Encode what is missing and say what came of it. Raises UserError as `build_cache` does."""
    console = console or Console()
    for _ in sources.scan(config.data.folders):  # a wrong folder is said before a model is loaded
        break
    device = choose_device(config.device)
    set_precision(config.cache.precision)
    vae = load_vae(config.model).to(device, COMPUTE_DTYPE[config.cache.precision])
    name = config.model.vae or config.model.base
    _say(
        console,
        f"VAE {name}, {vae.channels} channels, factor {vae.scaling_factor:g}, {config.cache.precision} on {device}",
    )
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        counts = build.build_cache(config, vae, _live(bar) if console.is_terminal else _plain(console))
    seconds = time.perf_counter() - start
    _say(console, f"{counts.cached} of {counts.images} images cached in {config.cache.dir}: {counts.encoded} encoded now, "
         f"{counts.latents - counts.encoded} were there ({seconds:.1f} s)")  # fmt: skip
    if counts.empty_captions:
        _say(console, f'{counts.empty_captions} images have no caption or an empty one; they train as ""')
    if counts.rejected:
        _say(console, f"{counts.rejected} rejected: " + ", ".join(f"{n} x {why}" for why, n in counts.reasons.items()))
        for example in counts.examples:
            _say(console, f"  {example}")
    return counts


def _live(bar: Progress) -> build.Report:
    tasks: dict[str, object] = {}

    def show(event: build.Progress) -> None:
        task = tasks.get(event.phase)
        if task is None:
            task = tasks[event.phase] = bar.add_task(event.phase, total=event.total or None, speed="")
        bar.update(task, completed=event.done, speed=f"{event.images_per_second:.1f} img/s")  # type: ignore[arg-type]

    return show


def _plain(console: Console) -> build.Report:
    last = time.monotonic()

    def show(event: build.Progress) -> None:
        nonlocal last
        if time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            _say(console, f"{event.phase} {event.done}/{event.total or '?'} | {event.images_per_second:.1f} img/s")

    return show


def inspect_cache(config: Config, *, verify: bool, prune: bool, stats: bool, console: Console | None = None) -> None:
    """`fastsd cache` with --verify, --prune or --stats. Raises UserError when the verification finds damage."""
    console = console or Console()
    folder = config.cache.dir
    problems = store.verify(folder) if verify else []
    if verify and not problems:
        _say(console, f"{folder}: every latent and view is as its sha256 says")
    if prune:
        gone = store.prune(folder)
        _say(console, f"{folder}: {gone.shards} unused shards deleted, {gone.bytes / 1e6:.1f} MB")
    if stats:
        found = store.stats(folder)
        _say(console, f"{folder}: {found.latents} latents in {found.shards} shards, {found.shard_bytes / 1e6:.1f} MB")
        for name, meta in found.views.items():
            _say(console, f"  view {name}: {meta.cached} of {meta.images} images at {meta.resolution} px, VAE {meta.vae_name}, "
                 f"{meta.rejected} rejected, {meta.empty_captions} empty captions")  # fmt: skip
        for reason, count in found.rejected.items():
            _say(console, f"  rejected {count} x {reason}")
    if problems:
        raise UserError("\n".join(problems))


def check(config: Config, console: Console | None = None) -> None:
    """Go through everything a run needs, say what is there, and end with all that must be changed.

    Raises:
        UserError: every problem found, a sentence each.
    """
    console = console or Console()
    problems: list[str] = []

    def attempt(what: str, look: Callable[[], str]) -> None:
        try:
            _say(console, f"ok    {what}: {look()}")
        except UserError as error:
            problems.extend(str(error).split("\n"))
            _say(console, f"wrong {what}")

    models: list[Model] = []
    found: list[sources.Source] = []
    attempt(
        "device",
        lambda: f"{choose_device(config.device)}, kernels {choose_ops(config.kernels, choose_device(config.device)).name}",
    )
    attempt("images", lambda: _images(config, found))
    attempt("model", lambda: _model(config, models))
    if models:
        attempt("cache", lambda: _cache(config, models[0]))
        attempt("samples", lambda: check_samples(models[0], config))
    for i, stage in enumerate(config.stage):
        steps = stage.steps(len(found)) if found else 0
        _say(
            console,
            f"ok    {config.stage_name(i)}: {stage.optimizer} on {'+'.join(stage.train)}, {steps} steps of {stage.batch}",
        )
    attempt("run folder", lambda: _room(config, models))
    if problems:
        raise UserError("\n".join(problems))


def _images(config: Config, found: list[sources.Source]) -> str:
    found.extend(sources.scan(config.data.folders))
    return f"{len(found)} in {', '.join(config.data.folders)}"


def _model(config: Config, models: list[Model]) -> str:
    model = load_model(config.model)
    models.append(model)
    build.check_resolution(config.data.resolution, model.vae.downscale)
    step = model.vae.downscale * model.unet.cfg.downscale
    if config.data.resolution % step:
        low = max(config.data.resolution // step, 1) * step
        raise UserError(f"data.resolution is {config.data.resolution}, no multiple of {step} as this UNet needs; use {low}")
    parameters = sum(p.numel() for p in model.unet.parameters())
    return f"{config.model.base}, UNet {parameters:,} parameters, VAE factor {model.vae.scaling_factor:g}"


def _cache(config: Config, model: Model) -> str:
    latents = LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))
    return f"{latents.meta.cached} of {latents.meta.images} images cached in {config.cache.dir}"


def _room(config: Config, models: list[Model]) -> str:
    """Disk for the checkpoints that can exist at once: fp32 weights, state tensors and the average of those trained."""
    folder = Path(config.run).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not models:
        return f"{free / 1e9:.1f} GB free"
    model = models[0]
    size = {part: sum(p.numel() for p in model.part(part).parameters()) * 4 for part in ("unet", "text_encoder")}
    each = [sum(size[part] * (2 + (s.optimizer != "lion") + (s.ema > 0)) for part in s.train) for s in config.stage]
    need = sum(size.values()) + max(e * (s.keep_checkpoints + 1) for e, s in zip(each, config.stage, strict=True))
    if need > free:
        raise UserError(
            f"run is {config.run!r}: its checkpoints need about {need / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB; "
            "free space, or lower keep_checkpoints"
        )
    return f"{config.run}, checkpoints need about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"


def sample(source: dict[str, Any], settings: dict[str, Any], out: Path, precision: str, device: str) -> None:
    """`fastsd sample`: load a model, draw, write OUT/NNN-seed.png and OUT/grid.png. Raises UserError."""
    table = _from_options(SampleTable, settings)
    prompts = read_prompts(table)
    if not prompts:
        raise UserError("there is nothing to draw; give --prompt TEXT or --prompts FILE")
    run = Path(source["base"])
    if (run / "checkpoints").is_dir():  # a run: its newest checkpoint
        found = checkpoints(run / "checkpoints")
        if not found:
            raise UserError(f"{run}: this run has no checkpoint yet; wait for one, or name a model")
        source = {**source, "base": str(found[-1])}
    where = choose_device(device)
    model = load_model(_from_options(ModelTable, source), choose_ops("auto", where))
    for module in (model.unet, model.text.module):
        module.to(where, COMPUTE_DTYPE[precision])
    set_precision(precision, model.unet)
    model.vae.to(where, torch.float32)
    size = table.size or model.unet.cfg.sample_size * model.vae.downscale
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]
    images = generate(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], table, size)
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, (_, seed)) in enumerate(zip(images, pairs, strict=True)):
        image.save(out / f"{i:03d}-{seed}.png")
    grid(images, table.images, prompts).save(out / "grid.png")
    print(f"{len(images)} images and grid.png in {out}")


def _from_options(table: type[Options], settings: dict[str, Any]) -> Options:
    """A config table from command line options. Raises UserError naming the option."""
    try:
        return table.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UserError(f"--{option} is {first['input']!r}; {first['msg'].lower()}") from None


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
