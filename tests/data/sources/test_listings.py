"""Parquet listings, as jobs of Spark and Ray write them: images with captions, weights and masks, and every bad row named."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from caching import StubVae, draw, with_data
from sentences import refused

from fastsd.data.building.build import build_cache
from fastsd.data.cache import LatentCache
from fastsd.data.sources.folders import captions_of, scan


def listing(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def folders(path):
    return [type("Root", (), {"path": str(path)})()]


def test_a_listing_gives_what_its_columns_say(tmp_path):
    files = ["images/a.png", str(tmp_path / "images/b.png"), "./images/c.png"]
    for name in "abc":
        draw(tmp_path / f"images/{name}.png", ord(name), f"beside {name}")
    path = listing(
        tmp_path / "set.parquet",
        file=files,
        caption=[["one", "two"], [], None],
        score=[0.5, None, 2.0],
        mask=[None, "m.png", None],
    )
    sources = list(scan(folders(path), weight_key="score", masks="-mask.png"))
    assert [source.path for source in sources] == [str(tmp_path / f"images/{name}.png") for name in "abc"]
    assert [captions_of(source) for source in sources] == [("one", "two"), ("beside b",), ("beside c",)]
    assert [source.weight for source in sources] == [0.5, None, 2.0]
    assert [source.mask and source.mask.path for source in sources] == [None, str(tmp_path / "m.png"), None]
    sidecar = scan(folders(path), captions="sidecar")
    assert captions_of(next(sidecar)) == ("beside a",)


def test_a_folder_of_parts_is_one_listing_in_the_order_of_names(tmp_path):
    for i in range(4):
        draw(tmp_path / f"images/{i}.png", i, None)
    for i in (1, 0):
        names = [f"images/{2 * i}.png", f"images/{2 * i + 1}.png"]
        listing(tmp_path / f"set.parquet/part-{i}.snappy.parquet", file=names, text=[f"text {name}" for name in names])
    (tmp_path / "set.parquet/_SUCCESS").touch()
    (tmp_path / "set.parquet/.part-0.crc").touch()
    settings = with_data(tmp_path, folders=[str(tmp_path / "set.parquet")])
    assert build_cache(settings, StubVae()).cached == 4
    assert LatentCache.open(tmp_path / "cache").captions(range(4)) == [f"text images/{i}.png" for i in range(4)]
    assert build_cache(settings, StubVae()).encoded == 0


def test_bad_rows_are_named_and_stop_nothing(tmp_path):
    draw(tmp_path / "good.png", 1)
    files = ["good.png", None, "good.png", "missing.png"]
    listing(tmp_path / "set.parquet/0.parquet", file=files, caption=["fine", "a", "b", "c"])
    listing(tmp_path / "set.parquet/1.parquet", image=["good.png"])
    (tmp_path / "set.parquet/2.parquet").write_bytes(b"no parquet")
    counts = build_cache(with_data(tmp_path, folders=[str(tmp_path / "set.parquet")]), StubVae())
    assert counts.cached == 1 and counts.rejected == 5
    expected = [
        "0.parquet/row 2: has no file",
        "0.parquet/row 3: repeats the file of an earlier row, which is used",
        "missing.png: cannot be read (No such file or directory)",
        "1.parquet: has no column file (columns: image); add it with the paths of the images",
        "2.parquet: cannot be read as parquet",
    ]
    assert all(text in example for text, example in zip(expected, counts.examples, strict=True)), counts.examples


@pytest.mark.parametrize("columns", [{"image": ["a.png"]}, {"file": pa.array([], pa.string())}])
def test_a_listing_without_images_is_refused(tmp_path, columns):
    path = listing(tmp_path / "set.parquet", **columns)
    with refused("folder-empty", path=path):
        list(scan(folders(path)))
