"""Properties of a config key, declared in its annotation, beside its meaning.

    batch: Annotated[int, FIXED | COLUMN] = Field(32, ge=1)
    huber_delta: Annotated[float, FREE | LIGHT, Only(loss="huber")] = Field(1.0, gt=0)

Every key has FIXED or FREE.  What a key does not declare is treated in the safe way: it is planned for and put on the card.
"""

from __future__ import annotations

from enum import Flag, auto
from typing import Any

from pydantic import BaseModel


class Key(Flag):
    FIXED = auto()  # must not change while a run is in the stage: the rest would be a different run
    FREE = auto()  # may change when a run is resumed
    LIGHT = auto()  # changes neither the memory nor the operations of a step, so `fastsd plan` ignores it
    COLUMN = auto()  # has a column in the model card's table of stages
    NO_EFFECT = auto()  # does not affect the trained weights, so the model card omits it
    NOISE = auto()  # modifies the noise, so the step cannot draw it within the fused kernel
    CAPTION = auto()  # edits captions, so text embeddings cannot come from a cache


FIXED, FREE, LIGHT, COLUMN, NO_EFFECT, NOISE, CAPTION = Key


class Only:
    """Marks a key that works only with certain values of another: `Only(weighting=("min_snr", "p2"))`."""

    def __init__(self, **condition: str | tuple[str, ...]) -> None:
        ((self.option, values),) = condition.items()
        self.values = (values,) if isinstance(values, str) else values


def properties(table: type[BaseModel]) -> dict[str, Key]:
    """Return the properties of each key of a table."""
    fields = table.model_fields.items()
    return {key: next((mark for mark in field.metadata if isinstance(mark, Key)), Key(0)) for key, field in fields}


def keys_with(table: type[BaseModel], mark: Key) -> list[str]:
    """Return the keys of a table that have a property, in the table's order."""
    return [key for key, declared in properties(table).items() if mark in declared]


def conditions(table: type[BaseModel]) -> dict[str, Only]:
    """Return the condition of each key that works only with certain values of another key."""
    return {key: mark for key, field in table.model_fields.items() for mark in field.metadata if isinstance(mark, Only)}


def defaults(table: type[BaseModel], keys: list[str]) -> dict[str, Any]:
    """Return the default values of keys that have one."""
    fields = table.model_fields
    return {key: fields[key].get_default(call_default_factory=True) for key in keys if not fields[key].is_required()}
