"""Capture of a training step as a CUDA graph, which turns thousands of launches into one.

A step of this UNet launches some 3,000 kernels, and at batch 1 a GPU waits for Python most of the time.  The first calls
with a shape run eagerly.  They are ordinary training steps, in which libraries load, kernels compile and cuDNN chooses its
algorithms.  The next call captures the function without executing it.  This call and all later ones replay the graph.

A replay reads and writes the same memory as the capture.  Therefore inputs are copied into buffers, the caller fills tensors
with the values that change between steps, and results are cloned before the next replay overwrites them.

With several ranks, the exchange of gradients and weights is part of the step, and so of its graph.  NCCL's operations can be
captured, and PyTorch keeps its watchdog away from them.  But an operation must be captured on all ranks or on none, so the
ranks agree before each call: eager if one of them needs it, else a capture if one of them needs it, else a replay.  A capture
executes nothing, so a rank that fails in it leaves at once, and all ranks agree on its end.

Sources: PyTorch's notes on CUDA semantics, "Whole-network capture"; NCCL user guide, "Using NCCL with CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import out_of_memory
from fastsd.train.ranks import ALONE, Ranks

Function = Callable[..., tuple[Tensor, ...]]
_Key = tuple[tuple[torch.Size, torch.dtype] | None, ...]  # of the arguments
WARM_UP = 3  # number of eager calls with a shape before its capture
_REPLAY, _CAPTURE, _EAGER = range(3)


class CaptureFailed(RuntimeError):
    """Raised by all ranks together if one of them cannot capture a step. From then on, all calls are eager."""


@dataclass
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor | None]
    outputs: tuple[Tensor, ...]


class Graphs:
    """CUDA graphs of a function, one per combination of argument shapes and dtypes. The results are unchanged.

    The function is passed to each call, not kept, so that the owner of both is not part of a reference cycle.

    Args:
        ranks: the ranks that call the function together, on the same shapes.
        warn: called with a line of text if the ranks cannot capture it.
    """

    def __init__(self, ranks: Ranks = ALONE, warn: Callable[[str], None] = print) -> None:
        self._ranks, self._warn, self._disabled = ranks, warn, False
        self._stream = torch.cuda.Stream()
        self._calls: dict[_Key, int] = {}
        self._captures: dict[_Key, _Capture] = {}
        self._pool: Any = None  # handle of the graphs' memory
        self.capturing = False  # True during a capture, which executes nothing
        self.replayed = False  # set to True by every replay

    def __call__(self, function: Function, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """Call a function, eagerly or by replaying its graph.

        Args:
            function: takes tensors on the current GPU, or None, and returns a tuple of tensors. During capture it must not read
                device values or allocate memory that must outlive a call. In the eager calls it may do both.

        Raises:
            CaptureFailed: the ranks cannot capture the function. Nothing was executed; the next calls are eager.
            RanksOutOfMemory: memory has run out on a rank during the capture. All ranks raise it.
        """
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
        if self._disabled:
            return self._run_eagerly(function, *tensors)
        calls = self._calls.setdefault(key, 0)
        action = self._ranks.most(_REPLAY if key in self._captures else _CAPTURE if calls >= WARM_UP else _EAGER)
        if action != _REPLAY and (action == _EAGER or key in self._captures) and self._captures:
            self.free()  # eager calls allocate their activations outside the pool, where the graphs' still lie
        if action == _EAGER:
            self._calls[key] += 1
            return self._run_eagerly(function, *tensors)
        if action == _CAPTURE:
            self._captures[key] = self._captured(function, tensors)

        capture = self._captures[key]
        for buffer, tensor in zip(capture.inputs, tensors, strict=True):
            if buffer is not None and tensor is not None:
                buffer.copy_(tensor, non_blocking=True)
        # Allocated before the replay: if memory runs out, nothing has been executed, and the call can be repeated.
        results = tuple(map(torch.empty_like, capture.outputs))
        capture.graph.replay()
        self.replayed = True
        for result, output in zip(results, capture.outputs, strict=True):
            result.copy_(output)
        return results

    def _captured(self, function: Function, tensors: tuple[Tensor | None, ...]) -> _Capture:
        """Capture the function on all ranks, or on none."""
        memory, reason = None, ""
        try:
            capture = self._capture(function, tensors)
        except Exception as error:
            if self._ranks.world == 1:
                raise
            memory, reason = out_of_memory(error), (str(error) or type(error).__name__).splitlines()[0]
        self._ranks.memory_is_enough(memory)
        if problem := self._ranks.problem(reason):
            rank, reason = problem
            self._disabled = True
            self._warn(
                f"steps of {self._ranks.world} ranks cannot be captured as CUDA graphs, so small batches train slower "
                f"(rank {rank}: {reason})"
            )
            raise CaptureFailed(reason)
        return capture

    def _run_eagerly(self, function: Function, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        # Use the stream of the capture, because autograd's leaves remember the stream of their first use.
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = function(*tensors)
        current.wait_stream(self._stream)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(self._stream)
        for output in outputs:
            output.record_stream(current)
        return outputs

    def _capture(self, function: Function, tensors: tuple[Tensor | None, ...]) -> _Capture:
        inputs = [None if tensor is None else tensor.clone() for tensor in tensors]
        torch.cuda.empty_cache()  # the graph's own pool needs the memory that the eager calls have cached
        graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
        self.capturing = True
        # thread_local: the loader's threads pin batches during the capture, which must not invalidate it.
        options: dict[str, Any] = {"pool": pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        try:
            # The outer context restores the stream. The inner one does not if the capture cannot end.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **options):
                outputs = function(*inputs)
        except BaseException:
            self._abandon(graph, pool)
            raise
        finally:
            self.capturing = False
        self._pool = pool  # shared by the graphs of all shapes, because only one of them runs at a time
        return _Capture(graph, inputs, outputs)

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Free everything, and the memory of a failed capture.

        If a capture cannot end, PyTorch up to 2.13 goes on to allocate from its pool and never frees the pool.
        """
        self._captures.clear()
        with suppress(RuntimeError):
            graph.reset()
        with suppress(RuntimeError):  # raised if the capture has ended, so that its pool is released already
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
        self.free()

    def free(self) -> None:
        """Free the memory of all graphs. The next call with a shape captures it again, without new eager calls."""
        self._captures.clear()
        self._pool = None
        torch.cuda.empty_cache()

    def forget(self) -> None:
        """Start again with eager calls, because the function has changed. Call `free` first."""
        self._calls.clear()
