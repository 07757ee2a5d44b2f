"""The optimizers of `fastsd_kernels.optim`, where any trainer can use them."""

from fastsd_kernels.optim import AdamW as AdamW
from fastsd_kernels.optim import DLion as DLion
from fastsd_kernels.optim import FastOptimizer as FastOptimizer
from fastsd_kernels.optim import Lion as Lion
from fastsd_kernels.optim import flat_state as flat_state
from fastsd_kernels.optim import load_flat_state as load_flat_state
