"""The objective of a rectified flow, and the flow that a base of another prediction already knows.

    x_s = (1 - s) x_0 + s eps        target u = eps - x_0        t = T s is what the UNet is told

(Liu et al. 2023, "Flow straight and fast: learning to generate and transfer data with rectified flow", equation 1; the
direction of s and its distributions: Esser et al. 2024, "Scaling rectified flow transformers", sections 2 and 3.1.)  s is
continuous, and a function of (seed, sample position).

**The base's flow.**  A base predicts eps or v from x_t = a_t x_0 + b_t eps, where a_t^2 + b_t^2 = 1.  x_s and x_t say the same
about x_0 if their signal-to-noise ratios are equal, and then they differ by a factor only:

    s / (1 - s) = b_t / a_t        x_t = x_s / n,  n = sqrt((1 - s)^2 + s^2)        a_t = (1 - s) / n,  b_t = s / n

so t is where s_t = b_t / (a_t + b_t) equals s, a fraction between two timesteps.  The prediction at (x_t, t) gives eps and x_0:

    eps     x_0 = (x_t - b_t eps) / a_t
    v       x_0 = a_t x_t - b_t v,  eps = b_t x_t + a_t v

and u = eps - x_0 = (x_s - x_0) / s = (eps - x_s) / (1 - s).  The last two are equal; the one that divides by more is computed.
This is exact for every s between the s_t of the first and of the last timestep (0.028 to 0.936 for SD1.5).  Outside:

    below   less noise than the base has seen.  It is asked at its first timestep, with a_0 and b_0; u = (eps - x_s) / (1 - s).
    above   more noise than the base has seen, up to s = 1, pure noise.  It is asked at its last timestep, with x_s / n, as when
            it is sampled from pure noise; a_T and b_T give x_0, and u = (x_s - x_0) / s.  Both meet the exact form at the ends.
            With zero terminal SNR the last s_t is 1, so nothing lies above.

Shapes: B images, C latent channels, H x W positions, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsd.config.stages import StageTable
from fastsd.errors import UserError
from fastsd.model.flow_schedule import TIMESTEPS, is_flow, shifted, timesteps_of
from fastsd.model.unet import Attention, UNet
from fastsd.model.weights import plain_name
from fastsd.train.objective import Objective, alphas_cumprod, paper_weights, place_of
from fastsd.train.trainable import TrainableComponent, compute_weight
from fastsd_kernels import REFERENCE, Ops
from fastsd_kernels.noise import Purpose, normal

LIKE_EPSILON, LIKE_V = 0.9, 0.6  # the least and the largest cosine between a base's answer to pure noise and the noise


class FlowObjective(Objective):
    """The objective of a stage of a flow.

    Args:
        timesteps: T, what the UNet is told at s = 1.
        seed, ops, stage: as for `Objective`.

    Raises:
        UserError: `timestep_range` exceeds T, or a key has no meaning for flows.
    """

    def __init__(self, timesteps: int, seed: int, ops: Ops = REFERENCE, stage: StageTable | None = None) -> None:
        self._begin(stage or StageTable(train=["unet"], until=1), seed, ops, "flow", timesteps)
        self.total = timesteps
        if self.stage.weighting_form != "paper":
            raise UserError(
                "weighting-form-of-flow",
                f"{place_of(self.stage)}weighting_form is {self.stage.weighting_form!r}, which has no weights for flows; use "
                '"paper"',
            )

    def timesteps(self, positions_B: Tensor) -> Tensor:
        """Draw t = T s for each sample position, fp32 (B,) within the stage's `timestep_range`.

        The fraction of the range is uniform, logit-normal or cubic as for other models, and then shifted by `timestep_shift`.
        """
        fraction_B: Tensor = shifted(self._fractions(positions_B), self.stage.timestep_shift)
        return (self.first + fraction_B * (self.end - self.first)).float()

    def _levels(self, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s_B = t_B / self.total
        return torch.arange(len(t_B), device=t_B.device), 1 - s_B, s_B

    def _weights(self, t_B: Tensor) -> Tensor | None:
        """Return the weights of the papers, fp32 (B,), or None.

        With SNR = ((1 - s) / s)^2 and |u - u'|^2 = |x_0 - x_0'|^2 / s^2, they are s^2 times those of the loss in x_0. All of
        them fall to 0 towards s = 1.
        """
        if self.stage.weighting == "none":
            return None
        s_B = (t_B.double() / self.total).clamp(min=2.0**-24)
        weight_B = paper_weights(self.stage, ((1 - s_B) / s_B) ** 2) * s_B**2
        return weight_B.clamp(min=self.stage.weighting_min).float()


def objective_of(
    scheduler: Mapping[str, Any],
    seed: int,
    ops: Ops = REFERENCE,
    stage: StageTable | None = None,
    device: torch.device | str = "cpu",
) -> Objective:
    """Create the objective of a model with this scheduler config. Raises UserError as `Objective` and `FlowObjective`."""
    if is_flow(scheduler):
        return FlowObjective(timesteps_of(scheduler), seed, ops, stage)
    abar_T = alphas_cumprod(dict(scheduler)).to(device)
    return Objective(abar_T, seed, ops, stage, scheduler.get("prediction_type", "epsilon"))


@torch.no_grad()
def prediction_of(unet: UNet | Callable[..., Tensor], scheduler: Mapping[str, Any], context_1LD: Tensor, channels: int) -> str:
    """Return what a base predicts, "epsilon" or "v_prediction", by its answer to pure noise. Return "" if that shows neither.

    At the last timestep, x_t = a_t x_0 + b_t eps is the noise, because a_t is near 0. A base that predicts eps returns its
    input there. One that predicts v = a_t eps - b_t x_0 returns the mean image, which has little to do with the noise.
    """
    abar_T = alphas_cumprod(dict(scheduler))
    eps_BCHW = normal(0, Purpose.SAMPLE, torch.arange(2), (channels, 32, 32))
    last_B = torch.full((2,), float(len(abar_T) - 1))
    answer_BCHW = unet(eps_BCHW, last_B, context_1LD.expand(2, -1, -1)).float()
    likeness = torch.cosine_similarity(answer_BCHW.flatten(), eps_BCHW.flatten(), dim=0).item()
    if likeness > LIKE_EPSILON:
        return "epsilon"
    return "v_prediction" if likeness < LIKE_V else ""


class Teacher:
    """The flow of a base that predicts eps or v, in closed form (see the note above). Called like a UNet of a flow.

    Args:
        unet: the base's UNet, on any device.
        scheduler: the base's scheduler config.
        timesteps: T of the flow.
        moved: names of weights that earlier stages train, if there are no data to compare: all others are known to be those of
            this UNet until the stage trains them. None = the data are compared.
    """

    def __init__(
        self,
        unet: UNet,
        scheduler: Mapping[str, Any],
        timesteps: int = TIMESTEPS,
        *,
        moved: Collection[str] | None = None,
    ) -> None:
        assert not is_flow(scheduler)
        self.unet, self.total, self.moved = unet.requires_grad_(False), timesteps, moved
        self.velocity = scheduler.get("prediction_type") == "v_prediction"
        abar_T = alphas_cumprod(dict(scheduler)).double()
        signal_T, level_T = abar_T.sqrt(), (1 - abar_T).sqrt()
        self.s_T = (level_T / (signal_T + level_T)).float().to(unet.conv_in.weight.device)
        self.copied: list[Tensor] = []

    def share(self, component: TrainableComponent) -> None:
        """Move to the device and dtype of a stage's UNet. Weights that the stage does not train are shared with it if equal.

        `copied` then lists the others, which exist twice. Adapters leave all weights as they are, so nothing is copied.
        """
        parameters = {plain_name(name): (name, parameter) for name, parameter in component.module.named_parameters()}
        trained, device = set(component.names), next(component.module.parameters()).device
        self.copied, self.s_T = [], self.s_T.to(device)
        for plain, parameter in self.unet.named_parameters():
            name, original = parameters[plain]
            if self.moved is not None and name not in trained and name not in self.moved:
                parameter.data = original.data
                continue
            ours = compute_weight(parameter.data.to(device), component.dtype)
            comparable = self.moved is None and name not in trained and ours.shape == original.shape
            equal = comparable and torch.equal(ours, original.data)
            parameter.data = original.data if equal else ours
            self.copied += [] if equal else [ours]
        precisions = [layer.precision for layer in component.module.modules() if isinstance(layer, Attention)]
        for precision in precisions[:1]:
            self.unet.set_attention_precision(precision)

    def base_timesteps(self, s_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest s that the base has seen, and the base's t with that ratio of signal to noise, both fp32 (B,)."""
        s_T, last = self.s_T.to(s_B.device), len(self.s_T) - 1
        inside_B = s_B.clamp(s_T[0], s_T[-1])
        above_B = torch.searchsorted(s_T, inside_B).clamp(1, last)
        lower_B, upper_B = s_T[above_B - 1], s_T[above_B]
        return inside_B, above_B - 1 + (inside_B - lower_B) / (upper_B - lower_B)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor, t_B: Tensor, context_BLD: Tensor) -> Tensor:
        """Compute u, fp32 (B, C, H, W), at x_s and t = T s, (B,)."""
        s_B, x_BCHW = t_B.float() / self.total, x_BCHW.float()
        inside_B, base_t_B = self.base_timesteps(s_B)

        def image(values_B: Tensor) -> Tensor:
            return values_B[:, None, None, None]

        s, a, b = image(s_B), image((1 - inside_B) / _norm(inside_B)), image(inside_B / _norm(inside_B))
        x_t = x_BCHW / image(_norm(s_B))
        output = self.unet(x_t, base_t_B, context_BLD).float()
        if self.velocity:
            eps, x_0 = b * x_t + a * output, a * x_t - b * output
        else:
            eps, x_0 = output, (x_t - b * output) / a
        return torch.where(s < 0.5, (eps - x_BCHW) / (1 - s), (x_BCHW - x_0) / s)


def _norm(s_B: Tensor) -> Tensor:
    return ((1 - s_B) ** 2 + s_B**2).sqrt()
