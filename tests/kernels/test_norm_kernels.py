"""The GEGLU, LayerNorm and GroupNorm kernels: errors in the workload, odd shapes and layouts, and determinism.

The kernels run on a GPU if there is one, otherwise in Triton's interpreter.
"""

from collections import Counter

import pytest
import torch
from budget import check_budget
from environment import DEVICE
from sentences import refused
from torch import nn

from fastsd_kernels import workload
from fastsd_kernels.forward_backward import REFERENCE_FORWARD_BACKWARD, TRITON_FORWARD_BACKWARD
from fastsd_kernels.geglu import as_rows, geglu_reference, geglu_triton
from fastsd_kernels.group_norm import group_norm_backward, group_norm_reference, group_norm_triton
from fastsd_kernels.group_norm_statistics import add_statistics_op, group_norm_statistics, partial_statistics
from fastsd_kernels.layer_norm import layer_norm_reference, layer_norm_triton
from fastsd_kernels.partial_sums import column_sums

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
CHANNELS_LAST = torch.channels_last
OPS = torch.ops.fastsd
# NumPy warns about the sigmoid of large negative numbers, where 1 / (1 + inf) = 0 is correct.
pytestmark = [pytest.mark.kernels, pytest.mark.slow, pytest.mark.filterwarnings("ignore:overflow encountered in exp2")]


