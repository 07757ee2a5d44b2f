"""Caches whose files change, are damaged or come from a backup, and full disks. No wrong latent is trained on."""

import errno
import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from caching import flip
from dataset import DataSet, picture, png, saved, shot, tar_of
from sentences import pattern, says, sentence
from tiny import tiny_vae

from fastsd.config.schema import load_config
from fastsd.data.building import collect, pipeline
from fastsd.data.cache import LatentCache, View, freeze, view_place
from fastsd.data.sources import folders
from fastsd.data.tokens import Tokens
from fastsd.errors import UserError
from fastsd.model.formats.load import load_tokenizer


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    return DataSet(tmp_path, tiny_model, monkeypatch, capsys)


def test_files_that_change_before_encoding_are_rejected(folder, monkeypatch):
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
    assert folder.cached() == {"good", "same", "twin"}
    reasons = folder.rejected()
    assert says(reasons.pop("deleted.png"), "file-unreadable", cause=os.strerror(errno.ENOENT))
    assert reasons == dict.fromkeys(("edited.png", "cut.png", "set.tar/in tar.png"), sentence("file-changed"))
    monkeypatch.setattr(collect, "fill", fill)
    assert folder.cached() == {"good", "same", "twin", "edited", "replaced"} and says(folder.out, "images-cached", encoded=2)
    assert folder.rejected() == {"cut.png": sentence("file-empty")}
    folder.run("cache", "--verify")


def test_a_file_that_changed_but_kept_its_size_and_mtime_is_read_again(folder):
    folder.put_good("good.png")
    good, broken = saved(picture(1), "BMP"), b"no image".ljust(len(saved(picture(1), "BMP")))
    for data, captions, encoded in ((good, {"good", "sly"}, 2), (saved(picture(2), "BMP"), {"good", "sly"}, 1)):
        folder.put("sly.bmp", data)
        os.utime(folder / "sly.bmp", (1e9, 1e9))
        assert folder.cached() == captions and says(folder.out, "images-cached", encoded=encoded)
    for data, captions in ((broken, {"good"}), (good, {"good", "sly"})):
        folder.put("sly.bmp", data)
        os.utime(folder / "sly.bmp", (1e9, 1e9))
        assert folder.cached() == captions and says(folder.out, "images-cached", encoded=0)


def test_facts_of_an_earlier_version_hold_and_are_renewed(folder, monkeypatch):
    monkeypatch.setattr(collect, "_YOUNG_NS", 0)
    folder.put_good("0.png", "1.png")
    folder.put("bad.png", b"no image")
    folder.cached()
    with closing(sqlite3.connect(folder.cache / "cache.sqlite")) as db:
        times = dict(db.execute("SELECT path, mtime_ns FROM file UNION SELECT path, mtime_ns FROM rejected"))
        for table in ("file", "rejected"):
            for (path,) in db.execute(f"SELECT path FROM {table}").fetchall():
                db.execute(f"UPDATE {table} SET mtime_ns = ? WHERE path = ?", (os.stat(path).st_mtime_ns, path))
        db.commit()
    reads = []
    monkeypatch.setattr(folders, "read_bytes", lambda source: reads.append(source.path))
    folder.cached()
    assert not reads and len(times) == 3
    with closing(sqlite3.connect(folder.cache / "cache.sqlite")) as db:
        assert dict(db.execute("SELECT path, mtime_ns FROM file UNION SELECT path, mtime_ns FROM rejected")) == times


def interrupt(monkeypatch) -> None:
    """Press Ctrl-C once, while the third block is being encoded."""
    encode, calls = pipeline.Pipeline._encode, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return encode(*arguments)

    monkeypatch.setattr(pipeline.Pipeline, "_encode", interrupted)


