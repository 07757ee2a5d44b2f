"""Noise generated in kernels: known answers of Philox, and normals and noisy latents with the reference's bits."""

import pytest
import torch
import triton
import triton.language as tl
from budget import nan_filled_memory
from environment import DEVICE
from philox import KNOWN
from sentences import refused

from fastsd.train.objective import Objective
from fastsd_kernels.launch import launch
from fastsd_kernels.noise import (
    TARGETS,
    Purpose,
    add_noise_reference,
    add_noise_triton,
    normal,
    normal_triton,
    philox,
    philox_words,
)

pytestmark = [pytest.mark.kernels, pytest.mark.slow]

POSITIONS = torch.tensor([0, 5, 2**33 + 1, 17, -1, 2**62 + 12345], device=DEVICE)


@triton.jit(do_not_specialize=["seed", "purpose", "first"])
def _words(out_ptr, position_ptr, seed: tl.int64, purpose: tl.int64, first: tl.int64, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    words = philox_words(seed, purpose.to(tl.uint32), tl.load(position_ptr), first + offs)
    for lane in tl.static_range(4):
        tl.store(out_ptr + offs * 4 + lane, words[lane].to(tl.int64))


def words(seed, purpose, position, first, count):
    out = torch.empty(count, 4, dtype=torch.int64, device=DEVICE)
    position_1 = torch.tensor([position], device=DEVICE)
    launch(_words, (1,), out, position_1, seed - (seed >> 63 << 64), purpose, first, BLOCK=count)
    return out


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_philox_known_answers(counter, key, expected):
    position = counter[1] | counter[2] << 32
    position -= (position >> 63) << 64  # as int64
    assert words(key[0] | key[1] << 32, counter[3], position, counter[0], 1).flatten().tolist() == list(expected)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**40 + 3, 2**63, 2**64 - 1])
def test_words_equal_philox(seed):
    for position in (0, 16, 2**33 + 1, 2**63 - 1, -(2**63)):
        expected = philox(seed, Purpose.SAMPLE, torch.tensor([position]), torch.arange(64))[0]
        assert torch.equal(words(seed, Purpose.SAMPLE, position, 0, 64).cpu(), expected)


@pytest.mark.parametrize("shape", [(1,), (63,), (3, 5, 7), (4, 16, 16), (1025,), (0,)])
def test_normals_equal_the_reference(shape):
    for seed, purpose in ((7, Purpose.NOISE), (2**64 - 1, Purpose.SAMPLE)):
        with nan_filled_memory():
            ours = normal_triton(seed, purpose, POSITIONS, shape)
        assert torch.equal(ours.cpu(), normal(seed, purpose, POSITIONS.cpu(), shape))
    assert normal_triton(7, Purpose.NOISE, POSITIONS[:0], shape).shape == (0, *shape)


def test_last_bits_of_100_000_normals():
    ours = normal_triton(3, Purpose.NOISE, torch.arange(7, device=DEVICE), (4, 64, 64)).cpu()
    reference = normal(3, Purpose.NOISE, torch.arange(7), (4, 64, 64))
    differ = (ours != reference).sum().item()
    print(f"{differ} of {ours.numel()} normals differ, by {(ours - reference).abs().max():.1e} at most")
    # Both round from fp64, so about one in 10^7 is rounded in the other direction.
    assert differ <= 1
    torch.testing.assert_close(ours, reference, rtol=2.0**-22, atol=0)


def objective_and_latents(dtype=torch.float32, shape=(4, 16, 24)):
    gen = torch.Generator().manual_seed(0)
    abar = torch.linspace(0.9999, 0.0047, 1000)
    objective = Objective(abar.to(DEVICE), 11)
    latents = torch.randn(len(POSITIONS), *shape, generator=gen).to(DEVICE, dtype)
    return objective, latents


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 16, 24), (3, 5, 7), (16, 1, 1)])
def test_add_noise_equals_objective(shape, dtype):
    objective, latents = objective_and_latents(dtype, shape)
    noisy, t_B, eps = objective.add_noise(latents.float(), POSITIONS)
    tables = objective.signal, objective.level, 11
    with nan_filled_memory():
        x_t, target = add_noise_triton(latents, POSITIONS, t_B, *tables)
    reference = add_noise_reference(latents, POSITIONS, t_B, *tables)
    assert x_t.dtype == target.dtype == torch.float32
    for ours, *others in ((x_t, noisy, reference[0]), (target, eps, reference[1])):
        assert all(torch.equal(ours, other) for other in others)
    x_v, velocity = add_noise_triton(latents, POSITIONS, t_B, *tables, prediction="v_prediction")
    reference = add_noise_reference(latents, POSITIONS, t_B, *tables, prediction="v_prediction")
    assert torch.equal(x_v, x_t) and torch.equal(velocity, reference[1])
    signal, sigma = (table_T[t_B][:, None, None, None] for table_T in (objective.signal, objective.level))
    assert torch.equal(noisy, signal * latents.float() + sigma * eps)
    torch.testing.assert_close(velocity, signal * eps - sigma * latents.float(), rtol=0, atol=0)
    x_s, flow = add_noise_triton(latents, POSITIONS, t_B, *tables, prediction="flow")
    reference = add_noise_reference(latents, POSITIONS, t_B, *tables, prediction="flow")
    assert torch.equal(x_s, x_t) and torch.equal(flow, reference[1]) and torch.equal(flow, eps - latents.float())


def test_a_number_does_not_depend_on_batch_or_strides():
    objective, latents = objective_and_latents()
    _, t_B, _ = objective.add_noise(latents, POSITIONS)
    tables = objective.signal, objective.level, 11
    whole = add_noise_triton(latents, POSITIONS, t_B, *tables)
    rows = [add_noise_triton(latents[i : i + 1], POSITIONS[i : i + 1], t_B[i : i + 1], *tables) for i in range(len(t_B))]
    for together, single in zip(whole, zip(*rows, strict=True), strict=True):
        assert torch.equal(together, torch.cat(single))
    strided_t = torch.stack((t_B, t_B), dim=1)[:, 0]
    for other in (latents.contiguous(memory_format=torch.channels_last), latents.flip(3).flip(3), latents[..., :]):
        x_t, target = add_noise_triton(other, POSITIONS, strided_t, *tables)
        assert torch.equal(x_t, whole[0]) and torch.equal(target, whole[1])


def test_opcheck():
    objective, latents = objective_and_latents(shape=(3, 5, 7))
    t_B = torch.zeros(len(latents), dtype=torch.int64, device=DEVICE)
    operands = (latents, POSITIONS, t_B, objective.signal, objective.level, -3)
    for target in TARGETS.values():
        torch.library.opcheck(torch.ops.fastsd.add_noise.default, (*operands, target))
    torch.library.opcheck(torch.ops.fastsd.normal.default, (7, 4, POSITIONS, (3, 5, 7)))


def test_unusable_inputs_are_refused():
    objective, latents = objective_and_latents()
    rest = POSITIONS, torch.zeros_like(POSITIONS), objective.signal, objective.level, 0
    for function in (add_noise_reference, add_noise_triton):
        with refused("prediction-type", ValueError, prediction="x0"):
            function(latents, *rest, prediction="x0")
    with refused("latents-dtype", ValueError, dtype="torch.float64"):
        add_noise_triton(latents.double(), *rest)
    with refused("operand-devices", ValueError, op="add_noise"):
        add_noise_triton(latents.to("meta"), *rest)
