"""A data set made for one test, and the real commands on it.

A caption is its image's name, so that whatever must not be trained on shows among the captions of the cache.
"""

import io
import os
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
from commandline import fastsd
from PIL import Image
from tiny import job

from fastsd.data.cache import LatentCache

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 1\nbatch = 12\noptimizer = "lion"\nlr = 1e-4\n'


class DataSet:
    """Images in `path`, their cache in `cache`, a job that trains one step of 12. `self / name` is a path among the images."""

    def __init__(self, root: Path, model: Path, monkeypatch, capsys):
        self.path, self.cache, self._fixtures = root / "images", root / "cache", {"monkeypatch": monkeypatch, "capsys": capsys}
        self.path.mkdir(parents=True)
        self.config = job(root, model, self.path, STAGE, resolution=32)
        monkeypatch.setattr("fastsd.train.precision.INTERPRETED", False)  # as a user has it

    def __truediv__(self, name: str | bytes) -> Path:
        return self.path / os.fsdecode(name)

    def put(self, name: str | bytes, data: bytes, caption: bytes | None = None) -> None:
        path = self / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if len(path.name) < 250:  # else there is no room for a longer extension
            path.with_suffix(".txt").write_bytes(path.stem.encode(errors="replace") if caption is None else caption)

    def put_good(self, *names: str | bytes) -> None:
        for seed, name in enumerate(names):
            self.put(name, png(picture(seed)))

    def end(self, *words: object) -> tuple[int, str]:
        """(exit code, what a command says: of what went wrong, if anything did)."""
        code, out, err = fastsd(*words[:1], self.config, *words[1:], "sample.prompts=[]", **self._fixtures)
        assert "Traceback" not in out + err, out + err
        return code, err if code else out

    def run(self, *words: object, code: int = 0) -> str:
        """What a command says that ends with `code`; one sentence if it is not 0."""
        ended, said = self.end(*words)
        assert ended == code, said
        assert code == 0 or (said.startswith("fastsd: ") and said.count("\n") == 1), said
        return said

    def cached(self, *keys: str) -> set[str]:
        """Captions of all that `fastsd cache` leaves to train on."""
        self.said = self.run("cache", *keys)
        with closing(LatentCache.open(self.cache)) as latents:
            assert f"{len(latents)} of " in self.said
            for group in latents.groups:
                assert latents.get(range(group.first, group.first + group.count))["latents"].isfinite().all()
            return {caption for variants in latents.variants(range(len(latents))) for caption in variants}

    def rejected(self) -> dict[str, str]:
        """Reasons by name within the folder."""
        with closing(sqlite3.connect(self.cache / "cache.sqlite")) as db:
            found = {os.fsdecode(path): reason for path, reason in db.execute("SELECT path, reason FROM rejected")}
        assert (f"{len(found)} rejected:" in self.said) == bool(found)
        return {path.removeprefix(f"{self.path}/"): reason for path, reason in found.items()}

    def check(self, good: set[str], bad: dict[str, str]) -> None:
        """`fastsd cache` keeps these captions, and gives for each of the other files a reason with these words; twice."""
        for _ in range(2):
            assert self.cached() == good
            found = self.rejected()
            assert {name: reason for name, reason in found.items() if bad.get(name, "\0") not in reason} == {}
            assert set(found) == set(bad)
        assert "0 encoded now" in self.said


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(image: Image.Image, **options) -> bytes:
    return saved(image, "PNG", **options)


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
    """An image and its caption, for `tar_of`."""
    return [(f"{key}.png", png(picture(seed)), fields), (f"{key}.txt", key.encode(), {})]
