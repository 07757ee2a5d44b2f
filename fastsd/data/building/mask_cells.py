"""Making the masks of a cache: decoded into the table `mask` of cache.sqlite, frozen into the file that training maps.

The table has the cells of every crop, zlib's deflate of uint8 (h, w), by a key of all that decides them.  So an edited mask
alone is decoded again, and an edited caption decodes none.  The file's layout: `fastsd/data/masks.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastsd.config.schema import DataTable
from fastsd.data import cache
from fastsd.data.building.buckets import Buckets, Size, cut_at
from fastsd.data.building.decode import decode_mask
from fastsd.data.building.store import Store
from fastsd.data.masks import KEY_BYTES, MasksFile, inflated, mask_files, mask_path
from fastsd.data.rows import read_header
from fastsd.data.sources import folders
from fastsd.data.sources.image import Rejected, Source
from fastsd.errors import UserError

_VERSION = 1  # of what is made of a mask; counts up when the code changes it
_CHUNK = 256  # masks decoded between two commits


@contextlib.contextmanager
def of_mask() -> Iterator[None]:
    """What is wrong with a mask is said of its image, whose own bytes are not to blame."""
    try:
        yield
    except Rejected as error:
        raise Rejected(f"its mask: {error.reason}", lasting=False) from None


def check_shape(mask: Size, image: Size) -> None:
    """Raises Rejected: a mask of this size as displayed does not belong to an image of this one.

    It may be smaller or larger, but has its shape, to a pixel of the larger of the two.
    """
    if abs(mask[0] * image[1] - mask[1] * image[0]) > max(*mask, *image):
        ours, its = (f"{width} x {height}" for width, height in (mask, image))
        raise Rejected(f"it has {ours} pixels and the image as displayed {its}, another shape")


def key_of(data: DataTable, downscale: int, mask: bytes, image: bytes, size: Size) -> bytes:
    """All that decides a mask's cells, hashed.

    Args:
        downscale: pixels of a cell's side.
        mask: sha256 of its file.
        image: sha256 of the image's file, which decides where random crops lie.
        size: of the image as displayed.
    """
    buckets = data.buckets and data.buckets.model_dump()
    where = image.hex() if data.crop == "random" else ""
    said = _VERSION, data.resolution, buckets, data.crop, downscale, mask.hex(), where, size
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def make(
    store: Store, data: DataTable, downscale: int, pool: ThreadPoolExecutor, report: Callable[[int, int, float], None]
) -> None:
    """Bring the table `mask` up to date with `sample`; put aside what has a mask of no use.

    `report` is given the masks done, those there are to do, and masks a second.
    """
    lacking = (
        "SELECT MIN(id) FROM sample WHERE reason IS NULL AND mask IS NOT NULL AND"
        " (SELECT COUNT(*) FROM mask WHERE key = sample.mask AND crop < ?) < ? GROUP BY mask ORDER BY 1"
    )
    todo = [id for (id,) in store.db.execute(lacking, (data.crops, data.crops))]
    work = partial(_decoded, data=data, downscale=downscale, buckets=Buckets(data.resolution, data.buckets))
    columns = "mask, mask_path, mask_file, mask_offset, mask_length, content, width, height"
    start = time.perf_counter()
    for first in range(0, len(todo), _CHUNK):
        some = todo[first : first + _CHUNK]
        rows = [store.db.execute(f"SELECT {columns} FROM sample WHERE id = ?", (id,)).fetchone() for id in some]
        found = list(pool.map(work, rows))
        with store.transaction():
            for row, made in zip(rows, found, strict=True):
                key, path = row[:2]
                if isinstance(made, Rejected):
                    store.db.execute("UPDATE sample SET reason = ?, size = -1 WHERE mask = ?", (made.reason, key))
                    store.db.execute("DELETE FROM file WHERE path = ?", (path,))  # what is known may be what is wrong
                else:
                    crops = [(key, crop, cells) for crop, cells in enumerate(made)]
                    store.db.executemany("REPLACE INTO mask VALUES (?, ?, ?)", crops)
        done = first + len(some)
        report(done, len(todo), done / (time.perf_counter() - start))


def _decoded(row: tuple[Any, ...], *, data: DataTable, downscale: int, buckets: Buckets) -> list[bytes] | Rejected:
    """The cells of every crop of a mask, deflated."""
    key, _, file, offset, length, image, width, height = row
    try:
        with of_mask():
            raw = folders.read_bytes(Source(os.fsdecode(file), offset=offset, length=length))
            if key_of(data, downscale, hashlib.sha256(raw).digest(), image, (width, height)) != key:
                raise Rejected("it changed while it was being cached; run the same line again")
            place, crops = buckets.place(width, height), range(data.crops)
            cells = [decode_mask(raw, place, cut_at(data.crop, image, crop), downscale) for crop in crops]
            return [zlib.compress(crop.tobytes()) for crop in cells]
    except Rejected as error:
        return error


def freeze(store: Store, view: str, crops: int) -> None:
    """Write the masks of a frozen view atomically, unless they are there.

    Raises:
        OSError: the disk does not take it.
    """
    path = mask_path(store.folder, view)
    said = {"view": read_header(store.folder / "views" / path.name, cache.View.FORMAT)[1]["sha256"]}
    found = store.db.execute(f"SELECT mask FROM sample WHERE reason IS NULL ORDER BY {cache.ORDER}")
    keys = np.frombuffer(bytearray(b"".join(key or bytes(KEY_BYTES) for (key,) in found)), np.uint8)
    with contextlib.suppress(UserError):
        old = MasksFile(path)
        if old.metadata["view"] == said["view"] and np.array_equal(old.arrays["keys"], keys):
            return
    offsets, at = np.zeros(len(keys) // KEY_BYTES * crops + 1, np.int64), 0
    with tempfile.TemporaryFile(dir=store.folder) as scratch:  # memory stays flat
        for entry in range(len(offsets) - 1):
            key = keys[entry // crops * KEY_BYTES :][:KEY_BYTES].tobytes()
            if any(key):
                query = "SELECT cells FROM mask WHERE key = ? AND crop = ?"
                at += scratch.write(store.db.execute(query, (key, entry % crops)).fetchone()[0])
            offsets[entry + 1] = at
        scratch.flush()
        cells = np.memmap(scratch, np.uint8, "r+", shape=(at,)) if at else np.zeros(0, np.uint8)
        path.parent.mkdir(exist_ok=True)
        MasksFile.write(path, {"keys": keys, "offsets": offsets, "cells": cells}, said)


def damaged_files(store: Store) -> list[Path]:
    """Frozen masks that are not as they were written, and all that were frozen while the table was damaged, which is mended."""
    rows = store.db.execute("SELECT rowid, cells FROM mask")
    bad = [(id,) for id, cells in rows if inflated(cells, [-1]) is None]
    with store.transaction():
        store.db.executemany("DELETE FROM mask WHERE rowid = ?", bad)
    return [path for path in mask_files(store.folder) if bad or not _is_sound(path)]


def _is_sound(path: Path) -> bool:
    with contextlib.suppress(UserError):
        return bool(MasksFile(path))
    return False


def prune(store: Store, alive: set[str], rows: bool) -> list[Path]:
    """Forget masks that no view refers to; returns the files that belong to no view. Raises UserError: a damaged file.

    Args:
        alive: sha256 of the views.
        rows: whether to clear the table, too.
    """
    files = {path: MasksFile(path) for path in mask_files(store.folder)}
    kept = {path: file for path, file in files.items() if file.metadata["view"] in alive}
    if rows:
        store.db.execute("CREATE TEMP TABLE used (key BLOB PRIMARY KEY)")
        for file in kept.values():
            keys = file.arrays["keys"].reshape(-1, KEY_BYTES)
            store.db.executemany("INSERT OR IGNORE INTO used VALUES (?)", ((key.tobytes(),) for key in keys))
        store.db.execute("DELETE FROM mask WHERE key NOT IN (SELECT key FROM used)")
    return [path for path in files if path not in kept]
