"""Predict the time of every launch of our kernels in a training step of SD1.5's UNet, with no GPU present.

    python -m fastsd_kernels.atlas --time [--card 3090 4090 5090 H200 ...] [--batch 1 8 32] [--precision bf16 tf32 fp32]
                                          [--op attention ...] [--json FILE] [--diff FILE]
    python bench/kernel_times.py --published       predict kernels whose times are published, and compare

A step runs on tensors without data and its launches are recorded, so their arguments are those that they have on a GPU. Each
is compiled for the card's architecture and predicted from its machine code (`kernels/fastsd_kernels/prediction.py`). fp32 and
tf32 train with D-Lion, bf16 with Lion, without recomputing blocks. Columns:

    count     launches in a step
    us        predicted time of one launch; nothing here is measured
    floor     time of the busiest unit alone, with all SMs full, and that unit with its share of the predicted time
    blocks    on an SM, and waves of them
    work      attention: FLOPs of matmuls executed over needed
    ffma/lds  fused multiply-adds per number loaded from shared memory
    wgmma     share of the tensor-core FLOPs by wgmma (sm_90), not by mma
    cvt.rna   conversions to TF32 in the kernel's PTX

`--json` writes the milliseconds of a step by card, precision, batch and kernel. `--diff` compares them with such a file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsd.config.schema import StageTable
from fastsd.data.loader import Batch
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, empty_model, materialize
from fastsd.model.unet import UNetConfig
from fastsd.plan.rehearsal import WithoutData
from fastsd.storage import replace_file
from fastsd.train.precision import attention_precision
from fastsd.train.step import Step
from fastsd_kernels import TRITON
from fastsd_kernels.attention_tiles import needed_flops
from fastsd_kernels.cards import CARDS, Card
from fastsd_kernels.launch import INTERPRETED, OPERATORS, Launch, meta, recording
from fastsd_kernels.prediction import Predictor
from fastsd_kernels.sass import Compilation, Compiled, compile_launch, specialise

PRECISIONS = ("bf16", "tf32", "fp32")
META = torch.device("meta")
Sums = dict[str, dict[str, dict[str, dict[str, float]]]]  # ms of a step by card, precision, batch, kernel


HEADER = (
    f"{'card':5} {'mode':4} {'B':>3} {'op':16} {'kernel':18} {'shapes':32} count        us    floor busiest      "
    "blocks waves  work ffma/lds wgmma cvt.rna stack"
)


class Row(NamedTuple):
    """The launches of a step that take the same time. Times are predicted, of one launch, in microseconds."""

    card: str
    precision: str
    batch: int
    op: str
    kernel: str
    shape: str
    count: int
    us: float
    floor_us: float
    busiest: str
    share: float
    blocks: int
    waves: float
    work: float
    per_load: float
    wgmma: float
    rounded: int
    stack: int


class Launching(TorchDispatchMode):
    """Lets our operators launch their kernels on tensors without data. PyTorch would only make their results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = OPERATORS[func._schema.name] if func.namespace == "fastsd" else func
        return function(*args, **(kwargs or {}))


def step_launches(target: int, precision: str, batch: int) -> list[Launch]:
    """Return the launches of one training step with one micro-batch, on a GPU of compute capability `target`."""
    assert TRITON is not None
    model = empty_model(
        Shapes(UNetConfig.sd15(), SD15_TEXT | {"num_hidden_layers": 1}, SD15_VAE | {"layers_per_block": 1}), TRITON
    )
    model.scheduler = SD15_SCHEDULER
    with WithoutData(), Launching():
        materialize(model.unet, META)
        optimizer = "lion" if precision == "bf16" else "dlion"
        keys = {"train": ["unet"], "until": 1, "batch": batch, "precision": precision, "optimizer": optimizer, "lr": 1e-4}
        step = Step(model, StageTable.model_validate(keys), total=1, seed=0, cached_text=True)
        with mock.patch("torch.cuda.get_device_capability", lambda _: divmod(target, 10)):
            model.unet.set_attention_precision(attention_precision(precision, torch.device("cuda")))
        latents, texts = meta(batch, 4, 64, 64, dtype=torch.float16), meta(batch, 77, 768)
        ids, positions = meta(batch, 77, dtype=torch.int64), meta(batch, dtype=torch.int64)
        with recording(target) as launches:
            step(Batch(latents, ids, positions, [], texts), 0)
    return launches


