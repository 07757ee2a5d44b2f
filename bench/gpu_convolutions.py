"""Time the UNet's convolutions on a GPU by memory layout, precision, determinism and cuDNN's heuristic.

    python bench/gpu_convolutions.py [--small] [--lines FILE]

A measurement is the forward and the backward of one shape. `error` is that of the output and both gradients together against
fp64, relative. `workspace` is the peak of memory during the call above its tensors. cuDNN reads its heuristic mode once per
process, so each mode has a process of its own. The shapes are those with the most FLOPs.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
from measurements import Measurement, Record, Setup, figures_lines
from measurements import main as run_measurements
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.bench import counters
from fastsd.model.unet import UNet
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
BATCH = 8
SHAPES = 6  # number of shapes that are measured
HEURISTICS = {"A": (), "B": (("TORCH_CUDNN_USE_HEURISTIC_MODE_B", "1"),)}
Shape = tuple[int, int, int, int, int]  # channels in and out, side of the input, kernel size, stride


class _Convolutions(TorchDispatchMode):
    """Counts convolutions by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            x, weight, _, (stride, _), *_ = args
            self.counts[weight.shape[1], weight.shape[0], x.shape[-1], weight.shape[-1], stride] += 1
        return func(*args, **(kwargs or {}))


def convolutions(setup: Setup) -> Counter[Shape]:
    """Count the convolutions of the UNet's forward by shape, without computing it."""
    shapes, resolution = setup.shapes
    side = shapes.side(resolution)
    with torch.device("meta"), torch.no_grad(), _Convolutions() as convolutions:
        latents = torch.empty(1, shapes.unet.in_channels, side, side)
        text_embeds = torch.empty(1, 77, shapes.unet.cross_attention_dim)
        UNet(shapes.unet)(latents, torch.empty(1, dtype=torch.long), text_embeds)
    return convolutions.counts


def flops(shape: Shape) -> int:
    channels_in, channels_out, side, kernel, stride = shape
    return 2 * channels_in * channels_out * kernel**2 * (side // stride) ** 2


def run(x: Tensor, weight: Tensor, gradient: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the gradients of the input and of the weight."""
    options = [stride, stride], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1
    y = torch.ops.aten.convolution(x, weight, None, *options)
    dx, dweight, _ = torch.ops.aten.convolution_backward(gradient, x, weight, None, *options, [True, True, False])
    return y, dx, dweight


def relative_error(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    pairs = zip(results, expected, strict=True)
    return max(((result.double() - truth).norm() / truth.norm()).item() for result, truth in pairs)


def measure(heuristic: str, setup: Setup) -> list[Record]:
    counts = convolutions(setup)
    chosen = sorted(counts, key=lambda shape: counts[shape] * flops(shape), reverse=True)[: 2 if setup.dry else SHAPES]
    return [record for shape in chosen for record in measure_shape(shape, counts[shape], heuristic, setup)]


def measure_shape(shape: Shape, count: int, heuristic: str, setup: Setup) -> list[Record]:
    channels_in, channels_out, side, kernel, stride = shape
    torch.manual_seed(0)
    tensors = [torch.randn(BATCH, channels_in, side, side), torch.randn(channels_out, channels_in, kernel, kernel)]
    tensors[1] /= (channels_in * kernel**2) ** 0.5
    tensors.append(torch.randn(BATCH, channels_out, side // stride, side // stride))
    tensors = [tensor.to(setup.device) for tensor in tensors]
    records = []
    for precision in COMPUTE_DTYPE:
        # The operands are rounded first, so that the error is that of the operation.
        operands = [tensor.to(COMPUTE_DTYPE[precision]) for tensor in tensors]
        few = [operands[0][:1].double(), operands[1].double(), operands[2][:1].double()]
        expected = run(*few, stride)
        for layout, memory_format in LAYOUTS.items():
            inputs = [tensor.contiguous(memory_format=memory_format) for tensor in operands]
            for deterministic in (True, False):
                # With `deterministic`, cuDNN's heuristic chooses the algorithm. Otherwise its benchmark mode times them.
                with precision_switches(precision, deterministic=deterministic):
                    figures = time_and_memory(inputs, stride, setup)
                    error = relative_error(run(inputs[0][:1], inputs[1], inputs[2][:1], stride), expected)
                rate = 3 * BATCH * flops(shape) / figures["ms"] / 1e9
                labels = f"{channels_in} -> {channels_out}, {side} px, kernel {kernel}, stride {stride}"
                timed = "deterministic" if deterministic else "timed"
                name = f"{layout}, {timed}, heuristic {heuristic}"
                figures |= {"count": count, "error": error, "tflop_per_s": rate, "batch": BATCH}
                records.append(setup.record("convolution", labels, precision, name, **figures))
    return records


def time_and_memory(inputs: list[Tensor], stride: int, setup: Setup) -> dict[str, Any]:
    """Return the milliseconds of a call and the bytes of its workspace, after two calls that choose algorithms."""
    call = partial(run, *inputs, stride)
    results = [call() for _ in range(2)][-1]
    result_bytes = sum(tensor.nbytes for tensor in results)
    del results
    workspace = counters.rise(call, setup.device) - result_bytes
    times = [counters.seconds(call, setup.device, repeats=3) for _ in range(setup.rounds)]
    return {"ms": 1e3 * statistics.median(times), "workspace_mb": workspace / 1e6}


def measurements() -> list[Measurement]:
    return [
        Measurement("convolutions", f"cuDNN heuristic {name}", partial(measure, name), alone=True, environment=environment)
        for name, environment in HEURISTICS.items()
    ]


if __name__ == "__main__":
    sys.exit(run_measurements(__doc__, __file__, measurements(), figures_lines))
