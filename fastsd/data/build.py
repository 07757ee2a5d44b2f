"""Caching: images -> VAE -> shards, once.

While it lasts, SQLite is the truth.  Every distinct image content gets its (shard, row) before the first is encoded;
then groups of `cache.batch` rows are encoded, written into preallocated shards, flushed, and only then marked as done
by one commit.  So a process that is killed anywhere loses one group at the most, and the next one writes the same bytes
to the same places.  At the end the view is frozen, see `cache.py`.

The tables are described in `store.py`; one more lives only as long as the run: `sample`, a row per image file found.

Shapes: B images, R x R pixels, C x h x w latents.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import stat
import time
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastsd.config import Config
from fastsd.data import cache, sources
from fastsd.data.sources import Rejected, Source, shown
from fastsd.data.store import Shard, Store, disk_errors
from fastsd.errors import UserError

_SCAN_CHUNK = 512  # files whose hashes one commit keeps
# A file may change again within the resolution of its time stamp; younger ones are hashed again in the next run.
_YOUNG_NS = 2_000_000_000
_EXAMPLES = 20


class Encoder(Protocol):
    """What caching needs of a VAE; `fastsd.model.vae.Vae` is one.

    `encode` takes fp32 (B, 3, R, R) in [-1, 1] on the CPU and returns the raw posterior mean (B, C, h, w), on any
    device. An encoder that computes below fp32 may offer `encode_fp32` too, for the rare image that overflows.
    """

    @property
    def hash(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def scaling_factor(self) -> float: ...
    @property
    def shift_factor(self) -> float | None: ...
    @property
    def channels(self) -> int: ...
    @property
    def downscale(self) -> int: ...
    def encode(self, images_B3RR: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """For a live line. `phase`: "scan" (total unknown: 0) or "encode" (distinct images that were not cached yet)."""

    phase: str
    done: int
    total: int
    images_per_second: float


@dataclass(frozen=True)
class Counts:
    """What caching came to: `images` found = `cached` samples + `rejected`; `latents` are the distinct ones behind the
    samples, `encoded` those of them made by this run; `examples`: up to 20 of the rejected, "path: reason"."""

    images: int
    cached: int
    latents: int
    encoded: int
    rejected: int
    empty_captions: int
    reasons: dict[str, int]
    examples: list[str]
    view: str


Report = Callable[[Progress], None]


def build_cache(config: Config, vae: Encoder, report: Report | None = None) -> Counts:
    """Bring the latents of `config` up to date and freeze their view.

    Only what is new is encoded.  Interrupted anywhere, the same call goes on where it stopped.

    Raises:
        UserError: a folder, the resolution, the disk or the GPU's memory; or no image could be used at all.
    """
    check_resolution(config.data.resolution, vae.downscale)
    found = sources.scan(config.data.folders)
    with Store.open(Path(config.cache.dir), create=True) as store:
        return _Build(config, vae, store, report or (lambda event: None)).run(found)


def check_resolution(resolution: int, downscale: int) -> None:
    """Raises UserError for a resolution that the VAE cannot shrink evenly."""
    if resolution % downscale:
        low = resolution // downscale * downscale
        near = " or ".join(str(size) for size in (low, low + downscale) if size)
        raise UserError(f"data.resolution is {resolution}, no multiple of {downscale} as this VAE needs; use {near}")


@dataclass(frozen=True)
class _Row:
    number: int
    content: bytes
    path: bytes


class _Build:
    """One run over one (folders, preprocessing, VAE)."""

    def __init__(self, config: Config, vae: Encoder, store: Store, report: Report):
        self.config, self.vae, self.store, self.report = config, vae, store, report
        self.db = store.db
        self.dtype = cache.DTYPES[config.cache.dtype]
        self.resolution = config.data.resolution
        side = self.resolution // vae.downscale
        self.shape = [vae.channels, side, side]
        self.workers = config.cache.workers or _cores()
        self.encoded = 0
        self.space_name = cache.space_name(config, vae.hash)
        about = {
            "vae": vae.hash,
            "vae_name": vae.name,
            "scaling_factor": repr(float(vae.scaling_factor)),
            "shift_factor": repr(float(vae.shift_factor or 0.0)),
            "preprocessing": json.dumps(cache.preprocessing(config), sort_keys=True),
            "bucket": f"{self.resolution}x{self.resolution}",
        }
        self.space = store.space(self.space_name, about, config.cache.dtype)

    def run(self, found: Iterator[Source]) -> Counts:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="fastsd-decode")
        try:
            with warnings.catch_warnings():
                # Pillow's remarks on odd files; what matters comes back as a reason.
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
                self._scan(found, pool)
                self.store.forget_broken(self.space)
                self._plan()
                self._encode_all(pool)
        finally:
            pool.shutdown(cancel_futures=True)
        return self._freeze()

    def _scan(self, found: Iterator[Source], pool: ThreadPoolExecutor) -> None:
        """Fill the temporary table `sample`, one row per image file, with its content hash or the reason against it."""
        self.db.execute(
            "CREATE TEMP TABLE sample (id INTEGER PRIMARY KEY, path BLOB, content BLOB, caption TEXT, size INTEGER,"
            " mtime_ns INTEGER, reason TEXT)"
        )
        known = "SELECT size, mtime_ns, content FROM file WHERE path = ?"
        done, start = 0, time.perf_counter()
        while chunk := list(itertools.islice(found, _SCAN_CHUNK)):
            hints = [self.db.execute(known, (os.fsencode(source.path),)).fetchone() for source in chunk]
            with self.store.transaction():
                for sample in pool.map(_inspect, chunk, hints):
                    self.db.execute("INSERT INTO sample VALUES (NULL, ?, ?, ?, ?, ?, ?)", sample)
                    path, content, _, size, mtime_ns, _ = sample
                    if content and mtime_ns < time.time_ns() - _YOUNG_NS:
                        self.db.execute("REPLACE INTO file VALUES (?, ?, ?, ?)", (path, size, mtime_ns, content))
            done += len(chunk)
            self.report(Progress("scan", done, 0, done / (time.perf_counter() - start)))
        with self.store.transaction():
            self.db.execute("CREATE INDEX temp.sample_content ON sample (content)")
            # What failed before and has not changed since is not tried again.
            self.db.execute(
                "UPDATE sample SET reason = rejected.reason FROM rejected WHERE rejected.space = ? AND"
                " rejected.path = sample.path AND rejected.size = sample.size AND"
                " rejected.mtime_ns = sample.mtime_ns AND sample.reason IS NULL",
                (self.space,),
            )

    def _plan(self) -> None:
        """Give every new content its place, in sorted order, in new shards."""
        query = (
            "SELECT DISTINCT content FROM sample WHERE reason IS NULL AND content NOT IN"
            " (SELECT content FROM latent WHERE space = ?) ORDER BY content"
        )
        new = [content for (content,) in self.db.execute(query, (self.space,))]
        with self.store.transaction():
            self.db.execute("UPDATE space SET unfinished = 1 WHERE id = ?", (self.space,))
            for first in range(0, len(new), cache.SHARD_ROWS):
                contents = new[first : first + cache.SHARD_ROWS]
                # The name follows from what is planned, so that it is the same however often caching was interrupted.
                name = f"{self.space_name[:8]}-{hashlib.sha256(b''.join(contents)).hexdigest()[:16]}"
                self.store.add_shard(self.space, name, self.shape, contents)
        missing = [shard for shard in self.store.shards(self.space) if not shard.path.exists()]
        need = sum(shard.rows * shard.row_bytes for shard in missing)
        free = shutil.disk_usage(self.store.folder).free
        if need > free:
            raise UserError(
                f"cache.dir {self.store.folder}: the new latents need {need / 1e9:.1f} GB and the disk has"
                f" {free / 1e9:.1f} GB left; free some space or choose another folder"
            )

    def _encode_all(self, pool: ThreadPoolExecutor) -> None:
        """Encode what is planned and wanted, decoding a few groups ahead of the VAE."""
        depth = 1 + -(-2 * self.workers // self.config.cache.batch)
        ahead: deque[tuple[Shard, list[_Row], list[Future[np.ndarray]]]] = deque()
        total, done, start = self._pending(), 0, time.perf_counter()
        # One round does it, unless an image vanished meanwhile of which there is a copy: the copy's turn is the next.
        while self._pending():
            for group in itertools.chain(self._groups(), [None] * depth):
                if group is not None:
                    shard, rows = group
                    ahead.append((shard, rows, [pool.submit(_load, row, self.resolution) for row in rows]))
                if ahead and (group is None or len(ahead) > depth):
                    done += len(ahead[0][1])
                    self._finish(*ahead.popleft())
                    self.report(Progress("encode", min(done, total), total, done / (time.perf_counter() - start)))

    def _pending(self) -> int:
        query = (
            "SELECT COUNT(*) FROM latent WHERE space = ? AND sha256 IS NULL AND EXISTS"
            " (SELECT 1 FROM sample WHERE sample.content = latent.content AND reason IS NULL)"
        )
        return int(self.db.execute(query, (self.space,)).fetchone()[0])

    def _groups(self) -> Iterator[tuple[Shard, list[_Row]]]:
        """Fixed blocks of `cache.batch` rows of a shard, less those that are done or that nobody wants any more."""
        query = (
            "SELECT * FROM (SELECT row, content, (SELECT path FROM sample WHERE sample.content = latent.content AND"
            " reason IS NULL ORDER BY id LIMIT 1) AS path FROM latent WHERE shard = ? AND sha256 IS NULL)"
            " WHERE path IS NOT NULL ORDER BY row"
        )
        batch = self.config.cache.batch
        for shard in self.store.shards(self.space):
            rows = [_Row(*found) for found in self.db.execute(query, (shard.id,)).fetchall()]
            for _, group in itertools.groupby(rows, lambda row: row.number // batch):
                yield shard, list(group)

    def _finish(self, shard: Shard, rows: list[_Row], loading: list[Future[np.ndarray]]) -> None:
        """Encode a group, put it on the disk, and only then say so in the database."""
        refused: list[tuple[_Row, Rejected]] = []
        loaded: list[tuple[_Row, np.ndarray]] = []
        for row, future in zip(rows, loading, strict=True):
            try:
                loaded.append((row, future.result()))
            except Rejected as error:
                refused.append((row, error))
        done: list[tuple[int, bytes]] = []
        if loaded:
            for (row, _), mean in zip(loaded, self._encode([pixels for _, pixels in loaded]), strict=True):
                if mean is None:
                    refused.append((row, Rejected(f"its latent is not finite in {self.config.cache.dtype}")))
                else:
                    done.append((row.number, mean.contiguous().view(torch.uint8).numpy().tobytes()))
            with disk_errors(self.store.folder):
                shard.write_rows(done)
        with self.store.transaction():
            self.store.mark_done(shard, done)
            for row, refusal in refused:
                self._reject(row, refusal)
        self.encoded += len(done)

    def _encode(self, pixels: list[np.ndarray]) -> Iterator[Tensor | None]:
        """uint8 images -> for each its mean in the stored dtype, or None if even alone and in fp32 it is not finite."""
        images = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
        for i, mean in enumerate(self._means(self.vae.encode, images)):
            if not mean.isfinite().all():
                mean = self._means(getattr(self.vae, "encode_fp32", self.vae.encode), images[i : i + 1])[0]
            yield mean if mean.isfinite().all() else None

    def _means(self, encode: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                means = encode(images)
        except torch.OutOfMemoryError:
            batch = self.config.cache.batch
            raise UserError(f"cache.batch is {batch}, too much for this GPU's memory; lower it, {batch // 2 or 1}") from None
        assert list(means.shape) == [len(images), *self.shape], f"the VAE returned {list(means.shape)}"
        return means.to(self.dtype).cpu()

    def _reject(self, row: _Row, error: Rejected) -> None:
        """Put aside every file with this content, or only this one when its bytes are not to blame."""
        if error.lasting:
            which, value = "content = ?", row.content
            self.db.execute(f"UPDATE sample SET reason = ? WHERE {which}", (error.reason, value))
        else:
            which, value = "path = ?", row.path
            self.db.execute(f"UPDATE sample SET reason = ?, size = -1 WHERE {which}", (error.reason, value))
        self._remember_rejected(which, value)

    def _remember_rejected(self, which: str, value: Any) -> None:
        refused = f"SELECT ?, path, reason, size, mtime_ns FROM sample WHERE reason IS NOT NULL AND {which}"
        self.db.execute(f"REPLACE INTO rejected {refused}", (self.space, value))

    def _freeze(self) -> Counts:
        """Write the view of all samples that have their latent."""
        with self.store.transaction():
            self._remember_rejected("id > ?", 0)
            self.db.execute(
                "DELETE FROM rejected WHERE space = ? AND path IN (SELECT path FROM sample WHERE reason IS NULL)",
                (self.space,),
            )
        counts = self._counts()
        if not counts.cached:
            raise UserError(f"data.folders: none of the {counts.images} images could be used; the first: {counts.examples[0]}")
        vae, config = self.vae, self.config
        meta = cache.CacheMeta(
            vae_hash=vae.hash,
            vae_name=vae.name,
            scaling_factor=float(vae.scaling_factor),
            shift_factor=float(vae.shift_factor or 0.0),
            channels=vae.channels,
            downscale=vae.downscale,
            resolution=self.resolution,
            dtype=config.cache.dtype,
            preprocessing=cache.preprocessing(config),
            folders=[shown(folder) for folder in config.data.folders],
            images=counts.images,
            cached=counts.cached,
            rejected=counts.rejected,
            empty_captions=counts.empty_captions,
            latents=counts.latents,
        )
        arrays, shards = self._index()
        with disk_errors(self.store.folder):
            cache.freeze(self.store.folder, counts.view, arrays, shards, meta)
        with self.store.transaction():
            self.db.execute("UPDATE space SET unfinished = 0 WHERE id = ?", (self.space,))
        return counts

    def _index(self) -> tuple[dict[str, np.ndarray], list[Any]]:
        """The arrays of the view, and its shards: those in use, numbered in the order of their making."""
        query = "FROM sample JOIN latent ON latent.space = ? AND latent.content = sample.content WHERE sample.reason IS NULL"
        used = {id for (id,) in self.db.execute(f"SELECT DISTINCT shard {query}", (self.space,))}
        shards = [shard for shard in self.store.shards(self.space) if shard.id in used]
        number = {shard.id: i for i, shard in enumerate(shards)}
        shard_n, row_n, offsets, blob = array("i"), array("i"), array("q", [0]), bytearray()
        for shard, row, caption in self.db.execute(f"SELECT shard, row, caption {query} ORDER BY sample.id", (self.space,)):
            shard_n.append(number[shard])
            row_n.append(row)
            blob += caption.encode()
            offsets.append(len(blob))
        arrays: dict[str, np.ndarray] = {
            "shard": np.frombuffer(shard_n, np.int32),
            "row": np.frombuffer(row_n, np.int32),
            "caption_offsets": np.frombuffer(offsets, np.int64),
            "captions": np.frombuffer(blob, np.uint8),
        }
        return arrays, [[shard.name, shard.shape] for shard in shards]

    def _counts(self) -> Counts:
        images, cached, empty, latents = self.db.execute(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE reason IS NULL), COUNT(*) FILTER (WHERE reason IS NULL AND"
            " caption = ''), COUNT(DISTINCT CASE WHEN reason IS NULL THEN content END) FROM sample"
        ).fetchone()
        rejected = self.db.execute("SELECT path, reason FROM sample WHERE reason IS NOT NULL ORDER BY id").fetchall()
        return Counts(
            images=images,
            cached=cached,
            latents=latents,
            encoded=self.encoded,
            rejected=len(rejected),
            empty_captions=empty,
            reasons=dict(Counter(reason for _, reason in rejected).most_common()),
            examples=[f"{shown(path)}: {reason}" for path, reason in rejected[:_EXAMPLES]],
            view=cache.view_name(self.config, self.vae.hash),
        )


def _inspect(source: Source, hint: tuple[int, int, bytes] | None) -> tuple[bytes, bytes | None, str, int, int, str | None]:
    """A row of `sample`. `hint`: size, mtime and hash as remembered from an earlier run."""
    path = os.fsencode(source.path)
    try:
        if source.problem:
            raise Rejected(source.problem)
        caption = sources.read_caption(source.caption_path) if source.caption_path else ""
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would wait for ever
                raise Rejected("it is no regular file")
            if status.st_size > sources.MAX_IMAGE_BYTES:
                raise Rejected("it is larger than 1 GiB")
            if hint and hint[:2] == (status.st_size, status.st_mtime_ns):
                content = hint[2]
            else:
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise Rejected(f"it cannot be read ({error.strerror})") from None
    except Rejected as error:
        return path, None, "", -1, -1, error.reason
    return path, content, caption, status.st_size, status.st_mtime_ns, None


def _load(row: _Row, resolution: int) -> np.ndarray:
    """uint8 (3, R, R) of the content that was planned, or Rejected."""
    try:
        with open(row.path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise Rejected(f"it cannot be read ({error.strerror})", lasting=False) from None
    if hashlib.sha256(data).digest() != row.content:
        raise Rejected("it changed while it was being cached; run the same line again", lasting=False)
    return sources.decode(data, resolution)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
