"""Check memory on a GPU: what stays alive between two stages of a run, and recovery when memory runs out.

python bench/gpu_memory.py [--only stages oom] [--small] [--lines FILE]

stages   `fastsd train` with two stages and a small model: bytes alive before each stage and before its first step
oom      full-size steps with too little memory for their images: they continue with fewer images per forward, and end with
         the bits of a run that had this number from the start
"""

from __future__ import annotations

import gc
import sys
from typing import Any
from unittest import mock

import torch
from full_size import make_base
from measurements import DRY, Measurement, Record, Setup, figures_lines, free_memory, token_batches, weights_hash, whole_model
from measurements import main as run_measurements
from plan_check import SMALL, stage_of

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.demo.world import write_dataset
from fastsd.run import loop
from fastsd.train.graph import WARM_UP
from fastsd.train.step import Step

STEPS = WARM_UP + 2
CONFIG = """
run = "{folder}/run"
kernels = "{kernels}"
model = {{ base = "{folder}/base" }}
cache = {{ dir = "{folder}/cache" }}
data = {{ folders = ["{folder}/images"], resolution = 32 }}
log = {{ every = 1, tensorboard = false }}
[[stage]]
train = ["unet"]
until = {steps}
batch = 4
precision = "bf16"
optimizer = "lion"
lr = 1e-5
ema = 0.9
[[stage]]
train = ["unet", "text_encoder"]
until = {steps}
batch = 4
micro_batch = 2
"""
TOLERANCE = 1 << 20  # bytes: the allocator rounds each of the weights up


def stages(setup: Setup) -> list[Record]:
    """Return the bytes alive around the starts of two stages. The model alone may be alive between them."""
    folder = setup.folder / "stages"
    make_base(folder / "base", shapes=DRY[0] if setup.dry else SMALL[0])
    write_dataset(folder / "images", 8, seed=0)
    path = folder / "job.toml"
    path.write_text(CONFIG.format(folder=folder, steps=STEPS, kernels="reference" if setup.dry else "auto"))
    config = load_config(path, [])
    cache(config)
    free_memory()
    alive: list[dict[str, int]] = []
    start_stage = loop.start_stage

    def observed(*args: Any) -> Step:
        gc.collect()
        before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        step = start_stage(*args)
        alive.append({"before_stage": before, "reserved": reserved, "before_first_step": torch.cuda.memory_allocated()})
        return step

    with mock.patch.object(loop, "start_stage", observed):
        loop.train(config)
    records = [setup.record("stages", f"stage {i + 1}", "bytes alive", "fastsd", **figures) for i, figures in enumerate(alive)]
    left = alive[1]["before_stage"] - alive[0]["before_stage"]
    records[1]["left_by_the_first"] = left
    assert left <= TOLERANCE, f"the first stage leaves {left} bytes"
    return records


def out_of_memory(setup: Setup) -> list[Record]:
    """Run steps with memory for about 60 % of their activations, and for gradients in fp32, which fewer images need."""
    shapes, resolution = setup.shapes
    batch = 8 if setup.small else 16
    stage = stage_of(("bf16", "lion", batch, 1, "none", {}))
    batches = token_batches(shapes.unet.in_channels, shapes.side(resolution), batch)

    def train(micro_batch: int, steps: int, limit: int | None = None) -> dict[str, Any]:
        model, warnings = whole_model(setup, stage), list[str]()
        step = Step(model, stage, STEPS, seed=0, micro_batch_size=micro_batch, graph=limit is not None, warn=warnings.append)
        total = torch.cuda.get_device_properties(setup.device).total_memory
        held = 0
        try:
            if limit:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(limit / total)
            for i in range(steps):
                held = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                loss = step(batches[i % len(batches)], i).loss
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        gradients = sum(tensor.nbytes for tensor in step.tensors_by_role()["gradients"])
        figures = {
            "held": held,
            "gradients": gradients,
            "peak": torch.cuda.max_memory_allocated(),
            "micro_batch": step.micro_batch_size,
        }
        return {**figures, "hash": weights_hash(step), "loss": loss.item(), "warnings": warnings}

    whole = train(batch, 2)
    free_memory()
    limit = int(whole["held"] + whole["gradients"] + 0.6 * (whole["peak"] - whole["held"]))
    limited = train(batch, STEPS, limit)
    free_memory()
    expected = train(limited["micro_batch"], STEPS)
    figures = {"limit_gb": limit / 1e9, "peak_gb": whole["peak"] / 1e9, **{k: limited[k] for k in ("micro_batch", "warnings")}}
    figures |= {"same_bits": limited["hash"] == expected["hash"], "loss": limited["loss"], "expected_loss": expected["loss"]}
    assert limited["micro_batch"] < batch and figures["same_bits"], f"{figures}"
    return [setup.record("out of memory", f"batch {batch}", "bf16", "fastsd", **figures)]


def measurements() -> list[Measurement]:
    return [
        Measurement("stages", "bytes alive between stages", stages, alone=True),
        Measurement("oom", "recovery with equal bits", out_of_memory, alone=True),
    ]


if __name__ == "__main__":
    sys.exit(run_measurements(__doc__, __file__, measurements(), figures_lines))
