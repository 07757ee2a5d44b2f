"""Read the captions of a folder from `metadata.jsonl`, `.parquet` or `.csv`, in the format of Hugging Face's imagefolder.

A row has the `file_name` of an image, its caption, and optionally its loss weight. The name is relative to the folder of the
metadata file, and may be in a subfolder. If a file has only weights, the captions are beside the images.

Rows and images come in different orders, so the rows are written to a temporary database on the disk. Memory use does not grow
with the number of rows.
"""

from __future__ import annotations

import csv
import itertools
import os
import posixpath
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastsd.data.sources.image import CAPTION_KEYS, Rejected, json_object, row_captions, row_weight, shown
from fastsd.data.sources.names import folded
from fastsd.errors import UserError

FILES = ("metadata.jsonl", "metadata.parquet", "metadata.csv")
_DELIMITERS = (",", ";", "\t")  # of a .csv; spreadsheets write semicolons where a comma separates decimals
_MAX_LINE = 1 << 20  # bytes
_BATCH = 256  # rows of a parquet file in memory
_SHOWN_COLUMNS = 20  # columns that an error message lists

Entry = tuple[tuple[str, ...], float | None]  # captions and weight of an image; () and None = not given
_Rows = Iterator[tuple[int, dict[str, object] | str]]  # number of a row, from 1, and the row or the reason why it is unusable


class Metadata:
    """One `metadata.jsonl`, `metadata.parquet` or `metadata.csv`.

    Args:
        caption_key: the column with captions; "" = the first of text, caption, prompt.
        weight_key: the column with weights; "" = no weights.
        stems: look up images by their path without extension, because latents have another extension.
        captions: False = use only the weights.
    """

    def __init__(self, path: str, caption_key: str, weight_key: str, *, stems: bool, captions: bool = True) -> None:
        self.path, self._key, self._weight_key, self._stems = path, caption_key, weight_key, stems
        self._captions, self._csv = captions, path.lower().endswith(".csv")
        self._parquet = path.lower().endswith(".parquet")
        self._prefix = len(os.path.join(os.path.dirname(path), ""))
        self._looked_up = bytearray()  # for each stored row: 1 if its image was looked up, else 0
        # Different threads may use the connection, but never two at once.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA cache_size = -32768; BEGIN;"
            "CREATE TABLE row (image BLOB PRIMARY KEY, id INTEGER, number INTEGER, captions TEXT, weight REAL, reason TEXT,"
            " folded BLOB) WITHOUT ROWID"
        )

    def close(self) -> None:
        self._db.close()

    def load(self) -> Iterator[tuple[str, str]]:
        """Read the file and yield its problems, each as (row, reason). A problem of the whole file has the row "".

        Raises:
            UserError: the disk has too little space for the temporary database.
        """
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # reading a pipe could block forever
                raise Rejected("not a regular file")
            missing = self._missing_column()
            if missing:
                raise Rejected(missing)
            for number, row in self._rows():
                reason = row if isinstance(row, str) else self._store_row(number, row)
                if reason:
                    yield self._row_name(number), reason
            self._db.execute("CREATE INDEX row_folded ON row (folded)")
        except OSError as error:
            yield "", f"cannot be read ({error.strerror})"
        except Rejected as error:
            yield "", error.reason
        except sqlite3.OperationalError as error:
            raise UserError(
                "temporary-folder-full",
                f"{shown(self.path)}: its index does not fit into the temporary folder ({error}); free space there or set"
                " TMPDIR to another folder",
            ) from None

    def lookup(self, image: str) -> Entry:
        """Look up an image by its path, without extension if `stems`. Raises Rejected if its row is invalid."""
        name = image[self._prefix :].replace(os.sep, "/")
        query = "SELECT id, number, captions, weight, reason, image FROM row WHERE"
        row = self._db.execute(f"{query} image = ?", (self._image_key(name),)).fetchone()
        if not row:
            similar = self._db.execute(f"{query} folded = ? ORDER BY number", (self._folded_key(name),)).fetchall()
            row = next((row for row in similar if not self._is_of_another(row[-1], image)), None)
        if not row:
            return (), None
        id, number, captions, weight, reason, _ = row
        self._looked_up[id] = 1
        if reason:
            raise Rejected(f"{reason} ({self._row_name(number)} of {os.path.basename(self.path)})", lasting=False)
        return tuple(captions.split("\n")) if captions else (), weight

    def unmatched(self) -> Iterator[tuple[str, str]]:
        """Yield (row, reason) for every row whose image was never looked up, because it does not exist."""
        if 0 in self._looked_up:
            for image, id, number in self._db.execute("SELECT image, id, number FROM row ORDER BY image"):
                if not self._looked_up[id]:
                    yield self._row_name(number), f"file_name {shown(image)}: no such image"

    def _row_name(self, number: int) -> str:
        return f"{'row' if self._parquet else 'line'} {number}"

    def _image_key(self, relative: str) -> bytes:
        key = posixpath.splitext(relative)[0] if self._stems else relative
        return key.encode("utf-8", "surrogatepass")

    def _folded_key(self, relative: str) -> bytes:
        return self._image_key(folded(relative.replace("\\", "/")))  # Windows separates folders by backslashes

    def _is_of_another(self, key: bytes, image: str) -> bool:
        """Return True if the row with this key names a file that exists and is not `image`."""
        path = image[: self._prefix] + key.decode("utf-8", "surrogatepass")
        if self._stems or not os.path.exists(path):
            return False
        return not os.path.exists(image) or not os.path.samefile(path, image)

    def _store_row(self, number: int, row: dict[str, object]) -> str:
        """Store a row. Return "", or the reason why it is not stored."""
        name = row.get("file_name")
        if not name or not isinstance(name, str):
            return "has no file_name"
        normalized_name = posixpath.normpath(name)
        if os.path.isabs(name) or normalized_name.split("/")[0] == "..":
            return f"file_name {_printable(name)}: outside the folder"
        captions, weight, reason = None, None, None
        try:
            captions = "\n".join((row_captions(row, self._key) if self._captions else None) or ())
            weight = row_weight(row, self._weight_key)
        except Rejected as error:
            reason = error.reason
        keys = self._image_key(normalized_name), self._folded_key(normalized_name)
        values = (keys[0], len(self._looked_up), number, captions, weight, reason, keys[1])
        if not self._db.execute("INSERT OR IGNORE INTO row VALUES (?, ?, ?, ?, ?, ?, ?)", values).rowcount:
            return f"file_name {_printable(name)}: repeated; the first row is used"
        self._looked_up.append(0)
        return ""

    def _missing_column(self) -> str:
        """Return the problem if no row has a required column, otherwise ""."""
        caption_keys = (self._key,) if self._key else CAPTION_KEYS
        has_names = has_captions = has_weights = False
        seen_columns: dict[str, None] = {}
        for columns in self._columns():
            has_names = has_names or "file_name" in columns
            has_captions = has_captions or any(key in columns for key in caption_keys)
            has_weights = has_weights or bool(self._weight_key and self._weight_key in columns)
            if has_names and has_captions:
                return ""
            if len(seen_columns) < _SHOWN_COLUMNS:
                seen_columns |= dict.fromkeys(columns)
        if has_names and (has_weights or not self._captions):
            return ""
        listed = ", ".join(map(_printable, list(seen_columns)[:_SHOWN_COLUMNS])) or "nothing"
        if not has_names:
            return f"has no column file_name (found: {listed}); add it with the names of the images"
        return f"has no column {' or '.join(caption_keys)} (found: {listed}); set data.caption_key to the caption column"

    def _columns(self) -> Iterator[list[str]]:
        if self._parquet:
            yield list(parquet_names(self.path))
        elif self._csv:
            with _csv(self.path) as (columns, _):
                yield columns
        else:
            yield from (list(row) for _, row in _json_rows(self.path) if isinstance(row, dict))

    def _rows(self) -> _Rows:
        if self._csv:
            return _csv_rows(self.path, self._weight_key)
        if not self._parquet:
            return _json_rows(self.path)
        columns = ("file_name", self._weight_key, *((self._key,) if self._key else CAPTION_KEYS))
        return parquet_rows(self.path, [name for name in parquet_names(self.path) if name in columns])


