"""Runs that train adapters: trained weights, checkpoints, resuming, exported files, and their use by other commands."""

import json
import os
import re
import shutil
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import fastsd
from PIL import Image
from runs import final, rewind, run, same
from safetensors.torch import load_file
from sentences import refused, says
from tiny import job, tiny_vae

from fastsd.commands.long_clip import long_clip
from fastsd.commands.swap_vae import swap_vae
from fastsd.config.schema import ModelTable, SampleTable, load_config
from fastsd.model.formats.adapters import load_merged, load_to_train
from fastsd.model.formats.load import component_state_dict, load_model
from fastsd.model.shapes import Shapes
from fastsd.model.weights import diffusers_state_dict
from fastsd.plan.plan import plan_stage
from fastsd.run import checkpoint
from fastsd.sampling.generate import generate
from fastsd.terminal.console import Console

pytestmark = pytest.mark.slow

STAGE = """
[[stage]]
name = "lora"
train = ["lora"]
until = 6
batch = 4
optimizer = "adamw"
lr = 1e-2
schedule = "cosine"
checkpoint_every = 2
keep_checkpoints = 9
ema = 0.5
"""
LORA_OVERRIDE = "model.lora={{rank={rank}, text_encoder={text}}}"


def train_lora(folder: Path, model: Path, images: Path, *keys: str, rank: int = 4, text: str = "true", precision=None):
    folder.mkdir(exist_ok=True)
    return run(job(folder, model, images, STAGE), LORA_OVERRIDE.format(rank=rank, text=text), *keys, precision=precision)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, images):
    folder, _ = train_lora(tmp_path_factory.mktemp("lora"), tiny_model, images)
    return folder


def component_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in folder.glob("*/*.safetensors")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapters_change_and_checkpoints_link_the_base(precision, tmp_path, tiny_model, images):
    folder, text = train_lora(tmp_path, tiny_model, images, precision=precision)
    paths = checkpoint.checkpoints(folder / "checkpoints")
    for component, tensors in component_tensors(tiny_model).items():
        assert all(same(component_tensors(path)[component], tensors) for path in paths)
    first_unet, last_unet = paths[0] / "unet", paths[-1] / "unet"
    shared = {name for name in os.listdir(first_unet) if os.path.samefile(first_unet / name, last_unet / name)}
    assert shared == {"diffusion_pytorch_model.safetensors"}
    adapters = [load_file(path / "lora.safetensors") for path in paths]
    assert all(not same(a, b) for a, b in pairwise(adapters))
    assert {name.split(".")[0] for name in adapters[0]} == {"unet", "text_encoder"}
    state = [name for name in load_file(paths[-1] / "state.safetensors") if "/" in name]
    assert state and all(".lora_" in name for name in state)
    count = sum(tensor.numel() for tensor in adapters[0].values())
    assert says(text, "stage-length", stage="lora", parameters=f"{count:,}", steps=6)


@pytest.mark.parametrize("stop", [2, 4])
def test_resumed_run_has_the_same_bits(stop, uninterrupted, tmp_path, tiny_model, images):
    folder, _ = train_lora(tmp_path, tiny_model, images)
    rewind(folder, stop)
    folder, text = train_lora(tmp_path, tiny_model, images)
    assert says(text, "run-resumed", step=stop) and same(final(folder), final(uninterrupted))
    assert (folder / "log.jsonl").read_text() == (uninterrupted / "log.jsonl").read_text()


def test_exported_model_and_lora_predict_like_the_checkpoint(uninterrupted):
    newest = checkpoint.checkpoints(uninterrupted / "checkpoints")[-1]
    table = load_config(uninterrupted.parent / "job.toml", [LORA_OVERRIDE.format(rank=4, text="true")]).model
    applied = load_to_train(table.model_copy(update={"base": str(newest)}), checkpoint=newest)
    file = table.lora.model_copy(update={"file": str(uninterrupted / "lora.safetensors")})
    from_file = load_to_train(table.model_copy(update={"lora": file}))
    merged = load_merged(ModelTable(base=str(newest)))
    exported, base = load_model(ModelTable(base=f"{uninterrupted}/model")), load_model(table)

    def predict(model):
        torch.manual_seed(0)
        context = model.text.encode(model.text.tokenize(["a red circle"]))
        with torch.no_grad():
            return model.unet(torch.randn(1, 4, 16, 16), torch.tensor([500]), context)

    expected = predict(applied)
    assert torch.equal(predict(from_file), expected)
    for model in (merged, exported):
        torch.testing.assert_close(predict(model), expected, rtol=1e-5, atol=1e-5)
    assert (predict(base) - expected).abs().max() > 1e-3
    assert same(component_tensors(uninterrupted / "model")["unet"], diffusers_state_dict(merged.unet))
    images = [generate(m, ["a red circle"], [0], SampleTable(steps=2), 32)[0] for m in (merged, exported)]
    assert images[0].tobytes() == images[1].tobytes()


def test_adapters_of_a_base_are_merged(uninterrupted, tmp_path):
    newest = checkpoint.checkpoints(uninterrupted / "checkpoints")[-1]
    merged = component_state_dict(load_merged(ModelTable(base=str(newest))), "unet")
    assert same(component_state_dict(load_to_train(ModelTable(base=str(newest))), "unet"), merged)
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    swap_vae(str(newest), str(tmp_path / "vae"), tmp_path / "swapped", console=Console(file=StringIO()))
    long_clip(str(newest), tmp_path / "long", 99)
    for name in ("swapped", "long"):
        assert same(component_tensors(tmp_path / name)["unet"], merged)


