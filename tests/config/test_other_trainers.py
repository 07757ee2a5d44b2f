"""Hints for keys of other trainers: applied as they stand, they give a valid config with the converted values."""

import math
import re
import tomllib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentences import pattern, refused, says

from fastsd.config.conversion import Conversion, clip_skip_note, convert_key, toml_value
from fastsd.config.onetrainer_keys import CONCEPT, EVERYDREAM, ONETRAINER
from fastsd.config.other_trainers import COMMON, KOHYA
from fastsd.config.schema import TABLES, Config, load_config
from fastsd.errors import UserError
from fastsd.train.objective import Objective, timestep_weights
from fastsd.train.schedule import learning_rate

CONFIG = """
[model]
base = "m"
[data]
folders = ["a"]
[[stage]]
train = ["unet"]
optimizer = "lion"
lr = 1e-5
until = 1000
"""
# Line of a stage in another trainer's words, further lines that the config has, and keys with the values they must get.
HINTS = [
    # sd-scripts
    ("lr_scheduler_num_cycles = 3", 'schedule = "cosine"', {"restarts": 2}),
    ("lr_scheduler_num_cycles = 3", "", {"schedule": "cosine", "restarts": 2}),
    ("gradient_accumulation_steps = 4", "batch = 4", {"batch": 16, "micro_batch": 4}),
    ("train_batch_size = 6", "", {"batch": 6}),
    ("clip_skip = 2", "", {"model.clip_skip": 1}),
    ("max_token_length = 225", "", {"model.chunks": 3}),
    ("huber_c = 0.2", "", {"loss": "pseudo_huber", "huber_delta": 0.2}),
    ('loss_type = "smooth_l1"', "", {"loss": "pseudo_huber", "huber_delta": 0.1}),
    ('loss_type = "l2"', "", {"loss": "mse"}),
    ("multires_noise_discount = 0.4", "", {"pyramid_noise": 0.2828}),
    ("multires_noise_iterations = 6", "", {"pyramid_noise": 0.2121}),
    ("ip_noise_gamma = 0.1", "", {"input_perturbation": 0.1}),
    ("min_snr_gamma = 5", "", {"weighting": "min_snr", "weighting_gamma": 5}),
    ("max_train_epochs = 10", "", {"until": "10e"}),
    ("max_timestep = 600", "", {"timestep_range": [0, 600]}),
    ('mixed_precision = "bf16"', "", {"precision": "bf16"}),
    ("gradient_checkpointing = true", "", {"checkpointing": "block"}),
    ('optimizer_type = "AdamW8bit"', "", {"optimizer": "adamw", "weight_decay": 0.01}),
    ('lr_scheduler = "constant_with_warmup"', "", {"schedule": "constant"}),
    ("unet_lr = 1e-4", "", {"lr": {"unet": 1e-4}}),
    ("save_every_n_epochs = 2", "", {"checkpoint_every": "2e", "keep_every": "2e"}),
    ("network_dim = 16", "", {"model.lora.rank": 16, "model.lora.alpha": 1}),
    ("network_dim = 16", "network_alpha = 8", {"model.lora.rank": 16, "model.lora.alpha": 8}),
    ("conv_dim = 8", "", {"model.lora.conv": 8, "model.lora.conv_alpha": 1}),
    ('network_args = ["conv_dim=8", "conv_alpha=4"]', "", {"model.lora.conv": 8, "model.lora.conv_alpha": 4}),
    ('optimizer_args = ["weight_decay=0.1", "betas=0.9,0.95"]', "", {"weight_decay": 0.1, "betas": [0.9, 0.95]}),
    ("enable_bucket = true", "", {"data.buckets": {}}),
    ('resolution = "512,768"', "", {"data.resolution": 640}),
    ("seed = 7", "", {"seed": 7}),
    ("v_parameterization = true", "", {"model.prediction": "v_prediction"}),
    # diffusers
    ("use_ema = true", "", {"ema": 0.9999, "ema_power": 0.75}),
    ("snr_gamma = 5.0", "", {"weighting": "min_snr", "weighting_gamma": 5.0}),
    ("num_train_epochs = 3", "", {"until": "3e"}),
    # OneTrainer
    ("offset_noise_weight = 0.05", "", {"noise_offset": 0.05}),
    ("perturbation_noise_weight = 0.1", "", {"input_perturbation": 0.1}),
    ("max_noising_strength = 0.7", "", {"timestep_range": [0, 700]}),
    (
        'timestep_distribution = "LOGIT_NORMAL"',
        "noising_weight = 0.5\nnoising_bias = -0.3",
        {"timesteps": "logit_normal", "timestep_mean": -0.3, "timestep_std": 1.5},
    ),
    ('loss_weight_fn = "MIN_SNR_GAMMA"', "loss_weight_strength = 4.0", {"weighting": "min_snr", "weighting_gamma": 4.0}),
    ("learning_rate_warmup_steps = 200", "gradient_accumulation_steps = 4", {"warmup": 50}),
    ("debiased_estimation_loss = true", "", {"weighting": "debiased", "weighting_form": "sd-scripts"}),
    (
        'loss_weight_fn = "P2"',
        "loss_weight_strength = 1.0",
        {"weighting": "p2", "weighting_gamma": 1.0, "weighting_form": "onetrainer"},
    ),
    ('learning_rate_scheduler = "REX"', "", {"schedule": "rex", "rex_bend": 0.9}),
    ("loss_weight_strength = 4.0", 'weighting = "min_snr"', {"weighting_gamma": 4.0}),
    ("learning_rate_cycles = 2.0", "", {"schedule": "cosine", "restarts": 1}),
    ("noising_bias = -0.3", "", {"timesteps": "logit_normal", "timestep_mean": -0.3, "timestep_std": 1.0}),
    ("huber_strength = 1.0", "huber_delta = 0.3\nmse_strength = 0.0", {"loss": "huber", "huber_delta": 0.3}),
    ("text_encoder_layer_skip = 1", "", {"model.clip_skip": 1}),
    ("lora_rank = 16", "", {"model.lora.rank": 16, "model.lora.alpha": 1.0}),
    ('train_dtype = "TFLOAT_32"', "", {"precision": "tf32"}),
    # EveryDream2
    ("zero_frequency_noise_ratio = 0.02", "", {"noise_offset": 0.02}),
    ("pyramid_noise_discount = 0.03", "", {"pyramid_noise": 0.0212}),
    ("cond_dropout = 0.04", "", {"caption_dropout": 0.04}),
    ("grad_accum = 2", "batch = 8", {"batch": 16, "micro_batch": 8}),
    ("max_epochs = 40", "", {"until": "40e"}),
    ("timestep_end = 800", "", {"timestep_range": [0, 800]}),
]


