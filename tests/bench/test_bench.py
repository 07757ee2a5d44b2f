"""The benchmarks run with small sizes on any machine, the script for a GPU records outcomes, and verdicts are correct."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import gpu
import measurements
import pytest
import steps
import torch
from environment import ROOT
from sentences import refused, says
from verdicts import step_table, step_verdicts, table, time_by_kind, verdicts

from fastsd.bench import baselines
from fastsd_kernels import workload

# The benchmarks must not see xdist's variables, because pytest-benchmark would disable itself.
NO_GPU = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_every_suite_runs_on_a_cpu(tmp_path):
    """Run PyTorch's versions, and the kernels that are fast enough in Triton's interpreter."""
    file = tmp_path / "figures.json"
    quick = ["-p", "quick_interpreter"] if "quick_interpreter" in sys.modules else []
    command = [*quick, "bench", "--quick", "--benchmark-json", str(file), "-k", "not triton or optimizer"]
    support = os.pathsep.join([str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**NO_GPU, "TRITON_INTERPRET": "1", "PYTHONPATH": support}
    run = subprocess.run([sys.executable, "-m", "pytest", *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    records = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    ops = {"attention", "group_norm", "group_norm+silu", "layer_norm", "layer_norm+residual", "geglu", "noised"}
    assert {r["op"] for r in records} == ops | {"lion", "dlion", "adamw", "gradient_norm"}
    for r in records:
        assert r["seconds"] > 0 and r["bytes"] > 0 and r["count"] > 0 and r["batch"] == 1, r
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / r["seconds"] / 1e9)
        assert r["share_of_copy"] == pytest.approx(r["gb_per_s"] / r["copy_gb_per_s"])
        assert (r["op"] == "attention") == ("tflop_per_s" in r) == ("share_of_matmul" in r)
    implementations = {(r["op"], r["implementation"]) for r in records}
    assert {("lion", "lion-pytorch"), ("dlion", "dadaptation"), ("adamw", "torch fused")} <= implementations
    assert {(op, "triton in a step") for op in ("lion", "dlion", "adamw")} <= implementations
    assert len(table(records)) == 1 + len(records)


@pytest.mark.slow
def test_script_without_a_gpu_is_refused_in_one_line():
    run = subprocess.run([sys.executable, "bench/gpu.py"], cwd=ROOT, env=NO_GPU, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == "" and says(run.stderr, "no-cuda-device") and run.stderr.count("\n") == 1


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """Return a function that runs `gpu.main` with a simulated GPU. It returns the exit status and the result."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu, "read_stamp", lambda: {"gpu": "Some GPU", "date": "today"})

    def call(*arguments: str, prefix: str = "kernels") -> tuple[int, dict]:
        status = gpu.main(["--out", str(tmp_path), *arguments])
        (file,) = tmp_path.glob("*-some-gpu*")
        assert file.name == f"{prefix}-some-gpu.json"
        return status, json.loads(file.read_text())

    return call


def test_all_files_of_the_gpu_script_exist():
    assert all((ROOT / file).is_file() for part in gpu.PARTS.values() for file in part.files)
    assert gpu.ON_GPU.keys() <= {*gpu.PARTS["tests"].files, *gpu.PARTS["graphs"].files}


@pytest.mark.slow
def test_part_that_hangs_does_not_stop_the_next(visit, tmp_path, monkeypatch, capfd):
    """It is stopped at its limit, and the parts for which no time is left are recorded."""
    hanging, passing = tmp_path / "test_hanging.py", tmp_path / "test_passing.py"
    hanging.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\n")
    passing.write_text("def test_c(): pass\n")
    monkeypatch.setitem(gpu.PARTS, "graphs", gpu.Part(4, [str(hanging)]))
    monkeypatch.setitem(gpu.PARTS, "tests", gpu.Part(8, [str(passing)]))
    monkeypatch.setattr(gpu, "LEAST", 1e9)
    status, result = visit("--only", "graphs", "tests", "--limit", "600")
    assert status == 1 and [part["runs"][0]["not_started"] for part in result["parts"].values()] == [True, True]
    assert says(capfd.readouterr().out, "visit-no-time", part="tests")
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    status, result = visit("--only", "graphs", "tests", "--limit", "36")
    graphs, tests = (result["parts"][name]["runs"][-1] for name in ("graphs", "tests"))
    assert status == 1 and graphs["cut_off"] and graphs["passed"] == 1
    assert tests["passed"] == 1 and not tests["cut_off"]


