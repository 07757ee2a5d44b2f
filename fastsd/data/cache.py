"""The latent cache on disk: its format, and `LatentCache`, which reads it.

    DIR/cache.sqlite              the truth while caching (see `build.py`); training never opens it
    DIR/shards/S.safetensors      one tensor "mean" (n <= 4096, C, h, w): the raw posterior mean, unscaled
    DIR/views/V.safetensors       frozen: the shard, row and caption of every sample; training maps this file

Both kinds of file are ordinary safetensors; a shard's header is padded with spaces until the data starts at a multiple
of 4096.  One view belongs to one (folders, preprocessing, VAE, dtype); its name follows from the config, so training
finds it without looking at a single image.  Its tensors are shard, row (int32, n), caption_offsets (int64, n + 1) and
captions (UTF-8 bytes); a reader ignores tensors it does not know.  Sample i has the caption
captions[caption_offsets[i] : caption_offsets[i + 1]].

Alone, it takes three lines:

    from fastsd.data.cache import LatentCache
    cache = LatentCache.open("cache")
    latents = cache.get([0, 1, 2])["latents"]          # times cache.meta.scaling_factor, and a model can train on them

Shapes: B samples, C x h x w latents.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsd.config import Config
from fastsd.errors import UserError
from fastsd.storage import DTYPES as CODES
from fastsd.storage import flush_folder, write_safetensors

# The key `fastsd` of a file's metadata says what it is.
SHARD_FORMAT, VIEW_FORMAT = "latents-1", "view-1"
SHARD_ROWS = 4096
ALIGN = 4096
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_VIEW_TENSORS = {"caption_offsets": np.int64, "shard": np.int32, "row": np.int32, "captions": np.uint8}
_OPEN_SHARDS = 256  # well below the 1024 files a process may have open
_READERS = 8  # more threads do not make cold reads faster
_PER_READER = 4  # rows below which another thread costs more than it brings


@dataclass(frozen=True)
class CacheMeta:
    """What a view says about itself. Counts: `images` files found = `cached` samples + `rejected`; `empty_captions` of
    the samples; `latents` distinct ones behind them."""

    vae_hash: str
    vae_name: str
    scaling_factor: float
    shift_factor: float
    channels: int
    downscale: int
    resolution: int
    dtype: str
    preprocessing: dict[str, Any]
    folders: list[str]
    images: int
    cached: int
    rejected: int
    empty_captions: int
    latents: int


def preprocessing(config: Config) -> dict[str, Any]:
    """All that decides the stored bytes besides the image and the VAE. A change in the code counts up `version`."""
    return {
        "version": 1,
        "resolution": config.data.resolution,
        "resize": "shorter side, lanczos",
        "crop": "centre",
        "precision": config.cache.precision,
        "dtype": config.cache.dtype,
    }


def digest(*parts: Any) -> str:
    """sha256 of JSON, 64 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def space_name(config: Config, vae_hash: str) -> str:
    """Name of the latents that one VAE and one preprocessing give; latents of two spaces never share a shard."""
    return digest(vae_hash, preprocessing(config))[:16]


def view_name(config: Config, vae_hash: str) -> str:
    """Name of the view that caching `config` with this VAE freezes."""
    folders = [os.fsencode(os.path.abspath(folder)).hex() for folder in config.data.folders]
    return digest(vae_hash, preprocessing(config), folders)[:16]


