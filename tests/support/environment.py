"""What holds in every process of the tests: one thread, and Triton's interpreter where there is no GPU. Imported first."""

import importlib.metadata
import importlib.util
import os
import signal
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Small tensors gain nothing from threads, and sums depend on their number: the same one here and in subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell that starts the tests in the background has told them to ignore Ctrl-C, which some of them send themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Kernels run on CPU tensors here unless there is a GPU. Read when a kernel is defined, so before any import of them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # It replaces parts of this version's interpreter; under any other one the same tests take longer.
    if importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.7."):
        import quick_interpreter  # noqa: F401
