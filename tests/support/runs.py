"""Runs in this process, and their logs and checkpoints."""

import json
import shutil
import signal
from contextlib import AbstractContextManager, nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.run import checkpoint
from fastsd.run.loop import train
from fastsd.run.signals import StopSignals
from fastsd.terminal.console import Console


def run(path: Path, *overrides: str, precision: str | None = None) -> tuple[Path, str]:
    """Cache and train in this process. Return the run folder and the printed text."""
    out = StringIO()
    config = load_config(path, list(overrides), precision)
    console = Console(file=out, width=200)
    cache(config, console)
    train(config, console)
    return Path(config.run), out.getvalue()


def rows_of(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    """Read the rows of one of a run's logs."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def checkpoint_steps(folder: Path) -> list[int]:
    """List the steps of a run's checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(folder / "checkpoints")]


def stop_requested(run: Path) -> AbstractContextManager[StopSignals]:
    """Stand in for `stop_signals`: a signal arrives in the first step."""
    signals = StopSignals()
    with signals.deferred():
        signals.receive(signal.SIGTERM)
    return nullcontext(signals)


def rewind(folder: Path, step: int) -> None:
    """Delete the checkpoints after a step."""
    for later in checkpoint_steps(folder):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / checkpoint.name_of(later))


def final(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's last checkpoint, also those of the optimizer state."""
    last = checkpoint.checkpoints(folder / "checkpoints")[-1]
    return {
        f"{path.relative_to(last)}:{name}": tensor
        for path in sorted(last.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
