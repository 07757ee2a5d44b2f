"""Output of commands, and the progress of long work.

Progress is one line that is rewritten on a terminal, otherwise a line on stderr every few seconds. The command line shows it
(`shown`). A program that uses fastsd as a library sees nothing. Work that contains other work is shown before it, in one line:
"models 2/8 | denoising 12/25 steps | ETA 0:01:40".
"""

from __future__ import annotations

import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from shutil import get_terminal_size
from typing import IO, Any, TypeVar, cast

import rich.console

from fastsd.terminal.texts import WARNING, fit, on_one_line, size_text

T = TypeVar("T")
PLAIN_SECONDS = 10.0  # between lines if the output is no terminal
SOON = 1.0  # seconds until work is shown there for the first time
_REFRESH = 0.1  # seconds between updates on a terminal

# Our own signs in terminals whose encoding has too few characters.
_PLAIN = str.maketrans({"±": "+-", "×": "x", "≈": "~", "—": "-", "…": "...", "·": "*"})

_WITHOUT_PRECISION = ("cache",)  # commands with CONFIG that have no --precision


class _Output:
    """A text file for output that nobody may be able to see: a closed terminal or a full disk raises no error.

    Characters that the encoding of the file does not have, for example in the name of an image, are escaped.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            try:
                self._file.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self._file, "encoding", None) or "ascii"
                self._file.write(text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()


class Console(rich.console.Console):
    """A terminal or text file for the output of a command. Text has no markup. On a terminal, lines are wrapped.

    Attributes:
        on_warning: also receives the text of each warning; None = nobody.
    """

    on_warning: Callable[[str], None] | None = None
    _config_words: Sequence[str] = ()
    _config_options: Sequence[str] = ()

    @property
    def file(self) -> IO[str]:
        return cast("IO[str]", _Output(super().file))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def out(self, *args: Any, **kwargs: Any) -> None:
        with _without_progress():
            super().out(*args, **kwargs)

    def print(self, *args: Any, **kwargs: Any) -> None:
        with _without_progress():
            super().print(*args, **kwargs)

    def echo(self, text: str) -> None:
        style = "bold yellow" if text.startswith(WARNING) else None
        self.out(self._fit(self.copyable(text)), style=style, highlight=False)

    def warn(self, text: str) -> None:
        self.echo(f"{WARNING}{text}")
        if self.on_warning:
            self.on_warning(self.copyable(text))

    def name_config(self, words: Sequence[str], precision: str | None = None) -> None:
        """Set what replaces CONFIG in the commands of messages: the path and overrides of this command, and its precision."""
        self._config_words, self._config_options = words, ["--precision", precision] if precision else []

    def copyable(self, text: str) -> str:
        """Replace CONFIG in the commands that a text names, so that the user can copy them to a shell."""
        if not self._config_words:
            return text

        def command(match: re.Match[str]) -> str:
            options = () if match[1] in _WITHOUT_PRECISION else self._config_options
            return f"`fastsd {match[1]} {shlex.join([*self._config_words, *options])}"

        return re.sub(r"`fastsd ([a-z-]+) CONFIG\b", command, text)

    def _fit(self, text: str) -> str:
        return fit(text, self.width) if self.is_terminal else text

    def table(self, rows: list[list[str]], texts: Collection[str] = ()) -> None:
        """Write a table. Columns with a digit in the last row are aligned right, except those whose head is in `texts`."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        has_digits = [any(character.isdigit() for character in text) for text in rows[-1]]
        left_aligned = [not digits or head in texts for head, digits in zip(rows[0], has_digits, strict=True)]
        for row in rows:
            columns = zip(row, widths, left_aligned, strict=True)
            cells = [text.ljust(width) if left else text.rjust(width) for text, width, left in columns]
            self.out("  ".join(cells).rstrip(), highlight=False)


STDOUT = Console()


def error_text(text: str) -> str:
    """Return an error as stderr shows it: with commands that can be copied, and fitted to a terminal."""
    text = STDOUT.copyable(text)
    return fit(text, get_terminal_size().columns) if sys.stderr.isatty() else text


_display: _Display | None = None
_lock = threading.RLock()  # of the progress line


