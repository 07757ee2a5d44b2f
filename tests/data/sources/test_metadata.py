"""Captions in metadata.jsonl and metadata.parquet: what counts, what falls back, what is named."""

import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastsd.config.schema import FolderTable
from fastsd.data.sources.folders import captions_of, scan
from fastsd.errors import UserError


def images(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def jsonl(folder, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet", row_group_size=3)


def read(folder, **options):
    """What is found: {name: captions}, {name: problem}."""
    good, bad = {}, {}
    for source in scan([FolderTable(path=str(folder))], **options):
        name = os.path.relpath(source.name, folder)
        assert name not in good and name not in bad
        if source.problem:
            assert "\n" not in source.problem
            bad[name] = source.problem
        else:
            good[name] = captions_of(source)
    return good, bad


BOTH = pytest.mark.parametrize("write, kind", [(jsonl, "line"), (parquet, "row")])


@BOTH
def test_captions_and_variants(tmp_path, write, kind):
    images(tmp_path, "a.png", "b.png", "d/c.png", "e.png", "f.png")
    (tmp_path / "a.txt").write_text("of no account")
    (tmp_path / "e.txt").write_text("sidecar")
    write(
        tmp_path,
        [
            {"file_name": "b.png", "text": ["one", " two \n lines ", "", None]},
            {"file_name": "./d//c.png", "text": ["deep"]},
            {"file_name": "f.png", "text": None},
            {"file_name": "a.png", "text": ["naïve 🐈"]},
        ],
    )
    good, bad = read(tmp_path)
    assert good == {
        "a.png": ("naïve 🐈",), "b.png": ("one", "two lines"), "d/c.png": ("deep",), "e.png": ("sidecar",), "f.png": (),
    }  # fmt: skip
    assert not bad


@BOTH
@pytest.mark.parametrize("keys, key, caption", [
    ("text caption prompt", "", "text"), ("prompt caption", "", "caption"), ("long prompt", "", "prompt"),
    ("text long", "long", "long"),
])  # fmt: skip
def test_which_column(tmp_path, write, kind, keys, key, caption):
    images(tmp_path, "a.png")
    write(tmp_path, [{"file_name": "a.png", **{name: f"{name}\nline" for name in keys.split()}}])
    assert read(tmp_path, caption_key=key) == ({"a.png": (f"{caption} line",)}, {})


@BOTH
def test_rows_that_fit_no_image_are_named(tmp_path, write, kind):
    images(tmp_path, "a.png", "b.gif")
    rows = ["gone.png", "../a.png", "/etc/a.png", None, "a.png", "a.png", "b.gif", "x/../../a.png"]
    write(tmp_path, [{"file_name": name, "text": f"{i}"} for i, name in enumerate(rows, 1)])
    good, bad = read(tmp_path)
    assert good == {"a.png": ("5",)}
    wanted = {
        1: "no such image",
        2: "leads out",
        3: "leads out",
        4: "no file_name",
        6: "again",
        7: "no such image",
        8: "leads out",
    }
    assert len(bad) == len(wanted)
    for number, reason in wanted.items():
        assert reason in bad[f"metadata.{'jsonl' if kind == 'line' else 'parquet'}/{kind} {number}"]


def test_broken_lines_are_named_and_the_others_count(tmp_path):
    images(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    rows = [
        b'{"file_name": "a.png", "text": "a"',
        b"[1]",
        b'{"file_name": "b.png", "text": "caf\xe9"}',
        b'{"file_name": "c.png", "text": "' + b"x" * (3 << 20) + b'"}',
        b"[" * 100_000,
        b"",
        b'{"file_name": "\\ud800.png", "text": "d"}',
        b'\xef\xbb\xbf{"file_name": "e.png", "text": "e"}',
    ]
    jsonl(tmp_path, rows)
    good, bad = read(tmp_path)
    assert good == {"a.png": (), "b.png": (), "c.png": (), "d.png": (), "e.png": ("e",)}
    reasons = dict.fromkeys((1, 2, 3, 5), "no JSON object") | {4: "longer than 1 MiB", 7: "no such image"}
    assert len(bad) == len(reasons)
    assert all(reason in bad[f"metadata.jsonl/line {number}"] for number, reason in reasons.items())


@pytest.mark.parametrize(
    "caption, reason",
    [(7, r"\(text\) is no text but int"), ({"en": "x"}, "no text but dict"), (["x", 1], "no text but int"),
     ("a\0b", "NUL"), ("\ud83d", "not UTF-8")],
)  # fmt: skip
def test_a_bad_caption_puts_its_image_aside(tmp_path, caption, reason):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("must not step in")
    jsonl(tmp_path, [{"file_name": "b.png", "text": "b"}, {"file_name": "a.png", "text": caption}])
    good, bad = read(tmp_path)
    assert good == {"b.png": ("b",)} and list(bad) == ["a.png"]
    assert re.search(rf"{reason}.*: line 2 of metadata\.jsonl$", bad["a.png"])


@BOTH
@pytest.mark.parametrize(
    "columns, key, reason",
    [
        ("file_name blip", "", "none of text, caption, prompt (found: file_name, blip); set data.caption_key"),
        ("file_name text", "long", "no long (found: file_name, text); set data.caption_key"),
        ("image text", "", "no file_name (found: image, text)"),
    ],
)
def test_a_file_without_the_column_is_named_once_and_sidecars_count(tmp_path, write, kind, columns, key, reason):
    images(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("sidecar")
    write(tmp_path, [dict.fromkeys(columns.split(), f"{name}.png") for name in "ab"])
    good, bad = read(tmp_path, caption_key=key)
    assert good == {"a.png": (), "b.png": ("sidecar",)} and len(bad) == 1
    assert reason in bad[f"metadata.{'jsonl' if kind == 'line' else 'parquet'}"]


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "middle", "pipe"])
def test_unreadable_parquet_is_named_and_sidecars_count(tmp_path, kind):
    images(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("sidecar")
    path = tmp_path / "metadata.parquet"
    parquet(tmp_path, [{"file_name": f"{i}.png", "text": "x" * 50} for i in range(100)])
    data = path.read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "middle":
        path.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    else:
        path.write_bytes({"truncated": data[: len(data) // 2], "text": b"not parquet\n" * 9, "empty": b""}[kind])
    good, bad = read(tmp_path)
    assert good == {"a.png": ("sidecar",)}
    assert list(bad) == ["metadata.parquet"]
    assert ("no regular file" if kind == "pipe" else "cannot be read as parquet") in bad["metadata.parquet"]


def test_parquet_text_that_is_no_utf8(tmp_path):
    images(tmp_path, "a.png", "b.png")
    text = pa.array([b"caf\xe9", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"file_name": ["a.png", "b.png"], "text": text}), tmp_path / "metadata.parquet")
    good, bad = read(tmp_path)
    assert good == {"a.png": (), "b.png": ("b",)} and bad == {"metadata.parquet/row 1": "it is not UTF-8"}


def test_other_parquet_files_are_not_read(tmp_path):
    images(tmp_path, "a.png")
    parquet(tmp_path, [{"url": "http://x"}])
    (tmp_path / "metadata.parquet").rename(tmp_path / "00000.parquet")
    assert read(tmp_path) == ({"a.png": ()}, {})


def test_nearest_file_wins_and_both_kinds_may_stand_together(tmp_path):
    images(tmp_path, "a.png", "b.png", "d/c.png", "d/e.png")
    jsonl(tmp_path, [{"file_name": f"{name}.png", "text": "jsonl"} for name in ("a", "d/c", "d/e")])
    parquet(tmp_path, [{"file_name": f"{name}.png", "text": "parquet"} for name in ("a", "b")])
    jsonl(tmp_path / "d", [{"file_name": "c.png", "text": "inner"}])
    good, bad = read(tmp_path)
    assert good == {"a.png": ("jsonl",), "b.png": ("parquet",), "d/c.png": ("inner",), "d/e.png": ("jsonl",)}
    assert not bad


def test_latents_take_their_captions_by_the_image_name(tmp_path):
    images(tmp_path, "a.img_sdxl", "d/b.img_sdxl")
    jsonl(tmp_path, [{"file_name": "a.jpg", "text": "a"}, {"file_name": "d/b.png", "text": "b"}])
    assert read(tmp_path, latents="img_sdxl") == ({"a.img_sdxl": ("a",), "d/b.img_sdxl": ("b",)}, {})


def weights(folder, key="score"):
    found = scan([FolderTable(path=str(folder))], weight_key=key)
    return {os.path.relpath(source.name, folder): source.problem or (source.weight, *captions_of(source)) for source in found}


@BOTH
def test_weights_beside_captions_and_alone(tmp_path, write, kind):
    images(tmp_path, "a.png", "b.png", "c.png", "d/e.png")
    rows = [{"file_name": "a.png", "text": "A", "score": 2.0}, {"file_name": "b.png", "text": "B", "score": None},
            {"file_name": "d/e.png", "text": "E", "score": 0.0}]  # fmt: skip
    write(tmp_path, rows)
    assert weights(tmp_path) == {"a.png": (2.0, "A"), "b.png": (None, "B"), "c.png": (None,), "d/e.png": (0.0, "E")}
    assert weights(tmp_path, "")["a.png"] == (None, "A")
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "d/e.txt").write_text("too")
    write(tmp_path, [{"file_name": row["file_name"], "score": row["score"]} for row in rows])  # captions lie beside the images
    assert weights(tmp_path) == {"a.png": (2.0, "beside"), "b.png": (None,), "c.png": (None,), "d/e.png": (0.0, "too")}
    assert "none of text, caption, prompt" in weights(tmp_path, "")[f"metadata.{'jsonl' if kind == 'line' else 'parquet'}"]


def test_the_nearest_file_with_a_weight_counts(tmp_path):
    images(tmp_path, "d/a.png", "d/b.png")
    jsonl(tmp_path, [{"file_name": "d/a.png", "score": 3}, {"file_name": "d/b.png", "score": 4}])
    parquet(
        tmp_path / "d", [{"file_name": "a.png", "text": "a", "score": 5}, {"file_name": "b.png", "text": "b", "score": None}]
    )
    assert weights(tmp_path) == {"d/a.png": (5.0, "a"), "d/b.png": (4.0, "b")}


@pytest.mark.parametrize("value, said", [
    (-0.5, "is -0.5, and must be finite and at least 0"), (float("nan"), "is nan, and must be finite and at least 0"),
    (float("inf"), "is inf, and must be finite and at least 0"), (1e39, "is 1e+39, and must be finite and at least 0"),
    ("0.5", "is no number but str"), (True, "is no number but bool"), ([1], "is no number but list"),
])  # fmt: skip
@BOTH
def test_a_weight_that_is_none_puts_its_image_aside(tmp_path, write, kind, value, said):
    images(tmp_path, "a.png", "b.png")
    write(tmp_path, [{"file_name": "a.png", "text": "a", "score": value}, {"file_name": "b.png", "text": "b"}])
    name = "jsonl" if kind == "line" else "parquet"
    assert weights(tmp_path) == {"a.png": f"its weight (score) {said}: {kind} 1 of metadata.{name}", "b.png": (None, "b")}
    assert weights(tmp_path, "")["a.png"] == (None, "a")


@BOTH
def test_a_file_without_permission_is_named_and_sidecars_count(tmp_path, write, kind, monkeypatch):
    images(tmp_path, "a.png")
    write(tmp_path, [{"file_name": "a.png", "text": "a"}])

    def denied(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        good, bad = read(tmp_path)
    assert good == {"a.png": ()} and len(bad) == 1
    assert all(name.startswith("metadata.") and "Permission denied" in reason for name, reason in bad.items())


def test_a_full_disk_for_the_index_is_one_sentence(tmp_path, monkeypatch):
    import sqlite3

    from fastsd.data.sources.metadata import Metadata

    def full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    images(tmp_path, "a.png")
    jsonl(tmp_path, [{"file_name": "a.png", "text": "a"}])
    monkeypatch.setattr(Metadata, "_add", full)
    with pytest.raises(UserError, match="cannot hold its index.*; free some space"):
        read(tmp_path)
