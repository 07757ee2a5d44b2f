"""Progress of long work: what is shown on a terminal and elsewhere, and the first line of every command."""

import io
import json
import subprocess
import sys
import threading
import time

import pytest
from environment import ROOT

from fastsd.terminal import console
from fastsd.terminal.console import Console, counted, shown, work


class Clock:
    """Time that passes only when a test says so."""

    now = 100.0

    def monotonic(self):
        return self.now

    def pass_seconds(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_more_than_all_leaves_no_time(clock):
    work = console.Work("encoding", 20, "images")
    work.set(30, 20, 2.0, "")
    assert work.seconds_left() == 0


@pytest.fixture
def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=200)


@pytest.fixture
def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=30, color_system=None)


def test_plain_lines_are_spaced_in_time_and_have_the_remaining_time(clock, plain):
    with shown(plain):
        for _ in counted("encoding", range(20), "images"):
            clock.pass_seconds(2)
    assert plain.file.getvalue().splitlines() == [
        "encoding 1/20 images | ETA 0:00:38", "encoding 6/20 images | ETA 0:00:28", "encoding 11/20 images | ETA 0:00:18",
        "encoding 16/20 images | ETA 0:00:08",
    ]  # fmt: skip


def test_short_work_and_work_of_a_library_show_nothing(clock, plain):
    with shown(plain):
        for _ in counted("encoding", range(20)):
            clock.pass_seconds(0.04)
    for _ in counted("encoding", range(20)):
        clock.pass_seconds(20)
    assert plain.file.getvalue() == ""


def test_work_without_a_total_is_named_while_it_lasts(clock, plain, monkeypatch):
    monkeypatch.setattr(console, "SOON", 0.01)
    with shown(plain), work("listing"), work("reading"):
        clock.pass_seconds(2)
        for _ in range(500):
            if not plain.file.getvalue():
                time.sleep(0.01)
    assert plain.file.getvalue() == "listing | reading\n"


def test_nested_work_stands_in_one_line(clock, plain):
    with shown(plain):
        for _ in counted("models", range(2)):
            with work("loading unet", 3 << 30, "bytes") as loading:
                clock.pass_seconds(12)
                loading.add(3 << 29)
    assert plain.file.getvalue().splitlines() == [
        "models 0/2 | loading unet 1.5 GiB of 3.0 GiB | ETA 0:00:12",
        "models 1/2 | loading unet 1.5 GiB of 3.0 GiB | ETA 0:00:24",
    ]


def test_a_line_on_a_terminal_is_rewritten_fits_and_makes_room_for_other_output(clock, terminal):
    with shown(terminal):
        for i in counted("encoding many large images", range(3)):
            clock.pass_seconds(5)
            if i == 1:
                terminal.echo("a note")
    *lines, last = terminal.file.getvalue().split("\r")
    assert lines[0] == last == "" and all(len(line) == 29 for line in lines[1:] if "note" not in line)
    assert lines[1].startswith("encoding many large images 0/")
    assert lines[2:6] == ["encoding many large images 1/", " " * 29, "a note\n", "encoding many large images 2/"][:4]
    assert lines[-1] == " " * 29


def test_an_error_removes_the_line_and_other_threads_show_none(clock, terminal):
    with shown(terminal):
        thread = threading.Thread(target=lambda: list(counted("writing", range(9))))
        thread.start()
        thread.join()
        assert terminal.file.getvalue() == ""
        with pytest.raises(ValueError, match="wrong"), work("loading"), work("reading"):
            raise ValueError("wrong")
        assert terminal.file.getvalue().endswith("\r" + " " * 29 + "\r")
        terminal.echo("more")
    assert terminal.file.getvalue().endswith("\rmore\n")


# In a process of its own, calls every command with only its required arguments, and stops it where it imports what takes long.
CALL_ALL = """
import builtins, io, json, sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from importlib import import_module
from typer.main import get_command

HEAVY = {"torch", "transformers", "diffusers", "matplotlib", "numpy", "PIL"}
seen = {}

class Import(BaseException):
    pass

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise Import(name)

from fastsd.cli import app
assert not HEAVY & sys.modules.keys()
sys.meta_path.insert(0, Stop())
group = get_command(app)
for name, command in group.commands.items():
    words = [sys.argv[1] for parameter in command.params if parameter.required]
    output = io.StringIO()
    with redirect_stderr(output), redirect_stdout(output):
        try:
            group.main([name, *words], standalone_mode=False)
        except Import as stopped:
            seen[name] = [str(stopped), output.getvalue()]
        except BaseException as error:
            seen[name] = ["", output.getvalue()]
print(json.dumps(seen))
"""


def test_every_command_has_a_first_line_before_it_imports_what_takes_long():
    command = [sys.executable, "-c", CALL_ALL, str(ROOT / "configs" / "demo.toml")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = json.loads(output.splitlines()[-1])
    silent = {name: heavy for name, (heavy, line) in seen.items() if heavy and not line.startswith(name)}
    assert silent == {}
    assert {"train", "cache", "plan", "sample", "compare"} <= {name for name, (heavy, _) in seen.items() if heavy}


def test_a_long_path_loses_its_start_and_not_the_remaining_time(clock):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    with shown(terminal), work("loading runs/a-long-name/checkpoints/step-00000044/unet", 40, "") as progress:
        clock.pass_seconds(2)
        progress.add(20)
    last = terminal.file.getvalue().split("\r")[-3]
    assert len(last) == 59 and last.startswith("loading ...") and last.endswith("step-00000044/unet 20/40 | ETA 0:00:02")
