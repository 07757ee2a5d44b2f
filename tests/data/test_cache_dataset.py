"""`LatentCache` as a torch dataset."""

import copy

import pytest
import torch
from caching import StubVae, draw, with_data
from torch.utils.data import DataLoader, Dataset

from fastsd.data.building.build import build_cache
from fastsd.data.cache import LatentCache

BUCKETS = {"min": 16, "max": 64, "step": 8, "no_upscale": False}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Samples of several shapes."""
    root = tmp_path_factory.mktemp("dataset")
    for i, size in enumerate([(36, 40), (64, 20), (20, 64), (48, 48), (40, 36), (64, 24)] * 2):
        draw(root / f"images/{i:03}.png", i, f"picture {i}", size)
    build_cache(with_data(root, buckets=BUCKETS), StubVae())
    return LatentCache.open(root / "cache")


def test_items_are_the_samples_of_get(cache):
    assert isinstance(cache, Dataset) and len({group.shape for group in cache.groups}) > 1
    for i in range(len(cache)):
        for position in (i, i - len(cache)):
            sample = cache[position]
            assert torch.equal(sample["latents"], cache.get([i])["latents"][0]) and sample["caption"] == cache.captions([i])[0]


def test_items_of_several_shapes_keep_their_order(cache):
    positions = [len(cache) - 1, 0, 5, 0, -2]
    for position, sample in zip(positions, cache.__getitems__(positions), strict=True):
        assert torch.equal(sample["latents"], cache[position]["latents"]) and sample["caption"] == cache[position]["caption"]


def test_positions_outside_are_an_index_error(cache):
    for position in (len(cache), -len(cache) - 1):
        with pytest.raises(IndexError):
            cache[position]
    assert len(list(cache)) == len(cache)  # a plain loop ends by IndexError


@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), (1, "spawn")])
def test_a_data_loader_reads_every_sample(cache, workers, start, monkeypatch):
    monkeypatch.setattr("fastsd.data.rows._Shard.read_cached", lambda *_: False)  # as if nothing were in the page cache
    cache[0]  # this process has started its threads, which a forked worker does not inherit
    loader = DataLoader(cache, batch_size=None, num_workers=workers, multiprocessing_context=start)
    for i, sample in enumerate(loader):
        assert torch.equal(sample["latents"], cache[i]["latents"]) and sample["caption"] == cache[i]["caption"]
    assert i == len(cache) - 1


def test_a_copy_opens_the_same_view(cache):
    other = copy.copy(cache)
    assert other._open is not cache._open and torch.equal(other[3]["latents"], cache[3]["latents"])
