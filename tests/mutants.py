"""Mutation testing: plant small faults in the code, one at a time, and count those that no test notices.

Run it by hand:

    pip install pytest-cov
    python tests/mutants.py map                         # run the whole suite once; WORK/map.json: the tests of every line
    python tests/mutants.py run --count 600 --seed 1    # append to WORK/mutants-0.jsonl; repeat the command to continue
    python tests/mutants.py run --again --cap 9999      # those that survived, with all their tests
    python tests/mutants.py report

A mutant is killed if one of the tests that run its line fails or takes far too long.  Its tests run on a copy of the checkout,
in a fork of a process that has imported the libraries.  A person reads the survivors; LOG.md lists them with reasons.
"""

import argparse
import ast
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import py_compile
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastsd/train", "fastsd/run", "fastsd/data", "fastsd/model/formats")
FILES = ("fastsd/storage.py", "kernels/fastsd_kernels/cpu_optimizers.py", "kernels/fastsd_kernels/optim.py")
NO_BEHAVIOUR = (
    "strict",
    "encoding",
    "newline",
    "timeout",
)  # they assert, or matter elsewhere
FIRST_TESTS = 10  # run in their own process: a few tests need fewer imports
LIBRARIES = (
    "pytest", "environment", "hypothesis", "numpy", "pydantic", "typer", "rich.console", "PIL.Image", "safetensors.torch",
    "transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl",
)  # fmt: skip
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
        case ast.Return(value=ast.expr()) if ast.unparse(node.value) != "None":
            yield node, "return None", "return"
        case ast.Call(keywords=[_, *_]):
            for keyword in [keyword for keyword in node.keywords if keyword.arg not in NO_BEHAVIOUR]:
                others = [other for other in node.keywords if other is not keyword]
                yield node, ast.unparse(ast.Call(node.func, node.args, others)), f"{keyword.arg}= dropped"


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of all function bodies, without annotations, decorators, default values and messages."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.JoinedStr | ast.Raise) or (isinstance(tree, ast.AnnAssign) and child is tree.annotation):
            continue
        if isinstance(child, ast.keyword) and child.arg in NO_BEHAVIOUR:
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


def mutated_files() -> list[Path]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return paths + [ROOT / file for file in FILES]


def random_mutants(count: int, seed: int) -> list[Mutant]:
    all_mutants = [mutant for path in mutated_files() for mutant in mutants(path)]
    random.Random(seed).shuffle(all_mutants)
    return all_mutants[:count]


def make_map(work: Path) -> None:
    """Run the suite once with coverage. Write {file: {line: [tests]}} and the seconds of each test to map.json."""
    junit, data_file, config = work / "junit.xml", work / "coverage", work / "coveragerc"
    include = "\n    ".join(str(path) for path in mutated_files())
    config.write_text(f"[run]\ninclude =\n    {include}\ndata_file = {data_file}\n")
    options = ["--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report=", f"--junitxml={junit}"]
    subprocess.run([sys.executable, "-m", "pytest", "-n", "2", *options], cwd=ROOT)
    import coverage

    data = coverage.CoverageData(str(data_file))
    data.read()
    seconds = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        file = case.get("classname", "").replace(".", "/") + ".py"
        seconds[f"{file}::{case.get('name')}"] = float(case.get("time", 0))
    tests_of_file: dict[str, list[str]] = {}
    for test in seconds:
        tests_of_file.setdefault(test.split("::")[0], []).append(test)
    lines: dict[str, dict[int, list[str]]] = {}
    for file in data.measured_files():
        lines_of_file = lines.setdefault(Path(file).relative_to(ROOT).as_posix(), {})
        for line, contexts in data.contexts_by_lineno(file).items():
            tests = {context.split("|")[0] for context in contexts if context}
            # A fixture runs once, in the first test that uses it.  Each test of the file may look at its result.
            files = {context.split("::")[0] for context in contexts if context.endswith("|setup")}
            lines_of_file[line] = sorted(tests.union(*(tests_of_file[name] for name in files)))
    (work / "map.json").write_text(json.dumps({"lines": lines, "seconds": seconds}))


