"""From planned rows to shards on the disk: decoding threads -> VAE -> a writing thread, each ahead of the next.

Work goes in blocks: `cache.batch` neighbouring rows of a shard, so of one shape.  A block is claimed, decoded, encoded,
written, flushed, and only then marked as done by one commit: a process that is killed loses the blocks it had in hand, and
whoever comes next writes the same bytes to the same places.  Blocks that another process has claimed are left to it; if it
dies, its claims are free again.

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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import Config
from fastsd.data import cache
from fastsd.data.building.buckets import Buckets, cut_at
from fastsd.data.building.decode import decode
from fastsd.data.building.store import Claims, Shard, Store
from fastsd.data.sources import folders, imported_latents
from fastsd.data.sources.folders import Rejected, Source
from fastsd.errors import UserError

_WRITES_AHEAD = 8  # encoded blocks that may wait for the disk
_PATIENCE = 0.2  # seconds between looks at what other processes have left


class Encoder(Protocol):
    """What caching needs of a VAE; `fastsd.model.vae.Vae` is one.

    `encode` takes fp32 (B, 3, H, W) in [-1, 1], on `device` if the encoder has one, else on the CPU, and returns the raw
    posterior mean (B, C, h, w). An encoder that computes below fp32 may offer `encode_fp32` too, for the rare image that
    overflows.
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
    def encode(self, images_B3HW: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """For a live line. `phase`: "scan" (total unknown: 0), "masks" or "encode" (what was not cached yet); `limit`: the stage
    that holds up the others, "decode", "encode" or "write"."""

    phase: str
    done: int
    total: int
    images_per_second: float
    limit: str = ""


@dataclass(frozen=True)
class _Row:
    number: int
    version: int
    content: bytes
    key: bytes
    source: Source
    width: int
    height: int


@dataclass
class _Block:
    """Rows of one shard in hand. `loading`: their pixels, a future a content."""

    shard: Shard
    first: int
    rows: list[_Row]
    loading: list[Future[list[np.ndarray]]] = field(default_factory=list)
    refused: list[tuple[_Row, Rejected]] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoded:
    """A block that the writer is to finish: its rows' numbers and bytes."""

    block: _Block
    rows: list[tuple[int, bytes]]


class Pipeline:
    """Encodes what is planned and wanted in one space.

    Args:
        workers: threads of `pool`, for the reckoning.
        reject: puts a row aside in the database, within a transaction on the given store.
        report: is given a `Progress` a block.
    """

    def __init__(
        self, config: Config, vae: Encoder, store: Store, space: int, pool: ThreadPoolExecutor, workers: int,
        reject: Callable[[Store, bytes, bytes, Rejected], None], report: Callable[[Progress], None],
    ) -> None:  # fmt: skip
        self.config, self.vae, self.store, self.space = config, vae, store, space
        self.pool, self.workers, self.reject, self.report = pool, workers, reject, report
        self.buckets = Buckets(config.data.resolution, config.data.buckets)
        self.dtype = cache.DTYPES[config.cache.dtype]
        self.device = getattr(vae, "device", torch.device("cpu"))
        self.claims = Claims(store.folder)
        self.clock = Clock(workers)
        self.encoded = 0
        self.wanted = (space, json.dumps(cache.stored_versions(config.data)))

    def run(self) -> None:
        """Until nothing is left to do, here or in another process."""
        total, start, done = self._pending(), time.perf_counter(), 0
        ahead: deque[_Block] = deque()
        depth = 1 + -(-2 * self.workers // self.config.cache.batch)
        with contextlib.closing(self.claims), _Writer(self) as writer:
            while self._unfinished():
                at_work = None
                for block in itertools.chain(self._claimed(), [None] * (depth + 1)):
                    if block:
                        self._load(block)
                        ahead.append(block)
                    if ahead and (block is None or len(ahead) > depth):
                        following = self._encode(ahead.popleft())
                        if at_work:
                            done += self._hand_over(at_work, writer)
                            self._say(min(done, total), total, start)
                        at_work = following
                if at_work:
                    done += self._hand_over(at_work, writer)
                    self._say(min(done, total), total, start)
                elif self._unfinished():  # the rest is in other hands, or waits for this process's own disk
                    time.sleep(_PATIENCE)
                writer.drain()

    def _say(self, done: int, total: int, start: float) -> None:
        self.report(Progress("encode", done, total, done / (time.perf_counter() - start), self.clock.limit()))

    _WANTED = (
        "FROM latent WHERE space = ? AND version IN (SELECT value FROM json_each(?)) AND sha256 IS NULL AND EXISTS"
        " (SELECT 1 FROM sample WHERE sample.content = latent.content AND reason IS NULL)"
    )

    def _pending(self) -> int:
        return int(self.store.db.execute(f"SELECT COUNT(*) {self._WANTED}", self.wanted).fetchone()[0])

    def _unfinished(self) -> bool:
        return bool(self.store.db.execute(f"SELECT EXISTS (SELECT 1 {self._WANTED})", self.wanted).fetchone()[0])

    def _claimed(self) -> Iterator[_Block]:
        """Fixed blocks of `cache.batch` rows of a shard, less those that are done, not wanted, or in other hands."""
        batch = self.config.cache.batch
        columns = "path, file, offset, length, width, height"
        query = (
            f"SELECT row, version, latent.content, {columns} FROM latent JOIN sample ON sample.id ="
            " (SELECT id FROM sample WHERE sample.content = latent.content AND reason IS NULL ORDER BY id LIMIT 1)"
            " WHERE space = ? AND version IN (SELECT value FROM json_each(?)) AND shard = ? AND row >= ? AND row < ?"
            " AND sha256 IS NULL ORDER BY row"
        )
        for shard in self.store.shards(self.space):
            firsts = self.store.db.execute(
                "SELECT DISTINCT row / ? FROM latent WHERE space = ? AND shard = ? AND sha256 IS NULL ORDER BY 1",
                (batch, self.space, shard.id),
            ).fetchall()
            for (number,) in firsts:
                first = number * batch
                if not self.claims.take(shard.id, first, batch):
                    continue
                # Asked for after the claim: another process may have finished the block just before.
                found = self.store.db.execute(query, (*self.wanted, shard.id, first, first + batch)).fetchall()
                rows = [
                    _Row(row, version, content, key, Source(_path(file), offset=offset, length=length), width, height)
                    for row, version, content, key, file, offset, length, width, height in found
                ]
                if rows:
                    yield _Block(shard, first, rows)
                else:
                    self.claims.give_back(shard.id, first, batch)

    def _load(self, block: _Block) -> None:
        for _, rows in itertools.groupby(block.rows, lambda row: row.content):
            block.loading.append(self.pool.submit(self._decode, list(rows), tuple(block.shard.shape)))

    def _decode(self, rows: list[_Row], shape: tuple[int, ...]) -> list[np.ndarray]:
        """All wanted versions of one content: uint8 (3, H, W), or imported latents. Raises Rejected."""
        start = time.perf_counter()
        row = rows[0]
        data = folders.read_bytes(row.source)
        if hashlib.sha256(data).digest() != row.content:
            raise Rejected("it changed while it was being cached; run the same line again", lasting=False)
        settings = self.config.data
        if settings.latents:
            mean, mirrored = imported_latents.read_latent(data, settings.latents)
            if mean.shape != shape:
                raise Rejected(f"it holds a latent {mean.shape}, where this VAE has {shape}")
            if mirrored is None and settings.flip:
                raise Rejected("it holds no mirrored latents, which data.flip asks for")
            found = [mean if row.version == 0 or mirrored is None else mirrored for row in rows]
        else:
            place, found = self.buckets.place(row.width, row.height), []
            for crop, versions in itertools.groupby(rows, lambda row: row.version // 2):
                pixels = decode(data, place, cut_at(settings.crop, row.content, crop))
                mirrors = [row.version % 2 for row in versions]
                found += [np.ascontiguousarray(pixels[..., ::-1]) if mirror else pixels for mirror in mirrors]
        self.clock.decoded(time.perf_counter() - start, len(rows))
        return found

    def _encode(self, block: _Block) -> tuple[_Block, list[_Row], Tensor, Tensor]:
        """Start the VAE on a block: rows, images and means, which are still being computed on a GPU."""
        pixels: list[np.ndarray] = []
        rows: list[_Row] = []
        with self.clock.waiting("decode"):
            for future, (_, wanted) in zip(
                block.loading, itertools.groupby(block.rows, lambda row: row.content), strict=True
            ):  # fmt: skip
                group = list(wanted)
                try:
                    pixels += future.result()
                    rows += group
                except Rejected as error:
                    block.refused += [(row, error) for row in group]
        block.loading = []
        with self.clock.busy("encode"):
            images = self._on_device(pixels, block.shard.shape)
            encode = self.vae.encode if not self.config.data.latents else _as_they_are
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
        except torch.OutOfMemoryError:
            batch = self.config.cache.batch
            raise UserError(f"cache.batch is {batch}, too much for this GPU's memory; lower it, {batch // 2 or 1}") from None
        assert list(means.shape) == [len(images), *shape], f"the VAE returned {list(means.shape)}"
        return means.to(self.dtype)

    def _hand_over(self, at_work: tuple[_Block, list[_Row], Tensor, Tensor], writer: _Writer) -> int:
        """Take the means from the device, try those that are not finite alone in fp32, give all to the writer."""
        block, rows, images, means = at_work
        done: list[tuple[int, bytes]] = []
        with self.clock.busy("encode"):
            means = means.cpu()
            fine = means.flatten(1).isfinite().all(1).tolist()
            for i, row in enumerate(rows):
                mean = means[i]
                if not fine[i] and not self.config.data.latents:
                    again = getattr(self.vae, "encode_fp32", self.vae.encode)
                    mean = self._means(again, images[i : i + 1], block.shard.shape)[0].cpu()
                if mean.isfinite().all():
                    done.append((row.number, mean.contiguous().view(torch.uint8).numpy().tobytes()))
                else:
                    block.refused.append((row, Rejected(f"its latent is not finite in {self.config.cache.dtype}")))
        with self.clock.waiting("write"):
            writer.put(_Encoded(block, done))
        self.encoded += len(done)
        self.clock.images["encode"] += len(done)
        return len(block.rows)


class Clock:
    """Seconds each stage was at work, and seconds the main thread waited for its neighbours."""

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
    def busy(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited[stage] += time.perf_counter() - start

    def limit(self) -> str:
        """The stage the others wait for."""
        return max({**self.waited, "encode": self.seconds["encode"]}.items(), key=lambda item: item[1])[0]


def _path(file: bytes) -> str:
    return os.fsdecode(file)


def _as_they_are(latents: Tensor) -> Tensor:
    return latents


class _Writer:
    """The thread that puts rows on the disk and then into the database, several blocks a commit when it falls behind."""

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
        """Until everything given is on the disk."""
        reached = threading.Event()
        self._queue.put(reached)
        reached.wait()
        if self._error:
            raise self._error

    def _run(self) -> None:
        item: _Encoded | threading.Event | None = threading.Event()
        try:
            with Store.open(self._pipeline.store.folder, lock="") as store:
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
        except BaseException as error:  # it belongs to the main thread, which must not wait for this one for ever
            self._error = error
            while item is not None:
                if isinstance(item, threading.Event):
                    item.set()
                item = self._queue.get()

    def _write(self, store: Store, items: list[_Encoded]) -> None:
        pipeline = self._pipeline
        done: dict[int, tuple[Shard, list[tuple[int, bytes]]]] = {}
        for item in items:
            done.setdefault(item.block.shard.id, (item.block.shard, []))[1].extend(item.rows)
        for shard, rows in done.values():
            store.write(shard, rows)
        with store.transaction():
            for shard, rows in done.values():
                store.mark_done(shard, rows)
            for item in items:
                for row, refusal in item.block.refused:
                    pipeline.reject(store, row.content, row.key, refusal)
        for item in items:
            pipeline.clock.images["write"] += len(item.rows)
            pipeline.claims.give_back(item.block.shard.id, item.block.first, pipeline.config.cache.batch)
