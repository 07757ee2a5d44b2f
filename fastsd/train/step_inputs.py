"""The inputs of a step on the device, and hashes of them for the log."""

from __future__ import annotations

from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from fastsd.data.loader import Batch
from fastsd.train.objective import Objective
from fastsd.train.ranks import Ranks
from fastsd_kernels import noise


class StepInputs(NamedTuple):
    """The tensors of a batch that a step computes with, on the device (see `Batch`). It has token ids or text embeddings.

    Timesteps are a function of positions. The host draws them, because that takes a GPU some hundred launches of nothing.
    """

    latents_BCHW: Tensor
    positions_B: Tensor
    t_B: Tensor
    token_ids_BL: Tensor | None
    text_embeds_BLD: Tensor | None
    weight_B: Tensor | None
    mask_B1HW: Tensor | None

    @classmethod
    def of(cls, batch: Batch, t_B: Tensor, device: torch.device) -> StepInputs:
        """Copy a batch and its timesteps to the device without waiting. Token ids are omitted if there are text embeddings."""
        token_ids_BL = batch.token_ids_BL if batch.text_embeds_BLD is None else None
        t_B = t_B.pin_memory() if device.type == "cuda" else t_B
        text = token_ids_BL, batch.text_embeds_BLD
        tensors = batch.latents_BCHW, batch.positions_B, t_B, *text, batch.weight_B, batch.mask_B1HW
        return cls._make(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)

    def micro_batch(self, images: slice) -> StepInputs:
        return StepInputs._make(None if tensor is None else tensor[images] for tensor in self)


def fingerprints(batch: Batch, objective: Objective, ranks: Ranks) -> dict[str, str]:
    """Hash the inputs of a step: the samples of all ranks, their timesteps, and the noise of the first sample."""
    first = batch.positions_B[0] - ranks.rank * len(batch.positions_B)
    positions_B = first + torch.arange(len(batch.positions_B) * ranks.world)
    t_B, shape = objective.timesteps(positions_B), tuple(batch.latents_BCHW.shape[1:])
    eps = noise.normal(objective.seed, noise.Purpose.NOISE, positions_B[:1], shape)
    inputs = {"order": batch.samples_B, "timesteps": t_B, "noise": eps}
    return {key: xxhash.xxh3_64_hexdigest(data.cpu().numpy().tobytes()) for key, data in inputs.items() if data is not None}
