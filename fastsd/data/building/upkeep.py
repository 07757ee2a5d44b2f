"""Maintenance of a cache folder: verify every byte, report the contents, prune what is unused."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastsd.data import cache, masks, tokens
from fastsd.data.building import mask_cells
from fastsd.data.building.store import Store, disk_errors
from fastsd.data.rows import LATENTS, STATES
from fastsd.errors import UserError

MEASURED = 1024  # latents of a view used to measure the mean and std of its channels
# The scaling factor brings the std of latents near 1. SD1.5's and SDXL's are within 10 % of 1 on photographs.
USUAL_STD = (0.5, 2.0)
_DELETED = "deleted, run `fastsd cache CONFIG` to rebuild it"


def verify(dir: str | Path) -> list[str]:
    """Compare every finished row and every index with its sha256. Return a description of each file that differs.

    The next `fastsd cache` encodes differing rows again. Until then no training can use them, because the indexes that refer
    to them are removed.
    """
    problems = []
    with Store.open(Path(dir)) as store:
        for path, kind in cache.indexes(store.folder):
            try:
                kind(path)
            except UserError:
                store.db.execute("UPDATE space SET unfinished = 1")  # the space of a damaged index is unknown
                path.unlink()
                problems.append(f"{path} does not match its sha256; {_DELETED}")

        for path in tokens.token_files(store.folder):
            if damage := tokens.find_damage(path):
                path.unlink()
                problems.append(f"{path} {damage}; {_DELETED}")
        for path in mask_cells.damaged_files(store):
            path.unlink()
            problems.append(f"{path} is damaged; {_DELETED}")

        for shard in store.shards():
            done = store.done_rows(shard)
            if not done:
                continue
            if not shard.is_intact():
                bad_rows = [row for row, _ in done]
                problem = "is missing, truncated or has a damaged header"
            else:
                stored = shard.read_rows(row for row, _ in done)
                bad_rows = [row for (row, sha), data in zip(done, stored, strict=True) if hashlib.sha256(data).digest() != sha]
                row_list = ", ".join(map(str, bad_rows[:9])) + (", ..." if len(bad_rows) > 9 else "")
                problem = f"has {len(bad_rows)} damaged rows of {len(done)}: {row_list}"

            if bad_rows:
                store.forget(shard, bad_rows)
                problems.append(f"{shard.path} {problem}; run `fastsd cache CONFIG` to encode them again")
    return problems


@dataclass(frozen=True)
class ViewStats:
    """Metadata of a view and statistics of its samples."""

    meta: cache.CacheMeta
    buckets: dict[str, int]  # "width x height" in pixels -> samples
    mean: list[float]  # of each latent channel, scaled as the model sees it, over `measured` latents
    std: list[float]  # as for `mean`
    measured: int  # latents
    masked: int  # samples that have a mask

    @property
    def warning(self) -> str:
        """A sentence if the latents do not look like this VAE's, otherwise ""."""
        low, high = USUAL_STD
        std = sum(self.std) / len(self.std)
        if low <= std <= high:
            return ""
        return (
            f"the scaled latents have a standard deviation of {std:.2f}, expected about 1; check the VAE's scaling factor, "
            f"{self.meta.scaling_factor:g} (model.vae_scaling_factor)"
        )


@dataclass(frozen=True)
class Stats:
    """Contents of a cache folder."""

    views: dict[str, ViewStats]  # by name
    damaged: list[str]  # a sentence for each damaged view
    latents: int  # encoded
    states: int  # captions with text embeddings
    planned: int  # rows of both kinds that are not encoded yet, or never will be (rejected)
    shards: int  # files on disk
    shard_bytes: int  # their size
    rejected: dict[str, int]  # reason -> files


def stats(dir: str | Path) -> Stats:
    """Count the contents of a cache folder, possibly while another process fills it. Raises UserError if it is no cache."""
    with Store.open(Path(dir), lock="") as store:
        formats = {shard.id: shard.format for shard in store.shards()}
        encoded: Counter[str] = Counter()
        planned = 0
        for shard, done, rows in store.db.execute("SELECT shard, COUNT(sha256), COUNT(*) FROM latent GROUP BY shard"):
            encoded[formats[shard]] += done
            planned += rows - done
        files = [path for path in (store.folder / "shards").glob("*.safetensors") if path.exists()]
        views, damaged = dict[str, ViewStats](), list[str]()
        for path in cache.view_paths(store.folder):
            try:
                views[path.stem] = _measure(store.folder, path)
            except UserError as error:
                damaged.append(str(error))
        reasons = Counter(dict(store.db.execute("SELECT reason, COUNT(*) FROM rejected GROUP BY reason")))
        size = sum(path.stat().st_size for path in files)
        return Stats(views, damaged, encoded[LATENTS], encoded[STATES], planned, len(files), size, dict(reasons.most_common()))


