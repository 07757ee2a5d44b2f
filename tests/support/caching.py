"""Pictures, configs and a stub of a VAE that fill caches, and a stub of a cache."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastsd.config.schema import parse_config
from fastsd.data.building.buckets import Buckets
from fastsd.data.building.decode import decode, probe
from fastsd.model.latent_space import LatentSpace

R = 32  # resolution, px


class StubVae:
    """A VAE that pools and projects pixels, so that an image's latents do not depend on its batch."""

    name, channels, downscale = "stub", 4, 8

    def __init__(self, key="stub", scaling_factor=0.5, delay=0.0):
        self.hash, self.latent_space, self.delay = key, LatentSpace(scaling_factor), delay
        self.encoded = 0  # images

    def encode(self, images_B3RR):
        assert images_B3RR.dtype == torch.float32 and images_B3RR.abs().max() <= 1
        self.encoded += len(images_B3RR)
        time.sleep(self.delay)
        weight = torch.linspace(-1, 1, 12).reshape(4, 3, 1, 1)
        pooled = F.avg_pool2d(images_B3RR, self.downscale)
        return (pooled[:, None] * weight[None, :, :, 0, 0, None, None]).sum(2)


def config(root, folders=("images",), **cache_keys):
    raw = {
        "model": {"base": "none"},
        "data": {"folders": [str(root / folder) for folder in folders], "resolution": R},
        "cache": {"dir": str(root / "cache"), "batch": 4, "workers": 2} | cache_keys,
        "stage": [{"train": ["unet"], "until": 1}],
    }
    return parse_config(raw, "test")


def draw(path, seed, caption="a picture", size=(36, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def draw_many(root, count=10):
    for i in range(count):
        draw(root / f"images/{i:03}.png", i, f"picture {i}")


def expected(path, vae=None):
    """Return the latents that the cache must hold for an image."""
    data = path.read_bytes()
    pixels = torch.from_numpy(decode(data, Buckets(R, None).place(*probe(data))))[None].float() / 127.5 - 1
    return (vae or StubVae()).encode(pixels)[0]


def shard_bytes(root):
    return {path.name: path.read_bytes() for path in (root / "cache/shards").iterdir()}


def flip(path, at):
    """Flip one bit of the byte at an offset, which counts from the end if it is negative."""
    with path.open("r+b") as file:
        file.seek(at, 0 if at >= 0 else 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 4]))


class Texts:
    """A stub of a cache that holds only captions."""

    def __init__(self, variants, folder=Path(), sha256="1", copies=1):
        self.path, self.all, self.sha256, self.copies = folder / "views/view.safetensors", variants, sha256, copies

    def __len__(self):
        return len(self.all) * self.copies

    def variants(self, positions):
        return [list(self.all[i % len(self.all)]) for i in positions]


def with_data(root, **keys):
    """Return `config(root)` with other keys in its table `[data]`."""
    plain = config(root)
    return type(plain).model_validate(plain.model_dump(by_alias=True) | {"data": plain.data.model_dump() | keys})


BUCKETS = {"min": 16, "max": 64, "step": 8, "no_upscale": False}
