"""The config: defaults, overrides, and one sentence for everything that is wrong with it."""

import tomllib

import pytest
from environment import ROOT

from fastsd.config.config_errors import FAMILIAR
from fastsd.config.schema import _TABLES, Config, FolderTable, StageTable, dump_config, load_config, parse_config
from fastsd.config.stages import ENDLESS, parse_amount
from fastsd.errors import UserError

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


def load(tmp_path, text, *overrides, precision=None):
    path = tmp_path / "job.toml"
    path.write_text(text)
    return load_config(path, list(overrides), precision)


def test_defaults_and_stages(tmp_path):
    config = load(tmp_path, GOOD)
    unet, text = config.stage
    assert (unet.optimizer, unet.rate_of("unet"), unet.precision, unet.batch, unet.micro) == ("dlion", 1.0, "fp32", 32, 32)
    assert [config.stage_name(i) for i in range(2)] == ["unet", "stage-2"]
    assert unet.steps(100) == 7 and text.steps(100) == 250  # 200 images in batches of 32; steps are steps
    assert text.warmup_steps(250) == 25
    assert Config.model_validate_json(dump_config(config)) == config


@pytest.mark.parametrize(
    "until, found",
    [(7, (7, "steps")), ("7", (7, "steps")), ("7 steps", (7, "steps")), ("2e", (2, "epochs")),
     ("1.5 epochs", (1.5, "epochs")), ("64000 images", (64000, "images")), ("90s", (90, "seconds")), ("90m", (5400, "seconds")),
     ("1.5 hours", (5400, "seconds")), ("2d", (172800, "seconds"))],
)  # fmt: skip
def test_amounts(until, found):
    assert parse_amount("until", until) == found


def test_a_stage_counts_whole_steps():
    def steps(until):
        return StageTable(train=["unet"], until=until, batch=32).steps(100)

    assert [steps(until) for until in (7, "2e", "1.5e", "64 images", "65 images")] == [7, 7, 5, 2, 3]
    assert steps("3h") == ENDLESS


def test_overrides(tmp_path):
    config = load(tmp_path, GOOD, "seed=7", "model.vae=other/vae", "stage.0.batch=8", "stage.stage-2.lr=1e-5",
                  "stage.grad_clip=1.0", 'data.folders=["a", "b"]', "stage.unet.betas=[0.9, 0.95]",
                  precision="bf16")  # fmt: skip
    assert (config.seed, config.model.vae, config.data.folders) == (7, "other/vae", ["a", "b"])
    assert [stage.batch for stage in config.stage] == [8, 32]
    assert config.stage[1].lr == 1e-5 and config.stage[0].betas == [0.9, 0.95]
    assert {stage.grad_clip for stage in config.stage} == {1.0}
    assert {stage.precision for stage in config.stage} == {"bf16"}


