"""Check a machine with a GPU in seconds: versions, the C compiler that Triton needs, and one kernel against PyTorch.

python bench/gpu_machine.py [--small] [--lines FILE]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial

import torch
import triton
from measurements import Measurement, Record, Setup, figures_lines
from measurements import main as run_measurements

from fastsd.bench import counters
from fastsd_kernels import REFERENCE, TRITON, cpu_optimizers


def versions(setup: Setup) -> list[Record]:
    """Return the versions of the libraries, and the device's memory."""
    free, total = torch.cuda.mem_get_info(setup.device)
    figures = {**counters.stamp(setup.device), "triton": triton.__version__, "free_gb": free / 1e9, "total_gb": total / 1e9}
    return [setup.record("machine", "versions", "", "", **{k: v for k, v in figures.items() if k != "device"})]


def c_compiler(setup: Setup) -> list[Record]:
    """Find the compiler as Triton does: $CC, gcc or clang. It builds the launcher of every kernel."""
    path = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    assert path, "no C compiler found: set $CC, or install gcc or clang"
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    reason = cpu_optimizers.problem() or "usable"
    return [setup.record("machine", "C compiler", "", path, version=version, optimizers_for_a_cpu=reason)]


def one_kernel(dtype: torch.dtype, setup: Setup) -> list[Record]:
    """Launch one Triton kernel. Its error against fp64 may be twice PyTorch's."""
    assert TRITON is not None, "Triton is not installed"
    x = torch.randn(64, 640, device=setup.device).to(dtype)
    expected = REFERENCE.geglu(x.double())
    errors = [(ops.geglu(x).double() - expected).norm() / expected.norm() for ops in (TRITON, REFERENCE)]
    ours, pytorch = (error.item() for error in errors)
    seconds = counters.seconds(lambda: TRITON.geglu(x), setup.device, repeats=3)
    assert ours <= 2 * pytorch, f"error {ours:.1e}, and that of PyTorch is {pytorch:.1e}"
    name = str(dtype).removeprefix("torch.")
    return [setup.record("machine", "geglu", name, "triton", error=ours, pytorch_error=pytorch, us=1e6 * seconds)]


def measurements() -> list[Measurement]:
    kernels = [
        Measurement("machine", f"geglu, {dtype}", partial(one_kernel, dtype)) for dtype in (torch.float32, torch.bfloat16)
    ]
    return [Measurement("machine", "versions", versions), Measurement("machine", "C compiler", c_compiler), *kernels]


if __name__ == "__main__":
    sys.exit(run_measurements(__doc__, __file__, measurements(), figures_lines))
