"""`fastsd train --from`, and stages that end earlier than they stand."""

import errno
import json
import math
import os
import shutil
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from commandline import fastsd
from runs import checkpoint_steps, final, rewind, rows_of, run, same
from sentences import refused, says
from tiny import job

from fastsd.commands.cache import cache
from fastsd.compare.runs import read_runs
from fastsd.config.schema import load_config
from fastsd.model.formats.model_summary import read_summary
from fastsd.run import cost
from fastsd.run.checkpoint import name_of
from fastsd.run.loop import train
from fastsd.run.restore import read_manifest, write_manifest
from fastsd.run.run import open_run
from fastsd.storage import write_text
from fastsd.terminal.console import Console

STAGE = """
[[stage]]
name = "one"
train = ["unet.mid"]
until = 6
batch = 4
optimizer = "lion"
lr = 1e-3
checkpoint_every = 2
keep_checkpoints = 9
"""
CARRIED = STAGE + STAGE.replace('"one"', '"two"').replace("until = 6", 'until = 4\nstate = "carry"')
RESET = CARRIED.replace('"carry"', '"reset"')
KEYS = ["validate.stabilised=2", "validate.every=2", "validate.bands=1", "sample.prompts=[]", "export.single_file=false"]
LOGS = ("log.jsonl", "validation.jsonl")


def back_to(step: int) -> str:
    """Return the end of a message that names the command that goes back to a checkpoint."""
    return f"go back with `fastsd train CONFIG --from {name_of(step)}`"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, images):
    """Configs of complete runs by name."""
    paths = {"one": STAGE, "carried": CARRIED, "reset": RESET}
    for name, stages in paths.items():
        paths[name] = job(tmp_path_factory.mktemp(name), tiny_model, images, stages)
        run(paths[name], *KEYS)
    return paths


@pytest.fixture
def copy_of(finished, tmp_path):
    """Return a function that copies a complete run, and returns the copy's folder and a function that starts it again."""

    def copy(name, folder="run"):
        shutil.copytree(finished[name].parent / "run", tmp_path / folder)

        def start(*overrides, back=""):
            out = StringIO()
            config = load_config(finished[name], [*KEYS, f"run={tmp_path / folder}", *overrides])
            train(config, Console(file=out, width=500), start=back)
            return out.getvalue()

        return tmp_path / folder, start

    return copy


def stage_costs(folder):
    return json.loads((folder / "cost.json").read_text())["stages"]


def until(rows, step):
    return [row for row in rows if row["step"] <= step]


@pytest.mark.parametrize("name", ["step-00000004", "4"])
def test_going_back_trains_what_a_resumed_run_trains(name, copy_of):
    """The later steps lie in a folder that is a run as well, and the new ones are those of a run that never had them."""
    (before, _), (folder, start), (resumed, resume) = (copy_of("one", name) for name in ("before", "run", "resumed"))
    aside = folder / "set-aside-1"
    text = start("stage.lr=5e-4", back=name)
    later = f"all that followed is in {aside}, which you can delete"
    assert says(text, "went-back", name="step-00000004", later=later) and says(text, "key-changed", key="stage.0.lr")
    rewind(resumed, 4)
    resume("stage.lr=5e-4")
    assert checkpoint_steps(folder) == [2, 4, 6] and checkpoint_steps(aside) == [6]
    assert same(final(folder), final(resumed)) and same(final(aside), final(before))
    for log in LOGS:
        assert (folder / log).read_bytes() == (resumed / log).read_bytes()
        assert [*until(rows_of(before, log), 4), *rows_of(aside, log)] == rows_of(before, log)
    assert (aside / "model/fastsd.json").read_bytes() == (before / "model/fastsd.json").read_bytes()
    current, set_aside = read_runs([folder, aside])  # a report shows each once
    assert [row["step"] for row in current.log] == [1, 2, 3, 4, 5, 6] and [row["step"] for row in set_aside.log] == [5, 6]
    assert (current.config.stage[0].lr, set_aside.config.stage[0].lr) == (5e-4, 1e-3)
    assert not says(start(back="2"), "key-changed")  # compared with that checkpoint, not with the last start


