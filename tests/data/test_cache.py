"""The latent cache: images are encoded once, and changes, damage and interruptions never lead to wrong latents."""

import errno
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from caching import R, StubVae, config, draw, draw_many, expected, flip, shard_bytes
from commandline import function_process
from dataset import shot, tar_of
from safetensors import safe_open
from sentences import refused, sentence

from fastsd.data import cache as cache_module
from fastsd.data import rows as rows_module
from fastsd.data.building import build
from fastsd.data.building.build import build_cache
from fastsd.data.building.lists import changes
from fastsd.data.building.store import SCHEMA_VERSION, Shard, Store
from fastsd.data.building.upkeep import prune, stats, verify
from fastsd.data.cache import LatentCache, read_header, view_name, view_place


@pytest.fixture(autouse=True)
def single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_latents_are_the_output_of_the_vae(tmp_path):
    draw_many(tmp_path)
    events = []
    counts = build_cache(config(tmp_path), StubVae(), events.append)
    assert (counts.images, counts.cached, counts.latents, counts.encoded, counts.rejected) == (10, 10, 10, 10, 0)
    assert events[-1].phase == "encode" and events[-1].done == events[-1].total == 10
    newest, named = LatentCache.open(tmp_path / "cache"), LatentCache.open(tmp_path / "cache", counts.view)
    assert view_name(config(tmp_path), "stub") == counts.view == newest.name
    order = [7, 0, 9, 9, 3]
    for cache in (newest, named):
        latents = cache.get(order)["latents"]
        assert latents.shape == (5, 4, R // 8, R // 8) and latents.dtype == torch.float16
        for i, latent in zip(order, latents, strict=True):
            assert torch.equal(latent, expected(tmp_path / f"images/{i:03}.png").half())
        assert cache.captions(torch.tensor(order)) == [f"picture {i}" for i in order]
        assert len(cache) == 10 and cache.meta.scaling_factor == 0.5 and cache.meta.shift_factor == 0.0
        assert (cache.meta.vae_hash, cache.meta.channels, cache.meta.resolution) == ("stub", 4, R)
        cache.close()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_shards_are_plain_safetensors_with_aligned_data(tmp_path, dtype):
    draw_many(tmp_path, 6)
    build_cache(config(tmp_path, dtype=dtype), StubVae())
    (shard,) = (tmp_path / "cache/shards").iterdir()
    assert read_header(shard, "latents-1")[2] % 4096 == 0
    with safe_open(shard, "pt") as file:
        mean, metadata = file.get_tensor("mean"), file.metadata()
    assert metadata["vae"] == "stub" and metadata["scaling_factor"] == "0.5" and metadata["shape"] == "[4, 4, 4]"
    assert json.loads(metadata["preprocessing"])["dtype"] == dtype
    latents = LatentCache.open(tmp_path / "cache").get(range(6))["latents"]
    assert latents.dtype == mean.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert sorted(latents.flatten(1).tolist()) == sorted(mean.flatten(1).tolist())


def test_only_new_and_changed_images_are_encoded(tmp_path):
    draw_many(tmp_path, 20)
    build_cache(config(tmp_path), StubVae())
    unchanged = StubVae()
    assert build_cache(config(tmp_path), unchanged).encoded == unchanged.encoded == 0
    for i in (1, 2, 3):
        draw(tmp_path / f"images/{i:03}.png", 100 + i)
    for i in range(5):
        draw(tmp_path / f"images/new/{i}.png", 200 + i)
    for i in range(4, 11):
        for kind in (".png", ".txt"):
            old = tmp_path / f"images/{i:03}{kind}"
            old.rename(tmp_path / f"images/renamed-{i}{kind}")
    for i in (18, 19):
        (tmp_path / f"images/{i:03}.png").unlink()
    (tmp_path / "images/000.txt").write_text("another caption")
    changed = StubVae()
    counts = build_cache(config(tmp_path), changed)
    assert counts.encoded == changed.encoded == 8 and counts.cached == 23
    cache = LatentCache.open(tmp_path / "cache")
    paths = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: path.parts)
    for path, latent in zip(paths, cache.get(range(23))["latents"], strict=True):
        assert torch.equal(latent, expected(path).half())
    assert cache.captions([0]) == ["another caption"]


