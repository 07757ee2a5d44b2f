"""Paths in a config: `~` and environment variables are expanded, and relative paths start at the current folder."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

from fastsd.errors import UserError

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def expanded(path: str) -> str:
    """Expand `~`, `$NAME` and `${NAME}`, and remove a separator at the end, so that a path has one spelling.

    Raises:
        ValueError: a variable in braces is not set, or the path has control characters.
    """
    if any(character < " " for character in path):
        advice = "write / or 'single quotes', because a backslash in double quotes starts an escape"
        raise ValueError(f"the path {path!r} has control characters; {advice}")
    text = os.path.expandvars(os.path.expanduser(path))
    if match := _VARIABLE.search(text):
        raise ValueError(
            f"the path {path!r} has the environment variable {match[1]}, which is not set; set it, or write the path"
        )
    short = text.rstrip("/" + os.sep)
    return text if short.endswith(":") else short or text


PathText = Annotated[str, AfterValidator(expanded)]


def listed_paths(path: str) -> set[str]:
    """Read the absolute paths in the list `data.exclude_files`.

    The list is a text file in UTF-8 with one path per line, as fastsd shows paths: a file, or tar/member. Relative paths start
    at the current folder. Text after a tab is a note. Empty lines and lines that start with # are skipped.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [line.rstrip("\n").partition("\t")[0] for line in file if not line.startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise UserError(
            "exclusion-unreadable",
            f"data.exclude_files is {path!r}, which cannot be read ({reason}); give a text file with one path per line",
        ) from None
    return {os.path.abspath(name) for name in names if name.strip()}
