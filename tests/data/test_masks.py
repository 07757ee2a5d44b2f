"""Masks, from files to batches: each cell of a mask matches the same cell of the latent. Read next: `test_weights.py`."""

import io
import os
import re
import tarfile
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from caching import BUCKETS, StubVae, flip, with_data
from masked import ENDING, loader, stage
from PIL import Image
from sentences import pattern, refused, says, sentence

from fastsd.config.schema import parse_config
from fastsd.data import masks
from fastsd.data.building import mask_cells
from fastsd.data.building.buckets import Buckets
from fastsd.data.building.build import build_cache
from fastsd.data.building.decode import decode_mask
from fastsd.data.building.upkeep import prune, stats, verify
from fastsd.data.cache import LatentCache, view_name
from fastsd.data.loader import Loader
from fastsd.data.masks import Masks, mask_path
from fastsd.data.sources import folders
from fastsd.run.restart import compare_images

GREY = StubVae().encode(torch.ones(1, 3, 8, 8))[0, 0]  # channel 0 of a white pixel's latent


@pytest.fixture(autouse=True)
def old_files(monkeypatch):
    """Treat new files as old ones, so that their facts are stored."""
    monkeypatch.setattr("fastsd.data.building.collect._YOUNG_NS", 0)


@pytest.fixture
def calls(monkeypatch):
    """Count how many masks are decoded and how many files are read."""
    counts = {"decode_mask": 0, "read_bytes": 0}

    def counting(name, function, *arguments):
        counts[name] += 1
        return function(*arguments)

    monkeypatch.setattr(mask_cells, "decode_mask", partial(counting, "decode_mask", mask_cells.decode_mask))
    monkeypatch.setattr(folders, "read_bytes", partial(counting, "read_bytes", folders.read_bytes))
    return counts


