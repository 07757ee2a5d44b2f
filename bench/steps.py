"""Measure whole steps on a GPU: speed compared with diffusers, images in 24 GB, accuracy of `fastsd plan`, time by operation.

    python bench/steps.py [--only f a b c d e] [--small] [--rounds 3] [--lines FILE]

    f   first of all: bf16, batch 1 and 32, beside diffusers, and Lion beside lion-pytorch
    a   bf16: batch 32 and 64, checkpointing none and ff, cuDNN benchmark mode off and on, three optimizers, their baselines
    b   the same in tf32 and IEEE fp32 with fewer settings
    c   steps with and without a CUDA graph, batch 1 to 32
    d   the most images per forward in 24 GB, for ours and the baselines; the planned and the measured peak of real steps
    e   time of one step by kind of operation, for ours and eager diffusers

The model has SD1.5's shape and random weights, and images have 512 px. The step is that of `fastsd train`, and the baselines
are those of `fastsd bench`. The most important measurements come first, so part a starts before c and e and ends after them.
`measurements.py` runs them, those with capped memory in a process of their own, and `verdicts.py` judges the figures.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from measurements import (
    Measurement,
    Record,
    Setup,
    Skipped,
    free_memory,
    peak,
    token_batches,
    whole_model,
)
from measurements import main as run_measurements
from plan_check import planned, stage_of
from torch.autograd import DeviceType
from verdicts import step_table, time_by_kind

from fastsd.bench import baselines, counters, options, suites
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import StageTable
from fastsd.errors import UserError, out_of_memory
from fastsd.plan.plan import RESERVED, plan_stage
from fastsd.terminal.console import STDOUT
from fastsd.train.device import choose_ops
from fastsd.train.graph import WARM_UP
from fastsd.train.precision import set_precision

Case = tuple[str, str, int, int, str, dict[str, Any]]  # as `plan_check.CASES`
CAP = 24 << 30  # bytes of PyTorch's allocator, without the 0.5 GB of the CUDA context and libraries
# Cases for a GPU, with typical batches.
CASES: list[Case] = [
    ("bf16", "lion", 32, 1, "none", {}), ("bf16", "lion", 32, 1, "ff", {}), ("fp32", "dlion", 8, 1, "none", {}),
    ("fp32", "dlion", 8, 2, "ff", {}), ("bf16", "dlion", 16, 2, "ff", {}), ("bf16", "adamw", 16, 1, "block", {"ema": 0.999}),
    ("bf16", "lion", 16, 1, "none", {"fused_backward": True}), ("tf32", "adamw", 16, 1, "none", {}),
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Settings of a whole step: one stage, and how it is run."""

    precision: str
    optimizer: str
    batch: int
    checkpointing: str = "none"
    deterministic: bool = True
    graph: bool = True

    @property
    def kind(self) -> str:
        timed = "" if self.deterministic else ", cuDNN timed"
        return f"batch {self.batch}, {self.checkpointing}, {self.optimizer}{timed}"


def measurements() -> list[Measurement]:
    """Return all measurements in the order in which they run."""
    adamw = partial(Setting, "bf16", "adamw")
    most_important = [
        _step_measurement("f", adamw(1), "diffusers"),
        _step_measurement("f", adamw(32), "diffusers"),
        _step_measurement("f", Setting("bf16", "lion", 32), "lion-pytorch"),
        _step_measurement("a", adamw(32, deterministic=False), "compiled"),
        _step_measurement("a", Setting("bf16", "lion", 64, deterministic=False)),
        _step_measurement("a", Setting("bf16", "dlion", 32), "dadaptation"),
        _step_measurement("a", adamw(64), "diffusers"),
    ]

    graphs = [Measurement("c", f"graph, batch {batch}", partial(compare_graph, adamw(batch))) for batch in (1, 4, 16, 32)]
    profile = Measurement("e", "where the time goes", partial(profile_step, adamw(32, graph=False)))
    combinations = [
        _step_measurement("a", adamw(*arguments))
        for arguments in ((64, "none", False), (32, "ff", True), (32, "ff", False), (64, "ff", True), (64, "ff", False))
    ]

    other_precisions = [
        _step_measurement("b", Setting("tf32", "adamw", 32), "diffusers"),
        _step_measurement("b", Setting("fp32", "adamw", 8), "diffusers"),  # a step of 32 takes seconds
        _step_measurement("b", Setting("tf32", "lion", 64, deterministic=False)),
        _step_measurement("b", Setting("tf32", "adamw", 32, deterministic=False), "compiled"),
    ]
    stages = [("bf16", "lion"), ("fp32", "dlion")]
    our_memory = [_memory_measurement(*stage, level, baselines.OURS) for stage in stages for level in ("none", "ff")]
    plans = [
        Measurement("d", f"plan, {case[0]}, {_case_label(case)}", partial(check_plan, case), gpu_only=True) for case in CASES
    ]
    baseline_memory = [_memory_measurement(*stage, "none", OPTIMIZERS[stage[1]].package or "diffusers") for stage in stages]
    return [*most_important, *graphs, profile, *combinations, *other_precisions, *our_memory, *plans, *baseline_memory]