def read_header(path: Path, wanted: str) -> tuple[dict[str, Any], dict[str, str], int]:
    """-> (tensors, metadata, where the data starts) of one of our files.

    Raises:
        UserError: not a whole file of the `wanted` format.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length)) if length <= 1 << 30 else {}
        metadata = entries.pop("__metadata__")
        end = max(entry["data_offsets"][1] for entry in entries.values())
        if metadata["fastsd"] != wanted:
            raise ValueError(f"it is {metadata['fastsd']}")
        if path.stat().st_size != 8 + length + end:
            raise ValueError("cut short")
    except FileNotFoundError:
        raise damaged(path, "is missing") from None
    except OSError as error:
        raise damaged(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path, f"is no whole {wanted} file ({error})") from None
    return entries, metadata, 8 + length


def damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} {what}; run `fastsd cache CONFIG` again, it makes what is missing")


def freeze(folder: Path, name: str, arrays: dict[str, np.ndarray], shards: list[Any], meta: CacheMeta) -> None:
    """Write a view atomically, as the newest one. `shards`: [name, [C, h, w]] by the index used in `shard`."""
    path = folder / "views" / f"{name}.safetensors"
    content = {"shards": json.dumps(shards), "meta": json.dumps(asdict(meta), sort_keys=True)}
    sha = content_hash(arrays, content)
    serials = {}
    for other in view_paths(folder):
        try:
            serials[other] = _serial(other)
        except UserError:
            continue  # a damaged one is no rival
    newest = max(serials.values(), default=0)
    if serials.get(path) == newest and View(path).metadata["sha256"] == sha:
        return
    metadata = {"fastsd": VIEW_FORMAT, "serial": str(newest + 1), "sha256": sha, **content}
    temporary = path.with_name(f".{path.name}")
    write_safetensors(temporary, {key: torch.from_numpy(arrays[key]) for key in _VIEW_TENSORS}, metadata)
    os.replace(temporary, path)
    flush_folder(path.parent)


def content_hash(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """sha256 over all that a view says; its serial number is not part of it."""
    sha = hashlib.sha256(json.dumps([metadata["shards"], metadata["meta"]]).encode())
    for name in _VIEW_TENSORS:
        sha.update(arrays[name].data)
    return sha.hexdigest()


class View:
    """A frozen view, mapped: `shard`, `row`, `caption_offsets`, `captions` as `arrays`; `shards`, `meta`."""

    def __init__(self, path: Path):
        tensors, self.metadata, start = read_header(path, VIEW_FORMAT)
        mapped = np.memmap(path, np.uint8, "r")
        self.arrays = {}
        try:
            for name, kind in _VIEW_TENSORS.items():
                first, last = tensors[name]["data_offsets"]
                self.arrays[name] = np.asarray(mapped[start + first : start + last]).view(kind)
            raw = json.loads(self.metadata["meta"])
            self.meta = CacheMeta(**{field.name: raw[field.name] for field in fields(CacheMeta)})
            self.shards: list[tuple[str, list[int]]] = [(name, shape) for name, shape in json.loads(self.metadata["shards"])]
        except (ValueError, LookupError, TypeError) as error:
            raise damaged(path, f"is no whole {VIEW_FORMAT} file ({error})") from None

    def __len__(self) -> int:
        return len(self.arrays["row"])


def _serial(path: Path) -> int:
    return int(read_header(path, VIEW_FORMAT)[1]["serial"])


def view_paths(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "views").glob("*.safetensors") if not path.name.startswith("."))


class LatentCache:
    """Random access to the samples of one view. Threads may share it.

    `meta`: see `CacheMeta`.  `name`: of the view.
    """

    def __init__(self, folder: Path, path: Path):
        self.name = path.stem
        self._folder = folder / "shards"
        self._view = View(path)
        self.meta = self._view.meta
        self._dtype = DTYPES[self.meta.dtype]
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="fastsd-read")

    @classmethod
    def open(cls, dir: str | Path, view: str | None = None) -> LatentCache:
        """Open a view of the cache in `dir` by its name (see `view_name`), or the one frozen last.

        Raises:
            UserError: there is no such view, or it is damaged.
        """
        folder = Path(dir)
        if view is not None:
            path = folder / "views" / f"{view}.safetensors"
            if not path.is_file():
                raise UserError(f"cache.dir {folder} holds no latents for this config; run `fastsd cache CONFIG` first")
            return cls(folder, path)
        paths = view_paths(folder)
        if not paths:
            raise UserError(f"{folder} is no finished latent cache; run `fastsd cache CONFIG` first")
        return cls(folder, max(paths, key=_serial))

    def __len__(self) -> int:
        return len(self._view)

    def get(self, positions: Sequence[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """Read samples.

        Args:
            positions: B indices in [0, len), in any order, repeats allowed.

        Returns:
            "latents": (B, C, h, w), raw posterior mean in the stored dtype, on the CPU (pinned when there is a GPU).

        Raises:
            UserError: a shard is missing or damaged.
        """
        index_B = self._checked(positions)
        shard_B, row_B = self._view.arrays["shard"][index_B], self._view.arrays["row"][index_B]
        shapes = {tuple(self._view.shards[shard][1]) for shard in np.unique(shard_B)}
        assert len(shapes) == 1, f"a batch needs samples of one shape, not {sorted(shapes)}"
        latents = torch.empty((len(index_B), *shapes.pop()), dtype=self._dtype, pin_memory=torch.cuda.is_available())
        flat = latents.view(torch.uint8).view(-1).numpy().data
        size = len(flat) // len(index_B)
        order = np.lexsort((row_B, shard_B))  # along the disk, where it matters
        parts = min(_READERS, -(-len(order) // _PER_READER))

        def read(slots: np.ndarray) -> None:
            for slot in slots.tolist():
                self._shard(int(shard_B[slot])).read_row(int(row_B[slot]), flat[slot * size : (slot + 1) * size])

        for _ in self._readers.map(read, np.array_split(order, parts)):
            pass
        return {"latents": latents}

    def captions(self, positions: Sequence[int] | np.ndarray | Tensor) -> list[str]:
        """The captions of samples, "" for none."""
        offsets, blob = self._view.arrays["caption_offsets"], self._view.arrays["captions"]
        index_B = self._checked(positions)
        starts, ends = offsets[index_B].tolist(), offsets[index_B + 1].tolist()
        return [blob[start:end].tobytes().decode() for start, end in zip(starts, ends, strict=True)]

    def close(self) -> None:
        """Close the files; an interpreter that ends does it too."""
        self._readers.shutdown()
        self._open.clear()

    def _checked(self, positions: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        index_B = np.asarray(positions, dtype=np.int64)
        assert index_B.ndim == 1 and len(index_B), "positions are a flat, non-empty list"
        assert index_B.min() >= 0 and index_B.max() < len(self), f"positions lie outside [0, {len(self)})"
        return index_B

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            if number not in self._open:
                name, shape = self._view.shards[number]
                self._open[number] = _Shard(self._folder / f"{name}.safetensors", shape, self.meta)
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


class _Shard:
    """An open shard. Put out of the table it lives on in threads that still read; the last reference closes it."""

    def __init__(self, path: Path, shape: list[int], meta: CacheMeta):
        tensors, metadata, self._start = read_header(path, SHARD_FORMAT)
        mean = tensors.get("mean", {})
        if metadata.get("vae") != meta.vae_hash or mean.get("shape", [])[1:] != shape:
            raise damaged(path, "belongs to another VAE or shape than this view")
        if mean["dtype"] != CODES[DTYPES[meta.dtype]]:
            raise damaged(path, f"holds {mean['dtype']} where the view expects {meta.dtype}")
        self._path = path
        self._row_bytes = math.prod(shape) * DTYPES[meta.dtype].itemsize
        self._file = path.open("rb", buffering=0)
        self._lock = threading.Lock()

    def read_row(self, row: int, into: memoryview) -> None:
        at = self._start + row * self._row_bytes
        if hasattr(os, "preadv"):
            count = os.preadv(self._file.fileno(), [into], at)
        else:  # Windows: one position per file, so one reader at a time
            with self._lock:
                self._file.seek(at)
                count = self._file.readinto(into)
        if count != len(into):
            raise damaged(self._path, "is cut short")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
