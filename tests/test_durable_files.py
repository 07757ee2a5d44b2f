"""Files and folders are on the disk before their names are, and damaged or odd tensors are noticed."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentences import refused

from fastsd import storage
from fastsd.storage import TensorFile, new_file, new_folder, write_safetensors, write_text


def test_new_folder_is_flushed_before_and_after_its_renaming(disk, tmp_path):
    with new_folder(tmp_path / "saved") as folder:
        (folder / "inner").mkdir()
        write_text(folder / "inner" / "text", "a")
    assert disk() == ["text", "saved", "inner", "-> saved", tmp_path.name]
    assert (tmp_path / "saved" / "inner" / "text").read_text() == "a"


def test_new_folder_replaces_an_old_one_only_when_it_is_complete(disk, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "old").touch()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "saved") as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "old"]
    (tmp_path / ".tmp-saved").mkdir()  # from a process that was killed
    (tmp_path / ".tmp-saved" / "killed").touch()
    with new_folder(tmp_path / "saved") as folder:
        (folder / "new").touch()
        assert (tmp_path / "saved" / "old").exists()
    assert disk() == ["saved", "-> .tmp-old-saved", "-> saved", tmp_path.name]
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "new"]


def test_new_file_is_flushed_before_and_after_its_renaming(disk, tmp_path):
    storage.replace_file(tmp_path / "text", "a")
    assert disk() == ["text", "-> text", tmp_path.name]
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "text") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "text"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["text"] and (tmp_path / "text").read_text() == "a"


def test_written_files_are_flushed_and_hashed(disk, tmp_path):
    digests = {
        "text": write_text(tmp_path / "text", "ä"),
        "bytes": storage.write_bytes(tmp_path / "bytes", b"a"),
        "tensors": write_safetensors(tmp_path / "tensors", {"a": torch.ones(3)}),
    }
    assert disk() == ["text", "bytes", "tensors"]
    for name, digest in digests.items():
        assert digest == storage.sha256_of(tmp_path / name) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_link_or_copy(disk, tmp_path, monkeypatch):
    (tmp_path / "source").write_text("a")
    storage.link_or_copy(tmp_path / "source", tmp_path / "linked")
    assert (tmp_path / "linked").samefile(tmp_path / "source")

    def no_links(source, target):
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    storage.link_or_copy(tmp_path / "source", tmp_path / "copied")
    assert not (tmp_path / "copied").samefile(tmp_path / "source") and (tmp_path / "copied").read_text() == "a"
    assert disk() == ["copied"]


def test_leftovers_are_removed(tmp_path):
    for name in (".tmp-a", ".tmp-old-b", "c"):
        (tmp_path / name).mkdir()
    storage.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("block", [8, 24, 1 << 24])  # 8 bytes hold one number of fp64
def test_tensors_of_any_layout_survive_in_blocks(block, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BLOCK", block)
    tensors = {
        "matrix": torch.arange(15.0).view(3, 5),
        "transposed": torch.arange(15.0, dtype=torch.float64).view(3, 5).T,
        "ids": torch.arange(7),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.uint8),
    }
    write_safetensors(tmp_path / "a", tensors, {"key": "value"})
    file = TensorFile(tmp_path / "a")
    assert file.metadata == {"format": "pt", "key": "value"} and list(file.stored()) == list(tensors) and len(file) == 5
    # Tensors can be copied from one file to another without being read as a whole.
    write_safetensors(tmp_path / "b", file.stored(), {"key": "value"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for name, stored in file.stored().items():
        assert torch.equal(stored.read(), tensors[name]) and stored.read().dtype == tensors[name].dtype
        assert torch.equal(file[name], tensors[name])
        assert stored.shape == tensors[name].shape and stored.dtype == file[name].dtype == tensors[name].dtype
        assert all(0 < part.numel() * part.itemsize <= max(block, part.itemsize) for part in stored.blocks())
        if tensors[name].numel():
            assert torch.equal(torch.cat(list(stored.blocks())), tensors[name].flatten())
    assert file.stored()["matrix"].view(torch.Size([15])).read().tolist() == list(range(15))
    assert "missing" not in file
    with pytest.raises(KeyError):
        file["missing"]


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    write_safetensors(tmp_path / "a", {"a": torch.ones(8)})
    stored = TensorFile(tmp_path / "a").stored()["a"]
    os.truncate(tmp_path / "a", (tmp_path / "a").stat().st_size - 1)
    with refused("file-became-shorter"):
        stored.read()


def test_only_floating_point_tensors_are_cast(tmp_path):
    write_safetensors(tmp_path / "a", {"a": torch.tensor([1.5]), "b": torch.tensor([3])}, dtype=torch.float16)
    assert {name: tensor.dtype for name, tensor in load_file(tmp_path / "a").items()} == {
        "a": torch.float16, "b": torch.int64,
    }  # fmt: skip


def test_numbers_that_are_not_finite(tmp_path):
    tensors = {"a": torch.tensor([1.0, torch.nan, torch.inf])}
    write_safetensors(tmp_path / "a", tensors)
    with refused("not-finite", place="model", count=2, total=3, name="a", advice="; download or train the model again"):
        write_safetensors(tmp_path / "a", tensors, finite="model")
    with refused("not-finite", advice=" in torch.float16; choose another dtype"):
        write_safetensors(tmp_path / "a", {"a": torch.tensor([1e5])}, dtype=torch.float16, finite="model")
    write_safetensors(tmp_path / "a", {"a": torch.tensor([1e5])}, dtype=torch.float16)  # not checked
    assert load_file(tmp_path / "a")["a"].isinf()
    # The sum overflows, but no number does.
    write_safetensors(tmp_path / "a", {"a": torch.tensor([3e38, 3e38]), "b": torch.tensor([3])}, finite="model")


@pytest.mark.parametrize("align", [8, 4096])
def test_header_is_padded(align):
    for length in range(20):
        header = storage.safetensors_header({"a" * length: (torch.float32, (2, 3)), "b": (torch.int8, ())}, align=align)
        assert len(header) % align == 0 and len(header) < 8 + 200 + align
        assert int.from_bytes(header[:8], "little") == len(header) - 8
        entries = json.loads(header[8:])
        assert [entry["data_offsets"] for entry in list(entries.values())[1:]] == [[0, 24], [24, 25]]


def bad_header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


BAD_FILES = {
    "the header length is 3 bytes, but only 2 follow": bad_header(b"{}", 3),
    "the header length is 9 bytes, but only 0 follow": (9).to_bytes(4, "little"),
    "more than the limit of 12": bad_header(b"{}" + b" " * 11),
    "the header is not a JSON object": bad_header(b"[]"),
    "the header has 'a' twice": bad_header(b'{"a":1,"a":1}'),
}


@pytest.mark.parametrize("problem", BAD_FILES)
def test_damaged_headers_are_refused(problem, tmp_path, monkeypatch):
    if "limit" in problem:
        monkeypatch.setattr(storage, "MAX_HEADER", 12)
    (tmp_path / "a").write_bytes(BAD_FILES[problem])
    with refused("safetensors-unreadable") as error:
        TensorFile(tmp_path / "a")
    assert problem in str(error.value)


def test_a_header_of_the_largest_size_is_read(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "a", {"a": torch.ones(1)})
    length = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    monkeypatch.setattr(storage, "MAX_HEADER", length)
    assert TensorFile(tmp_path / "a")["a"] == 1
    monkeypatch.setattr(storage, "MAX_HEADER", length - 1)
    with refused("safetensors-unreadable"):
        TensorFile(tmp_path / "a")


def test_json_files(tmp_path):
    write_text(tmp_path / "a", '{"a": 1}')
    assert storage.read_json(tmp_path / "a") == {"a": 1}
    for text, code in (("[1]", "json-no-table"), ("{", "json-unreadable")):
        write_text(tmp_path / "a", text)
        with refused(code):
            storage.read_json(tmp_path / "a")
    with refused("json-unreadable"):
        storage.read_json(tmp_path / "missing")


@pytest.mark.parametrize("renames", [1, 2])
def test_a_folder_whose_replacement_was_killed_is_replaced_later(renames, tmp_path, monkeypatch):
    """The old folder has been renamed, and the new one perhaps too. The old one was not deleted."""

    def write(text):
        with new_folder(tmp_path / "saved") as folder:
            write_text(folder / "file", text)

    write("old")
    rename, done = Path.rename, []

    def dying(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    with monkeypatch.context() as killed:
        killed.setattr(Path, "rename", dying)
        killed.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt) if done else None)
        with pytest.raises(KeyboardInterrupt):
            write("new")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "saved"):
        assert (tmp_path / "saved" / "file").read_text() == ("old" if renames == 1 else "new")
        raise ZeroDivisionError
    write("newest")
    assert (tmp_path / "saved" / "file").read_text() == "newest" and os.listdir(tmp_path) == ["saved"]
