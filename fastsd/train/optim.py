"""The optimizers of `fastsd_kernels.optim`, where any trainer can use them, by their names in a config."""

import fastsd_kernels.optim
from fastsd.config.optimizers import OPTIMIZERS, OptimizerName
from fastsd_kernels.optim import AdamW as AdamW
from fastsd_kernels.optim import DLion as DLion
from fastsd_kernels.optim import FastOptimizer as FastOptimizer
from fastsd_kernels.optim import Lion as Lion
from fastsd_kernels.optimizer_state import flat_state as flat_state
from fastsd_kernels.optimizer_state import load_flat_state as load_flat_state


def optimizer_class(name: OptimizerName) -> type[FastOptimizer]:
    """Return the class of the optimizer with this name in a config."""
    implementation: type[FastOptimizer] = getattr(fastsd_kernels.optim, OPTIMIZERS[name].implementation)
    return implementation
