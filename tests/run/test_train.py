"""Training end to end on a tiny model: exact resume, kills, cadence, precision, parts, a full disk, what comes out."""

import errno
import json
import os
import shutil
import signal
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from runs import final, run, same
from tiny import job

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.errors import UserError
from fastsd.run import checkpoint, saving
from fastsd.run.loop import train
from fastsd.storage import read_safetensors

TWO_STAGES = """
[[stage]]
name = "unet"
train = ["unet"]
until = 8
batch = 6
micro_batch = 3
optimizer = "dlion"
d0 = 1e-4
caption_dropout = 0.2
checkpoint_every = 3
keep_checkpoints = 5
[[stage]]
name = "text"
train = ["text_encoder"]
until = "2e"
batch = 6
optimizer = "lion"
lr = 1e-3
warmup = 0.5
max_tags = 2
checkpoint_every = 2
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, images):
    """One uninterrupted run of the two stages."""
    folder, _ = run(job(tmp_path_factory.mktemp("whole"), tiny_model, images, TWO_STAGES))
    return folder


def wait_for_rows(process, log: Path, rows: int) -> None:
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= rows):
        time.sleep(0.002)


def test_killed_anywhere_ends_the_same(whole, tmp_path, tiny_model, images, start):
    path, said = job(tmp_path, tiny_model, images, TWO_STAGES), tmp_path / "said"
    log, kills = tmp_path / "run" / "log.jsonl", 0
    while kills < 4:  # one that had no processor for a while came too late: from the start
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        kills = 0
        for rows in (2, 4, 6, 9, 12):
            process = start(said, "train", str(path))
            wait_for_rows(process, log, rows)
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
    done = start(said, "train", str(path))
    done.join(1200)
    assert done.exitcode == 0, said.read_text()
    assert same(final(tmp_path / "run"), final(whole))
    assert log.read_bytes() == (whole / "log.jsonl").read_bytes()
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_optimizer_state_survives_a_stop_in_mid_stage(whole, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    folder, _ = run(path, "stage.unet.until=5", "stage.keep_checkpoints=9")
    # The same stage, asked for longer from a checkpoint inside it, equals the run that was never stopped.
    for later in checkpoint.checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(later)
    assert checkpoint.checkpoints(folder / "checkpoints")[-1].name == "step-00000003"
    state = checkpoint.load_state(folder / "checkpoints" / "step-00000003")
    assert {"unet|d", "unet|numerator_weighted"} <= state.keys() and any(k.startswith("unet|s/") for k in state)
    run(path)
    assert same(final(folder), final(whole))
    assert (folder / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def test_the_last_stage_can_be_made_longer(whole, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    run(path, "stage.text.until=5")
    folder, text = run(path)
    assert "changed since the last start: stage.1.until: 5, now '2e'" in text
    # The warm-up is a share of the stage's length, so the weights differ; the steps and their losses go on.
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 16))


def test_the_next_stage_can_start_from_a_chosen_checkpoint(tmp_path, tiny_model, images):
    """As phase 2 of xlsd.toml says: delete what came after the choice, shorten the stage to it, go on."""
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    run(path, "stage.unet.until=6", f"run={tmp_path / 'short'}")
    folder, _ = run(path, "stage.keep_checkpoints=9")
    for later in checkpoint.checkpoints(folder / "checkpoints"):
        if later.name > "step-00000006":
            shutil.rmtree(later)
    run(path, "stage.unet.until=6")
    assert same(final(folder), final(tmp_path / "short"))


def test_sampling_changes_nothing(whole, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    folder, text = run(path, "stage.sample_every=2", "sample.sampler=euler_a", "log.tensorboard=true")
    assert same(final(folder), final(whole))
    assert len(list((folder / "samples").glob("*.png"))) > len(list((whole / "samples").glob("*.png"))) == 2
    assert list((folder / "tensorboard").iterdir()) and "samples:" in text


def test_the_seed_changes_everything(whole, tmp_path, tiny_model, images):
    folder, _ = run(job(tmp_path, tiny_model, images, TWO_STAGES), "seed=1")
    assert not same(final(folder), final(whole))


def test_only_the_trained_part_moves(whole, tiny_model):
    def weights(folder, part):
        return read_safetensors(next((folder / part).glob("*.safetensors")))

    first = whole / "checkpoints" / "step-00000008"
    last = checkpoint.checkpoints(whole / "checkpoints")[-1]
    assert same(weights(first, "text_encoder"), weights(tiny_model, "text_encoder"))
    assert not same(weights(first, "unet"), weights(tiny_model, "unet"))
    assert same(weights(last, "unet"), weights(first, "unet"))
    assert not same(weights(last, "text_encoder"), weights(first, "text_encoder"))
    for part in ("unet", "text_encoder", "vae"):
        assert same(weights(whole / "model", part), weights(last, part))


def test_accumulation_gives_the_batch_gradient(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet", "text_encoder"]\nuntil = 2\nbatch = 6\noptimizer = "adamw"\nlr = 1e-3\n'
    losses = []
    for micro in (0, 3, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        out, _ = run(job(folder, tiny_model, images, stage), f"stage.micro_batch={micro}")
        losses.append([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_trains_and_loses_no_bit_of_what_is_frozen(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 6\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\ncheckpoint_every = 2\n'
    folder, text = run(job(tmp_path, tiny_model, images, stage), precision="bf16")
    assert "bf16" in text
    values = final(folder)
    unet = {name: t for name, t in values.items() if name.startswith("unet/")}
    assert all(t.dtype == torch.float32 for t in unet.values())
    # Exact masters: their low bits are in use, which bf16 weights could not hold.
    assert any(not torch.equal(t, t.bfloat16().float()) for t in unet.values())
    last = checkpoint.checkpoints(folder / "checkpoints")[-1]
    assert same(
        read_safetensors(last / "text_encoder" / "model.safetensors"),
        read_safetensors(tiny_model / "text_encoder" / "model.safetensors"),
    )
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    other = tmp_path / "fp32"
    other.mkdir()
    reference, _ = run(job(other, tiny_model, images, stage), precision="fp32")
    exact = [json.loads(line)["loss"] for line in (reference / "log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(exact, rel=0.03) and losses != exact


def test_precision_may_change_on_resume(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "dlion"\nd0 = 1e-4\ncheckpoint_every = 2\n'
    path = job(tmp_path, tiny_model, images, stage)
    folder, _ = run(path)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    before = read_safetensors(folder / "checkpoints" / "step-00000002" / "unet" / "diffusion_pytorch_model.safetensors")
    _, text = run(path, precision="bf16")
    assert "changed since the last start: stage.0.precision" in text
    after = read_safetensors(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and (folder / "log.jsonl").read_text().count("\n") == 4


def test_a_full_disk_stops_no_training(tmp_path, tiny_model, images, monkeypatch):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 6\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\ncheckpoint_every = 2\n'
    path = job(tmp_path, tiny_model, images, stage)
    write, calls = checkpoint.write_safetensors, []

    def full(target, *rest):
        calls.append(target)
        if "step-00000004" in str(target):
            target.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(target, *rest)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    folder, text = run(path)
    assert "checkpoint at step 4 not saved: No space left on device" in text
    assert [p.name for p in checkpoint.checkpoints(folder / "checkpoints")] == ["step-00000002", "step-00000006"]
    assert all(checkpoint.verify(p) is None for p in checkpoint.checkpoints(folder / "checkpoints"))

    monkeypatch.setattr(checkpoint, "write_safetensors", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError, match="could not be saved; free space"):
        run(path, f"run={tmp_path / 'other'}")


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, tiny_model, images, monkeypatch):
    """Neither notes on a checkpoint nor the finished model can be written: a line, a sentence; the same line again goes on."""
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\n'
    more = "checkpoint_every = 1\nkeep_checkpoints = 1\ncheckpoint_at = [2]\n"
    path = job(tmp_path, tiny_model, images, stage + more)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        notes = saving.replace_file
        patch.setattr(saving, "replace_file", lambda path, text: full() if path.name == "kept.json" else notes(path, text))
        patch.setattr(checkpoint, "export", full)
        with pytest.raises(
            UserError, match="the model could not be written .No space left on device.; free space on that disk"
        ):
            run(path)
    names = [p.name for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")]
    assert names == ["step-00000002", "step-00000004"]  # what is to stay stays, though it could not be noted
    folder, said = run(path)
    assert (folder / "model/unet").is_dir() and "resumed at step 4" in said


def test_a_damaged_checkpoint_is_passed_over(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 6\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\ncheckpoint_every = 2\n'
    path = job(tmp_path, tiny_model, images, stage)
    folder, _ = run(path)
    before = final(folder)
    weights = folder / "checkpoints" / "step-00000006" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    (folder / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    (folder / "checkpoints" / ".tmp-step-00000008").mkdir()
    _, text = run(path)
    assert "step-00000006 is damaged (unet/diffusion_pytorch_model.safetensors has another sha256" in text
    assert "step-00000004 is damaged (no readable manifest.json)" in text
    assert "resumed at step 2" in text
    assert same(final(folder), before)
    for path_ in checkpoint.checkpoints(folder / "checkpoints"):
        (path_ / "state.json").unlink()
    with pytest.raises(UserError, match="checkpoints is whole; start a new run"):
        run(path)


def test_retention_keeps_the_newest_and_the_stage_ends(whole):
    names = [path.name for path in checkpoint.checkpoints(whole / "checkpoints")]
    assert "step-00000008" in names and names[-1] == "step-00000015"
    assert names == ["step-00000008", "step-00000012", "step-00000014", "step-00000015"]


def test_a_gradient_that_is_not_finite_touches_nothing(tmp_path, tiny_model, images, monkeypatch):
    from fastsd.train import step as step_module

    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "dlion"\ncheckpoint_every = 1\n'
    true_loss, calls = step_module.Objective.loss, []

    def broken(self, *given):
        calls.append(1)
        return true_loss(self, *given) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(step_module.Objective, "loss", broken)
    folder, text = run(job(tmp_path, tiny_model, images, stage))
    second, third = (
        read_safetensors(folder / "checkpoints" / f"step-0000000{n}" / "unet" / "diffusion_pytorch_model.safetensors")
        for n in (2, 3)
    )
    assert same(second, third)
    assert "1 steps before step 3 had a gradient that is not finite" in text
    row = json.loads((folder / "log.jsonl").read_text().splitlines()[2])
    assert row["loss"] is None and row["skipped"] == 1

    monkeypatch.setattr(step_module.Objective, "loss", lambda self, *given: true_loss(self, *given) * float("nan"))
    with pytest.raises(UserError, match="no finite gradient for"):
        run(job(tmp_path, tiny_model, images, stage), f"run={tmp_path / 'dead'}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_first(number, tmp_path, tiny_model, images, start):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 5000\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\n'
    path = job(tmp_path, tiny_model, images, stage)
    process, said = start(tmp_path / "said", "train", str(path)), tmp_path / "said"
    wait_for_rows(process, tmp_path / "run" / "log.jsonl", 3)
    os.kill(process.pid, number)
    process.join(600)
    assert process.exitcode == 130 and "the same line again goes on" in said.read_text()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", print)[1].step >= 3


def test_what_must_not_change_is_refused(whole, tmp_path, tiny_model, images):
    shutil.copytree(whole, tmp_path / "run")
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    for change, words in [
        ("seed=5", "another seed: 0, now 5"),
        ("model.clip_skip=1", "another model.clip_skip: 0, now 1"),
        ("stage.unet.batch=3", "already trained with another stage.0.batch: 6, now 3"),
    ]:
        with pytest.raises(UserError, match=words):
            run(path, change)
    _, text = run(path, "log.every=5")
    assert "resumed at step 15" in text


def test_two_trainers_do_not_share_a_run(tmp_path, tiny_model, images):
    from fastsd.run.run import open_run

    config = load_config(job(tmp_path, tiny_model, images, TWO_STAGES))
    cache(config, Console(file=StringIO()))
    with open_run(config, Console(file=StringIO())):
        with pytest.raises(UserError, match="in which another fastsd is training"):
            train(config, Console(file=StringIO()))


def test_no_device_value_is_read_between_log_rows(tmp_path, tiny_model, images):
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastsd.run.run import open_run
    from fastsd.run.stage_start import start_stage

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "the step reads a value back"
            return func(*args, **(kwargs or {}))

    config = load_config(job(tmp_path, tiny_model, images, TWO_STAGES))
    cache(config, Console(file=StringIO()))
    with open_run(config, Console(file=StringIO())) as opened:
        step = start_stage(opened, 0)
        batch = opened.data.loader(0).batch(0, 6)
        with NoReading():
            for i in range(3):
                opened.advance(step, step(batch, i))


def test_images_that_came_in_between_are_said(tmp_path, tiny_model, images):
    own = shutil.copytree(images, tmp_path / "own")
    path = job(tmp_path, tiny_model, own, PLAIN)
    folder, text = run(path)
    assert "images at the last start" not in text
    shutil.copy(own / "0003.png", own / "more.png")
    _, text = run(path, "stage.0.until=6")
    assert "the cache had 21 images at the last start and has 22: from here on the order is another" in text
    (own / "more.txt").write_text("another caption")
    _, text = run(path, "stage.0.until=8")
    assert "captions or images have changed in the cache since the last start" in text
    # What an earlier version has not written down had its default.
    said = json.loads((folder / "config.json").read_text())
    del said["data"]["crops"], said["stage"][0]["shuffle_tags"], said["cache"]["hidden_states"]
    (folder / "config.json").write_text(json.dumps(said))
    assert "resumed at step 8" in run(path, "stage.0.until=9")[1]


PLAIN = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\n'


def test_buckets_repeats_and_shuffled_tags_resume_exactly(tmp_path, tiny_model, images):
    """Shapes that change from step to step, mirror images, folders with shares, captions edited on the way."""
    other = tmp_path / "other"
    other.mkdir()
    for i, size in enumerate([(60, 40), (40, 60), (64, 40), (40, 64), (50, 50)]):
        Image.effect_noise(size, 60).convert("RGB").save(other / f"{i}.png")
        (other / f"{i}.txt").write_text(f"one, two, three\nvariant, {i}")
    stage = PLAIN.replace(
        "until = 4", 'until = "2e"\nshuffle_tags = true\nkeep_tags = 1\ntag_dropout = 0.3\ncheckpoint_every = 2'
    )
    path = job(tmp_path, tiny_model, images, stage)
    keys = [
        f'data.folders=["{images}", {{ path = "{other}", repeats = 3 }}]', "data.resolution=32", "data.flip=true",
        "data.buckets={ min = 16, max = 64, step = 8 }", f'cache.dir="{tmp_path / "cache"}"',
    ]  # fmt: skip
    folder, text = run(path, *keys)
    assert "26 at 32 px in 3 sizes, 36 an epoch" in text and "12 steps" in text
    whole = final(folder)
    for step in (2, 6, 10):
        shutil.rmtree(folder / "model")
        for later in checkpoint.checkpoints(folder / "checkpoints"):
            if int(later.name.split("-")[1]) > step:
                shutil.rmtree(later)
        _, text = run(path, *keys)
        assert same(final(folder), whole)
