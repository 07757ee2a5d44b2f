"""The demo: the judge, the data set, the tokenizer, the shipped models and a short run."""

import re
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sentences import refused

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.demo import demo as module
from fastsd.demo import world
from fastsd.demo.demo import MODELS, SHOWN, demo
from fastsd.demo.models import write_tokenizer
from fastsd.model.formats.load import load_model
from fastsd.run.restart import lock
from fastsd.sampling.generate import generate
from fastsd.terminal.console import Console


def judge_accuracy(change) -> float:
    """Return the share of drawn and changed images whose colour and shape the judge recognises."""
    rng = np.random.default_rng(7)
    combos = world.combinations() * 6
    images = [change(world.draw(colour, shape, rng), rng) for colour, shape in combos]
    return float(np.mean([world.judge(image) == pair for image, pair in zip(images, combos, strict=True)]))


def blur_and_add_noise(image, rng):
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)), dtype=float) + rng.normal(0, 10, (64, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_judge_recognises_the_shapes():
    assert judge_accuracy(lambda image, rng: image) >= 0.99
    assert judge_accuracy(blur_and_add_noise) >= 0.97


def test_judge_rejects_other_images():
    rng = np.random.default_rng(3)
    empty = Image.new("RGB", (64, 64), world.BACKGROUND)
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    noise = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(50)]
    assert all(world.judge(image) == (None, None) for image in [empty, grey, *noise])
    for colour, shape in (("red", "circle"), ("blue", "star")):
        assert world.judge(world.draw(colour, shape, rng)) != ("blue", "circle")


def test_data_set_is_deterministic_and_captioned(tmp_path):
    for name in ("a", "b"):
        world.write_dataset(tmp_path / name, 48, seed=1)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 96
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    captions = {path.read_text().strip() for path in (tmp_path / "a").glob("*.txt")}
    assert all(any(colour in text for colour in world.COLOURS) for text in captions)
    assert all(any(shape in text for shape in world.SHAPES) for text in captions)


def test_tokenizer_accepts_any_text(tmp_path):
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a red circle", padding="max_length", max_length=77).input_ids
    assert len(ids) == 77 and ids[0] == tokenizer.bos_token_id and ids[4] == tokenizer.eos_token_id
    for text in ("wörld, 123!", "日本語", "A  RED\tCircle"):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids[1:-1]


def test_shipped_models_are_small_and_load():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= 8e6
    base = load_model(ModelTable(base=str(MODELS / "base")))
    other = load_model(ModelTable(base=str(MODELS / "base"), vae=str(MODELS / "vae")))
    assert base.vae.scaling_factor != other.vae.scaling_factor and base.vae.hash != other.vae.hash


def test_base_model_follows_prompts():
    model = load_model(ModelTable(base=str(MODELS / "base")))
    prompts = world.prompts()[:16]
    images = generate(model, [p for *_, p in prompts], [0] * 16, SampleTable(steps=12, guidance=2.0), 64)
    correct = [world.judge(image) == (colour, shape) for image, (colour, shape, _) in zip(images, prompts, strict=True)]
    assert sum(correct) >= 13


def test_final_picture_has_the_size_of_two_panels():
    rng = np.random.default_rng(0)
    images = [world.draw("red", "ring", rng)] * SHOWN
    sheet = world.picture([("one", images), ("two", images)], ["a red ring"] * SHOWN)
    assert sheet.width > 600 and sheet.height > 400


def test_a_demo_of_another_version_is_refused_before_it_is_touched(tmp_path, monkeypatch):
    """The same config may name the folder otherwise."""
    out, text = tmp_path / "demo", module._config_file().read_text()
    (out / "run").mkdir(parents=True)
    for older in (text.replace("until = 120", "until = 700"), text.replace("[model]\n", '[model]\nvae = "v"\n'), "no TOML"):
        (out / "demo.toml").write_text(older)
        with refused("demo-other-config", out=out):
            demo(out, Console(quiet=True))
        assert (out / "demo.toml").read_text() == older and not (out / "models").exists()
    (out / "demo.toml").write_text(text)
    with lock(out), refused("run-locked", folder=repr(str(out))):
        demo(out, Console(quiet=True))
    monkeypatch.setattr(world, "write_dataset", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        demo(out, Console(quiet=True))


@pytest.mark.slow
def test_short_demo_runs_the_users_commands(tmp_path, capsys, monkeypatch):
    from io import StringIO

    prompts = world.prompts()[::3]
    monkeypatch.setattr(world, "prompts", lambda: prompts)
    monkeypatch.setattr(module, "SEEDS", (0,))
    monkeypatch.setattr(module, "PICTURES", 64)
    monkeypatch.setattr(module, "ALIGNMENT_IMAGES", 16)
    text = re.sub(r"until = \d+", "until = 1", module._config_file().read_text()).replace("images = 4", "images = 1")
    text = text.replace("held_out = 32", "held_out = 8")
    monkeypatch.setattr(module, "_config_file", lambda: tmp_path / "short.toml")
    (tmp_path / "short.toml").write_text(text)
    out = StringIO()
    result = demo(tmp_path / "demo", Console(file=out, width=200))
    assert all(f"$ fastsd {command} " in out.getvalue() for command in ("swap-vae", "cache", "train", "sample"))
    assert (tmp_path / "demo" / "demo.png").exists() and result["samples"] == 16
    assert result["base"] >= 0.8 and result["before"] <= 0.5 and result["aligned"] >= 0.8
    assert 0 < result["loss"] < 1 and 0 < result["loss_before_training"] < 0.1
    assert (tmp_path / "demo/run/model/README.md").read_text().count("# Coloured shapes\n") == 1
    del prompts[SHOWN:]
    assert demo(tmp_path / "demo", Console(file=StringIO()))["samples"] == SHOWN  # again in the same folder
