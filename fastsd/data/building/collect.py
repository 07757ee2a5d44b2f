"""Fill the table `sample`, which has one row per image in the folders. Every `fastsd cache` builds it anew.

The table is in a separate database, `work/VIEW.sqlite`, which is deleted at the end. The first process of a view scans the
folders. Processes that start while the table is in use share it, so a million files are inspected only once.

    path                           the file, or tar/member; the key of everything that is stored about the image
    file, offset, length           where the bytes of the image are; length -1 = the whole file
    content                        sha256 of these bytes
    width, height                  size as displayed; in cells for imported latents
    bucket_width, bucket_height    size of the crop in pixels; in cells for imported latents
    captions                       the variants, one line each
    reason                         why the image is rejected; NULL = it is usable
    weight                         factor of the image's loss; NULL = not given
    mask                           key in the table `mask`, a hash of all that determines the mask's cells; NULL = no mask
    mask_path, mask_file, mask_offset, mask_length    as for the image
    state, companions              see `lists.py`
    enlarged                       factor by which the image is resized; above 1, it is enlarged

The table `unused` has the files that are no part of the data: path and reason.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from fastsd.config.schema import DataTable
from fastsd.data.building import mask_cells
from fastsd.data.building.buckets import Buckets
from fastsd.data.building.decode import probe
from fastsd.data.building.lists import companions, state
from fastsd.data.building.machines import Division
from fastsd.data.building.pipeline import CacheProgress
from fastsd.data.building.results import Tables
from fastsd.data.building.store import Store, disk_errors, lock_file, wait_for
from fastsd.data.sources import folders, imported_latents
from fastsd.data.sources.folders import DataSource, Rejected

_TABLE = """
CREATE TABLE work.sample (id INTEGER PRIMARY KEY, path BLOB, root INTEGER, file BLOB, offset INTEGER, length INTEGER,
    content BLOB, width INTEGER, height INTEGER, bucket_width INTEGER, bucket_height INTEGER, captions TEXT, size INTEGER,
    mtime_ns INTEGER, reason TEXT, weight REAL, mask BLOB, mask_path BLOB, mask_file BLOB, mask_offset INTEGER,
    mask_length INTEGER, state TEXT, companions TEXT, enlarged REAL)
"""
_UNUSED_TABLE = "CREATE TABLE work.unused (path BLOB, reason TEXT)"
_CHUNK = 512  # images inspected between two commits
# A file may change without a new timestamp if it is very young. The facts about younger files than this are not stored.
_YOUNG_NS = 2_000_000_000


class Sample(NamedTuple):
    """A row of the table, without its id."""

    path: bytes
    root: int
    file: bytes
    offset: int
    length: int
    content: bytes | None = None
    width: int = 0
    height: int = 0
    bucket_width: int = 0
    bucket_height: int = 0
    captions: str = ""
    size: int = -1
    mtime_ns: int = -1
    reason: str | None = None
    weight: float | None = None
    mask: bytes | None = None
    mask_path: bytes | None = None
    mask_file: bytes | None = None
    mask_offset: int = 0
    mask_length: int = 0
    state: str = ""
    companions: str = ""
    enlarged: float = 0.0


class _FileFacts(NamedTuple):
    """A row of the table `file`: facts about an image or a mask that hold while its size and times stay the same."""

    path: bytes
    size: int
    mtime_ns: int  # `_Stamp.times`, or the mtime alone in a row of an earlier version
    content: bytes
    width: int
    height: int

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height as displayed. They are in cells for imported latents."""
        return self.width, self.height


class _Stamp(NamedTuple):
    """The size and the times of a file, which change when the file changes.

    A copy or an archive can give a replaced file the size and mtime of the old one, but not its ctime. `times` has both.
    """

    size: int
    mtime_ns: int
    times: int

    def matches(self, size: int, times: int) -> bool:
        """Return True if a stored stamp is equal. That of an earlier version has only the mtime."""
        return size == self.size and times in (self.times, self.mtime_ns)

    @property
    def is_old(self) -> bool:
        return self.mtime_ns < time.time_ns() - _YOUNG_NS


