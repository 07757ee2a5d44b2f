"""Results of a build that machines exchange, and the databases that they start from and end with.

A result is a file with a few tables, an SQLite database in memory that is serialized, and its sha256. SQLite never opens it as
a file. The file is written to a temporary name, flushed and renamed, and never changes. Names: `facts-` and `masks-`, see
`collect.py` and `mask_cells.py`; `rows-`, the finished rows of a shard; `step-`, a step that is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsd.data.building.store import BUILD_FILE, Shard, Store, disk_errors
from fastsd.storage import copy_file, flush_folder, make_folder, remove_folder, write_bytes

Tables = dict[str, Sequence[Sequence[Any]]]  # name -> rows
MACHINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_KINDS = ("facts", "masks", "rows", "step")  # a result's name begins with its kind
_LAST_STEP = "step-merge-"
_DIGEST = 32  # bytes of a sha256


def _pack(tables: Tables) -> bytes:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("CREATE TABLE format (version)")
        for name, rows in tables.items():
            if rows:
                db.execute(f"CREATE TABLE {name} ({', '.join(f'c{i}' for i in range(len(rows[0])))})")
                db.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * len(rows[0]))})", rows)
        db.commit()
        data = db.serialize()
    return data + hashlib.sha256(data).digest()


def _unpack(content: bytes) -> Tables | None:
    """Return the tables of a file, or None if it is damaged."""
    data, digest = content[:-_DIGEST], content[-_DIGEST:]
    if hashlib.sha256(data).digest() != digest:
        return None
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.deserialize(data)
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: db.execute(f"SELECT * FROM {name} ORDER BY rowid").fetchall() for name in names}


class Results:
    """The results and leases of one build, as one machine uses them."""

    def __init__(self, folder: Path, machine: str = ""):
        self.folder, self._machine = folder, machine

    def _path(self, name: str) -> Path:
        return self.folder / "results" / name.partition("-")[0] / name

    def names(self, kind: str) -> set[str]:
        """List the results of a kind that are made."""
        with contextlib.suppress(FileNotFoundError):
            return {name for name in os.listdir(self.folder / "results" / kind) if not name.startswith(".")}
        return set()

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def read(self, name: str) -> Tables | None:
        """Return a result, or None if it is not made yet. A damaged result is deleted, and this machine has to make it again.

        The machine that made it is perhaps beyond this part of its work, and waits for this one.
        """
        with disk_errors(self.folder):
            try:
                content = self._path(name).read_bytes()
            except FileNotFoundError:
                return None
        tables = _unpack(content)
        if tables is None:
            self.delete(name)
            if self._machine:
                self.lease(name, next(attempt for attempt in itertools.count() if not self.has_lease(name, attempt)))
        return tables

    def publish(self, name: str, tables: Tables) -> None:
        path = self._path(name)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        with disk_errors(self.folder):
            try:
                write_bytes(temporary, _pack(tables))
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            flush_folder(path.parent)

    def delete(self, name: str) -> None:
        """Delete a result, and the steps that may have used it."""
        for result in (name, *self.names("step")):
            self._path(result).unlink(missing_ok=True)

    def lease(self, result: str, attempt: int) -> str:
        """Create a lease if it does not exist. Return the name of the machine that holds it.

        "" = it was created a moment ago, and its machine is not known yet, or it is damaged and never will be.
        """
        path = self.folder / "leases" / f"{result}.{attempt}"
        with disk_errors(self.folder):
            try:
                with path.open("x") as file:
                    file.write(self._machine)
                return self._machine
            except FileExistsError:
                return _holder(path)
            except OSError:  # a lease without a name would be waited for
                path.unlink(missing_ok=True)
                raise

    def has_lease(self, result: str, attempt: int) -> bool:
        return (self.folder / "leases" / f"{result}.{attempt}").exists()

    def machines(self) -> set[str]:
        """Return the names of the machines that hold or have held leases, as far as they can be read."""
        with disk_errors(self.folder):
            return {_holder(path) for path in (self.folder / "leases").glob("*")} - {""}

    def is_finished(self) -> bool:
        return any(name.startswith(_LAST_STEP) for name in self.names("step"))


def _holder(path: Path) -> str:
    """Return the machine that a lease names, or "". A name that no machine has, of a damaged lease, is that of a lost one."""
    with contextlib.suppress(FileNotFoundError):
        name = path.read_bytes().decode("ascii", "replace")
        return name if MACHINE_NAME.fullmatch(name) else ""
    return ""


def builds(folder: Path) -> list[Results]:
    """List the builds in `DIR/exchange`, oldest first."""
    paths = [path for path in folder.glob("*-*") if path.name.rpartition("-")[2].isdecimal()]
    return [Results(path) for path in sorted(paths, key=lambda path: int(path.name.rpartition("-")[2]))]


def current(folder: Path, view: str) -> Path:
    """Return the folder of the unfinished build of a view. Create one if there is none, or what one lacks."""
    existing = builds(folder)
    begun = [build.folder for build in existing if build.folder.name.rpartition("-")[0] == view and not build.is_finished()]
    number = max((int(build.folder.name.rpartition("-")[2]) for build in existing), default=0)
    path = begun[0] if begun else folder / f"{view}-{number + 1}"
    for name in ("leases", *(f"results/{kind}" for kind in _KINDS)):  # machines that start at the same time make the same
        make_folder(path / name)
    return path


def seed(folder: Path, home: Path, build: str) -> int:
    """Begin a machine's result of a build with a copy of the cache's database. Keep what the machine has of the same build.

    Returns:
        The largest id of a shard in the copy.
    """
    with disk_errors(home):
        marker = home / BUILD_FILE
        text = marker.read_text(errors="replace") if marker.is_file() else ""
        if belongs := re.fullmatch(rf"{re.escape(build)} (\d+)", text):
            return int(belongs[1])
        if home.exists():
            remove_folder(home)
        make_folder(home)
        _copy_database(folder, home / "cache.sqlite")
        with Store.open(folder, create=True, lock="", home=home) as store:
            last = int(store.db.execute("SELECT IFNULL(MAX(id), 0) FROM shard").fetchone()[0])
        write_bytes(marker, f"{build} {last}".encode())
        return last


def _copy_database(folder: Path, copy: Path) -> None:
    """Copy the cache's database without opening it. It is complete if no process uses it."""
    for suffix in ("", "-wal"):
        source = folder / f"cache.sqlite{suffix}"
        if source.exists():
            copy_file(source, copy.with_name(copy.name + suffix))