def test_a_large_index_reads_the_same_as_a_small_one(tmp_path, monkeypatch):
    draw_many(tmp_path, 9)
    build_cache(config(tmp_path), StubVae())
    order = [5, 0, 8, 8, 3]

    def read():
        cache = LatentCache.open(tmp_path / "cache")
        latents = [cache.get(samples)["latents"].tolist() for samples in (order, range(9))]
        return latents, cache.captions(order), cache.captions(range(2, 7))

    small = read()
    monkeypatch.setattr(rows_module, "_MAPPED", 0)
    assert read() == small


def test_the_same_image_twice_is_encoded_once_with_both_captions(tmp_path):
    for name in "ab":
        draw(tmp_path / f"images/{name}.png", 1, f"caption {name}")
    counts = build_cache(config(tmp_path), StubVae())
    assert (counts.cached, counts.latents, counts.encoded) == (2, 1, 1)
    cache = LatentCache.open(tmp_path / "cache")
    assert cache.captions([0, 1]) == ["caption a", "caption b"]
    assert torch.equal(*cache.get([0, 1])["latents"])


def test_two_vaes_and_two_folders_share_a_cache_and_never_mix(tmp_path):
    draw_many(tmp_path, 5)
    draw(tmp_path / "more/x.png", 77)
    small, large = config(tmp_path), config(tmp_path, ("images", "more"))
    first = build_cache(small, StubVae("first"))
    second = build_cache(small, StubVae("second", scaling_factor=0.25))
    both = build_cache(large, StubVae("first"))
    assert (first.encoded, second.encoded, both.encoded) == (5, 5, 1)
    assert len({first.view, second.view, both.view}) == 3
    directory = tmp_path / "cache"
    assert LatentCache.open(directory).name == both.view and len(LatentCache.open(directory)) == 6
    assert LatentCache.open(directory, second.view).meta.scaling_factor == 0.25
    used = [{name for name, _ in cache_module.View(directory / f"views/{v.view}.safetensors").shards} for v in (first, second)]
    assert not used[0] & used[1]
    # If a shard is replaced by one of the other VAE, the first read detects it.
    shards = [directory / f"shards/{names.pop()}.safetensors" for names in used]
    shutil.copy(shards[1], shards[0])
    with refused("frozen-file-damaged", path=shards[0], damage=sentence("damage-belongs-elsewhere")):
        LatentCache.open(directory, first.view).get([0])
    assert build_cache(small, StubVae("first")).encoded == 5


def test_bad_files_are_rejected_and_not_tried_again(tmp_path):
    draw_many(tmp_path, 6)
    images = tmp_path / "images"
    (images / "text.jpg").write_text("no image")
    (images / "empty.png").write_bytes(b"")
    (images / "half.png").write_bytes((images / "000.png").read_bytes()[:900])
    (images / "gone.png").symlink_to("nowhere.png")
    draw(images / "silent.png", 50, caption=None)
    draw(images / "blank.png", 51, caption=" \n")
    draw(images / "latin.png", 52)
    (images / "latin.txt").write_bytes(b"caf\xe9")
    if hasattr(os, "mkfifo"):
        os.mkfifo(images / "pipe.png")
    counts = build_cache(config(tmp_path), StubVae())
    bad = {"text.jpg", "empty.png", "half.png", "gone.png", "latin.png"} | ({"pipe.png"} if hasattr(os, "mkfifo") else set())
    assert (counts.images, counts.cached, counts.rejected, counts.empty_captions) == (8 + len(bad), 8, len(bad), 2)
    assert {Path(line.split(": ")[0]).name for line in counts.examples} == bad
    assert sum(counts.reasons.values()) == len(bad) == sum(stats(tmp_path / "cache").rejected.values())
    before = shard_bytes(tmp_path)
    counts = build_cache(config(tmp_path), StubVae())
    assert counts.rejected == len(bad) and counts.encoded == 0 and shard_bytes(tmp_path) == before
    draw(images / "half.png", 53)
    (images / "latin.txt").write_text("fine now")
    counts = build_cache(config(tmp_path), StubVae())
    assert counts.encoded == 2 and counts.rejected == len(bad) - 2 and counts.cached == 10


