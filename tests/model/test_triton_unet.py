"""The whole UNet on the TRITON table: as near to fp64 as PyTorch, an ordinary graph for torch.compile."""

import subprocess
import sys

import pytest
import torch
from unets import CFG

from fastsd.errors import UserError
from fastsd.model.unet import UNet
from fastsd.train.precision import choose_ops, describe_ops
from fastsd_kernels import CPU, REFERENCE, TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(ops, dtype):
    """Prediction and all gradients of one UNet, the same numbers for every table and dtype."""
    torch.manual_seed(0)
    unet = UNet(CFG, ops).to(DEVICE, dtype)
    x, context, target = torch.randn(2, 4, 4, 4), torch.randn(2, 7, 16), torch.randn(2, 4, 4, 4)
    x, context, target = (value.to(DEVICE, dtype) for value in (x, context, target))
    out = unet(x, torch.tensor([3, 700], device=DEVICE), context)
    (out * target).sum().backward()
    return {"out": out.detach(), **{name: p.grad for name, p in unet.named_parameters()}}


def error(found, truth):
    """Over all tensors, each relative to its size."""
    return torch.stack([(found[name].double() - want).norm() / want.norm() for name, want in truth.items()]).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_are_as_near_to_fp64_as_pytorchs(dtype):
    truth = run(REFERENCE, torch.float64)
    ours, theirs = (error(run(ops, dtype), truth) for ops in (TRITON, REFERENCE))
    print(f"{dtype}: {ours:.2e} against {theirs:.2e}")
    assert ours <= 2 * theirs


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


def test_which_table_a_run_gets():
    cpu = torch.device("cpu")
    assert choose_ops("reference", cpu) is REFERENCE
    assert choose_ops("auto", cpu) is CPU  # the interpreter is never chosen unasked
    if DEVICE == "cuda":
        assert choose_ops("auto", torch.device("cuda")) is TRITON
    else:
        assert choose_ops("triton", cpu) is TRITON  # asked for, and TRITON_INTERPRET is set


def test_a_gpu_without_triton_is_said_aloud(monkeypatch):
    monkeypatch.setattr("fastsd.train.precision.TRITON", None)
    with pytest.raises(UserError, match="Triton is not installed"):
        choose_ops("auto", torch.device("cuda"))
    with pytest.raises(UserError, match="is not installed"):
        choose_ops("triton", torch.device("cuda"))
    assert choose_ops("auto", torch.device("cpu")) is CPU


def test_a_cpu_without_a_compiler_is_said_aloud(monkeypatch):
    for place in ("fastsd_kernels", "fastsd.train.precision"):
        monkeypatch.setattr(f"{place}.cpu_problem", lambda: "no C compiler found")
    table = choose_ops("auto", torch.device("cpu"))
    assert table is REFERENCE
    assert describe_ops(table) == "reference (no C compiler found: optimizer steps are several times slower)"


def test_without_triton_the_references_still_run():
    """As on macOS, where it does not exist."""
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from fastsd_kernels import REFERENCE, TRITON
assert TRITON is None and "triton" not in sys.modules
print(REFERENCE.geglu(torch.ones(2, 4)).shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([2, 2])", done.stderr
