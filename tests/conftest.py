"""Fixtures that all tests share."""

import environment  # isort: skip  (first: it decides how kernels are defined)

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from commandline import command_line, processes
from filelock import FileLock
from tiny import make_tiny_model, write_images

from fastsd.train import graph

if not environment.ON_GPU:
    graph.WARM_UP = 1  # eager steps prepare a GPU's allocator and libraries, and the stand-in has none
# No test cuts the power, so a flush would only wait for a disk. Processes that tests start do flush.
os.fsync = os.fstat


@pytest.fixture
def whole_machine(tmp_path_factory):
    """Let only one test at a time, in all test processes together, take most of the memory."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "whole-machine.lock"):
        yield


def pytest_configure():
    if environment.ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("FASTSD_TEST_GPU is set, but PyTorch has no GPU; unset it")


@pytest.fixture(scope="session", autouse=hasattr(signal, "SIGHUP"))
def hangups_have_their_effect():
    """Let tests that are started under `nohup` not inherit the ignored signal, which would stay ignored in a run."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=environment.ON_GPU)
def share_of_the_gpu():
    """Let processes that test side by side share the GPU's memory."""
    torch.cuda.set_per_process_memory_fraction(0.8 / int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not environment.ON_GPU:
        pytest.skip("needs a GPU and FASTSD_TEST_GPU=1")


def pytest_collection_modifyitems(config, items):
    """Start the longest tests early and far apart. Otherwise they would wait for each other at the end."""
    if environment.ON_GPU:
        cpu_items = [item for item in items if not (item.get_closest_marker("gpu") or item.get_closest_marker("kernels"))]
        config.hook.pytest_deselected(items=cpu_items)
        items[:] = [item for item in items if item not in cpu_items]
    if "hours" not in config.option.markexpr:
        hours = [item for item in items if item.get_closest_marker("hours")]
        config.hook.pytest_deselected(items=hours)
        items[:] = [item for item in items if item not in hours]
    long_tests = [item for item in items if "whole_machine" in item.fixturenames]
    ordered = [item for item in items if item not in long_tests]
    for i, item in enumerate(long_tests):
        ordered.insert(i * len(ordered) // (2 * len(long_tests)), item)
    items[:] = ordered


def pytest_collection_finish():
    """Keep imported objects out of later garbage collections, each of which would take a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Keep out what a test has imported, too. Its garbage is collected before, because frozen objects stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def stand_in():
    """One GPU in main memory, see `bench/cuda_stand_in.py`."""
    from cuda_stand_in import StandIn

    with StandIn() as gpu:
        yield gpu


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu_kernels(request):
    """Kernels for tensors on a GPU: plain PyTorch on a stand-in, and Triton's on a GPU, if there is one."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    return "reference" if request.param == "stand-in" else "triton"


@pytest.fixture(scope="session")
def start():
    """Return `start(output, "train", ...)`, which runs `fastsd train ...` in a new process and appends its output to a file."""

    def start_process(output: Path, *words: str):
        process = processes().Process(target=command_line, args=(list(words), output))
        process.start()
        return process

    return start_process


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder, 21)
    return folder


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """Return a function that lists the files and folders below `tmp_path` that were flushed or renamed, in this order.

    A file is listed as "NAME, incomplete" if it was written to after it had been flushed for the last time.
    """
    calls, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def paths():
        return {path.stat().st_ino: path for path in [tmp_path, *tmp_path.rglob("*")]}

    def record_fsync(handle):
        fsync(handle)
        number = os.fstat(handle).st_ino
        path = paths().get(number)
        calls.append((number, path.read_bytes() if path and path.is_file() else None))

    def record_rename(source, target, function):
        function(source, target)
        calls.append((f"-> {Path(target).name}", None))

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", lambda source, target: record_rename(source, target, rename))
    monkeypatch.setattr(os, "replace", lambda source, target: record_rename(source, target, replace))

    def names():
        last_contents, final_paths, result = dict(calls), paths(), []
        for call, _ in calls:
            path, content = final_paths.get(call), last_contents[call]
            is_incomplete = path and content is not None and content != path.read_bytes()
            result.append(f"{path.name}, incomplete" if is_incomplete else path.name if path else call)
        calls.clear()
        return result

    return names