def rows_of(store: Store, shard: Shard) -> Tables:
    """Return what other machines must know of a shard: its space, its finished rows, and its images that were rejected."""
    run = store.db.execute
    unusable = (
        "SELECT path, reason, size FROM sample WHERE reason IS NOT NULL AND content IN"
        " (SELECT content FROM latent WHERE shard = ? AND sha256 IS NULL)"
    )
    return {
        "space": run(
            "SELECT space.name, metadata, dtype FROM space JOIN shard ON space.id = space WHERE shard.id = ?", (shard.id,)
        ).fetchall(),
        "shard": run("SELECT name, rows, shape FROM shard WHERE id = ?", (shard.id,)).fetchall(),
        "latent": run(
            "SELECT content, version, row, sha256, check64 FROM latent WHERE shard = ? AND sha256 IS NOT NULL ORDER BY row",
            (shard.id,),
        ).fetchall(),
        "rejected": run(unusable, (shard.id,)).fetchall() if _has_samples(store) else [],
    }


def absorb(store: Store, tables: Tables, *, unfinished: bool = False) -> bool:
    """Add the rows of a result to a database. A row that it has already stays where it is.

    Args:
        unfinished: the rows have no view yet, and `prune` must keep them.

    Returns:
        False if the result is damaged, or its shard is.
    """
    if len(tables.get("space", ())) != 1 or len(tables.get("shard", ())) != 1:
        return False
    ((space_name, metadata, dtype),), ((shard_name, rows, shape),) = tables["space"], tables["shard"]
    path = store.folder / "shards" / f"{shard_name}.safetensors"
    if not Shard(0, shard_name, rows, json.loads(shape), dtype, json.loads(metadata), path).is_intact():
        return False
    with store.transaction():
        run = store.db.execute
        run("INSERT OR IGNORE INTO space (name, metadata, dtype) VALUES (?, ?, ?)", (space_name, metadata, dtype))
        space = run("SELECT id FROM space WHERE name = ?", (space_name,)).fetchone()[0]
        run("INSERT OR IGNORE INTO shard (space, name, rows, shape) VALUES (?, ?, ?, ?)", (space, shard_name, rows, shape))
        shard = run("SELECT id FROM shard WHERE name = ?", (shard_name,)).fetchone()[0]
        if unfinished:
            run("UPDATE space SET unfinished = 1 WHERE id = ?", (space,))
        store.db.executemany(
            "INSERT INTO latent (space, content, version, shard, row, sha256, check64) VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (space, content, version) DO UPDATE SET shard = excluded.shard, row = excluded.row,"
            " sha256 = excluded.sha256, check64 = excluded.check64 WHERE latent.sha256 IS NULL",
            [(space, content, version, shard, *place) for content, version, *place in tables.get("latent", ())],
        )
        if tables.get("rejected") and _has_samples(store):
            store.db.executemany(
                "UPDATE sample SET reason = ?2, size = CASE WHEN ?3 < 0 THEN -1 ELSE size END"
                " WHERE path = ?1 AND reason IS NULL",
                tables["rejected"],
            )
    return True


