"""Match the names of images with those of their captions, masks and rows, and recognise what a system has left in a folder.

A name may differ from its partner's in two ways that people do not see. Windows ignores case, so `A.JPG` may have `A.TXT` or
`a.txt`. macOS writes accents as separate characters (NFD), and most other programs do not (NFC).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable

# Folders with thumbnails, deleted files or copies of old states: Synology, QNAP, macOS archives, Windows, ext4.
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "lost+found")
    + ("__macosx", "$recycle.bin", "recycler", "system volume information")
)


def is_system(name: str) -> bool:
    """Return True for a hidden file or folder, and for a folder that an operating system or a NAS has made."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def folded(name: str) -> str:
    """Return a form of a name that is equal for names that differ only in case or in the encoding of accents."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


class Partners:
    """The files of a folder that have the name of an image and one of `endings`.

    A file with exactly an image's name belongs to this image. If there is none, a file whose name differs only in case or in
    the encoding of accents does, unless that is exactly the name of another image.

    Args:
        names: names of files.
        endings: endings that replace the extension of an image, in lower case.
        stems: names of the folder's images, without extension.
    """

    def __init__(self, names: Iterable[str], endings: tuple[str, ...], stems: Collection[str]) -> None:
        self._stems = stems
        self._by_folded: dict[str, list[str]] = {}
        for name in names:
            if name.lower().endswith(endings):
                self._by_folded.setdefault(folded(name), []).append(name)
        self._names = {name for group in self._by_folded.values() for name in group}
        self.unmatched = set(self._names)

    def has(self, name: str) -> bool:
        """Return True for a file with one of the endings."""
        return name in self._names

    def find(self, stem: str, ending: str) -> str:
        """Return the name of the file that belongs to an image, or "". It is no longer in `unmatched`."""
        names = self._by_folded.get(folded(stem + ending), [])
        stems = {name: name[: -len(ending)] for name in names}
        free = [name for name in names if stems[name] == stem or stems[name] not in self._stems]
        best = min(free, key=lambda name: (name != stem + ending, stems[name] != stem, name), default="")
        self.unmatched.discard(best)
        return best
