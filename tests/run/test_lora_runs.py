"""Runs that train adapters: what moves, what is saved, how it resumes, what comes out, and what other commands make of it."""

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commandline import fastsd
from runs import final, run, same
from tiny import job

from fastsd.config.schema import ModelTable, SampleTable, load_config
from fastsd.model.formats.adapters import load_merged, load_to_train
from fastsd.model.formats.load import load_model
from fastsd.model.shapes import Shapes
from fastsd.model.weights import diffusers_state_dict
from fastsd.plan.plan import plan_stage
from fastsd.run import checkpoint
from fastsd.sampling.generate import generate
from fastsd.storage import read_safetensors

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
TABLE = "model.lora={{rank={rank}, text_encoder={text}}}"


def trained(folder: Path, model: Path, images: Path, *keys: str, rank: int = 4, text: str = "true", precision=None):
    folder.mkdir(exist_ok=True)
    return run(job(folder, model, images, STAGE), TABLE.format(rank=rank, text=text), *keys, precision=precision)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, images):
    folder, _ = trained(tmp_path_factory.mktemp("lora"), tiny_model, images)
    return folder


def part_files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: read_safetensors(path) for path in folder.glob("*/*.safetensors")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_adapters_move_and_checkpoints_link_the_base(precision, tmp_path, tiny_model, images):
    folder, said = trained(tmp_path, tiny_model, images, precision=precision)
    steps = checkpoint.checkpoints(folder / "checkpoints")
    for part, state in part_files(tiny_model).items():
        assert all(same(part_files(path)[part], state) for path in steps)
    assert all(os.path.samefile(steps[0] / "unet" / f, steps[-1] / "unet" / f) for f in os.listdir(steps[0] / "unet"))
    adapters = [read_safetensors(path / "lora.safetensors") for path in steps]
    assert all(not same(a, b) for a, b in pairwise(adapters))
    assert {name.split(".")[0] for name in adapters[0]} == {"unet", "text_encoder"}
    slots = [name for name in read_safetensors(steps[-1] / "state.safetensors") if "/" in name]
    assert slots and all(".lora_" in name for name in slots)
    count = sum(tensor.numel() for tensor in adapters[0].values())
    assert f"{count:,} parameters" in said


