"""`fastsd watch RUN ...`: one page, served on this machine only, that shows runs while they train and refreshes itself.

It reads the files of the runs and changes nothing. Addresses:

    /                    the page, with all sections
    /sections            JSON: [id, HTML] of each section
    /grid/RUN/FILE       a sample grid; RUN is the number of the run on the command line, from 0
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from urllib.parse import quote, unquote

from fastsd.compare import charts, numbers, page
from fastsd.compare.numbers import Table, Words
from fastsd.compare.page import Section
from fastsd.compare.runs import COLOURS, RunData, read_run
from fastsd.config.stages import ENDLESS
from fastsd.errors import UserError
from fastsd.run.folder import LogRow, grid_files, read_rows
from fastsd.run.live_line import duration
from fastsd.run.settings import ABSENT, short_names
from fastsd.terminal.console import STDOUT, Console
from fastsd.terminal.texts import size_text

HOST = "127.0.0.1"
REFRESH = 5.0  # seconds
PAUSE = 9.0  # shortest time between two builds of the sections, in lengths of a build: a long log must not slow the training
WARNINGS = 20  # newest warnings of a run on the page
FILES = ("config.json", "log.jsonl", "timing.jsonl", "validation.jsonl", "cost.json", "warnings.jsonl")
_NUMBERS = [
    ("log", "loss_smooth", "smoothed loss", ".4f"), ("timing", "images_per_second", "images per second", ".1f"),
    ("timing", "data_wait", "waiting for data", ".0%"),
]  # fmt: skip
# The page loads nothing from elsewhere, and no other page may read it or show it in a frame.
HEADERS = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'",
}  # fmt: skip


def watch(folders: Sequence[Path], port: int, console: Console = STDOUT) -> None:
    """Serve the page until Ctrl-C.

    Args:
        port: 0 = any free port.

    Raises:
        UserError: a folder is not that of a run, is given twice, or the port is in use.
    """
    pages = WatchPages(folders)
    try:
        server = ThreadingHTTPServer((HOST, port), partial(_Handler, pages))
    except OSError as error:
        raise UserError("watch-port", f"--port is {port}, which cannot be used ({error.strerror}); choose another") from None
    with server:
        number = server.server_port
        console.echo(f"http://{HOST}:{number} shows {', '.join(map(str, folders))}; Ctrl-C ends it")
        tunnel = f"ssh -L {number}:{HOST}:{number} {socket.gethostname()}"
        console.echo(f"from another machine: `{tunnel}`, then open the same address there")
        server.serve_forever()


class WatchPages:
    """The page about some runs, and its sections. Sections are built again only if a file of a run has changed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        if not folders:
            raise UserError("watch-no-runs", "no runs given; give run folders, for example runs/xlsd")
        for i, folder in enumerate(folders):
            if not (folder / "config.json").is_file():
                raise UserError("watch-no-run", f"{folder} has no config.json; give the folder of a run that has started")
            if folder.resolve() in [other.resolve() for other in folders[:i]]:
                raise UserError("watch-run-twice", f"{folder} is given twice; give each run once")
        self.folders = folders
        self._lock = threading.Lock()
        self._labels = list(short_names([folder.resolve().as_posix() for folder in folders]).values())
        self._signature: object = None
        self._next_build = 0.0
        self._runs: list[RunData] = []
        self._problems: dict[Path, str] = {}
        self._sections: list[Section] = []

    def page(self) -> str:
        title = self.folders[0].resolve().name if len(self.folders) == 1 else f"{len(self.folders)} runs"
        return page.page(title, self.sections(), REFRESH)

    def sections(self) -> list[Section]:
        with self._lock:
            signature = [self._signature_of(folder) for folder in self.folders]
            started_at = time.monotonic()
            if signature != self._signature and started_at >= self._next_build:
                self._read()
                self._sections = self._build()
                self._signature = signature
                finished_at = time.monotonic()
                self._next_build = finished_at + PAUSE * (finished_at - started_at)
            return [page.table_section(self._progress()), *self._sections]

    def _read(self) -> None:
        """Read the runs. Their labels and colours do not depend on which of them can be read."""
        self._runs, self._problems = [], {}
        for i, (folder, label) in enumerate(zip(self.folders, self._labels, strict=True)):
            try:
                self._runs.append(read_run(folder, label, COLOURS[i % len(COLOURS)]))
            except UserError as error:
                self._problems[folder] = "no log row yet" if error.code == "compare-no-rows" else str(error)

    def grid(self, number: int, name: str) -> bytes | None:
        """Return a sample grid's file, or None if there is none of that name."""
        if not 0 <= number < len(self.folders):
            return None
        paths = (path for path, *_ in grid_files(self.folders[number] / "samples") if path.name == name)
        path = next(paths, None)
        return path.read_bytes() if path else None

    @staticmethod
    def _signature_of(folder: Path) -> list[object]:
        """Return what changes when a file of a run does."""
        stamps: list[object] = []
        for name in FILES:
            with suppress(OSError):  # a file that is not there, or was deleted just now
                status = os.stat(folder / name)
                stamps.append((name, status.st_size, status.st_mtime_ns))
        return [stamps, sorted(path.name for path, *_ in grid_files(folder / "samples"))]

    def _build(self) -> list[Section]:
        runs = self._runs
        if not runs:
            return []
        films = [(run, [(grid, self._address(run, grid.path.name)) for grid in run.grids]) for run in runs if run.grids]
        sections = [Section("Samples", "The grids of the runs, always from the same seeds.", page.film(films))] if films else []
        drawn = [
            ("Training loss", "Faint: as logged. Bold: smoothed.", charts.loss_chart),
            (
                "Validation loss",
                "The same images, noise and timesteps each time, ± one standard error.",
                charts.validation_chart,
            ),
            ("Validation loss by timestep", "High timesteps determine composition, low ones detail.", charts.band_chart),
            ("Learning rate", "With D-Lion, the step size is d · lr.", charts.rate_chart),
        ]
        for title, note, draw in drawn:
            if body := page.chart(partial(draw, runs), title):
                sections.append(Section(title, note, body))
        if (warnings := self._warnings()).rows:
            sections.append(page.table_section(warnings))
        return [*sections, page.table_section(numbers.costs(runs))]

    def _address(self, run: RunData, name: str) -> str:
        return f"grid/{self.folders.index(run.folder)}/{quote(name)}"

    def _progress(self) -> Table:
        """Return a table with one column per run, which fits a phone."""
        runs = {run.folder: run for run in self._runs}
        columns = [
            _progress_of(runs[folder]) if folder in runs else {"state": self._problems[folder]} for folder in self.folders
        ]
        names = [runs.get(folder, label) for folder, label in zip(self.folders, self._labels, strict=True)]
        rows: list[Words] = [
            [fact, *(column.get(fact, ABSENT) for column in columns)] for fact in dict.fromkeys(chain(*columns))
        ]
        return Table("Progress", "", ["", *names], rows)

    def _warnings(self) -> Table:
        rows: list[Words] = []
        for run in self._runs:
            warnings = read_rows(run.folder / "warnings.jsonl", {"time": (int, float), "step": int, "text": str})
            for row in warnings[: -WARNINGS - 1 : -1]:
                when = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["time"]))
                rows.append([when, row["text"], f"{row['step']:,}", run])
        return Table("Warnings", f"The newest {WARNINGS} of each run.", ["time", "warning", "step", "run"], rows)


