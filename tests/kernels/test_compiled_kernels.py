"""Properties of compiled kernels that need no GPU. They are compiled in new processes, because tests run the interpreter."""

import json
import os
import subprocess
import sys
from math import prod

import pytest
from environment import ROOT

from fastsd_kernels.launch import ARCHITECTURES
from fastsd_kernels.prediction import LAUNCH_US

pytestmark = pytest.mark.slow


def output(program, *arguments):
    """Run a program of tests/support with kernels that can be compiled, and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = [sys.executable, str(ROOT / "tests/support" / program), *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_atlas_has_exactly_the_kernels_of_jobs():
    report = output("step_launches.py", *ARCHITECTURES)
    assert set(report) == set(map(str, ARCHITECTURES))
    for target, kernels in report.items():
        assert kernels["missing"] == {} and kernels["superfluous"] == {}, target
        assert kernels["kernels"] > 300


def work(kernel):
    """Return the numbers that a kernel rounds for each tile of the loop and before it, and the multiply-adds of a tile."""
    rows, keys = kernel["ROWS"], kernel["KEYS"]
    width, out_width = (sum(columns for _, columns in kernel[name]) for name in ("SUM_D", "OUT_D"))
    again = min(columns for _, columns in kernel["OUT_D"])  # of an operand that is also summed over rows
    if kernel["kernel"] == "_forward":  # q, k, v and P
        return rows * width + keys * (width + out_width) + rows * keys, rows * keys * (width + out_width)
    if kernel["kernel"] == "_backward_q":  # q, do, k, v, dS, and k's last slice
        return 2 * (rows + keys) * width + rows * keys + keys * again, rows * keys * (2 * width + out_width)
    # k, v, q, do, P, dS, and the last slices of q and do
    return 2 * (rows + keys) * width + 2 * rows * (keys + again), rows * keys * 2 * (width + out_width)


def test_operands_of_tf32_matmuls_are_rounded_once():
    """A thread rounds its share of every operand: none is left out, and none is rounded by each warp that reads it."""
    kernels = output("tensor_core_code.py")
    assert {kernel["target"] for kernel in kernels["tf32"]} == set(ARCHITECTURES)
    for kernel in kernels["tf32"]:
        print({key: kernel[key] for key in ("target", "kernel", "D", "rounded", "matmuls")})
        assert kernel["rounded"] > 0 and kernel["matmuls"] > 0
        if kernel["D"] == 40:
            assert kernel["HOLD"]
            rounded, products = work(kernel)
            assert kernel["rounded"] == rounded / (32 * kernel["num_warps"])
            if kernel["target"] != 90:  # its instructions have several sizes
                assert kernel["matmuls"] == products / prod((16, 8, 8)) / kernel["num_warps"]
    assert len(kernels["bf16"]) == len(kernels["ieee"]) == 6
    assert all(kernel["rounded"] == kernel["matmuls"] == 0 for mode in ("bf16", "ieee") for kernel in kernels[mode])


def test_compiled_kernels_are_predicted():
    report = output("predicted_kernels.py")
    for predicted, least in report["copy"].values():
        assert predicted - LAUNCH_US == pytest.approx(least, rel=0.01)
    assert report["last"] == 16 * (report["instructions"] - 1)  # none is left out
    problems = report["problems"]
    assert problems["sm_89, 1 warp, 16 keys"] == problems["sm_90, 4 warps, 64 keys"] == []
    assert problems["sm_89, 8 warps, 32 keys"] == ["executes 5.66 times the matmul work that it needs"]
    assert problems["sm_90, 1 warp, 16 keys"] == ["executes 100% of its matmul work by mma, not wgmma"]
    assert problems["sm_90, 8 warps, 64 keys"][0] == "executes 1.80 times the matmul work that it needs"
