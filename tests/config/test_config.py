"""Configs: defaults, overrides, and one sentence for each problem."""

import tomllib
from typing import get_args

import pytest
from environment import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import pattern, refused, says

from fastsd.config.keys import Key, conditions, properties
from fastsd.config.optimizers import OPTIMIZERS
from fastsd.config.schema import Config, SampleTable, StageTable, dump_config, load_config, parse_config
from fastsd.config.stages import ENDLESS, parse_amount, steps_of
from fastsd.errors import UserError
from fastsd.sampling.prompts import read_prompts

GOOD = """
[model]
base = "some/model"
[data]
folders = ["images"]
[[stage]]
name = "unet"
train = ["unet"]
until = "2e"
[[stage]]
train = ["text_encoder"]
until = 250
optimizer = "lion"
lr = 3e-6
warmup = 0.1
"""


def option_of(key, option, value, expected):
    return pattern("option-of", key=key, option=option, value=value, expected=expected)


def load(tmp_path, text, *overrides, precision=None):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load_config(path, list(overrides), precision)


def test_defaults_and_stages(tmp_path):
    config = load(tmp_path, GOOD)
    unet, text = config.stage
    assert (unet.optimizer, unet.rate_of("unet"), unet.precision) == ("dlion", 1.0, "fp32")
    assert unet.batch == unet.micro_batch_size == 32
    assert [config.stage_name(i) for i in range(2)] == ["unet", "stage-2"]
    assert unet.steps(100) == 7 and text.steps(100) == 250  # "2e" is 200 images in batches of 32
    assert text.warmup_steps(250) == 25
    assert Config.model_validate_json(dump_config(config)) == config


AMOUNTS = [
    (7, (7, "steps")), ("7", (7, "steps")), ("7 steps", (7, "steps")), ("2e", (2, "epochs")), ("1.5 epochs", (1.5, "epochs")),
    ("64000 images", (64000, "images")), ("90s", (90, "seconds")), ("90m", (5400, "seconds")), ("1.5 hours", (5400, "seconds")),
    ("2d", (172800, "seconds")),
]  # fmt: skip


@pytest.mark.parametrize("until, expected", AMOUNTS)
def test_amounts(until, expected):
    assert parse_amount("until", until) == expected


WORDS = {
    "steps": {"": 1, "step": 1, "steps": 1}, "epochs": {"e": 1, "epoch": 1, "epochs": 1}, "images": {"image": 1, "images": 1},
    "seconds": {
        **dict.fromkeys(["s", "second", "seconds"], 1), **dict.fromkeys(["m", "min", "mins", "minute", "minutes"], 60),
        **dict.fromkeys(["h", "hour", "hours"], 3600), **dict.fromkeys(["d", "day", "days"], 86400),
    },
}  # fmt: skip
FORMS = [(word, unit, factor) for unit, words in WORDS.items() for word, factor in words.items()]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 10**9), st.sampled_from(FORMS), st.booleans(), st.sampled_from(["", " "]))
def test_amounts_of_every_form(number, form, is_upper, space):
    word, unit, factor = form
    text = f"{space}{number}{space}{word}{space}"
    assert parse_amount("until", text.upper() if is_upper else text) == (number * factor, unit)
    if unit in ("epochs", "seconds"):
        assert parse_amount("until", f"{number}.5{space}{word}") == ((number + 0.5) * factor, unit)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(FORMS), st.integers(1, 300), st.integers(1, 10**6))
def test_a_larger_amount_has_no_fewer_steps(number, more, form, batch, epoch):
    word, unit, _ = form
    steps, more_steps = (steps_of("until", f"{n}{word}", batch, epoch) for n in (number, number + more))
    if unit == "seconds":
        assert steps is more_steps is None
    else:
        images = number * {"steps": batch, "epochs": epoch, "images": 1}[unit]
        assert (steps - 1) * batch < images <= steps * batch and steps <= more_steps


def test_steps_of_a_stage_are_rounded_up():
    def steps(until):
        return StageTable(train=["unet"], until=until, batch=32).steps(100)

    assert [steps(until) for until in (7, "2e", "1.5e", "64 images", "65 images")] == [7, 7, 5, 2, 3]
    assert steps("3h") == ENDLESS


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    (tmp_path / "c.toml").write_text(GOOD, encoding="utf-8-sig")
    assert load_config(tmp_path / "c.toml") == load(tmp_path, GOOD)


