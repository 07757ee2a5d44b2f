"""`fastsd redraw`: where images start and end, equal bits after interruptions, and errors."""

import io
import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commandline import fastsd
from dataset import DataSet, picture, png
from diffusers import AutoencoderKL
from model_files import spoil
from PIL import Image
from sentences import says
from tiny import tiny_vae

from fastsd.commands import redraw
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.data.cache import LatentCache
from fastsd.model.formats.load import load_model, load_vae, write_rest
from fastsd.model.latent_space import LatentSpace
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
def test_exact_predictions_recover_every_image(sampler, kind, start):
    """Denoising starts at latents noised to `start`, and timesteps are 50 apart. DDIM leaves the noise of timestep 0."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 8, 8, generator=generator).double() for _ in range(2))
    abar, calls = alphas_cumprod(SCHEDULERS[kind]).double(), []

    def unet(x_BCHW, t_B, text_embeds_BLD):
        signal, sigma = (table[t_B.long()][:, None, None, None] for table in (abar.sqrt(), (1 - abar).sqrt()))
        noise = (x_BCHW - signal * x0) / sigma
        calls.append((int(t_B[0]), x_BCHW))
        return noise if kind == "epsilon" else signal * noise - sigma * x0

    tokenize, encode = lambda prompts: torch.zeros(len(prompts), 77), lambda ids: ids[..., None]
    text = SimpleNamespace(tokenize=tokenize, encode=encode, device=torch.device("cpu"))
    model = SimpleNamespace(unet=unet, text=text, scheduler=SCHEDULERS[kind])
    table = SampleTable(sampler=sampler, steps=20, guidance=1.0)
    latents = denoise(model, ["a", "b"], eps.float(), [3, 4], table, x0.float(), start)
    assert [t for t, _ in calls] == list(range(start, -1, -50))
    abar_start = abar[start] if sampler == "ddim" else abar[start].clamp(min=2**-24)  # diffusers keeps sigmas finite
    expected_input = abar_start.sqrt() * x0 + (1 - abar_start).sqrt() * eps
    torch.testing.assert_close(calls[0][1].double(), expected_input, rtol=0, atol=1e-5)
    ddim_latents = abar[0].sqrt() * x0 + (1 - abar[0]).sqrt() * eps
    torch.testing.assert_close(latents.double(), ddim_latents if sampler == "ddim" else x0, rtol=0, atol=5e-5)


@pytest.fixture
def data(tmp_path, tiny_model, monkeypatch, capsys) -> DataSet:
    """13 cached images, captioned by their numbers."""
    data = DataSet(tmp_path, tiny_model, monkeypatch, capsys)
    data.put_good(*(f"{i:02d}.png" for i in range(COUNT)))
    data.run("cache")
    return data


@pytest.fixture
def redrawn(data, tiny_model, tmp_path, capsys, monkeypatch):
    """A function: `redrawn("out", *words)` runs `fastsd redraw`, and returns the files in tmp_path / "out" and the output."""

    def redraw_into(name, *words, code=0, model=tiny_model):
        command = ("redraw", model, data.config, tmp_path / name, *words)
        exit_code, out, err = fastsd(*command, capsys=capsys, monkeypatch=monkeypatch)
        assert exit_code == code and "Traceback" not in out + err, out + err
        assert code != 2 or (err.startswith("fastsd: ") and err.count("\n") == 1), err
        folder = tmp_path / name
        return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}, err or out

    return redraw_into


def pixels(files, name):
    return np.asarray(Image.open(io.BytesIO(files[name]))).astype(int)


NOISED = ("--start", 300)
WAYS = {"drawn": (), "decoded": ("--start", 0), "noised": NOISED}


@pytest.mark.parametrize("way", WAYS)
def test_writes_images_with_their_captions(data, redrawn, way):
    files, out = redrawn("out", *WAYS[way], "--limit", 9)
    assert says(out, "images-redrawn", count=9, drawn=9, present=0)
    with closing(LatentCache.open(data.cache)) as latents:
        captions = latents.captions(range(9))
    assert set(files) == {"redraw.json"} | {f"{i:08d}{ending}" for i in range(9) for ending in (".png", ".txt")}
    assert [files[f"{i:08d}.txt"].decode() for i in range(9)] == captions
    assert all(pixels(files, f"{i:08d}.png").shape == (32, 32, 3) for i in range(9))
    assert json.loads(files["redraw.json"])["start"] == {"drawn": None, "decoded": 0, "noised": 300}[way]


def test_start_0_decodes_the_cached_latents(data, redrawn, tiny_model, tmp_path):
    files, _ = redrawn("out", "--start", 0)
    vae = load_vae(ModelTable(base=str(tiny_model)))
    with closing(LatentCache.open(data.cache)) as latents:
        scaled = vae.scale(latents.get(range(COUNT))["latents"].float())
    for i, image in enumerate(vae.decode(scaled)):
        assert (pixels(files, f"{i:08d}.png") == np.asarray(to_image(image))).all()


def test_interruptions_do_not_change_the_bits(redrawn, monkeypatch, tmp_path):
    """In one call, with a limit, after kills in the middle of a file, and after files were deleted."""
    whole, _ = redrawn("whole", *NOISED)
    few, _ = redrawn("few", *NOISED, "--limit", 3)
    assert few == {name: whole[name] for name in few} and len(few) == 7
    assert redrawn("few", *NOISED)[0] == whole
    write, paths = redraw._write, []

    def write_or_die(path, data):
        paths.append(path)
        if len(paths) % 7 == 0:
            path.with_name(f".tmp-{path.name}").write_bytes(data[:3])
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(redraw, "_write", write_or_die)
    kills = 0
    while len(paths) < 2 * COUNT:
        files, out = redrawn("killed", *NOISED, code=130)
        kills += 1
        assert says(out, "redraw-stopped")
    assert kills == 4 and set(files) < set(whole) | {name for name in files if name.startswith(".tmp-")}
    monkeypatch.setattr(redraw, "_write", write)
    files, out = redrawn("killed", *NOISED)
    assert files == whole and says(out, "images-redrawn", count=COUNT)
    for name in ("00000002.png", "00000011.txt"):
        (tmp_path / "killed" / name).unlink()
    files, out = redrawn("killed", *NOISED)
    assert files == whole and says(out, "images-redrawn", drawn=2, present=11)


@pytest.mark.parametrize("sampler", ["euler_a", "dpm++"])
def test_noise_is_a_function_of_seed_and_number(redrawn, monkeypatch, sampler):
    words = ("--start", 700, f"sample.sampler={sampler}")
    first, _ = redrawn("first", *words)
    monkeypatch.setattr(redraw, "BATCH", 3)
    other, _ = redrawn("other", *words)
    seeded, _ = redrawn("seeded", *words, "seed=1")
    names = [name for name in first if name.endswith(".png")]
    # Other batches cause other rounding errors, by at most one level of 255.
    assert max(abs(pixels(first, name) - pixels(other, name)).max() for name in names) <= 1
    assert min(abs(pixels(first, name) - pixels(seeded, name)).max() for name in names) > 20


def test_each_bucket_keeps_its_size(data, redrawn):
    data.put("wide.png", png(picture(1, 64, 16)))
    data.put("high.png", png(picture(2, 16, 64)))
    keys = ("data.buckets.min=16", "data.buckets.max=64", "data.buckets.step=16")
    data.run("cache", *keys)
    for way, words in WAYS.items():
        files, _ = redrawn(way, *words, *keys)
        sizes = {files[name[:-4] + ".txt"].decode(): pixels(files, name).shape for name in files if name.endswith(".png")}
        assert sizes == {**{f"{i:02d}": (32, 32, 3) for i in range(COUNT)}, "wide": (16, 64, 3), "high": (64, 16, 3)}


def test_result_can_be_trained_on(data, redrawn, tmp_path):
    """First captions are kept, also empty ones. The tag filter applies. A run stands for its newest checkpoint."""
    data.put("00.png", png(picture(0)), b"first, kept\nsecond\n")
    data.put("01.png", png(picture(1)), b"")
    data.put("02.png", png(picture(2)), "\u00e9t\u00e9, dropped".encode())
    data.run("cache")
    data.run("train")
    files, _ = redrawn("out", 'data.exclude=["dropped"]', model=tmp_path / "run")
    captions = {name: text.decode() for name, text in files.items() if name.endswith(".txt")}
    assert sorted(captions.values()) == ["", *(f"{i:02d}" for i in range(3, COUNT)), "first, kept"]
    assert "00000002.txt" not in captions and json.loads(files["redraw.json"])["base"].endswith("step-00000001")
    keys = (f'data.folders=["{tmp_path / "out"}"]', f"run={tmp_path / 'again'}")
    assert data.cached(*keys) == set(captions.values())
    data.run("train", *keys)
    with closing(LatentCache.open(data.cache)) as latents:
        assert latents.variants(range(len(latents))) == [[text] for _, text in sorted(captions.items())]


def test_images_start_from_latents_of_the_models_own_vae(data, redrawn, tmp_path):
    tiny_vae(seed=5).save_pretrained(tmp_path / "vae")
    key = f"model.vae={tmp_path / 'vae'}"
    files, _ = redrawn("base")
    data.run("cache", key)
    assert {**redrawn("swapped", key)[0], "redraw.json": b""} == {**files, "redraw.json": b""}  # latents of any VAE will do
    (data.cache / "views").rename(data.cache / "views-of-both")
    data.run("cache", key)
    for start in (0, 300):
        assert says(redrawn("x", key, "--start", start, code=2)[1], "validate-no-latents")


@pytest.mark.parametrize("start", [0, 300])
def test_a_normalised_vae_has_its_own_space(start, data, redrawn, tiny_model, tmp_path, monkeypatch):
    """It decodes what the plain VAE decodes, and starts from latents that it has scaled itself. The cache stays valid."""
    folder = Path(spoil(tiny_model, tmp_path / "normalised", lambda _: None))
    model = load_model(ModelTable(base=str(folder)))
    plain = model.vae.latent_space
    model.vae.set_latent_space(LatentSpace(1.0, 0.0, (0.3, -0.2, 0.1, 0.0), (2.0, 0.5, 3.0, 4.0)))
    shutil.rmtree(folder / "vae")
    write_rest(folder, model)
    starts = []
    monkeypatch.setattr(redraw, "denoise", lambda *args: starts.append(args[5]) or args[5])
    files, _ = redrawn("out", "--start", start, model=folder)
    with closing(LatentCache.open(data.cache)) as latents:
        raw = latents.get(range(COUNT))["latents"].float()
    expected = model.vae.decode(model.vae.scale(raw))
    if start:
        torch.testing.assert_close(torch.cat(starts), model.vae.scale(raw), rtol=0, atol=0)
        assert not torch.allclose(torch.cat(starts), plain.scale(raw))
    for i, image in enumerate(expected):
        assert abs(pixels(files, f"{i:08d}.png") - np.asarray(to_image(image)).astype(int)).max() <= 1


def test_latents_of_another_size_are_refused(data, redrawn, tmp_path, tiny_model):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "finer")
    key = f"model.vae={tmp_path / 'finer'}"
    data.run("cache", key)
    fields = {"dir": data.cache, "downscale": 1, "base": tiny_model, "model_downscale": 2}
    files, err = redrawn("out", key, code=2)
    assert says(err, "redraw-downscale", **fields) and not files
    assert len(redrawn("out", f"model.vae={tiny_model}", "--limit", 1)[0]) == 3


BAD_WORDS = [
    (("--start", 1000), "redraw-start", "1000"),
    (("--start", -1), "redraw-start", "1 to 999"),
    (("sample.steps=1001",), "sample-steps", "1001"),
    (('data.include=["none"]',), "filter-leaves-none", "13"),
    (("cache.dir=elsewhere",), "no-view", "elsewhere"),
    (("--device", "abacus"), "device-unavailable", "'abacus'"),
    (("stage.0.batch=big",), "config-invalid", "stage.0.batch is 'big'"),
]


@pytest.mark.parametrize("words, error, fact", BAD_WORDS, ids=[" ".join(map(str, words)) for words, *_ in BAD_WORDS])
def test_bad_input_is_one_sentence_and_leaves_nothing(redrawn, tmp_path, words, error, fact):
    _, err = redrawn("out", *words, code=2)
    assert says(err, error) and fact in err and not (tmp_path / "out").exists()


def test_bad_models_and_folders_are_refused(data, redrawn, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for model, error in (("/no/model", "source-missing"), (data.config, "source-ending"), (tmp_path / "run", "no-checkpoint")):
        assert says(redrawn("out", model=model, code=2)[1], error)
    (tmp_path / "file").write_text("x")
    for name in ("file", "images"):  # the latter holds the images to redraw
        assert says(redrawn(name, "--limit", 1, code=2)[1], "redraw-out-exists")
    assert says(redrawn("file/x", code=2)[1], "redraw-unwritable", reason="Not a directory")


def test_a_folder_keeps_its_settings(redrawn, tmp_path):
    first, _ = redrawn("out", "--limit", 2)
    changes = {
        "--start 5": "start None (now 5)", "seed=7": "seed 0 (now 7)", "model.clip_skip=1": "clip_skip 0 (now 1)",
        "sample.guidance=2.0": "guidance 7.0 (now 2.0)", "--precision bf16": "precision 'fp32' (now 'bf16')",
        'data.exclude=["03"]': "exclude [] (now ['03'])", "sample.guidance_rescale=0.5": "guidance_rescale None (now 0.5)",
    }  # fmt: skip
    for words, differences in changes.items():
        assert says(redrawn("out", *words.split(), code=2)[1], "redraw-settings-differ", differences=differences)
    assert redrawn("out", "--limit", 2)[0] == first
    (tmp_path / "out" / "redraw.json").write_text("[1")
    assert says(redrawn("out", code=2)[1], "redraw-settings-unreadable", path=tmp_path / "out" / "redraw.json")
