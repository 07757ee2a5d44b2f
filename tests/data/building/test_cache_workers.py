"""Several processes that fill one cache: each image once, the same shards, even if processes are killed."""

import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from caching import StubVae, config, draw, draw_many, shard_bytes
from commandline import function_process

from fastsd.data import cache as cache_module
from fastsd.data.building.build import build_cache
from fastsd.data.building.store import Store
from fastsd.data.building.upkeep import verify
from fastsd.data.cache import LatentCache

IMAGES = 160


def work(root, delay, together):
    """Build the cache and print the counts, in a process of its own. Encode when `together` processes are ready to."""
    torch.set_num_threads(1)
    cache_module.SHARD_ROWS = 64
    vae = StubVae(delay=float(delay))
    encode = vae.encode

    def encode_together(*arguments):
        Path(root, f"{os.getpid()}.ready").touch()
        while len(list(Path(root).glob("*.ready"))) < int(together):
            time.sleep(0.005)
        return encode(*arguments)

    vae.encode = encode_together
    counts = build_cache(config(Path(root)), vae)
    print(json.dumps([vae.encoded, counts.encoded, counts.cached, counts.view]))


def start(root, delay=0.02, together=1):
    return function_process(__file__, "work", root, delay, together)


def result_of(process):
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return json.loads(out)


def build_alone(root, monkeypatch):
    """Build the cache in one process and delete it. Return its shards, its view's file and the name of the view."""
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 64)
    view = build_cache(config(root), StubVae()).view
    shards, frozen = shard_bytes(root), (root / f"cache/views/{view}.safetensors").read_bytes()
    shutil.rmtree(root / "cache")
    return shards, frozen, view


@pytest.mark.slow
def test_processes_share_the_work(tmp_path, monkeypatch):
    draw_many(tmp_path, IMAGES)
    shards, frozen, view = build_alone(tmp_path, monkeypatch)
    processes = [start(tmp_path, together=3) for _ in range(3)]
    results = [result_of(process) for process in processes]
    assert sum(result[0] for result in results) == sum(result[1] for result in results) == IMAGES
    assert all(result[0] > 0 for result in results)
    assert {(cached, name) for _, _, cached, name in results} == {(IMAGES, view)}
    assert shard_bytes(tmp_path) == shards
    assert (tmp_path / f"cache/views/{view}.safetensors").read_bytes() == frozen
    assert [path.suffix for path in (tmp_path / "cache/work").iterdir()] == [".lock"]


def test_processes_may_open_a_new_cache_at_once(tmp_path):
    """While another process writes, SQLite refuses to switch to WAL without waiting, even if it has a timeout."""
    (tmp_path / "cache").mkdir()
    with closing(sqlite3.connect(tmp_path / "cache/cache.sqlite", isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        rollback = threading.Timer(0.3, other.execute, ["ROLLBACK"])
        rollback.start()
        with Store.open(tmp_path / "cache", create=True) as store:
            assert store.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        rollback.join()


def test_other_processes_take_over_the_blocks_of_a_killed_one(tmp_path, monkeypatch):
    draw_many(tmp_path, IMAGES)
    shards, *_ = build_alone(tmp_path, monkeypatch)
    slow = start(tmp_path, delay=0.2)
    while not list((tmp_path / "cache").glob("shards/*.safetensors")):
        assert slow.poll() is None and time.sleep(0.05) is None
    other = start(tmp_path, delay=0.001)
    time.sleep(0.5)
    os.kill(slow.pid, signal.SIGKILL)
    slow.communicate()
    assert result_of(other)[2] == IMAGES
    assert shard_bytes(tmp_path) == shards
    assert verify(tmp_path / "cache") == []
    assert result_of(start(tmp_path))[0] == 0


def test_a_later_process_encodes_only_added_images(tmp_path):
    draw_many(tmp_path, 5)
    build_cache(config(tmp_path), StubVae())
    draw(tmp_path / "images/one-more.png", 99)
    assert result_of(start(tmp_path))[:3] == [1, 1, 6]
    assert len(LatentCache.open(tmp_path / "cache")) == 6