def smooth(width, height, seed=0):
    """Make a grey picture that is so smooth that all methods of resizing agree."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 4), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def write_image(root, name, image, mask=None, ending=ENDING, **options):
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(path, **options)
    path.with_suffix(".txt").write_text(path.stem)
    if mask is not None:
        mask.save(path.with_name(path.stem + ending))
    return path


def masked(root, **keys):
    config = with_data(root, **{"masks": ENDING} | keys)
    return config.model_copy(update={"cache": config.cache.model_copy(update={"dtype": "fp32"})})


def build(config):
    """Build the cache. Return its counts, and the masks by caption: uint8 (V, h, w)."""
    counts = build_cache(config, StubVae())
    masks_of = {}
    with closing(LatentCache.open(config.cache.dir, counts.view)) as cache:
        for i, caption in enumerate(cache.captions(range(len(cache)))):
            shape = cache.get([i])["latents"].shape[-2:]
            versions = [Masks(cache).get([i], [v], shape)[0, 0] for v in range(cache.versions)]
            masks_of[caption] = torch.stack(versions)
    return counts, masks_of


SIZES = [(80, 40), (37, 53), (101, 67), (41, 41), (33, 200)]


RANDOM = {"crop": "random", "flip": True}
CONFIGS = [{}, {"flip": True}, {"buckets": BUCKETS}, {"buckets": BUCKETS | {"no_upscale": True}}]
CONFIGS += [RANDOM | {"crops": 3}, RANDOM | {"crops": 2, "buckets": BUCKETS}]


@pytest.mark.parametrize("keys", CONFIGS, ids=str)
def test_masks_are_resized_and_cropped_like_their_images(tmp_path, keys):
    """Image and mask are the same grey picture, so each cell of the mask equals the latent's cell."""
    for i, size in enumerate(SIZES):
        grey = smooth(*size, seed=i)
        write_image(tmp_path, f"{i}.png", grey, grey)
        write_image(tmp_path, f"{i}-small.png", grey, grey.resize((-(-size[0] // 2), -(-size[1] // 2)), Image.Resampling.BOX))
        for orientation in (3, 6, 7):
            exif = Image.Exif()
            exif[0x0112] = orientation
            turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}[orientation]
            write_image(tmp_path, f"{i}-turned{orientation}.png", grey.transpose(turned), grey, exif=exif)
    config = masked(tmp_path, **keys)
    counts, masks_of = build(config)
    assert counts.cached == len(masks_of) == 5 * len(SIZES)
    with closing(LatentCache.open(config.cache.dir)) as cache:
        mirrored_errors = []
        for i, caption in enumerate(cache.captions(range(len(cache)))):
            for version in range(cache.versions):
                expected = (cache.get([i], [version])["latents"][0, 0] / GREY + 1) * 127.5
                cells = masks_of[caption][version]
                assert cells.dtype == torch.uint8 and cells.shape == expected.shape
                assert (cells - expected).abs().max() < (16 if "small" in caption else 8), caption
                mirrored_errors.append((cells.flip(1) - expected).abs().max().item())
        assert np.median(mirrored_errors) > 32  # a mirrored mask would be detected


def as_bytes(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def test_a_cell_is_the_mean_brightness_of_its_pixels():
    place = Buckets(16, None).place(16, 16)
    levels = np.repeat(np.repeat(np.array([[0, 255], [100, 7]], np.uint8), 8, 0), 8, 1)
    levels[8:, 8:][::2] = 8  # 7.5 on average
    expected = [[0, 255], [100, 8]]
    grey = Image.fromarray(levels)
    alpha = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    rgb = grey.convert("RGB")
    with_alpha = Image.merge("RGBA", (*rgb.split(), alpha))
    with_transparency = io.BytesIO()
    grey.save(with_transparency, "PNG", transparency=0)
    grey16 = Image.fromarray(levels.astype(np.uint16) * 257)
    kinds = [as_bytes(image) for image in (grey, rgb, with_alpha, with_alpha.convert("LA"), grey16, grey.convert("P"))]
    for kind, data in enumerate([*kinds, with_transparency.getvalue(), as_bytes(grey, "BMP")]):
        assert decode_mask(data, place, (0.5, 0.5), 8).tolist() == expected, kind
    halves = Image.fromarray(np.arange(256).reshape(16, 16) % 16 < 11).convert("1")
    assert decode_mask(as_bytes(halves), place, (0.5, 0.5), 8).tolist() == [[255, 96]] * 2  # 3 of 8 columns
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert decode_mask(as_bytes(red), place, (0.5, 0.5), 16).tolist() == [[76]]  # luminance


def test_an_image_without_a_mask_counts_in_full(tmp_path):
    write_image(tmp_path, "a.png", smooth(40, 40), Image.new("L", (40, 40)))
    write_image(tmp_path, "b.png", smooth(40, 40, 1))
    write_image(tmp_path, "A.png", smooth(40, 40, 2))  # another name
    counts, masks_of = build(masked(tmp_path))
    assert counts.images == counts.cached == 3
    assert not masks_of["a"].any() and (masks_of["b"] == 255).all() and (masks_of["A"] == 255).all()


@pytest.mark.parametrize("ending", ["-mask.png", ".mask.png", "-masklabel.png", "_M.PNG"])
def test_files_with_the_ending_of_masks_are_not_images(tmp_path, ending):
    grey = smooth(40, 40)
    for name in ("a.png", "a-1.png", "d/b.jpg"):
        write_image(tmp_path, name, grey, grey, ending)
    write_image(tmp_path, "c.PNG", smooth(40, 40, 1), grey, ending.upper())
    config = masked(tmp_path, masks=ending)
    counts, masks_of = build(config)
    assert counts.images == counts.cached == 4 and not any((cells == 255).all() for cells in masks_of.values())
    assert folders.count(config.data) == (4, 4)


def write_tar(root, order):
    """Write the images and captions of `root` to a tar, in the order that `order` makes."""
    with tarfile.open(root / "set.tar", "w") as tar:
        for path in order(path for path in (root / "images").rglob("*.*")):
            tar.add(path, path.relative_to(root / "images"))
    return {"folders": [str(root / "set.tar")]}


@pytest.mark.parametrize("order", [sorted, lambda paths: sorted(paths, key=lambda p: (p.name.endswith(ENDING), p))])
def test_masks_in_tars_equal_those_in_folders(tmp_path, order):
    names = ["a", "a-1", "a-n", "d/b", "c"]  # in the order of names, a-n comes between a's mask and a
    for i, name in enumerate(names):
        write_image(tmp_path, f"{name}.png", smooth(60, 44, i), smooth(60, 44, i) if name != "c" else None)
    _, in_folder = build(masked(tmp_path))
    counts, masks_of = build(masked(tmp_path, **write_tar(tmp_path, order)))
    assert counts.images == counts.cached == 5 and counts.encoded == 0
    assert masks_of.keys() == in_folder.keys() and all(torch.equal(masks_of[name], in_folder[name]) for name in masks_of)
    assert (masks_of["c"] == 255).all()


rejected = partial(pattern, "mask-rejected")
DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), rejected(reason=sentence("file-empty"))),
    "no image": (lambda path: path.write_bytes(b"x" * 99), rejected(reason=sentence("image-format"))),
    "cut": (lambda path: os.truncate(path, 200), pattern("mask-rejected")),
    "other": (lambda path: smooth(40, 60).save(path), pattern("mask-aspect-ratio", mask="40 x 60", image="60 x 44")),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), rejected(reason=sentence("file-not-regular"))),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_bad_mask_rejects_its_image_until_it_is_repaired(tmp_path, kind, calls):
    for i in range(4):
        write_image(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, i + 9))
    mask = tmp_path / "images" / f"2{ENDING}"
    intact = mask.read_bytes()
    damage, reason = DAMAGES[kind]
    damage(mask)
    for _ in range(2):
        counts, masks_of = build(masked(tmp_path))
        assert set(masks_of) == {"0", "1", "3"} and counts.rejected == 1
        assert re.search(f"2.png: {reason.pattern}", counts.examples[0]) and "\n" not in counts.examples[0]
    mask.unlink()
    mask.write_bytes(intact)
    os.utime(mask, (1e9, 1e9))
    counts, masks_of = build(masked(tmp_path))
    assert counts.rejected == 0 and counts.encoded == 1 and len(masks_of) == 4