def normal(*shape: int, dtype=torch.float32, mean=0.0, std=1.0, seed=0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return (mean + std * x).to(dtype).to(DEVICE)


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# GEGLU


@DTYPES
@pytest.mark.parametrize("kind", workload.GEGLU, ids=str)
def test_geglu_kinds(kind, dtype):
    x = normal(2, 3, 2 * kind.features, dtype=dtype, std=2)
    check_budget(f"{kind} {dtype}", geglu_triton, geglu_reference, {"x_2F": x})


@DTYPES
@pytest.mark.parametrize("rows, features", [(1, 7), (63, 1), (77, 97), (97, 300), (1025, 24)])
def test_geglu_odd_sizes(rows, features, dtype):
    x = normal(rows, 2 * features, dtype=dtype, std=2)
    check_budget(f"geglu {rows} x {features} {dtype}", geglu_triton, geglu_reference, {"x_2F": x})


@DTYPES
def test_geglu_layouts(dtype):
    wide = normal(2, 5, 100, dtype=dtype)
    sliced = wide[..., 8:72]
    assert as_rows(sliced).data_ptr() == sliced.data_ptr()  # used in place
    for x in (sliced, wide.transpose(0, 1), wide.transpose(1, 2)[..., :4], wide[..., ::2], wide[0, 0]):
        check_budget(f"geglu strides {x.stride()} {dtype}", geglu_triton, geglu_reference, {"x_2F": x})


@DTYPES
@pytest.mark.parametrize("rows, features", [(1, 7), (77, 97), (130, 24)])
def test_geglu_backward_gives_its_output_and_sums(rows, features, dtype):
    x, dy = normal(rows, 2 * features, dtype=dtype, std=2), normal(rows, features, dtype=dtype)
    value, gate = x.double().chunk(2, dim=-1)
    dgate = torch.ops.aten.gelu_backward(dy.double() * value, gate)
    exact = torch.cat([dy * nn.functional.gelu(gate), dgate], dim=-1).sum(0)
    dx, y, sums = OPS.geglu_backward(dy, x), geglu_triton(x), None
    pytorch_error = (dx.sum(0).double() - exact).norm()
    for output, summed in ((True, True), (True, False), (False, True), (False, False)):
        overwritten = dy.clone()
        results = TRITON_FORWARD_BACKWARD.geglu_backward(overwritten, x, output=output, sums=summed)
        assert torch.equal(results[0], dx)
        assert torch.equal(results[1], y) if output else results[1] is None
        assert torch.equal(overwritten, y if output else dy)
        if not summed:
            assert results[2] is None
            continue
        assert sums is None or torch.equal(results[2], sums)
        sums = results[2]
        assert (sums.double() - exact).norm() <= 2 * pytorch_error and sums.dtype == dtype


# LayerNorm


def layer_norm_of(function, eps=1e-5):
    return lambda x, weight, bias, **residual: function(x, weight, bias, eps, **residual)


def check_layer_norm(label, inputs, eps=1e-5, reference_inputs=None):
    kernel, reference = (layer_norm_of(function, eps) for function in (layer_norm_triton, layer_norm_reference))
    check_budget(label, kernel, reference, inputs, reference_inputs=reference_inputs)


def layer_norm_inputs(*shape: int, dtype, residual=False, mean=0.5, parameters=None):
    vectors = {name: normal(shape[-1], dtype=parameters or dtype, seed=i) for i, name in enumerate(("weight", "bias"))}
    inputs = {"x": normal(*shape, dtype=dtype, mean=mean, std=2), **vectors}
    return inputs | ({"residual": normal(*shape, dtype=dtype, seed=2)} if residual else {})


@DTYPES
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", workload.LAYER_NORM, ids=str)
def test_layer_norm_kinds(kind, residual, dtype):
    inputs = layer_norm_inputs(2, 5, kind.features, dtype=dtype, residual=residual)
    check_layer_norm(f"{kind} {dtype}", inputs, kind.eps)


@DTYPES
@pytest.mark.parametrize("rows, features, residual", [(63, 1, True), (77, 520, False), (97, 97, True), (2, 8191, False)])
def test_layer_norm_odd_sizes(rows, features, residual, dtype):
    inputs = layer_norm_inputs(rows, features, dtype=dtype, residual=residual)
    check_layer_norm(f"layer_norm {rows} x {features} {dtype}", inputs)


def test_layer_norm_of_many_rows():
    inputs = layer_norm_inputs(1025, 24, dtype=torch.bfloat16, residual=True)
    check_layer_norm("layer_norm 1025 x 24", inputs)


@DTYPES
def test_layer_norm_of_one_row(dtype):
    def by_row(function):
        # The error of one rstd is a single random draw, but a budget needs several.
        return lambda x, weight, bias: torch.cat([function(row, weight, bias, 1e-5) for row in x.split(1)])

    inputs = layer_norm_inputs(16, 33, dtype=dtype)
    check_budget(f"layer_norm 1 x 33 {dtype}", by_row(layer_norm_triton), by_row(layer_norm_reference), inputs)


@pytest.mark.parametrize("mean, dtype", [(1000.0, torch.float32), (64.0, torch.bfloat16)], ids=["fp32", "bf16"])
def test_layer_norm_where_the_mean_is_large(mean, dtype):
    inputs = layer_norm_inputs(9, 320, dtype=dtype, mean=mean)
    check_layer_norm(f"layer_norm mean {mean}", inputs)


def test_layer_norm_with_fp32_parameters():
    inputs = layer_norm_inputs(9, 320, dtype=torch.bfloat16, residual=True, parameters=torch.float32)
    bf16_inputs = {name: x.bfloat16() for name, x in inputs.items()}  # PyTorch's kernels on a GPU take one dtype
    check_layer_norm("layer_norm bf16, fp32 parameters", inputs, reference_inputs=bf16_inputs)


@DTYPES
def test_layer_norm_layouts(dtype):
    wide = normal(2, 5, 100, dtype=dtype)
    for x in (wide[..., 8:72], wide.transpose(0, 1), wide.transpose(1, 2), wide[..., ::2], wide[0, 0]):
        inputs = layer_norm_inputs(*x.shape, dtype=dtype) | {"x": x, "residual": x.flip(0)}
        inputs["weight"] = normal(2 * x.shape[-1], dtype=dtype)[::2]
        check_layer_norm(f"layer_norm strides {x.stride()} {dtype}", inputs)


def test_layer_norm_when_one_output_is_used():
    x, residual = normal(5, 40).requires_grad_(), normal(5, 40, seed=1).requires_grad_()
    weight, bias, upstream = normal(40).requires_grad_(), normal(40, seed=1).requires_grad_(), normal(5, 40, seed=2)
    leaves = (x, residual, weight, bias)
    for used in (0, 1):
        ours, expected = (
            torch.autograd.grad(f(x, weight, bias, 1e-5, residual=residual)[used], leaves, upstream, materialize_grads=True)
            for f in (layer_norm_triton, layer_norm_reference)
        )
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b)


