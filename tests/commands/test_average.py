"""`fastsd average`: averages of other lengths from a run's snapshots, compared with runs that keep them."""

import json
import re
import shutil
from io import StringIO
from pathlib import Path

import pytest
import torch
from runs import final, rewind, run, same
from safetensors.torch import load_file
from sentences import refused, says
from tiny import ONE_LEVEL, job, make_tiny_model

from fastsd.commands.average import average
from fastsd.config.schema import load_config
from fastsd.model.formats.model_summary import read_summary
from fastsd.model.unet import UNetConfig
from fastsd.plan.disk import snapshot_bytes
from fastsd.run import saving
from fastsd.run.checkpoint import averages_of, checkpoints, name_of
from fastsd.run.loop import train
from fastsd.run.restart import read_config
from fastsd.storage import write_safetensors
from fastsd.terminal.console import Console
from fastsd.train.averages import power_of

STAGE = """
[[stage]]
name = "one"
train = ["unet"]
until = 24
batch = 2
optimizer = "lion"
lr = 2e-3
checkpoint_every = 8
keep_every = 8
caption_dropout = 0.1
"""
LENGTHS = "stage.one.ema={ sigma_rel = [0.1, 0.05] }"
LIGHT = "sample.prompts=[]", "log.tensorboard=false", "export.single_file=false"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    make_tiny_model(folder, UNetConfig(**ONE_LEVEL))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_model, images):
    """Return the folder of a run that keeps two lengths."""
    path = job(tmp_path_factory.mktemp("two"), small_model, images, STAGE)
    return run(path, LENGTHS, "stage.one.ema_snapshots=12", *LIGHT)[0]