def test_masks_without_an_image_are_rejected(tmp_path):
    write_image(tmp_path, "a.png", smooth(40, 40), smooth(40, 40))
    for name in ("b", "d/a"):
        path = tmp_path / f"images/{name}{ENDING}"
        path.parent.mkdir(exist_ok=True)
        smooth(9, 9).save(path)
    for keys in ({}, write_tar(tmp_path, sorted)):
        counts, masks_of = build(masked(tmp_path, **keys))
        assert set(masks_of) == {"a"} and set(counts.reasons) == {sentence("mask-without-image")}
        assert counts.rejected == 2 and all(ENDING in example for example in counts.examples)


def test_bad_masks_in_a_tar_reject_their_samples(tmp_path):
    write_image(tmp_path, "a.png", smooth(40, 40), smooth(40, 40))
    write_image(tmp_path, "b.png", smooth(40, 40, 1), smooth(40, 40))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt", f"b{ENDING}", f"b{ENDING}"):
            tar.add(tmp_path / "images" / name, name)
        link = tarfile.TarInfo(f"a{ENDING}")
        link.type, link.linkname = tarfile.SYMTYPE, f"b{ENDING}"
        tar.addfile(link)
        tar.add(tmp_path / "images/a.png", "c.png")
    counts, masks_of = build(masked(tmp_path, folders=[str(tmp_path / "set.tar")]))
    problems = sentence("tar-member-kind", kind="symbolic link"), sentence("tar-member-repeated")
    assert set(masks_of) == {""} and counts.reasons == {sentence("mask-rejected", reason=reason): 1 for reason in problems}


def test_only_changed_masks_are_decoded_again(tmp_path, calls):
    for i in range(6):
        write_image(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, 9 + i) if i else None)
    config = masked(tmp_path)
    counts, before = build(config)
    assert counts.encoded == 6 and calls["decode_mask"] == 5
    frozen = mask_path(tmp_path / "cache", counts.view)
    stamp = frozen.stat().st_mtime_ns
    calls.update(decode_mask=0, read_bytes=0)
    counts, _ = build(config)
    assert counts.encoded == 0 and calls == {"decode_mask": 0, "read_bytes": 0} and frozen.stat().st_mtime_ns == stamp
    smooth(60, 44, 99).save(tmp_path / f"images/3{ENDING}")  # edited
    smooth(60, 44, 98).save(tmp_path / f"images/0{ENDING}")  # new
    (tmp_path / f"images/5{ENDING}").unlink()
    (tmp_path / "images/1.txt").write_text("caption")
    (tmp_path / "images/2.png").rename(tmp_path / "images/2b.png")
    (tmp_path / f"images/2{ENDING}").rename(tmp_path / f"images/2b{ENDING}")
    (tmp_path / "images/2.txt").rename(tmp_path / "images/2b.txt")
    counts, after = build(config)
    assert counts.encoded == 0 and calls["decode_mask"] == 2
    assert torch.equal(after["caption"], before["1"]) and torch.equal(after["2"], before["2"])
    assert torch.equal(after["4"], before["4"]) and (after["5"] == 255).all()
    assert not torch.equal(after["3"], before["3"]) and not (after["0"] == 255).all()
    write_image(tmp_path, "4.png", smooth(60, 44, 77))  # the mask and the crop of an edited image stay the same
    counts, last = build(config)
    assert counts.encoded == 1 and calls["decode_mask"] == 2 and torch.equal(last["4"], after["4"])


