"""Import latents that other trainers have written beside the images, instead of encoding the images again.

    img_sdxl, img_sdvae   foo.img_sdxl is a safetensors file. Its tensor `latent` is the raw posterior mean, fp32 (C, h, w) or
                          (1, C, h, w).
    npz                   foo.npz, or foo_0512x0768_sd.npz with the image's width and height, is from sd-scripts. It has the
                          array `latents`, fp32 (C, h, w), and may have `latents_flipped` of the mirrored image. The names of
                          both may end in a size (h x w), as in `latents_64x48`.

No format names its VAE. sd-scripts stores a raw sample of the posterior, not its mean. The posteriors of SD's and SDXL's VAE
are so narrow that sample and mean hardly differ. The masks and crop boxes of sd-scripts are ignored.

Shapes: C channels, h x w cells of the latent.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from fastsd.data.sources.image import Rejected

_TENSOR_NAME = "latent"
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_MAX_VALUES = 1 << 24  # of a latent: 16 channels at 8192 x 8192 pixels
_ARRAY_NAME = re.compile(r"latents((?:_\d+x\d+)?)\.npy")
_ACCEPTED = (0.5, 2.0)  # range of a standard deviation that should be 1


def probe_latent(data: bytes, kind: str) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents in a file. The values of an npz are not read.

    Args:
        data: the whole file.
        kind: the format, a value of data.latents.

    Raises:
        Rejected: the file has another format or is damaged, or its array does not have the shape of a latent.
    """
    shape, _ = _npz(data, read=False) if kind == "npz" else _safetensors(data)
    return shape


def read_latent(data: bytes, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the latents of an image and of its mirror image, unscaled fp32 (C, h, w). The latter may be None.

    Raises:
        Rejected: as for `probe_latent`, or a value is not finite.
    """
    _, arrays = _npz(data, read=True) if kind == "npz" else _safetensors(data)
    for array in arrays:
        if not np.isfinite(array).all():
            raise Rejected("latent has values that are not finite")
    return arrays[0], arrays[1] if len(arrays) > 1 else None


def check_scale(std_C: Sequence[float], scaling_factor: float) -> str | None:
    """Compare raw latents with the VAE's scaling factor. Return None if they match, otherwise the problem.

    A scaling factor is 1 divided by the standard deviation of raw latents. This deviation is near 5.5 for SD1.5's VAE (factor
    0.18215) and near 7 for SDXL's (0.13025). Factor times deviation should be 1. The product varies with the images, and plain
    drawings have a smaller one. A product below 0.5 or above 2 indicates an error. For example, latents that were scaled before
    they were stored have a product of about 0.15. A shift does not change the product.

    The check cannot distinguish these two VAEs. Latents of one have a product of 0.7 or 1.4 with the factor of the other, but
    so do some image sets with their own factor.

    Args:
        std_C: standard deviation of each channel over many images, of the latents as stored.
        scaling_factor: the VAE's scaling factor.
    """
    std = math.sqrt(sum(value * value for value in std_C) / len(std_C))
    product = std * scaling_factor
    if _ACCEPTED[0] <= product <= _ACCEPTED[1]:
        return None
    if _ACCEPTED[0] <= std <= _ACCEPTED[1]:
        explanation = f"they seem to be scaled already, and training would scale them by {scaling_factor:g} again"
    elif _ACCEPTED[0] <= product * scaling_factor <= _ACCEPTED[1]:
        explanation = f"they seem to have been divided by {scaling_factor:g}"
    else:
        explanation = "they are from another VAE, damaged, or from nearly identical images"
    return f"the latents have a standard deviation of {std:.3g}, scaled {product:.3g} instead of about 1: {explanation}"


def _safetensors(data: bytes) -> tuple[tuple[int, int, int], list[np.ndarray]]:
    try:
        tensors: dict[str, dict[str, Any]] = dict(deserialize(data))
    except SafetensorError as error:
        raise Rejected(f"not a valid safetensors file ({' '.join(str(error).split())[:120]})") from None
    if _TENSOR_NAME not in tensors:
        raise Rejected(f"has no tensor `{_TENSOR_NAME}` (found: {_list_names(tensors)})")
    tensor = tensors[_TENSOR_NAME]
    if tensor["dtype"] not in _FLOATS:
        raise Rejected(f"`{_TENSOR_NAME}` has dtype {tensor['dtype']}, not a float")
    shape = _latent_shape(tensor["shape"])
    values = np.frombuffer(tensor["data"], _FLOATS[tensor["dtype"]])
    if tensor["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return shape, [values.astype(np.float32).reshape(shape)]


def _npz(data: bytes, *, read: bool) -> tuple[tuple[int, int, int], list[np.ndarray]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            names = file.namelist()
            matches = [match for name in names if (match := _ARRAY_NAME.fullmatch(name))]
            if not matches:
                raise Rejected(f"has no array `latents` (found: {_list_names(name.removesuffix('.npy') for name in names)})")
            if len(matches) > 1:
                raise Rejected(f"has latents of several sizes ({_list_names(m[0][:-4] for m in matches)}); keep one")
            mirrored = f"latents_flipped{matches[0][1]}.npy"
            members = [matches[0][0], mirrored] if mirrored in names else [matches[0][0]]
            shapes = [_npy_shape(file, name) for name in members]
            if shapes[0] != shapes[-1]:
                raise Rejected(f"mirrored latents have shape {list(shapes[1])}, the others {list(shapes[0])}")
            return shapes[0], [_npy(file, name, shapes[0]) for name in members] if read else []
    except Rejected:
        raise
    except Exception as error:  # for a damaged file, zipfile, zlib and numpy raise anything from KeyError to struct.error
        message = " ".join(str(error).split())[:120]
        raise Rejected(f"cannot be read as npz ({message or type(error).__name__})") from None


def _npy_shape(file: zipfile.ZipFile, name: str) -> tuple[int, int, int]:
    """Read the shape of an array from its header, so that no memory is allocated for a false shape."""
    with file.open(name) as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
    if dtype.kind != "f":
        raise Rejected(f"`{name.removesuffix('.npy')}` has dtype {dtype}, not a float")
    return _latent_shape(shape)


def _npy(file: zipfile.ZipFile, name: str, shape: tuple[int, int, int]) -> np.ndarray:
    with file.open(name) as member:
        values = np.lib.format.read_array(member, allow_pickle=False)
    return np.ascontiguousarray(values.reshape(shape), np.float32)


def _latent_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    sizes = tuple(shape[1:]) if len(shape) == 4 and shape[0] == 1 else tuple(shape)
    if len(sizes) != 3 or 0 in sizes:
        raise Rejected(f"latent has shape {list(shape)}, expected (channels, height, width)")
    if math.prod(sizes) > _MAX_VALUES:
        raise Rejected(f"latent has shape {list(shape)}, larger than for any image")
    return sizes


def _list_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, names))[:8]) or "nothing"
