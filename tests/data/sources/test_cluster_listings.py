"""The example programs for Spark and Ray, really run: a cache is built from their listings. They need the extra `cluster`
and, for Spark, a Java runtime."""

import os
import subprocess
import sys

import pytest
from caching import StubVae, draw_many, with_data
from environment import ROOT

from fastsd.data.building.build import build_cache
from fastsd.data.cache import LatentCache

# One process of few tasks: a test needs no cluster, and Spark plans 200 tasks for a few rows otherwise.
SPARK = "--master local[2] --conf spark.sql.shuffle.partitions=2 --conf spark.ui.enabled=false pyspark-shell"
ENVIRONMENT = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_SUBMIT_ARGS": SPARK, "RAY_AUTH_MODE": "disabled"}


@pytest.mark.slow
@pytest.mark.parametrize("name, package", [("spark_listing", "pyspark"), ("ray_listing", "ray")])
def test_a_listing_of_a_cluster_is_cached(tmp_path, name, package):
    if not os.environ.get("FASTSD_TEST_CLUSTER"):  # set it where nothing may be skipped
        pytest.importorskip(package)
    draw_many(tmp_path, 5)
    (tmp_path / "images/004.txt").unlink()
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), "images", "set.parquet"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "5 images listed" in done.stdout
    assert build_cache(with_data(tmp_path, folders=[str(tmp_path / "set.parquet")]), StubVae()).cached == 5
    captions = LatentCache.open(tmp_path / "cache").captions(range(5))
    assert captions == [*(f"picture {i}" for i in range(4)), ""]
    assert len((ROOT / f"examples/{name}.py").read_text().splitlines()) < 40