def test_other_settings_reuse_masks_where_possible(tmp_path, calls):
    for i in range(3):
        write_image(tmp_path, f"{i}.png", smooth(90, 44, i), smooth(90, 44, i))
    plain, with_masks = build_cache(with_data(tmp_path, exclude=[ENDING]), StubVae()), build_cache(masked(tmp_path), StubVae())
    assert plain.images == 6 and with_masks.images == 3 and plain.view != with_masks.view
    calls.update(decode_mask=0)
    assert build_cache(masked(tmp_path, flip=True), StubVae()).encoded == 3 and calls["decode_mask"] == 0
    build_cache(masked(tmp_path, crop="random", crops=2), StubVae())
    assert calls["decode_mask"] == 6


def test_an_interrupted_build_continues(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(mask_cells, "_CHUNK", 2)
    for i in range(7):
        write_image(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, i))

    def stop(event):
        if event.phase == "masks" and event.done >= 4:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        build_cache(masked(tmp_path), StubVae(), stop)
    assert calls["decode_mask"] == 4 and prune(tmp_path / "cache").shards == 0
    counts, _ = build(masked(tmp_path))
    assert calls["decode_mask"] == 7 and counts.encoded == 7
    write_image(tmp_path, "8.png", smooth(60, 44, 8), smooth(60, 44, 8))
    with monkeypatch.context() as patch:
        patch.setattr(masks.MasksFile, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with refused("cache-disk-full"):
            build_cache(masked(tmp_path), StubVae())
    with refused("frozen-file-damaged", damage=sentence("damage-outdated")):
        Loader(LatentCache.open(tmp_path / "cache"), str, 0, stage(), data=masked(tmp_path).data)
    assert len(build(masked(tmp_path))[1]) == 8 and calls["decode_mask"] == 8


def test_verify_prune_and_stats_include_masks(tmp_path, calls):
    for i in range(5):
        write_image(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, i) if i < 3 else None)
    config = masked(tmp_path)
    counts, before = build(config)
    directory = tmp_path / "cache"
    frozen = mask_path(directory, counts.view)
    assert verify(directory) == [] and stats(directory).views[counts.view].masked == 3
    flip(frozen, -3)
    damage = sentence("damage-format", format="masks-1", cause=sentence("damage-sha256"))
    with closing(LatentCache.open(directory)) as cache, refused("frozen-file-damaged", path=frozen, damage=damage):
        Masks(cache)
    (problem,) = verify(directory)
    assert problem == sentence("verify-deleted", path=frozen, damage="is damaged") and not frozen.exists()
    with closing(LatentCache.open(directory)) as cache, refused("frozen-file-damaged", damage=sentence("damage-missing")):
        Masks(cache)
    decoded = calls["decode_mask"]
    assert all(torch.equal(cells, before[name]) for name, cells in build(config)[1].items()) and calls["decode_mask"] == decoded
    prune(directory)
    build(config)
    assert frozen.exists() and calls["decode_mask"] == decoded
    smooth(60, 44, 99).save(tmp_path / f"images/1{ENDING}")
    build(config)
    prune(directory)  # deletes the old mask of image 1
    build(config)
    (tmp_path / "cache/views" / frozen.name).unlink()
    prune(directory)
    assert not frozen.exists()
    build(config)
    assert calls["decode_mask"] == decoded + 1 + 3