class Failure:
    """A pytest plugin that writes the name of the first failed test to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(copy: Path, tests: list[str], limit_s: float) -> str | None:
    """Run tests in a fork. Return the first one that fails, "time" or "crash", or None if all pass."""
    failure = copy.with_name(f"{copy.name}.failed")
    failure.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(copy)
        sink = os.open(copy.with_name(f"{copy.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import pytest

        options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cov", "-p", "no:benchmark", f"--basetemp={copy}.tmp"]
        os._exit(int(pytest.main([*options, *tests], plugins=[Failure(failure)])))
    deadline = time.monotonic() + limit_s
    while not (status := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also processes that the tests have left
    if not status[0]:
        os.waitpid(child, 0)
        return "time"
    if os.waitstatus_to_exitcode(status[1]) == 0:
        return None
    return failure.read_text() if failure.exists() else "crash"


def import_libraries(copy: Path) -> None:
    """Import all that tests need but no module of fastsd, which each fork imports with its mutant."""
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "mutants"))
    sys.path[:0] = [str(copy), str(copy / "kernels"), str(copy / "tests/support"), str(copy / "bench")]
    os.environ["PYTHONPATH"] = f"{copy}:{copy / 'kernels'}"
    # Compile once. Later a file of the same second and size as its bytecode may be a mutant, so nothing else writes bytecode.
    subprocess.run([sys.executable, "-m", "pytest", "-q", "--collect-only"], cwd=copy, stdout=subprocess.DEVNULL)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    for library in LIBRARIES:
        importlib.import_module(library)
    assert not [name for name in sys.modules if name.startswith("fastsd")]


def distance(file: str, test: str) -> float:
    """Return a small number for a test that is likely to check a file: a test of the same name, or in the same folder."""
    test_file, folders = test.split("::")[0], file.split("/")
    return 0.1 if Path(file).stem in test_file else 0.3 if test_file.startswith(f"tests/{folders[1]}/") else 1


@contextlib.contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    path = copy / mutant.file
    original, bytecode = path.read_bytes(), importlib.util.cache_from_source(str(path))
    Path(bytecode).unlink(missing_ok=True)
    path.write_bytes(original[: mutant.start] + mutant.new.encode() + original[mutant.end :])
    yield
    path.write_bytes(original)
    py_compile.compile(str(path), bytecode)


def run(work: Path, count: int, seed: int, worker: int, workers: int, cap_s: float, again: bool) -> None:
    tests_map = json.loads((work / "map.json").read_text())
    results, copy = work / f"mutants-{worker}.jsonl", work / f"copy-{worker}"
    outcomes = {row["name"]: row["outcome"] for row in rows_of(work)}
    shutil.rmtree(copy, ignore_errors=True)
    import_libraries(copy)
    gc.freeze()
    for mutant in random_mutants(count, seed)[worker::workers]:
        if outcomes.get(mutant.name) != ("survived" if again else None):
            continue
        tests = {
            test: tests_map["seconds"].get(test, 1.0) for test in tests_map["lines"][mutant.file].get(str(mutant.line), [])
        }
        ordered = sorted(tests, key=lambda test: tests[test] * distance(mutant.file, test))
        totals_s = itertools.accumulate(tests[test] for test in ordered)
        chosen = ordered[: max(4, sum(total_s <= cap_s for total_s in totals_s))]
        started_at = time.monotonic()
        killer = None
        with planted(mutant, copy):
            for group in (chosen[:FIRST_TESTS], chosen[FIRST_TESTS:]):
                if group and killer is None:
                    killer = run_tests(copy, group, limit_s=30 + 5 * sum(tests[test] for test in group))
        outcome = "killed" if killer else "survived" if tests else "not run"
        row = {"outcome": outcome, "killer": killer, "tests": len(chosen), "tests_left_out": len(tests) - len(chosen)}
        row |= {"name": mutant.name, "s": round(time.monotonic() - started_at, 1), **asdict(mutant)}
        row |= {"old": (copy / mutant.file).read_bytes()[mutant.start : mutant.end].decode()}
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(outcome, f"{mutant.file}:{mutant.line}", mutant.kind, f"({row['s']} s)", flush=True)


def rows_of(work: Path) -> list[dict]:
    """Return the last row of each mutant, or that in which it was killed."""
    rows = [json.loads(line) for path in sorted(work.glob("mutants-*.jsonl")) for line in path.read_text().splitlines()]
    rows.sort(key=lambda row: row["outcome"] == "killed")
    return list({row["name"]: row for row in rows}.values())


def report(work: Path) -> None:
    rows = rows_of(work)
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
    parser.add_argument(
        "--cap", type=float, default=12, help="Expected seconds of all tests of a mutant; the slowest are left out."
    )
    parser.add_argument("--again", action="store_true", help="Run those that have survived, with new tests or a higher cap.")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if options.action == "map":
        make_map(work)
    elif options.action == "run":
        run(work, options.count, options.seed, options.worker, options.workers, options.cap, options.again)
    else:
        report(work)


if __name__ == "__main__":
    main()