def test_text_embeddings_of_a_base_with_adapters_are_those_of_its_merged_encoder(uninterrupted, tmp_path, images):
    newest = checkpoint.checkpoints(uninterrupted / "checkpoints")[-1]
    stage = STAGE.replace('"lora"]', '"unet.norms"]')
    folder, _ = run(job(tmp_path, newest, images, stage), "cache.hidden_states=true", "stage.0.until=1")
    text = component_tensors(folder / "model")["text_encoder"]
    assert same(text, component_state_dict(load_merged(ModelTable(base=str(newest))), "text_encoder"))


def test_ema_weights_are_exported(uninterrupted):
    raw, averaged = (load_file(uninterrupted / f"{name}.safetensors") for name in ("lora", "lora-ema"))
    assert raw.keys() == averaged.keys() and not same(raw, averaged)
    state = load_file(checkpoint.checkpoints(uninterrupted / "checkpoints")[-1] / "state.safetensors")
    emas = [tensor for key, tensor in state.items() if "@ema/" in key]
    assert any(torch.equal(tensor, ema) for tensor in averaged.values() for ema in emas)
    assert not same(component_tensors(uninterrupted / "model")["unet"], component_tensors(uninterrupted / "model-ema")["unet"])


def test_cost_counts_the_lora(uninterrupted):
    cost = json.loads((uninterrupted / "cost.json").read_text())
    assert cost["file_bytes"] == (uninterrupted / "lora.safetensors").stat().st_size
    assert cost["stages"][0]["steps"] == 6 and cost["stages"][0]["trained"] < 30_000


def test_training_starts_from_a_lora_file(uninterrupted, tmp_path, tiny_model, images):
    file = uninterrupted / "lora.safetensors"
    keys = [f'model.lora={{rank=4, text_encoder=true, file="{file}"}}', "stage.lr=1e-30", "stage.until=1"]
    folder, _ = run(job(tmp_path, tiny_model, images, STAGE), *keys)
    exported = load_file(folder / "lora.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in load_file(file).items())


def test_other_commands_accept_a_run_with_adapters(uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastsd.train.device.INTERPRETED", False)

    def output(*words):
        code, out, err = fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err
        return out

    for i, model in enumerate((uninterrupted, uninterrupted / "model", uninterrupted / "checkpoints/step-00000006")):
        output("sample", model, "--prompt", "a red circle", "--steps", 2, "--out", tmp_path / str(i), "--size", 32)
    run_image, merged, checkpoint = (np.asarray(Image.open(tmp_path / str(i) / "000-0.png")).astype(int) for i in range(3))
    assert np.array_equal(run_image, checkpoint)
    assert np.abs(run_image - merged).max() <= 1  # a run's adapters are not merged, so sums are rounded differently
    output("sample", uninterrupted, "--prompt", "x", "--steps", 2, "--out", tmp_path / "skip", "--size", 32, "--clip-skip", 1)
    keys = ["validate.stabilised=8", LORA_OVERRIDE.format(rank=4, text="true")]
    path = uninterrupted.parent / "job.toml"
    tables = [output("validate", model, path, *keys).splitlines()[-1] for model in (uninterrupted, uninterrupted / "model")]
    assert tables[0].split()[:3] == tables[1].split()[:3]
    assert re.search(r"adamw .*lora .* 6 steps .*4 images", output("check", path, *keys[1:]))
    assert "lora" in output("plan", path, *keys[1:])


def test_plan_counts_gradients_of_adapters_only(tiny_model, tmp_path, images):
    config = load_config(job(tmp_path, tiny_model, images, STAGE), [LORA_OVERRIDE.format(rank=4, text="false")])
    model = load_to_train(config.model)
    need = plan_stage(Shapes.of(model), config.stage[0], 32, 1 << 30).need(4)
    lora = sum(p.numel() for name, p in model.unet.named_parameters() if ".lora_" in name)
    assert 4 * lora <= need.owners["gradients"] < 4 * lora + 4 * 128 * 200


@pytest.mark.parametrize(
    "keys, name, fact",
    [
        (['model.lora={rank=4, targets=["attn3"]}'], "lora-target", "'attn3'"),
        (['model.lora={rank=4, file="none.safetensors"}'], "lora-file-missing", "'none.safetensors'"),
        (['stage.0.train=["unet"]', "model.lora={rank=0}"], "config-invalid", "model.lora.rank is 0"),
    ],
)
def test_bad_adapters_are_refused(keys, name, fact, tmp_path, tiny_model, images, monkeypatch, capsys):
    monkeypatch.setattr("fastsd.train.device.INTERPRETED", False)
    path = job(tmp_path, tiny_model, images, STAGE)
    code, _, err = fastsd("train", path, *keys, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(err, name) and fact in err and err.count("\n") == 1, err


def test_the_rank_is_fixed_after_the_start(uninterrupted, tmp_path, tiny_model, images):
    shutil.copytree(uninterrupted, tmp_path / "run")
    with refused("run-other-start", key="model.lora.rank", before=4, after=8):
        train_lora(tmp_path, tiny_model, images, rank=8)
