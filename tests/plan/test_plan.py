"""`fastsd plan` against measurement, against the targets of the reference job, and as a user meets it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from environment import ROOT
from plan_check import CASES, SMALL, compared, measured, planned, stage_of
from tiny import job

from fastsd import cli
from fastsd.config.schema import ModelTable, StageTable, load_config
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model, materialize, read_shapes
from fastsd.model.unet import UNetConfig
from fastsd.plan.gpu_specs import GPU_SPECS, find_gpu
from fastsd.plan.plan import GIB, RESERVED, MemoryEstimate, StagePlan, plan_stage
from fastsd.train.memory import saved_for_backward_bytes
from fastsd_kernels import REFERENCE, TRITON, fastest, workload

# One level less, and every kind of block still; what is beside the UNet is as small as it can be.
LEAST = replace(
    SMALL[0], unet=replace(SMALL[0].unet, block_out_channels=(32, 64), attention=(True, False)),
    text={**SMALL[0].text, "num_hidden_layers": 1},
    vae={**SMALL[0].vae, "block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"],
         "up_block_types": ["UpDecoderBlock2D"]},
)  # fmt: skip

XLSD = ROOT / "configs" / "xlsd.toml"
STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1000\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'
ROOM = int(24 * GIB) - RESERVED
PARAMETERS = sum(size * count for size, count in workload.PARAMETERS.items())


@pytest.fixture(autouse=True)
def planned_once(monkeypatch, traced):
    """Stages that differ in the room alone, which is no part of what is traced, share what was found out about them."""

    def shared(shapes, stage, resolution, device_bytes, ops=None, states=False):
        key = repr((shapes, stage, resolution, ops and ops.name, states))
        found = traced.setdefault(key, None) or plan_stage(shapes, stage, resolution, device_bytes, ops, states)
        traced[key], found.device_bytes = found, device_bytes
        return found

    monkeypatch.setattr("fastsd.plan.plan.plan_stage", shared)


@pytest.fixture(scope="module")
def traced() -> dict:
    return {}


@pytest.fixture(scope="module")
def sd15() -> Shapes:
    return Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)


@pytest.fixture(scope="module")
def first_phase(sd15) -> StagePlan:
    """Of the reference job: fp32, D-Lion, a batch of 32."""
    return plan_stage(sd15, load_config(XLSD).stage[0], 512, ROOM)


COMBINATIONS = [(case, fastest(torch.device("cpu"))) for case in CASES] + [(case, REFERENCE) for case in CASES[1:8:3]]


@pytest.mark.parametrize(
    "case, ops", COMBINATIONS, ids=["-".join(map(str, (ops.name, *case[:5], *case[5]))) for case, ops in COMBINATIONS]
)
def test_plan_equals_measurement(case, ops):
    shapes, resolution = LEAST, 16
    stage = stage_of(case)
    figures = compared(planned(shapes, resolution, stage, ops), measured(shapes, resolution, stage, ops))
    for owner, figure in figures.items():
        print(f"{owner:12} planned {figure['planned']:>11,}  measured {figure['measured']:>11,}  {figure['ratio']:.4f}")
        assert 0.93 < figure["ratio"] < 1.07, owner


def test_activations_are_what_autograd_keeps():
    shapes, resolution = SMALL
    stage = StageTable.model_validate({"train": ["unet"], "until": 1, "batch": 3})
    model, side = empty_model(shapes, REFERENCE), shapes.side(resolution)
    materialize(model.unet, torch.device("cpu"))
    inputs = torch.zeros(3, 4, side, side), torch.zeros(3), torch.zeros(3, 77, 48)
    kept = saved_for_backward_bytes(lambda: model.unet(*inputs), model.unet)
    assert plan_stage(shapes, stage, resolution, 0, REFERENCE).need(3).kept == pytest.approx(kept, rel=0.05)


@pytest.mark.skipif(TRITON is None, reason="plans for a GPU take Triton's kernels")
def test_the_reference_job_fits_24_gb(first_phase):
    plan = first_phase
    assert any(plan.need(8, level).total <= ROOM for level in ("none", "ff"))
    need = plan.need(8)
    weights = need.owners["weights of the unet, trained"]
    assert weights == need.owners["gradients"] == pytest.approx(4 * PARAMETERS, rel=0.001)
    assert need.owners["optimizer state"] == pytest.approx(2 * weights, rel=1e-6)
    assert plan.need(1).kept == pytest.approx(1.01e9, rel=0.01)
    assert need.kept == pytest.approx(8 * plan.need(1).kept, rel=0.001)

    lion = plan.stage.model_copy(update={"precision": "bf16", "optimizer": "lion", "lr": 1e-5, "checkpointing": "ff"})
    plan = plan_stage(plan.shapes, lion, 512, ROOM)
    assert plan.need(32).total <= ROOM
    # The whole batch at once needs no fp32 gradients.
    assert plan.need(16).owners["gradients"] == 2 * plan.need(32).owners["gradients"]


@pytest.mark.skipif(TRITON is None, reason="plans for a GPU take Triton's kernels")
def test_the_work_is_counted(first_phase):
    plan = first_phase
    need = {level: plan.need(8, level).work.flops / 8 for level in ("none", "ff", "block")}
    # Three times the forward; attention's backward takes 5 matmuls for its 2. The text encoder adds half a percent.
    attention = sum(count * kind.flops for kind, count in workload.ATTENTION.items())
    assert need["none"] == pytest.approx(3 * workload.FORWARD_FLOPS + attention / 2, rel=0.01)
    assert need["none"] < need["ff"] < need["block"] == pytest.approx(need["none"] + workload.FORWARD_FLOPS, rel=0.1)
    updates = plan.need(8).work.update
    assert sum(operation.bytes for operation in updates) > 28 * PARAMETERS  # D-Lion: p, m, s read and written, g read
    for card in GPU_SPECS:
        assert 0 < plan.images_per_second(card, 8, "block") < plan.images_per_second(card, 8, "none")
        assert plan.images_per_second(card, 1) < plan.images_per_second(card, 8)  # one update, more and smaller forwards


def test_the_largest_micro_batch_is_the_largest():
    shapes, resolution = SMALL
    stage = StageTable.model_validate({"train": ["unet"], "until": 1, "batch": 12, "precision": "bf16"})
    plan = plan_stage(shapes, stage, resolution, 0)
    assert plan.micro_batches == [1, 2, 3, 4, 6, 12]
    totals = {micro: plan.need(micro).total for micro in plan.micro_batches}
    for room in [0, *totals.values(), *(total - 1 for total in totals.values())]:
        assert plan.largest_micro_batch(room) == max((micro for micro in totals if totals[micro] <= room), default=0)
    assert plan.largest_micro_batch() == 0
    fused = stage.model_copy(update={"fused_backward": True})
    assert plan_stage(shapes, fused, resolution, 0).micro_batches == [12]


def test_shapes_come_from_config_files(tiny_model, tmp_path):
    shapes, notes = read_shapes(ModelTable(base=str(tiny_model)))
    model = load_model(ModelTable(base=str(tiny_model)))
    assert notes == [] and shapes.unet == model.unet.cfg == Shapes.of(model).unet
    assert shapes.text["hidden_size"] == model.text.width and shapes.vae["latent_channels"] == 4
    stage = StageTable.model_validate({"train": ["unet", "text_encoder"], "until": 1, "batch": 2})
    one, other = (plan_stage(found, stage, 32, 0).need(2) for found in (shapes, Shapes.of(model)))
    assert one == other and one.owners["EMA"] == 0
    # A VAE's own folder, a single file, and what is not here.
    assert read_shapes(ModelTable(base=str(tiny_model), vae=str(tiny_model / "vae")))[1] == []
    (tmp_path / "sd.safetensors").touch()
    for base in (str(tmp_path / "sd.safetensors"), "someone/nothing", str(tmp_path / "absent")):
        found, notes = read_shapes(ModelTable(base=base))
        assert found.unet == UNetConfig.sd15() and len(notes) == 3 and all(base in note for note in notes)
    with pytest.raises(UserError, match="latent channels"):
        read_shapes(ModelTable(base="someone/nothing", vae=str(channels_of(tmp_path, 16))))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        read_shapes(ModelTable(base=str(tmp_path)))


def channels_of(folder: Path, channels: int) -> Path:
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({**SD15_VAE, "latent_channels": channels}))
    return folder / "vae"


def test_cards_go_by_short_names():
    for name in ("4090", "rtx4090", "RTX 4090", "rtx-4090"):
        assert find_gpu(name).name == "RTX 4090"
    with pytest.raises(UserError, match="known are RTX 3090, .*give --vram"):
        find_gpu("potato")
    with pytest.raises(UserError, match="did you mean RTX 4090"):
        find_gpu("rtx 4091")
    for name in ("", "0", "rtx"):  # none, or not one
        with pytest.raises(UserError):
            find_gpu(name)


@pytest.fixture
def plan(monkeypatch, capsys):
    """`fastsd plan ...` in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastsd", "plan", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_plan_says_and_writes(plan, tmp_path, tiny_model, images):
    second = '[[stage]]\nname = "text"\ntrain = ["text_encoder"]\nuntil = "2e"\nbatch = 3\noptimizer = "adamw"\nlr = 1e-4\n'
    config, out = job(tmp_path, tiny_model, images, STAGE + second), tmp_path / "plan.json"
    code, said, _ = plan(config, "stage.0.micro_batch=2", "--precision", "bf16", "--json", out)
    assert code == 0
    assert f"those of {tiny_model}" in said and "images     21" in said
    assert "stage-1: unet, lion, bf16, checkpointing none, batch 4 = 2 x 2" in said
    assert said.count("fits 24 GB: micro-batch up to") == 2
    assert max(map(len, said.splitlines())) <= 120
    report = json.loads(out.read_text())
    unet, text = report["stages"]
    assert (unet["steps"], text["steps"]) == (1000, 14)
    assert unet["largest_micro_batch"] == 4 and text["largest_micro_batch"] == 3 and unet["fits"]
    assert unet["seconds"]["RTX 4090"] == pytest.approx(4000 / unet["images_per_second"]["RTX 4090"])
    assert unet["total"] >= sum(unet["memory"].values())
    assert unet["levels"].keys() == {"none", "ff", "block"}
    # 8 x 8 latents of 4 channels in fp16; what the checkpoints of training really take is held against files elsewhere.
    assert report["disk"]["cache_an_image"] == 512 and report["disk"]["cache"] == 21 * 512
    model = load_model(ModelTable(base=str(tiny_model)))
    sizes = [4 * sum(p.numel() for p in module.parameters()) for module in (model.unet, model.text.module, model.vae.module)]
    assert report["disk"]["model"] == sum(sizes) == 2 * report["disk"]["export"]  # one file more, in fp16
    assert sizes[0] * 2 <= report["disk"]["a_checkpoint"][0] <= sizes[0] * 2 * 1.2  # Lion's state, with its arena's gaps
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_an_answer(plan, tmp_path, tiny_model, images):
    config = job(tmp_path, tiny_model, images, STAGE.replace("batch = 4", "batch = 8"), resolution=32)
    code, said, _ = plan(config, "--vram", "1.2")
    assert code == 0 and "does not fit 1.2 GB at any micro-batch: the least it needs is" in said and "none fits" in said
    stage = plan_stage(read_shapes(ModelTable(base=str(tiny_model)))[0], load_config(config).stage[0], 32, 0)

    def between(*needs: MemoryEstimate) -> float:
        return sum((need.total + RESERVED) / GIB for need in needs) / 2

    some = between(stage.need(4), stage.need(8))
    code, said, _ = plan(config, "--vram", some)
    assert code == 0 and "at micro-batch 8: set micro_batch = 4" in said
    code, said, _ = plan(config, "stage.0.micro_batch=auto", "--vram", some)
    assert code == 0 and "batch 8 = 2 x 4" in said and "micro-batch up to 4" in said
    # Fused with the backward, a step has one micro-batch.
    fused = plan_stage(stage.shapes, stage.stage.model_copy(update={"fused_backward": True}), 32, 0)
    some = between(fused.need(8, "none"), fused.need(8, "block"))
    code, said, _ = plan(config, "stage.0.fused_backward=true", "--vram", some)
    assert code == 0 and 'set checkpointing = "' in said and "micro_batch = 8" in said


