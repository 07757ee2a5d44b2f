"""Find images, captions, masks and weights in folders, metadata files and WebDataset tars, or the latents of other trainers.

`scan` yields one `DataSource` per image. `captions_of` and `read_bytes` read its files. An error in a single file becomes the
`problem` of a `DataSource`, or raises `Rejected`, and does not stop the scan. An error that the user must fix, such as a
missing folder, raises `UserError`.

Read next: `names.py`, `metadata.py`, `tars.py`, `imported_latents.py`.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TypeAlias

from fastsd.config.schema import DataTable, FolderTable
from fastsd.data.sources import listings, metadata, tars
from fastsd.data.sources.exclusion import without_listed
from fastsd.data.sources.image import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MASK_WITHOUT_IMAGE,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    DataSource,
    Rejected,
    ends_in,
    name_captions,
    shown,
    text_captions,
)
from fastsd.data.sources.names import Partners, folded, is_system
from fastsd.data.sources.unused import HIDDEN, METADATA, OTHER, REPEATED, STRAY, ReportUnused
from fastsd.errors import UserError
from fastsd.terminal.console import work

# Filename patterns for each value of data.latents. Group 1 is the image's name without extension. sd-scripts writes foo.npz, or
# foo_0512x0768_sd.npz with the image's width and height. Its text embeddings have a similar name, which is excluded here.
_NAME_PATTERNS = {
    "": re.compile(rf"(.+)(?:{'|'.join(map(re.escape, IMAGE_EXTENSIONS))})", re.DOTALL | re.IGNORECASE),
    "img_sdxl": re.compile(r"(.+)\.img_sdxl", re.DOTALL | re.IGNORECASE),
    "img_sdvae": re.compile(r"(.+)\.img_sdvae", re.DOTALL | re.IGNORECASE),
    "npz": re.compile(r"(.+?)(?:_\d+x\d+)?(?:_sdxl|_sd)?(?<!_te_outputs)\.npz", re.DOTALL | re.IGNORECASE),
}
_NEVER_MASKS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # masks may have any other ending, also one of images
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")

_Sources: TypeAlias = "Iterator[DataSource | _Sources]"


def scan(
    roots: Sequence[FolderTable],
    *,
    captions: str = "file",
    caption_key: str = "",
    caption_lines: str = "variants",
    weight_key: str = "",
    latents: str = "",
    masks: str = "",
    unused: ReportUnused = lambda path, reason: None,
) -> Iterator[DataSource]:
    """Yield every image in `roots` and every problem, lazily. Roots are in order, and images are sorted within a root.

    A root is a folder, a tar, a Parquet listing (see `listings.py`), or a pattern of these such as `shards/{00..99}.tar`.
    Folders are searched recursively.
    Hidden files and the folders of operating systems are skipped, see `names.py`. Links are followed, but each folder is
    searched only once, and a folder that is a root itself only for this root. The images of a tar are yielded in the order of
    the tar.

    The caption of an image comes from the nearest `metadata.jsonl` or `.parquet` that lists the image. This file is beside or
    above the image, within its root. If there is none, the caption comes from the `.txt`, or else the `.caption`, beside the
    image. Case and the encoding of accents make no difference. An empty caption counts as none. A weight comes from the
    nearest metadata file that has one for the image. A mask is always beside its image.

    Args:
        captions: "file" = as above; "sidecar" = only texts beside the image; "filename" = the name of the image.
        caption_key: column of metadata files, and key in a tar's `.json`; "" = the first of text, caption, prompt.
        caption_lines: "variants" = each line of a text file is a caption; "join" = all lines are one caption.
        weight_key: as `caption_key`, for the factor of an image's loss; "" = no weights.
        latents: kind of another trainer's latents to find instead of images: `img_sdxl`, `img_sdvae` or `npz`. Captions
            have the name of the image.
        masks: ending that replaces the extension in the filename of a mask; "" = no masks. Files with it are not images.
        unused: receives each file that is not used, with the reason, see `unused.py`. A skipped folder counts as one file.

    Raises:
        UserError: a root is missing, unreadable, neither a folder nor a tar, or within an earlier root; a root turns out to
            have no image; `masks` is also an ending of images; or both `masks` and `latents` are given.
    """
    if masks and latents:
        raise UserError(
            "masks-and-latents",
            f"data.masks is {masks!r}, but the crops of data.latents {latents!r} are unknown; remove one of them",
        )
    if any(ends_in(extension, masks) for extension in _NEVER_MASKS):
        raise UserError(
            "masks-ending",
            f'data.masks is {masks!r}, also an ending of images; use an ending that only masks have, such as "-mask.png"',
        )

    root_paths: list[tuple[int, str]] = []
    earlier_roots: dict[str, str] = {}  # by the path without links
    earlier_files: dict[tuple[int, int], str] = {}
    for number, root in enumerate(roots):
        paths = [root.path] if os.path.exists(root.path) else list(dict.fromkeys(_expand(root.path)))
        if not any(map(os.path.exists, paths)):
            raise UserError("folder-missing", f"data.folders: {shown(root.path)} does not exist; correct the path or remove it")
        for path in map(os.path.abspath, paths):
            if os.path.isfile(path) and not path.lower().endswith((*tars.TARS, listings.LISTING)):
                raise UserError(
                    "folder-is-file",
                    f"data.folders: {shown(path)} is a file but no .tar or .parquet; give the folder that contains it",
                )
            same = earlier_files.get(_identity(path), "")
            if enclosing := same or earlier_roots.get(_within(os.path.realpath(path), earlier_roots), ""):
                problem = f"is inside {shown(enclosing)}, which is listed before it; remove it or list it first"
                problem = f"is the same as {shown(same)}, which is listed before it; remove one" if same else problem
                problem = "is listed twice; remove one" if enclosing == path else problem
                raise UserError("folder-within-folder", f"data.folders: {shown(path)} {problem}")
            earlier_roots[os.path.realpath(path)] = path
            if os.path.exists(path):
                earlier_files[_identity(path)] = path
            root_paths.append((number, path))
    visited = set(earlier_files)  # a walk leaves out what is a root itself, so this belongs to its own root
    options = (caption_key, weight_key), latents, masks, captions, caption_lines, unused, visited, earlier_files
    return _scan([root.path for root in roots], root_paths, lambda root: _Walk(root, *options))


def _scan(root_names: list[str], root_paths: list[tuple[int, str]], walk_of: Callable[[int], _Walk]) -> Iterator[DataSource]:
    for number, group in itertools.groupby(root_paths, lambda item: item[0]):
        has_images, first_problem, walk = False, "", walk_of(number)
        for _, path in group:
            for source in walk.search(path):
                if not source.problem:
                    has_images = True
                elif not first_problem:
                    first_problem = f" (first problem: {shown(source.name)}: {source.problem})"
                yield source
        if not has_images and not walk.has_other_roots:
            extensions = ", ".join(walk.extensions)
            problem = f"{shown(root_names[number])} has no images ({extensions})"
            raise UserError("folder-empty", f"data.folders: {problem}; add images or remove it{first_problem}")


def _identity(path: str) -> tuple[int, int]:
    """Return (device, inode) of a file or folder, which all of its names share, or (0, 0) if it cannot be read."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _within(path: str, folders: Collection[str]) -> str:
    """Return the entry of `folders` that equals or contains `path`, or "" if there is none."""
    while path not in folders:
        path, below = os.path.dirname(path), path
        if path == below:
            return ""
    return path


