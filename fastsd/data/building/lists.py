"""Name the files of a view, so that nothing is rejected, ignored or left out in silence, and notice when the folders change.

    DIR/lists/V.tsv           the files that people may want to look at: kind, path and detail. Kinds are `rejected`,
                              `no caption`, `enlarged`, and the reasons of `unused.py`
    DIR/lists/V-images.tsv    every image of the folders, also rejected ones: path, state and names of its texts and mask

The state is a hash of all that `scan` knows about an image: size and times of its files, and its captions from metadata. Tabs
and control characters in paths are escaped. Both files are written before the view.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fastsd.config.schema import DataTable
from fastsd.data.building.store import Store
from fastsd.data.cache import folder_base, view_place
from fastsd.data.sources import folders
from fastsd.data.sources.image import DataSource, shown
from fastsd.data.sources.unused import UnusedFiles
from fastsd.storage import new_file
from fastsd.terminal.texts import numbered

ENLARGED = 2.0  # an image is listed if it is enlarged by more than this factor
_EXAMPLES = 3


def list_path(folder: Path, view: str) -> Path:
    return folder / "lists" / f"{view}.tsv"


def _images_path(folder: Path, view: str) -> Path:
    return folder / "lists" / f"{view}-images.tsv"


def state(source: DataSource) -> str:
    """Return a hash that changes when a file of an image or its caption changes, 16 hex digits."""
    stamps: list[object] = []
    for path in (source.path, *source.caption_paths, *((source.mask.path,) if source.mask else ())):
        with suppress(OSError):
            status = os.stat(path)
            stamps.append((os.path.basename(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    facts = (stamps, source.offset, source.length, source.captions, source.weight, source.problem)
    return hashlib.blake2b(repr(facts).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def companions(source: DataSource) -> str:
    """Return the names of the texts and the mask of an image, separated by tabs."""
    paths = (*source.caption_paths, *((source.mask.name,) if source.mask else ()))
    return "\t".join(shown(os.path.basename(path)) for path in paths)


def write_lists(store: Store, view: str) -> None:
    """Write both files of a view from the tables `sample` and `unused`. Only one process at a time may call this."""
    notable = (
        "SELECT 'rejected', path, reason, id FROM sample WHERE reason IS NOT NULL"
        " UNION ALL SELECT 'no caption', path, '', id FROM sample WHERE reason IS NULL AND captions = ''"
        " UNION ALL SELECT 'enlarged', path, PRINTF('%.1f times', enlarged), id FROM sample"
        f" WHERE reason IS NULL AND enlarged > {ENLARGED} UNION ALL SELECT reason, path, '', rowid FROM unused ORDER BY 1, 4"
    )
    images = "SELECT path, state, companions FROM sample ORDER BY id"
    run = store.db.execute
    _write(list_path(store.folder, view), lambda: ((row[0], shown(row[1]), shown(row[2])) for row in run(notable)))
    _write(
        _images_path(store.folder, view),
        lambda: ((shown(path), image_state, *names.split("\t")) for path, image_state, names in run(images)),
    )


def _write(path: Path, rows: Callable[[], Iterable[Sequence[str]]]) -> None:
    """Replace a list atomically. An equal one stays as it is."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or not _equal(_read(path), rows()):
        with new_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines("\t".join(row) + "\n" for row in rows())
            file.flush()
            os.fsync(file.fileno())


def _equal(old: Iterable[list[str]], new: Iterable[Sequence[str]]) -> bool:
    return all(row is not None and other == list(row) for other, row in itertools.zip_longest(old, new))


def _read(path: Path) -> Iterator[list[str]]:
    with suppress(OSError), path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n").split("\t")


def unused_files(folder: Path, view: str) -> UnusedFiles:
    """Return the counts of the files that the scan for a view has not used."""
    counts = UnusedFiles()
    for kind, path, _ in _read(list_path(folder, view)):
        counts.add(path, kind)
    return counts


def enlarged(folder: Path, view: str) -> str:
    """Return a sentence on images that are enlarged much, or ""."""
    factors = [float(detail.split()[0]) for kind, _, detail in _read(list_path(folder, view)) if kind == "enlarged"]
    if not factors:
        return ""
    advice = "remove them, or set data.buckets.no_upscale = true"
    images = numbered(len(factors), "image is", "images are")
    return f"{images} enlarged more than {ENLARGED:g} times, up to {max(factors):.0f} times; {advice}"


class Changes(NamedTuple):
    """Images of the folders that are new, missing or changed since a view was cached: how many, and some of their names."""

    new: int
    missing: int
    changed: int
    examples: list[str]

    def __str__(self) -> str:
        counts = [f"{count} {word}" for word, count in zip(self._fields, self[:3], strict=False) if count]
        names = ", ".join(self.examples) + (", ..." if sum(self[:3]) > len(self.examples) else "")
        advice = "run `fastsd cache CONFIG`, or the old images and captions are trained on"
        return f"the folders have changed since they were cached: {', '.join(counts)} ({names}); {advice}"


def changes(data: DataTable, folder: Path, view: str) -> Changes | None:
    """Compare the folders with those that a view was cached from. Return None if they are equal or the view has no list.

    Files are listed, but not read. Raises UserError as `scan` does.
    """
    cached: dict[str, list[str]] = {}  # a path may have several problems
    for path, cached_state, *_ in _read(_images_path(folder, view)):
        cached.setdefault(path, []).append(cached_state)
    if not cached:
        return None
    missing, new, changed = set(cached), list[str](), list[str]()
    bases = [folder_base(root.path) for root in data.roots]
    place = view_place(folder / "views" / f"{view}.safetensors")
    old_bases = place.bases if place else bases
    for source in folders.scan_for(data):
        base = bases[source.root]
        is_below = source.name.startswith(base)
        path = shown(old_bases[source.root] + source.name.removeprefix(base) if is_below else source.name)
        missing.discard(path)
        if state(source) not in cached.get(path, ()):
            (changed if path in cached else new).append(path)
    examples = [os.path.basename(path) for path in (*new, *sorted(missing), *changed)][:_EXAMPLES]
    return Changes(len(new), len(missing), len(changed), examples) if new or missing or changed else None