@pytest.fixture
def copy(finished, tmp_path):
    """Return the folder of a copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def averaged(name: Path, sigma_rel: float, out: Path | None = None) -> str:
    """Make an average, and return what is printed."""
    console = Console(file=StringIO(), width=200)
    average(str(name), sigma_rel, out, console)
    return console.file.getvalue()


def unet(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_each_length_is_kept_exported_and_told(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"model", "model-ema-0.05", "model-ema-0.1", "snapshots"} <= names and "model-ema" not in names
    kept = averages_of(checkpoints(finished / "checkpoints")[-1])
    assert list(kept) == ["ema-0.05", "ema-0.1"]
    assert not same(kept["ema-0.05"]["unet"], kept["ema-0.1"]["unet"])
    for name, length in (("model-ema-0.05", "0.05"), ("model-ema-0.1", "0.1")):
        summary = read_summary(finished / name)
        assert (summary.weights, summary.title, summary.steps) == (f"ema-{length}", f"run-ema-{length}", 24)
        assert says((finished / name / "README.md").read_text(), "card-ema-length", length=length)
    files = list((finished / "snapshots").iterdir())
    planned = snapshot_bytes(read_config(finished / "config.json").stage[0], 2 * 4 * len(unet(finished / "model")), 24)
    assert len(files) == 12 and planned <= sum(file.stat().st_size for file in files) < 1.2 * planned
    snapshot = load_file(finished / "snapshots" / "step-00000024.safetensors")
    last = kept["ema-0.1"]["unet"]["conv_in.weight"]
    assert torch.equal(snapshot["unet@ema-0.1/conv_in.weight"], last.half())  # rounded once


def test_another_length_equals_that_of_a_run_that_keeps_it(finished, tmp_path, small_model, images):
    """The distance from the directly trained average is a small part of the distance between it and the weights."""
    directly, _ = run(job(tmp_path, small_model, images, STAGE), "stage.one.ema={ sigma_rel = [0.07] }", *LIGHT)
    assert torch.equal(unet(directly / "model"), unet(finished / "model"))  # averages change nothing in training
    out = averaged(finished, 0.07, tmp_path / "made")
    assert says(out, "average-made", length=0.07, steps=24, count=24)
    weights, exact, built = unet(directly / "model"), unet(directly / "model-ema-0.07"), unet(tmp_path / "made")
    error, distance = (built - exact).norm() / exact.norm(), (weights - exact).norm() / exact.norm()
    print(f"made {error:.1e} from the average of length 0.07, which is {distance:.1e} from the weights")
    assert error < 0.01 * distance
    neighbours = [unet(finished / name) for name in ("model-ema-0.05", "model-ema-0.1")]
    assert all((built - exact).norm() < 0.05 * (neighbour - exact).norm() for neighbour in neighbours)
    summary = read_summary(tmp_path / "made")
    assert summary.weights == "ema-0.07" and says(summary.note, "average-made", length=0.07)


def test_a_kept_length_is_that_of_the_checkpoint(finished, tmp_path):
    averaged(finished, 0.05, tmp_path / "made")
    assert torch.equal(unet(tmp_path / "made"), unet(finished / "model-ema-0.05"))


def test_an_average_ends_at_a_checkpoint(finished, tmp_path, small_model, images):
    shorter, _ = run(
        job(tmp_path, small_model, images, STAGE), "stage.one.until=16", "stage.one.ema={sigma_rel=[0.07]}", *LIGHT
    )
    averaged(finished / "checkpoints" / name_of(16), 0.07, tmp_path / "made")
    exact, built = unet(shorter / "model-ema-0.07"), unet(tmp_path / "made")
    assert (built - exact).norm() < 0.03 * (unet(shorter / "model") - exact).norm()


def test_a_resumed_run_has_the_same_averages_and_snapshots(finished, copy, tmp_path, small_model, images):
    """Also over a switch to bf16 and back: the averages are fp32 in both."""
    path = job(tmp_path, small_model, images, STAGE)
    rewind(copy, 8)
    for later in (copy / "snapshots").glob("*-0000001[024].safetensors"):
        later.write_bytes(b"what a changed run has left")
    best = copy / "snapshots" / "step-best.safetensors"
    best.write_bytes(b"a file of the user")
    run(path, f"run={copy}", LENGTHS, "stage.one.ema_snapshots=12", *LIGHT)
    best.unlink()  # it is still there
    assert same(final(copy), final(finished))
    files = [sorted((folder / "snapshots").iterdir()) for folder in (copy, finished)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_averages_follow_the_exact_weights_over_changes_of_precision(tmp_path, small_model, images):
    """fp32, bf16 and fp32 again, changed at resumes. Each step's average is that of the masters. Resuming changes no bit."""
    keys = LENGTHS, "stage.one.ema_snapshots=3", "stage.one.checkpoint_every=1", "stage.one.keep_checkpoints=9", *LIGHT
    parts = (3, "fp32"), (6, "bf16"), (9, "fp32")
    folders = [tmp_path / name for name in ("whole", "resumed")]
    path = job(tmp_path, small_model, images, STAGE)
    for until, precision in parts:
        for folder in folders:
            for step in (None, until - 2) if folder.name == "resumed" else (None,):
                if step:
                    rewind(folder, step)
                run(path, f"run={folder}", f"stage.one.until={until}", f"stage.one.precision={precision}", *keys)
    assert same(*map(final, folders))
    stored = [{file.name: file.read_bytes() for file in (folder / "snapshots").iterdir()} for folder in folders]
    assert stored[0] == stored[1] and stored[0]
    steps, name = checkpoints(folders[0] / "checkpoints"), "conv_in.weight"
    weights = [load_file(step / "unet" / "diffusion_pytorch_model.safetensors")[name].double() for step in steps]
    for length in (0.05, 0.1):
        kept = [averages_of(step)[f"ema-{length}"]["unet"][name].double() for step in steps]
        for t in range(2, 10):
            beta = (1 - 1 / t) ** (power_of(length) + 1)
            torch.testing.assert_close(kept[t - 1], beta * kept[t - 2] + (1 - beta) * weights[t - 1], rtol=1e-6, atol=1e-7)
        assert not any(torch.equal(average, average.bfloat16().double()) for average in kept)


