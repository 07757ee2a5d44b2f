"""Pickled checkpoints of other tools are read, and nothing that any file names is executed."""

import argparse
import collections
import contextlib
import datetime
import io
import os
import pathlib
import pickle
import runpy
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from sentences import refused

from fastsd.errors import UserError
from fastsd.model.formats.pickles import unpickle

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2, dtype=torch.float16)}


def read(path):
    notes = []
    return unpickle(path, notes), "\n".join(notes)


def assert_weights(state):
    assert state.keys() == WEIGHTS.keys() and all(torch.equal(state[name], tensor) for name, tensor in WEIGHTS.items())


NESTED = {
    "plain": (WEIGHTS, []),
    "model": ({"model": WEIGHTS, "epoch": torch.tensor(3)}, ["epoch"]),
    "module": ({"module": WEIGHTS, "step": 3}, ["step"]),
    "empty": ({"state_dict": {}, "model": WEIGHTS}, ["state_dict"]),
    "nested": ({"state_dict": {"state_dict": WEIGHTS, "lr": 1}, "epoch": 1}, ["epoch", "lr"]),
    "nested model": ({"model": {"state_dict": WEIGHTS}}, []),
    "two": ({"ema": {"a.weight": torch.zeros(2)}, "state_dict": WEIGHTS}, ["ema"]),
    "a defaultdict": ({"state_dict": collections.defaultdict(list, WEIGHTS)}, []),
    "not only tensors": ({**WEIGHTS, "version": np.float32(1), "name": "x"}, ["version, name"]),
}


@pytest.mark.parametrize("value, ignored", NESTED.values(), ids=NESTED)
def test_weights_are_found_in_nested_entries(value, ignored, tmp_path):
    torch.save(value, tmp_path / "in.ckpt")
    state, notes = read(tmp_path / "in.ckpt")
    assert_weights(state)
    assert [line.rpartition(": ")[2] for line in notes.splitlines()] == ignored


@pytest.mark.parametrize("value", [{"state_dict": {}}, {"model": {"a": 1}}, {"other": WEIGHTS}, np.ones(3)])
def test_a_file_without_weights_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "in.ckpt")
    with refused("weights-no-tensors"):
        read(tmp_path / "in.ckpt")


def test_a_dict_in_itself_is_refused(tmp_path):
    endless = {}
    endless["model"] = endless["state_dict"] = endless
    torch.save(endless, tmp_path / "in.ckpt")
    with refused("weights-no-tensors"):
        read(tmp_path / "in.ckpt")


# Payloads: each would create the file `executed` in the current folder, if anything in it ran.
COMMAND, CODE = "touch executed", "import os; os.system('touch executed')"


