"""Text of others in Markdown: titles, prompts and names appear as they are, and never act as markup, HTML or YAML.

Source: CommonMark 0.31, sections 2.4 (backslash escapes) and 6.1 (code spans); GitHub Flavored Markdown, section 4.10 (tables).
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Sequence

_MARKUP = re.compile(r"[\\`*\[\]~$]|(?<![^\W_])_|_(?![^\W_])|^[#+=-]|(?<= )#")
_NUMBER = re.compile(r"^(\d{1,9})([.)])(?= |$)")  # it would start an ordered list
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they would reorder the text around them


def inline(text: str) -> str:
    """Escape text for a line, a list item or a cell of `table`."""
    return html.escape(_NUMBER.sub(r"\1\\\2", _MARKUP.sub(r"\\\g<0>", one_line(text))), quote=False)


def code(text: str) -> str:
    """Format text as a code span."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * (text[:1] == "`" or text[-1:] == "`")
    return f"{fence}{pad}{text}{pad}{fence}"


def link_or_code(name: str) -> str:
    """Format a hub id as a link and any other name as code."""
    return f"[{inline(name)}](https://huggingface.co/{name})" if is_hub_id(name) else code(name)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table of cells that are Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def yaml_string(text: str) -> str:
    """Format text as a double-quoted YAML string."""
    return json.dumps(one_line(text), ensure_ascii=False)


def python_string(text: str) -> str:
    """Format text as a Python string literal of printable characters."""
    literal = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in literal)


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name, re.ASCII) is not None


def one_line(text: str) -> str:
    """Replace whitespace, control characters and what is no text by single spaces."""
    chars = (" " if unicodedata.category(char) in ("Cc", "Cs", "Cn") or char in _BIDI else char for char in text)
    return " ".join("".join(chars).split())
