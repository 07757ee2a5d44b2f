"""Grids of kernels: legal for inputs of any size, and refused, also while recording, where CUDA would refuse them."""

import pytest
import torch
from sentences import refused

from fastsd_kernels import TRITON
from fastsd_kernels.attention import attention_backward, attention_forward
from fastsd_kernels.dlion import dlion_step
from fastsd_kernels.geglu import geglu_backward_in_place, geglu_forward
from fastsd_kernels.gradient_norm import norm_of_sums, square_sums
from fastsd_kernels.group_norm import group_norm_apply, group_norm_backward
from fastsd_kernels.group_norm_statistics import add_statistics, group_norm_statistics
from fastsd_kernels.launch import launch, meta, recording
from fastsd_kernels.layer_norm import layer_norm_backward, layer_norm_forward
from fastsd_kernels.noise import add_noise_forward, normal_forward


def attention(batch, queries, keys, head_dim=40):
    q, k = (meta(batch, rows, 8, head_dim) for rows in (queries, keys))
    o, lse = attention_forward(q, k, k, "tf32")
    attention_backward(o, q, k, k, o, lse, "tf32")


def group_norm(batch, channels, side):
    x = meta(batch, channels, side, side).to(memory_format=torch.channels_last)
    mean, rstd = group_norm_statistics(x, x, None, None, None, 32, 1e-5)
    w = meta(2 * channels)
    group_norm_apply(x, x, mean, rstd, w, w, 32, True, None)
    group_norm_backward(x, x, x, mean, rstd, w, w, 32, True, *(None,) * 5, False)
    add_statistics(x, None, x)


def layer_norm(rows):
    x, w = meta(rows, 320), meta(320)
    _, _, mean, rstd = layer_norm_forward(x, w, w, 1e-5)
    layer_norm_backward(x, x, mean, rstd, w)


def geglu(rows, features):
    geglu_forward(meta(rows, 2 * features))
    geglu_backward_in_place(meta(rows, features), meta(rows, 2 * features), True, True, [], False)


def noise(batch, side):
    positions, table = meta(batch, dtype=torch.int64), meta(1000)
    normal_forward(0, 0, positions, (4, side, side))
    add_noise_forward(meta(batch, 4, side, side), positions, positions, table, table, 0, 0)


def arena(elements):
    norm_of_sums(square_sums(meta(elements)))
    dlion_step(*(meta(elements) for _ in range(4)), meta(4), *[None] * 6, 0.9, 0.99)


HOSTILE = {
    "9000 images of 8 heads": (lambda: attention(9000, 64, 77), 3),
    "one image, 2**22 queries": (lambda: attention(1, 1 << 22, 77), 5),
    "one image, 2**22 keys": (lambda: attention(1, 64, 1 << 22), 3),
    "VAE at 4096 px": (lambda: group_norm(1, 128, 4096), 9),
    "70,000 images": (lambda: group_norm(70_000, 320, 8), 9),
    "2**22 rows": (lambda: layer_norm(1 << 22), 3),
    "2**22 gates": (lambda: geglu(1 << 22, 1280), 3),
    "rows of 2**25 gates": (lambda: geglu(3, 1 << 25), 3),
    "noise of 70,000 images": (lambda: noise(70_000, 64), 2),
    "noise of an image of 2**26": (lambda: noise(1, 1 << 12), 2),
    "2**36 parameters": (lambda: arena(1 << 36), 3),
}


@pytest.mark.parametrize("run, count", HOSTILE.values(), ids=HOSTILE)
def test_inputs_of_any_size_have_legal_grids(run, count):
    with recording(89) as launches:
        run()
    assert len(launches) == count
    for x in launches:
        assert x.grid[0] < 2**31 and max(x.grid[1:], default=1) <= 512, (x.kernel.__name__, x.grid)
    # The input is large enough for the test to mean something.
    assert max(x.grid[0] for x in launches) > 65535


class Kernel:
    __name__ = "_kernel"

    def __getitem__(self, grid):
        return lambda *arguments: self.grids.append(grid)

    grids = []


@pytest.mark.parametrize("grid", [(1 << 31,), (1, 65536), (1, 1, 65536), (1 << 31, 65536, 65536)])
def test_grids_that_cuda_refuses_are_refused(grid):
    message = {"kernel": "_kernel", "grid": " x ".join(map(str, grid)), "limit": "2147483647 x 65535 x 65535"}
    with refused("grid-too-large", ValueError, **message):
        launch(Kernel(), grid, torch.zeros(1))
    with recording(89) as launches, refused("grid-too-large", ValueError, **message):
        launch(Kernel(), grid, meta(1))
    assert launches == [] and Kernel.grids == []


def test_the_largest_grid_is_launched():
    launch(Kernel(), grid := ((1 << 31) - 1, 65535, 65535), torch.zeros(1))
    assert Kernel.grids == [grid]
    Kernel.grids.clear()


@pytest.mark.gpu
def test_attention_of_more_heads_than_a_grid_is_high():
    """Each of 70,000 heads, of one key, returns its value."""
    v = torch.randn(35_000, 1, 2, 8, device="cuda")
    assert torch.equal(TRITON.attention(v, v, v), v)
