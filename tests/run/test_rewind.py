"""Going back in a run: what was recorded later is set aside, and a kill or a full disk at any moment loses nothing."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from runs import rows_of
from sentences import refused

from fastsd.run.checkpoint import name_of
from fastsd.run.rewind import finish_setting_aside, set_aside

ROWS = ("log.jsonl", "timing.jsonl", "validation.jsonl")
DAMAGED_LINE = b'{"step": 6, "lo\n'


@pytest.fixture
def folder(tmp_path):
    """A run's folder with checkpoints at 2, 4, 6 and 8, rows of eight steps, and an export of the last one."""
    run = tmp_path / "run"
    for step in (2, 4, 6, 8):
        (run / "checkpoints" / name_of(step)).mkdir(parents=True)
        (run / "checkpoints" / name_of(step) / "weights").write_text(f"weights {step}")
        for name in (f"samples/unet-{step:08d}.png", f"profiles/{name_of(step)}.json"):
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_text(f"of step {step}")
    for name in ROWS:
        (run / name).write_text("".join(json.dumps({"step": step, "file": name}) + "\n" for step in range(9)))
    with open(run / "log.jsonl", "ab") as file:
        file.write(DAMAGED_LINE + b'\xff\nnull\n{"step": 9}')
    for name in ("model", "model-ema"):
        (run / name).mkdir()
        (run / name / "fastsd.json").write_text('{"steps": 8}')
        (run / f"{name}.safetensors").write_text("in one file")
    (run / "config.json").write_text('{"seed": 1}')
    (run / "cost.json").write_text('{"stages": []}')
    (run / "lock").touch()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps(folder: Path, name: str) -> list[int]:
    return [row["step"] for row in rows_of(folder, name)]


def test_later_rows_checkpoints_grids_and_exports_are_moved(folder):
    (folder / ".tmp-health.jsonl").write_text('{"step": 7}\n')  # of a process that was killed
    before = contents(folder)
    moved = set_aside(folder, 4)
    assert moved == folder / "set-aside-1" and not (folder / "setting-aside.json").exists()
    for name in ROWS:
        assert steps(moved, name) == [5, 6, 7, 8]
        assert all(row["file"] == name for row in rows_of(moved, name))
    assert steps(folder, "timing.jsonl") == [0, 1, 2, 3, 4]
    assert (folder / "log.jsonl").read_bytes().endswith(DAMAGED_LINE + b'\xff\nnull\n{"step": 9}')
    after = contents(folder)
    later = [f"checkpoints/{name_of(step)}/weights" for step in (6, 8)]
    later += [f"samples/unet-{step:08d}.png" for step in (6, 8)] + [f"profiles/{name_of(step)}.json" for step in (6, 8)]
    later += ["model/fastsd.json", "model.safetensors", "model-ema/fastsd.json", "model-ema.safetensors"]
    for name, content in before.items():
        if name in later:
            assert name not in after and after[f"set-aside-1/{name}"] == content
        elif name not in ROWS:
            assert after[name] == content
    assert after["set-aside-1/config.json"] == before["config.json"]
    assert after["set-aside-1/cost.json"] == before["cost.json"]
    assert len(after) == len(before) + len(ROWS) + 2


def test_an_export_of_earlier_weights_stays(folder):
    (folder / "model/fastsd.json").write_text('{"steps": 4}')
    moved = set_aside(folder, 4)
    assert (folder / "model-ema.safetensors").exists() and not (moved / "model").exists()
    (folder / "model/fastsd.json").unlink()  # nobody knows which weights it has
    assert (set_aside(folder, 4) / "model.safetensors").exists() and not (folder / "model").exists()