def _progress_of(run: RunData) -> dict[str, str]:
    row: LogRow = run.log[-1]
    timing: LogRow = next((timing for timing in reversed(run.timing) if timing["step"] == row["step"]), {})
    age = 0.0
    with suppress(OSError):  # the folder was deleted just now
        age = max(time.time() - (run.folder / "log.jsonl").stat().st_mtime, 0.0)
    total = timing.get("stage_steps", 0)
    facts = {
        "state": "finished" if run.finished else f"last log row {duration(age)} ago",
        "stage": row["stage"],
        "step of the stage": f"{row.get('stage_step', 0):,}" + (f" of {total:,}" if 0 < total < ENDLESS else ""),
    }
    if not run.finished:
        names = {"stage_eta": "ETA of the stage", "eta": "ETA of the run"}
        facts |= {name: duration(max(timing[key] - age, 0.0)) for key, name in names.items() if key in timing}
    for source, key, name, form in _NUMBERS:
        value = (row if source == "log" else timing).get(key)
        facts |= {name: format(value, form)} if value is not None else {}
    facts |= {"memory": size_text(timing["memory_gb"] * 1e9)} if "memory_gb" in timing else {}
    facts |= {name: f"{row[name]:,}" for name in ("spikes", "skipped") if row.get(name)}
    return facts


class _Handler(BaseHTTPRequestHandler):
    """Answers GET requests of a browser on this machine."""

    def __init__(self, pages: WatchPages, *arguments: object) -> None:
        self.pages = pages
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # the browser has left
            self._respond()

    def _respond(self) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0]
        if name not in (HOST, "localhost"):  # a page elsewhere may point its own name at this machine
            return self.send_error(HTTPStatus.FORBIDDEN)
        kind, _, rest = self.path.partition("?")[0].removeprefix("/").partition("/")
        number, _, file_name = rest.partition("/")
        if kind == "" and not rest:
            return self._answer("text/html; charset=utf-8", self.pages.page().encode())
        if kind == "sections" and not rest:
            sections = [(section.anchor, section.html) for section in self.pages.sections()]
            return self._answer("application/json", json.dumps(sections).encode())
        if kind == "grid" and number.isdecimal() and (content := self.pages.grid(int(number), unquote(file_name))):
            return self._answer("image/png", content)
        return self.send_error(HTTPStatus.NOT_FOUND)

    def _answer(self, kind: str, content: bytes) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing: a page that refreshes itself makes many requests."""
