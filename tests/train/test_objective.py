"""The objective against the papers' formulas in double precision: targets, noise, timesteps, weights and losses."""

import json
import math
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace
from unittest import mock
from unittest.mock import Mock

import pytest
import torch
from model_files import edit_json, spoil
from sentences import refused, says
from step_inputs import Elsewhere, batches, stage_of
from torch.nn import functional as F

from fastsd.config.keys import Key, keys_with
from fastsd.config.schema import ModelTable, SampleTable, StageTable, load_config
from fastsd.model.formats.load import load_model, write_rest
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import plan_stage
from fastsd.sampling.generate import denoise
from fastsd.train.objective import Objective, alphas_cumprod
from fastsd.train.step import Step
from fastsd.train.step_inputs import StepInputs
from fastsd_kernels import REFERENCE, TRITON, noise
from fastsd_kernels.launch import recording
from fastsd_kernels.noise import Purpose

SEED, POSITIONS = 7, torch.tensor([0, 5, 2**33 + 1, 17, 123_456, 999_999])
VELOCITY = {**SD15_SCHEDULER, "prediction_type": "v_prediction"}
ZERO_SNR = {**VELOCITY, "rescale_betas_zero_snr": True}
SCHEDULERS = {"epsilon": SD15_SCHEDULER, "v_prediction": VELOCITY, "zero": ZERO_SNR}
NOISES = {
    "plain": {},
    "offset": {"noise_offset": 0.1},
    "pyramid": {"pyramid_noise": 0.4},
    "perturbation": {"input_perturbation": 0.2},
    "immiscible": {"immiscible": 5},
    "all": {"noise_offset": 0.05, "pyramid_noise": 0.3, "input_perturbation": 0.1, "immiscible": 3},
}


def make_objective(kind: str = "epsilon", **settings) -> Objective:
    scheduler = SCHEDULERS[kind]
    return Objective(alphas_cumprod(scheduler), SEED, REFERENCE, stage_of(**settings), scheduler["prediction_type"])


