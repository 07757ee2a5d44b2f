"""Images from a model - for grids during training, `fastsd sample`, and the demo.

The first latents of an image are a function of its seed alone, so the same seeds show the same composition as a model
changes, and sampling draws on no generator that training uses.  The schedulers are diffusers'.

Shapes: B images, C latent channels, H x W latent positions, L tokens, D context width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_merged
from fastsd.model.model import Model
from fastsd.train.precision import COMPUTE_DTYPE, choose_device, choose_ops, set_precision
from fastsd_kernels import noise

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