_StoredFacts = tuple[_FileFacts | None, _FileFacts | None]  # facts about an image and its mask from an earlier run
_Rejection = tuple[int, int, str]  # size, times and reason


@contextmanager
def sample_table(store: Store, view: str, prepare: Callable[[], None], notify: Callable[[str], None]) -> Iterator[None]:
    """Attach the table `sample`. If no other process uses it, `prepare` is called to fill it."""
    folder = store.home / "work"
    with disk_errors(store.folder):
        folder.mkdir(exist_ok=True)
        users_lock = (folder / f"{view}.lock").open("a+b")
    database = folder / f"{view}.sqlite"
    with users_lock:
        with one_at_a_time(store, notify):
            is_sole_user = lock_file(users_lock, exclusive=True)
            if is_sole_user:
                _remove_database(database)
                for leftover in folder.glob(f"{view}-*"):  # of a process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
            store.attach(database)
            if is_sole_user:
                store.db.execute(_TABLE)
                store.db.execute(_UNUSED_TABLE)
                prepare()
            lock_file(users_lock, exclusive=False)
        yield
        store.db.execute("DETACH work")
        if lock_file(users_lock, exclusive=True):
            _remove_database(database)


@contextmanager
def one_at_a_time(
    store: Store, notify: Callable[[str], None], lock: str = "turn", activity: str = "scanning the folders"
) -> Iterator[None]:
    """Let only one process at a time run the block of the `with` statement. `lock` names the lock file of the cache."""
    with disk_errors(store.folder):
        file = (store.home / f"{lock}.lock").open("a+b")
    with file:
        wait_for(lambda: lock_file(file, exclusive=True), lambda: notify(f"waiting: another process is {activity}"))
        yield


def _remove_database(database: os.PathLike[str]) -> None:
    for name in (os.fspath(database) + suffix for suffix in ("", "-wal", "-shm")):
        if os.path.exists(name):
            os.remove(name)


def fill(
    store: Store,
    space: int,
    sources: Iterator[DataSource],
    unused: list[tuple[str, str]],
    data: DataTable,
    downscale: int,
    pool: ThreadPoolExecutor,
    report: Callable[[CacheProgress], None],
    division: Division,
) -> None:
    """Inspect the sources and store them in the table `sample`. `unused` fills while they are listed, and is stored too."""
    rejected_query = "SELECT size, mtime_ns, reason FROM rejected WHERE space = ? AND path = ?"
    insert = f"INSERT INTO sample VALUES (?, {', '.join('?' * len(Sample._fields))})"
    inspect = functools.partial(_inspect, data=data, buckets=Buckets(data.resolution, data.buckets), downscale=downscale)
    done, start = 0, time.perf_counter()

    def stored_file(source: DataSource | None) -> _FileFacts | None:
        if source is None:
            return None
        row = store.db.execute("SELECT * FROM file WHERE path = ?", (os.fsencode(source.name),)).fetchone()
        return row and _FileFacts(*row)

    def store_unused() -> None:
        store.db.executemany("INSERT INTO unused VALUES (?, ?)", [(os.fsencode(path), reason) for path, reason in unused])
        unused.clear()

    def chunks() -> Iterator[tuple[int, list[DataSource]]]:
        for number in itertools.count():
            if not (chunk := list(itertools.islice(sources, _CHUNK))):
                return
            yield number * _CHUNK + 1, chunk

    def name(item: tuple[int, list[DataSource]]) -> str:
        return f"facts-{hashlib.blake2b(repr(item[1]).encode(errors='surrogatepass'), digest_size=16).hexdigest()}"

    def facts(item: tuple[int, list[DataSource]]) -> Tables:
        chunk = item[1]
        stored = [(stored_file(source), stored_file(source.mask)) for source in chunk]
        rejections = [store.db.execute(rejected_query, (space, os.fsencode(source.name))).fetchone() for source in chunk]
        results = list(pool.map(inspect, chunk, stored, rejections))
        new_files = (file for old, (_, files) in zip(stored, results, strict=True) for file in files if file not in old)
        return {"sample": [sample for sample, _ in results], "file": list(new_files)}

    for (first, chunk), tables in division.divide(chunks(), name, facts):
        with store.transaction():
            store.db.executemany(insert, ((id, *sample) for id, sample in enumerate(tables["sample"], first)))
            store.db.executemany("REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)", tables.get("file", ()))
            store_unused()
        done += len(chunk)
        report(CacheProgress("scan", done, 0, done / (time.perf_counter() - start)))
    with store.transaction():
        store_unused()
        store.db.execute("CREATE INDEX work.sample_content ON sample (content)")
        if data.masks:
            store.db.execute("CREATE INDEX work.sample_mask ON sample (mask)")


