"""Finding images and captions, and decoding everything that people keep in a folder of images."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from fastsd.data.sources import MAX_CAPTION_BYTES, Rejected, decode, read_caption, scan, shown
from fastsd.errors import UserError

R = 32


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(mode="RGB", size=(40, 48), colour=(200, 30, 40)):
    return Image.new(mode, size, colour)


def mean_colour(data):
    return decode(data, R).reshape(3, -1).mean(1).round().tolist()


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names(folder, *folders):
    return [os.path.relpath(source.path, folder) for source in scan([str(f) for f in folders or [folder]])]


def test_scan_is_recursive_sorted_and_skips_hidden_files(tmp_path):
    touch(tmp_path, "b.JPG", "a.png", "d/c.webp", "d/e/f.bmp", "c.jpeg", "c.txt", ".x.png", ".git/y.png", "notes.md")
    assert names(tmp_path) == ["a.png", "b.JPG", "c.jpeg", "d/c.webp", "d/e/f.bmp"]
    assert [bool(source.caption_path) for source in scan([str(tmp_path)])] == [False, False, True, False, False]


def test_scan_follows_links_once_and_lists_no_path_twice(tmp_path):
    touch(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a/loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a/self.png").symlink_to(tmp_path / "a/self.png")
    assert sorted(names(tmp_path)) == ["a/self.png", "a/x.png", "b/y.png"]
    assert names(tmp_path, tmp_path / "b", tmp_path) == ["b/y.png", "a/self.png", "a/x.png"]
    assert len(names(tmp_path, tmp_path, tmp_path / "b")) == 3


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_folder_that_cannot_serve_is_one_sentence(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "file":
        folder.write_text("x")
    elif kind == "empty":
        touch(folder, "notes.txt")
    with pytest.raises(UserError, match=r"^data.folders: [^\n]*;[^\n]*$") as error:
        list(scan([str(folder)]))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "data, caption",
    [
        (b"a red circle\nmore", "a red circle"),
        (b"\xef\xbb\xbf\r\n  \r\n  a, b \r\n", "a, b"),
        ("naïve café 🐈".encode(), "naïve café 🐈"),
        (b"", ""),
        (b" \n\t\n", ""),
    ],
)
def test_caption_is_the_first_line_that_says_something(tmp_path, data, caption):
    (tmp_path / "x.txt").write_bytes(data)
    assert read_caption(str(tmp_path / "x.txt")) == caption


@pytest.mark.parametrize(
    "data, reason",
    [(b"caf\xe9", "not UTF-8"), (b"a\0b", "NUL"), (b"x" * (MAX_CAPTION_BYTES + 1), "1 MiB"), (None, "cannot be read")],
)
def test_bad_captions_are_rejected(tmp_path, data, reason):
    if data is not None:
        (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(Rejected, match=reason):
        read_caption(str(tmp_path / "x.txt"))


@pytest.mark.parametrize(
    "data, colour",
    [
        (encoded(plain(), "JPEG", quality=95), [200, 30, 40]),
        (encoded(plain("L", colour=90), "JPEG"), [90, 90, 90]),
        (encoded(plain(), "WEBP", lossless=True), [200, 30, 40]),
        (encoded(plain(), "BMP"), [200, 30, 40]),
        (encoded(plain().quantize(4)), [200, 30, 40]),
        (encoded(plain("RGBA", colour=(200, 30, 40, 0))), [255, 255, 255]),
        (encoded(plain("RGBA", colour=(0, 0, 0, 51))), [204, 204, 204]),
        (encoded(plain("LA", colour=(0, 51))), [204, 204, 204]),
        (encoded(plain().quantize(4), transparency=0), [255, 255, 255]),
        (encoded(plain("L", colour=90), transparency=90), [255, 255, 255]),
        (encoded(plain("1", colour=1)), [255, 255, 255]),
        (encoded(plain("CMYK", colour=(0, 255, 255, 0)), "JPEG", quality=95), [254, 0, 0]),
        (encoded(Image.fromarray(np.full((48, 40), 0x8040, np.uint16))), [128, 128, 128]),
        (encoded(plain(), "PNG", save_all=True, append_images=[plain(colour="blue")]), [200, 30, 40]),
        (encoded(plain(), "WEBP", lossless=True, save_all=True, append_images=[plain(colour="blue")]), [200, 30, 40]),
        (encoded(plain(size=(1, 1))), [200, 30, 40]),
        (encoded(plain(size=(1, 20000))), [200, 30, 40]),
    ],
)  # fmt: skip
def test_every_kind_of_image_becomes_rgb(data, colour):
    pixels = decode(data, R)
    assert pixels.shape == (3, R, R) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.abs(np.subtract(mean_colour(data), colour)).max() <= 2


def test_shorter_side_and_centre_crop():
    image = plain(size=(3 * R, R), colour="blue")
    image.paste("lime", (R, 0, 2 * R, R))
    assert (decode(encoded(image), R) == np.array([0, 255, 0])[:, None, None])[:, :, 4:-4].all()
    # Beside the seams, where the resampling kernel of the half-size image reaches the neighbour, nothing is blue.
    assert mean_colour(encoded(image.resize((6 * R, 2 * R), Image.Resampling.NEAREST)))[1] > 240


def test_resizing_equals_resize_then_crop():
    # Away from black and white, where the kernel's overshoot would be clipped between Pillow's two passes.
    pixels = np.random.default_rng(0).integers(64, 192, (90, 60, 3), dtype=np.uint8)
    ours = decode(encoded(Image.fromarray(pixels)), R).transpose(1, 2, 0)
    whole = Image.fromarray(pixels).resize((R, 90 * R // 60), Image.Resampling.LANCZOS)
    top = (90 * R // 60 - R) // 2
    assert np.abs(ours.astype(int) - np.asarray(whole)[top : top + R]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    image = plain(size=(2 * R, R), colour="black")
    image.paste("white", (R // 2, 0, R, R // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        upright = encoded(ImageOps.exif_transpose(opened))
    assert np.abs(decode(data, R).astype(int) - decode(upright, R)).max() <= 3


def test_broken_exif_does_no_harm():
    data = encoded(plain(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage")
    assert mean_colour(data)[0] > 190


def png_of(width, height):
    """A few bytes that promise a giant."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


