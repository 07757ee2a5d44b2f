"""The command line as a user meets it: help at once, one sentence and exit 2 for what to change, cache, train, sample."""

import subprocess
import sys
import time

import pytest
from commandline import STAGE, fastsd
from tiny import job, tiny_vae, write_images


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr("fastsd.train.precision.INTERPRETED", False)  # as a user has it
    return lambda *words: fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)


def test_help_is_instant():
    command = [sys.executable, "-c", "import sys; sys.argv = ['fastsd', '--help']\nfrom fastsd.cli import main\nmain()"]
    subprocess.run(command, capture_output=True)
    imported = (
        "import sys; from fastsd import cli; assert not {'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"--help took {time.perf_counter() - start:.2f} s")
    assert done.returncode == 0
    for word in ("train", "cache", "sample", "check", "demo"):
        assert word in done.stdout
    assert subprocess.run([sys.executable, "-c", imported]).returncode == 0


def test_cache_train_sample(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    code, out, err = run("cache", path)
    assert code == 0 and "21 of 21 images cached" in out, err
    code, out, _ = run("cache", path)
    assert "0 encoded now, 21 were there" in out
    code, out, _ = run("check", path)
    assert code == 0 and "ok    model" in out and "ok    cache" in out
    code, out, err = run("train", "--precision", "fp32", path, "log.every=1")
    assert code == 0, err
    for word in ("images", "cpu on cpu", "factor 0.5", "21 of 21 images cached", "loss", "img/s", "ETA", "GB", "saved"):
        assert word in out
    for model in (tmp_path / "run", tmp_path / "run" / "model", tmp_path / "run" / "checkpoints" / "step-00000002"):
        code, out, err = run("sample", model, "--prompt", "a", "--prompt", "b", "--steps", 2, "--images", 2,
                             "--out", tmp_path / "out")  # fmt: skip
        assert code == 0, err
    assert len(list((tmp_path / "out").glob("*.png"))) == 5
    for option in ("--verify", "--stats", "--prune"):
        assert run("cache", option, path)[0] == 0
    assert run("train", path)[0] == 0  # finished already


def test_a_bad_image_and_an_empty_caption_stop_nothing(run, tmp_path, tiny_model):
    folder = tmp_path / "images"
    write_images(folder, 6)
    (folder / "0001.png").write_bytes(b"not an image")
    (folder / "0002.txt").write_text("  \n")
    path = job(tmp_path, tiny_model, folder, STAGE)
    code, out, _ = run("cache", path)
    assert code == 0 and "5 of 6 images cached" in out and "1 rejected" in out and "0001.png" in out
    assert "1 images have no caption or an empty one" in out
    code, out, _ = run("train", path)
    assert code == 0 and "1 rejected" in out and "1 empty captions" in out


def bad_jobs(tmp_path, tiny_model, images):
    """(words of a command, what its one sentence must say)."""
    path = job(tmp_path, tiny_model, images, STAGE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "only-bad").mkdir()
    (tmp_path / "only-bad" / "x.jpg").write_bytes(b"no")
    tiny_vae(channels=8).save_pretrained(tmp_path / "vae8")
    return [
        (("train", path, "sed=1"), "sed: unknown key; did you mean seed?"),
        (("train", path, "stage.0.batch=big"), "stage.0.batch is 'big' (a str); it must be a whole number"),
        (("train", tmp_path / "none.toml"), "no such config file"),
        (("cache", path, 'data.folders=["/no/such/folder"]'), "/no/such/folder"),
        (("cache", path, f'data.folders=["{tmp_path / "empty"}"]'), "holds no image"),
        (("cache", path, f'data.folders=["{tmp_path / "only-bad"}"]'), "none of the 1 images could be used"),
        (("cache", path, "model.base=/no/such/model"), "no such folder or file"),
        (("train", path, f"model.vae={tmp_path / 'vae8'}"), "has 8 latent channels and the UNet"),
        (("train", path, f"cache.dir={tmp_path / 'elsewhere'}"), "run `fastsd cache CONFIG` first"),
        (
            ("train", path, "kernels=triton"),
            'kernels is "triton", which needs an NVIDIA GPU, and the device is cpu; use "auto" or "reference"',
        ),
        (("train", path, "device=cuda:9"), "device is 'cuda:9', which does not work here"),
        (("train", path, "log.wandb=x"), "wandb is not installed"),
        (("train", path, "sample.size=33"), "multiples of 4 px"),
        (("train", path, "sample.prompts_file=/no/prompts"), "sample.prompts_file"),
        (("cache", path, "data.resolution=33"), "data.resolution is 33"),
        (("sample", tiny_model), "give --prompt TEXT or --prompts FILE"),
        (("sample", "/no/model", "--prompt", "x"), "no such folder or file"),
        (("sample", tiny_model, "--prompt", "x", "--sampler", "best"), "--sampler is 'best'"),
        (("sample", tiny_model, "--prompt", "x", "--size", "30"), "sample.size is 30"),
        (("sample", tiny_model, "--prompt", "x", "--vae-scaling-factor", "-1"), "--vae-scaling-factor is -1.0"),
    ]


@pytest.mark.parametrize("number", range(20))
def test_bad_input_gets_one_sentence_and_exit_2(number, run, tmp_path, tiny_model, images):
    assert run("cache", job(tmp_path, tiny_model, images, STAGE))[0] == 0
    words, sentence = bad_jobs(tmp_path, tiny_model, images)[number]
    code, out, err = run(*words)
    print(err)
    assert code == 2
    assert sentence in err
    assert "Traceback" not in err + out
    assert len(err.strip().splitlines()) == 1


def test_check_finds_everything_at_once(run, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE)
    code, _, err = run("check", path, "data.folders=['/no/such']", "model.base=/no/model", "device=cuda:9")
    assert code == 2
    assert "/no/such" in err and "/no/model" in err and "cuda:9" in err


def test_usage_errors_exit_2(run):
    for words in (("trian",), ("train",), ("train", "--precision", "fp16", "x.toml")):
        code, _, err = run(*words)
        assert code == 2 and "Usage" in err
