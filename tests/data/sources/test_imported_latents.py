"""Latents of other trainers: reading, rejection, and the check of their scale."""

import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch
from sentences import pattern, refused

from fastsd.data.sources.folders import Rejected
from fastsd.data.sources.imported_latents import check_scale, probe_latent, read_latent

LATENT = np.random.default_rng(0).normal(0, 5, (4, 6, 8)).astype(np.float32)


def npz(compress=False, **arrays):
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


KOHYA = {"original_size": np.array([640, 480]), "crop_ltrb": np.array([0, 0, 64, 48])}


@pytest.mark.parametrize("kind", ["img_sdxl", "img_sdvae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch", [False, True])
def test_reads_latents_from_safetensors(kind, dtype, batch):
    tensor = torch.from_numpy(LATENT).to(dtype)
    data = save_torch({"latent": tensor[None] if batch else tensor})
    assert probe_latent(data, kind) == (4, 6, 8)
    latent, mirrored = read_latent(data, kind)
    assert latent.dtype == np.float32 and mirrored is None
    assert np.array_equal(latent, tensor.float().numpy())


@pytest.mark.parametrize("suffix", ["", "_6x8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("compress", [False, True])
def test_reads_latents_from_npz(suffix, dtype, flip, compress):
    arrays = {"latents": LATENT.astype(dtype), **KOHYA, "alpha_mask": np.zeros((6, 8))}
    if flip:
        arrays["latents_flipped"] = arrays["latents"][..., ::-1]
    data = npz(compress, **{key + suffix: array for key, array in arrays.items()})
    assert probe_latent(data, "npz") == (4, 6, 8)
    latent, mirrored = read_latent(data, "npz")
    assert latent.dtype == np.float32 and np.array_equal(latent, LATENT.astype(dtype))
    assert (mirrored is not None) == flip
    if flip:
        assert mirrored.flags.c_contiguous and np.array_equal(mirrored, latent[..., ::-1])


def changed(index, value):
    array = LATENT.copy()
    array[index] = value
    return array


def npz_header_only(shape):
    """Make an npz whose array has a header with this shape, but no values."""
    file, header = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("latents.npy", header.getvalue())
    return file.getvalue()


VALID = {"img_sdxl": save({"latent": LATENT}), "npz": npz(latents=LATENT, **KOHYA)}
NOT_SAFETENSORS, NOT_NPZ = pattern("latent-not-safetensors"), pattern("latent-not-npz")


@pytest.mark.parametrize(
    "kind, data, reason",
    [
        ("img_sdxl", b"", NOT_SAFETENSORS),
        ("img_sdxl", b"text" * 50, NOT_SAFETENSORS),
        ("img_sdxl", VALID["img_sdxl"][:-1], NOT_SAFETENSORS),
        ("img_sdxl", VALID["img_sdxl"][:30], NOT_SAFETENSORS),
        ("img_sdxl", b"\xff" * 7 + b"\x7f" + b"{}", NOT_SAFETENSORS),
        ("img_sdxl", VALID["npz"], NOT_SAFETENSORS),
        ("img_sdxl", save({"emb": LATENT}), pattern("latent-missing", tensor="latent", names="'emb'")),
        ("img_sdxl", save({"latent": LATENT[0]}), pattern("latent-wrong-rank", shape=[6, 8])),
        ("img_sdxl", save({"latent": np.stack([LATENT] * 2)}), pattern("latent-wrong-rank", shape=[2, 4, 6, 8])),
        ("img_sdxl", save({"latent": LATENT[:0]}), pattern("latent-wrong-rank", shape=[0, 6, 8])),
        ("img_sdxl", save({"latent": LATENT.astype(np.int32)}), pattern("latent-dtype", dtype="I32")),
        ("npz", b"", NOT_NPZ),
        ("npz", b"text" * 50, NOT_NPZ),
        ("npz", VALID["npz"][:-1], NOT_NPZ),
        ("npz", VALID["npz"][: len(VALID["npz"]) // 2], NOT_NPZ),
        ("npz", VALID["img_sdxl"], NOT_NPZ),
        ("npz", npz(LATENT=LATENT, z=LATENT), pattern("latent-missing", tensor="latents", names="'LATENT', 'z'")),
        ("npz", npz(arr_0=LATENT), pattern("latent-missing", tensor="latents", names="'arr_0'")),
        ("npz", npz(latents_6x8=LATENT, latents_8x6=LATENT), pattern("latent-sizes", names="'latents_6x8', 'latents_8x6'")),
        ("npz", npz(latents=LATENT[0]), pattern("latent-wrong-rank", shape=[6, 8])),
        ("npz", npz(latents=LATENT.astype(np.int64)), pattern("latent-dtype", dtype="int64")),
        ("npz", npz(latents=np.array([{"a": 1}], object)), pattern("latent-dtype", dtype="object")),
        ("npz", npz(latents=LATENT, latents_flipped=LATENT[:, :3]), pattern("latent-mirrored-shape")),
        ("npz", npz_header_only((4, 1 << 20, 1 << 20)), pattern("latent-too-large")),
    ],
)
def test_files_without_a_usable_latent_are_rejected(kind, data, reason):
    for read in (probe_latent, read_latent):
        with pytest.raises(Rejected, match=reason) as error:
            read(data, kind)
        assert error.value.lasting and "\n" not in error.value.reason and len(error.value.reason) < 200


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_rejected(value):
    latent = changed((1, 2, 3), value)
    bad_mirror_image = npz(latents=LATENT, latents_flipped=latent)
    for kind, data in [("img_sdvae", save({"latent": latent})), ("npz", npz(latents=latent)), ("npz", bad_mirror_image)]:
        assert probe_latent(data, kind) == (4, 6, 8)
        with refused("latent-values", Rejected):
            read_latent(data, kind)


def test_an_array_without_values_is_rejected():
    with refused("latent-not-npz", Rejected):
        read_latent(npz_header_only((4, 6, 8)), "npz")


UNPICKLED = []


def record_unpickling():
    UNPICKLED.append(1)


class Trap:
    """An object whose pickle calls `record_unpickling` when it is loaded."""

    def __reduce__(self):
        return record_unpickling, ()


def test_nothing_is_unpickled():
    array = np.empty(1, object)
    array[0] = Trap()
    with pytest.raises(Rejected):
        read_latent(npz(latents=array), "npz")
    with pytest.raises(Rejected):
        read_latent(npz(latents=LATENT, latents_flipped=array), "npz")
    assert read_latent(npz(latents=LATENT, other=array), "npz")[0].shape == (4, 6, 8)
    assert not UNPICKLED
    with np.load(io.BytesIO(npz(latents=array)), allow_pickle=True) as file:
        file["latents"]
    assert UNPICKLED  # the trap works


@pytest.mark.parametrize("kind", ["img_sdxl", "npz"])
def test_truncated_and_corrupted_files_are_read_or_rejected(kind):
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(VALID[kind][: rng.integers(len(VALID[kind]))] if rng.random() < 0.3 else VALID[kind])
        for position in rng.integers(0, max(len(broken), 1), rng.integers(4)):
            broken[position : position + 1] = rng.bytes(1)
        try:
            assert np.isfinite(read_latent(bytes(broken), kind)[0]).all()
        except Rejected as error:
            assert error.reason


# Standard deviation of each channel over photographs, as published for SDXL's VAE.
SDXL = (8.4927, 5.9022, 6.5498, 5.2299)


@pytest.mark.parametrize(
    "std, factor, reason",
    [
        (SDXL, 0.13025, None),
        ((5.49,) * 4, 0.18215, None),
        (SDXL, 0.18215, None),  # the factor of another VAE gives 1.4, which is accepted
        ((5.49,) * 4, 0.13025, None),
        ([std * 0.13025 for std in SDXL], 0.13025, pattern("latents-std-scaled", factor=0.13025)),
        ((1.0,) * 4, 0.18215, pattern("latents-std-scaled", factor=0.18215)),
        ([std / 0.13025 for std in SDXL], 0.13025, pattern("latents-std-divided", factor=0.13025)),
        ((0.01,) * 4, 0.18215, pattern("latents-std-unknown")),
        ((0.0,) * 4, 0.18215, pattern("latents-std-unknown")),
        ((float("nan"),) * 4, 0.18215, pattern("latents-std-unknown")),
        ((1.0,) * 4, 1.0, None),
    ],
)
def test_latents_of_another_scale_are_detected(std, factor, reason):
    problem = check_scale(std, factor)
    assert reason.search(problem) if reason else problem is None