def test_a_repeated_command_goes_back_only_if_that_would_train_other_steps(copy_of):
    folder, start = copy_of("one")
    start("stage.lr=5e-4", back="2")
    (folder / "checkpoints/step-00000002").rename(folder / "deleted")  # retention deletes it in time
    weights = final(folder)
    for overrides in ((), ("stage.checkpoint_every=1",), ("stage.until=8",), ("log.every=2", "stage.until=8")):
        text = start("stage.lr=5e-4", *overrides, back="2")
        newest = "step-00000008" if "log.every=2" in overrides else "step-00000006"
        assert says(text, "went-back-before", name="2", newest=newest, record=folder / "went-back.json")
        assert not (folder / "set-aside-2").exists()
    assert checkpoint_steps(folder) == [4, 6, 8] and not same(final(folder), weights)
    (folder / "deleted").rename(folder / "checkpoints/step-00000002")
    for n, overrides in enumerate(
        [["lr=1e-4"], ["lr=1e-4", "until=3"], ["lr=1e-4", "until=3", "schedule=cosine"], ["lr=1e-4", "schedule=cosine"]], 2
    ):
        assert says(start(*(f"stage.{word}" for word in overrides), back="2"), "went-back"), overrides
        assert (folder / f"set-aside-{n}").exists()
    text = start("stage.lr=1e-4", "stage.schedule=cosine", back="step-00000004")
    assert says(text, "went-back", name="step-00000004")
    (folder / "went-back.json").unlink()
    assert says(start("stage.lr=1e-4", "stage.schedule=cosine", back="4"), "went-back")


def test_going_back_to_the_newest_checkpoint_counts_as_well(copy_of):
    folder, start = copy_of("one")
    assert says(start("stage.until=8", back="6"), "went-back", name="step-00000006", later="nothing followed")
    assert says(start("stage.until=10", back="6"), "went-back-before", newest="step-00000008")
    assert checkpoint_steps(folder) == [2, 4, 6, 8, 10] and not (folder / "set-aside-1").exists()


def test_settings_of_a_stage_that_has_not_begun_do_not_count(copy_of):
    folder, start = copy_of("carried")
    start("stage.one.lr=5e-4", back="2")
    rewind(folder, 4)
    text = start("stage.one.lr=5e-4", "stage.two.lr=1e-4", back="2")
    assert says(text, "went-back-before", newest="step-00000004") and checkpoint_steps(folder)[-1] == 10


def test_a_killed_going_back_is_finished_by_any_start(copy_of, monkeypatch):
    folder, start = copy_of("one")
    other, go_back = copy_of("one", "other")
    go_back(back="2")

    def killed(source, target, rename=os.rename):
        if "step-" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            start(back="2")
    assert checkpoint_steps(folder) == [2, 4, 6]
    assert says(start(), "setting-aside-finished", folder=folder / "set-aside-1")
    assert checkpoint_steps(folder) == [2, 4, 6] and checkpoint_steps(folder / "set-aside-1") == [4, 6]
    assert same(final(folder), final(other))
    for log in LOGS:
        assert (folder / log).read_bytes() == (other / log).read_bytes()


@pytest.mark.parametrize("name", ["carried", "reset"])
@pytest.mark.parametrize("step", [4, 6, 8])
def test_going_back_over_the_end_of_a_stage(name, step, copy_of):
    """To the middle of the earlier stage, to its end, and to the middle of the second."""
    (before, _), (folder, start) = copy_of(name, "before"), copy_of(name)
    start(back=str(step))
    assert checkpoint_steps(folder) == [2, 4, 6, 8, 10] and same(final(folder), final(before))
    for log in LOGS:
        assert (folder / log).read_bytes() == (before / log).read_bytes()
    assert json.loads((folder / "cost.json").read_text()).keys() == json.loads((before / "cost.json").read_text()).keys()


def test_settings_of_later_steps_may_differ_from_those_of_the_steps_set_aside(copy_of):
    folder, start = copy_of("carried")
    changes = ["stage.two.state=reset", "stage.two.batch=2", "stage.two.lr=1e-4"]
    with refused("run-other-stage", key="stage.1.batch", alternative=back_to(6)):
        start(*changes[1:])
    start(*changes, back="step-00000006")
    assert checkpoint_steps(folder) == [2, 4, 6, 8, 10] and rows_of(folder)[-1]["images"] == 6 * 4 + 4 * 2
    with refused("run-other-start", key="seed"):
        start("seed=3", back="6")
    with refused("run-other-stage", key="stage.0.batch", alternative="start a new run with run=FOLDER"):
        start("stage.batch=2", "stage.two.state=reset", back="4")
    assert not (folder / "set-aside-2").exists()


