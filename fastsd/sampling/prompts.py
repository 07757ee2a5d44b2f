"""Prompts of a sample grid, and the settings of each image.

A prompt is an entry of `sample.prompts`, or a line of a file with options as kohya's sd-scripts read them:

    a red fox --w 768 --h 512 --d 5 --s 30 --l 7.5 --n blurry, dark

An option begins with a space and two hyphens, so it can contain spaces. Settings without an option are those of `[sample]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fastsd.config.config_errors import sentence
from fastsd.config.schema import MOST_CHUNKS, PromptTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.text_encoder import TextEncoder, chunk_limit, divide, ids_of

_OPTIONS: dict[str, tuple[str, Callable[[str], object], str]] = {
    "w": ("width", int, "a whole number"), "h": ("height", int, "a whole number"), "d": ("seed", int, "a whole number"),
    "s": ("steps", int, "a whole number"), "l": ("guidance", float, "a number"), "n": ("negative", str, "a text"),
}  # fmt: skip


@dataclass(frozen=True)
class ImageSettings:
    """All settings of one image that may differ from those of its neighbours in a grid. Width and height are in px.

    Attributes:
        label: the prompt with those settings that it has itself, as a line that `parse_prompt` reads; "" = only the prompt.
    """

    prompt: str
    negative: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    label: str = ""


def read_prompts(table: SampleTable) -> list[PromptTable]:
    """Return the listed prompts of a config, followed by those of its file.

    Raises:
        UserError: the file cannot be read, or a line has an option that is unknown or has an invalid value.
    """
    prompts = [PromptTable(prompt=entry) if isinstance(entry, str) else entry for entry in table.prompts]
    if table.prompts_file:
        try:
            lines = Path(table.prompts_file).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"the file of prompts {table.prompts_file!r} cannot be read ({error})"
            raise UserError("prompts-unreadable", f"{problem}; give a UTF-8 text file") from None
        for number, line in enumerate(lines, start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                prompts.append(parse_prompt(line, f"{table.prompts_file}, line {number}"))
    return prompts


def parse_prompt(line: str, place: str) -> PromptTable:
    """Read a prompt with options. `place` begins the message of a UserError for options that are unknown or invalid."""
    prompt, *options = f" {line.strip()}".split(" --")
    values: dict[str, object] = {"prompt": prompt.strip()}
    for option in options:
        name, _, text = option.partition(" ")
        if name.lower() not in _OPTIONS:
            choice = ", ".join(f"--{letter}" for letter in _OPTIONS)
            raise UserError(
                "prompt-option", f"{place}: the option {f'--{option}'!r} is not supported; use {choice}, or remove it"
            )
        key, convert, kind = _OPTIONS[name.lower()]
        try:
            values[key] = convert(text.strip())
        except ValueError:
            raise UserError("prompt-option-value", f"{place}: --{name} is {text!r}; give {kind}") from None
    try:
        return PromptTable.model_validate(values)
    except ValidationError as error:
        raise UserError("prompt-option-range", f"{place}: {sentence(error.errors()[0])}") from None


def images_of(table: SampleTable, size: int) -> list[ImageSettings]:
    """Return the settings of a grid's images, row by row. `size` is the width and height if neither table nor prompt has any.

    Raises:
        UserError: as `read_prompts`.
    """
    images = []
    for prompt in read_prompts(table):
        width, height = (side or table.size or size for side in (table.width, table.height))
        values = table.model_dump(include={"negative", "seed", "steps", "guidance"}) | {"width": width, "height": height}
        values |= prompt.model_dump(exclude_none=True) | {"label": _label(prompt)}
        images += [ImageSettings(**values | {"seed": (values["seed"] + column) % 2**64}) for column in range(table.images)]
    return images


def _label(prompt: PromptTable) -> str:
    values = [(option, getattr(prompt, key)) for option, (key, *_) in _OPTIONS.items()]
    options = [f"--{option} {value}" for option, value in values if value is not None]
    return " ".join([prompt.prompt, *options]) if options else ""


def batches_of(images: Sequence[ImageSettings], batch: int) -> list[list[int]]:
    """Group the numbers of images that can be drawn together: they have one shape, number of steps and guidance."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault((image.width, image.height, image.steps, image.guidance), []).append(i)
    return [group[start : start + batch] for group in groups.values() for start in range(0, len(group), batch)]


def notes_on_prompts(text: TextEncoder, table: SampleTable, *, chunks_fixed: bool = False) -> list[str]:
    """Return a sentence for each prompt that the text encoder does not read to its end, or whose options are read as text.

    Args:
        chunks_fixed: True if the number of chunks must stay, as in a run that has started.

    Raises:
        UserError: as `read_prompts`.
    """
    notes = []
    for entry in table.prompts:
        parsed = f" {entry}".split(" --")[1:] if isinstance(entry, str) else []
        if any(option.partition(" ")[0].lower() in _OPTIONS for option in parsed):
            advice = "write a table with width, height, seed, steps, guidance, negative, or use sample.prompts_file"
            notes.append(f"sample.prompts has {entry!r}, whose options are read as text; {advice}")
    prompts = read_prompts(table)
    texts = [prompt.prompt for prompt in prompts] + [table.negative] + [prompt.negative or "" for prompt in prompts]
    unique = list(dict.fromkeys(texts))
    for prompt_text, ids in zip(unique, ids_of(text.tokenizer, unique), strict=True):
        windows = divide(text.tokenizer, ids, text.window - 2, text.cut)
        if len(windows) > chunk_limit(text.chunks):
            read = sum(map(len, windows[: chunk_limit(text.chunks)]))
            short = prompt_text if len(prompt_text) <= 40 else f"{prompt_text[:37]}..."
            unread = text.tokenizer.decode(ids[read:])
            problem = f"the prompt {short!r} has {len(ids)} tokens, of which {read} are read, without {unread!r}"
            more = f", or set chunks to {len(windows)}" if len(windows) <= MOST_CHUNKS and not chunks_fixed else ""
            notes.append(f"{problem}; shorten it{more}")
    return notes
