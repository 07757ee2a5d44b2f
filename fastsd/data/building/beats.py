"""Beats: small files by which machines see that the others are at work, without comparing their clocks."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

BEAT_SECONDS = 5.0
LOST_SECONDS = 60.0  # a beat that stands still for so long is that of a lost machine; network disks hide changes for seconds
_POLL_SECONDS = 0.2
_ENDED = "ended"


class Beats:
    """The beats of machines, as this process sees them. Thread-safe is only what `beating` runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: dict[str, tuple[str, float]] = {}  # name -> last beat, and when it was new

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.beat"

    def read(self, name: str) -> str:
        try:
            return self.path(name).read_text(errors="replace").strip()
        except OSError:
            return ""

    def is_lost(self, name: str) -> bool:
        """Return True if a machine has ended, or if its beat has not changed for `LOST_SECONDS` of this process's clock."""
        beat, now = self.read(name), time.monotonic()
        if name not in self._seen or self._seen[name][0] != beat:
            self._seen[name] = beat, now
        return beat.endswith(_ENDED) or now - self._seen[name][1] > LOST_SECONDS

    def has_ended(self, name: str) -> bool:
        """Return True if a machine has ended in an orderly way, or never began."""
        beat = self.read(name)
        return not beat or beat.endswith(_ENDED)

    def is_of_another_machine(self, name: str) -> bool:
        """Return True if a beat is that of another machine, or of this one before its last start, and was not ended."""
        return not self.has_ended(name) and not self.read(name).startswith(machine_id())

    def is_moving(self, name: str) -> bool:
        """Wait until the beat changes, and return True. Return False if it is that of a lost machine."""
        first = self.read(name)
        while not self.is_lost(name):
            if self.read(name) != first:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    @contextlib.contextmanager
    def beating(self, name: str) -> Iterator[None]:
        """Beat until the block ends."""
        stop = threading.Event()
        who = f"{machine_id()} {os.getpid()}"

        def beat() -> None:
            for count in range(sys.maxsize):
                self._write(name, f"{who} {count}")
                if stop.wait(BEAT_SECONDS):
                    return

        self._write(name, f"{who} start")
        thread = threading.Thread(target=beat, name="fastsd-beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def end(self, name: str) -> None:
        self._write(name, f"{machine_id()} {_ENDED}")

    def _write(self, name: str, beat: str) -> None:
        # In place: a network disk shows a new file under an old name later than new contents of a file.
        with contextlib.suppress(OSError), open(self.path(name), "r+b" if self.path(name).exists() else "w+b") as file:
            file.write(beat.ljust(80).encode())


def machine_id() -> str:
    """Return a text that differs between machines, and between two starts of one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"


def lost_seconds() -> str:
    """Return the longest wait for a lost machine, for a message."""
    return f"{LOST_SECONDS:.0f}"
