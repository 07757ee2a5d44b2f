"""Floor 3: images from a model - for grids during training, `fastsd sample`, and the demo.

The first latents of an image are a function of its seed alone, so the same seeds show the same composition as a model
changes, and sampling draws on no generator that training uses.  The schedulers are diffusers'.

Shapes: B images, C latent channels, H x W latent positions, L tokens, D context width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fastsd.config import Config, ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.adapted import load_merged
from fastsd.model.files import Model
from fastsd.storage import TEMPORARY
from fastsd.train.precision import COMPUTE_DTYPE, choose_device, choose_ops, set_precision
from fastsd_kernels import noise

GRID_CHUNK = "fastsd"  # the text chunk of a grid's PNG that says what it shows
BATCH = 8  # images a UNet call; the guidance doubles it


def load_to_sample(table: ModelTable, device: str = "auto", precision: str = "fp32") -> Model:
    """A model on its device, ready for `generate`; its VAE decodes in fp32. Raises UserError as `load_model` does."""
    where = choose_device(device)
    model = load_merged(table, choose_ops("auto", where))
    for module in (model.unet, model.text.module):
        module.to(where, COMPUTE_DTYPE[precision])
    set_precision(precision, model.unet)
    model.vae.to(where, torch.float32)
    return model


@torch.no_grad()
def generate(model: Model, prompts: Sequence[str], seeds: Sequence[int], table: SampleTable, size: int) -> list[Image.Image]:
    """One image per (prompt, seed) pair.

    Args:
        model: on its device, in any precision; its weights and mode stay as they are.
        prompts, seeds: of equal length.
        table: sampler, steps, guidance and negative prompt.
        size: px a side.

    Raises:
        UserError: a size that the model's latents cannot have.
    """
    check_size(model, size)
    check_steps(model, table)
    images: list[Image.Image] = []
    side, device = size // model.vae.downscale, model.unet.conv_in.weight.device
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        positions_B = torch.tensor(seeds[rows], device=device)
        eps_BCHW = noise.normal(0, noise.Purpose.SAMPLE, positions_B, (model.unet.cfg.in_channels, side, side))
        latents = denoise(model, prompts[rows], eps_BCHW, seeds[rows], table)
        images += [to_image(image) for image in model.vae.decode(latents)]
    return images


def check_size(model: Model, size: int) -> None:
    """Raise UserError for an image size that the model's latents cannot have."""
    step = model.vae.downscale * model.unet.cfg.downscale
    if size < step or size % step:
        lower = max(step, size // step * step)
        raise UserError(f"sample.size is {size}; this model's images are multiples of {step} px, for example {lower}")


def check_steps(model: Model, table: SampleTable) -> None:
    """Raise UserError for more steps than the noise schedule has."""
    timesteps = model.scheduler.get("num_train_timesteps", 1000)
    if table.steps > timesteps:
        raise UserError(f"sample.steps is {table.steps}, and {model.name} has {timesteps} timesteps; lower it")


def check_samples(model: Model, config: Config) -> str:
    """Find what would stop a sample grid before training starts; returns what the grid will be. Raises UserError."""
    table, size = config.sample, config.sample.size or config.data.resolution
    prompts = read_prompts(table)
    check_size(model, size)
    check_steps(model, table)
    return f"{len(prompts)} prompts x {table.images} at {size} px"


@torch.no_grad()
def denoise(
    model: Model, prompts: Sequence[str], eps_BCHW: Tensor, seeds: Sequence[int], table: SampleTable,
    latents_BCHW: Tensor | None = None, start: int = 0,
) -> Tensor:  # fmt: skip
    """Noise -> scaled latents of images, fp32 (B, C, H, W).

    Args:
        eps_BCHW: standard normals, on the UNet's device.
        seeds: of what a stochastic sampler adds on its way; B numbers below 2**32.
        table: sampler, steps, guidance and negative prompt.
        latents_BCHW, start: scaled latents to noise to timestep `start` and to go on from; None = from pure noise.
    """
    device, count, guided = eps_BCHW.device, len(prompts), table.guidance != 1.0
    ids = model.text.tokenize([*prompts, *[table.negative] * count] if guided else list(prompts))
    context_BLD = model.text.encode(ids.to(model.text.device)).to(device)  # an encoder that training leaves out lies elsewhere
    scheduler = make_sampler(table.sampler, model.scheduler)
    scheduler.set_timesteps(table.steps, device=device)
    if latents_BCHW is None:
        x_BCHW = eps_BCHW * scheduler.init_noise_sigma
    else:
        _begin_at(scheduler, start)
        x_BCHW = scheduler.add_noise(latents_BCHW, eps_BCHW, scheduler.timesteps[:1].expand(count))
    # Stochastic samplers draw their own noise: from generators of their own, one an image.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    extra = {} if table.sampler == "dpm++" else {"generator": generators}
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_BCHW, t)
        t_B = t.to(device).expand(len(context_BLD))
        prediction = model.unet(torch.cat([x_in, x_in]) if guided else x_in, t_B, context_BLD).float()
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + table.guidance * (conditional - unconditional)
        x_BCHW = scheduler.step(prediction, t, x_BCHW, **extra).prev_sample
    return x_BCHW


