"""The objective against formulas written from the papers in double precision: targets, noise, timesteps, weights, losses."""

import json
import math
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from model_files import edit_json, spoil
from step_inputs import Elsewhere, stage_of
from torch.nn import functional as F

from fastsd.config.schema import ModelTable, SampleTable, load_config
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model, write_rest
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import plan_stage
from fastsd.sampling.generate import denoise
from fastsd.train.objective import Objective, alphas_cumprod
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


def objective(kind: str = "epsilon", **settings) -> Objective:
    scheduler = SCHEDULERS[kind]
    return Objective(alphas_cumprod(scheduler), SEED, REFERENCE, stage_of(**settings), scheduler["prediction_type"])


def latents(height: int = 12, width: int = 20) -> torch.Tensor:
    return torch.randn(len(POSITIONS), 4, height, width, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.2


def draw(purpose: Purpose, *shape: int) -> torch.Tensor:
    return noise.normal(SEED, purpose, POSITIONS, shape).double()


def nearest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Li et al. 2025: each image takes, of k noises, the one at the least distance."""
    plain, more = draw(Purpose.NOISE, *x.shape[1:]), draw(Purpose.IMMISCIBLE, k - 1, *x.shape[1:])
    chosen = []
    for image, first, others in zip(x.double(), plain, more, strict=True):
        chosen.append(min([first, *others], key=lambda eps: (eps - image).pow(2).sum().item()))
    return torch.stack(chosen)


def pyramid(eps: torch.Tensor, share: float) -> torch.Tensor:
    """Whitaker 2023 with halved sides: noise of 1/2, 1/4, ... the size, share^i of it; the sum at unit standard deviation."""
    (_, c, h, w), variance, start = eps.shape, 1.0, 0
    sides = [(h // 2**i, w // 2**i) for i in range(1, 99) if min(h, w) // 2**i]
    drawn = draw(Purpose.PYRAMID, sum(c * a * b for a, b in sides))
    for i, (a, b) in enumerate(sides, 1):
        level, start = drawn[:, start : start + c * a * b].reshape(-1, c, a, b), start + c * a * b
        eps = eps + share**i * F.interpolate(level, (h, w), mode="bilinear")
        units = torch.eye(a * b, dtype=torch.float64).reshape(a * b, 1, a, b)  # each coarse number's weight everywhere
        variance += share ** (2 * i) * F.interpolate(units, (h, w), mode="bilinear").pow(2).sum(0).mean().item()
    return eps / variance**0.5


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", NOISES)
def test_noised_latents_and_target(name, kind):
    settings, x = NOISES[name], latents()
    x_t, t_B, target = objective(kind, **settings).noised(x, POSITIONS)
    abar = alphas_cumprod(SCHEDULERS[kind]).double()[t_B][:, None, None, None]
    eps = nearest(x, settings["immiscible"]) if "immiscible" in settings else draw(Purpose.NOISE, *x.shape[1:])
    eps = pyramid(eps, settings["pyramid_noise"]) if "pyramid_noise" in settings else eps
    eps = eps + settings.get("noise_offset", 0) * draw(Purpose.OFFSET, 4, 1, 1)
    more = settings.get("input_perturbation", 0) * draw(Purpose.PERTURBATION, *x.shape[1:])
    velocity = abar.sqrt() * eps - (1 - abar).sqrt() * x
    assert x_t.dtype == target.dtype == torch.float32
    torch.testing.assert_close(x_t.double(), abar.sqrt() * x + (1 - abar).sqrt() * (eps + more), rtol=0, atol=2e-6)
    torch.testing.assert_close(target.double(), eps if kind == "epsilon" else velocity, rtol=0, atol=2e-6)
    if kind == "zero":  # pure noise has nothing of the image, and v is the image
        last = objective(kind, timestep_range=[999, 1000], **settings).noised(x, POSITIONS)
        torch.testing.assert_close(last[0].double(), eps + more, rtol=0, atol=2e-6)
        assert torch.equal(last[2], -x)


def test_plain_noise_stays_fused_and_as_it_was():
    calls, x = [], latents()

    def noised(*given, **more):
        calls.append(more)
        return REFERENCE.add_noise(*given, **more)

    made = Objective(alphas_cumprod(SD15_SCHEDULER), SEED, replace(REFERENCE, add_noise=noised))
    x_t, t_B, target = made.noised(x, POSITIONS)
    assert calls == [{"prediction": "epsilon"}]
    assert torch.equal(t_B, noise.integers(SEED, Purpose.TIMESTEP, POSITIONS, 1000))
    assert torch.equal(target, noise.normal(SEED, Purpose.NOISE, POSITIONS, (4, 12, 20)))
    assert torch.equal(made.loss(x_t.bfloat16(), target, t_B), F.mse_loss(x_t.bfloat16().float(), target))


@pytest.mark.parametrize("name", NOISES)
def test_no_batch_split_changes_a_number(name):
    made, x = objective("v_prediction", timesteps="logit_normal", weighting="min_snr", **NOISES[name]), latents()
    whole, prediction = made.noised(x, POSITIONS), latents().flip(0)
    assert all(torch.equal(a, b) for a, b in zip(whole, made.noised(x, POSITIONS), strict=True))
    rows = [made.noised(x[i : i + 2], POSITIONS[i : i + 2]) for i in range(0, 6, 2)]
    for both, parts in zip(whole, zip(*rows, strict=True), strict=True):
        assert torch.equal(both, torch.cat(parts))
    losses = [made.loss(prediction[i : i + 2], rows[i // 2][2], rows[i // 2][1]) / 3 for i in range(0, 6, 2)]
    torch.testing.assert_close(sum(losses), made.loss(prediction, whole[2], whole[1]))


def test_pyramid_noise_has_unit_standard_deviation_at_any_size():
    for height, width in ((16, 16), (8, 24), (9, 5), (1, 7)):
        made, zeros = objective(pyramid_noise=0.8), torch.zeros(512, 4, height, width)
        _, _, eps = made.noised(zeros, torch.arange(512))
        count = 512 * 4  # at 0.8 an image's numbers hang together: at worst a channel is one number
        assert abs(eps.std().item() - 1) < 4 * (1 / (2 * count)) ** 0.5


# As its paper has it, of the loss in eps; and by Salimans and Ho's identities of the loss in v: times snr / (snr + 1).
WEIGHTS = {
    "min_snr": (5.0, lambda snr, g: min(snr, g) / snr),
    "debiased": (None, lambda snr, g: 1 / math.sqrt(snr)),
    "p2": (1.0, lambda snr, g: 1 / (1 + snr) ** g),
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_weightings(weighting, kind):
    default, weight = WEIGHTS[weighting]
    for gamma in (None, 0.7) if default else (None,):
        given = {"weighting_gamma": gamma} if gamma else {}
        made, abar = objective(kind, weighting=weighting, **given), alphas_cumprod(SCHEDULERS[kind]).double().tolist()
        for t in (0, 1, 250, 700, 998, 999):
            snr = abar[t] / (1 - abar[t])
            want = (weight(snr, gamma or default) if snr else 0) * (1 if kind == "epsilon" else snr / (snr + 1))
            x, y = latents()[:1], torch.zeros(1, 4, 12, 20)
            found = made.loss(x, y, torch.tensor([t])).item()
            assert found == pytest.approx(want * x.double().pow(2).mean().item(), rel=1e-5)
        assert made.weights_T.isfinite().all() and made.weights_T.dtype == torch.float32


def test_min_snr_of_v_is_as_its_paper_has_it():
    snr = torch.tensor([abar / (1 - abar) for abar in alphas_cumprod(SD15_SCHEDULER).double().tolist()])
    weights = objective("v_prediction", weighting="min_snr").weights_T
    torch.testing.assert_close(weights, snr.clamp(max=5) / (snr + 1), rtol=1e-5, atol=0)


LOSSES = {
    "mse": lambda d: d**2,
    "mae": abs,
    "huber": lambda d: d**2 / 2 if abs(d) < 0.3 else 0.3 * (abs(d) - 0.15),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses(loss, masked, weighted):
    made = objective(loss=loss, unmasked_weight=0.25, **({"huber_delta": 0.3} if loss == "huber" else {}))
    x, y = latents(3, 5), latents(3, 5).flip(0)
    mask = torch.rand(6, 1, 3, 5, generator=torch.Generator().manual_seed(1)) if masked else torch.ones(6, 1, 3, 5)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0]) if weighted else torch.ones(6)
    total = 0.0
    for image in range(6):
        differences = (x[image].double() - y[image].double()).flatten().tolist()
        kept = mask[image].double().expand(4, 3, 5).flatten().tolist()
        errors = [(0.25 + 0.75 * m) * LOSSES[loss](d) for d, m in zip(differences, kept, strict=True)]
        total += weight[image].item() * sum(errors) / len(errors) / 6
    given = {"weight_B": weight if weighted else None, "mask_B1HW": mask if masked else None}
    found = made.loss(x, y, POSITIONS % 1000, **given)
    assert found.shape == () and found.dtype == torch.float32 and found.item() == pytest.approx(total, rel=1e-6)
    assert made.loss(x.bfloat16(), y, POSITIONS % 1000, **given).dtype == torch.float32


DISTRIBUTIONS = {  # the share of draws below x
    "uniform": ({}, lambda x: x),
    "cubic": ({}, lambda x: 1 - (1 - x) ** (1 / 3)),
    "logit_normal": ({"timestep_mean": 0.5, "timestep_std": 0.8}, lambda x: NormalDist(0.5, 0.8).cdf(math.log(x / (1 - x)))),
}


@pytest.mark.parametrize("span", [(0, 1000), (200, 700)])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_timesteps(name, span):
    settings, below = DISTRIBUTIONS[name]
    made, positions = objective(timesteps=name, timestep_range=list(span), **settings), torch.arange(100_000)
    t, (low, high) = made.timesteps(positions), span
    word = noise.philox(SEED, Purpose.TIMESTEP, positions, torch.zeros(1, dtype=torch.int64))[:, 0, 0].double()
    u = noise.uniform(SEED, Purpose.TIMESTEP, positions)[:, 0]
    n = noise.normal(SEED, Purpose.TIMESTEP, positions, (1,))[:, 0].double()
    share = {"uniform": word / 2**32, "cubic": 1 - u**3, "logit_normal": 1 / (1 + torch.exp(-(0.5 + 0.8 * n)))}[name]
    assert torch.equal(t, low + (share * (high - low)).floor().long())
    assert t.dtype == torch.int64 and t.min() >= low and t.max() < high
    edges = [below(i / 20) if 0 < i < 20 else i / 20 for i in range(21)]
    expected = 100_000 * torch.tensor(edges).diff()
    found = torch.histc((t - low).double() / (high - low), 20, 0, 1)
    assert ((found - expected) ** 2 / expected).sum() < 19 + 6 * 38**0.5  # chi-square


def test_timesteps_stay_in_range_at_the_ends():
    far = objective(timesteps="logit_normal", timestep_mean=60.0, timestep_range=[3, 9]).timesteps(POSITIONS)
    near = objective(timesteps="logit_normal", timestep_mean=-60.0, timestep_range=[3, 9]).timesteps(POSITIONS)
    assert far.unique().tolist() == [8] and near.unique().tolist() == [3]


def test_timesteps_that_the_schedule_has_not():
    short = alphas_cumprod({**SD15_SCHEDULER, "num_train_timesteps": 100})
    assert Objective(short, SEED).timesteps(POSITIONS).max() < 100
    with pytest.raises(UserError) as error:
        Objective(short, SEED, stage=stage_of(timestep_range=[50, 101], name="late"))
    words = "stage 'late': timestep_range is [50, 101] and the model's noise schedule has 100 timesteps; end at 100 or before"
    assert str(error.value) == words


def test_zero_terminal_snr_ends_at_exactly_zero():
    abar = alphas_cumprod(ZERO_SNR)
    assert abar[-1].item() == 0.0 and (abar[:-1] > 0).all()
    # Lin et al. 2024, algorithm 1, in double precision.
    root = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(abar.double(), root**2, rtol=0, atol=1e-6)
    made = objective("zero")
    assert made.signal[-1].item() == 0.0 and made.level[-1].item() == 1.0


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpm++"])
def test_samplers_find_the_one_image_there_is(sampler, kind):
    """With the exact prediction for data of one point, every sampler ends there; DDIM one timestep's noise before it."""
    scheduler, point, seen = SCHEDULERS[kind], latents(8, 8)[:1].double(), []
    if kind == "zero":
        scheduler = {**scheduler, "timestep_spacing": "trailing"}
    abar = alphas_cumprod(scheduler).double()

    def unet(x_BCHW, t_B, context_BLD):
        signal, level = (table[t_B.long()][:, None, None, None] for table in (abar.sqrt(), (1 - abar).sqrt()))
        eps = (x_BCHW - signal * point) / level
        seen.append((int(t_B[0]), x_BCHW, eps))
        return eps if kind == "epsilon" else signal * eps - level * point

    text = SimpleNamespace(tokenize=lambda prompts: torch.zeros(len(prompts), 77), encode=lambda ids: ids[..., None])
    text.device = torch.device("cpu")
    model = SimpleNamespace(unet=unet, text=text, scheduler=scheduler)
    plain = noise.normal(0, Purpose.SAMPLE, torch.tensor([3, 4]), (4, 8, 8))
    found = denoise(model, ["a", "b"], plain, [3, 4], SampleTable(sampler=sampler, steps=20, guidance=1.0))
    last = abar[0].sqrt() * point + (1 - abar[0]).sqrt() * seen[0][2]
    torch.testing.assert_close(found.double(), last if sampler == "ddim" else point.expand(2, -1, -1, -1), rtol=0, atol=2e-5)
    if kind == "zero":  # from pure noise at the last timestep
        assert seen[0][0] == 999 and (seen[0][1] - plain).abs().max() < 1e-5


SCHEDULER_FILE = "scheduler/scheduler_config.json"


def loaded(tmp_path, tiny_model, base=None, **table):
    folder = spoil(tiny_model, tmp_path / "base", edit_json(SCHEDULER_FILE, **(base or {})))
    return load_model(ModelTable(base=folder, **table))


def test_a_base_says_its_prediction(tmp_path, tiny_model):
    model = loaded(tmp_path, tiny_model)
    assert model.prediction == "epsilon" and not model.notes and model.scheduler == SD15_SCHEDULER
    own = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = loaded(tmp_path / "v", tiny_model, own)
    assert model.prediction == "v_prediction" and not model.notes and model.scheduler["timestep_spacing"] == "trailing"
    model = loaded(tmp_path / "back", tiny_model, own, prediction="epsilon", zero_snr=False)
    assert model.prediction == "epsilon" and alphas_cumprod(model.scheduler)[-1] > 0
    assert 'the base predicts v_prediction and model.prediction is "epsilon"' in model.notes[0]


def test_another_prediction_is_said_and_written(tmp_path, tiny_model):
    from diffusers import DDIMScheduler

    model = loaded(tmp_path, tiny_model, prediction="v_prediction", zero_snr=True)
    (note,) = model.notes
    assert 'the base predicts epsilon and model.prediction is "v_prediction": the UNet has to learn it anew' in note
    write_rest(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDIMScheduler"]
    sampler = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert sampler.config.prediction_type == "v_prediction" and sampler.config.timestep_spacing == "trailing"
    assert sampler.alphas_cumprod[-1] == 0 and not sampler.config.clip_sample
    write_rest(tmp_path / "plain", load_model(ModelTable(base=str(tiny_model))))
    assert json.loads((tmp_path / "plain" / "model_index.json").read_text())["scheduler"] == ["diffusers", "PNDMScheduler"]


@pytest.mark.parametrize(
    "base, table",
    [({}, {"zero_snr": True}),
     ({"rescale_betas_zero_snr": True}, {}),
     ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"prediction": "epsilon"})],
)  # fmt: skip
def test_pure_noise_tells_nothing_by_epsilon(tmp_path, tiny_model, base, table):
    with pytest.raises(UserError, match="end in pure noise, of which epsilon tells nothing; set model.prediction") as error:
        loaded(tmp_path, tiny_model, base, **table)
    assert "\n" not in str(error.value)


