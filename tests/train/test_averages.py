"""Power-function averages: the paper's profile in fp64, through decays, through a real step, and by least squares."""

import math

import numpy as np
import pytest
import torch
from step_inputs import OPTIMIZERS, batches, stage_of

from fastsd.config.schema import ModelTable
from fastsd.config.stages import LONGEST
from fastsd.model.formats.load import load_model
from fastsd.train.averages import PowerDecays, Profile, combine, power_of
from fastsd.train.step import Step

PAIR = (0.05, 0.10)


def shares(steps: int, sigma_rel: float) -> np.ndarray:
    """Return the share of each step in an average, from the paper's profile: the integral of (g+1) s^g / t^(g+1) over it."""
    ends = np.arange(steps + 1) / steps
    return np.diff(ends ** (power_of(sigma_rel) + 1))


def test_the_power_of_a_length():
    assert [power_of(sigma) for sigma in PAIR] == pytest.approx([16.97, 6.94], abs=5e-3)  # the paper's, section 3.1
    assert power_of(LONGEST) == pytest.approx(0, abs=2e-3) and power_of(12**-0.5) == pytest.approx(0, abs=1e-9)
    for sigma in (1e-6, 0.01, 0.07, 0.2, 0.288):
        g = power_of(sigma)
        assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("skipped", [(), (1,), (2, 3, 150)])
def test_decays_give_the_profile(skipped):
    """The average of unit vectors is the share of each step. A step that changes nothing has none."""
    lengths, count = (0.02, *PAIR, 0.25), 200
    decays = PowerDecays(lengths, torch.device("cpu"))
    average = torch.zeros(len(lengths), count, dtype=torch.float64)
    for step in range(1, count + 1):
        decays.begin()
        found_inf = torch.tensor(step in skipped)
        if not found_inf:
            weights = torch.eye(count, dtype=torch.float64)[step - 1]
            average += (1 - decays.decays_K)[:, None] * (weights - average)
        decays.end(found_inf)
    counted = [step - 1 for step in range(1, count + 1) if step not in skipped]
    assert decays.steps_K.tolist() == [len(counted)] * 4
    for row, sigma in zip(average.numpy(), lengths, strict=True):
        np.testing.assert_allclose(row[counted], shares(len(counted), sigma), rtol=1e-9, atol=1e-15)
        times = np.arange(len(counted)) + 0.5
        mean = (row[counted] * times).sum()
        spread = math.sqrt((row[counted] * (times - mean) ** 2).sum()) / len(counted)
        assert spread == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        ({"precision": "fp32"}, 0),
        ({"precision": "bf16", "grad_clip": 1.0}, 1),
        ({"precision": "fp32", "fused_backward": True}, 2),
    ],
    ids=["fp32", "bf16", "fused"],
)
def test_a_step_keeps_the_averages(settings, seed, tiny_model):
    """After each step, both averages are the sums of all weights so far with the paper's shares, added in fp64."""
    stage = stage_of(**OPTIMIZERS["lion"], ema={"sigma_rel": list(PAIR)}, **settings)
    step = Step(load_model(ModelTable(base=str(tiny_model))), stage, 100, seed)
    history = []
    for number, batch in enumerate(batches(4, stage.batch)):
        step(batch, number)
        unet = step.components["unet"]
        history.append(torch.cat([tensor.double().flatten() for tensor in unet.state().values()]))
        weights = torch.stack(history)
        for sigma, name in zip(PAIR, ("ema-0.05", "ema-0.1"), strict=True):
            average = torch.cat([unet.ema_state()[f"{name}/{key}"].double().flatten() for key in unet.state()])
            expected = torch.from_numpy(shares(number + 1, sigma)) @ weights
            torch.testing.assert_close(average, expected, rtol=0, atol=2e-7 * weights.abs().max().item())
    state = step.state_dict()
    assert state["ema-0.05@steps"] == state["ema-0.1@steps"] == 4 and state["ema-0.1@start"] == 0


def stored_at(times, lengths=PAIR) -> list[Profile]:
    return [Profile(time, sigma) for time in times for sigma in lengths]


def test_least_squares_are_the_papers():
    """Factors and error against profiles on a fine grid, with the condition that factors add up to 1."""
    stored, target = stored_at(range(125, 1001, 125)), Profile(1000, 0.07)
    factors, error = combine(stored, target)
    tau = (np.arange(200_000) + 0.5) / 200

    def on_grid(profile: Profile) -> np.ndarray:
        g = power_of(profile.sigma_rel)
        return np.where(tau <= profile.steps, (g + 1) / profile.steps * np.minimum(tau / profile.steps, 1) ** g, 0)

    columns, goal = np.stack([on_grid(profile) for profile in stored], axis=1), on_grid(target)
    products, sides = columns.T @ columns, columns.T @ goal
    lagrange = np.block([[products, np.ones((16, 1))], [np.ones((1, 16)), np.zeros((1, 1))]])
    np.testing.assert_allclose(factors, np.linalg.solve(lagrange, [*sides, 1])[:16], atol=2e-4)
    assert sum(factors) == pytest.approx(1, abs=1e-12)
    assert error == pytest.approx(np.linalg.norm(columns @ factors - goal) / np.linalg.norm(goal), rel=1e-2)
    free = np.linalg.solve(products, sides)
    free_error = np.linalg.norm(columns @ free - goal) / np.linalg.norm(goal)
    print(f"error {error:.5f}; without the condition {free_error:.5f}, and the factors add up to {free.sum():.6f}")
    assert free_error <= error <= 1.02 * free_error


def test_errors_of_other_lengths():
    stored = stored_at([1000 * n / 16 for n in range(1, 17)])
    errors = {sigma: combine(stored, Profile(1000, sigma))[1] for sigma in (0.01, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.25)}
    print(errors)
    assert errors[0.05] == errors[0.1] == 0 and max(errors[sigma] for sigma in (0.07, 0.15)) < 0.0101
    assert 0.01 < errors[0.04] < 0.02 < errors[0.03] < 0.05 < errors[0.25] < errors[0.01]
    # What is later than the target average has no part in it, and without anything earlier there is no average.
    factors, error = combine(stored, Profile(500, 0.07))
    assert factors[16:] == [0.0] * 16 and error < 0.02
    assert combine(stored, Profile(10, 0.07)) == ([0.0] * 32, 1.0)
