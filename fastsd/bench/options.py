"""Resolve the options of `fastsd bench` to a config and a device, and print tables."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsd.bench import baselines, counters
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import Config, StageTable, load_config
from fastsd.data.building.buckets import planned_side
from fastsd.errors import UserError
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes, read_shapes
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.weights import diffusers_state_dict
from fastsd.train.device import choose_device, choose_ops
from fastsd_kernels import Ops

# Command line options that set config values, in addition to key=value.
OPTIONS = {
    "batch": "stage.0.batch", "micro_batch": "stage.0.micro_batch", "optimizer": "stage.0.optimizer", "size": "data.resolution",
    "graph": "cuda_graph",
}  # fmt: skip
RANDOM_CONFIG = """
model = {{ base = "random weights" }}
data = {{ folders = ["generated"], resolution = {size} }}
stage = [{{ train = ["unet"], until = 1, batch = {batch}, optimizer = "{optimizer}", lr = {lr} }}]
"""
Figures = tuple[torch.device, dict[str, Any]]  # the measured device; "settings", "results", "misses" and more


@dataclass(frozen=True)
class BenchOptions:
    """The command line. `changes` are key=value settings for the config. None means a default that fits the machine."""

    what: str
    config: str | None
    changes: list[str]
    precision: str | None = None
    small: bool = False
    steps: int | None = None
    peers: str | None = None
    fraction: float | None = None
    rate: float = 10.0

    def changed(self, key: str) -> str | None:
        """Return the last value of a key in `changes`, or None. `key` is the last part of its dotted name."""
        settings = [change.partition("=") for change in self.changes]
        return next((value.strip('"') for name, _, value in reversed(settings) if name.split(".")[-1] == key), None)


@dataclass
class BenchTarget:
    """The stage, device and shapes to measure. `cfg` is the UNet's shape; latents have `side` x `side` positions."""

    config: Config
    stage: StageTable
    device: torch.device
    ops: Ops
    cfg: UNetConfig
    side: int
    free: float  # bytes, before anything is allocated

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each tensor of diffusers' UNet. SD1.5 has 686 tensors."""
        with torch.device("meta"):
            return [tensor.numel() for tensor in diffusers_state_dict(UNet(self.cfg)).values()]


def bench_config(options: BenchOptions) -> Config:
    """Load the config, or create one for random weights, with the changes of the command line. Raises UserError."""
    if options.config:
        return load_config(options.config, options.changes, options.precision)
    name = options.changed("device") or "auto"
    gpu = torch.cuda.is_available() if name == "auto" else name.startswith("cuda")
    # D-Lion's state for two candidates would not fit into the main memory of an ordinary machine.
    optimizer = options.changed("optimizer") or ("dlion" if gpu or options.small else "lion")
    size, batch = (64, 2) if options.small else (512, 1)
    lr = OPTIMIZERS[optimizer].small_lr if optimizer in OPTIMIZERS else 1.0  # loading the config reports an unknown name
    text = RANDOM_CONFIG.format(size=size, batch=batch, optimizer=optimizer, lr=lr)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.toml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(path, options.changes, options.precision)
        except UserError as error:
            raise UserError("bench-config", str(error).replace(str(path), "bench")) from None


def bench_target(options: BenchOptions) -> BenchTarget:
    """Determine the stage, device and shapes to measure, without loading weights. Raises UserError."""
    config = bench_config(options)
    device = choose_device(config.device)
    if options.config:
        shapes, _ = read_shapes(config.model)
    else:
        shapes = Shapes(baselines.SMALL if options.small else UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    side = shapes.side(planned_side(config.data, shapes.step))
    ops, free = choose_ops(config.kernels, device), counters.free_bytes(device)
    stage = config.stage[0].model_copy(update={"teacher": ""})  # which the baselines do not have
    return BenchTarget(config, stage, device, ops, shapes.unet, side, free)
