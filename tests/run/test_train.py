"""Training end to end on a tiny model: exact resume, kills, precision, trained components, a full disk, damaged checkpoints."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import checkpoint_steps, final, rewind, rows_of, run, same, stop_requested
from safetensors.torch import load_file
from sentences import refused, says
from tiny import job, write_images

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.data.loader import Loader
from fastsd.run import checkpoint, cost
from fastsd.run.loop import train
from fastsd.run.restart import lock
from fastsd.terminal.console import Console
from fastsd.train.objective import Objective

pytestmark = pytest.mark.slow

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
PLAIN = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\n'
UNTIL_6 = PLAIN.replace("until = 4", "until = 6") + "checkpoint_every = 2\n"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_model, images):
    """The folder of an uninterrupted run of the two stages."""
    folder, _ = run(job(tmp_path_factory.mktemp("uninterrupted"), tiny_model, images, TWO_STAGES))
    return folder


def wait_for_rows(process, log: Path, rows: int) -> None:
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= rows):
        time.sleep(0.002)


def test_killed_runs_end_with_the_same_bits(uninterrupted, tmp_path, tiny_model, images, start):
    path, output = job(tmp_path, tiny_model, images, TWO_STAGES), tmp_path / "output"
    log, kills = tmp_path / "run" / "log.jsonl", 0
    while kills < 4:  # on a busy machine a run may end before it is killed; then start again
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        kills = 0
        for rows in (2, 4, 6, 9, 12):
            process = start(output, "train", str(path))
            wait_for_rows(process, log, rows)
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
    process = start(output, "train", str(path))
    process.join(1200)
    assert process.exitcode == 0, output.read_text()
    assert same(final(tmp_path / "run"), final(uninterrupted))
    assert log.read_bytes() == (uninterrupted / "log.jsonl").read_bytes()
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_a_stage_extended_from_its_middle_equals_one_run(uninterrupted, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    folder, _ = run(path, "stage.unet.until=5", "stage.keep_checkpoints=9")
    # The stage, extended from a checkpoint in its middle, equals the run that was never stopped.
    rewind(folder, 3)
    assert checkpoint_steps(folder) == [3]
    state = checkpoint.load_state(folder / "checkpoints" / "step-00000003")
    assert {"unet|d", "unet|numerator_weighted"} <= state.keys() and any(k.startswith("unet|s/") for k in state)
    run(path)
    assert same(final(folder), final(uninterrupted))
    assert (folder / "log.jsonl").read_bytes() == (uninterrupted / "log.jsonl").read_bytes()


def test_the_last_stage_can_be_extended(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    run(path, "stage.text.until=5")
    folder, text = run(path)
    assert says(text, "key-changed", key="stage.1.until", before=5, after="'2e'")
    assert [row["step"] for row in rows_of(folder)] == list(range(1, 16))


def test_the_next_stage_can_start_from_a_chosen_checkpoint(tmp_path, tiny_model, images):
    """As for phase 2 of xlsd.toml, later checkpoints are deleted, the stage is shortened, and training continues."""
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    run(path, "stage.unet.until=6", f"run={tmp_path / 'short'}")
    folder, _ = run(path, "stage.keep_checkpoints=9")
    rewind(folder, 6)
    run(path, "stage.unet.until=6")
    assert same(final(folder), final(tmp_path / "short"))


def test_sampling_does_not_change_training(uninterrupted, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    folder, text = run(path, "stage.sample_every=2", "sample.sampler=euler_a", "log.tensorboard=true")
    assert same(final(folder), final(uninterrupted))
    assert len(list((folder / "samples").glob("*.png"))) > len(list((uninterrupted / "samples").glob("*.png"))) == 2
    assert list((folder / "tensorboard").iterdir()) and "samples:" in text


def test_another_seed_gives_other_weights(uninterrupted, tmp_path, tiny_model, images):
    folder, _ = run(job(tmp_path, tiny_model, images, TWO_STAGES), "seed=1")
    assert not same(final(folder), final(uninterrupted))


def test_each_stage_changes_only_its_component(uninterrupted, tiny_model):
    def weights(folder, component):
        return load_file(next((folder / component).glob("*.safetensors")))

    first_end = uninterrupted / "checkpoints" / "step-00000008"
    last_end = checkpoint.checkpoints(uninterrupted / "checkpoints")[-1]
    assert same(weights(first_end, "text_encoder"), weights(tiny_model, "text_encoder"))
    assert not same(weights(first_end, "unet"), weights(tiny_model, "unet"))
    assert same(weights(last_end, "unet"), weights(first_end, "unet"))
    assert not same(weights(last_end, "text_encoder"), weights(first_end, "text_encoder"))
    for component in ("unet", "text_encoder", "vae"):
        assert same(weights(uninterrupted / "model", component), weights(last_end, component))


def test_accumulation_gives_the_batch_gradient(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet", "text_encoder"]\nuntil = 2\nbatch = 6\noptimizer = "adamw"\nlr = 1e-3\n'
    losses = []
    for micro_batch in (0, 3, 1):
        (tmp_path / str(micro_batch)).mkdir()
        folder, _ = run(job(tmp_path / str(micro_batch), tiny_model, images, stage), f"stage.micro_batch={micro_batch}")
        losses.append([row["loss"] for row in rows_of(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_trains_and_keeps_frozen_weights_exact(tmp_path, tiny_model, images):
    folder, text = run(job(tmp_path, tiny_model, images, UNTIL_6), precision="bf16")
    assert "bf16" in text
    unet = {name: t for name, t in final(folder).items() if name.startswith("unet/")}
    assert all(t.dtype == torch.float32 for t in unet.values())
    # Exact masters use bits that bf16 weights do not have.
    assert any(not torch.equal(t, t.bfloat16().float()) for t in unet.values())
    last, file = checkpoint.checkpoints(folder / "checkpoints")[-1], "text_encoder/model.safetensors"
    assert same(load_file(last / file), load_file(tiny_model / file))
    (tmp_path / "fp32").mkdir()
    reference, _ = run(job(tmp_path / "fp32", tiny_model, images, UNTIL_6), precision="fp32")
    losses, fp32_losses = ([row["loss"] for row in rows_of(root)] for root in (folder, reference))
    assert losses == pytest.approx(fp32_losses, rel=0.03) and losses != fp32_losses


def test_precision_may_change_on_resume(tmp_path, tiny_model, images):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "dlion"\nd0 = 1e-4\ncheckpoint_every = 2\n'
    path = job(tmp_path, tiny_model, images, stage)
    folder, _ = run(path)
    rewind(folder, 2)
    before = load_file(folder / "checkpoints/step-00000002" / UNET)
    _, text = run(path, precision="bf16")
    assert says(text, "key-changed", key="stage.0.precision")
    assert not same(before, load_file(folder / "model" / UNET)) and len(rows_of(folder)) == 4


def test_training_continues_with_a_full_disk(tmp_path, tiny_model, images, monkeypatch):
    path, write = job(tmp_path, tiny_model, images, UNTIL_6), checkpoint.write_safetensors

    def write_until_full(target, *rest):
        if "step-00000004" in str(target):
            target.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(target, *rest)

    monkeypatch.setattr(checkpoint, "write_safetensors", write_until_full)
    folder, text = run(path)
    assert says(text, "checkpoint-not-saved", step=4, reason="No space left on device")
    assert checkpoint_steps(folder) == [2, 6]
    assert all(checkpoint.verify(p) is None for p in checkpoint.checkpoints(folder / "checkpoints"))

    monkeypatch.setattr(checkpoint, "write_safetensors", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with refused("stage-end-not-saved"):
        run(path, f"run={tmp_path / 'other'}")


def test_a_full_disk_at_the_end_loses_nothing(tmp_path, tiny_model, images, monkeypatch):
    """Neither cost.json nor the model can be written. The same command continues."""
    path = job(tmp_path, tiny_model, images, PLAIN + "checkpoint_every = 1\nkeep_checkpoints = 1\ncheckpoint_at = [2]\n")

    def disk_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cost, "replace_file", disk_full)
        patch.setattr(checkpoint, "export", disk_full)
        with refused("model-not-written", strerror="No space left on device"):
            run(path)
    assert checkpoint_steps(tmp_path / "run") == [2, 4]
    folder, text = run(path)
    assert (folder / "model/unet").is_dir() and says(text, "run-resumed", step=4)
    (stage,) = json.loads((folder / "cost.json").read_text())["stages"]
    assert (stage["name"], stage["steps"], stage["images"]) == ("stage-1", 4, 24)


def test_damaged_checkpoints_without_other_copies_are_skipped(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, UNTIL_6)
    folder, _ = run(path)
    before = final(folder)
    weights = folder / "checkpoints/step-00000006" / UNET
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    shutil.rmtree(folder / "model")
    for name in ("manifest.json", "copies.json"):
        (folder / "checkpoints" / "step-00000004" / name).unlink()
    (folder / "checkpoints" / ".tmp-step-00000008").mkdir()
    _, text = run(path)
    assert says(text, "checkpoint-changed", checkpoint="step-00000006", file=UNET)
    assert says(text, "checkpoint-incomplete", checkpoint="step-00000004")
    assert says(text, "run-resumed", step=2)
    assert same(final(folder), before)
    for saved in checkpoint.checkpoints(folder / "checkpoints"):
        for name in ("state.json", "copies.json"):
            (saved / name).unlink()
    with refused("checkpoints-damaged"):
        run(path)


def test_retention_keeps_the_newest_and_the_stage_ends(uninterrupted):
    assert checkpoint_steps(uninterrupted) == [8, 12, 14, 15]


def test_steps_with_gradients_that_are_not_finite_are_skipped(tmp_path, tiny_model, images, monkeypatch):
    stage = '[[stage]]\ntrain = ["unet"]\nuntil = 4\nbatch = 6\noptimizer = "dlion"\ncheckpoint_every = 1\n'
    true_loss, calls = Objective.loss, []

    def nan_in_third_step(self, *args):
        calls.append(1)
        return true_loss(self, *args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(Objective, "loss", nan_in_third_step)
    folder, text = run(job(tmp_path, tiny_model, images, stage))
    before, after = (load_file(folder / f"checkpoints/step-0000000{n}" / UNET) for n in (2, 3))
    assert same(before, after)
    assert says(text, "steps-skipped", count=1, step=3)
    row = rows_of(folder)[2]
    assert row["loss"] is None and row["skipped"] == 1

    monkeypatch.setattr(Objective, "loss", lambda self, *args: true_loss(self, *args) * float("nan"))
    with refused("no-finite-gradient"):
        run(job(tmp_path, tiny_model, images, stage), f"run={tmp_path / 'dead'}")


def test_a_closed_terminal_saves_a_checkpoint(tmp_path, tiny_model, images, start):
    """The terminal is gone before the signal arrives, so all output fails from then on."""
    path = job(tmp_path, tiny_model, images, PLAIN.replace("until = 4", "until = 5000"))
    cache(load_config(path), Console(file=StringIO()))
    terminal, screen = os.openpty()
    process = start(Path(os.ttyname(screen)), "train", str(path))
    os.set_blocking(terminal, False)
    while not (tmp_path / "run" / "log.jsonl").exists() and process.is_alive():
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 4096)
        time.sleep(0.02)
    wait_for_rows(process, tmp_path / "run" / "log.jsonl", 3)
    os.close(terminal)
    os.close(screen)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGHUP)
    process.join(600)
    assert process.exitcode == 130
    step = checkpoint.newest(tmp_path / "run" / "checkpoints")[1].step
    assert step >= 3 and len(rows_of(tmp_path / "run")) == step


def test_signals_request_a_checkpoint_and_a_grid(tmp_path, tiny_model, images, start):
    path, output = job(tmp_path, tiny_model, images, PLAIN.replace("until = 4", "until = 5000")), tmp_path / "output"
    cache(load_config(path), Console(file=StringIO()))
    process = start(output, "train", str(path))
    wait_for_rows(process, tmp_path / "run" / "log.jsonl", 3)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGUSR2)
    expected_folders = [tmp_path / "run" / "checkpoints", tmp_path / "run" / "samples"]
    while process.is_alive() and not all(folder.exists() and list(folder.glob("[!.]*")) for folder in expected_folders):
        time.sleep(0.02)
    wait_for_rows(process, tmp_path / "run" / "log.jsonl", len(rows_of(tmp_path / "run")) + 3)  # the stop has its own step
    os.kill(process.pid, signal.SIGINT)
    process.join(600)
    (on_request, at_stop) = checkpoint.checkpoints(expected_folders[0])
    states = [json.loads((path / "state.json").read_text()) for path in (on_request, at_stop)]
    assert process.exitcode == 130 and [state["keep"] for state in states] == [True, False]
    assert [path.suffix for path in expected_folders[1].iterdir()] == [".png"]


def test_a_stop_without_room_for_the_checkpoint_does_not_claim_one(tmp_path, tiny_model, images, monkeypatch):
    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = job(tmp_path, tiny_model, images, PLAIN)
    monkeypatch.setattr("fastsd.run.loop.stop_signals", stop_requested)
    monkeypatch.setattr(checkpoint, "save", disk_full)
    with refused("stop-not-saved", step=1):
        run(path)


def test_a_cache_that_cannot_be_read_costs_no_step(tmp_path, tiny_model, images, monkeypatch):
    """The disk fails in the third step. The steps before are saved, and the same command ends with the same bits."""
    path = job(tmp_path, tiny_model, images, PLAIN)
    uninterrupted, _ = run(path, f"run={tmp_path / 'other'}")
    batch, failing = Loader.batch, []

    def read(fd, buffers, offset, flags=0, preadv=os.preadv):
        if failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset, flags)

    def load(self, position, count):
        if position == 12:
            failing.append(position)
        return batch(self, position, count)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", load)
        patch.setattr(os, "preadv", read)
        patch.setattr("fastsd.data.loader._WORKERS", 1)
        with refused("row-unreadable", strerror=os.strerror(errno.EIO)):
            run(path)
    assert checkpoint_steps(tmp_path / "run") == [2]
    folder, text = run(path)
    assert says(text, "run-resumed", step=2) and same(final(folder), final(uninterrupted))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_a_checkpoint(number, tmp_path, tiny_model, images, start):
    path, output = job(tmp_path, tiny_model, images, PLAIN.replace("until = 4", "until = 5000")), tmp_path / "output"
    process = start(output, "train", str(path))
    wait_for_rows(process, tmp_path / "run" / "log.jsonl", 3)
    os.kill(process.pid, number)
    process.join(600)
    step = checkpoint.newest(tmp_path / "run" / "checkpoints")[1].step
    assert process.exitcode == 130 and says(output.read_text(), "run-stopped", folder=tmp_path / "run", step=step) and step >= 3


def test_changes_of_fixed_settings_are_refused(uninterrupted, tmp_path, tiny_model, images):
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = job(tmp_path, tiny_model, images, TWO_STAGES)
    for change, name, fields in [
        ("seed=5", "run-other-start", {"key": "seed", "before": 0, "after": 5}),
        ("model.clip_skip=1", "run-other-start", {"key": "model.clip_skip", "before": 0, "after": 1}),
        ("stage.unet.batch=3", "run-other-stage", {"key": "stage.0.batch", "before": 6, "after": 3}),
    ]:
        with refused(name, **fields):
            run(path, change)
    _, text = run(path, "log.every=5")
    assert says(text, "run-resumed", step=15)


def test_removing_the_stage_that_a_run_is_in_is_refused(uninterrupted, tmp_path, tiny_model, images):
    shutil.copytree(uninterrupted, tmp_path / "run")
    rewind(tmp_path / "run", 12)
    first_stage = TWO_STAGES[: TWO_STAGES.rindex("[[stage]]")]
    with refused("run-fewer-stages", folder=tmp_path / "run", current_stage=2, count=1):
        run(job(tmp_path, tiny_model, images, first_stage))


def test_two_trainers_do_not_share_a_run(tmp_path, tiny_model, images):
    from fastsd.run.run import open_run

    config = load_config(job(tmp_path, tiny_model, images, TWO_STAGES))
    cache(config, Console(file=StringIO()))
    with open_run(config, Console(file=StringIO())):
        with refused("run-locked"):
            train(config, Console(file=StringIO()))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused(number, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with refused("run-not-lockable", folder=repr(str(tmp_path)), reason=os.strerror(number)):
        lock(tmp_path)


def test_a_lock_ends_with_its_process_and_not_with_a_child(tmp_path):
    processes, pids = multiprocessing.get_context("fork"), multiprocessing.SimpleQueue()

    def hold():
        with lock(tmp_path):
            os.fork()
            pids.put(os.getpid())
            time.sleep(60)

    trainer = processes.Process(target=hold)
    trainer.start()
    child = next(pid for pid in (pids.get(), pids.get()) if pid != trainer.pid)
    with refused("run-locked", folder=repr(str(tmp_path))):
        lock(tmp_path)
    trainer.kill()
    trainer.join()
    with lock(tmp_path):
        os.kill(child, signal.SIGKILL)
        other = processes.Process(target=lambda: None)  # a child of the process that holds the lock ends
        other.start()
        other.join()
        with refused("run-locked"):
            lock(tmp_path)


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
        step = start_stage(opened, 0, "")
        batch = opened.data.loader(0).batch(0, 6)
        with NoReading():
            for i in range(3):
                opened.advance(step, step(batch, i))


def test_changes_of_the_cache_are_reported(tmp_path, tiny_model, images):
    copies = shutil.copytree(images, tmp_path / "copies")
    path = job(tmp_path, tiny_model, copies, PLAIN)
    folder, text = run(path)
    assert not says(text, "cache-count-changed")
    shutil.copy(copies / "0003.png", copies / "more.png")
    _, text = run(path, "stage.0.until=6")
    assert says(text, "cache-count-changed", before=21, after=22)
    (copies / "more.txt").write_text("another caption")
    _, text = run(path, "stage.0.until=8")
    assert says(text, "cache-content-changed", contents="captions")
    # Keys that an older version did not write get their defaults.
    config = json.loads((folder / "config.json").read_text())
    del config["data"]["crops"], config["stage"][0]["shuffle_tags"], config["cache"]["hidden_states"]
    (folder / "config.json").write_text(json.dumps(config))
    assert says(run(path, "stage.0.until=9")[1], "run-resumed", step=8)


def test_a_run_goes_on_where_its_files_were_moved(uninterrupted, tmp_path, tiny_model, images, monkeypatch):
    """Everything but the run's folder has another place and another spelling, and the data were copied."""
    shutil.copytree(tiny_model, tmp_path / "old" / "base")
    shutil.copytree(images, tmp_path / "old" / "images")
    path = job(tmp_path, tmp_path / "old" / "base", tmp_path / "old" / "images", TWO_STAGES)
    folder, text = run(path, "stage.unet.until=5", "stage.keep_checkpoints=9")
    assert not says(text, "folders-changed")
    rewind(folder, 3)
    (tmp_path / "old" / "base").rename(tmp_path / "new-base")
    shutil.copytree(tmp_path / "old" / "images", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    _, text = run(path, "model.base=new-base/", 'data.folders=["./new"]')
    assert says(text, "model-moved", key="model.base", after="'new-base'")
    assert not says(text, "cache-content-changed") and not says(text, "folders-changed")
    assert same(final(folder), final(uninterrupted))


def test_train_says_that_the_folders_have_changed(tmp_path, tiny_model, images):
    copies = shutil.copytree(images, tmp_path / "copies")
    path = job(tmp_path, tiny_model, copies, PLAIN)
    _, text = run(path)
    assert not says(text, "folders-changed")
    (copies / "0003.png").unlink()
    out = StringIO()
    train(load_config(path, ["stage.0.until=5"]), Console(file=out, width=500))
    assert says(out.getvalue(), "folders-changed", changes="1 missing", names="0003.png")


@pytest.mark.parametrize("cached_text", [False, True])
def test_captions_of_different_numbers_of_chunks_resume_exactly(tmp_path, tiny_model, cached_text):
    """Batches have different numbers of tokens, which micro-batches and a resume do not change."""
    write_images(tmp_path / "images", 9)
    for i, count in enumerate([1, 30, 60, 10, 50, 90, 1, 15, 100]):
        (tmp_path / f"images/{i:04d}.txt").write_text(", ".join(f"red circle {j % 7}" for j in range(count)))
    edits = "" if cached_text else "shuffle_tags = true\ntag_dropout = 0.3\n"
    stage = PLAIN.replace("until = 4", "until = 6").replace("batch = 6", "batch = 2") + f"checkpoint_every = 2\n{edits}"
    stage = stage if cached_text else stage.replace('["unet"]', '["unet", "text_encoder"]')
    path = job(tmp_path, tiny_model, tmp_path / "images", stage)
    keys = ["model.chunks=auto", "model.cut=commas", "validate.held_out=3", f"cache.hidden_states={str(cached_text).lower()}"]
    lengths = set()
    token_ids = Loader._token_ids

    def recorded(*args):
        ids_BL = token_ids(*args)
        lengths.add(ids_BL.shape[1] // 77)
        return ids_BL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "_token_ids", recorded)
        folder, _ = run(path, *keys)
    assert len(lengths) > 1
    uninterrupted, losses = final(folder), [row["loss"] for row in rows_of(folder)]
    rewind(folder, 2)
    run(path, *keys)
    assert same(final(folder), uninterrupted) and [row["loss"] for row in rows_of(folder)] == losses
    other, _ = run(path, *keys, f"run={tmp_path / 'other'}", "stage.0.micro_batch=1")
    assert [row["loss"] for row in rows_of(other)] == pytest.approx(losses, rel=1e-5)


def test_buckets_repeats_and_shuffled_tags_resume_exactly(tmp_path, tiny_model, images):
    """The data has several shapes, mirrored images, a folder with repeats, and edited captions."""
    other = tmp_path / "other"
    other.mkdir()
    for i, size in enumerate([(60, 40), (40, 60), (64, 40), (40, 64), (50, 50)]):
        Image.effect_noise(size, 60).convert("RGB").save(other / f"{i}.png")
        (other / f"{i}.txt").write_text(f"one, two, three\nvariant, {i}")
    tags = "shuffle_tags = true\nkeep_tags = 1\ntag_dropout = 0.3\ncheckpoint_every = 2\n"
    path = job(tmp_path, tiny_model, images, PLAIN.replace("until = 4", 'until = "2e"') + tags)
    keys = [f'data.folders=["{images}", {{ path = "{other}", repeats = 3 }}]', f'cache.dir="{tmp_path / "cache"}"']
    keys += ["data.resolution=32", "data.flip=true", "data.buckets={ min = 16, max = 64, step = 8 }"]
    folder, text = run(path, *keys)
    assert says(text, "images-counted", images=26, resolution=32, sizes=" in 3 sizes", epoch=36)
    assert says(text, "stage-length", steps=12)
    uninterrupted = final(folder)
    for step in (2, 6, 10):
        shutil.rmtree(folder / "model")
        rewind(folder, step)
        run(path, *keys)
        assert same(final(folder), uninterrupted)