BAD = [
    ("seeed = 1\n" + GOOD, "seeed: unknown key; did you mean seed?"),
    ("learning_rate = 1\n" + GOOD, "learning_rate: unknown key; it is called lr here"),
    (GOOD + "train_batch_size = 4\n", "stage.1.train_batch_size: unknown key; it is called batch here"),
    (GOOD + "optimiser = 'lion'\n", "stage.1.optimiser: unknown key; did you mean optimizer?"),
    (GOOD + "guidance = 3.0\n", "stage.1.guidance: unknown key; did you mean sample.guidance?"),
    (GOOD + "[modell]\nbase = 'x'\n", "modell: unknown key; did you mean model?"),
    (GOOD + "batch = '4'\n", "stage.1.batch is '4' (a str); it must be a whole number"),
    (GOOD + "batch = 4.5\n", "stage.1.batch is 4.5 (a float); it must be a whole number"),
    (GOOD + "batch = 0\n", "stage.1.batch is 0; it must be greater than or equal to 1"),
    (GOOD + "batch = 4\nmicro_batch = 3\n", "stage.1: micro_batch 3 does not divide batch 4; choose a divisor"),
    (GOOD + "betas = [0.9, 1.0]\n", "both must be at least 0 and below 1"),
    (GOOD + "grad_clip = nan\n", "stage.1.grad_clip is nan; it must be a finite number"),
    (GOOD + "caption_dropout = 1.5\n", "stage.1.caption_dropout is 1.5; it must be less than or equal to 1"),
    (GOOD + "precision = 'fp16'\n", "stage.1.precision is 'fp16'; choose 'fp32', 'tf32' or 'bf16'"),
    (GOOD + "optimizer2 = 1\n", "did you mean optimizer?"),
    (GOOD.replace("until = 250", "until = '3 hours'"), "until is '3 hours', and warmup 0.1 needs a number of steps; count in"),
    (GOOD.replace("until = 250", "until = '3 weeks'"), "until is '3 weeks'; write steps (1000)"),
    (GOOD.replace("until = 250", "until = -5"), "until is -5; write steps (1000)"),
    (GOOD.replace("until = 250", "until = [1]"), "stage.1.until is [1]; it must be a number of steps, or"),
    (GOOD.replace("until = 250", "until = 'soon'"), "until is 'soon'; write steps (1000)"),
    (GOOD.replace("until = 250", "until = 0"), "until is 0; write steps"),
    (GOOD.replace("until = 250", ""), "stage.1.until is missing; add it"),
    (GOOD.replace("lr = 3e-6", ""), "lr is missing and lion needs one; write for example lr = 3e-6"),
    (GOOD.replace('["text_encoder"]', '["lora"]'), "trains \"lora\" and there is none; add a table"),
    (GOOD.replace('["text_encoder"]', '["vae"]'), "train names 'vae'; parts are"),
    (GOOD.replace('["text_encoder"]', '["unet", "unet.mid"]'), "train names 'unet' and 'unet.mid', which is in it; remove"),
    (GOOD + "reinit = ['lora']\n", "reinit names \"lora\", which starts anew in every run; remove it"),
    (GOOD + "reinit = ['clip.mid']\n", "reinit names 'clip.mid'; parts are"),
    (GOOD.replace("warmup = 0.1", "warmup = 300"), "warmup is 300 steps and the stage has 250; shorten it, or write a share"),
    (GOOD.replace("warmup = 0.1", "warmup = -1"), "stage.1.warmup is -1"),
    (GOOD + "state = 'carry'\n", "has state = \"carry\" and another optimizer than the stage before it ('lion'"),
    (GOOD.replace('name = "unet"', "state = 'carry'"), "stage 'stage-1' has state = \"carry\" and none before it; remove it"),
    (GOOD + "state = 'keep'\n", "stage.1.state is 'keep'; choose 'reset' or 'carry'"),
    (GOOD + "growth_rate = 1.02\n", "growth_rate is a guard of dlion's d and optimizer is 'lion'; remove it"),
    (GOOD + "d_max = 1e-3\n", "d_max is a guard of dlion's d"),
    (GOOD.replace('name = "unet"', "d_max = 1e-7"), "d_max is 1e-07, below d0 1e-06 where d starts; raise it or lower d0"),
    (GOOD.replace('name = "unet"', "growth_rate = 1.0"), "stage.0.growth_rate is 1.0; it must be greater than 1"),
    (GOOD + "ema_power = 0.75\n", "ema_power is given and ema is 0, so there is no average; set ema"),
    (GOOD + "restarts = 2\n", "restarts is given and schedule is constant; choose linear, cosine or rex"),
    (GOOD + "schedule = 'step'\n", "stage.1.schedule is 'step'; choose 'constant', 'linear', 'cosine' or 'rex'"),
    (GOOD + "lr_floor = 2.0\n", "stage.1.lr_floor is 2.0; it must be less than or equal to 1"),
    (GOOD + "sample_every = '1 week'\n", "sample_every is '1 week'; write steps (1000)"),
    (GOOD + "checkpoint_every = 0\n", "checkpoint_every is 0; write steps (1000)"),
    (GOOD + "checkpoint_at = ['1h']\n", "checkpoint_at has '1h'; count in steps, epochs or images"),
    (GOOD + "timestep_range = [500, 200]\n", "timestep_range is [500, 200]; write [from, to]"),
    (GOOD + "timestep_range = [500]\n", "stage.1.timestep_range is [500]; it must have at least 2 entries"),
    (GOOD + "weighting_gamma = 5.0\n", "weighting_gamma is given and weighting is 'none'; it belongs to min_snr and p2"),
    (GOOD + "huber_delta = 0.1\n", "huber_delta is given and loss is 'mse'; it belongs to huber"),
    (GOOD + "timestep_mean = 1.0\n", "timestep_mean is given and timesteps is 'uniform'; it belongs to logit_normal"),
    (GOOD + "loss = 'l3'\n", "stage.1.loss is 'l3'; choose 'mse', 'mae' or 'huber'"),
    (GOOD + "min_snr_gamma = 5\n", "stage.1.min_snr_gamma: unknown key; it is called weighting_gamma here"),
    (GOOD + "[model.lora]\nrank = 0\n", "model.lora.rank is 0; it must be greater than or equal to 1"),
    (GOOD + "[model.lora]\nrnk = 4\n", "model.lora.rnk: unknown key; did you mean rank?"),
    (GOOD + "[model.lora]\ntargets = []\n", "model.lora.targets is []; it must have at least 1 entries"),
    (GOOD.replace("[data]", "prediction = 'x0'\n[data]"), "model.prediction is 'x0'; choose '', 'epsilon' or 'v_prediction'"),
    (GOOD.replace("[data]", "prediction = 'epsilon'\nzero_snr = true\n[data]"), "in pure noise there is nothing to tell"),
    (GOOD.replace("[data]", "chunks = 0\n[data]"), "model.chunks is 0; it must be greater than or equal to 1"),
    (GOOD + "[validate]\nheld_out = -1\n", "validate.held_out is -1; it must be greater than or equal to 0"),
    (GOOD + "[validate]\nevery = 5\n", "validate.every is given and there is nothing to measure; set validate.held_out"),
    (GOOD + "[validate]\nheld_out = 8\nevery = 'now'\n", "validate.every is 'now'; write steps (1000)"),
    (GOOD.replace('["text_encoder"]', "[]"), "stage.1.train is []; it must have at least 1 entries"),
    (GOOD.replace('["text_encoder"]', '["unet", "unet"]'), "train names a part twice"),
    (GOOD.replace("[data]\nfolders = [\"images\"]", ""), "[data] is missing; add that table"),
    (GOOD.replace('base = "some/model"', ""), "model.base is missing; add it"),
    (GOOD.replace('name = "unet"', 'name = "a b"'), "stage 1 is named 'a b'; use letters"),
    (GOOD.replace('name = "unet"', 'name = "stage-2"'), "two stages are named 'stage-2'"),
    (GOOD + "micro_batch = 'most'\n", "stage.1.micro_batch is 'most'"),
    (GOOD.replace("lr = 3e-6", "lr = { unet = 1e-6 }"), "lr names unet and train names text_encoder"),
    (GOOD.replace("lr = 3e-6", "lr = { text_encoder = 0.0 }"), "lr is 0.0; it must be a number above 0, or one for each"),
    (GOOD + "fused_backward = true\ngrad_clip = 1.0\n", "remove grad_clip, or it"),
    (GOOD + "fused_backward = true\nmicro_batch = 8\n", "remove micro_batch, or it"),
    (GOOD + "ema = 1.0\n", "stage.1.ema is 1.0; it must be less than 1"),
    (GOOD.replace("[[stage]]", "[[stage]\n"), "cannot be read as TOML"),
    (GOOD.split("[[stage]]")[0] + "[stage]\ntrain = ['unet']\nuntil = 3\n", "write [[stage]] with two brackets"),
    ("stage = 3\n" + GOOD.split("[[stage]]")[0], "stage is 3 (an int); it must be a list"),
]  # fmt: skip


