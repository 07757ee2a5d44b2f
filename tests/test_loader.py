"""The loader: every sample once an epoch, batches that depend on their position alone, clean ends of prefetching."""

import threading
import time

import pytest
import torch

from fastsd.config import StageTable
from fastsd.data.captions import captions_for, edit
from fastsd.data.loader import Loader

LENGTH = 4


class Samples:
    """Stands for a cache of n samples; sample i has the latent i and the caption "tag i"."""

    def __init__(self, n=10):
        self.n = n

    def __len__(self):
        return self.n

    def get(self, positions):
        return {"latents": torch.as_tensor(positions).half()[:, None, None, None].expand(-1, 4, 2, 2)}

    def captions(self, positions):
        return [f"tag {i}, a,b ,  c" for i in torch.as_tensor(positions).tolist()]


def stage(**keys):
    return StageTable(train=["unet"], until=1, **keys)


def loader(n=10, seed=3, calls=None, **keys):
    def tokenize(texts):
        if calls is not None:
            calls.append(list(texts))
        return torch.tensor([[len(text)] * LENGTH for text in texts])

    return Loader(Samples(n), tokenize, seed, stage(**keys))


def seen(batch):
    return batch.latents_BCHW[:, 0, 0, 0].long().tolist()


def seen_in(batches):
    return [index for batch in batches for index in seen(batch)]


def test_every_epoch_has_every_sample_once_and_its_own_order():
    flat = seen_in(loader().stream(0, 30, 3))
    epochs = [flat[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_depends_on_seed_and_position_alone():
    whole = loader().batch(0, 24)
    for step in (1, 5, 8, 24):
        parts = list(loader().stream(0, 24, step))
        assert seen_in(parts) == seen(whole)
        assert torch.equal(torch.cat([part.token_ids_BL for part in parts]), whole.token_ids_BL)
        assert torch.equal(torch.cat([part.positions_B for part in parts]), torch.arange(24))
    assert seen(loader().batch(7, 9)) == seen(whole)[7:16]
    assert seen(loader(seed=4).batch(0, 24)) != seen(whole)
    assert [len(part.captions) for part in loader().stream(0, 10, 4)] == [4, 4, 2]


def test_a_batch_may_span_many_epochs_of_a_tiny_set():
    batch = loader(n=3).batch(1, 11)
    assert sorted(seen(batch)[2:5]) == sorted(seen(batch)[5:8]) == [0, 1, 2]


def test_captions_follow_their_latents_and_repeats_are_tokenized_once():
    calls = []
    one = loader(calls=calls, max_tags=1)
    batch = one.batch(0, 10)
    assert batch.captions == [f"tag {i}" for i in seen(batch)]
    assert batch.token_ids_BL.tolist() == [[len(caption)] * LENGTH for caption in batch.captions]
    one.batch(10, 20)
    assert sum(map(len, calls)) == 10


def test_max_tags_keeps_the_first_and_normalises_the_separators():
    assert edit("a ,b,,  c, d", 0, stage(max_tags=3), 0) == "a, b, c"
    assert edit("a ,b,,  c, d", 0, stage(), 0) == "a ,b,,  c, d"
    assert edit("a|b, still b|c", 0, stage(max_tags=2, tag_separator="|"), 0) == "a, b, still b"
    assert edit("", 0, stage(max_tags=2), 0) == ""


def test_caption_dropout_is_a_function_of_seed_and_position():
    texts, positions = ["x"] * 4000, torch.arange(4000)
    dropped = [text == "" for text in captions_for(texts, positions, stage(caption_dropout=0.25), 5)]
    assert abs(sum(dropped) / 4000 - 0.25) < 0.03
    assert [edit("x", p, stage(caption_dropout=0.25), 5) == "" for p in range(50)] == dropped[:50]
    assert [text == "" for text in captions_for(texts, positions, stage(caption_dropout=0.25), 6)] != dropped
    assert captions_for(texts, positions, stage(caption_dropout=1.0), 5) == [""] * 4000
    assert captions_for(texts, positions, stage(caption_dropout=0.0), 5) == texts


def test_stream_works_ahead_and_counts_the_waiting():
    slow = loader()
    made = []
    fast_batch = slow.batch
    slow.batch = lambda position, count: (made.append(position), time.sleep(0.05), fast_batch(position, count))[2]
    with slow.stream(0, 100, 5) as stream:
        next(stream)
        assert stream.waited >= 0.04
        time.sleep(0.5)
        waited = stream.waited
        assert 3 <= len(made) <= 6  # ahead, but not without bound
        next(stream)
        assert stream.waited - waited < 0.04


def test_an_exception_reaches_the_consumer():
    broken = loader()
    broken.cache.get = lambda positions: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(broken.stream(0, 10, 5))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastsd-loader"]


def test_a_stream_stops_when_closed_dropped_or_done():
    stream = loader().stream(0, 10**9, 2)
    next(stream)
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 1 and not threads()
    with pytest.raises(StopIteration):
        next(stream)
    dropped = loader().stream(0, 10**9, 2)
    next(dropped)
    del dropped
    assert len(list(loader().stream(0, 10, 2))) == 5
    deadline = time.perf_counter() + 3
    while threads() and time.perf_counter() < deadline:
        time.sleep(0.02)
    assert not threads()