def _has_samples(store: Store) -> bool:
    return any(name == "work" for _, name, _ in store.db.execute("PRAGMA database_list"))


_MERGE = """
INSERT OR IGNORE INTO space (name, metadata, dtype, unfinished) SELECT name, metadata, dtype, unfinished FROM node.space;
UPDATE space SET unfinished = (SELECT unfinished FROM node.space WHERE node.space.name = space.name)
    WHERE name IN (SELECT name FROM node.space);
CREATE TEMP TABLE space_id AS SELECT old.id AS old, new.id AS new FROM node.space old JOIN main.space new USING (name);
INSERT OR IGNORE INTO shard (space, name, rows, shape) SELECT new, name, rows, shape FROM node.shard old JOIN space_id
    ON space = old WHERE EXISTS (SELECT 1 FROM node.latent WHERE shard = old.id AND sha256 IS NOT NULL) ORDER BY old.id;
CREATE TEMP TABLE shard_id AS SELECT old.id AS old, new.id AS new FROM node.shard old JOIN main.shard new USING (name);
CREATE UNIQUE INDEX temp.shard_old ON shard_id (old);
REPLACE INTO latent SELECT space_id.new, content, version, shard_id.new, row, sha256, check64 FROM node.latent
    JOIN space_id ON space = space_id.old JOIN shard_id ON shard = shard_id.old WHERE sha256 IS NOT NULL;
REPLACE INTO file SELECT * FROM node.file;
DELETE FROM rejected WHERE space IN (SELECT new FROM space_id);
INSERT INTO rejected SELECT new, path, reason, size, mtime_ns FROM node.rejected JOIN space_id ON space = old;
INSERT OR IGNORE INTO mask SELECT * FROM node.mask;
"""


def merge(folder: Path, home: Path) -> None:
    """Replace the cache's database by one that also has all rows of a machine's database, atomically.

    It is made from a fresh copy in the machine's folder, because the cache's may have changed since the build began.
    """
    fresh = home / "merge"
    shutil.rmtree(fresh, ignore_errors=True)
    with disk_errors(folder):
        fresh.mkdir()
        _copy_database(folder, fresh / "cache.sqlite")
    with Store.open(folder, create=True, home=fresh) as store:
        store.db.execute("ATTACH ? AS node", (os.fspath(home / "cache.sqlite"),))
        with store.transaction():
            for statement in filter(str.strip, _MERGE.split(";")):
                store.db.execute(statement)
        store.db.execute("DETACH node")
        store.db.execute("PRAGMA journal_mode = DELETE")  # all in one file
    with disk_errors(folder), (fresh / "cache.sqlite").open("rb+") as file:
        os.fsync(file.fileno())
        # A log that stays would be replayed into the new database. What it has is in the new database.
        for suffix in ("-wal", "-shm"):
            (folder / f"cache.sqlite{suffix}").unlink(missing_ok=True)
        os.replace(fresh / "cache.sqlite", folder / "cache.sqlite")
        flush_folder(folder)
    shutil.rmtree(fresh, ignore_errors=True)
