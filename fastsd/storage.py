"""Write files and folders so that a crash leaves none half-written, and read safetensors files that may be damaged.

A file or folder is written under a temporary name, flushed to the disk and renamed. Then its parent is flushed. After a kill
or a power cut there is either the old version or the complete new one. Tensors are written to safetensors block by block,
which keeps memory use constant. Their sha256 is computed at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsd.errors import UserError
from fastsd.terminal.console import work

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # only read; see `Stored`
TEMPORARY = ".tmp-"
_OLD = ".tmp-old-"  # a folder that is being replaced
BLOCK = 1 << 24  # bytes of a tensor that are in memory while it is streamed
MAX_HEADER = 16 << 20  # bytes; the header of SD1.5 as a single file has 140 thousand


@dataclass(frozen=True)
class Stored:
    """A tensor in a file that has not been read yet. It is contiguous and starts at byte `offset`.

    Attributes:
        dtype: the dtype that is returned.
        encoded: the dtype in the file, if that is another one, such as fp8.
        scale: a factor of all values; None = 1.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    encoded: torch.dtype | None = None
    scale: float | None = None

    def numel(self) -> int:
        return self.shape.numel()

    def view(self, shape: torch.Size) -> Stored:
        """Return the same tensor with another shape."""
        assert shape.numel() == self.numel()
        return replace(self, shape=shape)

    def read(self) -> Tensor:
        """Read the whole tensor into new memory."""
        return self._read(0, self.numel()).view(self.shape)

    def blocks(self) -> Iterator[Tensor]:
        """Yield the tensor in flat blocks of at most `BLOCK` bytes, each in new memory."""
        length = BLOCK // self.dtype.itemsize
        yield from (self._read(start, min(start + length, self.numel())) for start in range(0, self.numel(), length))

    def _read(self, start: int, end: int) -> Tensor:
        itemsize = (self.encoded or self.dtype).itemsize
        size = (end - start) * itemsize
        if not size:
            return torch.empty(0, dtype=self.dtype)
        data = bytearray(size)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * itemsize)
            filled, buffer = 0, memoryview(data)
            while count := file.readinto(buffer[filled:]):
                filled += count
        if filled != size:
            raise UserError("file-became-shorter", f"{self.path}: became shorter while it was read; copy the file again")
        numbers = torch.frombuffer(data, dtype=self.encoded or self.dtype)
        if self.encoded is None:
            return numbers
        return numbers.to(self.dtype) if self.scale is None else numbers.to(self.dtype) * self.scale


Tensors = Mapping[str, Tensor | Stored]


def as_tensor(tensor: Tensor | Stored) -> Tensor:
    """Return the tensor in memory, reading it if it is `Stored`."""
    return tensor.read() if isinstance(tensor, Stored) else tensor


