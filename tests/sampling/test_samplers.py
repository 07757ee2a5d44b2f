"""Samplers with any number of steps: diffusers' own results where it has any, and otherwise the formula."""

from itertools import pairwise
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from sentences import refused

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.formats.load import load_model
from fastsd.model.model import SD15_SCHEDULER, usable_scheduler
from fastsd.sampling.generate import denoise, generate, rescale_guidance
from fastsd.sampling.samplers import FLOW_SAMPLERS, make_sampler
from fastsd.train.objective import alphas_cumprod

CLASSES = {
    "ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler, "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
}  # fmt: skip
VELOCITY = {**SD15_SCHEDULER, "prediction_type": "v_prediction"}
SCHEDULERS = {
    "epsilon": SD15_SCHEDULER,
    "leading": {**SD15_SCHEDULER, "timestep_spacing": "leading"},
    "zero": usable_scheduler({**VELOCITY, "rescale_betas_zero_snr": True}),
}
STEPS = 1, 20, 501, 750, 1000


def prediction(x_BCHW, t):
    """Stand in for a UNet: smooth, different at every timestep, and not exact."""
    return 0.9 * x_BCHW + 0.1 * torch.sin(3 * x_BCHW + float(t) / 300)


def drawn(sampler, scheduler, steps, latents=None, start=0):
    """Return the noise, the timesteps at which the model was called, and the result of `denoise`."""
    calls = []

    def unet(x_BCHW, t_B, _):
        calls.append(float(t_B[0]))
        return prediction(x_BCHW, t_B[0])

    text = SimpleNamespace(tokenize=lambda texts: torch.zeros(len(texts), 77), encode=lambda ids: ids[..., None])
    text.device = torch.device("cpu")
    model = SimpleNamespace(unet=unet, text=text, scheduler=scheduler)
    eps = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    table = SampleTable(sampler=sampler, steps=steps, guidance=1.0)
    return eps, calls, denoise(model, ["a"], eps, [3], table, latents, start)


def with_diffusers(sampler, scheduler, steps, eps, **overrides):
    reference = CLASSES[sampler].from_config({**scheduler, **overrides})
    reference.set_timesteps(steps)
    x, options = eps * reference.init_noise_sigma, {"generator": [torch.Generator().manual_seed(3)]}
    for t in reference.timesteps:
        output = prediction(reference.scale_model_input(x, t), t)
        x = reference.step(output, t, x, **({} if sampler == "dpm++" else options)).prev_sample
    return x


def ddim(timesteps, abar_T, x, *, velocity=False):
    """Song et al. 2021, "Denoising diffusion implicit models", equation 12 with eta 0, in fp64."""
    for t, following in pairwise([*map(int, timesteps), -1]):
        a, b = abar_T[t], abar_T[max(following, 0)]
        output = prediction(x.float(), t).double()
        eps = a.sqrt() * output + (1 - a).sqrt() * x if velocity else output
        x0 = a.sqrt() * x - (1 - a).sqrt() * output if velocity else (x - (1 - a).sqrt() * eps) / a.sqrt()
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    return x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("sampler", CLASSES)
def test_any_number_of_steps(sampler, kind, steps):
    """Up to half the timesteps, leading spacing gives diffusers' bits. Above, samples begin at the last timestep."""
    scheduler = SCHEDULERS[kind]
    eps, calls, result = drawn(sampler, scheduler, steps)
    print(f"{sampler}, {kind}, {steps} steps: {calls[0]:.0f} to {calls[-1]:.0f}")
    assert len(calls) == steps and result.isfinite().all()
    if kind == "zero" or steps > 500:
        assert calls[0] == 999
    lengths = [a - b for a, b in pairwise(calls)]
    assert all(abs(length - 1000 / steps) <= 1 for length in lengths if steps > 20)
    leads = sampler == "ddim" or kind == "leading"
    if steps <= 20 or (kind == "epsilon" and not leads and steps < 1000):
        assert torch.equal(result, with_diffusers(sampler, scheduler, steps, eps))
    elif steps == 1000 or not sampler.startswith("ddim"):  # with the spacing that works
        assert torch.equal(result, with_diffusers(sampler, scheduler, steps, eps, timestep_spacing="trailing"))
    if sampler == "ddim":
        velocity, abar_T = kind == "zero", alphas_cumprod(scheduler).double()
        if steps != 20 or not velocity:  # there, diffusers' steps are not as long as its timesteps are apart
            error = (result - ddim(calls, abar_T, eps.double(), velocity=velocity)).abs().max()
            print(f"DDIM's formula: {error:.1e}")
            assert error < 2e-5


