"""Numeric health of a run: updates that are not finite, spikes, checkpoints kept by health, rollback and the canary."""

import errno
import json
import math
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import checkpoint_steps, final, rewind, rows_of, same
from safetensors.torch import load_file
from sentences import refused, says
from tiny import job

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.model.formats.load import load_model
from fastsd.run import checkpoint, loss_health, rollback
from fastsd.run.checkpoint import RunProgress
from fastsd.run.loop import train
from fastsd.run.loss_health import _FIELDS, LossHealth
from fastsd.run.rewind import set_aside
from fastsd.run.training_data import TrainingData
from fastsd.terminal.console import Console
from fastsd.train.objective import Objective

pytestmark = pytest.mark.slow

STAGE = """
[[stage]]
train = ["unet"]
until = 6
batch = 4
checkpoint_every = 1
keep_checkpoints = 9
"""
ABSURD = {
    "lion": 'optimizer = "lion"\nlr = 1e38\n',
    "dlion": "d0 = 1e38\n",
    "adamw": 'optimizer = "adamw"\nlr = 1e38\n',
    "adamw with huge gradients": 'optimizer = "adamw"\nlr = 1e-3\n',
}


OPTIONS = {"": "auto", 'precision = "bf16"\n': "auto", "fused_backward = true\n": "reference", "ema = 0.5\n": "reference"}


@pytest.mark.parametrize("options, kernels", OPTIONS.items())
@pytest.mark.parametrize("absurd", ABSURD)
def test_absurd_settings_leave_finite_checkpoints(absurd, options, kernels, tmp_path, tiny_model, images):
    overrides = [f'kernels="{kernels}"', "log.every=10"]
    if "gradients" in absurd:
        overrides.append(f'data.folders=[{{path="{images}", loss_weight=1e24}}]')
    config = load_config(job(tmp_path, tiny_model, images, STAGE + ABSURD[absurd] + options), overrides)
    cache(config, Console(file=StringIO()))
    train(config, Console(file=StringIO()), export=False)
    folder = Path(config.run)
    assert checkpoint_steps(folder) == [1, 2, 3, 4, 5, 6]
    for path in (folder / "checkpoints").rglob("*.safetensors"):
        assert not [name for name, tensor in load_file(path).items() if not tensor.isfinite().all()], path
    assert rows_of(folder)[-1]["skipped"] > 0


def losses_of(health):
    return dict(zip(_FIELDS, health.state_dict()["loss_health"].tolist(), strict=True))


def test_spikes_are_counted_and_clipped():
    rng, health = np.random.default_rng(0), LossHealth(torch.device("cpu"))
    losses = 0.1 + 0.01 * rng.standard_normal(400)
    losses[[10, 100, 101, 200]] = 0.2, 0.5, 0.5, 0.01  # an early loss is not judged, and a low one is no spike
    for loss in losses:
        health.update(torch.tensor(loss, dtype=torch.float32), torch.tensor(0.0))
        assert health.problem() is None
    state = losses_of(health)
    assert state["losses"] == 400 and state["spikes"] == 2 == health.scalars()["spikes"]
    assert state["mean"] == pytest.approx(0.1, rel=0.03) and state["variance"] == pytest.approx(1e-4, rel=0.3)
    for _ in range(600):  # a new level: spikes at first, then it is the mean
        health.update(torch.tensor(0.15), torch.tensor(0.0))
    new_spikes = losses_of(health)["spikes"] - 2
    assert new_spikes < 10 and losses_of(health)["mean"] == pytest.approx(0.15, rel=0.01) and health.problem() is None


def test_losses_of_skipped_steps_are_left_out():
    health, other = (LossHealth(torch.device("cpu")) for _ in range(2))
    skipped = 0.0
    for step, loss in enumerate([1.0, math.nan, 0.5, math.inf, 7.0, 0.25]):
        skipped += step in (1, 3, 4)  # the gradients of step 4 were not finite, its loss was
        health.update(torch.tensor(loss), torch.tensor(skipped))
        assert health.scalars()["skipped_in_row"] == [0, 1, 0, 1, 2, 0][step]
        assert (health.problem() == "steps are being skipped") == (step in (1, 3, 4))
        if step not in (1, 3, 4):
            other.update(torch.tensor(loss), torch.tensor(0.0))
    ours, expected = losses_of(health), losses_of(other)
    assert {**ours, "skipped": 0.0} == expected and ours["skipped"] == 3
    health.begin(carried=True)  # as the step's own counter, those of the stage start from zero
    assert losses_of(health) == expected
    health.begin(carried=False)
    assert not any(losses_of(health).values())


