"""`fastsd config [KEY]`: the meaning, values and default of config keys."""

from __future__ import annotations

from textwrap import wrap

from fastsd.config.reference import entries, explain, lookup, title
from fastsd.terminal.console import STDOUT, Console

WIDEST = 100  # characters of a line, also in a wider terminal


def explain_config(name: str = "", console: Console = STDOUT) -> None:
    """Print a key, the keys of a table, or the names of all keys. Raises UserError if there is none of that name."""
    width = min(console.width, WIDEST)
    if name:
        console.echo("\n\n".join(explain(entry, width) for entry in lookup(name)))
        return
    for table in dict.fromkeys(entry.table for entry in entries()):
        keys = ", ".join(entry.key for entry in entries() if entry.table == table)
        console.echo("\n".join([title(table), *wrap(keys, width, initial_indent="    ", subsequent_indent="    "), ""]))
    console.echo("fastsd config KEY explains a key, for example `fastsd config stage.lr`")
