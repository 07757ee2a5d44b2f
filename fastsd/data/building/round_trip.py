"""Send every image of a config through a VAE and back, and measure what changes, at the size and crop at which it is cached.

With x the pixels of the crop and y those of its reconstruction, both in [0, 255], d = y - x is the error of a pixel:

    error      mean |d| over the pixels and the three colours
    fine       mean |d - b * d|, the part of the error in high frequencies. b is the binomial filter (1 2 1)^T (1 2 1) / 16,
               with edges replicated. It removes the highest frequency and keeps flat areas, so what is left are details of one
               to three pixels: small letters, thin lines, texture.

A tile is a square of `TILE` pixels, smaller at the right and lower edge. It has both errors too.

The encoder's mean is read from the cache if it is there, otherwise encoded and rounded as for the cache. Images are encoded and
decoded one at a time, so a result does not depend on other images. Of several crops, the first is measured. Masks and mirror
images change nothing. Results lie in the table `audit` of cache.sqlite, by image content and all that determines them. They
are committed after every `cache.batch` images, so a process that is killed loses no more.

Shapes: H x W pixels, C x h x w latents, V VAEs, N images, R x S tiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastsd.config.schema import Config
from fastsd.data import cache
from fastsd.data.building import collect
from fastsd.data.building.buckets import Buckets, Size, crop_position
from fastsd.data.building.build import CacheProgress, ProgressCallback, check_resolution
from fastsd.data.building.decode import decode
from fastsd.data.building.machines import Alone
from fastsd.data.building.pipeline import Clock, read_content
from fastsd.data.building.store import Shard, Store
from fastsd.data.sources import folders
from fastsd.data.sources.image import DataSource, Rejected, shown
from fastsd.errors import Stopped, UserError, out_of_memory
from fastsd.model.vae import Vae

TILE = 64  # px
_VERSION = 1  # of the measurement. Increment it when a change of the code changes the results.
_TABLE = (
    "CREATE TABLE IF NOT EXISTS audit (codec BLOB, content BLOB, error REAL, fine REAL, tiles BLOB,"
    " PRIMARY KEY (codec, content)) WITHOUT ROWID"
)
MEASURES = ("error", "fine")  # in the order of `Distortion.tiles`
# Orders of results by one of them: that of the first VAE, or the second VAE's minus the first one's.
WORST, GAIN, LOSS = "a.{0} DESC", "b.{0} - a.{0} DESC", "b.{0} - a.{0}"


@dataclass(frozen=True)
class Distortion:
    """Errors of an image after its way through a VAE, in units of 1/255 of the range of a pixel.

    Attributes:
        error, fine: both errors of the whole image.
        tiles: both errors of each tile, (2, R, S) in fp16.
    """

    error: float
    fine: float
    tiles: np.ndarray


def distortion(pixels_3HW: Tensor, decoded_3HW: Tensor) -> Distortion:
    """Compare an image, uint8, with its reconstruction, which is in [-1, 1]."""
    difference = (decoded_3HW.float() + 1) * 127.5 - pixels_3HW
    row = torch.tensor([0.25, 0.5, 0.25], device=difference.device)
    kernel = torch.outer(row, row).expand(3, 1, 3, 3)
    blurred = F.conv2d(F.pad(difference[None], (1, 1, 1, 1), mode="replicate"), kernel, groups=3)[0]
    errors_2HW = torch.stack([difference, difference - blurred]).abs().mean(1)
    tiles = F.avg_pool2d(errors_2HW, TILE, ceil_mode=True, count_include_pad=False)
    error, fine = errors_2HW.double().mean((1, 2)).tolist()
    return Distortion(error, fine, tiles.half().cpu().numpy())


class AuditedImage(NamedTuple):
    """An image file in the folders: its row in the table `sample`."""

    id: int
    path: bytes
    file: bytes
    offset: int
    length: int
    content: bytes
    width: int
    height: int

    @property
    def name(self) -> str:
        return shown(self.path)


@dataclass(frozen=True)
class Result:
    """An image, the size in px at which it is cached, its distortion by each VAE, and the measure that sorts the results."""

    image: AuditedImage
    size: Size
    distortions: tuple[Distortion, ...]
    by: str

    @property
    def values(self) -> list[float]:
        """The measure of the whole image, with each VAE."""
        return [getattr(distortion, self.by) for distortion in self.distortions]

    @property
    def gain(self) -> float:
        """The measure with the second VAE minus that with the first."""
        return self.values[1] - self.values[0]

    @property
    def tiles(self) -> np.ndarray:
        """The measure of each tile, (V, R, S) in fp16."""
        return np.stack([distortion.tiles[MEASURES.index(self.by)] for distortion in self.distortions])


def largest(tiles_RS: np.ndarray) -> tuple[int, int]:
    """Return the row and the column of the tile with the largest value."""
    row, column = np.unravel_index(tiles_RS.argmax(), tiles_RS.shape)
    return int(row), int(column)


@contextlib.contextmanager
def open_audit(config: Config, vaes: Sequence[Vae], report: ProgressCallback, notify: Callable[[str], None]) -> Iterator[Audit]:
    """List the images of a config, and yield their audit by one VAE or two. One process at a time can audit a cache.

    Raises:
        UserError: there is a problem with a folder, the resolution or the disk, or the config imports latents.
        Stopped: the user has pressed Ctrl-C in the block. The results so far remain.
    """
    if config.data.latents:
        problem = f"data.latents is {config.data.latents!r}, so the images themselves are not read"
        raise UserError("audit-imported", f"{problem}; remove data.latents to audit them")
    for vae, component in zip(vaes, ("VAE", "VAE of --against"), strict=False):
        check_resolution(config, vae.downscale, component=component)
    unused: list[tuple[str, str]] = []
    sources = folders.scan_for(config.data, lambda path, reason: unused.append((path, reason)))
    workers = config.cache.workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastsd-decode")
    try:
        with (
            warnings.catch_warnings(),
            Store.open(Path(config.cache.dir), create=True, lock="shared") as store,
            collect.one_at_a_time(store, notify, "audit", "auditing this cache"),
        ):
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as for a cache
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            store.db.execute(_TABLE)
            audit = Audit(config, vaes, store, pool, workers, report)

            def prepare() -> None:
                space = audit.space(vaes[0])
                collect.fill(store, space, sources, unused, config.data, vaes[0].downscale, pool, report, Alone(store.folder))

            # Not the table of the view, which a `fastsd cache` that starts meanwhile would take for one with planned rows.
            with collect.sample_table(store, f"audit-{cache.view_name(config, vaes[0].hash)}", prepare, notify):
                yield audit
    except KeyboardInterrupt:
        raise Stopped(f"{config.cache.dir}: the audit stopped") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Audit:
    """The audit of a config's images by V VAEs. See `open_audit`.

    Attributes:
        codecs: the key of each VAE in the table `audit`.
        measured: number of images that `run` has measured.
    """

    def __init__(
        self,
        config: Config,
        vaes: Sequence[Vae],
        store: Store,
        pool: ThreadPoolExecutor,
        workers: int,
        report: ProgressCallback,
    ) -> None:
        self.config, self.vaes, self.store, self.pool, self.report = config, vaes, store, pool, report
        self.db, self.measured = store.db, 0
        self._ahead, self._clock = 2 * workers, Clock(workers)
        self._buckets = Buckets(config.data.resolution, config.data.buckets)
        self._dtype = cache.DTYPES[config.cache.dtype]
        self.codecs = [self._codec(vae) for vae in vaes]

    def _codec(self, vae: Vae) -> bytes:
        """Return the key of all that determines the result of an image."""
        return bytes.fromhex(cache.digest(_VERSION, TILE, vae.hash, vae.decoder_hash, cache.preprocessing(self.config))[:16])

    def space(self, vae: Vae) -> int:
        """Return the id of the space with the cached latents of a VAE, or 0 if nothing was cached with it."""
        query = "SELECT id FROM space WHERE name = ?"
        row = self.db.execute(query, (cache.space_name(self.config, vae.hash),)).fetchone()
        return int(row[0]) if row else 0

    def run(self) -> None:
        """Measure the images without a result. Those that cannot be measured are rejected, and tried again the next time."""
        missing = " OR ".join(
            "NOT EXISTS (SELECT 1 FROM audit WHERE codec = ? AND content = sample.content)" for _ in self.vaes
        )
        query = (
            f"SELECT MIN(id) FROM sample WHERE reason IS NULL AND ({missing}) GROUP BY content"
            " ORDER BY bucket_height, bucket_width, 1"
        )
        ids = np.fromiter((id for (id,) in self.db.execute(query, self.codecs)), np.int64)
        batch, start = self.config.cache.batch, time.perf_counter()
        results: list[tuple[object, ...]] = []
        rejections: list[tuple[str, bytes]] = []
        for done, (image, loading) in enumerate(self._loading(ids), 1):
            try:
                with self._clock.waiting("decode"):
                    pixels = loading.result()
                with self._clock.busy("encode"):
                    results += self._missing_results(image, pixels)
                self.measured += 1
            except Rejected as error:
                rejections.append((error.reason, image.content))
            if done % batch == 0 or done == len(ids):
                with self.store.transaction():
                    self.db.executemany("REPLACE INTO audit VALUES (?, ?, ?, ?, ?)", results)
                    self.db.executemany("UPDATE sample SET reason = ? WHERE content = ?", rejections)
                results, rejections = [], []
                rate = done / (time.perf_counter() - start)
                self.report(CacheProgress("audit", done, len(ids), rate, self._clock.limit()))

    def _loading(self, ids: np.ndarray) -> Iterator[tuple[AuditedImage, Future[np.ndarray]]]:
        """Yield images with their pixels, which threads decode in advance."""
        queue: deque[tuple[AuditedImage, Future[np.ndarray]]] = deque()
        for id in ids.tolist():
            image = self._image(id)
            queue.append((image, self.pool.submit(self.pixels, image)))
            if len(queue) > self._ahead:
                yield queue.popleft()
        while queue:
            yield queue.popleft()

    def _image(self, id: int) -> AuditedImage:
        columns = ", ".join(AuditedImage._fields)
        return AuditedImage(*self.db.execute(f"SELECT {columns} FROM sample WHERE id = ?", (id,)).fetchone())

    def pixels(self, image: AuditedImage) -> np.ndarray:
        """Decode the first crop of an image as for the cache: uint8 (3, H, W). Raises Rejected."""
        start = time.perf_counter()
        source = DataSource(os.fsdecode(image.file), offset=image.offset, length=image.length)
        place = self._buckets.place(image.width, image.height)
        position = crop_position(self.config.data.crop, image.content, 0)
        pixels = decode(read_content(source, image.content), place, position)
        self._clock.decoded(time.perf_counter() - start, 1)
        return pixels

    def _missing_results(self, image: AuditedImage, pixels: np.ndarray) -> list[tuple[object, ...]]:
        query = "SELECT 1 FROM audit WHERE codec = ? AND content = ?"
        results: list[tuple[object, ...]] = []
        for index, codec in enumerate(self.codecs):
            if not self.db.execute(query, (codec, image.content)).fetchone():
                errors = distortion(
                    torch.from_numpy(pixels).to(self.vaes[index].device), self.reconstruct(image, pixels, index)
                )
                results.append((codec, image.content, errors.error, errors.fine, errors.tiles.tobytes()))
        return results

    def reconstruct(self, image: AuditedImage, pixels_3HW: np.ndarray, index: int) -> Tensor:
        """Send an image through the VAE with this index and back: fp32 (3, H, W) in [-1, 1], on the VAE's device.

        Raises:
            Rejected: a latent or the reconstruction is not finite.
            UserError: the image does not fit into the memory of the device.
        """
        vae = self.vaes[index]
        try:
            mean_CHW = self._cached_mean(image.content, vae)
            if mean_CHW is None:
                mean_CHW = self._encode(pixels_3HW, vae)
            decoded_3HW = vae.decode(vae.scale(mean_CHW[None].to(vae.device).float()))[0]
        except Exception as error:
            if out_of_memory(error) is None:
                raise
            size, advice = f"{pixels_3HW.shape[2]} x {pixels_3HW.shape[1]} px", "lower data.resolution"
            advice += '; or set device = "cpu"' if vae.device.type != "cpu" else ""
            raise UserError(
                "audit-memory", f"an image of {size} is too large for the memory of {vae.device}; {advice}"
            ) from None
        if not decoded_3HW.isfinite().all():
            raise Rejected(f"its reconstruction is not finite in {self.config.cache.precision}")
        return decoded_3HW

    def _encode(self, pixels_3HW: np.ndarray, vae: Vae) -> Tensor:
        """Encode an image and round its mean as the cache does, also if it needs fp32."""
        images = torch.from_numpy(pixels_3HW)[None].to(vae.device).float().div_(127.5).sub_(1)
        mean = vae.encode(images).to(self._dtype)
        if not mean.isfinite().all():
            mean = vae.encode_fp32(images).to(self._dtype)
        if not mean.isfinite().all():
            raise Rejected(f"latent is not finite in {self.config.cache.dtype}")
        return mean[0]

    def _cached_mean(self, content: bytes, vae: Vae) -> Tensor | None:
        """Return the cached mean (C, h, w), or None if it is not there or damaged."""
        query = "SELECT shard, row, sha256 FROM latent WHERE space = ? AND content = ? AND version = 0 AND sha256 IS NOT NULL"
        row = self.db.execute(query, (self._spaces[vae.hash], content)).fetchone()
        if row is None or row[0] not in self._shards:
            return None
        shard = self._shards[row[0]]
        with contextlib.suppress(OSError, UserError):
            data = next(iter(shard.read_rows([row[1]])))
            if hashlib.sha256(data).digest() == row[2]:
                return torch.frombuffer(bytearray(data), dtype=self._dtype).view(shard.shape)
        return None

    @cached_property
    def _spaces(self) -> dict[str, int]:
        return {vae.hash: self.space(vae) for vae in self.vaes}

    @cached_property
    def _shards(self) -> dict[int, Shard]:
        return {shard.id: shard for space in self._spaces.values() if space for shard in self.store.shards(space)}

    def errors(self) -> np.ndarray:
        """Return both errors of all images by all VAEs, fp64 (V, 2, N)."""
        columns = ("a.error, a.fine", "b.error, b.fine")[: len(self.vaes)]
        rows = self.db.execute(f"SELECT {', '.join(columns)} {self._joined}", self.codecs)
        flat = np.fromiter((value for row in rows for value in row), np.float64)
        return flat.reshape(-1, len(self.vaes), 2).transpose(1, 2, 0)

    def results(self, order: str = WORST, by: str = MEASURES[0], limit: int = -1) -> Iterator[Result]:
        """Yield the results, sorted by a measure. Equal ones are sorted by path. There may be as many as images."""
        query = f"SELECT id, bucket_width, bucket_height {self._joined} ORDER BY {order.format(by)}, path LIMIT ?"
        for id, width, height in self.db.execute(query, (*self.codecs, limit)):
            image, distortions = self._image(id), []
            for codec in self.codecs:
                select = "SELECT error, fine, tiles FROM audit WHERE codec = ? AND content = ?"
                error, fine, tiles = self.db.execute(select, (codec, image.content)).fetchone()
                shape = 2, math.ceil(height / TILE), math.ceil(width / TILE)
                distortions.append(Distortion(error, fine, np.frombuffer(tiles, np.float16).reshape(shape)))
            yield Result(image, (width, height), tuple(distortions), by)

    @property
    def _joined(self) -> str:
        joins = [f"JOIN audit {name} ON {name}.codec = ? AND {name}.content = sample.content" for name in "ab"]
        return f"FROM sample {' '.join(joins[: len(self.vaes)])} WHERE reason IS NULL"

    def rejected(self) -> dict[str, int]:
        """Return the number of rejected files for each reason, the most frequent one first."""
        query = "SELECT reason, COUNT(*) FROM sample WHERE reason IS NOT NULL GROUP BY reason ORDER BY 2 DESC, 1"
        return dict(self.db.execute(query))
