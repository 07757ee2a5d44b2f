"""The benchmarks run anywhere, in small; the script for a GPU keeps what happened; its goals judge figures as they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402
from verdicts import table, verdicts  # noqa: E402

from fastsd_kernels import workload  # noqa: E402

# Where these tests run in parallel, the benchmarks they start do not: pytest-benchmark would switch itself off.
NO_GPU = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"CUDA_VISIBLE_DEVICES": ""}


def test_every_suite_runs_on_a_cpu(tmp_path):
    """PyTorch's own and, in Triton's interpreter, the kernels that take no minutes there."""
    file = tmp_path / "figures.json"
    command = ["bench", "--quick", "--benchmark-json", str(file), "-k", "not triton or optimizer"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *command],
        cwd=ROOT, env={**NO_GPU, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    figures = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    ops = {"attention", "group_norm", "group_norm+silu", "layer_norm", "layer_norm+residual", "geglu", "noised"}
    assert {f["op"] for f in figures} == ops | {"lion", "dlion", "adamw", "gradient_norm"}
    for f in figures:
        assert f["seconds"] > 0 and f["bytes"] > 0 and f["count"] > 0 and f["batch"] == 1, f
        assert f["gb_per_s"] == pytest.approx(f["bytes"] / f["seconds"] / 1e9)
        assert f["share_of_copy"] == pytest.approx(f["gb_per_s"] / f["copy_gb_per_s"])
        assert (f["op"] == "attention") == ("tflop_per_s" in f) == ("share_of_matmul" in f)
    peers = {(f["op"], f["implementation"]) for f in figures}
    assert {("lion", "lion-pytorch"), ("dlion", "dadaptation"), ("adamw", "torch fused")} <= peers
    assert {(op, "triton in a step") for op in ("lion", "dlion", "adamw")} <= peers
    assert len(table(figures)) == 1 + len(figures)


def test_without_a_gpu_the_script_says_so_in_one_sentence():
    run = subprocess.run([sys.executable, "bench/gpu.py"], cwd=ROOT, env=NO_GPU, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == "" and run.stderr.startswith("No CUDA device") and run.stderr.count("\n") == 1


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """`gpu.main` as on a machine with a GPU, but for the GPU; returns (exit status, what it wrote)."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "read_stamp", lambda batch: {"gpu": "Some GPU", "batch": batch, "date": "today"})

    def call(*arguments: str) -> tuple[int, dict]:
        status = gpu.main(["--out", str(tmp_path), *arguments])
        (file,) = tmp_path.glob("kernels-*")
        assert file.name == "kernels-some-gpu.json"
        return status, json.loads(file.read_text())

    return call


