"""The error budget: a kernel may be at most twice as far from fp64 as PyTorch in the same dtype.

This holds for its output and every gradient. While the kernel runs, new memory is filled with NaN, so that elements which the
kernel does not write fail the test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

FACTOR = 2.0


@contextmanager
def nan_filled_memory():
    """Fill new memory of `torch.empty` and similar functions with NaN, or integers with the highest number."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def check_budget(
    label: str,
    kernel: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    *,
    reference_inputs: dict[str, Tensor] | None = None,
) -> dict[str, tuple[float, float]]:
    """Assert that outputs and gradients of `kernel` are within the budget: compare both functions with `reference` in fp64.

    Args:
        inputs: tensors in the dtype under test, with any strides. Each gets a gradient.
        reference_inputs: inputs of PyTorch, if it cannot mix the dtypes of `inputs`.

    Returns:
        The errors of the kernel and of PyTorch by name ("out0" or "d<input>"), norms relative to the fp64 result's.
    """
    truth = _run(reference, {k: v.detach().double() for k, v in inputs.items()}, None)
    with nan_filled_memory():
        ours = _run(kernel, {k: v.detach() for k, v in inputs.items()}, truth["upstream"])
    pytorch = _run(reference, {k: v.detach() for k, v in (reference_inputs or inputs).items()}, truth["upstream"])
    errors = {}
    for name, exact in truth["values"].items():
        result = ours["values"][name]
        assert result.shape == exact.shape, f"{label} {name}: {tuple(result.shape)}, not {tuple(exact.shape)}"
        assert torch.isfinite(result).all(), f"{label} {name}: not finite, or not written"
        # No result in this dtype is closer to the truth than the truth rounded to it.
        rounding_error = _error(exact.to(result.dtype), exact)
        errors[name] = _error(result, exact), max(_error(pytorch["values"][name], exact), rounding_error)
    print(f"{label:40s}", "  ".join(f"{k} {a:.1e}/{b:.1e}" for k, (a, b) in errors.items()))
    for name, (error, pytorch_error) in errors.items():
        assert error <= FACTOR * pytorch_error, (
            f"{label} {name}: error {error:.2e} is over {FACTOR} x PyTorch's {pytorch_error:.2e}"
        )
    return errors


def _run(function, inputs: dict[str, Tensor], upstream: list[Tensor] | None):
    """Return outputs and gradients. The random upstream gradients are the same numbers in every dtype."""
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        dtype = torch.bfloat16  # exact in every dtype under test
        upstream = [torch.randn(o.shape, generator=generator).to(dtype).to(o.device).double() for o in outputs]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )
    values = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    values |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"values": values, "upstream": upstream}


def _error(result: Tensor, truth: Tensor) -> float:
    distance = (result.double() - truth).norm().item()
    size = truth.norm().item()
    return distance / size if size else distance