def test_the_vae_of_an_interrupted_cache_may_be_swapped(folder, tmp_path, tiny_model, monkeypatch):
    folder.put_good(*(f"{i}.png" for i in range(24)))
    model = shutil.copytree(tiny_model, tmp_path / "model")
    base, names = f"model.base={model}", {str(i) for i in range(24)}
    interrupt(monkeypatch)
    folder.run("cache", base, code=130)
    assert folder.cached() == names and not says(folder.out, "images-cached", encoded=24)
    tiny_vae(seed=1).save_pretrained(model / "vae")
    assert says(folder.run("train", base, code=2), "no-view")
    assert folder.cached(base) == names and says(folder.out, "images-cached", encoded=24, present=0)
    folder.run("train", base)
    assert folder.cached(base, f"cache.dir={tmp_path / 'fresh'}") == names
    caches = folder.cache, tmp_path / "fresh"
    rebuilt, fresh = ({p.name: p.read_bytes() for p in (path / "shards").iterdir()} for path in caches)
    assert fresh.items() < rebuilt.items()  # the cache still has the shards of the old VAE
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert says(folder.run("cache", base, code=2), "safetensors-unreadable", path=weights)


@pytest.mark.slow
def test_caching_continues_after_a_full_disk_at_any_moment(folder, monkeypatch):
    folder.put_good(*(f"{i}.png" for i in range(20)))
    flush, calls_left = os.fsync, 0

    def full(handle):
        nonlocal calls_left
        calls_left -= 1
        if calls_left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    for moment in range(1, 100):
        shutil.rmtree(folder.cache, ignore_errors=True)
        calls_left = moment
        exit_code, out = folder.end("cache")
        assert exit_code == (0 if calls_left > 0 else 2), out
        assert calls_left > 0 or says(out, "cache-disk-full", folder=folder.cache)
        folder.run("cache")
        folder.run("cache", "--verify")
        if calls_left > 0:
            break
    assert moment > 5


def test_unusable_cache_folders_are_refused(folder, monkeypatch):
    folder.put_good("0.png", "1.png")
    folder.run("cache")
    (folder / "file").write_bytes(b"")
    for directory in (folder / "file", folder / "file" / "cache"):
        assert says(folder.run("cache", f"cache.dir={directory}", code=2), "cache-unusable", folder=directory)
        for option in ("--verify", "--stats", "--prune"):
            assert says(folder.run("cache", option, f"cache.dir={directory}", code=2), "no-cache", folder=directory)
    real_open = Path.open

    def read_only(path, mode="r", *rest, **options):
        if not set(mode).isdisjoint("wa+x") and folder.cache in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real_open(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", read_only)
    assert says(folder.run("cache", code=2), "cache-unusable", problem=os.strerror(errno.EROFS))
    folder.run("train")  # does not write to the cache


def test_caching_continues_after_ctrl_c(folder, monkeypatch):
    folder.put_good(*(f"{i}.png" for i in range(30)))
    interrupt(monkeypatch)
    assert says(folder.run("cache", code=130), "caching-stopped")
    assert folder.cached() == {str(i) for i in range(30)}
    assert "30 of 30" in folder.out and not says(folder.out, "images-cached", encoded=30)
    folder.run("cache", "--verify")


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap_rows(shard: Path) -> None:
    data = shard.read_bytes()
    size = (len(data) - 4096) // IMAGES
    first, second, rest = data[4096 : 4096 + size], data[4096 + size : 4096 + 2 * size], data[4096 + 2 * size :]
    shard.write_bytes(data[:4096] + second + first + rest)


def copy_other_vae(shard: Path, header: bool) -> None:
    """Replace a shard by that of another VAE for the same images. Without `header`, replace only its rows."""
    other = only_file(shard.parent.parent.parent / "another" / "shards").read_bytes()
    shard.write_bytes(other if header else shard.read_bytes()[:4096] + other[4096:])


IMAGES = 12
SHARD, VIEW, TOKENS = "shards", "views", "tokens"
# Each entry has the folder of the damaged file, the damage, the error of `fastsd train` (None = it trains on the right bytes),
# and whether `fastsd cache` detects the damage without --verify, which always does.
VIEW_FORMAT, SHARD_FORMAT = (pattern("damage-format", format=name) for name in ("view-2", "latents-1"))
ROW, MISSING = pattern("row-damaged"), pattern("frozen-file-damaged", damage=sentence("damage-missing"))
DAMAGES = {
    "a flipped bit in a shard": (SHARD, lambda path: flip(path, -99), pattern("row-damaged", row=11), False),
    "rows that changed places": (SHARD, swap_rows, ROW, False),
    "rows of zeros": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:4096] + bytes(12 * 2048)), ROW, False),
    "another VAE's rows": (SHARD, lambda path: copy_other_vae(path, header=False), ROW, False),
    "another VAE's shard": (SHARD, lambda path: copy_other_vae(path, header=True), pattern("damage-belongs-elsewhere"), True),
    "a flipped bit in a shard's header": (SHARD, lambda path: flip(path, 3), SHARD_FORMAT, True),
    "a cut shard": (SHARD, cut, SHARD_FORMAT, True),
    "an empty shard": (SHARD, lambda path: path.write_bytes(b""), SHARD_FORMAT, True),
    "no shard": (SHARD, Path.unlink, MISSING, True),
    "no shards": (SHARD, lambda path: shutil.rmtree(path.parent), MISSING, True),
    "a flipped bit in a view's captions": (VIEW, lambda path: flip(path, -3), pattern("damage-sha256"), True),
    "a flipped bit in a view's header": (VIEW, lambda path: flip(path, 20), VIEW_FORMAT, True),
    "a cut view": (VIEW, cut, VIEW_FORMAT, True),
    "an empty view": (VIEW, lambda path: path.write_bytes(b""), VIEW_FORMAT, True),
    "no view": (VIEW, Path.unlink, pattern("no-view"), True),
    "a flipped bit in the token ids": (TOKENS, lambda path: flip(path, -2), None, True),
    "cut token ids": (TOKENS, cut, None, True),
    "no token ids": (TOKENS, Path.unlink, None, True),
}


