"""The cache with aspect buckets, random crops, mirror images, tars and imported latents."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from caching import BUCKETS, R, StubVae, config, draw, draw_many, expected, with_data
from safetensors.numpy import save_file
from sentences import refused, says

from fastsd.data.building.buckets import Buckets
from fastsd.data.building.build import build_cache
from fastsd.data.building.decode import decode, probe
from fastsd.data.building.upkeep import stats, verify
from fastsd.data.cache import LatentCache

SIZES = {"wide": (80, 40), "tall": (40, 80), "square": (48, 48), "flat": (64, 50)}


def test_buckets_keep_the_aspect_ratio_and_form_groups(tmp_path):
    for i in range(3):
        for name, size in SIZES.items():
            draw(tmp_path / f"images/{name}{i}.png", i, f"{name}{i}", size)
    counts = build_cache(with_data(tmp_path, buckets=BUCKETS), StubVae())
    assert (counts.cached, counts.latents) == (12, 12)
    cache = LatentCache.open(tmp_path / "cache")
    assert sum(group.count for group in cache.groups) == len(cache) == 12
    table = Buckets(R, with_data(tmp_path, buckets=BUCKETS).data.buckets)
    for group in cache.groups:
        samples = range(group.first, group.first + group.count)
        for name, latent in zip(cache.captions(samples), cache.get(samples)["latents"], strict=True):
            width, height = table.place(*SIZES[name[:-1]]).size
            assert latent.shape == group.shape == (4, height // 8, width // 8)
            assert torch.equal(latent, bucketed(tmp_path / f"images/{name}.png", table))
    buckets = stats(tmp_path / "cache").views[counts.view].buckets
    assert sorted(buckets.values()) == [3, 3, 6]  # `flat` goes to the square bucket
    with refused("batch-shapes", AssertionError):
        cache.get([0, 11])


def bucketed(path, table, crop=(0.5, 0.5)):
    data = path.read_bytes()
    pixels = decode(data, table.place(*probe(data)), crop)
    return StubVae().encode(torch.from_numpy(pixels)[None].float() / 127.5 - 1)[0].half()


def test_mirror_images_are_encoded_only_with_flip(tmp_path):
    draw_many(tmp_path, 5)
    assert build_cache(with_data(tmp_path), StubVae()).encoded == 5
    counts = build_cache(with_data(tmp_path, flip=True), StubVae())
    assert (counts.encoded, counts.cached, counts.latents) == (5, 5, 10)
    cache = LatentCache.open(tmp_path / "cache", counts.view)
    assert cache.versions == 2
    plain, mirrored = cache.get(range(5), [0] * 5)["latents"], cache.get(range(5), [1] * 5)["latents"]
    for i in range(5):
        path = tmp_path / f"images/{i:03}.png"
        assert torch.equal(plain[i], expected(path).half())
        data = path.read_bytes()
        pixels = decode(data, Buckets(R, None).place(*probe(data)))[:, :, ::-1].copy()
        assert torch.equal(mirrored[i], StubVae().encode(torch.from_numpy(pixels)[None].float() / 127.5 - 1)[0].half())
    assert torch.equal(cache.get(range(5))["latents"], plain)
    assert build_cache(with_data(tmp_path), StubVae()).encoded == 0  # the view without mirror images is still valid


def test_random_crops_differ_and_are_reproducible(tmp_path):
    for i in range(4):
        draw(tmp_path / f"images/{i}.png", i, f"{i}", (90, 40))
    counts = build_cache(with_data(tmp_path, crop="random", crops=3, flip=True), StubVae())
    assert (counts.cached, counts.encoded) == (4, 24)
    cache = LatentCache.open(tmp_path / "cache")
    assert cache.versions == 6
    versions = torch.stack([cache.get(range(4), [v] * 4)["latents"] for v in range(6)])
    assert len({tuple(latent.flatten().tolist()) for latent in versions.flatten(0, 1)}) >= 20
    more = build_cache(with_data(tmp_path, crop="random", crops=4, flip=True), StubVae())
    assert more.encoded == 8  # the fourth crop and its mirror image
    reopened = LatentCache.open(tmp_path / "cache", more.view)
    assert torch.equal(torch.stack([reopened.get(range(4), [v] * 4)["latents"] for v in range(6)]), versions)


def test_flip_does_not_mix_up_versions(tmp_path):
    """Version 1 is a mirror image with `flip` and the second crop without it, whatever was cached before."""
    for i in range(4):
        draw(tmp_path / f"images/{i}.png", i, f"{i}", (90, 40))

    def latents(root, **keys):
        cache = LatentCache.open(root / "cache", build_cache(with_data(root, crop="random", **keys), StubVae()).view)
        return torch.stack([cache.get(range(4), [v] * 4)["latents"] for v in range(cache.versions)])

    def interrupted(**keys):
        class Failing(StubVae):
            def encode(self, images):
                raise RuntimeError("gone")

        with pytest.raises(RuntimeError):
            build_cache(with_data(tmp_path, crop="random", **keys), Failing())

    interrupted(crops=2, flip=True)
    crops = latents(tmp_path, crops=2)
    both = latents(tmp_path, crops=2, flip=True)
    assert torch.equal(both[0::2], crops) and not torch.equal(both[1], crops[1])
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(latents(tmp_path, crops=2, flip=True), both)
    assert torch.equal(latents(tmp_path, crops=2), crops)


def test_tars_and_folders_give_the_same_latents(tmp_path):
    draw_many(tmp_path, 6)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for path in sorted((tmp_path / "images").iterdir(), key=lambda path: path.name):
            tar.add(path, path.name)
    counts = build_cache(with_data(tmp_path, folders=[str(tmp_path / "images"), str(tmp_path / "set.tar")]), StubVae())
    assert (counts.images, counts.cached, counts.encoded) == (12, 12, 6)
    cache = LatentCache.open(tmp_path / "cache")
    assert [(group.root, group.count) for group in cache.groups] == [(0, 6), (1, 6)]
    assert torch.equal(cache.get(range(6))["latents"], cache.get(range(6, 12))["latents"])
    assert cache.captions(range(12)) == [f"picture {i}" for i in range(6)] * 2


def test_caption_lines_and_metadata_are_variants(tmp_path):
    for i in range(3):
        draw(tmp_path / f"images/{i}.png", i, caption=None)
    (tmp_path / "images/0.txt").write_text("one\n\n  two \n")
    rows = [{"file_name": "1.png", "text": ["three", "four\nlines"]}]
    (tmp_path / "images/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    counts = build_cache(config(tmp_path), StubVae())
    assert counts.empty_captions == 1
    assert LatentCache.open(tmp_path / "cache").variants(range(3)) == [["one", "two"], ["three", "four lines"], [""]]


def write_latents(root, latents, **names):
    (root / "images").mkdir(parents=True, exist_ok=True)
    for i, latent in enumerate(latents):
        save_file({"latent": latent}, root / f"images/{i}.img_sdxl")
        buffer = io.BytesIO()
        np.savez(buffer, latents=latent, latents_flipped=latent[..., ::-1])
        (root / f"images/{i}_0048x0040_sd.npz").write_bytes(buffer.getvalue())
        (root / f"images/{i}.txt").write_text(f"caption {i}")


@pytest.mark.parametrize("kind", ["img_sdxl", "npz"])
def test_latents_of_other_trainers_are_imported(tmp_path, kind):
    latents = np.random.default_rng(0).normal(0, 2, (6, 4, 5, 6)).astype(np.float32)
    write_latents(tmp_path, latents)
    (tmp_path / f"images/9.{kind}").write_bytes(b"broken")
    flip = kind == "npz"
    counts = build_cache(with_data(tmp_path, latents=kind, flip=flip), StubVae())
    assert (counts.cached, counts.rejected, counts.encoded) == (6, 1, 12 if flip else 6)
    cache = LatentCache.open(tmp_path / "cache")
    assert torch.equal(cache.get(range(6))["latents"], torch.from_numpy(latents).half())
    assert cache.captions(range(6)) == [f"caption {i}" for i in range(6)]
    if not flip:  # a tar gives the same latents
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for path in sorted((tmp_path / "images").glob("[0-5].*")):
                tar.add(path, path.name)
        counts = build_cache(with_data(tmp_path, latents=kind, folders=[str(tmp_path / "set.tar")]), StubVae())
        assert counts.cached == 6 and counts.encoded == 0
    if flip:
        assert torch.equal(cache.get([2], [1])["latents"][0], torch.from_numpy(latents[2, ..., ::-1].copy()).half())
    assert verify(tmp_path / "cache") == []


def test_imported_latents_of_another_scale_or_shape_are_refused(tmp_path):
    latents = np.random.default_rng(0).normal(0, 2, (6, 4, 5, 6)).astype(np.float32)
    write_latents(tmp_path, latents / 8)
    with refused("cache-latents-of-other-vae", kind="'img_sdxl'") as error:
        build_cache(with_data(tmp_path, latents="img_sdxl"), StubVae())
    assert " 0.24" in str(error.value)  # standard deviation
    save_file({"latent": latents[0, :3].copy()}, tmp_path / "images/0.img_sdxl")
    for i in range(1, 6):
        save_file({"latent": latents[i]}, tmp_path / f"images/{i}.img_sdxl")
    counts = build_cache(with_data(tmp_path, latents="img_sdxl"), StubVae())
    assert counts.cached == 5 and says(counts.examples[0], "latent-wrong-shape", shape=[3, 5, 6], expected=[4, 5, 6])
