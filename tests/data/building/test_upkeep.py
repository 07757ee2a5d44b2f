"""`fastsd cache --stats`, `--verify`, `--prune`, and what the command says, on a real (tiny) model."""

import numpy as np
import pytest
import torch
from caching import StubVae, config, draw_many, flip
from PIL import Image
from rich.console import Console
from tiny import job, write_images

from fastsd.commands import cache
from fastsd.config.schema import load_config
from fastsd.data.building import upkeep
from fastsd.data.building.build import build_cache
from fastsd.data.cache import LatentCache
from fastsd.data.tokens import token_files
from fastsd.errors import UserError

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1\n'


@pytest.fixture
def said():
    """What a command prints: `said(command, config, ...)` -> text."""

    def run(command, *arguments, **keys):
        console = Console(width=200, file=None, record=True, quiet=False)
        with console.capture() as capture:
            command(*arguments, **keys, console=console)
        return capture.get()

    return run


@pytest.fixture
def made(tmp_path, tiny_model):
    write_images(tmp_path / "images", 12)
    return load_config(job(tmp_path, tiny_model, tmp_path / "images", STAGE, resolution=32))


def look(said, config, **asked):
    return said(cache.inspect_cache, config, **{"verify": False, "prune": False, "stats": False} | asked)


def test_mean_and_std_are_those_of_the_scaled_latents(tmp_path):
    draw_many(tmp_path, 20)
    name = build_cache(config(tmp_path, dtype="fp32"), StubVae(scaling_factor=3.0)).view
    view = upkeep.stats(tmp_path / "cache").views[name]
    latents = 3.0 * LatentCache.open(tmp_path / "cache").get(range(20))["latents"].double()
    assert view.measured == 20 and view.buckets == {"32x32": 20}
    np.testing.assert_allclose(view.mean, latents.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(view.std, latents.transpose(0, 1).flatten(1).std(1, unbiased=False), rtol=1e-9)


def test_latents_that_are_not_of_the_factor_are_warned_of(tmp_path):
    draw_many(tmp_path, 6)
    plain = build_cache(config(tmp_path), StubVae()).view
    std = float(np.mean(upkeep.stats(tmp_path / "cache").views[plain].std)) / 0.5
    for i, (scale, warned) in enumerate([(1.0, False), (0.6, False), (1.8, False), (0.2, True), (5.0, True)]):
        view = build_cache(config(tmp_path), StubVae(f"vae {i}", scaling_factor=scale / std)).view
        warning = upkeep.stats(tmp_path / "cache").views[view].warning
        assert bool(warning) == warned, (scale, warning)
        assert not warned or f"standard deviation of {scale:.2f}" in warning


def test_the_command_tells_what_it_did_and_what_is_there(said, made, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "images/silent.png")
    (tmp_path / "images/0000.txt").write_text("word " * 100)
    (tmp_path / "images/bad.jpg").write_text("no image")
    out = said(cache.cache, made)
    assert "13 of 14 images cached" in out and "13 encoded now" in out and "1 images have no caption" in out
    assert all(f"{stage} " in out for stage in ("decode", "encode", "write")) and "img/s" in out
    assert "1 rejected:\n  1 x the content is no" in out and "bad.jpg" in out
    assert "0 encoded now, 13 already cached" in said(cache.cache, made)
    out = look(said, made, stats=True)
    assert "13 latents in 1 shards" in out and "sizes: 32x32 x 13" in out
    assert "1 captions are longer than 77 tokens and will be truncated" in out and "  1 rejected:\n  1 x the content" in out
    assert out.count("±") == 5  # of four channels, and of the heading


def test_damaged_token_ids_are_found_removed_and_made_again(said, made):
    said(cache.cache, made)
    (path,) = token_files(upkeep.Path(made.cache.dir))
    before = path.read_bytes()
    assert "match their sha256" in look(said, made, verify=True)
    flip(path, -3)
    with pytest.raises(UserError, match="does not match its sha256; removed"):
        look(said, made, verify=True)
    assert not path.exists()
    said(cache.cache, made)
    assert path.read_bytes() == before
    path.write_bytes(before[:100])
    assert len(upkeep.verify(made.cache.dir)) == 1


def test_prune_takes_token_ids_whose_view_is_gone(said, made, tmp_path):
    said(cache.cache, made)
    (old,) = token_files(upkeep.Path(made.cache.dir))
    (tmp_path / "images/0003.txt").write_text("another caption")
    said(cache.cache, made)
    # The file has the view's name: it was replaced, and nothing is left over.
    assert token_files(upkeep.Path(made.cache.dir)) == [old]
    (view,) = (upkeep.Path(made.cache.dir) / "views").iterdir()
    view.unlink()
    assert "1 unused shards" in look(said, made, prune=True)
    assert not token_files(upkeep.Path(made.cache.dir))


def test_a_tokenizer_that_is_missing_stops_no_encoding(said, made, tmp_path):
    keys = made.model.model_dump() | {"tokenizer": str(tmp_path)}
    out = said(cache.cache, made.model_copy(update={"model": type(made.model).model_validate(keys)}))
    assert "note: " in out and "no CLIP tokenizer there" in out and "12 of 12 images cached" in out


def test_stats_run_beside_a_process_that_fills_the_cache(tmp_path):
    draw_many(tmp_path, 8)

    class Watched(StubVae):
        def encode(self, images):
            found = upkeep.stats(tmp_path / "cache")
            assert found.latents + found.planned == 8 and not found.views
            return super().encode(images)

    torch.set_num_threads(1)
    assert build_cache(config(tmp_path), Watched()).encoded == 8
