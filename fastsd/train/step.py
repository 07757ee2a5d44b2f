"""Floor 3: one optimizer step. `train`, the demo and every later benchmark call this and nothing else.

The step never reads a device value: loss, gradient norm and skip counter stay on the device until the log asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.config import StageTable
from fastsd.data.loader import Batch
from fastsd.model.files import Model
from fastsd.train.objective import Objective, alphas_cumprod
from fastsd.train.optim import AdamW, DLion, FastOptimizer, Lion
from fastsd.train.parts import Part, gradient_norm
from fastsd.train.schedule import learning_rate

OPTIMIZERS: dict[str, type[FastOptimizer]] = {"dlion": DLion, "lion": Lion, "adamw": AdamW}
PARTS = ("unet", "text_encoder")


@dataclass(frozen=True)
class StepResult:
    """0-dim fp32 tensors on the device: mean loss of the batch, gradient norm before clipping, steps skipped so far."""

    loss: Tensor
    grad_norm: Tensor
    skipped: Tensor


class Step:
    """Forward, backward and update for one stage.

    Args:
        model: on its device, fp32.
        stage: what to train and how.
        total: optimizer steps of the stage, for the schedule.
        seed: of noise and timesteps.

    Attributes:
        parts: all trainable parts by name; those the stage trains have an entry in `optimizers` too.
    """

    def __init__(self, model: Model, stage: StageTable, total: int, seed: int) -> None:
        self.model, self.stage, self.total = model, stage, total
        self.parts = {name: Part(name, model.part(name), name in stage.train, stage.precision) for name in PARTS}
        self.optimizers = {name: _optimizer(stage, self.parts[name]) for name in stage.train}
        device = model.unet.conv_in.weight.device
        self.objective = Objective(alphas_cumprod(model.scheduler).to(device), seed, model.unet.ops)
        self.skipped = torch.zeros((), device=device)

    def __call__(self, batch: Batch, step: int) -> StepResult:
        """Train on one batch as step number `step` (from 0) of the stage."""
        loss = self._accumulate(batch)
        trained = [self.parts[name] for name in self.optimizers]
        gradients = [gradient for part in trained for gradient in part.gradients()]
        norm = gradient_norm(gradients)
        # A gradient that is not finite must not reach any state: the optimizers leave every byte when `skip` is set.
        skip = ~torch.isfinite(norm)
        self.skipped += skip
        if self.stage.grad_clip:
            torch._foreach_mul_(gradients, (self.stage.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.stage, step, self.total)
            optimizer.step(skip=skip)
            self.parts[name].write_back()
            self.parts[name].zero_gradients()
        return StepResult(loss, norm, self.skipped.clone())

    def _accumulate(self, batch: Batch) -> Tensor:
        """Gradients of the batch's mean loss, one micro-batch at a time; returns that loss."""
        count, device = len(batch.positions_B), self.skipped.device
        total = torch.zeros((), device=device)
        for start in range(0, count, self.stage.micro):
            rows = slice(start, start + self.stage.micro)
            latents = self.model.vae.scale(batch.latents_BCHW[rows].to(device, non_blocking=True).float())
            positions = batch.positions_B[rows].to(device, non_blocking=True)
            ids = batch.token_ids_BL[rows].to(device, non_blocking=True)
            noisy, t_B, target = self.objective.noised(latents, positions)
            with torch.set_grad_enabled("text_encoder" in self.optimizers):
                context = self.model.text.encode(ids)
            loss = self.objective.loss(self.model.unet(noisy, t_B, context), target) * (len(positions) / count)
            loss.backward()
            for name in self.optimizers:
                self.parts[name].collect_gradients()
            total += loss.detach()
        return total

    def d(self) -> dict[str, Tensor]:
        """D-Lion's estimates by part, 0-dim on the device; empty for other optimizers."""
        return {name: opt.shared["d"] for name, opt in self.optimizers.items() if isinstance(opt, DLion)}

    def release(self) -> None:
        """End the stage: the model holds its exact fp32 weights."""
        for part in self.parts.values():
            part.release()


def _optimizer(stage: StageTable, part: Part) -> FastOptimizer:
    settings: dict[str, Any] = {"lr": stage.rate, "weight_decay": stage.weight_decay}
    if stage.betas:
        settings["betas"] = tuple(stage.betas)
    if stage.optimizer == "dlion":
        settings["d0"] = stage.d0
    if stage.optimizer == "lion":
        settings["decoupled_weight_decay"] = stage.decoupled_weight_decay
    return OPTIMIZERS[stage.optimizer](part.masters, **settings)
