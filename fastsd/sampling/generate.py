"""Image generation for sample grids during training, `fastsd sample`, and the demo.

The initial noise of an image depends only on its seed, so a seed keeps showing the same composition while a model trains.
Sampling and training share no random generator. The schedulers are those of diffusers.

Shapes: B images, C latent channels, H x W latent positions, L tokens, D width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from PIL import Image
from torch import Tensor

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats.adapters import load_merged
from fastsd.model.model import Model
from fastsd.sampling.prompts import ImageSettings, batches_of
from fastsd.sampling.samplers import add_noise, begin_at, class_of, make_sampler, step_lengths
from fastsd.terminal.console import counted, work
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd.train.ranks import ALONE, Ranks
from fastsd.train.trainable import compute_weight
from fastsd_kernels import noise

BATCH = 8  # images per UNet call; guidance doubles it


def load_to_sample(table: ModelTable, device: str = "auto", precision: str = "fp32") -> Model:
    """Load a model onto its device, ready for `generate`. The VAE decodes in fp32. Raises UserError as `load_model` does."""
    target_device = choose_device(device)
    return prepare_to_sample(load_merged(table, choose_ops("auto", target_device)), target_device, precision)


def prepare_to_sample(model: Model, device: torch.device, precision: str, *, text_on_device: bool = True) -> Model:
    """Move a loaded model to its device, in the weights with which a stage of this precision computes.

    Args:
        text_on_device: False = leave the text encoder in fp32 in main memory, as a run that trains from cached text embeddings.
    """
    for module in [model.unet] + ([model.text.module] if text_on_device else []):
        for parameter in module.to(device).parameters():
            parameter.data = compute_weight(parameter.data, COMPUTE_DTYPE[precision])
    model.precision = precision
    model.vae.to(device, torch.float32)
    return model


def generate(
    model: Model, prompts: Sequence[str], seeds: Sequence[int], table: SampleTable, size: int, batch: int = BATCH
) -> list[Image.Image]:
    """Generate one image per (prompt, seed) pair.

    Args:
        model: on its device, in any precision; its weights and mode are not changed.
        prompts, seeds: sequences of equal length. A seed is below 2**64.
        table: sampler, steps, guidance and negative prompt.
        size: image size in px per side.
        batch: images per UNet call.

    Raises:
        UserError: the model does not support the size, or its noise schedule has fewer timesteps than `table.steps`.
    """
    settings = {"negative": table.negative, "width": size, "height": size, "steps": table.steps, "guidance": table.guidance}
    pairs = zip(prompts, seeds, strict=True)
    return draw(model, [ImageSettings(prompt=prompt, seed=seed, **settings) for prompt, seed in pairs], table, batch)  # type: ignore[arg-type]


def draw(model: Model, images: Sequence[ImageSettings], table: SampleTable, batch: int = BATCH) -> list[Image.Image]:
    """Generate images as `generate` does, each with settings of its own. `table` has those that they share."""
    drawn = draw_share(model, images, table, batch)
    return [drawn[i] for i in range(len(images))]


@torch.no_grad()
def draw_share(
    model: Model, images: Sequence[ImageSettings], table: SampleTable, batch: int = BATCH, ranks: Ranks = ALONE
) -> dict[int, Image.Image]:
    """Generate this rank's share of some images, and return them by their numbers.

    Ranks share UNet calls, not the images of one: a smaller call would round otherwise.
    """
    check_images(model, images)
    class_of(table.sampler, model.scheduler)
    drawn: dict[int, Image.Image] = {}
    downscale, device = model.vae.downscale, model.unet.conv_in.weight.device
    share = batches_of(images, batch)[ranks.rank :: ranks.world]
    switches = precision_switches(model.precision, model.unet) if model.precision else nullcontext()
    with switches, work("drawing", sum(map(len, share)), "images") as drawing:
        for numbers in share:
            chosen = [images[i] for i in numbers]
            first, seeds = chosen[0], [image.seed for image in chosen]
            shape = model.unet.cfg.in_channels, first.height // downscale, first.width // downscale
            positions_B = torch.tensor([seed - (seed >> 63 << 64) for seed in seeds], device=device)  # the same 64 bits
            eps_BCHW = noise.normal(0, noise.Purpose.SAMPLE, positions_B, shape)
            settings = table.model_copy(update={"steps": first.steps, "guidance": first.guidance})
            prompts, negatives = [image.prompt for image in chosen], [image.negative for image in chosen]
            latents = denoise(model, prompts, eps_BCHW, seeds, settings, negatives=negatives)
            drawn |= {i: to_image(image) for i, image in zip(numbers, model.vae.decode(latents), strict=True)}
            drawing.add(len(numbers))
    return drawn


def check_images(model: Model, images: Sequence[ImageSettings]) -> None:
    """Raise UserError if the model does not support the size or the number of steps of an image."""
    step = model.vae.downscale * model.unet.cfg.downscale
    for image in images:
        if any(side < step or side % step for side in (image.width, image.height)):
            lower = " x ".join(str(max(step, side // step * step)) for side in (image.width, image.height))
            raise UserError(
                "sample-size",
                f"the size of the sample {image.prompt!r} is {image.width} x {image.height} px; this model's images have sides "
                f"that are multiples of {step} px, for example {lower}",
            )
        check_steps(model, image.steps)


def check_steps(model: Model, steps: int) -> None:
    """Raise UserError if there are more sampling steps than timesteps in the noise schedule."""
    timesteps = model.scheduler.get("num_train_timesteps", 1000)
    if steps > timesteps:
        raise UserError("sample-steps", f"steps of a sample is {steps}, but {model.name} has {timesteps} timesteps; lower it")


@torch.no_grad()
def denoise(
    model: Model,
    prompts: Sequence[str],
    eps_BCHW: Tensor,
    seeds: Sequence[int],
    table: SampleTable,
    latents_BCHW: Tensor | None = None,
    start: int = 0,
    negatives: Sequence[str] | None = None,
) -> Tensor:
    """Denoise to the scaled latents of images, fp32 (B, C, H, W).

    Args:
        eps_BCHW: standard normal noise, on the UNet's device.
        seeds: B seeds below 2**64 for the noise that stochastic samplers add in each step.
        table: sampler, steps, guidance and its rescaling, and the negative prompt.
        latents_BCHW: scaled latents, to which noise is added before denoising; None = start from pure noise.
        start: timestep of the noise that is added to `latents_BCHW`.
        negatives: a negative prompt for each image; None = that of `table`.
    """
    device, count, guided = eps_BCHW.device, len(prompts), table.guidance != 1.0
    token_ids_BL = model.text.tokenize([*prompts, *(negatives or [table.negative] * count)] if guided else list(prompts))
    # A text encoder that is not trained stays on the CPU.
    text_embeds_BLD = model.text.encode(token_ids_BL.to(model.text.device)).to(device)
    scheduler = make_sampler(table.sampler, model.scheduler, table.steps, device)
    if latents_BCHW is None:
        x_BCHW = eps_BCHW * getattr(scheduler, "init_noise_sigma", 1.0)  # schedulers of flows only have none
    else:
        begin_at(scheduler, start)
        x_BCHW = add_noise(scheduler, latents_BCHW, eps_BCHW)

    # Stochastic samplers draw additional noise from a separate generator per image, which reads 32 bits of its seed.
    generators = [torch.Generator().manual_seed(seed ^ seed >> 32) for seed in seeds]
    step_options = {} if table.sampler == "dpm++" else {"generator": generators}
    lengths = step_lengths(scheduler)
    for i, t in enumerate(counted("denoising", scheduler.timesteps, "steps")):
        x_in = scheduler.scale_model_input(x_BCHW, t) if hasattr(scheduler, "scale_model_input") else x_BCHW
        t_B = t.to(device).expand(len(text_embeds_BLD))
        prediction = model.unet(torch.cat([x_in, x_in]) if guided else x_in, t_B, text_embeds_BLD).float()
        if guided:
            conditional, unconditional = prediction.chunk(2)
            prediction = unconditional + table.guidance * (conditional - unconditional)
            if table.guidance_rescale:
                prediction = rescale_guidance(prediction, conditional, table.guidance_rescale)
        if lengths:
            scheduler.num_inference_steps = lengths[i]
        x_BCHW = scheduler.step(prediction, t, x_BCHW, **step_options).prev_sample
    return x_BCHW


def rescale_guidance(guided_BCHW: Tensor, conditional_BCHW: Tensor, share: float) -> Tensor:
    """Reduce the spread of guided predictions to that of the conditional ones, by a share between 0 (not at all) and 1.

    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", equations 14 to 16.
    """
    ratio_B111 = conditional_BCHW.std((1, 2, 3), keepdim=True) / guided_BCHW.std((1, 2, 3), keepdim=True)
    return share * (guided_BCHW * ratio_B111) + (1 - share) * guided_BCHW


def to_image(image_3HW: Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) in [-1, 1] to a PIL image."""
    pixels = ((image_3HW.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
