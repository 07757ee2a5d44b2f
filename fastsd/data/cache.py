"""The format of the latent cache on the disk, and its reader, `LatentCache`.

    DIR/cache.sqlite              the state of the cache during a build (see `build.py`); training never opens it
    DIR/shards/S.safetensors      one tensor "mean" (n <= 4096, C, h, w): the raw posterior mean, unscaled
    DIR/views/V.safetensors       the captions of every sample and the places of its latents; frozen, training maps this file
    DIR/tokens, DIR/states        token ids (`tokens.py`) and text embeddings (`text_embeddings.py`) of a view's captions
    DIR/masks                     masks of a view's images (`masks.py`)
    DIR/lists                     names of the files of a view, for people and for `fastsd check` (`building/lists.py`)

Shards and views are ordinary safetensors files, see `rows.py`.  A view belongs to one combination of folders, preprocessing,
VAE and dtype.  Its name is a function of the config and the VAE, so training finds it without reading any image.

The n samples of a view are sorted into groups.  All samples of a group have one shape and come from one folder of the config.
Each sample has V versions, which are crops and their mirror images.  A view contains these tensors:

    shard, row            (n * V)    int32: the place of each version's latent
    check                 (n * V)    int64: the xxh3 of the row's bytes
    caption_offsets       (n + 1)    int64: the captions of sample i are captions[caption_offsets[i] : caption_offsets[i + 1]]
    captions                         UTF-8 bytes, one line per variant of a caption
    weight                (n)        fp32: the factor of each sample's loss; only with data.weight_key

Minimal use:

    from fastsd.data.cache import LatentCache
    cache = LatentCache.open("cache")
    latents = cache.get([0, 1, 2])["latents"]          # a model is trained on cache.meta.latent_space.scale(latents)

Shapes: B samples of one shape, V versions, C x h x w latents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastsd.config.paths import listed_paths
from fastsd.config.schema import Config, DataTable
from fastsd.data.rows import LATENTS, Index, Rows, damage_error, read_header
from fastsd.errors import UserError
from fastsd.model.latent_space import LatentSpace

SHARD_ROWS = 4096
ALIGN = 4096
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ORDER = "bucket_height, bucket_width, root, id"  # samples of a view are sorted by these columns of `collect.py`
Positions = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class CacheMeta:
    """Metadata of a view. Of the `images` in the folders, `cached` became samples and the rest were `rejected`. The samples
    have `latents` distinct latents, and `empty_captions` of them have an empty caption."""

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
    crops: int
    flip: bool
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space of the model that the view was written for. Another model with this VAE may have another one."""
        return LatentSpace(self.scaling_factor, self.shift_factor, tuple(self.latents_mean), tuple(self.latents_std))

    @property
    def versions(self) -> int:
        """Number of latents per image. With `flip`, version v is crop v // 2, mirrored if v is odd. Otherwise it is crop v."""
        return self.crops * (1 + self.flip)


@dataclass(frozen=True)
class Group:
    """Samples [first, first + count) of a view. They have one latent shape (C, h, w) and one folder `root` of the config."""

    shape: tuple[int, ...]
    root: int
    first: int
    count: int


def stored_versions(data: DataTable) -> list[int]:
    """Return the numbers of a view's versions in the database: 2 * crop, plus 1 for the mirror image. A crop has the same
    number with and without `flip`, so changing `flip` keeps the stored versions valid."""
    return [2 * crop + mirrored for crop in range(data.crops) for mirrored in range(1 + data.flip)]


def preprocessing(config: Config) -> dict[str, Any]:
    """Return the settings that, with the image, its version and the VAE, determine the stored bytes. Increment `version` when
    a change of the code changes the bytes."""
    data = config.data
    settings = {"version": 2, "dtype": config.cache.dtype}
    if data.latents:
        return settings | {"latents": data.latents}
    return settings | {
        "resolution": data.resolution,
        "buckets": data.buckets and data.buckets.model_dump(),
        "resize": "lanczos",
        "crop": data.crop,
        "precision": config.cache.precision,
    }


