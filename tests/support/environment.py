"""Settings of every test process: one thread, and Triton's interpreter if there is no GPU. Import this module first."""

import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Small tensors gain nothing from threads. Sums depend on the number of threads, so subprocesses have the same number.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell that starts the tests in the background lets them ignore Ctrl-C, but some tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Without a GPU, kernels run on CPU tensors. Triton reads the variable when a kernel is defined, so set it before that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # This module replaces parts of the interpreter of Triton 3.7. With other versions, tests only take longer.
    if importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.7."):
        import quick_interpreter  # noqa: F401
