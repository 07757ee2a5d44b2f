"""Compare the memory that `fastsd plan` predicts with that of real steps on this machine's CPU, by owner.

    python bench/plan_check.py [--small] [--json FILE] [--only WORD ...]

Every combination runs in its own process. It plans the step on tensors without data, then runs two real steps and tracks every
storage during the second one. At full size (SD1.5, 512 px) a combination takes a few minutes and up to 20 GB of memory.
`resident` is the peak resident memory of the process, including the plan and the libraries.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import StageTable
from fastsd.data.loader import Batch
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model, materialize
from fastsd.model.unet import UNetConfig
from fastsd.plan.plan import plan_stage
from fastsd.storage import replace_file
from fastsd.train.memory import LiveBytes
from fastsd.train.precision import set_precision
from fastsd.train.step import Step
from fastsd_kernels import Ops, fastest

CPU = torch.device("cpu")
# Owner in a measurement -> owner in a plan.
PLANNED_NAMES = {
    "VAE": "VAE, for samples", "gradients": "gradients", "state": "optimizer state", "ema": "EMA", "activations": "activations",
    "peak": "peak",
}  # fmt: skip
FULL = Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE), 512
SMALL_UNET: dict[str, Any] = {
    "block_out_channels": (32, 64, 64), "attention": (True, True, False), "layers_per_block": 1, "heads": 4,
    "cross_attention_dim": 48, "norm_groups": 8, "sample_size": 32,
}  # fmt: skip
SMALL_TEXT = {
    "vocab_size": 1000, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SMALL_VAE = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip
SMALL = Shapes(UNetConfig(**SMALL_UNET), {**SD15_TEXT, **SMALL_TEXT}, {**SD15_VAE, **SMALL_VAE}), 64
# Precision, optimizer, images per forward, forwards per step, checkpointing, and other keys of a stage.
CASES: list[tuple[str, str, int, int, str, dict[str, Any]]] = [
    ("fp32", "dlion", 1, 1, "none", {}),
    ("fp32", "dlion", 1, 2, "ff", {}),
    ("fp32", "lion", 2, 1, "ff", {}),
    ("fp32", "adamw", 1, 1, "block", {}),
    ("bf16", "lion", 2, 1, "none", {}),
    ("bf16", "lion", 1, 2, "block", {}),
    ("bf16", "dlion", 2, 1, "ff", {}),
    ("bf16", "adamw", 1, 2, "none", {"ema": 0.999}),
    ("bf16", "lion", 1, 1, "none", {"fused_backward": True}),
    ("fp32", "lion", 1, 1, "none", {"train": ["text_encoder"]}),
]


def stage_of(case: tuple[str, str, int, int, str, dict[str, Any]]) -> StageTable:
    precision, optimizer, micro_batch, forwards, level, overrides = case
    keys = {"train": ["unet"], "until": 1, "precision": precision, "optimizer": optimizer, "checkpointing": level}
    sizes = {"batch": micro_batch * forwards, "micro_batch": 0 if forwards == 1 else micro_batch}
    return StageTable.model_validate({**keys, **sizes, "lr": OPTIMIZERS[optimizer].small_lr, **overrides})


def planned(shapes: Shapes, resolution: int, stage: StageTable, ops: Ops) -> dict[str, int]:
    """Return the planned bytes of each owner, of the activations, and at the peak."""
    need = plan_stage(shapes, stage, resolution, 0, ops).need(stage.micro_batch_size)
    return {**need.owners, "activations": need.activations, "peak": need.step}


def measured(shapes: Shapes, resolution: int, stage: StageTable, ops: Ops) -> dict[str, int]:
    """Return the same bytes, measured in the second of two real steps. The first one allocates the state."""
    side, model = shapes.side(resolution), empty_model(shapes, ops)
    live = LiveBytes(CPU)
    bytes_after_forward: list[int] = []
    model.unet.checkpointing = stage.checkpointing
    set_precision(stage.precision, model.unet)
    with live:
        for module in (model.unet, model.text.module, model.vae.module):
            materialize(module, CPU)
            for parameter in module.parameters():
                parameter.data.normal_(0, 0.02)
            for buffer in module.buffers():  # position ids
                buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))

        step = Step(model, stage, total=2, seed=0)
        latents = torch.randn(stage.batch, shapes.unet.in_channels, side, side).half()
        token_ids = torch.zeros(stage.batch, model.text.lengths[-1], dtype=torch.int64)
        step(Batch(latents, token_ids, torch.arange(stage.batch), []), 0)
        bytes_before = live.now
        live.restart()
        handle = model.unet.register_forward_hook(lambda *_: bytes_after_forward.append(live.now))
        result = step(Batch(latents, token_ids, torch.arange(stage.batch), []), 1)
        handle.remove()

    assert torch.isfinite(result.loss) and not result.skipped
    owners = {"VAE": list(model.vae.module.parameters()), **step.tensors_by_role()}
    sizes = {owner: sum(t.untyped_storage().nbytes() for t in tensors) for owner, tensors in owners.items()}
    return {**sizes, "activations": bytes_after_forward[0] - bytes_before, "peak": live.peak}


def compare(planned: dict[str, int], measured: dict[str, int]) -> dict[str, dict[str, float]]:
    """Return the planned bytes, the measured bytes and their ratio by owner. The weights of both components are added."""
    planned_bytes = {measured_name: planned[name] for measured_name, name in PLANNED_NAMES.items()}
    planned_bytes["weights"] = sum(size for owner, size in planned.items() if owner.startswith("weights"))
    return {
        owner: {"planned": planned_bytes[owner], "measured": size, "ratio": planned_bytes[owner] / size if size else 1.0}
        for owner, size in measured.items()
        if size or planned_bytes[owner]
    }


def run_case(index: int, small: bool) -> None:
    shapes, resolution = SMALL if small else FULL
    stage, ops = stage_of(CASES[index]), fastest(CPU)
    figures = compare(planned(shapes, resolution, stage, ops), measured(shapes, resolution, stage, ops))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"kernels": ops.name, "figures": figures, "resident": resident}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, in seconds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="*", default=[], help="only combinations that have all these words in their name")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        return run_case(arguments.case, arguments.small)

    records = []
    for index, case in enumerate(CASES):
        *values, overrides = case
        name = "{} {} {} x {} {}".format(*values) + "".join(f" {key}={value}" for key, value in overrides.items())
        if not all(word in name.split() for word in arguments.only):
            continue
        command = [sys.executable, __file__, "--case", str(index), *(["--small"] if arguments.small else [])]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            sys.exit(f"{name}: failed with exit status {result.returncode}")
        record = {"case": name, **json.loads(result.stdout.splitlines()[-1])}
        ratios = "  ".join(f"{owner} {figure['ratio']:.4f}" for owner, figure in record["figures"].items())
        print(f"{name:44} peak {record['figures']['peak']['measured'] / 1e9:.3f} GB  planned / measured: {ratios}", flush=True)
        records.append(record)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    stamp: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": commit, "machine": platform.machine()}
    stamp |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    stamp["config"] = "a small model, 64 px" if arguments.small else "full-size SD1.5, random weights, 512 px"
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        replace_file(arguments.json, json.dumps({"stamp": stamp, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
