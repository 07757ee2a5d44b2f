"""Checkpoints as files: which one is resumed from, which ones are damaged, and which ones are deleted."""

import errno
import json
import os
import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sentences import refused, says

from fastsd.data.validation_split import ValidationSplits
from fastsd.run import checkpoint, restore
from fastsd.run.checkpoint import RunProgress, averages_of, checkpoints, name_of, newest, retain, verify
from fastsd.run.saving import Saving
from fastsd.storage import new_folder, write_safetensors
from fastsd.train.step import Step


def commit(folder, step, **state):
    """Write a checkpoint without a model."""
    path = folder / name_of(step)
    path.mkdir(parents=True)
    (path / "weights").write_text(f"weights {step}")
    (path / "state.json").write_text(json.dumps({"fastsd": "0.1", "step": step, "micro": 2, "micro_asked": "auto", **state}))
    digests = {name: sha256((path / name).read_bytes()).hexdigest() for name in ("weights", "state.json")}
    (path / "manifest.json").write_text(json.dumps(digests))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_checkpoint_has_its_progress(tmp_path):
    assert newest(tmp_path) is None
    for step in (2, 10, 9):
        commit(tmp_path, step, stage=1, images=40, seconds=1.5)
    (tmp_path / ".tmp-step-00000011").mkdir()
    (tmp_path / "step-12").mkdir()
    path, progress, warnings = newest(tmp_path)
    assert path.name == "step-00000010" and checkpoints(tmp_path)[-1] == path and warnings == []
    assert progress == RunProgress(stage=1, step=10, images=40, seconds=1.5, micro_batch_size=2, micro_batch_setting="auto")
    assert names(tmp_path) == ["step-00000002", "step-00000009", "step-00000010", "step-12"]


