"""The command line and test functions, in this process or in new ones."""

import functools
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path


def command_line(words: list[str], output: Path) -> None:
    """Run the command line and append what it prints to a file."""
    from fastsd import cli

    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["fastsd", *words]
    cli.main()


STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 2\noptimizer = "lion"\nlr = 1e-4\n'


def fastsd(*words, monkeypatch, capsys) -> tuple[int, str, str]:
    """Run the command line in this process. Return its exit code, stdout, and stderr without a command's first line."""
    from fastsd import cli

    monkeypatch.setattr(sys, "argv", ["fastsd", *map(str, words)])
    monkeypatch.setattr("fastsd.terminal.console.SOON", 1e6)  # no progress lines, whose number depends on the machine
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, re.sub(rf"\A{words[0] if words else ''}\b.*: loading PyTorch\n", "", err)


@functools.cache
def processes():
    """Return the context for new processes. Where possible they are forked from one that has finished the slow imports."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    modules = ("fastsd.run.loop", "fastsd.commands.cache", "fastsd.model.text_encoder")
    libraries = ("diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip")
    context.set_forkserver_preload(["environment", *modules, *libraries])
    return context


def call(file: str, function: str, arguments: list[str], output_paths: list[str]) -> None:
    """Call a function of a test module, with stdout and stderr appended to files."""
    for stream, path in enumerate(output_paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.path.insert(0, str(Path(file).parent))
    getattr(importlib.import_module(Path(file).stem), function)(*arguments)


class FunctionProcess:
    """A function in a new process, with those methods of `subprocess.Popen` that tests use."""

    def __init__(self, file: str, function: str, arguments: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.output_paths = [str(Path(self.folder.name, name)) for name in ("stdout", "stderr")]
        self.process = processes().Process(target=call, args=(file, function, arguments, self.output_paths))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> list[str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the process does not end"
        return [Path(path).read_text() if Path(path).exists() else "" for path in self.output_paths]


def function_process(file: str, function: str, *arguments: object) -> FunctionProcess:
    """Start `function(*arguments)` of the test module `file` in a new process. Arguments arrive as text."""
    return FunctionProcess(file, function, list(map(str, arguments)))
