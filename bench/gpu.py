"""Measure on a machine with a GPU in one visit of ten minutes: the most important first, and each result as soon as it ends.

    python bench/gpu.py [--only PART ...] [--limit SECONDS] [--batch 8] [--steps f a b c d e]
    python bench/gpu.py --dry            the same programs here, on a small model and the stand-in for CUDA; prints the plan

`PARTS` lists the parts in their order, with the seconds that each is expected to take on a GPU.  A part gets half as much
again, or its share of --limit if that is more, and never more than the time that is left.  So a part that hangs takes the time
of the last parts only.  The plan marks the parts that do not fit into ten minutes.

The results are OUT/kernels-<gpu>.json for parts that run with pytest, and OUT/<part>-<gpu>.json for the others.  Each file
holds a stamp, the outcome of each part, all figures, and all goals with their thresholds.  Failed and skipped tests are
included.  A file is complete after each part.  A stopped part keeps its results so far.  Another visit to the same GPU with the
same sources, versions and batch adds to a file; any other visit replaces it.  After a killed visit, the next one merges the
lines that it wrote.  The results of --dry are marked, and written to a temporary folder unless --out names one.

Compiling takes longer than measuring.  So test files run in parallel, and several processes compile the kernels of a suite into
Triton's cache before a single process times them.

Exit status: 0 if everything ran, whatever the figures; 1 if a test or benchmark failed or was stopped; 2 if there is no GPU or
no pytest-benchmark.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / folder) for folder in ("", "bench", "kernels")]
sys.path[:0] = PATHS


class Part(NamedTuple):
    """One part of a visit.

    Args:
        seconds: expected on a GPU.
        files: test files, or one script.
        options: of the script.
        dry: pytest's expression for --dry; the script gets --small and --dry.
    """

    seconds: int
    files: list[str]
    options: tuple[str, ...] = ()
    dry: str = ""


PARTS = {
    "machine": Part(20, ["bench/gpu_machine.py"]),
    "graphs": Part(90, ["tests/train/test_graph.py"], dry="stand-in and (lion-fp32 or d_freezes)"),
    "stages": Part(40, ["bench/gpu_memory.py"], ("--only", "stages")),
    "oom": Part(40, ["bench/gpu_memory.py"], ("--only", "oom")),
    "full": Part(170, ["bench/gpu_full_size.py"]),
    "convolutions": Part(60, ["bench/gpu_convolutions.py"]),
    "peers": Part(80, ["bench/steps.py"], ("--only", "f")),
    "evaluation": Part(45, ["bench/gpu_evaluation.py"], ("--only", "evaluation")),
    "checkpoint": Part(40, ["bench/gpu_evaluation.py"], ("--only", "checkpoint")),
    "tests": Part(
        200,
        [
            "tests/kernels/test_attention_kernels.py", "tests/kernels/test_norm_kernels.py",
            "tests/kernels/test_optimizer_kernels.py", "tests/kernels/test_noise_kernels.py", "tests/model/test_triton_unet.py",
            "tests/train/test_step.py", "tests/bench/test_bench_command.py",
        ],
        dry="invalid or refused",
    ),
    "attention": Part(150, ["bench/bench_attention.py"], dry="bf16 and sdpa"),
    "norms": Part(120, ["bench/bench_norms.py"], dry="geglu and pytorch"),
    "optimizers": Part(60, ["bench/bench_optimizers.py"], dry="lion and torch"),
    "noise": Part(30, ["bench/bench_noise.py"], dry="reference"),
    "vae": Part(60, ["bench/vae.py"]),
    "steps": Part(500, ["bench/steps.py"]),
}  # fmt: skip
VISIT = 600.0  # seconds of a GPU that are usually lent at a time
STRETCH = 1.5  # a part may take this many times its expected seconds
LEAST = 5.0  # seconds left below which no part starts
STAND_IN = "bench/cuda_stand_in.py"
# Parts with their own result file; all others run with pytest.
SCRIPTS = tuple(name for name, part in PARTS.items() if part.files[0].startswith("bench/") and "/bench_" not in part.files[0])
COMPILED_FIRST = ("attention", "norms")
PYTEST = ("-m", "pytest")
PACKAGES = ("lion-pytorch", "dadaptation", "diffusers", "transformers")
# File that also has tests for a CPU -> pytest's expression that selects its tests for a GPU.
ON_GPU = {"tests/bench/test_bench_command.py": "cuda", "tests/train/test_graph.py": "gpu"}
# Module -> consequence if it is missing.  The tests of the optimizers need the first two.
OPTIONAL = {
    "lion_pytorch": "lion-pytorch is skipped",
    "dadaptation": "dadaptation and its goal are skipped",
    "diffusers": "whole steps and the VAE are skipped",
    "pytest_timeout": "only --limit stops a test that hangs",
}


def read_stamp() -> dict[str, Any]:
    """Return the conditions of a measurement: the GPU and its limits, versions, and a hash of the sources."""
    import torch
    import triton

    def command_output(*command: str) -> str | None:
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    def smi(field: str) -> str | None:
        # nvidia-smi counts all GPUs, CUDA those that are visible.
        number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return command_output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", f"--id={number}")

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    device = torch.cuda.get_device_properties(0)
    # The hash of the sources distinguishes figures of uncommitted changes from those of the commit.
    sources = [p for folder in ("kernels/fastsd_kernels", "bench", "fastsd") for p in sorted((ROOT / folder).rglob("*.py"))]
    stamp: dict[str, Any] = {"gpu": device.name, "capability": f"sm_{device.major}{device.minor}"}
    stamp |= {"multiprocessors": device.multi_processor_count, "memory_gb": round(device.total_memory / 1e9, 1)}
    stamp |= {"l2_mb": round(device.L2_cache_size / 1e6, 1), "power_limit": smi("power.limit")}
    stamp |= {"clock_limit": smi("clocks.max.sm"), "driver": smi("driver_version"), "torch": torch.__version__}
    stamp |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__}
    stamp |= {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    stamp["commit"] = command_output("git", "rev-parse", "--short", "HEAD")
    stamp["sources"] = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]
    return stamp | {"date": datetime.now(UTC).strftime("%Y-%m-%d")}


def plan(names: Sequence[str]) -> list[str]:
    """Return a line per part: its expected seconds on a GPU, the time of its end, and a mark if that is too late."""
    lines, end = [], 0
    for name in names:
        end += PARTS[name].seconds
        late = "" if end <= VISIT else "  beyond ten minutes"
        lines.append(f"  {name:13} {PARTS[name].seconds:4} s, until {end // 60:2}:{end % 60:02}{late}")
    return lines


def seconds_for(name: str, names: Sequence[str], limit: float, left: float) -> float:
    """Return the seconds that a part may take, of the `left` ones of a visit of `limit` seconds to the parts `names`."""
    share = limit * PARTS[name].seconds / sum(PARTS[other].seconds for other in names)
    return min(left, max(STRETCH * PARTS[name].seconds, share))


def run(
    groups: Sequence[Sequence[str]], end: float | None, *, dry: bool = False, on_gpu: bool = True
) -> tuple[int | None, float]:
    """Run one Python process per group of arguments, in parallel. Return the worst exit status, and the seconds.

    The status is None if a process was stopped.  A single process writes to the terminal.  The output of several processes is
    printed when they are done, one after another.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # on a GPU kernels are compiled
    environment["FASTSD_TEST_GPU"] = "1" if on_gpu else "0"
    launcher = [STAND_IN] if dry else []
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*PATHS, os.environ.get("PYTHONPATH", "")]))
    start = time.monotonic()
    with ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) if len(groups) > 1 else None for _ in groups]
        processes = [
            subprocess.Popen([sys.executable, *launcher, *group], cwd=ROOT, env=environment, stdout=output, stderr=output)
            for group, output in zip(groups, outputs, strict=True)
        ]

        worst_status: int | None = 0
        for process, output in zip(processes, outputs, strict=True):
            try:
                status = process.wait(None if end is None else max(0.0, end - time.monotonic()))
                worst_status = None if worst_status is None else max(worst_status, abs(status))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                worst_status = None
            if output:
                output.seek(0)
                print(output.read(), flush=True)
    return worst_status, time.monotonic() - start