def _expand(pattern: str) -> Iterator[str]:
    """Expand `{a,b}` and `{000..123}` in a pattern as a shell does."""
    match = _BRACES.search(pattern)
    if not match:
        yield pattern
        return
    alternatives = match[1].split(",")
    if numbers := _RANGE.fullmatch(match[1]):
        first, last = numbers.groups()
        digits = len(first) if first.startswith("0") else 0
        alternatives = [f"{n:0{digits}d}" for n in range(int(first), int(last) + 1)]
    for word in alternatives:
        yield from _expand(pattern[: match.start()] + word + pattern[match.end() :])


class _Walk:
    """The search of one root."""

    def __init__(
        self,
        root: int,
        keys: tuple[str, str],
        latents: str,
        masks: str,
        captions: str,
        caption_lines: str,
        unused: ReportUnused,
        visited: set[tuple[int, int]],
        roots: Collection[tuple[int, int]],
    ) -> None:
        self.root, self.keys, self.latents, self.masks = root, keys, latents, masks
        self.captions, self.caption_lines, self.unused = captions, caption_lines, unused
        self.extensions = (f".{latents}",) if latents else IMAGE_EXTENSIONS
        self.visited = visited  # (device, inode) of each folder and tar, because links may form loops or lead to another root
        self.roots, self.has_other_roots, self.top = roots, False, (0, 0)

    def search(self, top: str) -> Iterator[DataSource]:
        """Yield all sources below a folder or in a tar. Raises UserError if the folder `top` is unreadable."""
        self.top = _identity(top)
        if listings.is_listing(top):
            yield from listings.sources(top, self.root, *self.keys, self.masks, captions=self.captions)
            return
        if not os.path.isdir(top):
            yield from self._samples(top)
            return
        stack: list[_Sources] = [self._listed(top, [])]  # no recursion, because folders may nest deeper than Python allows
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
            elif not isinstance(item, DataSource):
                stack.append(item)
            elif item.problem and item.path == top:
                raise UserError(
                    "folder-unreadable", f"data.folders: {shown(top)} {item.problem}; make it readable or remove it"
                )
            else:
                yield item

    def _is_visited(self, path: str) -> bool:
        """Return True for a folder or tar that is read under another name or for another root."""
        identity = _identity(path)
        if identity in self.visited:
            self.has_other_roots |= identity in self.roots and identity != self.top
            self.unused(path, REPEATED)
            return True
        if any(identity):
            self.visited.add(identity)
        return False

    def _folder(self, folder: str, above: list[metadata.Metadata]) -> _Sources:
        return iter(()) if self._is_visited(folder) else self._listed(folder, above)

    def _listed(self, folder: str, above: list[metadata.Metadata]) -> _Sources:
        """Yield a folder's sources and an iterator per subfolder or tar. `above` is its parents' metadata, nearest first."""
        try:
            with os.scandir(folder) as listing:
                entries = {entry.name: _is_folder(entry) for entry in listing}
        except OSError as error:
            yield DataSource(folder, self.root, problem=f"cannot be listed ({error.strerror})")
            return

        prefix = os.path.join(folder, "")
        for name in filter(is_system, sorted(entries)):
            self.unused(prefix + name, HIDDEN)
            del entries[name]
        with ExitStack() as open_tables:
            tables = []
            for name in sorted(entries):
                if name.lower() in metadata.FILES and not entries[name]:
                    is_used = self.captions == "file" or self.keys[1]
                    self.unused(prefix + name, METADATA if is_used else OTHER)
                    if is_used:
                        tables.append(open_tables.enter_context(closing(self._metadata(prefix + name))))
            for table in tables:
                yield from (DataSource(table.path, self.root, row, problem=reason) for row, reason in table.load())

            names = [name for name in sorted(entries) if not entries[name]]
            stems = self._stems(names)
            uses = Counter(stems.values())
            texts = Partners(names, CAPTION_EXTENSIONS, uses)
            masks = Partners(names, (self.masks.lower(),) if self.masks else (), uses)
            for name in sorted(entries):
                if entries[name]:
                    yield self._folder(prefix + name, tables + above)
                elif name.lower().endswith(tars.TARS):
                    yield self._tar(prefix + name)
                elif name in stems and self.latents and uses[stems[name]] > 1:
                    reason = "image has several files of latents; keep those of one VAE and size"
                    yield DataSource(prefix + name, self.root, problem=reason)
                elif name in stems:
                    yield self._image(prefix, name, stems[name], texts, masks, tables + above)
                elif not texts.has(name) and not masks.has(name) and name.lower() not in metadata.FILES:
                    self.unused(prefix + name, OTHER)
            for name in sorted(texts.unmatched):
                self.unused(prefix + name, STRAY)
            for name in sorted(masks.unmatched):
                yield DataSource(prefix + name, self.root, problem=MASK_WITHOUT_IMAGE)
            for table in tables:
                yield from (DataSource(table.path, self.root, row, problem=reason) for row, reason in table.unmatched())

    def _metadata(self, path: str) -> metadata.Metadata:
        return metadata.Metadata(path, *self.keys, stems=bool(self.latents), captions=self.captions == "file")

    def _tar(self, path: str) -> Iterator[DataSource]:
        return iter(()) if self._is_visited(path) else self._samples(path)

    def _samples(self, path: str) -> Iterator[DataSource]:
        return tars.samples(
            path,
            self.root,
            self.extensions,
            *self.keys,
            self.masks,
            captions=self.captions,
            caption_lines=self.caption_lines,
            unused=self.unused,
        )

    def _stems(self, names: list[str]) -> dict[str, str]:
        """Return the name of each image without its extension. Files that are no images are left out."""
        matches = {name: match for name in names if (match := _NAME_PATTERNS[self.latents].fullmatch(name))}
        # foo_sd.npz belongs to foo_sd if such an image or caption exists, otherwise to foo.
        beside = set(map(folded, names)) if self.latents == "npz" else set()
        stems = {}
        for name, match in matches.items():
            full = name.rpartition(".")[0]
            has_partner = any(folded(full + extension) in beside for extension in IMAGE_EXTENSIONS + CAPTION_EXTENSIONS)
            if not ends_in(name, self.masks):
                stems[name] = full if has_partner else match[1]
        return stems

    def _image(
        self, prefix: str, name: str, stem: str, texts: Partners, masks: Partners, tables: list[metadata.Metadata]
    ) -> DataSource:
        captions: tuple[str, ...] = ()
        weight, problem = None, ""
        for table in tables:  # every table records which of its images were looked up
            row: metadata.Entry = (), None
            try:
                row = table.lookup(prefix + (stem if self.latents else name))
            except Rejected as error:
                problem = problem or ("" if captions else error.reason)
            captions = captions or row[0]
            weight = row[1] if weight is None else weight
        paths = [prefix + text for extension in CAPTION_EXTENSIONS if (text := texts.find(stem, extension))]
        if self.captions == "filename":
            try:
                captions = name_captions(stem)
            except Rejected as error:
                problem = problem or error.reason
        mask_name = masks.find(stem, self.masks)
        mask = DataSource(prefix + mask_name, self.root) if mask_name else None
        source = DataSource(prefix + name, self.root, captions=captions, problem=problem, weight=weight, mask=mask)
        return source if captions or problem else replace(source, caption_paths=tuple(paths))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # `entry.is_dir()` raises for a link to itself.
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def scan_for(data: DataTable, unused: ReportUnused = lambda path, reason: None) -> Iterator[DataSource]:
    """Call `scan` with the settings of `[data]`, and leave out the images that data.exclude_files names."""
    keys = ("captions", "caption_key", "caption_lines", "weight_key", "latents", "masks")
    sources = scan(data.roots, **{key: getattr(data, key) for key in keys}, unused=unused)
    return without_listed(sources, data.exclude_files, unused) if data.exclude_files else sources


