"""Shards, tables and locks of a cache folder, without models."""

import errno
import hashlib
import os
import sqlite3
import time
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from sentences import refused

from fastsd.data.building import store as stores
from fastsd.data.building.claims import Claims
from fastsd.data.building.collect import one_at_a_time, sample_table
from fastsd.data.building.store import Shard, Store, disk_errors, lock_file, wait_for
from fastsd.data.rows import row_check

SHAPE, ROWS = [2, 3, 5], 4


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path, create=True) as store:
        yield store


def row(i: int) -> bytes:
    return np.full(SHAPE, i, dtype=np.float32).tobytes()


def planned(store, count: int = ROWS, name: str = "space") -> tuple[int, list[Shard]]:
    """Plan shards of `ROWS` rows for as many contents."""
    space = store.space(name, {"vae": name}, "fp32")
    with store.transaction():
        store.plan(space, SHAPE, [(bytes([i]), 0) for i in range(count)], ROWS, "a")
    return space, store.shards(space)


def test_rows_of_a_shard_are_on_the_disk_when_a_call_returns(store, disk):
    _, (shard,) = planned(store)
    disk()
    store.write(shard, [(1, row(1)), (3, row(3))])
    assert disk() == [shard.path.name, f"-> {shard.path.name}", "shards", shard.path.name]
    store.write(shard, [(0, row(7))])
    assert disk() == [shard.path.name]
    assert list(shard.read_rows([3, 0, 1, 2])) == [row(3), row(7), row(1), bytes(len(row(0)))]
    assert shard.path.stat().st_size == 4096 + ROWS * len(row(0)) and shard.row_bytes == len(row(0))
    assert [path.name for path in shard.path.parent.iterdir()] == [shard.path.name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC])
def test_only_a_file_system_that_cannot_allocate_is_forgiven(number, store, monkeypatch):
    _, (shard,) = planned(store)
    allocated = []

    def allocate(handle, start, size):
        allocated.append((start, size))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", allocate, raising=False)
    if number == errno.ENOSPC:
        with refused("cache-disk-full", folder=store.folder):
            store.write(shard, [(0, row(0))])
        assert not shard.path.exists()
    else:
        store.write(shard, [(0, row(0))])
        assert shard.is_intact()
    assert allocated == [(0, 4096 + ROWS * shard.row_bytes)]


def test_an_intact_shard_has_its_header_and_length(store):
    _, (shard,) = planned(store)
    assert not shard.is_intact()
    store.write(shard, [(0, row(0))])
    assert shard.is_intact()
    for change in ({"rows": 3}, {"shape": [2, 5, 3]}, {"dtype": "fp16"}, {"metadata": {"vae": "other"}}):
        assert not Shard(**{**vars(shard), **change}).is_intact()
    os.truncate(shard.path, shard.path.stat().st_size - 1)
    assert not shard.is_intact()


def test_lost_and_truncated_shards_are_planned_again(store):
    space, shards = planned(store, count=3 * ROWS)
    for shard in shards:
        store.write(shard, [(i, row(i)) for i in range(ROWS)])
        with store.transaction():
            store.mark_done(shard, [(i, row(i)) for i in range(ROWS)])
    expected = [(i, hashlib.sha256(row(i)).digest()) for i in range(ROWS)]
    assert [store.done_rows(shard) for shard in shards] == [expected] * 3
    checks = store.db.execute("SELECT check64 FROM latent WHERE shard = ? ORDER BY row", (shards[0].id,)).fetchall()
    assert checks == [(row_check(row(i)),) for i in range(ROWS)]
    shards[0].path.unlink()
    os.truncate(shards[1].path, 5000)
    store.forget_broken(space)
    assert [store.done_rows(shard) for shard in shards] == [[], [], expected]
    assert [shard.path.exists() for shard in shards] == [False, False, True]
    assert store.db.execute("SELECT unfinished FROM space").fetchall() == [(1,)]
    assert store.db.execute("SELECT COUNT(check64) FROM latent").fetchone() == (ROWS,)


def test_shards_are_named_for_their_content_and_belong_to_one_space(store):
    space, shards = planned(store, count=ROWS + 1)
    _, others = planned(store, count=2, name="other")
    assert [shard.rows for shard in shards] == [ROWS, 1] and [shard.rows for shard in others] == [2]
    assert store.shards() == [*shards, *others] and store.shards(space) == shards
    contents = b"".join(bytes([i]) + (0).to_bytes(4, "little") for i in range(ROWS))
    assert shards[0].name == f"a-{hashlib.sha256(contents).hexdigest()[:16]}"
    assert shards[0].path == store.folder / "shards" / f"{shards[0].name}.safetensors"
    assert shards[0].metadata == {"vae": "space"} and store.space("space", {"vae": "changed"}, "fp32") == space
    assert store.shards(space)[0].metadata == {"vae": "space"}