def test_latents_that_are_not_finite_are_encoded_alone_and_then_rejected(tmp_path):
    draw_many(tmp_path, 6)
    number_of = {expected(tmp_path / f"images/00{i}.png")[0, 0, 0].item(): i for i in range(6)}

    class Overflows(StubVae):
        def encode(self, images):
            means = super().encode(images)
            for mean in means:
                i = number_of[mean[0, 0, 0].item()]
                if i == 2 or (i == 3 and len(images) > 1):
                    mean[0, 0, 0] = float("nan")
            return means

    counts = build_cache(config(tmp_path), Overflows())
    assert counts.cached == 5 and counts.rejected == 1
    assert counts.examples[0].endswith(f"002.png: {sentence('latent-not-finite', dtype='fp16')}")
    assert LatentCache.open(tmp_path / "cache").get(range(5))["latents"].isfinite().all()


def test_no_usable_image_wrong_resolution_and_missing_cache_are_errors(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_text("no image")
    with refused("cache-no-usable-image", images=1):
        build_cache(config(tmp_path), StubVae())
    odd = StubVae()
    odd.downscale = 12
    with refused("cache-resolution", key="resolution", size=32, step=12, multiples="24 or 36"):
        build_cache(config(tmp_path), odd)
    with refused("no-finished-cache", folder=tmp_path / "cache"):
        LatentCache.open(tmp_path / "cache")
    with refused("no-view", folder=tmp_path / "elsewhere"):
        LatentCache.open(tmp_path / "elsewhere", "0123")


def test_latents_of_a_diffusers_vae_are_cached(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL(
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )

    class Kl(StubVae):
        downscale = 2

        def encode(self, images):
            return module.encode(images).latent_dist.mean

    draw_many(tmp_path, 5)
    build_cache(config(tmp_path, dtype="fp32"), Kl())
    latents = LatentCache.open(tmp_path / "cache").get([4, 1])["latents"]
    for i, latent in zip((4, 1), latents, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(latent, expected(tmp_path / f"images/00{i}.png", Kl()))


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, "cache-disk-full"), (errno.EACCES, "cache-unusable")])
def test_a_full_or_forbidden_disk_is_an_error_and_the_next_run_continues(tmp_path, monkeypatch, number, code):
    draw_many(tmp_path, 12)
    written = []
    write = Shard.write_rows

    def fail_later(shard, rows):
        if written or len(rows) == 12:  # a slow writer gets all rows at once
            raise OSError(number, os.strerror(number))
        write(shard, rows)
        written.extend(rows)

    monkeypatch.setattr(Shard, "write_rows", fail_later)
    with refused(code, folder=tmp_path / "cache"):
        build_cache(config(tmp_path), StubVae())
    monkeypatch.undo()
    assert build_cache(config(tmp_path), StubVae()).encoded == 12 - len(written)
    assert verify(tmp_path / "cache") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 0))
    draw(tmp_path / "images/one-more.png", 99)
    with refused("cache-disk-space", needed="0.0 MiB", free="0.0 MiB"):
        build_cache(config(tmp_path), StubVae())
    (tmp_path / "file").write_text("")
    with refused("cache-unusable", folder=tmp_path / "file"):
        build_cache(config(tmp_path, dir=str(tmp_path / "file")), StubVae())


