"""The command line, in this process and in processes of its own."""

import os
import subprocess
import sys
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


def function_process(file: str, function: str, *arguments: object) -> subprocess.Popen[str]:
    """`function(*arguments)` of the test module `file` in a process of its own; arguments arrive as text."""
    code = f"import sys, {Path(file).stem} as module; module.{function}(*sys.argv[1:])"
    folders = [str(Path(file).parent), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
