"""Files in the folders that are no part of the data. They are counted by ending and named: nothing is ignored in silence."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

from fastsd.data.sources.image import shown

OTHER = "neither an image nor a caption"
HIDDEN = "hidden, or made by a system"
STRAY = "caption without an image of the same name"
REPEATED = "a folder or tar that is read under another name"
METADATA = "metadata file"  # used for captions or weights
EXCLUDED = "excluded by data.exclude_files"
UNMATCHED = "line of data.exclude_files without an image"

ReportUnused = Callable[[str, str], None]  # receives a path and one of the reasons above
_EXAMPLES = 3
_ENDINGS = 8


class UnusedFiles:
    """Counts of unused files. `add` is a `ReportUnused`."""

    def __init__(self) -> None:
        self._endings: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, path: str, reason: str) -> None:
        self._counts[reason] += 1
        if reason == OTHER:
            self._endings[os.path.splitext(path)[1].lower() or "without ending"] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(shown(os.path.basename(path)))

    def lines(self) -> list[str]:
        """Return a sentence for each reason that is usual, with the endings or the first names of its files."""
        return [
            f"{count} {text}: {names}"
            for reason, text, names in (
                (OTHER, "other files are ignored", self._ending_list()),
                (HIDDEN, "hidden files and folders of systems are skipped", self._example_list(HIDDEN)),
                (EXCLUDED, "images are excluded by data.exclude_files", self._example_list(EXCLUDED)),
            )
            if (count := self._counts[reason])
        ]

    def warnings(self) -> list[str]:
        """Return a sentence for each reason that may be a mistake."""
        return [
            f"{count} {text}: {self._example_list(reason)}"
            for reason, text in (
                (STRAY, "captions have no image of the same name"),
                (UNMATCHED, "lines of data.exclude_files name no image of data.folders"),
            )
            if (count := self._counts[reason])
        ]

    def _ending_list(self) -> str:
        counts = sorted(self._endings.items(), key=lambda item: (-item[1], item[0]))
        listed = [f"{count} x {shown(ending)}" for ending, count in counts[:_ENDINGS]]
        return ", ".join(listed) + (", ..." if len(counts) > _ENDINGS else "")

    def _example_list(self, reason: str) -> str:
        examples = self._examples.get(reason, [])
        return ", ".join(examples) + (", ..." if self._counts[reason] > len(examples) else "")