def _begin_at(scheduler: Any, start: int) -> None:
    """Have a sampler begin at any timestep and go down in steps as long as those of a whole drawing.

    diffusers' image-to-image begins at one of the sampler's own timesteps; with few steps the nearest would be far off.
    """
    length = scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # the only one that DDIM can go
    timesteps = torch.arange(start, -1, -length)
    scheduler.timesteps = timesteps.to(scheduler.timesteps)
    if hasattr(scheduler, "sigmas"):
        abar = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), scheduler.sigmas[-1:]])


def make_sampler(name: str, config: dict[str, Any]) -> Any:
    """A diffusers scheduler by its short name, with the noise schedule and prediction of a model's scheduler config."""
    import diffusers

    kinds = {
        "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
    }  # fmt: skip
    # Latents are not bounded by 1; a config that says nothing of clipping would get DDIM's default, which clips.
    extra = {"clip_sample": False} if name == "ddim" else {}
    return getattr(diffusers, kinds[name]).from_config(config, **extra)


def to_image(image_3RR: Tensor) -> Image.Image:
    """(3, R, R) in [-1, 1] -> PIL."""
    pixels = ((image_3RR.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def read_prompts(table: SampleTable) -> list[str]:
    """The prompts of a config: those in the list, then the lines of the file. Raises UserError if it cannot be read."""
    prompts = list(table.prompts)
    if table.prompts_file:
        try:
            lines = Path(table.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sample.prompts_file is {table.prompts_file!r}: cannot be read ({error})") from None
        prompts += [line.strip() for line in lines if line.strip()]
    return prompts


def sample_grid(model: Model, table: SampleTable, size: int) -> Image.Image | None:
    """The fixed grid of a config: a row a prompt, a column a seed. None without prompts."""
    prompts = read_prompts(table)
    if not prompts:
        return None
    pairs = [(prompt, table.seed + column) for prompt in prompts for column in range(table.images)]
    images = generate(model, [p for p, _ in pairs], [s for _, s in pairs], table, size)
    return grid(images, table.images, prompts, table.seed)


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str], seed: int = 0) -> Image.Image:
    """Images in rows of `columns`, each row's caption under it.

    Its `info["cells"]` holds {"box": [left, top, right, bottom] in px, "prompt", "seed"} of each; `seed` is the first column's.
    """
    width, height = images[0].size
    text, gap = max(14, height // 18), max(4, width // 32)
    font = ImageFont.load_default(size=text)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap + 2 * text) + gap), "white")
    draw, cells = ImageDraw.Draw(sheet), sheet.info.setdefault("cells", [])
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + r * (height + gap + 2 * text)
        for c, image in enumerate(row):
            left = gap + c * (width + gap)
            sheet.paste(image, (left, top))
            cells.append({"box": [left, top, left + width, top + height], "prompt": caption, "seed": seed + c})
        draw.text((gap, top + height + text // 3), _fit(caption, font, sheet.width - 2 * gap), fill="black", font=font)
    return sheet


def save_grid(sheet: Image.Image, path: Path, stage: str = "", step: int = 0) -> None:
    """Write a grid as a PNG whose text chunk `fastsd` says in JSON what it shows: stage, step and `info["cells"]`.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file of the name stands as it was.
    """
    said, temporary = PngInfo(), path.with_name(TEMPORARY + path.name)
    said.add_text(GRID_CHUNK, json.dumps({"stage": stage, "step": step, "cells": sheet.info["cells"]}))
    sheet.save(temporary, "PNG", pnginfo=said)
    os.replace(temporary, path)


def _fit(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
