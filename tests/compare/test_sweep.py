"""`fastsd sweep`: planned runs, equality in everything else, resuming, baselines and errors."""

import gc
import json
from io import StringIO
from pathlib import Path

import pytest
from commandline import fastsd
from runs import stop_requested
from sentences import LINES, refused, says
from tiny import job

from fastsd.commands.cache import cache
from fastsd.compare import sweep as module
from fastsd.compare.sweep import plan_sweep, sweep
from fastsd.config.schema import load_config
from fastsd.errors import Stopped, UserError
from fastsd.model.unet import UNet
from fastsd.run.loop import train
from fastsd.terminal.console import Console

STAGE = '[[stage]]\nname = "unet"\ntrain = ["unet"]\nuntil = 3\nbatch = 2\noptimizer = "lion"\nlr = 1e-3\n'
TEXT_STAGE = STAGE.replace("unet", "text").replace('["text"]', '["text_encoder"]')


@pytest.fixture
def path(tmp_path, tiny_model, images) -> Path:
    return job(tmp_path, tiny_model, images, STAGE)


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(module, "compare", lambda *folders, **options: None)


def run_sweep(path: Path, *words: str, baseline: str = "") -> str:
    """Run a sweep, and return the printed text."""
    out = StringIO()
    sweep(path, words, baseline=baseline, console=Console(file=out, width=250))
    return out.getvalue()


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_every_combination_is_one_run(path):
    variants = plan_sweep(path, ["stage.caption_dropout=0.04,0.1", "seed=5", "model.clip_skip=0,1"], "bf16")
    names = [f"caption_dropout={dropout},clip_skip={skip}" for dropout in ("0.04", "0.1") for skip in (0, 1)]
    assert [variant.name for variant in variants] == names
    for variant in variants:
        config, stage = variant.config, variant.config.stage[0]
        assert variant.values == {"stage.caption_dropout": stage.caption_dropout, "model.clip_skip": config.model.clip_skip}
        assert config.seed == 5 and stage.precision == "bf16" and variant.folder == path.parent / "run" / variant.name


def test_folders_are_named_by_values(tmp_path, tiny_model, images):
    path = job(tmp_path, tiny_model, images, STAGE + TEXT_STAGE)
    names = [v.name for v in plan_sweep(path, ["stage.0.lr=1e-5,0.0003", "stage.1.lr=2,3.5"])]
    assert names == [f"0.lr={a},1.lr={b}" for a in ("1e-05", "0.0003") for b in ("2", "3.5")]
    words = ['stage.0.train=["unet"],["unet", "text_encoder"]', "sample.negative=,"]
    with refused("swept-value", key="sample.negative"):
        plan_sweep(path, words)
    words[1] = 'sample.negative="","a/b \\" c"'
    names = [f"train={train},negative={text}" for train in ("unet", "unet-text_encoder") for text in ("", "a-b-c")]
    assert [v.name for v in plan_sweep(path, words)] == names


@pytest.mark.slow
def test_runs_differ_in_one_value_and_equal_those_of_train(path, tmp_path):
    out = run_sweep(path, "stage.unet.caption_dropout=0.5,0.0", "log.every=1")
    root = tmp_path / "run"
    first, second = root / "caption_dropout=0.5", root / "caption_dropout=0"
    configs = []
    for folder, dropout in ((first, 0.5), (second, 0)):
        config = settings(folder)
        assert config["stage"][0].pop("caption_dropout") == dropout and config.pop("run") == str(folder)
        configs.append(config)
    assert configs[0] == configs[1]
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (first, second)]
    for key in ("order", "timesteps", "noise"):
        assert [row[key] for row in logs[0]] == [row[key] for row in logs[1]]
    # The baseline is the run with the config's own value.
    runs = {first.name: {"stage.unet.caption_dropout": 0.5}, second.name: {"stage.unet.caption_dropout": 0.0}}
    assert json.loads((root / "sweep.json").read_text()) == {"config": str(path), "baseline": second.name, "runs": runs}
    assert says(out, "sweep-start", count=2, folder=root, baseline=second.name) and "[2/2] caption_dropout=0" in out
    assert says((root / "report.html").read_text(), "section-difference")
    config = load_config(path, [f"run={tmp_path / 'alone'}", "stage.unet.caption_dropout=0.5"])
    train(config, Console(file=StringIO()))
    assert (tmp_path / "alone" / "log.jsonl").read_bytes() == (first / "log.jsonl").read_bytes()


@pytest.mark.slow
def test_same_command_skips_finished_runs_and_resumes_others(path, tmp_path, monkeypatch, no_report):
    words = ("stage.lr=1e-3,2e-3",)
    with monkeypatch.context() as patch:  # a stop is requested in the first step
        patch.setattr("fastsd.run.loop.stop_signals", stop_requested)
        with pytest.raises(Stopped):
            run_sweep(path, *words)
    root = tmp_path / "run"
    assert (root / "lr=0.001").exists() and not (root / "lr=0.002").exists()
    assert run_sweep(path, *words).count("resumed") == 1 and (root / "lr=0.002" / "model").is_dir()
    trained = []
    monkeypatch.setattr(module, "train", lambda config, console: trained.append(config))
    assert run_sweep(path, *words).count(LINES["sweep-finished"]) == 2 and trained == []
    assert run_sweep(path, *words, "stage.until=4").count(LINES["sweep-finished"]) == 0 and len(trained) == 2


