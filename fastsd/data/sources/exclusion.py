"""Leave out the images that data.exclude_files names, such as those that a VAE reconstructs worst."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastsd.config.paths import listed_paths
from fastsd.data.sources.image import DataSource, shown
from fastsd.data.sources.unused import EXCLUDED, UNMATCHED, ReportUnused
from fastsd.errors import UserError


def without_listed(sources: Iterable[DataSource], path: str, unused: ReportUnused) -> Iterator[DataSource]:
    """Yield the sources that the list `path` does not name. The others are reported, and so is each line without an image.

    Raises:
        UserError: the list cannot be read, or names every usable image.
    """
    unmatched, kept, excluded = listed_paths(path), 0, 0
    for source in sources:
        name = shown(source.name)
        if name in unmatched:
            unmatched.discard(name)
            excluded += 1
            unused(source.name, EXCLUDED)
        else:
            kept += not source.problem
            yield source
    if excluded and not kept:
        problem = f"data.exclude_files is {shown(path)}, which names all {excluded} usable images of data.folders"
        raise UserError("exclusion-leaves-none", f"{problem}; remove lines from it")
    for name in sorted(unmatched):
        unused(name, UNMATCHED)
