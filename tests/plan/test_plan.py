"""`fastsd plan`: comparison with measurements, the goals of the reference job, and the command line."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from commandline import fastsd
from environment import ROOT
from plan_check import CASES, SMALL, compare, measured, planned, stage_of
from sentences import pattern, refused, says
from tiny import job

from fastsd.config.keys import Key, keys_with
from fastsd.config.schema import BucketTable, DataTable, ModelTable, StageTable, load_config
from fastsd.data.building.buckets import planned_side
from fastsd.model.formats.load import load_model
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model, materialize, read_shapes
from fastsd.model.unet import UNetConfig
from fastsd.plan.gpu_specs import find_gpu
from fastsd.plan.operations import UPDATE, traffic
from fastsd.plan.plan import GIB, RESERVED, MemoryEstimate, StagePlan, plan_stage
from fastsd.train.memory import saved_for_backward_bytes
from fastsd_kernels import REFERENCE, TRITON, fastest, workload
from fastsd_kernels.cards import CARDS

pytestmark = pytest.mark.slow

# The fewest levels that still have every kind of block, and the smallest other components.
ONE_BLOCK = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
MINIMAL = replace(
    SMALL[0],
    unet=replace(SMALL[0].unet, block_out_channels=(32, 64), attention=(True, False)),
    text={**SMALL[0].text, "num_hidden_layers": 1},
    vae={**SMALL[0].vae, **ONE_BLOCK},
)

XLSD = ROOT / "configs" / "xlsd.toml"
STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1000\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'
ROOM = int(24 * GIB) - RESERVED
PARAMETERS = sum(size * count for size, count in workload.PARAMETERS.items())


@pytest.fixture(scope="module")
def sd15() -> Shapes:
    return Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)


@pytest.fixture(scope="module")
def reference_stage(sd15) -> StagePlan:
    """Plan the first stage of the reference job: fp32, D-Lion, batch 32."""
    return plan_stage(sd15, load_config(XLSD).stage[0], 512, ROOM)


COMBINATIONS = [(case, fastest(torch.device("cpu"))) for case in CASES] + [(case, REFERENCE) for case in CASES[1:8:3]]


@pytest.mark.parametrize(
    "case, ops", COMBINATIONS, ids=["-".join(map(str, (ops.name, *case[:5], *case[5]))) for case, ops in COMBINATIONS]
)
def test_plan_agrees_with_measurement(case, ops):
    shapes, resolution = MINIMAL, 16
    stage = stage_of(case)
    figures = compare(planned(shapes, resolution, stage, ops), measured(shapes, resolution, stage, ops))
    for owner, figure in figures.items():
        print(f"{owner:12} planned {figure['planned']:>11,}  measured {figure['measured']:>11,}  {figure['ratio']:.4f}")
        assert 0.93 < figure["ratio"] < 1.07, owner


def test_activations_agree_with_bytes_saved_for_backward():
    shapes, resolution = SMALL
    stage = StageTable.model_validate({"train": ["unet"], "until": 1, "batch": 3})
    model, side = empty_model(shapes, REFERENCE), shapes.side(resolution)
    materialize(model.unet, torch.device("cpu"))
    inputs = torch.zeros(3, 4, side, side), torch.zeros(3), torch.zeros(3, 77, 48)
    saved_bytes = saved_for_backward_bytes(lambda: model.unet(*inputs), model.unet)
    assert plan_stage(shapes, stage, resolution, 0, REFERENCE).need(3).activations == pytest.approx(saved_bytes, rel=0.05)


@pytest.mark.skipif(TRITON is None, reason="plans for a GPU need Triton's kernels")
def test_the_reference_job_fits_24_gb(reference_stage):
    plan = reference_stage
    assert any(plan.need(8, level).total <= ROOM for level in ("none", "ff"))
    need = plan.need(8)
    weights = need.owners["weights of the unet, trained"]
    assert weights == need.owners["gradients"] == pytest.approx(4 * PARAMETERS, rel=0.001)
    assert need.owners["optimizer state"] == pytest.approx(2 * weights, rel=1e-6)
    assert plan.need(1).activations == pytest.approx(1.01e9, rel=0.01)
    assert need.activations == pytest.approx(8 * plan.need(1).activations, rel=0.001)

    lion = plan.stage.model_copy(update={"precision": "bf16", "optimizer": "lion", "lr": 1e-5, "checkpointing": "ff"})
    plan = plan_stage(plan.shapes, lion, 512, ROOM)
    assert plan.need(32).total <= ROOM
    # The whole batch at once needs no fp32 gradients.
    assert plan.need(16).owners["gradients"] == 2 * plan.need(32).owners["gradients"]


@pytest.mark.skipif(TRITON is None, reason="plans for a GPU need Triton's kernels")
def test_flops_and_bytes_match_the_workload(reference_stage):
    plan = reference_stage
    flops = {level: plan.need(8, level).flops / 8 for level in ("none", "ff", "block")}
    # A backward has twice the FLOPs of the forward, attention's 5/2 times. The text encoder adds half a percent.
    attention = sum(count * kind.flops for kind, count in workload.ATTENTION.items())
    assert flops["none"] == pytest.approx(3 * workload.FORWARD_FLOPS + attention / 2, rel=0.01)
    assert flops["none"] < flops["ff"] < flops["block"] == pytest.approx(flops["none"] + workload.FORWARD_FLOPS, rel=0.1)
    update, _ = traffic(plan.operations(8))[UPDATE]
    assert update == pytest.approx(32 * PARAMETERS, rel=0.001)  # D-Lion reads and writes p, m, s and reads g, as the norm does
    for card in CARDS.values():
        slowest, fastest = plan.images_per_second(card, 8)
        assert 0 < slowest < fastest
        assert plan.images_per_second(card, 8, "block")[0] < slowest
        assert plan.images_per_second(card, 1)[0] < slowest  # as many images in smaller forwards


def test_largest_micro_batch_is_the_largest_that_fits():
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
    from_files, from_model = (plan_stage(source, stage, 32, 0).need(2) for source in (shapes, Shapes.of(model)))
    assert from_files == from_model and from_files.owners["EMA"] == 0
    # A folder that holds only a VAE, a single file, and missing models.
    assert read_shapes(ModelTable(base=str(tiny_model), vae=str(tiny_model / "vae")))[1] == []
    (tmp_path / "sd.safetensors").touch()
    for base in (str(tmp_path / "sd.safetensors"), "someone/nothing", str(tmp_path / "absent")):
        fallback, notes = read_shapes(ModelTable(base=base))
        assert fallback.unet == UNetConfig.sd15() and len(notes) == 3 and all(base in note for note in notes)
    with refused("components-do-not-fit"):
        read_shapes(ModelTable(base="someone/nothing", vae=str(write_vae_config(tmp_path, 16))))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("[1]")
    with refused("json-no-table") as error:
        read_shapes(ModelTable(base=str(tmp_path)))
    assert "list" in str(error.value)


def write_vae_config(folder: Path, channels: int) -> Path:
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({**SD15_VAE, "latent_channels": channels}))
    return folder / "vae"


def test_cards_are_found_by_short_names():
    for name in ("4090", "rtx4090", "RTX 4090", "rtx-4090"):
        assert find_gpu(name).name == "RTX 4090"
    for name, hint in (("potato", "--vram"), ("rtx 4091", "RTX 4090"), ("", ""), ("0", ""), ("rtx", "")):
        with refused("unknown-card", card=repr(name)) as error:
            find_gpu(name)
        assert "RTX 3090" in str(error.value) and hint in str(error.value).rpartition("; ")[2]


@pytest.fixture
def plan(monkeypatch, capsys):
    """Return a function that runs `fastsd plan` in this process and returns exit code, stdout and stderr."""
    return partial(fastsd, "plan", monkeypatch=monkeypatch, capsys=capsys)


def test_plan_prints_and_writes_every_stage(plan, tmp_path, tiny_model, images):
    text_stage = '[[stage]]\nname = "text"\ntrain = ["text_encoder"]\nuntil = "2e"\nbatch = 3\noptimizer = "adamw"\nlr = 1e-4\n'
    config, json_file = job(tmp_path, tiny_model, images, STAGE + text_stage), tmp_path / "plan.json"
    code, out, _ = plan(config, "stage.0.micro_batch=2", "--precision", "bf16", "--json", json_file)
    assert code == 0
    assert says(out, "plan-shapes", base=tiny_model) and says(out, "plan-images", images=21)
    settings = {"optimizer": "lion", "precision": "bf16", "checkpointing": "none", "batch": 4, "forwards": 2, "micro_batch": 2}
    assert says(out, "plan-stage", stage="stage-1", components="unet", **settings)
    assert len(pattern("plan-fits", vram=24).findall(out)) == 2
    assert max(map(len, out.splitlines())) <= 120
    assert "e+0" not in out, "the speed of a tiny model in scientific notation"

    report = json.loads(json_file.read_text())
    unet, text = report["stages"]
    assert (unet["steps"], text["steps"]) == (1000, 14)
    assert unet["largest_micro_batch"] == 4 and text["largest_micro_batch"] == 3 and unet["fits"]
    slowest, fastest = unet["images_per_second"]["RTX 4090"]
    assert unet["seconds"]["RTX 4090"] == pytest.approx([4000 / fastest, 4000 / slowest])
    assert unet["total"] >= sum(unet["memory"].values())
    assert unet["levels"].keys() == {"none", "ff", "block"}
    # 8 x 8 latents of 4 channels in fp16. `test_disk.py` compares the rest with files.
    assert report["disk"]["cache_an_image"] == 512 and report["disk"]["cache"] == 21 * 512
    model = load_model(ModelTable(base=str(tiny_model)))
    sizes = [4 * sum(p.numel() for p in module.parameters()) for module in (model.unet, model.text.module, model.vae.module)]
    assert report["disk"]["exports"] == sum(sizes) * 1.5  # the folder, and a file in fp16
    # A checkpoint also has Lion's state, including the gaps in its arena.
    assert sizes[0] * 2 <= report["disk"]["a_checkpoint"][0] <= sizes[0] * 2 * 1.2
    assert not (tmp_path / "run").exists()


def test_stage_that_does_not_fit_gets_advice(plan, tmp_path, tiny_model, images):
    config = job(tmp_path, tiny_model, images, STAGE.replace("batch = 4", "batch = 8"), resolution=32)
    code, out, _ = plan(config, "--vram", "1.2")
    assert code == 0 and says(out, "plan-never-fits", vram=1.2) and says(out, "plan-level", largest="none fits")
    stage = plan_stage(read_shapes(ModelTable(base=str(tiny_model)))[0], load_config(config).stage[0], 32, 0)

    def between(*needs: MemoryEstimate) -> float:
        return sum((need.total + RESERVED) / GIB for need in needs) / 2

    middle = between(stage.need(4), stage.need(8))
    code, out, _ = plan(config, "--vram", middle)
    assert code == 0 and says(out, "plan-lower-micro-batch", micro_batch=8, largest=4)
    code, out, _ = plan(config, "stage.0.micro_batch=auto", "--vram", middle)
    assert code == 0 and says(out, "plan-stage", batch=8, forwards=2, micro_batch=4) and says(out, "plan-fits", micro_batch=4)
    # A step with a fused backward has one micro-batch.
    fused = plan_stage(stage.shapes, stage.stage.model_copy(update={"fused_backward": True}), 32, 0)
    middle = between(fused.need(8, "none"), fused.need(8, "block"))
    code, out, _ = plan(config, "stage.0.fused_backward=true", "--vram", middle)
    assert code == 0 and says(out, "plan-more-checkpointing", micro_batch=8)


def test_an_automatic_number_of_chunks_is_planned_with_the_longest_batch(plan, tmp_path, tiny_model, images):
    config, stages = job(tmp_path, tiny_model, images, STAGE), {}
    for chunks in (3, 6, "auto"):
        json_file = tmp_path / f"{chunks}.json"
        code, out, _ = plan(config, f"model.chunks={chunks}", "cache.hidden_states=true", "--json", json_file)
        stages[chunks] = json.loads(json_file.read_text())
        line = says(out, "plan-text-lengths", longest=462, others="77, 154, 231")
        assert code == 0 and line == (chunks == "auto") and max(map(len, out.splitlines())) <= 120
    assert stages["auto"]["stages"] == stages[6]["stages"] != stages[3]["stages"]
    assert stages["auto"]["text_lengths"] == [77, 154, 231, 462] and stages[6]["text_lengths"] == [462]
    assert stages["auto"]["disk"]["cache_an_image"] == stages[3]["disk"]["cache_an_image"]


def test_epochs_without_images_are_estimated_for_a_million(plan, tmp_path, tiny_model, images):
    config = job(tmp_path, tiny_model, images, STAGE.replace("1000", '"2e"'))
    code, out, _ = plan(config, f'data.folders=["{tmp_path / "absent"}"]', "--card", "4090")
    assert code == 0 and says(out, "plan-images-unknown") and says(out, "plan-million-images")
    assert says(out, "plan-cache-million", kib=0.5)
    assert "RTX 4090" in out and "H200" not in out


@pytest.mark.parametrize(
    "words, name, fields",
    [
        (["{absent}"], "config-missing", {}),
        (["{config}", "--vram", "0"], "vram-invalid", {"vram": 0}),
        (["{config}", "--vram", "-3"], "vram-invalid", {"vram": -3}),
        (["{config}", "--vram", "nan"], "vram-invalid", {"vram": "nan"}),
        (["{config}", "--card", "gtx 1080"], "unknown-card", {"card": "'gtx 1080'"}),
        (["{config}", "data.resolution=33"], "model-resolution", {}),
        (["{config}", "--json", "{absent}/plan.json"], "json-unwritable", {}),
    ],
)
def test_bad_input_is_refused_in_one_line(plan, tmp_path, tiny_model, images, words, name, fields):
    paths = {"absent": tmp_path / "absent", "config": job(tmp_path, tiny_model, images, STAGE)}
    code, _, err = plan(*(word.format(**paths) for word in words))
    assert code == 2 and says(err, name, **fields) and len(err.splitlines()) == 1


def test_a_head_size_without_kernels_is_refused():
    stage, shapes = stage_of(("fp32", "lion", 2, 1, "none", {})), replace(MINIMAL, unet=replace(MINIMAL.unet, heads=8))
    with refused("head-size", size=4):
        plan_stage(shapes, stage, SMALL[1], 0, TRITON)
    assert plan_stage(shapes, stage, SMALL[1], 0, REFERENCE).need(2).total > 0  # as the sentence advises


def test_buckets_are_planned_with_the_largest(plan, tmp_path, tiny_model, images):
    """A resolution that only squares must have is accepted, as when the images are cached."""
    buckets = BucketTable(min=256, max=1024, step=64)
    for resolution, no_upscale, side in ((512, 0, 512), (520, 0, 576), (500, 0, 512), (448, 0, 448), (520, 1, 576)):
        table = buckets.model_copy(update={"no_upscale": bool(no_upscale)})
        assert planned_side(DataTable(folders=["a"], resolution=resolution, buckets=table), 64) == side
    assert planned_side(DataTable(folders=["a"], resolution=33), 4) == 33
    config = job(tmp_path, tiny_model, images, STAGE)
    code, out, _ = plan(config, "data.resolution=34", "data.buckets={min=16, max=64, step=8}", "--card", "4090")
    assert code == 0 and says(out, "plan-fits")


def test_each_average_is_one_arena():
    stage = StageTable(train=["unet"], until=1, batch=2, optimizer="lion", lr=1e-4)
    kinds = 0.0, 0.9, {"sigma_rel": [0.05, 0.10]}
    needs = [plan_stage(MINIMAL, stage.model_copy(update={"ema": ema}), SMALL[1], 0).need(2) for ema in kinds]
    arena = needs[0].owners["gradients"]
    assert [need.owners["EMA"] for need in needs] == [0, arena, 2 * arena]


def test_light_keys_do_not_change_the_plan():
    """A new key that is declared as LIGHT needs a value here, other than its default, that a step would notice if it could."""
    values = {
        "name": "s", "until": 7, "state": "carry", "reinit": ["unet.mid"], "micro_batch": 0, "lr": 0.3, "betas": [0.5, 0.6],
        "weight_decay": 0.1, "decoupled_weight_decay": True,
        "schedule": "cosine", "rex_bend": 0.9, "lr_floor": 0.1, "restarts": 2, "warmup": 3,
        "ema_snapshots": 3, "ema_snapshot_dtype": "fp32",
        "huber_delta": 0.5, "weighting_form": "onetrainer", "weighting_min": 0.1, "weighting_gamma": 2.0,
        "timestep_range": [100, 900], "timestep_mean": 1.0, "timestep_std": 2.0,
        "timestep_shift": 3.0, "teacher_share": 0.5,
        "unmasked_weight": 0.5, "caption_dropout": 0.1, "max_tags": 5, "tag_separator": ";", "shuffle_tags": True,
        "keep_tags": 1, "tag_dropout": 0.1, "shuffle_sentences": True, "sample_every": 5, "checkpoint_every": 5,
        "keep_checkpoints": 9, "keep_every": 4, "checkpoint_at": [3],
    }  # fmt: skip
    assert list(values) == keys_with(StageTable, Key.LIGHT)
    flow = {"timestep_shift": values.pop("timestep_shift")}  # which has no such weights
    for settings, changed in (
        ({"optimizer": "lion", "lr": 1e-4, "weighting": "p2"}, values),
        ({"optimizer": "adamw", "lr": 1e-4, "loss": "huber"}, values),
        ({"optimizer": "lion", "lr": 1e-4, "timestep_shift": 2.0}, flow),
    ):
        stage = StageTable(train=["unet"], until=1, batch=2, timesteps="logit_normal", **settings)
        plain, other = (plan_stage(MINIMAL, s, SMALL[1], 0).need(2) for s in (stage, stage.model_copy(update=changed)))
        assert (plain.total, plain.activations, plain.operations) == (other.total, other.activations, other.operations)
