"""Leaf: writing so that a crash loses nothing.

A file or folder is written under a temporary name, flushed to the disk, renamed, and its parent flushed: after a kill or
a power cut there is either the old one or the whole new one.  Tensors go to safetensors one at a time, so memory stays
flat, and their sha256 is taken on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsd.errors import UserError

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TEMPORARY = ".tmp-"


def safetensors_header(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, align: int = 8
) -> bytes:
    """The length and JSON header of a safetensors file with these tensors, in this order.

    Padded with spaces so that the data begins at a multiple of `align` bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-(len(text) + 8) % align)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors, in any layout and on any device, one at a time; flush to the disk; return the file's sha256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(safetensors_header({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, metadata))
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            put(flat.numpy().data)
        _flush(file)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a small text file, flush it to the disk, return its sha256."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> str:
    """Write a small file, flush it to the disk, return its sha256."""
    with open(path, "wb") as file:
        file.write(data)
        _flush(file)
    return hashlib.sha256(data).hexdigest()


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for, so that none stay in memory.

    A tensor it gives is a private view of the mapped file, and keeps it mapped: copy what is to live on.

    Args:
        prefix: only names that begin with it; names stay unchanged.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        try:
            self._file = safe_open(path, framework="pt")
            self._names = dict.fromkeys(name for name in self._file.keys() if name.startswith(prefix))  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error}); fetch or copy the file again") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_safetensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a file whose names begin with `prefix`, in memory. Raises UserError for a broken file."""
    return dict(TensorFile(path, prefix))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends, and vanishes when it raises.

    Files written in the block must have been flushed by their writers. An existing `path` is replaced.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, _ in os.walk(temporary):
            flush_folder(Path(folder))
        old = path.with_name(TEMPORARY + "old-" + path.name)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        flush_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted `new_folder` left in `folder`."""
    for path in folder.glob(TEMPORARY + "*"):
        shutil.rmtree(path, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Replace a small text file in one move."""
    temporary = path.with_name(TEMPORARY + path.name)
    write_text(temporary, text)
    os.replace(temporary, path)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Make renames inside a folder durable. Windows has no such call and needs none."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name: a hard link, or a flushed copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb+") as file:
            _flush(file)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
