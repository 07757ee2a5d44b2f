"""Encode a view's captions to text embeddings. `fastsd/data/text_embeddings.py` defines the shards and the index.

The key of a row is the sha256 of its token ids. A caption that many images have is therefore encoded once, and when captions
change, only new ones are encoded. Interruptions are handled as in `build.py`. Only one process at a time encodes.

Shapes: B captions, L tokens, D width of the text embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastsd.config.schema import CacheTable
from fastsd.data import cache
from fastsd.data.building.collect import one_at_a_time
from fastsd.data.building.machines import Alone, Division
from fastsd.data.building.pipeline import CacheProgress
from fastsd.data.building.store import Shard, Store, disk_errors
from fastsd.data.cache import DTYPES, LatentCache, TextEmbeddingsIndex
from fastsd.data.text_embeddings import index_path, open_index, shard_metadata, space_name
from fastsd.data.tokens import Tokens
from fastsd.errors import UserError
from fastsd.model.text_encoder import TextEncoder

_SHARD_BYTES = 512 << 20
_BLOCK = 64  # captions that are encoded, written and committed together
_CHUNK = 1024  # samples or entries of the index that are processed together


@dataclass(frozen=True)
class EmbeddingCounts:
    """Result of `write_text_embeddings`."""

    captions: int  # captions of all samples
    encoded: int  # distinct captions, including "", that this call has encoded


def write_text_embeddings(
    table: CacheTable,
    latents: LatentCache,
    text: TextEncoder,
    report: Callable[[CacheProgress], None] = lambda event: None,
    notify: Callable[[str], None] = lambda line: None,
    division: Division | None = None,
) -> EmbeddingCounts:
    """Bring the text embeddings of a view's captions up to date and freeze their index.

    Args:
        table: has the folder of the cache, and `dtype` and `precision` of the text embeddings.
        latents: the view. Its token ids must exist.
        text: the text encoder in fp32, on the device that it runs on. It is converted to `precision` in place.
        report: receives a `CacheProgress`, which counts captions, after every block.
        notify: receives a line when this process must wait for another one.
        division: the machines that receive the text embeddings, which this one encodes; None = no others.

    Raises:
        UserError: the token ids are missing, the disk fails, or a text embedding is not finite in `dtype`.
    """
    division = division or Alone(Path(table.dir))
    with (
        Store.open(Path(table.dir), lock="shared", home=division.home) as store,
        one_at_a_time(store, notify, "states", "encoding captions"),
    ):
        division.collect(store)
        writer = _Writer(table, latents, text, store, report, division)
        counts = writer.run()
        for shard in division.unpublished(store.shards(writer.space)):
            division.publish_shard(store, shard)
        return counts


class _Writer:
    """One call of `write_text_embeddings`."""

    def __init__(
        self,
        table: CacheTable,
        latents: LatentCache,
        text: TextEncoder,
        store: Store,
        report: Callable[[CacheProgress], None],
        division: Division,
    ) -> None:
        self.division = division
        self.latents, self.text, self.store, self.report, self.db = latents, text, store, report, store.db
        self.tokens = Tokens(latents, text.tokenizer, text.window, text.chunks, text.cut)
        metadata = shard_metadata(table, text)
        self.name = space_name(table, metadata)
        self.space = store.space(self.name, metadata, table.dtype)
        self.dtype = DTYPES[table.dtype]
        self.empty_L = text.tokenize([""])[0]
        text.module.to(DTYPES[table.precision])

    def run(self) -> EmbeddingCounts:
        self.store.forget_broken(self.space)
        current = self._current()
        if current is not None:
            return EmbeddingCounts(int(current.arrays["offsets"][-1]), 0)
        # SQLite stores temporary tables in an unnamed file, which disappears when the process ends for any reason.
        self.db.execute("CREATE TEMP TABLE caption (entry INTEGER PRIMARY KEY, content BLOB, length INTEGER)")
        self.offsets = self._zeros(np.int64, len(self.latents) + 1)
        self._collect()
        self._plan()
        encoded = self._encode_all()
        self._freeze()
        return EmbeddingCounts(int(self.offsets[-1]), encoded)

    def _current(self) -> TextEmbeddingsIndex | None:
        """Return the index, or None if it is missing or damaged or refers to an unknown shard."""
        with contextlib.suppress(UserError):
            index = open_index(self.latents, self.name)
            shard_names = {shard.name for shard in self.store.shards(self.space)}
            if shard_names.issuperset(name for name, _ in index.shards):
                return index
        return None

    def _zeros(self, dtype: type[np.generic], size: int) -> np.ndarray:
        """Allocate zeros in an unnamed file, to save memory."""
        with disk_errors(self.store.folder), tempfile.TemporaryFile(dir=self.store.home) as file:
            return np.memmap(file, dtype, "w+", shape=(size,))

    def _collect(self) -> None:
        """Fill `offsets`, and write the hash and the number of every entry's token ids to the table `caption`."""
        samples, insert = len(self.latents), "INSERT INTO caption VALUES (?, ?, ?)"
        for first in range(0, samples, _CHUNK):
            chunk = range(first, min(first + _CHUNK, samples))
            counts = [len(variants) for variants in self.latents.variants(chunk)]
            entries = [(i, variant) for i, count in zip(chunk, counts, strict=True) for variant in range(count)]
            start = int(self.offsets[first])
            self.offsets[first + 1 : chunk.stop + 1] = start + np.cumsum(counts)
            rows = (self.tokens.row(i, variant) for i, variant in entries)
            self.db.executemany(insert, ((entry, _content_hash(ids_L), len(ids_L)) for entry, ids_L in enumerate(rows, start)))
        self.db.execute(insert, (int(self.offsets[-1]), _content_hash(self.empty_L), len(self.empty_L)))
        self.db.execute("CREATE INDEX temp.caption_content ON caption (content)")

    def _plan(self) -> None:
        """Assign a row to every new caption, in sorted order."""
        self.division.disown(self.store, self.space)
        self.db.execute(
            "CREATE TEMP TABLE missing AS SELECT DISTINCT content, length FROM caption WHERE NOT EXISTS"
            " (SELECT 1 FROM latent WHERE space = ? AND latent.content = caption.content) ORDER BY content",
            (self.space,),
        )
        with self.store.transaction():
            self.db.execute("UPDATE space SET unfinished = 1 WHERE id = ?", (self.space,))
            for (length,) in self.db.execute("SELECT DISTINCT length FROM missing ORDER BY length").fetchall():
                shape = [length, self.text.width]
                shard_rows = min(cache.SHARD_ROWS, max(_SHARD_BYTES // (math.prod(shape) * self.dtype.itemsize), 1))
                contents = self.db.execute("SELECT content FROM missing WHERE length = ? ORDER BY rowid", (length,))
                new = ((content, 0) for (content,) in contents)
                names = self.name[:8], self.division.build, self.division.tag
                self.store.plan(self.space, shape, new, shard_rows, *names)
        self.store.check_room(self.space)

    _PENDING_ROWS = "FROM latent JOIN caption USING (content) WHERE space = ? AND sha256 IS NULL"

    def _encode_all(self) -> int:
        """Encode all captions that are not encoded yet. Return their number."""
        total = int(self.db.execute(f"SELECT COUNT(DISTINCT content) {self._PENDING_ROWS}", (self.space,)).fetchone()[0])
        previous, done = None, 0
        start = time.perf_counter()
        for block in itertools.chain(self._blocks(), [None]):
            current = self._encode(*block) if block else None  # a GPU computes this block while the previous one is written
            if previous:
                self._write(*previous)
                done += len(previous[1])
                self.report(CacheProgress("states", done, total, done / (time.perf_counter() - start)))
            previous = current
        return done

    def _blocks(self) -> Iterator[tuple[Shard, list[tuple[int, int]]]]:
        """Yield the blocks to encode: a shard and its captions, each as its row and an entry with the row's token ids."""
        query = f"SELECT row, MIN(entry) {self._PENDING_ROWS} AND shard = ? GROUP BY row ORDER BY row"
        for shard in self.store.shards(self.space):
            captions = self.db.execute(query, (self.space, shard.id)).fetchall()
            for first in range(0, len(captions), _BLOCK):
                yield shard, captions[first : first + _BLOCK]

    def _encode(self, shard: Shard, captions: list[tuple[int, int]]) -> tuple[Shard, list[int], Tensor]:
        rows, entries = zip(*captions, strict=True)
        ids_BL = torch.stack([self._ids(entry) for entry in entries])
        with torch.no_grad():
            text_embeds_BLD = self.text.encode(ids_BL.to(self.text.device))
        return shard, list(rows), text_embeds_BLD.to(self.dtype)

    def _ids(self, entry: int) -> Tensor:
        """Return the token ids of an entry, int64 (L,)."""
        sample = int(np.searchsorted(self.offsets, entry, "right")) - 1
        return self.empty_L if sample == len(self.latents) else self.tokens.row(sample, entry - int(self.offsets[sample]))

    def _write(self, shard: Shard, rows: list[int], text_embeds_BLD: Tensor) -> None:
        text_embeds_BLD = text_embeds_BLD.cpu()
        if not text_embeds_BLD.isfinite().all():
            advice = 'set cache.dtype = "fp32"' if shard.dtype != "fp32" else "fetch the text encoder again"
            raise UserError(
                "embeddings-not-finite", f"cache.hidden_states: text embeddings are not finite in {shard.dtype}; {advice}"
            )
        data = [(row, x_LD.view(torch.uint8).numpy().tobytes()) for row, x_LD in zip(rows, text_embeds_BLD, strict=True)]
        self.store.write(shard, data)
        with self.store.transaction():
            self.store.mark_done(shard, data)

    def _freeze(self) -> None:
        from_clause = "FROM caption JOIN latent USING (content) WHERE space = ?"
        used_ids = {shard for (shard,) in self.db.execute(f"SELECT DISTINCT shard {from_clause}", (self.space,))}
        shards = [shard for shard in self.store.shards(self.space) if shard.id in used_ids]
        shard_index = {shard.id: i for i, shard in enumerate(shards)}

        entries = int(self.offsets[-1]) + 1
        arrays = {"offsets": self.offsets, "check": self._zeros(np.int64, entries)}
        arrays |= {name: self._zeros(np.int32, entries) for name in ("shard", "row")}
        cursor, done = self.db.execute(f"SELECT shard, row, check64 {from_clause} ORDER BY entry", (self.space,)), 0
        while chunk := cursor.fetchmany(_CHUNK):
            span = slice(done, done + len(chunk))
            shard, arrays["row"][span], arrays["check"][span] = zip(*chunk, strict=True)
            arrays["shard"][span] = [shard_index[id] for id in shard]
            done += len(chunk)
        assert done == entries, f"{entries - done} captions have no text embeddings"

        path = index_path(self.latents, self.name)
        metadata = {"shards": json.dumps([[shard.name, shard.shape] for shard in shards]), "view": self.latents.sha256}
        with disk_errors(self.store.folder):
            path.parent.mkdir(exist_ok=True)
            TextEmbeddingsIndex.write(path, arrays, metadata | {"space": self.name})
        with self.store.transaction():
            self.db.execute("UPDATE space SET unfinished = 0 WHERE id = ?", (self.space,))


def _content_hash(ids_L: Tensor) -> bytes:
    return hashlib.sha256(ids_L.numpy().tobytes()).digest()
