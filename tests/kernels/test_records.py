"""The records of the operations: they agree with the tables, with the README, and with the launches of the kernels' files."""

import ast
import functools
import re
from dataclasses import fields

import pytest
from environment import ROOT

from fastsd_kernels import CPU, RECORDS, REFERENCE, TRITON, workload
from fastsd_kernels.launch import recording
from fastsd_kernels.ops import Ops

FILES = sorted(ROOT.glob("kernels/fastsd_kernels/*.py"))
README = (ROOT / "kernels/README.md").read_text()
ONE = {  # kinds of one number
    "group_norm": workload.GroupNorm(channels=1, side=1, groups=1, eps=1e-5, silu=False, shift=False),
    "layer_norm": workload.LayerNorm(rows=1, features=1, eps=1e-5),
    "geglu": workload.Geglu(rows=1, features=1),
}


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def is_kernel(function):
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_every_op_has_a_record_and_a_field():
    names = {op.name for op in RECORDS}
    assert len(names) == len(RECORDS) and names == ({field.name for field in fields(Ops)} - {"name", "forward_backward"})
    public = [f.name for path in FILES for f in functions(path) if f.name.endswith("_triton") and f.name[0] != "_"]
    assert set(public) == {f"{name}_triton" for name in names}


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
def test_tables_have_the_implementations_of_the_record(op):
    assert op.triton.__name__ == f"{op.name}_triton"
    assert getattr(REFERENCE, op.name) is op.reference and getattr(TRITON, op.name) is op.triton
    assert getattr(CPU, op.name) is (op.cpu or op.reference)


@functools.cache
def launched() -> set[tuple[str, str]]:
    """Return the module and name of each kernel that the calls of the records launch."""
    kernels = set()
    with recording(89) as launches:
        for op in RECORDS:
            for kind, mode in op.calls():
                assert kind and mode and launches
                kernels |= {(launch.kernel.fn.__module__, launch.kernel.__name__) for launch in launches}
                launches.clear()
    return kernels


def test_calls_launch_every_kernel():
    kernels = set()
    for path in FILES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        started = {ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) in ("launch", "_launch")}
        kernels |= {(f"fastsd_kernels.{path.stem}", f.name) for f in functions(path) if is_kernel(f) and f.name in started}
    assert launched() == kernels
    assert {op.triton.__module__ for op in RECORDS} <= {module for module, _ in kernels}


@pytest.mark.parametrize("op", RECORDS, ids=lambda op: op.name)
def test_readme_has_the_bytes_of_the_record(op):
    file = f"| `{op.triton.__module__.rpartition('.')[2]}.py` |"
    texts = [line.split("|")[3] for line in README.splitlines() if file in line]
    assert texts
    if op.name in ONE:  # multiples of a tensor in the forward and in the backward
        assert sum(map(int, re.findall(r"(\d+)[xF]", texts[0]))) == op.bytes(ONE[op.name], 1)
    elif op.cpu and "per parameter" in texts[0]:
        assert re.findall(r"(\d+) (?:B|with)", texts[0]) == [str(op.bytes(1, size)) for size in (4, 2)]
        assert README.count(texts[0]) >= 2  # also in the table of the CPU


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_functions_but_kernels_are_annotated(path):
    for function in functions(path):
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        untyped = [a.arg for a in named if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        assert is_kernel(function) or (untyped == [] and function.returns is not None), function.name