def test_a_loss_that_has_blown_up_is_not_healthy_until_it_is_the_usual_one():
    health, problems = LossHealth(torch.device("cpu")), []
    for step in range(3000):
        health.update(torch.tensor(0.1 if step < 1000 else 1.5), torch.tensor(0.0))
        problems.append(health.problem())
    assert problems[:1002] == [None] * 1002  # three losses make the difference
    assert problems[1002] == "the loss is about 0.229, and its long-run mean 0.1" and None not in problems[1003:]
    resumed = LossHealth(torch.device("cpu"))
    resumed.load_state_dict(health.state_dict())
    assert resumed.problem() == problems[-1] is not None
    while health.problem():
        health.update(torch.tensor(1.5), torch.tensor(0.0))
    assert 5000 < losses_of(health)["losses"] < 20_000


def test_a_checkpoint_of_an_older_version_counts_as_healthy_and_its_skipped_steps_as_known():
    health = LossHealth(torch.device("cpu"))
    health.load_state_dict({"skipped": torch.tensor(4.0)})
    health.update(torch.tensor(0.1), torch.tensor(4.0))
    assert health.problem() is None and losses_of(health)["losses"] == 1


LONG = """
[[stage]]
train = ["unet"]
until = 10
batch = 4
optimizer = "lion"
lr = 1e-4
ema = 0.9
checkpoint_every = 2
keep_checkpoints = {keep}
"""
TWO = LONG + '[[stage]]\ntrain = ["unet"]\nuntil = 6\nbatch = 2\nstate = "carry"\noptimizer = "lion"\nlr = 1e-4\n'


def wrong_targets(monkeypatch, wrong, factor=math.nan):
    """Multiply the targets of some global positions by a factor. Return the list of all positions that are trained on."""
    add_noise, positions = Objective.add_noise, []

    def adding_noise(self, latents, positions_B, t_B):
        noisy, t_B, target = add_noise(self, latents, positions_B, t_B)
        positions.extend(positions_B.tolist())
        return noisy, t_B, target * (factor if wrong(positions_B[0]) else 1)

    monkeypatch.setattr(Objective, "add_noise", adding_noise)
    return positions


def start(path, *overrides):
    out, config = StringIO(), load_config(path, list(overrides))
    console = Console(file=out, width=500)
    cache(config, console)
    try:
        train(config, console, export=False)
    finally:
        (path.parent / "output").write_text(out.getvalue())
    return Path(config.run), out.getvalue()


def state_of(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def test_a_blown_up_run_keeps_a_checkpoint_from_before(monkeypatch, tmp_path, tiny_model, images):
    monkeypatch.setattr(loss_health, "WARM_UP", 3)
    wrong_targets(monkeypatch, lambda position: position >= 16, factor=100.0)
    folder, out = start(job(tmp_path, tiny_model, images, LONG.format(keep=1)))
    assert checkpoint_steps(folder) == [4, 10]
    assert state_of(folder, 4)["healthy"] and not state_of(folder, 10)["healthy"]
    assert says(out, "checkpoint-not-healthy", step=6) and out.count("is not healthy") == 1
    assert [row["spikes"] for row in rows_of(folder)] == sorted(row["spikes"] for row in rows_of(folder))
    assert rows_of(folder)[3]["spikes"] == 0 < rows_of(folder)[-1]["spikes"] and " | spikes " in out


def test_retention_keeps_the_last_healthy_checkpoint(tmp_path):
    def retained(keep, *healthy):
        shutil.rmtree(tmp_path)
        for step, value in enumerate(healthy, start=1):
            folder = tmp_path / checkpoint.name_of(step)
            folder.mkdir(parents=True)
            table = {} if value is None else {"healthy": value}  # None: of an older version
            (folder / "state.json").write_text(json.dumps({"step": step, **table}))
        checkpoint.retain(tmp_path, keep, set())
        return [int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)]

    assert retained(1, True, True, True) == [3]
    assert retained(1, True, True, False) == [2, 3]
    assert retained(1, True, True, False, False, False) == [2, 5]
    assert retained(2, True, False, False, True, False) == [4, 5]
    assert retained(1, None, None, False) == [2, 3]
    assert retained(1, False, False, False) == [3]


