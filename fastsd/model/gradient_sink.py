"""Memory into which a layer's backward writes the gradient of a parameter itself, in place of returning it to autograd.

A gradient that autograd delivers is a new tensor, which its receiver then copies or adds: a second pass over memory, and a
launch. A parameter with a sink saves both where the layer knows the sink. Its matmul writes the first gradient of a step into
the sink's memory and adds the later ones there, before rounding. To autograd it returns None.

    sink = sink_of(weight)           in the backward of a layer, only if the gradient is needed
    if sink is None:  return the gradient
    sink.add_product(dy_rows.t(), x_rows)         or  sink.add_sum(dy_rows)  or  sink.add(gradient)

A kernel that sums the gradients of a layer's vectors writes them itself: `destination_of(weight, bias)`.

A layer may ignore sinks. The owner of the parameters (`fastsd/train/trainable.py`) passes what autograd delivers to `add`, so a
parameter may be used several times in a step, in both ways. A sink belongs to the memory of its parameter, not to the tensor
object: checkpointing and views, such as a 1x1 convolution's weight as that of a linear, give the layer other objects.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastsd_kernels.ops import Destination


class GradientSink:
    """The sum of a parameter's gradients over the micro-batches of a step.

    Args:
        parameter: its memory must stay where it is as long as the sink lives.
        memory: where the sum goes, in the parameter's shape, strides and dtype, or in fp32.

    Attributes:
        empty: True if the next gradient is a step's first one, so that `memory` has no meaning yet.
    """

    def __init__(self, parameter: Tensor, memory: Tensor) -> None:
        self.memory, self.empty = memory, True
        _SINKS[_place(parameter)] = self

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of the parameter's shape."""
        if self._starts():
            self.memory.copy_(gradient)
        else:
            self.memory.add_(gradient)

    def add_sum(self, dy_NF: Tensor) -> None:
        """Add the sum of N rows."""
        if self._starts():
            torch.sum(dy_NF, 0, dtype=self.memory.dtype, out=self.memory)
        else:
            self.memory.add_(torch.sum(dy_NF, 0, dtype=self.memory.dtype))

    def add_product(self, a_FN: Tensor, b_NK: Tensor) -> None:
        """Add a @ b, whose shape is the parameter's with all but its first dimension flattened."""
        memory = self.memory.view(len(a_FN), -1)
        options: dict[str, Any] = {} if memory.dtype == a_FN.dtype else {"out_dtype": memory.dtype}
        if options and a_FN.is_cpu:  # it has no matmul of bf16 with an fp32 result
            self.add((a_FN @ b_NK).view_as(self.memory))
        elif self._starts():
            torch.mm(a_FN, b_NK, out=memory, **options)
        else:
            torch.addmm(memory, a_FN, b_NK, out=memory, **options)

    def _starts(self) -> bool:
        started, self.empty = self.empty, False
        return started


def sink_of(tensor: Tensor) -> GradientSink | None:
    """Return the sink of the parameter that `tensor` is, or is a view of in full. None if it has none."""
    if torch.compiler.is_compiling():  # a compiled graph returns its gradients to autograd
        return None
    sink = _SINKS.get(_place(tensor))
    return sink if sink is not None and sink.memory.numel() == tensor.numel() else None


def destination_of(*vectors: Tensor) -> Destination | None:
    """Return the memory of the vectors' sinks for a kernel that sums their gradients together. It must write all of them.

    None if a vector has no sink, or if only some of them have received a gradient.
    """
    sinks = [sink for sink in map(sink_of, vectors) if sink is not None]
    if len(sinks) < len(vectors) or len({sink.empty for sink in sinks}) > 1:
        return None
    add = not sinks[0].empty
    for sink in sinks:
        sink.empty = False
    return [sink.memory for sink in sinks], add


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


_SINKS: WeakValueDictionary[tuple[int, int], GradientSink] = WeakValueDictionary()
