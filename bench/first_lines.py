"""Print the seconds from the start of a process to its first output, for every command.

    python bench/first_lines.py [ROUNDS]

A command gets configs/demo.toml for each required argument, and is ended at its first output. The figure is that of the
fastest round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from typer.main import get_command

from fastsd.cli import app

CONFIG = Path(__file__).parents[1] / "configs" / "demo.toml"


def first_output(command: list[str]) -> tuple[float, str]:
    """Return the seconds until a command writes to stdout or stderr, and the text."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process:
        assert process.stdout
        text = os.read(process.stdout.fileno(), 200).decode(errors="replace")
        seconds = time.perf_counter() - start
        process.kill()
    return seconds, text.partition("\n")[0]


def main(rounds: int = 3) -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        words = [str(CONFIG) for parameter in command.params if parameter.required]
        results = [first_output([sys.executable, "-m", "fastsd.cli", name, *words]) for _ in range(rounds)]
        print(f"{name:<15} {min(results)[0]:6.2f} s  {results[0][1]}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
