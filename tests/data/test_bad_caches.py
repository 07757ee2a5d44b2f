"""What becomes of a cache: files change under it, disks fill, bits flip, backups come back. Nothing wrong is trained on."""

import errno
import json
import os
import shutil
import signal
from contextlib import closing, suppress
from pathlib import Path

import pytest
from caching import flip
from dataset import DataSet, picture, png, saved, shot, tar_of
from tiny import tiny_vae

from fastsd.config.schema import load_config
from fastsd.data.building import collect, pipeline
from fastsd.data.cache import LatentCache, View, freeze
from fastsd.data.tokens import Tokens
from fastsd.errors import UserError
from fastsd.model.formats.load import load_tokenizer


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    return DataSet(tmp_path, tiny_model, monkeypatch, capsys)


def test_files_that_change_between_the_search_and_the_encoding(folder, monkeypatch):
    folder.put_good("good.png", "edited.png", "deleted.png", "cut.png", "twin.png")
    shutil.copy(folder / "deleted.png", folder / "same.png")
    (folder / "same.txt").write_text("same")
    (folder / "set.tar").write_bytes(tar_of(*shot("in tar", 8)))
    fill = collect.fill

    def then_change(*arguments):
        fill(*arguments)
        (folder / "edited.png").write_bytes(png(picture(9)))
        (folder / "deleted.png").unlink()
        (folder / "cut.png").write_bytes(b"")
        (folder / "set.tar").write_bytes(tar_of(*shot("replaced", 10)))

    monkeypatch.setattr(collect, "fill", then_change)
    changed, lost = "it changed while it was being cached; run the same line again", "it cannot be read (No such file"
    assert folder.cached() == {"good", "same", "twin"}
    found = folder.rejected()
    assert found.pop("deleted.png").startswith(lost)
    assert found == dict.fromkeys(("edited.png", "cut.png", "set.tar/in tar.png"), changed)
    monkeypatch.setattr(collect, "fill", fill)
    assert folder.cached() == {"good", "same", "twin", "edited", "replaced"} and "2 encoded now" in folder.said
    assert folder.rejected() == {"cut.png": "the file is empty"}
    folder.run("cache", "--verify")


def test_a_file_that_changed_behind_its_time_stamp(folder, tmp_path):
    folder.put_good("good.png")
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    for seed, keys in ((1, ()), (2, (f"model.vae={tmp_path / 'vae'}",))):
        folder.put("sly.bmp", saved(picture(seed), "BMP"))
        os.utime(folder / "sly.bmp", (1e9, 1e9))
        found = folder.cached(*keys)
    assert found == {"good"} and "sly.bmp: it changed while it was being cached; run the same line again" in folder.said
    assert folder.cached(*keys) == {"good", "sly"}


def interrupt(monkeypatch) -> None:
    """Ctrl-C once, while the third block is encoded: the first is on its way to the disk."""
    encode, calls = pipeline.Pipeline._encode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return encode(*arguments)

    monkeypatch.setattr(pipeline.Pipeline, "_encode", interrupted)


def test_a_vae_that_is_swapped_in_between(folder, tmp_path, tiny_model, monkeypatch):
    folder.put_good(*(f"{i}.png" for i in range(24)))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    base, names = f"model.base={model}", {str(i) for i in range(24)}
    interrupt(monkeypatch)
    folder.run("cache", base, code=130)
    assert folder.cached() == names and "24 encoded now" not in folder.said
    tiny_vae(seed=1).save_pretrained(model / "vae")
    assert "holds no latents for this config; run `fastsd cache CONFIG` first" in folder.run("train", base, code=2)
    assert folder.cached(base) == names and "24 encoded now, 0 already cached" in folder.said
    folder.run("train", base)
    assert folder.cached(base, f"cache.dir={tmp_path / 'fresh'}") == names
    again, fresh = ({p.name: p.read_bytes() for p in (at / "shards").iterdir()} for at in (folder.cache, tmp_path / "fresh"))
    assert fresh.items() < again.items()  # beside the old one's
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert f"{weights}: cannot be read as safetensors" in folder.run("cache", base, code=2)


def test_a_disk_that_is_full_at_any_moment(folder, monkeypatch):
    folder.put_good(*(f"{i}.png" for i in range(20)))
    flush, left = os.fsync, 0

    def full(handle):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    for moment in range(1, 100):
        shutil.rmtree(folder.cache, ignore_errors=True)
        left = moment
        ended, said = folder.end("cache")
        assert ended == (0 if left > 0 else 2), said
        assert left > 0 or "the disk is full; free some space, and the same line again goes on" in said
        folder.run("cache")
        folder.run("cache", "--verify")
        if left > 0:
            break
    assert moment > 5


