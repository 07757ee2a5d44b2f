"""Train the full-size model for a few steps on a GPU: seconds and memory with and without a graph, and the same bits on resume.

    python bench/gpu_full_size.py [--small] [--lines FILE]

The first process trains without a graph and then with one, and saves the state in the middle.  A second process continues from
that file.  `compile` is the time of the first step above that of a plain one: Triton compiles all kernels in it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measurements import (
    Measurement,
    Record,
    Setup,
    Skipped,
    figures_lines,
    free_memory,
    token_batches,
    weights_hash,
    whole_model,
)
from measurements import main as run_measurements
from plan_check import planned, stage_of

from fastsd.bench import counters
from fastsd.model.model import Model
from fastsd.storage import TensorFile, write_safetensors
from fastsd.train.device import choose_ops
from fastsd.train.graph import WARM_UP
from fastsd.train.step import Step

STEPS = WARM_UP + 5
SAVED = WARM_UP + 2  # steps before the state is saved
CASES = [("bf16", "lion", 4), ("fp32", "dlion", 2)]  # precision, optimizer, batch


def run_steps(setup: Setup, step: Step, first: int, last: int) -> tuple[list[float], list[float]]:
    """Run the steps [first, last). Return their losses and seconds."""
    shapes, resolution = setup.shapes
    batches = token_batches(shapes.unet.in_channels, shapes.side(resolution), step.stage.batch)
    losses, seconds = [], []
    for i in range(first, last):
        counters.synchronize(setup.device)
        start = time.perf_counter()
        loss = step(batches[i % len(batches)], i).loss
        counters.synchronize(setup.device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return losses, seconds


def save(path: Path, step: Step) -> None:
    weights = {f"weights/{name}/{key}": t for name, part in step.components.items() for key, t in part.state().items()}
    write_safetensors(path, {**weights, **step.state_dict()})


def load(path: Path, model: Model, make_step: Any) -> Step:
    """Load the weights into a model, and the optimizer state into its step."""
    tensors = TensorFile(path)
    with torch.no_grad():
        for name in ("unet", "text_encoder"):
            for key, parameter in model.component(name).named_parameters():
                parameter.copy_(tensors[f"weights/{name}/{key}"])
    step: Step = make_step(model)
    step.load_state_dict({key: tensors[key] for key in tensors if not key.startswith("weights/")})
    return step


def first_process(precision: str, optimizer: str, batch: int, setup: Setup) -> list[Record]:
    """Train without a graph and with one, from the same weights, and compare the results."""
    shapes, resolution = setup.shapes
    stage = stage_of((precision, optimizer, batch, 1, "none", {}))
    planned_bytes = planned(shapes, resolution, stage, choose_ops("auto", setup.device))["peak"]
    before = torch.cuda.memory_allocated(setup.device)
    records, results = [], []
    for graph in (False, True):
        make_step = partial(Step, stage=stage, total=STEPS, seed=0, graph=graph)
        step = make_step(whole_model(setup, stage))
        torch.cuda.reset_peak_memory_stats()
        losses, seconds = run_steps(setup, step, 0, SAVED)
        if graph:
            save(setup.folder / f"{precision}-{optimizer}.safetensors", step)
        more_losses, more_seconds = run_steps(setup, step, SAVED, STEPS)
        losses, seconds = losses + more_losses, seconds + more_seconds
        peaks = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
        figures: dict[str, Any] = {"peak_gb": peaks[0] / 1e9, "reserved_gb": peaks[1] / 1e9, "losses": losses}
        plain = seconds[1:WARM_UP] or seconds[:1]  # on the stand-in, the second step is captured
        figures |= {"hash": weights_hash(step), "first_s": seconds[0], "plain_s": statistics.median(plain)}
        figures["compile_s"] = seconds[0] - figures["plain_s"]
        if graph:
            figures |= {"capture_s": seconds[WARM_UP], "replay_s": statistics.median(seconds[WARM_UP + 1 :])}
        figures["planned_gb"] = planned_bytes / 1e9
        name = "graph" if graph else "no graph"
        records.append(setup.record("full size", f"batch {batch}", f"{precision}, {optimizer}", name, **figures))
        results.append((losses, figures["hash"]))
        del step
        free_memory()
    end = {"losses": results[1][0][SAVED:], "hash": results[1][1]}
    (setup.folder / f"{precision}-{optimizer}.json").write_text(json.dumps(end))
    records[1]["same_bits"] = results[0] == results[1]
    assert records[1]["same_bits"], f"the graph has other bits than plain steps: {results}"
    return records


def second_process(precision: str, optimizer: str, batch: int, setup: Setup) -> list[Record]:
    """Continue from the saved state, and compare the end with that of the first process."""
    path = setup.folder / f"{precision}-{optimizer}.safetensors"
    end_path = path.with_suffix(".json")
    if not end_path.exists():
        raise Skipped("skipped: the first process did not reach its end")
    expected = json.loads(end_path.read_text())
    stage = stage_of((precision, optimizer, batch, 1, "none", {}))
    make_step = partial(Step, stage=stage, total=STEPS, seed=0, graph=True)
    step = load(path, whole_model(setup, stage, seed=1), make_step)
    losses, seconds = run_steps(setup, step, SAVED, STEPS)
    end = {"losses": losses, "hash": weights_hash(step)}
    figures = {**end, "first_s": seconds[0], "same_bits": end == expected}
    path.unlink()
    assert end == expected, f"the resumed run ends with {end}, and the first process with {expected}"
    return [setup.record("full size", f"batch {batch}", f"{precision}, {optimizer}", "resumed", **figures)]


def measurements() -> list[Measurement]:
    processes = []
    for case in CASES:
        name = "{}, {}, batch {}".format(*case)
        processes.append(Measurement("full", name, partial(first_process, *case), alone=True))
        processes.append(Measurement("full", f"{name}, resumed", partial(second_process, *case), alone=True))
    return processes


if __name__ == "__main__":
    sys.exit(run_measurements(__doc__, __file__, measurements(), figures_lines))