@pytest.mark.parametrize(
    "keys, code, fields",
    [
        ({"masks": ".png"}, "masks-ending", {"masks": "'.png'"}),
        ({"masks": "PNG"}, "masks-ending", {"masks": "'PNG'"}),
        ({"masks": "-masks.png"}, "cache-no-such-detail", {"key": "masks", "value": "'-masks.png'"}),
        ({"weight_key": "x"}, "cache-no-such-detail", {"key": "weight_key", "value": "'x'"}),
        ({"latents": "npz"}, "masks-and-latents", {"masks": "'-mask.png'", "latents": "'npz'"}),
    ],
)
def test_keys_that_match_nothing_or_contradict_are_errors(tmp_path, keys, code, fields):
    write_image(tmp_path, "a.png", smooth(40, 40), smooth(40, 40))
    with refused(code, **fields):
        build_cache(masked(tmp_path, **keys), StubVae())


def test_views_keep_their_names():
    raw = {"model": {"base": "none"}, "data": {"folders": ["/data"]}, "stage": [{"train": ["unet"], "until": 1}]}
    assert view_name(parse_config(raw, "test"), "vae") == "150e4ce200c953bf"
    raw["data"] |= {"flip": True, "crop": "random", "crops": 3, "caption_key": "long", "buckets": {"min": 256, "max": 1024}}
    assert view_name(parse_config(raw, "test"), "vae") == "97e28dfb1bf8d8d5"
    optional_keys = [{}, {"masks": ENDING}, {"weight_key": ENDING}, {"masks": ENDING, "weight_key": "score"}]
    assert len({view_name(parse_config(raw | {"data": raw["data"] | keys}, "test"), "vae") for keys in optional_keys}) == 4


def test_masks_in_a_batch_follow_the_latents(tmp_path):
    for i, size in enumerate(SIZES * 2):
        write_image(tmp_path, f"{i}.png", smooth(*size, seed=i), smooth(*size, seed=i) if i else None)
    config = masked(tmp_path, crop="random", crops=3, flip=True, buckets=BUCKETS)
    build_cache(config, StubVae())
    with closing(LatentCache.open(config.cache.dir)) as cache:
        versions = set()
        for batch in loader(config, cache).stream(0, 120, 4):
            assert batch.weight_B is None and batch.mask_B1HW.dtype == torch.uint8
            assert batch.mask_B1HW.shape == (4, 1, *batch.latents_BCHW.shape[-2:])
            expected = (batch.latents_BCHW[:, :1] / GREY + 1) * 127.5
            for caption, mask, expected_cells in zip(batch.captions, batch.mask_B1HW, expected, strict=True):
                versions.add((caption, tuple(expected_cells.flatten().tolist())))
                assert (mask == 255).all() if caption == "0" else (mask - expected_cells).abs().max() < 8
        assert len(versions) > 30
        again = loader(config, cache).batch(8, 4)
        assert torch.equal(again.mask_B1HW, loader(config, cache).batch(8, 4).mask_B1HW)
        assert loader(config, cache)._masks is loader(config, cache)._masks  # a run maps the file only once


def test_a_run_is_told_about_changed_masks(tmp_path):
    def warnings(config):
        build_cache(config, StubVae())
        with closing(LatentCache.open(config.cache.dir)) as cache:
            return compare_images(tmp_path / "images.json", cache, config, resumed=(tmp_path / "images.json").exists())

    write_image(tmp_path, "0.png", smooth(60, 44), smooth(60, 44, 1))
    assert warnings(masked(tmp_path)) == [] == warnings(masked(tmp_path))
    smooth(60, 44, 2).save(tmp_path / f"images/0{ENDING}")
    (text,) = warnings(masked(tmp_path))
    assert says(text, "cache-content-changed", contents="masks") and warnings(masked(tmp_path)) == []


def test_a_view_whose_masks_are_all_rejected_has_no_cells(tmp_path):
    write_image(tmp_path, "0.png", smooth(60, 44))
    write_image(tmp_path, "1.png", smooth(60, 44, 1), smooth(44, 60))
    counts, masks_of = build(masked(tmp_path))
    file = masks.MasksFile(mask_path(tmp_path / "cache", counts.view))
    assert counts.rejected == 1 and len(file.arrays["cells"]) == 0 and file.arrays["offsets"].tolist() == [0, 0]
    assert (masks_of["0"] == 255).all()