def digest(*values: object) -> str:
    """Return the sha256 of the values as JSON, 64 hex digits."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def space_name(config: Config, vae_hash: str) -> str:
    """Return the name of the space: the latents of one VAE and one preprocessing. Two spaces never share a shard."""
    return digest(vae_hash, preprocessing(config))[:16]


def view_name(config: Config, vae_hash: str) -> str:
    """Return the name of the view that caching `config` with this VAE writes.

    The name of a new view depends on its folders. If there is no such view, it is that of the view with the same settings whose
    folders were moved, or whose folders are the same under other names.
    """
    folders = [os.fsencode(os.path.abspath(root.path)).hex() for root in config.data.roots]
    name = digest(*_settings(config, vae_hash, folders))[:16]
    cache_folder = Path(config.cache.dir)
    if (cache_folder / "views" / f"{name}.safetensors").is_file():
        return name
    settings = view_settings(config, vae_hash)
    for path in view_paths(cache_folder):
        place = view_place(path)
        if place and place.settings == settings and place.is_same_data(config.data):
            return path.stem
    return name


def view_settings(config: Config, vae_hash: str) -> str:
    """Return a hash of all that determines a view, except the places of its folders."""
    return digest(*_settings(config, vae_hash, []))


def _settings(config: Config, vae_hash: str, folders: list[str]) -> list[object]:
    data = config.data
    # Keys added in later versions enter the name only if they are set, so existing views keep their names.
    added = {"weight_key": "", "masks": "", "caption_lines": "variants", "captions": "file"}
    optional_settings: list[object] = [
        {key: value} for key, default in added.items() if (value := getattr(data, key)) != default
    ]
    if data.exclude_files:  # the list, and not its path, determines the samples
        optional_settings.append({"exclude_files": sorted(listed_paths(data.exclude_files))})
    return [vae_hash, preprocessing(config), folders, data.crops, data.flip, data.caption_key, *optional_settings]


def folder_base(path: str) -> str:
    """Return the folder or tar that the files of a root are in. For a pattern, this is the folder before the first brace."""
    before, brace, _ = path.partition("{")
    return os.path.abspath(os.path.dirname(before) if brace and not os.path.exists(path) else path)


@dataclass(frozen=True)
class Place:
    """The place of a view's data, so that the view is found again when they are moved.

    Attributes:
        settings: `view_settings`.
        paths: `data.folders` as written in the config.
        bases: `folder_base` of each.
        samples: some images: root, path below its base, offset, length and sha256.
    """

    settings: str
    paths: list[str]
    bases: list[str]
    samples: list[tuple[int, str, int, int, str]]

    def is_same_data(self, data: DataTable) -> bool:
        """Return True if all folders of `data` are the same, or were moved. A folder that exists elsewhere was copied."""
        bases = [folder_base(root.path) for root in data.roots]
        if len(bases) != len(self.bases):
            return False
        for path, root, old, new in zip(self.paths, data.roots, self.bases, bases, strict=True):
            if not os.path.exists(new) and path != root.path:
                return False
            if os.path.exists(old) and not (os.path.exists(new) and os.path.samefile(old, new)):
                return False
        present = [sample for sample in self.samples if os.path.exists(bases[sample[0]])]
        return bool(self.samples) and all(_is_there(bases[sample[0]], *sample[1:]) for sample in present)


def _is_there(base: str, below: str, offset: int, length: int, sha256: str) -> bool:
    try:
        with open(os.path.normpath(os.path.join(base, below)), "rb") as file:
            file.seek(offset)
            return hashlib.sha256(file.read(length)).hexdigest() == sha256
    except OSError:
        return False


def view_place(path: Path) -> Place | None:
    """Return the place of a view's data, or None if the view is damaged or from an earlier version."""
    try:
        return Place(**json.loads(read_header(path, View.FORMAT)[1]["place"]))
    except (UserError, KeyError, ValueError, TypeError):
        return None


def freeze(
    folder: Path,
    name: str,
    arrays: dict[str, np.ndarray],
    shards: list[object],
    groups: Sequence[Group],
    meta: CacheMeta,
    place: Place | None = None,
) -> None:
    """Write a view atomically and make it the newest one. `shards[i]` is [name, [C, h, w]] of the shard with index i."""
    path = folder / "views" / f"{name}.safetensors"
    content = {
        "shards": json.dumps(shards),
        "groups": json.dumps([[group.shape, group.root, group.count] for group in groups]),
        # Keys of the metadata that were added later are written only if they are set, so existing views keep their bytes.
        "meta": json.dumps({key: value for key, value in asdict(meta).items() if value != ()}, sort_keys=True),
    }
    unhashed = {"place": json.dumps(asdict(place), sort_keys=True)} if place else {}
    serials = {}
    for other in view_paths(folder):
        try:
            serials[other] = _serial(other)
        except UserError:
            continue  # the view is damaged
    newest = max(serials.values(), default=0)
    with contextlib.suppress(UserError):  # a view that is damaged after its header is written again
        expected = View.hashes(arrays, content).items() | unhashed.items()
        if serials.get(path) == newest and expected <= View(path).metadata.items():
            return
    View.write(path, arrays, content, serial=str(newest + 1), **unhashed)


