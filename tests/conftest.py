"""Fixtures that all tests share."""

import environment  # noqa: F401  # isort: skip  (first: it decides how kernels are defined)


import gc
from pathlib import Path

import pytest
from commandline import command_line, processes
from filelock import FileLock
from tiny import make_tiny_model, write_images


@pytest.fixture
def whole_machine(tmp_path_factory):
    """For a test that takes most of the memory: one at a time, whichever processes the tests run in."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "whole-machine.lock"):
        yield


def pytest_collection_modifyitems(items):
    """The longest tests begin early and far apart: several processes would else end with one of them waiting for the other."""
    long = [item for item in items if "whole_machine" in item.fixturenames]
    rest = [item for item in items if item not in long]
    for i, item in enumerate(long):
        rest.insert(i * len(rest) // (2 * len(long)), item)
    items[:] = rest


def pytest_collection_finish():
    """What has been imported stays: no collection of garbage looks through it again, which takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def start():
    """`start(said, "train", ...)`: `fastsd train ...` in a process of its own, what it says appended to the file `said`."""

    def begin(said: Path, *words: str):
        process = processes().Process(target=command_line, args=(list(words), said))
        process.start()
        return process

    return begin


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
