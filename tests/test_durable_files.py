"""Files and folders are on the disk before their names are, and damaged or odd tensors are noticed."""

import ast
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from environment import ROOT
from PIL import Image
from safetensors.torch import load_file
from sentences import refused

from fastsd import storage
from fastsd.commands.sample import SampleOptions, sample
from fastsd.compare.pictures import write_gif
from fastsd.run.folder import Grid
from fastsd.sampling.grid import save_grid
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
    with new_file(tmp_path / "text") as path:
        path.write_text("a")
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


def test_leftovers_are_removed_and_a_folder_without_its_replacement_is_restored(tmp_path):
    for name in (".tmp-a", ".tmp-old-b", "c", ".tmp-old-c", ".tmp-removed-d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    storage.remove_leftovers(tmp_path)
    assert {path.name: (path / "file").read_text() for path in tmp_path.iterdir()} == {"b": ".tmp-old-b", "c": "c"}


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    rename = Path.rename

    def failing(path, target):
        if path.name == ".tmp-saved":
            raise OSError(errno.EIO, "the disk fails")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="the disk fails"), new_folder(tmp_path / "saved") as folder:
        write_text(folder / "file", "new")
    assert os.listdir(tmp_path) == ["saved"] and not os.listdir(tmp_path / "saved")


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
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with the mark that some editors put in front
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


# Calls that write over an existing file. Each stands in one of these functions, or writes to a path from `new_file`.
WRITERS = {
    "fastsd/storage.py": {"write_safetensors", "write_bytes", "copy_file"},  # what the others are made of
    "fastsd/data/building/store.py": {"create", "write_rows"},  # a temporary file; rows that are not marked as done
    "fastsd/data/building/lists.py": {"_write"},  # a temporary file
    "fastsd/bench/data.py": {"_write_images"},  # a temporary folder
    "fastsd/bench/options.py": {"bench_config"},  # a temporary folder
    "fastsd/demo/models.py": {"save_base", "save_vae", "write_tokenizer"},  # a new folder
    "fastsd/demo/world.py": {"write_dataset"},  # a temporary file
    "fastsd/commands/redraw.py": {"write"},  # to memory
    "fastsd/compare/page.py": {"data_uri"},  # to memory
    "fastsd/compare/charts.py": {"svg"},  # to memory
    "fastsd/compare/audit.py": {"write_table"},  # a temporary file
    "fastsd/data/building/results.py": {"merge"},  # a temporary file, flushed and then renamed
    "kernels/fastsd_kernels/atlas.py": {"main"},  # a temporary file
}


def test_nothing_is_written_in_place():
    """After a kill or on a full disk, a file that is rewritten in place is neither the old one nor the new one."""
    writers: dict[str, set[str]] = {}
    for path in [*(ROOT / "fastsd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(map(overwrites, ast.walk(function))):
                writers.setdefault(path.relative_to(ROOT).as_posix(), set()).add(function.name)
    assert writers == WRITERS


def overwrites(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name, arguments = ast.unparse(node.func).split(".")[-1], [ast.unparse(argument) for argument in node.args]
    if "temporary" in arguments or "str(temporary)" in arguments:  # from `new_file`
        return False
    if name == "open":
        mode = next((text for text in arguments if re.fullmatch(r"'[rwaxbt+]{1,3}'", text)), "'r'")
        return "w" in mode or ("r" in mode and "+" in mode)
    is_method = isinstance(node.func, ast.Attribute) and not ast.unparse(node.func).endswith(("saving.save", "checkpoint.save"))
    return is_method and name in ("write_text", "write_bytes", "save", "savefig", "save_pretrained", "export_chrome_trace")


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_a_picture_is_on_the_disk_before_its_name_is(ending, disk, tmp_path):
    grid = Grid(tmp_path / "source", "s", 1, {})
    image = Image.new("RGB", (8, 8))
    image.info["cells"] = []
    if ending == "png":
        save_grid(image, tmp_path / "a.png")
    else:
        write_gif(tmp_path / "a.gif", "label", [(grid, image)])
    assert disk() == [f"a.{ending}", f"-> a.{ending}", tmp_path.name]


def test_a_sample_that_cannot_be_written_leaves_the_earlier_ones(tmp_path, tiny_model, monkeypatch):
    def draw() -> None:
        options = SampleOptions(tmp_path, ["a"], "fp32", "cpu")
        sample(str(tiny_model), {}, {"steps": 1, "size": 16, "images": 2}, options)

    draw()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {"000-0.png", "001-1.png", "grid.png"}

    def half(image, target, *args, **kwargs):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="No space"):
        draw()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_folder_and_its_parents_are_flushed(disk, tmp_path):
    storage.make_folder(tmp_path / "a" / "b")
    assert disk() == [tmp_path.name, "a"] and (tmp_path / "a" / "b").is_dir()
    storage.make_folder(tmp_path / "a" / "b")
    assert disk() == []
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        storage.make_folder(tmp_path / "file")


def test_errors_of_a_disk_name_the_file(tmp_path):
    """The system does not name a file that is open already."""
    for writing in (
        lambda: new_file(tmp_path / "a"),
        lambda: new_folder(tmp_path / "a"),
        lambda: storage.named_errors(tmp_path / "a"),
    ):
        with pytest.raises(OSError, match=f"{tmp_path}/a"), writing():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="missing"), storage.named_errors(tmp_path / "a"):
        (tmp_path / "missing").read_text()
