"""The operations of a step as a GPU runs them: kernels, and the bytes that each moves. Recorded on tensors without data.

    matmul, convolution     one operation per product, with its sizes; bytes of the operands and of the result
    attention               one operation per call, with the bytes of all its launches
    pass                    anything else: it moves memory and computes little. Passes form the groups of `GROUPS`

Our kernels count what they are launched with: each tensor of a launch once, and twice if the kernel reads and writes it. An
image that is read in two launches counts twice. Operations of PyTorch read their operands and write their results once, and
are one launch each. PyTorch adds the bias of a cuDNN convolution in a pass of its own, and sums its gradient in another.
Read next: `fastsd/plan/rehearsal.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastsd.train.memory import DirectMode
from fastsd_kernels.launch import OPERATORS, Launch

SUMS, BIAS_SUMS, CONV_BIAS = "sums of residuals and gradients", "bias sums", "convolution bias and its gradient"
ARENA, JOINS, UPDATE, OTHER = "gradients into the arena", "concatenation, upsampling", "optimizer and norm", "casts and others"
GROUPS = ("GEGLU", "LayerNorm", "GroupNorm", SUMS, BIAS_SUMS, CONV_BIAS, ARENA, JOINS, UPDATE, OTHER)
_GROUP_OF_KERNELS = {"geglu": "GEGLU", "layer_norm": "LayerNorm", "group_norm": "GroupNorm"}
_GROUP_OF_KERNELS["group_norm_statistics"] = SUMS  # the sum that a norm reads
_GROUP_OF_KERNELS |= dict.fromkeys(("gradient_norm", "lion", "dlion", "adamw"), UPDATE)
_GROUP_OF_OPERATION = {"add": SUMS, "add_": SUMS, "sum": BIAS_SUMS}
_GROUP_OF_OPERATION |= dict.fromkeys(("cat", "upsample_nearest2d", "upsample_nearest2d_backward"), JOINS)
_OVERWRITES = {"copy_", "fill_", "zero_"}  # write their first argument without reading it
_OUTPUTS = {"out", "grad_input"}  # arguments that are only written
_WITH_ADDEND = {"addmm", "baddbmm", "addmm_", "baddbmm_"}
_NO_WORK = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# PyTorch has no FLOP formulas for products in place, nor for its attention on a CPU.
_COUNTED_AS = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


class Operation(NamedTuple):
    """One operation of a step.

    Attributes:
        kind: "matmul", "convolution", "attention" or "pass".
        narrow: True if operands are in bf16.
        group: an entry of `GROUPS`; "attention" or "attention backward"; for a product, its kind.
        sizes: (products, M, N, K) of a matmul or convolution, a product being (M, K) x (K, N); (products, N, L, D) of attention
            with N queries and L keys of size D; empty for a pass.
    """

    kind: str
    group: str
    flops: int
    bytes: int
    launches: int
    narrow: bool
    sizes: tuple[int, ...] = ()


class Recorder(DirectMode):
    """Records the operations of a `with` block. Views and allocations are not recorded.

    Args:
        launches: the list of `fastsd_kernels.launch.recording`, which is emptied.

    Attributes:
        operations: how often each operation has run.
        arenas: storages of gradient arenas. What is written there forms a group.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()
        self.arenas: set[int] = set()
        self._launches = launches
        self._group = ""  # of our kernels while they are launched
        self._before: Counter[Operation] = Counter()  # the last call of `since_last`

    def since_last(self) -> Counter[Operation]:
        """Return the operations since the last call."""
        latest, self._before = self.operations - self._before, self.operations.copy()
        return latest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, mutated, new = _signature(func)
        written = _tensors([kwargs[key] if key in kwargs else args[i] for i, key in mutated if key in kwargs or i < len(args)])
        if func.namespace == "fastsd":
            return self._run_kernels(func, name, written, args, kwargs)
        result = func(*args, **kwargs)
        if not (mutated or new) or name in _NO_WORK:
            return result
        operands = args[1:] if name in _OVERWRITES else args, {key: x for key, x in kwargs.items() if key not in _OUTPUTS}
        read, written = _tensors(operands), written + (_tensors(result) if new else [])
        if all(tensor.is_cpu and not isinstance(tensor, FakeTensor) for tensor in (*read, *written)):
            return result  # the host's work beside a GPU
        num_bytes, narrow = _bytes((*read, *written)), any(tensor.dtype == torch.bfloat16 for tensor in read)
        formula = flop_registry.get(_COUNTED_AS.get(func.overloadpacket, func.overloadpacket))
        if formula is None:
            self._add_pass(self._group or self._group_of(name, written), num_bytes)
        elif name == "convolution":
            x, weight, bias, *_ = args
            sizes = _convolution_sizes(x, weight, result)[0]
            self._add(_product("convolution", sizes, _bytes((x, weight, result)), narrow=narrow))
            if bias is not None:
                self._add_pass(CONV_BIAS, 2 * _bytes([result]))
        elif name == "convolution_backward":
            (dy, x, weight, *_), (need_x, need_weight, need_bias) = args, args[-1]
            _, input_sizes, weight_sizes = _convolution_sizes(x, weight, dy)
            for need, sizes in ((need_x, input_sizes), (need_weight, weight_sizes)):
                if need:
                    self._add(_product("convolution", sizes, _bytes((x, weight, dy)), narrow=narrow))
            if need_bias:
                self._add_pass(CONV_BIAS, _bytes([dy]))
        elif "attention" in name:
            flops = formula(*args, **kwargs, out_val=result)
            self._add(_attention(name, args, "BHND", flops, num_bytes, 1))
        else:
            a, b = args[name in _WITH_ADDEND :][:2]
            sizes = prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1]
            self._add(_product("matmul", sizes, num_bytes, narrow=narrow))
        return result

    def _run_kernels(self, func: Any, name: str, mutated: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Call the function of one of our operators, which launches kernels. PyTorch would only make the results."""
        function = OPERATORS[func._schema.name]
        outside, self.operations = self.operations, Counter()
        self._group = _GROUP_OF_KERNELS.get(function.__module__.rpartition(".")[2], OTHER)
        try:
            with self:  # what it calls of PyTorch belongs to its group
                result = function(*args, **kwargs)
            twice = {tensor.untyped_storage()._cdata for tensor in mutated}
            for launch in reversed(self._launches):
                operands = _tensors(launch.arguments)
                storages = Counter(tensor.untyped_storage()._cdata for tensor in operands)
                # The last launch with a tensor that the operator changes writes it. What it reads there may be an argument too.
                once = {storage for storage in twice if storages[storage] == 1}
                twice -= storages.keys()
                again = [tensor for tensor in operands if tensor.untyped_storage()._cdata in once]
                self._add_pass(self._group, _bytes((*operands, *again)))
        finally:
            self._launches.clear()
            inside, self.operations, self._group = self.operations, outside, ""
        if "attention" in name:
            formula = flop_registry[func.overloadpacket]
            launches, num_bytes = (sum(getattr(op, key) * n for op, n in inside.items()) for key in ("launches", "bytes"))
            self._add(_attention(name, args, "BNHD", formula(*args, **kwargs, out_val=result), num_bytes, launches))
        else:
            self.operations += inside
        return result

    def _group_of(self, name: str, written: Iterable[Tensor]) -> str:
        group = _GROUP_OF_OPERATION.get(name, OTHER)
        in_arena = any(tensor.untyped_storage()._cdata in self.arenas for tensor in written)
        return ARENA if in_arena and group in (SUMS, OTHER) else group

    def _add(self, operation: Operation) -> None:
        self.operations[operation] += 1

    def _add_pass(self, group: str, num_bytes: int) -> None:
        self._add(Operation("pass", group, 0, num_bytes, 1, narrow=False))


def traffic(operations: Counter[Operation]) -> dict[str, tuple[int, int]]:
    """Return the bytes and launches of a step: of each group of passes, of all passes, of each other kind, and all launches."""

    def total(key: str, *values: str) -> tuple[int, int]:
        members = [(operation, count) for operation, count in operations.items() if getattr(operation, key) in values]
        return sum(op.bytes * n for op, n in members), sum(op.launches * n for op, n in members)

    rows = {group: total("group", group) for group in GROUPS} | {"all passes": total("kind", "pass")}
    rows |= {kind: total("kind", kind) for kind in ("matmul", "convolution", "attention")}
    return rows | {"everything": total("kind", "pass", "matmul", "convolution", "attention")}


def _product(kind: str, sizes: tuple[int, ...], num_bytes: int, *, narrow: bool) -> Operation:
    return Operation(kind, kind, 2 * prod(sizes), num_bytes, 1, narrow, sizes)


def _convolution_sizes(x: Tensor, weight: Tensor, y: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the sizes of the products that compute y, the gradient of x and that of the weight (Cout, Cin, h, w)."""
    outputs, inputs, taps = weight.shape[0], weight.shape[1], prod(weight.shape[2:])
    positions, places = y.numel() // outputs, x.numel() // inputs
    # With a stride, a position of x meets a part of the taps only.
    taps_of_input = max(1, taps * positions // places)
    return (
        (1, positions, outputs, inputs * taps),
        (1, places, inputs, outputs * taps_of_input),
        (1, outputs, inputs * taps, positions),
    )


def _attention(name: str, args: Any, order: str, flops: int, num_bytes: int, launches: int) -> Operation:
    q, k = _tensors(args)[1:3] if "backward" in name else _tensors(args)[:2]
    batch, queries, heads, width = (q.shape[order.index(letter)] for letter in "BNHD")
    group = "attention backward" if "backward" in name else "attention"
    sizes = batch * heads, queries, k.shape[order.index("N")], width
    return Operation("attention", group, flops, num_bytes, launches, q.dtype == torch.bfloat16, sizes)


@cache
def _signature(func: Any) -> tuple[str, list[tuple[int, str]], bool]:
    """Return an operation's name, position and name of each argument it writes, and True if its results are no views."""
    arguments = enumerate(func._schema.arguments)
    mutated = [(i, argument.name) for i, argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return func.overloadpacket.__name__, mutated, not any(value.alias_info for value in func._schema.returns)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
