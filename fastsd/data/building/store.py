"""Write a cache to the disk: SQLite tables, shards and locks.

    space      one VAE and one preprocessing, or one text encoder
    file       content hashes by path, size and times, so that an unchanged file is not read again. mtime_ns is a hash of the
               mtime and the ctime; earlier versions stored the mtime
    shard      n rows of one shape. A shard is planned here before its file exists.
    latent     the shard and row of each version of a content, and the sha256 and check64 of the row's bytes. Both are NULL
               until the row is on the disk. A content is an image file, or the token ids of a caption for text embeddings.
    rejected   rejected files and the reasons. Size -1 means that another attempt may succeed.
    mask       masks averaged over the cells of a latent, see `mask_cells.py`

A path is a file, or tar/member. It is stored as bytes, because a filename need not be valid text. Several processes may fill a
cache at once. Each holds a shared lock on `cache.lock` and locks the bytes of `claims.lock` that stand for the rows it is
encoding. The operating system releases both locks when a process ends for any reason.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastsd.data import cache
from fastsd.data.rows import LATENTS, TENSOR, read_header, row_check
from fastsd.errors import UserError
from fastsd.storage import DTYPES as CODES
from fastsd.storage import flush_folder, safetensors_header
from fastsd.terminal.texts import size_text

SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE space (id INTEGER PRIMARY KEY, name TEXT UNIQUE, metadata TEXT, dtype TEXT, unfinished INTEGER DEFAULT 0);
CREATE TABLE file (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, content BLOB, width INTEGER, height INTEGER)
    WITHOUT ROWID;
CREATE TABLE shard (id INTEGER PRIMARY KEY, space INTEGER, name TEXT UNIQUE, rows INTEGER, shape TEXT);
CREATE TABLE latent (space INTEGER, content BLOB, version INTEGER, shard INTEGER, row INTEGER, sha256 BLOB, check64 INTEGER,
    PRIMARY KEY (space, content, version)) WITHOUT ROWID;
CREATE UNIQUE INDEX latent_place ON latent (shard, row);
CREATE INDEX latent_missing ON latent (space, shard, row) WHERE sha256 IS NULL;
CREATE TABLE rejected (space INTEGER, path BLOB, reason TEXT, size INTEGER, mtime_ns INTEGER, PRIMARY KEY (space, path))
    WITHOUT ROWID;
"""
_MASK_SCHEMA = "CREATE TABLE IF NOT EXISTS mask (key BLOB, crop INTEGER, cells BLOB, PRIMARY KEY (key, crop))"
_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUSY_SECONDS = 60  # to wait for another process that writes to the database
# SQLite's result codes for problems with the disk or the user's setup. Any other code is a bug of ours.
_SQLITE_FULL = 13
_SQLITE_DISK = {3: "no permission", 5: "busy", 8: "read-only", 10: "i/o error", 14: "cannot be opened", _SQLITE_FULL: "full"}
_SQLITE_DAMAGED = {11: "malformed", 26: "no database"}
BUILD_FILE = "build"  # in a machine's folder: the build that its database belongs to
_POLL_SECONDS = 0.1  # between two attempts to take a lock that another process holds