def test_a_cache_folder_that_cannot_be_one(folder, monkeypatch):
    folder.put_good("0.png", "1.png")
    folder.run("cache")
    (folder / "file").write_bytes(b"")
    for place in (folder / "file", folder / "file" / "cache"):
        assert "cannot be used" in folder.run("cache", f"cache.dir={place}", code=2)
        for option in ("--verify", "--stats", "--prune"):
            assert "is no latent cache" in folder.run("cache", option, f"cache.dir={place}", code=2)
    real = Path.open

    def read_only(path, mode="r", *rest, **options):
        if not set(mode).isdisjoint("wa+x") and folder.cache in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", read_only)
    assert "(Read-only file system); mend that or choose another folder" in folder.run("cache", code=2)
    folder.run("train")  # reads only


def test_ctrl_c_is_one_sentence_and_the_same_line_goes_on(folder, monkeypatch):
    folder.put_good(*(f"{i}.png" for i in range(30)))
    interrupt(monkeypatch)
    assert folder.run("cache", code=130).endswith("; run the same command again to continue\n")
    assert folder.cached() == {str(i) for i in range(30)}
    assert "30 of 30" in folder.said and "30 encoded now" not in folder.said
    folder.run("cache", "--verify")


def one(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap_rows(shard: Path) -> None:
    data = shard.read_bytes()
    size = (len(data) - 4096) // IMAGES
    first, second, rest = data[4096 : 4096 + size], data[4096 + size : 4096 + 2 * size], data[4096 + 2 * size :]
    shard.write_bytes(data[:4096] + second + first + rest)


def of_another_vae(shard: Path, head: bool) -> None:
    """What another VAE made of the same images under this shard's name; or only its rows, under this one's head."""
    there = one(shard.parent.parent.parent / "another" / "shards").read_bytes()
    shard.write_bytes(there if head else shard.read_bytes()[:4096] + there[4096:])


IMAGES = 12
SHARD, VIEW, TOKENS = "shards", "views", "tokens"
# What is damaged, how, what `fastsd train` says ("" = it trains, on the right bytes), and whether `fastsd cache` alone sees it;
# --verify always does.
DAMAGES = {
    "a flipped bit in a shard": (SHARD, lambda path: flip(path, -99), "row 11 is damaged; `fastsd cache", False),
    "rows that changed places": (SHARD, swap_rows, "is damaged; `fastsd cache CONFIG --verify`", False),
    "rows of zeros": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(12 * 2048)), "is damaged", False),
    "another VAE's rows": (SHARD, lambda path: of_another_vae(path, head=False), "is damaged", False),
    "another VAE's shard": (SHARD, lambda path: of_another_vae(path, head=True), "belongs to another VAE", True),
    "a flipped bit in a shard's head": (SHARD, lambda path: flip(path, 3), "is no whole latents-1 file", True),
    "a cut shard": (SHARD, cut, "is no whole latents-1 file", True),
    "an empty shard": (SHARD, lambda path: path.write_bytes(b""), "is no whole latents-1 file", True),
    "no shard": (SHARD, Path.unlink, "is missing; run `fastsd cache CONFIG` again", True),
    "no shards": (SHARD, lambda path: shutil.rmtree(path.parent), "is missing; run `fastsd cache CONFIG` again", True),
    "a flipped bit in a view's captions": (VIEW, lambda path: flip(path, -3), "does not match its sha256", True),
    "a flipped bit in a view's head": (VIEW, lambda path: flip(path, 20), "is no whole view-2 file", True),
    "a cut view": (VIEW, cut, "is no whole view-2 file", True),
    "an empty view": (VIEW, lambda path: path.write_bytes(b""), "is no whole view-2 file", True),
    "no view": (VIEW, Path.unlink, "holds no latents for this config; run `fastsd cache CONFIG` first", True),
    "a flipped bit in the token ids": (TOKENS, lambda path: flip(path, -2), "", True),
    "cut token ids": (TOKENS, cut, "", True),
    "no token ids": (TOKENS, Path.unlink, "", True),
}  # fmt: skip


def loss(folder: DataSet, run: Path) -> float:
    """That of a step on as many images."""
    folder.run("train", f"run={run}")
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["loss"]


