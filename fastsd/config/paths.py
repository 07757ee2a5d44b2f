"""Paths in a config: `~` and environment variables are expanded, and relative paths start at the current folder."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator

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
