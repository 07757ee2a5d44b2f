"""WebDataset tars: images and captions in tar files, read in place, never extracted.

A sample is a run of adjacent members with the same key. The key is a member's name up to the first dot of the base name; the
rest, in lower case, is the extension. One pass over the headers finds the offset of every image and reads the captions.
The name of a mask is a key and an ending. Sorted by name, a mask need not be adjacent to its sample, so an earlier pass
finds all masks. The parser is written by hand: a member takes a few microseconds, and no false header costs memory or time.

Layout of a header: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, TypeVar

from fastsd.data.sources.image import (
    CAPTION_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    NO_IMAGE,
    DataSource,
    Rejected,
    ends_in,
    json_object,
    row_captions,
    row_weight,
    shown,
    text_captions,
)

_Said = TypeVar("_Said")
TARS = (".tar", ".tar.gz", ".tgz")
_BLOCK = 512
_MAX_EXTENDED = 1 << 20  # bytes of an extended header, such as a long name
_MAX_GROUP = 64  # members of one sample
_TEXTS = tuple(extension.removeprefix(".") for extension in CAPTION_EXTENSIONS)
_GZIP = b"\x1f\x8b"
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_KINDS = {
    b"1": "it is a hard link", b"2": "it is a symbolic link", b"3": "it is a device", b"4": "it is a device",
    b"6": "it is a pipe", b"S": "it is a sparse file",
}  # fmt: skip


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    problem: str


@dataclass
class _Group:
    """The sample being read: its members by extension. `again`: its key occurred earlier in the tar."""

    key: str
    again: bool = False
    members: dict[str, _Member] = field(default_factory=dict)


def samples(
    path: str, root: int, extensions: tuple[str, ...], caption_key: str, weight_key: str = "", masks: str = ""
) -> Iterator[DataSource]:
    """Yield the images in a tar, in its order, and every problem found.

    Captions come from `.txt`, then `.caption` (one per line), then `.json`. With a `caption_key`, `.json` comes first.

    Args:
        root: index in data.folders, stored in each source.
        extensions: image extensions, with their dot.
        caption_key: key in the `.json`; "" = the first of text, caption, prompt.
        weight_key: key in the `.json`; "" = no weights.
        masks: ending after the key in a mask's name; "" = no masks.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
            raise Rejected("it is no regular file")
        with open(path, "rb") as file:
            yield from _Tar(file, status.st_size, path, root, extensions, caption_key, weight_key, masks).samples()
    except OSError as error:
        yield DataSource(path, root, problem=f"it cannot be read ({error.strerror})")
    except Rejected as error:
        yield DataSource(path, root, problem=error.reason)


