"""Encode the planned rows of a cache in a pipeline: decoding threads -> VAE -> a writing thread, each ahead of the next.

The unit of work is a block: `cache.batch` adjacent rows of a shard, all of one shape. A block is claimed, decoded, encoded,
written and flushed. Only then does one commit mark it as done. A process that is killed loses only its blocks in progress, and
the next process writes the same bytes to the same places. A block that another process has claimed is left to that process. If
it is killed, its claims become free.

Shapes: B rows of a block, W x H pixels, C x h x w latents.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import Config
from fastsd.data import cache
from fastsd.data.building.buckets import Buckets, crop_position
from fastsd.data.building.claims import Claims
from fastsd.data.building.decode import decode
from fastsd.data.building.machines import Division
from fastsd.data.building.store import Shard, Store
from fastsd.data.sources import folders, imported_latents
from fastsd.data.sources.folders import DataSource, Rejected
from fastsd.errors import UserError, out_of_memory
from fastsd.model.latent_space import LatentSpace

_WRITES_AHEAD = 8  # encoded blocks that may wait for the disk
_POLL_SECONDS = 0.2  # between two checks for blocks that other processes have left undone


class LatentEncoder(Protocol):
    """The interface of a VAE that a cache is built with. `fastsd.model.vae.Vae` implements it.

    `encode` takes images, fp32 (B, 3, H, W) in [-1, 1], and returns the raw posterior mean (B, C, h, w). The images are on
    `device` if the encoder has this attribute, otherwise on the CPU. An encoder that computes in a dtype below fp32 may also
    have `encode_fp32`, which encodes the rare image that overflows.
    """

    @property
    def hash(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def latent_space(self) -> LatentSpace: ...
    @property
    def channels(self) -> int: ...
    @property
    def downscale(self) -> int: ...
    def encode(self, images_B3HW: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class CacheProgress:
    """Progress of a build, for the line that the user watches."""

    phase: str  # "scan", "masks", "encode" (counts images that were not cached before), "states" (captions) or "audit"
    done: int
    total: int  # 0 = unknown, during "scan"
    images_per_second: float
    limit: str = ""  # the pipeline step that the others wait for: "decode", "encode" or "write"


@dataclass(frozen=True)
class _Row:
    number: int
    version: int
    content: bytes
    key: bytes
    source: DataSource
    width: int
    height: int


@dataclass
class _Block:
    """A block in progress. `loading` has a future for each content, which returns its pixels."""

    shard: Shard
    first: int
    rows: list[_Row]
    loading: list[Future[list[np.ndarray]]] = field(default_factory=list)
    rejections: list[tuple[_Row, Rejected]] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoded:
    """A block that can be written. `rows` has the number and the bytes of each row."""

    block: _Block
    rows: list[tuple[int, bytes]]


class Pipeline:
    """Encodes the planned rows of one space that a config needs.

    Args:
        workers: number of threads in `pool`.
        reject: rejects a row in the database of a store. It is called within a transaction.
        report: receives a `CacheProgress` after every block.
        division: divides the shards among machines.
    """

    def __init__(
        self,
        config: Config,
        vae: LatentEncoder,
        store: Store,
        space: int,
        pool: ThreadPoolExecutor,
        workers: int,
        reject: Callable[[Store, bytes, bytes, Rejected], None],
        report: Callable[[CacheProgress], None],
        division: Division,
    ) -> None:
        self.division = division
        self.config, self.vae, self.store, self.space = config, vae, store, space
        self.pool, self.workers, self.reject, self.report = pool, workers, reject, report
        self.buckets = Buckets(config.data.resolution, config.data.buckets)
        self.dtype = cache.DTYPES[config.cache.dtype]
        self.device = getattr(vae, "device", torch.device("cpu"))
        self.claims = Claims(store.home)
        self.clock = Clock(workers)
        self.encoded = 0
        self.query_values = (space, json.dumps(cache.stored_versions(config.data)))

    def run(self) -> None:
        """Run until all rows are done, by this process or by others."""
        total, done = self._pending_count(), 0
        start = time.perf_counter()
        loading_blocks: deque[_Block] = deque()
        read_ahead = 1 + -(-2 * self.workers // self.config.cache.batch)

        with contextlib.closing(self.claims), _Writer(self) as writer:
            while self._has_pending():
                previous = None
                for block in itertools.chain(self._claimed(), [None] * (read_ahead + 1)):
                    if block:
                        self._load(block)
                        loading_blocks.append(block)
                    if loading_blocks and (block is None or len(loading_blocks) > read_ahead):
                        current = self._encode(loading_blocks.popleft())
                        if previous:
                            done += self._hand_over(previous, writer)
                            self._report_progress(min(done, total), total, start)
                        previous = current
                if previous:
                    done += self._hand_over(previous, writer)
                    self._report_progress(min(done, total), total, start)
                elif self._has_pending():  # the last blocks are with other processes or with the writer
                    time.sleep(_POLL_SECONDS)
                writer.drain()
                self.publish(self.store, self.store.shards(self.space))  # also those of a process that was killed
                self.division.collect(self.store)

    def _report_progress(self, done: int, total: int, start: float) -> None:
        self.report(CacheProgress("encode", done, total, done / (time.perf_counter() - start), self.clock.limit()))

    _PENDING_ROWS = (
        "FROM latent WHERE space = ? AND version IN (SELECT value FROM json_each(?)) AND sha256 IS NULL AND EXISTS"
        " (SELECT 1 FROM sample WHERE sample.content = latent.content AND reason IS NULL)"
    )

    def _pending_count(self) -> int:
        return int(self.store.db.execute(f"SELECT COUNT(*) {self._PENDING_ROWS}", self.query_values).fetchone()[0])

    def _has_pending(self) -> bool:
        return bool(self.store.db.execute(f"SELECT EXISTS (SELECT 1 {self._PENDING_ROWS})", self.query_values).fetchone()[0])

    def publish(self, store: Store, shards: Iterable[Shard]) -> None:
        """Give other machines the shards that are finished here."""
        for shard in self.division.unpublished(shards):
            query = f"SELECT EXISTS (SELECT 1 {self._PENDING_ROWS} AND shard = ?)"
            if not store.db.execute(query, (*self.query_values, shard.id)).fetchone()[0]:
                self.division.publish_shard(store, shard)

    def _claimed(self) -> Iterator[_Block]:
        """Claim and yield the blocks that no other process has claimed. They have only rows that must be encoded."""
        batch = self.config.cache.batch
        columns = "path, file, offset, length, width, height"
        query = (
            f"SELECT row, version, latent.content, {columns} FROM latent JOIN sample ON sample.id ="
            " (SELECT id FROM sample WHERE sample.content = latent.content AND reason IS NULL ORDER BY id LIMIT 1)"
            " WHERE space = ? AND version IN (SELECT value FROM json_each(?)) AND shard = ? AND row >= ? AND row < ?"
            " AND sha256 IS NULL ORDER BY row"
        )

        for shard in self.store.shards(self.space):
            block_numbers = self.store.db.execute(
                "SELECT DISTINCT row / ? FROM latent WHERE space = ? AND shard = ? AND sha256 IS NULL ORDER BY 1",
                (batch, self.space, shard.id),
            ).fetchall()
            if not block_numbers or not self.division.take(shard):
                continue
            self.division.collect(self.store)
            for (number,) in block_numbers:
                first = number * batch
                if not self.claims.take(shard.id, first, batch):
                    continue
                # Query after the claim, because another process may have finished the block before.
                results = self.store.db.execute(query, (*self.query_values, shard.id, first, first + batch)).fetchall()
                rows = [
                    _Row(row, version, content, key, DataSource(os.fsdecode(file), offset=offset, length=length), width, height)
                    for row, version, content, key, file, offset, length, width, height in results
                ]
                if rows:
                    yield _Block(shard, first, rows)
                else:
                    self.claims.release(shard.id, first, batch)

    def _load(self, block: _Block) -> None:
        for _, rows in itertools.groupby(block.rows, lambda row: row.content):
            block.loading.append(self.pool.submit(self._decode, list(rows), tuple(block.shard.shape)))

    def _decode(self, rows: list[_Row], shape: tuple[int, ...]) -> list[np.ndarray]:
        """Load the versions of one content: pixels, uint8 (3, H, W), or imported latents. Raises Rejected."""
        start = time.perf_counter()
        row = rows[0]
        data = read_content(row.source, row.content)
        settings = self.config.data
        if settings.latents:
            mean, mirrored = imported_latents.read_latent(data, settings.latents)
            if mean.shape != shape:
                raise Rejected(f"latent has shape {list(mean.shape)}, expected {list(shape)} for this VAE")
            if mirrored is None and settings.flip:
                raise Rejected("has no mirrored latents, which data.flip needs")
            outputs = [mean if row.version == 0 or mirrored is None else mirrored for row in rows]
        else:
            place, outputs = self.buckets.place(row.width, row.height), []
            for crop, versions in itertools.groupby(rows, lambda row: row.version // 2):
                pixels = decode(data, place, crop_position(settings.crop, row.content, crop))
                mirrors = [row.version % 2 for row in versions]
                outputs += [np.ascontiguousarray(pixels[..., ::-1]) if mirror else pixels for mirror in mirrors]
        self.clock.decoded(time.perf_counter() - start, len(rows))
        return outputs

    def _encode(self, block: _Block) -> tuple[_Block, list[_Row], Tensor, Tensor]:
        """Start to encode a block. Return it and its rows, images and means, which a GPU may still be computing."""
        pixels: list[np.ndarray] = []
        rows: list[_Row] = []
        with self.clock.waiting("decode"):
            by_content = itertools.groupby(block.rows, lambda row: row.content)
            for future, (_, content_rows) in zip(block.loading, by_content, strict=True):
                group = list(content_rows)
                try:
                    pixels += future.result()
                    rows += group
                except Rejected as error:
                    block.rejections += [(row, error) for row in group]
        block.loading = []
        with self.clock.busy("encode"):
            images = self._on_device(pixels, block.shard.shape)
            encode = (lambda latents: latents) if self.config.data.latents else self.vae.encode
            return block, rows, images, self._means(encode, images, block.shard.shape)

    def _on_device(self, pixels: list[np.ndarray], shape: list[int]) -> Tensor:
        if not pixels:
            return torch.empty(0)
        stacked = torch.from_numpy(np.stack(pixels)).to(self.device)
        return stacked if self.config.data.latents else stacked.float().div_(127.5).sub_(1)

    def _means(self, encode: Callable[[Tensor], Tensor], images: Tensor, shape: list[int]) -> Tensor:
        if not len(images):
            return torch.empty(0, *shape, dtype=self.dtype)
        try:
            with torch.no_grad():
                means = encode(images)
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            batch = self.config.cache.batch
            advice = f"lower it, for example to {batch // 2}" if batch > 1 else "lower data.resolution"
            raise UserError("cache-batch-memory", f"cache.batch is {batch}, too large for the GPU's memory; {advice}") from None
        assert list(means.shape) == [len(images), *shape], f"the VAE returned shape {list(means.shape)}"
        return means.to(self.dtype)

    def _hand_over(self, encoding: tuple[_Block, list[_Row], Tensor, Tensor], writer: _Writer) -> int:
        """Queue a block for writing and return its number of rows. Overflowed images are encoded again, alone and in fp32."""
        block, rows, images, means = encoding
        encoded_rows: list[tuple[int, bytes]] = []
        with self.clock.busy("encode"):
            means = means.cpu()
            is_finite = means.flatten(1).isfinite().all(1).tolist()
            for i, row in enumerate(rows):
                mean = means[i]
                if not is_finite[i] and not self.config.data.latents:
                    encode_fp32 = getattr(self.vae, "encode_fp32", self.vae.encode)
                    mean = self._means(encode_fp32, images[i : i + 1], block.shard.shape)[0].cpu()
                if mean.isfinite().all():
                    encoded_rows.append((row.number, mean.contiguous().view(torch.uint8).numpy().tobytes()))
                else:
                    block.rejections.append((row, Rejected(f"latent is not finite in {self.config.cache.dtype}")))
        with self.clock.waiting("write"):
            writer.put(_Encoded(block, encoded_rows))
        self.encoded += len(encoded_rows)
        self.clock.images["encode"] += len(encoded_rows)
        return len(block.rows)


def read_content(source: DataSource, content: bytes) -> bytes:
    """Read the bytes of an image, whose sha256 must still be `content`. Raises Rejected."""
    data = folders.read_bytes(source)
    if hashlib.sha256(data).digest() != content:
        raise Rejected("changed while it was being cached; run the same command again", lasting=False)
    return data


class Clock:
    """Measures how long each pipeline step was busy, and how long the main thread waited for decoding and writing."""

    def __init__(self, workers: int):
        self.workers, self._lock = workers, threading.Lock()
        self.seconds = dict.fromkeys(("decode", "encode", "write"), 0.0)
        self.images = dict.fromkeys(self.seconds, 0)
        self.waited = {"decode": 0.0, "write": 0.0}

    def decoded(self, seconds: float, images: int) -> None:
        with self._lock:
            self.seconds["decode"] += seconds / self.workers
            self.images["decode"] += images

    @contextlib.contextmanager
    def busy(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited[step] += time.perf_counter() - start

    def limit(self) -> str:
        """Return the pipeline step that the others wait for."""
        return max({**self.waited, "encode": self.seconds["encode"]}.items(), key=lambda item: item[1])[0]


class _Writer:
    """A thread that writes rows to the disk and then marks them as done. If it falls behind, a commit has several blocks."""

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._queue: queue.Queue[_Encoded | threading.Event | None] = queue.Queue(_WRITES_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fastsd-write", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._queue.put(None)
        self._thread.join()

    def put(self, encoded: _Encoded) -> None:
        self._queue.put(encoded)
        if self._error:
            raise self._error

    def drain(self) -> None:
        """Wait until all queued blocks are on disk."""
        marker = threading.Event()
        self._queue.put(marker)
        marker.wait()
        if self._error:
            raise self._error

    def _run(self) -> None:
        item: _Encoded | threading.Event | None = threading.Event()
        try:
            with self._pipeline.store.reopen() as store:
                store.attach(self._pipeline.store.work)
                item = self._queue.get()
                while item is not None:
                    items: list[_Encoded] = []
                    while isinstance(item, _Encoded) and len(items) < _WRITES_AHEAD:
                        items.append(item)
                        item = self._queue.get() if not self._queue.empty() else threading.Event()
                    with self._pipeline.clock.busy("write"):
                        self._write(store, items)
                    if isinstance(item, threading.Event):
                        item.set()
                        item = self._queue.get()
        except BaseException as error:  # `put` and `drain` raise it and must not wait forever
            self._error = error
            while item is not None:
                if isinstance(item, threading.Event):
                    item.set()
                item = self._queue.get()

    def _write(self, store: Store, items: list[_Encoded]) -> None:
        pipeline = self._pipeline
        rows_by_shard: dict[int, tuple[Shard, list[tuple[int, bytes]]]] = {}
        for item in items:
            rows_by_shard.setdefault(item.block.shard.id, (item.block.shard, []))[1].extend(item.rows)
        for shard, rows in rows_by_shard.values():
            store.write(shard, rows)
        with store.transaction():
            for shard, rows in rows_by_shard.values():
                store.mark_done(shard, rows)
            for item in items:
                for row, rejection in item.block.rejections:
                    pipeline.reject(store, row.content, row.key, rejection)
        pipeline.publish(store, [shard for shard, _ in rows_by_shard.values()])
        for item in items:
            pipeline.clock.images["write"] += len(item.rows)
            pipeline.claims.release(item.block.shard.id, item.block.first, pipeline.config.cache.batch)