def test_unknown_and_damaged_checkpoints(copy_of, tmp_path, monkeypatch, capsys, finished):
    folder, start = copy_of("one")
    listed = "choose one of step-00000002, step-00000004, step-00000006"
    for name in ("step-00000003", "3", "last", "step-", "-2", "../run"):
        with refused("unknown-checkpoint", name=repr(name), folder=folder / "checkpoints", advice=listed):
            start(back=name)
    for step in range(100, 140):
        (folder / "checkpoints" / name_of(step)).mkdir()
    with refused("unknown-checkpoint") as error:
        start(back="3")
    assert str(error.value).endswith(", step-00000139 and 23 older ones") and "step-00000119," not in str(error.value)
    shutil.rmtree(folder / "checkpoints")
    with refused("unknown-checkpoint", advice="leave --from out to start the run"):
        start(back="2")
    words = ["train", finished["one"], *KEYS, f"run={folder}", "--from", "7"]
    code, _, text = fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(text, "unknown-checkpoint", name="'7'")
    other, start = copy_of("one", "other")
    (other / "checkpoints/step-00000002/state.safetensors").write_bytes(b"damaged")
    before = sorted(other.rglob("*"))
    with refused("named-checkpoint-damaged", path=other / "checkpoints/step-00000002"):
        start(back="2")
    assert sorted(other.rglob("*")) == before


def test_a_stage_that_has_gone_beyond_its_end_is_refused(copy_of):
    folder, start = copy_of("one")
    exported = (folder / "model/fastsd.json").read_bytes()
    fields = {"folder": folder, "name": "'one'", "length": "6 steps", "least": '"6 steps"'}
    for amount, shown, alternative in (
        ("5", "5", back_to(4)),
        ("16 images", "'16 images', 4 steps", back_to(4)),
        ("0.5e", "'0.5e', 3 steps", back_to(2)),
        ("1", "1", "start a new run with run=FOLDER"),
        ("1s", "'1s'", None),
    ):
        fields |= {"until": shown} | ({"alternative": alternative} if alternative else {})
        if amount == "1s":
            state = json.loads((folder / "checkpoints/step-00000006/state.json").read_text())
            assert state["seconds"] > 0
            length = f"{math.ceil(state['seconds'])} seconds"
            amount, fields = f"{state['seconds'] / 2:.6f}s", {"length": length, "least": f'"{length}"'}
        with refused("stage-beyond-end", **fields):
            start(f"stage.until={amount}")
    assert (folder / "model/fastsd.json").read_bytes() == exported and checkpoint_steps(folder) == [2, 4, 6]
    text = start("stage.until=5", back="4")
    assert checkpoint_steps(folder) == [2, 4, 5] and json.loads((folder / "model/fastsd.json").read_text())["steps"] == 5
    assert not says(text, "already-finished")


def test_the_end_of_an_earlier_stage_cannot_move_behind_the_run(copy_of):
    folder, start = copy_of("carried")
    for changes, alternative in (
        (["stage.one.until=5"], back_to(4)),
        (["stage.one.until=9"], back_to(4)),
        (["stage.one.lr=1e-4"], back_to(4)),
        (["stage.one.until=1"], "start a new run with run=FOLDER"),
    ):
        with refused("run-other-stage", alternative=alternative):
            start(*changes)
    assert checkpoint_steps(folder)[-1] == 10
    for step in (8, 10):
        shutil.rmtree(folder / "checkpoints" / name_of(step), ignore_errors=True)
    with refused("run-other-stage", key="stage.0.lr", alternative=back_to(4)):
        start("stage.one.lr=1e-4")  # the stage is complete, and the next has not begun
    with refused("stage-beyond-end", name="'one'", until=4, alternative=back_to(4)):
        start("stage.one.until=4")
    with refused("stage-complete", name="'one'", until=9, alternative=back_to(4)):
        start("stage.one.until=9")
    start("stage.one.until=5", back="4")
    assert checkpoint_steps(folder) == [2, 4, 5, 7, 9]


