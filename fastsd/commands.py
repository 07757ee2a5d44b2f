"""Floor 3: what the command line does besides training - `fastsd cache`, `check` and `sample`."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastsd.config import Config, ModelTable, SampleTable
from fastsd.data import build, sources, upkeep
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.collect import one_at_a_time
from fastsd.data.held_out import choose_sets
from fastsd.data.loader import Loader
from fastsd.data.states import States, write_states
from fastsd.data.store import Store, disk_errors
from fastsd.data.tokens import Tokens, write_tokens
from fastsd.errors import UserError
from fastsd.model.adapted import load_to_train
from fastsd.model.files import Model, load_text, load_tokenizer, load_vae, locate
from fastsd.model.select import changed_parts, selected, size_of
from fastsd.sample import check_samples, generate, grid, load_to_sample, read_prompts, save_grid
from fastsd.stages import ENDLESS, PARTS
from fastsd.train.checkpoint import checkpoints
from fastsd.train.export import export_bytes
from fastsd.train.objective import Objective, alphas_cumprod
from fastsd.train.precision import COMPUTE_DTYPE, choose_device, choose_ops, set_precision
from fastsd.train.schedule import check_length
from fastsd.train.validation import Validation

Options = TypeVar("Options", ModelTable, SampleTable)
REASONS = 8  # why images were rejected, that are told
PLAIN_SECONDS = 10  # between progress lines when the output is not a terminal


def cache(config: Config, console: Console | None = None) -> build.Counts:
    """Encode what is missing and say what came of it; under torchrun each process on a GPU of its own.

    Raises UserError as `build_cache` does.
    """
    console = console or Console()
    data = config.data
    for _ in sources.scan_for(data):
        break  # a wrong folder is said before a model is loaded
    device = choose_device(config.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    set_precision(config.cache.precision)
    vae = load_vae(config.model, ops=choose_ops(config.kernels, device)).to(device, COMPUTE_DTYPE[config.cache.precision])
    name = config.model.vae or config.model.base
    _say(
        console,
        f"VAE {name}, {vae.channels} channels, factor {vae.scaling_factor:g}, {config.cache.precision} on {device}",
    )
    try:
        tokenizer = load_tokenizer(config.model)[0]
    except UserError as error:  # training will need it; encoding does not
        tokenizer = None
        _say(console, f"note: {error}")
    start = time.perf_counter()
    with progress(console) as report:
        counts = build.build_cache(config, vae, report, lambda line: _say(console, line))
        if tokenizer:
            _cache_tokens(config, counts.view, tokenizer, console)
        if config.cache.hidden_states:
            _cache_states(config, counts.view, device, report, console)
    seconds = time.perf_counter() - start
    _say(console, f"{counts.cached} of {counts.images} images cached in {config.cache.dir}: {counts.encoded} encoded now, "
         f"{counts.latents - counts.encoded} were there ({seconds:.1f} s)")  # fmt: skip
    if counts.encoded:
        _say(console, ", ".join(f"{stage} {rate:.1f} img/s" for stage, rate in counts.rates.items()) + ", each by itself")
    if counts.empty_captions:
        _say(console, f'{counts.empty_captions} images have no caption or an empty one; they train as ""')
    if counts.rejected:
        _say(console, f"{counts.rejected} rejected:")
        _say_reasons(console, counts.reasons)
        for example in counts.examples:
            _say(console, f"  {example}")
        if counts.rejected > len(counts.examples):
            _say(console, f"  and {counts.rejected - len(counts.examples)} more, in the table `rejected` of cache.sqlite")
    return counts


def _say_reasons(console: Console, reasons: dict[str, int]) -> None:
    """The commonest ones: some tell a place in a file, so there may be as many as files."""
    for reason, count in list(reasons.items())[:REASONS]:
        _say(console, f"  {count} x {reason}")
    if len(reasons) > REASONS:
        _say(console, f"  and {len(reasons) - REASONS} other reasons")


def _cache_tokens(config: Config, view: str, tokenizer: Any, console: Console) -> None:
    with (
        Store.open(Path(config.cache.dir), lock="shared") as store,
        one_at_a_time(store, lambda line: _say(console, line)),
        disk_errors(store.folder),
        closing(LatentCache.open(store.folder, view)) as latents,
    ):
        write_tokens(latents, tokenizer)


def _cache_states(config: Config, view: str, device: torch.device, report: build.Report, console: Console) -> None:
    text = load_text(config.model, locate(config.model.base, "model.base", config.model.revision))
    text.module.to(device)
    with closing(LatentCache.open(config.cache.dir, view)) as latents:
        made = write_states(config.cache, latents, text, report, lambda line: _say(console, line))
    _say(console, f"{made.captions} captions, the text encoder's states of {made.encoded} of them encoded now")


@contextmanager
def progress(console: Console) -> Iterator[build.Report]:
    """What shows how far a long work is: a live line on a terminal, else one every few seconds."""
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        yield _live(bar) if console.is_terminal else _plain(console)


def _live(bar: Progress) -> build.Report:
    tasks: dict[str, object] = {}

    def show(event: build.Progress) -> None:
        task = tasks.get(event.phase)
        if task is None:
            task = tasks[event.phase] = bar.add_task(event.phase, total=event.total or None, speed="")
        bar.update(task, completed=event.done, speed=_speed(event))  # type: ignore[arg-type]

    return show


def _plain(console: Console) -> build.Report:
    last = time.monotonic()

    def show(event: build.Progress) -> None:
        nonlocal last
        if time.monotonic() - last > PLAIN_SECONDS:
            last = time.monotonic()
            left = (event.total - event.done) / max(event.images_per_second, 1e-9)
            eta = f" | ETA {timedelta(seconds=round(left))}" if event.total else ""
            _say(console, f"{event.phase} {event.done}/{event.total or '?'} | {_speed(event)}{eta}")

    return show


def _speed(event: build.Progress) -> str:
    what = "captions" if event.phase == "states" else "img"
    return f"{event.images_per_second:.1f} {what}/s" + (f" | {event.limit} limits" if event.limit else "")


def inspect_cache(config: Config, *, verify: bool, prune: bool, stats: bool, console: Console | None = None) -> None:
    """`fastsd cache` with --verify, --prune or --stats. Raises UserError when the verification finds damage."""
    console = console or Console()
    folder = config.cache.dir
    problems = upkeep.verify(folder) if verify else []
    if verify and not problems:
        _say(console, f"{folder}: every latent and view is as its sha256 says")
    if prune:
        gone = upkeep.prune(folder)
        _say(console, f"{folder}: {gone.shards} unused shards deleted, {gone.bytes / 1e6:.1f} MB")
    if stats:
        found = upkeep.stats(folder)
        missing = f", {found.planned} not encoded (rejected since, or caching was interrupted)" if found.planned else ""
        states = f" and {found.states} states of captions" if found.states else ""
        size = f"{found.shards} shards, {found.shard_bytes / 1e6:.1f} MB"
        _say(console, f"{folder}: {found.latents} latents{states} in {size}{missing}")
        for name, view in found.views.items():
            _say_view(console, name, view)
            _say_over_length(config, name, console)
        for problem in found.damaged:
            _say(console, f"  damaged: {problem}")
        if found.rejected:
            _say(console, f"  {sum(found.rejected.values())} rejected:")
            _say_reasons(console, found.rejected)
    if problems:
        raise UserError("\n".join(problems))


def _say_view(console: Console, name: str, view: upkeep.ViewStats) -> None:
    meta = view.meta
    versions = f", {meta.versions} latents each" if meta.versions > 1 else ""
    _say(console, f"  view {name}: {meta.cached} of {meta.images} images{versions}, VAE {meta.vae_name}, "
         f"{meta.rejected} rejected, {meta.empty_captions} empty captions")  # fmt: skip
    if view.masked:
        _say(console, f"    {view.masked} of them with a mask")
    _say(console, "    sizes: " + ", ".join(f"{size} x {count}" for size, count in view.buckets.items()))
    channels = ", ".join(f"{mean:+.2f} ± {std:.2f}" for mean, std in zip(view.mean, view.std, strict=True))
    _say(console, f"    scaled channels, mean ± std over {view.measured} latents: {channels}")
    if view.warning:
        _say(console, f"    warning: {view.warning}")


def _say_over_length(config: Config, view: str, console: Console) -> None:
    """How many captions the text encoder will not see whole, where their token ids are cached."""
    with suppress(UserError), closing(LatentCache.open(config.cache.dir, view)) as latents:
        tokenizer = load_tokenizer(config.model)[0]
        tokens = Tokens(latents, tokenizer, tokenizer.model_max_length, config.model.chunks)
        room = tokens.chunks * tokens.window
        _say(console, f"    {tokens.over_length()} captions are longer than {room} tokens and will be cut")


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
    epoch: list[int] = []
    attempt(
        "device",
        lambda: f"{choose_device(config.device)}, kernels {choose_ops(config.kernels, choose_device(config.device)).name}",
    )
    attempt("images", lambda: _images(config, epoch))
    attempt("model", lambda: _model(config, models))
    if models:
        attempt("cache", lambda: _cache(config, models[0], epoch))
        if config.validate_.held_out or config.validate_.stabilised:
            attempt("validation", lambda: _validation(config, models[0], epoch))
        attempt("samples", lambda: check_samples(models[0], config))
    for i in range(len(config.stage)):
        attempt(config.stage_name(i), partial(_stage, config, i, models, epoch))
    for note in models[0].notes if models else []:
        _say(console, f"note  {note}")
    attempt("run folder", lambda: _room(config, models))
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))


def _images(config: Config, epoch: list[int]) -> str:
    images, repeated = sources.count(config.data)
    epoch.append(repeated)
    again = f", {repeated} an epoch" if repeated != images else ""
    return f"{images} in {', '.join(root.path for root in config.data.roots)}{again}"


def _model(config: Config, models: list[Model]) -> str:
    model = load_to_train(config.model, seed=config.seed)
    models.append(model)
    build.check_resolution(config, model.vae.downscale)
    if not config.data.buckets:  # whose sides may be odd numbers of cells: the UNet's ways down and up remember them
        build.check_resolution(config, model.vae.downscale * model.unet.cfg.downscale, "UNet")
    parameters = sum(p.numel() for p in model.unet.parameters())
    return f"{config.model.base}, UNet {parameters:,} parameters, VAE factor {model.vae.scaling_factor:g}"


def _stage(config: Config, index: int, models: list[Model], epoch: list[int]) -> str:
    stage, name, trained = config.stage[index], config.stage_name(index), ""
    if models:
        selected(models[0], stage.reinit, f"stage {name!r}: reinit")
        Objective(alphas_cumprod(models[0].scheduler), config.seed, stage=stage, prediction=models[0].prediction)
        trained = f" ({size_of(models[0], selected(models[0], stage.train, f'stage {name!r}: train')):,} parameters)"
    steps = check_length(stage, name, epoch[0]) if epoch else None
    length = f"{steps} steps" if steps and steps < ENDLESS else str(stage.until)
    return f"{stage.optimizer} on {'+'.join(stage.train)}{trained}, {length} of {stage.batch} images"


def _cache(config: Config, model: Model, epoch: list[int]) -> str:
    with closing(LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))) as latents:
        if config.cache.hidden_states:
            States(config.cache, latents, model.text).close()
        epoch[:] = [Loader(latents, model.text.tokenize, config.seed, config.stage[0], data=config.data).images]
        return f"{latents.meta.cached} of {latents.meta.images} images cached in {config.cache.dir}"


def _validation(config: Config, model: Model, epoch: list[int]) -> str:
    with closing(LatentCache.open(config.cache.dir, view_name(config, model.vae.hash))) as latents:
        sets, of = choose_sets(latents, config), (latents, model.text.tokenize, config.seed, config.stage[0])
        loader = Loader(*of, data=config.data, left_out=sets.left_out)
        epoch[:] = [loader.images]
        return f"{Validation(model, loader, sets, config.validate_)}, every {config.validate_.every}"


def _room(config: Config, models: list[Model]) -> str:
    """Disk for the checkpoints that can exist at once - fp32 weights, state tensors, averages - and for what is exported."""
    folder = Path(config.run).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not models:
        return f"{free / 1e9:.1f} GB free"
    model = models[0]
    modules = {part: model.part(part) for part in PARTS} | {"vae": model.vae.module}
    size = {part: sum(p.numel() for p in module.parameters()) * 4 for part, module in modules.items()}
    each = [0]
    for stage in config.stage:
        with suppress(UserError):  # what is wrong with a stage has been said
            trained = selected(model, stage.train, "train")
            slots = 1 + (stage.optimizer != "lion") + (stage.ema > 0)
            own = sum(size[part] for part in changed_parts(trained)) + 4 * slots * size_of(model, trained)
            each.append(own * (stage.keep_checkpoints + 1))
    need = sum(size.values()) + max(each) + export_bytes(config, size)
    if need > free:
        raise UserError(
            f"run is {config.run!r}: checkpoints and exported models need about {need / 1e9:.1f} GB and the disk has "
            f"{free / 1e9:.1f} GB; free space, lower keep_checkpoints, or set export.single_file = false"
        )
    return f"{config.run}, checkpoints and exported models need about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free"


def sample(source: dict[str, Any], settings: dict[str, Any], out: Path, precision: str, device: str) -> None:
    """`fastsd sample`: load a model, draw, write OUT/NNN-seed.png and OUT/grid.png. Raises UserError."""
    table = _from_options(SampleTable, settings)
    prompts = read_prompts(table)
    if not prompts:
        raise UserError("there is nothing to draw; give --prompt TEXT or --prompts FILE")
    source = {**source, "base": model_named(source["base"])}
    model = load_to_sample(_from_options(ModelTable, source), device, precision)
    size = table.size or model.unet.cfg.sample_size * model.vae.downscale
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]
    images = generate(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], table, size)
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, (_, seed)) in enumerate(zip(images, pairs, strict=True)):
        image.save(out / f"{i:03d}-{seed}.png")
    save_grid(grid(images, table.images, prompts, table.seed), out / "grid.png")
    print(f"{len(images)} images and grid.png in {out}")


def model_named(name: str) -> str:
    """MODEL of a command line: of a run its newest checkpoint, else what it names. Raises UserError: there is none yet."""
    folder = Path(name) / "checkpoints"
    if not folder.is_dir():
        return name
    found = checkpoints(folder)
    if not found:
        raise UserError(f"{name}: this run has no checkpoint yet; wait for one, or name a model")
    return str(found[-1])


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
