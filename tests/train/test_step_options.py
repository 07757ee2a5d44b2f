"""Each option of a stage, through `Step`, against a loop of PyTorch's and diffusers' own parts."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from step_inputs import batches, stage_of
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.model.select import selected
from fastsd.train.step import Step
from fastsd_kernels.noise import Purpose, integers, normal

pytestmark = pytest.mark.slow

STEPS, SEED, LR = 4, 3, 1e-3
BOTH = ["unet", "text_encoder"]
WEIGHTS = torch.tensor([0.0, 0.5, 1.0, 3.0])
CASES = {
    "nothing": {},
    "clip": {"grad_clip": 0.05},
    "accumulate": {"micro_batch": 1, "grad_clip": 0.05},
    "weight decay": {"weight_decay": 3.0},
    "betas": {"betas": [0.5, 0.9]},
    "frozen layers": {"train": ["unet.cross_attention"]},
    "frozen UNet": {"train": ["text_encoder"]},
    "both components": {"train": BOTH, "micro_batch": 2},
    "lr per component": {"train": BOTH, "lr": {"unet": LR, "text_encoder": LR / 4}},
    "clip over both components": {"train": BOTH, "grad_clip": 0.05},
    "cosine with warm-up": {"schedule": "cosine", "warmup": 2},
    "linear": {"schedule": "linear"},
    "mae": {"loss": "mae"},
    "huber": {"loss": "huber", "huber_delta": 0.1},
    "min-SNR": {"weighting": "min_snr", "weighting_gamma": 2.0},
    "image weights": {"weight_B": WEIGHTS},
    "image weights, accumulated": {"weight_B": WEIGHTS, "micro_batch": 2},
    "masks": {"mask_B1HW": True, "unmasked_weight": 0.25},
    "masks, accumulated": {"mask_B1HW": True, "micro_batch": 1},
}  # fmt: skip


def inputs(weight_B=None, mask_B1HW=None, **settings):
    """Return (stage, batches) of a case."""
    stage = stage_of(**{"optimizer": "adamw", "lr": LR, "weight_decay": 0.0, "until": STEPS, **settings})
    data = batches(STEPS, stage.batch, seed=1)
    for batch in data:
        object.__setattr__(batch, "weight_B", weight_B)
        if mask_B1HW:
            mask = torch.arange(stage.batch * 16 * 16).reshape(stage.batch, 1, 16, 16) % 256
            object.__setattr__(batch, "mask_B1HW", mask.to(torch.uint8))
    return stage, data


def loaded(folder):
    model = load_model(ModelTable(base=str(folder)))
    return model, {"unet": model.unet, "text_encoder": model.text.module}


def changes(modules, before):
    """Concatenate how far the weights have moved."""
    after = [p.detach() for module in modules.values() for p in module.parameters()]
    return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])


def copies(modules):
    return [p.detach().clone() for module in modules.values() for p in module.parameters()]


def by_step(folder, stage, data):
    model, modules = loaded(folder)
    before = copies(modules)
    step = Step(model, stage, total=STEPS, seed=SEED)
    losses = [float(step(batch, i).loss) for i, batch in enumerate(data)]
    step.release()
    return changes(modules, before), losses


def schedule_of(stage, optimizer):
    rest = STEPS - stage.warmup_steps(STEPS)
    after = {
        "constant": lambda: ConstantLR(optimizer, 1),
        "linear": lambda: LinearLR(optimizer, 1, 0, rest),
        "cosine": lambda: CosineAnnealingLR(optimizer, rest),
    }[stage.schedule]()
    if not stage.warmup:
        return after
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / stage.warmup, 1, stage.warmup - 1), after], [stage.warmup])


def by_hand(folder, stage, data):
    model, modules = loaded(folder)
    before = copies(modules)
    trained = {}
    for name, parameters in selected(model, stage.train, "train").items():
        trained[name] = [p for key, p in modules[name].named_parameters() if key in parameters]
    for parameter in (p for module in modules.values() for p in module.parameters()):
        parameter.requires_grad_(any(parameter is p for ps in trained.values() for p in ps))
    groups = [{"params": parameters, "lr": stage.rate_of(name)} for name, parameters in trained.items()]
    optimizer = torch.optim.AdamW(groups, betas=tuple(stage.betas or (0.9, 0.999)), weight_decay=stage.weight_decay)
    schedule = schedule_of(stage, optimizer)
    scheduler, losses = DDPMScheduler.from_config(model.scheduler), []
    for batch in data:
        latents, positions = model.vae.scale(batch.latents_BCHW), batch.positions_B
        eps = normal(SEED, Purpose.NOISE, positions, tuple(latents.shape[1:]))
        t = integers(SEED, Purpose.TIMESTEP, positions, 1000)
        prediction = model.unet(scheduler.add_noise(latents, eps, t), t, model.text.encode(batch.token_ids_BL))
        delta = {"delta": stage.huber_delta} if stage.loss == "huber" else {}
        distance = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}[stage.loss]
        error = distance(prediction, eps, reduction="none", **delta)
        if batch.mask_B1HW is not None:
            inside = batch.mask_B1HW / 255
            error = error * inside + error * (1 - inside) * stage.unmasked_weight
        error = error.mean(dim=[1, 2, 3])
        if stage.weighting == "min_snr":
            snr = compute_snr(scheduler, t)
            error = error * torch.minimum(snr, torch.full_like(snr, stage.weighting_gamma)) / snr
        loss = (error * (1 if batch.weight_B is None else batch.weight_B)).mean()
        loss.backward()
        if stage.grad_clip:
            torch.nn.utils.clip_grad_norm_([p for parameters in trained.values() for p in parameters], stage.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return changes(modules, before), losses


@pytest.fixture(scope="module")
def plain(tiny_model):
    return by_hand(tiny_model, *inputs())[0]


@pytest.mark.parametrize("name", CASES)
def test_option_trains_as_pytorch_does(name, tiny_model, plain):
    ours, losses = by_step(tiny_model, *inputs(**CASES[name]))
    expected_changes, expected = by_hand(tiny_model, *inputs(**CASES[name]))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    distance = (ours - expected_changes).norm() / expected_changes.norm()
    assert distance < 1e-3
    assert (
        name == "nothing" or (plain - expected_changes).norm() / expected_changes.norm() > 30 * distance
    )  # the option changes the result
