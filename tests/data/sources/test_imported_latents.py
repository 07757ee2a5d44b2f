"""Latents of other trainers: what is read, what is refused, and what their scale says."""

import io
import zipfile

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from safetensors.torch import save as save_torch

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
def test_safetensors(kind, dtype, batch):
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
def test_npz(suffix, dtype, flip, compress):
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


def changed(place, value):
    array = LATENT.copy()
    array[place] = value
    return array


def promising(shape):
    """An npz of a few hundred bytes whose array claims to be a giant."""
    file, head = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("latents.npy", head.getvalue())
    return file.getvalue()


FINE = {"img_sdxl": save({"latent": LATENT}), "npz": npz(latents=LATENT, **KOHYA)}


@pytest.mark.parametrize(
    "kind, data, reason",
    [
        ("img_sdxl", b"", "no whole safetensors"),
        ("img_sdxl", b"text" * 50, "no whole safetensors"),
        ("img_sdxl", FINE["img_sdxl"][:-1], "no whole safetensors"),
        ("img_sdxl", FINE["img_sdxl"][:30], "no whole safetensors"),
        ("img_sdxl", b"\xff" * 7 + b"\x7f" + b"{}", "no whole safetensors"),
        ("img_sdxl", FINE["npz"], "no whole safetensors"),
        ("img_sdxl", save({"emb": LATENT}), r"no tensor `latent` \(found: 'emb'\)"),
        ("img_sdxl", save({"latent": LATENT[0]}), r"shape \[6, 8\], where \(channels, height, width\)"),
        ("img_sdxl", save({"latent": np.stack([LATENT] * 2)}), r"shape \[2, 4, 6, 8\]"),
        ("img_sdxl", save({"latent": LATENT[:0]}), r"shape \[0, 6, 8\]"),
        ("img_sdxl", save({"latent": LATENT.astype(np.int32)}), "of I32, not of floats"),
        ("npz", b"", "cannot be read as npz"),
        ("npz", b"text" * 50, "cannot be read as npz"),
        ("npz", FINE["npz"][:-1], "cannot be read as npz"),
        ("npz", FINE["npz"][: len(FINE["npz"]) // 2], "cannot be read as npz"),
        ("npz", FINE["img_sdxl"], "cannot be read as npz"),
        ("npz", npz(LATENT=LATENT, **KOHYA), r"no array `latents` \(found: 'LATENT', 'crop_ltrb', 'original_size'\)"),
        ("npz", npz(arr_0=LATENT), r"no array `latents` \(found: 'arr_0'\)"),
        ("npz", npz(latents_6x8=LATENT, latents_8x6=LATENT), "several sizes .*'latents_6x8', 'latents_8x6'.*keep one"),
        ("npz", npz(latents=LATENT[0]), r"shape \[6, 8\]"),
        ("npz", npz(latents=LATENT.astype(np.int64)), "of int64, not of floats"),
        ("npz", npz(latents=np.array([{"a": 1}], object)), "of object, not of floats"),
        ("npz", npz(latents=LATENT, latents_flipped=LATENT[:, :3]), "mirrored latents are"),
        ("npz", promising((4, 1 << 20, 1 << 20)), "larger than that of any image"),
    ],
)
def test_what_is_no_latent_is_rejected(kind, data, reason):
    for read in (probe_latent, read_latent):
        with pytest.raises(Rejected, match=reason) as error:
            read(data, kind)
        assert error.value.lasting and "\n" not in error.value.reason and len(error.value.reason) < 200


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_rejected(value):
    bad = changed((1, 2, 3), value)
    for kind, data in [
        ("img_sdvae", save({"latent": bad})), ("npz", npz(latents=bad)), ("npz", npz(latents=LATENT, latents_flipped=bad))
    ]:  # fmt: skip
        assert probe_latent(data, kind) == (4, 6, 8)
        with pytest.raises(Rejected, match="not finite"):
            read_latent(data, kind)


def test_a_missing_end_of_the_values_is_rejected():
    with pytest.raises(Rejected, match="cannot be read as npz"):
        read_latent(promising((4, 6, 8)), "npz")


SPRUNG = []


def spring():
    SPRUNG.append(1)


class Trap:
    """Its pickle calls `spring` when it is loaded."""

    def __reduce__(self):
        return spring, ()


def test_nothing_is_unpickled():
    array = np.empty(1, object)
    array[0] = Trap()
    with pytest.raises(Rejected):
        read_latent(npz(latents=array), "npz")
    with pytest.raises(Rejected):
        read_latent(npz(latents=LATENT, latents_flipped=array), "npz")
    assert read_latent(npz(latents=LATENT, other=array), "npz")[0].shape == (4, 6, 8)
    assert not SPRUNG
    with np.load(io.BytesIO(npz(latents=array)), allow_pickle=True) as file:
        file["latents"]
    assert SPRUNG  # the trap works


@pytest.mark.parametrize("kind", ["img_sdxl", "npz"])
def test_any_cut_and_any_flipped_byte_is_survived(kind):
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(FINE[kind][: random.integers(len(FINE[kind]))] if random.random() < 0.3 else FINE[kind])
        for place in random.integers(0, max(len(broken), 1), random.integers(4)):
            broken[place : place + 1] = random.bytes(1)
        try:
            assert np.isfinite(read_latent(bytes(broken), kind)[0]).all()
        except Rejected as error:
            assert error.reason


# Each channel's standard deviation over photographs, as published for SDXL's VAE.
SDXL = (8.4927, 5.9022, 6.5498, 5.2299)


@pytest.mark.parametrize(
    "std, factor, said",
    [
        (SDXL, 0.13025, None),
        ((5.49,) * 4, 0.18215, None),
        (SDXL, 0.18215, None),  # another VAE's, 1.4x: it cannot be told
        ((5.49,) * 4, 0.13025, None),
        ([std * 0.13025 for std in SDXL], 0.13025, "scaled before they were stored"),
        ((1.0,) * 4, 0.18215, "scale them by 0.18215 again"),
        ([std / 0.13025 for std in SDXL], 0.13025, "divided by 0.13025"),
        ((0.01,) * 4, 0.18215, "another VAE's, or damaged"),
        ((0.0,) * 4, 0.18215, "another VAE's, or damaged"),
        ((float("nan"),) * 4, 0.18215, "another VAE's, or damaged"),
        ((1.0,) * 4, 1.0, None),
    ],
)
def test_what_the_scale_says(std, factor, said):
    sentence = check_scale(std, factor)
    assert said in sentence if said else sentence is None
