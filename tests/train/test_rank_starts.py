"""Ranks that torchrun starts again share its store with those that are gone, and must not meet them."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from ranks import ended, start_ranks, store_of_ranks
from sentences import refused
from torch.distributed import HashStore

from fastsd.errors import UserError
from fastsd.train.rank_starts import store_of_start
from fastsd.train.ranks import joined_ranks

WAIT = timedelta(minutes=2)


def start(store: HashStore, world: int, late: tuple[int, ...] = ()) -> list[str]:
    """Start ranks in threads, the late ones last. Return a key of the view that each of them has."""

    def join(rank: int) -> str:
        time.sleep(0.3 if rank in late else 0)
        view = store_of_start(store, rank, world, WAIT)
        view.set(f"rank {rank}", "here")
        view.wait([f"rank {other}" for other in range(world)], WAIT)
        return str(view.add("name", 1))

    with ThreadPoolExecutor(world) as pool:
        return sorted(pool.map(join, range(world)))


@pytest.mark.parametrize("late", [(), (0,), (1, 2)])
def test_ranks_of_one_start_meet_each_other_only(late):
    store = HashStore()
    for world in (3, 3, 2, 4):  # the number of machines may change
        assert start(store, world, late) == [str(n + 1) for n in range(world)]


def test_a_rank_that_does_not_come_is_told():
    store = HashStore()
    with refused("ranks-absent", rank="0", minutes="0.001", ranks="2"):
        store_of_start(store, 0, 2, timedelta(seconds=0.06))
    assert start(store, 2, (1,)) == ["1", "2"]  # also after a start that was given up


def test_a_process_whose_place_another_one_takes_ends():
    store = HashStore()
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(store_of_start, store, 0, 2, WAIT)
        store.wait(["start 0"], WAIT)
        assert start(store, 2) == ["1", "2"]
        with pytest.raises(RuntimeError, match="another process has become rank 0"):
            early.result()


@pytest.mark.parametrize("agent", ["True", "False"])
def test_a_store_that_is_not_there_is_one_sentence(agent, monkeypatch):
    monkeypatch.setattr("fastsd.train.ranks.TIMEOUT", timedelta(seconds=1))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": agent}
    for key, value in {**address, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(key, value)
    with refused("ranks-not-joined", rank="1"), joined_ranks():
        pass


def end_with_an_error() -> None:
    with joined_ranks() as ranks:
        ranks.wait()
        raise UserError("cache-missing", "the cache is missing")


def lose_a_rank() -> None:
    """Join late as rank 1, whose address of the first start still stands in the store, and kill it."""
    time.sleep(1 if os.environ["RANK"] == "1" else 0)
    with refused("rank-lost") as info, joined_ranks() as ranks:
        ranks.wait()
        if not ranks.main:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.wait()
    assert f"rank 1 (process {os.getpid()}" not in str(info.value)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_second_start_has_connections_and_reasons_of_its_own(tmp_path):
    files = [str(tmp_path / "out"), str(tmp_path / "err")]
    with store_of_ranks(2) as shared:
        assert sorted(ended(start_ranks(shared, "call", __file__, "end_with_an_error", [], files))) == [1, 2]
        assert ended(start_ranks(shared, "call", __file__, "lose_a_rank", [], files)) == [0, -9], (tmp_path / "err").read_text()