def test_a_locked_cache_is_refused(tmp_path):
    draw_many(tmp_path, 3)
    with Store.open(tmp_path / "cache", create=True), refused("cache-locked"):
        build_cache(config(tmp_path), StubVae())
    assert build_cache(config(tmp_path), StubVae()).encoded == 3


def test_a_cache_of_another_version_is_refused(tmp_path):
    draw_many(tmp_path, 3)
    build_cache(config(tmp_path), StubVae())
    with closing(sqlite3.connect(tmp_path / "cache/cache.sqlite")) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with refused("cache-version", folder=tmp_path / "cache", version=SCHEMA_VERSION + 1, expected=SCHEMA_VERSION):
        build_cache(config(tmp_path), StubVae())


@pytest.mark.parametrize("batch, advice", [(4, " to 2"), (1, "data.resolution")])
def test_a_batch_too_large_for_the_memory_is_refused(batch, advice, tmp_path):
    class SmallGpu(StubVae):
        def encode(self, images_B3RR):
            if len(images_B3RR) * images_B3RR.shape[-1] > 2 * R * (batch > 1):
                raise torch.OutOfMemoryError
            return super().encode(images_B3RR)

    draw_many(tmp_path, 5)
    with refused("cache-batch-memory", batch=batch) as error:
        build_cache(config(tmp_path, batch=batch), SmallGpu())
    assert str(error.value).endswith(advice)
    if batch > 1:
        assert build_cache(config(tmp_path, batch=batch // 2), SmallGpu()).encoded == 5


def test_verify_finds_a_flipped_bit_and_it_is_encoded_again(tmp_path):
    draw_many(tmp_path)
    view = build_cache(config(tmp_path), StubVae()).view
    before = shard_bytes(tmp_path)
    assert verify(tmp_path / "cache") == []
    (shard,) = (tmp_path / "cache/shards").iterdir()
    flip(shard, -5)
    (problem,) = verify(tmp_path / "cache")
    assert problem == sentence("verify-rows", path=shard, damaged=1, rows=10, row_list=9)
    with refused("no-view"):
        LatentCache.open(tmp_path / "cache", view)  # until then no training can use it
    assert build_cache(config(tmp_path), StubVae()).encoded == 1
    assert shard_bytes(tmp_path) == before and verify(tmp_path / "cache") == []
    flip(tmp_path / f"cache/views/{view}.safetensors", -3)
    assert len(verify(tmp_path / "cache")) == 1
    assert build_cache(config(tmp_path), StubVae()).encoded == 0
    assert verify(tmp_path / "cache") == []


@pytest.mark.parametrize("damage", ["cut", "deleted", "header"])
def test_a_broken_shard_is_reported_by_the_reader_and_encoded_again(tmp_path, damage):
    draw_many(tmp_path)
    build_cache(config(tmp_path), StubVae())
    before = shard_bytes(tmp_path)
    (shard,) = (tmp_path / "cache/shards").iterdir()
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 100)
    elif damage == "deleted":
        shard.unlink()
    else:
        flip(shard, 9)
    with refused("frozen-file-damaged", path=shard):
        LatentCache.open(tmp_path / "cache").get([0])
    assert build_cache(config(tmp_path), StubVae()).encoded == 10
    assert shard_bytes(tmp_path) == before


def test_prune_deletes_only_shards_that_no_view_needs(tmp_path):
    draw_many(tmp_path, 5)
    view = build_cache(config(tmp_path), StubVae("old")).view
    build_cache(config(tmp_path), StubVae("new"))
    assert prune(tmp_path / "cache").shards == 0
    (tmp_path / f"cache/views/{view}.safetensors").unlink()
    assert prune(tmp_path / "cache").shards == 1
    contents = stats(tmp_path / "cache")
    assert (contents.latents, contents.planned, contents.shards, len(contents.views)) == (5, 0, 1, 1)
    assert build_cache(config(tmp_path), StubVae("new")).encoded == 0
    assert build_cache(config(tmp_path), StubVae("old")).encoded == 5


def test_more_shards_than_open_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 3)
    monkeypatch.setattr(rows_module, "_OPEN_SHARDS", 2)
    draw_many(tmp_path, 20)
    build_cache(config(tmp_path), StubVae())
    cache = LatentCache.open(tmp_path / "cache")
    assert len(list((tmp_path / "cache/shards").iterdir())) == 7
    for _ in range(3):
        for i, latent in enumerate(cache.get(range(20))["latents"]):
            assert torch.equal(latent, expected(tmp_path / f"images/{i:03}.png").half())
        assert len(cache._open) <= 2


