"""A process that compiles kernels into Triton's cache. It needs no GPU and does not touch one.

It reads lines of JSON: first the target, then one kernel per line (`compilation.py` describes both). It answers each kernel
with one line: "" or the reason why it could not be compiled.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastsd_kernels.launch import cache_key


class _Driver:
    """Triton's view of a GPU that is not used: only its type matters to the compiler."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def work() -> None:
    """Compile until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Triton and its libraries may print
    driver.set_active(_Driver(GPUTarget(*json.loads(sys.stdin.readline()))))
    for kernel in sys.stdin:
        print(json.dumps(_problem(kernel)), file=replies, flush=True)


def _problem(kernel: str) -> str:
    try:
        warm_up(kernel)
    except Exception as error:
        cause = error.__cause__ or error
        # Triton's own errors first show the source code.
        reason = getattr(cause, "error_message", None) or str(cause).strip() or type(cause).__name__
        module, name, *_ = json.loads(kernel)
        return f"{module}.{name}: {reason.splitlines()[0]}"
    return ""


def warm_up(kernel: str) -> None:
    """Let Triton compile a kernel for the current target, unless it is in the cache. Triton's exceptions pass through."""
    module, name, arguments, options = json.loads(kernel)
    function = getattr(importlib.import_module(f"fastsd_kernels.{module}"), name)
    cache_key(function)
    constants = {key: _tuples(value) for key, value in options.items()}
    function.run(*map(_argument, arguments), grid=(1,), warmup=True, **constants)


def _argument(value: Any) -> Any:
    """Return a number or None as it is, and for [dtype, offset] a tensor without data whose address is `offset`."""
    if not isinstance(value, list):
        return value
    dtype, offset = value
    storage = torch.empty(16, dtype=getattr(torch, dtype), device="meta")
    return storage[offset // storage.element_size() :]


def _tuples(value: Any) -> Any:
    """Restore tuples, which are lists in JSON."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
