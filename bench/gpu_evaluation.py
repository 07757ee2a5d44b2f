"""Measure on a GPU what comes between the steps of a run: a sample and a validation beside a graph, and a checkpoint.

python bench/gpu_evaluation.py [--only evaluation checkpoint] [--small] [--lines FILE]

evaluation   seconds and memory of a sample and of a validation, after which the graph continues with the same bits
checkpoint   seconds that training stands still for copies of the UNet and the optimizer state, and seconds of writing them
             beside it: hashes, writes, flushes and the rename
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measurements import Measurement, Record, Setup, figures_lines, free_memory, token_batches, weights_hash, whole_model
from measurements import main as run_measurements
from plan_check import stage_of
from torch import Tensor

from fastsd import storage
from fastsd.bench import counters
from fastsd.config.schema import SampleTable
from fastsd.config.stages import StageTable
from fastsd.model.formats.load import component_state_dict, write_component
from fastsd.model.vae import Vae
from fastsd.run.validation import Strata
from fastsd.sampling.generate import generate
from fastsd.train import trainable
from fastsd.train.graph import WARM_UP
from fastsd.train.step import Step
from fastsd_kernels.noise import Purpose


def start(setup: Setup, stage: StageTable, steps: int) -> tuple[Step, Callable[[int], Tensor]]:
    """Return a step with a captured graph, and a function that runs step number i and returns its loss."""
    shapes, resolution = setup.shapes
    batches = token_batches(shapes.unet.in_channels, shapes.side(resolution), stage.batch)
    model = whole_model(setup, stage)
    model.vae = Vae(model.vae.module, "random weights", model.unet.ops)  # one that decodes
    step = Step(model, stage, steps, seed=0, graph=True)
    run = lambda i: step(batches[i % len(batches)], i).loss  # noqa: E731
    for i in range(WARM_UP + 1):
        run(i)
    return step, run


def sample(step: Step, size: int, steps: int) -> None:
    model = step.model
    # The model has no tokenizer. Any token ids take the same time.
    model.text.tokenize = lambda texts: torch.zeros(len(texts), 77, dtype=torch.int64)  # type: ignore[method-assign]
    generate(model, ["a red circle"], [0], SampleTable(prompts=["a red circle"], steps=steps, images=1), size)


@torch.no_grad()
def validate(step: Step, side: int, images: int) -> list[float]:
    model, device = step.model, step.device
    latents = torch.randn(images, model.unet.cfg.in_channels, side, side, device=device)
    text_embeds = model.text.encode(torch.zeros(images, 77, dtype=torch.int64, device=device))
    strata = Strata(model, 4, 0, Purpose.VALIDATION)
    return strata.errors(latents, text_embeds, torch.arange(images)).mean(1).tolist()


def evaluation(setup: Setup) -> list[Record]:
    """Compare steps after a sample and a validation with steps that follow at once."""
    shapes, resolution = setup.shapes
    stage = stage_of(("bf16", "lion", 4, 1, "none", {}))
    steps = WARM_UP + 4
    hashes, records = [], []
    tasks: dict[str, Callable[[], object]] = {}
    for evaluated in (False, True):
        step, run = start(setup, stage, steps)
        if evaluated:
            tasks = {
                "sample": partial(sample, step, resolution, 2 if setup.dry else 20),
                "validation": partial(validate, step, shapes.side(resolution), 4),
            }
            for name, task in tasks.items():
                begin = time.perf_counter()
                first_rise = counters.rise(task, setup.device)
                first_s = time.perf_counter() - begin
                figures = {"first_s": first_s, "seconds": counters.seconds(task, setup.device), "rise_gb": first_rise / 1e9}
                records.append(setup.record("evaluation", name, "bf16", "beside a graph", **figures))
        losses = [run(i).item() for i in range(WARM_UP + 1, steps)]
        hashes.append((losses, weights_hash(step)))
        captures = step._graphs._captures if step._graphs else {}
        assert len(captures) == 1, "the graph was freed"
        del step, run, captures
        tasks.clear()
        free_memory()
    records[-1]["same_bits"] = hashes[0] == hashes[1]
    assert hashes[0] == hashes[1], f"the graph continues with other bits: {hashes}"
    return records


class Clock:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        return call


class _File:
    """A file whose writes are timed."""

    def __init__(self, clock: Clock, *args: Any, **kwargs: Any) -> None:
        self.file = open(*args, **kwargs)  # noqa: SIM115
        self.write = clock.timed("write", self.file.write)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class _Digest:
    """A sha256 whose time is counted."""

    def __init__(self, clock: Clock, make: Callable[[], Any], data: bytes = b"") -> None:
        digest = make()
        self.update, self.hexdigest = clock.timed("hash", digest.update), digest.hexdigest
        self.update(data)


def checkpoint(setup: Setup) -> list[Record]:
    """Copy and write the large tensors of a checkpoint as a run does, and return the seconds by kind of work."""
    stage = stage_of(("bf16", "lion", 1, 1, "none", {}))
    step, _ = start(setup, stage, WARM_UP + 2)
    clock, target = Clock(), setup.folder / "checkpoint"
    replacements: list[tuple[Any, str, Any]] = [
        (Tensor, "cpu", clock.timed("copy to the host", Tensor.cpu)),
        (trainable, "join_master", clock.timed("join", trainable.join_master)),
        (os, "fsync", clock.timed("flush", os.fsync)),
        (Path, "rename", clock.timed("rename", Path.rename)),
        (storage.hashlib, "sha256", partial(_Digest, clock, storage.hashlib.sha256)),
    ]
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(mock.patch.object(*replacement))
        stack.enter_context(mock.patch.object(storage, "open", partial(_File, clock), create=True))
        counters.synchronize(setup.device)
        begin = time.perf_counter()
        weights = step.components["unet"].state(copy=True)
        state = {name: trainable.host_copy(tensor) for name, tensor in step.state_dict().items()}
        still = time.perf_counter() - begin
        with storage.new_folder(target) as new:
            write_component(new, step.model, "unet", component_state_dict(step.model, "unet", weights))
            storage.write_safetensors(new / "state.safetensors", state)
        total = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    figures = {"still": still, "seconds": total, "gb": size / 1e9, **clock.seconds, "rest": total - clock.seconds.total()}
    return [setup.record("checkpoint", "UNet and state of Lion", "bf16", "fastsd", **figures)]


def measurements() -> list[Measurement]:
    return [
        Measurement("evaluation", "sample and validation beside a graph", evaluation, alone=True),
        Measurement("checkpoint", "by kind of work", checkpoint, alone=True),
    ]


if __name__ == "__main__":
    sys.exit(run_measurements(__doc__, __file__, measurements(), figures_lines))