class Work:
    """Work in progress.

    Attributes:
        done, total: units that are done, and all; a total of 0 is unknown.
        note: the speed and what limits it, for the line.
    """

    def __init__(self, text: str, total: int, unit: str) -> None:
        self.text, self.total, self.unit = text, total, unit
        self.done, self.note = 0, ""
        self._start, self._per_second = time.monotonic(), 0.0

    def add(self, count: int = 1) -> None:
        """Count more units as done."""
        self.done += count
        self._show()

    def set(self, done: int, total: int, per_second: float, note: str) -> None:
        """Replace the counts and the note, and give the speed, which may not be that since the start."""
        self.done, self.total, self._per_second, self.note = done, total, per_second, note
        self._show()

    def seconds_left(self) -> float | None:
        """Estimate the remaining time. Return None if the total is unknown or nothing is done, and 0 if more is done."""
        per_second = self._per_second or self.done / max(time.monotonic() - self._start, 1e-9)
        return max(self.total - self.done, 0) / per_second if self.total and per_second else None

    def __str__(self) -> str:
        if not self.total:
            return f"{self.text} {self.done} {self.unit}".rstrip() if self.done else self.text
        if self.unit == "bytes":
            return f"{self.text} {size_text(self.done)} of {size_text(self.total)}"
        return f"{self.text} {self.done}/{self.total} {self.unit}".rstrip()

    def _show(self) -> None:
        if _display and self in _display.works:
            _display.show()


class _Display:
    """The line of progress. Only the main thread shows its work."""

    def __init__(self, console: Console | None) -> None:
        if console is None:
            console = STDOUT if STDOUT.is_terminal else Console(stderr=True)
        self.console = console
        self.rewrites = console.is_terminal and not console.is_dumb_terminal
        self.works: list[Work] = []
        self._last = self._began = 0.0  # when the line was last written, and the outermost work began
        self._on_terminal = False  # True while the line stands on the terminal
        self._was_shown = False  # True once the outermost work has had a plain line

    def begin(self, work: Work) -> None:
        with _lock:
            if not self.works:
                self._was_shown, self._began = False, time.monotonic()
            self.works.append(work)
            self.show(now=self.rewrites)

    def end(self, work: Work) -> None:
        with _lock:
            if work in self.works:  # after an exception, works may end in any order
                del self.works[self.works.index(work) :]
            if not self.works:
                self.clear()

    def show(self, *, now: bool = False) -> None:
        """Show the line if there is work and the line is due, or at once."""
        with _lock:
            moment = time.monotonic()
            if self.rewrites:
                due = moment - self._last >= _REFRESH
            else:
                due = moment - self._last >= PLAIN_SECONDS if self._was_shown else moment - self._began >= SOON
            if self.works and (now or due):
                self._last, self._was_shown = moment, True
                self._write(self._line())

    def _line(self) -> str:
        left = next((left for work in self.works if (left := work.seconds_left()) is not None), None)
        fields = [*map(str, self.works), self.works[-1].note, "" if left is None else f"ETA {timedelta(seconds=round(left))}"]
        return " | ".join(field for field in fields if field).replace("\n", " ")

    def _write(self, line: str) -> None:
        if self.rewrites:
            self.console.file.write("\r" + on_one_line(line, self.console.width - 1))
            self.console.file.flush()
            self._on_terminal = True
        else:
            self.console.echo(line)

    def clear(self) -> None:
        """Remove the line from the terminal."""
        if self._on_terminal:
            self._on_terminal = False
            self.console.file.write(f"\r{' ' * (self.console.width - 1)}\r")
            self.console.file.flush()


@contextmanager
def _without_progress() -> Iterator[None]:
    """Remove the progress line from the terminal, and keep it away inside the block."""
    with _lock:
        if _display:
            _display.clear()
        yield


@contextmanager
def shown(console: Console | None = None) -> Iterator[None]:
    """Show the progress of all work in the block.

    Args:
        console: None = stdout if it is a terminal, otherwise stderr.
    """
    global _display
    outer, display, ended = _display, _Display(console), threading.Event()

    def refresh() -> None:  # also during work that counts nothing
        while not ended.wait(SOON):
            display.show()

    thread = threading.Thread(target=refresh, daemon=True)
    _display = display
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        display.clear()
        _display = outer


@contextmanager
def work(text: str, total: int = 0, unit: str = "") -> Iterator[Work]:
    """Show the progress of the block, which counts what is done.

    Args:
        text: the work, for example "loading unet".
        total: number of units; 0 = unknown.
        unit: "bytes", or a name for the units, for example "images".
    """
    display = _display if threading.current_thread() is threading.main_thread() else None
    progress = Work(text, total, unit)
    if display:
        display.begin(progress)
    try:
        yield progress
    finally:
        if display:
            display.end(progress)


def counted(text: str, items: Collection[T], unit: str = "") -> Iterator[T]:
    """Yield the items, and show how many the loop is done with."""
    with work(text, len(items), unit) as progress:
        for item in items:
            yield item
            progress.add()
