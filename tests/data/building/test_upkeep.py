"""`fastsd cache`, with `--stats`, `--verify` and `--prune`, and its output, on a real (tiny) model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from caching import StubVae, config, draw_many, flip
from PIL import Image
from sentences import refused, says, sentence
from tiny import job, write_images

from fastsd.commands import cache
from fastsd.config.schema import load_config
from fastsd.data.building import upkeep
from fastsd.data.building.build import build_cache
from fastsd.data.cache import LatentCache
from fastsd.data.tokens import token_files
from fastsd.terminal.console import Console

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1\n'


def output(command, *arguments, **keys):
    """Run a command and return its output."""
    console = Console(width=200, file=None, record=True, quiet=False)
    with console.capture() as capture:
        command(*arguments, **keys, console=console)
    return capture.get()


@pytest.fixture
def job_config(tmp_path, tiny_model):
    write_images(tmp_path / "images", 12)
    return load_config(job(tmp_path, tiny_model, tmp_path / "images", STAGE, resolution=32))


def inspect(config, **options):
    return output(cache.inspect_cache, config, **{"verify": False, "prune": False, "stats": False} | options)


def test_mean_and_std_are_those_of_the_scaled_latents(tmp_path):
    draw_many(tmp_path, 20)
    name = build_cache(config(tmp_path, dtype="fp32"), StubVae(scaling_factor=3.0)).view
    view = upkeep.stats(tmp_path / "cache").views[name]
    latents = 3.0 * LatentCache.open(tmp_path / "cache").get(range(20))["latents"].double()
    assert view.measured == 20 and view.buckets == {"32x32": 20}
    np.testing.assert_allclose(view.mean, latents.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(view.std, latents.transpose(0, 1).flatten(1).std(1, unbiased=False), rtol=1e-9)


def test_warns_if_latents_do_not_match_the_scaling_factor(tmp_path):
    draw_many(tmp_path, 6)
    plain = build_cache(config(tmp_path), StubVae()).view
    std = float(np.mean(upkeep.stats(tmp_path / "cache").views[plain].std)) / 0.5
    for i, (scale, warned) in enumerate([(1.0, False), (0.6, False), (1.8, False), (0.2, True), (5.0, True)]):
        view = build_cache(config(tmp_path), StubVae(f"vae {i}", scaling_factor=scale / std)).view
        warning = upkeep.stats(tmp_path / "cache").views[view].warning
        assert bool(warning) == warned, (scale, warning)
        assert not warned or says(warning, "scaled-latents-std", std=f"{scale:.2f}")


def test_reports_counts_rejections_and_contents(job_config, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "images/silent.png")
    (tmp_path / "images/0000.txt").write_text("word " * 100)
    (tmp_path / "images/bad.jpg").write_text("no image")
    out = output(cache.cache, job_config)
    assert says(out, "images-cached", cached=13, images=14, encoded=13) and says(out, "empty-captions", count=1)
    assert all(f"{step} " in out for step in ("decode", "encode", "write")) and "img/s" in out
    rejected = f"1 rejected:\n  1 x {sentence('image-format')}"
    assert rejected in out and "bad.jpg" in out
    assert says(output(cache.cache, job_config), "images-cached", encoded=0, present=13)
    out = inspect(job_config, stats=True)
    assert says(out, "cache-contents", latents=13, shards=1) and "sizes: 32x32 x 13" in out
    assert says(out, "truncated-captions", captions=1, capacity=75) and rejected in out
    assert out.count("±") == 5  # four channels and the heading


def test_damaged_token_ids_are_detected_deleted_and_rebuilt(job_config):
    cache.cache(job_config)
    (path,) = token_files(Path(job_config.cache.dir))
    before = path.read_bytes()
    assert "sha256" in inspect(job_config, verify=True)
    flip(path, -3)
    with refused("cache-damaged", problem=sentence("verify-deleted", path=path, damage=sentence("damage-sha256"))):
        inspect(job_config, verify=True)
    assert not path.exists()
    cache.cache(job_config)
    assert path.read_bytes() == before
    path.write_bytes(before[:100])
    assert len(upkeep.verify(job_config.cache.dir)) == 1


def test_prune_deletes_token_ids_without_a_view(job_config, tmp_path):
    cache.cache(job_config)
    (first_file,) = token_files(Path(job_config.cache.dir))
    (tmp_path / "images/0003.txt").write_text("another caption")
    cache.cache(job_config)
    # The file has the name of the view, so the new file has replaced the old one.
    assert token_files(Path(job_config.cache.dir)) == [first_file]
    (view,) = (Path(job_config.cache.dir) / "views").iterdir()
    view.unlink()
    assert says(inspect(job_config, prune=True), "shards-pruned", shards=1)
    assert not token_files(Path(job_config.cache.dir))


def test_a_missing_tokenizer_does_not_stop_encoding(job_config, tmp_path):
    keys = job_config.model.model_dump() | {"tokenizer": str(tmp_path)}
    out = output(cache.cache, job_config.model_copy(update={"model": type(job_config.model).model_validate(keys)}))
    assert "warning: " in out and says(out, "no-tokenizer", source=tmp_path)
    assert says(out, "images-cached", cached=12, images=12)


def test_stats_run_beside_a_process_that_fills_the_cache(tmp_path):
    draw_many(tmp_path, 8)

    class Watched(StubVae):
        def encode(self, images):
            contents = upkeep.stats(tmp_path / "cache")
            assert contents.latents + contents.planned == 8 and not contents.views
            return super().encode(images)

    torch.set_num_threads(1)
    assert build_cache(config(tmp_path), Watched()).encoded == 8