def sentence_of(path, text: str, key: str) -> str:
    """Return what `load_config` says about an unknown key of a stage."""
    path.write_text(text)
    with refused("config-invalid") as error:
        load_config(path)
    (line,) = (line for line in str(error.value).split("\n") if f"stage.0.{key}: unknown key" in line)
    return line


@pytest.mark.parametrize("line, others, expected", HINTS, ids=[line for line, _, _ in HINTS])
def test_a_hint_applied_as_it_stands(line, others, expected, tmp_path):
    key = line.partition(" ")[0]
    text = sentence_of(tmp_path / "job.toml", CONFIG + f"{others}\n{line}\n", key)
    assignments = re.search(r"; use (.*?)(, the nearest)?( \(.*\))?$", text)[1].replace(" above all tables", "")
    values = tomllib.loads("\n".join(re.split(r" and (?=[\w.]+ =)", assignments)))
    kept = "\n".join(other for other in others.split("\n") if not re.match(r"[\w]+", other) or valid_in_a_stage(other))
    (tmp_path / "job.toml").write_text(CONFIG + kept)
    overrides = [
        f"{name if name in ('seed', 'run') or '.' in name else f'stage.0.{name}'}={toml_value(value)}"
        for name, value in flat(values).items()
    ]
    config = load_config(tmp_path / "job.toml", overrides)
    for name, value in expected.items():
        place: object = config.stage[0] if "." not in name and name != "seed" else config
        for segment in name.split("."):
            place = getattr(place, segment)
        assert place == pytest.approx(value) if isinstance(value, float) else place == value or value == {}, name
    assert flat(values).keys() == expected.keys()


def valid_in_a_stage(line: str) -> bool:
    return line.partition(" ")[0] in TABLES["stage"].model_fields