class View(Index):
    """The index of a cache's samples. It has the attributes `groups` and `meta`."""

    FORMAT, HASHED_KEYS, OPTIONAL = "view-2", ("shards", "groups", "meta"), {"weight": np.float32}
    TENSORS = {"caption_offsets": np.int64, "check": np.int64, "shard": np.int32, "row": np.int32, "captions": np.uint8}

    def _parse(self) -> None:
        super()._parse()
        values = json.loads(self.metadata["meta"])
        names = [field.name for field in fields(CacheMeta) if field.name in values or field.default is MISSING]
        self.meta = CacheMeta(**{name: values[name] for name in names})
        self.groups: list[Group] = []
        for shape, root, count in json.loads(self.metadata["groups"]):
            self.groups.append(Group(tuple(shape), root, self.samples, count))
        weight_count = len(self.arrays.get("weight", range(len(self))))
        if len(self) * self.meta.versions != len(self.arrays["row"]) or not self.samples == len(self) == weight_count:
            raise ValueError("tensors have inconsistent lengths")

    @property
    def samples(self) -> int:
        return self.groups[-1].first + self.groups[-1].count if self.groups else 0

    def __len__(self) -> int:
        return len(self.arrays["caption_offsets"]) - 1


def _serial(path: Path) -> int:
    serial = read_header(path, View.FORMAT)[1].get("serial", "")
    if not serial.isdecimal():
        raise damage_error(path, f"is not a valid {View.FORMAT} file (serial {serial!r})")
    return int(serial)


def view_paths(folder: Path) -> list[Path]:
    return _visible_files(folder / "views")


class TextEmbeddingsIndex(Index):
    """The index of a view's text embeddings, see `text_embeddings.py`."""

    FORMAT, HASHED_KEYS = "states-index-1", ("shards", "view", "space")
    TENSORS = {"offsets": np.int64, "check": np.int64, "shard": np.int32, "row": np.int32}


def states_paths(folder: Path) -> list[Path]:
    return _visible_files(folder / "states")


def indexes(folder: Path) -> list[tuple[Path, type[Index]]]:
    """List the files that refer to shards. Each comes with the class that reads it."""
    return [(path, View) for path in view_paths(folder)] + [(path, TextEmbeddingsIndex) for path in states_paths(folder)]


def _visible_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


