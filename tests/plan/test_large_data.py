"""The bytes of an image in a cache, as `fastsd plan --gpus` extrapolates them, against a real cache."""

import pytest
from caching import StubVae, config, draw

from fastsd.data.building.build import build_cache
from fastsd.plan.large_data import ROW

CAPTION = "a red fox in the snow, tag one, tag two, tag three"


def test_rows_of_a_cache_take_the_bytes_that_are_planned(tmp_path):
    """Compare its growth, because an empty database has some pages."""
    sizes, counts = [], (100, 400)
    for first, count in ((0, counts[0]), counts):
        for i in range(first, count):
            draw(tmp_path / f"images/{i:07}.png", i, CAPTION, size=(32, 32))
        build_cache(config(tmp_path, batch=64), StubVae())
        files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and "shards" not in file.parts]
        newest = max((file for file in files if file.parent.name == "views"), key=lambda file: file.stat().st_mtime_ns)
        sizes.append(sum(file.stat().st_size for file in files if file.parent.name != "views") + newest.stat().st_size)
    assert (sizes[1] - sizes[0]) / (counts[1] - counts[0]) == pytest.approx(ROW, rel=0.25)
