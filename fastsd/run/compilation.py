"""Compile the kernels of recorded launches side by side, before they are first used.

Without this, Triton compiles each kernel when it is first launched, one after another. Here, processes compile them into
Triton's cache on the disk, where the launches then find them. Triton itself decides on both sides which code a launch needs: it
specialises a kernel by its arguments' dtypes and by the divisibility of addresses and sizes by 16.

A kernel is described in JSON: [module, name, arguments, options]. An argument is a number, None, or, for a tensor,
[dtype, address modulo 16].
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import psutil
from torch import Tensor

from fastsd.terminal.console import Console, work
from fastsd_kernels.launch import Launch

_PROCESS_BYTES = 1 << 30  # memory of a process: PyTorch, Triton and LLVM
# The first line of the input is the module path of this process, which may differ from that of a new one.
_START = "import json, sys; sys.path = json.loads(input()); from fastsd.run.compile_worker import work; work()"


def kernels_of(launches: Iterable[Launch]) -> list[str]:
    """Return the kernels of recorded launches as JSON. Equal ones occur once."""

    def argument(value: object) -> object:
        return [str(value.dtype).removeprefix("torch."), value.data_ptr() % 16] if isinstance(value, Tensor) else value

    kernels: dict[str, None] = {}
    for launch in launches:
        module, name = launch.kernel.fn.__module__.removeprefix("fastsd_kernels."), launch.kernel.fn.__name__
        kernels[json.dumps([module, name, [*map(argument, launch.arguments)], launch.options])] = None
    return list(kernels)


def compile_kernels(kernels: Iterable[str], console: Console) -> None:
    """Compile those kernels that are not in Triton's cache, and print how many they are and how long it takes.

    A kernel that cannot be compiled here is compiled at its first launch. A warning says so.
    """
    from triton.runtime.driver import driver

    missing = [*missing_kernels(kernels).values()]
    if not missing:
        return
    target, start = driver.active.get_current_target(), time.monotonic()
    count = min(len(missing), len(psutil.Process().cpu_affinity()), max(1, psutil.virtual_memory().available // _PROCESS_BYTES))
    noun = "process" if count == 1 else "processes"
    console.echo(f"kernels: compiling {len(missing)} for sm_{target.arch} on {count} {noun}, once per machine")
    problems, done = [], 0
    with (
        work("compiling", len(missing), "kernels") as compiling,
        _compilers(missing, count, [target.backend, target.arch, target.warp_size]) as results,
    ):
        while count:
            with suppress(Empty):
                problem = results.get(timeout=0.2)  # on Windows, Ctrl-C does not interrupt a wait without a limit
                if problem is None:
                    count -= 1
                    continue
                done += 1
                problems += [problem] if problem else []
                compiling.add()
    failed = len(problems) + len(missing) - done
    if failed:
        warn_not_compiled(console, str(failed), problems[0] if problems else "a compiler process ended")
    console.echo(f"kernels: {len(missing) - failed} compiled in {time.monotonic() - start:.0f} s")


def warn_not_compiled(console: Console, count: str, reason: str) -> None:
    console.warn(f"kernels: {count} not compiled in advance ({reason}); they are compiled when they are first used")


def missing_kernels(kernels: Iterable[str]) -> dict[str, str]:
    """Return the kernels that are missing in Triton's cache on the disk, by their keys there."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    from fastsd.run.compile_worker import warm_up

    manager_class: Any = knobs.cache.manager_class or FileCacheManager

    class LookUp(manager_class):
        """Triton's cache, which raises the answer where Triton would compile the kernel or load it."""

        def __init__(self, key: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(key, *args, **kwargs)
            self._cache_key = key

        def get_group(self, filename: str) -> Any:
            raise _Answer(self._cache_key, present=filename in (super().get_group(filename) or {}))

    missing: dict[str, str] = {}
    with knobs.cache.scope():
        knobs.cache.manager_class = LookUp
        for kernel in dict.fromkeys(kernels):
            try:
                warm_up(kernel)
            except _Answer as answer:
                if not answer.present:
                    missing.setdefault(answer.key, kernel)
            except Exception:  # a process reports it
                missing[kernel] = kernel
    return missing


class _Answer(Exception):
    """The answer of a look-up in Triton's cache."""

    def __init__(self, key: str, *, present: bool) -> None:
        super().__init__(key)
        self.key, self.present = key, present


@contextmanager
def _compilers(kernels: list[str], count: int, target: list[Any]) -> Iterator[SimpleQueue[str | None]]:
    """Let `count` processes compile. Yield a queue with the result of each kernel, and None for each process without work.

    A result is the reason why a kernel could not be compiled, or "". All processes end with the context.
    """
    waiting, results = SimpleQueue[str](), SimpleQueue[str | None]()
    for kernel in kernels:
        waiting.put(kernel)
    processes: list[subprocess.Popen[str]] = []
    threads: list[Thread] = []
    try:
        for _ in range(count):
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            try:
                processes.append(subprocess.Popen([sys.executable, "-c", _START], encoding="utf-8", **pipes))
            except OSError:
                results.put(None)
                continue
            threads.append(Thread(target=_serve, args=(processes[-1], target, waiting, results), daemon=True))
            threads[-1].start()
        yield results
    finally:
        for process in processes:
            process.kill()  # one that has ended is left alone
        for thread in threads:
            thread.join()
        for process in processes:
            process.wait()


def _serve(
    process: subprocess.Popen[str], target: list[Any], waiting: SimpleQueue[str], results: SimpleQueue[str | None]
) -> None:
    """Give a process one kernel after another until none is left or the process ends."""
    assert process.stdin and process.stdout
    with suppress(Empty, OSError, ValueError), process.stdin as requests, process.stdout as replies:
        requests.write(f"{json.dumps(sys.path)}\n{json.dumps(target)}\n")
        while True:
            requests.write(waiting.get_nowait() + "\n")
            requests.flush()
            results.put(json.loads(replies.readline()))  # the end of the replies is no JSON
    results.put(None)
