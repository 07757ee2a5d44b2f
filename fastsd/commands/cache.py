"""`fastsd cache`: encode images and captions into the latent cache, or inspect an existing cache."""

from __future__ import annotations

import os
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastsd.commands.arguments import is_alone, shows_progress
from fastsd.commands.progress import progress
from fastsd.config.schema import Config
from fastsd.data.building import build, lists, upkeep
from fastsd.data.building.buckets import Buckets
from fastsd.data.building.collect import one_at_a_time
from fastsd.data.building.embed_captions import write_text_embeddings
from fastsd.data.building.machines import Division, joined, machine_name
from fastsd.data.building.store import Store, disk_errors
from fastsd.data.building.tokenize_captions import write_tokens
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.captions import several_captions
from fastsd.data.sources import folders
from fastsd.data.tokens import Tokens
from fastsd.errors import Stopped, UserError
from fastsd.model.formats.adapters import MADE_BY, load_merged
from fastsd.model.formats.load import load_text, load_tokenizer, load_vae, locate
from fastsd.model.shapes import read_shapes
from fastsd.model.vae import Vae
from fastsd.run.compilation import compile_kernels, kernels_of
from fastsd.run.launches import encoder_launches
from fastsd.terminal.console import STDOUT, Console, work
from fastsd.terminal.texts import numbered, size_text
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd_kernels import TRITON
from fastsd_kernels.launch import INTERPRETED, architecture

REASONS = 8  # most rejection reasons to print


def cache(config: Config, console: Console = STDOUT, machine: str = "") -> build.CacheCounts:
    """Encode the images that are missing and print a summary. Under torchrun, each process uses its own GPU.

    Args:
        machine: name of this machine, if several fill the cache, see `machines.machine_name`.

    Raises UserError as `build_cache` does.
    """
    data = config.data
    if not shows_progress():  # the first rank tells of the whole cache, and of its own part
        console = Console(quiet=True, force_terminal=False)
    with work("listing data.folders"):
        next(folders.scan_for(data), None)  # report a wrong folder before a model is loaded
    device = choose_device(config.device, console)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = choose_device(f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}")
    ops = choose_ops(config.kernels, device)
    vae = load_vae(config.model, ops=ops).to(device, COMPUTE_DTYPE[config.cache.precision])
    vae_name = config.model.vae or config.model.base
    unet_step = 1
    with suppress(UserError):  # a base that cannot be trained is no problem here
        unet_step = read_shapes(config.model)[0].unet.downscale
    build.check_resolution(config, vae.downscale, vae.downscale * unet_step)
    console.echo(f"VAE {vae_name}: {vae.channels} latent channels, {vae.latent_space}, {config.cache.precision} on {device}")
    try:
        tokenizer = load_tokenizer(config.model)[0]
    except UserError as error:  # training needs a tokenizer, but encoding images does not
        tokenizer = None
        console.warn(str(error))

    if ops is TRITON and not INTERPRETED and not data.latents:
        _compile_encoder(config, vae, console)
    start_time = time.perf_counter()
    name = machine_name(machine, os.environ)
    with (
        joined(Path(config.cache.dir), name, view_name(config, vae.hash), console.echo) as division,
        precision_switches(config.cache.precision),
        progress() as report_progress,
    ):
        counts = build.build_cache(config, vae, report_progress, console.echo, division)
        view = counts.view
        if tokenizer:
            division.once("token ids", lambda: _cache_tokens(config, view, tokenizer, division, console))
        if config.cache.hidden_states:
            embed = partial(_cache_text_embeddings, config, view, device, report_progress, division, console)
            division.once("text embeddings", embed)
        division.finish()
    seconds = time.perf_counter() - start_time

    present = counts.latents - counts.encoded
    origin = f"{counts.encoded} encoded now, {present} already cached"
    if name or not is_alone():
        origin = f"{counts.encoded} encoded by this process, {present} by others or before"
    console.echo(f"{counts.cached} of {counts.images} images cached in {config.cache.dir}: {origin} ({seconds:.1f} s)")
    if counts.encoded:
        rates = ", ".join(f"{step} {rate:.1f} img/s" for step, rate in counts.rates.items())
        console.echo(f"speed of each pipeline step alone: {rates}")
    with closing(LatentCache.open(config.cache.dir, counts.view)) as latents:
        _echo(console, several_captions(latents))
    if counts.empty_captions:
        images = numbered(counts.empty_captions, "image has", "images have")
        console.warn(f'{images} no caption or an empty one; the caption "" is trained')
    if counts.rejected:
        console.warn(f"{counts.rejected} rejected:")
        print_reasons(console, counts.reasons)
        for example in counts.examples:
            console.echo(f"  {example}")
        if counts.rejected > len(counts.examples):
            console.echo(f"  and {counts.rejected - len(counts.examples)} more")
    _print_lists(Path(config.cache.dir), counts.view, console)
    return counts


def _print_lists(folder: Path, view: str, console: Console, indent: str = "") -> None:
    """Print what was found in the folders besides usable images, and the file that names it all."""
    unused = lists.unused_files(folder, view)
    for line in unused.lines():
        _echo(console, line, indent)
    for warning in filter(None, (lists.enlarged(folder, view), *unused.warnings())):
        console.warn(warning)
    path = lists.list_path(folder, view)
    if path.exists() and path.stat().st_size:
        console.echo(f"{indent}these files are named in {path}")


