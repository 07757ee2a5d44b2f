"""Decode masks into the table `mask` of cache.sqlite, and freeze them into the file that training maps.

The table has the cells of every crop, a zlib-compressed uint8 (h, w). Their key is a hash of all that determines them. A mask
is therefore decoded again only if it was edited, and not if a caption was. `fastsd/data/masks.py` defines the file layout.
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
from fastsd.data.building.buckets import Buckets, Size, crop_position
from fastsd.data.building.decode import decode_mask
from fastsd.data.building.machines import Division
from fastsd.data.building.pipeline import CacheProgress
from fastsd.data.building.results import Tables
from fastsd.data.building.store import Store
from fastsd.data.masks import KEY_BYTES, MasksFile, inflate, mask_files, mask_path
from fastsd.data.rows import read_header
from fastsd.data.sources import folders
from fastsd.data.sources.image import DataSource, Rejected
from fastsd.errors import UserError

_VERSION = 1  # of the decoded cells. Increment it when a change of the code changes them.
_CHUNK = 256  # masks decoded between two commits


@contextlib.contextmanager
def as_mask_rejection() -> Iterator[None]:
    """Turn the rejection of a mask into one of its image. It is not `lasting`, because the image itself may be usable."""
    try:
        yield
    except Rejected as error:
        raise Rejected(f"mask: {error.reason}", lasting=False) from None


def check_shape(mask: Size, image: Size) -> None:
    """Raise Rejected unless a mask has the aspect ratio of its image. Both sizes are those as displayed.

    The mask may be smaller or larger than the image. The tolerance is one pixel of the larger one.
    """
    if abs(mask[0] * image[1] - mask[1] * image[0]) > max(*mask, *image):
        mask_size, image_size = (f"{width} x {height}" for width, height in (mask, image))
        raise Rejected(f"its aspect ratio ({mask_size} pixels) differs from the displayed image ({image_size})")


def mask_key(data: DataTable, downscale: int, mask: bytes, image: bytes, size: Size) -> bytes:
    """Hash all that determines a mask's cells.

    Args:
        downscale: side of a cell in pixels.
        mask: sha256 of the mask file.
        image: sha256 of the image file, which determines the random crops.
        size: size of the image as displayed.
    """
    buckets = data.buckets and data.buckets.model_dump()
    crop_seed = image.hex() if data.crop == "random" else ""
    inputs = _VERSION, data.resolution, buckets, data.crop, downscale, mask.hex(), crop_seed, size
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).digest()


def make(
    store: Store,
    data: DataTable,
    downscale: int,
    pool: ThreadPoolExecutor,
    report: Callable[[CacheProgress], None],
    division: Division,
) -> None:
    """Decode the masks that the table `mask` lacks, and reject the samples of unusable masks."""
    query = (
        "SELECT MIN(id) FROM sample WHERE reason IS NULL AND mask IS NOT NULL AND"
        " (SELECT COUNT(*) FROM mask WHERE key = sample.mask AND crop < ?) < ? GROUP BY mask ORDER BY 1"
    )
    sample_ids = [id for (id,) in store.db.execute(query, (data.crops, data.crops))]
    decode_row = partial(_decode, data=data, downscale=downscale, buckets=Buckets(data.resolution, data.buckets))
    columns = "mask, mask_path, mask_file, mask_offset, mask_length, content, width, height"

    def chunks() -> Iterator[list[tuple[Any, ...]]]:
        for first in range(0, len(sample_ids), _CHUNK):
            chunk = sample_ids[first : first + _CHUNK]
            yield [store.db.execute(f"SELECT {columns} FROM sample WHERE id = ?", (id,)).fetchone() for id in chunk]

    def name(rows: list[tuple[Any, ...]]) -> str:
        return f"masks-{hashlib.sha256(b''.join(row[0] for row in rows)).hexdigest()[:32]}"

    def cells(rows: list[tuple[Any, ...]]) -> Tables:
        results = list(zip(rows, pool.map(decode_row, rows), strict=True))
        usable = [(row[0], crop, x) for row, result in results if isinstance(result, list) for crop, x in enumerate(result)]
        rejected = [(result.reason, *row[:2]) for row, result in results if isinstance(result, Rejected)]
        return {"mask": usable, "rejected": rejected}

    start, done = time.perf_counter(), 0
    for rows, tables in division.divide(chunks(), name, cells):
        with store.transaction():
            for reason, key, path in tables.get("rejected", ()):
                store.db.execute("UPDATE sample SET reason = ?, size = -1 WHERE mask = ?", (reason, key))
                store.db.execute("DELETE FROM file WHERE path = ?", (path,))  # the stored facts may be wrong
            store.db.executemany("REPLACE INTO mask VALUES (?, ?, ?)", tables.get("mask", ()))
        done += len(rows)
        report(CacheProgress("masks", done, len(sample_ids), done / (time.perf_counter() - start)))


def _decode(row: tuple[Any, ...], *, data: DataTable, downscale: int, buckets: Buckets) -> list[bytes] | Rejected:
    """Decode a mask. Return the compressed cells of every crop."""
    key, _, file, offset, length, image, width, height = row
    try:
        with as_mask_rejection():
            raw = folders.read_bytes(DataSource(os.fsdecode(file), offset=offset, length=length))
            if mask_key(data, downscale, hashlib.sha256(raw).digest(), image, (width, height)) != key:
                raise Rejected("changed while it was being cached; run the same command again")
            place = buckets.place(width, height)
            positions = [crop_position(data.crop, image, crop) for crop in range(data.crops)]
            return [zlib.compress(decode_mask(raw, place, position, downscale).tobytes()) for position in positions]
    except Rejected as error:
        return error


def freeze(store: Store, view: str, crops: int) -> None:
    """Write the masks of a frozen view atomically, unless the file is up to date.

    Raises:
        OSError: the disk does not accept the file.
    """
    path = mask_path(store.folder, view)
    metadata = {"view": read_header(store.folder / "views" / path.name, cache.View.FORMAT)[1]["sha256"]}
    key_rows = store.db.execute(f"SELECT mask FROM sample WHERE reason IS NULL ORDER BY {cache.ORDER}")
    keys = np.frombuffer(bytearray(b"".join(key or bytes(KEY_BYTES) for (key,) in key_rows)), np.uint8)
    with contextlib.suppress(UserError):
        existing = MasksFile(path)
        if existing.metadata["view"] == metadata["view"] and np.array_equal(existing.arrays["keys"], keys):
            return
    offsets, offset = np.zeros(len(keys) // KEY_BYTES * crops + 1, np.int64), 0
    with tempfile.TemporaryFile(dir=store.home) as scratch:  # a large data set must not fill the memory
        for entry in range(len(offsets) - 1):
            key = keys[entry // crops * KEY_BYTES :][:KEY_BYTES].tobytes()
            if any(key):
                query = "SELECT cells FROM mask WHERE key = ? AND crop = ?"
                offset += scratch.write(store.db.execute(query, (key, entry % crops)).fetchone()[0])
            offsets[entry + 1] = offset
        scratch.flush()
        cells = np.memmap(scratch, np.uint8, "r+", shape=(offset,)) if offset else np.zeros(0, np.uint8)
        path.parent.mkdir(exist_ok=True)
        MasksFile.write(path, {"keys": keys, "offsets": offsets, "cells": cells}, metadata)


def damaged_files(store: Store) -> list[Path]:
    """Return the damaged mask files. If the table has damaged rows, delete them and return all files, which may have them."""
    rows = store.db.execute("SELECT rowid, cells FROM mask")
    damaged_rows = [(id,) for id, cells in rows if inflate(cells, [-1]) is None]
    with store.transaction():
        store.db.executemany("DELETE FROM mask WHERE rowid = ?", damaged_rows)
    return [path for path in mask_files(store.folder) if damaged_rows or not _is_sound(path)]


def _is_sound(path: Path) -> bool:
    with contextlib.suppress(UserError):
        return bool(MasksFile(path))
    return False


def prune(store: Store, view_hashes: set[str], *, rows: bool) -> list[Path]:
    """Delete the masks that no view uses from the table. Return the files that no view uses. Raises UserError on damage.

    Args:
        view_hashes: sha256 of the views.
        rows: delete from the table; False = only find the files.
    """
    files = {path: MasksFile(path) for path in mask_files(store.folder)}
    kept = {path: file for path, file in files.items() if file.metadata["view"] in view_hashes}
    if rows:
        store.db.execute("CREATE TEMP TABLE used (key BLOB PRIMARY KEY)")
        for file in kept.values():
            keys = file.arrays["keys"].reshape(-1, KEY_BYTES)
            store.db.executemany("INSERT OR IGNORE INTO used VALUES (?)", ((key.tobytes(),) for key in keys))
        store.db.execute("DELETE FROM mask WHERE key NOT IN (SELECT key FROM used)")
    return [path for path in files if path not in kept]
