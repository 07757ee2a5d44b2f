"""The attention kernels compared with fp64 and PyTorch, on a GPU or in Triton's interpreter: errors, layouts, determinism."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from budget import check_budget, nan_filled_memory
from environment import DEVICE
from precision_curves import EmulatedTf32
from sentences import refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastsd_kernels import attention, attention_backward, attention_tiles, workload
from fastsd_kernels.attention import (
    PRECISIONS,
    attention_backward_op,
    attention_op,
    attention_packed_backward_op,
    attention_reference,
    attention_triton,
)
from fastsd_kernels.attention_tiles import AttentionTile, choose_tile, launch_options, one_kernel_for_keys
from fastsd_kernels.launch import ARCHITECTURES, architecture, meta, recording

pytestmark = [pytest.mark.kernels, pytest.mark.slow]

MODES = ("bf16", *PRECISIONS)


def make(B, N, L, H, D, mode, seed=0):
    """Return q, k and v as strided views of one tensor, like the output of a fused projection."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    qkv_BN3HD = torch.randn(B, max(N, L), 3, H, D, generator=generator).to(DEVICE, dtype)
    return {"q": qkv_BN3HD[:, :N, 0], "k": qkv_BN3HD[:, :L, 1], "v": qkv_BN3HD[:, :L, 2]}


