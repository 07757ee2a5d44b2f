"""Images that a Parquet listing names: a `.parquet` file, or a folder `NAME.parquet` of such files, as Spark and Ray write it.

    file                       path of the image; a relative one starts at the folder that contains the listing
    text, caption or prompt    its caption, or a list of variants; without one, the texts beside the image are used
    data.weight_key            factor of its loss
    mask                       path of its mask, if data.masks is set

The order is that of the rows, in files sorted by name. Other columns are ignored.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from fastsd.data.sources.image import CAPTION_EXTENSIONS, CAPTION_KEYS, DataSource, Rejected, row_captions, row_weight
from fastsd.data.sources.metadata import parquet_names, parquet_rows

LISTING = ".parquet"


def is_listing(path: str) -> bool:
    """Return True for a `.parquet` file, and for a folder with this ending that contains such files."""
    return path.lower().endswith(LISTING) and (os.path.isfile(path) or bool(_files(path)))


def _files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(LISTING) and name[0] not in "._")
    return [os.path.join(path, name) for name in names]


def sources(path: str, root: int, caption_key: str, weight_key: str, masks: str, *, captions: str) -> Iterator[DataSource]:
    """Yield the images of a listing, and every problem. The arguments are those of `tars.samples`."""
    base = os.path.dirname(os.path.abspath(path))
    with closing(sqlite3.connect("")) as seen:  # in a temporary file, because a listing may have many millions of rows
        seen.execute("CREATE TABLE image (hash INTEGER PRIMARY KEY)")
        for file in _files(path):
            try:
                names = parquet_names(file)
                if "file" not in names:
                    listed = ", ".join(names) or "nothing"
                    raise Rejected(f"has no column file (columns: {listed}); add it with the paths of the images")
                keys = (caption_key,) if caption_key else CAPTION_KEYS
                columns = [name for name in ("file", "mask", weight_key, *keys) if name in names]
                for number, row in parquet_rows(file, list(dict.fromkeys(columns))):
                    member = f"row {number}"
                    if isinstance(row, str) or not row["file"] or not isinstance(row["file"], str):
                        problem = row if isinstance(row, str) else "has no file"
                        yield DataSource(file, root, member, problem=problem)
                        continue
                    image = os.path.normpath(os.path.join(base, row["file"]))
                    if not seen.execute("INSERT OR IGNORE INTO image VALUES (?)", (_hash(image),)).rowcount:
                        yield DataSource(file, root, member, problem="repeats the file of an earlier row, which is used")
                        continue
                    yield _source(image, base, row, root, (caption_key, weight_key), masks, captions)
            except OSError as error:
                yield DataSource(file, root, problem=f"cannot be read ({error.strerror})")
            except Rejected as error:
                yield DataSource(file, root, problem=error.reason)


def _source(
    image: str, base: str, row: dict[str, object], root: int, keys: tuple[str, str], masks: str, captions: str
) -> DataSource:
    texts: tuple[str, ...] = ()
    weight, problem, mask = None, "", None
    try:
        texts = (row_captions(row, keys[0]) or ()) if captions == "file" else ()
        weight = row_weight(row, keys[1])
    except Rejected as error:
        problem = error.reason
    if masks and isinstance(row.get("mask"), str):
        mask = DataSource(os.path.normpath(os.path.join(base, str(row["mask"]))), root)
    beside = () if texts else tuple(str(path) for end in CAPTION_EXTENSIONS if (path := Path(image).with_suffix(end)).is_file())
    return DataSource(image, root, captions=texts, caption_paths=beside, weight=weight, problem=problem, mask=mask)


def _hash(image: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(image), digest_size=8).digest(), "little", signed=True)
