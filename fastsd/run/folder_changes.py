"""Notice that the folders of a run's data have changed since they were cached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastsd.config.schema import Config
from fastsd.data.building import lists
from fastsd.errors import UserError
from fastsd.terminal.console import Console

_PATIENCE = 1.0  # seconds that a run waits at its end for the comparison


@contextmanager
def noticed_changes(config: Config, view: str, console: Console) -> Iterator[None]:
    """Compare the folders with a view of the cache while a run trains, and warn if they differ.

    The comparison runs in a thread, because the listing of a million images can take a minute. A run needs no folders, so one
    that cannot be listed is no reason for a warning.
    """

    def compare() -> None:
        with suppress(UserError, OSError):
            if changes := lists.changes(config.data, Path(config.cache.dir), view):
                console.warn(str(changes))

    thread = threading.Thread(target=compare, name="fastsd-folders", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(_PATIENCE)
