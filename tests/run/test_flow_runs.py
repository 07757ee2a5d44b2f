"""Runs that train a rectified flow: exact resume, the teacher, LoRA, what they export, and settings that do not fit."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import edit_json, spoil
from runs import checkpoint_steps, final, rewind, rows_of, run, same
from sentences import pattern, refused, says
from step_inputs import batches, stage_of
from tiny import job

from fastsd.config.schema import ModelTable, SampleTable, load_config
from fastsd.model.formats.load import load_model
from fastsd.model.shapes import Shapes
from fastsd.plan.plan import plan_stage
from fastsd.run.flow_start import colour_warning, compared, moments
from fastsd.run.teacher import load_teacher
from fastsd.sampling.generate import generate, load_to_sample
from fastsd.train.step import Step
from fastsd_kernels import REFERENCE, TRITON, noise

pytestmark = pytest.mark.slow

FLOW = ["model.prediction=flow", "sample.prompts=[]"]
STAGES = """
[[stage]]
name = "learned"
train = ["unet.mid", "unet.out"]
until = 4
batch = 6
micro_batch = 3
optimizer = "lion"
lr = 1e-3
teacher = "base"
teacher_share = 0.75
checkpoint_every = 2
[[stage]]
name = "images"
train = ["unet"]
until = 4
batch = 6
precision = "bf16"
optimizer = "dlion"
d0 = 1e-4
timesteps = "logit_normal"
timestep_shift = 3.0
weighting = "min_snr"
weighting_min = 0.1
checkpoint_every = 2
[validate]
held_out = 4
every = 2
bands = 2
per_band = 1
"""
ONE = '[[stage]]\nname = "one"\ntrain = ["unet"]\nuntil = 2\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\n'

TEXT = ONE.replace('"one"', '"text"').replace('"unet"', '"text_encoder"')


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, images):
    return run(job(tmp_path_factory.mktemp("flow"), tiny_model, images, STAGES), *FLOW)


def test_resumed_and_sampled_runs_have_the_same_bits(uninterrupted, tmp_path, tiny_model, images):
    """Both stages are continued from their middle, the precision changes between them, and samples are drawn in between."""
    whole, _ = uninterrupted
    path = job(tmp_path, tiny_model, images, STAGES)
    drawing = ["model.prediction=flow", "stage.sample_every=1", "sample.sampler=heun", "stage.keep_checkpoints=9"]
    for step in (2, 6):
        folder, _ = run(path, *drawing)
        assert same(final(folder), final(whole))
        assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
        rewind(folder, step)
        assert checkpoint_steps(folder)[-1] == step
    folder, _ = run(path, *drawing)
    assert same(final(folder), final(whole))
    assert (folder / "validation.jsonl").read_bytes() == (whole / "validation.jsonl").read_bytes()
    assert len(list((folder / "samples").glob("*.png"))) >= 8


def test_the_log_shows_the_colours_of_the_start(uninterrupted):
    folder, text = uninterrupted
    rows = rows_of(folder, "validation.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8] and "from pure noise: mean" in text
    assert says(text, "note-flow", prediction="epsilon")
    for row in rows:
        assert [len(row["start"][key]) for key in ("mean", "deviation", "data_mean", "data_deviation", "error")] == [4] * 5
        assert row["bands"][0][:2] == [0, 500]
    assert says(text, "flow-colours", step=2) and not says(text, "flow-colours", step=0)


def test_colours_of_the_start_against_numpy():
    x, y = (torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(i)).double() + i for i in (0, 1))
    start = compared(moments(x), moments(y))
    for key, tensor in (("mean", x), ("data_mean", y)):
        np.testing.assert_allclose(start[key], tensor.numpy().mean((0, 2, 3)))
    np.testing.assert_allclose(start["deviation"], x.numpy().std((0, 2, 3)))
    difference = (x - y).numpy().mean((2, 3))
    np.testing.assert_allclose(start["error"], difference.std(0, ddof=1) / math.sqrt(5))
    warning = colour_warning(start)
    assert pattern("flow-colours").search(f"validation at step 1: {warning}")
    same_mean = start | {"mean": start["data_mean"]}
    assert not colour_warning(same_mean)
    flat = same_mean | {"deviation": [start["deviation"][0], 0.2 * start["data_deviation"][1], start["deviation"][2]]}
    assert pattern("flow-flat").search(f"validation at step 1: {colour_warning(flat)}")


def test_runs_that_differ_in_one_key_see_the_same_noise(uninterrupted, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, ONE)
    keys = {"a": "seed=0", "lr": "stage.one.lr=1e-3", "shift": "stage.one.timestep_shift=2.0"}
    logs = {name: rows_of(run(path, *FLOW, f"run={tmp_path / name}", key)[0]) for name, key in keys.items()}
    hashes = {name: [[row[key] for row in rows] for key in ("order", "noise", "timesteps")] for name, rows in logs.items()}
    assert hashes["a"] == hashes["lr"] and hashes["a"][:2] == hashes["shift"][:2]
    assert all(a != b for a, b in zip(hashes["a"][2], hashes["shift"][2], strict=True))


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_target_is_the_flow_of_the_base(precision, share, tiny_model):
    """The loss is the distance to the teacher's flow. After training, the teacher is still the base."""
    table = ModelTable(base=str(tiny_model), prediction="flow")
    settings = {"optimizer": "lion", "lr": 1e-2, "teacher": "base", "teacher_share": share, "precision": precision}
    model, stage = load_model(table), stage_of(**settings)
    step = Step(model, stage, 2, seed=3, teacher=load_teacher(table, REFERENCE))
    assert sum(tensor.numel() for tensor in step.teacher.copied) == sum(p.numel() for p in model.unet.parameters())
    for number, batch in enumerate(batches(2, 4)):
        objective = step.objective
        x_s, t_B, target = objective.add_noise(model.vae.scale(batch.latents_BCHW.float()), batch.positions_B)
        with torch.no_grad():
            text = model.text.encode(batch.token_ids_BL)
            fresh = load_teacher(table, REFERENCE)
            fresh.share(step.components["unet"])
            blend = share * fresh(x_s, t_B, text) + (1 - share) * target
            expected = (model.unet(x_s, t_B, text).float() - blend).square().mean()
        torch.testing.assert_close(step(batch, number).loss, expected, rtol=1e-5, atol=1e-6)