@contextmanager
def pytorch_in(mode):
    """Let PyTorch use TF32 for "tf32", which only its plain backend does, and which a CPU emulates as the interpreter does.

    Other modes get its best fp32 backend.
    """
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if mode == "tf32" else "ieee"
    try:
        with (
            sdpa_kernel(SDPBackend.MATH) if mode == "tf32" else nullcontext(),
            EmulatedTf32() if mode == "tf32" and DEVICE == "cpu" else nullcontext(),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def check(label, inputs, mode):
    precision = "ieee" if mode == "bf16" else mode
    with pytorch_in(mode):
        check_budget(
            f"attention {mode} {label}",
            lambda q, k, v: attention_triton(q, k, v, precision=precision),
            lambda q, k, v: attention_reference(q, k, v).contiguous(),
            inputs,
        )


# The workload's kinds with at most 128 queries and keys, because the interpreter is slow. These are still several tiles.
KINDS = sorted({(min(kind.queries, 128), min(kind.keys, 128), kind.head_dim) for kind in workload.ATTENTION})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n, keys, d", KINDS)
def test_kinds_of_the_workload(n, keys, d, mode):
    check(f"{n}x{keys} d{d}", make(1, n, keys, 1, d, mode), mode)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes the tiles of its own architecture")
@pytest.mark.parametrize("mode", ["bf16", "tf32", "fp16x3"])
@pytest.mark.parametrize("d", [40, 80, 160])
def test_tiles_for_wgmma(monkeypatch, d, mode):
    monkeypatch.setattr(attention_tiles, "architecture", lambda device: 90)
    check(f"70x77 d{d}, sm_90", make(1, 70, 77, 1, d, mode), mode)


@pytest.mark.parametrize("mode", ["bf16", "ieee"])
@pytest.mark.parametrize(
    "n, keys, d",
    [(1, 1, 8), (63, 77, 16), (77, 63, 40), (97, 248, 24), (1025, 97, 8), (63, 1025, 40), (33, 231, 64), (1, 77, 160)],
)
def test_odd_lengths(n, keys, d, mode):
    check(f"{n}x{keys} d{d}", make(2 if n * keys < 10_000 else 1, n, keys, 1, d, mode), mode)


@pytest.mark.parametrize(
    "d, mode", [*((d, mode) for d in (24, 72, 168) for mode in MODES), *((d, "bf16") for d in (8, 48, 56, 120, 136, 256))]
)
def test_head_sizes(d, mode):
    check(f"20x33 d{d}", make(1, 20, 33, 1, d, mode, seed=d), mode)


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize("n, keys, d", [(65, 77, 40), (40, 33, 160)])
def test_fp16x3_is_as_exact_at_any_size(n, keys, d, size):
    """Values and gradients are far outside of fp16's range, and rows of one tensor differ by orders of magnitude."""
    inputs = make(1, n, keys, 1, d, "fp16x3")
    generator = torch.Generator().manual_seed(1)
    for name, spread in (("q", 0.5), ("k", 0.5), ("v", 3.0)):
        inputs[name] = (
            inputs[name] * torch.exp(spread * torch.randn(inputs[name].shape[:-1], generator=generator)).to(DEVICE)[..., None]
        )
    inputs["v"] = inputs["v"] * size
    check_budget(
        f"attention fp16x3 {n}x{keys} d{d}, values about {size:.0e}",
        lambda q, k, v: attention_triton(q, k, v, precision="fp16x3") * size,
        lambda q, k, v: attention_reference(q, k, v).contiguous() * size,
        inputs,
    )


def transposed(x):
    """Return the same numbers, stored as (B, H, N, D) as in other code."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def scattered(x):
    """Return the same numbers with odd strides and gaps between the columns."""
    out = torch.empty(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)[..., 1::2]
    return out.copy_(x)


def test_any_layout_gives_the_same_bits():
    inputs = make(2, 40, 50, 3, 40, "ieee").values()
    expected = None
    for layout in (torch.Tensor.detach, transposed, scattered, torch.Tensor.contiguous):
        leaves = [layout(x).detach().requires_grad_() for x in inputs]
        o = attention_triton(*leaves)
        results = o, *torch.autograd.grad(o, leaves, layout(torch.ones_like(o)))
        expected = expected or results
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), layout


def test_expanded_gradients_equal_dense_ones():
    leaves = [x.detach().requires_grad_() for x in make(1, 33, 20, 2, 16, "ieee").values()]
    expanded = torch.autograd.grad(attention_triton(*leaves).sum(), leaves)  # one number, expanded
    dense = torch.autograd.grad(attention_triton(*leaves), leaves, torch.ones(1, 33, 2, 16, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_large_scores_do_not_overflow():
    inputs = make(1, 40, 77, 1, 40, "ieee")
    inputs["q"] = inputs["q"] * 300  # scores in the thousands, far past exp's range
    o = attention_triton(*inputs.values())
    truth = attention_reference(*(x.double() for x in inputs.values()))
    assert (o - truth).abs().max() < 1e-3 * truth.abs().max()


@pytest.mark.parametrize("mode", ["bf16", "ieee"])
def test_repeated_backward_passes_have_the_same_bits(mode):
    # With one image and 77 keys, several programs share the queries, and their sums are added afterwards.
    leaves = [x.detach().requires_grad_() for x in make(1, 300, 77, 1, 40, mode).values()]
    dy = torch.randn_like(leaves[0])
    expected = None
    for _ in range(20 if DEVICE == "cuda" else 2):
        with nan_filled_memory():
            gradients = torch.autograd.grad(attention_triton(*leaves), leaves, dy)
        expected = expected or gradients
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.fixture
def passes(monkeypatch):
    """Let one pass compute all gradients on any GPU. Return a function that sets its programs, and a list of its kernels."""
    target, kernels = architecture(torch.device(DEVICE)), []
    real = attention_backward.launch
    monkeypatch.setattr(
        attention_backward,
        "launch",
        lambda kernel, *a, **options: (kernels.append(kernel.__name__), real(kernel, *a, **options)),
    )

    def on(programs):
        for kind in ("bf16", *PRECISIONS):
            monkeypatch.setitem(attention_tiles._TILES, ("dqdkdv", 48, kind, target), AttentionTile(32, 128, 4, 2, 16))
        monkeypatch.setitem(attention_backward._PROGRAMS, target, programs)

    return on, kernels


# Programs end within a head's tiles, at its end, and take those of several heads.
@pytest.mark.parametrize(
    "n, keys, heads, programs, mode", [(40, 1030, 2, 5, "bf16"), (64, 1024, 1, 2, "ieee"), (33, 1027, 3, 6, "tf32")]
)
def test_one_pass_for_all_gradients(n, keys, heads, programs, mode, passes):
    on, kernels = passes
    on(programs)
    check(f"one pass {n}x{keys} x{heads}", make(1, n, keys, heads, 40, mode), mode)
    assert kernels == ["_backward", "_add_copies"]


def test_one_pass_ignores_padded_keys(passes):
    """A padded key's score of 0 is then so far above the others that its weight would be infinite."""
    on, _ = passes
    on(4)
    inputs = make(1, 32, 1030, 1, 40, "ieee")
    inputs["q"], inputs["k"] = inputs["q"].abs() * 30, -inputs["k"].abs()
    check("scores below -100", inputs, "ieee")


def test_one_pass_repeats_its_bits_in_any_layout(passes):
    on, kernels = passes
    on(2)
    q, k, v = make(1, 40, 1030, 2, 40, "bf16").values()
    o, lse = attention_op(q, k, v, "ieee")
    do = torch.randn_like(o)
    expected = attention_backward_op(do, q, k, v, o, lse, "ieee")
    for _ in range(10 if DEVICE == "cuda" else 1):
        with nan_filled_memory():
            dq, dkv = attention_packed_backward_op(do, q, k, v, o, lse, "ieee", False)
        assert all(torch.equal(a, b) for a, b in zip((dq, *dkv.unbind(2)), expected, strict=True))
    assert "_backward" in kernels


@pytest.mark.parametrize("programs", [1, 2, 5, 7, 13])
@pytest.mark.parametrize("heads, keys", [(1, 1024), (3, 1027), (8, 4096), (24, 1536)])
def test_one_pass_takes_as_many_copies_as_programs_share_a_head(heads, keys, programs, passes):
    passes[0](programs)
    q, k = (meta(1, n, heads, 40, dtype=torch.bfloat16) for n in (64, keys))
    lse, target = meta(1, heads, 64), architecture(torch.device(DEVICE))
    with recording(target) as launches:
        attention_backward.one_pass(AttentionTile(32, 128, 4, 2), q, q, k, k, q, lse, "ieee", (q, k, k))
    (backward, _), tiles = launches, -(-keys // 128)
    share = -(-tiles * heads // programs)
    shared = [{unit // share for unit in range(tiles * i, tiles * (i + 1))} for i in range(heads)]
    assert backward.arguments[5].shape[0] == max(map(len, shared))
    assert backward.grid == (1 + max(map(max, shared)),)


def test_one_pass_needs_long_sequences_and_few_copies(passes):
    on, kernels = passes
    on(10**6)
    q, k, v = make(1, 16, 1152, 1, 40, "bf16").values()  # 9 tiles of keys
    o, lse = attention_op(q, k, v, "ieee")
    attention_backward_op(o, q, k, v, o, lse, "ieee")
    on(1)
    attention_backward_op(o, q, k[:, :1000], v[:, :1000], o, lse, "ieee")
    assert kernels == []
    attention_backward_op(o, q, k, v, o, lse, "ieee")
    assert kernels == ["_backward", "_add_copies"]


@pytest.mark.parametrize(
    "n, keys, d, programs, kernels",
    [
        (256, 256, 160, (256, 1), ["_backward_q", "_backward_kv"]),
        (256, 77, 160, (192, 1), ["_backward_q", "_backward_kv"]),
        (1024, 77, 80, (192, 2), ["_backward_q", "_backward_kv", "_add_copies", "_add_copies"]),
    ],
)
def test_launches_of_a_backward(n, keys, d, programs, kernels):
    """Programs share queries only where that is predicted to be faster. Kernels do all the work, so predictions see it."""
    q, k = (meta(8, length, 8, d, dtype=torch.bfloat16) for length in (n, keys))
    with recording(89) as launches, OperationCounter() as operations:
        attention.attention_backward(q, q, k, k, q, meta(8, 8, n), "ieee")
    assert [launch.kernel.__name__ for launch in launches] == kernels
    assert launches[1].grid == programs
    assert operations.names <= {"empty", "empty_like", "new_empty", "unsqueeze", "view", "transpose"}


class OperationCounter(TorchDispatchMode):
    """Collects the names of PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


def test_only_inputs_output_and_row_statistics_are_saved():
    leaves = [x.detach().requires_grad_() for x in make(2, 48, 77, 2, 40, "ieee").values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o = attention_triton(*leaves)
    assert [tuple(x.shape) for x in saved] == [*(tuple(x.shape) for x in leaves), tuple(o.shape), (2, 2, 48)]
    assert saved[4].dtype == torch.float32


@pytest.mark.parametrize("mode", ["bf16", "tf32"])
def test_opcheck(mode):
    q, k, v = make(2, 17, 33, 2, 16, mode).values()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    # Graph capture takes most of the time and does not depend on the dtype, so it is tested with one.
    tests = [f"test_{name}" for name in ("schema", "autograd_registration", "faketensor")]
    check = partial(torch.library.opcheck, test_utils=tests if mode == "bf16" else [*tests, "test_aot_dispatch_dynamic"])
    check(attention_op, (*leaves, "tf32"))
    o, lse = attention_op(q, k, v, "tf32")
    check(attention_backward_op, (torch.randn_like(o), q, k, v, o, lse, "tf32"))
    check(attention_packed_backward_op, (torch.randn_like(o), q, k, v, o, lse, "tf32", False))
    check(attention_packed_backward_op, (torch.randn_like(o), q, q, q, o, lse, "tf32", True))


@pytest.mark.parametrize("mode", MODES)
def test_packed_gradients_equal_separate_ones(mode):
    """Compare gradients that are written directly, and some that are summed over several splits."""
    precision = "ieee" if mode == "bf16" else mode
    for queries, keys, self_attention in ((40, 33, False), (40, 40, True), (300, 9, False)):
        q, k, v = make(1, queries, keys, 2, 40, mode).values()
        o, lse = attention_op(q, k, v, precision)
        inputs = torch.randn_like(o), q, k, v, o, lse, precision
        dqkv_or_dq, dkv = attention_packed_backward_op(*inputs, self_attention)
        gradients = dqkv_or_dq.unbind(2) if self_attention else (dqkv_or_dq, *dkv.unbind(2))
        assert all(torch.equal(a, b) for a, b in zip(gradients, attention_backward_op(*inputs), strict=True))


def test_flop_formula_equals_pytorchs():
    leaves = [x.detach().requires_grad_() for x in make(2, 16, 24, 2, 8, "ieee").values()]
    counted = []
    for function in (attention_triton, attention_reference):
        with FlopCounterMode(display=False) as counter:
            function(*leaves).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == 14 * 2 * 2 * 16 * 24 * 8
    if DEVICE == "cuda":
        assert counted[0] == counted[1]


def multiply_adds(kernel, kind, dtype, precision):
    """Return the multiply-adds of one kernel for a head with padding, those needed, and how often warps repeat them."""
    D, N, L = kind.head_dim, kind.queries, kind.keys
    tile = choose_tile(kernel, D, N, L, dtype, precision, torch.device("cpu"))
    options = launch_options(tile, D, dtype, precision)
    sum_width, out_width = (sum(width for _, width in options[name]) for name in ("SUM_D", "OUT_D"))
    sums = {"forward": 1, "dq": 2, "dkdv": 2, "dk": 2, "dv": 1}[kernel]  # matmuls that contract D
    outs = {"forward": 1, "dq": 1, "dkdv": 2, "dk": 1, "dv": 1}[kernel]  # matmuls whose result is D wide
    rows, keys = -(-N // tile.rows) * tile.rows, -(-L // tile.keys) * tile.keys
    result_rows = tile.rows if kernel in ("forward", "dq") else tile.keys
    repeated = max(1, 16 * tile.warps / result_rows)  # a warp of tensor cores computes at least 16 rows
    return rows * keys * (sums * sum_width + outs * out_width), N * L * D * (sums + outs), repeated


def kernels_of(kind, dtype, precision):
    return "forward", "dq", *(("dkdv",) if one_kernel_for_keys(kind.head_dim, dtype, precision) else ("dk", "dv"))


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "fp16x3")])
def test_no_kernel_multiplies_over_1_3_times_what_is_needed(dtype, precision, target):
    with recording(target):
        for kind in workload.ATTENTION:
            for kernel in kernels_of(kind, dtype, precision):
                run, needed, repeated = multiply_adds(kernel, kind, dtype, precision)
                tile = choose_tile(kernel, kind.head_dim, kind.queries, kind.keys, dtype, precision, torch.device("cpu"))
                if target == 90:  # wgmma: 4 warps compute 64 rows of a result
                    assert tile.warps % 4 == 0, (kind, kernel)
                    needed *= 1 if kernel in ("forward", "dq") else -(-kind.keys // 64) * 64 / kind.keys
                assert run * repeated <= 1.3 * needed, (kind, kernel, run * repeated / needed)


def test_padding_costs_at_most_six_percent():
    """Count the multiply-adds of a UNet step with the padding of slices and tiles, and without."""
    for dtype, precision in ((torch.bfloat16, "ieee"), *((torch.float32, precision) for precision in PRECISIONS)):
        run = needed = 0
        for kind, count in workload.ATTENTION.items():
            for kernel in kernels_of(kind, dtype, precision):
                counts = multiply_adds(kernel, kind, dtype, precision)
                run, needed = run + count * kind.heads * counts[0], needed + count * kind.heads * counts[1]
        step = 3 * workload.FORWARD_FLOPS / 2 - 3 * sum(k.flops * n for k, n in workload.ATTENTION.items()) / 2
        ratio = (step + run) / (step + needed)
        print(f"{dtype} {precision}: attention {run / needed:.3f}, step {ratio:.3f}")
        assert ratio <= 1.06


def test_unusable_inputs_are_refused():
    q = torch.zeros(1, 4, 2, 8, device=DEVICE)
    with refused("attention-precision", ValueError, precision="'fp8'"):
        attention_triton(q, q, q, precision="fp8")
    with refused("attention-shapes", ValueError):
        attention_triton(q, q[:, :, :1], q[:, :, :1])
    with refused("attention-dtypes", ValueError):
        attention_triton(q, q.bfloat16(), q)
    for shape, name in (
        ((1, 4, 2, 12), "attention-head-size"),
        ((1, 4, 2, 264), "attention-head-size"),
        ((1, 0, 2, 8), "attention-empty"),
    ):
        with refused(name, ValueError):
            attention_triton(*(torch.zeros(shape, device=DEVICE),) * 3)
