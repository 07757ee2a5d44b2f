"""Disk space and writes of a run: the plan compared with the files of real runs."""

import json
from pathlib import Path

import pytest
from commandline import fastsd
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import run
from sentences import says
from tiny import job

from fastsd.config.schema import load_config
from fastsd.plan.disk import ROW, TENSORBOARD_ROW, grid_bytes
from fastsd.run import checkpoint
from fastsd.terminal.texts import size_text
from fastsd.train.schedule import Interval

STAGES = """
[[stage]]
train = ["unet"]
until = 9
batch = 4
optimizer = "lion"
lr = 1e-4
checkpoint_every = 2
keep_checkpoints = 2
keep_every = "12 images"
checkpoint_at = [5, 99]
sample_every = 4
[[stage]]
train = ["unet", "text_encoder"]
until = 4
batch = 4
optimizer = "adamw"
lr = 1e-4
ema = 0.9
checkpoint_every = 1
keep_checkpoints = 1
"""


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """Return a function that plans a config and returns the disk space as JSON, and the output."""

    def planned(config: Path, *words: str):
        file = tmp_path / "plan.json"
        code, out, err = fastsd("plan", config, "--json", file, *words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err
        return json.loads(file.read_text())["disk"], out

    return planned


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.sampled_from(["", "e", " images"]), st.integers(1, 40), st.integers(1, 90), st.integers(0, 300))
def test_the_count_of_an_interval_is_how_often_it_is_due(number, unit, batch, epoch, total):
    interval = Interval("keep_every", f"{number}{unit}", batch, epoch)
    assert interval.count(total) == sum(interval.due(step, 0.0) for step in range(1, total + 1))


def weight_bytes(paths) -> int:
    """Return the bytes of the weights in folders. A file with several names is counted once, without its header."""
    files = {file.stat().st_ino: file for path in paths for file in path.rglob("*.safetensors")}
    return sum(file.stat().st_size - int.from_bytes(file.read_bytes()[:8], "little") for file in files.values())


@pytest.mark.slow
def test_planned_files_are_those_of_a_run(plan, tmp_path, tiny_model, images, monkeypatch):
    path, sizes, written = job(tmp_path, tiny_model, images, STAGES), [], []
    save = checkpoint.save

    def measured(folder, *args, **kwargs):
        before = weight_bytes(checkpoint.checkpoints(folder))
        target = save(folder, *args, **kwargs)
        sizes.append(weight_bytes(checkpoint.checkpoints(folder)))
        written.append(sizes[-1] - before)
        return target

    monkeypatch.setattr(checkpoint, "save", measured)
    folder, _ = run(path, "log.tensorboard=true")
    disk, out = plan(path, "log.tensorboard=true")
    saved = checkpoint.checkpoints(folder / "checkpoints")
    permanent = [path for path in saved if json.loads((path / "state.json").read_text())["keep"]]
    assert [int(path.name[5:]) for path in permanent] == [3, 5, 6, 9, 13] and disk["permanent"] == [4, 1]
    assert max(sizes) <= disk["checkpoints"] <= 1.3 * max(sizes)  # the gaps in arenas
    exported = [folder / "model", folder / "model-ema"]
    single = [folder / "model.safetensors", folder / "model-ema.safetensors"]
    assert disk["exports"] == pytest.approx(weight_bytes(exported) + sum(file.stat().st_size for file in single), rel=0.1)
    samples = sum(file.stat().st_size for file in (folder / "samples").iterdir())
    assert len(list((folder / "samples").iterdir())) == 5 and 0 < samples < disk["samples"]
    assert 13 * ROW < disk["logs"] < 20 * (ROW + TENSORBOARD_ROW)
    assert disk["total"] == sum(disk[key] for key in ("checkpoints", "exports", "samples", "logs"))
    others = disk["total"] - disk["checkpoints"]
    assert len(written) == 11 and sum(written) <= disk["written"] - others <= 1.4 * sum(written)  # 3 and 6 count twice
    assert says(out, "plan-checkpoints", permanent=5) and says(out, "plan-written", written="29.3 MiB")
    assert disk["written_a_day"] is None and not says(out, "plan-written-daily")


def test_keep_every_and_times_count(plan, tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 1000000\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'
    path = job(tmp_path, tiny_model, images, stage)
    disk, out = plan(path)
    size = disk["a_checkpoint"][0]
    kept, _ = plan(path, "stage.0.keep_every=100000")
    assert kept["permanent"] == [10] and kept["checkpoints"] - disk["checkpoints"] == 9 * size
    assert disk["written"] - (disk["total"] - disk["checkpoints"]) == pytest.approx(1000 * size, rel=0.01)
    assert not says(out, "plan-written-daily")  # it ends within a day


def test_writes_a_day_are_told_of_a_run_of_days(plan, tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = {}\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\ncheckpoint_every = "1h"\n'
    path = job(tmp_path, tiny_model, images, stage.format('"5d"') + stage.format('"5d"'))
    disk, out = plan(path)
    assert disk["written_a_day"] == [disk["written"] / 10] * 2
    assert says(out, "plan-written-daily", slowest=size_text(disk["written"] / 10), fastest=size_text(disk["written"] / 10))
    stage = stage.replace('"1h"', "1000")
    path = job(tmp_path, tiny_model, images, stage.format(10**9))
    disk, _ = plan(path, "--card", "4090")
    (speeds,) = json.loads((tmp_path / "plan.json").read_text())["stages"][0]["seconds"].values()
    assert disk["written_a_day"] == pytest.approx([disk["written"] * 86400 / seconds for seconds in speeds[::-1]])


def test_a_stage_that_ends_by_time_has_as_many_checkpoints_as_the_fastest_card_saves(plan, tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = "10h"\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\ncheckpoint_every = "30m"\n'
    path = job(tmp_path, tiny_model, images, stage)
    disk, _ = plan(path)
    others = disk["total"] - disk["checkpoints"]
    assert disk["written"] - others == pytest.approx(21 * disk["a_checkpoint"][0], rel=0.2)  # the first one has all components
    counts = [plan(path, "stage.0.keep_every=100000", "--card", card)[0]["permanent"][0] for card in ("H200", "4090", "3090")]
    assert len(set(counts)) > 1
    assert plan(path, "stage.0.keep_every=100000")[0]["permanent"][0] >= max(counts)


def test_unknown_images_are_said(plan, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGES)
    absent = f'data.folders=["{tmp_path / "absent"}"]'
    disk, out = plan(path, absent)
    assert disk["permanent"] == [4, 1] and says(out, "plan-written")
    for epochs in ("until", "keep_every", "sample_every"):
        disk, out = plan(path, absent, f"stage.1.{epochs}=2e")
        assert disk["written"] is None and disk["permanent"] == [4, 1] and says(out, "plan-not-known")


def test_pixels_of_a_grid_are_counted_in_their_sizes(tmp_path):
    path = job(tmp_path, tmp_path, tmp_path, STAGES)
    prompts = 'sample.prompts=["a", {prompt="b", width=48, height=32}]'
    assert grid_bytes(load_config(path, [prompts, "sample.images=2"])) == 2 * 3 * (16 * 16 + 48 * 32)
    assert grid_bytes(load_config(path, [prompts, "sample.prompts_file=/none", "sample.size=8"])) == 3 * (8 * 8 + 48 * 32)