def latents(height: int = 12, width: int = 20) -> torch.Tensor:
    return torch.randn(len(POSITIONS), 4, height, width, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.2


def draw(purpose: Purpose, *shape: int) -> torch.Tensor:
    return noise.normal(SEED, purpose, POSITIONS, shape).double()


def nearest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Choose the nearest of k noises for each image (Li et al. 2025)."""
    plain, more = draw(Purpose.NOISE, *x.shape[1:]), draw(Purpose.IMMISCIBLE, k - 1, *x.shape[1:])
    chosen = []
    for image, first, others in zip(x.double(), plain, more, strict=True):
        chosen.append(min([first, *others], key=lambda eps: (eps - image).pow(2).sum().item()))
    return torch.stack(chosen)


def pyramid(eps: torch.Tensor, share: float) -> torch.Tensor:
    """Add share^i times noise of 1 / 2^i of the size (Whitaker 2023), and scale the sum to unit standard deviation."""
    _, c, h, w = eps.shape
    variance, start = 1.0, 0
    sides = [(h // 2**i, w // 2**i) for i in range(1, 99) if min(h, w) // 2**i]
    numbers = draw(Purpose.PYRAMID, sum(c * a * b for a, b in sides))
    for i, (a, b) in enumerate(sides, 1):
        coarse = numbers[:, start : start + c * a * b].reshape(-1, c, a, b)
        start += c * a * b
        eps = eps + share**i * F.interpolate(coarse, (h, w), mode="bilinear")
        units = torch.eye(a * b, dtype=torch.float64).reshape(a * b, 1, a, b)  # they give the weights of the coarse numbers
        variance += share ** (2 * i) * F.interpolate(units, (h, w), mode="bilinear").pow(2).sum(0).mean().item()
    return eps / variance**0.5


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", NOISES)
def test_noisy_latents_and_target_match_the_formulas(name, kind):
    settings, x = NOISES[name], latents()
    x_t, t_B, target = make_objective(kind, **settings).add_noise(x, POSITIONS)
    abar = alphas_cumprod(SCHEDULERS[kind]).double()[t_B][:, None, None, None]
    eps = nearest(x, settings["immiscible"]) if "immiscible" in settings else draw(Purpose.NOISE, *x.shape[1:])
    eps = pyramid(eps, settings["pyramid_noise"]) if "pyramid_noise" in settings else eps
    eps = eps + settings.get("noise_offset", 0) * draw(Purpose.OFFSET, 4, 1, 1)
    perturbation = settings.get("input_perturbation", 0) * draw(Purpose.PERTURBATION, *x.shape[1:])
    velocity = abar.sqrt() * eps - (1 - abar).sqrt() * x
    assert x_t.dtype == target.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), abar.sqrt() * x + (1 - abar).sqrt() * (eps + perturbation), rtol=0, atol=2e-6)
    torch.testing.assert_close(target.double(), eps if kind == "epsilon" else velocity, rtol=0, atol=2e-6)
    if kind == "zero":  # the input is pure noise, and v is the negative image
        x_t, _, target = make_objective(kind, timestep_range=[999, 1000], **settings).add_noise(x, POSITIONS)
        torch.testing.assert_close(x_t.double(), eps + perturbation, rtol=0, atol=2e-6)
        assert torch.equal(target, -x)


def test_plain_noise_uses_the_fused_op():
    fused, x = Mock(side_effect=REFERENCE.add_noise), latents()
    objective = Objective(alphas_cumprod(SD15_SCHEDULER), SEED, replace(REFERENCE, add_noise=fused))
    x_t, t_B, target = objective.add_noise(x, POSITIONS)
    assert [call.kwargs for call in fused.call_args_list] == [{"prediction": "epsilon"}]
    assert torch.equal(t_B, noise.integers(SEED, Purpose.TIMESTEP, POSITIONS, 1000))
    assert torch.equal(target, noise.normal(SEED, Purpose.NOISE, POSITIONS, (4, 12, 20)))
    assert torch.equal(objective.loss(x_t.bfloat16(), target, t_B), F.mse_loss(x_t.bfloat16().float(), target))


@pytest.mark.parametrize("name", NOISES)
def test_splitting_a_batch_changes_no_number(name):
    objective, x = make_objective("v_prediction", timesteps="logit_normal", weighting="min_snr", **NOISES[name]), latents()
    whole, prediction = objective.add_noise(x, POSITIONS), latents().flip(0)
    assert all(torch.equal(a, b) for a, b in zip(whole, objective.add_noise(x, POSITIONS), strict=True))
    rows = [objective.add_noise(x[i : i + 2], POSITIONS[i : i + 2]) for i in range(0, 6, 2)]
    for tensor, chunks in zip(whole, zip(*rows, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(chunks))
    losses = [objective.loss(prediction[i : i + 2], rows[i // 2][2], rows[i // 2][1]) / 3 for i in range(0, 6, 2)]
    torch.testing.assert_close(sum(losses), objective.loss(prediction, whole[2], whole[1]))


def test_pyramid_noise_has_unit_standard_deviation_at_any_size():
    for height, width in ((16, 16), (8, 24), (9, 5), (1, 7)):
        objective, zeros = make_objective(pyramid_noise=0.8), torch.zeros(512, 4, height, width)
        _, _, eps = objective.add_noise(zeros, torch.arange(512))
        count = 512 * 4  # at 0.8 the numbers of a channel are correlated, at worst like a single number
        assert abs(eps.std().item() - 1) < 4 * (1 / (2 * count)) ** 0.5


# The weights of the papers for the loss in eps. For the loss in v, multiply them by snr / (snr + 1) (Salimans and Ho).
WEIGHTS = {
    "min_snr": (5.0, lambda snr, g: min(snr, g) / snr),
    "debiased": (None, lambda snr, g: 1 / math.sqrt(snr)),
    "p2": (1.0, lambda snr, g: 1 / (1 + snr) ** g),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_weightings_match_the_papers(weighting, kind):
    default, weight = WEIGHTS[weighting]
    for gamma in (None, 0.7) if default else (None,):
        args = {"weighting_gamma": gamma} if gamma else {}
        objective, abar = make_objective(kind, weighting=weighting, **args), alphas_cumprod(SCHEDULERS[kind]).double().tolist()
        for t in (0, 1, 250, 700, 998, 999):
            snr = abar[t] / (1 - abar[t])
            expected_weight = (weight(snr, gamma or default) if snr else 0) * (1 if kind == "epsilon" else snr / (snr + 1))
            x, y = latents()[:1], torch.zeros(1, 4, 12, 20)
            result = objective.loss(x, y, torch.tensor([t])).item()
            assert result == pytest.approx(expected_weight * x.double().pow(2).mean().item(), rel=1e-5)
        assert objective.weights_T.isfinite().all() and objective.weights_T.dtype == torch.float32


def test_min_snr_of_v_matches_its_paper():
    snr = torch.tensor([abar / (1 - abar) for abar in alphas_cumprod(SD15_SCHEDULER).double().tolist()])
    weights = make_objective("v_prediction", weighting="min_snr").weights_T
    torch.testing.assert_close(weights, snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=0)


SNR = {kind: (abar := alphas_cumprod(scheduler).double()) / (1 - abar) for kind, scheduler in SCHEDULERS.items()}


def sd_scripts(weighting: str, snr: torch.Tensor, v: bool) -> torch.Tensor:
    """kohya's sd-scripts, `apply_snr_weight` and `apply_debiased_estimation` in library/custom_train_functions.py."""
    if weighting == "min_snr":
        return torch.minimum(snr, torch.full_like(snr, 5)) / (snr + 1 if v else snr)
    snr = torch.minimum(snr, torch.full_like(snr, 1000))
    return 1 / (snr + 1) if v else 1 / snr.sqrt()


def onetrainer(weighting: str, snr: torch.Tensor, v: bool) -> torch.Tensor:
    """OneTrainer's `ModelSetupDiffusionLossMixin`, with a strength of 5 for min-SNR and 1 for P2."""
    if weighting == "min_snr":
        return torch.minimum(snr, torch.full_like(snr, 5)) / (snr + v)
    if weighting == "p2":
        return (1 + snr + v) ** -1.0
    return (snr.clip(max=1e3) + v).rsqrt()


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize(
    "form, weighting",
    [(sd_scripts, "min_snr"), (sd_scripts, "debiased"), (onetrainer, "min_snr"), (onetrainer, "debiased"), (onetrainer, "p2")],
)
def test_weightings_of_other_trainers(form, weighting, kind):
    name, v = form.__name__.replace("_", "-"), kind != "epsilon"
    weights = make_objective(kind, weighting=weighting, weighting_form=name).weights_T
    expected = form(weighting, SNR[kind], v)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
    paper = make_objective(kind, weighting=weighting).weights_T
    if weighting == "min_snr":
        assert torch.equal(weights, paper)
    elif v:  # towards pure noise, the paper's form falls where that of the trainer rises
        assert (weights[500:].diff() > 0).all() and (paper[500:].diff() < 0).all() and weights[-1] > 10 * paper[-1]
    else:  # they differ only where SNR is above 1000
        torch.testing.assert_close(weights[SNR[kind] < 1000], paper[SNR[kind] < 1000], rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_smallest_weight_trains_pure_noise(weighting):
    """SimpleTuner gives min-SNR a weight of 1 where SNR is 0. Here no weight is below `weighting_min`."""
    weights, floored = (make_objective("zero", weighting=weighting, weighting_min=w).weights_T for w in (0.0, 0.1))
    assert weights[-1] == 0 and floored[-1].item() == floored.min().item() == pytest.approx(0.1)
    assert torch.equal(floored[weights > 0.1], weights[weights > 0.1]) and (floored > 0).all()
    x, y = latents()[:1].requires_grad_(), torch.zeros(1, 4, 12, 20)
    for minimum, learned in ((0.0, False), (0.1, True)):
        loss = make_objective("zero", weighting=weighting, weighting_min=minimum).loss(x, y, torch.tensor([999]))
        assert bool(torch.autograd.grad(loss, x)[0].any()) == learned


LOSSES = {
    "mse": lambda d: d**2,
    "mae": abs,
    "huber": lambda d: d**2 / 2 if abs(d) < 0.3 else 0.3 * (abs(d) - 0.15),
    "pseudo_huber": lambda d: 2 * 0.3 * (math.sqrt(d**2 + 0.3**2) - 0.3),  # `huber` of sd-scripts with huber_c = 0.3
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_match_the_formulas(loss, masked, weighted):
    objective = make_objective(loss=loss, unmasked_weight=0.25, **({"huber_delta": 0.3} if "huber" in loss else {}))
    x, y = latents(3, 5), latents(3, 5).flip(0)
    mask = torch.rand(6, 1, 3, 5, generator=torch.Generator().manual_seed(1)) if masked else torch.ones(6, 1, 3, 5)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0]) if weighted else torch.ones(6)
    total = 0.0
    for image in range(6):
        differences = (x[image].double() - y[image].double()).flatten().tolist()
        mask_values = mask[image].double().expand(4, 3, 5).flatten().tolist()
        errors = [(0.25 + 0.75 * m) * LOSSES[loss](d) for d, m in zip(differences, mask_values, strict=True)]
        total += weight[image].item() * sum(errors) / len(errors) / 6
    args = {"weight_B": weight if weighted else None, "mask_B1HW": mask if masked else None}
    result = objective.loss(x, y, POSITIONS % 1000, **args)
    assert result.shape == () and result.dtype == torch.float32 and result.item() == pytest.approx(total, rel=1e-6)
    assert objective.loss(x.bfloat16(), y, POSITIONS % 1000, **args).dtype == torch.float32


def test_pseudo_huber_is_huber_of_sd_scripts_and_exact_for_small_errors():
    """sd-scripts: huber = 2 c (sqrt(d^2 + c^2) - c), smooth_l1 = 2 (sqrt(d^2 + c^2) - c). PyTorch's huber is half as large."""
    y, c = torch.zeros(1, 4, 3, 5), 0.1
    losses = {}
    for d in (1e-3, 1e-2, 0.5, 3.0):
        for loss in ("huber", "pseudo_huber"):
            objective = make_objective(loss=loss, huber_delta=c)
            losses[loss] = objective.loss(torch.full_like(y, d), y, torch.tensor([5])).item()
        huber, smooth_l1 = 2 * c * (math.sqrt(d**2 + c**2) - c), 2 * (math.sqrt(d**2 + c**2) - c)
        assert losses["pseudo_huber"] == pytest.approx(huber, rel=2e-6) == pytest.approx(c * smooth_l1)
        assert losses["huber"] == pytest.approx(losses["pseudo_huber"] / 2, rel=0.2)  # equal but for the bend and a factor of 2
    gradient = torch.autograd.functional.jacobian(lambda x: objective.loss(x, y, torch.tensor([5])), y)
    assert torch.equal(gradient, y)


def test_masks_are_weighted_as_in_onetrainer_but_for_grey():
    """OneTrainer multiplies by clamp(mask, unmasked_weight, 1), sd-scripts by the mask. Here weights are in proportion."""
    objective, share = make_objective(unmasked_weight=0.2), torch.tensor([0.0, 0.1, 0.5, 1.0])
    x, y = torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)
    weights = torch.stack([objective.loss(x, y, torch.tensor([5]), mask_B1HW=m.view(1, 1, 1, 1)) for m in share])
    onetrainers = share.clamp(0.2, 1)
    assert torch.equal(weights[[0, 3]], onetrainers[[0, 3]])
    torch.testing.assert_close(weights - onetrainers, torch.tensor([0.0, 0.08, 0.1, 0.0]))


