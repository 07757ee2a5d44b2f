"""The plan of a visit to a GPU, and a visit without one."""

import importlib
import json
import os
import sys
from pathlib import Path

import gpu
import pytest
from commandline import function_process
from environment import ROOT
from forked_programs import forked_programs
from sentences import says


def test_most_important_parts_fit_a_visit():
    """The parts come in their order of importance, and the benchmarks after the checks of a run."""
    order = ["machine", "graphs", "stages", "oom", "full", "convolutions", "peers", "evaluation", "checkpoint"]
    assert list(gpu.PARTS)[: len(order)] == order
    assert sum(gpu.PARTS[name].seconds for name in order) <= gpu.VISIT < sum(part.seconds for part in gpu.PARTS.values())
    lines = gpu.plan(list(gpu.PARTS))
    assert len(lines) == len(gpu.PARTS)
    assert [says(line, "visit-late") for line in lines] == [False] * len(order) + [True] * (len(lines) - len(order))


def test_every_part_has_a_share_of_the_time():
    names = ["machine", "full"]
    machine, full = (gpu.PARTS[name].seconds for name in names)
    assert gpu.seconds_for("machine", names, 10, 1000) == 1.5 * machine
    assert gpu.seconds_for("machine", names, 10 * (machine + full), 1e6) == 10 * machine
    assert gpu.seconds_for("full", ["full"], 570, 600) == 570
    assert gpu.seconds_for("full", names, 600, 7) == 7  # the parts before took longer


def dry_visit(out: str, *names: str) -> None:
    """Run `python bench/gpu.py --dry`. Its programs are forks, because imports would take nearly all of the time."""
    for key in [key for key in os.environ if key.startswith("PYTEST_XDIST")]:
        del os.environ[key]  # pytest-benchmark would disable itself in a process of xdist
    for name in gpu.SCRIPTS:
        importlib.import_module(Path(gpu.PARTS[name].files[0]).stem)  # for the libraries that it imports
    os.chdir(ROOT)
    with forked_programs():
        sys.exit(gpu.main(["--dry", "--limit", "1500", "--out", out, "--only", *names]))


@pytest.mark.slow
def test_dry_visit_runs_the_parts_of_a_visit(tmp_path):
    """Every part ends on the stand-in without a failure, and its results are marked.

    Suites are tested in `test_bench.py`, and the tests that the parts "graphs" and "tests" select run here anyway.
    """
    other = ("graphs", "tests", "steps")
    names = [name for name, part in gpu.PARTS.items() if "/bench_" not in part.files[0] and name not in other]
    visit = function_process(__file__, "dry_visit", tmp_path, *names)
    out, err = visit.communicate()
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*-stand-in.json")]
    parts = {name: part for result in results for name, part in result["parts"].items()}
    failures = {name: part["failed"] for name, part in parts.items() if part["failed"] or part["runs"][0]["status"]}
    assert visit.returncode == 0 and not failures, f"{failures}\n{out[-3000:]}{err[-3000:]}"
    assert parts.keys() == {*names} and all(result["stamp"]["dry"] for result in results)
    assert all(part["runs"][0].get("passed") for part in parts.values()), parts
    records = {(r["op"], r["kind"]): r for result in results for r in result["records"]}
    assert records["stages", "stage 2"]["left_by_the_first"] == 0
    assert records["out of memory", "batch 8"]["same_bits"] and records["evaluation", "validation"]["same_bits"]
    hashes = {}
    for result in results:
        for r in result["records"]:
            if r["op"] == "full size":
                hashes.setdefault(r["mode"], []).append((r["hash"], r["losses"][-1]))
    assert len(hashes) == 2 and all(len(ends) == 3 and len(set(ends)) == 1 for ends in hashes.values())