@DTYPES
@pytest.mark.parametrize("rows, features, added", [(1, 33, True), (70, 40, False), (130, 320, True)])
def test_layer_norm_backward_gives_its_output(rows, features, added, dtype):
    x, weight, bias, ds = layer_norm_inputs(rows, features, dtype=dtype, residual=True).values()
    dy, (y, mean, rstd) = normal(rows, features, dtype=dtype, seed=3), OPS.layer_norm(x, weight, bias, 1e-5)
    inputs = x, mean, rstd, weight, bias, 1e-5, ds if added else None
    backward = TRITON_FORWARD_BACKWARD.layer_norm_backward
    *expected, no_sum, no_output = backward(overwritten := dy.clone(), *inputs, output=False)
    assert no_sum is no_output is None and torch.equal(overwritten, dy)
    *gradients, dx_sum, rebuilt = backward(overwritten, *inputs, output=True, sums=True)
    assert equal(gradients, expected) and torch.equal(rebuilt, y) and torch.equal(overwritten, y)

    def plain_sum(dtype):
        values = [None if value is None else value.to(dtype) for value in (dy, x, weight, bias, inputs[-1])]
        _, s, *statistics = REFERENCE_FORWARD_BACKWARD.layer_norm(*values[1:4], 1e-5, None)
        arguments = values[0], s, *statistics, *values[2:4], 1e-5, values[4]
        return REFERENCE_FORWARD_BACKWARD.layer_norm_backward(*arguments, output=False, sums=True)[3].double()

    exact = plain_sum(torch.float64)
    rounding = (exact.to(dtype).double() - exact).norm()
    assert (dx_sum.double() - exact).norm() <= 2 * max((plain_sum(dtype) - exact).norm(), rounding)


def test_references_rebuild_the_output_of_the_forward():
    x, weight, bias, ds = layer_norm_inputs(9, 40, dtype=torch.bfloat16, residual=True).values()
    ops = REFERENCE_FORWARD_BACKWARD
    y, s, mean, rstd = ops.layer_norm(x, weight, bias, 1e-2, None)
    assert torch.equal(ops.layer_norm_backward(ds, s, mean, rstd, weight, bias, 1e-2, None, output=True)[4], y)
    dx, gated, sums = ops.geglu_backward(ds[:, :20], x, output=True, sums=True)
    assert torch.equal(gated, ops.geglu(x)) and torch.equal(sums, dx.sum(0))


def test_reference_rounds_the_residual_sum():
    x, weight, bias, _ = layer_norm_inputs(5, 40, dtype=torch.bfloat16, residual=True).values()
    residual = normal(5, 40)  # fp32: the sum is rounded to the dtype of x
    y, s = layer_norm_reference(x, weight, bias, 1e-5, residual=residual)
    assert torch.equal(s, (x.float() + residual).bfloat16())
    assert torch.equal(y, layer_norm_reference(s, weight, bias, 1e-5))
    assert torch.equal(layer_norm_triton(x, weight, bias, 1e-5, residual=residual)[1], s)


# GroupNorm


def group_norm_of(function, groups, eps=1e-5, silu=True):
    return lambda x, weight, bias, shift_BC=None: function(x, weight, bias, groups, eps, silu=silu, shift_BC=shift_BC)


def group_norm_inputs(*shape: int, dtype, shift=False, mean=0.5, parameters=None):
    vectors = {name: normal(shape[1], dtype=parameters or dtype, seed=i) for i, name in enumerate(("weight", "bias"))}
    inputs = {"x": normal(*shape, dtype=dtype, mean=mean, std=2).to(memory_format=CHANNELS_LAST), **vectors}
    return inputs | ({"shift_BC": normal(*shape[:2], dtype=parameters or dtype, seed=2)} if shift else {})


def check_group_norm(label, groups, inputs, eps=1e-5, silu=True, reference_inputs=None):
    kernel, reference = (group_norm_of(f, groups, eps, silu) for f in (group_norm_triton, group_norm_reference))
    check_budget(label, kernel, reference, inputs, reference_inputs=reference_inputs)


ALL_KINDS = (*workload.GROUP_NORM, *workload.VAE_GROUP_NORM, *workload.VAE_ENCODER_GROUP_NORM)
# All sides are two, so kinds that differ only in the side are tested once.
GROUP_NORM_KINDS = sorted({kind._replace(side=2) for kind in ALL_KINDS}, reverse=True)


@DTYPES
@pytest.mark.parametrize("kind", GROUP_NORM_KINDS, ids=lambda k: f"{k.channels}-{k.eps}-silu{k.silu:d}-shift{k.shift:d}")
def test_group_norm_kinds(kind, dtype):
    # The interpreter takes milliseconds a program, so only the tests below have several images, each with its own shift.
    inputs = group_norm_inputs(1, kind.channels, kind.side, kind.side, dtype=dtype, shift=kind.shift)
    check_group_norm(f"{kind} {dtype}", kind.groups, inputs, kind.eps, kind.silu)