@pytest.mark.slow
def test_visit_records_failures_and_continues(visit, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_a(): pass\ndef test_b(): assert 1 == 2, 'wrong'\n")
    monkeypatch.setitem(gpu.PARTS, "tests", gpu.Part(10, [str(broken), str(broken)]))
    status, result = visit("--only", "tests", "noise")
    assert status == 1
    ((test, message),) = result["parts"]["tests"]["failed"].items()
    assert test.endswith("test_b") and "wrong" in message
    assert result["parts"]["tests"]["runs"][0]["failed"] == 2 and result["parts"]["noise"]["runs"][0]["status"] == 0
    assert {r["implementation"] for r in result["records"]} == {"reference", "torch.randn"}
    assert [v["met"] for v in result["verdicts"]] == [None] * len(verdicts([]))
    assert "FAILED" in capfd.readouterr().out


def test_stopped_visit_keeps_its_results(visit, tmp_path):
    stamp = {"gpu": "Some GPU", "batch": 8, "date": "yesterday"}
    file, lines = tmp_path / "kernels-some-gpu.json", tmp_path / "kernels-some-gpu.norms.jsonl"
    previous = {"stamp": stamp, "parts": {}, "records": [kernel_record("lion", "all parameters", 1.0)], "verdicts": []}
    line = {"test": "x", "outcome": "passed", "seconds": 1, "record": kernel_record("geglu", "64x5120", 2.0)}
    for batch, ops in ((8, {"lion", "geglu"}), (4, set())):  # figures of another batch are not merged
        file.write_text(json.dumps(previous))
        lines.write_text(json.dumps(line) + '\n{"test": "y", "outc')
        status, result = visit("--only", "noise", "--limit", "0.1", "--batch", str(batch))
        assert status == 1 and result["parts"]["noise"]["runs"][-1]["cut_off"]
        assert {r["op"] for r in result["records"]} == ops
        assert result["stamp"]["batch"] == batch and not lines.exists()


def kernel_record(op, kind, seconds, implementation="triton", mode="bf16", count=1, share=0.9, once=0):
    """Return a kernel's record. A copy at 1 GB/s would move its bytes in a fraction `share` of its time."""
    size = share * seconds * 1e9
    labels = {"op": op, "kind": kind, "count": count, "implementation": implementation, "mode": mode, "timed": "graph"}
    rates = {"copy_gb_per_s": 1.0, "gb_per_s": share, "share_of_copy": share}
    return {**labels, **rates, "seconds": seconds, "bytes": size, "bytes_once": once * size}


def verdict_on(records, goal, judge=verdicts):
    """Return the verdict on the goal that begins with `goal`."""
    (verdict,) = [v for v in judge(records) if v.goal.startswith(goal)]
    return verdict


def attention_records(ratios, mode="bf16", peer_mode="bf16"):
    """Return records of every kind of attention: our kernel in 1 s, and two peers, the faster one in `ratios` seconds."""
    records = []
    for i, (kind, ratio) in enumerate(zip(workload.ATTENTION, ratios, strict=False)):
        records.append(kernel_record("attention", str(i), 1.0, mode=mode, count=workload.ATTENTION[kind]))
        records.append(kernel_record("attention", str(i), 9.0, "sdpa math", peer_mode))
        records.append(kernel_record("attention", str(i), ratio, "sdpa flash", peer_mode))
    return records


def test_attention_verdicts():
    passing = attention_records([1.0] + [1.5] * 7)
    assert all(v.met for v in verdicts(passing) if v.goal.startswith("attention bf16"))
    worst = verdict_on(attention_records([1.5, 0.99] + [1.5] * 6), "attention bf16, each")
    assert worst.met is False and worst.figure == 0.99
    assert says(worst.detail, "verdict-worst", kind=1, peer="sdpa flash", below=1, count=8)
    # The last two shapes occur less often than the others, so the two means differ.
    uneven = attention_records([1.15] * 6 + [1.6] * 2)
    assert verdict_on(uneven, "attention bf16 over the best of SDPA, geometric mean of").met is True
    assert verdict_on(uneven, "attention bf16 over the best of SDPA, geometric mean by").met is False
    for peer_mode in ("ieee", "tf32"):
        assert verdict_on(attention_records([2.0] * 8, "tf32", peer_mode), "attention tf32, each").met is True
        assert verdict_on(attention_records([2.0] * 7 + [1.9], "tf32", peer_mode), "attention tf32, each").met is False


def test_goals_without_measurements_are_open():
    assert {v.met for v in verdicts([])} == {None}
    partial_result = verdict_on(attention_records([1.5] * 3), "attention bf16, each")
    assert partial_result.met is None and partial_result.figure == 1.5 and "5" in partial_result.detail
    assert verdict_on(attention_records([0.5] * 3), "attention bf16, each").met is False
    incomplete = [r for r in attention_records([1.5] * 8) if not (r["kind"] == "3" and r["implementation"] == "triton")]
    missing = verdict_on(incomplete, "attention bf16, each")
    assert missing.met is False and "3" in missing.detail
    untimed = {key: value for key, value in kernel_record("lion", "x", 1.0).items() if key != "seconds"}
    assert {v.met for v in verdicts([untimed])} == {None} and len(table([untimed])) == 2


def test_group_norm_verdicts():
    kinds = [kind for kind in workload.GROUP_NORM if kind.silu]

    def norms(first_share, other_shares, ratio):
        records = []
        for i in range(len(kinds)):
            records.append(kernel_record("group_norm+silu", str(i), 1.0, share=other_shares if i else first_share, once=5 / 8))
            records.append(kernel_record("group_norm+silu", str(i), ratio if i else 3.0, "pytorch"))
        return records

    passing = norms(0.80, 0.85, 3.1)
    assert all(v.met for v in verdicts(passing) if v.goal.startswith("GroupNorm+SiLU bf16"))
    mixed = {v.goal.removeprefix("GroupNorm+SiLU bf16, "): v for v in verdicts(norms(0.5, 0.85, 2.9))}
    whole_step, each_shape = mixed["a whole step, of copy bandwidth"], mixed["each shape, of copy bandwidth"]
    assert whole_step.met is True and "0.52" in whole_step.detail
    assert each_shape.met is False and each_shape.figure == 0.5
    assert mixed["a whole step over PyTorch's"].met is False and mixed["each shape over PyTorch's"].figure == 2.9


def test_optimizer_verdicts():
    def optimizer(op, share, in_step, seconds=1.0):
        ours = kernel_record(op, "all parameters", seconds, mode="fp32", share=share)
        return [ours, kernel_record(op, "all parameters", seconds, "triton in a step", "fp32", share=in_step)]

    for op, name in (("lion", "Lion fp32"), ("dlion", "D-Lion fp32"), ("adamw", "AdamW fp32")):
        for share, in_step, met in ((0.86, 0.85, True), (0.86, 0.84, False), (0.84, 0.86, False)):
            assert verdict_on(optimizer(op, share, in_step), f"{name}, of copy").met is met
    for seconds, met in ((20.0, True), (19.9, False)):
        records = [*optimizer("dlion", 0.9, 0.9), kernel_record("dlion", "all parameters", seconds, "dadaptation", "fp32")]
        # The reference is faster than dadaptation, but the goal ignores it.
        records.append(kernel_record("dlion", "all parameters", 2.0, "reference", "fp32"))
        assert verdict_on(records, "D-Lion fp32 over").met is met


@pytest.mark.slow
def test_steps_script_runs_with_a_tiny_model(visit, monkeypatch, capfd):
    """Run the measurements in worker processes of `steps`. Those of a GPU's memory are skipped with a reason."""

    def run(groups, end, dry):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        ((script, *arguments),) = groups
        assert script == "bench/steps.py"
        return steps.main(arguments), 1.0

    monkeypatch.setattr(gpu, "run", run)
    status, result = visit("--only", "steps", "--steps", "b", "c", "d", "e", "--small", prefix="steps")
    part, records = result["parts"]["steps"], result["records"]
    assert part["failed"] == {}  # checked first, because it shows the reason
    assert status == 0 and part["runs"][0]["passed"] == 9 and result["stamp"]["small"]
    assert len(part["skipped"]) == 14
    assert all(says(message, "steps-no-gpu-memory") for message in part["skipped"].values())
    records_by_case = {(r["mode"], r["kind"], r["implementation"]): r for r in records if r["op"] == "step"}
    ours, diffusers = (records_by_case["fp32", "batch 8, none, adamw", name] for name in ("fastsd", "diffusers"))
    assert diffusers["times"] == pytest.approx(diffusers["ms"]["median"] / ours["ms"]["median"])
    assert ours["host_waits"] == {} and ours["launches"] > 0 and ours["peak_gb"] > 0
    (timed,) = [r for key, r in records_by_case.items() if key[:2] == ("tf32", "batch 32, none, adamw, cuDNN timed")]
    assert any(says(note, "steps-compiled-cpu") for note in timed["notes"])
    graphs = [(r["kind"], r["implementation"]) for r in records if r["op"] == "graph"]
    assert graphs == [(f"batch {n}", name) for n in (1, 4, 16, 32) for name in ("graph", "no graph")]
    for name in ("fastsd", "diffusers"):
        (profile,) = [r for r in records if r["op"] == "profile" and r["implementation"] == name]
        assert {"convolutions", "matmuls", "attention", "norms"} <= profile["kinds"].keys()
        assert sum(row["share"] for row in profile["kinds"].values()) == pytest.approx(1)
    assert [v["met"] for v in result["verdicts"]] == [None] * len(step_verdicts([]))  # a tiny model meets no goal
    out = capfd.readouterr().out
    assert says(out, "steps-kernels-cpu") and len(re.findall(r"\bopen\b", out)) == len(step_verdicts([]))


def test_failed_or_killed_measurement_does_not_stop_the_others(tmp_path, monkeypatch):
    """Every measurement yields a line. A new process starts after a failure and after a crash."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "for name in sys.argv[sys.argv.index('--serve') + 1 :]:\n"
        "    if name == 'd: dies':\n"
        "        os.abort()\n"
        "    outcome = 'failed' if 'fails' in name else 'passed'\n"
        "    print(json.dumps({'test': name, 'outcome': outcome, 'in': os.getpid()}), flush=True)\n"
        "    if outcome == 'failed':\n"
        "        break\n"
    )
    selected = [measurements.Measurement("d", label, lambda setup: []) for label in ("works", "fails", "dies", "continues")]
    selected += [measurements.Measurement("d", label, lambda setup: [], alone=True) for label in ("alone", "also alone")]
    lines = list(measurements.outcomes(selected, str(script), []))
    assert [line["outcome"] for line in lines] == ["passed", "failed", "failed", "passed", "passed", "passed"]
    assert says(lines[2]["message"], "steps-process-failed", status=-6)
    works, fails, _, *others = lines
    assert works["in"] == fails["in"] and len({line["in"] for line in (works, *others)}) == 4


def test_exception_of_a_measurement_becomes_its_outcome():
    setup = measurements.Setup(torch.device("cpu"), True, 1)

    def broken(setup):
        raise RuntimeError("planted")

    line = measurements.outcome(measurements.Measurement("a", "x", broken), setup)
    assert line["outcome"] == "failed" and line["message"].rstrip().endswith("RuntimeError: planted")
    assert measurements.outcome(measurements.Measurement("a", "x", lambda setup: []), setup)["outcome"] == "passed"


@pytest.mark.parametrize("most", [1, 3, 8, 100])
def test_largest_finds_the_largest_that_fits(most):
    for limit in range(12):
        fits = Mock(side_effect=lambda n, limit=limit: n <= limit)
        assert steps.largest(fits, most) == min(limit, most)
        sizes = [call.args[0] for call in fits.call_args_list]
        assert max(sizes) <= most and len(sizes) == len(set(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastsd", "lion-pytorch"])
def test_most_images_stops_at_the_first_size_out_of_memory(name, monkeypatch):
    """Simulate a device that runs out of memory with more than five images."""
    memory_fractions = []
    values = {"synchronize": None, "reset_peak_memory_stats": None, "max_memory_allocated": 7e9, "max_memory_reserved": 8e9}
    values["get_device_properties"] = SimpleNamespace(total_memory=48 << 30)
    for function, value in values.items():
        monkeypatch.setattr(torch.cuda, function, Mock(return_value=value))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", memory_fractions.append)
    monkeypatch.setattr(steps, "planned_images", lambda *arguments: 6)
    text = {**measurements.SMALL[0].text, "hidden_size": baselines.SMALL.cross_attention_dim}
    monkeypatch.setattr(measurements, "SMALL", (replace(measurements.SMALL[0], unet=baselines.SMALL, text=text), 16))
    loss = torch.nn.functional.mse_loss

    def mse_loss(prediction, target):
        if len(prediction) > 5:
            raise torch.OutOfMemoryError("no more")
        return loss(prediction, target)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", mse_loss)
    (record,) = steps.most_images("bf16", "lion", "ff", name, measurements.Setup(torch.device("cpu"), True, 1))
    assert memory_fractions == [0.5] and record["kind"] == "24 GB, lion, ff"
    assert record["images"] == 5 and record["peak_gb"] == 7
    assert record.get("planned") == (6 if name == "fastsd" else None)
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    if name != "fastsd":
        with refused("bench-baseline-missing", steps.Skipped, baseline="lion-pytorch"):
            steps.most_images("bf16", "lion", "ff", name, measurements.Setup(torch.device("cpu"), True, 1))


def test_kernel_times_are_counted_once_by_launching_operation():
    def event(name, microseconds=0.0, kernels=(), gpu=False, annotation=False):
        launched = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
        device = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
        time = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, is_user_annotation=annotation, device_type=device, time_range=time, kernels=launched)

    kernel_times = [("nchwToNhwc", 1e3), ("sm90_kernel", 5e3), ("_forward", 2e3), ("_forward", 5e2), ("nvjet_tst", 15e2)]
    events = [
        event("aten::cudnn_convolution", kernels=[("nchwToNhwc", 1000.0), ("sm90_kernel", 5000.0)]),
        event("fastsd::layer_norm", kernels=[("_forward", 2000.0)]),
        event("Optimizer.step#AdamW.step", kernels=[("Optimizer.step#AdamW.step", 9000.0)], annotation=True),
        event("Optimizer.step#AdamW.step", 9000.0, gpu=True, annotation=True),
        *(event(name, microseconds, gpu=True) for name, microseconds in kernel_times),
    ]
    times_us = steps._kernel_times(events)
    assert sum(times_us.values()) == 10000 and times_us["", "_forward"] == 500
    kinds = time_by_kind([(*key, time_us / 1e3) for key, time_us in times_us.items()])
    assert {kind: row["ms"] for kind, row in kinds.items()} == {"convolutions": 6, "norms": 2, "matmuls": 1.5, "other": 0.5}
    assert kinds["convolutions"]["share"] == 0.6


def test_operations_are_assigned_to_their_kind():
    names = {
        "attention": ["aten::_flash_attention_backward", "fastsd::attention_packed_backward"],
        "optimizer": ["fastsd::norm_of_sums", "aten::_foreach_lerp_", "aten::_fused_adamw_", "fastsd::dlion_estimate"],
        "norms": ["fastsd::group_norm_apply", "aten::native_layer_norm_backward"],
        "convolutions": ["aten::convolution_backward", "aten::cudnn_convolution"],
        "matmuls": ["aten::addmm", "aten::mm", "aten::bmm", "nvjet_tst_128x256"],
        "elementwise, copies": ["aten::normal_", "aten::convert", "aten::copy_", "fastsd::geglu", "fastsd::normal", "Memset"],
        "other": ["aten::sum", "cudaThing"],
    }
    for kind, operations in names.items():
        assert list(time_by_kind([(name, "", 1.0) for name in operations])) == [kind]


H200 = {
    "device": "NVIDIA H200", "small": False, "mfu": 0.5, "host_waits": {}, "peak_gb": 40.0, "launches": 3000,
    "ms": {"median": 1e3},
}  # fmt: skip


def step_record(implementation, mode="bf16", img_per_s=100.0, times=1.0, kind="batch 32, none, adamw", op="step", **more):
    labels = {"op": op, "kind": kind, "mode": mode, "implementation": implementation, "img_per_s": img_per_s, "times": times}
    return {**labels, **H200, **more}


def step_verdict_on(records, goal):
    return verdict_on(records, goal, step_verdicts)


def test_step_verdicts():
    for mode, at_least in (("bf16", 150.0), ("tf32", 110.0)):
        slow, fast = step_record("fastsd", mode, at_least - 1), step_record("fastsd", mode, at_least, kind="batch 64")
        assert step_verdict_on([slow], f"{mode}, 512 px, images").met is False
        assert step_verdict_on([slow, fast], f"{mode}, 512 px, images").met is True
        other_gpu = step_verdict_on([fast | {"device": "NVIDIA B200"}], f"{mode}, 512 px, images")
        assert other_gpu.met is None and other_gpu.figure == at_least and "B200" in other_gpu.detail
    for mode, peer, at_least in (("bf16", "diffusers", 2.0), ("bf16", "compiled", 1.3), ("fp32", "diffusers", 1.3)):
        fast = step_record(peer, mode, times=at_least)
        slow = step_record(peer, mode, times=at_least - 0.01, kind="batch 64, none, adamw")
        assert step_verdict_on([fast], f"{mode}, 512 px, whole steps over {peer}").met is True
        worst = step_verdict_on([fast, slow], f"{mode}, 512 px, whole steps over {peer}")
        assert worst.met is False and says(worst.detail, "verdict-worst-step", kind="batch 64, none, adamw", below=1, count=2)
    missing = step_record("fastsd", notes=["compiled: no compiler"])
    open_goal = step_verdict_on([missing], "bf16, 512 px, whole steps over compiled")
    assert open_goal.met is None and open_goal.detail == "compiled: no compiler"
    assert step_verdict_on([step_record("fastsd"), step_record("no graph", op="graph")], "share of settings").met is True
    waits = step_record("fastsd", host_waits={"wait": 3})
    other_waits = step_record("diffusers", host_waits={"wait": 9})
    assert step_verdict_on([step_record("fastsd"), waits, other_waits], "share of settings").figure == 0.5


def test_memory_verdicts():
    def most_images(mode, optimizer, level, images, name="fastsd"):
        fields = {"optimizer": optimizer, "checkpointing": level, "images": images, "reserved_gb": 25.0}
        return step_record(name, mode, kind=f"24 GB, {optimizer}, {level}", op="micro-batch", **fields)

    for mode, optimizer, at_least in (("fp32", "dlion", 8), ("bf16", "lion", 32)):
        records = [most_images(mode, optimizer, "none", *result) for result in ((at_least - 1,), (99, "a peer"))]
        assert step_verdict_on(records, f"{mode}, {optimizer}").met is False
        verdict = step_verdict_on([*records, most_images(mode, optimizer, "ff", at_least)], f"{mode}, {optimizer}")
        assert verdict.met is True
        assert says(verdict.detail, "verdict-most-images", none=at_least - 1, ff=at_least, images=99, peer="a peer")

    def plan(*ratios):
        fields = {"planned_gb": 1.0, "reserved_gb": 1.0}
        return [step_record("fastsd", op="plan", kind=f"{i}", ratio=ratio, **fields) for i, ratio in enumerate(ratios)]

    passing = plan(0.94, 1.06, 1.0, 1.0, 1.0, 1.0)
    assert step_verdict_on(passing, "peak of a step").met is True and step_verdict_on(passing[:5], "peak of a step").met is None
    for ratio in (0.92, 1.08):
        assert step_verdict_on(plan(1.0, ratio), "peak of a step").met is False
    profile = step_record("fastsd", op="profile", step_ms=2.0, kinds={"norms": {"ms": 1.0, "share": 1.0}})
    opaque = step_record("compiled", host_waits=None, peak_gb=None, launches=None)
    records = [*passing, profile, most_images("bf16", "lion", "ff", 40), opaque]
    assert len(step_table(records)) == len(records)
    assert {v.met for v in step_verdicts([r | {"small": True} for r in records])} == {None}
