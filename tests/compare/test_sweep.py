"""`fastsd sweep`: which runs it makes, that they differ in nothing else, what it passes over, and what it refuses."""

import contextlib
import gc
import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import job

from fastsd import cli
from fastsd.commands.cache import cache
from fastsd.compare import sweep as module
from fastsd.compare.sweep import plan_sweep, sweep
from fastsd.config.schema import load_config
from fastsd.errors import Stopped, UserError
from fastsd.model.unet import UNet
from fastsd.run.loop import train

STAGE = '[[stage]]\nname = "unet"\ntrain = ["unet"]\nuntil = 3\nbatch = 2\noptimizer = "lion"\nlr = 1e-3\n'
SECOND = STAGE.replace("unet", "text").replace('["text"]', '["text_encoder"]')


@pytest.fixture
def path(tmp_path, tiny_model, images) -> Path:
    return job(tmp_path, tiny_model, images, STAGE)


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(module, "compare", lambda *folders, **options: None)


def run(path: Path, *words: str, baseline: str = "") -> str:
    """Sweep, and return what was said."""
    out = StringIO()
    sweep(path, words, baseline=baseline, console=Console(file=out, width=250))
    return out.getvalue()


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_every_combination_is_a_run_of_its_own(path):
    variants = plan_sweep(path, ["stage.caption_dropout=0.04,0.1", "seed=5", "model.clip_skip=0,1"], "bf16")
    assert [variant.name for variant in variants] == [
        f"caption_dropout={dropout},clip_skip={skip}" for dropout in ("0.04", "0.1") for skip in (0, 1)
    ]
    for variant in variants:
        config, stage = variant.config, variant.config.stage[0]
        assert variant.values == {"stage.caption_dropout": stage.caption_dropout, "model.clip_skip": config.model.clip_skip}
        assert config.seed == 5 and stage.precision == "bf16" and variant.folder == path.parent / "run" / variant.name


def test_folders_are_named_by_values(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE + SECOND)
    names = [v.name for v in plan_sweep(path, ["stage.0.lr=1e-5,0.0003", "stage.1.lr=2,3.5"])]
    assert names == [f"0.lr={a},1.lr={b}" for a in ("1e-05", "0.0003") for b in ("2", "3.5")]
    words = ['stage.0.train=["unet"],["unet", "text_encoder"]', "sample.negative=,"]
    with pytest.raises(UserError, match="sample.negative has an empty one"):
        plan_sweep(path, words)
    words[1] = 'sample.negative="","a/b \\" c"'
    assert [v.name for v in plan_sweep(path, words)] == [
        f"train={train},negative={negative}" for train in ("unet", "unet-text_encoder") for negative in ("", "a-b-c")
    ]


def test_runs_differ_in_one_value_and_come_out_as_train_makes_them(path, tmp_path):
    said = run(path, "stage.unet.caption_dropout=0.5,0.0", "log.every=1")
    root = tmp_path / "run"
    first, second = root / "caption_dropout=0.5", root / "caption_dropout=0"
    one, other = settings(first), settings(second)
    assert one["stage"][0].pop("caption_dropout") == 0.5 and other["stage"][0].pop("caption_dropout") == 0
    assert one.pop("run") == str(first) and other.pop("run") == str(second) and one == other
    rows = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (first, second)]
    assert [[r[key] for r in rows[0]] for key in ("order", "timesteps", "noise")] == [
        [r[key] for r in rows[1]] for key in ("order", "timesteps", "noise")
    ]
    # The config's own value is the baseline; it stands second.
    assert json.loads((root / "sweep.json").read_text()) == {
        "config": str(path), "baseline": second.name,
        "runs": {first.name: {"stage.unet.caption_dropout": 0.5}, second.name: {"stage.unet.caption_dropout": 0.0}},
    }  # fmt: skip
    assert f"2 runs in {root}, measured against {second.name}" in said and "[2/2] caption_dropout=0" in said
    assert "Difference from the baseline" in (root / "report.html").read_text()
    config = load_config(path, [f"run={tmp_path / 'alone'}", "stage.unet.caption_dropout=0.5"])
    train(config, Console(file=StringIO()))
    assert (tmp_path / "alone" / "log.jsonl").read_bytes() == (first / "log.jsonl").read_bytes()


