"""What looking through folders finds, why something is put aside, how captions and weights are written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CAPTION_EXTENSIONS = (".txt", ".caption")  # beside an image; the first that is there counts
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
MAX_WEIGHT = float.fromhex("0x1.fffffep+127")  # what fp32 holds
NO_IMAGE = "it counts as a mask (data.masks), and there is no image of that name beside it"
CAPTION_KEYS = ("text", "caption", "prompt")


class Rejected(Exception):
    """One file that cannot be used. `reason` is a short sentence without the path.

    `lasting` says that the bytes themselves are at fault, so trying again is pointless until the file changes.
    """

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image, its captions and its mask lie, or (`problem`) something that cannot be used and why."""

    path: str  # the file that is read
    root: int = 0  # index in data.folders
    member: str = ""  # name inside a tar; of a problem in a metadata file its line or row
    offset: int = 0  # of the image's bytes within `path`
    length: int = -1  # -1 = the whole file
    caption_path: str = ""  # a text file, read by `captions_of`
    captions: tuple[str, ...] = ()  # known already, from metadata or a tar
    problem: str = ""
    weight: float | None = None  # of its loss, as metadata has it
    mask: Source | None = None

    @property
    def name(self) -> str:
        """What people are shown, and the key by which the image is remembered."""
        return f"{self.path}/{self.member}" if self.member else self.path


def shown(path: str | bytes) -> str:
    """A path fit for one line of a terminal: undecodable bytes and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def ends_in(name: str, ending: str) -> bool:
    """Whether a name has the ending ("" = none has), in whatever case."""
    return bool(ending) and name[-len(ending) :].lower() == ending.lower()


def text_captions(data: bytes) -> tuple[str, ...]:
    """The captions in a text file: its lines, stripped, without empty ones.

    Raises:
        Rejected: it is no UTF-8 text or larger than any caption.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise Rejected("its caption is larger than 1 MiB", lasting=False)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(f"its caption is not UTF-8 (byte {error.start})", lasting=False) from None
    if "\0" in text:
        raise Rejected("its caption holds NUL characters, so it is no UTF-8 text", lasting=False)
    return tuple(stripped for line in text.splitlines() if (stripped := line.strip()))


def row_captions(row: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    """The captions in a JSON object or table row: under `key`, or the first of `CAPTION_KEYS` ("") that is not null.

    A string is one caption, whose line breaks become spaces; a list of strings are variants.  None: it has none.

    Raises:
        Rejected: it is neither, or no UTF-8 text, or larger than any caption.
    """
    for name in (key,) if key else CAPTION_KEYS:
        value = row.get(name)
        if value is None:
            continue
        texts = [text for text in value if text is not None] if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise Rejected(f"its caption ({name}) is no text but {type(text).__name__}", lasting=False)
        lines = (" ".join(text_captions(text.encode("utf-8", "surrogatepass"))) for text in texts)
        return tuple(line for line in lines if line)
    return None


def row_weight(row: Mapping[str, Any], key: str) -> float | None:
    """The weight of an image's loss in a JSON object or table row; None: it has none. Raises Rejected: it cannot be one."""
    value = row.get(key) if key else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Rejected(f"its weight ({key}) is no number but {type(value).__name__}", lasting=False)
    if not 0 <= value <= MAX_WEIGHT:
        raise Rejected(f"its weight ({key}) is {value}, and must be finite and at least 0", lasting=False)
    return float(value)


def json_object(data: bytes) -> dict[str, Any]:
    """Raises Rejected: it is something else, or no JSON at all."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Rejected("it is no JSON object", lasting=False)
    return found
