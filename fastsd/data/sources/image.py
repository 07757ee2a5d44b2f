"""Images in folders and tars, reasons for their rejection, and the parsing of captions and weights."""

from __future__ import annotations

import codecs
import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif", ".jxl"),  # need the extra "formats"
)
CAPTION_EXTENSIONS = (".txt", ".caption")  # beside an image; the first with text is used
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
MAX_WEIGHT = float.fromhex("0x1.fffffep+127")  # the largest finite fp32 number
MASK_WITHOUT_IMAGE = "mask (data.masks) without an image of the same name"
CAPTION_KEYS = ("text", "caption", "prompt")
_LINE_END = re.compile(r"\r\n?|\n")  # `str.splitlines` also ends lines at U+0085, U+2028, form feeds and other characters


class Rejected(Exception):
    """Raised for a file that cannot be used. `reason` is a short phrase without the path.

    `lasting` is True if the content of the file is the reason, so another attempt fails until the file changes.
    """

    def __init__(self, reason: str, *, lasting: bool = True):
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class DataSource:
    """An image with its captions, weight and mask or, if it has a `problem`, a file or row that cannot be used."""

    path: str  # the file to read
    root: int = 0  # index in data.folders
    member: str = ""  # name inside a tar, or the line or row of a metadata file that has a problem
    offset: int = 0  # where the bytes of the image start in `path`
    length: int = -1  # number of these bytes; -1 = the whole file
    caption_paths: tuple[str, ...] = ()  # text files beside the image; `captions_of` reads the first that has text
    captions: tuple[str, ...] = ()  # captions from metadata or a tar, which are read already
    problem: str = ""  # reason why it cannot be used
    weight: float | None = None  # factor of the image's loss, from metadata
    mask: DataSource | None = None

    @property
    def name(self) -> str:
        """The name that messages show, and the key of the image in the database of the cache."""
        return f"{self.path}/{self.member}" if self.member else self.path


def shown(path: str | bytes) -> str:
    """Format a path for one line of a terminal. Control characters and bytes that are not UTF-8 are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def ends_in(name: str, ending: str) -> bool:
    """Return True if a name has this ending, in upper or lower case. No name has the ending ""."""
    return bool(ending) and name[-len(ending) :].lower() == ending.lower()


def text_captions(data: bytes, lines: str = "variants") -> tuple[str, ...]:
    """Split a text file into captions, one per line. They are stripped, and empty ones are left out.

    Args:
        lines: data.caption_lines. "join" makes one caption of all lines.

    Raises:
        Rejected: the file is not UTF-8 text or is larger than `MAX_CAPTION_BYTES`.
    """
    _check_size(data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "WINDOWS-1252"
        advice = f"convert it, for example with `iconv -f {encoding} -t UTF-8 OLD > NEW`"
        raise Rejected(f"caption: not UTF-8 (byte {error.start}); {advice}", lasting=False) from None
    return _captions(text, lines)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_CAPTION_BYTES:
        raise Rejected("caption: larger than 1 MiB", lasting=False)


def _captions(text: str, lines: str) -> tuple[str, ...]:
    if "\0" in text:
        raise Rejected("caption: contains NUL characters", lasting=False)
    captions = tuple(stripped for line in _LINE_END.split(text) if (stripped := line.strip()))
    return (" ".join(captions),) if captions and lines == "join" else captions


def name_captions(name: str) -> tuple[str, ...]:
    """Return the caption in the name of an image without its extension. Raises Rejected if the name is not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Rejected("caption: the file's name is not UTF-8; rename it", lasting=False) from None
    return _captions(name, "join")


def row_captions(row: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """Return the captions in a JSON object or table row, or None if it has no caption.

    The value is at `key` or, if `key` is "", at the first of `CAPTION_KEYS` that is not null. A string is one caption, and
    its line breaks become spaces. A list of strings has the variants of a caption.

    Raises:
        Rejected: the value is neither a string nor a list of strings, is not UTF-8 text, or is larger than
            `MAX_CAPTION_BYTES`.
    """
    for name in (key,) if key else CAPTION_KEYS:
        value = row.get(name)
        if value is None:
            continue
        texts = [text for text in value if text is not None] if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise Rejected(f"caption ({name}): {type(text).__name__} instead of text", lasting=False)
            try:
                _check_size(text.encode())
            except UnicodeEncodeError as error:  # a surrogate that a JSON escape has left alone
                raise Rejected(f"caption: not UTF-8 (character {error.start})", lasting=False) from None
        return tuple(itertools.chain.from_iterable(_captions(text, "join") for text in texts))
    return None


def row_weight(row: Mapping[str, object], key: str) -> float | None:
    """Return the loss weight in a JSON object or table row, or None if it has none. Raises Rejected if it is not valid."""
    value = row.get(key) if key else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Rejected(f"weight ({key}): {type(value).__name__} instead of a number", lasting=False)
    if not 0 <= value <= MAX_WEIGHT:
        raise Rejected(f"weight ({key}): {value} is negative or not finite", lasting=False)
    return float(value)


def json_object(data: bytes) -> dict[str, object]:
    """Parse a JSON object. Raises Rejected for any other value and for invalid JSON."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Rejected("not a JSON object", lasting=False)
    return value