def kill_repeatedly(root, seed):
    """Fork processes that build the cache, and kill them at random moments until one finishes. Print the number of kills."""
    cache_module.SHARD_ROWS = 16
    torch.set_num_threads(1)
    root, rng, kills, fsync = Path(root), random.Random(int(seed)), 0, os.fsync

    def deadly(handle):
        """Kill the process in one of its first calls of `os.fsync`, before or after the call has taken effect."""
        deadly.calls -= 1
        if deadly.late or deadly.calls:
            fsync(handle)
        if not deadly.calls:
            os.kill(os.getpid(), signal.SIGKILL)

    while True:
        delay, deadly.calls, deadly.late = rng.uniform(0.0, 0.2), rng.randrange(1, 8), rng.random() < 0.5
        child = os.fork()
        if child == 0:
            if kills in (1, 2, 4, 6):  # between write, flush and commit, which a timer rarely hits
                os.fsync = deadly
            build_cache(config(root), StubVae(delay=0.01))
            os._exit(0)
        if kills in (0, 3, 5):
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            assert status == 0, "a builder failed"
            break
        kills += 1
    print(kills)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_any_moment_leads_to_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD_ROWS", 16)
    draw_many(tmp_path, 150)
    (tmp_path / "images/030.png").write_bytes(b"broken")
    build_cache(config(tmp_path), StubVae())
    shards = shard_bytes(tmp_path)
    (view,) = (tmp_path / "cache/views").iterdir()
    frozen = view.read_bytes()
    shutil.rmtree(tmp_path / "cache")
    process = function_process(__file__, "kill_repeatedly", tmp_path, 7)
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    assert int(out) == 7
    assert shard_bytes(tmp_path) == shards
    assert view.read_bytes() == frozen
    assert verify(tmp_path / "cache") == []
    assert build_cache(config(tmp_path), StubVae()).encoded == 0


def test_what_a_killed_build_left_in_work_is_removed(tmp_path, monkeypatch):
    """The index of a view is collected in a folder there. A kill leaves it, and that of another view is in use."""
    draw_many(tmp_path, 3)
    folders, freeze = [], cache_module.freeze

    def watched(*args):
        folders.extend(path for path in (tmp_path / "cache/work").iterdir() if path.is_dir())
        return freeze(*args)

    monkeypatch.setattr(cache_module, "freeze", watched)
    build_cache(config(tmp_path), StubVae())
    (left,) = folders
    other = left.with_name(f"other-{left.name}")
    for folder in (left, other):
        folder.mkdir()
        (folder / "shard").touch()
    build_cache(config(tmp_path), StubVae())
    assert not left.exists() and other.exists()


def test_a_large_index_is_read_in_few_calls_and_never_mapped(tmp_path, monkeypatch):
    draw_many(tmp_path, 9)
    build_cache(config(tmp_path), StubVae())
    calls, pread = [], os.pread

    def counting(*arguments):
        calls.append(arguments)
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", counting)
    cache = LatentCache.open(tmp_path / "cache")
    cache.variants(range(2, 7))
    assert not calls
    monkeypatch.setattr(rows_module, "_MAPPED", 0)
    cache.variants(range(2, 7))
    assert len(calls) == 2 + 5  # starts and ends of the captions of neighbours, and each caption
    calls.clear()
    cache.variants([2, 4, 3])
    assert len(calls) == 2 * 3 + 3


