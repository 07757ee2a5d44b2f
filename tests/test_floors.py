"""The house: imports run downwards only, `kernels` is a source root and no package, files and functions stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "fastsd_kernels": 0,
    "fastsd.errors": 0, "fastsd.complaints": 0, "fastsd.config": 0, "fastsd.stages": 0, "fastsd.storage": 0, "fastsd": 0,
    "fastsd.model": 1,
    "fastsd.data": 2,
    "fastsd.train": 2,
    "fastsd.bench": 3, "fastsd.bench_data": 3, "fastsd.peers": 3, "fastsd.counters": 3, "fastsd.plan": 3, "fastsd.cards": 0,
    "fastsd.sample": 3, "fastsd.commands": 3, "fastsd.compare": 3, "fastsd.sweep": 3, "fastsd.validate": 3, "fastsd.redraw": 3,
    "fastsd.convert": 3, "fastsd.model_card": 3, "fastsd.train.export": 3,
    "fastsd.long_clip": 3, "fastsd.lr_probe": 3, "fastsd.demo": 3, "fastsd.demo_world": 3, "fastsd.demo_models": 3,
    "fastsd.swap_vae": 3, "fastsd.train.step": 3, "fastsd.train.run": 3, "fastsd.train.loop": 3,
    "fastsd.cli": 4,
}  # fmt: skip
FILES = sorted([*ROOT.glob("fastsd/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    while module not in FLOORS:
        assert "." in module, f"{module} has no floor; give it one in FLOORS"
        module = module.rpartition(".")[0]
    return FLOORS[module]


def imports(tree: ast.AST):
    """Every imported module, with names that are modules of ours resolved; those for type checkers only are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if (ROOT / (full.replace(".", "/") + ".py")).exists() else node.module


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_downwards(path):
    module = module_of(path)
    for imported in imports(ast.parse(path.read_text())):
        top = imported.split(".")[0]
        if top in ("fastsd", "fastsd_kernels"):
            assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}, which is above it"
        if top in ("pickle", "dill", "joblib"):
            pytest.fail(f"{module} imports {imported}")
        if module.startswith("fastsd_kernels"):
            allowed = {"torch", "triton", "fastsd_kernels", "math", "enum", "dataclasses", "collections", "typing",
                       "__future__", "contextlib"}  # fmt: skip
            if module == "fastsd_kernels.absent":
                allowed |= {"importlib", "sys", "types"}
            if module == "fastsd_kernels.cpu":  # compiles and loads a library
                allowed |= {"ctypes", "functools", "hashlib", "os", "pathlib", "shlex", "shutil", "subprocess", "tempfile"}
            if module.rpartition(".")[2] in ("atlas", "machine_code"):  # a tool, never imported by what trains
                allowed |= {"argparse", "concurrent", "json", "multiprocessing", "pathlib", "re", "subprocess", "sys",
                            "tempfile"}  # fmt: skip
            assert top in allowed, f"{module} imports {imported}; floor 0 has torch and triton only"


def test_the_command_line_imports_nothing_heavy():
    tree = ast.parse((ROOT / "fastsd/cli.py").read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in top for name in imports(ast.Module([node], []))}
    assert names <= {"__future__", "os", "sys", "enum", "pathlib", "typing", "typer", "fastsd.errors"}


def test_no_package_where_none_may_be():
    for folder in ("kernels", "tests", "bench", "configs"):
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_lines_weigh(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"
