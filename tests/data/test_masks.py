"""Masks, from files to the batch: each cell of a mask is what that cell of the latent shows. Read next: `test_weights.py`."""

import io
import os
import tarfile
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from caching import BUCKETS, StubVae, flip, with_data
from masked import ENDING, loader, stage
from PIL import Image

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
from fastsd.errors import UserError

GREY = StubVae().encode(torch.ones(1, 3, 8, 8))[0, 0]  # what a white pixel comes to in channel 0


@pytest.fixture(autouse=True)
def old_files(monkeypatch):
    """Files are taken as settled at once."""
    monkeypatch.setattr("fastsd.data.building.collect._YOUNG_NS", 0)


@pytest.fixture
def work(monkeypatch):
    """Counts what is decoded and read."""
    done = {"decode_mask": 0, "read_bytes": 0}

    def counting(name, function, *arguments):
        done[name] += 1
        return function(*arguments)

    monkeypatch.setattr(mask_cells, "decode_mask", partial(counting, "decode_mask", mask_cells.decode_mask))
    monkeypatch.setattr(folders, "read_bytes", partial(counting, "read_bytes", folders.read_bytes))
    return done


def smooth(width, height, seed=0):
    """Grey, and so smooth that one way to resize it is as good as another."""
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 4), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def put(root, name, image, mask=None, ending=ENDING, **options):
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(path, **options)
    path.with_suffix(".txt").write_text(path.stem)
    if mask is not None:
        mask.save(path.with_name(path.stem + ending))
    return path


def masked(root, **keys):
    made = with_data(root, **{"masks": ENDING} | keys)
    return made.model_copy(update={"cache": made.cache.model_copy(update={"dtype": "fp32"})})


def build(made, vae=None):
    """(counts, samples' masks by caption: uint8 (h, w) of every version)."""
    counts = build_cache(made, vae or StubVae())
    found = {}
    with closing(LatentCache.open(made.cache.dir, counts.view)) as cache:
        for i, caption in enumerate(cache.captions(range(len(cache)))):
            shape = cache.get([i])["latents"].shape[-2:]
            versions = [Masks(cache).get([i], [v], shape)[0, 0] for v in range(cache.versions)]
            found[caption] = torch.stack(versions)
    return counts, found


SIZES = [(80, 40), (37, 53), (101, 67), (41, 41), (33, 200)]