def _step_measurement(part: str, setting: Setting, *names: str) -> Measurement:
    suffix = f" beside {' and '.join(names)}" if names else ""
    return Measurement(part, f"{setting.precision}, {setting.kind}{suffix}", partial(whole_steps, setting, names))


def _memory_measurement(precision: str, optimizer: str, level: str, name: str) -> Measurement:
    measure = partial(most_images, precision, optimizer, level, name)
    return Measurement("d", f"24 GB, {precision}, {optimizer}, {level}, {name}", measure, gpu_only=True, alone=True)


def _case_label(case: Case) -> str:
    _, *values, overrides = case
    return "{}, {} x {}, {}".format(*values) + "".join(f", {key}" for key in overrides)


def bench_options(setup: Setup, setting: Setting, names: list[str]) -> options.BenchOptions:
    settings = {f"stage.0.{key}": getattr(setting, key) for key in ("optimizer", "batch", "checkpointing")}
    settings |= {"deterministic": setting.deterministic, "cuda_graph": setting.graph}
    if setup.small or setup.dry:  # a trial run
        settings["stage.0.batch"] = 1
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    extra_options: dict[str, Any] = {"steps": setup.rounds, "peers": ",".join(names) or "none"}
    return options.BenchOptions("step", None, changes, setting.precision, setup.small, **extra_options)


def whole_steps(setting: Setting, names: tuple[str, ...], setup: Setup) -> list[Record]:
    """Time our step and those of the available baselines with `fastsd bench step`."""
    available, notes = list[str](), list[str]()
    for name in names:
        if name == "compiled" and setup.device.type == "cpu":
            notes.append("skipped: baseline compiled, because compiling for a CPU takes minutes")
        else:
            installed, reasons = baselines.attempt(name, partial(baselines.require, name))
            notes += reasons
            available += [name] if installed else []
    _, figures = suites.bench_step(bench_options(setup, setting, available), STDOUT)
    notes += figures["misses"]
    columns = ("img_per_s", "tflop_per_s", "mfu", "peak_gb", "held_gb", "launches", "host_waits", "times", "ms", "first_loss")
    shared = {"optimizer": setting.optimizer, "batch": setting.batch, "switches": figures["settings"]["switches"]}
    shared["matmul_tflop_per_s"] = figures["matmul_tflop_per_s"]
    records = [
        setup.record("step", setting.kind, setting.precision, row["name"], **shared, **{key: row[key] for key in columns})
        for row in figures["results"]
    ]
    records[0]["notes"] = notes
    return records


def compare_graph(setting: Setting, setup: Setup) -> list[Record]:
    """Time a step with and without a CUDA graph. `times` of the second record is the speedup by the graph."""
    records = []
    for graph, name in ((True, "graph"), (False, "no graph")):
        (record,) = whole_steps(replace(setting, graph=graph), (), setup)
        records.append(record | {"op": "graph", "kind": f"batch {setting.batch}", "implementation": name})
        free_memory()
    records[1]["times"] = records[1]["ms"]["median"] / records[0]["ms"]["median"]
    return records


def profile_step(setting: Setting, setup: Setup) -> list[Record]:
    """Measure the time of kernels in one step, by the operation that launched them. On a CPU, measure that of operations."""
    target, notes = options.bench_target(bench_options(setup, setting, [])), list[str]()
    model = baselines.random_model(target.cfg, target.ops)
    model.unet.to(target.device)
    model.text.module.to(target.device)
    set_precision(setting.precision, model.unet)
    batches = baselines.random_batches(target.cfg.in_channels, target.side, target.stage.batch)

    records, gpu = [], target.device.type == "cuda"
    if not gpu:
        notes.append("skipped: time of kernels needs a GPU; these are operations on a CPU")
    inputs = baselines.BenchInputs(model, target.stage, batches, target.device)
    candidates, skipped = baselines.candidates(inputs, ["diffusers"])
    notes += skipped
    for candidate in candidates:
        with candidate.turn():
            for _ in range(WARM_UP):
                candidate.step()
            seconds = counters.seconds(candidate.step, target.device)
            activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if gpu else [])]
            with torch.profiler.profile(activities=activities) as profile:
                candidate.step()
                counters.synchronize(target.device)
        operations = {(row.key, ""): row.self_cpu_time_total for row in profile.key_averages()}
        times_us = _kernel_times(profile.events()) if gpu else Counter(operations)
        rows = [(name, kernel[:120], time_us / 1e3) for (name, kernel), time_us in times_us.most_common()]
        figures = {"rows": rows, "kinds": time_by_kind(rows), "step_ms": 1e3 * seconds, "notes": notes}
        records.append(setup.record("profile", setting.kind, setting.precision, candidate.name, **figures))
    return records


