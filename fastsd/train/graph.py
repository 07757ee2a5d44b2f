"""A training step as a CUDA graph - thousands of launches become one.

A step of this UNet launches some 3,000 kernels; at batch 1 a GPU waits for Python most of the time. The first calls
of a shape run as they are, which lets libraries load, kernels compile and cuDNN choose; they are steps like any other. Then
the function is recorded, which does nothing but record, and replayed from there on.

What is replayed reads and writes the very memory that was recorded. So inputs are copied into buffers, what varies
lies in tensors that the caller fills, and results are cloned before the next replay overwrites them.

Source: PyTorch's notes on CUDA semantics, "Whole-network capture".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls of a shape before it is recorded


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphed:
    """`function` as one CUDA graph per shapes and dtypes of its arguments; the same results.

    Args:
        function: of tensors on the current GPU, returns a tuple of them. Reads no device value and allocates nothing that
            must outlive a call, but in the calls before it is recorded.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self.function = function
        self._stream = torch.cuda.Stream()
        self._calls: dict[Any, int] = {}
        self._recorded: dict[Any, _Recorded] = {}
        self._pool: Any = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._recorded:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UP:
                return self._plain(*tensors)
            self._recorded[key] = self._record(tensors)
        recorded = self._recorded[key]
        for buffer, tensor in zip(recorded.inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        recorded.graph.replay()
        return tuple(output.clone() for output in recorded.outputs)

    def _plain(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # On the stream of the recording: autograd's leaves remember the stream they were first used on.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = self.function(*tensors)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(self._stream)
        for tensor in outputs:
            tensor.record_stream(current)
        return outputs

    def _record(self, tensors: tuple[Tensor, ...]) -> _Recorded:
        inputs = [tensor.clone() for tensor in tensors]
        torch.cuda.empty_cache()  # what the plain calls hold, the graph's own pool will need
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the loader's thread pins its batches meanwhile, which must not end the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = self.function(*inputs)
        except RuntimeError as error:
            # Ending a recording that ran out of memory fails once more; the first reason is the one to handle.
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        self._pool = graph.pool()  # graphs of other shapes share it: only one of them runs at a time
        return _Recorded(graph, inputs, outputs)

    def clear(self) -> None:
        """Drop all graphs and their memory; shapes are recorded anew."""
        self._recorded.clear()
        self._calls.clear()
        self._pool = None
