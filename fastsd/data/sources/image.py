"""Sources found in folders, reasons for rejecting them, and the parsing of captions and weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CAPTION_EXTENSIONS = (".txt", ".caption")  # beside an image; the first that exists is used
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
MAX_WEIGHT = float.fromhex("0x1.fffffep+127")  # the largest finite fp32 number
MASK_WITHOUT_IMAGE = "mask (data.masks) without an image of the same name"
CAPTION_KEYS = ("text", "caption", "prompt")


class Rejected(Exception):
    """Raised for a file that cannot be used. `reason` is a short phrase without the path.

    `lasting` is True if the bytes themselves are at fault, so a retry is pointless until the file changes.
    """

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class DataSource:
    """Location of an image, its captions and its mask, or (`problem`) of an unusable file or row, with the reason."""

    path: str  # the file to read
    root: int = 0  # index in data.folders
    member: str = ""  # name inside a tar; for a problem in a metadata file, its line or row
    offset: int = 0  # of the image's bytes in `path`
    length: int = -1  # -1 = the whole file
    caption_path: str = ""  # a text file, read by `captions_of`
    captions: tuple[str, ...] = ()  # already read, from metadata or a tar
    problem: str = ""
    weight: float | None = None  # factor on the image's loss, from metadata
    mask: DataSource | None = None

    @property
    def name(self) -> str:
        """Display name, also the key of the image in the cache's database."""
        return f"{self.path}/{self.member}" if self.member else self.path


def shown(path: str | bytes) -> str:
    """Format a path for one line of a terminal: undecodable bytes and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def ends_in(name: str, ending: str) -> bool:
    """Return True if a name has the ending, ignoring case. The ending "" matches no name."""
    return bool(ending) and name[-len(ending) :].lower() == ending.lower()


def text_captions(data: bytes) -> tuple[str, ...]:
    """Split a text file into captions: its lines, stripped, without empty ones.

    Raises:
        Rejected: it is not UTF-8 text, or larger than `MAX_CAPTION_BYTES`.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise Rejected("caption: larger than 1 MiB", lasting=False)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(f"caption: not UTF-8 (byte {error.start})", lasting=False) from None
    if "\0" in text:
        raise Rejected("caption: contains NUL characters", lasting=False)
    return tuple(stripped for line in text.splitlines() if (stripped := line.strip()))


def row_captions(row: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """Return the captions in a JSON object or table row, None if it has no caption.

    The value is at `key` or, if `key` is "", at the first of `CAPTION_KEYS` that is not null. A string is one caption, and
    its line breaks become spaces. A list of strings holds the variants of a caption.

    Raises:
        Rejected: the value is neither, is not UTF-8 text, or is larger than `MAX_CAPTION_BYTES`.
    """
    for name in (key,) if key else CAPTION_KEYS:
        value = row.get(name)
        if value is None:
            continue
        texts = [text for text in value if text is not None] if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise Rejected(f"caption ({name}): {type(text).__name__} instead of text", lasting=False)
        lines = (" ".join(text_captions(text.encode("utf-8", "surrogatepass"))) for text in texts)
        return tuple(line for line in lines if line)
    return None


def row_weight(row: Mapping[str, Any], key: str) -> float | None:
    """Return the loss weight in a JSON object or table row, None if absent. Raises Rejected if the value is no valid weight."""
    value = row.get(key) if key else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Rejected(f"weight ({key}): {type(value).__name__} instead of a number", lasting=False)
    if not 0 <= value <= MAX_WEIGHT:
        raise Rejected(f"weight ({key}): {value} is negative or not finite", lasting=False)
    return float(value)


def json_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises Rejected for any other value and for invalid JSON."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Rejected("not a JSON object", lasting=False)
    return value