def test_a_lora_shares_all_weights_with_its_teacher(tmp_path, tiny_model, images):
    stage = ONE.replace('["unet"]', '["lora"]') + 'teacher = "base"\n[model.lora]\nrank = 2\n'
    folder, text = run(job(tmp_path, tiny_model, images, stage), *FLOW)
    assert says(text, "teacher-bytes", stage="one", size="0.0 MiB")
    assert (folder / "lora.safetensors").exists() and load_model(ModelTable(base=str(folder / "model"))).prediction == "flow"


def test_the_plan_counts_the_teacher(tiny_model):
    shapes = Shapes.of(load_model(ModelTable(base=str(tiny_model))))
    size = sum(4 * p.numel() for p in load_model(ModelTable(base=str(tiny_model))).unet.parameters())
    settings = {"optimizer": "lion", "lr": 1e-3}
    plans = {}
    for name, keys in {"plain": {}, "whole": {"teacher": "base"}, "part": {"teacher": "base", "train": ["unet.mid"]}}.items():
        plans[name] = plan_stage(shapes, stage_of(**settings, **keys), 32, 1 << 40, TRITON or REFERENCE).need(4)
    owners = {name: sum(size for owner, size in plan.owners.items() if "teacher" in owner) for name, plan in plans.items()}
    assert owners["plain"] == 0 < owners["part"] < owners["whole"] == size
    assert plans["whole"].flops > 1.3 * plans["plain"].flops


