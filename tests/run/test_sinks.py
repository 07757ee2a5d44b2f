"""Reports of a run: sinks that fail, model-FLOP utilisation, and traces that the user requests."""

import json
import resource
import signal
import sys
import threading
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from runs import final, rows_of, run, same
from sentences import pattern, says
from tiny import job

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.model.shapes import forward_flops
from fastsd.plan.gpu_specs import find_gpu, gpu_of
from fastsd.run import log, loop, report
from fastsd.run.sinks import TensorBoard
from fastsd.terminal.console import Console
from fastsd_kernels.cards import CARDS

STAGE = '[[stage]]\ntrain = ["unet"]\nuntil = 7\nbatch = 6\noptimizer = "lion"\nlr = 1e-4\nsample_every = 4\n'


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_model, images):
    """The config, folder and output of a run without sinks, traces or a known peak."""
    path = job(tmp_path_factory.mktemp("plain"), tiny_model, images, STAGE)
    return path, *run(path)


def test_text_is_written_as_it_is():
    text = "[bold] :smile: 1 of 2\n" + "long " * 40
    console = Console(file=StringIO(), width=20)
    console.echo(text)
    console.warn(text)
    assert console.file.getvalue() == f"{text}\nwarning: {text}\n"


class RecordingSink:
    """Records its calls. The methods in `broken` raise."""

    def __init__(self, name, *broken):
        self.name, self.broken, self.calls = name, broken, []

    def record(self, method, *args):
        if method in self.broken:
            raise RuntimeError(f"{method} failed")
        self.calls.append((method, *args))

    def scalars(self, values, step):
        self.record("scalars", step, values["train/loss"])

    def image(self, name, image, step):
        self.record("image", step, name, image.size)

    def close(self):
        self.record("close")


@pytest.mark.parametrize("method", ["scalars", "image", "close"])
def test_a_sink_that_fails_warns_once_and_harms_nothing_else(method, plain, tmp_path, monkeypatch):
    path, folder, _ = plain
    sinks = RecordingSink("first", method), RecordingSink("second")
    monkeypatch.setattr(report, "open_sinks", lambda *args: list(sinks))
    failing, text = run(path, f"run={tmp_path / 'run'}")
    warnings = pattern("sink-failed", sink="first", error="RuntimeError", reason=f"{method} failed").findall(text)
    assert len(warnings) == 1 and not says(text, "sink-failed", sink="second")
    assert {call[0] for call in sinks[0].calls} == {"scalars", "image", "close"} - {method}
    assert [call[1:] for call in sinks[1].calls if call[0] == "scalars"] == [(r["step"], r["loss"]) for r in rows_of(folder)]
    assert [call[1:3] for call in sinks[1].calls if call[0] == "image"] == [(n, "samples/stage-1") for n in (0, 4, 7)]
    assert sinks[1].calls[-1] == ("close",)
    assert same(final(failing), final(folder)) and (failing / "log.jsonl").read_bytes() == (folder / "log.jsonl").read_bytes()


