"""Count the bytes that a training step of SD1.5's UNet moves, and its launches, on tensors without data.

    python bench/traffic.py [--precision bf16] [--batch 32] [--micro-batch 8] [--checkpointing none] [--json]
    python bench/traffic.py --write                 update results/traffic.json, which a test compares with the code

Passes over memory are everything but matmuls, convolutions and attention. `fastsd/plan/operations.py` says what is counted.
Text embeddings are given, so the text encoder does not run. By default, fp32 and tf32 train with D-Lion, and bf16 with Lion.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import StageTable
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes
from fastsd.model.unet import UNetConfig
from fastsd.plan.operations import traffic
from fastsd.plan.plan import plan_stage
from fastsd.storage import replace_file

# Committed steps: precision, batch, micro-batch.
STEPS = {"bf16, 1 x 32": ("bf16", 32, 32), "fp32, 4 x 8": ("fp32", 32, 8)}
RESULTS = Path(__file__).parent / "results" / "traffic.json"
Rows = dict[str, tuple[int, int]]


def count(precision: str, batch: int, micro_batch: int, checkpointing: str = "none", optimizer: str = "") -> Rows:
    """Return `fastsd.plan.operations.traffic` of a step at 512 px."""
    optimizer = optimizer or ("lion" if precision == "bf16" else "dlion")
    keys = {"precision": precision, "batch": batch, "optimizer": optimizer, "lr": OPTIMIZERS[optimizer].small_lr}
    stage = StageTable.model_validate({"train": ["unet"], "until": 1, "checkpointing": checkpointing, **keys})
    shapes = Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    return traffic(plan_stage(shapes, stage, 512, 0, cached_text=True).operations(micro_batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--micro-batch", type=int, help="images per forward; the batch, if it is not given")
    parser.add_argument("--checkpointing", default="none", choices=("none", "ff", "block"))
    parser.add_argument("--optimizer", default="", choices=("", *OPTIMIZERS))
    parser.add_argument("--write", action="store_true", help=f"count the committed steps and write {RESULTS.name}")
    parser.add_argument("--json", action="store_true", help="print JSON: [bytes, launches] of a step by group")
    arguments = parser.parse_args()
    if arguments.write:
        rows_by_step = {name: count(*step) for name, step in STEPS.items()}
        lines = ",\n".join(
            f'  "{name}": {{\n' + ",\n".join(f"    {json.dumps(row)}: {list(rows[row])}" for row in rows) + "\n  }"
            for name, rows in rows_by_step.items()
        )
        replace_file(RESULTS, f"{{\n{lines}\n}}\n")
        return
    micro_batch = arguments.micro_batch or arguments.batch
    if arguments.batch % micro_batch:
        parser.error(f"--micro-batch is {micro_batch}; use a divisor of the batch, {arguments.batch}")
    rows = count(arguments.precision, arguments.batch, micro_batch, arguments.checkpointing, arguments.optimizer)
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    forwards, level = arguments.batch // micro_batch, arguments.checkpointing
    print(f"{arguments.precision}, {forwards} x {micro_batch} images, checkpointing {level}")
    print(f"{'':36} MB an image   launches a step")
    for name, (size, launches) in rows.items():
        print(f"{name:36} {size / arguments.batch / 1e6:11,.1f}   {launches:15,}")


if __name__ == "__main__":
    main()
