"""`fastsd redraw`: a data set that a model generates from the captions or images of another data set.

    OUT/redraw.json                  the model, images, settings and start; written first
    OUT/00000012.png 00000012.txt    image number 12 of the cache, redrawn, and its first caption

Drawing starts in one of three ways: from pure noise; from an image's latents, noised to a timestep; or from the unchanged
latents, which are only decoded (timestep 0).

Noise is a function of (seed, image number). Batches do not depend on how many of their images are requested or already exist.
A data set therefore has the same bits if it is made in one call, in several calls, or with interruptions.

Shapes: B images of one size, C latent channels, H x W latent positions.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsd.commands.progress import progress
from fastsd.commands.validate import latents_of
from fastsd.config.schema import Config, ModelTable
from fastsd.data.building.build import ProgressCallback
from fastsd.data.building.pipeline import CacheProgress
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.captions import select
from fastsd.errors import Stopped, UserError
from fastsd.model.flow_schedule import timesteps_of
from fastsd.model.formats.load import load_vae, table_of
from fastsd.model.model import Model
from fastsd.model.vae import Vae
from fastsd.run.folder import resolve_model
from fastsd.sampling.generate import BATCH, check_steps, denoise, load_to_sample, to_image
from fastsd.storage import TEMPORARY, flush_folder, replace_file, write_bytes
from fastsd.terminal.console import STDOUT, Console
from fastsd.train.device import choose_device
from fastsd.train.precision import precision_switches
from fastsd_kernels import noise

SETTINGS_FILE = "redraw.json"
_SAMPLER_NOISE = 1 << 40  # plus an image's number: the position of the noise that a stochastic sampler adds
_SAMPLING_KEYS = {"sampler", "steps", "guidance", "negative"}


def redraw(
    name: str,
    config: Config,
    out: Path,
    start: int | None = None,
    limit: int | None = None,
    precision: str = "fp32",
    device: str = "",
    console: Console = STDOUT,
) -> int:
    """Redraw the cached images of a config into a folder that another config can use in `data.folders`.

    Args:
        name: a diffusers folder, hub id, single file, run (its newest checkpoint) or checkpoint.
        config: has the images, the tag filter, [sample], the seed, and those [model] settings that the model does not store.
        start: timestep to which latents are noised; 0 = only decode them; None = start from pure noise.
        limit: draw only the first `limit` images; None = all.
        device: name of the device; "" = the config's.

    Returns:
        The number of images drawn in this call.

    Raises:
        UserError: the model does not load, its noise schedule does not have `start`, there are no latents, or `out` has other
            contents, was made with other settings or cannot be written.
        Stopped: the user pressed Ctrl-C. The images drawn so far remain.
    """
    start_time = time.perf_counter()
    table = table_of(resolve_model(name), config.model)
    model, vae = _load(table, config, start, precision, device or config.device)
    cache = closing(_any_latents(table, config, vae)) if start is None else latents_of(table.base, config, vae)

    with cache as latents:
        selected = select(latents, tuple(config.data.include), tuple(config.data.exclude), config.stage[0].tag_separator)
        count = len(latents) if selected is None else len(selected)
        num_images = min(limit or count, count)
        try:
            _claim(out, _settings(table, config, latents, start, precision))
            method = "from pure noise" if start is None else f"noised to timestep {start}" if start else "decoded unchanged"
            console.echo(f"{table.base}: {num_images} of {len(latents)} images cached in {config.cache.dir}, {method}")
            with precision_switches(precision, model.unet if model else None), progress() as report_progress:
                redrawer = _Redrawer(config, latents, vae, model, start)
                num_drawn = redrawer.write(out, _batches(latents, selected), num_images, report_progress)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                "redraw-unwritable",
                f"OUT {out} cannot be written ({reason}); fix that and run the same command again to continue",
            ) from error
        except KeyboardInterrupt:
            raise Stopped(f"{out}: redrawing stopped") from None

    seconds = time.perf_counter() - start_time
    counts = f"{num_drawn} drawn now, {num_images - num_drawn} already existed"
    console.echo(f"{num_images} images in {out}: {counts} ({seconds:.1f} s)")
    return num_drawn


def _load(table: ModelTable, config: Config, start: int | None, precision: str, device: str) -> tuple[Model | None, Vae]:
    """Load the model and the VAE that decodes. The model is None if latents are only decoded."""
    if start == 0:
        return None, load_vae(table).to(choose_device(device), torch.float32)
    model = load_to_sample(table, device, precision)
    timesteps = timesteps_of(model.scheduler)
    if start is not None and not 0 < start < timesteps:
        advice = f"give 1 to {timesteps - 1}, or 0 to decode the latents unchanged"
        raise UserError(
            "redraw-start", f"--start is {start}, but the noise schedule of {table.base} has {timesteps} timesteps; {advice}"
        )
    check_steps(model, config.sample.steps)
    return model, model.vae


def _any_latents(table: ModelTable, config: Config, vae: Vae) -> LatentCache:
    """Open the config's latents. They may be from any VAE, because only their captions and sizes are used."""
    latents = LatentCache.open(config.cache.dir, view_name(config, load_vae(config.model).hash))
    if latents.meta.downscale != vae.downscale:
        raise UserError(
            "redraw-downscale",
            f"cache.dir is {config.cache.dir}: its latents are {latents.meta.downscale} times smaller than the images, but "
            f"{table.base} needs {vae.downscale} times; set model.vae to its VAE and run `fastsd cache CONFIG` first",
        )
    return latents


