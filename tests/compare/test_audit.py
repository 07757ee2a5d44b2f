"""`fastsd cache --audit`: errors by their formulas, the order of images with known detail, interruptions, bad input."""

import html.parser
import os
import re
import shutil
import signal
import sqlite3
import time
from contextlib import closing, suppress

import numpy as np
import pytest
import torch
from dataset import DataSet, picture, png, shot, tar_of
from detailed_images import photograph
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from sentences import says
from tiny import tiny_vae

from fastsd.config.schema import ModelTable
from fastsd.data.building.buckets import Buckets
from fastsd.data.building.decode import decode, probe
from fastsd.data.building.round_trip import Audit, Distortion, Result, distortion, largest
from fastsd.demo.demo import MODELS
from fastsd.model.formats.load import load_vae
from fastsd.model.vae import Vae

COUNT = 7


@pytest.fixture
def data(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    data = DataSet(tmp_path, tiny_model, monkeypatch, capsys)
    data.put_good(*(f"{i}.png" for i in range(COUNT)))
    return data


@pytest.fixture
def other_vae(tmp_path):
    """A VAE of the same shapes with other weights."""
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def files(data, by_fine=None):
    """Return the files of all audits of a cache by name, or of those sorted by either measure."""
    texts = {path.name: path.read_text() for path in (data.cache / "audit").iterdir()}
    return {name: text for name, text in texts.items() if by_fine in (None, "-fine" in name)}


def table(data, comparison=False, by_fine=False):
    """Return the head and the rows of an audit's table, of one VAE or of two."""
    tables = {name.replace("-fine", ""): text for name, text in files(data, by_fine).items() if name.endswith(".tsv")}
    (text,) = (text for name, text in tables.items() if ("-" in name) == comparison)
    head, *rows = (line.split("\t") for line in text.splitlines())
    return head, [dict(zip(head, row, strict=True)) for row in rows]


def names(rows):
    return [os.path.basename(row["# path"]) for row in rows]


@pytest.mark.parametrize("width, height", [(64, 64), (100, 70), (8, 130)])
def test_errors_follow_their_formulas(width, height):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, height, width), dtype=np.uint8)
    y = rng.uniform(-1, 1, (3, height, width))
    d = (y + 1) * 127.5 - x
    padded = np.pad(d, ((0, 0), (1, 1), (1, 1)), "edge")
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    shifted = [weights[i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    expected = [np.abs(d), np.abs(d - sum(shifted))]
    measured = distortion(torch.from_numpy(x), torch.from_numpy(y).float())
    assert [measured.error, measured.fine] == pytest.approx([values.mean() for values in expected], rel=1e-5)
    assert measured.tiles.shape == (2, -(-height // 64), -(-width // 64))
    for values, tiles in zip(expected, measured.tiles, strict=True):
        for (row, column), error in np.ndenumerate(tiles):
            tile = values[:, row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
            assert error == pytest.approx(tile.mean(), rel=1e-3)


def test_flat_errors_are_not_fine_and_a_checkerboard_is():
    grey, board = torch.full((3, 32, 32), 128, dtype=torch.uint8), torch.ones(32, 32)
    board[::2, ::2] = board[1::2, 1::2] = -1
    flat = distortion(grey, torch.full((3, 32, 32), 0.1))
    fine = distortion(grey, (128 + 10 * board).expand(3, -1, -1) / 127.5 - 1)
    assert flat.error == pytest.approx(12.25, abs=1e-3) and flat.fine < 1e-4
    assert fine.error == pytest.approx(10, abs=1e-3) and fine.fine == pytest.approx(10, abs=0.2)


def test_the_measure_that_sorts_also_chooses_the_tile():
    first, second = ([[[5, 2, 1]], [[1, 2, 3]]], [[[1, 9, 1]], [[2, 2, 0]]])
    distortions = [Distortion(*np.mean(tiles, (1, 2)), np.array(tiles, np.float16)) for tiles in (first, second)]
    for by, places, gain in (("error", [(0, 0), (0, 1)], 1), ("fine", [(0, 2), (0, 0)], -2 / 3)):
        result = Result(None, (192, 64), tuple(distortions), by)
        assert [largest(tiles) for tiles in result.tiles] == places and result.gain == pytest.approx(gain)


@pytest.mark.parametrize("is_cached", [False, True])
def test_each_image_has_the_error_of_its_crop(data, tiny_model, monkeypatch, is_cached):
    data.put("wide.png", png(picture(9, 60, 40)))
    if is_cached:
        data.cached()
        monkeypatch.setattr(Vae, "encode", lambda *_: pytest.fail("latents are encoded a second time"))
    out = data.run("cache", "--audit")
    assert says(out, "images-audited", count=COUNT + 1, measured=COUNT + 1, present=0)
    monkeypatch.undo()
    vae = load_vae(ModelTable(base=str(tiny_model)))
    expected = {}
    for path in data.path.glob("*.png"):
        pixels = decode(path.read_bytes(), Buckets(32, None).place(*probe(path.read_bytes())))
        mean = vae.encode(torch.from_numpy(pixels)[None].float() / 127.5 - 1).half().float()
        expected[str(path)] = float(((vae.decode(vae.scale(mean))[0] + 1) * 127.5 - torch.from_numpy(pixels)).abs().mean())
    _, rows = table(data)
    assert [row["# path"] for row in rows] == sorted(expected, key=lambda path: -expected[path])
    assert all(float(row["error"]) == pytest.approx(expected[row["# path"]], abs=2e-3) for row in rows)
    assert all((row["width"], row["height"]) == ("32", "32") and float(row["tiles"]) >= 0 for row in rows)
    errors = sorted(expected.values())
    assert says(out, "audit-errors", vae="tiny", worst=f"{errors[-1]:.2f}", median=f"{np.median(errors):.2f}")
    assert not is_cached or data.cached() == {*map(str, range(COUNT)), "wide"}


def test_the_images_with_most_fine_detail_are_worst(tmp_path, tiny_model, monkeypatch, capsys):
    """24 pictures like photographs, on a VAE that was trained on flat shapes. Three of them are pages of small text."""
    data = DataSet(tmp_path, tiny_model, monkeypatch, capsys)
    shares = np.random.default_rng(0).permutation(np.linspace(0, 0.5, 24))
    pages = [3, 11, 20]
    shares[pages] = 1
    for number, share in enumerate(shares):
        data.put(f"{number:02}.png", png(photograph(number, share, 64, 64)))
    words = "cache", "--audit", "--worst", "3", f"model.base={MODELS / 'base'}", "data.resolution=64"
    out = data.run(*words, "--by", "fine")
    _, rows = table(data, by_fine=True)
    fine = {int(name[:2]): float(row["fine"]) for name, row in zip(names(rows), rows, strict=True)}
    assert sorted(sorted(fine, key=lambda number: -fine[number])[:3]) == pages
    ranks = [np.argsort(np.argsort(values)) for values in (shares, [fine[number] for number in range(24)])]
    assert np.corrcoef(*ranks)[0, 1] > 0.9

    listed = data.cache / "audit" / next(name for name in files(data, by_fine=True) if name.endswith("-worst.txt"))
    assert says(out, "audit-exclude", count=3, path=listed)
    head, *lines = listed.read_text().splitlines()
    assert head == "# path\tfine" and sorted(int(os.path.basename(line)[:2]) for line in lines) == pages
    assert [line.split("\t")[0] for line in lines] == [row["# path"] for row in rows[:3]]
    (page,) = (text for name, text in files(data, by_fine=True).items() if name.endswith(".html"))
    assert "Sorted by the fine error." in page and "How many images have which fine error." in page


def test_interruptions_lose_a_batch_and_change_no_bit(data, monkeypatch, other_vae):
    words = "cache", "--audit", "--against", other_vae, "cache.batch=2"
    data.run(*words)
    whole = files(data)
    shutil.rmtree(data.cache)

    reconstruct, calls = Audit.reconstruct, []

    def reconstruct_or_stop(self, *arguments):
        calls.append(arguments)
        if len(calls) % 8 == 0:  # of two calls per image
            raise KeyboardInterrupt
        return reconstruct(self, *arguments)

    monkeypatch.setattr(Audit, "reconstruct", reconstruct_or_stop)
    for done in (2, 4, COUNT):  # the last one stops while the page is drawn
        code, out = data.end(*words)
        assert code == 130 and says(out, "audit-stopped", dir=data.cache)
        with closing(sqlite3.connect(data.cache / "cache.sqlite")) as db:
            assert db.execute("SELECT COUNT(*) FROM audit").fetchone() == (2 * done,)
    monkeypatch.undo()
    assert says(data.run(*words), "images-audited", count=COUNT, measured=0, present=COUNT)
    assert files(data) == whole


def results(data):
    """Return the number of results in a cache that another process may be making."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(data.cache / "cache.sqlite")) as db:
        return db.execute("SELECT COUNT(*) FROM audit").fetchone()[0]
    return 0


@pytest.mark.slow
def test_a_killed_audit_continues(data, start, tmp_path):
    data.run("cache", "--audit")
    whole = files(data)
    shutil.rmtree(data.cache)
    process = start(tmp_path / "out.txt", "cache", str(data.config), "--audit", "cache.batch=1", "sample.prompts=[]")
    while not results(data) and process.is_alive():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    present = results(data)
    assert says(data.run("cache", "--audit"), "images-audited", measured=COUNT - present, present=present) and present
    assert files(data) == whole


class Tags(html.parser.HTMLParser):
    """Count the elements of a page, and collect the alternative texts of its pictures."""

    def __init__(self, text):
        super().__init__()
        self.counts, self.alts, self.headings = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.alts += [value for key, value in attributes if key == "alt"]


def test_two_vaes_are_compared_by_gain(data, other_vae):
    out = data.run("cache", "--audit", "--against", other_vae, "--worst", "4")
    _, rows = table(data, comparison=True)
    gains = [float(row["gain"]) for row in rows]
    assert len(rows) == COUNT and gains == sorted(gains, reverse=True)
    for row in rows:
        assert float(row["gain"]) == pytest.approx(float(row["against_error"]) - float(row["error"]), abs=2e-3)
    better = sum(gain > 0 for gain in gains)
    worst = next((data.cache / "audit").glob("*-worst.txt"))
    assert says(out, "audit-exclude", count=4, path=worst) and says(out, "audit-files", page=f"{worst}"[:-10] + ".html")
    share, other = f"{better / COUNT:.0%}", f"{(COUNT - better) / COUNT:.0%}"
    assert says(out, "audit-shares", share=share, first="tiny", other=other, second="other", gain=f"{np.median(gains):+.2f}")
    (page,) = (text for name, text in files(data).items() if name.endswith(".html"))
    assert re.findall(r"<h2>(.*?)</h2>", page)[2:] == ["Better with tiny", "Better with other", "Worst images"]
    tags = Tags(page)
    assert tags.counts["article"] == min(1, better) + min(1, COUNT - better) + 2
    assert tags.counts["img"] == 10 * tags.counts["article"] and all(tags.alts)

    # The result of the config's VAE is there already, and does not depend on the other VAE.
    assert says(data.run("cache", "--audit"), "images-audited", measured=0, present=COUNT)
    _, alone = table(data)
    assert {row["# path"]: row["error"] for row in alone} == {row["# path"]: row["error"] for row in rows}

    out = data.run("cache", "--audit", "--against", other_vae, "--by", "fine", "--worst", "4")
    assert says(out, "images-audited", measured=0, present=COUNT)
    _, by_fine = table(data, comparison=True, by_fine=True)
    gains = [float(row["against_fine"]) - float(row["fine"]) for row in by_fine]
    assert [float(row["gain"]) for row in by_fine] == pytest.approx(gains, abs=2e-3) and gains == sorted(gains, reverse=True)
    better, other = (f"{sum(sign * gain > 0 for gain in gains) / COUNT:.0%}" for sign in (1, -1))
    assert says(out, "audit-shares", share=better, other=other, gain=f"{np.median(gains):+.2f}")


def test_vaes_that_differ_in_their_decoders_are_told_from_each_other(data, tiny_model, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    vae.decoder.conv_out.bias.data += 0.2
    vae.save_pretrained(tmp_path / "decoder")
    data.run("cache", "--audit", "--against", tmp_path / "decoder")
    _, rows = table(data, comparison=True)
    assert all(float(row["gain"]) != 0 for row in rows)


def test_folders_tars_buckets_and_masks(data, tmp_path):
    """A mask changes nothing. The list of the worst images excludes them, also from the next audit."""
    data.put("more/tall.png", png(picture(20, 40, 60)))
    data.put("more/tall-mask.png", png(Image.new("L", (40, 60))), b"")
    (data / "more/tall-mask.txt").unlink()
    (tmp_path / "t.tar").write_bytes(tar_of(*shot("m", 8)))
    keys = [f'data.folders=["{data.path}", "{tmp_path / "t.tar"}"]', "data.buckets={min = 16, max = 64, step = 8}"]
    data.run("cache", "--audit", "--worst", "2", *keys)
    _, rows = table(data)
    sizes = dict(zip(names(rows), [(row["width"], row["height"]) for row in rows], strict=True))
    assert sizes["tall.png"] == ("24", "40") and sizes["m.png"] == ("32", "32") and len(rows) == COUNT + 3
    plain = {row["# path"]: row["error"] for row in rows}
    out = data.run("cache", "--audit", "--worst", "2", "data.masks=-mask.png", *keys)
    assert says(out, "images-audited", count=COUNT + 2, measured=0)

    listed = next((data.cache / "audit").glob("*-worst.txt"))
    out = data.run("cache", "--audit", *keys, f"data.exclude_files={listed}")
    assert says(out, "images-audited", count=COUNT + 1, measured=0)
    assert len(data.cached(*keys, f"data.exclude_files={listed}")) == COUNT + 1
    assert says(data.out, "unused-excluded", count=2)
    assert len(plain) == COUNT + 3


def test_unusable_images_are_rejected_and_counted(data, monkeypatch):
    data.put("cut.png", png(picture(1))[:-30])
    out = data.run("cache", "--audit")
    assert says(out, "images-rejected", count=1) and says(out, "images-audited", count=COUNT)
    decode_vae = Vae.decode
    monkeypatch.setattr(Vae, "decode", lambda self, latents: decode_vae(self, latents) * float("nan"))
    data.put("new.png", png(picture(30)))
    out = data.run("cache", "--audit")
    assert says(out, "images-rejected", count=2) and "its reconstruction is not finite in fp32" in out
    monkeypatch.setattr(Vae, "decode", decode_vae)
    assert says(data.run("cache", "--audit"), "images-audited", count=COUNT + 1, measured=1)


def test_a_damaged_latent_is_encoded_again(data):
    data.run("cache", "--audit")
    whole = table(data)
    with closing(sqlite3.connect(data.cache / "cache.sqlite")) as db, db:
        db.execute("DELETE FROM audit")
    data.cached()
    (shard,) = (data.cache / "shards").iterdir()
    content = bytearray(shard.read_bytes())
    content[4096:5000] = bytes(904)
    shard.write_bytes(content)
    data.run("cache", "--audit")
    assert table(data) == whole


def test_an_image_that_changes_later_is_named_on_the_page(data, monkeypatch):
    run = Audit.run

    def run_and_edit(self):
        run(self)
        data.put("3.png", png(picture(40)))

    monkeypatch.setattr(Audit, "run", run_and_edit)
    data.run("cache", "--audit")
    (page,) = (text for name, text in files(data).items() if name.endswith(".html"))
    assert page.count("changed while it was being cached") == 1 and Tags(page).counts["img"] == 6 * (COUNT - 1)


def test_bad_input(data, other_vae, tiny_model, tmp_path, monkeypatch):
    def refuses(name, *words, **fields):
        assert says(data.run("cache", *words, code=2), name, **fields)

    refuses("audit-option-alone", "--against", other_vae, option="--against")
    refuses("audit-option-alone", "--worst", "3", option="--worst")
    refuses("audit-option-alone", "--by", "fine", option="--by")
    refuses("audit-with-others", "--audit", "--verify", "--prune", options="--verify, --prune")
    for number in (0, 1001):
        refuses("audit-worst", "--audit", "--worst", number, number=number)
    refuses("source-missing", "--audit", "--against", "nowhere")
    refuses("audit-same-vae", "--audit", "--against", tiny_model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("empty", "text.safetensors", "images/0.png"):
        out = data.run("cache", "--audit", "--against", tmp_path / name, code=2)
        assert name in out and "model." not in out, out
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    refuses("audit-no-vae", "--audit", "--against", tmp_path / "other.safetensors")
    refuses("audit-imported", "--audit", "data.latents=npz", kind="'npz'")
    assert not (data.cache / "audit").exists()

    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
    deep = AutoencoderKL.from_config({**tiny_vae().config, **blocks, "block_out_channels": [8] * 5})
    deep.save_pretrained(tmp_path / "deep")
    words = "--audit", "--against", tmp_path / "deep"
    refuses("cache-resolution", *words, "data.resolution=24", component="VAE of --against", size=24, step=16)
    data.run("cache", *words, "data.resolution=32")

    monkeypatch.setattr(Vae, "decode", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    refuses("audit-memory", "--audit", "data.resolution=48", width=48, height=48)


def test_no_usable_image(data):
    for path in data.path.glob("*.png"):
        path.write_bytes(b"text")
    assert says(data.run("cache", "--audit", code=2), "audit-no-image")
