"""Show the progress of a long command: a live line on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastsd.console import Console
from fastsd.data.building import build

PLAIN_SECONDS = 10  # time between progress lines if the output is not a terminal


@contextmanager
def progress(console: Console) -> Iterator[build.ProgressCallback]:
    """Yield a callback that shows the progress it is called with."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        yield _show_live(bar) if console.is_terminal else _show_lines(console)


def _show_live(bar: Progress) -> build.ProgressCallback:
    tasks: dict[str, object] = {}

    def show(event: build.CacheProgress) -> None:
        task = tasks.get(event.phase)
        if task is None:
            task = tasks[event.phase] = bar.add_task(event.phase, total=event.total or None, speed="")
        bar.update(task, completed=event.done, speed=_speed(event))  # type: ignore[arg-type]

    return show


def _show_lines(console: Console) -> build.ProgressCallback:
    last_time = time.monotonic()

    def show(event: build.CacheProgress) -> None:
        nonlocal last_time
        if time.monotonic() - last_time > PLAIN_SECONDS:
            last_time = time.monotonic()
            seconds_left = (event.total - event.done) / max(event.images_per_second, 1e-9)
            eta = f" | ETA {timedelta(seconds=round(seconds_left))}" if event.total else ""
            console.echo(f"{event.phase} {event.done}/{event.total or '?'} | {_speed(event)}{eta}")

    return show


def _speed(event: build.CacheProgress) -> str:
    unit = "captions" if event.phase == "states" else "img"
    return f"{event.images_per_second:.1f} {unit}/s" + (f" | limited by {event.limit}" if event.limit else "")
