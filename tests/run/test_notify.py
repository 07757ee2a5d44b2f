"""`log.notify`: the command of the user's at the events of a run, and the warnings that a run writes down."""

import time

import pytest
from runs import rows_of, run
from tiny import job

from fastsd.config.schema import load_config
from fastsd.errors import UserError
from fastsd.run.loop import train
from fastsd.run.notify import notified_end
from fastsd.terminal.console import STDOUT
from fastsd.train.ranks import RankLost

STAGES = "".join(
    f'[[stage]]\nname = "{name}"\ntrain = ["unet"]\nuntil = 1\nbatch = 2\noptimizer = "lion"\nlr = {lr}\n'
    for name, lr in (("first", "1e-4"), ("second", "1e-4"))
)


def events_in(path, count):
    """Return what the commands have written. They run beside training."""
    for _ in range(600):
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return lines
        time.sleep(0.1)
    raise AssertionError(lines)


@pytest.fixture
def notified(tmp_path, tiny_model, images):
    path, out = job(tmp_path, tiny_model, images, STAGES), tmp_path / "events"
    return path, out, f"log.notify='echo \"$FASTSD_EVENT|$FASTSD_RUN|$FASTSD_MESSAGE\" >> {out}'"


def test_stages_and_the_end_are_notified(notified):
    path, out, command = notified
    folder, _ = run(path, command)
    lines = sorted(events_in(out, 3))
    assert lines == [
        f"finished|{folder}|{folder}: all stages are complete",
        f"stage|{folder}|{folder}: stage first ended at step 1",
        f"stage|{folder}|{folder}: stage second ended at step 2",
    ]


def test_an_error_is_notified(notified):
    path, out, command = notified
    config = load_config(path, [command, "model.base=/no/model"])
    with pytest.raises(UserError) as error:
        train(config)
    (line,) = events_in(out, 1)
    assert line == f"error|{config.run}|{config.run}: {error.value}"


def test_the_loss_of_another_rank_is_notified_in_words(notified):
    path, out, command = notified
    config = load_config(path, [command])
    with pytest.raises(RankLost), notified_end(config, STDOUT):
        raise RankLost("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    assert events_in(out, 1) == [f"error|{config.run}|{config.run}: another rank has ended, or does not answer"]


def test_warnings_are_written_down(notified, tiny_model):
    path, _, _ = notified
    folder, text = run(path, "log.tensorboard=true", "log.every=1")
    (folder / "tensorboard").rename(folder / "moved")
    (folder / "tensorboard").write_text("")  # no folder, so that the event file cannot be made
    _, text = run(path, "log.tensorboard=true", "log.every=1", "stage.second.until=3")
    (warning,) = [row for row in rows_of(folder, "warnings.jsonl") if "TensorBoard" in row["text"]]
    assert f"warning: {warning['text']}" in text and warning["step"] == 3 and abs(time.time() - warning["time"]) < 600