@DTYPES
@pytest.mark.parametrize(
    "images, channels, height, width, groups, shift",
    [
        (2, 64, 1, 1, 2, True),
        (2, 35, 7, 9, 5, True),
        (1, 66, 7, 11, 3, False),
        (3, 6, 1, 97, 1, True),
        (1, 12, 41, 25, 2, False),
        (1, 1, 9, 7, 1, False),  # a group of one channel cancels any shift
    ],
)
def test_group_norm_odd_sizes(images, channels, height, width, groups, shift, dtype):
    inputs = group_norm_inputs(images, channels, height, width, dtype=dtype, shift=shift)
    check_group_norm(f"group_norm {images}x{channels}x{height}x{width} {dtype}", groups, inputs)


@pytest.mark.parametrize("mean, dtype", [(1000.0, torch.float32), (64.0, torch.bfloat16)], ids=["fp32", "bf16"])
def test_group_norm_where_the_mean_is_large(mean, dtype):
    inputs = group_norm_inputs(2, 40, 7, 11, dtype=dtype, mean=mean, shift=True)
    check_group_norm(f"group_norm mean {mean}", 4, inputs)
    inputs["shift_BC"] = inputs["shift_BC"] + torch.full_like(inputs["shift_BC"], -mean)
    check_group_norm(f"group_norm mean {mean}, cancelled", 4, inputs)


def test_group_norm_with_fp32_parameters():
    inputs = group_norm_inputs(2, 40, 5, 5, dtype=torch.bfloat16, shift=True, parameters=torch.float32)
    bf16_inputs = {name: x.bfloat16() for name, x in inputs.items()}
    check_group_norm("group_norm bf16, fp32 parameters", 4, inputs, reference_inputs=bf16_inputs)


@DTYPES
def test_group_norm_layouts(dtype):
    wide = normal(2, 16, 6, 5, dtype=dtype)
    last = wide.to(memory_format=CHANNELS_LAST)
    for x in (wide, last[:, 4:12], last.transpose(2, 3), last[:, :, ::2], wide[:1].expand(3, -1, -1, -1)):
        inputs = group_norm_inputs(*x.shape, dtype=dtype, shift=True) | {"x": x}
        inputs["weight"] = normal(2 * x.shape[1], dtype=dtype)[::2]
        inputs["shift_BC"] = normal(x.shape[1], len(x), dtype=dtype).t()
        check_group_norm(f"group_norm strides {x.stride()} {dtype}", 2, inputs)
    y = group_norm_triton(wide.requires_grad_(), *normal(2, 16, dtype=dtype), 2, 1e-5)
    (dx,) = torch.autograd.grad(y, wide, wide.detach())  # dy in the other layout
    assert y.is_contiguous(memory_format=CHANNELS_LAST) and dx.shape == wide.shape


def test_an_image_does_not_depend_on_its_batch():
    x, weight, bias, shift = group_norm_inputs(3, 96, 9, 5, dtype=torch.bfloat16, shift=True).values()
    dy = normal(*x.shape, dtype=x.dtype, seed=5)

    def run(rows):
        mean, rstd = group_norm_statistics(x[rows], None, None, None, shift[rows], 4, 1e-5)
        norm = mean, rstd, weight, bias, 4, True, shift[rows]
        dx, _, _, _, dshift = group_norm_backward(dy[rows], x[rows], None, *norm, *(None,) * 4, False)
        return mean, rstd, dx, dshift

    together = run(slice(0, 3))
    assert equal(run(slice(1, 2)), [value[1:2] for value in together])


@DTYPES
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("channels, skip_channels, groups", [(64, 128, 12), (35, 29, 4), (1, 7, 2)])
def test_two_images_have_the_bits_of_a_concatenated_one(channels, skip_channels, groups, silu, dtype):
    """A group may have channels of both, and no image needs whole tiles."""
    total, ops = channels + skip_channels, TRITON_FORWARD_BACKWARD
    joined, weight, bias = group_norm_inputs(2, total, 5, 7, dtype=dtype).values()
    dy = normal(2, total, 5, 7, dtype=dtype, seed=3).to(memory_format=CHANNELS_LAST)
    runs = []
    for images in ((joined,), joined.split([channels, skip_channels], dim=1)):
        y, mean, rstd = ops.group_norm(images, weight, bias, groups, 1e-5, None, silu=silu)
        norm = mean, rstd, weight, bias, groups, 1e-5, None
        recomputed = ops.group_norm_recompute(images, *norm, silu=silu)
        backward = ops.group_norm_backward(dy.clone(), images, *norm, silu=silu, through=None, output=True)
        dimages, *gradients, _, output = backward
        runs.append((y, mean, rstd, torch.cat(dimages, dim=1), *gradients, output))
        assert torch.equal(recomputed, y) and torch.equal(output, y)
    assert equal(*runs)


