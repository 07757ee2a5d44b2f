"""Texts for a terminal: sizes in bytes, numbers of things, lines that fit its width."""

from __future__ import annotations

import re
from textwrap import wrap
from typing import Any

from rich.cells import cell_len, set_cell_size

WARNING = "warning: "  # begins every line about something that may not be meant, and no other line


def size_text(count: float) -> str:
    """Format a number of bytes in the units of `df -h` and `nvidia-smi`: 12.5 MiB, 9.9 GiB, 1.23 TiB."""
    for unit, size, digits in (("TiB", 1 << 40, 2), ("GiB", 1 << 30, 1)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count / (1 << 20):.1f} MiB"


def numbered(count: int, singular: str, plural: str) -> str:
    """Format a number with the words that follow it: "1 image has", "3 images have"."""
    return f"{count} {singular if count == 1 else plural}"


def fit(text: str, width: int) -> str:
    """Wrap the lines of a text between words. Commands in backticks stay whole, so that they can be copied."""
    lines = []
    for line in text.split("\n"):
        whole = re.sub(r"`[^`]*`", lambda match: match[0].replace(" ", "\0"), line)
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "replace_whitespace": False}
        lines += wrap(whole, width, subsequent_indent=indent, drop_whitespace=True, **options) if len(line) > width else [whole]
    return "\n".join(lines).replace("\0", " ")


def on_one_line(text: str, width: int) -> str:
    """Cut a text to the width of a line, or pad it. The start of its longest word, which is a path, goes before its end."""
    word = max(text.split(" "), key=len)
    excess = cell_len(text) - width + len("...")
    if 3 < excess < len(word) - 8:
        text = text.replace(word, f"...{word[excess:]}", 1)
    return set_cell_size(text, width)
