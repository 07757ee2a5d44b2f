"""The start of a run from a base to a flow: what the fit of two layers gives, that it is kept, and when it is not made."""

import re
from io import StringIO

import numpy as np
import pytest
import torch
from runs import final, rewind, rows_of, run, same
from sentences import says
from tiny import job

from fastsd.config.schema import ModelTable, load_config
from fastsd.demo.demo import MODELS
from fastsd.demo.world import write_dataset
from fastsd.model.formats.load import load_model
from fastsd.model.unet import Attention
from fastsd.run import flow_fit
from fastsd.run.flow_fit import LAYERS, fit_time_embedding, fit_to_teacher
from fastsd.run.run import open_run
from fastsd.run.teacher import load_teacher
from fastsd.terminal.console import Console

pytestmark = pytest.mark.slow

STAGE = """
[[stage]]
name = "learned"
train = ["unet"]
until = 2
batch = 6
optimizer = "lion"
lr = 1e-5
teacher = "base"
checkpoint_every = 1
"""
WORLD = ["data.resolution=64", "validate.held_out=4", "validate.every=1"]
FLOW = ["model.prediction=flow", "sample.prompts=[]", "export.single_file=false"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A run from the demo's base, which has learned something, on its images."""
    folder = tmp_path_factory.mktemp("fit")
    write_dataset(folder / "pictures", 24, seed=1)
    path = job(folder, MODELS / "base", folder / "pictures", STAGE)
    return path, *run(path, *FLOW, *WORLD)


def test_the_run_begins_near_the_flow_of_the_base(fitted):
    """The base itself, with the target of a flow only, is several times further away."""
    _, folder, text = fitted
    before, after = (float(number) for number in re.search(r"distance from it (\S+) -> (\S+) on", text).groups())
    assert says(text, "flow-fitted", stage="learned", before=f"{before:.3g}", after=f"{after:.3g}")
    assert after < 0.5 * before
    plain = run(fitted[0], *FLOW, "stage.teacher=", f"run={folder.parent / 'plain'}", *WORLD)
    losses = [rows_of(run_folder, "validation.jsonl")[0]["loss"] for run_folder in (folder, plain[0])]
    assert losses[0] < 0.6 * losses[1] and "fitted" not in plain[1]


def test_a_resumed_run_keeps_the_fit(fitted):
    path, folder, _ = fitted
    expected = {name: tensor.clone() for name, tensor in final(folder).items()}
    rewind(folder, 1)
    _, text = run(path, *FLOW, *WORLD)
    assert same(final(folder), expected) and "fitted" not in text


@pytest.mark.parametrize("train", ['["unet.mid", "unet.out"]', '["lora"]'])
def test_layers_that_a_stage_does_not_train_are_not_fitted(train, tmp_path, tiny_model, images):
    keys = [*FLOW, f"stage.train={train}", *(["model.lora={rank=2}"] if "lora" in train else [])]
    assert "fitted" not in run(job(tmp_path, tiny_model, images, STAGE), *keys)[1]


@pytest.fixture
def few_images(monkeypatch):
    """The fit is made from 16 images and measured on 8, which is enough to see which weights change."""
    for name, count in (("FEWEST", 16), ("MEASURED", 8), ("_ROWS", 1)):
        monkeypatch.setattr(flow_fit, name, count)


def test_only_two_layers_are_fitted(fitted, few_images):
    path, folder, _ = fitted
    config = load_config(path, [*FLOW, *WORLD, f"run={folder.parent / 'untrained'}"])
    base = dict(load_model(ModelTable(base=str(MODELS / "base"))).unet.named_parameters())
    with open_run(config, Console(file=StringIO())) as untrained:
        unet = untrained.model.unet
        modules = unet.conv_in, unet.conv_out
        fit_to_teacher(untrained, load_teacher(config.model, untrained.ops))
        changed = {name for name, weight in unet.named_parameters() if not torch.equal(weight, base[name])}
        assert (unet.conv_in, unet.conv_out) == modules and unet.cfg.in_channels == 4
    assert changed == set(LAYERS)


def test_a_second_fit_changes_nothing(fitted, few_images):
    """A run that was saved before its first step is fitted again when it is resumed. Attention has its precision afterwards."""
    path, folder, _ = fitted
    config = load_config(path, [*FLOW, *WORLD, f"run={folder.parent / 'twice'}"])
    with open_run(config, Console(file=StringIO())) as twice:
        unet, teacher = twice.model.unet, load_teacher(config.model, twice.ops)
        unet.set_attention_precision("tf32")
        fit_to_teacher(twice, teacher)
        once = {name: weight.clone() for name, weight in unet.named_parameters()}
        fit_to_teacher(twice, teacher)
        assert all(torch.equal(weight, once[name]) for name, weight in unet.named_parameters())
        assert {layer.precision for layer in unet.modules() if isinstance(layer, Attention)} == {"tf32"}


def test_without_memory_training_begins_with_the_base(fitted, few_images, monkeypatch):
    path, folder, _ = fitted
    config = load_config(path, [*FLOW, *WORLD, f"run={folder.parent / 'little'}"])
    base = dict(load_model(ModelTable(base=str(MODELS / "base"))).unet.named_parameters())
    text = StringIO()

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("fastsd.model.align.refit_last", fail)
    with open_run(config, Console(file=text)) as little:
        fit_to_teacher(little, load_teacher(config.model, little.ops))
        assert all(torch.equal(weight, base[name]) for name, weight in little.model.unet.named_parameters())
        assert not little.saving.changed
    assert says(text.getvalue(), "flow-unfitted", stage="learned")


def test_the_time_embedding_against_least_squares_of_numpy():
    table = ModelTable(base=str(MODELS / "base"))
    teacher, embedding = load_teacher(table), load_model(table).unet.time_embedding
    weight, bias = (parameter.detach().double().numpy() for parameter in (embedding.linear_1.weight, embedding.linear_1.bias))
    s = torch.linspace(0, 1, 2001)
    waves, targets = embedding.waves(1000 * s).double().numpy(), embedding.waves(teacher.base_timesteps(s)[1]).double().numpy()
    rows = np.hstack([waves, np.ones((2001, 1))])
    initial = np.hstack([weight, bias[:, None]])
    root = np.sqrt(1e-2 * (rows**2).sum(0).mean()) * np.eye(rows.shape[1])
    expected = np.linalg.lstsq(np.vstack([rows, root]), np.vstack([targets @ weight.T + bias, root @ initial.T]), rcond=None)[0]
    with torch.no_grad():
        fit_time_embedding(embedding, teacher)
    np.testing.assert_allclose(embedding.linear_1.weight.detach().numpy(), expected[:-1].T, atol=1e-5)
    np.testing.assert_allclose(embedding.linear_1.bias.detach().numpy(), expected[-1], atol=1e-5)