def test_each_call_has_a_folder_and_nothing_later_needs_none(folder):
    assert set_aside(folder, 8) is None and not list(folder.glob("set-aside*"))
    assert [set_aside(folder, step).name for step in (6, 4)] == ["set-aside-1", "set-aside-2"]
    assert steps(folder / "set-aside-1", "log.jsonl") == [7, 8] and steps(folder / "set-aside-2", "log.jsonl") == [5, 6]
    assert set_aside(folder, 4) is None
    shutil.rmtree(folder / "set-aside-1")
    (folder / "log.jsonl").write_text('{"step": 5}\n')  # rows alone, written before the first later checkpoint
    assert set_aside(folder, 4).name == "set-aside-3"


CALLS = ("rename", "replace", "unlink", "fsync", "mkdir")


def disturbed(patch, number: int, error: BaseException, *, after: bool) -> list[int]:
    """Let the call with this number raise an error instead of, or after, its work. Return the list of calls."""
    calls = list[int]()

    def wrap(call):
        def wrapped(*args, **options):
            calls.append(len(calls))
            if calls[-1] != number:
                return call(*args, **options)
            if after:
                call(*args, **options)
            raise error

        return wrapped

    for name in CALLS:
        patch.setattr(os, name, wrap(getattr(os, name)))
    return calls


def whole(folder: Path, before: dict[str, bytes]) -> None:
    """Check that every row and file of `before` is in the run or set aside, and that the run's checkpoints have no gap."""
    rows = {line for path in folder.rglob("[!.]*.jsonl") for line in path.read_bytes().splitlines()}
    files = [content for name, content in contents(folder).items() if ".tmp-" not in name]
    for name, content in before.items():
        assert (set(content.splitlines()) <= rows) if name in ROWS else content in files, name
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) in [
        [name_of(step) for step in (2, 4, 6, 8)[:count]] for count in (2, 3, 4)
    ]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("error", "after"), [(KeyboardInterrupt(), False), (KeyboardInterrupt(), True), (FULL, False)])
def test_a_kill_or_a_full_disk_at_any_moment_loses_nothing(error, after, folder, monkeypatch):
    before, tried, number = contents(folder), folder.with_name("undisturbed"), 0
    shutil.copytree(folder, tried)
    set_aside(tried, 4)
    undisturbed = contents(tried)
    while True:
        shutil.rmtree(tried)
        shutil.copytree(folder, tried)
        with monkeypatch.context() as patch:
            calls = disturbed(patch, number, error, after=after)
            try:
                set_aside(tried, 4)
            except KeyboardInterrupt:
                pass
            except Exception as caught:
                with refused("not-set-aside", folder=tried, strerror="No space left on device"):
                    raise caught
        if len(calls) <= number:
            break
        whole(tried, before)
        interrupted = (tried / "setting-aside.json").exists()
        with monkeypatch.context() as patch:  # a kill in the second attempt
            disturbed(patch, number % 7, KeyboardInterrupt(), after=after)
            try:
                finish_setting_aside(tried)
            except KeyboardInterrupt:
                whole(tried, before)
        finish_setting_aside(tried)
        assert contents(tried) == (undisturbed if interrupted or (tried / "set-aside-1").exists() else before)
        assert finish_setting_aside(tried) is None
        number += 1
    assert number > 60, number


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "4", "folder": "set-aside-1"}', '{"step": 4}'])
def test_a_damaged_journal_is_removed(content, folder):
    before = contents(folder)
    (folder / "setting-aside.json").write_text(content)
    assert finish_setting_aside(folder) is None and contents(folder) == before


def test_setting_aside_reaches_the_disk_before_the_journal_is_removed(folder, disk):
    set_aside(folder, 6)
    calls = disk()
    assert calls.index("-> setting-aside.json") < calls.index("set-aside-1") and calls[-1] == "run"
    copied = calls.index("-> log.jsonl")
    removed = calls.index("-> log.jsonl", copied + 1)
    moved = calls.index(f"-> {name_of(8)}")
    assert calls[copied + 1] == "set-aside-1" and calls[removed + 1] == "run"
    assert calls[moved + 1 : moved + 3] == ["checkpoints", "checkpoints"]
