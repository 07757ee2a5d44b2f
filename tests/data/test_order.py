"""The order of samples: once per epoch, by repeats and weights, in batches of one shape, from any position."""

from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.config.schema import FolderTable
from fastsd.data import order as order_module
from fastsd.data.cache import Group
from fastsd.data.order import Order
from fastsd_kernels.noise import Purpose, permutation, permuted

WIDE, HIGH, SQUARE = (4, 8, 16), (4, 16, 8), (4, 12, 12)


def groups(*rows):
    """Make adjacent groups from rows (shape, root, count)."""
    firsts = np.cumsum([0, *(count for _, _, count in rows)]).tolist()
    return [Group(shape, root, first, count) for (shape, root, count), first in zip(rows, firsts, strict=False)]


def order(*rows, shares=(), seed=3, batch=4, origin=0, selected=None):
    return Order(groups(*rows), shares, seed, batch=batch, origin=origin, selected=selected)


def batches(stage, count, origin=0):
    return [stage.batch(origin + i * stage.batch_size, stage.batch_size).tolist() for i in range(count)]


def flat(lists):
    return [index for items in lists for index in items]


def test_one_shape_has_every_sample_once_per_epoch_in_the_permutation_of_the_epoch():
    stage = order((WIDE, 0, 10))
    assert stage.epoch == 10
    for epoch in range(3):
        assert torch.equal(stage.batch(10 * epoch, 10), permutation(3, Purpose.ORDER, epoch, 10))
    assert stage.batch(0, 10).tolist() != stage.batch(10, 10).tolist()
    assert stage.batch(0, 10).tolist() != order((WIDE, 0, 10), seed=4).batch(0, 10).tolist()


def test_one_shape_does_not_depend_on_the_batch():
    whole = order((WIDE, 0, 60), (WIDE, 1, 100), batch=7).batch(0, 10_000).tolist()  # several blocks, many epochs
    assert whole[37:137] == order((WIDE, 0, 60), (WIDE, 1, 100), batch=100, origin=37).batch(37, 100).tolist()
    assert flat(order((WIDE, 0, 60), (WIDE, 1, 100)).batch(i, 9).tolist() for i in range(0, 9000, 9)) == whole[:9000]


def test_a_batch_has_one_shape_and_remainders_are_carried_on():
    stage = order((WIDE, 0, 10), (HIGH, 0, 7), (SQUARE, 0, 3))
    shapes = [range(10), range(10, 17), range(17, 20)]
    read = batches(stage, 500)
    assert all(any(set(batch) <= set(samples) for samples in shapes) for batch in read)
    for epoch in range(1, 101):
        counts = Counter(flat(read[: sum(epoch * len(samples) // 4 for samples in shapes)]))
        for samples in shapes:
            times = [counts[i] for i in samples]
            # Less than a batch of each shape is missing, and each of its samples at most once.
            assert 0 <= epoch * len(samples) - sum(times) < 4 and max(times) - min(times) <= 1


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 40, 200])
def test_samples_of_rare_shapes_that_a_stage_never_reaches_are_counted(steps):
    stage = order((WIDE, 0, 40), (HIGH, 0, 3), (SQUARE, 0, 1), (HIGH, 1, 2), batch=8)
    seen = set(flat(batches(stage, steps)))
    reached = {shape for shape, samples in (("high", {40, 41, 42, 44, 45}), ("square", {43})) if seen & samples}
    never = stage.unused_samples(steps)
    assert never in (0, 1, 6) and never <= 46 - len(seen)
    if steps * 8 % stage.epoch == 0:  # at the end of an epoch, the bound is exact
        assert never == {(): 6, ("high",): 1, ("high", "square"): 0}[tuple(sorted(reached))]
    assert order((WIDE, 0, 3), batch=8).unused_samples(steps) == 0


def test_shapes_alternate_in_a_new_order_in_every_epoch_and_stage():
    def turns(origin):
        return [batch[0] < 40 for batch in batches(order((WIDE, 0, 40), (HIGH, 0, 40), origin=origin), 40, origin)]

    first, second = turns(0)[:20], turns(0)[20:]
    assert sum(first) == sum(second) == 10 and first != second
    assert turns(80)[:20] == second and turns(84)[:20] not in (first, second)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 9), st.integers(0, 50), st.integers(0, 40))
def test_any_batch_is_computed_directly(counts, batch, origin, far):
    rows = [((4, 8, 8 + i), 0, count) for i, count in enumerate(counts)]
    far += origin // batch
    read = flat(batches(order(*rows, batch=batch, origin=origin), far + 1, origin))
    alone = order(*rows, batch=batch, origin=origin).batch(origin + far * batch, batch).tolist()
    assert read[far * batch :] == alone
    assert [order(*rows, batch=batch, origin=origin).batch(origin + far * batch + i, 1).item() for i in range(batch)] == alone


