"""Record the kernel launches of a job on tensors without data, so that its kernels can be compiled before it starts.

The real training step, the UNet's forwards of samples and validation, and the VAE's encoder run on the meta device. Nothing is
computed or allocated. Launches get the same arguments as on the GPU: dtypes, sizes, strides, and addresses that are those of
the GPU modulo 512, because PyTorch aligns allocations to 512 bytes and views keep their offset on the meta device.

Shapes: B images, C latent channels, H x W latent positions, L text tokens, D width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from fastsd.config.schema import Config, StageTable
from fastsd.data.loader import Batch
from fastsd.model.model import Model
from fastsd.model.shapes import Shapes, empty_model, materialize
from fastsd.model.vae_encoder import VaeEncoder
from fastsd.plan.rehearsal import WithoutData
from fastsd.run.validation import Validation
from fastsd.sampling.generate import BATCH
from fastsd.sampling.grid import read_prompts
from fastsd.train.precision import attention_precision
from fastsd.train.step import Step
from fastsd_kernels import TRITON
from fastsd_kernels.launch import OPERATORS, Launch, architecture, recording

META = torch.device("meta")


class _LaunchingOperators(WithoutData):
    """Calls the functions of the kernels' operators. Without data, torch would only compute the shapes of their results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastsd":
            return OPERATORS[func._schema.name](*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _recording(device: torch.device) -> Iterator[list[Launch]]:
    with recording(architecture(device)) as launches, _LaunchingOperators():
        yield launches


def stage_launches(
    config: Config,
    stage: StageTable,
    model: Model,
    device: torch.device,
    micro_batch_size: int,
    shapes_CHW: Iterable[tuple[int, ...]],
    validation: Validation,
    *,
    cached_text: bool,
) -> list[Launch]:
    """Record a step of a stage with each shape of latents, and the forwards of its samples and of validation.

    Args:
        model: only its shapes and its noise schedule matter.
        device: the GPU that the launches are for.
        micro_batch_size: images per forward.
        shapes_CHW: shapes of an image's latents in the cache.
        cached_text: True if batches contain text embeddings.
    """
    assert TRITON is not None
    empty = empty_model(Shapes.of(model), TRITON)
    empty.scheduler = model.scheduler
    unet, text = empty.unet, empty.text
    with _recording(device) as launches:
        for module in [unet] if cached_text else [unet, text.module]:
            materialize(module, META)
        unet.checkpointing = stage.checkpointing
        unet.set_attention_precision(attention_precision(stage.precision, device))
        step = Step(empty, stage, 1, config.seed, micro_batch_size, cached_text=cached_text)
        # The positions of the second micro-batch may begin at an odd multiple of 8 bytes. The others are aligned like these.
        count = min(stage.batch, 2 * micro_batch_size)
        token_ids_BL = torch.empty(count, text.length, dtype=torch.int64, device=META)
        positions_B = torch.empty(count, dtype=torch.int64, device=META)
        text_embeds_BLD = torch.empty(count, text.length, text.width, device=META) if cached_text else None
        for shape in sorted(set(shapes_CHW)):
            step(Batch(torch.empty(count, *shape, device=META), token_ids_BL, positions_B, [], text_embeds_BLD), 0)
        with torch.no_grad():
            for B, H, W in _sampled(config, model):
                latents_BCHW = torch.empty(B, unet.cfg.in_channels, H, W, device=META)
                unet(latents_BCHW, torch.empty(B, device=META), torch.empty(B, text.length, text.width, device=META))
            for B, *shape_CHW in sorted(validation.shapes):
                text_embeds_BLD = torch.empty(B, text.length, text.width, device=META)
                strata = replace(validation.strata, model=empty)
                identity_B = torch.zeros(B, dtype=torch.int64)
                # Timesteps and positions are rows of B numbers. Those of the second stratum may be aligned to 8 bytes only.
                list(islice(strata.forwards(torch.empty(B, *shape_CHW, device=META), text_embeds_BLD, identity_B), 2))
    return launches


def _sampled(config: Config, model: Model) -> set[tuple[int, int, int]]:
    """Return (images, H, W) of the UNet's forwards while a sample grid is drawn. Guidance doubles the images."""
    table = config.sample
    side = (table.size or config.data.resolution) // model.vae.downscale
    images = len(read_prompts(table)) * table.images
    batches = {min(images, BATCH), images % BATCH} - {0}
    return {(batch if table.guidance == 1 else 2 * batch, side, side) for batch in batches}


def encoder_launches(
    vae_config: dict[str, Any], device: torch.device, dtype: torch.dtype, sizes: Iterable[tuple[int, int]]
) -> list[Launch]:
    """Record how a VAE encodes an image of each size (width, height) in px. Kernels do not depend on the number of images."""
    from diffusers import AutoencoderKL

    assert TRITON is not None
    with META:
        module = AutoencoderKL.from_config(vae_config)
    encoder = VaeEncoder(module.to(dtype, memory_format=torch.channels_last), TRITON)
    with _recording(device) as launches, torch.no_grad():
        # The norms see only the number of positions, which a turned image shares.
        for width, height in sorted({(min(size), max(size)) for size in sizes}):
            encoder(torch.empty(1, 3, height, width, dtype=dtype, device=META).to(memory_format=torch.channels_last))
    return launches
