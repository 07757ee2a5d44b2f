"""The kernels of a job are compiled before it starts: all that it launches, side by side, once."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from threading import Timer
from typing import Any

import first_start
import psutil
import pytest
from PIL import Image
from runs import rewind
from sentences import says
from tiny import job
from triton.runtime.driver import driver

from fastsd.commands import cache as cache_command
from fastsd.commands.cache import cache
from fastsd.config.schema import ModelTable, StageTable, load_config
from fastsd.errors import Stopped
from fastsd.model.formats.load import load_model
from fastsd.model.model import SD15_SCHEDULER
from fastsd.model.shapes import Shapes
from fastsd.run import compilation, stage_kernels
from fastsd.run.compilation import compile_kernels, kernels_of
from fastsd.run.launches import StageRecorder
from fastsd.run.loop import train
from fastsd.terminal.console import Console
from fastsd_kernels import TRITON
from fastsd_kernels.launch import recording

TWO_STAGES = """
[validate]
held_out = 5
batch = 2
[[stage]]
train = ["unet"]
until = 2
batch = 4
micro_batch = 1
optimizer = "dlion"
immiscible = 2
[[stage]]
train = ["unet.attention", "text_encoder"]
until = 2
batch = 4
micro_batch = 2
precision = "bf16"
optimizer = "lion"
lr = 1e-5
ema = 0.9
checkpointing = "block"
"""
SHAPES = """
[data.buckets]
min = 8
max = 24
step = 8
[model.lora]
rank = 3
[[stage]]
train = ["lora"]
until = 12
batch = 3
precision = "tf32"
optimizer = "adamw"
lr = 1e-5
grad_clip = 1.0
checkpointing = "ff"
[[stage]]
train = ["unet"]
until = 12
batch = 2
precision = "bf16"
optimizer = "dlion"
fused_backward = true
"""
AUTOMATIC = """
[[stage]]
train = ["unet"]
until = 1
batch = 4
micro_batch = "auto"
optimizer = "dlion"
[[stage]]
train = ["unet"]
until = 1
batch = 6
micro_batch = "auto"
precision = "bf16"
optimizer = "dlion"
"""


@pytest.fixture(scope="module")
def programs():
    """The process that has imported `first_start.py` for compiled kernels."""
    command, env = [sys.executable, first_start.__file__], {**os.environ, "TRITON_INTERPRET": "0"}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.communicate()


@pytest.fixture
def program(programs, tmp_path):
    """Return a function that runs a program of `first_start.py`, with a cache of Triton that is empty at first."""

    def run(*words: str) -> Any:
        print(json.dumps({"words": words, "cache": str(tmp_path / "triton")}), file=programs.stdin, flush=True)
        answer = json.loads(programs.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    return run


def add_wide_images(folder: Path, count: int) -> None:
    for i in range(count):
        Image.new("RGB", (48, 16), (40 * i, 80, 120)).save(folder / f"wide-{i}.png")


@pytest.fixture
def images(tmp_path, images):
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    add_wide_images(folder, 5)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stages", [TWO_STAGES, SHAPES], ids=["two stages", "shapes"])
def test_exactly_the_kernels_that_a_job_launches_are_compiled_at_its_start(program, tmp_path, tiny_model, images, stages):
    path = job(tmp_path, tiny_model, images, stages, seed="1")
    # With guidance, a sample's forward has 16 images of 1 x 1 positions at the lowest level, and without it 8. The samples of
    # one prompt have another shape and no guidance.
    before, after = (
        ("images = 1", "images = 4\nsize = 4") if stages == TWO_STAGES else ("[cache]", "[cache]\nhidden_states = true")
    )
    other = ', { prompt = "c", width = 20, height = 12, guidance = 1.0 }]' if stages == TWO_STAGES else "]"
    path.write_text(path.read_text().replace(before, after).replace('"blue star"]', f'"blue star"{other}'))
    result = program("train_job", str(path))
    at_start, later = result["compiled"]
    assert at_start.keys() == result["launched"].keys()
    assert later.keys() < at_start.keys()  # those of the second stage
    print(len(at_start), "kernels")


@pytest.mark.slow
def test_a_micro_batch_that_was_unknown_at_the_start(program, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, AUTOMATIC)
    result = program("train_job", str(path))
    at_start, later = result["compiled"]
    missing = result["launched"].keys() - at_start.keys()
    assert len(missing) <= 5 and missing <= later.keys()
    assert len(at_start.keys() - result["launched"].keys()) <= 5


@pytest.mark.slow
def test_kernels_of_the_encoder(program, tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, SHAPES)
    path.write_text(path.read_text().replace("[cache]\n", '[cache]\nprecision = "bf16"\n'))
    result = program("cache_job", str(path))
    (compiled,) = result["compiled"]
    assert result["launched"] and result["launched"].keys() <= compiled.keys()


@pytest.mark.slow
def test_compiled_kernels_are_found_by_their_launches(program):
    first, second, wrong = program("compile_twice")
    assert says(first, "kernels-compiling", count=5, target="sm_89") and says(first, "kernels-compiled", count=5)
    assert len(first.splitlines()) == 2 and second == ""
    reason = "geglu._forward: arange's range must be a power of 2"
    assert says(wrong, "kernels-not-compiled", count=1, reason=reason) and says(wrong, "kernels-compiled", count=0)
    same, other = program("start_compiled")
    assert same == [] and other == ["_forward"]


SLOW = "import time; time.sleep(3600)"


@pytest.fixture
def compilers(monkeypatch):
    """Let three kernels be missing on a GPU. Return a function that sets the program of the processes that compile them."""
    monkeypatch.setattr(driver, "_active", first_start.Gpu(89))
    monkeypatch.setattr(compilation, "missing_kernels", lambda kernels: {name: f'"{name}"' for name in "abc"})
    return lambda code: monkeypatch.setattr(compilation, "_START", code)


@pytest.mark.parametrize("code", ["pass", "print('no JSON', flush=True); input(); input(); input()"])
def test_processes_that_end_or_print(compilers, code):
    compilers(code)
    out = StringIO()
    compile_kernels([], Console(file=out, width=200))
    assert says(out.getvalue(), "kernels-not-compiled", count=3, reason="a compiler process ended")


def test_processes_that_do_not_start(compilers, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/python")
    out = StringIO()
    compile_kernels([], Console(file=out, width=200))
    assert says(out.getvalue(), "kernels-not-compiled", count=3, reason="a compiler process ended")


@pytest.mark.timeout(60)  # without an end of the processes the call would wait for them
def test_ctrl_c_ends_all_processes(compilers):
    compilers(SLOW)
    before = psutil.Process().children()
    Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        compile_kernels([], Console(file=StringIO()))
    assert psutil.Process().children() == before


def test_ctrl_c_stops_caching_that_compiles(tmp_path, tiny_model, images, monkeypatch):
    def compile_kernels(kernels, console):
        assert kernels
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_command, "INTERPRETED", False)
    monkeypatch.setattr(cache_command, "choose_ops", lambda *_: TRITON)
    monkeypatch.setattr(cache_command, "compile_kernels", compile_kernels)
    with pytest.raises(Stopped, match="caching stopped"):
        cache(load_config(job(tmp_path, tiny_model, images, SHAPES)), Console(file=StringIO()))


@pytest.fixture
def gpu_run(monkeypatch, tmp_path, tiny_model, images):
    """Return a function that trains a job as if it were on a GPU, and returns what is printed. Its kernels are not started."""
    path = job(tmp_path, tiny_model, images, AUTOMATIC)
    cache(load_config(path), Console(file=StringIO()))
    monkeypatch.setattr(stage_kernels, "INTERPRETED", False)
    monkeypatch.setattr("fastsd.run.run.choose_ops", lambda *_: TRITON)

    def start(*overrides: str) -> str:
        out = StringIO()
        with recording(89):
            train(load_config(path, overrides), Console(file=out, width=200))
        return out.getvalue()

    return start


@pytest.mark.timeout(60)
def test_a_signal_stops_a_run_that_compiles(compilers, gpu_run, monkeypatch):
    compilers(SLOW)
    before = psutil.Process().children()
    monkeypatch.setattr(StageRecorder, "launches", lambda self: [])
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0])  # for one signal: a second one would stop at once
    monkeypatch.setattr(compilation, "_serve", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="stopped, no step is lost"):
        gpu_run()
    assert psutil.Process().children() == before


def test_a_job_that_cannot_be_recorded_is_trained(gpu_run, monkeypatch):
    def launches(self):
        raise RuntimeError("no such shape\nsecond line")

    monkeypatch.setattr(StageRecorder, "launches", launches)
    monkeypatch.setattr(compilation, "missing_kernels", lambda kernels: dict(enumerate(kernels)))
    text = gpu_run()
    for stage in ("stage-1", "stage-2"):
        assert says(text, "kernels-not-compiled", count=f"those of {stage}", reason="no such shape")
    assert says(text, "log-row", stage="stage-2")


def test_kernels_are_recorded_for_every_number_of_tokens(tiny_model):
    """With an automatic number of chunks, batches have those of 1, 2, 3 or 6. Some kernels depend on it."""
    shapes = Shapes.of(load_model(ModelTable(base=str(tiny_model))))
    stage = StageTable(train=["unet"], until=1, batch=2, optimizer="dlion")

    def kernels(chunks):
        latents = (4, 8, 8)
        settings = {"architecture": 86, "attention": "ieee", "scheduler": SD15_SCHEDULER, "cached_text": False}
        sizes = {"trained": (latents,), "sampled": ((2, *latents),), "validated": ((3, *latents),)}
        recorder = StageRecorder(stage, 2, shapes=replace(shapes, chunks=chunks), **settings, **sizes)
        return set(kernels_of(recorder.launches()))

    by_chunks = [kernels(chunks) for chunks in (1, 2, 3, 6)]
    assert kernels("auto") == set.union(*by_chunks) and len({frozenset(names) for names in by_chunks}) > 1


def test_a_restart_remembers_the_kernels(gpu_run, monkeypatch, tmp_path):
    recorded, compiled, launches = [], [], StageRecorder.launches
    monkeypatch.setattr(StageRecorder, "launches", lambda self: recorded.append(self) or launches(self))
    monkeypatch.setattr(stage_kernels, "compile_kernels", lambda kernels, *_: compiled.append(kernels))
    gpu_run()
    assert len(recorded) == 3  # the second stage again, with its own micro-batch
    rewind(tmp_path / "run", 1)
    gpu_run()
    assert len(recorded) == 3 and compiled[2] == compiled[1] != []
    rewind(tmp_path / "run", 1)
    gpu_run("stage.1.micro_batch=3")
    assert len(recorded) == 4
    (tmp_path / "run" / "kernels.json").write_text("{")
    rewind(tmp_path / "run", 1)
    gpu_run("stage.1.micro_batch=3")
    assert len(recorded) == 5