def test_a_stage_can_end_at_the_newest_checkpoint(copy_of):
    """It needs no step then, and its state is carried over."""
    (folder, start), (other, train_anew) = copy_of("carried"), copy_of("carried", "other")
    rewind(folder, 4)
    measured = (folder / "validation.jsonl").read_text().splitlines(keepends=True)
    (folder / "validation.jsonl").write_text("".join(line for line in measured if json.loads(line)["step"] < 4))
    text = start("stage.one.until=4", "stage.two.keep_checkpoints=1")
    train_anew("stage.one.until=4", back="2")
    assert same(final(folder), final(other)) and (folder / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    assert rows_of(folder, "validation.jsonl") == rows_of(other, "validation.jsonl")
    assert [(row["name"], row["steps"]) for row in stage_costs(folder)] == [("one", 4), ("two", 4)]
    assert checkpoint_steps(folder) == [4, 8] and not says(text, "already-finished")
    rewind(folder, 4)
    start("stage.one.until=4", "stage.two.keep_checkpoints=1")
    assert checkpoint_steps(folder) == [4, 8] and same(final(folder), final(other))


def test_a_finished_run_says_so(copy_of, finished):
    folder, start = copy_of("one")
    shutil.rmtree(folder / "model")
    text = start()
    assert says(text, "already-finished", step=6, name="'one'") and (folder / "model/unet").is_dir()
    assert not says(start("stage.until=8"), "already-finished") and says(start("stage.until=8"), "already-finished", step=8)
    with refused("stage-beyond-end", alternative=back_to(6)):
        start("stage.until=7")
    start("stage.until=7", back="6")
    assert checkpoint_steps(folder) == [2, 4, 6, 7]


def test_removed_stages(copy_of, tmp_path, tiny_model, images):
    folder, _ = copy_of("reset")
    path = job(tmp_path, tiny_model, images, STAGE)
    with refused("run-fewer-stages", current_stage=2, count=1, alternative=back_to(6)):
        run(path, *KEYS)
    train(load_config(path, KEYS), Console(file=StringIO()), start="6")
    assert json.loads((folder / "model/fastsd.json").read_text())["steps"] == 6
    assert says(run(path, *KEYS, "stage.until=24 images")[1], "already-finished", step=6)
    with refused("stage-complete", until=8, alternative=back_to(4)):  # its state was not kept
        run(path, *KEYS, "stage.until=8")
    train(load_config(path, [*KEYS, "stage.until=8"]), Console(file=StringIO()), start="4")
    assert checkpoint_steps(folder) == [2, 4, 6, 8]


CHANGED = ["stage.one.lr=5e-4", "stage.one.precision=bf16", "stage.one.schedule=cosine", "cache.dtype=fp32"]


def test_the_card_and_the_costs_tell_the_settings_over_the_steps(copy_of, finished):
    folder, start = copy_of("carried")
    before = stage_costs(folder)
    cache(load_config(finished["carried"], CHANGED), Console(file=StringIO()))
    start("stage.one.lr=5e-4", back="2")
    rewind(folder, 4)
    start(*CHANGED)
    changes = [
        {"step": 2, "key": "lr", "before": 1e-3, "after": 5e-4},
        {"step": 4, "key": "cache.dtype", "before": "fp16", "after": "fp32"},
        {"step": 4, "key": "precision", "before": "fp32", "after": "bf16"},
        {"step": 4, "key": "schedule", "before": "constant", "after": "cosine"},
    ]
    first, second = stage_costs(folder)
    assert sorted(first["changes"], key=str) == sorted(changes, key=str) and "changes" not in second
    assert [(row["steps"], row["images"]) for row in (first, second)] == [(6, 24), (4, 16)]
    card, summary = (folder / "model/README.md").read_text(), read_summary(folder / "model")
    assert "| one | unet.mid | lion | 0.001 until step 2, then 0.0005 | fp32 until step 4, then bf16 | 4 | 6 | 24 |" in card
    assert "| two | unet.mid | lion | 0.001 | fp32 | 4 | 4 | 16 |" in card and "| Training precision | fp32, bf16 |" in card
    assert "schedule = constant until step 4, then cosine" in card and "cache.dtype = fp16 until step 4, then fp32" in card
    assert (summary.precision, summary.stages[0].lr) == ("fp32, bf16", 5e-4)

    # Going back forgets what was changed after the checkpoint, and nothing else.
    start("stage.one.lr=5e-4", back="4")
    assert stage_costs(folder)[0]["changes"] == changes[:1]
    assert json.loads((folder / "set-aside-2/cost.json").read_text())["stages"] == [first, second]
    start("stage.one.schedule=cosine", back="2")
    start("stage.one.schedule=cosine", "stage.one.until=7", back="4")
    assert {change["key"] for change in stage_costs(folder)[0]["changes"]} == {"schedule", "until"}
    assert "until = 6 until step 4, then 7" in (folder / "model/README.md").read_text()
    start(back="2")
    card = (folder / "model/README.md").read_text()
    assert "until step" not in card and [row.keys() for row in stage_costs(folder)] == [row.keys() for row in before]


def test_settings_between_two_stages_belong_to_the_later(copy_of, finished):
    folder, start = copy_of("carried")
    rewind(folder, 6)
    cache(load_config(finished["carried"], CHANGED), Console(file=StringIO()))
    start("stage.two.lr=5e-4", "stage.one.checkpoint_every=3", "cache.dtype=fp32")
    card = (folder / "model/README.md").read_text()
    assert "| one | unet.mid | lion | 0.001 |" in card and "| two | unet.mid | lion | 0.0005 |" in card
    assert "until step" not in card


def test_settings_that_no_step_was_trained_with_are_not_on_the_card(copy_of):
    """Neither those of a start that trained nothing, nor those of one that was killed before its first checkpoint."""
    folder, start = copy_of("one")
    before = (folder / "model/README.md").read_text()
    assert says(start("stage.lr=5e-4", "stage.precision=bf16"), "key-changed")
    assert (folder / "model/README.md").read_text() == before
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("0.0005", "0.25"))
    start("stage.lr=5e-4", "stage.until=8")
    card = (folder / "model/README.md").read_text()
    assert "| 0.001 until step 6, then 0.0005 | fp32 | 4 | 8 | 32 |" in card
    start("stage.lr=1e-4", "stage.until=10")
    assert "| 0.001 until step 6, 0.0005 until step 8, then 0.0001 |" in (folder / "model/README.md").read_text()


