"""Decode image files to pixels: `probe` reads the size from the header, `decode` resizes and crops the image.

The output is sRGB on a white background for every kind of input:

    EXIF        Sizes, crops and pixels are those of the image as displayed.
    alpha       The image is composited over white, also with a palette or a single transparent colour (tRNS).
    16 bit      Values are scaled to 8 bits.
    ICC         The image is converted to sRGB after the resize. A broken profile, or one for other pixels, is ignored.
    CMYK        The image is converted with its profile, otherwise by Pillow. With Adobe's marker, ink is stored inverted.
    animation   The first frame is decoded, as is the first page of a TIFF.
    32 bit      Values have no known range, so the image is rejected.

HEIC and JPEG XL need packages of their own, which `pip install "fastsd[formats]"` installs.

Only the brightness of a mask is decoded. Its transparency is ignored, because people who paint masks do not change it.

Pillow's decoders and its resize release the GIL. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is not smaller than
the resized image. Only the crop is resized, so a strip of 1 x 20000 pixels never becomes a huge image. Any error in a file,
including an early end, raises `Rejected`.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

from fastsd.data.building.buckets import Place, Size
from fastsd.data.sources.image import Rejected

CropBox = tuple[float, float, float, float]  # left, top, right, bottom
Orientation = tuple[bool, bool, bool]  # turn an image upright: mirror columns, mirror rows, then swap the two
# JPEG includes MPO, which some cameras write. Pillow's other decoders are not used.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
# How the files of formats that need a package start: bytes, their offset, and the name of the format.
_PACKAGED = {"HEIC": "HEIF", "JPEG XL": "JXL"}  # their names in Pillow
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SIGNATURES = [(4, b"ftyp" + brand, "HEIC") for brand in _HEIC_BRANDS]
_SIGNATURES += [(0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL")]
MAX_PIXELS = 178_956_970  # above this size, Pillow raises an error instead of warning
_MAX_PROFILE_BYTES = 4 << 20
_EXIF_ORIENTATION = 0x0112
# The steps for each EXIF orientation.
_ORIENTATIONS: dict[int, Orientation] = {
    2: (True, False, False),
    3: (True, True, False),
    4: (False, True, False),
    5: (False, False, True),
    6: (False, True, True),
    7: (True, True, True),
    8: (True, False, True),
}
_UPRIGHT = (False, False, False)


def probe(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an image file as displayed, in pixels. No pixel is decoded.

    Raises:
        Rejected: the file is empty, not an image, or has a damaged header or more than `MAX_PIXELS` pixels.
    """
    with _open(data) as image:
        width, height = image.size
        return (height, width) if _orientation(image)[2] else (width, height)


def decode(data: bytes, place: Place, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Decode an image file, resize it to `place.resized`, and crop `place.size` from that.

    Args:
        data: the whole file.
        place: resize and crop for the size that `probe` returns.
        crop: position of the crop in the image as displayed, from 0 (left, top) to 1 (right, bottom), rounded to pixels.

    Returns:
        Contiguous uint8 (3, H, W), where `place.size` is (W, H).

    Raises:
        Rejected: as for `probe`, or the file is truncated or damaged.
    """
    return np.ascontiguousarray(_decode_crop(data, place, crop, _rgb))


def decode_mask(data: bytes, place: Place, crop: tuple[float, float], cell: int) -> np.ndarray:
    """Decode a mask file to a weight for each cell of the latent. Cells with 255 count in full.

    Args:
        data: the whole file.
        place: resize and crop of the image. The mask is stretched to the size of the image.
        crop: position of the image's crop.
        cell: side of a cell in pixels. It divides the sides of `place.size`.

    Returns:
        uint8 (H / cell, W / cell): the mean brightness of each cell's pixels, rounded.

    Raises:
        Rejected: as for `decode`.
    """
    grey = _decode_crop(data, place, crop, _brightness)[0]
    height, width = grey.shape
    sums = grey.reshape(height // cell, cell, width // cell, cell).sum((1, 3), dtype=np.uint32)
    return ((2 * sums + cell**2) // (2 * cell**2)).astype(np.uint8)


def _decode_crop(
    data: bytes, place: Place, crop: tuple[float, float], render: Callable[[Image.Image, CropBox, Size], np.ndarray]
) -> np.ndarray:
    """Return the crop of an image as displayed, (channels, H, W). See `decode`.

    `render` resizes a box of the image as stored to a given size.
    """
    with _open(data) as image:
        if image.format == "PNG":
            with Image.open(io.BytesIO(data), formats=["PNG"]) as checked:
                checked.verify()  # the decoder does not verify the checksums of the pixels
        mirror_columns, mirror_rows, swap = orientation = _orientation(image)
        box = _crop_box(image, place, crop, orientation)
        pixels = render(image, box, place.size[::-1] if swap else place.size)
        if mirror_columns:
            pixels = pixels[:, :, ::-1]
        if mirror_rows:
            pixels = pixels[:, ::-1]
        return pixels.transpose(0, 2, 1) if swap else pixels


@contextmanager
def _open(data: bytes) -> Iterator[Image.Image]:
    """Open an image and read its header. Raises Rejected, also for errors inside the `with` block."""
    if not data:
        raise Rejected("file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Rejected(f"{image.width} x {image.height} is more than {MAX_PIXELS} pixels")
            yield image
    except Rejected:
        raise
    except UnidentifiedImageError:
        packed = next((name for at, start, name in _SIGNATURES if data.startswith(start, at)), "")
        if packed and _PACKAGED[packed] not in _formats():
            raise Rejected(f'{packed} needs a package; run `pip install "fastsd[formats]"`', lasting=False) from None
        raise Rejected("not a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF image") from None
    except Image.DecompressionBombError:
        raise Rejected(f"size is more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise Rejected("not enough memory to decode it", lasting=False) from None
    except Exception as error:  # Pillow's decoders raise anything from struct.error to SyntaxError on damaged files
        message = " ".join(str(error).split())[:120]
        if "truncated" in message.lower():  # some of Pillow's messages contain a number of bytes
            raise Rejected("file is truncated") from None
        raise Rejected(f"cannot be decoded ({message or type(error).__name__})") from None


@lru_cache
def _formats() -> tuple[str, ...]:
    """Return Pillow's names of all formats that can be read, with those of the packages that are installed."""
    formats = list(FORMATS)
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        formats.append("HEIF")
    with suppress(ImportError):
        importlib.import_module("pillow_jxl")  # registers itself
        formats.append("JXL")
    return tuple(formats)


def _orientation(image: Image.Image) -> Orientation:
    # Some decoders turn the image themselves, also if its EXIF block still has the orientation. A JPEG within a JPEG XL stays.
    if image.format == "TIFF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return _UPRIGHT
    try:
        # PNG's own method decodes all pixels to look for EXIF data after them, so call that of the base class.
        return _ORIENTATIONS.get(int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)), _UPRIGHT)
    except Exception:  # the pixels are intact even if the EXIF block is broken
        return _UPRIGHT


