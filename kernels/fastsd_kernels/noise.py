"""Counter-based randomness: every random number of a run is a pure function of (seed, purpose, sample position, element).

There is no generator state, so resuming, sampling or validating in between, another batch split or another number of
GPUs change no number.  The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with

    key     = (seed low 32, seed high 32)
    counter = (block of four elements, position low 32, position high 32, purpose)

One call gives four 32-bit words.  Words become uniforms in the open interval by u = (floor(w / 2^9) + 1/2) * 2^-23, exact in
fp32.  Pairs of them become normals by Box and Muller: r = sqrt(-2 ln u1), (r cos 2 pi u2, r sin 2 pi u2), so |n| <= 5.65.
The integer part is exact on any device.  The reference takes logarithm and cosine in fp64 and rounds once, so that a
number does not depend on where in a vector register it was computed.

`add_noise` is the forward process in one pass.  The noise is generated where it is used, and stored only as the target:

    x_t = signal_t x_0 + sigma_t eps        target = eps, v = signal_t eps - sigma_t x_0, or u = eps - x_0 of a flow

Bytes moved, per element: x_0 read, x_t and target written: 12, or 10 with x_0 in 16 bits.  The kernel takes logarithm and
cosine in fp64, too, so its normals equal the reference's, except for one in about 10^7 that differs in the last bit.  On a
GeForce fp64 runs at 1/64 of the rate of fp32, and 80 fp64 operations a number take 0.2 ms for 32 images of 64x64x4, which is
negligible in a step.  Rejected: tl.cos, which takes any angle in fp64 and needs a table in local memory for that.  Here the
angle is a multiple of 2^-24 turns: quarter turns are split off exactly in integers, and a short series does the rest.

Shapes: B samples, K blocks.  32-bit words live in int64 tensors, which torch multiplies on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsd_kernels import workload
from fastsd_kernels.launch import custom_op, launch, meta, require_device
from fastsd_kernels.ops import AddNoise, Calls, Normal, Op

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
TARGETS = {"epsilon": 0, "v_prediction": 1, "flow": 2}
_VELOCITY, _FLOW = TARGETS["v_prediction"], TARGETS["flow"]
SORTED = 1 << 16  # elements up to which a permutation is made by sorting
_FEISTEL_ROUNDS = 8  # even, so that the halves end where they began


class Purpose(IntEnum):
    """The use of a random number. It is written into the counter: a new purpose gets a new number, an old one keeps its own."""

    NOISE = 0  # eps of the forward process
    TIMESTEP = 1  # t
    ORDER = 2  # the permutation of an epoch; position = epoch, and 2**40 times the shape's number
    CAPTION = 3  # caption dropout, variants, tags and sentences
    SAMPLE = 4  # the first latents of a generated image; position = image seed
    BATCHES = 5  # the order of an epoch's batches of several shapes; position = the first sample's
    ROTATION = 6  # the fixed order in which a folder's images take turns; position = the group's number
    VERSION = 7  # which crop or mirror image
    REINIT = 8  # new weights for reinitialised layers; position = a hash of the parameter's name
    IMMISCIBLE = 9  # further noises that eps is chosen from
    PYRAMID = 10  # coarser noises added to eps
    OFFSET = 11  # one number a channel added to eps
    PERTURBATION = 12  # noise added to eps in the input only
    ADAPTER = 13  # the first weights of low-rank adapters; position = a hash of the parameter's name
    HELD_OUT = 14  # the choice of held-out and stabilised images; position = the image's checksum or number
    VALIDATION = 15  # timesteps and noises of a measured image; position = its checksum or number, block = the timestep stratum
    REDRAW = 16  # a redrawn image; position = its number in the cache view, and 2**40 more for the sampler's own noise
    ALIGNMENT = 17  # the choice of images that align two VAEs; their timesteps and noises, position = number, block = stratum


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
    """Uniform numbers in (0, 1), multiples of 2**-24: fp64 (B, count)."""
    words = _words(seed, purpose, position_B, count)[:, :count]
    return ((words >> 9).double() + 0.5) * 2.0**-23


def integers(seed: int, purpose: int, position_B: Tensor, high: int) -> Tensor:
    """Uniform integers in [0, high), high < 2**31: int64 (B,). floor(w * high / 2**32) has a bias below high / 2**32."""
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


def permuted(seed: int, purpose: int, position: int, count: int, index_B: Tensor) -> Tensor:
    """Compute single elements of a permutation of range(count): int64 (B,) on the device of `index_B`.

    Up to `SORTED` elements this is `permutation`. Above, it is a generalised Feistel network over a x b >= count, with a and b
    about sqrt(count) and Philox as round function. Results outside range(count) pass through it again until they fall inside.

    Args:
        position: selects the permutation, together with seed and purpose.
        count: below 2**48.
        index_B: int64 in [0, count).

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, sections 4 and 5.
    """
    if count <= SORTED:
        return permutation(seed, purpose, position, count).to(index_B.device)[index_B]
    assert count <= 1 << 48
    a = math.isqrt(count - 1) + 1
    b = -(-count // a)
    positions = torch.tensor([position], device=index_B.device)

    def network(index_B: Tensor) -> Tensor:
        left_B, right_B = index_B % a, index_B // a
        for i in range(_FEISTEL_ROUNDS):
            # Four rounds share a block's words; halves stay below 2^24, so the next four find other blocks.
            word_B = philox(seed, purpose, positions, right_B + (i // 4 << 24))[0, :, i % 4]
            left_B, right_B = right_B, (left_B + word_B) % (b if i % 2 else a)
        return left_B + a * right_B

    out_B = network(index_B)
    while (outside_B := out_B >= count).any():
        out_B[outside_B] = network(out_B[outside_B])
    return out_B


@torch.no_grad()
def add_noise_reference(
    latents_BCHW: Tensor,
    positions_B: Tensor,
    t_B: Tensor,
    signal_T: Tensor,
    sigma_T: Tensor,
    seed: int,
    *,
    prediction: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """Add noise to latents, and return the result with the target that a model predicts from it.

    Args:
        latents_BCHW: scaled latents, fp32, bf16 or fp16.
        positions_B: int64 sample positions, which select the noise (`Purpose.NOISE`).
        t_B: int64 timesteps in [0, T).
        signal_T, sigma_T: fp32, sqrt(abar_t) and sqrt(1 - abar_t).
        seed: 0 <= seed < 2**64.
        prediction: "epsilon", "v_prediction", or "flow", whose x_t is (1 - s) x_0 + s eps.

    Returns:
        (x_t, target): fp32 (B, C, H, W).

    Raises:
        ValueError: another prediction.

    Source: Ho et al. 2020, "Denoising diffusion probabilistic models", equation 4; Salimans and Ho 2022, "Progressive
    distillation for fast sampling of diffusion models", appendix D; Liu et al. 2023, "Flow straight and fast", equation 1.
    """
    target = _target(prediction)
    x_BCHW = latents_BCHW.float()
    eps_BCHW = normal(seed, Purpose.NOISE, positions_B, tuple(x_BCHW.shape[1:]))
    signal, sigma = (table_T[t_B][:, None, None, None] for table_T in (signal_T, sigma_T))
    noisy_BCHW = signal * x_BCHW + sigma * eps_BCHW
    if target == _VELOCITY:
        return noisy_BCHW, signal * eps_BCHW - sigma * x_BCHW
    return noisy_BCHW, eps_BCHW - x_BCHW if target == _FLOW else eps_BCHW


def _target(prediction: str) -> int:
    """Return the number by which kernels know what a model predicts."""
    if prediction not in TARGETS:
        raise ValueError(f'add_noise: prediction is "{prediction}"; use {", ".join(map(repr, TARGETS))}'.replace("'", '"'))
    return TARGETS[prediction]


@triton.jit
def philox_words(seed, purpose, position, blocks):
    """Return four uint32 words of each block, those of `philox` for one position."""
    c0 = blocks.to(tl.uint32)
    zero = tl.zeros_like(c0)
    return tl.philox(seed, c0, zero + position.to(tl.uint32), zero + (position >> 32).to(tl.uint32), zero + purpose)


@triton.jit
def _box_muller(word1, word2):
    """Return two fp32 normals from two words, as `normal` does."""
    u = ((word1 >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07  # 2^-23
    radius = tl.sqrt(-2.0 * tl.log(u))
    # The angle is turn / 2^24 turns: the nearest quarter, and x within an eighth of a turn of it.
    turn = ((word2 >> 9) * 2 + 1).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    x = (turn - (quarter << 22)).to(tl.float64) * 3.7450702829239286e-07  # 2 pi / 2^24
    sin, cos = _sin_cos(x)
    # Each quarter turns (cos, sin) into (-sin, cos).
    odd = (quarter & 1) == 1
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    first = tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = tl.where((quarter & 2) == 2, -second, second)
    return (radius * first).to(tl.float32), (radius * second).to(tl.float32)


@triton.jit
def _sin_cos(x):
    """Return sin x and cos x in fp64 for |x| <= pi / 4, as Taylor series whose first omitted term is below the last bit."""
    y = x * x
    sin = y * (1 / 355687428096000) - 1 / 1307674368000
    sin = sin * y + 1 / 6227020800
    sin = sin * y - 1 / 39916800
    sin = sin * y + 1 / 362880
    sin = sin * y - 1 / 5040
    sin = sin * y + 1 / 120
    sin = sin * y - 1 / 6
    cos = y * (1 / 20922789888000) - 1 / 87178291200
    cos = cos * y + 1 / 479001600
    cos = cos * y - 1 / 3628800
    cos = cos * y + 1 / 40320
    cos = cos * y - 1 / 720
    cos = cos * y + 1 / 24
    cos = cos * y - 1 / 2
    return x + x * y * sin, 1 + y * cos


@triton.jit
def _normals(seed, purpose, position, i_block, BLOCK: tl.constexpr):
    """Return 4 BLOCK consecutive normals of one sample."""
    blocks = i_block * BLOCK + tl.arange(0, BLOCK)
    word0, word1, word2, word3 = philox_words(seed, purpose, position, blocks)
    n0, n1 = _box_muller(word0, word1)
    n2, n3 = _box_muller(word2, word3)
    # join puts its arguments side by side along a new last dimension: [block, pair, lane of pair].
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * BLOCK])


# The positions of a micro-batch start at any multiple of 8 bytes, which needs no variant of its own.
@triton.jit(do_not_specialize=["seed", "purpose"], do_not_specialize_on_alignment=["position_ptr"])
def _normal(n_ptr, position_ptr, seed: tl.int64, purpose: tl.int32, count, BLOCK: tl.constexpr):
    n_blocks = tl.cdiv(count, 4 * BLOCK)
    i_sample, i_block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    eps = _normals(seed, purpose, tl.load(position_ptr + i_sample), i_block, BLOCK)
    offs = i_block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(n_ptr + i_sample.to(tl.int64) * count + offs, eps, offs < count)


@triton.jit(do_not_specialize=["seed", "purpose"], do_not_specialize_on_alignment=["position_ptr", "t_ptr"])
def _add_noise(
    x_ptr, xt_ptr, target_ptr, position_ptr, t_ptr, signal_ptr, sigma_ptr,
    seed: tl.int64, purpose: tl.int32, count,
    TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(count, 4 * BLOCK)
    i_sample, i_block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    eps = _normals(seed, purpose, tl.load(position_ptr + i_sample), i_block, BLOCK)
    t = tl.load(t_ptr + i_sample)
    signal, sigma = tl.load(signal_ptr + t), tl.load(sigma_ptr + t)
    offs = i_block * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    mask = offs < count
    start = i_sample.to(tl.int64) * count
    x = tl.load(x_ptr + start + offs, mask, other=0.0).to(tl.float32)
    tl.store(xt_ptr + start + offs, signal * x + sigma * eps, mask)
    if TARGET == 1:
        target = signal * eps - sigma * x
    elif TARGET == 2:
        target = eps - x
    else:
        target = eps
    tl.store(target_ptr + start + offs, target, mask)


# (blocks of four elements, warps) of a tile, for every architecture. One block a thread is 128 bits of fp32, and takes few
# registers, of which an fp64 number needs two. With 128 threads an image of 64x64x4 has 32 programs, and 4 images fill a GPU.
_TILE = (128, 4)


def _launch(
    kernel: Any, operands: tuple[Tensor, ...], seed: int, purpose: int, samples: int, count: int, **options: int
) -> None:
    block, warps = _TILE
    if samples * count:
        grid = (samples * triton.cdiv(count, 4 * block),)
        # Without fusing, x_t is two products and a sum, each of them rounded, as in PyTorch.
        options |= {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}
        launch(kernel, grid, *operands, seed, int(purpose), count, **options)


def normal_forward(seed: int, purpose: int, position_B: Tensor, shape: Sequence[int]) -> Tensor:
    """Return normals, fp32 (B, *shape), contiguous. seed: an int64, see `_signed`."""
    out = position_B.new_empty(len(position_B), *shape, dtype=torch.float32)
    _launch(_normal, (out, position_B.contiguous()), seed, purpose, len(out), math.prod(shape))
    return out


def add_noise_forward(
    latents_BCHW: Tensor, positions_B: Tensor, t_B: Tensor, signal_T: Tensor, sigma_T: Tensor, seed: int, target: int
) -> tuple[Tensor, Tensor]:
    """Return (x_t, target), fp32 (B, C, H, W), contiguous. seed: an int64, see `_signed`; target: a value of `TARGETS`."""
    x = latents_BCHW.contiguous()  # an element's noise follows from its place in this order: other layouts are copied
    x_t, target_BCHW = (torch.empty_like(x, dtype=torch.float32) for _ in range(2))
    operands = (x, x_t, target_BCHW, *(v.contiguous() for v in (positions_B, t_B, signal_T, sigma_T)))
    _launch(_add_noise, operands, seed, Purpose.NOISE, len(x), math.prod(x.shape[1:]), TARGET=target)
    return x_t, target_BCHW


_normal_op = custom_op("normal")(normal_forward)
_add_noise_op = custom_op("add_noise")(add_noise_forward)


@_normal_op.register_fake
def _(seed: int, purpose: int, position_B: Tensor, shape: Sequence[int]) -> Tensor:
    return position_B.new_empty(len(position_B), *shape, dtype=torch.float32)


@_add_noise_op.register_fake
def _(
    latents_BCHW: Tensor, positions_B: Tensor, t_B: Tensor, signal_T: Tensor, sigma_T: Tensor, seed: int, target: int
) -> tuple[Tensor, Tensor]:
    x_t, target_BCHW = (latents_BCHW.new_empty(latents_BCHW.shape, dtype=torch.float32) for _ in range(2))
    return x_t, target_BCHW


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as an int64, which ops and kernels take."""
    return seed - (seed >> 63 << 64)


