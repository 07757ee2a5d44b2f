"""A dataset for a single test, and the real commands on it.

Each caption is the name of its image. So the captions in the cache show which images are trained on.
"""

import io
import os
import re
import sqlite3
import struct
import tarfile
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
from commandline import fastsd
from PIL import Image
from sentences import says
from tiny import job

from fastsd.data.cache import LatentCache

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1\nbatch = 12\noptimizer = "lion"\nlr = 1e-4\n'


class DataSet:
    """Images in `path`, their cache in `cache`, and a job of one step with batch 12. `self / name` is an image's path."""

    def __init__(self, root: Path, model: Path, monkeypatch, capsys):
        self.path, self.cache = root / "images", root / "cache"
        self._fixtures = {"monkeypatch": monkeypatch, "capsys": capsys}
        self.path.mkdir(parents=True)
        self.config = job(root, model, self.path, STAGE, resolution=32)
        monkeypatch.setattr("fastsd.train.device.INTERPRETED", False)  # choose the precision as in a real run

    def __truediv__(self, name: str | bytes) -> Path:
        return self.path / os.fsdecode(name)

    def put(self, name: str | bytes, data: bytes, caption: bytes | None = None) -> None:
        path = self / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if len(path.name) < 250:  # a file name may have 255 bytes
            path.with_suffix(".txt").write_bytes(path.stem.encode(errors="replace") if caption is None else caption)

    def put_good(self, *names: str | bytes) -> None:
        for seed, name in enumerate(names):
            self.put(name, png(picture(seed)))

    def end(self, *words: object) -> tuple[int, str]:
        """Run a command. Return its exit code, and its stdout, or stderr if it failed."""
        code, out, err = fastsd(*words[:1], self.config, *words[1:], "sample.prompts=[]", **self._fixtures)
        assert "Traceback" not in out + err, out + err
        return code, err if code else out

    def run(self, *words: object, code: int = 0) -> str:
        """Return the output of a command that must end with `code`. If that is not 0, the output must be one line."""
        exit_code, out = self.end(*words)
        assert exit_code == code, out
        assert code == 0 or (out.startswith("fastsd: ") and out.count("\n") == 1), out
        return out

    def cached(self, *keys: str) -> set[str]:
        """Run `fastsd cache` and keep its output in `self.out`. Return the captions of all cached samples."""
        self.out = self.run("cache", *keys)
        with closing(LatentCache.open(self.cache)) as latents:
            assert f"{len(latents)} of " in self.out
            for group in latents.groups:
                assert latents.get(range(group.first, group.first + group.count))["latents"].isfinite().all()
            return {caption for variants in latents.variants(range(len(latents))) for caption in variants}

    def rejected(self) -> dict[str, str]:
        """Return the reason for every rejected file, by its path within the folder."""
        with closing(sqlite3.connect(self.cache / "cache.sqlite")) as db:
            reasons = {os.fsdecode(path): reason for path, reason in db.execute("SELECT path, reason FROM rejected")}
        assert (f"{len(reasons)} rejected:" in self.out) == bool(reasons)
        return {path.removeprefix(f"{self.path}/"): reason for path, reason in reasons.items()}

    def check(self, good: set[str], bad: dict[str, str | re.Pattern[str]]) -> None:
        """Assert that `fastsd cache`, run twice, keeps the captions `good` and rejects the files `bad` for matching reasons."""
        for _ in range(2):
            assert self.cached() == good
            reasons = self.rejected()
            assert set(reasons) == set(bad)
            assert all(re.search(bad[name], reason) for name, reason in reasons.items()), reasons
        assert says(self.out, "images-cached", encoded=0)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def denied(*args: object) -> None:
    raise PermissionError(13, "Permission denied")


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(image: Image.Image, **options) -> bytes:
    return saved(image, "PNG", **options)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_by_hand(width: int, height: int, bits: int, colour: int, lines: bytes, *chunks: bytes) -> bytes:
    """Make a PNG from compressed `lines`. `bits`: per sample. `colour`: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def tar_of(*members: tuple[str, bytes, dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shot(key: str, seed: int, **fields: object) -> list[tuple[str, bytes, dict[str, object]]]:
    """Return an image and its caption as members for `tar_of`."""
    return [(f"{key}.png", png(picture(seed)), fields), (f"{key}.txt", key.encode(), {})]
