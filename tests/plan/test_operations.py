"""Bytes and launches of a step: single operations against their formulas, and the committed totals of whole steps."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plan_check import SMALL
from traffic import RESULTS, STEPS, count

from fastsd.config.schema import StageTable
from fastsd.plan.operations import ARENA, BIAS_SUMS, CONV_BIAS, GROUPS, JOINS, OTHER, SUMS, UPDATE, Recorder, traffic
from fastsd.plan.plan import plan_stage
from fastsd.plan.rehearsal import WithoutData
from fastsd.train.memory import LiveBytes
from fastsd_kernels import TRITON
from fastsd_kernels.dlion import dlion_triton
from fastsd_kernels.launch import meta, recording

pytestmark = pytest.mark.skipif(TRITON is None, reason="the kernels of a GPU need Triton")


@pytest.fixture
def recorder():
    with recording(89) as launches, WithoutData():
        yield Recorder(launches)


@pytest.mark.parametrize("mode", [LiveBytes, Recorder, WithoutData])
def test_modes_are_called_without_the_compiler(mode):
    """PyTorch wraps the method of a mode that may not be compiled. The wrapper imports the compiler, which takes seconds."""
    assert not hasattr(mode.__torch_dispatch__, "__wrapped__")


def image(channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return meta(2, channels, 8, 8, dtype=dtype).to(memory_format=torch.channels_last)


def test_kernels_count_what_they_are_launched_with(recorder):
    x, weight, d = meta(2, 64, 2 * 96), meta(96), meta(dtype=torch.float64)
    p, g, m, s = (meta(4096) for _ in range(4))
    pixels = image(32)
    with recorder:
        y = TRITON.geglu(x)
        TRITON.layer_norm(y, weight, weight, 1e-5)
        TRITON.group_norm(pixels, meta(32), meta(32), 4, 1e-5)
        dlion_triton([p], [g], [m], [s], d, lr=1.0)
    rows = traffic(recorder.operations)
    assert rows["GEGLU"] == (4 * 3 * 2 * 64 * 96, 1)
    # x, y, weight, bias, mean and rstd.
    assert rows["LayerNorm"] == (4 * (2 * 2 * 64 * 96 + 2 * 96 + 2 * 2 * 64), 1)
    # The image is read for its statistics and again with y; the rest are sums of tiles.
    images, launches = rows["GroupNorm"]
    assert launches == 3 and 3 * 4 * pixels.numel() <= images < 3.5 * 4 * pixels.numel()
    # p, m and s are read and written, g is read; the rest are factors and partial sums.
    assert 28 * 4096 <= rows[UPDATE][0] < 28 * 4096 + 200 and rows[UPDATE][1] == 1


def test_operations_of_pytorch_have_groups_and_products_their_sizes(recorder):
    x, weight, matrix, arena = image(8), meta(16, 8, 3, 3).to(memory_format=torch.channels_last), meta(6, 8), meta(16)
    recorder.arenas = {arena.untyped_storage()._cdata}
    with recorder:
        y = F.conv2d(x, weight, meta(16), padding=1)
        torch.ops.aten.convolution_backward(y, x, weight, [16], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True] * 3)
        rows = F.linear(x.permute(0, 2, 3, 1).reshape(-1, 8), matrix)
        arena[:6].copy_(rows.sum(0))
        arena[:6].add_(rows[0])
        torch.sum(rows, 0, out=arena[:6])
        torch.mm(matrix[:4, :4], matrix[:4, :4], out=arena.view(4, 4))
        arena.view(4, 4).addmm_(matrix[:4, :2], matrix[:2, :4])
        torch.cat([x + x, x], 1).bfloat16()
    assert y.is_contiguous(memory_format=torch.channels_last)
    sizes = Counter({(op.kind, op.sizes): n for op, n in recorder.operations.items() if op.kind != "pass"})
    products = [("convolution", (1, 128, 16, 72)), ("convolution", (1, 128, 8, 144)), ("convolution", (1, 16, 72, 128))]
    assert sizes == Counter([*products, ("matmul", (1, 128, 6, 8)), ("matmul", (1, 4, 4, 4)), ("matmul", (1, 4, 4, 2))])
    passes = {group: row for group, row in traffic(recorder.operations).items() if group in GROUPS and row[1]}
    assert passes == {
        CONV_BIAS: (4 * 3 * y.numel(), 2),  # read and written, and its gradient read
        BIAS_SUMS: (2 * 4 * (rows.numel() + 6), 2),  # also those into an arena
        ARENA: (4 * (2 + 3) * 6, 2),
        SUMS: (4 * 3 * x.numel(), 1),
        JOINS: (4 * 4 * x.numel(), 1),
        OTHER: (6 * 2 * x.numel(), 1),
    }


def test_a_step_of_many_micro_batches_is_derived_from_two():
    shapes = replace(SMALL[0], unet=replace(SMALL[0].unet, block_out_channels=(32,), attention=(True,)))
    stage = StageTable.model_validate({"train": ["unet"], "until": 1, "batch": 3, "optimizer": "dlion"})
    plan = plan_stage(shapes, stage, SMALL[1], 0, cached_text=True)
    derived = traffic(plan.operations(1))
    assert derived == traffic(plan._rehearsals[False].step(1, "none", 3).operations)
    # The first micro-batch writes the gradients, which the others read, too.
    assert derived["everything"][0] > 3 * traffic(plan.need(1).operations)["everything"][0] - 3 * derived[UPDATE][0]


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_steps_move_the_committed_bytes(step):
    """When a change moves fewer bytes, run `python bench/traffic.py --write`. It is what keeps them from growing again."""
    assert json.loads(RESULTS.read_text())[step] == {name: list(row) for name, row in count(*STEPS[step]).items()}


def layouts(results):
    def layout(x):
        return x if x is None else (x.shape, x.stride(), x.storage_offset(), x.dtype, x.untyped_storage().nbytes())

    return list(map(layout, results if isinstance(results, (tuple, list)) else [results]))


def test_remembered_layouts_are_those_of_pytorch():
    """Only the second of two equal calls remembers. Arguments that are equal in Python, such as 1 and True, are told apart."""
    aten, x, matrix, integers = torch.ops.aten, meta(4, 6, 8), meta(6, 6), meta(5, dtype=torch.int64)
    backward = aten.convolution_backward, meta(2, 16, 2, 2), meta(2, 8, 4, 4), meta(16, 8, 3, 3), [16]
    convolution = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    views = [(aten.unbind, 1), (aten.slice, 1, 2, 4), (aten.view, [24, 8]), (aten.permute, [2, 0, 1]), (aten.select, 0, -1)]
    calls = [
        (aten.native_layer_norm, x, [8], meta(8), None, 1e-5),
        (aten.mul, x[:, :1], x.transpose(1, 2)[:, :6, :1]),
        *((aten.mul, integers, number) for number in (1, 1.0, True)),
        *((aten.cat, [x] * count, 1) for count in (2, 3)),
        *((*backward, *convolution, [flag, not flag, True]) for flag in (True, False)),
        (aten.sum, x, [1], True),
        (aten.unbind, x[:, :1], 1),
        (aten.empty_like, x.transpose(0, 2)),
        (aten.addmm_, matrix, matrix, matrix),
        *((function, base, *args) for base in (x, meta(9, 6, 8)[5:]) for function, *args in views),  # at any offset
    ]
    for function, *args in calls:
        expected = function(*args)
        with WithoutData():
            results = [function(*args) for _ in range(2)]
        for result in results:
            assert layouts(result) == layouts(expected) and type(result) is type(expected), function
    with WithoutData():
        assert all(x[:, 2:4].untyped_storage()._cdata == x.untyped_storage()._cdata for _ in range(2))