JPEG = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
TEXT_BOMB = PngImagePlugin.PngInfo()
TEXT_BOMB.add_text("comment", "x" * (2 << 20), zip=True)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"this is text", "no JPEG"),
        (b"\x89PNG\r\n\x1a\n", "no JPEG|cannot be decoded"),
        (JPEG[:10], "no JPEG|cannot be decoded"),
        (JPEG[:200], "no JPEG|cannot be decoded"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-300], "truncated"),
        (encoded(plain())[:60], "cannot be decoded"),
        (png_of(20000, 20000), "pixels"),
        (png_of(50000, 5000), "pixels"),
        (png_of(100, 100), "cannot be decoded"),
        (encoded(plain(), pnginfo=TEXT_BOMB), "cannot be decoded"),
        (encoded(plain(), "TIFF"), "no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG"),
    ],
)
def test_bad_images_are_rejected_with_one_short_sentence(data, reason):
    with pytest.raises(Rejected, match=reason) as error:
        decode(data, R)
    assert "\n" not in error.value.reason and len(error.value.reason) < 160


def test_cutting_a_file_anywhere_never_crashes():
    for data in (JPEG, encoded(plain()), encoded(plain(), "WEBP"), encoded(plain(), "BMP")):
        for cut in range(0, len(data), max(1, len(data) // 25)):
            try:
                assert decode(data[:cut], R).shape == (3, R, R)
            except Rejected as error:
                assert error.reason


def test_paths_are_shown_on_one_line():
    assert shown("a\nb.png") == r"a\nb.png"
    assert shown("🐈.png") == "🐈.png"
    assert shown(b"caf\xe9.png") == r"caf\xe9.png"
