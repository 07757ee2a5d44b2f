"""The training objective: noisy latents, the target (noise or velocity) and the weighted loss.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps        target = eps, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
    loss = mean over images of  w(t) w_image  mean over elements of  m d(prediction, target)

(Ho et al. 2020, equations 4 and 14; v: Salimans and Ho 2022, appendix D.)  `noise_sampler.py` defines eps.  Noise and
timestep are functions of (seed, sample position), so splitting a batch does not change them (see `fastsd_kernels.noise`);
immiscible noise also depends on the image.  Shapes: B images, C latent channels, H x W positions, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsd.config.stages import StageTable
from fastsd.errors import UserError
from fastsd.train.noise_sampler import NoiseSampler
from fastsd_kernels import REFERENCE, Ops, noise

ALL_TIMESTEPS = StageTable.model_fields["timestep_range"].default


def alphas_cumprod(scheduler: dict[str, Any]) -> Tensor:
    """Compute abar_t of a diffusers scheduler config, fp32 (T,). With zero terminal SNR the last value is exactly 0.

    Source: Lin et al. 2024, "Common diffusion noise schedules and sample steps are flawed", algorithm 1, for
    `rescale_betas_zero_snr`.
    """
    from diffusers import DDPMScheduler

    abar_T: Tensor = DDPMScheduler.from_config(scheduler).alphas_cumprod
    return abar_T.float()


class Objective:
    """The objective of a stage.

    Args:
        alphas_cumprod: abar_t, fp32 (T,), on the training device.
        seed: seed of noise and timesteps.
        ops: the implementation that draws the noise.
        stage: provides loss, weighting, noise and timesteps; None = plain noise, uniform timesteps, unweighted mean square.
        prediction: "epsilon" or "v_prediction".  `FlowObjective` is that of a flow, and `objective_of` chooses.

    Raises:
        UserError: `timestep_range` exceeds the timesteps of the noise schedule, or a key is only for flows.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        seed: int,
        ops: Ops = REFERENCE,
        stage: StageTable | None = None,
        prediction: str = "epsilon",
    ) -> None:
        self._begin(stage or StageTable(train=["unet"], until=1), seed, ops, prediction, len(alphas_cumprod))
        _refuse_keys_of_flows(self.stage, prediction)
        self.signal, self.level = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.weights_T = timestep_weights(self.stage, alphas_cumprod, prediction)

    def _begin(self, stage: StageTable, seed: int, ops: Ops, prediction: str, timesteps: int) -> None:
        self.stage, self.seed, self.ops, self.prediction = stage, seed, ops, prediction
        self.first, self.end = _timestep_range(self.stage, timesteps)
        self.noise_sampler = NoiseSampler(self.stage, seed, ops)
        huber = partial(F.huber_loss, delta=self.stage.huber_delta)
        pseudo_huber = partial(_pseudo_huber, delta=self.stage.huber_delta)
        distances: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": huber}
        distances["pseudo_huber"] = pseudo_huber
        self._distance = distances[self.stage.loss]

    def timesteps(self, positions_B: Tensor) -> Tensor:
        """Draw t for each sample position: int64 (B,) on the device of `positions_B`, within the stage's `timestep_range`.

        A fraction of the range is drawn and rounded down to a timestep.  It is uniform, or has a normal logit (Esser et al.
        2024, "Scaling rectified flow transformers", section 3.1, where 1 also means pure noise), or is "cubic": 1 - u^3, which
        favours noisy timesteps (Mou et al. 2023, "T2I-Adapter", non-uniform time step sampling).
        """
        count = self.end - self.first
        if self.stage.timesteps == "uniform":
            return self.first + noise.integers(self.seed, noise.Purpose.TIMESTEP, positions_B, count)
        # A fraction may round to 1.
        return self.first + (self._fractions(positions_B) * count).long().clamp(max=count - 1)

    def _fractions(self, positions_B: Tensor) -> Tensor:
        """Draw a fraction of the timestep range for each sample position, fp64 (B,) in [0, 1]."""
        stage, draw = self.stage, (self.seed, noise.Purpose.TIMESTEP, positions_B)
        if stage.timesteps == "logit_normal":
            return torch.sigmoid(stage.timestep_mean + stage.timestep_std * noise.normal(*draw, (1,))[:, 0].double())
        uniform_B = noise.uniform(*draw)[:, 0]
        return uniform_B if stage.timesteps == "uniform" else 1 - uniform_B**3

    def _levels(self, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the index of each image in the tables of the signal and of the noise level, int64 (B,), and the two tables."""
        return t_B, self.signal, self.level

    def _weights(self, t_B: Tensor) -> Tensor | None:
        """Return the loss weight of each image's timestep, fp32 (B,), or None if the weights are equal."""
        return None if self.weights_T is None else self.weights_T[t_B]

    def add_noise(self, latents_BCHW: Tensor, positions_B: Tensor, t_B: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Add noise to scaled latents at their sample positions. Return (x_t fp32, t (B,), target fp32).

        Args:
            t_B: what `timesteps` returned for the positions, on the device of the latents; None = draw it here.
        """
        t_B = self.timesteps(positions_B) if t_B is None else t_B
        index_B, signal_T, level_T = self._levels(t_B)
        if self.noise_sampler.plain:
            args = latents_BCHW, positions_B, index_B, signal_T, level_T, self.seed
            x_BCHW, target_BCHW = self.ops.add_noise(*args, prediction=self.prediction)
            return x_BCHW, t_B, target_BCHW

        latents_BCHW = latents_BCHW.float()
        eps_BCHW, input_BCHW = self.noise_sampler(latents_BCHW, positions_B)
        signal, level = (table_T[index_B][:, None, None, None] for table_T in (signal_T, level_T))
        target_BCHW = eps_BCHW
        if self.prediction == "v_prediction":
            target_BCHW = signal * eps_BCHW - level * latents_BCHW
        elif self.prediction == "flow":
            target_BCHW = eps_BCHW - latents_BCHW
        return signal * latents_BCHW + level * input_BCHW, t_B, target_BCHW

    def loss(
        self,
        prediction_BCHW: Tensor,
        target_BCHW: Tensor,
        t_B: Tensor,
        weight_B: Tensor | None = None,
        mask_B1HW: Tensor | None = None,
    ) -> Tensor:
        """Compute the weighted mean error of each image, and return the mean over images, 0-dim fp32.

        Args:
            t_B: the timesteps that `add_noise` returned.
            weight_B: a factor for each image's loss.
            mask_B1HW: in [0, 1]. The weight of an element is unmasked_weight + (1 - unmasked_weight) * mask. The mean is over
                all elements, as in sd-scripts and by default in OneTrainer. If it were over the area of the mask, an image
                with a small mask would count as much as an image without a mask.
        """
        prediction_BCHW = prediction_BCHW.float()
        weights_B = self._weights(t_B)
        if weights_B is None and weight_B is None and mask_B1HW is None:
            return self._distance(prediction_BCHW, target_BCHW)
        error_BCHW = self._distance(prediction_BCHW, target_BCHW, reduction="none")
        if mask_B1HW is not None:
            unmasked_weight = self.stage.unmasked_weight
            error_BCHW = error_BCHW * (unmasked_weight + (1 - unmasked_weight) * mask_B1HW.float())
        loss_B = error_BCHW.flatten(1).mean(1)
        if weights_B is not None:
            loss_B = loss_B * weights_B
        if weight_B is not None:
            loss_B = loss_B * weight_B.float()
        return loss_B.mean()


def _pseudo_huber(prediction: Tensor, target: Tensor, *, delta: float, reduction: str = "mean") -> Tensor:
    """Compute 2 c (sqrt(d^2 + c^2) - c): d^2 for small differences d, 2 c |d| for large ones (c = delta).

    Written without the difference of two near numbers.  Source: Charbonnier et al. 1997, "Deterministic edge-preserving
    regularization in computed imaging"; sd-scripts, `huber` with a constant schedule.
    """
    d = prediction - target
    loss = 2 * delta * d * d / ((d * d + delta**2).sqrt() + delta)
    return loss.mean() if reduction == "mean" else loss


def timestep_weights(stage: StageTable, alphas_cumprod: Tensor, prediction: str) -> Tensor | None:
    """Compute the loss weight of each timestep, fp32 (T,). Return None if the weights are equal.

    The weights depend on SNR = abar / (1 - abar).  The papers give them for the loss in eps.  With

        |eps - eps'|^2 = SNR |x_0 - x_0'|^2        |v - v'|^2 = (SNR + 1) |x_0 - x_0'|^2

    (Salimans and Ho 2022, section 4) they are converted to the loss in x_0, and then to what the model predicts:

        min_snr   min(SNR, gamma) / SNR    gamma 5    Hang et al. 2023, "Efficient diffusion training via min-SNR"
        debiased  1 / sqrt(SNR)                       Yu et al. 2024, "Unmasking bias in diffusion model training"
        p2        1 / (1 + SNR)^gamma      gamma 1    Choi et al. 2022, "Perception prioritized training", k = 1

    For v, all three are 0 where SNR is 0, so nothing is learned from pure noise.  The weights are not normalised.

    Two trainers have other weights for v, with a limit of SNR to 1000 in "debiased", also for eps:

        sd-scripts   debiased  1 / sqrt(SNR)    for v  1 / (SNR + 1)
        onetrainer   debiased  1 / sqrt(SNR)    for v  1 / sqrt(SNR + 1)
                     p2        1 / (1 + SNR)^gamma    for v  1 / (2 + SNR)^gamma
    """
    if stage.weighting == "none":
        return None
    abar_T = alphas_cumprod.double()
    snr_T = abar_T / (1 - abar_T).clamp(min=2.0**-24)  # finite where abar rounds to 1
    denominator_T = snr_T + 1 if prediction == "v_prediction" else snr_T
    if stage.weighting == "min_snr" or stage.weighting_form == "paper":
        weight_T = paper_weights(stage, snr_T) / denominator_T
    elif stage.weighting == "p2":
        weight_T = 1 / (1 + denominator_T) ** (stage.weighting_gamma or 1.0)
    else:
        power = 1.0 if prediction == "v_prediction" and stage.weighting_form == "sd-scripts" else 0.5
        weight_T = 1 / denominator_T.clamp(max=1000 + (prediction == "v_prediction")) ** power
    return weight_T.clamp(min=stage.weighting_min).float()


def paper_weights(stage: StageTable, snr: Tensor) -> Tensor:
    """Compute the weights of the papers for the loss in x_0 (see `timestep_weights`)."""
    if stage.weighting == "min_snr":
        return snr.clamp(max=stage.weighting_gamma or 5.0)
    return snr.sqrt() if stage.weighting == "debiased" else snr / (1 + snr) ** (stage.weighting_gamma or 1.0)


def place_of(stage: StageTable) -> str:
    """Return the beginning of a message about a stage."""
    return f"stage {stage.name!r}: " if stage.name else "stage: "


def _refuse_keys_of_flows(stage: StageTable, prediction: str) -> None:
    """Raise UserError if a stage sets a key that only flows have."""
    keys = {"timestep_shift": f"timestep_shift is {stage.timestep_shift:g}", "teacher": f"teacher is {stage.teacher!r}"}
    for key, text in keys.items():
        if getattr(stage, key) != StageTable.model_fields[key].default:
            raise UserError(
                "stage-needs-flow",
                f'{place_of(stage)}{text}, but the model predicts {prediction}; set model.prediction = "flow", or remove {key}',
            )


def _timestep_range(stage: StageTable, timesteps: int) -> tuple[int, int]:
    """Return the first timestep of the stage, and the end, which is excluded."""
    if stage.timestep_range == ALL_TIMESTEPS:  # the default means all timesteps of the model
        return 0, timesteps
    first, end = stage.timestep_range
    if end > timesteps:
        raise UserError(
            "timestep-range",
            f"{place_of(stage)}timestep_range is {[first, end]}, but the model's noise schedule has {timesteps} timesteps; "
            f"use [{min(first, timesteps - 1)}, {timesteps}]",
        )
    return first, end