@DTYPES
def test_the_gradient_of_a_residual_is_added_before_rounding(dtype):
    """It is a gradient of x beside that of the norm, as in h(norm(x)) + x."""

    def both_of(function):
        return lambda x, weight, bias: (function(x, weight, bias, 4, 1e-5), x * 1)

    class WithResidual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias, groups, eps):
            norm = weight, bias, groups, eps, None
            y, mean, rstd = TRITON_FORWARD_BACKWARD.group_norm((x,), *norm, silu=False)
            ctx.save_for_backward(x, mean, rstd)
            ctx.norm = norm
            return y, x * 1

        @staticmethod
        def backward(ctx, dy, dx):
            x, mean, rstd = ctx.saved_tensors
            options = {"silu": False, "through": dx, "output": False}
            run = TRITON_FORWARD_BACKWARD.group_norm_backward(dy, (x,), mean, rstd, *ctx.norm, **options)
            (dx,), dweight, dbias, _, _ = run
            return dx, dweight, dbias, None, None

    inputs = group_norm_inputs(2, 40, 5, 7, dtype=dtype)
    label, reference = f"group_norm with a residual {dtype}", both_of(group_norm_reference)
    check_budget(label, lambda *tensors, **named: WithResidual.apply(*tensors, *named.values(), 4, 1e-5), reference, inputs)


@DTYPES
@pytest.mark.parametrize("images, channels, height, width", [(2, 70, 7, 9), (1, 64, 23, 24), (1, 5, 1, 1)])
@pytest.mark.parametrize("with_bias, with_residual", [(True, True), (False, True), (True, False)])
def test_sums_have_the_statistics_that_the_norm_would_take(images, channels, height, width, with_bias, with_residual, dtype):
    h, residual = (normal(images, channels, height, width, dtype=dtype, mean=3.0, seed=i) for i in (0, 1))
    inputs = {"h": h.to(memory_format=CHANNELS_LAST)} | ({"bias": normal(channels, dtype=dtype)} if with_bias else {})
    inputs |= {"residual": residual} if with_residual else {}  # in the other layout

    def sum_of(function):
        return lambda h, bias=None, residual=None: function(h, bias, residual)[0]

    reference = REFERENCE_FORWARD_BACKWARD.add_statistics
    check_budget(f"add {list(inputs)} {dtype}", sum_of(add_statistics_op), sum_of(reference), inputs)
    out, partial = add_statistics_op(*(inputs.get(name) for name in ("h", "bias", "residual")))
    assert out.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(partial, partial_statistics(out, None))


# All three


@DTYPES
@pytest.mark.parametrize("rows, columns", [(1, 1), (63, 33), (64, 32), (200, 70), (0, 5), (3, 0)])
def test_column_sums(rows, columns, dtype):
    x = normal(rows, 2 * columns)
    (y,), exact = column_sums(x, 1, dtype), x.double().sum(0)
    assert y.dtype == dtype
    assert equal(column_sums(x, 2, dtype), y.split(columns) if columns else (y, y))
    rounding = max((exact.to(dtype) - exact).norm(), (x.sum(0).to(dtype) - exact).norm())
    assert (y - exact).norm() <= 2 * rounding
    memory = normal(3, columns + 8).unbind()  # fp32, for gradients of any dtype
    first, second = (vector[4 : 4 + columns] for vector in memory[:2])
    before = [vector.clone() for vector in memory]
    assert column_sums(x, 2, dtype, ([first, second], True))[0] is first
    added = torch.cat([first - before[0][4:-4], second - before[1][4:-4]])
    assert torch.allclose(added.double(), exact, atol=1e-4)
    column_sums(x, 2, dtype, ([first, second], False))
    assert equal((first, second), column_sums(x, 2, torch.float32))
    first[:], second[:] = before[0][4:-4], before[1][4:-4]
    assert equal(memory, before)  # nothing around the vectors is written


