"""Image generation for sample grids during training, `fastsd sample`, and the demo.

The initial noise of an image depends only on its seed, so a seed keeps showing the same composition while a model trains.
Sampling and training share no random generator. The schedulers are those of diffusers.

Shapes: B images, C latent channels, H x W latent positions, L tokens, D width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_merged
from fastsd.model.model import Model
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd_kernels import noise

BATCH = 8  # images per UNet call; guidance doubles it


def load_to_sample(table: ModelTable, device: str = "auto", precision: str = "fp32") -> Model:
    """Load a model onto its device, ready for `generate`. The VAE decodes in fp32. Raises UserError as `load_model` does."""
    target_device = choose_device(device)
    model = load_merged(table, choose_ops("auto", target_device))
    for module in (model.unet, model.text.module):
        module.to(target_device, COMPUTE_DTYPE[precision])
    model.precision = precision
    model.vae.to(target_device, torch.float32)
    return model


@torch.no_grad()
def generate(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], table: SampleTable, size: int, batch: int = BATCH
) -> list[Image.Image]:
    """Generate one image per (prompt, seed) pair.

    Args:
        model: on its device, in any precision; its weights and mode are not changed.
        prompts, seeds: sequences of equal length.
        table: sampler, steps, guidance and negative prompt.
        size: image size in px per side.
        batch: images per UNet call.

    Raises:
        UserError: the model does not support the size, or its noise schedule has fewer timesteps than `table.steps`.
    """
    check_size(model, size)
    check_steps(model, table)
    images: list[Image.Image] = []
    side = size // model.vae.downscale
    device = model.unet.conv_in.weight.device
    with precision_switches(model.precision, model.unet) if model.precision else nullcontext():
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            positions_B = torch.tensor(seeds[rows], device=device)
            eps_BCHW = noise.normal(0, noise.Purpose.SAMPLE, positions_B, (model.unet.cfg.in_channels, side, side))
            latents = denoise(model, prompts[rows], eps_BCHW, seeds[rows], table)
            images += [to_image(image) for image in model.vae.decode(latents)]
    return images


def check_size(model: Model, size: int) -> None:
    """Raise UserError if the model does not support an image size."""
    step = model.vae.downscale * model.unet.cfg.downscale
    if size < step or size % step:
        lower = max(step, size // step * step)
        raise UserError(
            "sample-size", f"sample.size is {size}; this model's images are multiples of {step} px, for example {lower}"
        )


def check_steps(model: Model, table: SampleTable) -> None:
    """Raise UserError if there are more sampling steps than timesteps in the noise schedule."""
    timesteps = model.scheduler.get("num_train_timesteps", 1000)
    if table.steps > timesteps:
        raise UserError("sample-steps", f"sample.steps is {table.steps}, but {model.name} has {timesteps} timesteps; lower it")


@torch.no_grad()
def denoise(
    model: Model,
    prompts: Sequence[str],
    eps_BCHW: Tensor,
    seeds: Sequence[int],
    table: SampleTable,
    latents_BCHW: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Denoise to the scaled latents of images, fp32 (B, C, H, W).

    Args:
        eps_BCHW: standard normal noise, on the UNet's device.
        seeds: B seeds below 2**32 for the noise that stochastic samplers add in each step.
        table: sampler, steps, guidance and negative prompt.
        latents_BCHW: scaled latents, to which noise is added before denoising; None = start from pure noise.
        start: timestep of the noise that is added to `latents_BCHW`.
    """
    device, count, guided = eps_BCHW.device, len(prompts), table.guidance != 1.0
    token_ids_BL = model.text.tokenize([*prompts, *[table.negative] * count] if guided else list(prompts))
    # A text encoder that is not trained stays on the CPU.
    text_embeds_BLD = model.text.encode(token_ids_BL.to(model.text.device)).to(device)
    scheduler = make_sampler(table.sampler, model.scheduler)
    scheduler.set_timesteps(table.steps, device=device)
    if latents_BCHW is None:
        x_BCHW = eps_BCHW * scheduler.init_noise_sigma
    else:
        _begin_at(scheduler, start)
        x_BCHW = scheduler.add_noise(latents_BCHW, eps_BCHW, scheduler.timesteps[:1].expand(count))

    # Stochastic samplers draw additional noise from a separate generator per image.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    step_options = {} if table.sampler == "dpm++" else {"generator": generators}
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x_BCHW, t)
        t_B = t.to(device).expand(len(text_embeds_BLD))
        prediction = model.unet(torch.cat([x_in, x_in]) if guided else x_in, t_B, text_embeds_BLD).float()
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + table.guidance * (conditional - unconditional)
        x_BCHW = scheduler.step(prediction, t, x_BCHW, **step_options).prev_sample
    return x_BCHW


def _begin_at(scheduler: Any, start: int) -> None:
    """Make a sampler start at any timestep, with steps as long as when it starts from pure noise.

    In contrast, diffusers' image-to-image starts at one of the sampler's own timesteps, which may be far from `start`.
    """
    length = scheduler.config.num_train_timesteps // scheduler.num_inference_steps  # DDIM supports no other step length
    timesteps = torch.arange(start, -1, -length)
    scheduler.timesteps = timesteps.to(scheduler.timesteps)
    if hasattr(scheduler, "sigmas"):
        abar = scheduler.alphas_cumprod[timesteps]
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt(), scheduler.sigmas[-1:]])


def make_sampler(name: str, config: dict[str, Any]) -> Any:
    """Create a diffusers scheduler by its short name, with the noise schedule and prediction type of a scheduler config."""
    import diffusers

    classes = {
        "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
        "dpm++": "DPMSolverMultistepScheduler",
    }  # fmt: skip
    # Latents are not bounded by 1, but DDIM clips by default if the config does not mention clipping.
    overrides = {"clip_sample": False} if name == "ddim" else {}
    return getattr(diffusers, classes[name]).from_config(config, **overrides)


def to_image(image_3RR: Tensor) -> Image.Image:
    """Convert a tensor (3, R, R) in [-1, 1] to a PIL image."""
    pixels = ((image_3RR.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
