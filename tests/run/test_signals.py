"""Signals in every phase of a run, and to commands that are no runs."""

import os
import signal
from contextlib import suppress

import pytest
from commandline import fastsd
from runs import checkpoint_steps, run
from sentences import refused, sentence
from tiny import job

from fastsd.errors import Stopped
from fastsd.run import export, loop
from fastsd.run import run as run_module
from fastsd.run.signals import REQUESTS, signals_of_commands, stop_signals
from fastsd.train.step import Step

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 4\noptimizer = "lion"\nlr = 1e-4\n'
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
COMMANDS = {
    "sample": ("fastsd.commands.sample.sample", "MODEL", "--prompt", "a"),
    "validate": ("fastsd.commands.validate.validate", "MODEL", "CONFIG"),
    "convert": ("fastsd.commands.convert.convert", "MODEL", "out"),
    "compare": ("fastsd.compare.compare.compare", "run"),
    "plan": ("fastsd.plan.plan.plan", "CONFIG"),
    "demo": ("fastsd.demo.demo.demo",),
}


def send(number, count=1):
    """Return a function that sends a signal to this process."""

    def receive(*args, **options):
        for _ in range(count):
            os.kill(os.getpid(), number)

    return receive


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("module, name", [(run_module, "load_to_train"), (loop, "start_stage"), (export, "write_card")])
def test_a_signal_while_nothing_is_trained_stops_at_once(number, module, name, tmp_path, tiny_model, images, monkeypatch):
    """While the model loads, a stage starts, or the model is exported."""
    path = job(tmp_path, tiny_model, images, STAGE)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, send(number))
        with refused("run-stopped-idle", error=Stopped, folder=tmp_path / "run"):
            run(path)
    folder, _ = run(path)
    assert checkpoint_steps(folder) == [2] and (folder / "model" / "README.md").exists()


@pytest.mark.parametrize("number", STOPS)
def test_a_second_signal_in_a_step_stops_at_once(number, tmp_path, tiny_model, images, monkeypatch):
    """But a terminal that is closed twice does not."""
    step = Step.__call__

    def interrupted(self, *args):
        send(number, count=2)()
        return step(self, *args)

    monkeypatch.setattr(Step, "__call__", interrupted)
    message = "run-stopped" if number == signal.SIGHUP else "run-stopped-at-once"
    with refused(message, error=Stopped, folder=tmp_path / "run"):
        run(job(tmp_path, tiny_model, images, STAGE))
    assert checkpoint_steps(tmp_path / "run") == ([1] if number == signal.SIGHUP else [])


def test_a_program_that_handles_signals_itself_gets_its_own(tmp_path, tiny_model, images, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(job(tmp_path, tiny_model, images, STAGE))


@pytest.mark.parametrize("number", STOPS)
def test_ignored_signals_stay_ignored(number, tmp_path):
    """As SIGHUP under nohup, and SIGINT of a command that a shell script starts in the background."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals_of_commands(), stop_signals(tmp_path) as signals:
            send(number)()
        assert not signals and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_requests_before_a_run_obeys_them_do_not_end_it(tmp_path):
    before = [signal.getsignal(number) for number in REQUESTS]
    with signals_of_commands():
        for number in REQUESTS:
            send(number)()
        with stop_signals(tmp_path):
            for number in REQUESTS:
                send(number)()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trigger.checkpoint", "trigger.sample"]
    assert [signal.getsignal(number) for number in REQUESTS] == before


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_a_command_with_one_line(number, command, tmp_path, tiny_model, images, monkeypatch, capsys):
    config = job(tmp_path, tiny_model, images, STAGE)
    function, *words = COMMANDS[command]
    monkeypatch.setattr(function, send(number))
    words = [{"CONFIG": config, "MODEL": tiny_model}.get(word, word) for word in words]
    with suppress(KeyboardInterrupt):  # a traceback would be red
        code, out, err = fastsd(command, *words, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, out, err) == (130, "", f"fastsd: {sentence('command-stopped', command=command)}\n")
