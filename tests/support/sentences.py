"""Assertions on messages of fastsd. A test names a message, and `sentences.toml` holds its sentence."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastsd.errors import UserError
from fastsd.terminal.texts import WARNING

FILE = Path(__file__).with_suffix(".toml")
_TABLES = tomllib.loads(FILE.read_text())
ERRORS, LINES, WARNINGS = _TABLES["errors"], _TABLES["lines"], _TABLES["warnings"]
SENTENCES = ERRORS | LINES | WARNINGS


def pattern(name: str, /, **fields: object) -> re.Pattern[str]:
    """Compile the sentence `name`. A field that is not given matches any text within a line.

    A warning follows its word, or is a whole text that nothing has printed yet. CONFIG is a field: a command line fills it in.
    """
    sentence = SENTENCES[name].replace("CONFIG", "{CONFIG}")
    parts = re.split(r"\{(\w+)\}", sentence)
    assert not fields.keys() - set(parts[1::2]), f"{name}: {sentence!r} has no field {sorted(fields)}"
    for i, text in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.escape(text)
        elif text in fields:
            parts[i] = rf"(?<!\d){re.escape(str(fields[text]))}(?!\d)"  # 1 is not the beginning of 12
        else:
            parts[i] = r"[^\n]*?"
    start = rf"(?:\A|{re.escape(WARNING)})" if name in WARNINGS else ""
    return re.compile(start + "".join(parts))


def sentence(name: str, /, **fields: object) -> str:
    """Return the sentence `name` with all its fields filled in."""
    return SENTENCES[name].format(**fields)


def says(text: str, name: str, /, **fields: object) -> bool:
    """Return True if the sentence `name` with the given fields occurs in `text`."""
    return pattern(name, **fields).search(text) is not None


@contextmanager
def refused(name: str, /, error: type[Exception] = UserError, **fields: object) -> Iterator[pytest.ExceptionInfo]:
    """Expect an error whose code is `name` (a `UserError`) and whose message is the sentence `name` with the given fields."""
    with pytest.raises(error, match=pattern(name, **fields)) as info:
        yield info
    assert getattr(info.value, "code", name) == name
