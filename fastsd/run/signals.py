"""Signals that a run obeys.

SIGINT SIGTERM SIGHUP   save and stop; a second SIGINT or SIGTERM stops at once
SIGUSR1 SIGUSR2         the same as `touch trigger.checkpoint` and `touch trigger.sample`
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

# Windows has neither.
HANGUP: int | None = getattr(signal, "SIGHUP", None)
REQUESTS: dict[int, str] = {
    getattr(signal, name): action
    for name, action in (("SIGUSR1", "checkpoint"), ("SIGUSR2", "sample"))
    if hasattr(signal, name)
}


@contextmanager
def stop_signal(run: Path) -> Iterator[list[int]]:
    """Obey signals. Yield a list to which those are added that ask the loop to save and stop."""
    received_signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _leave_terminal()
        elif received_signals:
            raise KeyboardInterrupt
        received_signals.append(number)

    def request(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            (run / f"trigger.{REQUESTS[number]}").touch()

    handlers = {signal.SIGINT: stop, signal.SIGTERM: stop} | dict.fromkeys(REQUESTS, request)
    handlers |= {HANGUP: stop} if HANGUP else {}
    try:
        old_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # not in the main thread: the caller handles signals
        yield received_signals
        return
    try:
        yield received_signals
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


def _leave_terminal() -> None:
    """Send the output of a closed terminal nowhere. Otherwise the next line that is printed would end the run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # `isatty` denies it once the terminal is gone
            os.dup2(nowhere, stream)
    os.close(nowhere)