def _measure(folder: Path, path: Path) -> ViewStats:
    latents = cache.LatentCache(folder, path)
    try:
        meta, total = latents.meta, len(latents)
        buckets: Counter[str] = Counter()
        sums, squares = torch.zeros(2, meta.channels, dtype=torch.float64)
        cells = measured = 0
        for group in latents.groups:
            _, height, width = group.shape
            buckets[f"{width * meta.downscale}x{height * meta.downscale}"] += group.count
            count = -(-min(MEASURED, total) * group.count // total)  # its share, at least one
            for chunk in np.array_split(np.linspace(0, group.count - 1, count, dtype=np.int64), -(-count // 64)):
                x = (latents.get(group.first + chunk)["latents"].double() - meta.shift_factor) * meta.scaling_factor
                sums += x.sum((0, 2, 3))
                squares += x.square().sum((0, 2, 3))
                cells += len(chunk) * height * width
                measured += len(chunk)

        mean = sums / cells
        std = (squares / cells - mean.square()).clamp(min=0).sqrt()
        masked = masks.Masks(latents).count if masks.mask_path(folder, latents.name).exists() else 0
        return ViewStats(meta, dict(buckets.most_common()), mean.tolist(), std.tolist(), measured, masked)
    finally:
        latents.close()


@dataclass(frozen=True)
class Pruned:
    shards: int
    bytes: int


def prune(dir: str | Path) -> Pruned:
    """Delete shards, token ids and masks that no view or text embeddings index uses, and the records of missing files.

    A space with an interrupted build is not touched until the build is finished. To discard a view, or the text embeddings
    of its captions, delete its file first.

    Raises:
        UserError: there is no cache, or a view is damaged and might refer to files that look unused.
    """
    with Store.open(Path(dir)) as store:
        views = cache.view_paths(store.folder)
        names = {path.stem for path in views}
        with disk_errors(store.folder):
            # A text embeddings index is deleted with its view. If only captions have changed, most embeddings remain useful.
            for path in cache.states_paths(store.folder):
                if path.stem.partition("-")[0] not in names:
                    path.unlink()

        used = {name for path, kind in cache.indexes(store.folder) for name, _ in kind(path).shards}
        view_hashes = {cache.View(path).metadata["sha256"] for path in views}
        busy = {id for (id,) in store.db.execute("SELECT id FROM space WHERE unfinished")}
        spaces = dict(store.db.execute("SELECT id, space FROM shard"))
        shards = store.shards()
        unused = [shard for shard in shards if shard.name not in used and spaces[shard.id] not in busy]

        with store.transaction():
            for shard in unused:
                store.db.execute("DELETE FROM latent WHERE shard = ?", (shard.id,))
                store.db.execute("DELETE FROM shard WHERE id = ?", (shard.id,))
            stale = [path for path in tokens.token_files(store.folder) if tokens.view_hash(path) not in view_hashes]
            stale += mask_cells.prune(store, view_hashes, rows=not busy)
            for table in ("file", "rejected"):
                paths = {path for (path,) in store.db.execute(f"SELECT path FROM {table}") if not _exists(path)}
                store.db.executemany(f"DELETE FROM {table} WHERE path = ?", [(path,) for path in paths])

        # Keep also the shards that views use and a lost database had planned.
        kept = {shard.path.name for shard in shards} - {shard.path.name for shard in unused}
        kept |= {f"{name}.safetensors" for name in used}
        freed = 0
        with disk_errors(store.folder):
            # Includes shards of an earlier prune that was interrupted here, and leftovers of an interrupted build.
            orphans = [path for path in (store.folder / "shards").iterdir() if path.name not in kept]
            for path in orphans + stale:
                freed += path.stat().st_size
                path.unlink()
        return Pruned(len(orphans), freed)


def _exists(path: bytes) -> bool:
    """Return True if the file, or the tar that holds the member, exists."""
    return os.path.lexists(path) or os.path.isfile(path.partition(b".tar/")[0] + b".tar")
