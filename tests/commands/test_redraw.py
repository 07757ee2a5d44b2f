"""Data sets made by a model: where an image starts and ends, the same bits however they come about, and what is refused."""

import io
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commandline import fastsd
from dataset import DataSet, picture, png
from PIL import Image
from tiny import tiny_vae

from fastsd.commands import redraw
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.data.cache import LatentCache
from fastsd.model.formats.load import load_vae
from fastsd.model.model import SD15_SCHEDULER
from fastsd.sampling.generate import denoise, to_image
from fastsd.train.objective import alphas_cumprod

SCHEDULERS = {
    "epsilon": SD15_SCHEDULER,
    "v_prediction": {**SD15_SCHEDULER, "prediction_type": "v_prediction"},
    "zero": {
        **SD15_SCHEDULER, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    },
}  # fmt: skip
COUNT = 13


@pytest.mark.parametrize("start", [1, 37, 600, 999])
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpm++"])
def test_with_the_exact_prediction_every_image_is_found_again(sampler, kind, start):
    """From its latent noised to `start`, on to timesteps 50 apart; DDIM ends one timestep's noise before it."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 8, 8, generator=generator).double() for _ in range(2))
    abar, seen = alphas_cumprod(SCHEDULERS[kind]).double(), []

    def unet(x_BCHW, t_B, context_BLD):
        signal, level = (table[t_B.long()][:, None, None, None] for table in (abar.sqrt(), (1 - abar).sqrt()))
        noise = (x_BCHW - signal * x0) / level
        seen.append((int(t_B[0]), x_BCHW))
        return noise if kind == "epsilon" else signal * noise - level * x0

    text = SimpleNamespace(tokenize=lambda prompts: torch.zeros(len(prompts), 77), encode=lambda ids: ids[..., None])
    text.device = torch.device("cpu")
    model = SimpleNamespace(unet=unet, text=text, scheduler=SCHEDULERS[kind])
    table = SampleTable(sampler=sampler, steps=20, guidance=1.0)
    found = denoise(model, ["a", "b"], eps.float(), [3, 4], table, x0.float(), start)
    assert [t for t, _ in seen] == list(range(start, -1, -50))
    left = abar[start] if sampler == "ddim" else abar[start].clamp(min=2**-24)  # diffusers' sigmas stay finite
    first = left.sqrt() * x0 + (1 - left).sqrt() * eps
    torch.testing.assert_close(seen[0][1].double(), first, rtol=0, atol=1e-5)
    last = abar[0].sqrt() * x0 + (1 - abar[0]).sqrt() * eps
    torch.testing.assert_close(found.double(), last if sampler == "ddim" else x0, rtol=0, atol=5e-5)


@pytest.fixture
def data(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    """13 images, captioned by their numbers; cached."""
    data = DataSet(tmp_path, tiny_model, monkeypatch, capsys)
    data.put_good(*(f"{i:02d}.png" for i in range(COUNT)))
    data.run("cache")
    return data


@pytest.fixture
def made(data, tiny_model, tmp_path, capsys, monkeypatch):
    """made("out", *words): the files of tmp_path / "out" after `fastsd redraw` with these words, and what it said."""

    def make(name, *words, code=0, model=tiny_model):
        ended, out, err = fastsd("redraw", model, data.config, tmp_path / name, *words, capsys=capsys, monkeypatch=monkeypatch)
        assert ended == code and "Traceback" not in out + err, out + err
        assert code != 2 or (err.startswith("fastsd: ") and err.count("\n") == 1), err
        folder = tmp_path / name
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}, err or out

    return make


def pixels(files, name):
    return np.asarray(Image.open(io.BytesIO(files[name]))).astype(int)


NOISED = ("--start", 300)
WAYS = {"drawn": (), "decoded": ("--start", 0), "noised": NOISED}


@pytest.mark.parametrize("way", WAYS)
def test_every_image_is_there_with_its_caption(data, made, way):
    files, said = made("out", *WAYS[way], "--limit", 9)
    assert "9 images in" in said and "9 drawn now, 0 were there" in said
    with closing(LatentCache.open(data.cache)) as latents:
        captions = latents.captions(range(9))
    assert set(files) == {"redraw.json"} | {f"{i:08d}{ending}" for i in range(9) for ending in (".png", ".txt")}
    assert [files[f"{i:08d}.txt"].decode() for i in range(9)] == captions
    assert all(pixels(files, f"{i:08d}.png").shape == (32, 32, 3) for i in range(9))
    assert json.loads(files["redraw.json"])["start"] == {"drawn": None, "decoded": 0, "noised": 300}[way]


def test_decoded_once_is_the_cached_latent_decoded(data, made, tiny_model, tmp_path):
    files, _ = made("out", "--start", 0)
    vae = load_vae(ModelTable(base=str(tiny_model)))
    with closing(LatentCache.open(data.cache)) as latents:
        scaled = vae.scale(latents.get(range(COUNT))["latents"].float())
    for i, image in enumerate(vae.decode(scaled)):
        assert (pixels(files, f"{i:08d}.png") == np.asarray(to_image(image))).all()


def test_a_set_has_the_same_bits_however_it_came_about(made, monkeypatch, tmp_path):
    """At once, by limits, after kills in the middle of a file, with files gone."""
    whole, _ = made("whole", *NOISED)
    few, _ = made("few", *NOISED, "--limit", 3)
    assert few == {name: data for name, data in whole.items() if name in few} and len(few) == 7
    assert made("few", *NOISED)[0] == whole
    real, left = redraw._write, []

    def dying(path, data):
        left.append(path)
        if len(left) % 7 == 0:
            path.with_name(f".tmp-{path.name}").write_bytes(data[:3])
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(redraw, "_write", dying)
    kills = 0
    while len(left) < 2 * COUNT:
        files, said = made("killed", *NOISED, code=130)
        kills += 1
        assert "redrawing stopped; the same line again goes on from there" in said
    assert kills == 4 and set(files) < set(whole) | {name for name in files if name.startswith(".tmp-")}
    monkeypatch.setattr(redraw, "_write", real)
    files, said = made("killed", *NOISED)
    assert files == whole and f"{COUNT} images" in said
    for name in ("00000002.png", "00000011.txt"):
        (tmp_path / "killed" / name).unlink()
    files, said = made("killed", *NOISED)
    assert files == whole and "2 drawn now, 11 were there" in said


@pytest.mark.parametrize("sampler", ["euler_a", "dpm++"])
def test_noise_is_a_function_of_seed_and_number(made, monkeypatch, sampler):
    words = ("--start", 700, f"sample.sampler={sampler}")
    one, _ = made("one", *words)
    monkeypatch.setattr(redraw, "BATCH", 3)
    other, _ = made("other", *words)
    seeded, _ = made("seeded", *words, "seed=1")
    names = [name for name in one if name.endswith(".png")]
    # Other batches, other roundings: a level of 255 at most.
    assert max(abs(pixels(one, name) - pixels(other, name)).max() for name in names) <= 1
    assert min(abs(pixels(one, name) - pixels(seeded, name)).max() for name in names) > 20


def test_each_bucket_keeps_its_size(data, made):
    data.put("wide.png", png(picture(1, 64, 16)))
    data.put("high.png", png(picture(2, 16, 64)))
    keys = ("data.buckets.min=16", "data.buckets.max=64", "data.buckets.step=16")
    data.run("cache", *keys)
    for way, words in WAYS.items():
        files, _ = made(way, *words, *keys)
        sizes = {files[name[:-4] + ".txt"].decode(): pixels(files, name).shape for name in files if name.endswith(".png")}
        assert sizes == {**{f"{i:02d}": (32, 32, 3) for i in range(COUNT)}, "wide": (16, 64, 3), "high": (64, 16, 3)}


def test_a_set_can_be_trained_on(data, made, tmp_path):
    """First captions alone, empty ones stay empty, the filter by tag counts; a run stands for its newest checkpoint."""
    data.put("00.png", png(picture(0)), b"first, kept\nsecond\n")
    data.put("01.png", png(picture(1)), b"")
    data.put("02.png", png(picture(2)), "\u00e9t\u00e9, dropped".encode())
    data.run("cache")
    data.run("train")
    files, _ = made("out", 'data.exclude=["dropped"]', model=tmp_path / "run")
    captions = {name: data.decode() for name, data in files.items() if name.endswith(".txt")}
    assert sorted(captions.values()) == ["", *(f"{i:02d}" for i in range(3, COUNT)), "first, kept"]
    assert "00000002.txt" not in captions and json.loads(files["redraw.json"])["base"].endswith("step-00000001")
    keys = (f'data.folders=["{tmp_path / "out"}"]', f"run={tmp_path / 'again'}")
    assert data.cached(*keys) == set(captions.values())
    data.run("train", *keys)
    with closing(LatentCache.open(data.cache)) as latents:
        assert latents.variants(range(len(latents))) == [[text] for _, text in sorted(captions.items())]


def test_images_begin_in_latents_of_the_models_own_vae(data, made, tmp_path):
    tiny_vae(seed=5).save_pretrained(tmp_path / "vae")
    key = f"model.vae={tmp_path / 'vae'}"
    own, _ = made("own")
    data.run("cache", key)
    assert {**made("swapped", key)[0], "redraw.json": b""} == {**own, "redraw.json": b""}  # by whatever VAE its latents are
    (data.cache / "views").rename(data.cache / "views-of-both")
    data.run("cache", key)
    for start in (0, 300):
        assert "holds no latents of these images by the VAE of" in made("x", key, "--start", start, code=2)[1]


def test_the_config_says_of_a_model_what_it_does_not_say_itself(tmp_path):
    table = ModelTable(base="b", vae="v", vae_scaling_factor=0.13, clip_skip=1, chunks=2, prediction="v_prediction")
    assert redraw._table("m", table) == ModelTable(base="m", clip_skip=1, chunks=2)
    file = str(tmp_path / "m.safetensors")
    Path(file).touch()
    kept = {"clip_skip": 1, "chunks": 2, "prediction": "v_prediction"}
    assert redraw._table(file, table) == ModelTable(base=file, tokenizer="b", **kept)


BAD = [
    (("--start", 1000), "--start is 1000 and the noise schedule of"),
    (("--start", -1), "give 1 to 999, or 0 to decode"),
    (("sample.steps=1001",), "sample.steps is 1001, and"),
    (('data.include=["none"]',), "leave none of the 13 images"),
    (("cache.dir=elsewhere",), "run `fastsd cache CONFIG` first"),
    (("--device", "cuda:9"), "device is 'cuda:9'"),
    (("stage.0.batch=big",), "stage.0.batch is 'big'"),
]


@pytest.mark.parametrize("words, sentence", BAD, ids=[" ".join(map(str, words)) for words, _ in BAD])
def test_what_cannot_be_is_one_sentence_and_leaves_nothing(made, tmp_path, words, sentence):
    _, said = made("out", *words, code=2)
    assert sentence in said and not (tmp_path / "out").exists()


def test_a_model_or_a_folder_that_is_none(data, made, tmp_path):
    assert "no such folder or file" in made("out", model="/no/model", code=2)[1]
    assert "not a .safetensors file" in made("out", model=data.config, code=2)[1]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in made("out", model=tmp_path / "run", code=2)[1]
    (tmp_path / "file").write_text("x")
    for name in ("file", "images"):  # the last one holds what there is to draw anew
        assert "which exists and is nothing that redraw has made" in made(name, "--limit", 1, code=2)[1]
    assert "cannot be written (Not a directory)" in made("file/x", code=2)[1]


def test_one_folder_is_one_set(made, tmp_path):
    first, _ = made("out", "--limit", 2)
    changes = {
        "--start 5": "start None (now 5)", "seed=7": "seed 0 (now 7)", "model.clip_skip=1": "clip_skip 0 (now 1)",
        "sample.guidance=2.0": "guidance 7.0 (now 2.0)", "--precision bf16": "precision 'fp32' (now 'bf16')",
        'data.exclude=["03"]': "exclude [] (now ['03'])",
    }  # fmt: skip
    for words, said in changes.items():
        assert f"was made with {said}; name another folder" in made("out", *words.split(), code=2)[1]
    assert made("out", "--limit", 2)[0] == first
    (tmp_path / "out" / "redraw.json").write_text("[1")
    assert "redraw.json cannot be read" in made("out", code=2)[1]