def test_epochs_without_images_are_told_by_the_million(plan, tmp_path, tiny_model, images):
    config = job(tmp_path, tiny_model, images, STAGE.replace("1000", '"2e"'))
    code, said, _ = plan(config, f'data.folders=["{tmp_path / "absent"}"]', "--card", "4090")
    assert code == 0 and "not found" in said and "1,000,000 images" in said and "for a million images" in said
    assert "RTX 4090" in said and "H200" not in said


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["{absent}"], "does not exist; use the path of a .toml file"),
        (["{config}", "--vram", "0"], "--vram is 0; give"),
        (["{config}", "--vram", "-3"], "--vram is -3; give"),
        (["{config}", "--vram", "nan"], "--vram is nan; give"),
        (["{config}", "--card", "gtx 1080"], "--card is 'gtx 1080'; known are"),
        (["{config}", "data.resolution=33"], "data.resolution is 33, no multiple of"),
        (["{config}", "--json", "{absent}/plan.json"], "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(plan, tmp_path, tiny_model, images, words, sentence):
    places = {"absent": tmp_path / "absent", "config": job(tmp_path, tiny_model, images, STAGE)}
    code, _, said = plan(*(word.format(**places) for word in words))
    assert code == 2 and sentence in said and len(said.splitlines()) == 1
