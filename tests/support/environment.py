"""Settings of every test process: one thread, no GPU, and Triton's interpreter. Import this module first."""

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
# Tests hide the GPU, so that they are the same on every machine: all of them may run side by side, fork, and compare bits.
# With FASTSD_TEST_GPU=1, only the tests of a GPU run, and those of kernels, which run in Triton's interpreter otherwise.
ON_GPU = os.environ.get("FASTSD_TEST_GPU") == "1"
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Triton reads the variable when a kernel is defined, so set it before that.
    os.environ["TRITON_INTERPRET"] = "1"
    # This module replaces parts of the interpreter of Triton 3.7. With other versions, tests only take longer.
    if importlib.util.find_spec("triton") and importlib.metadata.version("triton").startswith("3.7."):
        import quick_interpreter  # noqa: F401