def test_paths_are_expanded_and_have_one_spelling(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DISK", "/disk")
    keys = "model.base", "model.vae", "model.tokenizer", "model.lora.file", "cache.dir", "sample.prompts_file", "run"
    paths = ["~/x/", "$DISK/y", "${DISK}/y", "plain/", "/", "$UNSET/z"]
    expected = ["/home/me/x", "/disk/y", "/disk/y", "plain", "/", "$UNSET/z"]
    for path, full in zip(paths, expected, strict=True):
        folders = f'data.folders=["{path}", {{path = "{path}", repeats = 2}}]'
        config = load(tmp_path, GOOD, *(f"{key}={path}" for key in keys), folders)
        assert config == load(tmp_path, GOOD, *(f"{key}={full}" for key in keys), folders.replace(path, full))
        assert [root.path for root in config.data.roots] == [full, full] and config.data.roots[1].repeats == 2
        assert {config.model.base, config.model.lora.file, config.cache.dir, config.sample.prompts_file, config.run} == {full}
    for key in (*keys, "data.folders"):
        value = ['["${UNSET}/a"]', '[{ path = "${UNSET}/a" }]'] if key == "data.folders" else ["${UNSET}/a"]
        for text in value:
            with refused("config-invalid") as error:
                load(tmp_path, GOOD, f"{key}={text}")
            assert str(error.value).count("\n") == 0 and says(str(error.value), "path-variable", variable="UNSET")


@pytest.mark.parametrize(
    "path, advised", [("C:\\Users\\me", True), ("C:\\pics", True), ("C:\\new\\temp", None), ("a] = [", False)]
)
def test_backslashes_in_paths_get_the_advice_they_need(tmp_path, path, advised):
    text = f'run = "{path}' + ("\n" if advised is False else '"\n') + GOOD
    if advised is None:  # \n and \t are valid escapes
        with refused("config-invalid") as error:
            load(tmp_path, text)
        assert says(str(error.value), "path-control")
    else:
        advice = "write paths with / or in 'single quotes', because a backslash in double quotes starts an escape"
        with refused("config-no-toml", advice=advice if advised else "fix the file"):
            load(tmp_path, text)
    assert advised is False or load(tmp_path, text.replace(f'"{path}"', f"'{path}'")).run == path


def test_backslashes_in_overrides_get_the_advice_they_need(tmp_path):
    assert load(tmp_path, GOOD, "run=C:\\pics").run == "C:\\pics"
    assert load(tmp_path, GOOD, "data.folders=['C:\\pics']").data.folders == ["C:\\pics"]
    for value in ('["C:\\pics"]', '"C:\\pics"', '[{ path = "C:\\pics" }]'):
        with refused("override-backslash", value=value):
            load(tmp_path, GOOD, f"data.folders={value}")


def test_a_config_that_is_not_utf8_gets_advice(tmp_path):
    (tmp_path / "c.toml").write_bytes(f"run = 'caf\u00e9'\n{GOOD}".encode("latin-1"))
    with refused("config-no-toml", advice="save it as UTF-8"):
        load_config(tmp_path / "c.toml")


def test_prompts_end_only_at_the_ends_of_lines(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red fox\r\n\n one\x85\u2028two \rthree".encode())
    table = SampleTable(prompts=["first"], prompts_file=str(tmp_path / "prompts.txt"))
    assert [prompt.prompt for prompt in read_prompts(table)] == ["first", "a red fox", "one\x85\u2028two", "three"]


def test_overrides(tmp_path):
    top_level = "seed=7", "model.vae=other/vae", 'data.folders=["a", "b"]'
    stages = "stage.0.batch=8", "stage.stage-2.lr=1e-5", "stage.grad_clip=1.0", "stage.unet.betas=[0.9, 0.95]"
    config = load(tmp_path, GOOD, *top_level, *stages, precision="bf16")
    assert (config.seed, config.model.vae, config.data.folders) == (7, "other/vae", ["a", "b"])
    assert [stage.batch for stage in config.stage] == [8, 32]
    assert config.stage[1].lr == 1e-5 and config.stage[0].betas == [0.9, 0.95]
    assert {stage.grad_clip for stage in config.stage} == {1.0}
    assert {stage.precision for stage in config.stage} == {"bf16"}


def choice(key, value, choices):
    return pattern("value-choice", key=key, value=repr(value), choices=choices)


BAD = [
    ("seeed = 1\n" + GOOD, pattern("key-similar", key="seeed", suggestion="seed")),
    ("learning_rate = 1\n" + GOOD, pattern("key-renamed", key="learning_rate", replacement="stage.lr = 1")),
    (GOOD + "train_batch_size = 4\n", pattern("key-renamed", key="stage.1.train_batch_size", replacement="batch = 4")),
    (GOOD + "optimiser = 'lion'\n", pattern("key-similar", key="stage.1.optimiser", suggestion="optimizer")),
    (GOOD + "guidance = 3.0\n", pattern("key-similar", key="stage.1.guidance", suggestion="sample.guidance")),
    (GOOD + "[modell]\nbase = 'x'\n", pattern("key-similar", key="modell", suggestion="model")),
    (GOOD + "batch = '4'\n", pattern("value-whole", key="stage.1.batch", value="'4'", type="str")),
    (GOOD + "batch = 4.5\n", pattern("value-whole", key="stage.1.batch", value=4.5, type="float")),
    (GOOD + "batch = 0\n", pattern("value-at-least", key="stage.1.batch", value=0, limit=1)),
    (GOOD + "batch = 4\nmicro_batch = 3\n", pattern("micro-batch-divides", micro_batch=3, batch=4)),
    (GOOD + "betas = [0.9, 1.0]\n", pattern("betas-range", betas=[0.9, 1.0])),
    (GOOD + "grad_clip = nan\n", pattern("value-finite", key="stage.1.grad_clip", value="nan")),
    (GOOD + "caption_dropout = 1.5\n", pattern("value-at-most", key="stage.1.caption_dropout", value=1.5, limit=1)),
    (GOOD + "precision = 'fp16'\n", choice("stage.1.precision", "fp16", "'fp32', 'tf32' or 'bf16'")),
    (GOOD + "optimizer2 = 1\n", pattern("key-similar", suggestion="optimizer")),
    (GOOD.replace("until = 250", "until = '3 hours'"), pattern("steps-needed", until="'3 hours'", option="warmup 0.1")),
    (GOOD.replace("until = 250", "until = '3 weeks'"), pattern("amount-form", key="until", value="'3 weeks'")),
    (GOOD.replace("until = 250", "until = -5"), pattern("amount-form", key="until", value=-5)),
    (GOOD.replace("until = 250", "until = [1]"), pattern("value-until", key="stage.1.until", value=[1])),
    (GOOD.replace("until = 250", "until = 'soon'"), pattern("amount-form", key="until", value="'soon'")),
    (GOOD.replace("until = 250", "until = 0"), pattern("amount-form", key="until", value=0)),
    (GOOD.replace("until = 250", f"until = '{'9' * 400}'"), pattern("amount-form", key="until")),
    (GOOD.replace("until = 250", ""), pattern("key-missing", key="stage.1.until")),
    (GOOD.replace("lr = 3e-6", ""), pattern("lr-missing", optimizer="lion")),
    (GOOD.replace('["text_encoder"]', '["lora"]'), pattern("lora-table-missing", stage="'stage-2'")),
    (GOOD.replace('["text_encoder"]', '["vae"]'), pattern("train-names", value="'vae'")),
    (GOOD.replace('"text_encoder"', '"unet", "unet.mid"'), pattern("train-includes", component="'unet'", group="'unet.mid'")),
    (GOOD + "reinit = ['lora']\n", pattern("reinit-lora")),
    (GOOD + "reinit = ['clip.mid']\n", pattern("reinit-names", value="'clip.mid'")),
    (GOOD.replace("warmup = 0.1", "warmup = 300"), pattern("warmup-beyond-stage", warmup=300, steps=250)),
    (GOOD.replace("warmup = 0.1", "warmup = -1"), pattern("value-at-least", key="stage.1.warmup", value=-1)),
    (GOOD + "state = 'carry'\n", pattern("carry-differs", key="optimizer", value="'lion'", previous="'dlion'")),
    (GOOD.replace('name = "unet"', "state = 'carry'"), pattern("carry-first", stage="'stage-1'")),
    (GOOD + "state = 'keep'\n", choice("stage.1.state", "keep", "'reset' or 'carry'")),
    (GOOD + "growth_rate = 1.02\n", option_of("growth_rate", "optimizer", "'lion'", "dlion")),
    (
        GOOD.replace('name = "unet"', "decoupled_weight_decay = true"),
        option_of("decoupled_weight_decay", "optimizer", "'dlion'", "lion"),
    ),
    (GOOD + "d_max = 1e-3\n", option_of("d_max", "optimizer", "'lion'", "dlion")),
    (GOOD.replace('name = "unet"', "d_max = 1e-7"), pattern("d-max-below-d0", d_max="1e-07", d0="1e-06")),
    (GOOD.replace('name = "unet"', "growth_rate = 1.0"), pattern("value-above", key="stage.0.growth_rate", value=1.0, limit=1)),
    (GOOD + "ema_power = 0.75\n", pattern("ema-is-off", key="ema_power")),
    (GOOD + "restarts = 2\n", option_of("restarts", "schedule", "'constant'", "linear or cosine or rex")),
    (GOOD + "schedule = 'step'\n", choice("stage.1.schedule", "step", "'constant', 'linear', 'cosine' or 'rex'")),
    (GOOD + "lr_floor = 2.0\n", pattern("value-at-most", key="stage.1.lr_floor", value=2.0, limit=1)),
    (GOOD + "sample_every = '1 week'\n", pattern("amount-form", key="sample_every", value="'1 week'")),
    (GOOD + "checkpoint_every = 0\n", pattern("amount-form", key="checkpoint_every", value=0)),
    (GOOD + "checkpoint_at = ['1h']\n", pattern("checkpoint-at-time", key="checkpoint_at", value="'1h'")),
    (GOOD + "keep_every = '1h'\n", pattern("checkpoint-at-time", key="keep_every", value="'1h'")),
    (GOOD + "keep_every = '1 week'\n", pattern("amount-untimed", key="keep_every", value="'1 week'")),
    (GOOD + "keep_every = -1\n", pattern("amount-untimed", key="keep_every", value="-1")),
    (GOOD + "checkpoint_at = ['1 week']\n", pattern("amount-untimed", key="checkpoint_at", value="'1 week'")),
    (GOOD + "timestep_range = [500, 200]\n", pattern("timestep-range-order", range=[500, 200])),
    (GOOD + "timestep_range = [500]\n", pattern("value-entries", key="stage.1.timestep_range", value=[500], limit=2)),
    (GOOD + "weighting_gamma = 5.0\n", option_of("weighting_gamma", "weighting", "'none'", "min_snr or p2")),
    (GOOD + "weighting_form = 'onetrainer'\n", option_of("weighting_form", "weighting", "'none'", "min_snr or debiased or p2")),
    (GOOD + "weighting_min = 0.1\n", option_of("weighting_min", "weighting", "'none'", "min_snr or debiased or p2")),
    (GOOD + "weighting_min = -0.1\n", pattern("value-at-least", key="stage.1.weighting_min", value=-0.1, limit=0)),
    (GOOD + "weighting = 'p2'\nweighting_form = 'sd-scripts'\n", pattern("sd-scripts-has-no-p2")),
    (GOOD + "rex_bend = 0.9\n", option_of("rex_bend", "schedule", "'constant'", "rex")),
    (GOOD + "schedule = 'rex'\nrex_bend = 1.0\n", pattern("value-below", key="stage.1.rex_bend", value=1.0, limit=1)),
    (GOOD + "huber_delta = 0.1\n", option_of("huber_delta", "loss", "'mse'", "huber or pseudo_huber")),
    (GOOD + "timestep_mean = 1.0\n", option_of("timestep_mean", "timesteps", "'uniform'", "logit_normal")),
    (GOOD + "loss = 'l3'\n", choice("stage.1.loss", "l3", "'mse', 'mae', 'huber' or 'pseudo_huber'")),
    (
        GOOD + "min_snr_gamma = 5\n",
        pattern("key-renamed", key="stage.1.min_snr_gamma", replacement='weighting = "min_snr" and weighting_gamma = 5'),
    ),
    (GOOD + "[model.lora]\nrank = 0\n", pattern("value-at-least", key="model.lora.rank", value=0, limit=1)),
    (GOOD + "[model.lora]\nrnk = 4\n", pattern("key-similar", key="model.lora.rnk", suggestion="rank")),
    (GOOD + "[model.lora]\ntargets = []\n", pattern("value-entries", key="model.lora.targets", value=[], limit=1)),
    (
        GOOD.replace("[data]", "prediction = 'x0'\n[data]"),
        choice("model.prediction", "x0", "'', 'epsilon', 'v_prediction' or 'flow'"),
    ),
    (GOOD.replace("[data]", "prediction = 'epsilon'\nzero_snr = true\n[data]"), pattern("epsilon-at-zero-snr")),
    (GOOD.replace("[data]", "chunks = 0\n[data]"), pattern("value-kind", key="model.chunks", value=0)),
    (GOOD.replace("[data]", "chunks = 'all'\n[data]"), pattern("value-kind", key="model.chunks", value="'all'")),
    (GOOD.replace("[data]", "cut = 'end'\n[data]"), choice("model.cut", "end", "'tokens', 'commas' or 'words'")),
    (GOOD + "[validate]\nheld_out = -1\n", pattern("value-at-least", key="validate.held_out", value=-1, limit=0)),
    (GOOD + "[validate]\nevery = 5\n", pattern("validate-every-unused")),
    (GOOD + "[validate]\nheld_out = 8\nevery = 'now'\n", pattern("amount-form", key="validate.every", value="'now'")),
    (GOOD.replace('["text_encoder"]', "[]"), pattern("value-entries", key="stage.1.train", value=[], limit=1)),
    (GOOD.replace('["text_encoder"]', '["unet", "unet"]'), pattern("train-duplicate", train=["unet", "unet"])),
    (GOOD.replace('[data]\nfolders = ["images"]', ""), pattern("table-missing", table="data")),
    (GOOD.replace('base = "some/model"', ""), pattern("key-missing", key="model.base")),
    (GOOD.replace('name = "unet"', 'name = "a b"'), pattern("stage-name-characters", number=1, stage="'a b'")),
    (GOOD.replace('name = "unet"', 'name = "stage-2"'), pattern("stage-names-equal", stage="'stage-2'")),
    (GOOD + "micro_batch = 'most'\n", pattern("value-kind", key="stage.1.micro_batch", value="'most'")),
    (GOOD.replace("lr = 3e-6", "lr = { unet = 1e-6 }"), pattern("lr-keys", keys=["unet"], train=["text_encoder"])),
    (GOOD.replace("lr = 3e-6", "lr = { text_encoder = 0.0 }"), pattern("value-lr", key="lr", value=0.0)),
    (GOOD + "fused_backward = true\ngrad_clip = 1.0\n", pattern("fused-backward-with", option="grad_clip")),
    (GOOD + "fused_backward = true\nmicro_batch = 8\n", pattern("fused-backward-with", option="micro_batch")),
    (GOOD + "fused_backward = true\ncanary_every = 5\n", pattern("canary-fused")),
    ("deterministic = false\n" + GOOD + "canary_every = 5\n", pattern("canary-not-deterministic", stage="'stage-2'")),
    (GOOD + "canary_every = -1\n", pattern("value-at-least", key="stage.1.canary_every", value=-1, limit=0)),
    (GOOD + "ema = 1.0\n", pattern("ema-decay", ema=1.0)),
    (GOOD + "ema = { decay = 0.9, sigma_rel = [0.05] }\n", pattern("ema-table", key="decay")),
    (GOOD + "ema = { sigma_rel = [] }\n", pattern("ema-lengths", lengths=[])),
    (GOOD + "ema = { sigma_rel = [0.01, 0.02, 0.03, 0.04, 0.05] }\n", pattern("ema-lengths")),
    (GOOD + "ema = { sigma_rel = [0.05, 0.3] }\n", pattern("ema-length", length=0.3)),
    (GOOD + "ema = { sigma_rel = [0.0] }\n", pattern("ema-length", length=0.0)),
    (GOOD + "ema = { sigma_rel = [0.1, 0.05, 0.10] }\n", pattern("ema-length-twice", length=0.1)),
    (GOOD + "ema = { sigma_rel = [0.1] }\nema_power = 0.75\n", pattern("ema-needs-no-warmup", key="ema_power")),
    (GOOD + "ema = 0.9\nema_snapshots = 8\n", pattern("ema-without-snapshots", key="ema_snapshots")),
    (GOOD.replace("[[stage]]", "[[stage]\n"), pattern("config-no-toml")),
    (GOOD.split("[[stage]]")[0] + "[stage]\ntrain = ['unet']\nuntil = 3\n", pattern("stage-one-bracket")),
    ("stage = 3\n" + GOOD.split("[[stage]]")[0], pattern("value-list", key="stage", value=3, type="int")),
]
BAD_DATA = [
    ('folders = ["a", { path = "b", repeat = 2 }]', pattern("value-folders", value={"path": "b", "repeat": 2})),
    ('folders = ["a", { path = "b", repeats = 0 }]', pattern("value-folders")),
    ('folders = [{ path = "b", repeats = 2, weight = 0.5 }]', pattern("folder-repeats-and-weight", path="b")),
    ("crops = 2", pattern("crops-of-centre", crops=2, crop="'centre'")),
    ('crop = "left"', choice("data.crop", "left", "'centre' or 'random'")),
    ('latents = "npz"\ncrop = "random"', pattern("imported-latents-with", latents="'npz'", option="crop")),
    ('latents = "img_sdxl"\nflip = true', pattern("flip-of-imported", latents="img_sdxl")),
    ("buckets = true", pattern("value-table", key="data.buckets", value=True, type="bool")),
    ("buckets = { mn = 128 }", pattern("key-similar", key="data.buckets.mn", suggestion="min")),
    (
        "buckets = { min_bucket_reso = 128 }",
        pattern("key-renamed", key="data.buckets.min_bucket_reso", replacement="min = 128"),
    ),
    ("buckets = { min = 100 }", pattern("bucket-step", key="min", value=100, step=64, advice="buckets.min = 64")),
    ("buckets = { max = 520 }", pattern("bucket-step", key="max", value=520, step=64, advice="buckets.max = 576")),
    ("buckets = { min = 512, max = 256 }", pattern("buckets-min-above-max", min=512, max=256)),
    ("buckets = { min = 576, max = 1024 }", pattern("buckets-above-resolution", min=576, resolution=512)),
    ("buckets = { min = 32 }", pattern("bucket-step-above", step=64, limit="buckets.min 32")),
    ("buckets = { max = 448 }", pattern("buckets-below-resolution", max=448, resolution=512)),
    ("enable_bucket = true", pattern("key-renamed", key="data.enable_bucket", replacement="buckets = {}")),
    ('include = "cat"', pattern("value-list", key="data.include", value="'cat'", type="str")),
]


@pytest.mark.parametrize("line, sentence", BAD_DATA, ids=[line[:40] for line, _ in BAD_DATA])
def test_bad_data(line, sentence):
    data = {"folders": ["a"]} | tomllib.loads(line)
    raw = {"model": {"base": "m"}, "data": data, "stage": [{"train": ["unet"], "until": 1}]}
    with pytest.raises(UserError, match=sentence) as error:
        parse_config(raw, "job.toml")
    assert str(error.value).startswith("job.toml: data")


@pytest.mark.parametrize("text, sentence", BAD, ids=[f"{i} {sentence.pattern[:40]}" for i, (_, sentence) in enumerate(BAD)])
def test_bad_configs(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load(tmp_path, text)
    assert all(line.startswith(str(tmp_path / "job.toml")) for line in str(error.value).split("\n"))


@pytest.mark.parametrize(
    "item, name, fields",
    [
        ("seed", "override-form", {}),
        ("stage.5.lr=1", "override-no-stage", {"segment": "'5'"}),
        ("seed.x=1", "override-no-table", {"segment": "'seed'"}),
    ],
)
def test_bad_overrides(tmp_path, item, name, fields):
    with refused(name, **fields):
        load(tmp_path, "seed = 1\n" + GOOD, item)


def test_override_of_an_unknown_key(tmp_path):
    with refused("config-invalid") as error:
        load(tmp_path, GOOD, "stage.0.x=1")
    assert says(str(error.value), "key-unknown", key="stage.0.x")


def test_missing_files_and_folders_are_refused(tmp_path):
    with refused("config-missing", path=tmp_path / "no.toml"):
        load_config(tmp_path / "no.toml")
    with refused("config-is-folder", path=tmp_path):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["xlsd.toml", "demo.toml"])
def test_shipped_configs_load(name):
    config = load_config(ROOT / "configs" / name)
    assert config.stage


def test_every_stage_key_declares_its_properties():
    """A key that resume may not change, or may, says so. Keys that modify noise or captions are used only if they say so."""
    for key, declared in properties(StageTable).items():
        assert (Key.FIXED in declared) != (Key.FREE in declared), f"{key}: declare FIXED or FREE in its annotation"
    for key, only in conditions(StageTable).items():
        choices = get_args(StageTable.model_fields[only.option].annotation)
        assert set(only.values) < set(choices), f"{key}: {only.option} is one of {choices}"
    assert set(OPTIMIZERS) == set(get_args(StageTable.model_fields["optimizer"].annotation))


def test_stage_shorter_than_an_image_has_one_step():
    stage = StageTable(train=["unet"], until="0.1e", batch=4)
    assert stage.steps(images_per_epoch=3) == 1
