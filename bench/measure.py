"""Time forward and backward passes with cold caches and without host overhead; measure the machine's peak rates.

On a GPU most of these kernels finish before Python can launch the next one.  So the work is warmed up and captured in a CUDA
graph, and replays of the graph are timed.  A replay takes at least `_MIN_REPLAY`, so its own overhead is negligible.  Between
two uses of a tensor, other tensors fill the L2 cache twice (`Bench.copies`).  As in a step, all forwards run first, then all
backwards in reverse order.  Work that waits for the GPU cannot be captured.  It runs several times per round, marked "eager".

Every figure is for one call: the median round time divided by the number of calls in a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsd_kernels import workload

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MIN_REPLAY = 4e-3  # seconds; the overhead of a replay, about 10 us, is then at most 0.3 %

Call = Callable[[], object]
# Tensors that require gradients, and the gradients of the outputs.
Operands = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """An operation to time, and the fewest bytes and FLOPs that its forward and backward together need."""

    op: str
    kind: str
    count: int  # uses in the forward of one image
    implementation: str
    mode: str  # dtype, or the precision of fp32 matmuls
    bytes: int
    flops: int = 0
    bytes_once: int = 0  # bytes if every pass touched each tensor once; 0 if these are the same as `bytes`


class Machine(NamedTuple):
    """Peak copy and matmul rates of this machine, measured in the same run as the benchmarks."""

    copy_gb_per_s: float  # bytes read plus bytes written
    matmul_tflop_per_s: dict[str, float]  # by mode


def label(kind: Any) -> str:
    """Return a short label of a kind, which is a key of a table in `workload`."""
    if isinstance(kind, workload.Attention):
        return f"{kind.queries}x{kind.keys} d{kind.head_dim}"
    if isinstance(kind, workload.GroupNorm):
        return f"{kind.channels}c {kind.side}px{' silu' if kind.silu else ''}{' shift' if kind.shift else ''}"
    return f"{kind.rows}x{kind.features}"


def smallest(table: dict[Any, int], count: int = 2) -> list[Any]:
    """Return the `count` kinds of a table in `workload` that have the fewest elements."""

    def elements(kind: Any) -> int:
        if isinstance(kind, workload.Attention):
            return (kind.queries + kind.keys) * kind.heads * kind.head_dim
        if isinstance(kind, workload.GroupNorm):
            return kind.channels * kind.side**2
        return kind.rows * kind.features

    return sorted(table, key=elements)[:count]


@contextmanager
def fp32_matmuls(mode: str) -> Iterator[None]:
    """Run PyTorch's fp32 matmuls in the block in TF32 if the mode is "tf32", otherwise in IEEE fp32."""
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if mode == "tf32" else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = previous


def _median_seconds(work: Call, device: torch.device, repeats: int) -> float:
    """Return the seconds of one call of `work`, as the median of five rounds of `repeats` calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for i in range(7):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        if i > 1:  # the first two rounds warm up
            times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def measure_machine(device: torch.device, *, quick: bool) -> Machine:
    """Time a copy of 1 GiB (`quick`: 16 MiB) and matmuls of 8192 x 8192 matrices (512 x 512)."""
    gpu = device.type == "cuda" and not quick
    source, target = (torch.ones(1 << (28 if gpu else 22), device=device) for _ in range(2))
    copy_rate = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, 10 if gpu else 1) / 1e9
    matmul_rates: dict[str, float] = {}
    side = 8192 if gpu else 512
    for mode in ("bf16", "tf32", "ieee"):
        a = torch.randn(side, side, device=device, dtype=DTYPES["bf16" if mode == "bf16" else "fp32"])
        with fp32_matmuls(mode):
            matmul_rates[mode] = 2 * side**3 / _median_seconds(partial(torch.matmul, a, a), device, 3) / 1e12
    return Machine(copy_rate, matmul_rates)


def forward_and_backward(function: Callable[..., Any], sets: Sequence[Operands]) -> None:
    """Run all forwards, then all backwards in reverse order, as in a step."""
    outputs = [function(*inputs) for inputs, _ in sets]
    for inputs, upstream in reversed(sets):
        output = outputs.pop()
        torch.autograd.grad(output if isinstance(output, tuple) else (output,), inputs, upstream)


def capture(work: Call) -> tuple[Call, int]:
    """Capture `work` in a CUDA graph. Return a function that replays it and waits, and how often one replay runs `work`."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    repeats = 1
    while True:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                work()

        def replay(graph: torch.cuda.CUDAGraph = graph) -> None:
            graph.replay()
            torch.cuda.synchronize()

        replay()
        start = time.perf_counter()
        replay()
        seconds = time.perf_counter() - start
        if repeats > 1 or seconds >= _MIN_REPLAY:
            return replay, repeats
        repeats = math.ceil(_MIN_REPLAY / seconds)


