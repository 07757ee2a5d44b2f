"""The command line, in this process and in processes of its own."""

import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path


def command_line(words: list[str], said: Path) -> None:
    from fastsd import cli

    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = ["fastsd", *words]
    cli.main()


STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 2\noptimizer = "lion"\nlr = 1e-4\n'


def fastsd(*words, monkeypatch, capsys) -> tuple[int, str, str]:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from fastsd import cli

    monkeypatch.setattr(sys, "argv", ["fastsd", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@functools.cache
def processes():
    """For processes of their own, forked, where a system can, from one that has done the imports, which take seconds."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    own = ("fastsd.run.loop", "fastsd.commands.cache", "fastsd.model.text_encoder")
    lazy = ("diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip")
    context.set_forkserver_preload(["environment", *own, *lazy])
    return context


def call(file: str, function: str, arguments: list[str], streams: list[str]) -> None:
    for stream, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.path.insert(0, str(Path(file).parent))
    getattr(importlib.import_module(Path(file).stem), function)(*arguments)


class FunctionProcess:
    """What tests use of `subprocess.Popen`."""

    def __init__(self, file: str, function: str, arguments: list[str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [str(Path(self.folder.name, name)) for name in ("stdout", "stderr")]
        self.process = processes().Process(target=call, args=(file, function, arguments, self.streams))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> list[str]:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"
        return [Path(path).read_text() if Path(path).exists() else "" for path in self.streams]


def function_process(file: str, function: str, *arguments: object) -> FunctionProcess:
    """`function(*arguments)` of the test module `file` in a process of its own; arguments arrive as text."""
    return FunctionProcess(file, function, list(map(str, arguments)))