@pytest.mark.parametrize("stop", [2, 4])
def test_it_resumes_to_the_bit(stop, whole, tmp_path, tiny_model, images):
    folder, _ = trained(tmp_path, tiny_model, images)
    for path in checkpoint.checkpoints(folder / "checkpoints"):
        if int(path.name[5:]) > stop:
            shutil.rmtree(path)
    folder, said = trained(tmp_path, tiny_model, images)
    assert f"resumed at step {stop}" in said and same(final(folder), final(whole))
    assert (folder / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


def test_what_comes_out_is_the_model_with_its_adapters(whole, tiny_model):
    """RUN/model has them merged, RUN/lora.safetensors alone; both predict what the checkpoint does."""
    newest = checkpoint.checkpoints(whole / "checkpoints")[-1]
    table = load_config(whole.parent / "job.toml", [TABLE.format(rank=4, text="true")]).model
    applied = load_to_train(table.model_copy(update={"base": str(newest)}), checkpoint=newest)
    file = table.lora.model_copy(update={"file": str(whole / "lora.safetensors")})
    from_file = load_to_train(table.model_copy(update={"lora": file}))
    merged, exported, base = (
        load_merged(ModelTable(base=str(newest))),
        load_model(ModelTable(base=f"{whole}/model")),
        load_model(table),
    )

    def states(model):
        torch.manual_seed(0)
        context = model.text.encode(model.text.tokenize(["a red circle"]))
        with torch.no_grad():
            return model.unet(torch.randn(1, 4, 16, 16), torch.tensor([500]), context)

    expected = states(applied)
    assert torch.equal(states(from_file), expected)
    for model in (merged, exported):
        torch.testing.assert_close(states(model), expected, rtol=1e-5, atol=1e-5)
    assert (states(base) - expected).abs().max() > 1e-3
    assert same(part_files(whole / "model")["unet"], diffusers_state_dict(merged.unet))
    images = [generate(m, ["a red circle"], [0], SampleTable(steps=2), 32)[0] for m in (merged, exported)]
    assert images[0].tobytes() == images[1].tobytes()


def test_the_average_comes_out_too(whole):
    raw, average = (read_safetensors(whole / f"{name}.safetensors") for name in ("lora", "lora-ema"))
    assert raw.keys() == average.keys() and not same(raw, average)
    state = read_safetensors(checkpoint.checkpoints(whole / "checkpoints")[-1] / "state.safetensors")
    assert any(torch.equal(average[name], tensor) for name in average for key, tensor in state.items() if "@ema/" in key)
    assert not same(part_files(whole / "model")["unet"], part_files(whole / "model-ema")["unet"])


def test_cost_tells_the_lora(whole):
    cost = json.loads((whole / "cost.json").read_text())
    assert cost["file_bytes"] == (whole / "lora.safetensors").stat().st_size
    assert cost["stages"][0]["steps"] == 6 and cost["stages"][0]["trained"] < 30_000


def test_a_lora_can_be_gone_on_with(whole, tmp_path, tiny_model, images):
    file = whole / "lora.safetensors"
    keys = [f'model.lora={{rank=4, text_encoder=true, file="{file}"}}', "stage.lr=1e-30", "stage.until=1"]
    folder, _ = run(job(tmp_path, tiny_model, images, STAGE), *keys)
    again = read_safetensors(folder / "lora.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in read_safetensors(file).items())


def test_commands_take_a_run_with_adapters(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastsd.train.precision.INTERPRETED", False)

    def done(*words):
        code, out, err = fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err
        return out

    for i, model in enumerate((whole, whole / "model", whole / "checkpoints/step-00000006")):
        done("sample", model, "--prompt", "a red circle", "--steps", 2, "--out", tmp_path / str(i), "--size", 32)
    grids = [(tmp_path / str(i) / "000-0.png").read_bytes() for i in range(3)]
    assert grids[0] == grids[1] == grids[2]
    done("sample", whole, "--prompt", "x", "--steps", 2, "--out", tmp_path / "skip", "--size", 32, "--clip-skip", 1)
    keys = ["validate.stabilised=8", TABLE.format(rank=4, text="true")]
    tables = [done("validate", model, whole.parent / "job.toml", *keys).splitlines()[-1] for model in (whole, whole / "model")]
    assert tables[0].split()[:3] == tables[1].split()[:3]
    check = done("check", whole.parent / "job.toml", *keys[1:])
    assert "adamw on lora" in check and "parameters), 6 steps of 4 images" in check
    assert "lora" in done("plan", whole.parent / "job.toml", *keys[1:])


def test_a_plan_counts_adapters_only(tiny_model, tmp_path, images):
    config = load_config(job(tmp_path, tiny_model, images, STAGE), [TABLE.format(rank=4, text="false")])
    model = load_to_train(config.model)
    need = plan_stage(Shapes.of(model), config.stage[0], 32, 1 << 30).need(4)
    lora = sum(p.numel() for name, p in model.unet.named_parameters() if ".lora_" in name)
    assert 4 * lora <= need.owners["gradients"] < 4 * lora + 4 * 128 * 200


@pytest.mark.parametrize(
    "keys, sentence",
    [(['model.lora={rank=4, targets=["attn3"]}'], "model.lora.targets has 'attn3'"),
     (['model.lora={rank=4, file="none.safetensors"}'], "model.lora.file is 'none.safetensors': no such file"),
     (["stage.0.train=[\"unet\"]", "model.lora={rank=0}"], "model.lora.rank is 0; it must be greater than or equal to 1")],
)  # fmt: skip
def test_bad_adapters_are_one_sentence(keys, sentence, tmp_path, tiny_model, images, monkeypatch, capsys):
    monkeypatch.setattr("fastsd.train.precision.INTERPRETED", False)
    path = job(tmp_path, tiny_model, images, STAGE)
    code, _, err = fastsd("train", path, *keys, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and sentence in err and err.count("\n") == 1, err


def test_adapters_of_another_rank_do_not_resume(whole, tmp_path, tiny_model, images):
    from fastsd.errors import UserError

    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match="was started with another model.lora.rank: 4, now 8"):
        trained(tmp_path, tiny_model, images, rank=8)