def run_part(name: str, lines: Path, options: argparse.Namespace, end: float | None) -> tuple[int | None, float]:
    """Run a part of `PARTS`. It appends its outcomes to the file `lines`. Return the same as `run`."""
    part, dry = PARTS[name], options.dry
    outcome_args = ["-p", "outcomes", "--outcomes", str(lines)]
    if name in SCRIPTS:
        small = ["--small", "--rounds", "1"] if options.small or dry else []
        only = ["--only", *(["e"] if dry else options.steps)] if name == "steps" else []
        # The others start processes of their own, on the stand-in if they have --dry.
        if dry:
            only += ["--resolution", "32"] if name == "vae" else ["--dry"]
        return run([[*part.files, "--lines", str(lines), *part.options, *only, *small]], end, dry=dry and name == "vae")
    if not part.files[0].startswith("bench/"):
        files = part.files[:1] if dry else part.files
        selections = {file: part.dry if dry else ON_GPU.get(file) for file in files}
        groups = [[*PYTEST, *outcome_args, *_select(selections[file], options.k), file] for file in files]
        own_stand_in = dry and "stand-in" in part.dry
        return run(groups, end, dry=dry and not own_stand_in, on_gpu=not own_stand_in)
    arguments = [*PYTEST, *part.files, "--batch", str(options.batch), "--benchmark-quiet"]
    arguments += ["--compiled"] if options.compiled else []
    if dry:
        return run([[*arguments, *outcome_args, "--quick", *_select(part.dry, options.k)]], end, dry=True)
    if name in COMPILED_FIRST:
        shards = max(1, min(8, (os.cpu_count() or 1) // 2))  # each holds about 0.5 GB of the GPU's memory
        only_compile = [*_select("triton", options.k), "--benchmark-disable"]
        # The last run repeats a failure of these and records it.
        run([[*arguments, *only_compile, "--shard", f"{i}/{shards}"] for i in range(shards)], end)
    return run([[*arguments, *outcome_args, *_select(options.k)]], end)


def _select(*expressions: str | None) -> list[str]:
    """Return pytest's arguments that select the tests matching all expressions."""
    conditions = [f"({expression})" for expression in expressions if expression]
    return ["-k", " and ".join(conditions)] if conditions else []


def merge_lines(result: dict[str, Any], name: str, lines: Path, status: int | None, seconds: float) -> None:
    """Add a part's outcomes and figures to the result, and delete `lines`. Later figures of a case replace earlier ones."""
    outcomes = []
    if lines.exists():
        text = lines.read_text()
        # A process that was killed may have left an incomplete line without a newline.
        outcomes = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    part = result["parts"].setdefault(name, {"runs": [], "failed": {}, "skipped": {}})
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    part["runs"].append({"status": status, "seconds": round(seconds), "cut_off": status is None, **counts})
    for outcome in outcomes:
        for kind in ("failed", "skipped"):
            part[kind].pop(outcome["test"], None)
            if outcome["outcome"] == kind:
                part[kind][outcome["test"]] = outcome["message"]
    kernel_records = [outcome["record"] for outcome in outcomes if "seconds" in outcome.get("record", {})]
    script_records = [record for outcome in outcomes for record in outcome.get("records", [])]
    cases = {_case_key(record): record for record in (*result["records"], *kernel_records, *script_records)}
    result["records"] = list(cases.values())
    lines.unlink(missing_ok=True)


def _case_key(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(record[key] for key in ("op", "kind", "mode", "implementation"))


def open_result(path: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """Return the previous result if its stamp differs only in the date, otherwise a new one. Merge lines of killed parts."""
    new: dict[str, Any] = {"stamp": stamp, "parts": {}, "records": [], "verdicts": []}
    if not path.exists():
        return new
    previous = json.loads(path.read_text())
    if {**previous["stamp"], "date": None} != {**stamp, "date": None}:
        for name in PARTS:
            path.with_suffix(f".{name}.jsonl").unlink(missing_ok=True)
        return new
    for name in PARTS:
        lines = path.with_suffix(f".{name}.jsonl")
        if lines.exists():
            merge_lines(previous, name, lines, None, 0.0)
    return {**previous, "stamp": stamp}


def write_result(result: dict[str, Any], path: Path) -> None:
    judge, _ = _judge_and_table(path)
    result["verdicts"] = [verdict._asdict() for verdict in judge(result["records"])]
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(path)


def _judge_and_table(path: Path) -> tuple[Any, Any]:
    """Return the function that judges the goals of a file's records, and the one that formats them as a table."""
    name = path.name.partition("-")[0]
    if name == "vae":
        from vae import vae_table, vae_verdicts

        return vae_verdicts, vae_table
    from verdicts import step_table, step_verdicts, table, verdicts

    if name in ("steps", "kernels"):
        return (step_verdicts, step_table) if name == "steps" else (verdicts, table)
    from measurements import figures_lines

    return lambda records: [], step_table if name == "peers" else figures_lines


def report(result: dict[str, Any], path: Path) -> bool:
    """Print figures, failures and goals. Return True if every part finished without a failure."""
    judge, table = _judge_and_table(path)
    print("\n" + "\n".join(table(result["records"])))
    print("\nSkipped: " + ("" if any(part["skipped"] for part in result["parts"].values()) else "none"))
    for part in result["parts"].values():
        for test, message in part["skipped"].items():
            print(f"  {test.split('::')[-1]}: {message}")

    passed = True
    print("\nParts:")
    for name, part in result["parts"].items():
        last_run = part["runs"][-1]
        passed &= last_run["status"] == 0 and not part["failed"]
        outcomes = [outcome for outcome in ("passed", "failed", "skipped") if outcome in last_run]
        counts = ", ".join(f"{last_run[outcome]} {outcome}" for outcome in outcomes)
        status = "STOPPED" if last_run["cut_off"] else f"exit status {last_run['status']}"
        status = "no time was left" if last_run.get("not_started") else status
        print(f"  {name:10} {counts or 'nothing ran'} in {last_run['seconds']} s, {status}")
        for test, message in part["failed"].items():
            errors = [line for line in message.splitlines() if line.startswith("E ")] or message.splitlines() or [""]
            print(f"    FAILED {test}: {errors[-1][:200]}")

    goals = [f"  {verdict.line()}" for verdict in judge(result["records"])]
    print("\n".join(["\nGoals:", *goals] if goals else []))
    print(f"\nWritten: {path}")
    return passed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results (default: bench/results)")
    parser.add_argument("--batch", type=int, default=8, help="images per call (default: 8)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--skip-tests", action="store_true", help="run only the benchmarks")
    help = "of all parts together (default: 600); the last parts are then left out, and the running one is stopped"
    parser.add_argument("--limit", type=float, metavar="SECONDS", default=VISIT, help=help)
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the tests and benchmarks that match, as in pytest")
    parser.add_argument("--compiled", action="store_true", help="include torch.compile's norms and GEGLU")
    parser.add_argument(
        "--steps", nargs="+", choices="fabcde", default=list("abcde"), help="parts of steps.py (default: a to e)"
    )
    parser.add_argument("--small", action="store_true", help="tiny models in the scripts: a trial run without real figures")
    parser.add_argument("--dry", action="store_true", help="print the plan, and try everything on the stand-in for CUDA")
    options = parser.parse_args(arguments)
    names = [name for name in options.only if not (options.skip_tests and name in ("graphs", "tests"))]
    if options.dry:
        print("\n".join(["Expected on a GPU:", *plan(names)]), flush=True)
        with tempfile.TemporaryDirectory(prefix="fastsd-dry-") as folder:
            options.out = options.out or Path(folder)
            return visit(names, {"gpu": "stand-in", "dry": True, "date": None}, options)
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device found; run this on a machine with a GPU, or `pytest bench` on any machine", file=sys.stderr)
        return 2
    if not {*names} <= {*SCRIPTS} and importlib.util.find_spec("pytest_benchmark") is None:
        print("pytest-benchmark is not installed; run `pip install pytest-benchmark`", file=sys.stderr)
        return 2
    for module, consequence in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            print(f"WARNING: {module} is not installed: {consequence}", flush=True)
    options.out = options.out or ROOT / "bench" / "results"
    return visit(names, read_stamp(), options)


def visit(names: Sequence[str], stamp: dict[str, Any], options: argparse.Namespace) -> int:
    """Run parts in their order, write their results, and return the exit status."""
    end = time.monotonic() + options.limit
    print(json.dumps(stamp, indent=1), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    gpu = re.sub("[^a-z0-9]+", "-", stamp["gpu"].lower()).strip("-")
    results: dict[Path, dict[str, Any]] = {}
    for name in names:
        path = options.out / f"{name if name in SCRIPTS else 'kernels'}-{gpu}.json"
        if path not in results:
            settings = {"small": options.small} if name in SCRIPTS else {"batch": options.batch}
            results[path] = open_result(path, {**stamp, **settings})
            write_result(results[path], path)
        left = end - time.monotonic()
        if left < LEAST:
            print(f"\n== {name}: no time left", flush=True)
            part = results[path]["parts"].setdefault(name, {"runs": [], "failed": {}, "skipped": {}})
            part["runs"].append({"status": None, "seconds": 0, "cut_off": True, "not_started": True})
            write_result(results[path], path)
            continue
        seconds_limit = seconds_for(name, names, options.limit, left)
        print(f"\n== {name}, at most {seconds_limit:.0f} s", flush=True)
        lines = path.with_suffix(f".{name}.jsonl")
        status, seconds = run_part(name, lines, options, time.monotonic() + seconds_limit)
        merge_lines(results[path], name, lines, status, seconds)
        write_result(results[path], path)
    passed = [report(result, path) for path, result in results.items()]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
