"""Decoding of image files of every kind, compared with known colours."""

import io
import struct
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from dataset import chunk, png_by_hand
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from sentences import pattern, refused

from fastsd.data.building import decode as decode_module
from fastsd.data.building.buckets import Buckets, Place
from fastsd.data.building.decode import decode, probe
from fastsd.data.sources.image import Rejected

R = 32
SQUARE = Place((R, R), (R, R))
RED = (200, 30, 40)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(mode="RGB", size=(40, 48), colour=RED):
    return Image.new(mode, size, colour)


def noise(width, height, low=0, high=256, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(low, high, (height, width, 3), dtype=np.uint8))


def colour(data):
    """Decode a picture of one colour. Check that all pixels have it, and return it."""
    pixels = decode(data, Buckets(R, None).place(*probe(data)))
    assert pixels.shape == (3, R, R) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.ptp(pixels.reshape(3, -1).astype(int), axis=1).max() <= 1
    return pixels[:, R // 2, R // 2].tolist()


def assert_colour(data, expected, tolerance=2):
    assert np.abs(np.subtract(colour(data), expected)).max() <= tolerance


def any_of(*names):
    """Return a pattern for one of several sentences, because Pillow's versions differ."""
    return "|".join(pattern(name).pattern for name in names)


def png(width, height, bits, colour, lines, *chunks):
    return png_by_hand(width, height, bits, colour, zlib.compress(lines), *chunks)


def png16(kind, samples, *chunks):
    """Make a PNG of 40 x 48 pixels of one colour, with 16 bits per sample."""
    return png(40, 48, 16, kind, (b"\0" + struct.pack(f">{len(samples)}H", *samples) * 40) * 48, *chunks)


# Pillow writes inverted ink, with Adobe's marker in bytes 2 to 18. Without the marker, ink is not inverted.
INK = encoded(plain("CMYK", colour=(0, 255, 255, 0)), "JPEG", quality=95)
BARE_INK = encoded(plain("CMYK", colour=(255, 0, 0, 255)), "JPEG", quality=95)
BARE_INK = BARE_INK[:2] + BARE_INK[18:]
# Y, Cb and Cr of (0, 255, 255), which is cyan as light and red as ink. The last byte of the marker declares YCCK.
YCCK = bytearray(encoded(plain("CMYK", colour=(255 - 179, 255 - 171, 255, 0)), "JPEG", quality=95))
assert INK[6:11] == b"Adobe" and YCCK[17] == 0
YCCK[17] = 2
BLUE = plain(colour="blue")


@pytest.mark.parametrize(
    "data, expected",
    [
        (encoded(plain(), "JPEG", quality=95), RED),
        (encoded(plain("L", colour=90), "JPEG"), (90, 90, 90)),
        (encoded(plain(), "WEBP", lossless=True), RED),
        (encoded(plain(), "BMP"), RED),
        (encoded(plain(), "GIF"), RED),
        (encoded(plain().quantize(4)), RED),
        (encoded(plain("1", colour=1)), (255, 255, 255)),
        (encoded(plain("1", colour=1), "BMP"), (255, 255, 255)),
        # Alpha is composited over white.
        (encoded(plain("RGBA", colour=(*RED, 0))), (255, 255, 255)),
        (encoded(plain("RGBA", colour=(0, 0, 0, 51))), (204, 204, 204)),
        (encoded(plain("RGBA", colour=(0, 0, 0, 51)), "WEBP", lossless=True), (204, 204, 204)),
        (encoded(plain("LA", colour=(0, 51))), (204, 204, 204)),
        (encoded(plain().quantize(4), transparency=0), (255, 255, 255)),
        (encoded(plain().quantize(4), transparency=b"\x33"), (244, 210, 212)),
        (encoded(plain().quantize(4), "GIF", transparency=0), (255, 255, 255)),
        (encoded(plain(), transparency=RED), (255, 255, 255)),
        (encoded(plain(), transparency=(1, 2, 3)), RED),
        (encoded(plain("L", colour=90), transparency=90), (255, 255, 255)),
        (encoded(plain("1", colour=0), transparency=0), (255, 255, 255)),
        # 16 bits are scaled, not clipped.
        (png16(0, [0x8040]), (128, 128, 128)),
        (png16(0, [0x0140]), (1, 1, 1)),
        (png16(0, [0xFFFF]), (255, 255, 255)),
        (png16(0, [0x8040], chunk(b"tRNS", b"\x80\x40")), (255, 255, 255)),
        (png16(0, [0x8040], chunk(b"tRNS", b"\x80\x41")), (128, 128, 128)),
        (png16(2, [0xC8FF, 0x1E00, 0x2880]), RED),
        (png16(4, [0x0000, 0x3333]), (204, 204, 204)),
        (png16(6, [0x0000, 0x0000, 0x0000, 0x3333]), (204, 204, 204)),
        (INK, (254, 0, 0)),
        (BARE_INK, (254, 0, 0)),
        (bytes(YCCK), (254, 0, 0)),
        # The first frame of an animation is decoded.
        (encoded(plain(), save_all=True, append_images=[BLUE]), RED),
        (encoded(plain(), "GIF", save_all=True, append_images=[BLUE]), RED),
        (encoded(plain(), "WEBP", lossless=True, save_all=True, append_images=[BLUE]), RED),
        (encoded(plain(), "MPO", quality=95, save_all=True, append_images=[BLUE]), RED),
        (encoded(plain(size=(1, 1))), RED),
        (encoded(plain(size=(1, 20000))), RED),
        (encoded(plain(size=(20000, 1))), RED),
    ],
)
def test_every_kind_of_image_becomes_srgb_on_white(data, expected):
    assert_colour(data, expected)


def s15(*numbers):
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def profile(space, connection, tags):
    """Make an ICC profile by hand."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    head = b"\0" * 4 + struct.pack(">I", 0x02400000) + b"prtr" + space + connection + b"\0" * 12 + b"acsp" + b"\0" * 28
    head += s15(0.9642, 1.0, 0.8249) + b"\0" * 48
    return struct.pack(">I", 4 + len(head + table + body)) + head + table + body


def curve(*values):
    return b"curv" + struct.pack(">II", 0, len(values)) + struct.pack(f">{len(values)}H", *values)


def to_linear(v):
    """Convert an sRGB value to linear light."""
    return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4


SRGB_CURVE = curve(*(round(65535 * to_linear(i / 1023)) for i in range(1024)))
LINEAR = curve(256)  # the exponent 1, in 256ths
WHITE = b"XYZ \0\0\0\0" + s15(0.9642, 1.0, 0.8249)
XYZ = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)  # of sRGB, adapted to D50
PRIMARIES = [b"XYZ \0\0\0\0" + s15(*xyz) for xyz in XYZ]


def matrix_profile(primaries, trc):
    names = [b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC"]
    return profile(b"RGB ", b"XYZ ", {b"wtpt": WHITE, **dict(zip(names, [*primaries, trc, trc, trc], strict=True))})


def ink_profile(lab):
    """Make a CMYK profile in which all mixtures without black ink have this colour (L, a, b)."""
    ramp = bytes(range(256))
    point = bytes([round(lab[0] * 2.55), lab[1] + 128, lab[2] + 128])
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = head + ramp * 4 + (point + bytes([0, 128, 128])) * 8 + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"wtpt": WHITE, b"A2B0": table})


OTHER_SRGB = matrix_profile(PRIMARIES, SRGB_CURVE)
SWAPPED = matrix_profile(PRIMARIES[::-1], SRGB_CURVE)
LINEAR_RGB = matrix_profile(PRIMARIES, LINEAR)
LINEAR_GREY = profile(b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": LINEAR})
RED_INK = ink_profile((54, 81, 70))


@pytest.mark.parametrize(
    "data, expected",
    [
        (encoded(plain(), icc_profile=SWAPPED), RED[::-1]),
        (encoded(plain(), "JPEG", quality=95, icc_profile=SWAPPED), RED[::-1]),
        (encoded(plain(), "WEBP", lossless=True, icc_profile=SWAPPED), RED[::-1]),
        (encoded(plain().quantize(4), icc_profile=SWAPPED), RED[::-1]),
        (encoded(plain("RGBA", colour=(200, 30, 40, 51)), icc_profile=SWAPPED), (212, 210, 244)),
        (encoded(plain(colour=(128, 26, 255)), icc_profile=LINEAR_RGB), (188, 90, 255)),
        (encoded(plain("L", colour=128), icc_profile=LINEAR_GREY), (188, 188, 188)),
        (encoded(plain("LA", colour=(128, 51)), icc_profile=LINEAR_GREY), (242, 242, 242)),
        (png16(0, [0x8000], chunk(b"iCCP", b"x\0\0" + zlib.compress(LINEAR_GREY))), (188, 188, 188)),
        (encoded(plain("CMYK", colour=(9, 99, 199, 0)), "JPEG", quality=95, icc_profile=RED_INK), (253, 0, 0)),
    ],
)
def test_profiles_are_converted_to_srgb(data, expected):
    assert_colour(data, expected, 3)


@pytest.mark.parametrize(
    "wrong", [OTHER_SRGB, LINEAR_GREY, RED_INK, b"no profile", SWAPPED[:200], b"\0" * 500, b"x" * (5 << 20)]
)
def test_a_profile_that_is_srgb_or_broken_or_of_another_kind_changes_no_bit(wrong):
    image = noise(48, 48)
    with_profile = encoded(image, "JPEG", icc_profile=wrong)
    assert np.array_equal(decode(with_profile, SQUARE), decode(encoded(image, "JPEG"), SQUARE))


def test_an_rgb_profile_is_ignored_for_cmyk():
    assert_colour(encoded(plain("CMYK", colour=(0, 255, 255, 0)), "JPEG", icc_profile=SWAPPED), (254, 0, 0))


def test_a_profile_can_be_used_by_many_threads():
    files = [encoded(noise(R, R, seed=seed), icc_profile=SWAPPED) for seed in range(8)] * 4
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda data: decode(data, SQUARE), files))
    assert all(np.array_equal(pixels, decode(data, SQUARE)) for pixels, data in zip(together, files, strict=True))


def resize_then_crop(image, place, left, top):
    """Resize the whole picture, then crop it."""
    resized = image.convert("RGB").resize(place.resized, Image.Resampling.LANCZOS)
    return np.asarray(resized.crop((left, top, left + place.size[0], top + place.size[1]))).transpose(2, 0, 1).astype(int)


# No pixel is near black or white, where Pillow would clip the overshoot of the filter between its two passes.
MUTED = noise(90, 60, 64, 192)


@pytest.mark.parametrize(
    "place, crop, left, top",
    [
        (Place((48, 32), (32, 32)), (0.5, 0.5), 8, 0),
        (Place((49, 32), (32, 32)), (0.5, 0.5), 8, 0),  # of 17 free columns, 8 are on the left, as in kohya's 17 // 2
        (Place((48, 32), (32, 32)), (0.0, 0.0), 0, 0),
        (Place((48, 32), (32, 32)), (1.0, 1.0), 16, 0),
        (Place((72, 48), (40, 32)), (0.25, 0.75), 8, 12),
        (Place((90, 60), (64, 56)), (0.5, 0.5), 13, 2),
        (Place((300, 200), (256, 192)), (0.9, 0.1), 40, 0),
        (Place((9, 6), (8, 5)), (0.5, 0.5), 0, 0),
    ],
)
def test_resize_with_the_crop_equals_resize_then_crop(place, crop, left, top):
    expected = resize_then_crop(MUTED, place, left, top)
    pixels = decode(encoded(MUTED), place, crop).astype(int)
    assert pixels.shape == expected.shape
    # If an image shrinks to less than a sixth, Pillow first takes averages of blocks.
    assert np.abs(pixels - expected).max() <= (1 if place.resized[0] > 15 else 8)


@settings(max_examples=30)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 40), st.integers(2, 40))
def test_every_crop_lies_within_the_image(fx, fy, width, height):
    place = Buckets(16, None).place(width, height)
    assert decode(encoded(noise(width, height)), place, (fx, fy)).shape == (3, 16, 16)


def oriented(orientation, image=None):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"data": encoded(image or MUTED, exif=exif), "exif": exif}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    data = oriented(orientation)["data"]
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)
    assert probe(data) == upright.size
    place = Buckets(R, None).place(*probe(data))
    assert place.resized != place.size
    for crop in ((0.5, 0.5), (0.1, 0.9), (0.8, 0.3)):
        assert np.array_equal(decode(data, place, crop), decode(encoded(upright), place, crop))


TURNED_FORMATS = [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("AVIF", {"quality": 100, "subsampling": "4:4:4"})]


@pytest.mark.parametrize("format, options", TURNED_FORMATS)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_orientation_is_applied_once_in_other_formats(format, options, orientation):
    upright = oriented(orientation)["data"]
    data = encoded(MUTED, format, exif=oriented(orientation)["exif"], **options)
    assert probe(data) == probe(upright)
    place = Buckets(R, None).place(*probe(data))
    difference = np.subtract(decode(data, place), decode(upright, place), dtype=int)
    assert np.abs(difference).mean() <= (2 if format == "AVIF" else 0)


def test_the_modes_of_tiff_have_their_colours():
    deep = np.full((48, 40), RED[0] << 8, np.uint16)
    assert_colour(encoded(plain(), "TIFF"), RED)
    for values in (deep, deep.astype(">u2")):
        assert_colour(encoded(Image.fromarray(values), "TIFF"), (RED[0],) * 3)
    assert_colour(encoded(plain("CMYK", colour=(0, 255, 255, 0)), "TIFF"), (255, 0, 0), 3)
    assert_colour(encoded(plain("LA", colour=(0, 0)), "TIFF"), (255,) * 3)
    pages = {"save_all": True, "append_images": [plain(colour=(0, 0, 255))]}
    for format in ("TIFF", "GIF"):
        assert_colour(encoded(plain(), format, **pages), RED)
    for mode in ("I", "F"):
        with refused("image-bits", Rejected):
            colour(encoded(Image.new(mode, (40, 48)), "TIFF"))


HEIC, JXL = b"\0\0\0\x18ftypheic" + bytes(99), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99)


@pytest.mark.parametrize("data, name, module", [(HEIC, "HEIC", "pillow_heif"), (JXL, "JPEG XL", "pillow_jxl")])
def test_formats_that_need_a_package_say_so_until_it_is_installed(data, name, module, monkeypatch, request):
    request.addfinalizer(decode_module._formats.cache_clear)
    monkeypatch.setitem(sys.modules, module, None)
    decode_module._formats.cache_clear()
    with refused("image-needs-package", Rejected, format=name) as error:
        probe(data)
    assert not error.value.lasting  # it is tried again when the package is there

    code = {"HEIC": "HEIF", "JPEG XL": "JXL"}[name]
    package = types.ModuleType(module)
    package.register_heif_opener = lambda: None
    monkeypatch.setitem(sys.modules, module, package)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    Image.register_open(code, lambda file, name: plain(), lambda start: start == data[:16])
    decode_module._formats.cache_clear()
    assert probe(data) == (40, 48)
    with refused("image-format", Rejected):
        probe(b"rubbish")


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff garbage", b"Exif\0\0", b"x" * 900])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(exif, format):
    data = encoded(plain(), format, exif=exif)
    assert probe(data) == (40, 48)
    assert_colour(data, RED, 6)


@pytest.mark.parametrize(
    "size, place, orientation, decoded",
    [
        ((2048, 1536), Buckets(512, None).place(2048, 1536), 1, (1024, 768)),
        ((1536, 2048), Buckets(512, None).place(2048, 1536), 6, (768, 1024)),
        ((1366, 1024), Buckets(512, None).place(1366, 1024), 1, (683, 512)),
        ((1365, 1024), Buckets(512, None).place(1365, 1024), 1, (1365, 1024)),  # half of its size would be a pixel too narrow
        ((1024, 768), Buckets(512, None).place(1024, 768), 1, (1024, 768)),
        ((1000, 900), Place((125, 113), (64, 64)), 1, (250, 225)),
        ((1000, 904), Place((125, 113), (64, 64)), 1, (125, 113)),
        ((300, 200), Buckets(512, None).place(300, 200), 1, (300, 200)),
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_needed(size, place, orientation, decoded, monkeypatch):
    sizes, draft = [], JpegImageFile.draft

    def recorded_draft(image, *arguments):
        result = draft(image, *arguments)
        sizes.append(image.size)
        return result

    monkeypatch.setattr(JpegImageFile, "draft", recorded_draft)
    image = plain(size=size)
    image.paste("blue", (0, 0, size[0] // 2, size[1]))
    pixels = decode(encoded(image, "JPEG", quality=95, exif=oriented(orientation)["exif"]), place)
    assert sizes == [decoded]
    half = pixels[:, : pixels.shape[1] // 2 - 8] if orientation == 6 else pixels[:, :, : pixels.shape[2] // 2 - 8]
    assert np.abs(half.reshape(3, -1).astype(int) - np.array([[0], [0], [255]])).max() <= 6


def test_a_drafted_jpeg_has_the_same_crop_box_as_the_full_one():
    """The JPEG decoder rounds half of an odd side up. The picture must not move by that."""
    ramp = np.linspace(0, 255, 1001).round().astype(np.uint8)
    data = encoded(Image.fromarray(np.broadcast_to(ramp, (901, 1001)).copy()), "JPEG", quality=100)
    place = Place((250, 225), (250, 225))
    expected = np.linspace(0, 255, 1001)[np.clip((np.arange(250) + 0.5) * 1001 / 250, 0, 1000).astype(int)]
    error = (decode(data, place)[0].astype(float) - expected)[:, 4:-4]
    assert np.abs(error).max() <= 1.6 and abs(error.mean()) < 0.3


def test_giant_images_are_rejected_without_allocating_pixels():
    giant = png(20000, 20000, 1, 0, bytes(2501 * 20000))
    assert len(giant) < 50_000
    Image.core.reset_stats()
    for data in (giant, png(50000, 5000, 8, 2, b""), png(1 << 31, 1 << 31, 8, 2, b"")):
        for read in (probe, lambda data: decode(data, SQUARE)):
            with pytest.raises(Rejected, match=any_of("image-pixels", "image-undecodable")):
                read(data)
    assert Image.core.get_stats()["new_count"] == 0, "pixels were allocated"


@pytest.mark.parametrize(
    "format, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})]
)
def test_probe_reads_only_the_header(format, options):
    data = encoded(noise(400, 300), format, **options)
    start = data if format == "WEBP" else data[:2000]
    assert probe(start) == (400, 300)


TEXT_BOMB = PngImagePlugin.PngInfo()
TEXT_BOMB.add_text("comment", "x" * (2 << 20), zip=True)
JPEG = encoded(noise(64, 64), "JPEG")


NOT_AN_IMAGE, TRUNCATED, UNDECODABLE = (any_of(f"image-{name}") for name in ("format", "truncated", "undecodable"))
BAD_HEADER = any_of("image-format", "image-undecodable")


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", any_of("file-empty")),
        (b"this is text", NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NOT_AN_IMAGE),
        (encoded(plain(), "ICO"), NOT_AN_IMAGE),
        (encoded(plain(), "PPM"), NOT_AN_IMAGE),
        (encoded(Image.new("F", (9, 9)), "TIFF"), any_of("image-bits")),
        (encoded(plain(), "TIFF")[:-999], TRUNCATED),
        (encoded(plain(), "AVIF")[:-99], any_of("image-format", "image-truncated", "image-undecodable")),
        (b"\x89PNG\r\n\x1a\n", BAD_HEADER),
        (png(100, 100, 8, 2, bytes(99)), TRUNCATED),
        (png(0, 0, 8, 2, b""), BAD_HEADER),
        (png(9, 9, 7, 2, b""), BAD_HEADER),
        (png(9, 9, 8, 2, bytes(28 * 9), chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(64 << 20)))), UNDECODABLE),
        (encoded(plain(), pnginfo=TEXT_BOMB), UNDECODABLE),
        # A wrong checksum of the header, a wrong checksum of the pixels, and a wrong bit in the pixels.
        (flipped(encoded(plain()), 30), NOT_AN_IMAGE + "|broken PNG"),
        (flipped(encoded(plain()), -14), "broken PNG"),
        (flipped(encoded(noise(40, 40)), 2000), "broken PNG"),
        (JPEG[:10], any_of("image-format", "image-truncated")),
        (JPEG[:200], any_of("image-format", "image-truncated")),
        (JPEG[: len(JPEG) // 2], TRUNCATED),
        (JPEG[:-300], TRUNCATED),
        (JPEG[:-1], TRUNCATED),
        (b"GIF89a" + bytes(50), BAD_HEADER),
        (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20), BAD_HEADER),
    ],
)
def test_bad_images_are_rejected_with_a_short_reason(data, reason):
    with pytest.raises(Rejected, match=reason) as error:
        decode(data, SQUARE)
    assert "\n" not in error.value.reason and len(error.value.reason) < 160 and error.value.lasting


@pytest.mark.parametrize(
    "format, options",
    [
        *((format, {}) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_rows": 1}),
        ("WEBP", {"lossless": True}),
        ("MPO", {"save_all": True, "append_images": [BLUE]}),
    ],
)
def test_truncated_files_are_rejected_and_never_padded(format, options):
    data = encoded(noise(64, 64), format, **options)
    for place in (SQUARE, Place((8, 8), (8, 8))):
        whole = decode(data, place)
        for cut in range(0, len(data), 61):
            try:
                # Only a second picture and the few bytes of an end marker may be missing.
                assert np.array_equal(decode(data[:cut], place), whole)
                assert format == "MPO" or len(data) - cut <= 4
            except Rejected as error:
                assert error.reason
        if format == "JPEG":
            for cut in range(1, 40):
                with pytest.raises(Rejected):
                    decode(data[:-cut], place)