@dataclass(frozen=True)
class Shard:
    """A planned shard. Its file may not exist yet. `shape` is the shape of a row, and `metadata["fastsd"]` the format."""

    id: int
    name: str
    rows: int
    shape: list[int]
    dtype: str
    metadata: dict[str, str]
    path: Path

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * cache.DTYPES[self.dtype].itemsize

    def is_intact(self) -> bool:
        """Return True if the file has the right header and its full length. The rows are not checked."""
        try:
            tensors, metadata, _ = read_header(self.path, self.format)
        except UserError:
            return False
        tensor = tensors.get(TENSOR[self.format], {})
        actual = (tensor.get("shape"), tensor.get("dtype"), metadata)
        return actual == ([self.rows, *self.shape], CODES[cache.DTYPES[self.dtype]], metadata | self.metadata)

    def read_rows(self, rows: Iterable[int]) -> Iterator[bytes]:
        start = self._start()
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(start + row * self.row_bytes)
                yield file.read(self.row_bytes)

    def write_rows(self, rows: Sequence[tuple[int, bytes]]) -> None:
        """Write rows to an existing file. They are on the disk when this returns."""
        start = self._start()
        with self.path.open("r+b") as file:
            for row, data in rows:
                assert len(data) == self.row_bytes and row < self.rows
                file.seek(start + row * self.row_bytes)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _start(self) -> int:
        return read_header(self.path, self.format)[2]

    @property
    def format(self) -> str:
        return self.metadata.get("fastsd", LATENTS)

    def create(self) -> None:
        """Create the file at its full length."""
        shapes = {TENSOR[self.format]: (cache.DTYPES[self.dtype], (self.rows, *self.shape))}
        metadata = {"fastsd": self.format, **self.metadata, "shape": json.dumps(self.shape)}
        header = safetensors_header(shapes, metadata, cache.ALIGN)
        size = len(header) + self.rows * self.row_bytes
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(header)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                try:  # a full disk fails here, not in the middle of a row
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        flush_folder(self.path.parent)


