"""Test the UNet on the TRITON table, which must be as close to fp64 as PyTorch, and the choice of the table."""

import subprocess
import sys

import pytest
import torch
from environment import DEVICE
from sentences import refused
from unets import CFG

from fastsd.model.unet import UNet
from fastsd.train.device import choose_ops, describe_ops
from fastsd_kernels import CPU, REFERENCE, TRITON

pytestmark = [pytest.mark.kernels, pytest.mark.slow]


def run(ops, dtype, checkpointing="none"):
    """Return the prediction and all gradients of a UNet. Its weights and inputs are the same for every table and dtype."""
    torch.manual_seed(0)
    unet = UNet(CFG, ops, checkpointing).to(DEVICE, dtype)
    x, context, target = torch.randn(2, 4, 4, 4), torch.randn(2, 7, 16), torch.randn(2, 4, 4, 4)
    x, context, target = (value.to(DEVICE, dtype) for value in (x, context, target))
    out = unet(x, torch.tensor([3, 700], device=DEVICE), context)
    (out * target).sum().backward()
    return {"out": out.detach(), **{name: p.grad for name, p in unet.named_parameters()}}


def error(tensors, truth):
    """Return the norm of the relative errors of all tensors."""
    return torch.stack([(tensors[name].double() - exact).norm() / exact.norm() for name, exact in truth.items()]).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_as_close_to_fp64_as_pytorchs(dtype):
    truth = run(REFERENCE, torch.float64)
    triton_error, reference_error = (error(run(ops, dtype), truth) for ops in (TRITON, REFERENCE))
    print(f"{dtype}: {triton_error:.2e} against {reference_error:.2e}")
    assert triton_error <= 2 * reference_error


def test_statistics_that_are_taken_again_change_no_bit():
    """Checkpointed blocks take the statistics of their inputs, and others get them from the sum before."""
    passed, taken_again = (run(TRITON, torch.bfloat16, level) for level in ("none", "block"))
    assert all(torch.equal(value, taken_again[name]) for name, value in passed.items())


def test_compiles_into_one_graph():
    torch.manual_seed(0)
    unet = UNet(CFG, TRITON).to(DEVICE)
    inputs = torch.randn(1, 4, 4, 4, device=DEVICE), torch.tensor([3], device=DEVICE), torch.randn(1, 7, 16, device=DEVICE)
    gradients = []
    for function in (unet, torch.compile(unet, fullgraph=True, backend="aot_eager")):
        unet.zero_grad()
        function(*inputs).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters()})
    assert error(*gradients) < 1e-5


def test_choice_of_the_table():
    cpu = torch.device("cpu")
    assert choose_ops("reference", cpu) is REFERENCE
    assert choose_ops("auto", cpu) is CPU  # the interpreter is never chosen automatically
    if DEVICE == "cuda":
        assert choose_ops("auto", torch.device("cuda")) is TRITON
    else:
        assert choose_ops("triton", cpu) is TRITON  # in the interpreter


def test_a_gpu_without_triton_is_an_error(monkeypatch):
    monkeypatch.setattr("fastsd.train.device.TRITON", None)
    with refused("triton-missing"):
        choose_ops("auto", torch.device("cuda"))
    with refused("triton-cannot-run"):
        choose_ops("triton", torch.device("cuda"))
    assert choose_ops("auto", torch.device("cpu")) is CPU


def test_a_cpu_without_a_compiler_is_described(monkeypatch):
    for module in ("fastsd_kernels", "fastsd.train.device"):
        monkeypatch.setattr(f"{module}.cpu_problem", lambda: "gcc: not found")
    table = choose_ops("auto", torch.device("cpu"))
    assert table is REFERENCE
    assert describe_ops(table).startswith("reference") and "gcc: not found" in describe_ops(table)


def test_references_run_without_triton():  # as on macOS, where it does not exist
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from fastsd_kernels import REFERENCE, TRITON
assert TRITON is None and "triton" not in sys.modules
print(REFERENCE.geglu(torch.ones(2, 4)).shape)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.stdout.strip() == "torch.Size([2, 2])", process.stderr
