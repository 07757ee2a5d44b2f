"""What lies in people's folders: every bad file is named with a reason, and the good ones beside it are cached as they are."""

import errno
import io
import json
import os
import struct
import tarfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset import DataSet, picture, png, saved, shot, tar_of
from PIL import Image, ImageChops, ImageCms
from tar_bytes import END, raw

from fastsd.data.cache import LatentCache

TOO_MANY = "more than 178956970"
NO_IMAGE = "the content is no JPEG, PNG, WebP, BMP or GIF image"


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    return DataSet(tmp_path, tiny_model, monkeypatch, capsys)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_by_hand(width: int, height: int, bits: int, colour: int, lines: bytes, *chunks: bytes) -> bytes:
    """`colour`: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA. `lines`: compressed."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def deep_png(samples_HWC: np.ndarray, colour: int, *chunks: bytes) -> bytes:
    """16 bits a sample, which Pillow cannot write in colour."""
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples_HWC)
    return png_by_hand(samples_HWC.shape[1], samples_HWC.shape[0], 16, colour, zlib.compress(lines), *chunks)


def giant_png(side: int) -> bytes:
    """Black, 1 bit a pixel: 48 KB for 20000 x 20000."""
    zip = zlib.compressobj(9)
    lines = b"".join(zip.compress(bytes(1 + side // 8)) for _ in range(side))
    return png_by_hand(side, side, 1, 0, lines + zip.flush())


def behind_head(file: bytes, added: bytes) -> bytes:
    """A PNG with a chunk more."""
    return file[:33] + added + file[33:]


def bad_images() -> dict[str, tuple[bytes, str]]:
    """By name: an image file that cannot be used, and what is said of it."""
    jpeg = saved(picture(50, 200, 150), "JPEG", quality=95)
    scan, size = jpeg.index(b"\xff\xda"), jpeg.index(b"\xff\xc0") + 5
    progressive = saved(picture(50, 200, 150), "JPEG", quality=95, progressive=True)
    clean, bmp = png(picture(51)), saved(picture(52), "BMP")
    head, data = clean.index(b"IHDR"), clean.index(b"IDAT")
    bomb = zlib.compress(bytes(64 << 20), 9)
    return {
        "cut-mark.jpg": (jpeg[:2], NO_IMAGE),
        "cut-head.jpg": (jpeg[:20], NO_IMAGE),
        "cut-tables.jpg": (jpeg[:400], "it ends early"),
        "cut-scan.jpg": (jpeg[: (scan + len(jpeg)) // 2], "it ends early"),
        "cut-end.jpg": (jpeg[:-2], "it ends early"),
        "cut-progressive.jpg": (progressive[: 2 * len(progressive) // 3], "it ends early"),
        "huge.jpg": (jpeg[:size] + struct.pack(">HH", 65500, 65500) + jpeg[size + 4 :], TOO_MANY),
        "empty.jpg": (b"", "the file is empty"),
        "zeros.jpg": (bytes(5000), NO_IMAGE),
        "text.jpg": (b"these are not the bytes of an image\n" * 30, NO_IMAGE),
        "page.png": (b"<!DOCTYPE html><html><title>404</title></html>", NO_IMAGE),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', NO_IMAGE),
        "tiff.jpg": (saved(picture(53), "TIFF"), NO_IMAGE),
        "avif.jpg": (b"\0\0\0\x20ftypavif" + bytes(500), NO_IMAGE),
        "giant.png": (giant_png(20000), TOO_MANY),
        "sum-head.png": (clean[: head + 17] + b"abcd" + clean[head + 21 :], NO_IMAGE),
        "sum-pixels.png": (clean[:-20] + bytes(4) + clean[-16:], "bad header checksum"),
        "bits.png": (clean[: data + 40] + bytes(9) + clean[data + 49 :], "it cannot be decoded"),
        "cut.png": (clean[: len(clean) // 2], "it ends early"),
        "no-end.png": (clean[:-12], "it ends early"),
        "bomb-text.png": (behind_head(clean, chunk(b"zTXt", b"k\0\0" + bomb)), "Decompressed data too large"),
        "bomb-profile.png": (behind_head(clean, chunk(b"iCCP", b"k\0\0" + bomb)), "Decompressed data too large"),
        "bomb-pixels.png": (png_by_hand(13000, 13000, 8, 2, zlib.compress(bytes(1 << 20), 9)), "it ends early"),
        "cut.webp": (saved(picture(54, 300, 300), "WEBP")[:200], "it cannot be decoded"),
        "cut.bmp": (bmp[:500], "it ends early"),
        "huge.bmp": (bmp[:18] + struct.pack("<ii", 60000, 60000) + bmp[26:], TOO_MANY),
        "cut-head-gif.png": (saved(picture(55).convert("P"), "GIF")[:300], NO_IMAGE),
        "cut-gif.png": (saved(picture(55).convert("P"), "GIF")[:-200], "it ends early"),
    }


def test_bad_images_are_put_aside_and_named(folder):
    bad = bad_images()
    assert len(bad["giant.png"][0]) < 50_000
    for name, (data, _) in bad.items():
        folder.put(name, data)
    odd = ("a\nb.png", "🐈.png", b"caf\xe9.png", "-rf.png", "n" * 251 + ".png", "%s{0}[b].png")
    folder.put_good("good.png", *odd)
    folder.put("trailing.png", png(picture(60)) + b"rubbish")
    (folder / "folder.jpg").mkdir()
    folder.put("folder.jpg/inside.png", png(picture(61)))
    good = {"good", "a", "b", "🐈", "caf?", "-rf", "%s{0}[b]", "trailing", "inside", ""}
    folder.check(good, {name: reason for name, (_, reason) in bad.items()})
    assert "avif.jpg: the content is no JPEG" in folder.said
    assert "9 of 37 images cached" in folder.said and "9 at 32 px" in folder.run("train")


def test_what_is_no_file_or_cannot_be_read(folder, monkeypatch):
    folder.put_good("good.png", "locked.png", "unseen.png", "locked-caption.png")
    for name in ("loop", "dangling", "pipe"):
        (folder / f"{name}.txt").write_text(name)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("/no/such/image.png")
    os.mkfifo(folder / "pipe.png")
    folder.put("vast.png", png(picture(8)))
    os.truncate(folder / "vast.png", 2 << 30)
    (folder / "shut").mkdir()
    folder.put("shut/in.png", png(picture(9)))
    (folder / "around").symlink_to(folder.path, target_is_directory=True)
    forbid(monkeypatch, {"locked.png": "open", "locked-caption.txt": "open", "unseen.png": "stat", "shut": "scandir"})
    folder.check({"good"}, {
        "loop.png": "it cannot be read (Too many levels of symbolic links)",
        "dangling.png": "it cannot be read (No such file or directory)",
        "pipe.png": "it is no regular file",
        "vast.png": "it is larger than 1 GiB",
        "locked.png": "it cannot be read (Permission denied)",
        "unseen.png": "it cannot be read (Permission denied)",
        "locked-caption.png": "its caption cannot be read (Permission denied)",
        "shut": "this folder cannot be searched (Permission denied)",
    })  # fmt: skip
    monkeypatch.undo()


def forbid(monkeypatch, names: dict[str, str]) -> None:
    """Take away a right by file name, as root's own cannot be."""
    for module, call in (("builtins", "open"), ("os", "stat"), ("os", "scandir")):
        real = getattr(__import__(module), call)

        def refuse(path, *rest, real=real, call=call, **options):
            if isinstance(path, str | Path) and names.get(os.path.basename(path)) == call:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real(path, *rest, **options)

        monkeypatch.setattr(f"{module}.{call}", refuse)