BAD = [
    ("model", 'prediction = "epsilon"\nzero_snr = true', 'prediction is "epsilon" and zero_snr is true'),
    ("model", 'prediction = "sample"', "model.prediction is 'sample'; choose"),
    ("model", "zero_terminal_snr = true", "unknown key; use model.zero_snr"),
    ("stage", "timestep_range = [500, 500]", "timestep_range is [500, 500]; use [first, end]"),
    ("stage", "timestep_range = [-1, 500]", "timestep_range is [-1, 500]; use [first, end]"),
    ("stage", "timestep_range = [500]", "stage.0.timestep_range is [500]; it must have at least 2 entries"),
    ("stage", "weighting_gamma = 5.0", "weighting_gamma is set and weighting is 'none'"),
    ("stage", 'weighting = "debiased"\nweighting_gamma = 5.0', "weighting_gamma is set and weighting is 'debiased'"),
    ("stage", 'weighting = "min-snr"', "stage.0.weighting is 'min-snr'; choose"),
    ("stage", "min_snr_gamma = 5.0", "stage.0.min_snr_gamma: unknown key; use weighting_gamma"),
    ("stage", 'loss = "l2"', "stage.0.loss is 'l2'; choose 'mse', 'mae' or 'huber'"),
    ("stage", "huber_delta = 0.0", "stage.0.huber_delta is 0.0; it must be greater than 0"),
    ("stage", "noise_offset = -0.1", "stage.0.noise_offset is -0.1; it must be greater than or equal to 0"),
    ("stage", "pyramid_noise = 1.0", "stage.0.pyramid_noise is 1.0; it must be less than 1"),
    ("stage", "immiscible = 0", "stage.0.immiscible is 0; it must be greater than or equal to 1"),
    ("stage", 'timesteps = "sigmoid"', "stage.0.timesteps is 'sigmoid'; choose"),
    ("stage", "timestep_std = 0.0", "stage.0.timestep_std is 0.0; it must be greater than 0"),
]