def test_pyramid_noise_is_finer_than_multires_noise():
    """sd-scripts: noise += discount^i noise at 1 / r^i of the size, i from 0, r random in [2, 4); then noise / std.

    Sizes fall faster than 1 / 2^i, so noise of a coarse size has a larger factor, and the mean of a channel spreads more.
    """
    plain, spreads = torch.zeros(64, 4, 32, 32), []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        multires = torch.randn(plain.shape, generator=generator)
        for i in range(6):
            side = max(1, int(32 / (torch.rand((), generator=generator).item() * 2 + 2) ** i))
            coarse = torch.randn(64, 4, side, side, generator=generator)
            multires += F.interpolate(coarse, (32, 32), mode="bilinear") * 0.4**i
            if side == 1:
                break
        spreads.append((multires / multires.std()).mean((2, 3)).std().item())
    _, _, eps = make_objective(pyramid_noise=0.4).add_noise(plain, torch.arange(64))
    assert 1 / 32 < 0.8 * eps.mean((2, 3)).std().item() < eps.mean((2, 3)).std().item() < min(spreads)


DISTRIBUTIONS = {  # (settings, cumulative distribution of the fraction)
    "uniform": ({}, lambda x: x),
    "cubic": ({}, lambda x: 1 - (1 - x) ** (1 / 3)),
    "logit_normal": ({"timestep_mean": 0.5, "timestep_std": 0.8}, lambda x: NormalDist(0.5, 0.8).cdf(math.log(x / (1 - x)))),
}