def unusual_images() -> dict[str, tuple[bytes, Image.Image, str]]:
    """By name: an image file of an unusual kind, the picture it shows, and why its pixels may differ ("" = they may not)."""
    shown, grey = picture(70), picture(70).convert("L")
    levels, alpha = np.asarray(shown), np.asarray(picture(71).convert("L"))
    few, dots = shown.quantize(200), shown.convert("1")
    on_white = Image.fromarray((255 - (255.0 - levels) * alpha[..., None] / 255).round().astype(np.uint8))
    grey_on_white = Image.fromarray((255 - (255.0 - np.asarray(grey)) * alpha / 255).round().astype(np.uint8))
    first = few.getpixel((0, 0))
    without_first = Image.fromarray(np.where((np.asarray(few) == first)[..., None], 255, np.asarray(few.convert("RGB"))))
    deep = np.dstack([levels, alpha]).astype(np.uint16) * 256 + 200  # a low byte that must not matter
    red = levels[..., 0]
    without_red = Image.fromarray(np.where(red == red[0, 0], 255, red))
    best = {"quality": 100, "subsampling": 0}
    none = Image.new("L", grey.size)
    inks = Image.merge("CMYK", [*ImageChops.invert(shown).split(), none])
    luma = Image.merge("CMYK", [*ImageChops.invert(ImageChops.invert(shown).convert("YCbCr")).split(), none])
    adobe, plain, ycck = (bytearray(saved(image, "JPEG", **best)) for image in (inks, ImageChops.invert(inks), luma))
    mark = adobe.index(b"\xff\xee")  # Adobe's; Pillow stores inverted inks, as Adobe does
    ycck[mark + 15] = 2  # of its colours
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    more = {"save_all": True, "append_images": [picture(72)], "duration": 100}
    turn = Image.Exif()
    turn[0x0112] = 6
    lossy, rounded = "JPEG rounds", "blending rounds"
    return {
        "cmyk.jpg": (bytes(adobe), shown, lossy),
        "cmyk-unmarked.jpg": (bytes(plain[:mark] + plain[mark + 16 :]), shown, lossy),
        "cmyk-as-ycck.jpg": (bytes(ycck), shown, lossy),
        "cmyk-with-srgb.jpg": (saved(Image.open(io.BytesIO(adobe)), "JPEG", icc_profile=srgb, **best), shown, lossy),
        "grey16.png": (deep_png(deep[..., :1], 0), Image.fromarray(red), ""),
        "grey16-clear.png": (
            deep_png(deep[..., :1], 0, chunk(b"tRNS", struct.pack(">H", deep[0, 0, 0]))),
            without_red,
            "",
        ),
        "rgb16.png": (deep_png(deep[..., :3], 2), shown, ""),
        "rgba16.png": (deep_png(deep, 6), on_white, rounded),
        "palette.png": (png(few), few, ""),
        "palette-clear.png": (png(few, transparency=first), without_first, ""),
        "rgba.png": (png(Image.fromarray(np.dstack([levels, alpha]))), on_white, rounded),
        "la.png": (png(Image.merge("LA", [grey, Image.fromarray(alpha)])), grey_on_white, rounded),
        "bilevel.png": (png(dots), dots, ""),
        "animated.gif.png": (saved(few, "GIF", **more), few, ""),
        "animated-webp.jpg": (saved(shown, "WEBP", lossless=True, **more), shown, ""),
        "animated.png": (png(shown, **more), shown, ""),
        "turned.png": (png(shown.transpose(Image.Transpose.ROTATE_90), exif=turn), shown, ""),
        "broken-exif.png": (png(shown, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), shown, ""),
        "broken-exif-in.jpg": (saved(shown, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff", **best), shown, lossy),
        "swapped-icc.png": (png(shown, icc_profile=swapped), Image.merge("RGB", shown.split()[::-1]), "ICC rounds"),
        "broken-icc.png": (png(shown, icc_profile=b"no profile at all"), shown, ""),
        "cut-icc.png": (png(shown, icc_profile=srgb[:300]), shown, ""),
        "lab-icc.png": (png(shown, icc_profile=lab), shown, ""),
        "grey-with-srgb.png": (png(grey, icc_profile=srgb), grey, ""),
    }


def test_unusual_images_come_out_in_their_colours(folder):
    images = unusual_images()
    for name, (data, shown, _) in images.items():
        folder.put(name, data)
        folder.put(f"{name}.clean.png", png(shown.convert("RGB")))
    folder.put("other.png", png(picture(73)))
    folder.check({Path(name).stem for name in images} | {f"{name}.clean" for name in images} | {"other"}, {})
    with closing(LatentCache.open(folder.cache)) as latents:
        places = {name: i for i, name in enumerate(latents.captions(range(len(latents))))}
        found = {name: latents.get([i])["latents"][0].float() for name, i in places.items()}
    for name, (_, _, may_differ) in images.items():
        clean = found[f"{name}.clean"]
        # Against the distance to another picture. Rounding is a level or two of the 60 by which pixels differ there;
        # whatever is handled wrongly (inverted, unscaled, on black) is half of it and more.
        error = float((found[Path(name).stem] - clean).norm() / (found["other"] - clean).norm())
        print(f"{name}: {error:.4f}")
        assert error <= (0.04 if may_differ else 0), name


def test_extreme_shapes(folder):
    for name, size in {"dot": (1, 1), "tall": (1, 20_000), "wide": (20_000, 1), "good": (40, 36)}.items():
        folder.put(f"{name}.png", png(picture(80, *size)))
    folder.check({"dot", "tall", "wide", "good"}, {})
    assert folder.cached("data.buckets={min=16, max=64, step=8}") == {"dot", "tall", "wide", "good"}
    assert folder.cached("data.buckets={min=16, max=64, step=8, no_upscale=true}") == {"good"}
    narrow = "pixels give no bucket of 8 px a side without enlarging"
    sizes = {"dot.png": "1 x 1", "tall.png": "1 x 20000", "wide.png": "20000 x 1"}
    assert folder.rejected() == {name: f"{size} {narrow}" for name, size in sizes.items()}


def test_bad_captions_put_their_images_aside(folder):
    largest = b"a" + b" " * ((1 << 20) - 2) + b"z"
    captions = {
        "larger": (largest + b".", "its caption is larger than 1 MiB"),
        "nul": (b"a\0b", "its caption holds NUL"),
        "latin": (b"caf\xe9", "its caption is not UTF-8"),
        "utf-16": ("café".encode("utf-16"), "its caption is not UTF-8"),
        "folder": (None, ""),
        "pipe": (None, "its caption is no regular file"),
        "loop": (None, "its caption cannot be read (Too many levels"),
        "largest": (largest, ""),
        "words": (b"word " * 10_000, ""),
        "lines": ("one\r\n\n \u2028two \x85".encode(), ""),
        "mark": (b"\xef\xbb\xbfmarked", ""),
        "blank": (b" \n\t\r\n", ""),
    }
    for seed, (name, (caption, _)) in enumerate(captions.items()):
        folder.put(f"{name}.png", png(picture(seed)), caption or b"")
        if caption is None:
            (folder / f"{name}.txt").unlink()
    (folder / "folder.txt").mkdir()
    os.mkfifo(folder / "pipe.txt")
    (folder / "loop.txt").symlink_to("loop.txt")
    good = {largest.decode(), ("word " * 10_000).strip(), "one", "two", "marked", ""}
    folder.check(good, {f"{name}.png": reason for name, (_, reason) in captions.items() if reason})
    assert "2 images have no caption" in folder.said  # the folder and the blank one
    assert "1 captions are longer than 77 tokens and will be truncated" in folder.run("cache", "--stats")
    folder.run("train")


def test_bad_tars(folder):
    first, second = shot("first", 1), shot("second", 2)
    link = {"linkname": "/etc/passwd", "size": 0}
    whole = tar_of(*first, *second)
    end = 512 + -(-len(first[0][1]) // 512) * 512 + 1024
    tars = {
        "good.tar": (tar_of(*shot("in tar", 3)), {}),
        "escape.tar": (tar_of(*shot("../up", 4)), {"/../up.png": "leads out of the tar", "/../up.txt": ""}),
        "root.tar": (tar_of(*shot("/etc/up", 5)), {"//etc/up.png": "leads out of the tar", "//etc/up.txt": ""}),
        "symlink.tar": (tar_of(*shot("s", 6, type=tarfile.SYMTYPE, **link)), {"/s.png": "it is a symbolic link"}),
        "hardlink.tar": (tar_of(*shot("h", 7, type=tarfile.LNKTYPE, **link)), {"/h.png": "it is a hard link"}),
        "bomb.tar": (raw("b.png", 1 << 60) + END, {"": "it is cut off at byte"}),
        "long.tar": (raw("@", 1 << 40, b"L") + END, {"": "it is cut off at byte"}),
        "within.tar": (whole[: end + 600], {"": "it is cut off at byte"}),
        "between.tar": (whole[:end], {"": "it ends at byte"}),
        "twice.tar": (tar_of(*first[:1], *shot("first", 8), *second), {"/first.png (at byte": "more than once"}),
        "again.tar": (tar_of(*shot("a", 9), *shot("z", 10), *shot("a", 11)), {"/a.png (at byte": "was there before"}),
        "packed.tar.gz": (b"\x1f\x8b" + bytes(600), {"": "it is compressed"}),
        "packed.tar": (b"\x1f\x8b" + bytes(600), {"": "it is compressed"}),
        "empty.tar": (b"", {"": "the file is empty"}),
        "page.tar": (b"<!DOCTYPE html>" * 100, {"": "it is no tar"}),
        "inside.tar": (tar_of(("i.png", b"no image", {}), ("i.txt", b"i", {})), {"/i.png": NO_IMAGE}),
    }
    for name, (data, _) in tars.items():
        (folder / name).write_bytes(data)
    bad = {name + at: reason for name, (_, problems) in tars.items() for at, reason in problems.items()}
    assert folder.cached() == {"in tar", "first", "second", "a", "z"}
    found = folder.rejected()
    for name, reason in bad.items():
        assert any(at.startswith(name) and reason in why for at, why in found.items()), (name, found)
    assert all(any(at.startswith(name) for name in bad) for at in found)
    assert folder.cached() == {"in tar", "first", "second", "a", "z"} and "0 encoded now" in folder.said


def test_bad_metadata(folder):
    for part in ("lines", "wrong", "cut", "lost"):
        (folder / part).mkdir()
        for i in range(3):
            folder.put(f"{part}/{i}.png", png(picture(i)))
            (folder / f"{part}/{i}.txt").unlink()
    lines = [
        {"file_name": "0.png", "text": "said"}, "{broken", [1], {"text": "of nothing"}, {"file_name": "9.png", "text": "gone"},
        {"file_name": "../wrong/0.png", "text": "stolen"}, {"file_name": "/etc/0.png", "text": "stolen"},
        {"file_name": "1.png", "text": 3}, {"file_name": "0.png", "text": "said again"},
        {"file_name": "2.png", "text": "x" * (1 << 20)},
    ]  # fmt: skip
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "lines/metadata.jsonl").write_text("\n".join(text))
    names = pa.array([f"{i}.png" for i in range(3)])
    pq.write_table(pa.table({"file_name": names, "words": names}), folder / "wrong/metadata.parquet")
    pq.write_table(pa.table({"file_name": names, "text": names}), folder / "cut/metadata.parquet")
    whole = (folder / "cut/metadata.parquet").read_bytes()
    (folder / "cut/metadata.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "lost/metadata.parquet").mkdir()
    at = "lines/metadata.jsonl/line"
    folder.check({"said", ""}, {
        f"{at} 2": "it is no JSON object",
        f"{at} 3": "it is no JSON object",
        f"{at} 4": "it has no file_name",
        f"{at} 5": "it names 9.png, and no such image is there",
        f"{at} 6": "its file_name ../wrong/0.png leads out",
        f"{at} 7": "its file_name /etc/0.png leads out",
        f"{at} 9": "it names 0.png again",
        f"{at} 10": "longer than 1 MiB",
        "lines/1.png": "its caption (text) is no text but int",
        "wrong/metadata.parquet": "it has none of text, caption, prompt (found: file_name, words); set data.caption_key",
        "cut/metadata.parquet": "it cannot be read as parquet",
    })  # fmt: skip