class LatentCache(Rows, Dataset[dict[str, Any]]):
    """Random access to the samples of one view. Thread-safe. Also a dataset for `torch.utils.data.DataLoader`.

    `name`, `path`, `sha256`, `meta` and `groups` describe the view, see `CacheMeta` and `Group`. `versions` is the number of
    latents per sample.
    """

    def __init__(self, folder: Path, path: Path):
        self.name, self.path = path.stem, path
        self._view = View(path)
        self.meta, self.groups = self._view.meta, self._view.groups
        self.sha256, self.versions = self._view.metadata["sha256"], self.meta.versions
        super().__init__(folder, self._view, DTYPES[self.meta.dtype], {"fastsd": LATENTS, "vae": self.meta.vae_hash})

    @classmethod
    def open(cls, dir: str | Path, view: str | None = None) -> LatentCache:
        """Open the view with this name (see `view_name`) in the cache folder `dir`. By default, open the newest view.

        Raises:
            UserError: the view does not exist or is damaged.
        """
        folder = Path(dir)
        if view is not None:
            path = folder / "views" / f"{view}.safetensors"
            if not path.is_file():
                raise UserError(
                    "no-view", f"cache.dir {folder} has no latents for this config; run `fastsd cache CONFIG` first"
                )
            return cls(folder, path)
        paths = view_paths(folder)
        if not paths:
            raise UserError("no-finished-cache", f"{folder} is not a finished latent cache; run `fastsd cache CONFIG` first")
        return cls(folder, max(paths, key=_serial))

    def __len__(self) -> int:
        return len(self._view)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return one sample: "latents" (C, h, w), the raw posterior mean of its first version, and "caption", its first.

        Raises:
            IndexError: `position` is outside [-len, len).
            UserError: as `get`.
        """
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return samples as `__getitem__` does, read together. They may have different shapes."""
        index_B = np.array(positions, dtype=np.int64)
        index_B[index_B < 0] += len(self)
        if index_B.min() < 0 or index_B.max() >= len(self):
            raise IndexError(f"position {positions} is outside a cache of {len(self)} samples")
        samples: dict[int, dict[str, Any]] = {}
        group_B = np.searchsorted([group.first for group in self.groups], index_B, side="right")
        for group in np.unique(group_B):
            (slots,) = np.nonzero(group_B == group)
            latents_BCHW, captions = self.get(index_B[slots])["latents"], self.captions(index_B[slots])
            for slot, latents_CHW, caption in zip(slots, latents_BCHW, captions, strict=True):
                samples[int(slot)] = {"latents": latents_CHW, "caption": caption}
        return [samples[slot] for slot in range(len(positions))]

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._folder.parent, self.path)  # a spawned worker opens the files itself

    def get(self, positions: Positions, versions: Positions | None = None) -> dict[str, Tensor]:
        """Read samples.

        Args:
            positions: B indices in [0, len) of samples of one shape, in any order; repeats are allowed.
            versions: B numbers in [0, V) that select a crop or mirror image of each sample; None = the first version.

        Returns:
            A dict with "latents": raw posterior means (B, C, h, w) in the stored dtype, on the CPU, pinned if there is a GPU.

        Raises:
            UserError: a shard is missing or damaged.
        """
        index_B = self._checked_positions(positions) * self.versions
        if versions is not None:
            version_B = np.asarray(versions, dtype=np.int64)
            assert version_B.min() >= 0 and version_B.max() < self.versions, f"versions are outside [0, {self.versions})"
            index_B += version_B
        return {"latents": self._read(index_B)}

    def checks(self, first: int, last: int) -> np.ndarray:
        """Return the xxh3 of the first version of each sample in [first, last), int64."""
        return self._view.cut("check", first * self.versions, last * self.versions)[:: self.versions]

    def captions(self, positions: Positions) -> list[str]:
        """Return the first caption of each sample, or "" for a sample without captions."""
        return [variants[0] for variants in self.variants(positions)]

    def variants(self, positions: Positions) -> list[list[str]]:
        """Return all captions of each sample, or [""] for a sample without captions."""
        index_B = self._checked_positions(positions)
        starts, ends = (self._view.take("caption_offsets", index).tolist() for index in (index_B, index_B + 1))
        encoded = (self._view.cut("captions", start, end).tobytes() for start, end in zip(starts, ends, strict=True))
        return [text.decode().split("\n") for text in encoded]

    def content_hashes(self) -> dict[str, str]:
        """Return the sha256 of the captions and of the latents, in their groups. They do not depend on where any file is."""
        hashes = {}
        for key, names in (("captions", ("caption_offsets", "captions")), ("latents", ("check",))):
            sha = hashlib.sha256(self._view.metadata["groups"].encode())
            for name in names:
                sha.update(self._view.arrays[name].view(np.uint8).data)
            hashes[key] = sha.hexdigest()
        return hashes

    @property
    def weight_hash(self) -> str:
        """The sha256 of the weights, or "" if there are no weights."""
        return self._view.metadata.get("sha256_weight", "")

    def weights(self, positions: Positions) -> Tensor | None:
        """Return the factor of each sample's loss, fp32 (B,). Return None if the view was built without data.weight_key."""
        if "weight" not in self._view.arrays:
            return None
        return torch.from_numpy(self._view.take("weight", self._checked_positions(positions)).copy())

    def _checked_positions(self, positions: Positions) -> np.ndarray:
        index_B = np.array(positions, dtype=np.int64)
        assert index_B.ndim == 1 and len(index_B), "positions must be a flat, non-empty list"
        assert index_B.min() >= 0 and index_B.max() < len(self), f"positions are outside [0, {len(self)})"
        return index_B