def normal_triton(seed: int, purpose: int, position_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`normal` as one launch.

    Raises:
        ValueError: a device that runs no kernels.
    """
    require_device("normal", position_B)
    return _normal_op(_signed(seed), purpose, position_B, shape)


@torch.no_grad()
def add_noise_triton(
    latents_BCHW: Tensor,
    positions_B: Tensor,
    t_B: Tensor,
    signal_T: Tensor,
    sigma_T: Tensor,
    seed: int,
    *,
    prediction: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """`add_noise_reference` as one launch. A t outside the tables is not detected.

    Raises:
        ValueError: another prediction, a dtype that `add_noise_reference` does not name, or a device that runs no kernels.
    """
    target = _target(prediction)
    require_device("add_noise", latents_BCHW, positions_B, t_B, signal_T, sigma_T)
    if latents_BCHW.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"add_noise: latents are {latents_BCHW.dtype}; use float32, bfloat16 or float16")
    return _add_noise_op(latents_BCHW, positions_B, t_B, signal_T, sigma_T, _signed(seed), target)


def _normal_calls() -> Calls:
    for side in (64, 1):  # one number a channel, for a noise offset, takes narrow stores
        normal_forward(7, 0, meta(workload.BATCH, dtype=torch.int64), (4, side, side))
        yield f"4x{side}x{side}", "fp32"


def _add_noise_calls() -> Calls:
    position, table = meta(workload.BATCH, dtype=torch.int64), meta(1000)
    for target in TARGETS.values():
        add_noise_forward(meta(workload.BATCH, 4, 64, 64), position, position, table, table, 7, target)
        yield "4x64x64", "fp32"


NORMAL: Op[Normal] = Op(
    name="normal",
    reference=normal,
    triton=normal_triton,
    calls=_normal_calls,
    bytes=lambda count, _: 4 * count,
)
ADD_NOISE: Op[AddNoise] = Op(
    name="add_noise",
    reference=add_noise_reference,
    triton=add_noise_triton,
    calls=_add_noise_calls,
    bytes=lambda count, size: count * (size + 8),  # x_0 read, x_t and target written in fp32
)
