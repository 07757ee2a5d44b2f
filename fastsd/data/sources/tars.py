"""Find the images and captions in WebDataset tars, which are read in place and never extracted.

A sample consists of adjacent members with the same key. The key is a member's name up to the first dot of the base name. The
rest, in lower case, is the extension. One pass over the headers finds the offset of every image and reads the captions.
The name of a mask is a key and an ending. If a tar is sorted by name, a mask may not be adjacent to its sample, so an earlier
pass finds all masks. The parser is written by hand. It takes a few microseconds for a member, and no false header makes it
allocate much memory.

Sources for the layout of a header: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, NamedTuple, TypeVar

from fastsd.data.sources.image import (
    CAPTION_EXTENSIONS,
    MASK_WITHOUT_IMAGE,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    DataSource,
    Rejected,
    ends_in,
    json_object,
    name_captions,
    row_captions,
    row_weight,
    shown,
    text_captions,
)
from fastsd.data.sources.names import is_system
from fastsd.data.sources.unused import HIDDEN, OTHER, STRAY, ReportUnused

_Value = TypeVar("_Value")
TARS = (".tar", ".tar.gz", ".tgz")
_BLOCK = 512
_MAX_EXTENDED = 1 << 20  # bytes of an extended header, which has for example a long name
_MAX_GROUP = 64  # members of one sample
_TEXT_EXTENSIONS = tuple(extension.removeprefix(".") for extension in CAPTION_EXTENSIONS)
_GZIP = b"\x1f\x8b"
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_KIND_NAMES = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"6": "pipe", b"S": "sparse file"}


class _Member(NamedTuple):
    name: str
    offset: int
    size: int
    problem: str


@dataclass
class _Group:
    """The sample that is being read, with its members by extension. `is_repeated` = its key has occurred before in the tar."""

    key: str
    is_repeated: bool = False
    members: dict[str, _Member] = field(default_factory=dict)


def samples(
    path: str,
    root: int,
    extensions: tuple[str, ...],
    caption_key: str,
    weight_key: str = "",
    masks: str = "",
    *,
    captions: str = "file",
    caption_lines: str = "variants",
    unused: ReportUnused = lambda path, reason: None,
) -> Iterator[DataSource]:
    """Yield the images in a tar, in its order, and every problem.

    Captions come from the first of `.txt`, `.caption` and `.json` that has any. With a `caption_key`, `.json` comes first.

    Args:
        root: index in data.folders, for the sources.
        extensions: image extensions, each with its dot.
        caption_key: key in the `.json`; "" = the first of text, caption, prompt.
        weight_key: key in the `.json`; "" = no weights.
        masks: ending that follows the key in the name of a mask; "" = no masks.
        captions: "file" = as above; "sidecar" = not from `.json`; "filename" = the key without its folder.
        caption_lines: "variants" = each line of a text is a caption; "join" = all lines are one caption.
        unused: receives each member that is not used, with the reason.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could block forever
            raise Rejected("not a regular file")
        with open(path, "rb") as file:
            options = extensions, caption_key, weight_key, masks, captions, caption_lines, unused
            yield from _Tar(file, status.st_size, path, root, *options).samples()
    except OSError as error:
        yield DataSource(path, root, problem=f"cannot be read ({error.strerror})")
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
    captions: str
    caption_lines: str
    unused: ReportUnused
    seen_keys: set[bytes] = field(default_factory=set)  # hashes of the keys of the samples read so far
    masks_by_key: dict[str, _Member] = field(default_factory=dict)  # masks of the samples that are not read yet

    def samples(self) -> Iterator[DataSource]:
        """Yield the sources of the tar. Raises Rejected where the tar is damaged or truncated."""
        self._find_masks()

        group = _Group("")
        try:
            for member in self._members():
                match = _KEY_AND_EXTENSION.fullmatch(unicodedata.normalize("NFC", member.name))
                key, extension = (match[1], match[2].lower()) if match else ("", "")
                if ends_in(member.name, self.masks):
                    continue
                if _is_system(member.name) or (not member.problem and not self._is_relevant(extension)):
                    self.unused(f"{self.path}/{member.name}", HIDDEN if _is_system(member.name) else OTHER)
                    continue
                if key != group.key:
                    yield from self._finish(group)
                    group = _Group(key, self._is_repeated(key))
                if not key:
                    yield self._reject(member, member.problem)
                elif extension in group.members:
                    yield self._reject(member, "repeated in the tar; the first is used")
                elif len(group.members) == _MAX_GROUP:
                    yield self._reject(member, f"more than {_MAX_GROUP} files have the key {shown(key)}")
                else:
                    group.members[extension] = member
        except Rejected as error:
            yield from self._finish(group, error.reason)
            raise

        yield from self._finish(group)
        for member in self.masks_by_key.values():
            yield self._reject(member, MASK_WITHOUT_IMAGE)

    def _find_masks(self) -> None:
        with suppress(Rejected):  # reported when the images are read
            for member in self._members() if self.masks else ():
                if ends_in(member.name, self.masks):
                    key = unicodedata.normalize("NFC", member.name[: -len(self.masks)])
                    problem = "repeated in the tar" if key in self.masks_by_key else member.problem
                    self.masks_by_key[key] = member._replace(problem=problem)

    def _is_repeated(self, key: str) -> bool:
        digest = hashlib.blake2b(os.fsencode(key), digest_size=8).digest()
        if digest in self.seen_keys:
            return True
        self.seen_keys.add(digest)
        return False

    def _is_relevant(self, extension: str) -> bool:
        return extension in _TEXT_EXTENSIONS or extension == "json" or f".{extension}".endswith(self.extensions)

    def _finish(self, group: _Group, end_reason: str = "") -> Iterator[DataSource]:
        """Yield the images of a sample. If an error ended the tar, `end_reason` is this error, and a caption may be missing."""
        if not group.members:
            return
        if group.is_repeated:
            first_member = next(iter(group.members.values()))
            reason = f"members with the key {shown(group.key)} are not adjacent; the first are used"
            yield self._reject(first_member, f"{reason}, pack with `tar --sort=name` to use all")
            return

        images = [member for extension, member in group.members.items() if f".{extension}" in self.extensions]
        for extension, member in group.members.items() if not images else ():
            if not member.problem and not f".{extension}".endswith(self.extensions):
                self.unused(f"{self.path}/{member.name}", STRAY)
        for extension, member in group.members.items():
            if member.problem and member not in images:
                yield DataSource(self.path, self.root, member.name, problem=member.problem)
            elif not images and f".{extension}".endswith(self.extensions):
                key = shown(group.key)
                reason = f"read as file .{shown(extension)} of sample {key}, because keys end at the first dot; rename it"
                yield self._reject(member, reason)

        if images:
            captions, weight, problem = self._caption_and_weight(group)
            mask = self.masks_by_key.pop(group.key, None)
            mask_source = mask and DataSource(self.path, self.root, mask.name, mask.offset, mask.size, problem=mask.problem)
            if end_reason and (not captions or (self.masks and not mask)):
                problem = problem or f"{'mask' if captions else 'caption'} may be missing: {end_reason}"
            for name, offset, size, image_problem in images:
                location = self.path, self.root, name, offset, size
                yield DataSource(
                    *location, captions=captions, problem=image_problem or problem, weight=weight, mask=mask_source
                )

    def _caption_and_weight(self, group: _Group) -> tuple[tuple[str, ...], float | None, str]:
        """Return the captions and weight of a sample, and the reason why it cannot be used, or ""."""
        members = group.members
        extensions = ("json", *_TEXT_EXTENSIONS) if self.caption_key else (*_TEXT_EXTENSIONS, "json")
        extensions = extensions if self.captions == "file" else _TEXT_EXTENSIONS
        try:
            has_weight = self.weight_key and "json" in members
            weight = self._read_json(members["json"], row_weight, self.weight_key) if has_weight else None
            if self.captions == "filename":
                return name_captions(group.key.rpartition("/")[2]), weight, ""
            for extension in extensions:
                if extension in members:
                    captions = self._read_captions(members[extension], extension)
                    if captions:
                        return captions, weight, ""
        except Rejected as error:
            return (), None, error.reason
        return (), weight, ""

    def _read_captions(self, member: _Member, extension: str) -> tuple[str, ...] | None:
        if extension == "json":
            return self._read_json(member, row_captions, self.caption_key)
        return text_captions(self._content(member), self.caption_lines)

    def _read_json(self, member: _Member, read: Callable[[dict[str, object], str], _Value], key: str) -> _Value:
        data = self._content(member)
        if len(data) > MAX_CAPTION_BYTES:
            raise Rejected(".json: larger than 1 MiB")
        try:
            return read(json_object(data), key)
        except Rejected as error:
            raise Rejected(f".json: {error.reason}") from None

    def _content(self, member: _Member) -> bytes:
        if member.problem:
            raise Rejected(f"caption {shown(member.name)}: {member.problem}")
        return self._read(member.offset, min(member.size, MAX_CAPTION_BYTES + 1))

    def _reject(self, member: _Member, reason: str) -> DataSource:
        """Return a source with the problem of a member. Its name has the offset, because names may be repeated."""
        return DataSource(self.path, self.root, f"{member.name} (at byte {member.offset})", problem=reason)

    def _read(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(size)

    def _members(self) -> Iterator[_Member]:
        """Yield every member except folders. Raises Rejected if the file is damaged, truncated, compressed or not a tar."""
        offset, extended = 0, _Extended()
        while True:
            header = self._read(offset, _BLOCK)
            if len(header) < _BLOCK:
                raise Rejected(self._end_reason(offset, header))
            if header.count(0) == _BLOCK:
                return
            if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156]):
                raise Rejected(self._damage_reason(offset, header))

            kind, size, data_offset = header[156:157], _number(header[124:136]), offset + _BLOCK
            if size < 0:
                raise Rejected(self._damage_reason(offset, header))
            if extended.size >= 0 and kind not in b"gKLXx":
                size = extended.size
            map_continues = kind == b"S" and header[482]
            while map_continues:  # the map of a sparse file
                block = self._read(data_offset, _BLOCK)
                map_continues, data_offset = len(block) == _BLOCK and block[504], data_offset + _BLOCK
            offset = data_offset if kind in b"123456" else data_offset + -(-size // _BLOCK) * _BLOCK
            if offset > data_offset and data_offset + size > self.size:
                raise Rejected(f"truncated at byte {self.size}, within {shown(_name(header, extended))}")

            if kind in b"KLXx":
                extended.add(kind, size, self._read(data_offset, size) if size <= _MAX_EXTENDED else b"")
            elif kind != b"g":
                name = _name(header, extended)
                if kind not in b"5DV" and not name.endswith("/"):
                    yield _Member(name, data_offset, size, _problem(kind, name, size, extended))
                extended = _Extended()

    def _end_reason(self, offset: int, header: bytes) -> str:
        if offset == 0:
            return self._damage_reason(offset, header)
        return f"ends at byte {self.size} without an end mark, may be truncated; the members before are used"

    def _damage_reason(self, offset: int, header: bytes) -> str:
        if offset == 0 and (header.startswith(_GZIP) or self.path.lower().endswith(TARS[1:])):
            return "compressed; unpack it with gunzip first"
        if offset == 0:
            return "not a tar" if header else "file is empty"
        return f"damaged at byte {offset}; the members before are used"


@dataclass
class _Extended:
    """Contents of the extended headers that precede a member."""

    name: str = ""
    size: int = -1
    problem: str = ""

    def add(self, kind: bytes, size: int, data: bytes) -> None:
        if size > _MAX_EXTENDED:
            self.problem = "extended header is larger than 1 MiB"
        elif kind == b"L":
            self.name = _text(data)
        elif kind in b"Xx":
            try:
                self._records(data)
            except ValueError:
                self.problem = "extended header is damaged"

    def _records(self, data: bytes) -> None:
        """Parse pax records: "length key=value\\n", where length is the number of bytes of the whole record."""
        offset = 0
        while offset < len(data) and data[offset]:
            length = int(data[offset : data.index(b" ", offset)])
            record = data[offset : offset + length]
            if length < 5 or len(record) < length or not record.endswith(b"\n"):
                raise ValueError
            key, _, value = record[:-1].partition(b" ")[2].partition(b"=")
            if key == b"path":
                self.name = _text(value)
            elif key == b"size":
                self.size = max(int(value), 0)
            elif key.startswith(b"GNU.sparse."):
                self.problem = _unsupported(b"S")
            offset += length


def _is_system(name: str) -> bool:
    return any(map(is_system, (folder for folder in name.split("/") if folder not in (".", ".."))))


def _unsupported(kind: bytes) -> str:
    return f"{_KIND_NAMES[kind]} (not supported)" if kind in _KIND_NAMES else "not a regular file"


def _problem(kind: bytes, name: str, size: int, extended: _Extended) -> str:
    if extended.problem:
        return extended.problem
    if name.startswith("/") or ".." in name.split("/"):
        return "path is outside the tar"
    if kind not in b"0\x007":
        return _unsupported(kind)
    return "larger than 1 GiB" if size > MAX_IMAGE_BYTES else ""


def _name(header: bytes, extended: _Extended) -> str:
    if extended.name:
        return extended.name
    # In GNU's own format, these bytes are times. In POSIX's, they are the start of a long name.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Parse octal digits, or GNU's binary form of a large number. Return -1 for anything else."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1
