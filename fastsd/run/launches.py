"""Record the kernel launches of a job on tensors without data, so that its kernels can be compiled before it starts.

The real training step, the UNet's forwards of samples and validation, and the VAE's encoder run on the meta device. Nothing is
computed or allocated. Launches get the same arguments as on the GPU: dtypes, sizes, strides, and addresses that are those of
the GPU modulo 512, because PyTorch aligns allocations to 512 bytes and views keep their offset on the meta device.

Shapes: B images, C latent channels, H x W latent positions, L text tokens, D width of the text embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from fastsd.config.stages import StageTable
from fastsd.data.loader import Batch
from fastsd.model.model import Model
from fastsd.model.select import selected
from fastsd.model.shapes import Shapes, empty_model, materialize
from fastsd.model.vae_encoder import VaeEncoder
from fastsd.plan.rehearsal import WithoutData, empty_teacher
from fastsd.run.validation import Strata
from fastsd.train.step import Step
from fastsd_kernels import TRITON
from fastsd_kernels.launch import OPERATORS, Launch, recording
from fastsd_kernels.noise import Purpose

META = torch.device("meta")
Sizes = tuple[tuple[int, ...], ...]  # sorted


class _LaunchingOperators(WithoutData):
    """Calls the functions of the kernels' operators. Without data, torch would only compute the shapes of their results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastsd":
            return OPERATORS[func._schema.name](*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _recording(architecture: int) -> Iterator[list[Launch]]:
    with recording(architecture) as launches, _LaunchingOperators():
        yield launches


@dataclass(frozen=True)
class StageRecorder:
    """All that the launches of a stage depend on: its step, and the UNet's forwards of its samples and of validation.

    Kernels are not specialised on seeds.

    Attributes:
        architecture: the GPU that tiles are chosen for.
        attention: how the UNet's attention multiplies fp32.
        cached_text: True if batches contain text embeddings.
        trained: (C, H, W) of an image's latents in the cache.
        sampled, validated: (B, C, H, W) of latents.
    """

    stage: StageTable
    micro_batch_size: int
    shapes: Shapes
    scheduler: dict[str, Any]
    architecture: int
    attention: str
    cached_text: bool
    trained: Sizes
    sampled: Sizes
    validated: Sizes

    def launches(self) -> list[Launch]:
        """Record the launches."""
        assert TRITON is not None
        model = empty_model(self.shapes, TRITON)
        model.scheduler = self.scheduler
        with _recording(self.architecture) as launches:
            materialize(model.unet, META)
            model.unet.checkpointing = self.stage.checkpointing
            model.unet.set_attention_precision(self.attention)
            self._train(model)
            with torch.no_grad():
                self._evaluate(model)
        return launches

    def _train(self, model: Model) -> None:
        stage, text = self.stage, model.text
        # A frozen text encoder launches no kernels. Its output is converted like text embeddings of a cache.
        encode = not self.cached_text and bool(selected(model, stage.train, "train").get("text_encoder"))
        if encode:
            materialize(text.module, META)
        teacher = empty_teacher(self.shapes, model.unet.ops, META) if stage.teacher else None
        step = Step(model, stage, 1, 0, self.micro_batch_size, cached_text=not encode, teacher=teacher)
        # With an odd micro-batch, the int64 positions of every second micro-batch are only aligned to 8 bytes.
        count = min(stage.batch, (1 + self.micro_batch_size % 2) * self.micro_batch_size)
        positions_B = torch.empty(count, dtype=torch.int64, device=META)
        for shape_CHW, length in product(self.trained, text.lengths):
            token_ids_BL = torch.empty(count, length, dtype=torch.int64, device=META)
            text_embeds_BLD = None if encode else torch.empty(count, length, text.width, device=META)
            latents_BCHW = torch.empty(count, *shape_CHW, device=META)
            step(Batch(latents_BCHW, token_ids_BL, positions_B, [], text_embeds_BLD), 0)

    def _evaluate(self, model: Model) -> None:
        def text_embeds(count: int, length: int) -> torch.Tensor:
            return torch.empty(count, length, model.text.width, device=META)

        for shape, length in product(self.sampled, model.text.lengths):
            model.unet(torch.empty(shape, device=META), torch.empty(shape[0], device=META), text_embeds(shape[0], length))
        for shape, length in product(self.validated, model.text.lengths):
            # Timesteps and positions are rows of B int64. With an odd B, every second row may be aligned to 8 bytes only.
            strata = Strata(model, 1 + shape[0] % 2, 0, Purpose.VALIDATION)
            identity_B = torch.zeros(shape[0], dtype=torch.int64)
            list(strata.forwards(torch.empty(shape, device=META), text_embeds(shape[0], length), identity_B))


def encoder_launches(
    vae_config: dict[str, Any], architecture: int, dtype: torch.dtype, sizes: Iterable[tuple[int, int]]
) -> list[Launch]:
    """Record how a VAE encodes an image of each size (width, height) in px. Kernels do not depend on the number of images."""
    from diffusers import AutoencoderKL

    assert TRITON is not None
    with META:
        module = AutoencoderKL.from_config(vae_config)
    encoder = VaeEncoder(module.to(dtype, memory_format=torch.channels_last), TRITON)
    with _recording(architecture) as launches, torch.no_grad():
        # The norms see only the number of positions, which a turned image shares.
        for width, height in sorted({(min(size), max(size)) for size in sizes}):
            encoder(torch.empty(1, 3, height, width, dtype=dtype, device=META).to(memory_format=torch.channels_last))
    return launches
