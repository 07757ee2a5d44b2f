"""One step of each optimizer over all parameters of the UNet, and the norm of their gradients.

The kernels and the references update one flat arena.  The other packages update one tensor per parameter of the module.  These
are 638 tensors, where diffusers has 686, because the module fuses q, k and v.  "halves" means bf16 high halves, 16-bit low
halves and bf16 gradients.  States are fp32.  "triton in a step" also scales and zeroes the gradients and reads the flag
`found_inf`, in the same pass.

lion-pytorch and dadaptation are timed without a CUDA graph: dadaptation reads two numbers back for every tensor.
"""

from __future__ import annotations

import pytest
import torch
from measure import Bench, Call, Case
from torch import Tensor

from fastsd_kernels import adamw, dlion, gradient_norm, lion, workload
from fastsd_kernels.adamw import adamw_reference, adamw_triton
from fastsd_kernels.dlion import dlion_estimate_reference, dlion_estimate_triton, dlion_reference, dlion_triton
from fastsd_kernels.gradient_norm import gradient_norm_reference, gradient_norm_triton
from fastsd_kernels.lion import lion_reference, lion_triton

PEERS = {"lion": "lion-pytorch", "dlion": "dadaptation", "adamw": "torch fused"}
CASES = [
    pytest.param(op, mode, implementation, id=f"{op} {mode} {implementation}".replace(" ", "-"))
    for op, peer in PEERS.items()
    for mode, others in (("fp32", ("reference", peer)), ("halves", ()))
    for implementation in ("triton", "triton in a step", *others)
]
_MAX_QUICK_SIZE = 12_000  # elements of a tensor; the quick arena has one tensor of each size up to this


def _sizes(bench: Bench) -> list[int]:
    if bench.quick:
        return [size for size in workload.PARAMETERS if size <= _MAX_QUICK_SIZE]
    return [size for size, count in workload.PARAMETERS.items() for _ in range(count)]


def _arena_step(op: str, kernels: bool, p: Tensor, g: Tensor, options: dict) -> Call:
    """Return a function that runs one step over an arena, with the kernel or the reference."""
    m = torch.zeros_like(p, dtype=torch.float32)
    if op == "lion":
        lion = lion_triton if kernels else lion_reference
        return lambda: lion([p], [g], [m], lr=1e-4, **options)
    second_state = torch.zeros_like(m)
    if op == "adamw":
        adamw = adamw_triton if kernels else adamw_reference
        step_counts = [m.new_zeros(())]
        return lambda: adamw([p], [g], [m], [second_state], step_counts, lr=1e-4, **options)
    dlion, estimate = (dlion_triton, dlion_estimate_triton) if kernels else (dlion_reference, dlion_estimate_reference)
    d = m.new_full((), 1e-6, dtype=torch.float64)
    numerator = m.new_zeros((), dtype=torch.float64)
    found_inf = options.get("found_inf")

    def step() -> None:
        sums = dlion([p], [g], [m], [second_state], d, lr=1.0, **options)
        estimate(d, numerator, *sums, lr=1.0, found_inf=found_inf)

    return step


def _peer_step(op: str, parameters: list[Tensor]) -> Call:
    if op == "lion":
        return pytest.importorskip("lion_pytorch").Lion(parameters, lr=1e-4).step
    if op == "dlion":
        return pytest.importorskip("dadaptation").DAdaptLion(parameters).step
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=parameters[0].is_cuda).step


def _gradients(bench: Bench, sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [bench.tensor(size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("op, mode, implementation", CASES)
def bench_optimizer(op: str, mode: str, implementation: str, bench: Bench) -> None:
    sizes = _sizes(bench)
    numel = sum(sizes)
    halves, in_step = mode == "halves", implementation == "triton in a step"
    num_bytes = {"lion": lion, "dlion": dlion, "adamw": adamw}[op].OP.bytes(numel, 2 if halves else 4)
    case = Case(op, "all parameters", 1, implementation, mode, num_bytes)
    if implementation == PEERS[op]:
        parameters = [torch.nn.Parameter(bench.tensor(size)) for size in sizes]
        for p in parameters:
            p.grad = bench.tensor(p.numel())
        step, captured = _peer_step(op, parameters), op == "adamw"
        calls = 1 if captured else 3
        bench.time(case, lambda: [step() for _ in range(calls)], calls=calls, captured=captured)
        return
    p, g = (bench.tensor(numel, dtype=torch.bfloat16 if halves else torch.float32) for _ in range(2))
    options: dict = {"masters_lo": [torch.zeros_like(p, dtype=torch.int16)]} if halves else {}
    if in_step:
        options |= {"scale": torch.ones((), device=p.device), "found_inf": torch.zeros((), device=p.device)}
    bench.time(case, _arena_step(op, implementation != "reference", p, g, options))


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["triton", "reference", "pytorch"])
def bench_gradient_norm(mode: str, implementation: str, bench: Bench) -> None:
    sizes, dtype = _sizes(bench), torch.bfloat16 if mode == "bf16" else torch.float32
    case = Case("gradient_norm", "all parameters", 1, implementation, mode, gradient_norm.OP.bytes(sum(sizes), dtype.itemsize))
    if implementation == "pytorch":
        grads = _gradients(bench, sizes, dtype)
        bench.time(case, lambda: torch.isfinite(torch.nn.utils.get_total_norm(grads)))
    else:
        (arena,) = _gradients(bench, [sum(sizes)], dtype)
        norm = gradient_norm_triton if implementation == "triton" else gradient_norm_reference
        bench.time(case, lambda: norm([arena]))