BAD_DATA = [
    ('folders = ["a", { path = "b", repeat = 2 }]', "data.folders is {'path': 'b', 'repeat': 2}; it must be a list of paths"),
    ('folders = ["a", { path = "b", repeats = 0 }]', "it must be a list of paths"),
    ('folders = [{ path = "b", repeats = 2, weight = 0.5 }]', "folder b has repeats and weight; give one of them"),
    ("crops = 2", 'crops is 2 and crop \'centre\': one centre is all there is; use crop = "random"'),
    ('crop = "left"', "data.crop is 'left'; choose 'centre' or 'random'"),
    ('latents = "npz"\ncrop = "random"', "latents is 'npz', cut already by another trainer; remove crop"),
    ('latents = "img_sdxl"\nflip = true', "img_sdxl files hold no mirrored latents; remove flip"),
    ("buckets = true", "data.buckets is True (a bool); it must be a table"),
    ("buckets = { mn = 128 }", "data.buckets.mn: unknown key; did you mean min?"),
    ("buckets = { min_bucket_reso = 128 }", "data.buckets.min_bucket_reso: unknown key; it is called data.buckets.min here"),
    ("buckets = { min = 100 }", "min is 100, no multiple of step 64; use 64"),
    ("buckets = { min = 512, max = 256 }", "min is 512 and max 256; min must not be above max"),
    ("buckets = { min = 576, max = 1024 }", "buckets.min is 576, above resolution 512; lower it"),
    ("buckets = { max = 448 }", "buckets.max is 448, below resolution 512; raise it"),
    ("enable_bucket = true", "data.enable_bucket: unknown key; it is called data.buckets here"),
    ('include = "cat"', "data.include is 'cat' (a str); it must be a list"),
]  # fmt: skip


@pytest.mark.parametrize("line, sentence", BAD_DATA, ids=[line[:40] for line, _ in BAD_DATA])
def test_bad_data(line, sentence):
    data = {"folders": ["a"]} | tomllib.loads(line)
    raw = {"model": {"base": "m"}, "data": data, "stage": [{"train": ["unet"], "until": 1}]}
    with pytest.raises(UserError) as error:
        parse_config(raw, "job.toml")
    assert sentence in str(error.value) and str(error.value).startswith("job.toml: data")


@pytest.mark.parametrize("text, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_configs(tmp_path, text, sentence):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    lines = str(error.value).split("\n")
    assert any(sentence in line for line in lines), str(error.value)
    assert all(line.startswith(str(tmp_path / "job.toml")) for line in lines)


@pytest.mark.parametrize(
    "item, sentence",
    [("seed", "write key=value"), ("stage.5.lr=1", "there is no stage '5'"), ("seed.x=1", "is a value, not a table"),
     ("stage.0.x=1", "stage.0.x: unknown key")],
)  # fmt: skip
def test_bad_overrides(tmp_path, item, sentence):
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, "seed = 1\n" + GOOD, item)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)


def test_familiar_names_lead_to_names_that_exist():
    for target in FAMILIAR.values():
        table, _, key = target.rpartition(".")
        tables = [_TABLES[table]] if table else [Config, FolderTable, *_TABLES.values()]
        assert any(key in known.model_fields for known in tables), target


@pytest.mark.parametrize("name", ["xlsd.toml", "demo.toml"])
def test_shipped_configs_are_good(name):

    config = load_config(ROOT / "configs" / name)
    assert config.stage
