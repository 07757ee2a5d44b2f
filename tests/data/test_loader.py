"""The loader: batches depend only on their position, for any number of workers, and prefetching ends cleanly."""

import math
import threading
import time
from contextlib import ExitStack, closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sentences import refused

from fastsd.commands.cache import cache as make_cache
from fastsd.config.schema import DataTable, StageTable, parse_config
from fastsd.data.building.tokenize_captions import write_tokens
from fastsd.data.cache import Group, LatentCache
from fastsd.data.loader import PREFETCH, Loader
from fastsd.data.tokens import Tokens
from fastsd.model.formats.load import load_text
from fastsd.model.text_encoder import pad

LENGTH = 4
SQUARE, WIDE = (4, 2, 2), (4, 1, 4)


class Samples:
    """Stub of a cache. In version v of sample i, channel 0 is i and channel 1 is v. The captions start with "tag i"."""

    def __init__(self, *counts, versions=1):
        """Make groups from rows (shape, root, count), or one group of squares from its count."""
        self.groups, self.versions = [], versions
        for shape, root, count in counts if isinstance(counts[0], tuple) else [(SQUARE, 0, *counts)]:
            self.groups.append(Group(shape, root, len(self), count))

    def __len__(self):
        return self.groups[-1].first + self.groups[-1].count if self.groups else 0

    def get(self, positions, versions=None):
        positions = torch.as_tensor(positions)
        (shape,) = {group.shape for i in positions.tolist() for group in self.groups if 0 <= i - group.first < group.count}
        latents = torch.zeros(len(positions), *shape)
        latents[:, 0] = positions[:, None, None]
        latents[:, 1] = 0 if versions is None else torch.as_tensor(versions)[:, None, None]
        return {"latents": latents}

    def variants(self, positions):
        return [[f"tag {i}, a,b ,  c"] * (1 + i % 2) for i in positions]


def stage(**keys):
    return StageTable(**{"train": ["unet"], "until": 1, "batch": 4} | keys)


def tokenize(texts):
    return torch.tensor([[len(text)] * LENGTH for text in texts])


def loader(cache=None, seed=3, tokenize=tokenize, data=None, origin=0, rank=0, world=1, tokens=None, **keys):
    cache = cache or Samples(10)
    return Loader(cache, tokenize, seed, stage(**keys), data=data, origin=origin, rank=rank, world=world, tokens=tokens)


def sample_numbers(batch):
    return batch.latents_BCHW[:, 0, 0, 0].long().tolist()


def all_sample_numbers(batches):
    return [index for batch in batches for index in sample_numbers(batch)]


def same(a, b):
    tensors = ("latents_BCHW", "token_ids_BL", "positions_B")
    return a.captions == b.captions and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


BUCKETS = Samples((SQUARE, 0, 21), (SQUARE, 1, 14), (WIDE, 0, 5), (WIDE, 1, 30), versions=4)
SHARES = DataTable(folders=[{"path": "a", "repeats": 3}, {"path": "b", "weight": 0.5}])
EDITS = {"caption_dropout": 0.2, "shuffle_tags": True, "tag_dropout": 0.2}