def without_gradients(monkeypatch):
    """Let steps 6, 7 and 8 of a run of `TWO` have no finite gradients."""
    return wrong_targets(monkeypatch, lambda position: 20 <= position < 32)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, tiny_model, images):
    """A run without some gradients, its output, and the positions that it trained on."""
    with pytest.MonkeyPatch.context() as patch:
        positions = without_gradients(patch)
        return *start(job(tmp_path_factory.mktemp("rolled"), tiny_model, images, TWO.format(keep=9))), positions


@pytest.fixture
def rolled_back(first_run, monkeypatch):
    """The rolled back run, which is only read. Runs of the test have no gradients in the same steps."""
    without_gradients(monkeypatch)
    return first_run


def test_a_run_goes_back_once_and_on_past_the_images(rolled_back):
    folder, out, positions = rolled_back
    assert says(out, "rolled-back", first=6, last=8, step=4, image=33, folder=folder / "set-aside-1")
    # Steps 1 to 8, whose row is read before the checkpoint of step 8; then 5 to 10, and 6 steps of the second stage.
    assert positions == [*range(32), *range(32, 56), *range(56, 68)]
    assert [(row["step"], row["images"]) for row in rows_of(folder)][3:7] == [(4, 16), (5, 36), (6, 40), (7, 44)]
    assert rows_of(folder)[-1]["step"] == 16 and {row["skipped"] for row in rows_of(folder)} == {0}
    assert checkpoint_steps(folder) == [8, 10, 16] and checkpoint_steps(folder / "set-aside-1") == [6]
    assert not state_of(folder / "set-aside-1", 6)["healthy"]
    last = state_of(folder, 16)
    assert (last["images"], last["passed_over"], last["rolled_back_stage"]) == (68, 16, 0)
    costs = json.loads((folder / "cost.json").read_text())["stages"]
    assert [(row["steps"], row["images"]) for row in costs] == [(10, 40), (6, 12)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_during_a_rollback_changes_nothing(moment, rolled_back, monkeypatch, tmp_path, tiny_model, images):
    class Killed(BaseException):
        pass

    def killed(folder, step):
        if moment == "after":
            set_aside(folder, step)
        raise Killed

    (tmp_path / "killed").mkdir()
    path = job(tmp_path / "killed", tiny_model, images, TWO.format(keep=9))
    with monkeypatch.context() as patch:
        patch.setattr(rollback, "set_aside", killed)
        with pytest.raises(Killed):
            start(path)
    folder, _ = start(path)
    assert same(final(folder), final(rolled_back[0]))
    assert (folder / "log.jsonl").read_bytes() == (rolled_back[0] / "log.jsonl").read_bytes()


@pytest.mark.parametrize("step", [4, 6, 8, 10])
def test_a_rolled_back_run_resumes_with_the_same_bits(step, rolled_back, tmp_path):
    folder, _, _ = rolled_back
    copy = shutil.copytree(folder, tmp_path / "run")
    rewind(copy, step)
    start(folder.parent / "job.toml", f"run={copy}")
    assert same(final(copy), final(folder)) and (copy / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()


def test_a_second_failure_in_a_stage_ends_the_run(monkeypatch, tmp_path, tiny_model, images):
    positions = wrong_targets(monkeypatch, lambda position: position >= 20)
    path = job(tmp_path, tiny_model, images, LONG.format(keep=9))
    with refused("no-finite-gradient", folder=tmp_path / "run", first=5, last=7) as error:
        start(path)
    loader = TrainingData(load_config(path), load_model(load_config(path).model), {}).loader(0)
    numbers = ", ".join(map(str, loader.batch(32, 4).samples_B.tolist()))
    assert f" had images {numbers} of the cache; " in str(error.value)
    assert positions == [*range(32), *range(32, 48)] and (tmp_path / "output").read_text().count("going back") == 1
    assert state_of(tmp_path / "run", 4)["healthy"] and not state_of(tmp_path / "run", 6)["healthy"]


def test_a_run_may_go_back_to_an_earlier_stage(monkeypatch, tmp_path, tiny_model, images):
    monkeypatch.setattr(checkpoint, "last_healthy", lambda folder: folder / checkpoint.name_of(4))
    positions = wrong_targets(monkeypatch, lambda position: 44 <= position < 50)
    folder, out = start(job(tmp_path, tiny_model, images, TWO.format(keep=9)))
    # Batches of 4 images, and from 40 on of 2. Step 16 is computed before the row of step 15 is read.
    assert says(out, "rolled-back", first=13, last=15, step=4, image=53)
    assert positions == [*range(52), *range(52, 76), *range(76, 88)]
    last = state_of(folder, 16)
    assert (last["stage_images"], last["images"], last["passed_over"], last["rolled_back_stage"]) == (76, 88, 36, 1)


def test_a_rollback_that_cannot_be_recorded_is_repeated(rolled_back, monkeypatch, tmp_path, tiny_model, images):
    (tmp_path / "full").mkdir()
    path = job(tmp_path / "full", tiny_model, images, TWO.format(keep=9))

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "replace_file", full)
        with refused(
            "rollback-not-written", folder=tmp_path / "full/run/checkpoints/step-00000004", reason="No space left on device"
        ):
            start(path)
    folder, _ = start(path)
    assert same(final(folder), final(rolled_back[0]))


@pytest.mark.parametrize("text", ["", "[1]", '{"images": 32}', '{"images": "a", "passed_over": 1, "rolled_back_stage": 0}'])
def test_a_damaged_record_of_a_rollback_counts_as_none(text, tmp_path):
    (tmp_path / "state.json").write_text('{"images": 16, "step": 4}')
    assert checkpoint.pass_over(tmp_path, 8, 1) == RunProgress(step=4, images=24, passed_over=8, rolled_back_stage=1)
    assert checkpoint.pass_over(tmp_path, 8, 2) == checkpoint.read_progress(tmp_path)
    assert checkpoint.read_progress(tmp_path) == RunProgress(step=4, images=32, passed_over=16, rolled_back_stage=2)
    (tmp_path / checkpoint.ROLLBACK).write_text(text)
    assert checkpoint.read_progress(tmp_path) == RunProgress(step=4, images=16)


def test_a_run_without_a_healthy_checkpoint_ends(monkeypatch, tmp_path, tiny_model, images):
    wrong_targets(monkeypatch, lambda position: True)
    with refused("no-finite-gradient", first=1, last=3):
        start(job(tmp_path, tiny_model, images, LONG.format(keep=9)))


def test_canary_errors_are_said_and_change_no_log_row(monkeypatch, tmp_path, tiny_model, images):
    folders, loss, calls = [], Objective.loss, []
    for name, canary_every in (("plain", 0), ("checked", 2)):
        (tmp_path / name).mkdir()
        path = job(tmp_path / name, tiny_model, images, LONG.format(keep=9) + f"canary_every = {canary_every}\n")
        folders.append(start(path)[0])
    plain, checked = folders
    assert same(final(plain), final(checked)) and (plain / "log.jsonl").read_bytes() == (checked / "log.jsonl").read_bytes()
    assert [row.get("canary_errors") for row in rows_of(checked, "timing.jsonl")] == [0.0] * 10
    assert "canary_errors" not in rows_of(plain, "timing.jsonl")[0]

    def loss_with_an_error(self, *args):
        calls.append(args)
        return loss(self, *args) * (1.001 if len(calls) == 5 else 1)  # the second computation of step 4 is call 6

    monkeypatch.setattr(Objective, "loss", loss_with_an_error)
    shutil.rmtree(checked)
    _, out = start(path)
    assert says(out, "canary-error", count=1, step=4) and out.count("computed twice") == 1 and " | canary errors 1 | " in out
    assert same(final(plain), final(checked))