def test_damage_is_named_never_trained_on_and_made_good(folder, tmp_path):
    folder.put_good(*(f"{i}.png" for i in range(IMAGES)))
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    alone = "cache.batch=1"  # so that a row made again has the same bytes whatever is made beside it
    folder.run("cache", alone, f"cache.dir={tmp_path / 'another'}", f"model.vae={tmp_path / 'vae'}")
    folder.run("cache", alone)
    whole = shutil.copytree(folder.cache, tmp_path / "whole")
    right = loss(folder, tmp_path / "run")
    for name, (part, damage, said, seen) in DAMAGES.items():
        print(name)
        shutil.rmtree(folder.cache)
        shutil.copytree(whole, folder.cache)
        path = one(folder.cache / part)
        damage(path)
        if said:
            told = folder.run("train", f"run={tmp_path / 'none'}", code=2)
            assert said in told and str(folder.cache if name == "no view" else path) in told
        else:
            assert loss(folder, tmp_path / name) == right
        if not seen:
            assert path.name in folder.run("cache", "--verify", code=2)
            assert "run `fastsd cache CONFIG` first" in folder.run("train", f"run={tmp_path / 'none'}", code=2)
        folder.run("cache", alone)
        folder.run("cache", "--verify")
        assert {p.name for p in whole.rglob("*")} == {p.name for p in folder.cache.rglob("*")}
        for made in folder.cache.glob("*/*.safetensors"):
            first = made.read_bytes().replace(b'"serial":"2"', b'"serial":"1"')  # counts how often a view was written
            assert first == (whole / made.relative_to(folder.cache)).read_bytes(), made


def test_backups_that_come_back(folder, tmp_path):
    folder.put_good(*(f"{i}.png" for i in range(IMAGES)))
    folder.run("cache")
    before, first = shutil.copytree(folder.cache, tmp_path / "before"), loss(folder, tmp_path / "first")
    for i in range(6):
        folder.put(f"more {i}.png", png(picture(50 + i)))
    folder.put("0.png", png(picture(60)))
    folder.run("cache")
    after, second = shutil.copytree(folder.cache, tmp_path / "after"), loss(folder, tmp_path / "second")
    names = {str(i) for i in range(IMAGES)} | {f"more {i}" for i in range(6)}

    def restored(*parts: str) -> None:
        shutil.rmtree(folder.cache)
        shutil.copytree(after, folder.cache)
        for part in parts:
            if (before / part).is_dir():
                shutil.rmtree(folder.cache / part)
                shutil.copytree(before / part, folder.cache / part)
            else:
                shutil.copy(before / part, folder.cache / part)

    def good_again(encoded: int) -> None:
        assert folder.cached() == names and f": {encoded} encoded now" in folder.said
        folder.run("cache", "--verify")
        assert loss(folder, tmp_path / "again") == second
        shutil.rmtree(tmp_path / "again")

    restored("cache.sqlite")
    assert loss(folder, tmp_path / "old database") == second
    good_again(7)
    restored("shards")
    assert "is missing; run `fastsd cache CONFIG` again" in folder.run("train", f"run={tmp_path / 'none'}", code=2)
    good_again(7)
    restored("views", "tokens")
    assert loss(folder, tmp_path / "old view") == first
    good_again(0)
    restored("tokens")
    assert loss(folder, tmp_path / "old tokens") == second
    good_again(0)
    for damage in (lambda path: path.write_bytes(b"these are not the bytes of a database\n" * 999), cut):
        restored()
        damage(folder.cache / "cache.sqlite")
        assert loss(folder, tmp_path / damage.__name__) == second
        for option in ([], ["--verify"], ["--stats"], ["--prune"]):
            assert "delete it, and `fastsd cache CONFIG` encodes the images anew" in folder.run("cache", *option, code=2)
        (folder.cache / "cache.sqlite").unlink()
        good_again(18)
        folder.run("cache", "--prune")
        good_again(0)


def test_no_bit_of_an_index_flips_unseen(folder):
    """What says where latents lie, and the captions' token ids: read as they were written or not at all, and made again."""
    folder.put_good(*(f"{i}.png" for i in range(4)))
    folder.run("cache")
    tokenizer = load_tokenizer(load_config(folder.config).model)[0]
    view, ids = one(folder.cache / VIEW), one(folder.cache / TOKENS)

    def read_view() -> object:
        found = View(view)
        return found.meta, found.groups, found.shards, {name: array.tobytes() for name, array in found.arrays.items()}

    def read_ids() -> object:
        found = Tokens(latents, tokenizer, 77)
        return [found.row(i, 0).tolist() for i in range(4)]

    with closing(LatentCache.open(folder.cache)) as latents:
        for path, read in ((view, read_view), (ids, read_ids)):
            whole, right = path.read_bytes(), read()
            for at in range(0, len(whole), 5):
                flip(path, at)
                with suppress(UserError):
                    assert read() == right, (path, at)
                path.write_bytes(whole)
    found = View(view)
    arrays = {name: array.copy() for name, array in found.arrays.items()}
    for at in range(0, view.stat().st_size, 50):
        flip(view, at)
        freeze(folder.cache, view.stem, arrays, found.shards, found.groups, found.meta)
        assert View(view).metadata["sha256"] == found.metadata["sha256"]
