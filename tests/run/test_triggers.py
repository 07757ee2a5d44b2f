"""Actions that are due after a step: by intervals, by chosen steps, and by trigger files of the user."""

from types import SimpleNamespace

import pytest

from fastsd.config.schema import StageTable
from fastsd.run.triggers import Due, Triggers
from fastsd.train.ranks import ALONE

NEVER = {"sample_every": 0, "checkpoint_every": "9e"}


class Run:
    """The parts of a run that triggers use, with batches of 4 of 20 images."""

    def __init__(self, folder, *, log=100, validate=0, measured=True, **stage):
        self.folder, self.data = folder, SimpleNamespace(epochs=[7, 20], sets=SimpleNamespace(measured=measured))
        table = StageTable(**{"train": ["unet"], "until": 100, "batch": 4, **NEVER, **stage})
        self.config = SimpleNamespace(
            stage=[None, table], log=SimpleNamespace(every=log), validate_=SimpleNamespace(every=validate)
        )
        self.seconds, self.ranks = 0.0, ALONE
        progress = SimpleNamespace(stage_step=0)
        self.position = SimpleNamespace(progress=progress, elapsed=lambda: self.seconds, steps=[None, 12])

    def due(self, steps, start=0):
        """Return the steps after which each action is due."""
        triggers, result = Triggers(self, 1), {}
        for step in range(start + 1, steps + 1):
            self.position.progress.stage_step = step
            due = triggers.after_step()
            for action in Due._fields:
                if getattr(due, action):
                    result.setdefault(action, []).append(step)
        return result


@pytest.mark.parametrize(
    "settings, due",
    [
        ({"log": 4}, {"log": [4, 8, 12]}),
        ({"validate": 5}, {"validation": [5, 10]}),
        ({"validate": 5, "measured": False}, {}),
        ({"sample_every": "1e"}, {"samples": [5, 10]}),
        ({"checkpoint_every": 6}, {"checkpoint": [6, 12]}),
        ({"keep_every": 5}, {"checkpoint": [5, 10], "permanent": [5, 10]}),
        ({"keep_every": "1e", "checkpoint_every": 4}, {"checkpoint": [4, 5, 8, 10, 12], "permanent": [5, 10]}),
        ({"keep_every": "18 images"}, {"checkpoint": [5, 9], "permanent": [5, 9]}),
        ({"checkpoint_at": [3, "2e"]}, {"checkpoint": [3, 10], "permanent": [3, 10]}),
        ({"ema": {"sigma_rel": [0.1]}, "ema_snapshots": 3}, {"snapshot": [4, 8, 12]}),
        ({"ema": 0.9}, {}),
    ],
)
def test_each_action_has_its_own_interval(settings, due, tmp_path):
    assert Run(tmp_path, **settings).due(12) == due


def test_a_resumed_stage_keeps_the_same_steps(tmp_path):
    assert Run(tmp_path, log=4, sample_every=3).due(12, start=6) == {"log": [8, 12], "samples": [9, 12]}


@pytest.mark.parametrize(
    "file, actions",
    [("sample", ("samples",)), ("checkpoint", ("checkpoint", "permanent")), ("profile", ("profile",))],
)
def test_a_trigger_file_requests_an_action_once_and_is_deleted(file, actions, tmp_path):
    trigger = tmp_path / f"trigger.{file}"
    trigger.touch()
    assert Run(tmp_path).due(3) == {key: [1] for key in actions} and not trigger.exists()
    # It is also deleted if the action is due without it.
    trigger.touch()
    assert Run(tmp_path, sample_every=1, checkpoint_at=[1]).due(2).get(actions[0]) in ([1], [1, 2]) and not trigger.exists()
    trigger.mkdir()  # it cannot be deleted as a file, so it requests nothing
    assert Run(tmp_path).due(3) == {}


def test_intervals_in_seconds_count_the_time_before_a_restart(tmp_path):
    run = Run(tmp_path, checkpoint_every="10s")
    run.seconds = 25.0
    triggers = Triggers(run, 1)
    times = []
    for seconds in (26.0, 34.9, 35.0, 36.0, 44.9, 45.5, 55.0, 55.5):
        run.seconds = seconds
        times += [seconds] if triggers.after_step().checkpoint else []
    assert times == [35.0, 45.5, 55.5]
