"""Settings as dotted keys: differences between runs, and `key=a,b,c` from the command line."""

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
    """Parse `key=a,b,c`. Return the key, and the values by their text. A value is TOML, or a bare word, which is a string.

    Raises:
        UserError: the key or a value is missing, or a value occurs twice.
    """
    key, equals, text = (field.strip() for field in word.partition("="))
    if not equals or not key:
        raise UserError(
            "swept-no-values", f"{word!r} is not a list of values; write key=a,b,c, for example stage.caption_dropout=0.04,0.1"
        )
    values: dict[str, Any] = {}
    for item in split(text):
        if not item:
            problem = "has an empty value" if text else "has no values"
            raise UserError("swept-value", f'{key} {problem} in {word!r}; write key=a,b,c, and "" for an empty string')
        value = parse_value(item)
        if setting_text(value) in map(setting_text, values.values()):
            raise UserError("swept-value-twice", f"{key} has the value {item} twice; remove one")
        values[item] = value
    return key, values


def split(text: str) -> list[str]:
    """Split text at its commas, except inside brackets and quotes."""
    items, depth, quote, previous = [""], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote and previous != "\\" else quote
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "[{") - (char in "]}")
        if char == "," and not quote and not depth:
            items.append("")
        else:
            items[-1] += char
        previous = char
    return [item.strip() for item in items]


def combinations(words: Sequence[str]) -> list[dict[str, tuple[str, Any]]]:
    """Combine the values of several `key=a,b,c` in every way: (text, value) by key. The last key varies fastest.

    Raises:
        UserError: as for `choices`, or a key occurs twice.
    """
    values_by_key: dict[str, dict[str, Any]] = {}
    for word in words:
        key, values = choices(word)
        if key in values_by_key:
            raise UserError("swept-key-twice", f"{key} is set twice; write all its values as {key}=a,b,c")
        values_by_key[key] = values
    products = product(*(values.items() for values in values_by_key.values()))
    return [dict(zip(values_by_key, chosen_values, strict=True)) for chosen_values in products]


def setting_text(value: object) -> str:
    """Format a setting's value as JSON, except that text has no quotes unless it is empty, and None is `UNSET`."""
    if value is None:
        return UNSET
    if isinstance(value, float):
        return f"{value:.10g}"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def safe_name(text: str) -> str:
    """Convert text to a file name that is valid on every system."""
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-.")[:80]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Map each dotted (or slashed) key to its shortest ending that no other key has."""
    separator = "/" if any("/" in key for key in keys) else "."
    shortest = {}
    for key in keys:
        segments = key.split(separator)
        others = [f"{separator}{other}" for other in keys if other != key]
        endings = [separator.join(segments[-n:]) for n in range(1, len(segments) + 1)]
        unique_endings = (ending for ending in endings if not any(other.endswith(f"{separator}{ending}") for other in others))
        shortest[key] = next(unique_endings, key)
    return shortest


def differences(configs: Sequence[Config]) -> dict[str, list[str]]:
    """Map each dotted key in which configs differ to its values as text, one per config, or `ABSENT` for a config without it.

    Stages are matched by name, unless every config has only one stage. A stage that some configs lack has a single key,
    `stage.NAME`, and its value lists the settings of the stage. `run` is ignored: it is the location of a run, not a setting.
    """
    one_stage_each = all(len(config.stage) == 1 for config in configs)
    columns = [flatten(config.model_dump(by_alias=True) | {"stage": None, "run": None}) for config in configs]
    names = dict.fromkeys(config.stage_name(i) for config in configs for i in range(len(config.stage)))
    for name in ["stage"] if one_stage_each else names:
        key = "stage" if one_stage_each else f"stage.{name}"
        stages_by_name = [{config.stage_name(i): stage for i, stage in enumerate(config.stage)} for config in configs]
        tables = [next(iter(stages.values())) if one_stage_each else stages.get(name) for stages in stages_by_name]
        everywhere = all(table is not None for table in tables)
        for column, table in zip(columns, tables, strict=True):
            if table is not None and everywhere:
                column |= flatten({k: v for k, v in table.model_dump().items() if k != "name"}, f"{key}.")
            elif table is not None:
                non_defaults = table.model_dump(exclude_defaults=True, exclude={"name"})
                column[key] = ", ".join(f"{k} = {setting_text(v)}" for k, v in non_defaults.items())

    keys = dict.fromkeys(key for column in columns for key in column)
    rows = {key: [column.get(key, ABSENT) for column in columns] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1 and set(row) != {ABSENT, UNSET}}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested tables into {dotted key: value as text}."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": setting_text(value)}
    return flat
