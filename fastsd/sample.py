"""Floor 3: images from a model - for grids during training, `fastsd sample`, and the demo.

The first latents of an image are a function of its seed alone, so the same seeds show the same composition as a model
changes, and sampling draws on no generator that training uses.  The schedulers are diffusers'.

Shapes: B images, C latent channels, H x W latent positions, L tokens, D context width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastsd.config import Config, SampleTable
from fastsd.errors import UserError
from fastsd.model.files import Model
from fastsd_kernels import noise

BATCH = 8  # images a UNet call; the guidance doubles it


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
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        latents = _denoise(model, list(prompts[rows]), list(seeds[rows]), table, size // model.vae.downscale)
        images += [to_image(image) for image in model.vae.decode(latents)]
    return images


def check_size(model: Model, size: int) -> None:
    """Raise UserError for an image size that the model's latents cannot have."""
    step = model.vae.downscale * model.unet.cfg.downscale
    if size < step or size % step:
        lower = max(step, size // step * step)
        raise UserError(f"sample.size is {size}; this model's images are multiples of {step} px, for example {lower}")


def check_samples(model: Model, config: Config) -> str:
    """Find what would stop a sample grid before training starts; returns what the grid will be. Raises UserError."""
    table, size = config.sample, config.sample.size or config.data.resolution
    prompts = read_prompts(table)
    check_size(model, size)
    return f"{len(prompts)} prompts x {table.images} at {size} px"


def _denoise(model: Model, prompts: list[str], seeds: list[int], table: SampleTable, side: int) -> Tensor:
    device = model.unet.conv_in.weight.device
    count, guided = len(prompts), table.guidance != 1.0
    ids = model.text.tokenize(prompts + [table.negative] * count if guided else prompts)
    context_BLD = model.text.encode(ids.to(model.text.device)).to(device)  # an encoder that training leaves out lies elsewhere
    scheduler = make_sampler(table.sampler, model.scheduler)
    scheduler.set_timesteps(table.steps, device=device)
    shape = (model.unet.cfg.in_channels, side, side)
    x_BCHW = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor(seeds, device=device), shape)
    x_BCHW = x_BCHW * scheduler.init_noise_sigma
    # Stochastic samplers draw their own noise: from generators of their own, one an image.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    extra = {} if table.sampler == "dpm++" else {"generator": generators}
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_BCHW, t)
        t_B = t.to(device).expand(len(context_BLD))
        eps = model.unet(torch.cat([x_in, x_in]) if guided else x_in, t_B, context_BLD).float()
        if guided:
            conditional, unconditional = eps.chunk(2)
            eps = unconditional + table.guidance * (conditional - unconditional)
        x_BCHW = scheduler.step(eps, t, x_BCHW, **extra).prev_sample
    return x_BCHW


def make_sampler(name: str, config: dict[str, Any]) -> Any:
    """A diffusers scheduler by its short name, with the noise schedule of a model's scheduler config."""
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
    return grid(images, table.images, prompts)


def grid(images: Sequence[Image.Image], columns: int, captions: Sequence[str]) -> Image.Image:
    """Images in rows of `columns`, each row's caption under it."""
    width, height = images[0].size
    text, gap = max(14, height // 18), max(4, width // 32)
    font = ImageFont.load_default(size=text)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    sheet = Image.new("RGB", (columns * (width + gap) + gap, len(rows) * (height + gap + 2 * text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + r * (height + gap + 2 * text)
        for c, image in enumerate(row):
            sheet.paste(image, (gap + c * (width + gap), top))
        draw.text((gap, top + height + text // 3), _fit(caption, font, sheet.width - 2 * gap), fill="black", font=font)
    return sheet


def _fit(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
