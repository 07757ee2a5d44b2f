"""The reason that ranks tell when one of them ends: one rank prints it, and names those that are lost."""

import os
import platform
import signal
import subprocess
import sys
from datetime import timedelta

import pytest
from ranks import ended, start_ranks, store_of_ranks
from sentences import refused, says
from torch.distributed import HashStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from fastsd.errors import Stopped, UserError
from fastsd.train import rank_ends
from fastsd.train.rank_ends import RankEnds
from fastsd.train.ranks import joined_ranks

CLOSED = "Connection closed by peer"


@pytest.fixture
def two(monkeypatch):
    """The ends of rank 0 and rank 1, which share a store."""
    monkeypatch.setattr(rank_ends, "_GRACE", 0.2)
    store = HashStore()
    return RankEnds(store, 0, 2), RankEnds(store, 1, 2), store


@pytest.fixture(scope="module")
def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_one_rank_tells_what_several_have(two):
    first, second, _ = two
    assert first.tells("cache-missing") and not second.tells("cache-missing")
    assert second.tells("out-of-memory")


def test_nothing_is_added_to_the_reason_of_another_rank(two):
    first, second, _ = two
    second.tells("cache-missing")
    assert first.after_loss(CLOSED, 30).code == 2


def test_a_rank_that_a_signal_has_stopped_is_not_lost(two):
    first, second, _ = two
    assert second.stops()
    assert isinstance(first.after_loss(CLOSED, 30), Stopped)
    assert first.stops() and second.after_loss(CLOSED, 30).code == 130


def test_a_killed_rank_is_named_and_torchrun_stops_the_others_because_of_it(two, ended_process, monkeypatch):
    first, _, store = two
    store.set("process 1", f"{ended_process} {platform.node()}")
    assert not first.stops()
    error = first.after_loss(CLOSED, 30)
    name = f"rank 1 (process {ended_process} on {platform.node()})"
    assert isinstance(error, UserError)
    assert says(str(error), "rank-lost", rank=name, advice="run the same command again to resume from the last checkpoint")
    assert first.after_loss(CLOSED, 30).code == 2  # it has been told
    for key, value in (("MAX_RESTARTS", "3"), ("RESTART_COUNT", "2")):
        monkeypatch.setenv(f"TORCHELASTIC_{key}", value)
    error = RankEnds(HashStore(), 0, 1).after_loss(CLOSED, 30)
    assert says(str(error), "rank-lost", advice="torchrun starts all ranks again from the last checkpoint")


def test_a_rank_on_another_machine_has_no_name(two, ended_process):
    first, _, store = two
    store.set("process 1", f"{ended_process} another")
    assert says(str(first.after_loss(CLOSED, 30)), "rank-lost", rank="a rank on another machine")


def test_a_machine_that_takes_the_store_with_it(two, monkeypatch):
    first = two[0]
    for name in ("set", "get", "add", "check"):
        monkeypatch.setattr(HashStore, name, lambda *_: (_ for _ in ()).throw(RuntimeError("broken pipe")))
    assert says(str(first.after_loss(CLOSED, 30)), "rank-lost", rank="a rank on another machine")


def wait_for_a_rank_that_hangs() -> None:
    rank_ends._GRACE = 0.5
    with refused("rank-hangs", minutes="30") as info, joined_ranks() as ranks:
        ranks.wait()
        _set_pg_timeout(timedelta(seconds=1))  # in place of 30 minutes
        if not ranks.main:
            os.kill(os.getpid(), signal.SIGSTOP)
        ranks.wait()
    assert str(info.value).startswith("rank 1 (process ")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP")
def test_a_rank_that_hangs_ends_the_others(tmp_path):
    with store_of_ranks(2) as shared:
        files = [str(tmp_path / "out"), str(tmp_path / "err")]
        first, second = start_ranks(shared, "call", __file__, "wait_for_a_rank_that_hangs", [], files)
        code = ended([first])
        second.kill()  # also if the assertion fails: nothing else would end it
        assert code == [0], (tmp_path / "err").read_text()
        assert ended([second]) == [-9]