def test_repeats_count_exactly():
    shares = [FolderTable(path="a", repeats=3), FolderTable(path="b")]
    stage = order((WIDE, 0, 5), (HIGH, 0, 4), (WIDE, 1, 7), (HIGH, 1, 9), shares=shares, batch=1)
    assert stage.epoch == 3 * 9 + 16
    for epochs in (1, 10):
        counts = Counter(flat(batches(stage, epochs * stage.epoch)))
        assert counts == {i: epochs * (3 if i in (0, 1, 2, 3, 4, 5, 6, 7, 8) else 1) for i in range(25)}


@pytest.mark.parametrize("weights, lengths", [((3.0, 1.0), (300, 100)), ((1.0, 1.0), (200, 200)), ((0.001, 9.0), (1, 400))])
def test_weights_divide_the_positions_of_their_folders_evenly_among_images(weights, lengths):
    shares = [*(FolderTable(path="w", weight=weight) for weight in weights), FolderTable(path="r", repeats=2)]
    stage = order((WIDE, 0, 100), (WIDE, 1, 300), (WIDE, 2, 50), shares=shares)
    assert stage.epoch == sum(lengths) + 100
    for epochs in (1, 10):
        counts = Counter(stage.batch(0, epochs * stage.epoch).tolist())
        for samples, length in ((range(100), lengths[0]), (range(100, 400), lengths[1])):
            times = [counts[i] for i in samples]
            assert sum(times) == epochs * length and max(times) - min(times) <= 1
        assert all(counts[i] == 2 * epochs for i in range(400, 450))


def test_weights_keep_the_proportion_of_shapes():
    shares = [FolderTable(path="a", weight=1.0), FolderTable(path="b", weight=1.0)]
    stage = order((WIDE, 0, 90), (WIDE, 1, 20), (HIGH, 0, 9), (HIGH, 1, 80), (SQUARE, 0, 1), shares=shares, batch=1)
    counts = Counter(flat(batches(stage, 10 * stage.epoch)))
    ranges = range(90), range(90, 110), range(110, 119), range(119, 199), range(199, 200)
    assert [sum(counts[i] for i in samples) / 10 for samples in ranges] == [90, 20, 9, 80, 1] and stage.epoch == 200


def test_a_shape_smaller_than_a_batch_skips_epochs():
    stage = order((WIDE, 0, 64), (HIGH, 0, 2), batch=8)
    high_batches = [i for i, batch in enumerate(batches(stage, 66)) if batch[0] >= 64]  # 8 epochs of 66 in batches of 8
    assert len(high_batches) == 2 and high_batches[0] in range(24, 33) and high_batches[1] in range(57, 66)
    assert Counter(stage.batch(8 * high_batches[0], 8).tolist()) == {64: 4, 65: 4}


def test_a_later_stage_with_another_batch_size_continues():
    rows = [(WIDE, 0, 24), (HIGH, 0, 12)]
    first = flat(batches(order(*rows, batch=6), 12))  # two epochs
    second = flat(batches(order(*rows, batch=4, origin=72), 9, 72))  # the third
    assert Counter(first) == dict.fromkeys(range(36), 2) and Counter(second) == dict.fromkeys(range(36), 1)
    # In the middle of an epoch, each shape continues with the second half of its sequence.
    wide = flat(batch for batch in batches(order(*rows, batch=6, origin=18), 6, 18) if batch[0] < 24)
    halves = permutation(3, Purpose.ORDER, 0, 24)[12:], permutation(3, Purpose.ORDER, 1, 24)[:12]
    assert sorted(wide) == sorted(torch.cat(halves).tolist())


def test_only_selected_samples_are_read():
    selected = np.array([0, 3, 4, 11, 12, 19])
    stage = order((WIDE, 0, 10), (WIDE, 1, 5), (HIGH, 0, 3), (HIGH, 1, 2), selected=selected, batch=1)
    assert stage.epoch == 6
    assert sorted(flat(batches(stage, 6))) == selected.tolist()


def test_ten_million_samples_take_no_memory(monkeypatch):
    sizes = []

    def watched(seed, purpose, position, count, index_B):
        sizes.append(len(index_B))
        return permuted(seed, purpose, position, count, index_B)

    monkeypatch.setattr(order_module, "permuted", watched)
    before = psutil.Process().memory_full_info().uss
    shares = [FolderTable(path="a", weight=1.0), FolderTable(path="b", weight=2.0)]
    stage = order((WIDE, 0, 6_000_000), (HIGH, 1, 4_000_000), shares=shares, batch=64)
    read = batches(stage, 50) + [stage.batch(64 * 10**9, 64).tolist()]
    assert max(sizes) <= 1024 and psutil.Process().memory_full_info().uss - before < 64e6
    assert len(set(flat(read[:50]))) == 50 * 64
