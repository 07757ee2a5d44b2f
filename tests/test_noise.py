"""Counter-based randomness: known answers of Philox, statistics, independence of how a batch is cut."""

import pytest
import torch

from fastsd_kernels import noise

# Known answers of Random123's Philox 4x32-10 test vectors: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


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
def test_permutation_is_one(count):
    order = noise.permutation(5, noise.Purpose.ORDER, 3, count)
    assert torch.equal(order.sort().values, torch.arange(count))
    assert torch.equal(order, noise.permutation(5, noise.Purpose.ORDER, 3, count))
    if count == 1000:
        assert not torch.equal(order, noise.permutation(5, noise.Purpose.ORDER, 4, count))
