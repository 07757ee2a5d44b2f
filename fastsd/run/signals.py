"""Signals that commands obey.

                        a run                                                   other commands
SIGINT SIGTERM SIGHUP   saves and stops; at a second SIGINT or SIGTERM at once  stop and remove temporary files
SIGUSR1 SIGUSR2         the same as `touch trigger.checkpoint`, `... .sample`   nothing

A stop signal that is ignored when the command starts stays ignored, such as SIGHUP under nohup.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

Handler = Callable[[int, FrameType | None], None] | int

# Windows has neither.
HANGUP: int | None = getattr(signal, "SIGHUP", None)
REQUESTS: dict[int, str] = {
    getattr(signal, name): action
    for name, action in (("SIGUSR1", "checkpoint"), ("SIGUSR2", "sample"))
    if hasattr(signal, name)
}


class StopSignals:
    """The signals so far that asked a run to stop. It is true if there are any.

    While the run loads, exports, or is between two stages, everything is saved: a signal raises KeyboardInterrupt. Inside
    `deferred`, only a second one does.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._deferred = False

    def __bool__(self) -> bool:
        return bool(self._received)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block check for signals by itself, so that it can save first."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def receive(self, number: int) -> None:
        """Record a signal. Raises KeyboardInterrupt if the run need not or shall not save."""
        repeated = bool(self._received)
        self._received.append(number)
        if not self._deferred or (repeated and number != HANGUP):
            raise KeyboardInterrupt

    def describe(self) -> str:
        """Say what is lost by a stop through KeyboardInterrupt."""
        return "steps after the newest checkpoint are lost" if len(self._received) > 1 else "no step is lost"


@contextmanager
def stop_signals(run: Path) -> Iterator[StopSignals]:
    """Obey signals inside the context. `run` is the run's folder, which may not exist yet."""
    signals = StopSignals()

    def stop(number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _leave_terminal()
        signals.receive(number)

    def request(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            (run / f"trigger.{REQUESTS[number]}").touch()

    with _handlers(stop, request):
        yield signals


@contextmanager
def signals_of_commands() -> Iterator[None]:
    """Raise KeyboardInterrupt for all stop signals. Ignore requests until a run obeys them: by default they end the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        if number == HANGUP:
            _leave_terminal()
        raise KeyboardInterrupt

    with _handlers(stop, signal.SIG_IGN):
        yield


@contextmanager
def _handlers(stop: Handler, request: Handler) -> Iterator[None]:
    """Handle stop signals and requests inside the context, unless this is not the main thread: then the caller does."""
    handlers: dict[int, Handler] = dict.fromkeys(REQUESTS, request)
    stops = [signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else [])]
    handlers |= {number: stop for number in stops if signal.getsignal(number) != signal.SIG_IGN}
    old_handlers = {number: signal.getsignal(number) for number in handlers}
    is_main = threading.current_thread() is threading.main_thread()
    try:
        for number, handler in handlers.items() if is_main else ():
            signal.signal(number, handler)
        yield
    finally:
        for number, old_handler in old_handlers.items() if is_main else ():
            signal.signal(number, old_handler)


def end_at_signals() -> None:
    """Let stop signals end the process from here on, unless they are ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, *([HANGUP] if HANGUP else [])):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _leave_terminal() -> None:
    """Send the output of a closed terminal nowhere. Otherwise the next line that is printed would end the run."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # `isatty` denies it once the terminal is gone
            os.dup2(nowhere, stream)
    os.close(nowhere)