class Reduced:
    """An object that unpickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self):
        return self.call


class Stateful:
    """A class whose instances run code when their state is set."""

    def __setstate__(self, state):
        os.system(COMMAND)

    def __getstate__(self):
        return {"a": 1}


class Made:
    """A class that runs code when an instance is made without `__init__`."""

    def __new__(cls, command=COMMAND):
        if "unpickling" in os.environ:
            os.system(command)
        return object.__new__(cls)


class Dictionary(dict):
    """A dict that runs code when an entry is set."""

    def __setitem__(self, name, value):
        os.system(COMMAND)


inner = pickle.dumps(Reduced(os.system, COMMAND))
numpy_scalar, numpy_array = np.float64(1).__reduce__()[0], np.arange(3).__reduce__()[0]
CALLS = {
    "system": Reduced(os.system, COMMAND),
    "eval": Reduced(eval, f"__import__('os').system({COMMAND!r})"),
    "exec": Reduced(exec, CODE),
    "runpy": Reduced(runpy.run_path, "code.py"),
    "process": Reduced(subprocess.check_call, COMMAND.split()),
    "nested pickle": Reduced(pickle.loads, inner),
    "state": Stateful(),
    "new": Made(),
    "dict": Dictionary(a=1),
    "scalar of objects": Reduced(numpy_scalar, np.dtype("O"), Reduced(os.system, COMMAND)),
    "array of objects": np.array([Reduced(os.system, COMMAND)], dtype=object),
    "array of another class": Reduced(numpy_array, Reduced(os.system, COMMAND), (0,), b"b"),
    "dtype": Reduced(np.dtype, Reduced(os.system, COMMAND)),
    "options": argparse.Namespace(a=Reduced(os.system, COMMAND)),
    "path": Reduced(pathlib.PurePosixPath, Reduced(os.system, COMMAND)),
    "a default factory": Reduced(collections.defaultdict, Reduced(os.system, COMMAND)),
    "a key": {"x": {Reduced(os.system, COMMAND): 1}},
    "an element": [{1, Reduced(os.system, COMMAND)}],
}  # fmt: skip
ARGUMENT = b"X\x0e\x00\x00\x00touch executed"
CALL = b"(" + ARGUMENT + b"tR"
OPCODES = {
    "global": b"cos\nsystem\n" + CALL,
    "a module of a harmless module": b"cargparse\n_os.system\n" + CALL,
    "another module of one": b"cpathlib\nos.system\n" + CALL,
    "getattr": b"cbuiltins\ngetattr\n(cpathlib\nos\nX\x06\x00\x00\x00systemtR" + CALL,
    "inst": b"(S'touch executed'\nios\nsystem\n",
    "obj": b"(cos\nsystem\n" + ARGUMENT + b"o",
    "stack global": b"\x8c\x02os\x8c\x06system\x93" + ARGUMENT + b"\x85R",
    "new object": b"cpathlib\nPurePosixPath\ncos\nsystem\n" + CALL + b"\x85\x81",
    "new object with keywords": f"c{__name__}\nMade\n".encode() + b")}X\x07\x00\x00\x00command" + ARGUMENT + b"s\x92",
    "a state": b"cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00acos\nsystem\n" + CALL + b"sb",
    "a replaced __setstate__": b"cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb" + ARGUMENT + b"b",
}


def as_zip(path, pickled):
    """Write a file of torch whose pickle is replaced."""
    torch.save({"x": torch.ones(1)}, path)
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in entries.items():
            file.writestr(name, pickled if name.endswith("/data.pkl") else data)


def as_tar(path, pickled):
    """Write a file as the first versions of torch did."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        for name, data in (("sys_info", pickle.dumps({}, 2)), ("storages", pickled), ("tensors", pickled), ("pickle", pickled)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def as_script(path, pickled):
    """Write a file that torch takes for TorchScript."""
    as_zip(path, pickled)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(f"{path.stem}/constants.pkl", pickled)


WRITERS = {"zip": as_zip, "one pickle": lambda path, pickled: path.write_bytes(pickled), "tar": as_tar, "script": as_script}


def assert_nothing_runs(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert error.value.code in ("pickle-runs-code", "weights-unreadable") and "\n" not in str(error.value)
    assert not pathlib.Path("executed").exists()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("unpickling", "1")
    pathlib.Path("code.py").write_text(CODE)
    return tmp_path


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", CALLS.values(), ids=CALLS)
def test_no_payload_in_a_value_runs(value, zipped, protocol, place):
    path = place / "in.ckpt"
    torch.save({"state_dict": {"x": value}}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert pathlib.Path("executed").exists()  # so the payload works
    os.remove("executed")
    assert_nothing_runs(path)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("code", OPCODES.values(), ids=OPCODES)
def test_no_payload_in_an_opcode_runs(code, write, place):
    with contextlib.suppress(Exception):
        pickle.loads(b"\x80\x04" + code + b".")
    assert pathlib.Path("executed").exists()
    os.remove("executed")
    for protocol in (b"\x80\x02", b"\x80\x04"):
        write(place / "in.ckpt", protocol + code + b".")
        assert_nothing_runs(place / "in.ckpt")


@pytest.mark.parametrize("factory", [os.system, eval, pickle.loads])
def test_no_harmful_function_is_kept(factory, place):
    torch.save({"state_dict": WEIGHTS, "x": collections.defaultdict(factory)}, place / "in.ckpt")
    assert_nothing_runs(place / "in.ckpt")


def test_no_code_of_harmless_libraries_runs(place, monkeypatch):
    """Not even the libraries of the list are called, although the file names them."""
    value = [np.float64(1), np.arange(2), pathlib.PurePosixPath("a"), argparse.Namespace(a=1), datetime.date(2020, 1, 1)]
    torch.save({"state_dict": WEIGHTS, "x": value}, place / "in.ckpt")
    loaded, load = [], torch.load

    def keep(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(torch, "load", keep)
    read(place / "in.ckpt")
    assert {type(item).__module__ for item in loaded[0]["x"]} == {"fastsd.model.formats.pickles"}
