"""The reference of all config keys, read from the schema: each key's type, default and conditions, and the comment beside it.

`fastsd config KEY` prints an entry. `docs/config.md` holds all of them:

    python -m fastsd.config.reference > docs/config.md
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import json
import math
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastsd.config.config_errors import KINDS
from fastsd.config.keys import FIXED, conditions, properties
from fastsd.config.schema import TABLES, Config, FolderTable
from fastsd.errors import UserError

BOUNDS = (Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below")
LISTS = ("stage",)
NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
INTRODUCTION = """\
# Config keys

This page is generated from `fastsd/config/`. `fastsd config KEY` prints the same in a terminal. A config is TOML. It needs
`[model] base`, `[data] folders` and at least one `[[stage]]` with `train` and `until`. To override a value, add it to a
command: `seed=7`, `stage.unet.batch=16` for the stage with the name "unet", or `stage.batch=16` for all stages.

A key of a stage that says "fixed" cannot change once the run is in that stage; all others can, at every start.
"""


class Entry(NamedTuple):
    """A key of the config. `default` is "" if the key is required."""

    table: str
    key: str
    type: str
    default: str
    condition: str
    meaning: str

    @property
    def name(self) -> str:
        return f"{self.table}.{self.key}" if self.table else self.key


@cache
def entries() -> list[Entry]:
    """Return all keys, in the order of the schema."""
    tables: dict[str, type[BaseModel]] = {"": Config, **TABLES, "data.folders": FolderTable}
    order = ["", *(field.alias or name for name, field in Config.model_fields.items())]
    names = sorted(tables, key=lambda name: (order.index(name.split(".")[0]), name))
    return [entry for name in names for entry in _entries(name, tables[name])]


def _entries(name: str, table: type[BaseModel]) -> Iterator[Entry]:
    comments, marks, only = _comments(table), properties(table), conditions(table)
    for key, field in table.model_fields.items():
        if table is Config and (key == "stage" or _is_table(field.annotation)):
            continue
        rules = [f"only with {only[key].option} = {_either(only[key].values)}"] if key in only else []
        rules += ["fixed"] if FIXED in marks[key] else []
        accepted = KINDS.get(f"{name}.{key}") or KINDS.get(key) or _kind(field.annotation, field.metadata)
        default = "" if field.is_required() else _toml(field.get_default(call_default_factory=True))
        yield Entry(name, key, accepted, default, "; ".join(rules), comments[key])


def _comments(table: type[BaseModel]) -> dict[str, str]:
    """Return the comment of each key: the lines directly above it, and those beside it."""
    source = inspect.getsource(table)
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.removeprefix("#").strip() for token in tokens if token.type == tokenize.COMMENT}
    meanings = {}
    for node in cast(ast.ClassDef, ast.parse(source).body[0]).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            texts = [comments[line] for line in range(first, (node.end_lineno or first) + 1) if line in comments]
            meanings[node.target.id] = " ".join(text for text in texts if text != "fmt: skip")
    return meanings


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _kind(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describe the values that a type accepts, with the limits in `metadata`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    limits = [
        f" {word} {_short(getattr(mark, name))}"
        for mark in _flat(metadata)
        for kind, name, word in BOUNDS
        if type(mark) is kind
    ]
    if origin is Annotated:
        return _kind(arguments[0], arguments[1:])
    if origin is Literal:
        return _either(arguments)
    if origin is list:
        return f"a list of {_kind(arguments[0]).removeprefix('a ')}s"
    if arguments:
        return " or ".join(_kind(argument) for argument in arguments if argument is not NoneType) + ",".join(limits)
    if _is_table(annotation):
        return "a table"
    return NAMES[annotation] + ",".join(limits)


def _short(limit: float) -> str:
    power = round(math.log2(limit)) if limit > 1 << 20 else 0
    return f"2^{power}" if power and limit == 2**power else f"{limit:g}"


def _flat(metadata: Iterable[Any]) -> list[Any]:
    """Return marks, and those in a nested Field."""
    return [mark for item in metadata for mark in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _either(values: Iterable[Any]) -> str:
    *others, last = [json.dumps(value) for value in values]
    return f"{', '.join(others)} or {last}" if others else last


def _toml(value: Any) -> str:
    return "unset" if value is None else "no table" if isinstance(value, BaseModel) else json.dumps(value)


def lookup(name: str) -> list[Entry]:
    """Return the entries of a key, with or without its table, or those of a table. Raises UserError if there are none."""
    name = name.strip("[]")
    matches = [entry for entry in entries() if name in (entry.name, entry.key, entry.table)]
    exact = [entry for entry in matches if name in (entry.name, entry.table)]
    if not matches:
        names = [*dict.fromkeys(entry.table for entry in entries() if entry.table), *(entry.name for entry in entries())]
        keys = {entry.key: entry.name for entry in entries()} | {key: key for key in names}
        close = difflib.get_close_matches(name.lower(), keys, n=1)
        advice = f"did you mean {keys[close[0]]}?" if close else "`fastsd config` lists all keys"
        raise UserError("config-key-unknown", f"{name}: the config has no such key or table; {advice}")
    return exact or matches


def explain(entry: Entry, width: int) -> str:
    """Return an entry as lines of at most `width` characters for a terminal."""
    lines = [line for text in (entry.meaning, _facts(entry)) for line in textwrap.wrap(text, width - 4, break_on_hyphens=False)]
    return "\n".join([entry.name, *(f"    {line}" for line in lines)])


def _facts(entry: Entry) -> str:
    facts = [entry.type, f"default {entry.default}" if entry.default else "required", entry.condition]
    line = "; ".join(fact for fact in facts if fact)
    return line[0].upper() + line[1:] + "."


def _item(entry: Entry) -> str:
    meaning = entry.meaning.removesuffix(".").replace("*", "\\*")
    return f"- `{entry.key}`: {meaning}. *{_facts(entry)}*"


def title(table: str) -> str:
    """Return the header of a table in a config."""
    return f"[[{table}]]" if table in LISTS else f"[{table}]" if table else "before the first table"


def page() -> str:
    """Return docs/config.md."""
    lines = [INTRODUCTION]
    for name in dict.fromkeys(entry.table for entry in entries()):
        lines += [f"## {title(name)}\n", *(_item(entry) for entry in entries() if entry.table == name), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