@pytest.mark.parametrize("keys", [
    {}, {"flip": True}, {"buckets": BUCKETS}, {"crop": "random", "crops": 3, "flip": True},
    {"crop": "random", "crops": 2, "flip": True, "buckets": BUCKETS},
    {"buckets": BUCKETS | {"no_upscale": True}},
], ids=str)  # fmt: skip
def test_a_mask_lies_on_its_image(tmp_path, keys):
    """Image and mask are the same grey picture; so each cell of the mask is what the latent's cell shows."""
    for i, size in enumerate(SIZES):
        grey = smooth(*size, seed=i)
        put(tmp_path, f"{i}.png", grey, grey)
        put(tmp_path, f"{i}-small.png", grey, grey.resize((-(-size[0] // 2), -(-size[1] // 2)), Image.Resampling.BOX))
        for orientation in (3, 6, 7):
            exif = Image.Exif()
            exif[0x0112] = orientation
            turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE}[orientation]
            put(tmp_path, f"{i}-turned{orientation}.png", grey.transpose(turned), grey, exif=exif)
    made = masked(tmp_path, **keys)
    counts, found = build(made)
    assert counts.cached == len(found) == 5 * len(SIZES)
    with closing(LatentCache.open(made.cache.dir)) as cache:
        differ = []
        for i, caption in enumerate(cache.captions(range(len(cache)))):
            for version in range(cache.versions):
                shown = (cache.get([i], [version])["latents"][0, 0] / GREY + 1) * 127.5
                cells = found[caption][version]
                assert cells.dtype == torch.uint8 and cells.shape == shown.shape
                assert (cells - shown).abs().max() < (16 if "small" in caption else 8), caption
                differ.append((cells.flip(1) - shown).abs().max().item())
        assert np.median(differ) > 32  # a mirrored one would have been noticed


def as_bytes(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def test_what_a_cell_is_worth():
    place = Buckets(16, None).place(16, 16)
    levels = np.repeat(np.repeat(np.array([[0, 255], [100, 7]], np.uint8), 8, 0), 8, 1)
    levels[8:, 8:][::2] = 8  # 7.5 on average
    wanted = [[0, 255], [100, 8]]
    grey = Image.fromarray(levels)
    alpha = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    colours = grey.convert("RGB")
    with_alpha = Image.merge("RGBA", (*colours.split(), alpha))
    clear = io.BytesIO()
    grey.save(clear, "PNG", transparency=0)
    kinds = {
        "grey": as_bytes(grey), "rgb": as_bytes(colours), "rgba": as_bytes(with_alpha),
        "la": as_bytes(with_alpha.convert("LA")), "16 bit": as_bytes(Image.fromarray(levels.astype(np.uint16) * 257)),
        "palette": as_bytes(grey.convert("P")), "tRNS": clear.getvalue(), "bmp": as_bytes(grey, "BMP"),
    }  # fmt: skip
    for kind, data in kinds.items():
        assert decode_mask(data, place, (0.5, 0.5), 8).tolist() == wanted, kind
    halves = Image.fromarray(np.arange(256).reshape(16, 16) % 16 < 11).convert("1")
    assert decode_mask(as_bytes(halves), place, (0.5, 0.5), 8).tolist() == [[255, 96]] * 2  # 3 of 8 columns
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    assert decode_mask(as_bytes(red), place, (0.5, 0.5), 16).tolist() == [[76]]  # luminance


def test_an_image_without_a_mask_counts_in_full(tmp_path):
    put(tmp_path, "a.png", smooth(40, 40), Image.new("L", (40, 40)))
    put(tmp_path, "b.png", smooth(40, 40, 1))
    put(tmp_path, "A.png", smooth(40, 40, 2))  # another name
    counts, found = build(masked(tmp_path))
    assert counts.images == counts.cached == 3
    assert not found["a"].any() and (found["b"] == 255).all() and (found["A"] == 255).all()


@pytest.mark.parametrize("ending", ["-mask.png", ".mask.png", "-masklabel.png", "_M.PNG"])
def test_files_that_end_so_are_no_images(tmp_path, ending):
    grey = smooth(40, 40)
    for name in ("a.png", "a-1.png", "d/b.jpg"):
        put(tmp_path, name, grey, grey, ending)
    put(tmp_path, "c.PNG", smooth(40, 40, 1), grey, ending.upper())
    made = masked(tmp_path, masks=ending)
    counts, found = build(made)
    assert counts.images == counts.cached == 4 and not any((cells == 255).all() for cells in found.values())
    assert folders.count(made.data) == (4, 4)


def write_tar(root, order):
    """The images of `root` in a tar, their files in an order."""
    with tarfile.open(root / "set.tar", "w") as tar:
        for path in order(path for path in (root / "images").rglob("*.*")):
            tar.add(path, path.relative_to(root / "images"))
    return {"folders": [str(root / "set.tar")]}


@pytest.mark.parametrize("order", [sorted, lambda paths: sorted(paths, key=lambda p: (p.name.endswith(ENDING), p))])
def test_masks_in_tars(tmp_path, order):
    names = ["a", "a-1", "a-n", "d/b", "c"]  # sorted by name, a-n comes between a's mask and a
    for i, name in enumerate(names):
        put(tmp_path, f"{name}.png", smooth(60, 44, i), smooth(60, 44, i) if name != "c" else None)
    _, beside = build(masked(tmp_path))
    counts, found = build(masked(tmp_path, **write_tar(tmp_path, order)))
    assert counts.images == counts.cached == 5 and counts.encoded == 0
    assert found.keys() == beside.keys() and all(torch.equal(found[name], beside[name]) for name in found)
    assert (found["c"] == 255).all()


BROKEN = {
    "empty": (lambda path: path.write_bytes(b""), "its mask: the file is empty"),
    "no image": (lambda path: path.write_bytes(b"x" * 99), "its mask: the content is no JPEG"),
    "cut": (lambda path: os.truncate(path, 200), "its mask: it "),
    "other": (lambda path: smooth(40, 60).save(path), "its mask: it has 40 x 60 pixels and the image as displayed 60 x 44"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "its mask: it is no regular file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_mask_of_no_use_rejects_its_image_until_it_is_mended(tmp_path, kind, work):
    for i in range(4):
        put(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, i + 9))
    bad = tmp_path / "images" / f"2{ENDING}"
    good = bad.read_bytes()
    breaks, reason = BROKEN[kind]
    breaks(bad)
    for _ in range(2):
        counts, found = build(masked(tmp_path))
        assert set(found) == {"0", "1", "3"} and counts.rejected == 1
        assert f"2.png: {reason}" in counts.examples[0] and "\n" not in counts.examples[0]
    bad.unlink()
    bad.write_bytes(good)
    os.utime(bad, (1e9, 1e9))
    counts, found = build(masked(tmp_path))
    assert counts.rejected == 0 and counts.encoded == 1 and len(found) == 4


def test_a_mask_without_an_image_is_named(tmp_path):
    put(tmp_path, "a.png", smooth(40, 40), smooth(40, 40))
    for name in ("b", "d/a"):
        path = tmp_path / f"images/{name}{ENDING}"
        path.parent.mkdir(exist_ok=True)
        smooth(9, 9).save(path)
    for keys in ({}, write_tar(tmp_path, sorted)):
        counts, found = build(masked(tmp_path, **keys))
        assert set(found) == {"a"} and set(counts.reasons) == {
            "it counts as a mask (data.masks), and there is no image of that name beside it"
        }
        assert counts.rejected == 2 and all(ENDING in example for example in counts.examples)


def test_a_damaged_member_of_a_tar_costs_its_sample(tmp_path):
    put(tmp_path, "a.png", smooth(40, 40), smooth(40, 40))
    put(tmp_path, "b.png", smooth(40, 40, 1), smooth(40, 40))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt", f"b{ENDING}", f"b{ENDING}"):
            tar.add(tmp_path / "images" / name, name)
        link = tarfile.TarInfo(f"a{ENDING}")
        link.type, link.linkname = tarfile.SYMTYPE, f"b{ENDING}"
        tar.addfile(link)
        tar.add(tmp_path / "images/a.png", "c.png")
    counts, found = build(masked(tmp_path, folders=[str(tmp_path / "set.tar")]))
    assert set(found) == {""} and counts.reasons == {
        "its mask: it is a symbolic link": 1, "its mask: the tar holds it more than once": 1,
    }  # fmt: skip


def test_only_what_changed_is_made_again(tmp_path, work):
    for i in range(6):
        put(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, 9 + i) if i else None)
    made = masked(tmp_path)
    counts, before = build(made)
    assert counts.encoded == 6 and work["decode_mask"] == 5
    frozen = mask_path(tmp_path / "cache", counts.view)
    stamp = frozen.stat().st_mtime_ns
    work.update(decode_mask=0, read_bytes=0)
    counts, _ = build(made)
    assert counts.encoded == 0 and work == {"decode_mask": 0, "read_bytes": 0} and frozen.stat().st_mtime_ns == stamp
    smooth(60, 44, 99).save(tmp_path / f"images/3{ENDING}")  # edited
    smooth(60, 44, 98).save(tmp_path / f"images/0{ENDING}")  # new
    (tmp_path / f"images/5{ENDING}").unlink()
    (tmp_path / "images/1.txt").write_text("caption")
    (tmp_path / "images/2.png").rename(tmp_path / "images/2b.png")
    (tmp_path / f"images/2{ENDING}").rename(tmp_path / f"images/2b{ENDING}")
    (tmp_path / "images/2.txt").rename(tmp_path / "images/2b.txt")
    counts, after = build(made)
    assert counts.encoded == 0 and work["decode_mask"] == 2
    assert torch.equal(after["caption"], before["1"]) and torch.equal(after["2"], before["2"])
    assert torch.equal(after["4"], before["4"]) and (after["5"] == 255).all()
    assert not torch.equal(after["3"], before["3"]) and not (after["0"] == 255).all()
    put(tmp_path, "4.png", smooth(60, 44, 77))  # an edited image keeps its mask, and its crop is where it was
    counts, last = build(made)
    assert counts.encoded == 1 and work["decode_mask"] == 2 and torch.equal(last["4"], after["4"])


def test_other_settings_share_what_they_can(tmp_path, work):
    for i in range(3):
        put(tmp_path, f"{i}.png", smooth(90, 44, i), smooth(90, 44, i))
    plain, with_masks = build_cache(with_data(tmp_path, exclude=[ENDING]), StubVae()), build_cache(masked(tmp_path), StubVae())
    assert plain.images == 6 and with_masks.images == 3 and plain.view != with_masks.view
    work.update(decode_mask=0)
    assert build_cache(masked(tmp_path, flip=True), StubVae()).encoded == 3 and work["decode_mask"] == 0
    build_cache(masked(tmp_path, crop="random", crops=2), StubVae())
    assert work["decode_mask"] == 6


def test_an_interrupted_run_goes_on(tmp_path, work, monkeypatch):
    monkeypatch.setattr(mask_cells, "_CHUNK", 2)
    for i in range(7):
        put(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, i))

    def stop(event):
        if event.phase == "masks" and event.done >= 4:
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError):
        build_cache(masked(tmp_path), StubVae(), stop)
    assert work["decode_mask"] == 4 and prune(tmp_path / "cache").shards == 0
    counts, _ = build(masked(tmp_path))
    assert work["decode_mask"] == 7 and counts.encoded == 7
    put(tmp_path, "8.png", smooth(60, 44, 8), smooth(60, 44, 8))
    frozen = masks.MasksFile.write
    monkeypatch.setattr(masks.MasksFile, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="the disk is full"):
        build_cache(masked(tmp_path), StubVae())
    with pytest.raises(UserError, match="belongs to images as they were before; run `fastsd cache CONFIG` again"):
        Loader(LatentCache.open(tmp_path / "cache"), str, 0, stage(), data=masked(tmp_path).data)
    monkeypatch.setattr(masks.MasksFile, "write", frozen)
    assert len(build(masked(tmp_path))[1]) == 8 and work["decode_mask"] == 8


def test_verify_prune_and_stats_know_masks(tmp_path, work):
    for i in range(5):
        put(tmp_path, f"{i}.png", smooth(60, 44, i), smooth(60, 44, i) if i < 3 else None)
    made = masked(tmp_path)
    counts, before = build(made)
    directory = tmp_path / "cache"
    frozen = mask_path(directory, counts.view)
    assert verify(directory) == [] and stats(directory).views[counts.view].masked == 3
    flip(frozen, -3)
    with closing(LatentCache.open(directory)) as cache, pytest.raises(UserError, match="does not match its sha256"):
        Masks(cache)
    (problem,) = verify(directory)
    assert str(frozen) in problem and "`fastsd cache CONFIG` makes it again" in problem and not frozen.exists()
    with closing(LatentCache.open(directory)) as cache, pytest.raises(UserError, match="is missing; run `fastsd cache CONFIG`"):
        Masks(cache)
    decoded = work["decode_mask"]
    assert all(torch.equal(cells, before[name]) for name, cells in build(made)[1].items()) and work["decode_mask"] == decoded
    prune(directory)
    build(made)
    assert frozen.exists() and work["decode_mask"] == decoded
    smooth(60, 44, 99).save(tmp_path / f"images/1{ENDING}")
    build(made)
    prune(directory)  # the old one of image 1
    build(made)
    (tmp_path / "cache/views" / frozen.name).unlink()
    prune(directory)
    assert not frozen.exists()
    build(made)
    assert work["decode_mask"] == decoded + 1 + 3


@pytest.mark.parametrize("keys, said", [
    ({"masks": ".png"}, "data.masks is '.png', and so end images, too; write what only masks end in, such as \"-mask.png\""),
    ({"masks": "PNG"}, "data.masks is 'PNG', and so end images, too; write what only masks end in, such as \"-mask.png\""),
    ({"masks": "-masks.png"}, "data.masks is '-masks.png' and no image has such a file beside it; correct or remove it"),
    ({"weight_key": "x"}, "data.weight_key is 'x' and no image has such a number in its metadata; correct or remove it"),
    ({"latents": "npz"}, "data.masks is '-mask.png' and data.latents 'npz', cut by rules unknown here; remove one of them"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence(tmp_path, keys, said):
    put(tmp_path, "a.png", smooth(40, 40), smooth(40, 40))
    with pytest.raises(UserError) as error:
        build_cache(masked(tmp_path, **keys), StubVae())
    assert str(error.value) == said


def test_views_keep_their_names():
    raw = {"model": {"base": "none"}, "data": {"folders": ["/data"]}, "stage": [{"train": ["unet"], "until": 1}]}
    assert view_name(parse_config(raw, "test"), "vae") == "150e4ce200c953bf"
    raw["data"] |= {"flip": True, "crop": "random", "crops": 3, "caption_key": "long", "buckets": {"min": 256, "max": 1024}}
    assert view_name(parse_config(raw, "test"), "vae") == "97e28dfb1bf8d8d5"
    more = [{}, {"masks": ENDING}, {"weight_key": ENDING}, {"masks": ENDING, "weight_key": "score"}]
    assert len({view_name(parse_config(raw | {"data": raw["data"] | keys}, "test"), "vae") for keys in more}) == 4


def test_masks_in_a_batch_follow_the_latents(tmp_path):
    for i, size in enumerate(SIZES * 2):
        put(tmp_path, f"{i}.png", smooth(*size, seed=i), smooth(*size, seed=i) if i else None)
    made = masked(tmp_path, crop="random", crops=3, flip=True, buckets=BUCKETS)
    build_cache(made, StubVae())
    with closing(LatentCache.open(made.cache.dir)) as cache:
        seen = set()
        for batch in loader(made, cache).stream(0, 120, 4):
            assert batch.weight_B is None and batch.mask_B1HW.dtype == torch.uint8
            assert batch.mask_B1HW.shape == (4, 1, *batch.latents_BCHW.shape[-2:])
            shown = (batch.latents_BCHW[:, :1] / GREY + 1) * 127.5
            for caption, mask, own in zip(batch.captions, batch.mask_B1HW, shown, strict=True):
                seen.add((caption, tuple(own.flatten().tolist())))
                assert (mask == 255).all() if caption == "0" else (mask - own).abs().max() < 8
        assert len(seen) > 30
        again = loader(made, cache).batch(8, 4)
        assert torch.equal(again.mask_B1HW, loader(made, cache).batch(8, 4).mask_B1HW)
        assert loader(made, cache)._masks is loader(made, cache)._masks  # mapped once a run
