"""Images and captions as they lie on disk: finding them, reading captions, decoding pixels.

`scan` walks folders, `read_caption` reads the text beside an image, `decode` turns the bytes of an image file into a
square of pixels.  What a single file does wrong becomes `Rejected` with a reason and stops nothing; what the user must
change (a folder) becomes `UserError`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastsd.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What may hide behind those names (a camera's MPO counts as JPEG); Pillow's other decoders stay out of reach.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 178_956_970  # twice Pillow's own bound, where it stops warning and refuses
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Rejected(Exception):
    """One file that cannot be used. `reason` is a short sentence without the path.

    `lasting` says that the bytes themselves are at fault, so trying again is pointless until the file changes.
    """

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


@dataclass(frozen=True)
class Source:
    """An image file and the caption beside it ("" = none), or a folder that could not be searched (`problem`)."""

    path: str
    caption_path: str = ""
    problem: str = ""


def shown(path: str | bytes) -> str:
    """A path fit for one line of a terminal: undecodable bytes and control characters are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def scan(folders: Sequence[str]) -> Iterator[Source]:
    """Every image below `folders`, lazily: folders in the given order, sorted within each, no path twice.

    Hidden files and folders are skipped, links are followed, and a folder that a link leads back to is searched once.

    Raises:
        UserError: a folder that is missing, is no folder, or (once it has been searched) holds no image.
    """
    for folder in folders:
        if not os.path.exists(folder):
            raise UserError(f"data.folders: {shown(folder)} does not exist; correct the path or remove it")
        if not os.path.isdir(folder):
            raise UserError(f"data.folders: {shown(folder)} is a file; name the folder that holds it")
    return _scan(folders)


def _scan(folders: Sequence[str]) -> Iterator[Source]:
    searched: set[str] = set()
    for folder in folders:
        found = 0
        places = set()
        root = os.path.abspath(folder)
        for source in _walk(root, set()):
            if source.problem and source.path == root:
                raise UserError(f"data.folders: {shown(folder)}: {source.problem}; make it readable or remove it")
            found += not source.problem
            place = os.path.dirname(source.path)
            places.add(place)
            if place not in searched:  # folders of the config may lie within each other
                yield source
        if not found:
            wanted = ", ".join(EXTENSIONS)
            raise UserError(f"data.folders: {shown(folder)} holds no image ({wanted}); put some there or remove it")
        searched |= places


def _walk(folder: str, visited: set[str]) -> Iterator[Source]:
    real = os.path.realpath(folder)
    if real in visited:
        return
    visited.add(real)
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: _is_folder(entry) for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        yield Source(folder, problem=f"this folder cannot be searched ({error.strerror})")
        return
    for name in sorted(is_folder):
        path = os.path.join(folder, name)
        stem, extension = os.path.splitext(name)
        if is_folder[name]:
            yield from _walk(path, visited)
        elif extension.lower() in EXTENSIONS:
            caption = f"{stem}.txt"
            yield Source(path, os.path.join(folder, caption) if caption in is_folder else "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # Following the link by hand: `entry.is_dir()` raises on one that leads to itself.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def read_caption(path: str) -> str:
    """The first non-empty line of a text file, stripped; "" when it has none.

    Raises:
        Rejected: the file cannot be read, is no UTF-8 text, or is larger than any caption.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CAPTION_BYTES + 1)
    except OSError as error:
        raise Rejected(f"its caption cannot be read ({error.strerror})", lasting=False) from None
    if len(data) > MAX_CAPTION_BYTES:
        raise Rejected("its caption file is larger than 1 MiB", lasting=False)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(f"its caption is not UTF-8 (byte {error.start})", lasting=False) from None
    if "\0" in text:
        raise Rejected("its caption holds NUL characters, so it is no UTF-8 text", lasting=False)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def decode(data: bytes, resolution: int) -> np.ndarray:
    """The bytes of an image file -> its centre square.

    EXIF orientation is applied, transparency lies over white, 16 bit is scaled down to 8, every other mode is
    converted to RGB, and of an animation the first frame counts.  The shorter side becomes `resolution`, up or down.

    Args:
        data: the whole file.
        resolution: R, pixels.

    Returns:
        uint8 (3, R, R), contiguous.

    Raises:
        Rejected: the file is empty, no image, damaged, or of more than `MAX_PIXELS`.
    """
    if not data:
        raise Rejected("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            pixels = np.asarray(_square(image, resolution))
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("the content is no JPEG, PNG, WebP or BMP image") from None
    except Image.DecompressionBombError:
        raise Rejected(f"it has more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise Rejected("there is not enough memory to decode it", lasting=False) from None
    except Exception as error:  # Pillow's decoders raise anything from struct.error to SyntaxError on damaged files
        words = " ".join(str(error).split())[:120]
        raise Rejected(f"it cannot be decoded ({words or type(error).__name__})") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _square(image: Image.Image, resolution: int) -> Image.Image:
    """RGB (R, R). The middle is cut out by the resize itself: a strip of 1 x 20000 never becomes a giant first."""
    turn = _orientation(image)
    # JPEG only, elsewhere nothing happens: the decoder itself halves the size as long as both sides stay >= R.
    image.draft(None, (resolution, resolution))
    image = _eight_bit(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    if turn in _TURNS:
        image = image.transpose(_TURNS[turn])
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode -> L, RGB or RGBA, so that resampling works on colours, not on palette indices or 16-bit words."""
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling.
        words = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((words >> 8).astype(np.uint8), "L")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")
