"""Rectified flows against the papers' formulas in double precision: noise, timesteps, weights, and the base's own flow."""

import math
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from sentences import refused
from step_inputs import stage_of

from fastsd.model.flow_schedule import flow_scheduler, shift_of
from fastsd.model.model import SD15_SCHEDULER
from fastsd.train.flow import FlowObjective, Teacher, objective_of
from fastsd.train.objective import alphas_cumprod
from fastsd_kernels import REFERENCE, noise
from fastsd_kernels.noise import Purpose

SEED, POSITIONS = 7, torch.tensor([0, 5, 2**33 + 1, 17, 123_456, 999_999])
FLOW = flow_scheduler(SD15_SCHEDULER)
VELOCITY = {**SD15_SCHEDULER, "prediction_type": "v_prediction"}
ZERO_SNR = {**VELOCITY, "rescale_betas_zero_snr": True}


def objective(**settings) -> FlowObjective:
    return objective_of(FLOW, SEED, REFERENCE, stage_of(**settings))


def latents() -> torch.Tensor:
    return torch.randn(len(POSITIONS), 4, 6, 10, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.2


@pytest.mark.parametrize("settings", [{}, {"immiscible": 3}, {"noise_offset": 0.1, "input_perturbation": 0.2}])
def test_noisy_latents_and_target(settings):
    x = latents()
    x_s, t_B, target = objective(**settings).add_noise(x, POSITIONS)
    eps = target.double() + x  # of plain noise below
    if not settings:
        torch.testing.assert_close(eps, noise.normal(SEED, Purpose.NOISE, POSITIONS, (4, 6, 10)).double(), rtol=0, atol=1e-6)
    extra = settings.get("input_perturbation", 0) * noise.normal(SEED, Purpose.PERTURBATION, POSITIONS, (4, 6, 10)).double()
    s = (t_B.double() / 1000)[:, None, None, None]
    assert t_B.dtype == x_s.dtype == target.dtype == torch.float32 and not t_B.frac().eq(0).all()
    torch.testing.assert_close(x_s.double(), (1 - s) * x + s * (eps + extra), rtol=0, atol=2e-6)
    pairs = [objective(**settings).add_noise(x[i : i + 2], POSITIONS[i : i + 2]) for i in (0, 2, 4)]
    for whole, parts in zip((x_s, t_B, target), zip(*pairs, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "cubic"])
def test_distribution_of_timesteps(kind, shift):
    """The share of draws below a quantile is that of the distribution's cumulative function."""
    mean = {"timestep_mean": 0.3} if kind == "logit_normal" else {}
    flow = objective(timesteps=kind, timestep_shift=shift, timestep_range=[200, 700], **mean)
    s = (flow.timesteps(torch.arange(40_000)).double() - 200) / 500
    assert s.min() >= 0 and s.max() <= 1
    for quantile in (0.1, 0.5, 0.8):
        before = quantile / (shift - (shift - 1) * quantile)  # the inverse of the shift
        expected = {
            "uniform": before,
            "cubic": 1 - (1 - before) ** (1 / 3),
            "logit_normal": NormalDist(0.3, 1).cdf(math.log(before / (1 - before))),
        }[kind]
        assert abs((s < quantile).double().mean().item() - expected) < 0.01


WEIGHTS = {
    "min_snr": lambda snr: min(snr, 5.0) / snr,
    "debiased": lambda snr: 1 / math.sqrt(snr),
    "p2": lambda snr: 1 / (1 + snr),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_weights_are_those_of_the_papers(weighting):
    """With |eps - eps'|^2 = SNR |x_0 - x_0'|^2 and |u - u'|^2 = |x_0 - x_0'|^2 / s^2, the papers' weights of eps hold for u."""
    x, y = latents()[:1], torch.zeros(1, 4, 6, 10)
    for t in (0.5, 130.0, 500.25, 931.0, 999.5):
        s = t / 1000
        snr = ((1 - s) / s) ** 2
        loss = objective(weighting=weighting).loss(x, y, torch.tensor([t])).item()
        expected = WEIGHTS[weighting](snr) * snr * s**2 * x.double().square().mean().item()
        assert loss == pytest.approx(expected, rel=1e-5)
    floor = objective(weighting=weighting, weighting_min=0.1).loss(x, y, torch.tensor([1000.0])).item()
    assert floor == pytest.approx(0.1 * x.double().square().mean().item(), rel=1e-5)
    mask = torch.zeros(1, 1, 6, 10)
    assert objective(unmasked_weight=0.25).loss(x, y, torch.tensor([9.0]), None, mask).item() == pytest.approx(
        0.25 * x.double().square().mean().item(), rel=1e-5
    )


def base_flow(predict, scheduler, x_s, s):
    """The flow of a base in fp64: the same signal-to-noise ratio, and the input rescaled. `predict` takes x_t and t."""
    abar = alphas_cumprod(scheduler).double()
    s_T = ((1 - abar).sqrt() / (abar.sqrt() + (1 - abar).sqrt())).tolist()
    inside, last = min(max(s, s_T[0]), s_T[-1]), len(s_T) - 1
    above = next((t for t in range(1, last + 1) if s_T[t] >= inside), last)
    t = above - 1 + (inside - s_T[above - 1]) / (s_T[above] - s_T[above - 1])
    a, b = (1 - inside) / math.hypot(1 - inside, inside), inside / math.hypot(1 - inside, inside)
    x_t = x_s / math.hypot(1 - s, s)
    output = predict(x_t, t)
    velocity = scheduler["prediction_type"] == "v_prediction"
    eps, x_0 = (b * x_t + a * output, a * x_t - b * output) if velocity else (output, (x_t - b * output) / a if a else None)
    return (eps - x_s) / (1 - s) if s < 0.5 else (x_s - x_0) / s


@pytest.mark.parametrize("scheduler", [SD15_SCHEDULER, VELOCITY, ZERO_SNR], ids=["epsilon", "velocity", "zero-snr"])
def test_the_flow_of_a_base_is_its_closed_form(scheduler):
    s_B = torch.tensor([0.001, 0.02, 0.1, 0.45, 0.55, 0.8, 0.93, 0.97, 1.0])
    x_s = torch.randn(len(s_B), 4, 3, 3, generator=torch.Generator().manual_seed(1))

    def unet(x_BCHW, t_B, _):
        return 0.9 * x_BCHW + 0.1 * torch.sin(3 * x_BCHW + t_B[:, None, None, None] / 300)

    def predict(x, t):
        return 0.9 * x + 0.1 * torch.sin(3 * x + t / 300)

    fake = SimpleNamespace(conv_in=SimpleNamespace(weight=torch.zeros(1)), requires_grad_=lambda _: unet)
    ours = Teacher(fake, scheduler)(x_s, 1000 * s_B, None)
    for i, s in enumerate(s_B.double().tolist()):
        expected = base_flow(predict, scheduler, x_s[i].double(), s)
        torch.testing.assert_close(ours[i].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("velocity", [False, True])
def test_a_base_that_is_right_gives_the_right_flow(velocity):
    """A base that knows x_0 says eps - x_0, at every s that its noise schedule reaches."""
    scheduler, x = VELOCITY if velocity else SD15_SCHEDULER, latents().double()
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s = torch.tensor([0.03, 0.2, 0.5, 0.7, 0.9, 0.93])[:, None, None, None].double()
    n = ((1 - s) ** 2 + s**2).sqrt()
    target = ((1 - s) * eps - s * x) / n if velocity else eps
    unet = SimpleNamespace(conv_in=SimpleNamespace(weight=torch.zeros(1)), requires_grad_=lambda _: lambda *_: target.float())
    u = Teacher(unet, scheduler)(((1 - s) * x + s * eps).float(), 1000 * s.flatten().float(), None)
    torch.testing.assert_close(u.double(), eps - x, rtol=0, atol=2e-5)


def test_keys_that_only_flows_or_only_others_have():
    for settings, text in (({"timestep_shift": 3.0}, "timestep_shift is 3"), ({"teacher": "base"}, "teacher is 'base'")):
        with refused("stage-needs-flow", setting=text, prediction="epsilon", key=next(iter(settings))):
            objective_of(SD15_SCHEDULER, 0, stage=stage_of(**settings))
    with refused("weighting-form-of-flow", form="'sd-scripts'"):
        objective(weighting="min_snr", weighting_form="sd-scripts")
    with refused("timestep-range", range="[0, 1200]", timesteps=1000, first=0, end=1000):
        objective(timestep_range=[0, 1200])
    assert shift_of(flow_scheduler({**SD15_SCHEDULER, "num_train_timesteps": 500}, 2.5)) == 2.5
    assert shift_of({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}) == 3.0
