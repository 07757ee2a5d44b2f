"""Console output and log files of a run.

console              a header, then one live line (plain lines if it is not a terminal)
RUN/log.jsonl        one row per log interval; it holds only values that training determines, so it is the same, bit for
                     bit, however often the run is interrupted
RUN/timing.jsonl     speed, memory and time spent waiting for data, for the same steps
RUN/validation.jsonl one row per measurement, set and kind of weights (raw or an average); reproducible in the same way
RUN/warnings.jsonl   the warnings of all starts, with time and step
RUN/tensorboard      all of the above but the warnings
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import psutil
import torch
from PIL import Image
from rich.live import Live
from rich.text import Text

from fastsd.config.schema import LogTable
from fastsd.run.flow_start import colour_warning
from fastsd.run.folder import LogRow, read_rows
from fastsd.run.live_line import charts, live_line
from fastsd.run.sinks import Sink, open_sinks
from fastsd.run.validation import ValidationRow, band_label, format_line
from fastsd.storage import flush_folder, replace_file
from fastsd.terminal.console import Console
from fastsd.terminal.texts import fit
from fastsd.train.memory import main_memory


class TrainReport:
    """The console and log files of one run.

    Args:
        run: the run's folder.
        table: `[log]` of the config.
        step: steps done. Rows of later steps, which an interrupted run has left, are removed.
        saved_at: time of the newest checkpoint as in `time.time()`; None = no checkpoint.
        logs: `digests` at that checkpoint.
    """

    def __init__(
        self,
        run: Path,
        table: LogTable,
        step: int,
        saved_at: float | None,
        console: Console,
        logs: Mapping[str, RowsDigest] = MappingProxyType({}),
    ) -> None:
        self.console = console
        self.run = run
        self.log, self.timing = (RowFile(run / name, step, logs.get(name)) for name in ("log.jsonl", "timing.jsonl"))
        # The measurement before step 1 is repeated.
        self.validations = RowFile(run / "validation.jsonl", step or -1, logs.get("validation.jsonl"))
        for file in (self.log, self.timing, self.validations):
            name = file.path.name
            if file.damaged:
                console.warn(f"{name}: {file.damaged} damaged rows removed")
            if file is not self.validations and file.last <= step - max(table.every, file.spacing):
                console.warn(f"{name}: the rows after step {file.last} are missing; training continues at step {step}")
            elif file.changed and not file.damaged:
                console.warn(f"{name}: rows are missing or not those that were logged; training continues at step {step}")
        self.sinks = open_sinks(run, table, step, console)
        self._failed_sinks = set[str]()
        self.live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
        self.saved_at = saved_at
        self._step = step  # of the newest row
        console.on_warning = self._record_warning

    def header(self, rows: dict[str, str]) -> None:
        width = max(map(len, rows)) + 2
        for name, value in rows.items():
            # A rich table would wrap the lines at 80 columns in a log file, and rich itself would break words.
            text = fit(value, self.console.width - width) if self.console.is_terminal else value
            lines = text.replace("\n", "\n" + " " * width)
            self.console.print(Text.assemble((name.ljust(width), "bold"), lines), soft_wrap=True)
        if self.live:
            self.live.start()

    def digests(self) -> dict[str, RowsDigest]:
        """Return the digests of the files whose rows a repeated run writes again."""
        return {file.path.name: digest for file in (self.log, self.validations) if (digest := file.digest())}

    def saved(self) -> None:
        self.saved_at = time.time()

    def row(self, values: LogRow, timing: dict[str, float]) -> None:
        """Write the row of one log interval to the files and to the console line."""
        self._step = values["step"]
        self._append(self.log, values)
        self._append(self.timing, {"step": values["step"], **timing})
        self._send(lambda sink: sink.scalars(charts(values, timing), values["step"]))
        if self.live:
            self.live.update(Text(live_line(values, timing, self.saved_at, self.console.width)))
        else:
            self.console.echo(live_line(values, timing, self.saved_at))

    def _record_warning(self, text: str) -> None:
        """Append a warning to its file, for `fastsd watch`. Nothing depends on it, so a full disk loses it."""
        with contextlib.suppress(OSError), open(self.run / "warnings.jsonl", "a", encoding="utf-8") as file:
            file.write(_json({"time": time.time(), "step": self._step, "text": text}))

    def _append(self, file: RowFile, *rows: dict[str, Any]) -> None:
        """Append rows to a file. Training does not depend on it: a full disk is a warning, and the first lost row another."""
        before = file.is_waiting, file.lost
        try:
            file.append("".join(map(_json, rows)))
        except OSError as error:
            if before == (True, file.lost):
                return
            lost = "" if file.lost is None else f", and from step {file.lost} on rows are lost"
            name, step = file.path.name, rows[-1]["step"]
            self.console.warn(f"{name}: row of step {step} not written yet ({error.strerror}){lost}; training continues")

    def _send(self, send: Callable[[Sink], None]) -> None:
        """Call `send` for each sink. Training does not depend on sinks, so the first error of each is a warning."""
        for sink in self.sinks:
            try:
                send(sink)
            except Exception as error:
                if sink.name not in self._failed_sinks:
                    self._failed_sinks.add(sink.name)
                    self.console.warn(f"{sink.name} not written: {type(error).__name__}: {error}; training continues")

    def validation(self, rows: list[ValidationRow]) -> None:
        """Write the validation rows (see `validation.py`) that were measured after a step."""
        step = rows[0]["step"]
        scalars = {}
        for row in rows:
            name = row["set"] + ("" if row["weights"] == "raw" else f"_{row['weights']}")
            scalars[f"validation/{name}"] = row["loss"]
            scalars |= {f"validation/{name}/t{band_label(first, end)}": loss for first, end, loss, _ in row["bands"]}

        self._append(self.validations, *rows)
        self._send(lambda sink: sink.scalars(scalars, step))
        self.console.echo(f"validation at step {step}: {format_line(rows)}")
        if step and "start" in rows[0] and (warning := colour_warning(rows[0]["start"])):
            self.console.warn(f"validation at step {step}: {warning}")

    def has_validation(self, step: int, count: int) -> bool:
        """Return True if `count` rows were measured after a step. If a kill has left fewer, remove them."""
        path = self.validations.path
        complete = sum(row["step"] == step for row in read_rows(path, {"step": int})) == count
        if not complete:
            self.validations = RowFile(path, step - 1)
        return complete

    def rows(self, stage: str) -> list[LogRow]:
        """Read the rows logged so far for a stage."""
        return [row for row in read_rows(self.run / "log.jsonl", {"stage": str}) if row["stage"] == stage]

    def images(self, path: Path, step: int, image: Image.Image) -> None:
        """Report a sample grid that was saved at `path`."""
        self.console.echo(f"samples: {path}")
        self._send(lambda sink: sink.image(f"samples/{path.stem.rpartition('-')[0]}", image, step))

    def flush(self) -> None:
        """Flush the logs to the disk, before a checkpoint is committed. Raises OSError if the disk is full."""
        for file in (self.log, self.timing, self.validations):
            file.flush()

    def close(self) -> None:
        self.console.on_warning = None
        if self.live:
            self.live.stop()
        for file in (self.log, self.timing, self.validations):
            with contextlib.suppress(OSError):  # the user was already warned about a full disk
                file.flush()
        self._send(lambda sink: sink.close())


class SilentReport(TrainReport):
    """The report of ranks other than 0, which write nothing. Its console is one that nobody sees."""

    def __init__(self, run: Path, table: LogTable, step: int, saved_at: float | None, console: Console, logs: object) -> None:
        self.run, self.console, self.saved_at, self.live = run, console, saved_at, None

    def row(self, values: LogRow, timing: dict[str, float]) -> None:
        """Do nothing."""

    def rows(self, stage: str) -> list[LogRow]:
        """Return no rows: they are read for warnings only."""
        return []

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class RowsDigest(TypedDict):
    """Describes the first rows of a file."""

    rows: int
    sha256: str


class RowFile:
    """A JSONL file to which rows are appended. While the disk is full, they wait in memory.

    Args:
        path: the file. Damaged and truncated rows are removed, and so are rows after `step`.
        recorded: digest of the rows that must be there.

    Attributes:
        lost: step of the first row that did not fit into memory either; None = all rows are written or waiting.
        damaged: number of removed rows that no kill explains: it can only leave half of the last row.
        changed: True if the first rows are not those that were recorded.
        last: step of the last row that was kept, or 0.
        spacing: largest number of steps between two rows that were kept.
    """

    LIMIT = 16 << 20  # bytes that may wait, over 30,000 rows

    def __init__(self, path: Path, step: int, recorded: RowsDigest | None = None) -> None:
        self.path = path
        self.lost: int | None = None
        self._waiting = b""
        self.damaged = self.last = self.spacing = 0
        self._count, self._hash = 0, hashlib.sha256()
        self.changed = recorded is not None and recorded != self.digest()
        if not path.exists():
            return
        rows = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:  # a power cut may leave anything
                row, row_step = line.decode(), int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError, RecursionError):
                self.damaged += line.endswith(b"\n") or not line.startswith(b"{")
                continue
            if row.endswith("\n") and row_step <= step:
                rows.append(row)
                self._add(line)
                if recorded and self._count == recorded["rows"]:
                    self.changed = recorded != self.digest()
                self.spacing, self.last = max(self.spacing, row_step - self.last), row_step
        replace_file(path, "".join(rows))

    def _add(self, row: bytes) -> None:
        self._count += 1
        self._hash.update(row)

    def digest(self) -> RowsDigest | None:
        """Return the digest of all rows, or None if some are lost."""
        return None if self.lost is not None else {"rows": self._count, "sha256": self._hash.hexdigest()}

    @property
    def is_waiting(self) -> bool:
        return bool(self._waiting)

    def append(self, rows: str) -> None:
        """Write rows, and before them those that wait. Raises OSError if they must wait."""
        data = rows.encode()
        if len(self._waiting) + len(data) <= self.LIMIT:
            self._waiting += data
            for row in data.splitlines(keepends=True):
                self._add(row)
        elif self.lost is None:
            self.lost = json.loads(rows.splitlines()[0])["step"]
        self._write()

    def _write(self) -> None:
        if self._waiting:
            with open(self.path, "ab", buffering=0) as file:
                while self._waiting:  # a write on a full disk may write a part
                    self._waiting = self._waiting[file.write(self._waiting) :]

    def flush(self) -> None:
        """Write the rows that wait, and flush the file to the disk. Raises OSError if the disk is full."""
        self._write()
        if self.path.exists():
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
            flush_folder(self.path.parent)  # the file may be new


def _json(values: dict[str, object]) -> str:
    """Encode one row. JSON cannot represent numbers that are not finite, so these become null."""
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_gb(device: torch.device) -> float:
    """Return the peak GPU memory this process allocated, or its resident memory on a CPU, in units of 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def free_memory(device: torch.device) -> int:
    """Return the bytes this process can still allocate.

    Unused memory that PyTorch has reserved is first returned to the device. What cannot be returned, such as the private pool
    of a CUDA graph, is not free.
    """
    gc.collect()
    if device.type != "cuda":
        return main_memory()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