def _printable(text: str) -> str:
    """Format text from a file for one line of a terminal, at most 200 characters."""
    return shown(text.encode("utf-8", "surrogatepass"))[:200]


def _json_rows(path: str) -> _Rows:
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE):
            number += 1
            if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(_MAX_LINE)
                yield number, "longer than 1 MiB"
            elif line.strip():
                try:
                    yield number, json_object(line)
                except Rejected as error:
                    yield number, error.reason


@contextmanager
def _csv(path: str) -> Iterator[tuple[list[str], Any]]:
    """Open a table. Return its header and a `csv.reader` of the lines after it. Raises Rejected if it is no CSV."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first_line = file.readline(_MAX_LINE)
        try:
            headers = {mark: next(csv.reader([first_line], delimiter=mark), []) for mark in _DELIMITERS}
        except csv.Error as error:
            raise Rejected(f"cannot be read as CSV ({error})") from None
        delimiter = next((mark for mark, header in headers.items() if "file_name" in header), ",")
        yield headers[delimiter], csv.reader(file, delimiter=delimiter)


def _csv_rows(path: str, weight_key: str) -> _Rows:
    """Yield the rows of a table, each with the number of its last line. Empty cells are left out."""
    with _csv(path) as (columns, reader):
        try:
            for cells in reader:
                number = 1 + reader.line_num
                row: dict[str, object] = {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
                with suppress(KeyError, ValueError):  # a weight that is no number is reported as text
                    row[weight_key] = float(str(row[weight_key]))
                if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                    yield number, "not UTF-8"
                elif len(cells) > len(columns):
                    counts = f"{len(cells)} cells, but the header has {len(columns)}"
                    yield number, f"has {counts}; quote texts with {reader.dialect.delimiter!r}"
                elif cells:
                    yield number, row
        except csv.Error as error:
            yield 1 + reader.line_num, f"cannot be read as CSV ({error})"


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`. Raises Rejected, also for errors inside the `with` block."""
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as file:
            yield pq.ParquetFile(file, pre_buffer=False)
    except Exception as error:  # for a damaged file, pyarrow raises anything from ArrowException to UnicodeDecodeError
        raise Rejected(f"cannot be read as parquet ({_printable(str(error))})") from None


def parquet_names(path: str) -> list[str]:
    """Return the names of the columns. Raises Rejected if the file is damaged."""
    with _parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: str, columns: list[str]) -> _Rows:
    """Yield the rows with their numbers, from 1. Raises Rejected if the file is damaged."""
    with _parquet(path) as file:
        rows = map(_batch_rows, file.iter_batches(_BATCH, columns=columns, use_threads=False))
        yield from enumerate(itertools.chain.from_iterable(rows), 1)


def _batch_rows(batch: Any) -> list[dict[str, object] | str]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return ["not UTF-8"]
        return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]
