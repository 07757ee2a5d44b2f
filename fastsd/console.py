"""Output of commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from textwrap import wrap
from typing import IO, Any, cast

import rich.console

# Our own signs in terminals whose encoding has too few characters.
_PLAIN = str.maketrans({"±": "+-", "×": "x", "≈": "~", "—": "-", "…": "...", "·": "*"})

WARNING = "warning: "  # begins every line about something that may not be meant, and no other line
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


def size_text(count: float) -> str:
    """Format a number of bytes in the units of `df -h` and `nvidia-smi`: 12.5 MiB, 9.9 GiB, 1.23 TiB."""
    for unit, size, digits in (("TiB", 1 << 40, 2), ("GiB", 1 << 30, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count / (1 << 20):.1f} MiB"


def fit(text: str, width: int) -> str:
    """Wrap the lines of a text between words. Commands in backticks stay whole, so that they can be copied."""
    lines = []
    for line in text.split("\n"):
        whole = re.sub(r"`[^`]*`", lambda match: match[0].replace(" ", "\0"), line)
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
        lines += wrap(whole, width, subsequent_indent=indent, drop_whitespace=True, **options) if len(line) > width else [whole]
    return "\n".join(lines).replace("\0", " ")


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

    def table(self, rows: list[list[str]]) -> None:
        """Write a table. Columns with a digit in the last row are aligned right, other columns left."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        left_aligned = [not any(character.isdigit() for character in text) for text in rows[-1]]
        for row in rows:
            columns = zip(row, widths, left_aligned, strict=True)
            cells = [text.ljust(width) if left else text.rjust(width) for text, width, left in columns]
            self.out("  ".join(cells).rstrip(), highlight=False)


STDOUT = Console()