def flat(values: dict, place: str = "") -> dict:
    """Return dotted keys of tables of the config. The value of a key may be a table as well."""
    result = {}
    for key, value in values.items():
        is_table = isinstance(value, dict) and (f"{place}{key}" in TABLES or place) and f"{place}{key}" != "data.buckets"
        result |= flat(value, f"{place}{key}.") if is_table else {f"{place}{key}": value}
    return result


UNUSABLE = {  # keys that must not be replaced by another: words of the sentence
    'huber_schedule = "snr"': ("key-no-equal", "our huber has a constant threshold"),
    'huber_schedule = "snr"\nhuber_c = 0.1': (
        "key-no-equal",
        'with huber_schedule "snr" the threshold depends on the timestep',
    ),
    "xformers = true": ("key-not-needed", "attention is always fused"),
    "cache_latents = true": ("key-not-needed", "latents are always cached on the disk"),
    "v_pred_like_loss = 0.1": ("key-no-equal", "the loss has no such term"),
    "generalized_offset_noise = true": ("key-no-equal", "the offset is equal in all timesteps"),
    'timestep_distribution = "SIGMOID"': ("key-no-equal", "timesteps is uniform, logit_normal or cubic"),
    "embedding_perturbation = 1.0": ("key-no-equal", "embeddings are not perturbed"),
}


@pytest.mark.parametrize("lines", UNUSABLE)
def test_a_key_without_an_equal_says_so(lines, tmp_path):
    key = lines.split("\n")[-1].partition(" ")[0]
    name, reason = UNUSABLE[lines]
    text = sentence_of(tmp_path / "job.toml", CONFIG + lines, key)
    assert says(text, name, key=f"stage.0.{key}", reason=reason) and "did you mean" not in text


def test_keys_of_the_rules_exist():
    """Rules that were given a value name keys of the schema only."""
    keys = {f"{table}.{field}" for table, fields in TABLES.items() for field in fields.model_fields}
    keys |= {field.alias or name for name, field in Config.model_fields.items()}
    values = (True, 2, 0.5, "constant", "l2", "512", "networks.lora", ["conv_dim=4"], "COSINE_WITH_HARD_RESTARTS", "LORA",
              "REX", "ADAMW", "P2", "MIN_SNR_GAMMA", "FLOAT_32", "fp16", "bf16", "filename", "ddim", "a.txt")  # fmt: skip
    for rules in (KOHYA, COMMON, ONETRAINER, CONCEPT, EVERYDREAM):
        for name, rule in rules.items():
            conversions = [convert_key(rule, value, {name: value, "learning_rate": 1e-5}) for value in values]
            assert all(isinstance(conversion, Conversion) for conversion in conversions)
            assert not {key for conversion in conversions for key in conversion.values} - keys, name


@pytest.mark.parametrize("clip_skip, place", [(1, "2nd"), (2, "3rd"), (3, "4th"), (10, "11th"), (11, "12th"), (20, "21st")])
def test_the_count_of_clip_skip(clip_skip, place):
    note = clip_skip_note(clip_skip)
    assert pattern("clip-skip-counts", clip_skip=clip_skip, place=place, others=clip_skip + 1).fullmatch(note)


@given(st.recursive(st.text() | st.integers() | st.booleans() | st.floats(allow_nan=False), st.lists, max_leaves=5))
def test_values_survive_toml(value):
    text = toml_value(value)
    assert "\n" not in text and "\r" not in text and tomllib.loads(f"v = {text}")["v"] == value


# --- the formulas of the other trainers, in a few lines each, against what the conversion gives ---


def stage_of(tmp_path, lines: str, rules=KOHYA):
    """Return the stage that the conversion of these lines gives, each read with all others."""
    settings = tomllib.loads(lines)
    overrides = []
    for key, value in settings.items():
        for name, new in convert_key(rules[key], value, settings).values.items():
            overrides.append(f"{name.replace('stage.', 'stage.0.')}={toml_value(new)}")
    (tmp_path / "job.toml").write_text(CONFIG)
    return load_config(tmp_path / "job.toml", overrides)


