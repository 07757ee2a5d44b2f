"""The writing side of the cache on disk: its SQLite tables, its shards, one writer at a time; verify, stats, prune.

    space      one VAE and one preprocessing
    file       content hashes by (path, size, mtime), so that an unchanged file is not read again
    shard      n rows of one shape; planned here before its file exists
    latent     where the latent of a content lies; sha256 of its bytes once they are on disk, NULL before
    rejected   what was put aside and why; a size of -1 means that trying again may help

Paths are stored as bytes, since a file name need not be text.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastsd.data import cache
from fastsd.errors import UserError
from fastsd.storage import flush_folder, safetensors_header

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE space (id INTEGER PRIMARY KEY, name TEXT UNIQUE, metadata TEXT, dtype TEXT, unfinished INTEGER DEFAULT 0);
CREATE TABLE file (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, content BLOB) WITHOUT ROWID;
CREATE TABLE shard (id INTEGER PRIMARY KEY, space INTEGER, name TEXT UNIQUE, rows INTEGER, shape TEXT);
CREATE TABLE latent (space INTEGER, content BLOB, shard INTEGER, row INTEGER, sha256 BLOB, PRIMARY KEY (space, content))
    WITHOUT ROWID;
CREATE UNIQUE INDEX latent_place ON latent (shard, row);
CREATE TABLE rejected (space INTEGER, path BLOB, reason TEXT, size INTEGER, mtime_ns INTEGER, PRIMARY KEY (space, path))
    WITHOUT ROWID;
"""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of SQLite's result codes, those that the disk or its owner answers for; the others are our fault.
_SQLITE_FULL = 13
_SQLITE_DISK = {3: "no permission", 5: "busy", 8: "read-only", 10: "i/o error", 11: "damaged", 14: "cannot be opened"}
_SQLITE_DISK |= {_SQLITE_FULL: "full", 26: "no database"}


@dataclass(frozen=True)
class Shard:
    """A planned shard. `shape` is that of a row, [C, h, w]; `path` need not exist yet."""

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

    def whole(self) -> bool:
        """Whether the file is there with its header and its full length; says nothing about the rows."""
        try:
            tensors, metadata, _ = cache.read_header(self.path, cache.SHARD_FORMAT)
        except UserError:
            return False
        mean = tensors.get("mean", {})
        says = (mean.get("shape"), mean.get("dtype"), metadata)
        return says == ([self.rows, *self.shape], cache.CODES[cache.DTYPES[self.dtype]], metadata | self.metadata)

    def read_rows(self, rows: Iterable[int]) -> Iterator[bytes]:
        start = self._start()
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(start + row * self.row_bytes)
                yield file.read(self.row_bytes)

    def write_rows(self, rows: Sequence[tuple[int, bytes]]) -> None:
        """Put rows in their places, on the disk when this returns; the file is made on the first call."""
        if not self.path.exists():
            self._create()
        start = self._start()
        with self.path.open("r+b") as file:
            for row, data in rows:
                assert len(data) == self.row_bytes and row < self.rows
                file.seek(start + row * self.row_bytes)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _start(self) -> int:
        return cache.read_header(self.path, cache.SHARD_FORMAT)[2]

    def _create(self) -> None:
        shapes = {"mean": (cache.DTYPES[self.dtype], (self.rows, *self.shape))}
        head = safetensors_header(shapes, {"fastsd": cache.SHARD_FORMAT, **self.metadata}, cache.ALIGN)
        size = len(head) + self.rows * self.row_bytes
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(head)
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                try:  # a full disk shows here, not in the middle of a row
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        flush_folder(self.path.parent)


