"""Text on a terminal: lines end between words, and commands stay whole."""

from io import StringIO

import pytest

from fastsd.terminal.console import Console
from fastsd.terminal.texts import fit


@pytest.mark.parametrize(
    "text, lines",
    [
        ("short", ["short"]),
        ("note  words that do not fit into a line", ["note  words that do", "  not fit into a", "  line"]),
        ("  - a list item that is long", ["  - a list item that", "    is long"]),
        ("run `fastsd cache a.toml b=1` now", ["run", "  `fastsd cache a.toml b=1`", "  now"]),
        ("x" * 30, ["x" * 30]),
        ("one\n\n  two", ["one", "", "  two"]),
        ("state-of-the-art a-b-c-d-e", ["state-of-the-art", "  a-b-c-d-e"]),
    ],
)
def test_lines_end_between_words(text, lines):
    assert fit(text, 20).split("\n") == lines


def test_only_a_terminal_wraps():
    for terminal, count in ((True, 2), (False, 1)):
        file = StringIO()
        console = Console(file=file, width=20, force_terminal=terminal, color_system=None)
        console.echo("words that do not fit here")
        console.warn("words that do not fit here")
        console.table([["aaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbb"]])
        assert len(file.getvalue().splitlines()) == 2 * count + 1
