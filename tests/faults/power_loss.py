"""Disks after a power cut, computed from the recorded calls of a process.

A power cut keeps what was flushed: a file's data by fsync of the file, and the names in a folder by fsync of the folder. Of the
calls after that, a file system may keep all, none, or some in any order. Each is a call that changes a file (a write or a new
size) or a group of names (a rename removes one and adds another, and is never done by halves).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Files = dict[str, bytes]  # contents by path; folders are left out
VARIANTS = ("kept", "lost", "names", "zeros", "prefix", "subset")


@dataclass(frozen=True)
class Call:
    """One recorded call, see `record` in `shim.c`."""

    name: str
    error: int
    offset: int
    path: str
    other: str
    data: bytes


def read_trace(path: Path) -> list[Call]:
    """Read the calls that a process has made."""
    calls = []
    with open(path, "rb") as file:
        while line := file.readline():
            name, error, offset, size, first, second = line.decode().removesuffix("\n").split("\t")
            calls.append(Call(name, int(error), int(offset), first, second, file.read(int(size))))
    return calls


@dataclass(eq=False)
class File:
    """A file: the data on the disk, and the changes since: (offset, data), or (size, None)."""

    flushed: bytes = b""
    changes: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, changes: list[tuple[int, bytes | None]]) -> bytes:
        data = bytearray(self.flushed)
        for offset, block in changes:
            end = offset + len(block or b"")
            data += bytes(max(end - len(data), 0))
            if block is None:
                del data[offset:]
            else:
                data[offset:end] = block
        return bytes(data)


@dataclass(eq=False)
class Folder:
    """A folder: the names now, and those on the disk."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    flushed: dict[str, File | Folder] = field(default_factory=dict)


Change = tuple[Folder, str, File | Folder | None]  # None = the name is removed


class Disk:
    """The files of a folder while a process runs.

    Args:
        root: a folder whose files are on the disk; None = there are no files.
        prefix: the path of the folder in the recorded calls. Calls for other paths are ignored.
    """

    def __init__(self, root: Path | None, prefix: str) -> None:
        self.prefix, self.top = prefix, Folder()
        self.pending: list[list[Change]] = []  # changes of names since the last flush of their folder, oldest first
        files: dict[int, File] = {}
        folders = {root: self.top}
        for path in sorted(root.rglob("*")) if root else ():
            if path.is_dir():
                node = folders[path] = Folder()
            else:
                node = files.setdefault(path.stat().st_ino, File(path.read_bytes()))
            for names in (folders[path.parent].names, folders[path.parent].flushed):
                names[path.name] = node

    def apply(self, call: Call) -> None:
        """Do what a call did."""
        inside = [self._place(path) for path in (call.path, call.other) if path]
        if call.error or None in inside:
            return
        folder, name = inside[0]
        node = folder.names.get(name) if name else folder
        if call.name == "mkdir":
            self._change([(folder, name, Folder())])
        elif call.name == "create":
            self._change([(folder, name, File())])
        elif call.name in ("unlink", "rmdir"):
            self._change([(folder, name, None)])
        elif call.name in ("rename", "link"):
            self._change([(*inside[1], node), *([(folder, name, None)] if call.name == "rename" else [])])
        elif call.name == "fsync":
            self._flush(node)
        elif call.name == "write":
            node.changes.append((call.offset, call.data))
        elif call.name in ("truncate", "resize"):
            node.changes.append((call.offset, None))

    def _place(self, path: str) -> tuple[Folder, str] | None:
        if path != self.prefix and not path.startswith(f"{self.prefix}/"):
            return None
        folder, parts = self.top, path.removeprefix(self.prefix).strip("/").split("/")
        for part in parts[:-1]:
            folder = folder.names[part]
        return folder, parts[-1]

    def _change(self, changes: list[Change]) -> None:
        _set(changes, "names")
        self.pending.append(changes)

    def _flush(self, node: File | Folder) -> None:
        if isinstance(node, File):
            node.flushed, node.changes = node.content(node.changes), []
            return
        for changes in [group for group in self.pending if any(folder is node for folder, _, _ in group)]:
            _set(changes, "flushed")
            self.pending.remove(changes)

    def after_power_cut(self, variant: str, rng: random.Random) -> Files:
        """Return the files after a power cut.

        Args:
            variant: "kept" = nothing is lost, as after a kill. "lost" = only flushed data and names are left. "names" = all
                names are left, but only flushed data; "zeros" = also the lengths, with zeros instead of data. "prefix" and
                "subset" = some changes of names are left, the first ones or any, and some changes of each file.
        """
        pending = {"kept": self.pending, "lost": [], "names": self.pending, "zeros": self.pending}.get(variant)
        if pending is None:
            pending = [group for group in self.pending if rng.random() < 0.5]
            pending = self.pending[: len(pending)] if variant == "prefix" else pending
        saved = [(folder, dict(folder.flushed)) for group in pending for folder, _, _ in group]
        for group in pending:
            _set(group, "flushed")
        files = dict(self._walk(self.top, "", variant, rng))
        for folder, names in reversed(saved):
            folder.flushed = names
        return files

    def _walk(self, folder: Folder, path: str, variant: str, rng: random.Random) -> Iterator[tuple[str, bytes]]:
        for name, node in folder.flushed.items():
            if isinstance(node, Folder):
                yield from self._walk(node, f"{path}{name}/", variant, rng)
            else:
                changes = list(node.changes)
                if variant in ("lost", "names"):
                    changes = []
                elif variant == "zeros":
                    changes = [(offset, block and bytes(len(block))) for offset, block in changes]
                elif variant != "kept":
                    changes = [
                        (offset, block and block[: rng.choice((512, None))]) for offset, block in changes if rng.random() < 0.5
                    ]
                yield f"{path}{name}", node.content(changes)


def _set(changes: list[Change], table: str) -> None:
    for folder, name, node in changes:
        if node is None:
            getattr(folder, table).pop(name, None)
        else:
            getattr(folder, table)[name] = node


def write_files(files: Files, folder: Path) -> None:
    """Write the files of a disk into a new folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    os.makedirs(folder, exist_ok=True)