def test_other_lengths_may_be_enabled_in_the_middle(copy, tmp_path, small_model, images):
    """The new average starts there, so it is as long as a share of its own steps; those of earlier lengths end."""
    path = job(tmp_path, small_model, images, STAGE)
    rewind(copy, 8)
    new = "stage.one.ema={ sigma_rel = [0.1, 0.2] }"
    run(path, f"run={copy}", new, "stage.one.ema_snapshots=12", *LIGHT)
    state = {key.partition(":")[2]: tensor for key, tensor in final(copy).items()}
    assert [state[f"ema-{name}@steps"].item() for name in ("0.1", "0.2")] == [24, 16]
    assert [state[f"ema-{name}@start"].item() for name in ("0.1", "0.2")] == [0, 8]
    assert says(averaged(copy, 0.12, tmp_path / "made"), "average-made", steps=24)


def test_what_cannot_be_averaged_is_refused(finished, copy, tmp_path, small_model, images):
    for length in (0.0, -0.1, 0.2887, 1.0):
        with refused("average-length", length=f"{length:g}"):
            averaged(finished, length)
    with refused("average-no-run", name=small_model):
        averaged(small_model, 0.07)
    with refused("average-unreachable", count=22) as info:
        averaged(finished, 0.005)
    averaged(finished, float(info.value.message.rpartition(" is ")[2]), tmp_path / "advised")  # the advice holds

    occupied = tmp_path / "occupied"
    occupied.mkdir()
    with refused("average-out-exists", out=occupied):
        averaged(finished, 0.07, occupied)

    shutil.rmtree(copy / "snapshots")
    with refused("average-without-snapshots", length=0.2) as info:
        averaged(copy, 0.2)
    averaged(copy, float(re.search(r"--sigma-rel ([\d.]+)", info.value.message)[1]), tmp_path / "nearest")
    averaged(copy, 0.1)
    assert (copy / "averages" / "model-ema-0.1" / "unet").is_dir()

    state = copy / "checkpoints" / name_of(24) / "state.safetensors"
    tensors = {name: tensor for name, tensor in load_file(state).items() if "ema" not in name}
    state.unlink()
    write_safetensors(state, tensors)
    with refused("average-none-kept", checkpoint=name_of(24)):
        averaged(copy, 0.07)


@pytest.mark.parametrize("kind", ["cut", "one bit of a weight", "one digit of a count"])
def test_a_damaged_snapshot_is_left_out(kind, copy, tmp_path):
    path = copy / "snapshots" / "step-00000012.safetensors"
    data = bytearray(path.read_bytes())
    if kind == "one bit of a weight":
        data[-101] ^= 1
    elif kind == "one digit of a count":
        data[data.index(b" 12, ") + 2] ^= 4
    path.write_bytes(data[:100] if kind == "cut" else data)
    out = averaged(copy, 0.07, tmp_path / "made")
    assert says(out, "snapshot-damaged", path=path) and says(out, "average-made", count=22)


def test_a_snapshot_that_cannot_be_written_stops_nothing(tmp_path, small_model, images, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_snapshot", full)
    path = job(tmp_path, small_model, images, STAGE.replace("until = 24", "until = 2"))
    folder, text = run(path, LENGTHS, *LIGHT)
    assert says(text, "snapshot-not-written", step=2, folder=folder / "snapshots", reason="No space left on device")
    assert (folder / "model-ema-0.1").is_dir()


def test_going_back_sets_snapshots_and_averages_aside(copy, tmp_path, small_model, images):
    averaged(copy, 0.07)
    config = load_config(job(tmp_path, small_model, images, STAGE), [f"run={copy}", LENGTHS, "stage.one.until=8", *LIGHT])
    train(config, Console(file=StringIO()), start="8")
    aside = copy / "set-aside-1"
    moved = sorted(path.name for path in (aside / "snapshots").iterdir())
    assert moved == [f"step-{step:08d}.safetensors" for step in range(10, 25, 2)]
    assert (aside / "averages" / "model-ema-0.07").is_dir() and not (copy / "averages" / "model-ema-0.07").exists()
    assert json.loads((aside / "averages" / "model-ema-0.07" / "fastsd.json").read_text())["steps"] == 24
