"""`fastsd redraw` - a data set made by a model: what it draws from another one's captions, or from its images.

    OUT/redraw.json                  which model, images, settings and start; written first
    OUT/00000012.png 00000012.txt    number 12 of the cached images, and its first caption

Three ways, by where an image starts: from pure noise; from its latent, noised to a timestep; from its latent as it is, which
is only decoded (timestep 0).  Noise is a function of (seed, number).  Batches are the same however many of their images are
asked for or there already, so a set has the same bits whether it was made at once, piece by piece, or after interruptions.

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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastsd.commands.progress import progress
from fastsd.commands.validate import latents_of
from fastsd.config.schema import Config, ModelTable
from fastsd.data.building.build import Report
from fastsd.data.building.pipeline import Progress
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.captions import select
from fastsd.errors import Stopped, UserError
from fastsd.model.formats.load import load_vae
from fastsd.model.model import Model
from fastsd.model.vae import Vae
from fastsd.run.folder import model_named
from fastsd.sampling.generate import BATCH, check_steps, denoise, load_to_sample, to_image
from fastsd.storage import TEMPORARY, flush_folder, replace_file, write_bytes
from fastsd.train.objective import alphas_cumprod
from fastsd.train.precision import choose_device, set_precision
from fastsd_kernels import noise

SAID = "redraw.json"
_OWN = 1 << 40  # added to a number: noise that a stochastic sampler adds on its own
_SAMPLING = {"sampler", "steps", "guidance", "negative"}


def redraw(
    name: str, config: Config, out: Path, start: int | None = None, limit: int | None = None, precision: str = "fp32",
    device: str = "", console: Console | None = None,
) -> int:  # fmt: skip
    """Draw the cached images of a config anew, into a folder that can be `data.folders` of another; how many were drawn now.

    Args:
        name: MODEL - diffusers folder, hub id, single file, a run (its newest checkpoint) or a checkpoint.
        config: its images, filter by tag, [sample] and seed; of its [model] what the model itself does not say.
        start: the timestep to which latents are noised; 0 = they are only decoded; None = from pure noise.
        limit: only the first so many images; None = all.
        device: "" = the config's.

    Raises:
        UserError: a model that does not load, a start that its noise schedule does not have, no latents, or an `out` that is
            something else, was made with other settings or cannot be written.
        Stopped: by Ctrl-C; what was drawn is kept.
    """
    console, began = console or Console(), time.perf_counter()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    table = _table(model_named(name), config.model)
    model, vae = _load(table, config, start, precision, device or config.device)
    cache = closing(_any_latents(table, config, vae)) if start is None else latents_of(table.base, config, vae)
    with cache as latents:
        selected = select(latents, tuple(config.data.include), tuple(config.data.exclude), config.stage[0].tag_separator)
        count = len(latents) if selected is None else len(selected)
        wanted = min(limit or count, count)
        try:
            _claim(out, _said(table, config, latents, start, precision))
            how = "from pure noise" if start is None else f"noised to timestep {start}" if start else "decoded once"
            say(f"{table.base}: {wanted} of {len(latents)} images cached in {config.cache.dir}, {how}")
            with progress(console) as report:
                made = _Work(config, latents, vae, model, start).make(out, _batches(latents, selected), wanted, report)
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"OUT {out} cannot be written ({why}); mend that, and the same line again goes on") from error
        except KeyboardInterrupt:
            raise Stopped(f"{out}: redrawing stopped") from None
    seconds = time.perf_counter() - began
    say(f"{wanted} images in {out}: {made} drawn now, {wanted - made} were there ({seconds:.1f} s)")
    return made


def _table(base: str, table: ModelTable) -> ModelTable:
    """What loads the model as it is, with its own VAE: how captions are read, and what a file does not say, is the config's."""
    if not Path(base).is_file():
        revision = table.revision if base == table.base else ""
        return ModelTable(base=base, revision=revision, clip_skip=table.clip_skip, chunks=table.chunks)
    factor = None if table.vae else table.vae_scaling_factor  # of the config's VAE, which may be another
    own = {"base": base, "vae": "", "vae_scaling_factor": factor, "tokenizer": table.tokenizer or table.base, "lora": None}
    return table.model_copy(update=own)


