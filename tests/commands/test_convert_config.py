"""`fastsd convert-config`: files with the documented keys of other trainers are converted, checked and trained with."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
from commandline import fastsd
from sentences import refused, says
from tiny import write_images

from fastsd.commands.convert_config import convert_config
from fastsd.config.schema import load_config
from fastsd.model.formats.adapters import load_to_train
from fastsd.model.lora import adaptable_layers, lora_state_dict

KOHYA = """
[model_arguments]
pretrained_model_name_or_path = "{model}"
v2 = false
clip_skip = 2
[dataset_arguments]
dataset_config = "dataset.toml"
[network_arguments]
network_module = "networks.lora"
network_dim = 4
network_args = ["conv_dim=2", "conv_alpha=2", "dropout=0.1"]
unet_lr = 1e-4
text_encoder_lr = 5e-5
[optimizer_arguments]
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.1", "betas=0.9,0.99"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 1
gradient_accumulation_steps = 2
max_train_steps = 2
[training_arguments]
mixed_precision = "no"
xformers = true
min_snr_gamma = 5
noise_offset = 0.05
huber_c = 0.1
output_dir = "{folder}/out"
output_name = "mine"
weighted_captions = true
huggingface_token = "secret-value"
my_own_key = 5
validate_every_n_steps = 5
"""
DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 16
batch_size = 2
[[datasets.subsets]]
image_dir = "{images}"
num_repeats = 3
class_tokens = "sks dog"
[[datasets.subsets]]
image_dir = "{images}"
keep_tokens = 1
[[datasets.subsets]]
image_dir = "{others}"
num_repeats = 1
keep_tokens = 2
"""


def onetrainer(folder: Path, model: Path, images: Path) -> dict:
    return {
        "__version": 10, "training_method": "FINE_TUNE", "model_type": "STABLE_DIFFUSION_15", "base_model_name": str(model),
        "workspace_dir": str(folder / "workspace"), "cache_dir": str(folder / "cache"), "batch_size": 2, "resolution": "16",
        "gradient_accumulation_steps": 2, "learning_rate": 3e-4, "learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS",
        "learning_rate_cycles": 2.0, "learning_rate_warmup_steps": 4.0, "epochs": 1, "aspect_ratio_bucketing": False,
        "optimizer": {"optimizer": "LION", "weight_decay": 0.02, "beta1": 0.9, "beta2": 0.99, "use_triton": False},
        "unet": {"train": True, "learning_rate": 1e-4, "weight_dtype": "FLOAT_32"}, "vae": {"weight_dtype": "FLOAT_32"},
        "text_encoder": {"train": True, "dropout_probability": 0.05}, "train_dtype": "FLOAT_32", "ema": "GPU",
        "ema_decay": 0.999, "offset_noise_weight": 0.05, "generalized_offset_noise": True, "loss_weight_fn": "MIN_SNR_GAMMA",
        "loss_weight_strength": 4.0, "timestep_distribution": "LOGIT_NORMAL", "noising_bias": -0.5, "noising_weight": 0.2,
        "max_noising_strength": 0.9, "masked_training": False, "unmasked_weight": 0.2, "transformer": {"train": True},
        "sample_after": 10, "sample_after_unit": "NEVER", "concept_file_name": "concepts.json", "weird_key": 1,
        "samples": [
            {"prompt": "red circle", "seed": 42, "cfg_scale": 5.0, "width": 32, "noise_scheduler": "DDIM"},
            {"prompt": "blue star", "seed": 42, "cfg_scale": 6.0, "width": 32},
        ],
    }  # fmt: skip