@pytest.mark.parametrize("span", [(0, 1000), (200, 700)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_timesteps_follow_their_distribution(name, span):
    settings, cumulative = DISTRIBUTIONS[name]
    objective, positions = make_objective(timesteps=name, timestep_range=list(span), **settings), torch.arange(100_000)
    t, (low, high) = objective.timesteps(positions), span
    word = noise.philox(SEED, Purpose.TIMESTEP, positions, torch.zeros(1, dtype=torch.int64))[:, 0, 0].double()
    u = noise.uniform(SEED, Purpose.TIMESTEP, positions)[:, 0]
    n = noise.normal(SEED, Purpose.TIMESTEP, positions, (1,))[:, 0].double()
    fraction = {"uniform": word / 2**32, "cubic": 1 - u**3, "logit_normal": 1 / (1 + torch.exp(-(0.5 + 0.8 * n)))}[name]
    assert torch.equal(t, low + (fraction * (high - low)).floor().long())
    assert t.dtype == torch.int64 and t.min() >= low and t.max() < high
    cdf = [cumulative(i / 20) if 0 < i < 20 else i / 20 for i in range(21)]
    expected = 100_000 * torch.tensor(cdf).diff()
    counts = torch.histc((t - low).double() / (high - low), 20, 0, 1)
    assert ((counts - expected) ** 2 / expected).sum() < 19 + 6 * 38**0.5  # chi-square


def test_timesteps_stay_in_range_at_the_ends():
    noisiest = make_objective(timesteps="logit_normal", timestep_mean=60.0, timestep_range=[3, 9]).timesteps(POSITIONS)
    cleanest = make_objective(timesteps="logit_normal", timestep_mean=-60.0, timestep_range=[3, 9]).timesteps(POSITIONS)
    assert noisiest.unique().tolist() == [8] and cleanest.unique().tolist() == [3]


def test_timestep_range_beyond_the_schedule_is_refused():
    short = alphas_cumprod({**SD15_SCHEDULER, "num_train_timesteps": 100})
    assert Objective(short, SEED).timesteps(POSITIONS).max() < 100
    with refused("timestep-range", prefix="stage 'late': ", range=[50, 101], timesteps=100):
        Objective(short, SEED, stage=stage_of(timestep_range=[50, 101], name="late"))


def test_zero_terminal_snr_ends_at_exactly_zero():
    abar = alphas_cumprod(ZERO_SNR)
    assert abar[-1].item() == 0.0 and (abar[:-1] > 0).all()
    # Lin et al. 2024, algorithm 1, in double precision.
    root = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(abar.double(), root**2, rtol=0, atol=1e-6)
    objective = make_objective("zero")
    assert objective.signal[-1].item() == 0.0 and objective.level[-1].item() == 1.0


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpm++"])
def test_samplers_reach_the_only_image_of_the_data(sampler, kind):
    """If all data is one image and the prediction exact, every sampler ends at it. DDIM keeps the noise of one timestep."""
    scheduler, point, calls = SCHEDULERS[kind], latents(8, 8)[:1].double(), []
    if kind == "zero":
        scheduler = {**scheduler, "timestep_spacing": "trailing"}
    abar = alphas_cumprod(scheduler).double()

    def unet(x_BCHW, t_B, context_BLD):
        signal, level = (table[t_B.long()][:, None, None, None] for table in (abar.sqrt(), (1 - abar).sqrt()))
        eps = (x_BCHW - signal * point) / level
        calls.append((int(t_B[0]), x_BCHW, eps))
        return eps if kind == "epsilon" else signal * eps - level * point

    text = SimpleNamespace(tokenize=lambda prompts: torch.zeros(len(prompts), 77), encode=lambda ids: ids[..., None])
    text.device = torch.device("cpu")
    model = SimpleNamespace(unet=unet, text=text, scheduler=scheduler)
    plain = noise.normal(0, Purpose.SAMPLE, torch.tensor([3, 4]), (4, 8, 8))
    result = denoise(model, ["a", "b"], plain, [3, 4], SampleTable(sampler=sampler, steps=20, guidance=1.0))
    noisy = abar[0].sqrt() * point + (1 - abar[0]).sqrt() * calls[0][2]
    torch.testing.assert_close(result.double(), noisy if sampler == "ddim" else point.expand(2, -1, -1, -1), rtol=0, atol=2e-5)
    if kind == "zero":  # from pure noise at the last timestep
        assert calls[0][0] == 999 and (calls[0][1] - plain).abs().max() < 1e-5


SCHEDULER_FILE = "scheduler/scheduler_config.json"


def loaded(tmp_path, tiny_model, base=None, **table):
    folder = spoil(tiny_model, tmp_path / "base", edit_json(SCHEDULER_FILE, **(base or {})))
    return load_model(ModelTable(base=folder, **table))


def test_prediction_comes_from_the_base_or_the_config(tmp_path, tiny_model):
    model = loaded(tmp_path, tiny_model)
    assert model.prediction == "epsilon" and not model.notes and model.scheduler == SD15_SCHEDULER
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = loaded(tmp_path / "v", tiny_model, scheduler)
    assert model.prediction == "v_prediction" and not model.notes and model.scheduler["timestep_spacing"] == "trailing"
    model = loaded(tmp_path / "back", tiny_model, scheduler, prediction="epsilon", zero_snr=False)
    assert model.prediction == "epsilon" and alphas_cumprod(model.scheduler)[-1] > 0
    assert says(model.notes[0], "base-prediction", prediction="epsilon", base_prediction="v_prediction")


def test_another_prediction_is_noted_and_exported(tmp_path, tiny_model):
    from diffusers import DDIMScheduler

    model = loaded(tmp_path, tiny_model, prediction="v_prediction", zero_snr=True)
    (note,) = model.notes
    assert says(note, "base-prediction", prediction="v_prediction", base_prediction="epsilon")
    write_rest(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    sampler = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert sampler.config.prediction_type == "v_prediction" and sampler.config.timestep_spacing == "trailing"
    assert sampler.alphas_cumprod[-1] == 0 and not sampler.config.clip_sample
    write_rest(tmp_path / "plain", load_model(ModelTable(base=str(tiny_model))))
    assert json.loads((tmp_path / "plain" / "model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize(
    "base, table",
    [
        ({}, {"zero_snr": True}),
        ({"rescale_betas_zero_snr": True}, {}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"prediction": "epsilon"}),
    ],
)
def test_zero_snr_with_epsilon_is_refused(tmp_path, tiny_model, base, table):
    with refused("zero-snr-epsilon") as error:
        loaded(tmp_path, tiny_model, base, **table)
    assert "\n" not in str(error.value)


BAD_SETTINGS = [  # table, lines, facts in the message
    ("model", 'prediction = "epsilon"\nzero_snr = true', ["zero_snr", "true", '"epsilon"']),
    ("model", 'prediction = "sample"', ["model.prediction", "'sample'"]),
    ("model", "zero_terminal_snr = true", ["model.zero_terminal_snr", "use zero_snr = true"]),
    ("stage", "timestep_range = [500, 500]", ["timestep_range", "[500, 500]"]),
    ("stage", "timestep_range = [-1, 500]", ["timestep_range", "[-1, 500]"]),
    ("stage", "timestep_range = [500]", ["stage.0.timestep_range", "[500]", "2"]),
    ("stage", "weighting_gamma = 5.0", ["weighting_gamma", "'none'"]),
    ("stage", 'weighting = "debiased"\nweighting_gamma = 5.0', ["weighting_gamma", "'debiased'"]),
    ("stage", 'weighting = "min-snr"', ["stage.0.weighting", "'min-snr'"]),
    ("stage", "min_snr_gamma = 5.0", ["stage.0.min_snr_gamma", "weighting_gamma"]),
    ("stage", 'loss = "l2"', ["stage.0.loss", "'l2'", "'mse'", "'mae'", "'huber'"]),
    ("stage", "huber_delta = 0.0", ["stage.0.huber_delta", "0.0"]),
    ("stage", "noise_offset = -0.1", ["stage.0.noise_offset", "-0.1", "0"]),
    ("stage", "pyramid_noise = 1.0", ["stage.0.pyramid_noise", "1.0", "1"]),
    ("stage", "immiscible = 0", ["stage.0.immiscible", "0", "1"]),
    ("stage", 'timesteps = "sigmoid"', ["stage.0.timesteps", "'sigmoid'"]),
    ("stage", "timestep_std = 0.0", ["stage.0.timestep_std", "0.0"]),
]


@pytest.mark.parametrize("table, lines, facts", BAD_SETTINGS, ids=[lines for _, lines, _ in BAD_SETTINGS])
def test_bad_objective_settings_are_refused_in_one_line(tmp_path, table, lines, facts):
    tables = {"model": 'base = "m"', "data": 'folders = ["a"]', "stage": 'train = ["unet"]\nuntil = 3'}
    tables[table] += "\n" + lines
    path = tmp_path / "job.toml"
    path.write_text("".join(f"{'[[stage]]' if name == 'stage' else f'[{name}]'}\n{body}\n" for name, body in tables.items()))
    with refused("config-invalid") as error:
        load_config(path)
    message = str(error.value)
    assert all(fact in message for fact in facts) and "\n" not in message


EVERYTHING = {
    **NOISES["all"], "loss": "huber", "weighting": "min_snr", "timesteps": "logit_normal", "timestep_range": [10, 900],
    "unmasked_weight": 0.1,
}  # fmt: skip


def test_all_settings_together_stay_on_the_device():
    """With meta tensors, every transfer to or from the host is visible. A CUDA graph could not capture it."""
    with recording(86), Elsewhere() as watch:
        objective = Objective(torch.empty(1000, device="meta"), 0, TRITON or REFERENCE, stage_of(**EVERYTHING), "v_prediction")
        x, positions = torch.empty(4, 4, 16, 24, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
        x_t, t_B, target = objective.add_noise(x, positions)
        objective.loss(x_t, target, t_B, torch.empty(4, device="meta"), torch.empty(4, 1, 16, 24, device="meta"))
    assert watch.operations > 50 and not watch.found


@pytest.mark.slow
def test_plan_accepts_every_objective(tiny_model):
    shapes = Shapes.of(load_model(ModelTable(base=str(tiny_model))))
    for ops in (REFERENCE, TRITON):
        plain, full = (plan_stage(shapes, stage_of(**settings), 32, 1 << 40, ops).need(4) for settings in ({}, EVERYTHING))
        assert full.total >= plain.total


@pytest.mark.parametrize("key", keys_with(StageTable, Key.NOISE))
def test_every_noise_key_modifies_the_noise(key):
    """A key that is declared as noise must not be ignored, as it would be if the fused kernel drew plain noise."""
    plain, modified = (make_objective(**settings) for settings in ({}, {key: 2 if key == "immiscible" else 0.5}))
    assert plain.noise_sampler.plain and not modified.noise_sampler.plain
    assert not torch.equal(plain.add_noise(latents(), POSITIONS)[0], modified.add_noise(latents(), POSITIONS)[0])


def test_noise_sampler_reads_declared_keys_only():
    settings = make_objective().noise_sampler.settings
    assert list(vars(settings)) == keys_with(StageTable, Key.NOISE)


@pytest.mark.parametrize("timesteps", ["uniform", "cubic", "logit_normal"])
def test_a_step_computes_no_timestep_on_the_device(timesteps, tiny_model):
    """The host draws them: philox alone is some hundred launches. The step uses those that it is given."""
    batch = batches(1, 2)[0]
    stage = stage_of(batch=2, lr=1e-4, optimizer="lion", timesteps=timesteps)
    step = Step(load_model(ModelTable(base=str(tiny_model))), stage, 1, seed=0)
    t_B = step.objective.timesteps(batch.positions_B)
    expected = step._accumulate(StepInputs.of(batch, t_B, step.device))
    with mock.patch.object(Objective, "timesteps", side_effect=AssertionError):
        assert torch.equal(step._accumulate(StepInputs.of(batch, t_B, step.device)), expected)
        assert not torch.equal(step._accumulate(StepInputs.of(batch, 999 - t_B, step.device)), expected)
    step.release()
