"""`fastsd sample`: the settings of a run, options in their place, EMA weights, adapters, and files that are never replaced."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import BOTH, move
from commandline import fastsd
from PIL import Image
from runs import run
from sentences import says
from tiny import job

from fastsd.commands import sample as module
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.config.stages import COMPONENTS
from fastsd.model.formats.adapters import write_lora_file
from fastsd.model.formats.load import load_model
from fastsd.model.lora import add_lora
from fastsd.model.weights import ADAPTER
from fastsd.run.folder import read_grid
from fastsd.sampling.generate import generate, load_to_sample, prepare_to_sample

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 2\nbatch = 4\noptimizer = "lion"\nlr = 1e-3\nema = 0.5\n'
PROMPTS = (
    'sample.prompts=["red", {prompt="red circle", width=32, height=48, seed=4294967301, steps=3, guidance=2, negative="blue"}]'
)
SETTINGS = (
    PROMPTS, "sample.images=3", "sample.seed=5", "sample.sampler=euler_a", 'sample.negative="green"', "sample.guidance=3.5",
    "sample.guidance_rescale=0.5", "sample.steps=4", "sample.size=24", "model.clip_skip=1", "model.chunks=2",
)  # fmt: skip


SECOND = """
import sys
from pathlib import Path
from fastsd.storage import locked_folder

with locked_folder(Path("{0}")):
    print("locked", flush=True)
    sys.stdin.read()
    (Path("{0}") / "000-7.png").touch()