def _kernel_times(events: Any) -> Counter[tuple[str, str]]:
    """Return microseconds by (launching operation, kernel). The operation is "" if the profiler recorded none."""
    times_us: Counter[tuple[str, str]] = Counter()
    unassigned_us: Counter[str] = Counter()
    for event in events:
        # A range marked by a program spans kernels that are counted separately.
        if event.is_user_annotation:
            continue
        if event.device_type == DeviceType.CUDA:
            unassigned_us[event.name] += event.time_range.elapsed_us()
        for kernel in event.kernels:
            times_us[event.name, kernel.name] += kernel.duration
    for (_, kernel_name), time_us in times_us.items():
        unassigned_us[kernel_name] -= time_us
    times_us.update({("", kernel_name): time_us for kernel_name, time_us in unassigned_us.items() if time_us > 0.5})
    return times_us


def most_images(precision: str, optimizer: str, level: str, name: str, setup: Setup) -> list[Record]:
    """Find the most images per forward under `CAP`, by running real steps until memory runs out.

    Our step holds all tensors of a run, including text encoder and VAE, and records a graph. A baseline holds only its UNet.
    """
    is_ours = name == baselines.OURS
    if not is_ours:
        installed, reasons = baselines.attempt(name, partial(baselines.require, name))
        if not installed:
            raise Skipped(*reasons)
    shapes, resolution = setup.shapes
    side, max_images = shapes.side(resolution), 8 if setup.small else 512
    peaks: dict[int, tuple[int, int]] = {}
    stage = stage_of((precision, optimizer, max_images, 1, level, {}))
    torch.cuda.set_per_process_memory_fraction(CAP / torch.cuda.get_device_properties(setup.device).total_memory)
    # The initial weights of a baseline stay in main memory.
    model = whole_model(setup, stage) if is_ours else baselines.random_model(shapes.unet, choose_ops("auto", setup.device))
    model.text.module.to(setup.device)
    set_precision(precision)
    inputs = baselines.BenchInputs(model, stage, [], setup.device, graph=is_ours)
    candidate: Any = baselines.OurStep(inputs, _raise_out_of_memory) if is_ours else baselines.baseline_maker(inputs)(name)

    def fits(images: int) -> bool:
        make_batches = token_batches if is_ours else baselines.random_batches
        inputs.batches = make_batches(shapes.unet.in_channels, side, images)
        try:
            with candidate.turn():
                peaks[images] = peak(lambda: [candidate.step() for _ in range(WARM_UP + 2)])
        except Exception as error:
            if out_of_memory(error) is None and not isinstance(error, UserError):
                raise
            print(f"{name}: {images} images do not fit: {str(error).splitlines()[0][:200]}", flush=True)
            return False
        finally:
            candidate.trainer.free_graphs() if is_ours else candidate.optimizer.zero_grad()
            free_memory()
        return True

    images = largest(fits, max_images)
    allocated, reserved = peaks.get(images, (0, 0))
    figures: dict[str, Any] = {"images": images, "cap_gb": CAP / 1e9, "peak_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}
    if is_ours:
        figures["planned"] = planned_images(setup, stage, max_images)
    return [setup.record("micro-batch", f"24 GB, {optimizer}, {level}", precision, name, **figures)]


def _raise_out_of_memory(line: str) -> None:
    """Fail instead of continuing with fewer images per forward."""
    raise torch.OutOfMemoryError(line)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, or 0, by doubling and bisection. `fits` must be monotonic."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def planned_images(setup: Setup, stage: StageTable, most: int) -> int:
    """Return the largest micro-batch according to `fastsd plan --vram 24`."""
    shapes, resolution = setup.shapes
    plan = plan_stage(shapes, stage, resolution, CAP - RESERVED, choose_ops("auto", setup.device))

    def fits(images: int) -> bool:
        # The micro-batch is the whole batch, so gradients are not accumulated.
        plan.stage = stage.model_copy(update={"batch": images})
        return plan.need(images).total <= plan.device_bytes

    return largest(fits, most)


def check_plan(case: Case, setup: Setup) -> list[Record]:
    """Compare the planned and measured peak of a step with existing state. A graph would need the same memory."""
    shapes, resolution = setup.shapes
    stage, before = stage_of(case), torch.cuda.memory_allocated(setup.device)
    predicted = planned(shapes, resolution, stage, choose_ops("auto", setup.device))["peak"]
    batches = token_batches(shapes.unet.in_channels, shapes.side(resolution), stage.batch)
    ours = baselines.OurStep(baselines.BenchInputs(whole_model(setup, stage), stage, batches, setup.device))
    for _ in range(2):
        ours.step()
    allocated, reserved = peak(ours.step)
    measured = allocated - before
    sizes = {"planned_gb": predicted / 1e9, "peak_gb": measured / 1e9, "reserved_gb": reserved / 1e9, "before_gb": before / 1e9}
    return [setup.record("plan", _case_label(case), stage.precision, baselines.OURS, ratio=predicted / measured, **sizes)]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 1 if anything failed, whatever the figures."""
    return run_measurements(__doc__, __file__, measurements(), step_table, arguments)


if __name__ == "__main__":
    sys.exit(main())