def runs(dtype=torch.bfloat16):
    """Return the function and the differentiable inputs of each op, by name."""
    layer = layer_norm_inputs(70, 40, dtype=dtype, residual=True)
    group = group_norm_inputs(2, 40, 5, 7, dtype=dtype, shift=True)
    return {
        "geglu": (geglu_triton, {"x_2F": normal(9, 80, dtype=dtype)}),
        "layer_norm": (layer_norm_of(layer_norm_triton), layer),
        "group_norm": (group_norm_of(group_norm_triton, 4), group),
    }


@pytest.mark.parametrize("op", ["geglu", "layer_norm", "group_norm"])
def test_gradients_are_deterministic_and_may_be_expanded(op):
    function, inputs = runs()[op]
    leaves = [x.requires_grad_() for x in inputs.values()]
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [torch.ones_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    for _ in range(2 if DEVICE == "cpu" else 20):
        assert equal(torch.autograd.grad(outputs, leaves, upstream, retain_graph=True), gradients)
    # The gradient of a sum has strides of zero.
    assert equal(torch.autograd.grad(sum(y.sum() for y in outputs), leaves), gradients)


@DTYPES
def test_recomputed_outputs_have_the_same_bits(dtype):
    x, weight, bias, residual = layer_norm_inputs(70, 40, dtype=dtype, residual=True).values()
    y, s, mean, rstd = OPS.layer_norm_residual(x, residual, weight, bias, 1e-5)
    assert torch.equal(OPS.layer_norm_apply(s, mean, rstd, weight, bias), y)
    y, mean, rstd = OPS.layer_norm(x, weight, bias, 1e-5)
    assert torch.equal(OPS.layer_norm_apply(x, mean, rstd, weight, bias), y)

    x, weight, bias, shift = group_norm_inputs(2, 40, 5, 7, dtype=dtype, shift=True).values()
    y, mean, rstd = OPS.group_norm(x, weight, bias, 4, 1e-5, True, shift, None, None, None)
    assert equal(group_norm_statistics(x, None, None, None, shift, 4, 1e-5), (mean, rstd))
    norm = mean, rstd, weight, bias, 4, True, shift
    assert torch.equal(OPS.group_norm_apply(x, None, *norm), y)
    dy = normal(*x.shape, dtype=dtype, seed=3).to(memory_format=CHANNELS_LAST)
    gradients = OPS.group_norm_backward(dy, x, None, *norm, *(None,) * 4, False)
    assert equal(OPS.group_norm_backward(dy, x, None, *norm, None, dy, None, None, False), gradients)
    assert torch.equal(dy, y)  # the memory of dy


@DTYPES
def test_only_the_input_is_saved_for_backward(dtype):
    saved = []
    for function, inputs in runs(dtype).values():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            function(**{name: x.requires_grad_() for name, x in inputs.items()})
        input_size = max(x.numel() for x in inputs.values())
        assert sum(x.numel() >= input_size for x in saved) == 1  # x, or its sum with the residual
        saved.clear()


def test_opcheck():
    x, r, w, b = (t.requires_grad_() for t in (normal(5, 6), normal(5, 6, seed=1), normal(6), normal(6, seed=1)))
    plain = [t.detach() for t in (x, r, w, b)]
    _, mean, rstd = OPS.layer_norm(*plain[::2], plain[3], 1e-5)
    image, shift = normal(2, 6, 2, 3).to(memory_format=CHANNELS_LAST), normal(2, 6)
    statistics = group_norm_statistics(image, None, None, None, shift, 3, 1e-5)
    norm = *statistics, *plain[2:], 3, True
    differentiable = [t.clone().requires_grad_() for t in (image, w, b)]
    in_place = plain[1].clone(), plain[0], mean, rstd, *plain[2:]
    cases = [
        ("geglu", (x,)),
        ("geglu_backward", (normal(5, 3), plain[0])),
        ("layer_norm", (x, w, b, 1e-5)),
        ("layer_norm_residual", (x, r, w, b, 1e-5)),
        ("layer_norm_apply", (plain[0], mean, rstd, *plain[2:])),
        ("layer_norm_backward", (plain[1], plain[0], mean, rstd, plain[2], plain[1])),
        ("layer_norm_backward_in_place", (*in_place, plain[1], True, False, [], False)),
        ("layer_norm_backward_in_place", (*in_place, None, False, True, [normal(6), normal(6), normal(6)], True)),
        ("geglu_backward_in_place", (normal(5, 3), plain[0], True, True, [], False)),
        ("geglu_backward_in_place", (normal(5, 3), plain[0], False, True, [normal(6)], False)),
        ("group_norm", (*differentiable, 3, 1e-5, True, shift.clone().requires_grad_(), None, None, None)),
        ("group_norm_apply", (image, None, *norm, shift)),
        ("group_norm_backward", (image.contiguous(), image, None, *norm, shift, *(None,) * 4, False)),
        (
            "group_norm_backward",
            (image, image, None, *statistics, *plain[2:], 3, True, None, image, torch.empty_like(image), None, None, False),
        ),
        ("group_norm_backward", (image, image, None, *norm, None, None, None, normal(6), normal(6), True)),
        ("add_statistics", tuple(t.clone().requires_grad_() for t in (image, b, image))),
    ]
    for name, arguments in cases:
        torch.library.opcheck(getattr(OPS, name).default, arguments)


def test_vae_workload_equals_the_norms_of_diffusers_vae():
    from diffusers import AutoencoderKL

    counts = Counter()

    def count_norm(name):
        def hook(module, inputs, output):
            (x,) = inputs  # (B, C, H, W), or in attention (B, C, H*W)
            side = x.shape[2] if x.ndim == 4 else round(x.shape[2] ** 0.5)
            # SiLU follows every norm except that of attention.
            silu = not name.endswith("group_norm")
            counts[workload.GroupNorm(x.shape[1], side, module.num_groups, module.eps, silu, False)] += 1

        return hook

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
        for name, module in vae.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_hook(count_norm(name))
        vae(torch.empty(1, 3, 512, 512))
    assert counts == workload.VAE_GROUP_NORM


def test_unusable_inputs_are_refused():
    x, image = torch.zeros(2, 6, device=DEVICE), torch.zeros(1, 6, 2, 2, device=DEVICE)
    ones = torch.ones(6, device=DEVICE)
    half = image.half()
    wide = x.new_zeros(1, 8193), x.new_ones(8193), x.new_ones(8193)
    cases = [
        ("geglu-odd", {}, lambda: geglu_triton(x[:, :5])),
        ("x-dtype", {"op": "geglu", "dtype": "torch.float16"}, lambda: geglu_triton(x.half())),
        ("layer-norm-shapes", {}, lambda: layer_norm_triton(x, ones[:5], ones[:5], 1e-5)),
        ("layer-norm-residual", {}, lambda: layer_norm_triton(x, ones, ones, 1e-5, residual=x[:1])),
        ("layer-norm-residual", {}, lambda: layer_norm_reference(x, ones, ones, 1e-5, residual=x[:1])),
        ("x-dtype", {"op": "layer_norm", "dtype": "torch.float64"}, lambda: layer_norm_triton(x.double(), ones, ones, 1e-5)),
        ("layer-norm-features", {"features": 8193, "limit": 8192}, lambda: layer_norm_triton(*wide, 1e-5)),
        ("group-norm-shapes", {"groups": 4}, lambda: group_norm_triton(image, ones, ones, 4, 1e-5)),
        ("group-norm-shapes", {"bias_shape": (5,)}, lambda: group_norm_triton(image, ones, ones[:5], 3, 1e-5)),
        ("group-norm-shift", {"shape": (2, 6)}, lambda: group_norm_triton(image, ones, ones, 3, 1e-5, shift_BC=x)),
        ("x-dtype", {"op": "group_norm", "dtype": "torch.float16"}, lambda: group_norm_triton(half, ones, ones, 3, 1e-5)),
        ("operand-devices", {"op": "group_norm"}, lambda: group_norm_triton(image, ones.to("meta"), ones, 3, 1e-5)),
    ]
    for name, fields, call in cases:
        with refused(name, ValueError, **fields):
            call()


def test_empty_batches():
    assert geglu_triton(normal(0, 6)).shape == (0, 3)
    x, weight = normal(0, 6).requires_grad_(), normal(6).requires_grad_()
    layer_norm_triton(x, weight, weight, 1e-5).sum().backward()
    assert x.grad.shape == (0, 6) and not weight.grad.any()
    image = normal(0, 6, 2, 2).requires_grad_()
    group_norm_triton(image, weight, weight, 3, 1e-5).sum().backward()
    assert image.grad.shape == image.shape and not weight.grad.any()
