"""The optimizers of a stage, one record each.

Their classes define the rest: state tensors (`slots`) and hyper-parameters, which are stage keys of the same names.  A key that
only one optimizer has is marked so in `stages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["dlion", "lion", "adamw"]


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer.

    Attributes:
        implementation: name of its class in `fastsd_kernels.optim`.
        tunes_lr: it estimates a step size d, and lr is a factor of d, 1.0 by default. The others need an lr.
        original: "package.Class" of the implementation that `fastsd bench` compares it with; "" = that of torch.optim.
    """

    implementation: str
    tunes_lr: bool = False
    original: str = ""

    @property
    def package(self) -> str:
        """Name under which pip installs the original implementation."""
        return self.original.partition(".")[0].replace("_", "-")

    @property
    def class_name(self) -> str:
        """Name of the original implementation's class."""
        return self.original.partition(".")[2]

    @property
    def small_lr(self) -> float:
        """An lr that keeps random weights stable, for benchmarks."""
        return 1.0 if self.tunes_lr else 1e-6


OPTIMIZERS: dict[OptimizerName, OptimizerSpec] = {
    "dlion": OptimizerSpec("DLion", tunes_lr=True, original="dadaptation.DAdaptLion"),
    "lion": OptimizerSpec("Lion", original="lion_pytorch.Lion"),
    "adamw": OptimizerSpec("AdamW"),
}
ORIGINALS = {spec.package: name for name, spec in OPTIMIZERS.items() if spec.original}
