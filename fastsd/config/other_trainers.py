"""Keys of other trainers, with the settings that have the same effect here: kohya's sd-scripts, diffusers, and common words.

The keys of OneTrainer and EveryDream2 are in `onetrainer_keys.py`, and the kinds of rules in `conversion.py`.

Sources: the arguments of sd-scripts (train_network, fine_tune, train_db; train_util and custom_train_functions of its library;
lora of its networks) and of diffusers' training examples.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from fastsd.config.conversion import (
    OFF,
    Conversion,
    Rule,
    Rules,
    Settings,
    Status,
    averages_rule,
    batch_rule,
    choices,
    choose,
    computed,
    convert_key,
    no_equal,
    not_needed,
    optimizer_rule,
    pyramid_rule,
    same,
    switch,
    with_reasons,
)
from fastsd.config.onetrainer_keys import EVERYDREAM, ONETRAINER

# What sd-scripts does if a key is missing, where it differs from our default.
KOHYA_DEFAULTS = {
    "train_batch_size": 1, "learning_rate": 2e-6, "optimizer_type": "AdamW", "max_grad_norm": 1.0, "max_train_steps": 1600,
    "multires_noise_iterations": 0,
}  # fmt: skip
KOHYA_LORA_DEFAULTS = {"network_dim": 4, "network_alpha": 1}
_TRAINED_BY_DREAMBOOTH = ("no_train_text_encoder", "stop_text_encoder_training", "reg_data_dir", "prior_loss_weight")


def kohya_trains_text(settings: Settings) -> bool:
    """Return True if sd-scripts trains the text encoder: with a network by default, in fine_tune only if told to."""
    if settings.get("network_module"):
        rate = settings.get("text_encoder_lr")
        frozen = settings.get("network_train_unet_only") or settings.get("cache_text_encoder_outputs")
        return not frozen and (rate is None or bool(_first(rate)))
    if any(key in settings for key in _TRAINED_BY_DREAMBOOTH):
        return not settings.get("no_train_text_encoder")
    return bool(settings.get("train_text_encoder"))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _rates(_: Any, settings: Settings) -> Conversion:
    common = settings.get("learning_rate")
    rates = {"unet": settings.get("unet_lr"), "text_encoder": settings.get("text_encoder_lr", settings.get("learning_rate_te"))}
    rates = {component: _first(rate) or None for component, rate in rates.items()}
    if not any(rates.values()):
        return Conversion("same", {"stage.lr": common})
    if common and kohya_trains_text(settings):
        rates = {component: rate or common for component, rate in rates.items()}
    else:
        rates["unet"] = rates["unet"] or common
    if settings.get("network_module") and not rates["text_encoder"]:
        return Conversion("converted", {"stage.lr": rates["unet"]})
    return Conversion("converted", {"stage.lr": {component: rate for component, rate in rates.items() if rate}})


def _schedule(value: Any, settings: Settings) -> Conversion:
    name = str(value).lower()
    if name == "cosine_with_restarts" and (settings.get("lr_scheduler_num_cycles") or 1) > 1:
        return _restarts(settings["lr_scheduler_num_cycles"], settings)
    if name == "cosine_with_min_lr":
        floor = settings.get("lr_scheduler_min_lr_ratio") or 0.0
        return Conversion("converted", {"stage.schedule": "cosine", "stage.lr_floor": floor})
    if name == "polynomial" and settings.get("lr_scheduler_power", 1) == 1:
        return Conversion("converted", {"stage.schedule": "linear"}, "of power 1")
    schedules = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine"}
    schedules |= {schedule: schedule for schedule in ("constant", "linear", "cosine")}
    return choices("stage.schedule", schedules)(value, settings)


def _restarts(value: Any, settings: Settings) -> Conversion:
    if settings.get("lr_scheduler", "cosine_with_restarts") != "cosine_with_restarts":
        return Conversion("not needed", {}, "only cosine_with_restarts uses it")
    values: dict[str, Any] = {"stage.restarts": int(value) - 1}
    if settings.get("schedule", "constant") == "constant":  # the table of an unknown key may have a schedule already
        values = {"stage.schedule": "cosine"} | values
    return Conversion("converted", values, "cycles minus one")


def _steps(value: Any, settings: Settings) -> Conversion:
    if settings.get("max_train_epochs"):
        return Conversion("not needed", {}, "max_train_epochs replaces it")
    return Conversion("same", {"stage.until": value})


def _network(value: Any, settings: Settings) -> Conversion:
    if value != "networks.lora" and not str(value).startswith("lycoris"):
        return Conversion("no equal", {}, 'only LoRA can be trained; use networks.lora there, or train = ["unet"]')
    has_convolutions = any(str(entry).startswith("conv_dim") for entry in settings.get("network_args") or [])
    trains_text = kohya_trains_text(settings)
    targets = ["transformers", *(["resnets", "downsamplers", "upsamplers"] if has_convolutions else [])]
    values = {"stage.train": ["lora"], "model.lora.targets": targets + (["attention", "feed_forward"] if trains_text else [])}
    status: Status = "converted" if value == "networks.lora" else "nearest"
    return Conversion(status, values | {"model.lora.text_encoder": trains_text}, "the layers that networks.lora adapts")


def _rank(value: Any, settings: Settings) -> Conversion:
    alpha = settings.get("network_alpha", 1)
    values = {"model.lora.rank": int(value)} | ({"model.lora.alpha": alpha} if alpha else {})
    return Conversion("converted", values, "network_alpha is 1 by default" if "network_alpha" not in settings else "")


def _alpha(value: Any, _: Settings) -> Conversion:
    if not value:
        return Conversion("not needed", {}, "0 means the rank, as alpha unset does")
    return Conversion("same", {"model.lora.alpha": value})


def _conv_rank(value: Any, settings: Settings) -> Conversion:
    alpha = settings.get("network_args.conv_alpha", settings.get("conv_alpha"))
    why = "conv_alpha is 1 by default" if alpha is None else ""
    return Conversion("converted", {"model.lora.conv": int(value), "model.lora.conv_alpha": alpha or 1}, why)


def _conv_alpha(value: Any, settings: Settings) -> Conversion:
    if "network_args.conv_dim" not in settings:
        return Conversion("not needed", {}, "without conv_dim it has no effect")
    return Conversion("same", {"model.lora.conv_alpha": value})


def arguments_of(key: str, value: Any) -> dict[str, Any]:
    """Return the entries of `network_args` or `optimizer_args` as `key.name` -> value.

    Args:
        value: a list of "name=value", a text with several of them, or a table.
    """
    values = value.split() if isinstance(value, str) else value
    entries = values.items() if isinstance(values, Mapping) else [str(entry).partition("=")[::2] for entry in values]
    return {f"{key}.{name.strip()}": _literal(text) for name, text in entries}


def _literal(text: Any) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _arguments(key: str) -> Rule:
    def rule(value: Any, settings: Settings) -> Conversion:
        arguments = arguments_of(key, value)
        values, reasons = dict[str, Any](), []
        for name, argument in arguments.items():
            conversion = convert_key(KOHYA.get(name, no_equal("it is unknown")), argument, {**settings, **arguments})
            values |= conversion.values
            reasons += [f"{name.rpartition('.')[2]}: {conversion.why}"] if conversion.why else []
        return Conversion("converted" if values else "no equal", values, "; ".join(reasons))

    return rule


def _huber(_: Any, settings: Settings) -> Conversion:
    """sd-scripts: 2 c (sqrt(x^2 + c^2) - c), our pseudo_huber; that over c is its smooth_l1. c may depend on the timestep."""
    loss, schedule = settings.get("loss_type", "huber"), settings.get("huber_schedule")
    if loss not in ("huber", "smooth_l1"):
        return Conversion("not needed", {}, "only loss_type huber and smooth_l1 use it")
    if schedule not in (None, "constant"):
        return Conversion("no equal", {}, f'with huber_schedule "{schedule}" the threshold depends on the timestep')
    delta = settings.get("huber_c", 0.1) * settings.get("huber_scale", 1.0)
    reasons = ["without the factor 1 / huber_c of the loss"] if loss == "smooth_l1" else []
    reasons += ['equal for huber_schedule "constant"; the others have no equal'] if schedule is None else []
    values = {"stage.loss": "pseudo_huber", "stage.huber_delta": delta}
    return Conversion("nearest" if reasons else "converted", values, "; ".join(reasons))


def _loss(value: Any, settings: Settings) -> Conversion:
    if value in ("huber", "smooth_l1"):
        return _huber(value, settings)
    return choices("stage.loss", {"l2": "mse", "l1": "mae"})(value, settings)


def _multires(_: Any, settings: Settings) -> Conversion:
    iterations = settings.get("multires_noise_iterations", 6)
    if iterations < 2:  # the first iteration adds noise of full size
        return Conversion("not needed", {}, "without multires_noise_iterations of 2 or more it has no effect")
    return pyramid_rule(settings.get("multires_noise_discount", 0.3), settings)


def _timesteps(_: Any, settings: Settings) -> Conversion:
    first, end = settings.get("min_timestep") or 0, settings.get("max_timestep") or 1000
    return Conversion("converted", {"stage.timestep_range": [first, end]})


def _saving(unit: str) -> Rule:
    def rule(value: Any, settings: Settings) -> Conversion:
        if not value:
            return OFF
        interval = f"{value}e" if unit == "epochs" else value
        kept = settings.get(f"save_last_n_{unit}")
        if kept:
            return Conversion(
                "converted", {"stage.checkpoint_every": interval, "stage.keep_checkpoints": max(kept // value, 1)}
            )
        return Conversion("converted", {"stage.checkpoint_every": interval, "stage.keep_every": interval}, "all are kept")

    return rule


def side_of(value: Any) -> int:
    """Return the side of the square of a resolution: 512, "512", "512,768" or [512, 768]."""
    sides = [int(float(side)) for side in (value if isinstance(value, list) else str(value).split(","))]
    return sides[0] if len(set(sides)) == 1 else round(math.sqrt(math.prod(sides)) / 64) * 64


def _epochs(key: str) -> Rule:
    return lambda value, _: Conversion("converted", {key: f"{value}e"}) if value else OFF


def _sample_steps(value: Any, settings: Settings) -> Conversion:
    if settings.get("sample_every_n_epochs"):
        return Conversion("not needed", {}, "sample_every_n_epochs replaces it")
    return Conversion("same", {"stage.sample_every": value})


_EPOCHS = {key: _epochs(f"stage.{ours}") for key, ours in (
    ("max_train_epochs", "until"), ("num_train_epochs", "until"), ("sample_every_n_epochs", "sample_every"),
)}  # fmt: skip
KOHYA_NOT_NEEDED = {
    "attention is always fused": "xformers sdpa mem_eff_attn diffusers_xformers",
    "latents are always cached on the disk": "cache_latents cache_latents_to_disk skip_cache_check",
    "the loader and memory need no settings": "max_data_loader_n_workers persistent_data_loader_workers lowram highvram "
    "blocks_to_swap cpu_offload_checkpointing disable_mmap_load_safetensors ddp_timeout ddp_gradient_as_bucket_view "
    "ddp_static_graph dynamo_backend torch_compile text_encoder_batch_size",
    "weights and VAE are fp32": "no_half_vae full_bf16 full_fp16 fp8_base fp8_base_unet",
    "the same command resumes a run": "resume save_state save_state_on_train_end save_last_n_steps_state initial_epoch "
    "save_last_n_epochs_state initial_step skip_until_initial_step resume_from_huggingface",
    "RUN has a log and the settings": "logging_dir log_with log_prefix log_tracker_name log_tracker_config wandb_run_name "
    "log_config output_config config_file no_metadata debug_dataset use_safetensors wandb_api_key validation_seed",
    "it is a name or a secret of the program": "huggingface_token dataset_class",
    "SD1.5 does not use it": "weighting_scheme mode_scale logit_mean logit_std tokenizer_cache_dir",
    "another key has it": "save_last_n_steps save_last_n_epochs",
    "other optimizers use it": "optimizer_args.scale_parameter optimizer_args.relative_step optimizer_args.warmup_init "
    "optimizer_args.safeguard_warmup optimizer_args.use_bias_correction",
}  # fmt: skip
KOHYA_NO_EQUAL = {
    "captions are used as they are": "caption_prefix caption_suffix enable_wildcard secondary_separator weighted_captions "
    "keep_tokens_separator custom_attributes no_token_padding",
    "use caption_dropout": "caption_dropout_every_n_epochs", "use tag_dropout": "token_warmup_min token_warmup_step",
    "only crops and mirrored images are made": "color_aug face_crop_aug_range resize_interpolation",
    "its strength is constant": "noise_offset_random_strength adaptive_noise_scale ip_noise_gamma_random_strength",
    "the loss has no such term": "v_pred_like_loss scale_v_pred_loss_like_noise_pred",
    "give regularisation images as a folder with loss_weight": "prior_loss_weight network_multiplier",
    "write one [[stage]] for each phase": "stop_text_encoder_training",
    "LoRA is trained without it": "scale_weight_norms network_dropout dim_from_weights network_args.dropout "
    "network_args.rank_dropout network_args.module_dropout network_args.block_dims network_args.block_alphas",
    "merge them first with `fastsd convert MODEL OUT --merge FILE`": "base_weights base_weights_multiplier",
    "the schedules are constant, linear, cosine and rex": "lr_decay_steps lr_scheduler_power lr_scheduler_timescale "
    "lr_scheduler_type lr_scheduler_args optimizer_schedulefree_wrapper schedulefree_wrapper_args",
    "masks are files beside the images; see data.masks": "alpha_mask conditioning_data_dir",
    "write metadata.jsonl into the folder": "in_json metadata_file", "only SD1.5 can be trained": "v2",
    "export and uploads are separate": "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo async_upload "
    "huggingface_repo_visibility save_state_to_huggingface training_comment save_n_epoch_ratio",
    "write captions into files": "class_tokens", "our huber has a constant threshold": "huber_schedule",
    "train = [\"lora\"] trains the UNet too": "network_train_text_encoder_only",
}  # fmt: skip
# fmt: off
KOHYA: Rules = {
    **with_reasons(not_needed, KOHYA_NOT_NEEDED), **with_reasons(no_equal, KOHYA_NO_EQUAL), **_EPOCHS,
    "pretrained_model_name_or_path": same("model.base"), "vae": same("model.vae"), "clip_skip": computed(
        "model.clip_skip", lambda n: max(n - 1, 0), "there, 1 is the last layer; here it is 0"),
    "max_token_length": computed("model.chunks", lambda n: n // 75, "the ends between chunks are kept here", "nearest"),
    "v_parameterization": switch("model.prediction", "v_prediction"), "zero_terminal_snr": switch("model.zero_snr", True),
    "network_module": _network, "network_dim": _rank, "network_alpha": _alpha, "network_weights": same("model.lora.file"),
    "network_args": _arguments("network_args"), "network_args.conv_dim": _conv_rank, "conv_dim": _conv_rank,
    "network_args.conv_alpha": _conv_alpha, "conv_alpha": same("model.lora.conv_alpha"),
    "network_args.algo": lambda value, _: OFF if value in ("lora", "locon") else Conversion("no equal", {}, "only LoRA"),
    "network_train_unet_only": switch("model.lora.text_encoder", False), "train_text_encoder": lambda _, settings: Conversion(
        "converted", {"stage.train": ["unet", "text_encoder"] if kohya_trains_text(settings) else ["unet"]}),
    "no_train_text_encoder": switch("stage.train", ["unet"]),
    "train_data_dir": computed("data.folders", lambda path: [path], "a folder N_NAME there: { path, repeats = N } here"),
    "image_dir": computed("data.folders", lambda path: [path]), "reg_data_dir": choose(
        "data.folders", 'add { path = "...", loss_weight = 1.0 }'),
    "num_repeats": choose("data.folders", 'in an entry of folders: { path = "...", repeats = 2 }'),
    "dataset_repeats": choose("data.folders", 'in an entry of folders: { path = "...", repeats = 2 }'),
    "resolution": computed("data.resolution", side_of), "flip_aug": switch("data.flip", True),
    "random_crop": switch("data.crop", "random", "data.crops of them are stored"),
    "caption_extension": lambda value, _: OFF if value in (".txt", ".caption") else Conversion(
        "no equal", {}, "captions are .txt or .caption"),
    "caption_extention": not_needed("captions are .txt or .caption"),
    "enable_bucket": switch("data.buckets", {}), "min_bucket_reso": same("data.buckets.min"),
    "max_bucket_reso": same("data.buckets.max"), "bucket_reso_steps": same("data.buckets.step"),
    "bucket_no_upscale": same("data.buckets.no_upscale"), "masked_loss": choose("data.masks", "the suffix of the masks"),
    "vae_batch_size": same("cache.batch"), "cache_text_encoder_outputs": switch("cache.hidden_states", True),
    "cache_text_encoder_outputs_to_disk": switch("cache.hidden_states", True), "cache_info": not_needed("the cache has it"),
    "train_batch_size": batch_rule, "gradient_accumulation_steps": batch_rule, "batch_size": batch_rule,
    "gradient_checkpointing": switch("stage.checkpointing", "block", '"ff" takes less time'),
    "mixed_precision": choices("stage.precision", {"no": "fp32", "bf16": "bf16"}, {"fp16": ("bf16", "there is no fp16")}),
    "learning_rate": _rates, "unet_lr": _rates, "text_encoder_lr": _rates, "learning_rate_te": _rates,
    "optimizer_type": optimizer_rule, "use_8bit_adam": switch("stage.optimizer", "adamw", "its state is fp32"),
    "use_lion_optimizer": switch("stage.optimizer", "lion"), "optimizer_args": _arguments("optimizer_args"),
    "optimizer_args.weight_decay": same("stage.weight_decay"), "optimizer_args.betas": computed("stage.betas", list),
    "optimizer_args.d0": same("stage.d0"),
    "optimizer_args.growth_rate": lambda rate, _: Conversion("same", {"stage.growth_rate": rate}) if 1 < rate < 1e9 else OFF,
    "optimizer_args.decouple": not_needed("weight decay is decoupled"), "max_grad_norm": same("stage.grad_clip"),
    "lr_scheduler": _schedule, "lr_scheduler_num_cycles": _restarts, "lr_warmup_steps": same("stage.warmup"),
    "lr_scheduler_min_lr_ratio": same("stage.lr_floor"), "max_train_steps": _steps, "fused_backward_pass": choose(
        "stage.fused_backward", "it needs grad_clip = 0 and no accumulation"), "seed": same("seed"),
    "loss_type": _loss, "huber_c": _huber, "huber_scale": _huber,
    "sample_at_first": no_equal("use `fastsd sample` on the base"),
    "noise_offset": same("stage.noise_offset"), "multires_noise_discount": _multires,
    "multires_noise_iterations": _multires, "ip_noise_gamma": same("stage.input_perturbation"),
    "min_snr_gamma": lambda gamma, _: Conversion(
        "converted", {"stage.weighting": "min_snr", "stage.weighting_gamma": gamma}) if gamma else OFF,
    "debiased_estimation_loss": lambda on, _: Conversion(
        "converted", {"stage.weighting": "debiased", "stage.weighting_form": "sd-scripts"}) if on else OFF,
    "min_timestep": _timesteps, "max_timestep": _timesteps, "shuffle_caption": same("stage.shuffle_tags"),
    "keep_tokens": same("stage.keep_tags"), "caption_separator": same("stage.tag_separator"),
    "caption_dropout_rate": same("stage.caption_dropout"), "caption_tag_dropout_rate": same("stage.tag_dropout"),
    "save_every_n_steps": _saving("steps"), "save_every_n_epochs": _saving("epochs"),
    "sample_every_n_steps": _sample_steps, "sample_prompts": same("sample.prompts_file"),
    "sample_sampler": choices("sample.sampler", {
        "ddim": "ddim", "euler": "euler", "k_euler": "euler", "euler_a": "euler_a", "k_euler_a": "euler_a",
        "dpmsolver++": "dpm++"}, {"dpmsolver": ("dpm++", "it is the newer version")}),
    "validation_split": choose("validate.held_out", "a number of images, not a share"),
    "validate_every_n_steps": same("validate.every"), "max_validation_steps": no_equal("all held-out images are measured"),
    "validate_every_n_epochs": computed("validate.every", lambda n: f"{n}e"), "output_dir": lambda folder, settings: Conversion(
        "converted", {"run": "/".join([folder, *filter(None, [settings.get("output_name")])])}),
    "output_name": same("export.title"), "save_precision": choices(
        "export.dtype", {"float": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}),
    "save_model_as": lambda value, _: Conversion("converted", {"export.single_file": "diffusers" not in str(value)}),
}
# Names of diffusers' examples, and words that people try.
COMMON: Rules = {
    "lr_warmup_steps": same("stage.warmup"), "warmup_steps": same("stage.warmup"), "min_lr": choose(
        "stage.lr_floor", "a share of lr"), "epochs": computed("stage.until", lambda n: f"{n}e"), "steps": _steps,
    "base_model": same("model.base"), "vae_path": same("model.vae"), "prediction": same("model.prediction"),
    "pretrained_vae_model_name_or_path": same("model.vae"), "prediction_type": same("model.prediction"),
    "zero_snr": same("model.zero_snr"), "rescale_betas_zero_snr": same("model.zero_snr"), "lora": choose(
        "model.lora", "a table"),
    "rank": same("model.lora.rank"), "target_modules": same("model.lora.targets"), "cfg": same("sample.guidance"),
    "guidance_scale": same("sample.guidance"), "num_inference_steps": same("sample.steps"), "scheduler": same("sample.sampler"),
    "instance_data_dir": computed("data.folders", lambda path: [path]), "folder": computed("data.folders", lambda path: [path]),
    "images": computed("data.folders", lambda path: [path]), "center_crop": switch("data.crop", "centre"),
    "random_flip": same("data.flip"), "caption_column": same("data.caption_key"), "checkpointing_steps": same(
        "stage.checkpoint_every"), "decay": same("stage.weight_decay"), "adam_weight_decay": same("stage.weight_decay"),
    "initial_d": same("stage.d0"), "snr_gamma": KOHYA["min_snr_gamma"], "min_snr": switch("stage.weighting", "min_snr"),
    "p2_gamma": lambda gamma, _: Conversion("converted", {"stage.weighting": "p2", "stage.weighting_gamma": gamma}),
    "input_perturbation": same("stage.input_perturbation"), "timestep_sampling": same("stage.timesteps"),
    "use_ema": averages_rule, "ema_decay": averages_rule, "ema_max_decay": averages_rule,
    "logit_mean": same("stage.timestep_mean"), "logit_std": same("stage.timestep_std"), "validation_steps": same(
        "validate.every"), "num_validation_images": same("sample.images"), "validation_epochs": computed(
        "validate.every", lambda n: f"{n}e"), "validation_prompt": computed("sample.prompts", lambda prompt: [prompt]),
    "log_every": same("log.every"), "metadata_title": same("export.title"), "metadata_author": same("export.author"),
    "metadata_license": same("export.license"), "train_unet": choose("stage.train", "it lists the components"),
    "freeze": choose("stage.train", "it lists the components"), "unfreeze": choose("stage.train", "it lists the components"),
}
# fmt: on


def conversion_of(key: str, value: Any, settings: Settings) -> Conversion | None:
    """Return what stands here for a key of any trainer, or None if no trainer has it."""
    tables = (rules for rules in (KOHYA, COMMON, ONETRAINER, EVERYDREAM) if key in rules)
    conversions = [convert_key(rules[key], value, settings) for rules in tables]
    return next((conversion for conversion in conversions if conversion.values), next(iter(conversions), None))