def steps_on_the_board(folder):
    """Return the steps and losses that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")]


def test_tensorboard_continues_after_a_full_disk(tmp_path):
    """The disk has no room for half of a row. No thread is involved, whose error would be a traceback."""
    board, threads = TensorBoard(tmp_path, 0), threading.active_count()
    board.scalars({"train/loss": 1.0}, 1)
    (file,) = (tmp_path / "tensorboard").iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError):
            board.scalars({"train/loss": 1.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert threading.active_count() == threads
    for step in (3, 4):
        board.scalars({"train/loss": 0.5}, step)
    board.image("samples/a", Image.new("RGB", (4, 3)), 4)
    assert steps_on_the_board(tmp_path) == [(1, 1.0), (3, 0.5), (4, 0.5)]


def test_tensorboard_hides_the_steps_that_a_restart_repeats(tmp_path):
    for step_done, steps in ((0, (1, 2, 3, 4)), (2, (3,))):
        board = TensorBoard(tmp_path, step_done)
        for step in steps:
            board.scalars({"train/loss": float(step_done)}, step)
    assert steps_on_the_board(tmp_path) == [(1, 0.0), (2, 0.0), (3, 2.0)]


def test_a_sink_that_cannot_be_opened_is_left_out(plain, tmp_path, monkeypatch):
    def init(**settings):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    path, folder, _ = plain
    offline, text = run(path, f"run={tmp_path / 'run'}", "log.wandb=project")
    assert says(text, "sink-not-opened", sink="Weights & Biases", error="ConnectionError", reason="offline")
    assert same(final(offline), final(folder))


def test_weights_and_biases_gets_the_rows(plain, tmp_path, monkeypatch):
    logged = []
    wandb_run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **settings: logged.append(settings) or wandb_run))
    path, folder, _ = plain
    run(path, f"run={tmp_path / 'run'}", "log.wandb=project")
    settings, *rows, end = logged
    assert settings["project"] == "project" and settings["id"] == "run" and end == "finish"
    assert [(step, values["train/loss"]) for step, values in rows] == [(row["step"], row["loss"]) for row in rows_of(folder)]


def test_utilisation_is_logged_if_the_peak_is_known(plain, tiny_model, tmp_path, monkeypatch):
    path, folder, text = plain
    assert not any("mfu" in row for row in rows_of(folder, "timing.jsonl")) and "MFU" not in text
    monkeypatch.setattr(log, "gpu_of", lambda device: CARDS["4090"]._replace(bf16=2, tf32=3, fp32=0.5))
    with_peak, text = run(path, f"run={tmp_path / 'run'}")
    model = load_model(ModelTable(base=str(tiny_model)))
    rows, flops = rows_of(with_peak, "timing.jsonl"), 3 * forward_flops(model.unet.cfg, 16 // model.vae.downscale)
    assert [row["mfu"] for row in rows] == pytest.approx([flops * row["images_per_second"] / 0.5e12 for row in rows])
    assert all(f" | MFU {row['mfu']:.0%}\n" in text for row in rows)
    assert same(final(with_peak), final(folder))


DEVICE_NAMES = {
    "NVIDIA GeForce RTX 4090": "4090", "NVIDIA GeForce RTX 3090": "3090", "NVIDIA H200": "h200",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA H100 PCIe": None,
    "NVIDIA H200 NVL": None, "Tesla T4": None,
}  # fmt: skip


@pytest.mark.parametrize("name, card", DEVICE_NAMES.items())
def test_devices_are_recognised_by_name(name, card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_of(torch.device("cuda")) == (find_gpu(card) if card else None)
    assert gpu_of(torch.device("cpu")) is None


def request_profile_at(step, monkeypatch):
    class RequestsProfile(loop.Triggers):
        def after_step(self):
            if self.run.position.progress.step == step:
                (self.run.folder / "trigger.profile").touch()
            return super().after_step()

    monkeypatch.setattr(loop, "Triggers", RequestsProfile)


@pytest.mark.parametrize("requested, last, steps", [(1, 6, 5), (5, 7, 2)])
def test_requested_profiles_are_traces(requested, last, steps, plain, tmp_path, monkeypatch):
    request_profile_at(requested, monkeypatch)
    path, folder, _ = plain
    traced, text = run(path, f"run={tmp_path / 'run'}")
    trace = traced / "profiles" / f"step-{last:08d}.json"
    assert says(text, "profile-written", steps=steps, path=trace) and list(trace.parent.iterdir()) == [trace]
    events = json.loads(trace.read_text())["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events) and not (traced / "trigger.profile").exists()
    assert same(final(traced), final(folder))


@pytest.mark.parametrize("method", ["start", "export_chrome_trace"])
def test_a_profile_that_fails_harms_nothing(method, plain, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no tracer")

    request_profile_at(1, monkeypatch)
    monkeypatch.setattr(torch.profiler.profile, method, fail)
    path, folder, _ = plain
    traced, text = run(path, f"run={tmp_path / 'run'}")
    assert says(text, "profile-failed", reason="no tracer") and not list(traced.glob("profiles/*"))
    assert same(final(traced), final(folder))