@pytest.mark.parametrize("damage", [Path.unlink, partial(Path.write_text, data="["), partial(Path.write_text, data="{}")])
def test_costs_are_those_of_the_checkpoint(damage, copy_of, finished):
    """A kill between a checkpoint and the cost, or a damaged file, loses no stage."""
    folder, start = copy_of("carried")
    before = json.loads((folder / "cost.json").read_text())
    assert before["stages"][0]["seconds"] > 0
    damage(folder / "cost.json")
    rewind(folder, 8)
    start()
    after = json.loads((folder / "cost.json").read_text())
    assert after["stages"][0] == before["stages"][0] and after["stages"][1]["steps"] == 4
    assert after["file_bytes"] == before["file_bytes"]
    config = load_config(finished["carried"], [*KEYS, f"run={folder}"])
    with open_run(config, Console(file=StringIO()), "4"):  # in the middle of the first stage, no stage is complete
        assert stage_costs(folder) == [] and "file_bytes" not in (folder / "cost.json").read_text()
    assert json.loads((folder / "set-aside-1/cost.json").read_text()) == after


def test_a_run_of_an_older_version_keeps_its_costs(copy_of):
    folder, start = copy_of("carried")
    rewind(folder, 8)
    path = folder / "checkpoints/step-00000008"
    state = json.loads((path / "state.json").read_text())
    state = {key: value for key, value in state.items() if key not in ("costs", "changes")}
    digest = write_text(path / "state.json", json.dumps(state))
    write_manifest(path, read_manifest(path) | {"state.json": digest})
    first = stage_costs(folder)[0]
    start()
    assert stage_costs(folder)[0] == first and [row["name"] for row in stage_costs(folder)] == ["one", "two"]
    assert "| one | unet.mid | lion | 0.001 | fp32 | 4 | 6 | 24 |" in (folder / "model/README.md").read_text()


def test_costs_that_cannot_be_written_are_a_warning(copy_of, monkeypatch):
    folder, start = copy_of("one")

    def full(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(cost, "replace_file", full)
    text = start("stage.until=8")
    assert says(text, "cost-not-written", folder=folder, strerror="disk full") and checkpoint_steps(folder)[-1] == 8