def test_one_visit_keeps_failures_and_goes_on(visit, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'wrong'\n")
    monkeypatch.setitem(gpu.PARTS, "tests", [str(broken), str(broken)])
    status, result = visit("--only", "tests", "noise")
    assert status == 1
    ((test, message),) = result["parts"]["tests"]["failed"].items()
    assert test.endswith("test_b") and "wrong" in message
    assert result["parts"]["tests"]["runs"][0]["failed"] == 2 and result["parts"]["noise"]["runs"][0]["status"] == 0
    assert {r["implementation"] for r in result["records"]} == {"reference", "torch.randn"}
    assert [v["met"] for v in result["verdicts"]] == [None] * len(verdicts([]))
    assert "FAILED" in capfd.readouterr().out


def test_a_visit_that_was_cut_off_leaves_what_it_had(visit, tmp_path):
    stamp = {"gpu": "Some GPU", "batch": 8, "date": "yesterday"}
    file, lines = tmp_path / "kernels-some-gpu.json", tmp_path / "kernels-some-gpu.norms.jsonl"
    old = {"stamp": stamp, "parts": {}, "records": [figure("lion", "all parameters", 1.0)], "verdicts": []}
    noted = {"test": "x", "outcome": "passed", "seconds": 1, "record": figure("geglu", "64x5120", 2.0)}
    for batch, kinds in ((8, {"lion", "geglu"}), (4, set())):  # figures of another batch are others
        file.write_text(json.dumps(old))
        lines.write_text(json.dumps(noted) + '\n{"test": "y", "outc')
        status, result = visit("--only", "noise", "--limit", "0.1", "--batch", str(batch))
        assert status == 1 and result["parts"]["noise"]["runs"][-1]["cut_off"]
        assert {r["op"] for r in result["records"]} == kinds
        assert result["stamp"]["batch"] == batch and not lines.exists()


def figure(op, kind, seconds, implementation="triton", mode="bf16", count=1, share=0.9, once=0):
    """A record whose bytes make up `share` of what a copy at 1 GB/s moves in that time."""
    size = share * seconds * 1e9
    return {
        "op": op, "kind": kind, "count": count, "implementation": implementation, "mode": mode, "seconds": seconds,
        "bytes": size, "bytes_once": once * size, "copy_gb_per_s": 1.0, "gb_per_s": share, "share_of_copy": share,
        "timed": "graph",
    }  # fmt: skip


def goal(records, start):
    (found,) = [v for v in verdicts(records) if v.goal.startswith(start)]
    return found


def attention(ratios, mode="bf16", peer_mode="bf16"):
    """Attention that takes 1 s at each of the workload's kinds, and peers that take `ratios`, the fastest of two last."""
    records = []
    for i, (kind, ratio) in enumerate(zip(workload.ATTENTION, ratios, strict=False)):
        records.append(figure("attention", str(i), 1.0, mode=mode, count=workload.ATTENTION[kind]))
        records.append(figure("attention", str(i), 9.0, "sdpa math", peer_mode))
        records.append(figure("attention", str(i), ratio, "sdpa flash", peer_mode))
    return records


def test_attention_goals():
    good = attention([1.0] + [1.5] * 7)
    assert all(v.met for v in verdicts(good) if v.goal.startswith("attention bf16"))
    worst = goal(attention([1.5, 0.99] + [1.5] * 6), "attention bf16, each")
    assert worst.met is False and worst.figure == 0.99 and worst.detail == "1 over sdpa flash; 1 of 8 below"
    # Five shapes occur five times as often as the last two: the two means differ.
    uneven = attention([1.15] * 6 + [1.6] * 2)
    assert goal(uneven, "attention bf16 over the best of SDPA, geometric mean of").met is True
    assert goal(uneven, "attention bf16 over the best of SDPA, geometric mean by").met is False
    for peer_mode in ("ieee", "tf32"):
        assert goal(attention([2.0] * 8, "tf32", peer_mode), "attention tf32, each").met is True
        assert goal(attention([2.0] * 7 + [1.9], "tf32", peer_mode), "attention tf32, each").met is False


def test_what_was_not_measured_is_not_met():
    assert {v.met for v in verdicts([])} == {None}
    some = goal(attention([1.5] * 3), "attention bf16, each")
    assert some.met is None and some.figure == 1.5 and "5 not measured" in some.detail
    assert goal(attention([0.5] * 3), "attention bf16, each").met is False
    failed = [r for r in attention([1.5] * 8) if not (r["kind"] == "3" and r["implementation"] == "triton")]
    assert (
        goal(failed, "attention bf16, each").met is False and "no figure for 3" in goal(failed, "attention bf16, each").detail
    )
    assert "seconds" not in (untimed := {k: v for k, v in figure("lion", "x", 1.0).items() if k != "seconds"})
    assert {v.met for v in verdicts([untimed])} == {None} and len(table([untimed])) == 2


def test_group_norm_goals():
    kinds = [kind for kind in workload.GROUP_NORM if kind.silu]

    def norms(first, others, ratio):
        records = []
        for i in range(len(kinds)):
            records.append(figure("group_norm+silu", str(i), 1.0, share=others if i else first, once=5 / 8))
            records.append(figure("group_norm+silu", str(i), ratio if i else 3.0, "pytorch"))
        return records

    good = norms(0.80, 0.85, 3.1)
    assert all(v.met for v in verdicts(good) if v.goal.startswith("GroupNorm+SiLU bf16"))
    mixed = {v.goal.removeprefix("GroupNorm+SiLU bf16, "): v for v in verdicts(norms(0.5, 0.85, 2.9))}
    whole, each = mixed["a whole step, of copy bandwidth"], mixed["each shape, of copy bandwidth"]
    assert whole.met is True and "0.52 if each pass reads once" in whole.detail
    assert each.met is False and each.figure == 0.5
    assert mixed["a whole step over PyTorch's"].met is False and mixed["each shape over PyTorch's"].figure == 2.9


def test_optimizer_goals():
    def optimizer(op, share, in_step, seconds=1.0):
        ours = figure(op, "all parameters", seconds, mode="fp32", share=share)
        return [ours, figure(op, "all parameters", seconds, "triton in a step", "fp32", share=in_step)]

    for op, name in (("lion", "Lion fp32"), ("dlion", "D-Lion fp32"), ("adamw", "AdamW fp32")):
        for share, in_step, met in ((0.86, 0.85, True), (0.86, 0.84, False), (0.84, 0.86, False)):
            assert goal(optimizer(op, share, in_step), f"{name}, of copy").met is met
    for seconds, met in ((20.0, True), (19.9, False)):
        records = [*optimizer("dlion", 0.9, 0.9), figure("dlion", "all parameters", seconds, "dadaptation", "fp32")]
        # The reference is faster than dadaptation, and not what the goal names.
        records.append(figure("dlion", "all parameters", 2.0, "reference", "fp32"))
        assert goal(records, "D-Lion fp32 over").met is met