class Store:
    """An open cache folder. `db` is in autocommit mode, and `transaction` groups statements. For `work`, see `attach`.

    The database and the locks are in `home`, which is `folder` unless several machines fill the cache, see `machines.py`.
    """

    work: Path

    def __init__(self, folder: Path, db: sqlite3.Connection, home: Path):
        self.folder, self.db, self.home = folder, db, home

    @classmethod
    @contextmanager
    def open(cls, folder: Path, *, create: bool = False, lock: str = "exclusive", home: Path | None = None) -> Iterator[Store]:
        """Open a cache folder for writing.

        Args:
            home: folder of the database and the locks; None = `folder`.
            lock: "exclusive" keeps out all other processes. "shared" allows other processes that encode. "" takes no lock,
                for reading, or if this process holds a lock already.

        Raises:
            UserError: the cache does not exist, is locked by another process or has another version, or the disk fails.
        """
        home = home or folder
        database = home / "cache.sqlite"
        if not create and not database.is_file():
            raise UserError("no-cache", f"cache.dir {folder} is not a latent cache; run `fastsd cache CONFIG` first")
        with disk_errors(folder):
            for name in ("shards", "views") if create else ():
                (folder / name).mkdir(parents=True, exist_ok=True)

        with _folder_lock(home, lock), database_errors(folder, home):
            db = sqlite3.connect(database, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                _use_write_ahead_log(db)
                db.execute("PRAGMA synchronous = FULL")
                with _transaction(db):
                    version = db.execute("PRAGMA user_version").fetchone()[0]
                    if version == 0:
                        for statement in filter(str.strip, _SCHEMA.split(";")):
                            db.execute(statement)
                        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                    elif version != SCHEMA_VERSION:
                        raise UserError(
                            "cache-version",
                            f"cache.dir {folder} has version {version}, expected {SCHEMA_VERSION}; choose another folder",
                        )
                    db.execute(_MASK_SCHEMA)
                yield cls(folder, db, home)
            finally:
                db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with _transaction(self.db):
            yield

    def attach(self, work: Path) -> None:
        """Attach another database file under the name `work`. It is written without flushing, because it can be rebuilt."""
        self.db.execute("ATTACH ? AS work", (os.fspath(work),))
        self.db.execute("PRAGMA work.journal_mode = WAL")
        self.db.execute("PRAGMA work.synchronous = OFF")
        self.work = work

    def space(self, name: str, metadata: dict[str, str], dtype: str) -> int:
        """Return the id of a space. Its first use creates it and fixes its metadata, so that its shards never change."""
        with self.transaction():
            self.db.execute(
                "INSERT OR IGNORE INTO space (name, metadata, dtype) VALUES (?, ?, ?)",
                (name, json.dumps(metadata, sort_keys=True), dtype),
            )
        return int(self.db.execute("SELECT id FROM space WHERE name = ?", (name,)).fetchone()[0])

    def shards(self, space: int | None = None) -> list[Shard]:
        records = self.db.execute(
            "SELECT shard.id, shard.name, rows, shape, dtype, metadata FROM shard JOIN space ON shard.space = space.id"
            " WHERE ?1 IS NULL OR space = ?1 ORDER BY shard.id",
            (space,),
        )
        return [
            Shard(id, name, rows, json.loads(shape), dtype, json.loads(text), self.folder / f"shards/{name}.safetensors")
            for id, name, rows, shape, dtype, text in records
        ]

    def reopen(self) -> contextlib.AbstractContextManager[Store]:
        """Open the same cache once more, for another thread."""
        return Store.open(self.folder, lock="", home=self.home)

    def plan(
        self,
        space: int,
        shape: list[int],
        contents: Iterable[tuple[bytes, int]],
        rows: int,
        prefix: str,
        build: str = "",
        suffix: str = "",
    ) -> None:
        """Plan shards of at most `rows` rows for all of `contents`, see `add_shard`.

        Args:
            prefix, suffix: the start and the end of each name.
            build: also determines the names; "" = they depend on the contents alone.
        """
        remaining = iter(contents)
        while chunk := list(itertools.islice(remaining, rows)):
            # The name depends only on the planned content, so interruptions of the build do not change it.
            planned_content = build.encode() + b"".join(content + version.to_bytes(4, "little") for content, version in chunk)
            name = f"{prefix}-{hashlib.sha256(planned_content).hexdigest()[:16]}{suffix}"
            self.add_shard(space, name, shape, chunk)

    def check_room(self, space: int) -> None:
        """Raise UserError if the disk has too little space for the planned shards."""
        need = sum(shard.rows * shard.row_bytes for shard in self.shards(space) if not shard.path.exists())
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(
                "cache-disk-space",
                f"cache.dir {self.folder}: new shards need {size_text(need)} and the disk has {size_text(free)} free;"
                " free space or choose another folder",
            )

    def add_shard(self, space: int, name: str, shape: list[int], contents: Sequence[tuple[bytes, int]]) -> None:
        """Plan a shard whose row i is for `contents[i]`, a (content, version). Call this within a transaction."""
        added = self.db.execute(
            "INSERT INTO shard (space, name, rows, shape) VALUES (?, ?, ?, ?)",
            (space, name, len(contents), json.dumps(shape)),
        )
        latent_rows = [(space, *content, added.lastrowid, row) for row, content in enumerate(contents)]
        self.db.executemany("INSERT INTO latent VALUES (?, ?, ?, ?, ?, NULL, NULL)", latent_rows)

    def write(self, shard: Shard, rows: Sequence[tuple[int, bytes]]) -> None:
        """Write rows. They are on the disk when this returns. Then call `mark_done`."""
        with disk_errors(self.folder):
            if not shard.path.exists():
                with self.transaction():  # keeps other processes from creating it at the same time
                    if not shard.path.exists():
                        shard.create()
            shard.write_rows(rows)

    def mark_done(self, shard: Shard, rows: Iterable[tuple[int, bytes]]) -> None:
        """Record rows that `write` has put on the disk. Call this within a transaction."""
        hashed = [(hashlib.sha256(data).digest(), row_check(data), shard.id, row) for row, data in rows]
        self.db.executemany("UPDATE latent SET sha256 = ?, check64 = ? WHERE shard = ? AND row = ?", hashed)

    def done_rows(self, shard: Shard) -> list[tuple[int, bytes]]:
        query = "SELECT row, sha256 FROM latent WHERE shard = ? AND sha256 IS NOT NULL ORDER BY row"
        return self.db.execute(query, (shard.id,)).fetchall()

    def forget(self, shard: Shard, rows: Iterable[int]) -> None:
        """Mark rows to be encoded again. Until then nobody reads them, because the indexes of their shard are deleted."""
        with disk_errors(self.folder):
            for path, index_class in cache.indexes(self.folder):
                try:
                    stale = shard.name in {name for name, _ in index_class(path).shards}
                except UserError:
                    stale = False  # nobody can read rows through a damaged index
                if stale:
                    path.unlink()
                    flush_folder(path.parent)
        with self.transaction():
            # Keeps `prune` from deleting the other shards, which have lost their index.
            self.db.execute("UPDATE space SET unfinished = 1 WHERE id IN (SELECT space FROM shard WHERE id = ?)", (shard.id,))
            keys = [(shard.id, row) for row in rows]
            self.db.executemany("UPDATE latent SET sha256 = NULL, check64 = NULL WHERE shard = ? AND row = ?", keys)

    def forget_broken(self, space: int) -> None:
        """Plan lost and truncated shards again. This reads only headers and lengths. `verify` checks the rows."""
        for shard in self.shards(space):
            if not shard.is_intact():
                done = [row for row, _ in self.done_rows(shard)]
                if done:
                    self.forget(shard, done)
                with disk_errors(self.folder):
                    shard.path.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError from writing below `folder` into a UserError."""
    try:
        yield
    except OSError as error:
        raise _disk_error(folder, error.strerror or str(error), full=error.errno in _FULL_ERRNOS) from error


@contextmanager
def database_errors(folder: Path, home: Path) -> Iterator[None]:
    """Turn an SQLite error caused by the disk into a UserError. `home` is that of a `Store`."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in _SQLITE_DAMAGED and (home / BUILD_FILE).exists():
            raise UserError(
                "machine-database-damaged",
                f"cache.dir {folder}: {home / 'cache.sqlite'} is damaged ({error}); delete {home} and run the same command"
                " again to continue with what machines have finished",
            ) from error
        if code in _SQLITE_DAMAGED:
            raise UserError(
                "cache-database-damaged",
                f"cache.dir {folder}: cache.sqlite is damaged ({error}); delete it and run `fastsd cache CONFIG` to encode the"
                " images again",
            ) from error
        if code not in _SQLITE_DISK:
            raise
        raise _disk_error(folder, f"cache.sqlite: {error}", full=code == _SQLITE_FULL) from error


def _disk_error(folder: Path, problem: str, *, full: bool) -> UserError:
    if full:
        return UserError(
            "cache-disk-full", f"cache.dir {folder}: the disk is full; free space and run the same command again to continue"
        )
    return UserError("cache-unusable", f"cache.dir {folder} cannot be used ({problem}); fix that or choose another folder")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        # SQLite may already have rolled back when the disk was full.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _use_write_ahead_log(db: sqlite3.Connection) -> None:
    """Switch to WAL mode. Wait for another process that switches at the same moment, which SQLite does not do."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.01)


@contextmanager
def _folder_lock(folder: Path, lock: str) -> Iterator[None]:
    with disk_errors(folder):
        handle = (folder / "cache.lock").open("a+b")
    with handle:
        if sys.platform != "win32":  # SQLite takes such locks, and would wait for them in silence
            import fcntl

            with lock_errors(handle):
                fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.lockf(handle, fcntl.LOCK_UN)
        if lock and not lock_file(handle, exclusive=lock == "exclusive"):
            raise UserError("cache-locked", f"cache.dir {folder} is in use by another `fastsd cache`; wait until it ends")
        yield


def lock_file(handle: IO[bytes], *, exclusive: bool) -> bool:
    """Lock a file until it is closed or locked again. Return False if another process holds a conflicting lock.

    Raises:
        UserError: the file system has no locks.
    """
    with lock_errors(handle) as conflict:
        if sys.platform == "win32":  # no shared locks, so only one process at a time
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    return not conflict


@contextmanager
def lock_errors(handle: IO[bytes]) -> Iterator[list[OSError]]:
    """Collect the error of a lock that another process holds. Turn any other error into a UserError: it would never end."""
    conflict = list[OSError]()
    try:
        yield conflict
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):  # POSIX and Windows allow either
            raise UserError(
                "cache-not-lockable",
                f"cache.dir: {handle.name} cannot be locked ({error.strerror}); choose a folder on a file system with locks",
            ) from None
        conflict.append(error)


def wait_for(attempt: Callable[[], bool], on_wait: Callable[[], None]) -> None:
    """Repeat `attempt` until it succeeds. Calls `on_wait` once if the first attempt fails."""
    if attempt():
        return
    on_wait()
    while not attempt():
        time.sleep(_POLL_SECONDS)
