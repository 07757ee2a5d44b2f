"""`fastsd lr-probe`: reports on a d that settles, rises or stays at d0, resuming, and cleaning up."""

import json
import signal
from io import StringIO
from pathlib import Path

import pytest
from sentences import refused, says
from tiny import job

from fastsd.commands import lr_probe as module
from fastsd.commands.cache import cache
from fastsd.commands.lr_probe import Probe, lr_probe
from fastsd.config.schema import load_config
from fastsd.terminal.console import Console

STAGES = """
[[stage]]
name = "unet"
train = ["unet"]
until = "2e"
batch = 4
optimizer = "lion"
lr = 1e-4
schedule = "cosine"
ema = 0.9
[[stage]]
name = "both"
train = ["unet", "text_encoder"]
until = 5
batch = 4
optimizer = "lion"
lr = { unet = 1e-4, text_encoder = 1e-5 }
"""


def run_probe(tmp_path, model, images, *keys, **options) -> tuple[list[Probe], str, Path]:
    out = StringIO()
    config = load_config(job(tmp_path, model, images, STAGES), list(keys))
    cache(config, Console(file=StringIO()))
    probes = lr_probe(config, console=Console(file=out, width=200), **options)
    return probes, out.getvalue(), Path(config.run) / "lr-probe"


def test_trains_with_dlion_and_reads_the_log(tmp_path, tiny_model, images):
    (probe,), out, folder = run_probe(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and probe.plateau == rows[-1]["d"] and probe.growth == rows[-1]["d"] / rows[-11]["d"]
    assert probe.left_d0 == (rows[-1]["d"] > 1e-5) and out.splitlines()[-1] == module._sentence(probe, 40)
    assert not list(folder.glob("checkpoints/*"))
    assert not (folder / "model").exists() and not (folder.parent / "log.jsonl").exists()
    (again,), _, _ = run_probe(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    assert again == probe


@pytest.mark.slow
def test_stopped_probe_resumes(tmp_path, tiny_model, images, monkeypatch):
    from fastsd.errors import Stopped
    from fastsd.run import loop

    (whole,), _, _ = run_probe(tmp_path, tiny_model, images, "stage.d0=1e-5", "run=" + str(tmp_path / "whole"), steps=40)

    class Stopping(loop.Triggers):
        def after_step(self):
            if self.run.position.progress.step == 9:
                signal.raise_signal(signal.SIGINT)
            return super().after_step()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Triggers", Stopping)
        with pytest.raises(Stopped):
            run_probe(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    (again,), out, _ = run_probe(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    assert "step 9" in out and again == whole


def test_each_component_has_its_own_d(tmp_path, tiny_model, images):
    probes, out, _ = run_probe(tmp_path, tiny_model, images, steps=40, stage="both")
    assert [probe.component for probe in probes] == ["unet", "text_encoder"]
    assert all(f"d of the {probe.component} " in out for probe in probes)


def test_unknown_stage_is_refused(tmp_path, tiny_model, images):
    with refused("probe-unknown-stage", stage="'last'", stages="unet, both"):
        run_probe(tmp_path, tiny_model, images, steps=40, stage="last")


REPORTS = [
    ([1e-6] * 40, "probe-stayed", {"d": "d", "steps": 400, "longer": 1200}),
    ([1e-6] * 20 + [6e-4] * 20, "probe-settled", {"d": "d", "value": "0.0006", "lr": "2.0e-04"}),
    ([1e-6 * 1.1**i for i in range(40)], "probe-rising", {"d": "d", "steps": 400, "growth": "159%"}),
]


@pytest.mark.parametrize("d, name, fields", REPORTS, ids=[name for _, name, _ in REPORTS])
def test_reports_whether_d_settled(d, name, fields):
    probe = module._read("", 0, [{"d": value} for value in d], 1e-6)
    assert says(module._sentence(probe, 400), name, **fields)
