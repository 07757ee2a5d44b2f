"""Conversion of a setting of another trainer: which keys and values have the same effect here, and the sentence that says so.

A rule takes a key's value and the other settings beside it, because many settings depend on others: four accumulations of
four images are `batch = 16`.  `other_trainers.py` and `onetrainer_keys.py` have a rule for each key.  The message for an
unknown key of a config and `fastsd convert-config` both use these rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Settings = Mapping[str, Any]  # all keys of the other trainer's config with their values; the keys of tables have dotted names
# same: another name at most. nearest: the effect is similar. no equal: nothing has the effect. not needed: off, or automatic
Status = Literal["same", "converted", "nearest", "no equal", "not needed"]


@dataclass(frozen=True)
class Conversion:
    """The result of a rule.

    Attributes:
        values: dotted keys of a config -> values. A stage's key is `stage.KEY`. None = the value is for the user to choose.
        why: how the values follow, how the effect differs, or why there are none; not a full sentence.
    """

    status: Status
    values: Mapping[str, Any]
    why: str = ""


Rule = Callable[[Any, Settings], Conversion]
Rules = dict[str, Rule]
OFF = Conversion("not needed", {}, "it is off")


def same(key: str) -> Rule:
    return lambda value, _: Conversion("same", {key: value})


def computed(key: str, function: Callable[[Any], Any], why: str = "", status: Status = "converted") -> Rule:
    return lambda value, _: OFF if status == "nearest" and not value else Conversion(status, {key: function(value)}, why)


def switch(key: str, value: Any, why: str = "", status: Status = "converted") -> Rule:
    """Return the rule of a key that is off, or else has the same effect as `key = value`."""
    return lambda on, _: Conversion(status, {key: value}, why) if on else OFF


def choose(key: str, why: str) -> Rule:
    return lambda value, _: Conversion("no equal", {key: None}, why) if value else OFF


def choices(key: str, values: Mapping[str, Any], nearest: Mapping[str, tuple[Any, str]] | None = None) -> Rule:
    """Return the rule of a key with certain words as values, whatever their case.

    Args:
        values: word -> value of `key`.
        nearest: word -> value with a similar effect, and how it differs.
    """

    def rule(word: Any, _: Settings) -> Conversion:
        folded = str(word).lower()
        if folded in values:
            return Conversion("converted" if values[folded] != word else "same", {key: values[folded]})
        if folded in (nearest or {}):
            value, why = (nearest or {})[folded]
            return Conversion("nearest", {key: value}, why)
        return Conversion("no equal", {}, f"{key.rpartition('.')[2]} has no such value")

    return rule


def no_equal(reason: str) -> Rule:
    return lambda value, _: Conversion("no equal", {}, reason) if value else OFF


def not_needed(reason: str) -> Rule:
    return lambda _, __: Conversion("not needed", {}, reason)


def with_reasons(make: Callable[[str], Rule], keys_by_reason: Mapping[str, str]) -> Rules:
    """Return `make(reason)` for each of the keys, which stand behind their reason, separated by spaces."""
    return {key: make(reason) for reason, keys in keys_by_reason.items() for key in keys.split()}


def convert_key(rule: Rule, value: Any, settings: Settings) -> Conversion:
    """Apply a rule. A value that is unset is off, and one that the rule cannot read has no equal."""
    if value is None or value in ("", [], {}):
        return OFF
    try:
        return rule(value, settings)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        return Conversion("no equal", {}, "its value is not understood")


def hint(conversion: Conversion, table: str) -> str:
    """Return the end of the sentence about an unknown key of another trainer: the keys and values to use instead.

    Args:
        table: the table with the unknown key. Keys of this table are written without its name.
    """
    why = f" ({conversion.why})" if conversion.why else ""
    if not conversion.values:
        return f"it has no equal{why}; remove it" if conversion.status == "no equal" else f"it is not needed{why}; remove it"
    assignments = " and ".join(
        key.removeprefix(f"{table}.")
        + ("" if value is None else f" = {toml_value(value)}")
        + (" above all tables" if table and "." not in key else "")
        for key, value in conversion.values.items()
    )
    return f"use {assignments}{', the nearest' if conversion.status == 'nearest' else ''}{why}"


def toml_value(value: Any) -> str:
    """Write a value in TOML, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_value(entry)}" for key, entry in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")


