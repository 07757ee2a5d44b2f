"""Adding noise to latents, compared with the same computation in PyTorch and with PyTorch's own generator.

"reference" computes the same counter-based noise with PyTorch's integers.  "torch.randn" draws from a stateful generator, so
the noise of a single sample cannot be reproduced.  Its time is the lower limit for PyTorch.
"""

from __future__ import annotations

import pytest
import torch
from measure import DTYPES, Bench, Case

from fastsd_kernels import workload
from fastsd_kernels.noise import ADD_NOISE, add_noise_reference, add_noise_triton

FIRST = min(workload.CONV, key=lambda conv: conv.inputs)  # the convolution that takes latents
TIMESTEPS = 1000


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("implementation", ["triton", "reference", "torch.randn"])
def bench_noised(mode: str, implementation: str, bench: Bench) -> None:
    x = bench.tensor(bench.batch, FIRST.inputs, FIRST.side, FIRST.side, dtype=DTYPES[mode])
    positions = torch.arange(bench.batch, device=x.device)
    t = torch.randint(TIMESTEPS, (bench.batch,), device=x.device)
    signal, level = (torch.rand(TIMESTEPS, device=x.device) for _ in range(2))

    def randn() -> tuple[torch.Tensor, torch.Tensor]:
        eps = torch.randn(x.shape, device=x.device)
        return signal[t][:, None, None, None] * x + level[t][:, None, None, None] * eps, eps

    add_noise = add_noise_triton if implementation == "triton" else add_noise_reference
    work = randn if implementation == "torch.randn" else lambda: add_noise(x, positions, t, signal, level, 7)
    kind = f"{FIRST.inputs}x{FIRST.side}x{FIRST.side}"
    case = Case("noised", kind, 1, implementation, mode, ADD_NOISE.bytes(x.numel(), x.element_size()))
    bench.time(case, work)