def test_progress_counts_files_then_new_images(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsd.data.building.collect._CHUNK", 6)
    draw_many(tmp_path, 9)
    events = []
    build_cache(config(tmp_path), StubVae(), events.append)
    draw(tmp_path / "images/new.png", 50)
    counts = build_cache(config(tmp_path), StubVae(), events.append)
    done = [(event.phase, event.done, event.total) for event in events]
    assert done[:2] == [("scan", 6, 0), ("scan", 9, 0)] and done[2:5] == [("encode", n, 9) for n in (4, 8, 9)]
    assert done[5:] == [("scan", 6, 0), ("scan", 10, 0), ("encode", 1, 1)]
    assert all(0 < event.images_per_second < 1e6 for event in events)
    assert counts.rates.keys() == {"decode", "encode", "write"} and all(rate > 0 for rate in counts.rates.values())


class PageCache:
    """A page cache that holds the rows of some positions, for calls of `os.preadv` with RWF_NOWAIT."""

    def __init__(self, monkeypatch, is_cached):
        self.at_once, self.later, self.expected = [], [], []
        preadv = os.preadv

        def read(handle, buffers, position, flags=0):
            if flags and not is_cached(position):
                raise BlockingIOError
            (self.at_once if flags else self.later).append(position)
            return preadv(handle, buffers, position)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: self.expected.append(arguments[1:3]))


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs Linux")
def test_rows_in_the_page_cache_are_read_at_once_and_others_are_announced(tmp_path, monkeypatch):
    draw_many(tmp_path, 9)
    build_cache(config(tmp_path), StubVae())
    cache = LatentCache.open(tmp_path / "cache")
    latents = cache.get(range(9))["latents"]
    size = latents[0].nbytes
    positions = [4096 + row * size for row in range(9)]
    pages = PageCache(monkeypatch, lambda position: position in positions[:5])
    assert torch.equal(cache.get(range(9))["latents"], latents)
    assert sorted(pages.at_once) == positions[:5] and sorted(pages.later) == positions[5:]
    assert sorted(pages.expected) == [(position, size) for position in positions[5:]]