@pytest.mark.parametrize("cycles", [1, 3])
def test_cycles_are_those_of_transformers(cycles, tmp_path):
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup as schedule

    lines = (
        f'lr_scheduler = "cosine_with_restarts"\nlr_scheduler_num_cycles = {cycles}\nlr_warmup_steps = 10\nlearning_rate = 1e-3'
    )
    stage = stage_of(tmp_path, lines).stage[0]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = schedule(optimizer, num_warmup_steps=10, num_training_steps=100, num_cycles=cycles)
    for step in range(100):
        if step >= 10:  # the warm-up there starts at 0, here at 1 / 10
            assert learning_rate(stage, step, 100, "unet") == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_images_of_a_step_and_an_epoch(tmp_path):
    """sd-scripts: an update after `gradient_accumulation_steps` batches; an epoch has each image `num_repeats` times."""
    stage = stage_of(tmp_path, "train_batch_size = 4\ngradient_accumulation_steps = 4\nmax_train_epochs = 3").stage[0]
    images, repeats = 40, 4
    updates = 3 * math.ceil(images * repeats / 4 / 4)  # max_train_epochs * ceil(batches / accumulation)
    assert (stage.batch, stage.micro_batch_size) == (16, 4)
    assert stage.steps(images_per_epoch=images * repeats) == updates


@pytest.mark.parametrize("rates, unet, text", [("unet_lr = 1e-4", 1e-4, 2e-6), ("text_encoder_lr = 5e-5", 2e-6, 5e-5)])
def test_rates_of_components(rates, unet, text, tmp_path):
    """A component without an lr of its own has `learning_rate`."""
    lines = f'network_module = "networks.lora"\nlearning_rate = 2e-6\n{rates}\nnetwork_dim = 4'
    stage = stage_of(tmp_path, lines).stage[0]
    assert (stage.rate_of("unet"), stage.rate_of("text_encoder")) == (unet, text)


def test_alpha_of_a_network_is_1_by_default(tmp_path):
    lora = stage_of(tmp_path, 'network_module = "networks.lora"\nnetwork_dim = 8\nlearning_rate = 1e-4').model.lora
    assert (lora.rank, lora.alpha, lora.alpha / lora.rank) == (8, 1, 0.125)  # networks.lora: scale = alpha / lora_dim


def test_offset_noise_is_onetrainers(tmp_path):
    """noise + weight * randn(B, C, 1, 1), in input and target: variance 1 + weight^2, and that of channel means weight^2."""
    stage = stage_of(tmp_path, "offset_noise_weight = 0.5", ONETRAINER).stage[0]
    assert stage == stage_of(tmp_path, "zero_frequency_noise_ratio = 0.5", EVERYDREAM).stage[0]
    objective = Objective(torch.linspace(0.99, 0.01, 1000), 0, stage=stage)
    noise, perturbed = objective.noise_sampler(torch.zeros(400, 4, 16, 16), torch.arange(400))
    assert torch.equal(noise, perturbed)
    assert noise.var().item() == pytest.approx(1.25, abs=0.03)
    assert noise.mean((2, 3)).var().item() == pytest.approx(0.25 + 1 / 256, abs=0.03)


def test_perturbation_is_not_onetrainers(tmp_path):
    """OneTrainer adds it to the noise that is the target as well; here the target stays, as in sd-scripts and the paper."""
    stage = stage_of(tmp_path, "perturbation_noise_weight = 0.5", ONETRAINER).stage[0]
    assert stage == stage_of(tmp_path, "ip_noise_gamma = 0.5").stage[0]
    target, noise = Objective(torch.linspace(0.99, 0.01, 1000), 0, stage=stage).noise_sampler(
        torch.zeros(100, 4, 16, 16), torch.arange(100)
    )
    assert (target.var().item(), noise.var().item()) == pytest.approx((1.0, 1.25), abs=0.03)
    conversion = convert_key(ONETRAINER["perturbation_noise_weight"], 0.5, {})
    assert conversion.status == "nearest" and "target" in conversion.why


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_of_sd_scripts(loss_type, tmp_path):
    """2 c (sqrt(x^2 + c^2) - c) with a constant threshold c; smooth_l1 is that over c, a factor that the conversion names."""
    c = 0.25
    settings = {"loss_type": loss_type, "huber_c": c, "huber_schedule": "constant"}
    conversion = convert_key(KOHYA["loss_type"], loss_type, settings)
    assert ("1 / huber_c" in conversion.why) == (loss_type == "smooth_l1")
    (tmp_path / "job.toml").write_text(CONFIG)
    overrides = [f"{key}={toml_value(value)}" for key, value in conversion.values.items()]
    stage = load_config(tmp_path / "job.toml", overrides).stage[0]
    x = torch.randn(3, 4, 8, 8)
    loss = Objective(torch.linspace(0.99, 0.01, 1000), 0, stage=stage).loss(x, torch.zeros_like(x), torch.arange(3))
    assert loss.item() == pytest.approx((2 * c * (torch.sqrt(x**2 + c**2) - c)).mean().item(), rel=1e-5)