def test_every_epoch_has_every_sample_once_in_a_new_order():
    assert loader().images == 10
    samples = all_sample_numbers(loader().stream(0, 30, 3))
    epochs = [samples[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_only_on_seed_and_position():
    whole = loader().batch(0, 24)
    for step in (1, 5, 8, 24):
        batches = list(loader().stream(0, 24, step))
        assert all_sample_numbers(batches) == sample_numbers(whole)
        assert torch.equal(torch.cat([batch.token_ids_BL for batch in batches]), whole.token_ids_BL)
        assert torch.equal(torch.cat([batch.positions_B for batch in batches]), torch.arange(24))
    assert sample_numbers(loader().batch(7, 9)) == sample_numbers(whole)[7:16]
    assert sample_numbers(loader(seed=4).batch(0, 24)) != sample_numbers(whole)
    assert [len(batch.captions) for batch in loader().stream(0, 10, 4)] == [4, 4, 2]


def test_a_batch_may_span_many_epochs_of_a_tiny_set():
    batch = loader(Samples(3)).batch(1, 11)
    assert sorted(sample_numbers(batch)[2:5]) == sorted(sample_numbers(batch)[5:8]) == [0, 1, 2]


def test_captions_follow_their_latents_and_repeats_are_tokenized_once():
    calls = []
    counting = loader(tokenize=lambda texts: (calls.append(list(texts)), tokenize(texts))[1], max_tags=1)
    batch = counting.batch(0, 10)
    assert batch.captions == [f"tag {i}" for i in sample_numbers(batch)]
    assert batch.token_ids_BL.tolist() == [[len(caption)] * LENGTH for caption in batch.captions]
    counting.batch(10, 20)
    assert sum(map(len, calls)) == 10


@pytest.mark.parametrize("cache, data", [(Samples(10), None), (BUCKETS, None), (BUCKETS, SHARES)])
def test_any_number_of_workers_makes_the_same_global_batches(cache, data):
    def batches(rank, world):
        return list(loader(cache, data=data, batch=12, origin=24, rank=rank, world=world, **EDITS).stream(24, 240, 12))

    whole = batches(0, 1)
    for world in (2, 3, 12):
        for i, shares in enumerate(zip(*(batches(rank, world) for rank in range(world)), strict=True)):
            for name in ("latents_BCHW", "token_ids_BL", "positions_B"):
                assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(whole[i], name))
            assert [caption for share in shares for caption in share.captions] == whole[i].captions
    with refused("batch-not-divisible", ValueError, batch=12, workers=5):
        loader(cache, world=5, batch=12, origin=24).batch(24, 12)


@pytest.mark.parametrize("data", [None, SHARES])
def test_a_resumed_run_reads_the_same_batches(data):
    whole = list(loader(BUCKETS, data=data, origin=8, **EDITS).stream(8, 400, 4))
    resumed = list(loader(BUCKETS, data=data, origin=8, **EDITS).stream(8 + 37 * 4, 400, 4))
    assert len(resumed) == len(whole) - 37 and all(same(*pair) for pair in zip(whole[37:], resumed, strict=True))
    assert len({batch.latents_BCHW.shape for batch in whole}) == 2


def test_repeats_and_weights_determine_the_epoch():
    with_shares = loader(BUCKETS, data=SHARES, batch=1)
    assert with_shares.images == 3 * 26 + 44
    samples = all_sample_numbers(with_shares.stream(0, with_shares.images, 1))
    assert all(samples.count(i) == (3 if i < 21 or 35 <= i < 40 else 1) for i in range(70))


def test_the_filter_selects_samples_by_tag():
    filtered = loader(data=DataTable(folders=["a"], include=["TAG 3", "tag 7", "tag 8"], exclude=["tag 8"]))
    assert filtered.images == 2 and sorted(sample_numbers(filtered.batch(0, 4))) == [3, 3, 7, 7]
    with refused("filter-leaves-none", filters="data.exclude ['c']", images=10):
        loader(data=DataTable(folders=["a"], exclude=["c"]))


def test_versions_follow_from_the_position():
    whole = loader(Samples(50, versions=6)).batch(0, 3000).latents_BCHW[:, 1, 0, 0].long()
    assert all(abs(count - 500) < 100 for count in torch.bincount(whole, minlength=6).tolist())
    assert torch.equal(loader(Samples(50, versions=6)).batch(40, 9).latents_BCHW[:, 1, 0, 0].long(), whole[40:49])
    assert not torch.equal(loader(Samples(50, versions=6), seed=4).batch(0, 3000).latents_BCHW[:, 1, 0, 0].long(), whole)
    assert not loader(Samples(50)).batch(0, 100).latents_BCHW[:, 1].any()


class CachedTokens:
    """Stub of cached token ids."""

    def row(self, sample, variant):
        return torch.tensor([sample, variant, 0, 0])


def test_cached_token_ids_are_used_for_unedited_captions():
    calls = []

    def counted(texts):
        calls.append(list(texts))
        return tokenize(texts)

    batch = loader(tokenize=counted, tokens=CachedTokens(), caption_dropout=0.5).batch(0, 20)
    for index, caption, row in zip(sample_numbers(batch), batch.captions, batch.token_ids_BL.tolist(), strict=True):
        assert row == ([index, 0, 0, 0] if caption else [0] * LENGTH)
    assert calls == [[""]] and 3 < batch.captions.count("") < 17
    edited = loader(tokens=CachedTokens(), max_tags=2).batch(0, 10)
    assert torch.equal(edited.token_ids_BL, loader(max_tags=2).batch(0, 10).token_ids_BL)


def test_a_tokenizer_is_never_called_by_two_threads_at_once():
    busy, counts = [], []

    def slow(texts):
        busy.append(1)
        counts.append(len(busy))
        time.sleep(0.002)
        busy.pop()
        return tokenize(texts)

    assert len(list(loader(Samples(400), tokenize=slow).stream(0, 200, 4))) == 50
    assert max(counts) == 1


def test_batches_of_buckets_crops_and_mirror_images(tmp_path, tiny_model):
    for i in range(30):
        path = tmp_path / "images" / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.radial_gradient("L").resize([(32, 32), (48, 24), (24, 48)][i % 3]).convert("RGB").point(
            lambda v, i=i: v + i
        ).save(path)
        path.with_suffix(".txt").write_text(f"red circle {i}\nblue star, {i}")
    data = {"resolution": 32, "crop": "random", "crops": 2, "flip": True, "buckets": {"min": 16, "max": 64, "step": 8}}
    raw = {
        "model": {"base": str(tiny_model)},
        "data": {"folders": [str(path.parent)]} | data,
        "cache": {"dir": str(tmp_path / "cache")},
        "stage": [{"train": ["unet"], "until": 1, "batch": 4, "caption_dropout": 0.2}],
    }
    config = parse_config(raw, "test")
    make_cache(config)
    cache, text = LatentCache.open(config.cache.dir), load_text(config.model, tiny_model)
    write_tokens(cache, text.tokenizer)

    def batches(**keys):
        loader = Loader(cache, text.tokenize, 3, config.stage[0], data=config.data, **keys)
        return list(loader.stream(0, loader.images * 4, 4))

    plain, with_tokens = batches(), batches(tokens=Tokens(cache, text.tokenizer, text.window))
    assert all(same(*pair) for pair in zip(plain, with_tokens, strict=True))
    shapes = {tuple(batch.latents_BCHW.shape[1:]) for batch in plain}
    assert len(shapes) == 3 == len(cache.groups) and len({batch.latents_BCHW[0].double().sum().item() for batch in plain}) > 25
    captions = {caption for batch in plain for caption in batch.captions}
    assert "" in captions and len(captions) > 45  # nearly all samples have occurred with both variants
    cache.close()


def test_token_ids_are_as_long_as_the_whole_batch_needs():
    """Their number depends on neither the workers nor the captions tokenized before."""

    def tokenize(texts):
        return pad([torch.full((len(text) - 4,), len(text)) for text in texts])  # "tag 9" has 1, "tag 10" 2, "tag 100" 3

    def batches(start=0, rank=0, world=1):
        keys = {"max_tags": 1, "batch": 4, "rank": rank, "world": world}
        return list(loader(Samples(300), tokenize=tokenize, **keys).stream(start, 1200, 4))

    whole = batches()
    for batch in whole:
        assert batch.token_ids_BL.shape[1] == math.lcm(*(len(caption) - 4 for caption in batch.captions))
        assert all(set(row) == {len(text)} for row, text in zip(batch.token_ids_BL.tolist(), batch.captions, strict=True))
    assert {batch.token_ids_BL.shape[1] for batch in whole} >= {2, 3, 6}
    assert all(same(*pair) for pair in zip(whole[101:], batches(start=404), strict=True))
    for shares in zip(*(batches(rank=rank, world=2) for rank in range(2)), whole, strict=True):
        assert torch.equal(torch.cat([share.token_ids_BL for share in shares[:2]]), shares[2].token_ids_BL)


def test_stream_works_ahead_and_counts_the_waiting(monkeypatch):
    """The clock of the test counts ready batches. No batch is ready before the consumer waits for the first one."""
    gated_loader, positions, ready, gate = loader(), [], [], threading.Event()
    load, open_gate = gated_loader.batch, iter([gate.set])

    def gated_load(position, count):
        positions.append(position)
        gate.wait()
        batch = load(position, count)
        ready.append(1)
        return batch

    gated_loader.batch = gated_load
    clock = SimpleNamespace(perf_counter=lambda: (len(ready), next(open_gate, int)())[0])
    monkeypatch.setattr("fastsd.data.loader.time", clock)
    with gated_loader.stream(0, 100, 5) as stream, ExitStack() as stack:
        stack.callback(gate.set)  # or the threads would never end
        next(stream)
        while len(ready) < PREFETCH + 1:
            time.sleep(0.01)
        time.sleep(0.3)
        assert sorted(positions) == [5 * i for i in range(PREFETCH + 1)]  # prefetching is limited
        gate.clear()
        waited = stream.waited
        for _ in range(PREFETCH):
            next(stream)
        assert waited == stream.waited >= 1


def test_batches_come_in_order_even_if_a_later_one_is_ready_first():
    uneven = loader()
    batch = uneven.batch
    uneven.batch = lambda position, count: (time.sleep(0.02 if position % 10 else 0), batch(position, count))[1]
    assert [int(result.positions_B[0]) for result in uneven.stream(0, 60, 5)] == list(range(0, 60, 5))


def test_an_exception_reaches_the_consumer():
    broken = loader()
    broken.cache.get = lambda *_: 1 / 0
    stream = broken.stream(0, 10, 5)
    with pytest.raises(ZeroDivisionError):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("fastsd-loader")]


