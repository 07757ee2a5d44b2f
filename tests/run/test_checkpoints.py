"""Checkpoints as files: which one is resumed from, which ones are damaged, and which ones are deleted."""

import json
from hashlib import sha256

import pytest
import torch
from sentences import refused

from fastsd.run import checkpoint
from fastsd.run.checkpoint import RunProgress, averages_of, checkpoints, name_of, newest, retain, verify
from fastsd.storage import write_safetensors


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
    assert newest(tmp_path, pytest.fail) is None
    for step in (2, 10, 9):
        commit(tmp_path, step, stage=1, images=40, seconds=1.5)
    (tmp_path / ".tmp-step-00000011").mkdir()
    (tmp_path / "step-12").mkdir()
    path, progress = newest(tmp_path, pytest.fail)
    assert path.name == "step-00000010" and checkpoints(tmp_path)[-1] == path
    assert progress == RunProgress(stage=1, step=10, images=40, seconds=1.5, micro_batch_size=2, micro_batch_setting="auto")
    assert names(tmp_path) == ["step-00000002", "step-00000009", "step-00000010", "step-12"]


DAMAGE = {
    "is missing or unreadable": lambda path: (path / "manifest.json").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").write_text("{"),
    "weights is missing": lambda path: (path / "weights").unlink(),
    "weights does not match its sha256": lambda path: (path / "weights").write_text("other"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_damaged_checkpoints_are_set_aside_again_and_again(problem, tmp_path):
    good = commit(tmp_path, 2)
    for _ in range(2):
        warnings = []
        for step in (4, 6):
            DAMAGE[problem](commit(tmp_path, step))
        assert problem in verify(tmp_path / name_of(6)) and verify(good) is None
        assert newest(tmp_path, warnings.append)[0] == good
        assert [text.split()[1] for text in warnings] == [name_of(6), name_of(4)] and all(problem in text for text in warnings)
        assert names(tmp_path) == [f"damaged-{name_of(4)}", f"damaged-{name_of(6)}", name_of(2)]
    assert newest(tmp_path, pytest.fail)[0] == good


def test_if_all_checkpoints_are_damaged_they_stay(tmp_path):
    for step in (2, 4):
        DAMAGE["weights is missing"](commit(tmp_path, step))
    with refused("checkpoints-damaged", count=2):
        newest(tmp_path, lambda text: None)
    assert names(tmp_path) == [name_of(2), name_of(4)]


def test_an_older_damaged_checkpoint_is_left_alone(tmp_path):
    DAMAGE["weights is missing"](commit(tmp_path, 2))
    commit(tmp_path, 4)
    assert newest(tmp_path, pytest.fail)[0].name == name_of(4) and names(tmp_path) == [name_of(2), name_of(4)]


def test_retention_counts_from_the_newest_and_spares_the_kept(tmp_path):
    for step in range(1, 7):
        commit(tmp_path, step)
    retain(tmp_path, 2, {name_of(1), name_of(3), name_of(6)})
    assert names(tmp_path) == [name_of(step) for step in (1, 3, 5, 6)]


def test_averages_are_found_by_component(tmp_path):
    assert averages_of(tmp_path) == {}  # a model without training state
    tensors = {"unet@ema/a.b": torch.ones(2), "unet@ema/c": torch.zeros(1), "text_encoder@ema/a": torch.ones(3)}
    write_safetensors(tmp_path / checkpoint.TENSORS, tensors | {"unet|d": torch.ones(1), "loss": torch.ones(1)})
    averages = averages_of(tmp_path)
    assert {name: set(values) for name, values in averages.items()} == {"unet": {"a.b", "c"}, "text_encoder": {"a"}}
    assert torch.equal(averages["unet"]["c"], torch.zeros(1))