def _crop_box(image: Image.Image, place: Place, crop: tuple[float, float], orientation: Orientation) -> CropBox:
    """Return the box of the crop in the image as stored. Make a JPEG's decoder use the smallest sufficient size."""
    mirror_columns, mirror_rows, swap = orientation
    (resized_w, resized_h), (w, h) = place
    # If n pixels are cut off, offsets are 0 to n, and the middle one is n // 2, as in kohya's code and PyTorch.
    left, top = (
        max(math.ceil(fraction * (resized - cropped + 1)) - 1, 0)
        for fraction, resized, cropped in zip(crop, place.resized, place.size, strict=True)
    )
    if swap:
        resized_w, resized_h, w, h, left, top = resized_h, resized_w, h, w, top, left
    if mirror_columns:
        left = resized_w - left - w
    if mirror_rows:
        top = resized_h - top - h
    drafted = image.draft(None, (resized_w, resized_h))  # None unless it is a JPEG
    width, height = drafted[1][2:] if drafted else image.size
    scale_x, scale_y = width / resized_w, height / resized_h
    return left * scale_x, top * scale_y, (left + w) * scale_x, (top + h) * scale_y


def _rgb(image: Image.Image, box: CropBox, size: Size) -> np.ndarray:
    """Resize a box of the image as stored to (W, H) and convert it to sRGB: uint8 (3, H, W)."""
    profile, inverted = image.info.get("icc_profile"), image.format != "TIFF" and "adobe" not in image.info
    image = _to_colour_mode(image).resize(size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    if image.mode == "CMYK" and inverted:
        image = ImageChops.invert(image)  # Pillow decodes every JPEG as if it had Adobe's marker
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    if alpha:
        image = image.convert(image.mode.removesuffix("A"))
    transform = _to_srgb(profile, image.mode) if profile and len(profile) <= _MAX_PROFILE_BYTES else None
    image = transform.apply(image) if transform else image.convert("RGB")
    if alpha:
        background = Image.new("RGB", size, "white")
        background.paste(image, mask=alpha)
        image = background
    lines = np.frombuffer(image.tobytes("raw", "RGB;L"), np.uint8)  # each line as all its red, all its green, all its blue
    return lines.reshape(size[1], 3, size[0]).transpose(1, 0, 2)


def _brightness(image: Image.Image, box: CropBox, size: Size) -> np.ndarray:
    """Resize the brightness of a box to (W, H), without overshoot at edges: uint8 (1, H, W)."""
    grey = _eight_bits(np.asarray(image)) if image.mode in ("I;16", "I;16B") else image.convert("L")
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=3.0))[None]


def _eight_bits(values: np.ndarray) -> Image.Image:
    # Pillow's own conversion clips at 255 instead of scaling.
    return Image.fromarray((values >> 8).astype(np.uint8))


def _to_colour_mode(image: Image.Image) -> Image.Image:
    """Convert any mode to L, LA, RGB, RGBA or CMYK. Palette indices and 16-bit values cannot be resampled."""
    if image.mode in ("I", "F"):
        raise Rejected("has 32 bits per sample, of no known range; save it with 8 or 16 bits")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("I;16", "I;16B"):
        values, transparent = np.asarray(image), image.info.get("transparency")
        grey = _eight_bits(values)
        if transparent is not None:
            grey.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
        return grey
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("L", "LA", "1") else "RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from an ICC profile to sRGB for a mode, or None if it is unnecessary or impossible."""
    try:
        source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, target, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "RGB":
        # There are many versions of the sRGB profile. A profile that changes colours by at most one level is one of them.
        levels = np.arange(0, 256, 17, dtype=np.uint8)
        swatch = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        change = np.asarray(transform.apply(Image.fromarray(swatch))).astype(int) - swatch
        if np.abs(change).max() <= 1:
            return None
    return transform