@pytest.mark.parametrize("start", [1, 600, 999])
@pytest.mark.parametrize("steps", [20, 500, 501, 750, 1000])
def test_a_start_from_latents_has_steps_of_the_same_length(start, steps):
    latents = torch.ones(1, 4, 4, 4)
    eps, calls, result = drawn("ddim", SD15_SCHEDULER, steps, latents, start)
    assert calls[0] == start and abs(len(calls) - (start + 1) * steps / 1000) <= 1
    abar_T = alphas_cumprod(SD15_SCHEDULER).double()
    noisy = abar_T[start].sqrt() * latents + (1 - abar_T[start]).sqrt() * eps
    torch.testing.assert_close(result.double(), ddim(calls, abar_T, noisy.double()), rtol=0, atol=2e-5)
    euler_calls = drawn("euler", SD15_SCHEDULER, steps, latents, start)[1]
    assert euler_calls == calls


@pytest.mark.parametrize("start", [0, 30, 600])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm++"])
def test_samplers_of_flows(sampler, shift, start):
    """With the flow of a single image, every sampler ends at the image, from pure noise (0) or from the noise of a timestep."""
    image = torch.linspace(-1, 1, 64).view(1, 4, 4, 4)
    calls = []

    def unet(x_BCHW, t_B, _):
        calls.append(float(t_B[0]))
        return (x_BCHW - image) / (t_B[:, None, None, None] / 1000)

    text = SimpleNamespace(tokenize=lambda texts: torch.zeros(len(texts), 77), encode=lambda ids: ids[..., None])
    text.device = torch.device("cpu")
    model = SimpleNamespace(unet=unet, text=text, scheduler=flow_scheduler(SD15_SCHEDULER, shift))
    eps = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    result = denoise(
        model, ["a"], eps, [3], SampleTable(sampler=sampler, steps=9, guidance=1.0), image if start else None, start
    )
    assert calls[0] == (start or (999 if sampler == "dpm++" else 1000)) and calls == sorted(calls, reverse=True)
    assert (result - image).abs().max() < 0.02  # DPM++ rounds timesteps


@pytest.mark.parametrize("start", [0, 300])
@pytest.mark.parametrize("flow, sampler", [(False, name) for name in CLASSES] + [(True, name) for name in FLOW_SAMPLERS])
def test_counting_the_steps_changes_no_bit(sampler, flow, start, monkeypatch):
    """Samplers of flows begin at a step that is set, and others do not. Both give what a search by timestep gives."""
    scheduler = flow_scheduler(SD15_SCHEDULER, 3.0) if flow else SD15_SCHEDULER
    latents = torch.linspace(-1, 1, 64).view(1, 4, 4, 4) if start else None
    *_, result = drawn(sampler, scheduler, 20, latents, start)
    begun, scheduler_class = [], type(make_sampler(sampler, scheduler, 20, torch.device("cpu")))
    monkeypatch.setattr(scheduler_class, "set_begin_index", lambda self, index=0: begun.append(index), raising=False)
    *_, searched = drawn(sampler, scheduler, 20, latents, start)
    assert torch.equal(searched, result) and begun == ([0] if flow else [])


def test_a_flow_may_have_timesteps_twice():
    """DPM++ rounds timesteps, so that a shift makes neighbours equal; each step is nevertheless taken once."""
    scheduler = make_sampler("dpm++", flow_scheduler(SD15_SCHEDULER, 3.0), 600, torch.device("cpu"))
    assert len(set(scheduler.timesteps.tolist())) < 600
    x = torch.ones(1, 4, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(x / scheduler.sigmas[scheduler.step_index or 0], t, x).prev_sample
    assert scheduler.step_index == 600 and x.abs().max() < 0.01


@pytest.mark.parametrize("steps", [500, 501])
def test_the_spacing_changes_where_leading_would_begin_too_early(steps):
    timesteps = make_sampler("ddim", SD15_SCHEDULER, steps, torch.device("cpu")).timesteps
    reference = diffusers.DDIMScheduler.from_config(SD15_SCHEDULER)
    reference.set_timesteps(steps)
    assert int(timesteps[0]) == 999 and int(reference.timesteps[0]) == (999 if steps == 500 else 501)


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_guidance_is_rescaled_as_in_diffusers(share):
    generator = torch.Generator().manual_seed(0)
    guided, conditional = (torch.randn(3, 4, 5, 6, generator=generator) * scale for scale in (7, 1))
    rescaled = rescale_guidance(guided, conditional, share)
    assert torch.equal(rescaled, rescale_noise_cfg(guided, conditional, guidance_rescale=share))
    if share == 1:
        torch.testing.assert_close(rescaled.std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_guidance_rescale_is_a_setting_of_the_samples(tiny_model):
    model = load_model(ModelTable(base=str(tiny_model)))
    images = [
        generate(model, ["a red circle"], [0], SampleTable(steps=2, guidance_rescale=share), 32)[0].tobytes()
        for share in (0.0, 0.7)
    ]
    assert images[0] == generate(model, ["a red circle"], [0], SampleTable(steps=2), 32)[0].tobytes() != images[1]


def test_more_steps_than_timesteps_are_refused(tiny_model):
    model = load_model(ModelTable(base=str(tiny_model)))
    with refused("sample-steps", steps=1001, timesteps=1000):
        generate(model, ["a"], [0], SampleTable(steps=1001), 32)