@pytest.mark.parametrize("sampler", ["dpm++", "euler"])
def test_diffusers_draws_our_image(sampler, uninterrupted, tmp_path, monkeypatch):
    """The pipeline of the exported folder with the scheduler of its config, or as the card's program says."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

    shift = edit_json("scheduler/scheduler_config.json", flow_shift=2.0)
    folder = Path(spoil(uninterrupted[0] / "model", tmp_path / "model", shift))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    card = (folder / "README.md").read_text()
    assert "rectified flow" in card and says(card, "card-comfy-flow", shift=1) and says(card, "card-webui-flow")
    if sampler == "euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", shift=2.0)
        pipe.scheduler.init_noise_sigma = 1.0
    model = load_to_sample(ModelTable(base=str(folder)), "cpu")
    eps = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (4, 16, 16))
    expected = pipe("a red circle", latents=eps, num_inference_steps=6, guidance_scale=3.0, output_type="np").images[0]
    pixels = []
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda latents: [pixels.append(image) or image for image in decode(latents)])
    generate(model, ["a red circle"], [5], SampleTable(sampler=sampler, steps=6, guidance=3.0), 32)
    ours = (pixels[0].permute(1, 2, 0).numpy() / 2 + 0.5).clip(0, 1)
    assert np.abs(ours - expected).max() <= 1e-4


def test_the_single_file_is_a_flow_again(uninterrupted):
    path, base = uninterrupted[0] / "model.safetensors", uninterrupted[0] / "model"
    model = load_model(ModelTable(base=str(path), tokenizer=str(base)))
    assert model.prediction == "flow" and model.scheduler == load_model(ModelTable(base=str(base))).scheduler


def test_settings_that_do_not_fit(uninterrupted, tmp_path, tiny_model, images):
    flow, path = str(uninterrupted[0] / "model"), job(tmp_path, tiny_model, images, ONE)
    with refused("base-is-flow", key="prediction", base=flow):
        run(path, f"model.base={flow}", "model.prediction=epsilon")
    with refused("base-is-flow", key="zero_snr", base=flow):
        run(path, f"model.base={flow}", "model.zero_snr=true")
    with refused("flow-shift-without-flow", base=tiny_model):
        run(path, "model.flow_shift=3.0")
    with refused("teacher-is-flow", stage="'one'", base=flow):
        run(path, f"model.base={flow}", "stage.one.teacher=base", "sample.prompts=[]")
    for sampler in ("ddim", "euler_a"):
        with refused("sampler-of-flow", sampler=f"'{sampler}'", kind="a flow", samplers="'euler', 'heun', 'dpm++'"):
            run(path, "model.prediction=flow", f"sample.sampler={sampler}")
    with refused("sampler-of-flow", sampler="'heun'", kind="no flow"):
        run(path, "sample.sampler=heun")
    for keys in (["stage.one.timestep_shift=3.0"], ["stage.one.teacher=base"]):
        with refused("stage-needs-flow", prediction="epsilon"):
            run(path, *keys)
    with refused("weighting-form-of-flow", prefix="stage 'one': "):
        run(path, *FLOW, "stage.one.weighting=debiased", "stage.one.weighting_form=onetrainer")
    with refused("timestep-range", range="[0, 2000]"):
        run(path, *FLOW, "stage.one.timestep_range=[0, 2000]")
    for keys, name in (
        (["model.prediction=flow", "model.zero_snr=true"], "zero-snr-of-flow"),
        (["model.prediction=epsilon", "model.flow_shift=2.0"], "flow-shift-of-others"),
        (["model.prediction=flow", "stage.one.teacher=base", 'stage.one.train=["text_encoder"]'], "teacher-and-text-encoder"),
    ):
        with pytest.raises(Exception, match=pattern(name)):
            load_config(path, keys)
    text = job(tmp_path, tiny_model, images, TEXT + ONE.replace("until = 2", "until = 4"))
    with pytest.raises(Exception, match=pattern("teacher-and-text-encoder")):
        load_config(text, ["model.prediction=flow", "stage.one.teacher=base"])
    load_config(text, ["model.prediction=flow", "stage.text.teacher=base", 'stage.text.train=["unet"]'])
    for key, value in (("timestep_shift", 0), ("teacher_share", 2.0)):
        with pytest.raises(Exception, match=re.escape(f"{key}")):
            load_config(path, ["model.prediction=flow", "stage.one.teacher=base", f"stage.one.{key}={value}"])
    with pytest.raises(Exception, match="teacher_share is set and teacher is ''"):
        load_config(path, ["stage.one.teacher_share=0.5"])