"""


@pytest.fixture
def sample(monkeypatch, capsys):
    """A function that runs `fastsd sample`, and returns its output. It expects exit code 0, or `code`."""

    def run_sample(*words, code=0):
        exit_code, out, err = fastsd("sample", *words, monkeypatch=monkeypatch, capsys=capsys)
        assert exit_code == code and "Traceback" not in out + err, out + err
        assert code == 0 or err.count("\n") == 1
        return out + err

    return run_sample


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def last_grid(folder: Path) -> Path:
    return sorted((folder / "samples").iterdir())[-1]


RUNS = {
    "all settings": (STAGE, SETTINGS),
    "bf16, text encoder": (STAGE.replace('["unet"]', '["unet", "text_encoder"]'), ("stage.precision=bf16",)),
    "cached text embeddings": (STAGE, ("stage.precision=bf16", "cache.hidden_states=true")),
    "EMA": (STAGE, ("sample.weights=ema", PROMPTS)),
    "adapters, EMA": (
        STAGE.replace('["unet"]', '["lora"]'),
        ("model.lora={rank=2, text_encoder=true}", "sample.weights=ema", "model.clip_skip=1", "stage.precision=bf16"),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_sampled_with_its_own_settings(name, tmp_path, tiny_model, images, sample):
    """Without options, and from the newest checkpoint by name, the grid equals the run's own in every bit and every setting."""
    stages, overrides = RUNS[name]
    folder, _ = run(job(tmp_path, tiny_model, images, stages), *overrides)
    out = sample(folder, "--out", tmp_path / "out")
    checkpoint = folder / "checkpoints" / "step-00000002"
    assert says(out, "samples-of-run", base=checkpoint, precision="bf16" if "stage.precision=bf16" in overrides else "fp32")
    sample(checkpoint, "--out", tmp_path / "out")
    expected = read_grid(last_grid(folder), "", 2)
    assert last_grid(folder).name == f"stage-1{'-ema' if 'EMA' in name else ''}-00000002.png"
    for file in ("grid.png", "grid-2.png"):
        drawn = read_grid(tmp_path / "out" / file, "", 2)
        assert np.array_equal(pixels(tmp_path / "out" / file), pixels(last_grid(folder)))
        assert drawn.cells == expected.cells and drawn.weights == expected.weights
    if "EMA" in name:  # the other weights give another picture
        sample(folder, "--out", tmp_path / "out", "--no-ema")
        assert not np.array_equal(pixels(tmp_path / "out/grid-3.png"), pixels(last_grid(folder)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, images) -> Path:
    """A run with all settings."""
    return run(job(tmp_path_factory.mktemp("trained"), tiny_model, images, STAGE), *SETTINGS)[0]


OPTIONS = [
    ("--images", 1), ("--seed", 6), ("--steps", 5), ("--guidance", 2), ("--guidance-rescale", 0), ("--negative", ""),
    ("--sampler", "ddim"), ("--width", 16), ("--height", 16), ("--size", 16), ("--clip-skip", 0),
    ("--precision", "bf16"), ("--ema",),
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[0])
def test_an_option_replaces_the_setting_of_a_run(option, trained, tmp_path, sample):
    sample(trained, "--out", tmp_path, *option)
    drawn, expected = pixels(tmp_path / "grid.png"), pixels(last_grid(trained))
    assert drawn.shape != expected.shape or not np.array_equal(drawn, expected)
    if option[0] in ("--steps", "--guidance", "--negative", "--seed", "--size"):  # the second prompt has its own
        grids = read_grid(tmp_path / "grid.png", "", 0), read_grid(last_grid(trained), "", 0)
        cells = [list(grid.cut().values())[3:] for grid in grids]
        assert all(np.array_equal(*pair) for pair in zip(*cells, strict=True))


def test_prompts_and_chunks_replace_those_of_a_run(trained, tmp_path, sample):
    text = ", ".join(["red"] * 40 + ["blue"])
    for chunks in (None, 1):
        out = sample(trained, "--prompt", text, "--images", 1, "--out", tmp_path, *(["--chunks", chunks] if chunks else []))
        assert says(out, "prompt-cut", capacity=75, advice=", or set chunks to 2") == (chunks == 1)
    stored = read_grid(tmp_path / "grid.png", "", 0)
    assert list(stored.cells) == [(text, 5)]
    assert not np.array_equal(pixels(tmp_path / "grid.png"), pixels(tmp_path / "grid-2.png"))


def test_a_file_of_prompts_is_drawn_as_asked(tiny_model, tmp_path, sample):
    (tmp_path / "prompts.txt").write_text("# comment\na\na --w 48 --h 32\na --d 9\na --s 3\na --l 2\na --n blue\n")
    out = sample(
        tiny_model, "--prompts", tmp_path / "prompts.txt", "--prompt", "b --w 16", "--steps", 2, "--size", 32, "--out", tmp_path
    )
    assert says(out, "samples-written", count=7, grid="grid.png", out=tmp_path)
    names = [f"{i:03d}-{seed}.png" for i, seed in enumerate([0, 0, 0, 9, 0, 0, 0])]
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == names
    drawn = [Image.open(tmp_path / name) for name in names]
    assert [image.size for image in drawn] == [(16, 32), (32, 32), (48, 32)] + [(32, 32)] * 4
    assert len({image.tobytes() for image in drawn}) == 7


def test_nothing_that_exists_is_replaced(tiny_model, tmp_path, sample):
    words = tiny_model, "--prompt", "a", "--steps", 1, "--size", 16, "--out", tmp_path, "--seed", 2**64 - 1, "--images", 2
    for _ in range(3):
        sample(*words)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    grids = {"grid.png", "grid-2.png", "grid-3.png"}
    assert set(before) - grids == {f"{i:03d}-{0 if i % 2 else 2**64 - 1}.png" for i in range(6)}
    (tmp_path / "grid-2.png").unlink()
    (tmp_path / "1000-7.png").write_bytes(b"mine")
    sample(*words[:-1], 1)
    assert before | {"1000-7.png": b"mine"} == {
        path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name not in (f"1001-{2**64 - 1}.png",)
    } | {"grid-2.png": before["grid-2.png"]}


def test_two_calls_into_one_folder_take_different_numbers(tiny_model, tmp_path, sample, monkeypatch):
    """A call that has drawn waits until the other one has written."""
    words = tiny_model, "--prompt", "a", "--steps", 1, "--size", 16, "--out", tmp_path, "--seed", 7
    second = subprocess.Popen([sys.executable, "-c", SECOND.format(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert second.stdout.readline() == b"locked\n"
    release, draw = threading.Timer(0.5, second.communicate), module.draw

    def draw_and_release(*args):
        drawn = draw(*args)
        release.start()
        return drawn

    monkeypatch.setattr(module, "draw", draw_and_release)
    sample(*words)
    release.join()
    assert {path.name for path in tmp_path.iterdir()} == {"000-7.png", "001-7.png", "grid.png"}


def test_a_seed_beyond_64_bits_is_refused(tiny_model, tmp_path, sample):
    err = sample(tiny_model, "--prompt", "a", "--seed", 2**64, "--out", tmp_path, code=2)
    assert says(err, "sample-option", option="seed", value=2**64)


def test_a_file_as_output_is_refused(tiny_model, tmp_path, sample):
    (tmp_path / "image.png").write_bytes(b"mine")
    err = sample(tiny_model, "--prompt", "a", "--out", tmp_path / "image.png", code=2)
    assert says(err, "sample-out-file", out=repr(str(tmp_path / "image.png")))


def test_a_model_without_averages_is_refused(tiny_model, trained, tmp_path, sample):
    for model in (tiny_model, trained / "model"):
        err = sample(model, "--prompt", "a", "--ema", "--out", tmp_path / "out", code=2)
        assert says(err, "sample-no-ema", base=model)


def test_adapters_are_merged_as_convert_merges_them(tiny_model, tmp_path, sample, monkeypatch, capsys):
    file = tmp_path / "a.safetensors"
    adapted = load_model(ModelTable(base=str(tiny_model)))
    add_lora(adapted, BOTH, seed=0)
    move(adapted)
    names = [(component, name) for component in COMPONENTS for name, _ in adapted.component(component).named_parameters()]
    tensors = {c: {n: adapted.component(c).get_parameter(n) for d, n in names if d == c and ADAPTER in n} for c in COMPONENTS}
    write_lora_file(file, adapted, tensors)
    options = "--prompt", "red circle", "--steps", 2, "--size", 32
    for i, loras in enumerate([(), (f"{file}:0.5",), (f"{file}:0.25", f"{file}:0.25"), (str(file),)]):
        words = [word for lora in loras for word in ("--lora", lora)]
        out = sample(tiny_model, *options, *words, "--out", tmp_path / str(i))
        assert out.count(f"merged {file}") == len(loras)
    drawn = [pixels(tmp_path / str(i) / "000-0.png").astype(int) for i in range(4)]
    assert not any(np.array_equal(drawn[0], other) for other in drawn[1:]) and not np.array_equal(drawn[1], drawn[3])
    assert np.abs(drawn[1] - drawn[2]).max() <= 1
    fastsd("convert", tiny_model, tmp_path / "merged", "--merge", f"{file}:0.5", monkeypatch=monkeypatch, capsys=capsys)
    sample(tmp_path / "merged", *options, "--out", tmp_path / "merged-out")
    assert np.array_equal(pixels(tmp_path / "merged-out/000-0.png"), drawn[1])
    err = sample(tiny_model, *options, "--lora", f"{file}:nan", "--out", tmp_path, code=2)
    assert says(err, "merge-strength", option="--lora")


def test_a_damaged_config_of_a_run_is_named(trained, tmp_path, sample):
    checkpoint = tmp_path / "step"
    shutil.copytree(trained / "checkpoints" / "step-00000002", checkpoint)
    (checkpoint / "run.json").write_text("{")
    out = sample(checkpoint, "--prompt", "a", "--steps", 1, "--out", tmp_path / "out")
    assert says(out, "samples-without-run", path=checkpoint / "run.json")
    model = load_to_sample(ModelTable(base=str(checkpoint)))
    (image,) = generate(model, ["a"], [0], SampleTable(steps=1), 32)
    assert np.array_equal(pixels(tmp_path / "out/000-0.png"), image)


def test_bf16_rounds_weights_as_a_stage_does(tiny_model):
    """Halfway between two bf16 numbers, a stage's high half is the larger one, and PyTorch's conversion the even one."""
    model = load_to_sample(ModelTable(base=str(tiny_model)))
    weight = model.unet.conv_in.weight
    with torch.no_grad():
        weight.fill_(1 + 2**-8)
    prepare_to_sample(model, torch.device("cpu"), "bf16")
    assert (model.unet.conv_in.weight == 1 + 2**-7).all() and torch.tensor(1 + 2**-8).bfloat16() == 1