def test_room_is_needed_only_for_shards_that_do_not_exist(store, monkeypatch):
    space, shards = planned(store, count=2 * ROWS)
    need = ROWS * shards[0].row_bytes
    free = 2 * need
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    store.check_room(space)
    free = need
    with refused("cache-disk-space", needed="0.0 MiB", free="0.0 MiB"):
        store.check_room(space)
    store.write(shards[0], [(0, row(0))])
    store.check_room(space)


def test_a_failed_transaction_changes_nothing(store):
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.db.execute("INSERT INTO space (name) VALUES ('lost')")
        _ = 1 / 0
    assert store.db.execute("SELECT COUNT(*) FROM space").fetchone() == (0,)
    with store.transaction():
        store.db.execute("INSERT INTO space (name) VALUES ('kept')")
    assert store.db.execute("SELECT name, unfinished FROM space").fetchall() == [("kept", 0)]
    # A transaction that the disk has already rolled back raises its own error.
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.db.execute("ROLLBACK")
        _ = 1 / 0


def test_databases_survive_a_power_cut_or_can_be_rebuilt(store, tmp_path):
    def setting(name):
        return store.db.execute(f"PRAGMA {name}").fetchone()[0]

    assert setting("journal_mode") == "wal" and setting("synchronous") == 2 and store.db.isolation_level is None
    store.attach(tmp_path / "work.sqlite")
    assert setting("work.journal_mode") == "wal" and setting("work.synchronous") == 0 and setting("synchronous") == 2
    assert store.work == tmp_path / "work.sqlite" and store.work.exists()


def test_a_cache_is_created_only_if_wanted_and_opened_again(tmp_path):
    with refused("no-cache"), Store.open(tmp_path / "new"):
        pass
    with Store.open(tmp_path / "new", create=True) as store:
        planned(store)
    with Store.open(tmp_path / "new", create=True) as store:
        assert [shard.rows for shard in store.shards()] == [ROWS]
        store.db.execute("PRAGMA user_version = 1")
    with refused("cache-version", version=1, folder=tmp_path / "new"), Store.open(tmp_path / "new"):
        pass


def test_an_exclusive_lock_excludes_all_others(tmp_path):
    with Store.open(tmp_path, create=True), Store.open(tmp_path, lock=""):
        for lock in ("exclusive", "shared"):
            with refused("cache-locked"), Store.open(tmp_path, lock=lock):
                pass
    with Store.open(tmp_path, lock="shared"), Store.open(tmp_path, lock="shared"):
        with refused("cache-locked"), Store.open(tmp_path):
            pass
    with Store.open(tmp_path), (tmp_path / "cache.lock").open() as handle:
        assert not lock_file(handle, exclusive=False)
    with (tmp_path / "cache.lock").open() as handle, (tmp_path / "cache.lock").open() as other:
        assert lock_file(handle, exclusive=True) and not lock_file(other, exclusive=True)
        assert lock_file(handle, exclusive=False) and lock_file(other, exclusive=False)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_file_system_without_locks_is_refused_at_once(call, number, tmp_path, monkeypatch):
    def failing(*_):
        raise OSError(number, os.strerror(number))

    with Store.open(tmp_path, create=True):
        claims, file = Claims(tmp_path), tmp_path / "cache.lock"
    monkeypatch.setattr(f"fcntl.{call}", failing)
    for lock in ("exclusive", "shared", *([""] if call == "lockf" else [])):  # SQLite takes locks as lockf does
        with refused("cache-not-lockable", file=file, reason=os.strerror(number)), Store.open(tmp_path, lock=lock):
            pass
    with file.open("a+b") as handle, refused("cache-not-lockable", reason=os.strerror(number)):
        lock_file(handle, exclusive=True) if call == "flock" else claims.take(1, 0, 1)


def database_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("trouble")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    "code, name",
    [(11, "cache-database-damaged"), (26, "cache-database-damaged"), (10 | 3 << 8, "cache-unusable"), (13, "cache-disk-full")],
)
def test_trouble_of_the_database_has_a_name(code, name, store):
    with refused(name, folder=store.folder), stores.database_errors(store.folder, store.home):
        raise database_error(code)


def test_mistakes_in_sql_are_no_trouble_of_the_disk(store):
    for error in (database_error(1), sqlite3.ProgrammingError("no code")):
        with pytest.raises(sqlite3.Error) as raised, stores.database_errors(store.folder, store.home):
            raise error
        assert raised.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, None])
def test_trouble_of_the_disk_has_a_name(number, tmp_path):
    error = OSError("odd") if number is None else OSError(number, os.strerror(number))
    with (
        refused("cache-disk-full" if number not in (errno.EACCES, None) else "cache-unusable") as raised,
        disk_errors(tmp_path),
    ):
        raise error
    if number in (errno.EACCES, None):
        assert f"({os.strerror(number) if number else 'odd'})" in str(raised.value)


