"""Divide a build among machines that share a folder, but no locks: those of network disks are missing or do not work.

    DIR/machines/NAME/       working folder of a machine: its `cache.sqlite` and its locks. Other machines open none of them.
    DIR/machines/NAME.beat   changes every few seconds while a process of the machine works
    DIR/exchange/VIEW-N/     the N-th build of a view by several machines
        leases/              which machine makes a result
        results/               what the machines have made, see `results.py`

A machine starts from a copy of the cache's database. It lists the folders, and all machines divide the rest in results: facts
about 512 images, masks, or a shard of latents. A result's name is a hash of what it is made from, above all of content keys, so
machines that see the same images need no agreement. A machine makes a result if it creates the result's lease first, which is
atomic on network disks too. Faster machines therefore make more results. A result is written once and renamed into place, and
every machine copies it into its database. The lease of a machine whose beat stands still is taken over. Only the observer's
clock counts, so clocks may differ.

Exactness does not depend on leases. If two machines make the same result, each writes a shard of its own, and the cache uses
one of the two. The last results are steps that one machine makes for all: view, token ids, text embeddings, and the merged
database, which replaces the cache's. Then the cache is an ordinary one.

The processes of one machine share its working folder in the same way as they share a cache that one machine fills alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastsd.data.building import results
from fastsd.data.building.beats import Beats, lost_seconds
from fastsd.data.building.results import Tables
from fastsd.data.building.store import Shard, Store, disk_errors, lock_file, wait_for
from fastsd.errors import UserError
from fastsd.storage import make_folder, remove_folder

_POLL_SECONDS = 0.2
_OLDEST = 4  # results of other machines that are asked for after each result
_SHARDS_PER_BUILD = 64  # a build has at least so many shards, as long as they have `_FEWEST_ROWS`
_FEWEST_ROWS = 16
_TAG = 9  # characters at the end of a shard's name that tell its machine
_ALONE = "alone"

_Item = TypeVar("_Item")
Notify = Callable[[str], None]


class Division(Protocol):
    """The division of a build among machines. `home` is the folder of the database and the locks."""

    home: Path
    build: str  # enters the names of new shards
    tag: str  # ends the names of new shards

    def divide(
        self, items: Iterable[_Item], name: Callable[[_Item], str], make: Callable[[_Item], Tables]
    ) -> Iterator[tuple[_Item, Tables]]:
        """Yield each item with its result, which this or another machine makes. `name` names the result."""
        ...

    def disown(self, store: Store, space: int) -> None:
        """Forget the unfinished rows of shards that this machine may not write, so that they are planned again."""
        ...

    def shard_rows(self, rows: int, most: int) -> int:
        """Return the number of rows of a new shard, if there are `rows` new rows. It is at most `most`."""
        ...

    def take(self, shard: Shard) -> bool:
        """Return True if this machine encodes a shard."""
        ...

    def unpublished(self, shards: Iterable[Shard]) -> list[Shard]:
        """Return those shards that this machine has begun and not published."""
        ...

    def publish_shard(self, store: Store, shard: Shard) -> None:
        """Give the rows and the rejections of a finished shard to the other machines."""
        ...

    def collect(self, store: Store) -> None:
        """Take over the rows that other machines have published."""
        ...

    def once(self, step: str, do: Callable[[], None]) -> None:
        """Let one machine take a step of the build. Return when it is done."""
        ...

    def finish(self) -> None:
        """Merge the rows of all machines into the cache's database."""
        ...


class Alone:
    """The division of a build that one machine makes alone."""

    build = tag = ""

    def __init__(self, folder: Path):
        self.home = folder

    def divide(
        self, items: Iterable[_Item], name: Callable[[_Item], str], make: Callable[[_Item], Tables]
    ) -> Iterator[tuple[_Item, Tables]]:
        return ((item, make(item)) for item in items)

    def disown(self, store: Store, space: int) -> None:
        pass

    def shard_rows(self, rows: int, most: int) -> int:
        return most

    def take(self, shard: Shard) -> bool:
        return True

    def unpublished(self, shards: Iterable[Shard]) -> list[Shard]:
        return []

    def publish_shard(self, store: Store, shard: Shard) -> None:
        raise AssertionError("a shard is published only to other machines")

    def collect(self, store: Store) -> None:
        pass

    def once(self, step: str, do: Callable[[], None]) -> None:
        do()

    def finish(self) -> None:
        pass