def count(data: DataTable, unused: ReportUnused = lambda path, reason: None) -> tuple[int, int]:
    """Count the images, and the images per epoch with repeats, without any filter by tag. Raises UserError as `scan` does."""
    images_per_root = Counter[int]()
    with work("counting images") as counting:
        for source in scan_for(data, unused):
            images_per_root[source.root] += not source.problem
            counting.add()
    return images_per_root.total(), sum(data.roots[root].repeats * images for root, images in images_per_root.items())


def captions_of(source: DataSource, lines: str = "variants") -> tuple[str, ...]:
    """Return an image's captions, stripped and without empty ones. `lines` is data.caption_lines.

    Raises:
        Rejected: a text file cannot be used.
    """
    texts = (text_captions(_read(path, "caption: ", MAX_CAPTION_BYTES), lines) for path in source.caption_paths)
    return source.captions or next(filter(None, texts), ())


def read_bytes(source: DataSource) -> bytes:
    """Read the file or tar member of an image. Raises Rejected if it is unreadable, truncated or larger than 1 GiB."""
    data = _read(source.path, "", MAX_IMAGE_BYTES, source.offset, source.length)
    if len(data) < source.length:
        raise Rejected("tar ends within this member", lasting=False)
    return data


def _read(path: str, prefix: str, limit: int, offset: int = 0, length: int = -1) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
            raise Rejected(f"{prefix}not a regular file", lasting=False)
        if (status.st_size if length < 0 else length) > limit:
            raise Rejected(f"{prefix}larger than {limit >> 20} MiB", lasting=False)
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise Rejected(f"{prefix}cannot be read ({error.strerror})", lasting=False) from None