def test_prune_keeps_the_facts_of_files_that_exist(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsd.data.building.collect._YOUNG_NS", 0)
    draw_many(tmp_path, 4)
    (tmp_path / "images/bad.png").write_bytes(b"bad")
    (tmp_path / "images/gone.png").write_bytes(b"bad")
    build_cache(config(tmp_path), StubVae())
    (tmp_path / "images/003.png").unlink()
    (tmp_path / "images/gone.png").unlink()
    prune(tmp_path / "cache")
    with closing(sqlite3.connect(tmp_path / "cache/cache.sqlite")) as db:
        names = [
            sorted(Path(os.fsdecode(path)).name for (path,) in db.execute(f"SELECT path FROM {table}"))
            for table in ("file", "rejected")
        ]
    assert names == [["000.png", "001.png", "002.png"], ["bad.png"]]


def test_a_block_may_have_no_readable_image(tmp_path):
    draw_many(tmp_path, 3)

    def spoil(event):
        if event.phase == "scan":
            (tmp_path / "images/001.png").write_bytes(b"bad")

    counts = build_cache(config(tmp_path, batch=1), StubVae(), spoil)
    assert (counts.cached, counts.encoded, counts.rejected) == (2, 2, 1)
    cache = LatentCache.open(tmp_path / "cache")
    paths = [tmp_path / f"images/00{i}.png" for i in (0, 2)]
    assert torch.equal(cache.get(range(2))["latents"], torch.stack([expected(path) for path in paths]).half())


def test_names_of_spaces_never_change(tmp_path):
    """Another name would let every image be encoded again."""
    plain = config(tmp_path)
    assert cache_module.space_name(plain, "vae") == "f65773c6779a89af"
    draw_many(tmp_path, 3)
    build_cache(plain, StubVae())
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{16}\.safetensors", name) for name in shard_bytes(tmp_path))
    assert all(name.startswith(cache_module.space_name(plain, "stub")[:8]) for name in shard_bytes(tmp_path))
    bf16 = config(tmp_path, dtype="bf16")
    assert cache_module.space_name(bf16, "vae") == "545213a87c7ef613"


@pytest.mark.parametrize("positions", [[-1, 0], [0, 3], [3], [[0]], []], ids=str)
def test_positions_outside_the_cache_are_our_mistake(positions, tmp_path):
    draw_many(tmp_path, 3)
    build_cache(config(tmp_path), StubVae())
    cache = LatentCache.open(tmp_path / "cache")
    assert len(cache) == 3 and len(cache.variants([0, 2])) == 2
    for read in (cache.get, cache.variants):
        with pytest.raises(AssertionError):
            read(positions)
    with pytest.raises(AssertionError):
        cache.get([0], [1])  # there is only version 0


def without_last(name):
    return lambda arrays, metadata: arrays.update({name: arrays[name][:-1]})


def with_another_group(arrays, metadata):
    groups = json.loads(metadata["groups"])
    metadata["groups"] = json.dumps([*groups, groups[0]])


CHANGES = {name: without_last(name) for name in ("row", "caption_offsets")} | {"groups": with_another_group}


@pytest.mark.parametrize("name", CHANGES)
def test_a_view_whose_tensors_disagree_is_refused(name, tmp_path):
    draw_many(tmp_path, 3)
    counts = build_cache(config(tmp_path), StubVae())
    path = tmp_path / f"cache/views/{counts.view}.safetensors"
    view = cache_module.View(path)
    arrays = {key: array.copy() for key, array in view.arrays.items()}
    metadata = {key: view.metadata[key] for key in cache_module.View.HASHED_KEYS}
    CHANGES[name](arrays, metadata)
    cache_module.View.write(path, arrays, metadata, serial="1")
    with refused("frozen-file-damaged", path=path):
        LatentCache.open(tmp_path / "cache")


def test_the_rate_of_a_scan_is_files_per_second(tmp_path, monkeypatch):
    ticks = iter(range(5, 10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # each call takes a second
    monkeypatch.setattr("fastsd.data.building.collect._CHUNK", 6)
    draw_many(tmp_path, 9)
    events = []
    build_cache(config(tmp_path), StubVae(), events.append)
    assert [event.images_per_second for event in events if event.phase == "scan"] == [6 / 1, 9 / 2]


def test_a_view_without_a_serial_number_is_damaged(tmp_path):
    draw_many(tmp_path, 3)
    counts = build_cache(config(tmp_path), StubVae())
    path = tmp_path / f"cache/views/{counts.view}.safetensors"
    view = cache_module.View(path)
    arrays = {key: array.copy() for key, array in view.arrays.items()}
    metadata = {key: view.metadata[key] for key in cache_module.View.HASHED_KEYS}
    cache_module.View.write(path, arrays, metadata, serial="one")
    draw_many(tmp_path, 4)
    other = build_cache(config(tmp_path, dtype="bf16"), StubVae())  # written as the newest in spite of the damaged one
    with closing(LatentCache.open(tmp_path / "cache", other.view)) as cache:
        assert len(cache) == 4
    with refused("frozen-file-damaged", path=path):
        LatentCache.open(tmp_path / "cache")


def test_a_view_is_found_however_its_folders_are_spelt_and_wherever_they_are_moved(tmp_path, monkeypatch):
    cache_key = {"dir": str(tmp_path / "cache")}
    draw_many(tmp_path / "old")
    first = build_cache(config(tmp_path / "old", **cache_key), StubVae())
    (tmp_path / "link").symlink_to(tmp_path / "old", target_is_directory=True)
    assert view_name(config(tmp_path / "link", **cache_key), "stub") == first.view

    shutil.copytree(tmp_path / "old", tmp_path / "copy")  # a copy may be edited, so it has a view of its own
    (tmp_path / "copy/images/000.txt").write_text("edited")
    assert view_name(config(tmp_path / "copy", **cache_key), "stub") != first.view
    draw_many(tmp_path / "other", 9)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = config(tmp_path / "new", **cache_key)
    assert view_name(moved, "stub") == first.view and changes(moved.data, tmp_path / "cache", first.view) is None
    draw(tmp_path / "other/images/000.png", 77)
    assert view_name(config(tmp_path / "other", **cache_key), "stub") != first.view
    assert view_name(moved, "another VAE") != first.view
    more = moved.model_copy(update={"data": moved.data.model_copy(update={"caption_lines": "join"})})
    assert view_name(more, "stub") != first.view

    draw(tmp_path / "new/images/new.png", 50)
    assert changes(moved.data, tmp_path / "cache", first.view)[:3] == (1, 0, 0)
    second = build_cache(moved, StubVae())
    assert second.view == first.view and second.encoded == 1
    assert changes(moved.data, tmp_path / "cache", first.view) is None
    shutil.rmtree(tmp_path / "new")
    assert view_name(moved, "stub") == first.view


@pytest.mark.parametrize("pattern", ["set-{0..1}.tar", "tars/{0..1}.tar", "set-0.tar"])
def test_moved_tars_are_found_and_others_are_not(tmp_path, monkeypatch, pattern):
    relative = config(tmp_path)
    relative = relative.model_copy(update={"data": relative.data.model_copy(update={"folders": [pattern]})})

    def pack(folder, seed):
        for number in range(2):
            path = folder / pattern.replace("{0..1}", str(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar_of(*shot(f"image {number}", seed + number)))
        monkeypatch.chdir(folder)

    pack(tmp_path / "a", 1)
    first = build_cache(relative, StubVae())
    pack(tmp_path / "b", 3)
    assert view_name(relative, "stub") != first.view
    (tmp_path / "a").rename(tmp_path / "c")
    assert view_name(relative, "stub") != first.view
    monkeypatch.chdir(tmp_path / "c")
    assert view_name(relative, "stub") == first.view
    assert changes(relative.data, tmp_path / "cache", first.view) is None


def test_a_view_is_found_without_its_images_if_the_config_is_the_same(tmp_path, monkeypatch):
    draw_many(tmp_path / "a")
    relative = config(tmp_path)
    relative = relative.model_copy(update={"data": relative.data.model_copy(update={"folders": ["images"]})})
    monkeypatch.chdir(tmp_path / "a")
    first = build_cache(relative, StubVae())
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert view_name(relative, "stub") != first.view  # the images of `a` are still there
    shutil.rmtree(tmp_path / "a")
    assert view_name(relative, "stub") == first.view
    draw_many(tmp_path / "b")
    draw(tmp_path / "b/images/003.png", 99)
    assert view_name(relative, "stub") != first.view


def test_a_view_of_an_earlier_version_gets_its_place_and_keeps_its_hash(tmp_path, monkeypatch):
    draw_many(tmp_path)
    place = build._Build._place
    monkeypatch.setattr(build._Build, "_place", lambda self: None)
    view = build_cache(config(tmp_path), StubVae()).view
    path = tmp_path / f"cache/views/{view}.safetensors"
    sha256 = LatentCache.open(tmp_path / "cache", view).sha256
    assert view_place(path) is None and "place" not in read_header(path, "view-2")[1]
    monkeypatch.setattr(build._Build, "_place", place)
    assert build_cache(config(tmp_path), StubVae()).view == view
    assert view_place(path).bases == [str(tmp_path / "images")]
    assert LatentCache.open(tmp_path / "cache", view).sha256 == sha256