def _settings(table: ModelTable, config: Config, latents: LatentCache, start: int | None, precision: str) -> dict[str, object]:
    """Collect everything that determines the redrawn images, but not how many are drawn."""
    base = os.path.abspath(table.base) if os.path.exists(table.base) else table.base
    view = f"{latents.name} {latents.sha256[:16]}"
    unset = {"flow_shift"} if table.flow_shift is None else set()  # folders of older versions do not have this key
    settings = {"base": base, "precision": precision, "start": start, "seed": config.seed}
    model = table.model_dump(exclude={"lora"} | unset) | settings
    images = {"view": view, "include": config.data.include, "exclude": config.data.exclude}
    # Folders of older versions do not have this key.
    rescale = {"guidance_rescale": config.sample.guidance_rescale} if config.sample.guidance_rescale else {}
    return model | images | config.sample.model_dump(include=_SAMPLING_KEYS) | rescale


def _claim(out: Path, settings: dict[str, object]) -> None:
    """Write `settings` into `out`. Raises UserError if it has other settings or other contents."""
    path = out / SETTINGS_FILE
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not name.startswith(TEMPORARY) for name in os.listdir(out))):
            raise UserError(
                "redraw-out-exists", f"OUT is {str(out)!r}, which already exists and is not from redraw; choose a new folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        existing = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(
            "redraw-settings-unreadable", f"{path}: cannot be read as JSON, so the settings are unknown; choose a new folder"
        ) from None
    keys = [key for key in sorted(settings.keys() | existing.keys()) if existing.get(key) != settings.get(key)]
    if keys:
        differences = ", ".join(f"{key} {existing.get(key)!r} (now {settings.get(key)!r})" for key in keys)
        raise UserError("redraw-settings-differ", f"OUT is {out}, which was made with {differences}; choose another folder")


def _batches(latents: LatentCache, selected: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield batches of image numbers. The images of a batch have the same size."""
    for group in latents.groups:
        numbers = np.arange(group.first, group.first + group.count)
        if selected is not None:
            numbers = selected[slice(*np.searchsorted(selected, [group.first, group.first + group.count]))]
        yield from (numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH))


@dataclass(frozen=True)
class _Redrawer:
    """Draws images. Latents are only decoded if `model` is None."""

    config: Config
    latents: LatentCache
    vae: Vae
    model: Model | None
    start: int | None

    def write(self, out: Path, batches: Iterator[np.ndarray], limit: int, report_progress: ProgressCallback) -> int:
        """Draw the first `limit` images, except those that exist. Return how many were drawn."""
        start_time, done, num_drawn = time.perf_counter(), 0, 0
        for numbers_B in batches:
            names = [f"{number:08d}" for number in numbers_B[: limit - done].tolist()]
            missing = {name for name in names if not all((out / f"{name}{ending}").exists() for ending in (".txt", ".png"))}
            done += len(names)
            if missing:
                captions = self.latents.captions(numbers_B)
                for name, caption, image_3HW in zip(names, captions, self.draw(numbers_B, captions), strict=False):
                    if name in missing:
                        _write(out / f"{name}.txt", caption.encode())
                        to_image(image_3HW).save(png := io.BytesIO(), "PNG")
                        _write(out / f"{name}.png", png.getvalue())
                flush_folder(out)
                num_drawn += len(missing)
                report_progress(CacheProgress("redraw", done, limit, num_drawn / (time.perf_counter() - start_time)))
            if done == limit:
                break
        return num_drawn

    def draw(self, numbers_B: np.ndarray, captions: list[str]) -> Tensor:
        """Return images (B, 3, 8 H, 8 W) in [-1, 1]."""
        latents_BCHW = self.latents.get(numbers_B)["latents"].to(self.vae.device).float()
        if self.model is None or self.start is not None:  # otherwise only their size is used, and they may be any VAE's
            latents_BCHW = self.vae.scale(latents_BCHW)
        if self.model is None:
            return self.vae.decode(latents_BCHW)
        positions_B = torch.from_numpy(numbers_B).to(self.vae.device)
        shape = (self.vae.channels, *latents_BCHW.shape[2:])
        eps_BCHW = noise.normal(self.config.seed, noise.Purpose.REDRAW, positions_B, shape)
        seeds = noise.integers(self.config.seed, noise.Purpose.REDRAW, positions_B + _SAMPLER_NOISE, 2**31 - 1).tolist()
        start_args = () if self.start is None else (latents_BCHW, self.start)
        return self.vae.decode(denoise(self.model, captions, eps_BCHW, seeds, self.config.sample, *start_args))


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(TEMPORARY + path.name)
    write_bytes(temporary, data)
    os.replace(temporary, path)
