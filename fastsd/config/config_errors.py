"""Error messages for invalid configs: one sentence per problem, with the field, the value found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from fastsd.config.conversion import hint
from fastsd.config.other_trainers import conversion_of

Tables = Mapping[str, Any]  # pydantic models by table name; a nested table has a dotted name, such as data.buckets

# Descriptions of the accepted values, for keys that accept more than one type.
KINDS = {
    "folders": 'a list of paths, each a string or { path = "...", repeats = 2 } or { path = "...", weight = 0.5 }',
    "model.chunks": 'a whole number from 1 to 8, or "auto"',
    "micro_batch": 'a whole number, 0 for the whole batch, or "auto"',
    "lr": "a number above 0, or one per trained component: { unet = 1e-6, text_encoder = 3e-6 }",
    "ema": "a number from 0 to below 1, or { sigma_rel = [0.05, 0.10] } with one to four lengths above 0 and at most 0.2886",
    "until": 'a number of steps, or "2e", "64000 images", "12h"',
    "validate.every": 'a number of steps, or "1e", "30m"',
    "sample_every": 'a number of steps, 0 for never, or "1e", "30m"',
    "checkpoint_every": 'a number of steps, or "1e", "30m"',
    "keep_every": 'a number of steps, 0 for never, or "10e", "1000000 images"',
    "checkpoint_at": 'a list of steps or "1e", "5000 images"',
}


def unknown_keys(raw: dict[str, Any], top: Collection[str], tables: Tables) -> list[str]:
    """Return a sentence for each key that is not in the schema. `top` holds the valid keys outside tables."""
    problems = []
    for key in raw:
        if key not in top:
            problems.append(f"{key}: unknown key{_did_you_mean(key, raw, '', sorted(top), tables)}")
    for name, table in tables.items():
        entries: Any = raw
        for segment in name.split("."):
            entries = entries.get(segment, {}) if isinstance(entries, dict) else {}
        for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            place = f"{name}.{i}" if isinstance(entries, list) else name
            for key in entry if isinstance(entry, dict) else []:
                if key not in table.model_fields:
                    advice = _did_you_mean(key, entry, name, sorted(table.model_fields), tables)
                    problems.append(f"{place}.{key}: unknown key{advice}")
    return problems


def _did_you_mean(key: str, entry: dict[str, Any], table: str, names: list[str], tables: Tables) -> str:
    """Return the end of the sentence about a key of `entry`, which has the keys of a table that are valid or not."""
    full_names = {field: f"{name}.{field}" for name, cls in tables.items() for field in cls.model_fields}
    conversion = conversion_of(key, entry[key], entry)
    if conversion and (conversion.values or key not in full_names):
        return f"; {hint(conversion, table)}"
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    if key in full_names:
        return f"; did you mean {full_names[key]}?"
    return f"; valid keys are {', '.join(names)}" if names else ""


def sentence(item: Any) -> str:
    """Turn a pydantic error into a sentence: the field, the value found and what to do."""
    place = ".".join(str(segment) for segment in item["loc"] if segment not in ("int", "str", "float", "table"))
    value = item["input"]
    for i, segment in enumerate(item["loc"]):
        location = ".".join(map(str, item["loc"][: i + 1]))
        accepted = KINDS.get(location) or KINDS.get(str(segment))
        if accepted and item["type"] not in ("value_error", "missing"):
            return f"{location} is {value!r}; it must be {accepted}"

    if item["type"] == "missing":
        if len(item["loc"]) == 1:
            return f"[{place}] is missing; add the table"
        return f"{place} is missing; add it"
    if place == "stage" and isinstance(value, dict):
        return "stage is a table; write [[stage]] with two brackets"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{place}: {message}" if place else message

    expected = item["msg"].replace("Input should be ", "").replace("a valid ", "a ").replace("a integer", "a whole number")
    if item["type"] == "literal_error":
        return f"{place} is {value!r}; choose {expected}"
    if item["type"] in ("too_short", "too_long"):
        limit = item["ctx"].get("min_length", item["ctx"].get("max_length"))
        bound = "least" if item["type"] == "too_short" else "most"
        noun = "entry" if limit == 1 else "entries"
        return f"{place} is {value!r}; it must have at {bound} {limit} {noun}"
    if "instance of" in expected:
        expected = "a table"
    type_name = type(value).__name__
    shown = value if len(repr(value)) < 80 else type_name
    type_note = f" (a{'n' if type_name[0] in 'aeiou' else ''} {type_name})" if item["type"].endswith("_type") else ""
    return f"{place} is {shown!r}{type_note}; it must be {expected[0].lower()}{expected[1:]}"
