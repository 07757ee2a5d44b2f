"""The structure of the code: each folder has a floor, imports lead only to lower floors, and files and functions stay short."""

import ast
import functools
import graphlib
import re
import subprocess
from collections.abc import Iterator, Mapping

import pytest
from environment import ROOT

# Every folder has a floor, also one inside another folder. Loose files in fastsd/ are on floor 0.2, but for the command line.
FLOORS = {
    "fastsd_kernels": 0, "fastsd.terminal": 0, "fastsd": 0.2, "fastsd.config": 0.5,
    "fastsd.model": 1, "fastsd.model.formats": 1.5,
    "fastsd.data": 2, "fastsd.data.sources": 2, "fastsd.data.building": 2.5,
    "fastsd.train": 3,
    "fastsd.sampling": 4, "fastsd.bench": 4,
    "fastsd.plan": 5,
    "fastsd.run": 6,
    "fastsd.commands": 7,
    "fastsd.compare": 8, "fastsd.demo": 8,
    "fastsd.cli": 9, "fastsd.__main__": 9.5,
}  # fmt: skip
FLOOR_0 = {"torch", "triton", "fastsd_kernels", "math", "enum", "dataclasses", "collections", "typing", "__future__",
           "contextlib"}  # fmt: skip
TOOL = {"argparse", "concurrent", "json", "multiprocessing", "operator", "pathlib", "re", "subprocess", "sys", "tempfile"}
MORE_ON_FLOOR_0 = {
    "fastsd_kernels.no_triton": {"importlib", "sys", "types"},
    # This module compiles and loads a library.
    "fastsd_kernels.cpu_optimizers": {"ctypes", "functools", "hashlib", "os", "pathlib", "shlex", "shutil", "subprocess",
                                      "tempfile"},
    # Training never imports these.
    **{f"fastsd_kernels.{name}": TOOL for name in ("atlas", "prediction", "replay", "sass", "ttir", "warp_path")},
}  # fmt: skip
FILES = sorted([*ROOT.glob("fastsd/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def module_of(path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_of(path): path.read_text() for path in FILES}


def folder_of(module: str) -> str:
    """Return the entry of `FLOORS` for a module: itself, or the innermost folder that holds it."""
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return module


def imported(module: str, sources: Mapping[str, str]) -> set[str]:
    return _imported(sources[module]) - {module}


@functools.cache
def _imported(source: str) -> set[str]:
    return set(imports(ast.parse(source)))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every imported module, also those for type checkers. `from a import b` yields `a.b` if that is our module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in SOURCES else node.module


def faults(module: str, sources: Mapping[str, str]) -> list[str]:
    """List a module's forbidden imports: of higher floors, of pickles, and on floor 0 of more than torch and triton."""
    problems, folder = [], folder_of(module)
    for name in sorted(imported(module, sources)):
        top = name.partition(".")[0]
        if top in ("fastsd", "fastsd_kernels"):
            other_folder = folder_of(name)
            if other_folder != folder and FLOORS[other_folder] >= FLOORS[folder]:
                problems.append(f"{module} imports {name}, which is not below it")
        elif top in ("pickle", "dill", "joblib"):
            problems.append(f"{module} imports {name}")
        if folder == "fastsd_kernels" and top not in FLOOR_0 | MORE_ON_FLOOR_0.get(module, set()):
            problems.append(f"{module} imports {name}; floor 0 has torch and triton only")
    return problems


def circle(sources: Mapping[str, str]) -> list[str]:
    """Return modules that import each other in a circle, or an empty list."""
    try:
        graphlib.TopologicalSorter({module: imported(module, sources) for module in sources}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_run_downwards(module):
    assert faults(module, SOURCES) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(SOURCES) == []


@pytest.mark.parametrize("module, planted, fault", [
    ("fastsd.train.step", "from fastsd.run.loop import train", "imports fastsd.run.loop, which is not below it"),
    ("fastsd.run.export", "import fastsd.commands.cache", "imports fastsd.commands.cache, which is not below it"),
    ("fastsd.data.cache", "import fastsd.data.building.store", "imports fastsd.data.building.store, which is not below it"),
    ("fastsd.demo.demo", "from fastsd.compare import page", "imports fastsd.compare.page, which is not below it"),
    ("fastsd.storage", "from fastsd.cli import main", "imports fastsd.cli, which is not below it"),
    ("fastsd.model.vae", "import pickle", "imports pickle"),
    ("fastsd_kernels.lion", "import os", "imports os; floor 0 has torch and triton only"),
])  # fmt: skip
def test_a_planted_import_is_refused(module, planted, fault):
    assert f"{module} {fault}" in faults(module, planted_in(module, planted))


@pytest.mark.parametrize("module, planted, other", [
    ("fastsd.bench.counters", "from fastsd.bench.timing import in_turns", "fastsd.bench.timing"),
    ("fastsd.errors", "if TYPE_CHECKING:\n    from fastsd import storage", "fastsd.storage"),
    ("fastsd.run.checkpoint", "def late():\n    import fastsd.run.loop", "fastsd.run.loop"),
])  # fmt: skip
def test_a_planted_circle_is_refused(module, planted, other):
    assert {module, other} <= set(circle(planted_in(module, planted)))


def planted_in(module: str, text: str) -> dict[str, str]:
    return {**SOURCES, module: f"{SOURCES[module]}\n{text}\n"}


def test_every_folder_has_a_floor_and_few_files_are_loose():
    folders = {module_of(path.parent / "__init__.py") for path in FILES}
    assert folders <= FLOORS.keys()
    assert len([path for path in FILES if path.parent == ROOT / "fastsd"]) <= 5


def test_files_of_one_name_hold_the_same_kind_of_thing():
    # data/cache.py is the latent cache, commands/cache.py the command that fills it.
    allowed = {"__init__", "cache", "optim"}
    names = [path.stem for path in FILES]
    assert {name for name in names if names.count(name) > 1} <= allowed


def test_the_command_line_imports_nothing_heavy():
    light = {
        "__future__",
        "collections.abc",
        "contextlib",
        "functools",
        "os",
        "sys",
        "enum",
        "pathlib",
        "typing",
        "typer",
        "fastsd.errors",
        "fastsd.commands.arguments",
        "fastsd.commands.examples",
    }
    for module in ("fastsd.cli", "fastsd.commands.arguments", "fastsd.commands.examples"):
        nodes = [node for node in ast.parse(SOURCES[module]).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert set(imports(ast.Module(nodes, []))) <= light


def test_only_fastsd_and_its_kernels_are_packages():
    tracked = subprocess.run(["git", "ls-files", "*__init__.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    allowed = ("fastsd/", "kernels/fastsd_kernels/")
    assert [name for name in tracked if not name.startswith(allowed)] == []
    for folder in ("kernels", "tests", "bench", "configs"):
        assert not list((ROOT / folder).glob("__init__.py"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name}"


def test_each_folder_tells_its_floor():
    for folder, floor in FLOORS.items():
        if folder not in ("fastsd", "fastsd.cli", "fastsd.__main__"):
            assert ast.get_docstring(ast.parse(SOURCES[folder])).startswith(f"Floor {floor}: "), folder


def test_files_that_texts_name_exist():
    folders = ("fastsd", "kernels", "bench", "configs")
    texts = [*ROOT.glob("*.md"), *(path for folder in folders for path in ROOT.glob(f"{folder}/**/*.[mp][dy]"))]
    existing = [f"/{path.relative_to(ROOT).as_posix()}" for path in [*texts, *ROOT.glob("tests/**/*.py")]]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        if path.name != "LOG.md"  # it gives files the names they had at the time
        for name in re.findall(r"(?<![\w/*.{])(?:\.\./)?([\w./]*\w\.py)\b", path.read_text())
        if not any(file.endswith(f"/{name}") for file in existing)
    ]
    # A placeholder, and a file of the original Stable Diffusion.
    allowed = {"CONTRIBUTING.md: kernels/fastsd_kernels/OP.py", "fastsd/model/formats/original_names.py: openaimodel.py"}
    assert set(missing) == allowed