def test_again_passes_over_what_is_finished_and_resumes_what_is_not(path, tmp_path, monkeypatch, no_report):
    words = ("stage.lr=1e-3,2e-3",)
    with monkeypatch.context() as patch:  # asked to stop in the first step
        patch.setattr("fastsd.run.loop.stop_signal", lambda: contextlib.nullcontext([15]))
        with pytest.raises(Stopped):
            run(path, *words)
    root = tmp_path / "run"
    assert (root / "lr=0.001").exists() and not (root / "lr=0.002").exists()
    said = run(path, *words)
    assert said.count("resumed at step 1") == 1 and (root / "lr=0.002" / "model").is_dir()
    begun = []
    monkeypatch.setattr(module, "train", lambda config, console: begun.append(config))
    assert run(path, *words).count("finished already") == 2 and begun == []
    assert run(path, *words, "stage.until=4").count("finished already") == 0 and len(begun) == 2


def test_a_run_that_fails_does_not_lose_the_others(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastsd", "sweep", str(path), "stage.lr=1e-3,1e30,2e-3", "stage.until=9", "log.every=1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and err.startswith("fastsd: lr=1e+30 failed: ") and "no finite gradient" in err
    assert len(err.strip().splitlines()) == 1 and "the others go on" in out
    root = tmp_path / "run"
    assert (root / "lr=0.001" / "model").is_dir() and (root / "lr=0.002" / "model").is_dir()
    assert "lr=1e+30" in (root / "report.html").read_text()


def test_caches_are_made_once_for_each_view_and_models_do_not_pile_up(path, tmp_path, monkeypatch, no_report):
    cached, alive = [], []

    def counted(config, console):
        cached.append(config.data.resolution)
        return cache(config, console)

    def watched(config, console):
        gc.collect()
        alive.append(sum(type(thing) is UNet for thing in gc.get_objects()))
        return train(config, console)

    monkeypatch.setattr(module, "cache", counted)
    monkeypatch.setattr(module, "train", watched)
    gc.collect()
    before = sum(type(thing) is UNet for thing in gc.get_objects())
    run(path, "data.resolution=16,24", "model.clip_skip=0,1", "stage.until=1", f"cache.dir={tmp_path / 'cache'}")
    assert cached == [16, 24] and alive == [before] * 4


def test_a_baseline_can_be_named(path, monkeypatch, no_report):
    monkeypatch.setattr(module, "train", lambda config, console: None)
    assert "measured against seed=1" in run(path, "seed=1,2")
    assert "measured against seed=2" in run(path, "seed=1,2", baseline="seed=2")


BAD = [
    (["stage.lrr=1e-3,2e-3"], ": stage.0.lrr: unknown key; did you mean lr?"),
    (["stage.batch=2,big"], ": stage.0.batch is 'big' (a str); it must be a whole number"),
    (["stage.lr=-1,1e-3"], ": stage.0.lr is -1; it must be"),
    (["stage.lr="], "stage.lr has no values ('stage.lr='); write key=a,b,c"),
    (["stage.lr=1e-3,"], "stage.lr has an empty one among its values"),
    (["stage.lr=1e-3,0.001"], "stage.lr has the value 0.001 twice; leave one out"),
    (["stage.lr=1e-3,2e-3", "stage.lr=3e-3"], "stage.lr is given twice; write all its values in one: stage.lr=a,b,c"),
    (["stage.lr"], "'stage.lr' names no values; write key=a,b,c"),
    ([], "there is nothing to sweep; give a key several values"),
    (["seed=3"], "there is nothing to sweep; give a key several values, for example stage.caption_dropout=0.04,0.1"),
    (["run=a,b"], "run has several values; name one folder, below which each run gets its own"),
    (["sample.negative=a b,a-b"], "two runs would share the folder"),
    (["stage.lr=1,1.0"], "stage.lr has the value 1.0 twice; leave one out"),
    (["stage.0.lr=1e-3,2e-3", "stage.unet.lr=3e-3,4e-3"], "are the same run; leave one out"),
    (["seed=1,2", "model.base=/none"], "model.base is '/none': no such folder or file"),
    (["model.clip_skip=0,1,2"], "model.clip_skip is 2 and the text encoder has 2 layers; choose 0 to 1"),
    (["seed=1,2", "sample.size=33"], "sample.size is 33; this model's images are multiples of 4 px"),
    (["seed=1,2", "--baseline", "seed=3"], "--baseline is 'seed=3', which is not among the runs (seed=1, seed=2)"),
    (["seed=1,2", "stage.7.lr=1"], "there is no stage '7'"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: " ".join(case[0]))
def test_bad_sweeps_get_one_sentence_before_anything_is_trained(case, path, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["fastsd", "sweep", str(path), *case[0]])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    print(err)
    assert stop.value.code == 2 and case[1] in err and len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
