"""Counter-based randomness: every random number of a run is a pure function of (seed, purpose, sample position, element).

Nothing keeps a generator state, so resuming, sampling or validating in between, another batch split or another number of
GPUs change no number.  The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with

    key     = (seed low 32, seed high 32)
    counter = (block of four elements, position low 32, position high 32, purpose)

One call gives four 32-bit words.  Words become uniforms in the open interval by u = (floor(w / 2^9) + 1/2) * 2^-23, exact in
fp32, and pairs of them normals by Box and Muller: r = sqrt(-2 ln u1), (r cos 2 pi u2, r sin 2 pi u2), so |n| <= 5.65.
The integer part is exact on any device.  The reference takes logarithm and cosine in fp64 and rounds once, so that a
number does not depend on where in a vector register it was computed.

Shapes: B samples, K blocks.  32-bit words live in int64 tensors, which torch multiplies on every device.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(IntEnum):
    """What a random number is for. Written into the counter: a new purpose gets a new number, an old one keeps its own."""

    NOISE = 0  # eps of the forward process
    TIMESTEP = 1  # t
    ORDER = 2  # the permutation of an epoch; position = epoch
    CAPTION = 3  # caption dropout and variants
    SAMPLE = 4  # the first latents of a generated image; position = image seed


def philox(seed: int, purpose: int, position_B: Tensor, block_K: Tensor) -> Tensor:
    """Philox 4x32-10 words.

    Args:
        seed: 0 <= seed < 2**64.
        purpose: stream number, see `Purpose`.
        position_B: int64 sample positions.
        block_K: int64 block numbers below 2**32.

    Returns:
        int64 (B, K, 4), each in [0, 2**32), on the device of `position_B`.
    """
    shape = (len(position_B), len(block_K))
    c0 = block_K.to(position_B.device).expand(shape)
    c1 = (position_B & _MASK)[:, None].expand(shape)
    c2 = (position_B >> 32 & _MASK)[:, None].expand(shape)
    c3 = torch.full_like(c0, purpose)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(_ROUNDS):
        # int64 products wrap, so the high word needs the mask after the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _words(seed: int, purpose: int, position_B: Tensor, count: int) -> Tensor:
    blocks = torch.arange(-(-count // 4), device=position_B.device)
    return philox(seed, purpose, position_B, blocks).flatten(1)


def uniform(seed: int, purpose: int, position_B: Tensor, count: int = 1) -> Tensor:
    """Uniforms in (0, 1), multiples of 2**-24: fp64 (B, count)."""
    words = _words(seed, purpose, position_B, count)[:, :count]
    return ((words >> 9).double() + 0.5) * 2.0**-23


def integers(seed: int, purpose: int, position_B: Tensor, high: int) -> Tensor:
    """Integers uniform in [0, high) for high < 2**31: int64 (B,). floor(w * high / 2**32); bias below high / 2**32."""
    return _words(seed, purpose, position_B, 1)[:, 0] * high >> 32


def normal(seed: int, purpose: int, position_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals: fp32 (B, *shape), contiguous. Element e of a sample comes from lane e % 4 of block e // 4."""
    count = math.prod(shape)
    words = _words(seed, purpose, position_B, count)
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
    angle = (2.0 * math.pi) * u[:, 1::2]
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.flatten(1)[:, :count].float().reshape(len(position_B), *shape)


def permutation(seed: int, purpose: int, position: int, count: int) -> Tensor:
    """A permutation of range(count), a function of (seed, purpose, position): int64 (count,) on the CPU.

    Sorts 62-bit random keys; equal keys (probability about count**2 / 2**63) fall back to index order.
    """
    words = _words(seed, purpose, torch.tensor([position]), 2 * count)[0].view(-1, 2)[:count]
    return torch.argsort(words[:, 0] << 30 ^ words[:, 1], stable=True)
