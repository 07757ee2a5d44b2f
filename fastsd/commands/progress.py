"""Show the progress of building a cache, and of commands that count images as it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fastsd.data.building import build
from fastsd.terminal.console import Work, work


@contextmanager
def progress() -> Iterator[build.ProgressCallback]:
    """Yield a callback that shows the progress it is called with. Each phase is work of its own."""
    with ExitStack() as stack:
        works: dict[str, Work] = {}

        def show(event: build.CacheProgress) -> None:
            if event.phase not in works:
                stack.close()
                works[event.phase] = stack.enter_context(work(event.phase, event.total))
            limit = f" | limited by {event.limit}" if event.limit else ""
            unit = "captions" if event.phase == "states" else "img"
            note = f"{event.images_per_second:.1f} {unit}/s{limit}"
            works[event.phase].set(event.done, event.total, event.images_per_second, note)

        yield show