def _load(table: ModelTable, config: Config, start: int | None, precision: str, device: str) -> tuple[Model | None, Vae]:
    """The model, where one draws, and the VAE that decodes."""
    if start == 0:
        set_precision(precision)
        return None, load_vae(table).to(choose_device(device), torch.float32)
    model = load_to_sample(table, device, precision)
    timesteps = len(alphas_cumprod(model.scheduler))
    if start is not None and not 0 < start < timesteps:
        advice = f"give 1 to {timesteps - 1}, or 0 to decode the latents as they are"
        raise UserError(f"--start is {start} and the noise schedule of {table.base} has {timesteps} timesteps; {advice}")
    check_steps(model, config.sample)
    return model, model.vae


def _any_latents(table: ModelTable, config: Config, vae: Vae) -> LatentCache:
    """The latents of the config, for their captions and sizes alone: of whatever VAE."""
    latents = LatentCache.open(config.cache.dir, view_name(config, load_vae(config.model).hash))
    if latents.meta.downscale != vae.downscale:
        raise UserError(
            f"the latents in {config.cache.dir} are {latents.meta.downscale} times smaller than their images and those of "
            f"{table.base} {vae.downscale} times; name its VAE in model.vae and run `fastsd cache CONFIG` first"
        )
    return latents


def _said(table: ModelTable, config: Config, latents: LatentCache, start: int | None, precision: str) -> dict[str, Any]:
    """All that decides what a set is but how many of its images are there."""
    base = os.path.abspath(table.base) if os.path.exists(table.base) else table.base
    return {
        **table.model_dump(exclude={"lora"}), "base": base, "precision": precision, "start": start,
        "seed": config.seed, "view": f"{latents.name} {latents.sha256[:16]}", "include": config.data.include,
        "exclude": config.data.exclude, **config.sample.model_dump(include=_SAMPLING),
    }  # fmt: skip


def _claim(out: Path, said: dict[str, Any]) -> None:
    """Say in `out` what it is going to be. Raises UserError: it is something else already."""
    path = out / SAID
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not name.startswith(TEMPORARY) for name in os.listdir(out))):
            raise UserError(f"OUT is {str(out)!r}, which exists and is nothing that redraw has made; name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(said, indent=2) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} cannot be read, so what OUT was made with is unknown; name a new folder") from None
    keys = [key for key in sorted(said.keys() | found.keys()) if found.get(key) != said.get(key)]
    if keys:
        others = ", ".join(f"{key} {found.get(key)!r} (now {said.get(key)!r})" for key in keys)
        raise UserError(f"OUT {out} was made with {others}; name another folder")


def _batches(latents: LatentCache, selected: np.ndarray | None) -> Iterator[np.ndarray]:
    """Numbers of images of one size."""
    for group in latents.groups:
        numbers = np.arange(group.first, group.first + group.count)
        if selected is not None:
            numbers = selected[slice(*np.searchsorted(selected, [group.first, group.first + group.count]))]
        yield from (numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH))


@dataclass(frozen=True)
class _Work:
    """What draws. `model` None: nothing does, latents are decoded."""

    config: Config
    latents: LatentCache
    vae: Vae
    model: Model | None
    start: int | None

    def make(self, out: Path, batches: Iterator[np.ndarray], wanted: int, report: Report) -> int:
        """Draw those of the first `wanted` images that are not there; their number."""
        began, done, made = time.perf_counter(), 0, 0
        for numbers_B in batches:
            names = [f"{number:08d}" for number in numbers_B[: wanted - done].tolist()]
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
                made += len(missing)
                report(Progress("redraw", done, wanted, made / (time.perf_counter() - began)))
            if done == wanted:
                break
        return made

    def draw(self, numbers_B: np.ndarray, captions: list[str]) -> Tensor:
        """Images (B, 3, 8 H, 8 W) in [-1, 1]."""
        latents_BCHW = self.vae.scale(self.latents.get(numbers_B)["latents"].to(self.vae.device).float())
        if self.model is None:
            return self.vae.decode(latents_BCHW)
        positions_B = torch.from_numpy(numbers_B).to(self.vae.device)
        shape = (self.vae.channels, *latents_BCHW.shape[2:])
        eps_BCHW = noise.normal(self.config.seed, noise.Purpose.REDRAW, positions_B, shape)
        seeds = noise.integers(self.config.seed, noise.Purpose.REDRAW, positions_B + _OWN, 2**31 - 1).tolist()
        begin = () if self.start is None else (latents_BCHW, self.start)
        return self.vae.decode(denoise(self.model, captions, eps_BCHW, seeds, self.config.sample, *begin))


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(TEMPORARY + path.name)
    write_bytes(temporary, data)
    os.replace(temporary, path)