CONCEPTS = [
    {"path": "", "balancing": 2.0, "text": {"enable_tag_shuffling": True, "caps_randomize_enable": True}, "loss_weight": 0.5},
    {"path": "validation", "type": "VALIDATION"},
    {"path": "unused", "enabled": False},
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: fastsd(*words, monkeypatch=monkeypatch, capsys=capsys)


def rows(text: str, label: str) -> str:
    return "\n".join(line for line in text.split("\n") if line.startswith(label))


def train_two_steps(run, config: str, *overrides: str) -> str:
    """Cache, check and train with a converted config."""
    output = ""
    for command in ("cache", "check", "train"):
        code, out, err = run(
            command, config, "device=cpu", "log.tensorboard=false", "sample.images=1", "sample.steps=1", *overrides
        )
        assert code == 0, err
        output += out
    assert says(output, "check-passed", check="model") and says(output, "clip-skip-counts", clip_skip=1) == ("clip" in config)
    return output


@pytest.mark.slow
def test_a_config_of_sd_scripts(run, tmp_path, tiny_model, images):
    (tmp_path / "clip.toml").write_text(KOHYA.format(model=tiny_model, folder=tmp_path))
    write_images(tmp_path / "others", 4, seed=1)
    (tmp_path / "dataset.toml").write_text(DATASET.format(images=images, others=tmp_path / "others"))
    code, out, err = run("convert-config", "clip.toml")
    assert code == 0, err
    assert says(out, "config-converted", path="clip.toml", trainer="sd-scripts", out="clip-fastsd.toml")
    config = load_config(tmp_path / "clip-fastsd.toml")
    stage, lora = config.stage[0], config.model.lora
    assert (config.model.base, config.model.clip_skip, config.run) == (str(tiny_model), 1, f"{tmp_path}/out/mine")
    assert (lora.rank, lora.alpha, lora.conv, lora.conv_alpha, lora.text_encoder) == (4, 1, 2, 2, True)
    assert [(root.path, root.repeats) for root in config.data.roots] == [(str(images), 3), (f"{tmp_path}/others", 1)]
    assert (stage.batch, stage.micro_batch, stage.until, stage.schedule, stage.restarts) == (4, 2, 2, "cosine", 2)
    assert (stage.optimizer, stage.weight_decay, stage.betas, stage.grad_clip) == ("adamw", 0.1, [0.9, 0.99], 1.0)
    assert (stage.loss, stage.noise_offset, stage.shuffle_tags, stage.keep_tags) == ("mse", 0.05, True, 1)

    no_equal = rows(out, "no equal")
    listed = "weighted_captions", "network_args.dropout", "class_tokens", "keep_tokens: 1, 2", "another subset"
    for key in (*listed, "validate_every_n_steps"):
        assert key in no_equal and key in (tmp_path / "clip-fastsd.toml").read_text(), key
    assert "my_own_key = 5" in rows(out, "unknown") and "model.vae" in rows(out, "to do")
    assert rows(out, "not needed").split(None, 2)[2].split(", ") == ["huber_c", "huggingface_token", "v2", "xformers"]
    assert "secret-value" not in out + (tmp_path / "clip-fastsd.toml").read_text()
    train_two_steps(run, "clip-fastsd.toml")
    assert (tmp_path / "out" / "mine" / "checkpoints" / "step-00000002").is_dir()
    assert (tmp_path / "out" / "mine" / "lora.safetensors").exists()


@pytest.mark.slow
def test_a_config_of_onetrainer(run, tmp_path, tiny_model, images):
    (tmp_path / "ot.json").write_text(json.dumps(onetrainer(tmp_path, tiny_model, images)))
    (tmp_path / "concepts.json").write_text(json.dumps([CONCEPTS[0] | {"path": str(images)}, *CONCEPTS[1:]]))
    code, out, err = run("convert-config", "ot.json", "ours.toml")
    assert code == 0, err
    config = load_config(tmp_path / "ours.toml")
    stage = config.stage[0]
    assert (stage.train, stage.lr) == (["unet", "text_encoder"], {"unet": 1e-4, "text_encoder": 3e-4})
    assert (stage.batch, stage.micro_batch, stage.until, stage.warmup, stage.restarts) == (4, 2, "1e", 2, 1)
    assert (stage.optimizer, stage.weight_decay, stage.betas, stage.grad_clip) == ("lion", 0.02, [0.9, 0.99], 1.0)
    assert (stage.weighting, stage.weighting_gamma, stage.timestep_range) == ("min_snr", 4.0, [0, 900])
    assert (stage.timesteps, stage.timestep_mean, stage.timestep_std) == ("logit_normal", -0.5, 1.2)
    assert (stage.ema, stage.caption_dropout, stage.noise_offset) == (0.999, 0.05, 0.05)
    assert (stage.shuffle_tags, stage.keep_tags, stage.checkpointing) == (True, 1, "block")
    (root,) = config.data.roots
    assert (root.path, root.repeats, root.loss_weight) == (str(images), 2, 0.5)
    assert [(prompt.prompt, prompt.guidance) for prompt in config.sample.prompts] == [("red circle", 5.0), ("blue star", 6.0)]
    assert (config.sample.seed, config.sample.width, config.sample.height) == (42, 32, 0)

    no_equal = rows(out, "no equal")
    for key in (
        "generalized_offset_noise",
        "text.caps_randomize_enable",
        "concept validation, type VALIDATION",
        "noise_scheduler",
    ):
        assert key in no_equal, key
    assert "weird_key = 1" in rows(out, "unknown") and "transformer.train" in rows(out, "not needed")
    assert "ema" in rows(out, "nearest")
    train_two_steps(run, "ours.toml", "stage.until=2")
    assert (tmp_path / "workspace" / "checkpoints" / "step-00000002").is_dir()


def test_a_config_of_everydream(run, tmp_path):
    settings = {"resume_ckpt": "m", "data_root": "d", "batch_size": 8, "clip_skip": 2, "max_epochs": 40,
                "optimizer_config": "o.json",
                "pyramid_noise_discount": None, "disable_amp": True, "flip_p": 0.0}  # fmt: skip
    optimizer = {"base": {"optimizer": "adamw8bit", "lr": 1e-6, "epsilon": 1e-8}, "text_encoder_overrides": {"lr": 5e-7}}
    (tmp_path / "train.json").write_text(json.dumps(settings))
    (tmp_path / "o.json").write_text(json.dumps(optimizer))
    assert run("convert-config", "train.json")[0] == 0
    config = load_config(tmp_path / "train-fastsd.toml")
    assert config.stage[0].lr == {"unet": 1e-6, "text_encoder": 5e-7} and config.stage[0].weight_decay == 0.01
    assert (config.stage[0].caption_dropout, config.stage[0].noise_offset) == (0.04, 0.02)  # its defaults
    assert (config.model.clip_skip, config.stage[0].until, config.stage[0].precision) == (1, "40e", "fp32")


@pytest.mark.parametrize("layers", ["", "attentions"])
def test_layers_of_a_lora_of_onetrainer(layers, run, tmp_path, tiny_model):
    """Without a filter, it adapts all linear layers and convolutions of the UNet; the filter is not for the text encoder."""
    settings = {"training_method": "LORA", "base_model_name": str(tiny_model), "lora_rank": 2, "layer_filter": layers}
    (tmp_path / "ot.json").write_text(json.dumps(settings))
    assert run("convert-config", "ot.json")[0] == 0
    model = load_to_train(load_config(tmp_path / "ot-fastsd.toml").model)
    adapted = {name.split(".lora_")[0] for name in lora_state_dict(model)}
    expected = {f"unet.{layer}" for layer in adaptable_layers(model, "unet") if layers in layer}
    assert adapted == expected | {f"text_encoder.{layer}" for layer in adaptable_layers(model, "text_encoder")}


@pytest.mark.parametrize("arguments, conv", [([], 0), (["conv_dim=2"], 2)])
def test_layers_and_alphas_of_networks_lora(arguments, conv, run, tmp_path, tiny_model):
    """networks.lora adapts linear layers and 1x1 convolutions in Transformer2DModel, and with conv_dim ResNets and samplers.

    Alpha is 1 by default, that of 3x3 convolutions as well.
    """
    from diffusers import UNet2DConditionModel

    text = f'pretrained_model_name_or_path = "{tiny_model}"\nnetwork_module = "networks.lora"\nnetwork_args = {arguments}\n'
    (tmp_path / "k.toml").write_text(text)
    assert run("convert-config", "k.toml")[0] == 0
    config = load_config(tmp_path / "k-fastsd.toml").model
    model = load_to_train(config)
    classes = {"Transformer2DModel"} | ({"ResnetBlock2D", "Downsample2D", "Upsample2D"} if conv else set())
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    expected = {
        f"unet.{name}.{child}"
        for name, module in unet.named_modules()
        if type(module).__name__ in classes
        for child, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    } | {f"text_encoder.{layer}" for layer in adaptable_layers(model, "text_encoder")}
    assert {name.split(".lora_")[0] for name in lora_state_dict(model)} == expected
    assert (config.lora.rank, config.lora.alpha, config.lora.conv, config.lora.conv_alpha) == (4, 1, conv, 1 if conv else None)


def test_folders_of_dreambooth(run, tmp_path):
    for name in ("10_sks dog", "1_other", "no number"):
        (tmp_path / "images" / name).mkdir(parents=True)
    (tmp_path / "db.toml").write_text('train_data_dir = "images"\nmax_train_epochs = 2\nlearning_rate = 1e-6\n')
    assert run("convert-config", "db.toml")[0] == 0
    config = load_config(tmp_path / "db-fastsd.toml")
    assert [(root.path, root.repeats) for root in config.data.roots] == [("images/10_sks dog", 10), ("images/1_other", 1)]
    assert config.stage[0].until == "2e" and config.stage[0].weight_decay == 0.01 and config.stage[0].batch == 1


def test_zero_is_off_and_arguments_are_text(run, tmp_path):
    """0 epochs are no length and no interval, and the steps of samples count only without epochs."""
    (tmp_path / "zero.toml").write_text(
        "max_train_epochs = 0\nmax_train_steps = 7\nsave_every_n_epochs = 0\nsave_every_n_steps = 5\n"
        'sample_every_n_epochs = 2\nsample_every_n_steps = 0\noptimizer_args = "weight_decay=0.3 betas=0.9,0.95"\n'
        "prior_loss_weight = 1.0\n"
    )
    _, out, _ = run("convert-config", "zero.toml")
    stage = load_config(tmp_path / "zero-fastsd.toml").stage[0]
    assert (stage.until, stage.checkpoint_every, stage.sample_every) == (7, 5, "2e")
    assert (stage.weight_decay, stage.betas, stage.train) == (0.3, [0.9, 0.95], ["unet", "text_encoder"])
    assert "train_db of sd-scripts" in rows(out, "to do") and "train_text_encoder = true" in rows(out, "converted")


def test_a_file_with_little_in_it_is_completed(run, tmp_path):
    (tmp_path / "little.toml").write_text("learning_rate = 1e-5\ndataset_config = 'none.toml'\n")
    _, out, _ = run("convert-config", "little.toml")
    todo = rows(out, "to do")
    assert all(name in todo for name in ("none.toml", "model.base", "data.folders", "model.vae", "stage.train"))
    config = load_config(tmp_path / "little-fastsd.toml")
    assert config.stage[0].until == 1600 and config.stage[0].optimizer == "adamw"
    written = (tmp_path / "little-fastsd.toml").read_text()
    assert all("  # " in line for line in written.split("\n") if " = " in line and not line.startswith("#"))
    assert tomllib.loads(written)["stage"][0]["lr"] == 1e-5


REFUSED = {
    "no.toml": (None, "convert-config-missing"),
    "bad.toml": ("a = ", "convert-config-unreadable"),
    "bad.json": ("{", "convert-config-unreadable"),
    "list.json": ("[]", "convert-config-list"),
    "ours.toml": ("[[stage]]\n", "convert-config-own"),
    "gui.json": ('{"LoRA_type": "Standard", "epoch": 10, "network_dim": 8}', "convert-config-gui"),
    "else.toml": ("[tool]\nx = 1\n", "convert-config-unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(name, tmp_path):
    text, code = REFUSED[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    with refused(code, path=tmp_path / name):
        convert_config(tmp_path / name, None)
    assert not list(tmp_path.glob("*fastsd*"))


def test_an_existing_file_is_kept(tmp_path):
    (tmp_path / "a.toml").write_text("learning_rate = 1e-5")
    (tmp_path / "b.toml").write_text("mine")
    with refused("convert-config-exists", out=tmp_path / "b.toml"):
        convert_config(tmp_path / "a.toml", tmp_path / "b.toml")
    assert (tmp_path / "b.toml").read_text() == "mine"


def test_no_key_is_dropped(tmp_path, capsys):
    """Every key of a file is in a line of the output."""
    keys = re.findall(r"^(\w+) =", KOHYA, re.M)
    (tmp_path / "a.toml").write_text(KOHYA.format(model="m", folder="f"))
    convert_config(tmp_path / "a.toml", None)
    out = capsys.readouterr().out
    assert [key for key in keys if key not in out] == []