def loss(folder: DataSet, run: Path) -> float:
    """Return the loss of one step. Its output is kept in `folder.out`."""
    folder.out = folder.run("train", f"run={run}")
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["loss"]


@pytest.mark.slow
def test_damage_is_reported_never_trained_on_and_repaired(folder, tmp_path):
    folder.put_good(*(f"{i}.png" for i in range(IMAGES)))
    tiny_vae(seed=1).save_pretrained(tmp_path / "vae")
    batch = "cache.batch=1"  # a row has the same bytes for any rows that are encoded with it
    folder.run("cache", batch, f"cache.dir={tmp_path / 'another'}", f"model.vae={tmp_path / 'vae'}")
    folder.run("cache", batch)
    intact = shutil.copytree(folder.cache, tmp_path / "intact")
    right_loss = loss(folder, tmp_path / "run")
    for name, (subfolder, damage, message, is_detected) in DAMAGES.items():
        print(name)
        shutil.rmtree(folder.cache)
        shutil.copytree(intact, folder.cache)
        path = only_file(folder.cache / subfolder)
        damage(path)
        if message:
            out = folder.run("train", f"run={tmp_path / 'none'}", code=2)
            assert message.search(out) and str(folder.cache if name == "no view" else path) in out
        else:
            assert loss(folder, tmp_path / name) == right_loss and says(folder.out, "captions-tokenized", reason=path)
        if not is_detected:
            assert path.name in folder.run("cache", "--verify", code=2)
            assert says(folder.run("train", f"run={tmp_path / 'none'}", code=2), "no-view")
        folder.run("cache", batch)
        folder.run("cache", "--verify")
        assert {p.name for p in intact.rglob("*")} == {p.name for p in folder.cache.rglob("*")}
        for file in folder.cache.glob("*/*.safetensors"):
            content = file.read_bytes().replace(b'"serial":"2"', b'"serial":"1"')  # counts how often a view was written
            assert content == (intact / file.relative_to(folder.cache)).read_bytes(), file