def _compile_encoder(config: Config, vae: Vae, console: Console) -> None:
    """Compile the kernels that encode images of the config's sizes. With `no_upscale` any size may occur: take the largest."""
    resolution = config.data.resolution
    sizes = Buckets(resolution, config.data.buckets).sizes or [(resolution, resolution)]
    try:
        with precision_switches(config.cache.precision):
            launches = encoder_launches(dict(vae.module.config), architecture(vae.device), vae.dtype, sizes)
        compile_kernels(kernels_of(launches), console)
    except KeyboardInterrupt:
        raise Stopped(f"{config.cache.dir}: caching stopped") from None


def _echo(console: Console, line: str, indent: str = "") -> None:
    if line:
        console.echo(indent + line)


def print_reasons(console: Console, reasons: dict[str, int]) -> None:
    """Print the most common reasons. Some include a position in a file, so there may be as many reasons as files."""
    for reason, count in list(reasons.items())[:REASONS]:
        console.echo(f"  {count} x {reason}")
    if len(reasons) > REASONS:
        console.echo(f"  and {len(reasons) - REASONS} other reasons")


def _cache_tokens(config: Config, view: str, tokenizer: Any, division: Division, console: Console) -> None:
    with (
        Store.open(Path(config.cache.dir), lock="shared", home=division.home) as store,
        one_at_a_time(store, console.echo),
        disk_errors(store.folder),
        closing(LatentCache.open(store.folder, view)) as latents,
    ):
        write_tokens(latents, tokenizer)


def _cache_text_embeddings(
    config: Config,
    view: str,
    device: torch.device,
    report_progress: build.ProgressCallback,
    division: Division,
    console: Console,
) -> None:
    base = locate(config.model.base, "model.base", config.model.revision)
    # Adapters of a base are merged, which needs the whole model.
    text = load_merged(config.model).text if (base / MADE_BY).is_file() else load_text(config.model, base)
    text.module.to(device)
    with closing(LatentCache.open(config.cache.dir, view)) as latents:
        counts = write_text_embeddings(config.cache, latents, text, report_progress, console.echo, division)
    console.echo(f"text embeddings of {counts.captions} captions: {counts.encoded} encoded now, the others already cached")


def inspect_cache(config: Config, *, verify: bool, prune: bool, stats: bool, console: Console = STDOUT) -> None:
    """Run `fastsd cache` with --verify, --prune or --stats. Raises UserError if the verification finds damage."""
    folder = config.cache.dir
    problems = upkeep.verify(folder) if verify else []
    if verify and not problems:
        console.echo(f"{folder}: all latents and views match their sha256")
    if prune:
        pruned = upkeep.prune(folder)
        console.echo(f"{folder}: {pruned.shards} unused shards deleted ({size_text(pruned.bytes)})")
    if stats:
        contents = upkeep.stats(folder)
        missing = f"; {contents.planned} not encoded (rejected later, or caching was interrupted)" if contents.planned else ""
        text_embeddings = f" and {contents.states} text embeddings" if contents.states else ""
        size = f"{contents.shards} shards, {size_text(contents.shard_bytes)}"
        console.echo(f"{folder}: {contents.latents} latents{text_embeddings} in {size}{missing}")
        for name, view in contents.views.items():
            _print_view(console, name, view)
            _print_captions(config, name, console)
            _print_lists(Path(folder), name, console, indent="    ")
        for problem in contents.damaged:
            console.echo(f"  damaged: {problem}")
        if contents.rejected:
            console.warn(f"{sum(contents.rejected.values())} rejected:")
            print_reasons(console, contents.rejected)
    if problems:
        raise UserError("cache-damaged", "\n".join(problems))


def _print_view(console: Console, name: str, view: upkeep.ViewStats) -> None:
    meta = view.meta
    versions = f", {meta.versions} latents each" if meta.versions > 1 else ""
    counts = f"{meta.rejected} rejected, {meta.empty_captions} empty captions"
    console.echo(f"  view {name}: {meta.cached} of {meta.images} images{versions}, VAE {meta.vae_name}, {counts}")
    if view.masked:
        console.echo(f"    {view.masked} images have a mask")
    console.echo("    sizes: " + ", ".join(f"{size} x {count}" for size, count in view.buckets.items()))
    channels = ", ".join(f"{mean:+.2f} ± {std:.2f}" for mean, std in zip(view.mean, view.std, strict=True))
    console.echo(f"    mean ± std of each scaled channel, from {view.measured} latents: {channels}")
    if view.warning:
        console.warn(view.warning)


def _print_captions(config: Config, view: str, console: Console) -> None:
    """Print how many images have several captions. Print how many captions will be truncated, if their token ids are cached."""
    with suppress(UserError), closing(LatentCache.open(config.cache.dir, view)) as latents:
        _echo(console, several_captions(latents), indent="    ")
        tokenizer = load_tokenizer(config.model)[0]
        tokens = Tokens(latents, tokenizer, tokenizer.model_max_length, config.model.chunks, config.model.cut)
        if truncation := tokens.truncation():
            console.warn(truncation)