@dataclass
class _Tar:
    file: IO[bytes]
    size: int
    path: str
    root: int
    extensions: tuple[str, ...]
    caption_key: str
    weight_key: str
    masks: str
    known: set[bytes] = field(default_factory=set)  # hashes of the keys so far
    masked: dict[str, _Member] = field(default_factory=dict)  # masks by key, for samples not read yet

    def samples(self) -> Iterator[DataSource]:
        """Yield the tar's sources. Raises Rejected where the tar is damaged or cut off."""
        self._find_masks()
        group = _Group("")
        try:
            for member in self._members():
                match = _KEY.fullmatch(member.name)
                key, extension = (match[1], match[2].lower()) if match else ("", "")
                if ends_in(member.name, self.masks) or (not member.problem and not self._wanted(extension)):
                    continue
                if key != group.key:
                    yield from self._finish(group)
                    group = _Group(key, self._met(key))
                if not key:
                    yield self._bad(member, member.problem)
                elif extension in group.members:
                    yield self._bad(member, "the tar holds it more than once; the first counts")
                elif len(group.members) == _MAX_GROUP:
                    yield self._bad(member, f"more than {_MAX_GROUP} files share its key {shown(key)}")
                else:
                    group.members[extension] = member
        except Rejected as error:
            yield from self._finish(group, error.reason)
            raise
        yield from self._finish(group)
        for member in self.masked.values():
            yield self._bad(member, NO_IMAGE)

    def _find_masks(self) -> None:
        with suppress(Rejected):  # reported when the images are read
            for member in self._members() if self.masks else ():
                if ends_in(member.name, self.masks):
                    key = member.name[: -len(self.masks)]
                    problem = "the tar holds it more than once" if key in self.masked else member.problem
                    self.masked[key] = member._replace(problem=problem)

    def _met(self, key: str) -> bool:
        digest = hashlib.blake2b(os.fsencode(key), digest_size=8).digest()
        if digest in self.known:
            return True
        self.known.add(digest)
        return False

    def _wanted(self, extension: str) -> bool:
        return extension in _TEXTS or extension == "json" or f".{extension}".endswith(self.extensions)

    def _finish(self, group: _Group, cut: str = "") -> Iterator[DataSource]:
        """Yield the images of a sample. `cut`: "", or the error that ended the tar here, so its caption may be missing."""
        if not group.members:
            return
        if group.again:
            first = next(iter(group.members.values()))
            reason = f"its key {shown(group.key)} was there before: members of a sample must lie side by side"
            yield self._bad(first, f"{reason}; the first ones count, `tar --sort=name` puts them in order")
            return
        images = [member for extension, member in group.members.items() if f".{extension}" in self.extensions]
        for extension, member in group.members.items():
            if member.problem and member not in images:
                yield DataSource(self.path, self.root, member.name, problem=member.problem)
            elif not images and f".{extension}".endswith(self.extensions):
                key = shown(group.key)
                reason = (
                    f"it counts as the file .{shown(extension)} of sample {key}, for a key ends at the first dot; rename it"
                )
                yield self._bad(member, reason)
        if images:
            captions, weight, problem = self._said(group.members)
            mask = self.masked.pop(group.key, None)
            mask_source = mask and DataSource(self.path, self.root, mask.name, mask.offset, mask.size, problem=mask.problem)
            if cut and (not captions or (self.masks and not mask)):
                problem = problem or f"its {'mask' if captions else 'caption'} may be missing: {cut}"
            for name, offset, size, image_problem in images:
                location = self.path, self.root, name, offset, size
                yield DataSource(
                    *location, captions=captions, problem=image_problem or problem, weight=weight, mask=mask_source
                )

    def _said(self, members: dict[str, _Member]) -> tuple[tuple[str, ...], float | None, str]:
        """Return the captions and weight of a sample, and the reason it cannot be used, or ""."""
        extensions = ("json", *_TEXTS) if self.caption_key else (*_TEXTS, "json")
        try:
            has_weight = self.weight_key and "json" in members
            weight = self._read_json(members["json"], row_weight, self.weight_key) if has_weight else None
            for extension in extensions:
                if extension in members:
                    captions = self._read_captions(members[extension], extension)
                    if captions is not None:
                        return captions, weight, ""
        except Rejected as error:
            return (), None, error.reason
        return (), weight, ""

    def _read_captions(self, member: _Member, extension: str) -> tuple[str, ...] | None:
        if extension == "json":
            return self._read_json(member, row_captions, self.caption_key)
        return text_captions(self._content(member))

    def _read_json(self, member: _Member, read: Callable[[dict[str, Any], str], _Said], key: str) -> _Said:
        data = self._content(member)
        if len(data) > MAX_CAPTION_BYTES:
            raise Rejected("its .json is larger than 1 MiB")
        try:
            return read(json_object(data), key)
        except Rejected as error:
            raise Rejected(f"{error.reason} (.json)") from None

    def _content(self, member: _Member) -> bytes:
        if member.problem:
            raise Rejected(f"its caption {shown(member.name)} is of no use: {member.problem}")
        return self._read(member.offset, min(member.size, MAX_CAPTION_BYTES + 1))

    def _bad(self, member: _Member, reason: str) -> DataSource:
        """Report a problem with a member. The offset identifies it, because several members may have the same name."""
        return DataSource(self.path, self.root, f"{member.name} (at byte {member.offset})", problem=reason)

    def _read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(size)

    def _members(self) -> Iterator[_Member]:
        """Yield every member except folders. Raises Rejected if the file is damaged, cut off, compressed, or not a tar."""
        offset, extended = 0, _Extended()
        while True:
            header = self._read(offset, _BLOCK)
            if len(header) < _BLOCK:
                raise Rejected(self._ending(offset, header))
            if header.count(0) == _BLOCK:
                return
            if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156]):
                raise Rejected(self._damaged(offset, header))
            kind, size, data_offset = header[156:157], _number(header[124:136]), offset + _BLOCK
            if size < 0:
                raise Rejected(self._damaged(offset, header))
            if extended.size >= 0 and kind not in b"gKLXx":
                size = extended.size
            map_continues = kind == b"S" and header[482]
            while map_continues:  # the map of a sparse file
                block = self._read(data_offset, _BLOCK)
                map_continues, data_offset = len(block) == _BLOCK and block[504], data_offset + _BLOCK
            offset = data_offset if kind in b"123456" else data_offset + -(-size // _BLOCK) * _BLOCK
            if offset > data_offset and data_offset + size > self.size:
                raise Rejected(f"it is cut off at byte {self.size}, within {shown(_name(header, extended))}")
            if kind in b"KLXx":
                extended.add(kind, size, self._read(data_offset, size) if size <= _MAX_EXTENDED else b"")
            elif kind != b"g":
                name = _name(header, extended)
                if kind not in b"5DV" and not name.endswith("/"):
                    yield _Member(name, data_offset, size, _problem(kind, name, size, extended))
                extended = _Extended()

    def _ending(self, at: int, header: bytes) -> str:
        if at == 0:
            return self._damaged(at, header)
        return f"it ends at byte {self.size} without the mark that ends a tar, so it may be cut off; what came before is used"

    def _damaged(self, at: int, header: bytes) -> str:
        if at == 0 and (header.startswith(_GZIP) or self.path.lower().endswith(TARS[1:])):
            return "it is compressed; unpack it with gunzip first: members of a compressed tar cannot be read one by one"
        if at == 0:
            return "it is no tar" if header else "the file is empty"
        return f"it is damaged at byte {at}; what came before is used"


@dataclass
class _Extended:
    """Contents of the extended headers that precede a member."""

    name: str = ""
    size: int = -1
    problem: str = ""

    def add(self, kind: bytes, size: int, data: bytes) -> None:
        if size > _MAX_EXTENDED:
            self.problem = "its extended header is larger than 1 MiB"
        elif kind == b"L":
            self.name = _text(data)
        elif kind in b"Xx":
            try:
                self._records(data)
            except ValueError:
                self.problem = "its extended header is damaged"

    def _records(self, data: bytes) -> None:
        """Parse pax records: "length key=value\\n", where length counts the whole record, itself included."""
        at = 0
        while at < len(data) and data[at]:
            length = int(data[at : data.index(b" ", at)])
            record = data[at : at + length]
            if length < 5 or len(record) < length or not record.endswith(b"\n"):
                raise ValueError
            key, _, value = record[:-1].partition(b" ")[2].partition(b"=")
            if key == b"path":
                self.name = _text(value)
            elif key == b"size":
                self.size = max(int(value), 0)
            elif key.startswith(b"GNU.sparse."):
                self.problem = _KINDS[b"S"]
            at += length


def _problem(kind: bytes, name: str, size: int, extended: _Extended) -> str:
    if extended.problem:
        return extended.problem
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads out of the tar"
    if kind not in b"0\x007":
        return _KINDS.get(kind, "it is no regular file")
    return "it is larger than 1 GiB" if size > MAX_IMAGE_BYTES else ""


def _name(header: bytes, extended: _Extended) -> str:
    if extended.name:
        return extended.name
    # GNU's own format has times where POSIX has the start of a long name.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Parse octal digits, or GNU's binary form of large numbers; -1 for anything else."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1
