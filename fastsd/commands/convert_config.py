"""`fastsd convert-config`: write a config with the settings of another trainer's config file, and say what became of each key.

`foreign_config.py` reduces a trainer's file to flat settings, and reads its datasets or concepts.  Then the rule of each key
(see `fastsd.config.conversion`) gives the keys and values here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from fastsd.commands.foreign_config import Foreign, read_foreign
from fastsd.config.conversion import Conversion, Rules, Settings, convert_key, toml_value
from fastsd.config.schema import load_config
from fastsd.errors import UserError
from fastsd.storage import replace_file
from fastsd.terminal.console import STDOUT, Console

LABELS = {"same": "taken over", "converted": "converted", "nearest": "nearest", "no equal": "no equal"}
TABLES = ("model", "model.lora", "data", "data.buckets", "cache", "sample", "validate", "log", "export", "stage")
NEEDED = {  # keys that a config must have, with a value to start from and advice
    "model.base": ("sd15", "no base model is named; set it to a diffusers folder, a hub id or a .safetensors file"),
    "data.folders": (["images"], "no folder of images is named; list your folders"),
    "stage.train": (["unet"], "nothing to train is named; the UNet is assumed"),
    "stage.until": (1000, "no length is named; set steps or epochs"),
}


@dataclass
class Result:
    """The converted keys, and lines about the others.

    Attributes:
        values: dotted key -> value and comment.
        rows: status -> lines about keys with that status.
    """

    values: dict[str, tuple[Any, str]] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, status: str, line: str) -> None:
        self.rows.setdefault(status, []).append(line)

    def convert(self, name: str, value: Any, rules: Rules, settings: Settings, *, by_default: bool = False) -> None:
        """Convert a key that has a rule, or list it as unknown.

        Args:
            by_default: the file does not have the key, so it has the other trainer's default.
        """
        origin = f"{' '.join(name.split())} = {_short(value)}" + (", its default there" if by_default else "")
        key = name.removeprefix("concepts.")
        rule = next((rules[pattern] for pattern in _patterns(key) if pattern in rules), None)
        if rule is None:
            self.add("unknown", origin)
            return
        conversion = convert_key(rule, value, settings)
        new_values = {new: new_value for new, new_value in conversion.values.items() if new_value is not None}
        if not new_values:
            if conversion.status == "not needed":
                self.add("not needed", "" if by_default else name)
            else:
                self.add("no equal", _with_reason(_choice(origin, conversion), conversion.why))
            return
        for new, new_value in new_values.items():
            if not (by_default and new in self.values):  # a key of the file counts more than a default
                self.values[new] = new_value, _with_reason(origin, conversion.why)
        assignments = " and ".join(f"{new} = {toml_value(new_value)}" for new, new_value in new_values.items())
        self.add(conversion.status, _with_reason(f"{origin} -> {assignments}", conversion.why))


def convert_config(source: Path, out: Path | None, console: Console = STDOUT) -> None:
    """Convert the config of sd-scripts, OneTrainer or EveryDream2 and print a line for each key.

    Args:
        out: the TOML file to write; None = `SOURCE-fastsd.toml` beside `source`.

    Raises:
        UserError: `source` is not a config of a known trainer, or `out` exists.
    """
    out = out or source.with_name(f"{source.stem}-fastsd.toml")
    if out.exists():
        raise UserError("convert-config-exists", f"{out} already exists; choose a new name, or remove it")
    foreign = read_foreign(source)
    result = converted(foreign)
    missing = _complete(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, _toml(source, foreign, result))

    console.echo(f"{source}: a config of {foreign.trainer}, converted to {out}")
    for status, label in LABELS.items():
        for line in result.rows.get(status, []):
            console.echo(f"{label:<12}{line}")
    if names := sorted(filter(None, result.rows.get("not needed", []))):
        console.echo(f"{'not needed':<12}{', '.join(names)}")
    for line in result.rows.get("unknown", []):
        console.echo(f"{'unknown':<12}{line}; look for a setting in its place")
    for line in [*foreign.notes, *missing, *_problems(out)]:
        console.echo(f"{'to do':<12}{line}")
    console.echo(f"next: `fastsd check {quote(str(out))}`")


def converted(foreign: Foreign) -> Result:
    """Apply the rules of a trainer to its settings."""
    result = Result()
    lookup = foreign.defaults | foreign.settings
    for name, value in foreign.settings.items():
        if name not in foreign.expanded:
            result.convert(name, value, foreign.rules, lookup)
    for name, value in foreign.concept_settings.items():
        result.convert(f"concepts.{name}", value, foreign.concept_rules, foreign.concept_settings)
    for name, value in foreign.defaults.items():
        if name not in foreign.settings:
            result.convert(name, value, foreign.rules, lookup, by_default=True)
    for reason, names in foreign.without_equal.items():
        for name in names:
            result.add("no equal", _with_reason(name, reason))
    for key, (value, origin) in foreign.values.items():
        result.values[key] = value, origin
        result.add("converted", f"{origin} -> {key} = {toml_value(value)}")

    if "data.buckets" not in result.values:
        result.values = {key: value for key, value in result.values.items() if not key.startswith("data.buckets.")}
    if "validate.held_out" not in result.values and (every := result.values.pop("validate.every", None)):
        result.add("no equal", _with_reason(every[1], "set validate.held_out first, a number of images"))
    return result


def _complete(result: Result) -> list[str]:
    """Add the keys that a config must have. Return a sentence about each."""
    missing = []
    for key, (value, advice) in NEEDED.items():
        if key not in result.values:
            result.values[key] = value, "missing"
            missing.append(f"{key}: {advice}")
    if "model.vae" not in result.values:
        missing.append("model.vae: no VAE is named, so the base's is used; set it to swap in another")
    return missing


def _problems(path: Path) -> list[str]:
    """Return what is wrong with the written config."""
    try:
        load_config(path)
    except UserError as error:
        return [problem.removeprefix(f"{path}: ") for problem in str(error).split("\n")]
    return []


def _toml(source: Path, foreign: Foreign, result: Result) -> str:
    """Write the values as TOML, each with the key that it comes from, and at the end the keys without an equal."""
    lines = [f"# Converted from {source.name}, a config of {foreign.trainer}. `fastsd check` finds what is left to do.", ""]
    lines += [_line(key, *result.values[key]) for key in result.values if "." not in key]
    for table in TABLES:
        rows = {key: value for key, value in result.values.items() if key.rpartition(".")[0] == table}
        rows.pop("data.buckets", None)
        if rows or table in result.values:
            comment = f"  # {result.values[table][1]}" if table in result.values else ""
            lines += ["", f"[[{table}]]" if table == "stage" else f"[{table}]{comment}"]
            lines += [_line(key.rpartition(".")[2], *value) for key, value in rows.items()]
    for status, title in (("no equal", "No equal"), ("unknown", "Unknown")):
        if rows_of := result.rows.get(status):
            lines += ["", f"# {title}:", *(f"#   {line}" for line in rows_of)]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, comment: str) -> str:
    return f"{key} = {toml_value(value)}  # {comment}"


def _patterns(key: str) -> Iterable[str]:
    """Yield the names under which a rule for a key may stand: its own, and those of all keys of its tables."""
    yield key
    while "." in key:
        key = key.rpartition(".")[0]
        yield f"{key}.*"
    yield f"{key}.*"


def _choice(origin: str, conversion: Conversion) -> str:
    return f"{origin} -> {' and '.join(conversion.values)}" if conversion.values else origin


def _with_reason(line: str, reason: str) -> str:
    return f"{line}: {reason}" if reason else line


def _short(value: Any) -> str:
    text = toml_value(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
