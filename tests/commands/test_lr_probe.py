"""`fastsd lr-probe`: what it says of a d that settles, rises or stands still, and that it leaves nothing heavy behind."""

import json
import signal
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import job

from fastsd.commands import lr_probe as module
from fastsd.commands.cache import cache
from fastsd.commands.lr_probe import Probe, lr_probe
from fastsd.config.schema import load_config
from fastsd.errors import UserError

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


def probed(tmp_path, model, images, *keys, **options) -> tuple[list[Probe], str, Path]:
    out = StringIO()
    config = load_config(job(tmp_path, model, images, STAGES), list(keys))
    cache(config, Console(file=StringIO()))
    found = lr_probe(config, console=Console(file=out, width=200), **options)
    return found, out.getvalue(), Path(config.run) / "lr-probe"


def test_it_trains_with_dlion_and_reads_its_log(tmp_path, tiny_model, images):
    (probe,), said, folder = probed(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and probe.plateau == rows[-1]["d"] and probe.growth == rows[-1]["d"] / rows[-11]["d"]
    assert probe.left == (rows[-1]["d"] > 1e-5) and said.splitlines()[-1] == module._sentence(probe, 40)
    assert (
        not list(folder.glob("checkpoints/*"))
        and not (folder / "model").exists()
        and not (folder.parent / "log.jsonl").exists()
    )
    (again,), _, _ = probed(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    assert again == probe


def test_a_probe_that_was_stopped_goes_on(tmp_path, tiny_model, images, monkeypatch):
    from fastsd.errors import Stopped
    from fastsd.run import loop

    (whole,), _, _ = probed(tmp_path, tiny_model, images, "stage.d0=1e-5", "run=" + str(tmp_path / "whole"), steps=40)

    class Asking(loop.Triggers):
        def log(self):
            if self.run.position.progress.step == 9:
                signal.raise_signal(signal.SIGINT)
            return super().log()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Triggers", Asking)
        with pytest.raises(Stopped):
            probed(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    (again,), said, _ = probed(tmp_path, tiny_model, images, "stage.d0=1e-5", steps=40)
    assert "resumed at step 9" in said and again == whole


def test_each_part_has_its_own(tmp_path, tiny_model, images):
    found, said, _ = probed(tmp_path, tiny_model, images, steps=40, stage="both")
    assert [probe.part for probe in found] == ["unet", "text_encoder"]
    assert "for the unet" in said and "for the text_encoder" in said


def test_an_unknown_stage_is_said(tmp_path, tiny_model, images):
    with pytest.raises(UserError, match="--stage is 'last'; the stages of this config are unet, both"):
        probed(tmp_path, tiny_model, images, steps=40, stage="last")


@pytest.mark.parametrize(
    "d, sentence",
    [([1e-6] * 40, "d never left d0 in 400 steps: no lr found; give --steps 1200"),
     ([1e-6] * 20 + [6e-4] * 20, "d settled at 0.0006: use lion, lr = 2.0e-04"),
     ([1e-6 * 1.1**i for i in range(40)], "d was still rising after 400 steps, by 159% in the last quarter")],
)  # fmt: skip
def test_what_it_says(d, sentence):
    probe = module._read("", 0, [{"d": value} for value in d], 1e-6)
    assert module._sentence(probe, 400).startswith(sentence)