DAMAGE = {
    "is missing or unreadable": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").write_text("{"),
    "weights is missing": lambda path: (path / "weights").unlink(),
    "weights does not match its sha256": lambda path: (path / "weights").write_text("other"),
    "weights cannot be read: Is a directory": lambda path: ((path / "weights").unlink(), (path / "weights").mkdir()),
    "manifest.json is missing or unreadable": lambda path: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_damaged_checkpoints_are_set_aside_again_and_again(problem, tmp_path):
    good = commit(tmp_path, 2)
    for _ in range(2):
        for step in (4, 6):
            DAMAGE[problem](commit(tmp_path, step))
        assert problem in verify(tmp_path / name_of(6)) and verify(good) is None
        path, _, warnings = newest(tmp_path)
        assert path == good
        assert [text.split()[1] for text in warnings] == [name_of(6), name_of(4)] and all(problem in text for text in warnings)
        assert names(tmp_path) == [f"damaged-{name_of(4)}", f"damaged-{name_of(6)}", name_of(2)]
    path, _, warnings = newest(tmp_path)
    assert path == good and warnings == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_damaged(number, tmp_path, monkeypatch):
    def failing(path, sha256_of=restore.sha256_of):
        if path.parent.name == name_of(4):
            raise OSError(number, os.strerror(number))
        return sha256_of(path)

    good, path = commit(tmp_path, 2), commit(tmp_path, 4)
    monkeypatch.setattr(restore, "sha256_of", failing)
    chosen, _, (warning,) = newest(tmp_path)
    assert chosen == good and f"weights cannot be read: {os.strerror(number)}" in warning and not path.exists()


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_one_sentence(tmp_path, monkeypatch):
    """Later checkpoints would link to its files."""
    commit(tmp_path, 2)
    DAMAGE["weights is missing"](commit(tmp_path, 4))
    monkeypatch.setattr(Path, "rename", lambda path, target: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with refused("checkpoint-stuck", path=tmp_path / name_of(4), strerror="read-only"):
        newest(tmp_path)


def test_if_all_checkpoints_are_damaged_they_stay(tmp_path):
    for step in (2, 4):
        DAMAGE["weights is missing"](commit(tmp_path, step))
    with refused("checkpoints-damaged", count=2):
        newest(tmp_path)
    assert names(tmp_path) == [name_of(2), name_of(4)]


def test_an_older_damaged_checkpoint_is_left_alone(tmp_path):
    DAMAGE["weights is missing"](commit(tmp_path, 2))
    good = commit(tmp_path, 4)
    path, _, warnings = newest(tmp_path)
    assert path == good and warnings == [] and names(tmp_path) == [name_of(2), name_of(4)]


def test_retention_counts_from_the_newest_and_spares_the_kept(tmp_path):
    for step in range(1, 7):
        commit(tmp_path, step, keep=step == 3)
    retain(tmp_path, 2, {name_of(1), name_of(6)})
    assert names(tmp_path) == [name_of(step) for step in (1, 3, 5, 6)]


def test_retention_after_a_kill_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    for step in range(1, 4):
        commit(tmp_path, step)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            retain(tmp_path, 1, set())
    assert [path.name for path in checkpoints(tmp_path)] == [name_of(2), name_of(3)]
    assert newest(tmp_path)[0].name == name_of(3) and names(tmp_path) == [name_of(2), name_of(3)]


def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch):
    """A run saves a step again if the disk fails in its first step after a start."""
    commit(tmp_path, 4)
    rename, rmtree, killed = Path.rename, shutil.rmtree, []

    def dying(path, target):
        if path.name == f".tmp-{name_of(4)}":
            killed.append(path)
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", dying)
        patch.setattr(shutil, "rmtree", lambda *args, **options: killed or rmtree(*args, **options))
        with new_folder(tmp_path / name_of(4)):
            patch.setattr(Path, "exists", lambda path: not killed and os.path.exists(path))  # nothing happens after a kill
    assert killed and sorted(os.listdir(tmp_path)) == [f".tmp-old-{name_of(4)}", f".tmp-{name_of(4)}"]
    assert newest(tmp_path)[0].name == name_of(4) and names(tmp_path) == [name_of(4)]


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for step in (100_000_000, 99_999_999):
        commit(tmp_path, step)
    assert newest(tmp_path)[0].name == "step-100000000"


def test_averages_are_found_by_component(tmp_path):
    assert averages_of(tmp_path) == {}  # a model without training state
    tensors = {"unet@ema-0.1/a.b": torch.ones(2), "unet@ema-0.1/c": torch.zeros(1), "text_encoder@ema-0.1/a": torch.ones(3)}
    tensors |= {
        "unet@ema-0.05/c": torch.ones(1),
        "unet|d": torch.ones(1),
        "loss": torch.ones(1),
        "ema-0.1@steps": torch.ones(1),
    }
    write_safetensors(tmp_path / checkpoint.TENSORS, tensors)
    by_name = averages_of(tmp_path)
    assert list(by_name) == ["ema-0.05", "ema-0.1"] and torch.equal(by_name["ema-0.05"]["unet"]["c"], torch.ones(1))
    averages = by_name["ema-0.1"]
    assert {name: set(values) for name, values in averages.items()} == {"unet": {"a.b", "c"}, "text_encoder": {"a"}}
    assert torch.equal(averages["unet"]["c"], torch.zeros(1))


class Run:
    """A stand-in for a run of three stages, of which the last carries state on. It records what is saved."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.calls, self.saved, self.retained, self.kept = folder, [], [], [], []
        stages = [SimpleNamespace(state=state) for state in ("reset", "reset", "carry")]
        config = SimpleNamespace(run=str(folder), stage=stages)
        monkeypatch.setattr("fastsd.run.saving.dump_config", lambda config: "the config")
        self.position = SimpleNamespace(progress=RunProgress())
        smoothed = SimpleNamespace(state_dict=lambda: {"loss": torch.zeros(1)})
        health = SimpleNamespace(state_dict=dict, problem=lambda: None)
        report = SimpleNamespace(
            flush=lambda: self.calls.append("flush"),
            digests=dict,
            saved=lambda: self.calls.append("saved"),
            console=SimpleNamespace(warn=self.calls.append),
        )
        cost = SimpleNamespace(
            record=lambda progress, console: self.calls.append(f"cost {progress.costs}"),
            of_complete_stage=lambda progress: [f"of step {progress.step}"],
        )
        component = SimpleNamespace(
            ema_state=lambda: {"ema/w": torch.ones(1)},
            state=lambda *kind: {"w": torch.ones(2)},
            collect_lows=lambda: None,
            collect_averages=lambda: None,
            names=[],
        )
        self.step = SimpleNamespace(
            components={"unet": component},
            optimizers={},
            skipped=torch.zeros(1),
            powers=None,
            sharded=False,
            stage=SimpleNamespace(keep_checkpoints=2),
        )
        self.step.state_dict, self.step.average_state = (partial(f, self.step) for f in (Step.state_dict, Step.average_state))
        monkeypatch.setattr(checkpoint, "save", self.save_files)
        monkeypatch.setattr(checkpoint, "retain", lambda *arguments: self.retained.append(arguments[1:]))
        monkeypatch.setattr(checkpoint, "load_state", lambda path: {"from": path.name})
        sets = ValidationSplits({}, np.empty(0), {})
        self.saving = Saving(config, SimpleNamespace(lora=None), self.position, smoothed, health, report, cost, {}, sets)
        self.saving.changed = {"unet"}

    def save_files(self, folder, progress, model, weights, changed, state, adapters, *, config, keep):
        assert config == "the config"
        self.saved.append((set(weights), set(changed), set(state), adapters))
        self.kept += [progress.step] if keep else []
        return folder / name_of(progress.step)

    def save(self, stage, step, *, done=False, keep=False):
        """Return True if the step is saved."""
        self.calls.clear()
        self.position.progress = RunProgress(stage=stage, step=step, stage_done=done)
        self.saving.save(self.step, keep=keep)
        return self.saving.is_saved


def test_a_checkpoint_in_a_stage_has_all_state_and_may_be_deleted(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    assert run.save(0, 3)
    assert run.calls == ["flush", "saved"] and run.kept == [] and run.saving.changed == set()
    assert run.saved == [({"unet", "text_encoder"}, {"unet"}, {"loss", "skipped", "unet@ema/w"}, None)]
    assert run.retained == [(2, set())] and run.saving.state == {}


def test_requested_checkpoints_are_kept_and_the_next_stage_finds_its_state(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    assert run.save(0, 3, keep=True) and run.kept == [3] and not any("cost" in call for call in run.calls)
    assert run.save(0, 5, done=True)
    assert run.calls == ["flush", "saved", "cost ['of step 5']"]
    assert run.saved[-1][2] == {"loss", "unet@ema/w"} and run.saving.state == {}  # the next stage starts afresh
    assert run.save(1, 7, done=True)
    assert "skipped" in run.saved[-1][2] and run.saving.state == {"from": name_of(7)}  # the next stage carries it on
    assert run.save(2, 9, done=True)
    assert "skipped" in run.saved[-1][2] and run.saving.state == {"from": name_of(7)}  # the last stage may be extended
    assert run.kept == [3] and run.retained[-1] == (2, set())


def test_state_that_changes_with_the_next_step_is_copied_for_the_thread(tmp_path, monkeypatch):
    """With sharded state, only what was gathered for the checkpoint is written as it is."""
    state = {
        "unet|m/w": torch.zeros(2),
        "unet@ema-0.1/w": torch.zeros(2),
        "unet|d": torch.zeros(()),
        "skipped": torch.zeros(()),
    }
    state |= {"ema-0.1@steps": torch.zeros(3)[1]}
    commit(tmp_path / "checkpoints", 1)
    run, written = Run(tmp_path, monkeypatch), []
    run.saving.changed, run.step.sharded, run.step.state_dict = set(), True, lambda **_: state
    monkeypatch.setattr(checkpoint, "save", lambda *args, **_: written.append(args[5]) or args[0] / name_of(args[1].step))
    assert run.save(0, 3)
    shared = {name for name, tensor in state.items() if written[0][name].data_ptr() == tensor.data_ptr()}
    assert shared == {"unet|m/w", "unet@ema-0.1/w"}


@pytest.mark.parametrize("damage", [b"", b"{", b"null", b"[1]", b"\xff"])
def test_checkpoints_that_an_older_version_kept_stay(damage, tmp_path, monkeypatch):
    for file, step in (("stage-ends.json", 1), ("kept.json", 3)):
        (tmp_path / file).write_text(json.dumps([name_of(step)]))
    assert Run(tmp_path, monkeypatch).saving.kept == {name_of(1), name_of(3)}
    (tmp_path / "kept.json").write_bytes(damage)
    assert Run(tmp_path, monkeypatch).saving.kept == {name_of(1)}


def test_a_checkpoint_that_cannot_be_written_is_reported_and_tried_again(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "disk full")

    run = Run(tmp_path, monkeypatch)
    monkeypatch.setattr(checkpoint, "save", full)
    assert not run.save(0, 3, keep=True)
    assert says(run.calls[-1], "checkpoint-not-saved", step=3, reason="disk full", folder=tmp_path / "checkpoints")
    assert run.saving.changed == {"unet"} and run.saving.kept == set() and not run.retained


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_training(tmp_path, monkeypatch):
    def denied(*arguments, **options):
        raise PermissionError

    for step in (1, 2):
        commit(tmp_path, step)
    monkeypatch.setattr(os, "rmdir", denied)
    monkeypatch.setattr(os, "rename", denied)
    retain(tmp_path, 1, set())
    assert names(tmp_path) == [name_of(1), name_of(2)]