def machine_name(option: str, environment: Mapping[str, str]) -> str:
    """Return the name of this machine among those that fill a cache together, or "" if it fills it alone.

    Args:
        option: the name that the user gave. By default, it is the host's name if torchrun or Slurm run on several machines.

    Raises:
        UserError: the name cannot name a folder.
    """
    several = (("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("SLURM_JOB_NUM_NODES", ""), ("SLURM_ARRAY_TASK_COUNT", ""))
    counts = ((_count(environment, total), _count(environment, local)) for total, local in several)
    name = option or (os.uname().nodename if hasattr(os, "uname") and any(total > local for total, local in counts) else "")
    if name and not results.MACHINE_NAME.fullmatch(name):
        raise UserError(
            "machine-name",
            f"--machine is {name!r}; use at most 63 letters, digits, dots, hyphens and underscores, such as node-1",
        )
    return name


def _count(environment: Mapping[str, str], variable: str) -> int:
    text = environment.get(variable, "1")
    return int(text) if text.isdecimal() else 1


@contextlib.contextmanager
def joined(folder: Path, name: str, view: str, notify: Notify) -> Iterator[Division]:
    """Join the machines that fill a cache. With the name "", fill it alone.

    Raises:
        UserError: another machine has the same name, or machines do what this start excludes.
    """
    with disk_errors(folder):
        make_folder(folder / "machines" if name else folder)
    if name:
        with Machine.join(folder, name, view, notify) as machine:
            yield machine
        return
    settle(folder, notify)
    _refuse_one_that_is_alone(folder, notify, including_this=False)
    beats = Beats(folder)
    try:
        with beats.beating(_ALONE):
            yield Alone(folder)
    finally:
        beats.end(_ALONE)


def _refuse_one_that_is_alone(folder: Path, notify: Notify, *, including_this: bool) -> None:
    """Raise UserError if a machine fills the cache alone: another one or, with `including_this`, this one."""
    beats = Beats(folder)
    if beats.is_of_another_machine(_ALONE) or (including_this and not beats.has_ended(_ALONE)):
        notify(f"waiting up to {lost_seconds()} s: a machine may be at work in {folder}")
        if beats.is_moving(_ALONE):
            raise UserError(
                "cache-machine-alone",
                f"cache.dir {folder} is being filled by a machine that was started without --machine; wait until it ends, or"
                " stop it and start all with `fastsd cache CONFIG --machine NAME`",
            )


class Machine:
    """One of several machines that fill a cache, see `Division`. Each of its processes has such an object."""

    def __init__(self, folder: Path, name: str, exchange: Path, beats: Beats, notify: Notify):
        self.folder, self.name, self.beats, self.notify = folder, name, beats, notify
        self.home = folder / "machines" / name
        self.build = exchange.name
        self.tag = f"-{hashlib.sha256(name.encode()).hexdigest()[: _TAG - 1]}"
        self.results = results.Results(exchange, name)
        self._copied = 0  # the last id of a shard that was in the cache's database
        self._collected: set[str] = set()
        self._listing = hashlib.sha256()

    @classmethod
    @contextlib.contextmanager
    def join(cls, folder: Path, name: str, view: str, notify: Notify) -> Iterator[Machine]:
        beats = Beats(folder / "machines")
        _refuse_one_that_is_alone(folder, notify, including_this=True)
        if beats.is_of_another_machine(name):
            notify(f"waiting up to {lost_seconds()} s: machine {name} was not stopped, or another machine has its name")
            if beats.is_moving(name):
                raise UserError(
                    "machine-name-taken",
                    f"cache.dir {folder}: another machine is called {name}; give this one its own name with --machine",
                )
        with disk_errors(folder):
            users_lock = (folder / "machines" / f"{name}.lock").open("a+b")
        with users_lock as users, contextlib.ExitStack() as ends:
            with beats.beating(name):
                with _alone_in(folder / "machines" / f"{name}.join", notify):
                    exchange = results.current(folder / "exchange", view)
                    machine = cls(folder, name, exchange, beats, notify)
                    machine._copied = results.seed(folder, machine.home, exchange.name)
                    lock_file(users, exclusive=False)
                ends.callback(machine._leave, users)  # after the last beat, which would overwrite the end
                yield machine

    def _leave(self, users: Any) -> None:
        """End the beat, if this is the machine's last process. Delete what finished builds no longer need."""
        with _alone_in(self.folder / "machines" / f"{self.name}.join", self.notify):
            if lock_file(users, exclusive=True):
                self.beats.end(self.name)
                if self.results.is_finished():
                    remove_folder(self.home)
                for build in results.builds(self.folder / "exchange"):
                    # Without this machine, whose last beat may not have been written.
                    if build.is_finished() and all(map(self.beats.is_lost, build.machines() - {self.name})):
                        remove_folder(build.folder)

    def divide(
        self, items: Iterable[_Item], name: Callable[[_Item], str], make: Callable[[_Item], Tables]
    ) -> Iterator[tuple[_Item, Tables]]:
        waiting: dict[str, _Item] = {}

        def ready(candidates: list[str]) -> Iterator[tuple[_Item, Tables]]:
            for result in candidates:
                tables = self.results.read(result)
                if tables is None and self._lease(result):
                    tables = make(waiting[result])
                    self.results.publish(result, tables)
                if tables is not None:
                    yield waiting.pop(result), tables

        for item in items:
            result = name(item)
            self._listing.update(result.encode())
            waiting[result] = item
            # The oldest are probably made by now. Without this, the items of all other machines would fill the memory.
            yield from ready([result, *itertools.islice((other for other in waiting if other != result), _OLDEST)])
        while waiting:
            before = len(waiting)
            yield from ready(list(waiting))
            if len(waiting) == before:
                time.sleep(_POLL_SECONDS)

    def disown(self, store: Store, space: int) -> None:
        foreign = "SELECT id FROM shard WHERE id <= ? OR SUBSTR(name, -?) != ?"
        delete = f"DELETE FROM latent WHERE space = ? AND sha256 IS NULL AND shard IN ({foreign})"
        with store.transaction():
            lost = store.db.execute(delete, (space, self._copied, _TAG, self.tag)).rowcount
        if lost:  # perhaps of a shard that was damaged after a step
            self.results.delete("step-view")

    def shard_rows(self, rows: int, most: int) -> int:
        return min(most, max(_FEWEST_ROWS, -(-rows // _SHARDS_PER_BUILD)))

    def take(self, shard: Shard) -> bool:
        result = self._result(shard)
        return bool(result) and not self.results.has(result) and self._lease(result)

    def _result(self, shard: Shard) -> str:
        return "rows-" + shard.name.removesuffix(self.tag) if shard.name.endswith(self.tag) else ""

    def _lease(self, result: str) -> bool:
        """Return True if this machine makes a result: it holds the lease, or creates it, or takes it over from a lost one."""
        for attempt in range(sys.maxsize):
            holder = self.results.lease(result, attempt)
            if self.results.has_lease(result, attempt + 1):  # it was taken from this holder, perhaps from this machine
                continue
            if holder == self.name:
                return True
            if not self.beats.is_lost(holder):
                return False
        raise AssertionError("a result has as many lost machines as Python can count")

    def unpublished(self, shards: Iterable[Shard]) -> list[Shard]:
        begun = [shard for shard in shards if shard.id > self._copied and self._result(shard)]
        return [shard for shard in begun if not self.results.has(self._result(shard)) and shard.path.exists()]

    def publish_shard(self, store: Store, shard: Shard) -> None:
        self.results.publish(self._result(shard), results.rows_of(store, shard))

    def collect(self, store: Store) -> None:
        for result in sorted(self.results.names("rows") - self._collected):
            if (tables := self.results.read(result)) is not None and results.absorb(store, tables):
                self._collected.add(result)
            else:  # lost or damaged since, so it is made again
                self.results.delete(result)

    def once(self, step: str, do: Callable[[], None]) -> None:
        result = f"step-{step.replace(' ', '-')}-{self._listing.hexdigest()[:16]}"

        def attempt() -> bool:
            with _alone_in(self.home / "steps.lock", self.notify):
                if not self.results.has(result) and self._lease(result):
                    do()
                    self.results.publish(result, {})
            return self.results.has(result)

        wait_for(attempt, lambda: self.notify(f"waiting: another machine makes the {step}"))

    def finish(self) -> None:
        def merge() -> None:
            with Store.open(self.folder, lock="shared", home=self.home) as store:
                self.collect(store)
            results.merge(self.folder, self.home)

        self.once("merge", merge)


@contextlib.contextmanager
def _alone_in(path: Path, notify: Notify) -> Iterator[None]:
    """Let one process of this machine at a time run the block."""
    with path.open("a+b") as file:
        wait_for(lambda: lock_file(file, exclusive=True), lambda: None)
        yield


def settle(folder: Path, notify: Notify = lambda line: None) -> None:
    """Make an ordinary cache of one that several machines began to fill: keep what they encoded, delete their other files.

    Call it before any other use of the cache's database that writes.

    Raises:
        UserError: a machine is at work.
    """
    builds = results.builds(folder / "exchange")
    names = {path.stem for path in (folder / "machines").glob("*.beat")}
    if not builds and not names:
        return
    beats = Beats(folder / "machines")
    unclear = sorted(name for name in names if not beats.is_lost(name))
    if unclear:
        notify(f"waiting up to {lost_seconds()} s: machines may be at work in {folder} ({', '.join(unclear)})")
    working = next((name for name in unclear if beats.is_moving(name)), "")
    if working:
        raise UserError(
            "cache-machines-at-work",
            f"cache.dir {folder} is being filled by machine {working}; wait until it ends, or join it with"
            " `fastsd cache CONFIG --machine NAME`",
        )
    for build in builds:
        if not build.is_finished():
            with Store.open(folder, create=True) as store, contextlib.suppress(sqlite3.DatabaseError):
                for result in sorted(build.names("rows")):
                    if (tables := build.read(result)) is not None:
                        results.absorb(store, tables, unfinished=True)
        remove_folder(build.folder)
    remove_folder(folder / "machines")
