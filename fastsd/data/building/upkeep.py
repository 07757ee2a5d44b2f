"""Maintain a cache folder: verify every byte, report the contents, delete unused files."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastsd.data import cache, masks, tokens
from fastsd.data.building import machines, mask_cells
from fastsd.data.building.store import Store, disk_errors
from fastsd.data.rows import LATENTS, STATES
from fastsd.errors import UserError
from fastsd.terminal.console import counted, work

MEASURED = 1024  # latents of a view whose mean and std are measured
# The std of scaled latents should be 1. With SD1.5's and SDXL's VAE, photographs are within 10 % of 1.
USUAL_STD = (0.5, 2.0)
_DELETED = "deleted, run `fastsd cache CONFIG` to rebuild it"


def verify(dir: str | Path) -> list[str]:
    """Compare every finished row and every index with its sha256. Return one line for each file that differs.

    The next `fastsd cache` encodes differing rows again. Until then no training can use these rows, because the indexes that
    refer to them are deleted.
    """
    problems = []
    machines.settle(Path(dir))
    with Store.open(Path(dir)) as store:
        for path, index_class in cache.indexes(store.folder):
            try:
                index_class(path)
            except UserError:
                store.db.execute("UPDATE space SET unfinished = 1")  # nobody can tell the space of a damaged index
                path.unlink()
                problems.append(f"{path} does not match its sha256; {_DELETED}")

        for path in tokens.token_files(store.folder):
            if damage := tokens.find_damage(path):
                path.unlink()
                problems.append(f"{path} {damage}; {_DELETED}")
        for path in mask_cells.damaged_files(store):
            path.unlink()
            problems.append(f"{path} is damaged; {_DELETED}")

        for shard in counted("verifying", store.shards(), "shards"):
            done = store.done_rows(shard)
            if not done:
                continue
            if not shard.is_intact():
                damaged_rows = [row for row, _ in done]
                problem = "is missing, truncated or has a damaged header"
            else:
                stored = zip(done, shard.read_rows(row for row, _ in done), strict=True)
                damaged_rows = [row for (row, sha), data in stored if hashlib.sha256(data).digest() != sha]
                row_list = ", ".join(map(str, damaged_rows[:9])) + (", ..." if len(damaged_rows) > 9 else "")
                problem = f"has {len(damaged_rows)} damaged rows of {len(done)}: {row_list}"

            if damaged_rows:
                store.forget(shard, damaged_rows)
                problems.append(f"{shard.path} {problem}; run `fastsd cache CONFIG` to encode them again")
    return problems


@dataclass(frozen=True)
class ViewStats:
    """Metadata of a view and statistics of its samples."""

    meta: cache.CacheMeta
    buckets: dict[str, int]  # "width x height" in pixels -> number of samples
    mean: list[float]  # mean of each channel of the scaled latents, which a model is trained on
    std: list[float]  # std of each channel of the scaled latents
    measured: int  # number of latents that `mean` and `std` are measured on
    masked: int  # number of samples with a mask

    @property
    def warning(self) -> str:
        """A sentence if the latents do not look like latents of this VAE, otherwise ""."""
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
    latents: int  # encoded latents
    states: int  # captions with text embeddings
    planned: int  # rows that are not encoded yet, or never will be because the image was rejected
    shards: int  # files on the disk
    shard_bytes: int  # size of these files
    rejected: dict[str, int]  # reason -> number of files


def stats(dir: str | Path) -> Stats:
    """Count the contents of a cache folder. Another process may fill it meanwhile. Raises UserError if it is no cache."""
    with Store.open(Path(dir), lock="") as store:
        formats = {shard.id: shard.format for shard in store.shards()}
        encoded: Counter[str] = Counter()
        planned = 0
        for shard, done, rows in store.db.execute("SELECT shard, COUNT(sha256), COUNT(*) FROM latent GROUP BY shard"):
            encoded[formats[shard]] += done
            planned += rows - done
        files = [path for path in (store.folder / "shards").glob("*.safetensors") if path.exists()]
        views, damaged = dict[str, ViewStats](), list[str]()
        for path in counted("measuring", cache.view_paths(store.folder), "views"):
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
        sums, square_sums = torch.zeros(2, meta.channels, dtype=torch.float64)
        cell_count = measured = 0
        for group in latents.groups:
            _, height, width = group.shape
            buckets[f"{width * meta.downscale}x{height * meta.downscale}"] += group.count
            count = -(-min(MEASURED, total) * group.count // total)  # in proportion to its samples, at least one
            for chunk in np.array_split(np.linspace(0, group.count - 1, count, dtype=np.int64), -(-count // 64)):
                scaled = meta.latent_space.scale(latents.get(group.first + chunk)["latents"].double())
                sums += scaled.sum((0, 2, 3))
                square_sums += scaled.square().sum((0, 2, 3))
                cell_count += len(chunk) * height * width
                measured += len(chunk)

        mean = sums / cell_count
        std = (square_sums / cell_count - mean.square()).clamp(min=0).sqrt()
        masked = masks.Masks(latents).count if masks.mask_path(folder, latents.name).exists() else 0
        return ViewStats(meta, dict(buckets.most_common()), mean.tolist(), std.tolist(), measured, masked)
    finally:
        latents.close()


@dataclass(frozen=True)
class Pruned:
    shards: int
    bytes: int


def prune(dir: str | Path) -> Pruned:
    """Delete the shards, token ids and masks that no view or text embeddings use, and the records of missing files.

    If a build was interrupted, the rows of its space are kept until the build is finished. To discard a view or its text
    embeddings, delete its file in `views` or `states` first.

    Raises:
        UserError: there is no cache, or a view is damaged, so that nobody can tell which files it uses.
    """
    machines.settle(Path(dir))
    with Store.open(Path(dir)) as store:
        views = cache.view_paths(store.folder)
        view_names = {path.stem for path in views}
        with disk_errors(store.folder):
            # Delete only the text embeddings of deleted views. If captions have changed, most embeddings remain useful.
            for path in cache.states_paths(store.folder) + sorted((store.folder / "lists").glob("*.tsv")):
                if path.stem.partition("-")[0] not in view_names:
                    path.unlink()

        used_names = {name for path, index_class in cache.indexes(store.folder) for name, _ in index_class(path).shards}
        view_hashes = {cache.View(path).metadata["sha256"] for path in views}
        unfinished = {id for (id,) in store.db.execute("SELECT id FROM space WHERE unfinished")}
        space_of = dict(store.db.execute("SELECT id, space FROM shard"))
        shards = store.shards()
        unused = [shard for shard in shards if shard.name not in used_names and space_of[shard.id] not in unfinished]

        with work("deleting what no view uses"), store.transaction():
            for shard in unused:
                store.db.execute("DELETE FROM latent WHERE shard = ?", (shard.id,))
                store.db.execute("DELETE FROM shard WHERE id = ?", (shard.id,))
            stale = [path for path in tokens.token_files(store.folder) if tokens.view_hash(path) not in view_hashes]
            stale += mask_cells.prune(store, view_hashes, rows=not unfinished)
            for table in ("file", "rejected"):
                paths = {path for (path,) in store.db.execute(f"SELECT path FROM {table}") if not _exists(path)}
                store.db.executemany(f"DELETE FROM {table} WHERE path = ?", [(path,) for path in paths])

        # Also keep the shards that a view uses and the database does not know, because an older database was lost.
        kept = {shard.path.name for shard in shards} - {shard.path.name for shard in unused}
        kept |= {f"{name}.safetensors" for name in used_names}
        freed = 0
        with disk_errors(store.folder):
            # These include the shards of an earlier `prune` that was interrupted here, and files of an interrupted build.
            orphans = [path for path in (store.folder / "shards").iterdir() if path.name not in kept]
            for path in orphans + stale:
                freed += path.stat().st_size
                path.unlink()
        return Pruned(len(orphans), freed)


def _exists(path: bytes) -> bool:
    """Return True if the file, or the tar that holds the member, exists."""
    return os.path.lexists(path) or os.path.isfile(path.partition(b".tar/")[0] + b".tar")