def test_a_stream_stops_when_closed_dropped_or_done():
    endless, positions = loader(), []
    batch = endless.batch
    endless.batch = lambda position, count: (positions.append(position), batch(position, count))[1]
    stream = endless.stream(0, 10**9, 2)
    next(stream)
    stream.close()
    assert len(positions) <= PREFETCH + 1 and not loader_threads()
    with pytest.raises(StopIteration):
        next(stream)
    dropped = loader().stream(0, 10**9, 2)
    next(dropped)
    del dropped
    assert len(list(loader().stream(0, 10, 2))) == 5
    while loader_threads():
        time.sleep(0.02)


@pytest.mark.parametrize("data", [None, DataTable(folders=["a"], exclude=["tag 8"])], ids=["all", "filtered"])
def test_left_out_samples_are_in_no_batch(data):
    usable = [i for i in range(10) if i not in (1, 3) and not (data and i == 8)]
    partial = Loader(Samples((SQUARE, 0, 10)), tokenize, 3, stage(), data=data, left_out=np.array([1, 3]))
    assert partial.images == len(usable)
    assert sorted(sample_numbers(partial.batch(0, len(usable)))) == usable


def test_a_run_on_the_cpu_does_not_use_the_gpu(images, tiny_model, tmp_path, monkeypatch):
    """Pinned memory creates a CUDA context of half a GB, also if the run's device is the CPU."""
    raw = {
        "model": {"base": str(tiny_model)},
        "data": {"folders": [str(images)], "resolution": 32},
        "cache": {"dir": str(tmp_path / "cache")},
        "stage": [{"train": ["unet"], "until": 1, "batch": 4}],
    }
    config = parse_config(raw, "test")
    make_cache(config)
    pinned, empty = [], torch.empty
    record = lambda *shape, pin_memory=False, **options: pinned.append(pin_memory) or empty(*shape, **options)  # noqa: E731
    monkeypatch.setattr(torch, "empty", record)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(True) or tensor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with closing(LatentCache.open(config.cache.dir)) as latents:
        for in_use in (False, True):
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
            pinned.clear()
            Loader(latents, load_text(config.model, tiny_model).tokenize, 0, config.stage[0], data=config.data).batch(0, 4)
            assert pinned.count(True) == (3 if in_use else 0)
