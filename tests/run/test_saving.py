"""Checkpoints are written while training goes on. They hold what the step left, whatever later steps do."""

import errno
import os
from threading import Event, get_ident

import pytest
from runs import checkpoint_steps, final, run, same
from safetensors.torch import load_file
from sentences import says
from tiny import job

from fastsd.run import checkpoint, saving
from fastsd.train.memory import main_memory
from fastsd.train.step import Step

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 6\nbatch = 4\noptimizer = "lion"\nlr = 1e-3\ncheckpoint_every = 2\n'
KINDS = {
    "fp32": (),
    "bf16 with EMA": ('stage.0.precision="bf16"', "stage.0.ema=0.5", 'stage.0.optimizer="dlion"', "stage.0.lr=1.0"),
    "text encoder": ('stage.0.train=["text_encoder"]', 'stage.0.precision="bf16"', 'stage.0.optimizer="adamw"'),
    "some layers": ('stage.0.train=["unet.conv_in.*"]', 'stage.0.precision="bf16"'),
    "adapters": ('stage.0.train=["lora"]', "model.lora.rank=2", "stage.0.ema={sigma_rel=[0.1, 0.2]}"),
}


@pytest.fixture
def path(tmp_path, tiny_model, images):
    return job(tmp_path, tiny_model, images, STAGE)


def tensors(folder, step):
    """Read all tensors of a checkpoint."""
    path = folder / "checkpoints" / checkpoint.name_of(step)
    files = sorted(path.rglob("*.safetensors"))
    return {f"{file.relative_to(path)}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_while_a_checkpoint_is_written(kind, path, tmp_path, monkeypatch):
    """The checkpoint of step 4 waits for step 5. It holds the bits of a run in which training waits."""
    with monkeypatch.context() as patch:
        patch.setattr(saving, "main_memory", lambda: 0)
        waiting, text = run(path, f"run={tmp_path / 'waiting'}", *KINDS[kind])
        assert says(text, "checkpoint-waits", free="0.0 MiB") and text.count("training waits") == 1
    save, step, trained, threads = checkpoint.save, Step.__call__, Event(), {}

    def save_later(folder, progress, *args, **options):
        threads[progress.step] = get_ident()
        assert progress.step != 4 or trained.wait(60)
        return save(folder, progress, *args, **options)

    def train_step(self, batch, number):
        result = step(self, batch, number)
        if number == 4:
            trained.set()
        return result

    monkeypatch.setattr(checkpoint, "save", save_later)
    monkeypatch.setattr(Step, "__call__", train_step)
    folder, text = run(path, *KINDS[kind])
    assert "training waits" not in text
    assert threads[2] == threads[6] == get_ident() != threads[4]  # the first and the last are waited for
    assert checkpoint_steps(folder) == checkpoint_steps(waiting) == [2, 4, 6]
    for number in (2, 4, 6):
        assert same(tensors(folder, number), tensors(waiting, number))


def test_a_checkpoint_that_fails_in_the_background_costs_only_itself(path, tmp_path, monkeypatch):
    undisturbed, _ = run(path, f"run={tmp_path / 'undisturbed'}", "stage.0.checkpoint_at=[5]", "stage.0.until=8")
    save = checkpoint.save

    def full(folder, progress, *args, **options):
        if progress.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(folder, progress, *args, **options)

    monkeypatch.setattr(checkpoint, "save", full)
    folder, text = run(path, "stage.0.checkpoint_at=[5]", "stage.0.until=8")
    assert says(text, "checkpoint-not-saved", step=4, reason=os.strerror(errno.ENOSPC), folder=folder / "checkpoints")
    assert checkpoint_steps(folder) == [5, 6, 8] and same(final(folder), final(undisturbed))


def test_a_bug_in_the_background_ends_the_run(path, monkeypatch):
    save = checkpoint.save

    def broken(folder, progress, *args, **options):
        assert progress.step != 4, "a bug"
        return save(folder, progress, *args, **options)

    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(AssertionError, match="a bug"):
        run(path)


def test_a_run_that_ends_with_an_error_finishes_its_checkpoint(path, tmp_path, monkeypatch):
    step = Step.__call__

    def failing(self, batch, number):
        if number == 4:
            raise ZeroDivisionError
        return step(self, batch, number)

    monkeypatch.setattr(Step, "__call__", failing)
    with pytest.raises(ZeroDivisionError):
        run(path)
    assert checkpoint_steps(tmp_path / "run") == [2, 4]
    assert checkpoint.verify(tmp_path / "run/checkpoints" / checkpoint.name_of(4)) is None


def test_the_limit_of_a_container_counts(tmp_path):
    free = main_memory(tmp_path)
    assert free > 0  # no container
    for name, text in (
        ("memory.max", "9000000"),
        ("memory.current", "5000000"),
        ("memory.stat", "anon 1\ninactive_file 250000\n"),
    ):
        (tmp_path / name).write_text(text)
    assert main_memory(tmp_path) == 4_250_000
    (tmp_path / "memory.current").write_text("9900000")
    assert main_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert main_memory(tmp_path) > 4_250_000