def signature(launch: Launch) -> str:
    """Return a text that is the same for launches that take the same time."""
    values = [(tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in launch.arguments]
    return f"{launch.kernel.fn.__module__} {launch.kernel.__name__} {launch.grid} {values} {launch.options}"


def describe(launch: Launch) -> tuple[str, str, str]:
    """Return a launch's op, its kernel with what it computes, and the shapes of its first tensors."""
    suffix = "".join(f" {name[5:].lower()}" for name in ("WITH_K", "WITH_V") if launch.options.get(name))
    shapes = dict.fromkeys("x".join(map(str, x.shape)) for x in launch.arguments[:2] if isinstance(x, Tensor))
    return launch.kernel.fn.__module__.rpartition(".")[2], launch.kernel.__name__.lstrip("_") + suffix, " ".join(shapes)


@cache
def predictor() -> Predictor:
    """Return the process's predictor, which remembers kernels."""
    return Predictor()


_COMPILED: dict[str, Compiled] = {}


def compile_once(compilation: Compilation) -> Compiled:
    if compilation.key not in _COMPILED:
        _COMPILED[compilation.key] = compile_launch(compilation)
    return _COMPILED[compilation.key]


def predict_launch(name: str, card: Card, launch: Launch, precision: str, batch: int, count: int) -> Row:
    compilation = specialise(launch, card.sm)
    compiled = compile_once(compilation)
    p = predictor().predict(card, compilation.key, compiled, launch)
    op, kernel, shape = describe(launch)
    needed = needed_flops(launch) if op.startswith("attention") else 0
    work = p.executed / needed if needed else 0
    code, share = compiled.code, p.shares[p.busiest]
    figures = p.us, p.floor_us, p.busiest, share, p.blocks, p.waves, work, p.per_load, p.wgmma, code.rounded, code.stack
    return Row(name, precision, batch, op, kernel, shape, count, *figures)


def predict_step(names: list[str], precision: str, batches: list[int], ops: list[str]) -> list[Row]:
    """Predict the launches of steps on cards of one architecture. `ops` is empty for all."""
    rows = []
    for batch in batches:
        launches = step_launches(CARDS[names[0]].sm, precision, batch)
        counts = Counter(map(signature, launches))
        for launch in {signature(launch): launch for launch in launches}.values():
            if not ops or describe(launch)[0] in ops:
                rows += [
                    predict_launch(name, CARDS[name], launch, precision, batch, counts[signature(launch)]) for name in names
                ]
    return rows


def sums(rows: list[Row]) -> Sums:
    """Add up the milliseconds of a step by card, precision, batch and kernel."""
    table: Sums = {}
    for row in rows:
        times = table.setdefault(row.card, {}).setdefault(row.precision, {}).setdefault(str(row.batch), {})
        name = f"{row.op} {row.kernel}"
        times[name] = round(times.get(name, 0) + row.count * row.us / 1e3, 4)
    return table


def line(row: Row) -> str:
    name = f"{row.card:5} {row.precision:4} {row.batch:3} {row.op:16} {row.kernel:18} {row.shape:32}"
    unit = f"{row.floor_us:8.1f} {row.busiest:7} {row.share:4.0%}"
    work, per_load = (f"{x:.2f}" if x else "-" for x in (row.work, row.per_load))
    extra = f"{row.blocks:3} {row.waves:8.2f} {work:>5} {per_load:>8} {row.wgmma:5.0%} {row.rounded:7} {row.stack:5}"
    return f"{name} {row.count:5} {row.us:9.1f} {unit} {extra}"


def print_sums(table: Sums, before: Sums) -> None:
    """Print the predicted milliseconds of a step by op, beside those of an earlier table."""
    print("\nPredicted ms of a step" + (", before -> now" if before else ""))
    for card, precisions in table.items():
        for precision, batches in precisions.items():
            for batch, times in batches.items():
                earlier = before.get(card, {}).get(precision, {}).get(batch, {})
                ops = dict.fromkeys(name.split()[0] for name in (*times, *earlier))
                texts = []
                for op in (*ops, ""):
                    now, old = (sum(ms for name, ms in x.items() if not op or name.split()[0] == op) for x in (times, earlier))
                    texts.append(f"{op or 'all'} " + (f"{old:.2f} -> {now:.2f}" if earlier else f"{now:.2f}"))
                print(f"{card:5} {precision:4} batch {batch:2}  " + ", ".join(texts))


def stamp() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    return {"commit": commit.stdout.strip(), **versions, "figures": "predicted ms of a step, nothing measured"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", nargs="+", choices=CARDS, default=["3090", "4090", "5090", "H200"], metavar="CARD")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="images per step")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--op", nargs="+", default=[], help="files of kernels, such as attention")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times of a step to this file")
    parser.add_argument("--diff", type=Path, metavar="FILE", help="compare with the times in this file")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--published", action="store_true", help="compare predictions with published times instead")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so Triton compiles nothing; unset it")
    if options.published:
        from published_times import compare

        compare()
        return
    before = json.loads(options.diff.read_text())["steps"] if options.diff else {}
    targets = {CARDS[name].sm: [x for x in options.card if CARDS[x].sm == CARDS[name].sm] for name in options.card}
    tasks = [(names, precision, options.batch, options.op) for names in targets.values() for precision in options.precision]
    print(HEADER)
    rows: list[Row] = []
    # Not forked: a copy of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for new_rows in pool.map(predict_step, *zip(*tasks, strict=True)):
            rows += new_rows
            print("\n".join(map(line, new_rows)), flush=True)
    table = sums(rows)
    print_sums(table, before)
    if options.json:
        replace_file(options.json, json.dumps({"stamp": stamp(), "steps": table}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