def clip_skip_note(clip_skip: int) -> str:
    """Say which layer of the text encoder a `clip_skip` above 0 reads, because other tools count from 1."""
    suffix = {1: "st", 2: "nd", 3: "rd"}.get((clip_skip + 1) % 10 if clip_skip + 1 not in (11, 12, 13) else 0, "th")
    return f"clip_skip is {clip_skip}: reads the {clip_skip + 1}{suffix}-last layer; kohya and A1111 call this {clip_skip + 1}"


def pyramid_rule(discount: Any, _: Settings) -> Conversion:
    """Convert multi-resolution noise. Its first level is a second noise of full size, so the coarser ones count 1 / sqrt(2)."""
    if not discount:
        return OFF
    why = "the discount over sqrt(2); the sizes there are random, here halves"
    return Conversion("nearest", {"stage.pyramid_noise": round(discount / 2**0.5, 4)}, why)


def batch_rule(_: Any, settings: Settings) -> Conversion:
    images = next((settings[key] for key in ("train_batch_size", "batch_size", "batch") if settings.get(key)), 32)
    count = settings.get("gradient_accumulation_steps") or settings.get("grad_accum") or 1
    if count == 1:
        return Conversion("same", {"stage.batch": images})
    values = {"stage.batch": images * count, "stage.micro_batch": images}
    return Conversion("converted", values, f"batch counts the images of a step, {images} x {count}")


def optimizer_rule(value: Any, settings: Settings) -> Conversion:
    name = str(value).rpartition(".")[2].lower()
    kind = name.removeprefix("paged").removesuffix("8bit").removesuffix("32bit")
    reasons = ["its state is fp32"] if kind != name else []
    arguments = {str(entry).partition("=")[0] for entry in settings.get("optimizer_args") or []} | settings.keys()
    if kind == "adamw":
        decay = {} if arguments & {"weight_decay", "adam_weight_decay"} else {"stage.weight_decay": 0.01}
        reasons += ["the default of weight_decay there is 0.01"] if decay else []
        return Conversion("converted", {"stage.optimizer": "adamw"} | decay, "; ".join(reasons))
    if kind in ("lion", "dadaptlion"):
        return Conversion("converted", {"stage.optimizer": "lion" if kind == "lion" else "dlion"}, "; ".join(reasons))
    if kind.startswith(("dadapt", "prodigy")):
        why = "it also estimates its step size, but updates by the sign"
        return Conversion("nearest", {"stage.optimizer": "dlion"}, why)
    return Conversion("nearest", {"stage.optimizer": "adamw"}, f"there is no {value}; choose lr anew")


def averages_rule(value: Any, settings: Settings) -> Conversion:
    """Convert an EMA of diffusers, OneTrainer or EveryDream2. One that is updated every k steps has the decay's k-th root."""
    interval = settings.get("ema_update_step_interval") or settings.get("ema_update_interval") or 1
    decay = next((settings[key] for key in ("ema_decay", "ema_max_decay", "ema_decay_rate") if settings.get(key)), 0.9999)
    if not value or str(value).upper() == "OFF" or settings.get("ema") == "OFF":
        return OFF
    if isinstance(settings.get("ema"), float):  # it is our key, in another table
        return Conversion("same", {"stage.ema": settings["ema"]})
    root = f"decay ** (1 / {interval}); " if interval != 1 else ""
    values = {"stage.ema": round(decay ** (1 / interval), 8), "stage.ema_power": 0.75}
    return Conversion("nearest", values, f"{root}the warm-up there is (1 + n) / (10 + n)")
