"""What the folders hold at this moment: the table `sample`, one row per image found, made anew by every `fastsd cache`.

It lives in a database of its own, `work/VIEW.sqlite`, which is thrown away in the end.  The first process of a view looks
through the folders; those that come while it is at work share its table, so that a million files are looked at once.

    path       the file, or tar/member; the key of everything that is remembered about it
    file, offset, length   where its bytes are; length -1 = the whole file
    content    sha256 of these bytes        width, height    as displayed; of imported latents: their cells
    bucket_width, bucket_height             pixels of the crop, of imported latents: their cells
    captions   the variants, a line each    reason           why it cannot be used; NULL = it can
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

from fastsd.config import DataTable
from fastsd.data import imports, sources
from fastsd.data.buckets import Buckets
from fastsd.data.decode import probe
from fastsd.data.sources import Rejected, Source
from fastsd.data.store import Store, disk_errors, lock_file, wait_for

_TABLE = """
CREATE TABLE work.sample (id INTEGER PRIMARY KEY, path BLOB, root INTEGER, file BLOB, offset INTEGER, length INTEGER,
    content BLOB, width INTEGER, height INTEGER, bucket_width INTEGER, bucket_height INTEGER, captions TEXT, size INTEGER,
    mtime_ns INTEGER, reason TEXT)
"""
_CHUNK = 512  # files whose hashes one commit keeps
# A file may change again within the resolution of its time stamp; younger ones are hashed again in the next run.
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


@contextmanager
def collected(store: Store, view: str, prepare: Callable[[], None], waiting: Callable[[str], None]) -> Iterator[None]:
    """Attach `sample`. `prepare` is to fill it, unless other processes work with it already; it runs in one at a time."""
    folder = store.folder / "work"
    with disk_errors(store.folder):
        folder.mkdir(exist_ok=True)
        users = (folder / f"{view}.lock").open("a+b")
    database = folder / f"{view}.sqlite"
    with users:
        with one_at_a_time(store, waiting):
            alone = lock_file(users, exclusive=True)
            if alone:
                _remove(database)
            store.attach(database)
            if alone:
                store.db.execute(_TABLE)
                prepare()
            lock_file(users, exclusive=False)
        yield
        store.db.execute("DETACH work")
        if lock_file(users, exclusive=True):
            _remove(database)


@contextmanager
def one_at_a_time(
    store: Store, waiting: Callable[[str], None], name: str = "turn", doing: str = "looking through the folders"
) -> Iterator[None]:
    """What processes that share a cache must not do side by side: looking through folders, freezing a view; by `name`."""
    with disk_errors(store.folder):
        turn = (store.folder / f"{name}.lock").open("a+b")
    with turn:
        wait_for(lambda: lock_file(turn, exclusive=True), lambda: waiting(f"another process is {doing}"))
        yield


def _remove(database: os.PathLike[str]) -> None:
    for name in (os.fspath(database) + suffix for suffix in ("", "-wal", "-shm")):
        if os.path.exists(name):
            os.remove(name)


def fill(
    store: Store, space: int, found: Iterator[Source], data: DataTable, pool: ThreadPoolExecutor,
    report: Callable[[int, float], None],
) -> None:  # fmt: skip
    """Fill `sample`. `report` is given the number of files so far and files a second."""
    buckets = Buckets(data.resolution, data.buckets)
    known = "SELECT size, mtime_ns, content, width, height FROM file WHERE path = ?"
    refused = "SELECT size, mtime_ns, reason FROM rejected WHERE space = ? AND path = ?"
    insert = f"INSERT INTO sample ({', '.join(Sample._fields)}) VALUES ({', '.join('?' * len(Sample._fields))})"
    done, start = 0, time.perf_counter()
    while chunk := list(itertools.islice(found, _CHUNK)):
        keys = [os.fsencode(source.name) for source in chunk]
        hints = [store.db.execute(known, (key,)).fetchone() for key in keys]
        bad = [store.db.execute(refused, (space, key)).fetchone() for key in keys]
        inspect = functools.partial(_inspect, latents=data.latents, buckets=buckets)
        with store.transaction():
            for sample in pool.map(inspect, chunk, hints, bad):
                store.db.execute(insert, sample)
                if sample.content and sample.mtime_ns < time.time_ns() - _YOUNG_NS:
                    remembered = (sample.path, sample.size, sample.mtime_ns, sample.content, sample.width, sample.height)
                    store.db.execute("REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)", remembered)
        done += len(chunk)
        report(done, done / (time.perf_counter() - start))
    with store.transaction():
        store.db.execute("CREATE INDEX work.sample_content ON sample (content)")


def _inspect(
    source: Source, hint: tuple[int, int, bytes, int, int] | None, refused: tuple[int, int, str] | None, *, latents: str,
    buckets: Buckets,
) -> Sample:  # fmt: skip
    """A row of `sample`. `hint`, `refused`: size, mtime and what was found out about the file in an earlier run."""
    sample = Sample(os.fsencode(source.name), source.root, os.fsencode(source.path), source.offset, source.length)
    try:
        if source.problem:
            raise Rejected(source.problem)
        captions = "\n".join(sources.captions_of(source))
        stamp = _stamp(source)
        sample = sample._replace(captions=captions, size=stamp[0], mtime_ns=stamp[1])
        if refused and refused[:2] == stamp:  # the same bytes will not do better now
            raise Rejected(refused[2])
        if hint and hint[:2] == stamp:
            content, width, height = hint[2:]
        else:
            data = sources.read_bytes(source)
            content = hashlib.sha256(data).digest()
            width, height = imports.probe_latent(data, latents)[:0:-1] if latents else probe(data)
        sample = sample._replace(content=content, width=width, height=height)
        bucket = (width, height) if latents else buckets.place(width, height).size
        return sample._replace(bucket_width=bucket[0], bucket_height=bucket[1])
    except Rejected as error:
        if not error.lasting:
            sample = sample._replace(size=-1, mtime_ns=-1)
        return sample._replace(reason=error.reason)


def _stamp(source: Source) -> tuple[int, int]:
    """(bytes, time of the last change) by which an unchanged image is known again. Raises Rejected."""
    try:
        status = os.stat(source.path)
    except OSError as error:
        raise Rejected(f"it cannot be read ({error.strerror})", lasting=False) from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
        raise Rejected("it is no regular file")
    size = status.st_size if source.length < 0 else source.length
    if size > sources.MAX_IMAGE_BYTES:
        raise Rejected("it is larger than 1 GiB")
    return size, status.st_mtime_ns
