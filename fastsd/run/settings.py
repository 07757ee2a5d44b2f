"""Settings as dotted keys - in which ones runs differ, and `key=a,b,c` as the command line has it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from fastsd.config.schema import Config, parse_value
from fastsd.errors import UserError

ABSENT, UNSET = "—", "unset"


def choices(word: str) -> tuple[str, dict[str, Any]]:
    """`key=a,b,c` -> (key, {text: value}). Values are TOML, bare words are strings; commas in brackets or quotes part nothing.

    Raises:
        UserError: no key, no value, or one that is there twice.
    """
    key, equals, text = (part.strip() for part in word.partition("="))
    if not equals or not key:
        raise UserError(f"{word!r} names no values; write key=a,b,c, for example stage.caption_dropout=0.04,0.1")
    found: dict[str, Any] = {}
    for item in split(text):
        if not item:
            what = "has an empty one among its values" if text else "has no values"
            raise UserError(f'{key} {what} ({word!r}); write key=a,b,c, and "" for an empty text')
        value = parse_value(item)
        if said(value) in map(said, found.values()):
            raise UserError(f"{key} has the value {item} twice; leave one out")
        found[item] = value
    return key, found


def split(text: str) -> list[str]:
    """Parts between commas, but for those within brackets or quotes."""
    parts, depth, quote, before = [""], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        if char == "," and not quote and not depth:
            parts.append("")
        else:
            parts[-1] += char
        before = char
    return [part.strip() for part in parts]


def combinations(words: Sequence[str]) -> list[dict[str, tuple[str, Any]]]:
    """Every combination of `key=a,b,c` words as {key: (text, value)}, the last key running fastest.

    Raises:
        UserError: as `choices`, and for a key that is there twice.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for word in words:
        key, values = choices(word)
        if key in chosen:
            raise UserError(f"{key} is given twice; write all its values in one: {key}=a,b,c")
        chosen[key] = values
    every = product(*(values.items() for values in chosen.values()))
    return [dict(zip(chosen, picked, strict=True)) for picked in every]


def said(value: Any) -> str:
    """A setting's value in a word: JSON, but text without its quotes."""
    if value is None:
        return UNSET
    if isinstance(value, float):
        return f"{value:.10g}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def safe_name(text: str) -> str:
    """A text as a file's name that every system takes."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.")[:80]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Dotted (or slashed) keys -> their ends, each just long enough to be told from the others."""
    mark = "/" if any("/" in key for key in keys) else "."
    short = {}
    for key in keys:
        parts = key.split(mark)
        ends = [mark.join(parts[-n:]) for n in range(1, len(parts) + 1)]
        alone = (e for e in ends if not any(o != key and f"{mark}{o}".endswith(f"{mark}{e}") for o in keys))
        short[key] = next(alone, key)
    return short


def differences(configs: Sequence[Config]) -> dict[str, list[str]]:
    """Dotted keys in which configs differ -> the value of each, in words; `ABSENT` where one has no such table.

    Stages go by name, or by none where every run has one only. Of a stage that some runs lack, one row `stage.NAME` tells what
    it sets. `run` is no setting: it is where a run lies.
    """
    single = all(len(config.stage) == 1 for config in configs)
    columns = [_flat(config.model_dump(by_alias=True) | {"stage": None, "run": None}) for config in configs]
    names = dict.fromkeys(config.stage_name(i) for config in configs for i in range(len(config.stage)))
    for name in ["stage"] if single else names:
        key = "stage" if single else f"stage.{name}"
        stages = [{config.stage_name(i): stage for i, stage in enumerate(config.stage)} for config in configs]
        tables = [next(iter(mine.values())) if single else mine.get(name) for mine in stages]
        everywhere = all(table is not None for table in tables)
        for column, table in zip(columns, tables, strict=True):
            if table is not None and everywhere:
                column |= _flat({k: v for k, v in table.model_dump().items() if k != "name"}, f"{key}.")
            elif table is not None:
                set_here = table.model_dump(exclude_defaults=True, exclude={"name"})
                column[key] = ", ".join(f"{k} = {said(v)}" for k, v in set_here.items())
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = {key: [column.get(key, ABSENT) for column in columns] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1 and set(row) != {ABSENT, UNSET}}


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": said(value)}
    return flat
