"""Mutation testing: plant small faults in the code, one at a time, and count those that no test notices.

Run it by hand:

    pip install pytest-cov
    python tests/mutants.py map                         # run the whole suite once; WORK/map.json: the tests of every line
    python tests/mutants.py run --count 600 --seed 1    # append to WORK/mutants-0.jsonl; repeat the command to continue
    python tests/mutants.py report

A mutant is killed if one of the tests that run its line fails or takes far too long.  Its tests run on a copy of the checkout,
in a fork of a process that has imported the libraries.  A person reads the survivors; LOG.md lists them with reasons.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastsd/train", "fastsd/run", "fastsd/data", "fastsd/model/formats", "fastsd/storage.py")
FILES = ("kernels/fastsd_kernels/cpu_optimizers.py", "kernels/fastsd_kernels/optim.py")
LIMIT_S = 300  # for all tests of a mutant
SWAPS: dict[type, type] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A fault: `new` replaces the bytes [start, end) of a file."""

    file: str
    line: int
    start: int
    end: int
    new: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.start}:{self.new}"


def mutations(node: ast.AST) -> Iterator[tuple[ast.AST, str, str]]:
    """Yield (the node to replace, its replacement, kind) for every fault that can be planted at a node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield node, ast.unparse(ast.Compare(node.left, [SWAPS[type(op)]()], node.comparators)), "compare"
        case ast.BoolOp():
            yield node, f"({ast.unparse(ast.BoolOp(SWAPS[type(node.op)](), node.values))})", "and/or"
        case ast.BinOp() if type(node.op) in SWAPS:
            yield node, f"({ast.unparse(ast.BinOp(node.left, SWAPS[type(node.op)](), node.right))})", "operator"
        case ast.AugAssign() if type(node.op) in SWAPS:
            yield node, ast.unparse(ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)), "operator"
        case ast.UnaryOp(op=ast.Not()):
            yield node, f"bool({ast.unparse(node.operand)})", "not"
        case ast.Constant(value=bool()):
            yield node, str(not node.value), "constant"
        case ast.Constant(value=int()):
            yield node, str(node.value + 1), "constant"
        case ast.If() if all(isinstance(statement, ast.Raise) for statement in node.body):
            yield node.test, "False", "refusal"
        case ast.If() | ast.IfExp() | ast.While():
            yield node.test, f"(not ({ast.unparse(node.test)}))", "condition"
        case ast.Expr(value=ast.Call()):
            yield node, "pass", "call dropped"
        case ast.Return(value=ast.expr()):
            yield node, "return None", "return"
        case ast.Call(keywords=[_, *_]):
            for keyword in node.keywords:
                others = [other for other in node.keywords if other is not keyword]
                yield node, ast.unparse(ast.Call(node.func, node.args, others)), f"{keyword.arg}= dropped"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of all function bodies, without annotations, decorators, default values and f-strings."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.JoinedStr):
            continue
        if isinstance(child, ast.FunctionDef):
            for statement in child.body:
                yield statement
                yield from nodes(statement)
        elif isinstance(child, ast.ClassDef):
            yield from nodes(child)
        elif not isinstance(tree, ast.Module | ast.ClassDef):
            yield child
            yield from nodes(child)


def mutants(path: Path) -> list[Mutant]:
    source = path.read_bytes()
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    by_name = {}
    for node in nodes(ast.parse(source)):
        for target, new, kind in mutations(node):
            start = line_starts[target.lineno - 1] + target.col_offset
            end = line_starts[target.end_lineno - 1] + target.end_col_offset
            mutant = Mutant(path.relative_to(ROOT).as_posix(), target.lineno, start, end, new, kind)
            by_name[mutant.name] = mutant
    return list(by_name.values())


def random_mutants(count: int, seed: int) -> list[Mutant]:
    paths = [path for folder in FOLDERS for path in sorted([ROOT / folder, *(ROOT / folder).rglob("*.py")]) if path.is_file()]
    paths += [ROOT / file for file in FILES if (ROOT / file).exists()]
    all_mutants = [mutant for path in paths for mutant in mutants(path)]
    random.Random(seed).shuffle(all_mutants)
    return all_mutants[:count]


def make_map(work: Path) -> None:
    """Run the suite once with coverage. Write {file: {line: [tests]}} and the seconds of each test to map.json."""
    junit, data_file, config = work / "junit.xml", work / "coverage", work / "coveragerc"
    config.write_text(f"[run]\nsource = {ROOT}/fastsd\n    {ROOT}/kernels\ndata_file = {data_file}\n")
    options = ["--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report=", f"--junitxml={junit}"]
    subprocess.run([sys.executable, "-m", "pytest", "-n", "auto", *options], cwd=ROOT)
    import coverage

    data = coverage.CoverageData(str(data_file))
    data.read()
    lines = {}
    for file in data.measured_files():
        contexts = data.contexts_by_lineno(file)
        tests = {line: sorted({name.split("|")[0] for name in names if name}) for line, names in contexts.items()}
        lines[Path(file).relative_to(ROOT).as_posix()] = tests
    import xml.etree.ElementTree as ElementTree

    seconds = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        seconds[f"{file}::{case.get('name')}"] = float(case.get("time", 0))
    (work / "map.json").write_text(json.dumps({"lines": lines, "seconds": seconds}))


def run_tests(copy: Path, tests: list[str]) -> int:
    """Run tests in a fork; return pytest's exit code, or -1 after LIMIT_S."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(copy)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:xdist", "-p", "no:randomly", "--timeout=120", *tests])))
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if (status := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(status[1])
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def run(work: Path, count: int, seed: int, worker: int, workers: int) -> None:
    tests_map = json.loads((work / "map.json").read_text())
    results = work / f"mutants-{worker}.jsonl"
    finished = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    copy = work / f"copy-{worker}"
    shutil.rmtree(copy, ignore_errors=True)
    for name in ("fastsd", "kernels", "tests", "bench", "configs", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md"):
        source = ROOT / name
        if source.exists():
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    sys.path[:0] = [str(copy), str(copy / "kernels"), str(copy / "tests/support"), str(copy / "bench")]
    os.environ["PYTHONPATH"] = f"{copy}:{copy / 'kernels'}"
    os.environ["TRITON_INTERPRET"] = "1"
    for library in (
        "pytest",
        "torch",
        "transformers.models.clip.modeling_clip",
        "diffusers.models.autoencoders.autoencoder_kl",
    ):
        importlib.import_module(library)
    for mutant in random_mutants(count, seed)[worker::workers]:
        if mutant.name in finished:
            continue
        tests = tests_map["lines"].get(mutant.file, {}).get(str(mutant.line), [])
        tests = sorted(tests, key=lambda test: tests_map["seconds"].get(test, 1.0))
        path = copy / mutant.file
        original = path.read_bytes()
        path.write_bytes(original[: mutant.start] + mutant.new.encode() + original[mutant.end :])
        started_at = time.monotonic()
        code = run_tests(copy, tests) if tests else None
        path.write_bytes(original)
        outcome = {None: "not run", 0: "survived"}.get(code, "killed")
        row = {"name": mutant.name, "outcome": outcome, "tests": len(tests), "s": round(time.monotonic() - started_at, 1)}
        row |= asdict(mutant) | {"old": original[mutant.start : mutant.end].decode()}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(outcome, f"{mutant.file}:{mutant.line}", mutant.kind, f"({row['s']} s)", flush=True)


def report(work: Path) -> None:
    rows = [json.loads(line) for path in sorted(work.glob("mutants-*.jsonl")) for line in path.read_text().splitlines()]
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("killed", "survived", "not run")}
    print(f"{len(rows)} mutants: {counts}; killed {counts['killed'] / max(len(rows), 1):.1%}")
    for row in sorted(rows, key=lambda row: row["name"]):
        if row["outcome"] != "killed":
            print(f"{row['outcome']:9} {row['file']}:{row['line']}: {row['kind']}: {row['old'][:90]!r} -> {row['new'][:90]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing of fastsd.")
    parser.add_argument("action", choices=["map", "run", "report"])
    parser.add_argument("--work", type=Path, default=Path("mutants"), help="Folder for the map, the results and the copies.")
    parser.add_argument("--count", type=int, default=600, help="Mutants to plant.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the choice.")
    parser.add_argument("--worker", type=int, default=0, help="This process takes mutants worker, worker + workers, ...")
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.action == "map":
        make_map(work)
    elif options.action == "run":
        run(work, options.count, options.seed, options.worker, options.workers)
    else:
        report(work)


if __name__ == "__main__":
    main()
