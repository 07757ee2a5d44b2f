"""Measurements on a GPU: each is one line of JSON, written as soon as it is complete, and none stops the next.

A failed measurement is recorded, and the next one starts in a new process, because a broken CUDA context breaks all later ones.
Each measurement that needs it has its own process. The others share one and free memory after each. A worker process ends when
its parent ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import xxhash
from plan_check import FULL, SMALL

from fastsd.bench import baselines, counters
from fastsd.config.schema import StageTable
from fastsd.data.loader import Batch
from fastsd.model.model import Model
from fastsd.model.shapes import Shapes, empty_model, materialize
from fastsd.model.unet import UNetConfig
from fastsd.terminal.console import Console
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import set_precision
from fastsd.train.step import Step

Record = dict[str, Any]
LONGEST = 2000  # characters from the end of a traceback
# A model for trials on the stand-in, where Python dispatches every operation.
DRY_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DRY_UNET = UNetConfig(
    block_out_channels=(16,),
    attention=(True,),
    layers_per_block=1,
    heads=2,
    cross_attention_dim=16,
    norm_groups=4,
    sample_size=16,
)
DRY = Shapes(DRY_UNET, {**SMALL[0].text, **DRY_TEXT}, {**SMALL[0].vae, "block_out_channels": [8, 8], "norm_num_groups": 4}), 32
STAND_IN = str(Path(__file__).with_name("cuda_stand_in.py"))


class Skipped(Exception):
    """A measurement that is impossible on this machine; the message gives the reason."""


@dataclass(frozen=True)
class Setup:
    """Options of the command line, and the device."""

    device: torch.device
    small: bool
    rounds: int
    dry: bool = False  # on the stand-in for CUDA: figures mean nothing
    folder: Path = Path()  # for files that one measurement leaves to another

    @property
    def shapes(self) -> tuple[Shapes, int]:
        """The model's shapes, and the resolution in px."""
        return DRY if self.dry else SMALL if self.small else FULL

    def record(self, op: str, kind: str, mode: str, implementation: str, **figures: Any) -> Record:
        labels = {"op": op, "kind": kind, "mode": mode, "implementation": implementation}
        return {**labels, "device": counters.device_name(self.device), "small": self.small, **figures}


@dataclass(frozen=True)
class Measurement:
    part: str
    what: str
    measure: Callable[[Setup], list[Record]]
    gpu_only: bool = False
    alone: bool = False  # in its own process
    environment: tuple[tuple[str, str], ...] = ()  # variables of that process

    @property
    def name(self) -> str:
        return f"{self.part}: {self.what}"


def whole_model(setup: Setup, stage: StageTable, seed: int = 0) -> Model:
    """Create all components of a model on the device, with random weights and the stage's settings."""
    shapes, _ = setup.shapes
    torch.manual_seed(seed)
    model = empty_model(shapes, choose_ops("auto", setup.device))
    for module in (model.unet, model.text.module, model.vae.module):
        materialize(module, setup.device)
        with torch.no_grad():
            for tensor in module.parameters():
                tensor.normal_(0, 0.02)
    for positions in model.text.module.buffers():
        positions.copy_(torch.arange(positions.numel()).view_as(positions))
    model.unet.checkpointing = stage.checkpointing
    set_precision(stage.precision, model.unet)
    return model


def token_batches(channels: int, side: int, batch: int) -> list[Batch]:
    """Create a batch like those of `baselines.random_batches`, but with 77 token ids per text."""
    template = baselines.random_batches(channels, side, batch)[0]
    return [replace(template, token_ids_BL=torch.zeros(batch, 77, dtype=torch.int64))]


