"""Build a cache: encode every image with the VAE once, and write the latents to shards.

    collect.py      lists the images of the folders in a table of samples
    mask_cells.py   averages their masks over the cells of a latent
    this module     assigns a shard and a row to every distinct image content, before the first one is encoded
    pipeline.py     decodes and encodes the images, and writes the latents
    this module     freezes the view of all samples, see `cache.py`

During a build, the SQLite database defines the state of the cache, see `store.py`. A process that is killed loses only its
blocks in progress, and the next process writes the same bytes to the same places. Several processes, also under torchrun,
share the work.

Shapes: C x h x w latents, V versions (crops, mirror images) of an image.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastsd.config.schema import BucketTable, Config
from fastsd.data import cache
from fastsd.data.building import collect, lists, mask_cells
from fastsd.data.building.machines import Alone, Division, settle
from fastsd.data.building.pipeline import CacheProgress, LatentEncoder, Pipeline
from fastsd.data.building.store import Store, disk_errors
from fastsd.data.sources import folders, imported_latents
from fastsd.data.sources.folders import DataSource, Rejected, shown
from fastsd.errors import Stopped, UserError

_EXAMPLES = 20  # rejected images that are listed, and imported latents whose scale is checked


@dataclass(frozen=True)
class CacheCounts:
    """Result of building a cache."""

    images: int  # images in the folders: `cached` + `rejected`
    cached: int  # samples of the view
    latents: int  # distinct latents of these samples, in all versions
    encoded: int  # latents that this process has encoded
    rejected: int  # rejected images
    empty_captions: int  # samples without a caption
    reasons: dict[str, int]  # reason -> number of rejected images
    examples: list[str]  # "path: reason" of up to 20 rejected images
    view: str  # name of the view
    rates: dict[str, float]  # pipeline step -> images/s that it would reach alone, if it had work


ProgressCallback = Callable[[CacheProgress], None]


def build_cache(
    config: Config,
    vae: LatentEncoder,
    report: ProgressCallback | None = None,
    notify: Callable[[str], None] | None = None,
    division: Division | None = None,
) -> CacheCounts:
    """Bring the latents of `config` up to date and freeze their view.

    Only new images are encoded. After an interruption, the same call continues the build. Processes that make this call at the
    same time share the work.

    Args:
        notify: receives a line when the build must wait for another process.
        division: divides the work among machines; None = among the processes of this one.

    Raises:
        UserError: there is a problem with a folder, the resolution, the disk or the GPU's memory, or no image is usable.
        Stopped: the user has pressed Ctrl-C. The latents encoded so far remain in the cache.
    """
    check_resolution(config, vae.downscale)
    unused: list[tuple[str, str]] = []
    sources = folders.scan_for(config.data, lambda path, reason: unused.append((path, reason)))
    try:
        folder = Path(config.cache.dir)
        if division is None:
            settle(folder, notify or (lambda line: None))
            division = Alone(folder)
        with Store.open(folder, create=True, lock="shared", home=division.home) as store:
            build = _Build(config, vae, store, report or (lambda event: None), notify or (lambda line: None), division)
            return build.run(sources, unused)
    except KeyboardInterrupt:
        raise Stopped(f"{config.cache.dir}: caching stopped") from None


def check_resolution(config: Config, downscale: int, step: int = 0, component: str = "VAE") -> None:
    """Raise UserError unless `downscale` divides the step of the buckets or, without buckets, the resolution.

    The message names values that all rules allow: multiples of `step`, which the UNet needs of squares (0 = `downscale`), and
    steps that divide the sides of the buckets.
    """
    data = config.data
    field, size = ("buckets.step", data.buckets.step) if data.buckets else ("resolution", data.resolution)
    if size % downscale and not data.latents:  # imported latents have any size
        step = max(step, downscale)
        usable = [size // step * step, (size // step + 1) * step]
        near = " or ".join(str(multiple) for multiple in usable if multiple)
        if data.buckets:
            near = _usable_buckets(data.buckets, downscale)
        raise UserError(
            "cache-resolution", f"data.{field} is {size}, but the {component} needs a multiple of {downscale}; use {near}"
        )


def _usable_buckets(buckets: BucketTable, downscale: int) -> str:
    """Return the step nearest to that of the buckets which is a multiple of `downscale`, and the sides that fit it."""
    low, high, step = buckets.min, buckets.max, buckets.step
    common = [n for n in range(downscale, low + 1, downscale) if low % n == 0 and high % n == 0]
    if common:
        return str(min(common, key=lambda n: abs(n - step)))
    step = max(step // downscale, 1) * downscale
    low = max(low // step, 1) * step
    return f"{step} with buckets.min = {low} and buckets.max = {max(-(-high // step) * step, low)}"


class _Build:
    """One build of one view."""

    def __init__(
        self,
        config: Config,
        vae: LatentEncoder,
        store: Store,
        report: ProgressCallback,
        notify: Callable[[str], None],
        division: Division,
    ):
        self.division = division
        self.config, self.vae, self.store, self.report, self.notify = config, vae, store, report, notify
        self.db = store.db
        self.workers = config.cache.workers or _cores()
        self.view = cache.view_name(config, vae.hash)
        self.stored_versions = cache.stored_versions(config.data)
        self.versions = len(self.stored_versions)
        self.space_name = cache.space_name(config, vae.hash)
        metadata = {
            "vae": vae.hash,
            "vae_name": vae.name,
            "scaling_factor": repr(float(vae.latent_space.factor)),
            "shift_factor": repr(float(vae.latent_space.shift)),
            "preprocessing": json.dumps(cache.preprocessing(config), sort_keys=True),
        }
        self.space = store.space(self.space_name, metadata, config.cache.dtype)

    def run(self, sources: Iterator[DataSource], unused: list[tuple[str, str]]) -> CacheCounts:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="fastsd-decode")
        pipeline = Pipeline(
            self.config, self.vae, self.store, self.space, pool, self.workers, self._reject, self.report, self.division
        )

        def prepare() -> None:
            data, downscale = self.config.data, self.vae.downscale
            collect.fill(self.store, self.space, sources, unused, data, downscale, pool, self.report, self.division)
            self._check_keys()
            if data.masks:
                self.db.execute("UPDATE space SET unfinished = 1 WHERE id = ?", (self.space,))
                mask_cells.make(self.store, data, downscale, pool, self.report, self.division)
            self.store.forget_broken(self.space)
            self.division.collect(self.store)
            if self.config.data.latents:
                self._check_imported_scale()
            self._plan()

        try:
            with warnings.catch_warnings():
                # Pillow warns of odd files. Errors that matter become reasons for a rejection.
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
                with collect.sample_table(self.store, self.view, prepare, self.notify):
                    pipeline.run()
                    with collect.one_at_a_time(self.store, self.notify):
                        counts = self._tally(pipeline)
                        self.division.once("view", lambda: self._freeze(counts))
                        with self.store.transaction():
                            self.db.execute("UPDATE space SET unfinished = 0 WHERE id = ?", (self.space,))
                        return counts
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_keys(self) -> None:
        """Raise UserError if the config names weights or masks that no image has. The name is then probably wrong."""
        query = "SELECT COUNT(*) FILTER (WHERE reason IS NULL), COUNT(weight), COUNT(mask_path) FROM sample"
        usable, weighted, masked = self.db.execute(query).fetchone()
        no_weight, no_mask = "no image has a number with this key in its metadata", "no image has a mask file with this ending"
        for key, images, problem in (("weight_key", weighted, no_weight), ("masks", masked, no_mask)):
            if usable and not images and (name := getattr(self.config.data, key)):
                raise UserError("cache-no-such-detail", f"data.{key} is {name!r}, but {problem}; correct or remove it")

    def _check_imported_scale(self) -> None:
        """Raise UserError if the latents of another trainer do not look like latents of this VAE."""
        kind, means = self.config.data.latents, []
        sql = "SELECT file, offset, length FROM sample WHERE reason IS NULL AND id % (SELECT 1 + COUNT(*) / ? FROM sample) = 0"
        for path, offset, length in self.db.execute(sql, (_EXAMPLES,)):
            with contextlib.suppress(Rejected):  # the pipeline reports this file
                data = folders.read_bytes(DataSource(os.fsdecode(path), offset=offset, length=length))
                mean, _ = imported_latents.read_latent(data, kind)
                means.append(mean.reshape(len(mean), -1))
        if means and len({len(mean) for mean in means}) == 1:
            std_C = np.concatenate(means, axis=1).std(axis=1).tolist()
            problem = imported_latents.check_scale(std_C, self.vae.latent_space.overall_factor(std_C))
            if problem:
                raise UserError(
                    "cache-latents-of-other-vae",
                    f"data.latents is {kind!r}: {problem}; set model.vae to their VAE, or remove data.latents to encode the"
                    " images",
                )

    def _plan(self) -> None:
        """Assign a row to every new version of a content, in sorted order. Every new shard has rows of one shape."""
        self.division.disown(self.store, self.space)
        missing = " UNION ALL ".join(
            f"SELECT bucket_height AS height, bucket_width AS width, content, {version} AS version FROM sample WHERE reason"
            f" IS NULL AND NOT EXISTS (SELECT 1 FROM latent WHERE space = {self.space} AND latent.content = sample.content"
            f" AND latent.version = {version})"
            for version in self.stored_versions
        )
        new = self.db.execute(
            f"SELECT DISTINCT height, width, content, version FROM ({missing}) ORDER BY 1, 2, 3, 4"
        ).fetchall()
        division = self.division
        rows_of_shard = division.shard_rows(len(new), cache.SHARD_ROWS)
        with self.store.transaction():
            self.db.execute("UPDATE space SET unfinished = 1 WHERE id = ?", (self.space,))
            for (height, width), rows in itertools.groupby(new, lambda row: row[:2]):
                shape, contents = self._shape(width, height), (row[2:] for row in rows)
                names = self.space_name[:8], division.build, division.tag
                self.store.plan(self.space, shape, contents, rows_of_shard, *names)
        self.store.check_room(self.space)

    def _shape(self, width: int, height: int) -> list[int]:
        """Return the shape of a bucket's latents. Its size is in cells for imported latents, and in pixels for images."""
        cell = 1 if self.config.data.latents else self.vae.downscale
        return [self.vae.channels, height // cell, width // cell]

    def _reject(self, store: Store, content: bytes, key: bytes, error: Rejected) -> None:
        """Reject every file with this content or, if the content is not the cause, only this file."""
        condition, value = ("content = ?", content) if error.lasting else ("path = ?", key)
        retry = "" if error.lasting else ", size = -1"
        store.db.execute(f"UPDATE sample SET reason = ?{retry} WHERE {condition}", (error.reason, value))
        if not error.lasting:  # the stored facts may be wrong
            store.db.execute("DELETE FROM file WHERE path = ?", (key,))
        self._store_rejected(store, condition, value)

    def _store_rejected(self, store: Store, condition: str, value: bytes | int) -> None:
        rejected = f"SELECT ?, path, reason, size, mtime_ns FROM sample WHERE reason IS NOT NULL AND {condition}"
        store.db.execute(f"REPLACE INTO rejected {rejected}", (self.space, value))

    def _tally(self, pipeline: Pipeline) -> CacheCounts:
        """Record what is rejected. Return the counts. Raises UserError if no image is usable."""
        with self.store.transaction():
            self._store_rejected(self.store, "id > ?", 0)
            self.db.execute(
                "DELETE FROM rejected WHERE space = ? AND path IN (SELECT path FROM sample WHERE reason IS NULL)",
                (self.space,),
            )
            for root in self.config.data.roots:  # forget files that were rejected earlier and no longer exist
                folder = os.fsencode(os.path.abspath(root.path))
                self.db.execute(
                    "DELETE FROM rejected WHERE space = ? AND path > ? AND path < ? AND path NOT IN (SELECT path FROM sample)",
                    (self.space, folder + b"/", folder + b"0"),  # "0" follows "/" in ASCII
                )

        counts = self._counts(pipeline)
        if not counts.cached:
            raise UserError(
                "cache-no-usable-image",
                f"data.folders: all {counts.images} images were rejected; add usable images (first rejection:"
                f" {counts.examples[0]})",
            )
        return counts

    def _freeze(self, counts: CacheCounts) -> None:
        """Write the view of all samples that have latents."""
        vae, config = self.vae, self.config
        meta = cache.CacheMeta(
            vae_hash=vae.hash,
            vae_name=vae.name,
            scaling_factor=float(vae.latent_space.factor),
            shift_factor=float(vae.latent_space.shift),
            channels=vae.channels,
            downscale=vae.downscale,
            resolution=config.data.resolution,
            dtype=config.cache.dtype,
            preprocessing=cache.preprocessing(config),
            folders=[shown(root.path) for root in config.data.roots],
            images=counts.images,
            cached=counts.cached,
            rejected=counts.rejected,
            empty_captions=counts.empty_captions,
            latents=counts.latents,
            crops=config.data.crops,
            flip=config.data.flip,
            latents_mean=vae.latent_space.mean,
            latents_std=vae.latent_space.std,
        )

        work = self.store.home / "work"
        with disk_errors(work.parent), tempfile.TemporaryDirectory(prefix=f"{counts.view}-", dir=work) as scratch:
            lists.write_lists(self.store, counts.view)
            arrays, shards, groups = self._index(Path(scratch), counts.cached)
            cache.freeze(self.store.folder, counts.view, arrays, shards, groups, meta, self._place())
            if config.data.masks:
                mask_cells.freeze(self.store, counts.view, config.data.crops)

    def _place(self) -> cache.Place:
        """Return the place of the data, with up to `_EXAMPLES` images in even steps."""
        config = self.config
        paths = [root.path for root in config.data.roots]
        bases = [cache.folder_base(path) for path in paths]
        query = (
            "SELECT root, file, offset, length, content FROM sample WHERE reason IS NULL AND id % (SELECT 1 + COUNT(*) / ?"
            " FROM sample) = 0"
        )
        samples = [
            (root, os.path.relpath(os.fsdecode(file), bases[root]), offset, length, content.hex())
            for root, file, offset, length, content in self.db.execute(query, (_EXAMPLES,))
        ]
        return cache.Place(cache.view_settings(config, self.vae.hash), paths, bases, samples)

    _USED_ROWS = (
        "FROM sample JOIN latent ON latent.space = ? AND latent.content = sample.content"
        " WHERE sample.reason IS NULL AND version IN (SELECT value FROM json_each(?))"
    )

    def _index(self, scratch: Path, samples: int) -> tuple[dict[str, np.ndarray], list[object], list[cache.Group]]:
        """Return the arrays of the view (in files, to save memory), its shards in the order of creation, and its groups."""
        shard_rows = self.db.execute(f"SELECT DISTINCT shard {self._USED_ROWS}", (self.space, json.dumps(self.stored_versions)))
        used_ids = {shard for (shard,) in shard_rows}
        shards = [shard for shard in self.store.shards(self.space) if shard.id in used_ids]
        shard_index = {shard.id: i for i, shard in enumerate(shards)}
        size_query = "SELECT SUM(LENGTH(CAST(captions AS BLOB))) FROM sample WHERE reason IS NULL"
        caption_bytes = int(self.db.execute(size_query).fetchone()[0])

        lengths = dict.fromkeys(("shard", "row", "check"), samples * self.versions)
        lengths |= {"caption_offsets": samples + 1, "captions": caption_bytes}
        if self.config.data.weight_key:
            lengths["weight"] = samples
        arrays: dict[str, np.ndarray] = {}
        for name, length in lengths.items():
            dtype = (cache.View.TENSORS | cache.View.OPTIONAL)[name]
            arrays[name] = np.memmap(scratch / name, dtype, "w+", shape=(length,)) if length else np.zeros(0, dtype)

        query = (
            f"SELECT shard, row, check64, bucket_height, bucket_width, root, IFNULL(weight, 1), captions {self._USED_ROWS}"
            f" ORDER BY {cache.ORDER}, version"
        )

        group_sizes: Counter[tuple[int, int, int]] = Counter()
        cursor = self.db.execute(query, (self.space, json.dumps(self.stored_versions)))
        done = offset = 0
        while chunk := cursor.fetchmany(self.versions << 14):
            shard, row, check, *group_columns, weight, captions = zip(*chunk, strict=True)
            span = slice(done * self.versions, done * self.versions + len(chunk))
            arrays["shard"][span] = [shard_index[id] for id in shard]
            arrays["row"][span], arrays["check"][span] = row, check
            per_sample = slice(None, None, self.versions)  # a sample's versions are adjacent
            group_sizes.update(zip(*(column[per_sample] for column in group_columns), strict=True))
            encoded_captions = [caption.encode() for caption in captions[per_sample]]
            ends = offset + np.cumsum([len(caption) for caption in encoded_captions])
            arrays["captions"][offset : ends[-1]] = np.frombuffer(b"".join(encoded_captions), np.uint8)
            arrays["caption_offsets"][done + 1 : done + 1 + len(encoded_captions)] = ends
            if "weight" in arrays:
                arrays["weight"][done : done + len(encoded_captions)] = weight[per_sample]
            done, offset = done + len(encoded_captions), int(ends[-1])

        groups, first = [], 0
        for (height, width, root), count in group_sizes.items():
            groups.append(cache.Group(tuple(self._shape(width, height)), root, first, count))
            first += count
        return arrays, [[shard.name, shard.shape] for shard in shards], groups

    def _counts(self, pipeline: Pipeline) -> CacheCounts:
        images, cached, empty, latents = self.db.execute(
            "SELECT COUNT(*), COUNT(*) FILTER (WHERE reason IS NULL), COUNT(*) FILTER (WHERE reason IS NULL AND"
            " captions = ''), COUNT(DISTINCT CASE WHEN reason IS NULL THEN content END) FROM sample"
        ).fetchone()
        rejected = self.db.execute("SELECT path, reason FROM sample WHERE reason IS NOT NULL ORDER BY id").fetchall()
        clock = pipeline.clock
        return CacheCounts(
            images=images,
            cached=cached,
            latents=latents * self.versions,
            encoded=pipeline.encoded,
            rejected=len(rejected),
            empty_captions=empty,
            reasons=dict(Counter(reason for _, reason in rejected).most_common()),
            examples=[f"{shown(path)}: {reason}" for path, reason in rejected[:_EXAMPLES]],
            view=self.view,
            rates={step: clock.images[step] / busy for step, busy in clock.seconds.items() if busy > 0},
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