@pytest.mark.slow
def test_failed_run_does_not_stop_the_others(path, tmp_path, monkeypatch, capsys):
    words = ("sweep", path, "stage.lr=1e-3,1e30,2e-3", "stage.until=9", "log.every=1")
    code, out, err = fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(err, "sweep-run-failed", run="fastsd: lr=1e+30") and says(err, "no-finite-gradient")
    assert len(err.strip().splitlines()) == 1 and says(out, "sweep-continues")
    root = tmp_path / "run"
    assert (root / "lr=0.001" / "model").is_dir() and (root / "lr=0.002" / "model").is_dir()
    assert "lr=1e+30" in (root / "report.html").read_text()


def test_failed_runs_are_listed_at_the_end(path, monkeypatch, no_report):
    def refuse(config, console):
        if config.seed < 3:
            raise UserError("run-locked", f"locked {config.seed}, see `fastsd check CONFIG`")

    monkeypatch.setattr(module, "train", refuse)
    commands = [f"`fastsd check {path} seed={seed} run={path.parent / 'run'}/seed={seed}`" for seed in (1, 2)]
    problems = [f"seed={seed} failed: locked {seed}, see {command}" for seed, command in enumerate(commands, 1)]
    with refused("sweep-runs-failed", problem="\n".join(problems)):
        run_sweep(path, "seed=1,2,3")


def test_each_problem_of_the_models_is_reported_once(path, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", lambda config, console: pytest.fail("trained"))
    with refused("sweep-jobs") as error:
        run_sweep(path, "model.clip_skip=0,2", "sample.size=33,35", "seed=1,2")
    problems = str(error.value).splitlines()
    assert [says(problem, "sample-size", width=size) for problem, size in zip(problems, (33, 35), strict=False)] == [True, True]
    assert len(problems) == 3 and says(problems[2], "clip-skip", clip_skip=2)


@pytest.mark.slow
def test_caches_are_built_once_per_view_and_models_are_freed(path, tmp_path, monkeypatch, no_report):
    resolutions, model_counts = [], []

    def count_models():
        gc.collect()
        return sum(type(value) is UNet for value in gc.get_objects())

    def counting_cache(config, console):
        resolutions.append(config.data.resolution)
        return cache(config, console)

    def counting_train(config, console):
        model_counts.append(count_models())
        return train(config, console)

    monkeypatch.setattr(module, "cache", counting_cache)
    monkeypatch.setattr(module, "train", counting_train)
    before = count_models()
    run_sweep(path, "data.resolution=16,24", "model.clip_skip=0,1", "stage.until=1", f"cache.dir={tmp_path / 'cache'}")
    assert resolutions == [16, 24] and model_counts == [before] * 4


def test_baseline_can_be_named(path, monkeypatch, no_report):
    monkeypatch.setattr(module, "train", lambda config, console: None)
    assert says(run_sweep(path, "seed=1,2"), "sweep-start", baseline="seed=1")
    assert says(run_sweep(path, "seed=1,2", baseline="seed=2"), "sweep-start", baseline="seed=2")


BAD_SWEEPS = [
    (["stage.lrr=1e-3,2e-3"], "sweep-configs", "stage.0.lrr"),
    (["stage.batch=2,big"], "sweep-configs", "stage.0.batch is 'big' (a str)"),
    (["stage.lr=-1,1e-3"], "sweep-configs", "stage.0.lr is -1"),
    (["stage.lr="], "swept-value", "'stage.lr='"),
    (["stage.lr=1e-3,"], "swept-value", "'stage.lr=1e-3,'"),
    (["stage.lr=1e-3,0.001"], "swept-value-twice", " 0.001 "),
    (["stage.lr=1e-3,2e-3", "stage.lr=3e-3"], "swept-key-twice", "stage.lr=a,b,c"),
    (["stage.lr"], "swept-no-values", "'stage.lr'"),
    ([], "sweep-no-values", ""),
    (["seed=3"], "sweep-no-values", ""),
    (["run=a,b"], "sweep-several-folders", ""),
    (["sample.negative=a b,a-b"], "sweep-shared-folder", "negative=a-b"),
    (["stage.lr=1,1.0"], "swept-value-twice", "1.0"),
    (["stage.0.lr=1e-3,2e-3", "stage.unet.lr=3e-3,4e-3"], "sweep-same-run", ""),
    (["seed=1,2", "model.base=/none"], "source-missing", "'/none'"),
    (["model.clip_skip=0,1,2"], "clip-skip", " 2 "),
    (["seed=1,2", "sample.size=33"], "sample-size", "33"),
    (["seed=1,2", "--baseline", "seed=3"], "unknown-baseline-run", "seed=1, seed=2"),
    (["seed=1,2", "stage.7.lr=1"], "override-no-stage", "'7'"),
]


@pytest.mark.parametrize("words, error, fact", BAD_SWEEPS, ids=[" ".join(words) for words, *_ in BAD_SWEEPS])
def test_bad_sweeps_get_one_sentence_before_any_training(words, error, fact, path, tmp_path, monkeypatch, capsys):
    before = sorted(tmp_path.rglob("*"))
    code, _, err = fastsd("sweep", path, *words, monkeypatch=monkeypatch, capsys=capsys)
    print(err)
    assert code == 2 and says(err, error) and fact in err and len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