class Store:
    """An open cache folder. `db` runs in autocommit; group statements by `transaction`."""

    def __init__(self, folder: Path, db: sqlite3.Connection):
        self.folder, self.db = folder, db

    @classmethod
    @contextmanager
    def open(cls, folder: Path, create: bool = False, exclusive: bool = True) -> Iterator[Store]:
        """Raises UserError: no cache there, another process writes to it, another version's, or an unusable disk."""
        database = folder / "cache.sqlite"
        if not create and not database.is_file():
            raise UserError(f"cache.dir {folder} is no latent cache; run `fastsd cache CONFIG` first")
        with disk_errors(folder):
            for name in ("shards", "views") if create else ():
                (folder / name).mkdir(parents=True, exist_ok=True)
        with _only_writer(folder, exclusive), database_errors(folder):
            db = sqlite3.connect(database, timeout=60, isolation_level=None)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
                elif version != SCHEMA_VERSION:
                    raise UserError(f"cache.dir {folder} is of another version ({version}); choose another folder")
                yield cls(folder, db)
            finally:
                db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            # A full disk may have rolled back by itself already.
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def space(self, name: str, metadata: dict[str, str], dtype: str) -> int:
        """The id of a space; what it says about its VAE is fixed when it is first met, so its shards never change."""
        with self.transaction():
            self.db.execute(
                "INSERT OR IGNORE INTO space (name, metadata, dtype) VALUES (?, ?, ?)",
                (name, json.dumps(metadata, sort_keys=True), dtype),
            )
        return int(self.db.execute("SELECT id FROM space WHERE name = ?", (name,)).fetchone()[0])

    def shards(self, space: int | None = None) -> list[Shard]:
        found = self.db.execute(
            "SELECT shard.id, shard.name, rows, shape, dtype, metadata FROM shard JOIN space ON shard.space = space.id"
            " WHERE ?1 IS NULL OR space = ?1 ORDER BY shard.id",
            (space,),
        )
        return [
            Shard(id, name, rows, json.loads(shape), dtype, json.loads(text), self.folder / f"shards/{name}.safetensors")
            for id, name, rows, shape, dtype, text in found
        ]

    def add_shard(self, space: int, name: str, shape: list[int], contents: Sequence[bytes]) -> None:
        """Plan a shard whose row i is the latent of `contents[i]`; to be called within a transaction."""
        added = self.db.execute(
            "INSERT INTO shard (space, name, rows, shape) VALUES (?, ?, ?, ?)",
            (space, name, len(contents), json.dumps(shape)),
        )
        places = [(space, content, added.lastrowid, row) for row, content in enumerate(contents)]
        self.db.executemany("INSERT INTO latent VALUES (?, ?, ?, ?, NULL)", places)

    def mark_done(self, shard: Shard, rows: Iterable[tuple[int, bytes]]) -> None:
        """Record rows that `write_rows` has put on the disk; to be called within a transaction."""
        hashed = [(hashlib.sha256(data).digest(), shard.id, row) for row, data in rows]
        self.db.executemany("UPDATE latent SET sha256 = ? WHERE shard = ? AND row = ?", hashed)

    def done_rows(self, shard: Shard) -> list[tuple[int, bytes]]:
        query = "SELECT row, sha256 FROM latent WHERE shard = ? AND sha256 IS NOT NULL ORDER BY row"
        return self.db.execute(query, (shard.id,)).fetchall()

    def forget(self, shard: Shard, rows: Iterable[int]) -> None:
        """Have rows encoded again, and take away the views that would read them before that is done."""
        with disk_errors(self.folder):
            for path in cache.view_paths(self.folder):
                try:
                    stale = shard.name in {name for name, _ in cache.View(path).shards}
                except UserError:
                    stale = False  # damaged: nothing can read it, so nothing is misled by it
                if stale:
                    path.unlink()
            flush_folder(self.folder / "views")
        with self.transaction():
            # Without their view the other shards must not look unused to `prune`.
            self.db.execute("UPDATE space SET unfinished = 1 WHERE id IN (SELECT space FROM shard WHERE id = ?)", (shard.id,))
            marks = [(shard.id, row) for row in rows]
            self.db.executemany("UPDATE latent SET sha256 = NULL WHERE shard = ? AND row = ?", marks)

    def forget_broken(self, space: int) -> None:
        """Plan lost or cut shards again. Cheap: looks at heads and lengths only, see `verify` for the rest."""
        for shard in self.shards(space):
            if not shard.whole():
                done = [row for row, _ in self.done_rows(shard)]
                if done:
                    self.forget(shard, done)
                with disk_errors(self.folder):
                    shard.path.unlink(missing_ok=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError from writing below `folder` into a UserError."""
    try:
        yield
    except OSError as error:
        raise _disk_trouble(folder, error.strerror or str(error), error.errno in _FULL) from error


@contextmanager
def database_errors(folder: Path) -> Iterator[None]:
    """Turns what the disk does to SQLite into a UserError."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code not in _SQLITE_DISK:
            raise
        raise _disk_trouble(folder, f"cache.sqlite: {error}", code == _SQLITE_FULL) from error


def _disk_trouble(folder: Path, what: str, full: bool) -> UserError:
    if full:
        return UserError(f"cache.dir {folder}: the disk is full; free some space, and the same line again goes on")
    return UserError(f"cache.dir {folder} cannot be used ({what}); mend that or choose another folder")


@contextmanager
def _only_writer(folder: Path, exclusive: bool) -> Iterator[None]:
    """Holds a lock that the system lifts when the process ends, however it ends."""
    if not exclusive:
        yield
        return
    with disk_errors(folder):
        handle = (folder / "cache.lock").open("a+b")
    with handle:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"cache.dir {folder}: another `fastsd cache` is at work there; wait until it ends") from None
        yield


