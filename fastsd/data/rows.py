"""Rows on the disk: the shards that contain them and the frozen indexes that locate them.

    shard    has one tensor of at most 4096 rows.  Spaces after its header make the data start at a multiple of 4096.
    index    has, for every entry, shard and row (int32) and check (int64, the xxh3 of the row's bytes), and other tensors that
             depend on the kind of index.  A reader ignores unknown tensors.

Both are ordinary safetensors files.  The key `fastsd` of their metadata names the format.  `store.py` writes the shards.
Read next: `cache.py`, `text_embeddings.py`.

Shapes: B entries of an index.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from fastsd.errors import UserError
from fastsd.storage import DTYPES as CODES
from fastsd.storage import flush_folder, write_safetensors

LATENTS, STATES = "latents-1", "states-1"
TENSOR = {LATENTS: "mean", STATES: "states"}  # name of the only tensor of a shard, by format
OUTDATED = "is outdated (images or captions have changed)"
_OPEN_SHARDS = 256  # well below the 1024 files that a process may have open
_MAPPED = 32 << 20  # bytes: a tensor up to this size is read through the mapping, which may load all of it into memory
_HASH_CHUNK = 16 << 20  # bytes of a file in memory while it is hashed
_READERS = 8  # more threads do not make cold reads faster
# With fewer rows, another thread costs more time than it saves. If the disk can prefetch rows, threads matter less.
_ROWS_PER_READER = 32 if hasattr(os, "posix_fadvise") else 4


def read_header(path: Path, file_format: str) -> tuple[dict[str, Any], dict[str, str], int]:
    """Read the header of a fastsd file. Return its tensors, its metadata and the offset of its data.

    Raises:
        UserError: the file is missing, truncated or not of `file_format`.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length)) if length <= 1 << 30 else {}
        metadata = entries.pop("__metadata__")
        end = max(entry["data_offsets"][1] for entry in entries.values())
        if metadata["fastsd"] != file_format:
            raise ValueError(f"its format is {metadata['fastsd']}")
        if path.stat().st_size != 8 + length + end:
            raise ValueError("truncated")
    except FileNotFoundError:
        raise damage_error(path, "is missing") from None
    except OSError as error:
        raise damage_error(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise damage_error(path, f"is not a valid {file_format} file ({error})") from None
    return entries, metadata, 8 + length


def damage_error(path: Path, problem: str) -> UserError:
    return UserError("frozen-file-damaged", f"{path} {problem}; run `fastsd cache CONFIG` again to rebuild it")


def row_check(data: Any) -> int:
    """Return the checksum that detects a damaged row: the xxh3 of its bytes, as a signed 64-bit number."""
    return int.from_bytes(xxhash.xxh3_64_digest(data), "big", signed=True)


class Frozen:
    """A memory-mapped frozen file, with its flat tensors `arrays` and its `metadata`.

    Args:
        file_format: format that the file must have.
        kinds: dtypes of the required tensors, by name.
        optional: dtypes of the optional tensors, by name.

    Raises:
        UserError: the file is missing or damaged.
    """

    def __init__(
        self, path: Path, file_format: str, kinds: Mapping[str, type[np.generic]], optional: Mapping[str, type[np.generic]] = {}
    ):
        tensors, self.metadata, data_start = read_header(path, file_format)
        self._path = path
        self._file = path.open("rb", buffering=0)  # closed with the last reference
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = np.frombuffer(self._map, np.uint8)
        self.arrays: dict[str, np.ndarray] = {}
        self._starts: dict[str, int] = {}
        try:
            for name, dtype in [*kinds.items(), *(item for item in optional.items() if item[0] in tensors)]:
                start, end = (data_start + offset for offset in tensors[name]["data_offsets"])
                self.arrays[name] = np.asarray(mapped[start:end]).view(dtype)
                self._starts[name] = start
        except (ValueError, LookupError, TypeError) as error:
            raise damage_error(path, f"is not a valid {file_format} file ({error})") from None

    def take(self, name: str, index_B: np.ndarray) -> np.ndarray:
        """Return entries of a tensor.

        Entries of a large tensor are read with `pread`. If they were read through the mapping, each access would load up to a
        megabyte around the entry and keep it, until the whole file is in memory.
        """
        if not self._is_large(name):
            return self.arrays[name][index_B]
        first, last = int(index_B[0]), int(index_B[-1]) + 1
        if np.array_equal(index_B, np.arange(first, last)):
            return self.cut(name, first, last)
        array = self.arrays[name]
        file, size, start = self._file.fileno(), array.itemsize, self._starts[name]
        return self._entries([os.pread(file, size, start + i * size) for i in index_B.tolist()], len(index_B), array.dtype)

    def cut(self, name: str, first: int, last: int) -> np.ndarray:
        """Return entries [first, last) of a tensor, read as in `take`."""
        array = self.arrays[name]
        if not self._is_large(name):
            return array[first:last]
        size = array.itemsize
        data = os.pread(self._file.fileno(), (last - first) * size, self._starts[name] + first * size)
        return self._entries([data], last - first, array.dtype)

    def _is_large(self, name: str) -> bool:
        return self.arrays[name].nbytes > _MAPPED and hasattr(os, "pread")

    def _entries(self, chunks: list[bytes], count: int, dtype: np.dtype[np.generic]) -> np.ndarray:
        data = b"".join(chunks)
        if len(data) != count * dtype.itemsize:
            raise damage_error(self._path, "is truncated")
        return np.frombuffer(data, dtype)


class Sealed(Frozen):
    """A frozen file whose metadata has the sha256 of its contents. Raises UserError if it is missing or damaged.

    A subclass defines a kind of file by its `FORMAT`, its `TENSORS` and the `HASHED_KEYS` of the metadata that the sha256 also
    covers.  Other files refer to the file by this sha256.  Tensors in `OPTIONAL` have separate hashes, so that other files stay
    valid when these tensors change.
    """

    FORMAT: ClassVar[str]
    TENSORS: ClassVar[dict[str, type[np.generic]]]
    OPTIONAL: ClassVar[dict[str, type[np.generic]]] = {}
    HASHED_KEYS: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path):
        super().__init__(path, self.FORMAT, self.TENSORS, self.OPTIONAL)
        try:
            self._parse()
            if not self.is_sound():  # captions, unlike rows, have no other checksum
                raise ValueError("does not match its sha256")
        except (ValueError, LookupError, TypeError) as error:
            raise damage_error(path, f"is not a valid {self.FORMAT} file ({error})") from None

    def _parse(self) -> None:
        """Parse the contents that only a subclass has. Raises ValueError, LookupError or TypeError if they are invalid."""

    def _release_pages(self) -> None:
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's page cache

    def is_sound(self) -> bool:
        """Return True if all bytes match their hashes. This reads the whole file."""
        keys = "sha256", *(f"sha256_{name}" for name in self.OPTIONAL)
        expected = {key: sha for key in keys if (sha := self.metadata.get(key))}
        return self.hashes(self.arrays, self.metadata, self._release_pages) == expected

    @classmethod
    def hashes(
        cls, arrays: dict[str, np.ndarray], metadata: dict[str, str], between: Callable[[], None] = lambda: None
    ) -> dict[str, str]:
        """Hash the contents of a file, and each `OPTIONAL` tensor that it has. Calls `between` every few megabytes."""
        hashed_metadata = json.dumps([metadata[key] for key in cls.HASHED_KEYS])
        contents = {"sha256": (hashed_metadata, list(cls.TENSORS))}
        contents |= {f"sha256_{name}": ("", [name]) for name in cls.OPTIONAL if name in arrays}
        digests = {}
        for key, (text, names) in contents.items():
            sha = hashlib.sha256(text.encode())
            for name in names:
                data = arrays[name].view(np.uint8)
                for start in range(0, len(data), _HASH_CHUNK):
                    sha.update(data[start : start + _HASH_CHUNK].data)
                    between()
            digests[key] = sha.hexdigest()
        return digests

    @classmethod
    def write(cls, path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str], **unhashed: str) -> None:
        """Write a file atomically. Its sha256 covers `metadata` but not `unhashed`, which is further metadata."""
        metadata = {"fastsd": cls.FORMAT, **unhashed, **cls.hashes(arrays, metadata), **metadata}
        temporary = path.with_name(f".{path.name}")
        names = [*cls.TENSORS, *(name for name in cls.OPTIONAL if name in arrays)]
        write_safetensors(temporary, {name: torch.from_numpy(np.require(arrays[name], None, "W")) for name in names}, metadata)
        os.replace(temporary, path)
        flush_folder(path.parent)