@pytest.mark.parametrize("table, lines, sentence", BAD, ids=[lines for _, lines, _ in BAD])
def test_bad_objectives_are_one_sentence(tmp_path, table, lines, sentence):
    tables = {"model": 'base = "m"', "data": 'folders = ["a"]', "stage": 'train = ["unet"]\nuntil = 3'}
    tables[table] += "\n" + lines
    path = tmp_path / "job.toml"
    path.write_text("".join(f"{'[[stage]]' if name == 'stage' else f'[{name}]'}\n{body}\n" for name, body in tables.items()))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


EVERYTHING = {
    **NOISES["all"], "loss": "huber", "weighting": "min_snr", "timesteps": "logit_normal", "timestep_range": [10, 900],
    "unmasked_weight": 0.1,
}  # fmt: skip


def test_everything_at_once_stays_on_its_device():
    """On tensors without data whatever comes from the host or is asked by it shows: what a CUDA graph could not record."""
    with recording(86), Elsewhere() as watch:
        made = Objective(torch.empty(1000, device="meta"), 0, TRITON or REFERENCE, stage_of(**EVERYTHING), "v_prediction")
        x, positions = torch.empty(4, 4, 16, 24, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
        x_t, t_B, target = made.noised(x, positions)
        made.loss(x_t, target, t_B, torch.empty(4, device="meta"), torch.empty(4, 1, 16, 24, device="meta"))
    assert watch.operations > 50 and not watch.found


def test_a_plan_has_every_objective(tiny_model):
    shapes = Shapes.of(load_model(ModelTable(base=str(tiny_model))))
    for ops in (REFERENCE, TRITON):
        needs = [plan_stage(shapes, stage_of(**settings), 32, 1 << 40, ops).need(4) for settings in ({}, EVERYTHING)]
        assert needs[1].total >= needs[0].total