def _inspect(
    source: DataSource, stored: _StoredFacts, rejection: _Rejection | None, *, data: DataTable, buckets: Buckets, downscale: int
) -> tuple[Sample, list[_FileFacts]]:
    """Return a row of `sample` and rows of `file` for a source. `stored` and `rejection` come from an earlier run."""
    sample = Sample(os.fsencode(source.name), source.root, os.fsencode(source.path), source.offset, source.length)
    sample = sample._replace(state=state(source), companions=companions(source))
    files: list[_FileFacts] = []
    try:
        if source.problem:
            raise Rejected(source.problem)
        captions = "\n".join(folders.captions_of(source, data.caption_lines))
        stamp = _stamp(source)
        sample = sample._replace(captions=captions, weight=source.weight, size=stamp.size, mtime_ns=stamp.times)
        if rejection and stamp.matches(*rejection[:2]):  # the same bytes would be rejected again
            raise Rejected(rejection[2])

        image = _file_facts(source, stamp, stored[0], data.latents)
        files += [image] if stamp.is_old else []
        sample = sample._replace(content=image.content, width=image.width, height=image.height)
        if data.latents:
            bucket = image.dimensions
        else:
            (resized_width, _), bucket = buckets.place(*image.dimensions)
            sample = sample._replace(enlarged=resized_width / image.width)
        sample = sample._replace(bucket_width=bucket[0], bucket_height=bucket[1])

        if source.mask:
            sample = _with_mask(sample, source.mask)
            with mask_cells.as_mask_rejection():
                if source.mask.problem:
                    raise Rejected(source.mask.problem)
                mask_stamp = _stamp(source.mask)
                mask = _file_facts(source.mask, mask_stamp, stored[1])
                files += [mask] if mask_stamp.is_old else []
                mask_cells.check_shape(mask.dimensions, image.dimensions)
            sample = sample._replace(mask=mask_cells.mask_key(data, downscale, mask.content, image.content, image.dimensions))
    except Rejected as error:
        if not error.lasting:
            sample = sample._replace(size=-1, mtime_ns=-1)
        sample = sample._replace(reason=error.reason)
    return sample, files


def _with_mask(sample: Sample, mask: DataSource) -> Sample:
    path, file = os.fsencode(mask.name), os.fsencode(mask.path)
    return sample._replace(mask_path=path, mask_file=file, mask_offset=mask.offset, mask_length=mask.length)


def _file_facts(source: DataSource, stamp: _Stamp, old: _FileFacts | None, latents: str = "") -> _FileFacts:
    """Return the facts about a file: the `old` ones if the file is unchanged, otherwise new ones. Raises Rejected."""
    if old and stamp.matches(old.size, old.mtime_ns):
        return old._replace(mtime_ns=stamp.times)
    data = folders.read_bytes(source)
    width, height = imported_latents.probe_latent(data, latents)[:0:-1] if latents else probe(data)
    return _FileFacts(os.fsencode(source.name), stamp.size, stamp.times, hashlib.sha256(data).digest(), width, height)


def _stamp(source: DataSource) -> _Stamp:
    """Return the stamp of an image or a mask. Raises Rejected."""
    try:
        status = os.stat(source.path)
    except OSError as error:
        raise Rejected(f"cannot be read ({error.strerror})", lasting=False) from None
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
        raise Rejected("not a regular file")
    size = status.st_size if source.length < 0 else source.length
    if size > folders.MAX_IMAGE_BYTES:
        raise Rejected("larger than 1 GiB")
    times = hashlib.blake2b(f"{status.st_mtime_ns} {status.st_ctime_ns}".encode(), digest_size=7).digest()
    return _Stamp(size, status.st_mtime_ns, int.from_bytes(times, "little"))
