"""Counter-based randomness: known answers of Philox, statistics, and independence of the batch."""

import pytest
import torch
from philox import KNOWN

from fastsd_kernels import noise


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_known_answers(counter, key, expected):
    position = counter[1] | counter[2] << 32
    position -= (position >> 63) << 64  # as int64
    words = noise.philox(key[0] | key[1] << 32, counter[3], torch.tensor([position]), torch.tensor([counter[0]]))
    assert words.flatten().tolist() == list(expected)


def test_normals_are_standard_and_independent():
    n = noise.normal(3, noise.Purpose.NOISE, torch.arange(64), (4, 64, 64)).double()
    count = n.numel()
    assert abs(n.mean()) < 4 / count**0.5
    assert abs(n.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((n**4).mean() - 3) < 4 * (96 / count) ** 0.5
    gram = n.flatten(1) @ n.flatten(1).T / n[0].numel()
    assert (gram - torch.eye(64)).abs().max() < 6 / n[0].numel() ** 0.5
    tail = (n.abs() > 3).double().mean().item()
    assert tail == pytest.approx(0.0026998, rel=0.05)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1,)])
def test_a_number_does_not_depend_on_the_batch(shape):
    positions = torch.tensor([0, 5, 2**33 + 1, 17])
    whole = noise.normal(7, noise.Purpose.NOISE, positions, shape)
    single = torch.cat([noise.normal(7, noise.Purpose.NOISE, positions[i : i + 1], shape) for i in range(4)])
    assert torch.equal(whole, single)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, noise.normal(8, noise.Purpose.NOISE, positions, shape))
    assert not torch.equal(whole, noise.normal(7, noise.Purpose.SAMPLE, positions, shape))


def test_integers_cover_their_range_evenly():
    draws = noise.integers(1, noise.Purpose.TIMESTEP, torch.arange(200_000), 1000)
    counts = torch.bincount(draws, minlength=1000)
    assert draws.min() == 0 and draws.max() == 999
    assert ((counts - 200).double() ** 2 / 200).sum() < 1000 + 6 * 2000**0.5  # chi-square


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutation_contains_every_index_once(count):
    order = noise.permutation(5, noise.Purpose.ORDER, 3, count)
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(order, noise.permutation(5, noise.Purpose.ORDER, 3, count))
    if count == 1000:
        assert not torch.equal(order, noise.permutation(5, noise.Purpose.ORDER, 4, count))


@pytest.mark.parametrize("count", [1, 7, noise.SORTED, noise.SORTED + 1, 100_003, 10**6])
def test_permuted_computes_single_elements(count):
    order = noise.permuted(5, noise.Purpose.ORDER, 3, count, torch.arange(count))
    assert torch.equal(order.sort().values, torch.arange(count))
    indices = torch.tensor([count - 1, 0, count // 2, 0])
    assert torch.equal(noise.permuted(5, noise.Purpose.ORDER, 3, count, indices), order[indices])
    if count <= noise.SORTED:
        assert torch.equal(order, noise.permutation(5, noise.Purpose.ORDER, 3, count))


def test_permuted_has_the_statistics_of_a_random_permutation():
    count = 2_000_003
    for index in (torch.arange(50_000) * 40 + 7, torch.arange(50_000) + 1_234_567):  # a grid, and consecutive indices
        images = [noise.permuted(*key, count, index) for key in ((5, 2, 3), (5, 2, 4), (5, 6, 3), (6, 2, 3))]
        for i, image in enumerate(images):
            share = image.double() / count  # uniform, so mean 1/2 and variance 1/12
            counts = torch.histc(share, 100, 0, 1)
            assert ((counts - 500) ** 2 / 500).sum() < 99 + 6 * 198**0.5  # chi-square
            # It correlates with neither its neighbour nor its index nor another permutation.
            others = [share[:-1], index.double() / count, *(earlier.double() / count for earlier in images[:i])]
            for other in others:
                correlations = torch.corrcoef(torch.stack((share[-len(other) :], other)))
                assert abs(correlations[0, 1]) < 5 / len(index) ** 0.5
            steps = (image[1:] - image[:-1]) % count
            assert len(steps.unique()) > 0.98 * len(steps)  # the distance of neighbours varies


@pytest.mark.slow
def test_permuted_has_one_fixed_point_on_average():
    count = 70_001
    index = torch.arange(count)
    fixed_points = sum((noise.permuted(0, 2, position, count, index) == index).sum().item() for position in range(30))
    assert abs(fixed_points - 30) < 5 * 30**0.5