def _blocks(tensor: Tensor | Stored) -> Iterator[Tensor]:
    """Yield a tensor of any layout in flat blocks on the CPU."""
    if isinstance(tensor, Stored):
        yield from tensor.blocks()
    elif tensor.is_cpu and tensor.is_contiguous():
        yield from tensor.detach().flatten().split(BLOCK // tensor.dtype.itemsize)
    else:
        yield tensor.detach().cpu().contiguous().flatten()


def safetensors_header(
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, align: int = 8
) -> bytes:
    """Return the first bytes of a safetensors file with these tensors in this order: the header's length and the JSON header.

    The header is padded with spaces until the data starts at a multiple of `align` bytes.
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


def write_safetensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None, finite: str = ""
) -> str:
    """Write tensors of any layout and device block by block, flush to the disk and return the file's sha256.

    Args:
        dtype: the dtype that floating-point tensors are cast to; None = unchanged.
        finite: the model's name in the error message if a number is not finite; "" = not checked.

    Raises:
        UserError: `finite` is set and a number is not finite, or overflows in `dtype`.
    """
    digest = hashlib.sha256()
    dtypes = {name: dtype if dtype and t.dtype.is_floating_point else t.dtype for name, t in tensors.items()}
    size = sum(tensor.numel() * dtypes[name].itemsize for name, tensor in tensors.items())
    shown_path = "/".join(name.removeprefix(TEMPORARY) for name in path.parts[-2:])
    with named_errors(path), open(path, "wb") as file, work(f"writing {shown_path}", size, "bytes") as writing:

        def write(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)
            writing.add(len(data))

        write(safetensors_header({name: (dtypes[name], tuple(t.shape)) for name, t in tensors.items()}, metadata))
        for name, tensor in tensors.items():
            for block in _blocks(tensor):
                cast = block.to(dtypes[name])
                if finite:
                    check_finite(name, block, finite)
                if finite and cast is not block:
                    check_finite(name, cast, finite, f" in {dtypes[name]}; choose another dtype")
                write(cast.view(torch.uint8).numpy().data)
        _flush(file)
    return digest.hexdigest()


def check_finite(name: str, tensor: Tensor, place: str, advice: str = "; download or train the model again") -> None:
    """Raise UserError if a number is NaN or infinite."""
    # A sum needs one pass and no temporary. It can overflow although all numbers are finite, so then the elements are checked.
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
        count = int((~tensor.isfinite()).sum())
        if count:
            raise UserError("not-finite", f"{place}: {count} of {tensor.numel()} values in {name} are not finite{advice}")


def write_text(path: Path, text: str) -> str:
    """Write a small text file, flush it to the disk and return its sha256."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> str:
    """Write a small file, flush it to the disk and return its sha256."""
    with named_errors(path), open(path, "wb") as file:
        file.write(data)
        _flush(file)
    return hashlib.sha256(data).hexdigest()


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads each tensor on access, so no tensor stays in memory.

    A returned tensor is a private view of the mapped file and keeps it mapped. Copy a tensor that must live longer.

    Raises:
        UserError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._header = _read_header(path)
            self._file = safe_open(path, framework="pt")
            self._names = dict.fromkeys(self._file.keys())
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise UserError(
                "safetensors-unreadable", f"{path}: cannot be read as safetensors ({error}); download or copy the file again"
            ) from None
        self._path = path

    @property
    def metadata(self) -> dict[str, str]:
        return self._header[1].get("__metadata__") or {}

    def stored(self) -> dict[str, Stored]:
        """Return all tensors, unread, in the order of the header, those in fp8 as bf16. Raise UserError for any other dtype."""
        data_start, entries = self._header
        tensors = {}
        for name, entry in entries.items():
            if name not in self._names:
                continue
            encoded = FP8.get(entry["dtype"])
            dtype = next((dtype for dtype, label in DTYPES.items() if label == entry["dtype"]), encoded and torch.bfloat16)
            if dtype is None:
                raise UserError(
                    "tensor-dtype", f"{self._path}: {name} has dtype {entry['dtype']}; give a model in fp8, fp16, bf16 or fp32"
                )
            offset = data_start + entry["data_offsets"][0]
            tensors[name] = Stored(self._path, offset, dtype, torch.Size(entry["shape"]), encoded)
        return tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the position of a safetensors file's first data byte, and its header. Raise ValueError if the header is bad."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        remaining = os.fstat(file.fileno()).st_size - 8
        if length > remaining:
            raise ValueError(f"the header length is {length} bytes, but only {max(remaining, 0)} follow")
        if length > MAX_HEADER:
            raise ValueError(f"the header has {length} bytes, more than the limit of {MAX_HEADER}")
        text = file.read(length)
    header = json.loads(text, object_pairs_hook=_dict_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return 8 + length, header


def _dict_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    header = dict(pairs)
    if len(header) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the header has {next(name for name in names if names.count(name) > 1)!r} twice")
    return header


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise UserError if the file is unreadable or contains something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark in front
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            "json-unreadable", f"{path}: cannot be read as JSON ({error}); download or copy the file again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            "json-no-table", f"{path}: contains a {type(data).__name__}, expected a JSON object; download the file again"
        )
    return data


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, work(f"verifying {path}", os.fstat(file.fileno()).st_size, "bytes") as verifying:
        while block := file.read(BLOCK):
            digest.update(block)
            verifying.add(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder. Rename it to `path` when the block ends, or delete it when the block raises an exception.

    The block must flush the files that it writes. An existing `path` is replaced.
    """
    temporary, old = path.with_name(TEMPORARY + path.name), path.with_name(_OLD + path.name)
    if old.exists() and not path.exists():  # a kill between the two renames below
        old.rename(path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with named_errors(path):
            yield temporary
        for folder, _, _ in os.walk(temporary):
            flush_folder(Path(folder))
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        flush_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        raise


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path. Flush the file there and rename it to `path` when the block ends, or delete it when it raises.

    An existing `path` is replaced.
    """
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with named_errors(path):
            yield temporary
            with open(temporary, "rb+") as file:
                _flush(file)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder if the disk allows it.

    It is renamed first, and deleted when that is durable, so a kill or a power cut leaves it whole or as a leftover that
    `remove_leftovers` deletes.
    """
    with contextlib.suppress(OSError):
        path = path.rename(path.with_name(TEMPORARY + "removed-" + path.name))
        flush_folder(path.parent)
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary folders that an interrupted `new_folder` or `remove_folder` left in `folder`.

    A folder that was about to be replaced when the interruption came is restored.
    """
    for old in folder.glob(_OLD + "*"):
        path = old.with_name(old.name.removeprefix(_OLD))
        if not path.exists():
            old.rename(path)
    for path in folder.glob(TEMPORARY + "*"):
        shutil.rmtree(path, ignore_errors=True)


def replace_file(path: Path, text: str) -> None:
    """Replace a small text file atomically."""
    with new_file(path) as temporary:
        write_text(temporary, text)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in each OSError of the block. The system names files that cannot be opened, but not those being written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents durably: a power cut must not lose one with all that was flushed into it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush_folder(path.parent)


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of a folder, and hold it. It leaves no file.

    On a system or a disk without such locks, there is none.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def flush_folder(path: Path) -> None:
    """Make renames inside a folder durable. Windows neither has nor needs such a call."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` as a hard link to `source`, or as a flushed copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and flush the copy. It takes no space of its own on file systems that can share blocks (btrfs, XFS)."""
    with open(source, "rb") as old, open(target, "wb") as new:
        with contextlib.suppress(OSError, AttributeError):  # no such call, or not between these file systems
            while os.copy_file_range(old.fileno(), new.fileno(), 1 << 30):
                pass
        shutil.copyfileobj(old, new, BLOCK)  # what is left
        _flush(new)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