# sd-scripts and OneTrainer: weights of epsilon and of v, from snr and snr limited to 1000
WEIGHTS = {
    "MIN_SNR_GAMMA": (lambda snr, _: snr.clamp(max=3.0) / snr, lambda snr, _: snr.clamp(max=3.0) / (snr + 1)),
    "P2": (lambda snr, _: (1 + snr) ** -3.0, lambda snr, _: (2 + snr) ** -3.0),
    "DEBIASED_ESTIMATION": (lambda _, limited: limited**-0.5, lambda _, limited: (limited + 1) ** -0.5),
    "debiased_estimation_loss": (lambda _, limited: limited**-0.5, lambda _, limited: 1 / (limited + 1)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_timesteps(name, tmp_path):
    lines = f'loss_weight_fn = "{name}"\nloss_weight_strength = 3.0'
    is_kohya = name == "debiased_estimation_loss"
    stage = stage_of(tmp_path, f"{name} = true" if is_kohya else lines, KOHYA if is_kohya else ONETRAINER).stage[0]
    abar = torch.linspace(0.99995, 0.005, 1000, dtype=torch.float64)
    snr = abar / (1 - abar)
    for prediction, formula in zip(("epsilon", "v_prediction"), WEIGHTS[name], strict=True):
        weights = timestep_weights(stage, abar, prediction)
        torch.testing.assert_close(weights, formula(snr, snr.clamp(max=1000)).float(), rtol=1e-5, atol=1e-9)


def test_rex_of_onetrainer(tmp_path):
    """(1 - x) / ((1 - d) + d (1 - x)) with d = 0.9, after a warm-up of `warmup / accumulation` steps."""
    lines = 'learning_rate_scheduler = "REX"\nlearning_rate_warmup_steps = 20.0\ngradient_accumulation_steps = 2'
    stage = stage_of(tmp_path, lines, {**ONETRAINER}).stage[0]
    for step in range(10, 100, 9):
        x = (step - 10) / 90
        assert learning_rate(stage, step, 100, "unet") == pytest.approx(1e-5 * (1 - x) / (0.1 + 0.9 * (1 - x)), rel=1e-6)


def test_logit_normal_timesteps_of_onetrainer(tmp_path):
    """sigmoid(normal(noising_bias, noising_weight + 1)) of the range between the two strengths, rounded down."""
    lines = 'timestep_distribution = "LOGIT_NORMAL"\nnoising_weight = 0.5\nnoising_bias = -0.4\nmin_noising_strength = 0.1'
    stage = stage_of(tmp_path, lines, ONETRAINER).stage[0]
    ours = Objective(torch.linspace(0.99, 0.01, 1000), 0, stage=stage).timesteps(torch.arange(20000)).double()
    generator = torch.Generator().manual_seed(0)
    others = (torch.normal(-0.4, 1.5, (20000,), generator=generator).sigmoid() * 900 + 100).int().double()
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    torch.testing.assert_close(ours.quantile(quantiles), others.quantile(quantiles), rtol=0.0, atol=15.0)


def test_the_first_level_of_multires_noise_is_of_full_size():
    """noise + sum of d^i upsample(randn(size / r^i)) from i = 0: the first coarse level is d / sqrt(2) of the fine noise."""
    values = convert_key(
        KOHYA["multires_noise_iterations"], 6, {"multires_noise_iterations": 6, "multires_noise_discount": 0.4}
    ).values
    fine = torch.randn(2, 4, 64, 64).add(torch.randn(2, 4, 64, 64)).std().item()
    assert values["stage.pyramid_noise"] == pytest.approx(0.4 / fine, rel=0.03)
    assert not convert_key(KOHYA["multires_noise_discount"], 0.4, {"multires_noise_iterations": 1}).values


def test_a_value_that_is_not_understood_is_no_traceback(tmp_path):
    for line in ('gradient_accumulation_steps = "4"', "clip_skip = 'x'", "resolution = 'big'", "lr_scheduler = 3"):
        with pytest.raises(UserError):
            (tmp_path / "job.toml").write_text(CONFIG + line)
            load_config(tmp_path / "job.toml")
