"""Settings of a stage that mean something else in other trainers, and the notes on those that are often not meant."""

import math
from io import StringIO

import pytest
import torch
from runs import run
from sentences import says, sentence
from step_inputs import stage_of
from tiny import job

from fastsd.commands.check import check
from fastsd.config.schema import load_config
from fastsd.config.stages import ENDLESS
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.model import SD15_SCHEDULER
from fastsd.terminal.console import Console
from fastsd.train.schedule import ema_decay, learning_rate
from fastsd.train.stage_notes import stage_notes, starting_share

STAGE = '[[stage]]\nname = "one"\ntrain = ["unet"]\nuntil = 8\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'


def lr(step: int, **settings) -> float:
    return learning_rate(stage_of(**settings), step, 100, "unet")


@pytest.mark.parametrize("bend", [0.5, 0.9])
def test_rex_of_onetrainer_has_another_bend(bend):
    """OneTrainer: (1 - x) / ((1 - d) + d (1 - x)) with d = 0.9, from the paper's (1 - x) / (1 / 2 + 1 / 2 (1 - x))."""
    for step in range(0, 100, 7):
        x = step / 100
        expected = (1 - x) / ((1 - bend) + bend * (1 - x))
        assert lr(step, schedule="rex", rex_bend=bend) == pytest.approx(expected, rel=1e-12)
    assert lr(50, schedule="rex") == pytest.approx(2 / 3) and lr(50, schedule="rex", rex_bend=0.9) == pytest.approx(10 / 11)


def test_ema_warmup_is_that_of_diffusers_one_step_earlier():
    from diffusers.training_utils import EMAModel

    model = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=2 / 3)
    settings = stage_of(ema=0.999, ema_power=2 / 3)
    assert model.get_decay(1) == 0  # diffusers copies the weights in its first step
    for step in (0, 1, 10, 1000, 50_000):
        assert ema_decay(settings, step) == pytest.approx(model.get_decay(step + 2), rel=1e-12)


def share_of_start(decays) -> float:
    return math.exp(sum(math.log(max(decay, 1e-300)) for decay in decays))


def test_ema_of_other_trainers_forgets_the_starting_weights():
    """OneTrainer, and diffusers without use_ema_warmup: decay min((1 + n) / (10 + n), ema) in step n."""
    steps = range(3000)
    plain, power = (share_of_start(ema_decay(stage_of(ema=0.9999, ema_power=p), n) for n in steps) for p in (0.0, 0.75))
    onetrainer = share_of_start(min((1 + n) / (10 + n), 0.9999) for n in steps)
    assert plain == pytest.approx(0.741, abs=0.001) and power < 1e-9 and onetrainer < 1e-9
    for settings in ({}, {"ema_power": 0.75}, {"ema_power": 1.5}, {"ema_after": 1000}):
        table = stage_of(ema=0.9999, **settings)
        decays = [ema_decay(table, n) for n in steps]
        assert starting_share(table, 3000) == pytest.approx(share_of_start(decays[table.ema_after :]), rel=1e-9)


NOTES = [  # (settings, prediction and noise schedule, steps, sentence or "")
    ({"ema": 0.9999}, "epsilon", 3000,
     sentence("ema-keeps-start", stage="'a'", ema=0.9999, steps="3,000", share="74%", power=0.75)),
    ({"ema": 0.99999}, "epsilon", 200_000,
     sentence("ema-keeps-start", stage="'a'", ema=0.99999, steps="200,000", share="14%", power=0.67)),
    ({"ema": 0.9999}, "epsilon", 30_000, ""),
    ({"ema": 0.9999, "ema_power": 0.75}, "epsilon", 3000, ""),
    ({"ema": 0.9999, "state": "carry"}, "epsilon", 3000, ""),  # the EMA is that of the stage before
    ({"ema": 0.5}, "epsilon", 2, ""),  # too short for any EMA
    ({"ema": 0.9999}, "epsilon", ENDLESS, ""),
    ({"weighting": "min_snr"}, "zero", 9, sentence("weighting-zero", stage="'a'", weighting="min_snr", timestep=999)),
    ({"weighting": "p2"}, "zero", 9, sentence("weighting-zero", stage="'a'", weighting="p2", timestep=999)),
    ({"weighting": "min_snr", "weighting_min": 0.1}, "zero", 9, ""),
    ({"weighting": "min_snr", "timestep_range": [0, 900]}, "zero", 9, ""),  # another stage may train the rest
    ({"weighting": "min_snr"}, "v", 9, ""),
    ({"weighting": "debiased"}, "v", 9,
     sentence("weighting-of-paper", stage="'a'", weighting="debiased", form='"sd-scripts" or "onetrainer"')),
    ({"weighting": "p2"}, "v", 9, sentence("weighting-of-paper", stage="'a'", weighting="p2", form='"onetrainer"')),
    ({"weighting": "p2", "weighting_form": "onetrainer"}, "zero", 9, ""),
    ({"weighting": "debiased"}, "epsilon", 9, ""),
    ({"caption_dropout": 0.0}, "epsilon", 9, sentence("dropout-missing", stage="'a'")),
    ({"caption_dropout": 0.0, "train": ["unet.mid"]}, "epsilon", 9, ""),
    ({"optimizer": "dlion", "train": ["text_encoder"]}, "epsilon", 9, sentence("dlion-on-text", stage="'a'", lr="3e-6")),
    ({"optimizer": "dlion", "train": ["unet.mid", "text_encoder.layers"]}, "epsilon", 9,
     sentence("dlion-on-text", stage="'a'", lr="{ unet = 1e-6, text_encoder = 3e-6 }")),
    ({"optimizer": "dlion"}, "epsilon", 9, ""),
]  # fmt: skip


def test_weights_of_a_flow_fall_towards_pure_noise():
    scheduler = flow_scheduler(SD15_SCHEDULER)
    stage = stage_of(weighting="debiased", caption_dropout=0.1)
    assert stage_notes(stage, "a", 9, scheduler) == [sentence("flow-weighting", stage="'a'", weighting="'debiased'")]
    assert not stage_notes(stage.model_copy(update={"weighting_min": 0.1}), "a", 9, scheduler)


@pytest.mark.parametrize("settings, kind, steps, expected", NOTES)
def test_notes_on_settings_that_are_often_not_meant(settings, kind, steps, expected):
    velocity = {} if kind == "epsilon" else {"prediction_type": "v_prediction", "rescale_betas_zero_snr": kind == "zero"}
    scheduler = SD15_SCHEDULER | velocity
    stage = stage_of(**{"caption_dropout": 0.1} | settings)
    notes = stage_notes(stage, "a", steps, scheduler)
    assert notes == ([expected] if expected else [])


def test_check_and_the_start_of_a_run_print_the_notes(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    keys = ["sample.prompts=[]", "stage.one.ema=0.99", "stage.one.weighting=min_snr"]
    keys += ["model.prediction=v_prediction", "model.zero_snr=true"]
    _, text = run(path, *keys)
    out = StringIO()
    check(load_config(path, keys), Console(file=out, width=200))
    for printed in (text, out.getvalue()):
        assert says(printed, "ema-keeps-start", stage="'one'", share="92%", power=0.75)
        assert says(printed, "weighting-zero", stage="'one'", weighting="min_snr", timestep=999)
