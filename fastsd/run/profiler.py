"""Traces of training steps, which the user requests with a file RUN/trigger.profile. Open them in Perfetto or chrome://tracing.

RUN/profiles/step-00000120.json   the last steps up to step 120, and what the run does between them
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastsd.run.checkpoint import name_of
from fastsd.storage import new_file
from fastsd.terminal.console import Console

STEPS = 5  # length of a trace


class Profiler:
    """Traces the steps of a stage on request. An error is only a warning, because training does not depend on a trace."""

    def __init__(self, run: Path, console: Console) -> None:
        self.folder, self.console = run / "profiles", console
        self._trace: torch.profiler.profile | None = None
        self._first = self._last = 0  # the trace covers the steps after `_first`, up to `_last`

    def after_step(self, step: int, *, requested: bool) -> None:
        """Start a trace if it is `requested`. Write the current trace when it has `STEPS` steps."""
        self._last = step
        if self._trace and step == self._first + STEPS:
            self.close()
        elif requested and not self._trace:
            with self._errors_as_warnings():
                self._trace, self._first = torch.profiler.profile(), step
                self._trace.start()

    def close(self) -> None:
        """Write the current trace, if there is one."""
        trace, self._trace = self._trace, None
        if trace:
            with self._errors_as_warnings():
                trace.stop()
                self.folder.mkdir(exist_ok=True)
                path = self.folder / f"{name_of(self._last)}.json"
                with new_file(path) as temporary:
                    trace.export_chrome_trace(str(temporary))
                self.console.echo(f"profile of {self._last - self._first} steps: {path}")

    @contextmanager
    def _errors_as_warnings(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._trace = None
            self.console.warn(f"profile at step {self._last} failed: {error}; training continues")