@pytest.mark.slow
def test_restored_backups_are_brought_up_to_date(folder, tmp_path):
    folder.put_good(*(f"{i}.png" for i in range(IMAGES)))
    folder.run("cache")
    before, first_loss = shutil.copytree(folder.cache, tmp_path / "before"), loss(folder, tmp_path / "first")
    for i in range(6):
        folder.put(f"more {i}.png", png(picture(50 + i)))
    folder.put("0.png", png(picture(60)))
    folder.run("cache")
    after, second_loss = shutil.copytree(folder.cache, tmp_path / "after"), loss(folder, tmp_path / "second")
    names = {str(i) for i in range(IMAGES)} | {f"more {i}" for i in range(6)}

    def restore(*files: str) -> None:
        shutil.rmtree(folder.cache)
        shutil.copytree(after, folder.cache)
        for name in files:
            if (before / name).is_dir():
                shutil.rmtree(folder.cache / name)
                shutil.copytree(before / name, folder.cache / name)
            else:
                shutil.copy(before / name, folder.cache / name)

    def assert_repaired(encoded: int) -> None:
        assert folder.cached() == names and says(folder.out, "images-cached", encoded=encoded)
        folder.run("cache", "--verify")
        assert loss(folder, tmp_path / "again") == second_loss
        shutil.rmtree(tmp_path / "again")

    restore("cache.sqlite")
    assert loss(folder, tmp_path / "old database") == second_loss
    assert_repaired(7)
    restore("shards")
    assert MISSING.search(folder.run("train", f"run={tmp_path / 'none'}", code=2))
    assert_repaired(7)
    restore("views", "tokens")
    assert loss(folder, tmp_path / "old view") == first_loss
    assert_repaired(0)
    restore("tokens")
    assert loss(folder, tmp_path / "old tokens") == second_loss
    assert_repaired(0)
    for damage in (lambda path: path.write_bytes(b"these are not the bytes of a database\n" * 999), cut):
        restore()
        damage(folder.cache / "cache.sqlite")
        assert loss(folder, tmp_path / damage.__name__) == second_loss
        for option in ([], ["--verify"], ["--stats"], ["--prune"]):
            assert says(folder.run("cache", *option, code=2), "cache-database-damaged", folder=folder.cache)
        (folder.cache / "cache.sqlite").unlink()
        assert_repaired(18)
        folder.run("cache", "--prune")
        assert_repaired(0)


def test_every_flipped_bit_of_an_index_is_detected(folder):
    """Flipped bits make a view or a file of token ids unreadable, or change nothing. A damaged view is written again."""
    folder.put_good(*(f"{i}.png" for i in range(4)))
    folder.run("cache")
    tokenizer = load_tokenizer(load_config(folder.config).model)[0]
    view, ids = only_file(folder.cache / VIEW), only_file(folder.cache / TOKENS)

    def read_view() -> object:
        index = View(view)
        return index.meta, index.groups, index.shards, {name: array.tobytes() for name, array in index.arrays.items()}

    def read_ids() -> object:
        tokens = Tokens(latents, tokenizer, 77)
        return [tokens.row(i, 0).tolist() for i in range(4)]

    with closing(LatentCache.open(folder.cache)) as latents:
        for path, read in ((view, read_view), (ids, read_ids)):
            data, content = path.read_bytes(), read()
            for offset in range(0, len(data), 5):
                flip(path, offset)
                with suppress(UserError):
                    assert read() == content, (path, offset)
                path.write_bytes(data)
    index = View(view)
    arrays = {name: array.copy() for name, array in index.arrays.items()}
    place = view_place(view)
    for offset in range(0, view.stat().st_size, 50):
        flip(view, offset)
        freeze(folder.cache, view.stem, arrays, index.shards, index.groups, index.meta, place)
        assert View(view).metadata["sha256"] == index.metadata["sha256"] and view_place(view) == place