class Index(Sealed):
    """A frozen index. `shards[i]` is the name and the row shape of the shard with number i."""

    def _parse(self) -> None:
        self.shards: list[tuple[str, list[int]]] = [(name, shape) for name, shape in json.loads(self.metadata["shards"])]


class Rows:
    """Random access to rows of shards by their entry in an index. Thread-safe.

    Args:
        folder: folder of the cache.
        index: locates the rows.
        dtype: dtype of the rows.
        owner: metadata that every shard must have: its format under the key `fastsd`, and the origin of its rows.
    """

    def __init__(self, folder: Path, index: Index, dtype: torch.dtype, owner: dict[str, str]):
        self._folder, self._index, self._dtype, self._owner = folder / "shards", index, dtype, owner
        self._starts: dict[int, int] = {}
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._threads: tuple[int, ThreadPoolExecutor] | None = None  # process, its threads

    def close(self) -> None:
        """Close the files. This is optional, because they are also closed when the interpreter ends."""
        self._readers().shutdown()
        self._open.clear()

    def _readers(self) -> ThreadPoolExecutor:
        """Return this process's threads. A forked process, such as a DataLoader's worker, inherits none and starts its own."""
        if self._threads is None or self._threads[0] != os.getpid():
            self._threads = os.getpid(), ThreadPoolExecutor(_READERS, thread_name_prefix="fastsd-read")
        return self._threads[1]

    def _read(self, index_B: np.ndarray) -> Tensor:
        """Read rows of one shape to the CPU, (B, ...), pinned for a GPU. Raises UserError if a row is damaged."""
        shard_B, row_B, check_B = (self._index.take(name, index_B) for name in ("shard", "row", "check"))
        shapes = {tuple(self._index.shards[shard][1]) for shard in np.unique(shard_B)}
        assert len(shapes) == 1, f"a batch needs samples of one shape, not {sorted(shapes)}"
        output = torch.empty((len(index_B), *shapes.pop()), dtype=self._dtype, pin_memory=can_pin())
        flat = output.view(torch.uint8).view(-1).numpy().data
        size = len(flat) // len(index_B)

        requests = [
            (self._shard(shard), row, flat[slot * size : (slot + 1) * size])
            for slot, (shard, row) in enumerate(zip(shard_B.tolist(), row_B.tolist(), strict=True))
        ]

        # First copy the rows that are in the page cache. Then request all others from the disk and read them in threads.
        uncached = [request for request in requests if not request[0].read_cached(request[1], request[2])]
        uncached.sort(key=lambda request: (request[0].path, request[1]))  # some disks are faster in the order of the file
        for shard, row, into in uncached:
            shard.expect(row, len(into))
        readers = min(_READERS, -(-len(uncached) // _ROWS_PER_READER))
        for _ in self._readers().map(_read_all, [uncached[i::readers] for i in range(readers)]):
            pass

        for (shard, row, into), check in zip(requests, check_B.tolist(), strict=True):
            if row_check(into) != check:
                raise UserError(
                    "row-damaged",
                    f"{shard.path}: row {row} is damaged; run `fastsd cache CONFIG --verify`, then `fastsd cache CONFIG`",
                )
        return output

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            if number not in self._open:
                name, shape = self._index.shards[number]
                path = self._folder / f"{name}.safetensors"
                if number not in self._starts:  # the header is checked only once
                    self._starts[number] = self._start(path, shape)
                self._open[number] = _Shard(path, self._starts[number])
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]

    def _start(self, path: Path, shape: list[int]) -> int:
        """Return the offset of a shard's data. Raises UserError if the shard does not match the index."""
        file_format = self._owner["fastsd"]
        tensors, metadata, start = read_header(path, file_format)
        tensor = tensors.get(TENSOR[file_format], {})
        if metadata | self._owner != metadata or tensor.get("shape", [])[1:] != shape:
            raise damage_error(path, "has another VAE, text encoder or shape than its index")
        if tensor["dtype"] != CODES[self._dtype]:
            raise damage_error(path, f"has dtype {tensor['dtype']}, its index expects {CODES[self._dtype]}")
        return start


def can_pin() -> bool:
    """Return True if this process computes on a GPU. DataLoader's workers and runs on the CPU must leave it alone."""
    return torch.cuda.is_initialized()


class _Shard:
    """An open shard. The file is closed with the last reference, so threads can still read from an evicted shard."""

    def __init__(self, path: Path, start: int):
        self.path, self._start = path, start
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise damage_error(path, f"cannot be read ({error.strerror})") from None
        self._lock = threading.Lock()

    def read_cached(self, row: int, into: memoryview) -> bool:
        """Copy a row if it is in the page cache. Return False if it is not, or if the system is not Linux."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self._file.fileno(), [into], self._start + row * len(into), os.RWF_NOWAIT) == len(into)
        except OSError:  # the read would block, or the file system does not support RWF_NOWAIT
            return False

    def expect(self, row: int, size: int) -> None:
        """Ask the disk to fetch a row. Do not wait for it."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # only a hint: `read` reports what is wrong
                os.posix_fadvise(self._file.fileno(), self._start + row * size, size, os.POSIX_FADV_WILLNEED)

    def read(self, row: int, into: memoryview) -> None:
        position = self._start + row * len(into)
        try:
            if hasattr(os, "preadv"):
                count = os.preadv(self._file.fileno(), [into], position)
            else:  # Windows: the file has one position, so only one thread may read at a time
                with self._lock:
                    self._file.seek(position)
                    count = self._file.readinto(into)
        except OSError as error:
            raise UserError(
                "row-unreadable",
                f"{self.path}: row {row} cannot be read ({error.strerror}); check the disk and its connection, and run again",
            ) from None
        if count != len(into):
            raise damage_error(self.path, "is truncated")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _read_all(rows: Sequence[tuple[_Shard, int, memoryview]]) -> None:
    for shard, row, into in rows:
        shard.read(row, into)