class Bench:
    """Creates the tensors of one benchmark, times it, and passes its figures to pytest-benchmark and to `record`."""

    def __init__(
        self,
        benchmark: Any,
        device: torch.device,
        batch: int,
        quick: bool,
        machine: Machine | None,
        record: Callable[..., None],
    ) -> None:
        self.benchmark, self.device, self.machine = benchmark, device, machine
        self.batch, self.quick, self.record = batch, quick, record
        self.gpu = device.type == "cuda"

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        """Create a tensor of standard normal numbers. Only a tensor of shape (B, C, H, W) can be channels last."""
        x = torch.randn(shape, device=self.device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    def copies(self, make: Callable[[], Operands]) -> list[Operands]:
        """Create enough sets of operands to fill the L2 cache twice. Their inputs require gradients."""
        sets = [make()]
        set_bytes = sum(x.nbytes for group in sets[0] for x in group)
        cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size if self.gpu else 0
        sets += [make() for _ in range(math.ceil(2 * cache_bytes / set_bytes) - 1)]
        for inputs, _ in sets:
            for x in inputs:
                x.requires_grad_()
        return sets

    def differentiated(self, case: Case, function: Callable[..., Any], make: Callable[[], Operands]) -> None:
        """Time the forward and backward of `function`."""
        sets = self.copies(make)
        self.time(case, lambda: forward_and_backward(function, sets), calls=len(sets))

    def time(self, case: Case, work: Call, *, calls: int = 1, captured: bool = True) -> None:
        """Time `work`, which runs the case `calls` times. On a GPU, `work` runs as a CUDA graph if `captured` is true."""
        rounds = 3 if self.quick else 20
        if not self.gpu:
            run, warmup = work, 1
        elif captured:
            run, repeats = capture(work)
            calls, warmup = calls * repeats, 3
        else:

            def run() -> None:
                work()
                torch.cuda.synchronize()

            rounds, warmup = min(rounds, 5), 1
        self.benchmark.group = f"{case.op}, {case.kind}, {case.mode}"
        self.benchmark.pedantic(run, rounds=rounds, warmup_rounds=warmup)
        execution = "eager" if not (self.gpu and captured) else "graph"
        info = {**asdict(case), "batch": self.batch, "timed": execution, "calls_a_round": calls}
        if self.machine and self.benchmark.stats:
            stats = self.benchmark.stats.stats
            info |= {"rounds": rounds, "seconds": stats.median / calls, "seconds_min": stats.min / calls}
            info |= {"seconds_iqr": stats.iqr / calls, **rates(case, stats.median / calls, self.machine)}
        self.benchmark.extra_info.update(info)
        self.record(info)


def rates(case: Case, seconds: float, machine: Machine) -> dict[str, float]:
    """Return the achieved rates and their shares of the machine's peak rates."""
    figures = {"gb_per_s": case.bytes / seconds / 1e9, "copy_gb_per_s": machine.copy_gb_per_s}
    figures["share_of_copy"] = figures["gb_per_s"] / machine.copy_gb_per_s
    if case.bytes_once:
        figures["share_of_copy_once"] = figures["share_of_copy"] * case.bytes_once / case.bytes
    if case.flops:
        # These compute three products for each one counted, so their shares are at most a third. fp16 has bf16's rate.
        products = {"tf32x3": "tf32", "fp16x3": "bf16"}.get(case.mode, case.mode)
        peak_rate = machine.matmul_tflop_per_s[products]
        figures |= {"tflop_per_s": case.flops / seconds / 1e12, "matmul_tflop_per_s": peak_rate}
        figures["share_of_matmul"] = figures["tflop_per_s"] / peak_rate
    return figures