def peak(run: Callable[[], Any]) -> tuple[int, int]:
    """Return the peak of allocated bytes and that of reserved bytes during `run()`."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def free_memory() -> None:
    """Free unused memory, including that of compiled code."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def weights_hash(step: Step) -> str:
    """Hash the weights that a step computes with and the low halves of bf16."""
    digest = xxhash.xxh3_64()
    for tensor in step.tensors_by_role()["weights"]:
        digest.update(tensor.detach().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def outcome(measurement: Measurement, setup: Setup) -> dict[str, Any]:
    """Run a measurement and return its line of JSON."""
    line: dict[str, Any] = {"test": measurement.name, "outcome": "passed"}
    start = time.monotonic()
    try:
        if measurement.gpu_only and setup.device.type == "cpu":
            raise Skipped("skipped: memory measurements need a GPU")
        line["records"] = measurement.measure(setup)
    except Skipped as reason:
        line |= {"outcome": "skipped", "message": str(reason)}
    except Exception:
        line |= {"outcome": "failed", "message": traceback.format_exc()[-LONGEST:]}
    return line | {"seconds": round(time.monotonic() - start, 1)}


def serve(selected: list[Measurement], setup: Setup) -> None:
    """Run measurements one after another until one fails. Print a line of JSON for each."""
    # Standard output is reserved for the lines; other output goes to the terminal.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()  # end when the parent ends
    for measurement in selected:
        print(f"\n-- {measurement.name}", flush=True)
        line = outcome(measurement, setup)
        print(json.dumps(line), file=lines, flush=True)
        if line["outcome"] == "failed":
            return
        free_memory()


def outcomes(
    selected: list[Measurement], script: str, options: list[str], launcher: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the lines of all selected measurements, from as many worker processes as needed."""
    remaining = list(selected)
    while remaining:
        group = remaining[:1] if remaining[0].alone else list(takewhile(lambda measurement: not measurement.alone, remaining))
        command = [sys.executable, *launcher, script, *options, "--serve", *(measurement.name for measurement in group)]
        environment = {**os.environ, **dict(group[0].environment)}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout
            count = 0
            last_outcome = {"outcome": ""}
            for line in process.stdout:
                count += 1
                last_outcome = json.loads(line)
                yield last_outcome
        if count < len(group) and last_outcome["outcome"] != "failed":
            message = f"the process failed with exit status {process.returncode}"
            yield {"test": group[count].name, "outcome": "failed", "message": message}
            count += 1
        remaining = remaining[count:]


def main(
    description: str | None,
    script: str,
    all_measurements: list[Measurement],
    show: Callable[[list[Record]], list[str]],
    arguments: list[str] | None = None,
) -> int:
    """Run the command line of a script. Return the exit status: 1 if anything failed, whatever the figures.

    Args:
        show: returns the lines to print for the records of a measurement.
    """
    parts = list(dict.fromkeys(entry.part for entry in all_measurements))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=" ".join(parts))
    parser.add_argument("--small", action="store_true", help="tiny model, any device: a trial run without real figures")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each candidate, 4 steps each on a GPU (default: 3)")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="append each outcome to this file, as JSON lines")
    parser.add_argument("--dry", action="store_true", help="on the stand-in for CUDA: a trial run without a GPU")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        setup = Setup(choose_device("auto", Console(stderr=True)), options.small, options.rounds, options.dry, options.folder)
        serve([entry for entry in all_measurements if entry.name in options.serve], setup)
        return 0
    gpu = torch.cuda.is_available() or options.dry
    if not (gpu or options.small):
        print("no CUDA device found; run this on a machine with a GPU, or use --small on any machine", file=sys.stderr)
        return 2

    failed = False
    flags = [f"--{name}" for name in ("small", "dry") if getattr(options, name)]
    # Without a GPU, measurements that need their own process are skipped immediately.
    selected = [replace(entry, alone=entry.alone and gpu) for entry in all_measurements if entry.part in options.only]
    with tempfile.TemporaryDirectory(prefix="fastsd-bench-") as folder:
        serve_options = ["--rounds", str(options.rounds), "--folder", folder, *flags]
        for line in outcomes(selected, script, serve_options, [STAND_IN] if options.dry else []):
            if options.lines:
                with options.lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            failed |= line["outcome"] == "failed"
            print(f"{line['outcome']:7} {line['test']} {line.get('message', '')}".rstrip())
            print("\n".join(show(line.get("records", []))), flush=True)
    return int(failed)


def figures_lines(records: Sequence[Record]) -> list[str]:
    """Return a line per record with all of its figures."""
    labels = ("op", "kind", "mode", "implementation")
    lines = []
    for record in records:
        figures = {key: value for key, value in record.items() if key not in (*labels, "device", "small")}
        texts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()]
        lines.append(f"{' '.join(str(record[key]) for key in labels)}: {', '.join(texts)}")
    return lines