def verify(dir: str | Path) -> list[str]:
    """Compare every finished row and every view with its sha256. Returns one sentence per shard or view that differs.

    What differs is set to be encoded again by the next `build_cache`, and views that refer to it are removed, so that
    nothing trains on it meanwhile.
    """
    problems = []
    with Store.open(Path(dir)) as store:
        for path in cache.view_paths(store.folder):
            try:
                view = cache.View(path)
                sound = cache.content_hash(view.arrays, view.metadata) == view.metadata["sha256"]
            except UserError:
                sound = False
            if not sound:
                store.db.execute("UPDATE space SET unfinished = 1")  # whose view it was cannot be told
                path.unlink()
                problems.append(f"{path} does not match its sha256; removed, `fastsd cache CONFIG` makes it again")
        for shard in store.shards():
            done = store.done_rows(shard)
            if not done:
                continue
            if not shard.whole():
                bad = [row for row, _ in done]
                what = "is missing, cut short or has a damaged head"
            else:
                stored = shard.read_rows(row for row, _ in done)
                bad = [row for (row, sha), data in zip(done, stored, strict=True) if hashlib.sha256(data).digest() != sha]
                some = ", ".join(map(str, bad[:9])) + (", ..." if len(bad) > 9 else "")
                what = f"has {len(bad)} of {len(done)} rows that do not match their sha256: {some}"
            if bad:
                store.forget(shard, bad)
                problems.append(f"{shard.path} {what}; `fastsd cache CONFIG` encodes them again")
    return problems


@dataclass(frozen=True)
class Stats:
    """`views`: name -> what it says of itself.  `latents` encoded, `planned` ones missing still or for good (rejected),
    in `shards` of `shard_bytes` on disk.  `rejected`: reason -> files."""

    views: dict[str, cache.CacheMeta]
    latents: int
    planned: int
    shards: int
    shard_bytes: int
    rejected: dict[str, int]


def stats(dir: str | Path) -> Stats:
    """Count what a cache folder holds; may run beside a process that fills it. Raises UserError: no cache there."""
    with Store.open(Path(dir), exclusive=False) as store:
        done, planned = store.db.execute("SELECT COUNT(sha256), COUNT(*) - COUNT(sha256) FROM latent").fetchone()
        files = [path for path in (store.folder / "shards").glob("*.safetensors") if path.exists()]
        views = {path.stem: cache.View(path).meta for path in cache.view_paths(store.folder)}
        reasons = Counter(dict(store.db.execute("SELECT reason, COUNT(*) FROM rejected GROUP BY reason")))
        size = sum(path.stat().st_size for path in files)
        return Stats(views, done, planned, len(files), size, dict(reasons.most_common()))


@dataclass(frozen=True)
class Pruned:
    shards: int
    bytes: int


def prune(dir: str | Path) -> Pruned:
    """Delete shards that no view refers to, and what is remembered of image files that are gone.

    A space whose caching was interrupted is left alone until it is finished.  To give up a view, delete its file first.
    Raises UserError: no cache there, or a damaged view.
    """
    with Store.open(Path(dir)) as store:
        used = {name for path in cache.view_paths(store.folder) for name, _ in cache.View(path).shards}
        busy = {id for (id,) in store.db.execute("SELECT id FROM space WHERE unfinished")}
        spaces = dict(store.db.execute("SELECT id, space FROM shard"))
        shards = store.shards()
        unused = [shard for shard in shards if shard.name not in used and spaces[shard.id] not in busy]
        with store.transaction():
            for shard in unused:
                store.db.execute("DELETE FROM latent WHERE shard = ?", (shard.id,))
                store.db.execute("DELETE FROM shard WHERE id = ?", (shard.id,))
            for table in ("file", "rejected"):
                paths = {path for (path,) in store.db.execute(f"SELECT path FROM {table}") if not os.path.lexists(path)}
                store.db.executemany(f"DELETE FROM {table} WHERE path = ?", [(path,) for path in paths])
        kept = {shard.path.name for shard in shards} - {shard.path.name for shard in unused}
        freed = 0
        with disk_errors(store.folder):
            # Also files of shards forgotten earlier, should a prune have been cut off here.
            orphans = [path for path in (store.folder / "shards").iterdir() if path.name not in kept]
            for path in orphans:
                freed += path.stat().st_size
                path.unlink()
        return Pruned(len(orphans), freed)