def test_the_first_switch_to_a_write_ahead_log_waits_for_others(monkeypatch):
    class Database:
        calls = 0
        code = sqlite3.SQLITE_BUSY | 2 << 8  # with details in the higher bits

        def execute(self, query):
            self.calls += 1
            if self.calls < 3:
                raise database_error(self.code)

    waits, now = [], 0.0
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    database = Database()
    stores._use_write_ahead_log(database)
    assert database.calls == 3 and len(waits) == 2
    other = Database()
    other.code = sqlite3.SQLITE_READONLY
    with pytest.raises(sqlite3.OperationalError):
        stores._use_write_ahead_log(other)
    assert other.calls == 1

    def late(seconds):
        nonlocal now
        now += 1000

    monkeypatch.setattr(time, "sleep", late)
    with pytest.raises(sqlite3.OperationalError):
        stores._use_write_ahead_log(slow := Database())
    assert slow.calls == 2


def test_waiting_is_announced_once(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for failures in (0, 1, 3):
        attempts, announced = iter([False] * failures + [True]), []
        wait_for(lambda attempts=attempts: next(attempts), lambda announced=announced: announced.append(1))
        assert announced == [1] * bool(failures)
        assert next(attempts, "none left") == "none left"


@contextmanager
def other_process_claims(folder, *arguments):
    """Let another process hold a claim."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        claims = Claims(folder)
        os.write(writer, bytes([claims.take(*arguments)]))
        time.sleep(60)
        os._exit(1)
    try:
        assert os.read(reader, 1) == b"\1"
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_claims_are_on_rows_of_one_shard(tmp_path):
    with other_process_claims(tmp_path, 1, 8, 4):
        claims = Claims(tmp_path)
        for shard, first, count, free in (
            (1, 8, 4, False), (1, 11, 1, False), (1, 0, 9, False),
            (1, 0, 8, True), (1, 12, 4, True), (0, 8, 4, True), (2, 8, 4, True),
        ):  # fmt: skip
            assert claims.take(shard, first, count) == free, (shard, first, count)
            claims.release(shard, first, count)
        claims.close()
    assert Claims(tmp_path).take(1, 8, 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_released_claims_can_be_taken_by_others(tmp_path):
    claims = Claims(tmp_path)
    for held in (True, False):
        claims.take(1, 8, 4)
        if not held:
            claims.release(1, 8, 4)
        child = os.fork()
        if child == 0:
            os._exit(int(Claims(tmp_path).take(1, 10, 1)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (not held)


def test_the_sample_table_lives_until_its_last_user_ends(tmp_path):
    database, filled = tmp_path / "work" / "view.sqlite", []

    def use(name):
        stack = ExitStack()
        store = stack.enter_context(Store.open(tmp_path, create=True, lock="shared"))
        stack.enter_context(sample_table(store, "view", lambda: filled.append(name), lambda text: filled.append(text)))
        return store, stack

    first_store, first = use("first")
    first_store.db.execute("INSERT INTO sample (path) VALUES ('a')")
    second_store, second = use("second")
    assert filled == ["first"]  # the second finds the table filled
    first.close()
    assert database.exists() and second_store.db.execute("SELECT path FROM sample").fetchall() == [("a",)]
    third_store, third = use("third")
    second.close()
    assert database.exists() and len(third_store.db.execute("SELECT path FROM sample").fetchall()) == 1
    third.close()
    assert filled == ["first"] and not list((tmp_path / "work").glob("view.sqlite*"))
    use("fourth")[1].close()
    assert filled == ["first", "fourth"]


def test_a_table_that_a_killed_process_left_is_filled_again(tmp_path):
    (tmp_path / "work").mkdir()
    for ending in ("", "-wal", "-shm"):
        (tmp_path / f"work/view.sqlite{ending}").write_text("left")
    filled = []
    with Store.open(tmp_path, create=True) as store, sample_table(store, "view", lambda: filled.append(1), print):
        assert filled == [1] and store.db.execute("SELECT COUNT(*) FROM sample").fetchone() == (0,)


def test_one_process_at_a_time_with_a_message(tmp_path, monkeypatch):
    texts = []

    def release(seconds):
        other.close()

    monkeypatch.setattr(time, "sleep", release)
    other = (tmp_path / "turn.lock").open("a+b")
    assert lock_file(other, exclusive=True)
    with Store.open(tmp_path, create=True) as store, one_at_a_time(store, texts.append):
        with (tmp_path / "turn.lock").open() as handle:
            assert not lock_file(handle, exclusive=False)
    assert texts == ["waiting: another process is scanning the folders"]
    with Store.open(tmp_path) as store, one_at_a_time(store, texts.append, "other", "busy"):
        assert (tmp_path / "other.lock").exists()
    assert len(texts) == 1
