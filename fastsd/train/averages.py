"""Averages of the weights with a power-function profile: their decays in a run, and any other length made of them afterwards.

After t steps, an average of power gamma gives the weights of step s = 1 .. t the share (s/t)^(gamma+1) - ((s-1)/t)^(gamma+1),
the integral over (s-1, s] of its profile

    p(tau) = (gamma+1) tau^gamma / t^(gamma+1)                  0 < tau <= t
    sigma_rel = sqrt((gamma+1) / ((gamma+2)^2 (gamma+3)))       standard deviation of the profile, as a share of t

so its length grows with the run, and nothing of the starting weights remains. One decay per step keeps it exactly:

    average = beta_t average + (1 - beta_t) weights             beta_t = (1 - 1/t)^(gamma+1)

Profiles of stored averages, of two lengths at several times, span others: `combine` finds the sum of them that is closest to
the profile of another length, and the same sum of the averages is the average of that length.

Source: Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3.1, equations 123 to
127 and algorithm 3 of appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def power_of(sigma_rel: float) -> float:
    """Return the power gamma >= 0 of an average with the relative length `sigma_rel`, above 0 and at most 1/sqrt(12)."""
    low, high = 0.0, 1 / sigma_rel  # sigma_rel < 1 / (gamma + 2), and falls with gamma
    for _ in range(200):
        gamma = (low + high) / 2
        longer = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) > sigma_rel**2
        low, high = (gamma, high) if longer else (low, gamma)
    return low


class PowerDecays:
    """The decays of a stage's power-function averages, computed on the device, where a captured step reads them.

    A step that changes no weight is not counted, so the profile over the other steps is exact.

    Args:
        sigma_rel: relative lengths of the K averages.

    Attributes:
        steps_K: steps that each average has, fp64 (K,).
        starts_K: number of the first step of each, fp64 (K,).
        decays_K: decay of each in the current step, fp64 (K,).
    """

    def __init__(self, sigma_rel: Sequence[float], device: torch.device) -> None:
        self._exponents_K = torch.tensor([power_of(sigma) + 1 for sigma in sigma_rel], dtype=torch.float64, device=device)
        self.steps_K, self.starts_K, self.decays_K = torch.zeros(3, len(sigma_rel), dtype=torch.float64, device=device).unbind()
        self._new = set(range(len(sigma_rel)))

    def state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return what a checkpoint stores of the averages with these names, "NAME@steps" and "NAME@start", as views."""
        rows = {"steps": self.steps_K, "start": self.starts_K}
        return {f"{name}@{key}": row[k] for key, row in rows.items() for k, name in enumerate(names)}

    def continues(self, k: int) -> None:
        """Record that the state of average k was loaded."""
        self._new.discard(k)

    def number(self, step: int) -> None:
        """Number the next step, which is the first of the averages that were not loaded."""
        for k in self._new:
            self.starts_K[k].fill_(step)
        self._new.clear()

    def begin(self) -> None:
        """Compute the decays of the next step."""
        self.decays_K.copy_((self.steps_K / (self.steps_K + 1)) ** self._exponents_K)

    def end(self, found_inf: Tensor) -> None:
        """Count a step, unless `found_inf` is set (0-dim)."""
        self.steps_K += found_inf == 0


class Profile(NamedTuple):
    """The profile of an average: its length `sigma_rel`, after `steps` steps."""

    steps: float
    sigma_rel: float


def combine(stored: Sequence[Profile], target: Profile) -> tuple[list[float], float]:
    """Find the sum of stored averages whose profile is closest to a target in the mean square, with factors that add to 1.

    Without that condition, the sum would be a model whose weights are all a little too small, by up to 0.3 % for lengths far
    from those stored. In the paper this changes nothing, because its weights are normalised.

    Returns:
        (a factor for each stored average, the error that remains). The error is the norm of the difference between the
        profiles, relative to the norm of the target. Averages later than the target get the factor 0.

    Source: as this module; the least squares of algorithm 3 in appendix C.
    """
    if target in stored:
        return [float(i == stored.index(target)) for i in range(len(stored))], 0.0
    usable = [profile.steps <= target.steps for profile in stored]
    columns_2N = np.array([(p.steps, power_of(p.sigma_rel)) for p, fits in zip(stored, usable, strict=True) if fits]).T
    if not columns_2N.size:
        return [0.0] * len(stored), 1.0
    goal_2 = np.array([target.steps, power_of(target.sigma_rel)])
    products_NN = _inner_products(columns_2N[:, :, None], columns_2N[:, None, :])
    products_N, square = _inner_products(columns_2N, goal_2[:, None]), _inner_products(goal_2, goal_2)
    # Columns of norm 1: profiles of early steps are much higher than those of late ones.
    norms_N = np.sqrt(np.diag(products_NN))
    sides_N2 = np.stack([products_N, np.ones_like(products_N)], axis=1) / norms_N[:, None]
    solutions_N2 = np.linalg.lstsq(products_NN / norms_N / norms_N[:, None], sides_N2, rcond=1e-12)[0] / norms_N[:, None]
    nearest_N, correction_N = solutions_N2.T
    factors_N = nearest_N + correction_N * (1 - nearest_N.sum()) / correction_N.sum()
    error = square - 2 * factors_N @ products_N + factors_N @ products_NN @ factors_N
    remaining = iter(factors_N.tolist())
    return [next(remaining) if fits else 0.0 for fits in usable], math.sqrt(max(float(error / square), 0.0))


def _inner_products(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the integrals of products of profiles (steps, gamma), broadcast over the dimensions after the first."""
    (steps_a, gamma_a), (steps_b, gamma_b) = first, second
    shorter, longer = np.minimum(steps_a, steps_b), np.maximum(steps_a, steps_b)
    gamma_longer = np.where(steps_a < steps_b, gamma_b, gamma_a)
    heights = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(heights * (shorter / longer) ** gamma_longer / longer)
