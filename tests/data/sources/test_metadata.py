"""Captions and weights in metadata.jsonl and metadata.parquet: precedence, fallback and rejection."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset import denied, touch
from sentences import refused, says, sentence

from fastsd.config.schema import FolderTable
from fastsd.data.sources.folders import captions_of, scan


def jsonl(folder, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def parquet(folder, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet", row_group_size=3)


def read(folder, **options):
    """Scan a folder. Return the captions of each image, and each problem, by name."""
    captions, problems = {}, {}
    for source in scan([FolderTable(path=str(folder))], **options):
        name = os.path.relpath(source.name, folder)
        assert name not in captions and name not in problems
        if source.problem:
            assert "\n" not in source.problem
            problems[name] = source.problem
        else:
            captions[name] = captions_of(source)
    return captions, problems


FILES = {"line": "metadata.jsonl", "row": "metadata.parquet"}
BOTH = pytest.mark.parametrize("write, kind", [(jsonl, "line"), (parquet, "row")])


@BOTH
def test_captions_and_variants_are_read(tmp_path, write, kind):
    touch(tmp_path, "a.png", "b.png", "d/c.png", "e.png", "f.png", "g.png", "h.png")
    (tmp_path / "g.txt").write_text("beside an empty row")
    (tmp_path / "h.txt").write_text("beside a null")
    (tmp_path / "a.txt").write_text("ignored")
    (tmp_path / "e.txt").write_text("sidecar")
    write(
        tmp_path,
        [
            {"file_name": "b.png", "text": ["one", " two \n lines ", "", None]},
            {"file_name": "./d//c.png", "text": ["deep"]},
            {"file_name": "f.png", "text": None},
            {"file_name": "g.png", "text": [" "]},
            {"file_name": "h.png", "text": None},
            {"file_name": "a.png", "text": ["naïve 🐈"]},
        ],
    )
    captions, problems = read(tmp_path)
    assert not problems and captions == {
        "a.png": ("naïve 🐈",),
        "b.png": ("one", "two lines"),
        "d/c.png": ("deep",),
        "e.png": ("sidecar",),
        "f.png": (),
        "g.png": ("beside an empty row",),
        "h.png": ("beside a null",),
    }


@BOTH
def test_rows_are_matched_whatever_case_accents_and_separators(tmp_path, write, kind):
    touch(tmp_path, "A.JPG", "cafe\u0301.png", "d/b.png", "e.png", "E.png", "f.png")
    rows = {"a.jpg": "case", "caf\u00e9.png": "accents", "d\\b.png": "separator", "E.png": "exact", "F.PNG": "a", "f.Png": "b"}
    write(tmp_path, [{"file_name": name, "text": text} for name, text in rows.items()])
    captions, problems = read(tmp_path)
    assert captions == {
        "A.JPG": ("case",), "cafe\u0301.png": ("accents",), "d/b.png": ("separator",), "e.png": (), "E.png": ("exact",),
        "f.png": ("a",),
    }  # fmt: skip
    assert list(problems.values()) == [sentence("metadata-no-image", file_name="f.Png")]


def test_metadata_files_are_found_whatever_their_case(tmp_path):
    touch(tmp_path, "a.png")
    jsonl(tmp_path, [{"file_name": "a.png", "text": "a"}])
    (tmp_path / "metadata.jsonl").rename(tmp_path / "Metadata.JSONL")
    assert read(tmp_path) == ({"a.png": ("a",)}, {})


@BOTH
@pytest.mark.parametrize(
    "keys, key, caption",
    [
        ("text caption prompt", "", "text"),
        ("prompt caption", "", "caption"),
        ("long prompt", "", "prompt"),
        ("text long", "long", "long"),
    ],
)
def test_the_caption_column_is_the_key_or_the_first_usual_one(tmp_path, write, kind, keys, key, caption):
    touch(tmp_path, "a.png")
    write(tmp_path, [{"file_name": "a.png", **{name: f"{name}\nline" for name in keys.split()}}])
    assert read(tmp_path, caption_key=key) == ({"a.png": (f"{caption} line",)}, {})


@BOTH
def test_rows_without_an_image_are_reported(tmp_path, write, kind):
    touch(tmp_path, "a.png", "b.svg")
    rows = ["gone.png", "../a.png", "/etc/a.png", None, "a.png", "a.png", "b.svg", "x/../../a.png"]
    write(tmp_path, [{"file_name": name, "text": f"{i}"} for i, name in enumerate(rows, 1)])
    captions, problems = read(tmp_path)
    assert captions == {"a.png": ("5",)}
    reasons = dict.fromkeys((1, 7), "metadata-no-image") | dict.fromkeys((2, 3, 8), "metadata-outside")
    reasons |= {4: "metadata-no-file-name", 6: "metadata-repeated"}
    assert len(problems) == len(reasons)
    for number, reason in reasons.items():
        assert says(problems[f"{FILES[kind]}/{kind} {number}"], reason)


def test_broken_lines_are_reported_and_the_others_used(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
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
    captions, problems = read(tmp_path)
    assert captions == {"a.png": (), "b.png": (), "c.png": (), "d.png": (), "e.png": ("e",)}
    reasons = dict.fromkeys((1, 2, 3, 5), "json-not-object") | {4: "metadata-line-too-long", 7: "metadata-no-image"}
    assert len(problems) == len(reasons)
    assert all(says(problems[f"metadata.jsonl/line {number}"], reason) for number, reason in reasons.items())


@pytest.mark.parametrize(
    "caption, reason",
    [
        (7, sentence("caption-not-text", key="text", type="int")),
        ({"en": "x"}, sentence("caption-not-text", key="text", type="dict")),
        (["x", 1], sentence("caption-not-text", key="text", type="int")),
        ("a\0b", sentence("caption-contains-nul")),
        ("\ud83d", sentence("caption-not-text-characters", position=0)),
    ],
)
def test_images_with_bad_captions_are_rejected(tmp_path, caption, reason):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("no fallback")
    jsonl(tmp_path, [{"file_name": "b.png", "text": "b"}, {"file_name": "a.png", "text": caption}])
    captions, problems = read(tmp_path)
    problem = sentence("metadata-in-row", reason=reason, row="line 2", file="metadata.jsonl")
    assert captions == {"b.png": ("b",)} and problems == {"a.png": problem}


@BOTH
@pytest.mark.parametrize(
    "columns, key, problem",
    [
        ("file_name blip", "", sentence("metadata-column", column="text or caption or prompt", columns="file_name, blip")),
        ("file_name text", "long", sentence("metadata-column", column="long", columns="file_name, text")),
        ("image text", "", sentence("metadata-no-file-names", columns="image, text")),
    ],
)
def test_a_file_without_the_column_is_reported_once_and_sidecars_are_used(tmp_path, write, kind, columns, key, problem):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "b.txt").write_text("sidecar")
    write(tmp_path, [dict.fromkeys(columns.split(), f"{name}.png") for name in "ab"])
    captions, problems = read(tmp_path, caption_key=key)
    assert captions == {"a.png": (), "b.png": ("sidecar",)} and problems == {FILES[kind]: problem}


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "middle", "pipe"])
def test_unreadable_parquet_is_reported_and_sidecars_are_used(tmp_path, kind):
    touch(tmp_path, "a.png")
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
    captions, problems = read(tmp_path)
    assert captions == {"a.png": ("sidecar",)}
    assert list(problems) == ["metadata.parquet"]
    assert says(problems["metadata.parquet"], "file-not-regular" if kind == "pipe" else "metadata-not-parquet")


def test_parquet_rows_that_are_not_utf8_are_reported(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    text = pa.array([b"caf\xe9", b"b"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"file_name": ["a.png", "b.png"], "text": text}), tmp_path / "metadata.parquet")
    captions, problems = read(tmp_path)
    assert captions == {"a.png": (), "b.png": ("b",)} and problems == {"metadata.parquet/row 1": sentence("metadata-not-utf8")}


def test_other_parquet_files_are_not_read(tmp_path):
    touch(tmp_path, "a.png")
    parquet(tmp_path, [{"url": "http://x"}])
    (tmp_path / "metadata.parquet").rename(tmp_path / "00000.parquet")
    assert read(tmp_path) == ({"a.png": ()}, {})


def test_the_nearest_file_wins_and_both_kinds_may_be_combined(tmp_path):
    touch(tmp_path, "a.png", "b.png", "d/c.png", "d/e.png")
    jsonl(tmp_path, [{"file_name": f"{name}.png", "text": "jsonl"} for name in ("a", "d/c", "d/e")])
    parquet(tmp_path, [{"file_name": f"{name}.png", "text": "parquet"} for name in ("a", "b")])
    jsonl(tmp_path / "d", [{"file_name": "c.png", "text": "inner"}])
    captions, problems = read(tmp_path)
    assert captions == {"a.png": ("jsonl",), "b.png": ("parquet",), "d/c.png": ("inner",), "d/e.png": ("jsonl",)}
    assert not problems


def test_latents_take_their_captions_by_the_image_name(tmp_path):
    touch(tmp_path, "a.img_sdxl", "d/b.img_sdxl")
    jsonl(tmp_path, [{"file_name": "a.jpg", "text": "a"}, {"file_name": "d/b.png", "text": "b"}])
    assert read(tmp_path, latents="img_sdxl") == ({"a.img_sdxl": ("a",), "d/b.img_sdxl": ("b",)}, {})


def weights(folder, key="score"):
    sources = scan([FolderTable(path=str(folder))], weight_key=key)
    return {os.path.relpath(source.name, folder): source.problem or (source.weight, *captions_of(source)) for source in sources}


@BOTH
def test_weights_beside_captions_and_alone(tmp_path, write, kind):
    touch(tmp_path, "a.png", "b.png", "c.png", "d/e.png")
    rows = [
        {"file_name": "a.png", "text": "A", "score": 2.0},
        {"file_name": "b.png", "text": "B", "score": None},
        {"file_name": "d/e.png", "text": "E", "score": 0.0},
    ]
    write(tmp_path, rows)
    assert weights(tmp_path) == {"a.png": (2.0, "A"), "b.png": (None, "B"), "c.png": (None,), "d/e.png": (0.0, "E")}
    assert weights(tmp_path, "")["a.png"] == (None, "A")
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "d/e.txt").write_text("too")
    write(tmp_path, [{"file_name": row["file_name"], "score": row["score"]} for row in rows])  # weights only
    assert weights(tmp_path) == {"a.png": (2.0, "beside"), "b.png": (None,), "c.png": (None,), "d/e.png": (0.0, "too")}
    assert says(weights(tmp_path, "")[FILES[kind]], "metadata-column", column="text or caption or prompt")


def test_the_nearest_file_with_a_weight_counts(tmp_path):
    touch(tmp_path, "d/a.png", "d/b.png")
    jsonl(tmp_path, [{"file_name": "d/a.png", "score": 3}, {"file_name": "d/b.png", "score": 4}])
    parquet(
        tmp_path / "d", [{"file_name": "a.png", "text": "a", "score": 5}, {"file_name": "b.png", "text": "b", "score": None}]
    )
    assert weights(tmp_path) == {"d/a.png": (5.0, "a"), "d/b.png": (4.0, "b")}


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf"), 1e39, "0.5", True, [1]], ids=str)
@BOTH
def test_images_with_invalid_weights_are_rejected(tmp_path, write, kind, value):
    touch(tmp_path, "a.png", "b.png")
    write(tmp_path, [{"file_name": "a.png", "text": "a", "score": value}, {"file_name": "b.png", "text": "b"}])
    reason = sentence("weight-not-number", key="score", type=type(value).__name__)
    if isinstance(value, float):
        reason = sentence("weight-out-of-range", key="score", value=value)
    problem = sentence("metadata-in-row", reason=reason, row=f"{kind} 1", file=FILES[kind])
    assert weights(tmp_path) == {"a.png": problem, "b.png": (None, "b")}
    assert weights(tmp_path, "")["a.png"] == (None, "a")


@BOTH
def test_a_file_without_permission_is_reported_and_sidecars_are_used(tmp_path, write, kind, monkeypatch):
    touch(tmp_path, "a.png")
    write(tmp_path, [{"file_name": "a.png", "text": "a"}])

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", denied)
        captions, problems = read(tmp_path)
    assert captions == {"a.png": ()} and len(problems) == 1
    assert all(name.startswith("metadata.") and "Permission denied" in reason for name, reason in problems.items())


def test_a_full_temporary_folder_is_an_error(tmp_path, monkeypatch):
    import sqlite3

    from fastsd.data.sources.metadata import Metadata

    def raise_full(*args):
        raise sqlite3.OperationalError("database or disk is full")

    touch(tmp_path, "a.png")
    jsonl(tmp_path, [{"file_name": "a.png", "text": "a"}])
    monkeypatch.setattr(Metadata, "_store_row", raise_full)
    with refused("temporary-folder-full", path=tmp_path / "metadata.jsonl"):
        read(tmp_path)


def test_tables_of_spreadsheets_are_read(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    rows = [
        b"\xef\xbb\xbffile_name;text;weight",
        b'a.png;"two\n lines; quoted";0.5',
        b"b.png;;1,5",
        b"c.png;caf\xe9",
        b"d.png;a;1;b",
        b"",
        b"e.png;plain;",
        b"f.png;gone",
    ]
    (tmp_path / "metadata.csv").write_bytes(b"\r\n".join(rows))
    captions, problems = read(tmp_path)
    assert captions == {"a.png": ("two lines; quoted",), "b.png": (), "c.png": (), "d.png": (), "e.png": ("plain",)}
    assert problems == {
        "metadata.csv/line 5": sentence("metadata-not-utf8"),
        "metadata.csv/line 6": sentence("metadata-cells", cells=4, columns=3, delimiter="';'"),
        "metadata.csv/line 9": sentence("metadata-no-image", file_name="f.png"),
    }
    weights = {source.name: source.weight for source in scan([FolderTable(path=str(tmp_path))], weight_key="weight")}
    assert weights[str(tmp_path / "a.png")] == 0.5 and weights[str(tmp_path / "e.png")] is None
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png," + b"x" * 200_000)
    problems = read(tmp_path)[1]
    assert list(problems) == ["metadata.csv/line 2"] and says(problems["metadata.csv/line 2"], "metadata-not-csv")
    (tmp_path / "metadata.csv").write_bytes(b"x" * 200_000)
    assert says(read(tmp_path)[1]["metadata.csv"], "metadata-not-csv")


def test_a_weight_that_is_no_number_is_reported(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,text,weight\na.png,a,much\n")
    assert list(read(tmp_path, weight_key="weight")[1]) == ["a.png"]
