"""Keys of OneTrainer and of EveryDream2, with the settings that have the same effect here.

The keys of nested tables have dotted names: `unet.learning_rate`.  `unet.*` stands for all keys of a table without a rule.

Sources: OneTrainer's TrainConfig, ConceptConfig, ModelSetupNoiseMixin and ModelSetupDiffusionLossMixin; EveryDream2's
arguments of train and its optimizer.json.
"""

from __future__ import annotations

from typing import Any

from fastsd.config.conversion import (
    OFF,
    Conversion,
    Rule,
    Rules,
    Settings,
    averages_rule,
    batch_rule,
    choices,
    choose,
    computed,
    no_equal,
    not_needed,
    optimizer_rule,
    pyramid_rule,
    same,
    switch,
    with_reasons,
)

# What OneTrainer does if a key is missing, where it differs from our default.
ONETRAINER_DEFAULTS = {
    "training_method": "FINE_TUNE", "optimizer.optimizer": "ADAMW", "learning_rate": 3e-6, "learning_rate_warmup_steps": 200,
    "epochs": 100, "batch_size": 1, "clip_grad_norm": 1.0, "train_dtype": "FLOAT_16", "aspect_ratio_bucketing": True,
    "unet.gradient_checkpointing": True, "loss_weight_fn": "CONSTANT", "timestep_distribution": "UNIFORM",
    "learning_rate_scheduler": "CONSTANT",
}  # fmt: skip
ONETRAINER_LORA_DEFAULTS = {"lora_rank": 16, "lora_alpha": 1.0}
EVERYDREAM_DEFAULTS = {
    "batch_size": 2, "max_epochs": 300, "cond_dropout": 0.04, "zero_frequency_noise_ratio": 0.02, "loss_type": "mse_huber",
    "disable_textenc_training": False, "disable_amp": False, "optimizer_config.base.optimizer": "adamw8bit",
}  # fmt: skip


def onetrainer_trains(settings: Settings, component: str) -> bool:
    return bool(settings.get(f"{component}.train", True) and settings.get(f"{component}.include", True))


def _method(value: Any, settings: Settings) -> Conversion:
    components = [component for component in ("unet", "text_encoder") if onetrainer_trains(settings, component)]
    if value == "FINE_TUNE":
        return Conversion("converted", {"stage.train": components})
    if value != "LORA":
        return Conversion("no equal", {}, "only the UNet, the text encoder and LoRA can be trained")
    layers = [name.strip() for name in str(settings.get("layer_filter") or "").split(",") if name.strip()]
    targets = [f"*{layer}*" for layer in layers] or ["*"]
    if layers and "text_encoder" in components:
        targets += ["self_attn", "mlp"]  # all layers of the text encoder, which the filter is not for
    values: dict[str, Any] = {"stage.train": ["lora"], "model.lora.targets": targets}
    values |= {} if layers else {"model.lora.conv": settings.get("lora_rank", 16)}
    return Conversion("converted", values | {"model.lora.text_encoder": "text_encoder" in components})


def _rate(_: Any, settings: Settings) -> Conversion:
    common = settings.get("learning_rate")
    scaler = str(settings.get("learning_rate_scaler", "NONE"))
    images, count = settings.get("batch_size") or 1, settings.get("gradient_accumulation_steps") or 1
    scale = (images if "BATCH" in scaler or "BOTH" in scaler else 1) * (count if scaler[-4:] in ("TION", "BOTH") else 1)
    rates = {
        component: (settings.get(f"{component}.learning_rate") or common) * scale**0.5
        for component in ("unet", "text_encoder")
        if onetrainer_trains(settings, component)
    }
    why = f"times the square root of {scale}" if scale != 1 else ""
    if len(set(rates.values())) == 1:
        rate = next(iter(rates.values()))
        return Conversion("same" if rate == common else "converted", {"stage.lr": rate}, why)
    return Conversion("converted", {"stage.lr": rates}, why)


def _warmup(value: Any, settings: Settings) -> Conversion:
    count = settings.get("gradient_accumulation_steps") or 1
    if value <= 1:
        return Conversion("same", {"stage.warmup": value}) if value < 1 else Conversion("no equal", {}, "the whole run")
    return Conversion("converted" if count > 1 else "same", {"stage.warmup": int(value / count)}, "steps of the optimizer")


def _schedule(value: Any, settings: Settings) -> Conversion:
    cycles = settings.get("learning_rate_cycles", 1)
    if value == "COSINE_WITH_HARD_RESTARTS" and float(cycles).is_integer():
        values: dict[str, Any] = {"stage.schedule": "cosine"} | ({"stage.restarts": int(cycles) - 1} if cycles > 1 else {})
        return Conversion("converted", values, "cycles minus one" if cycles > 1 else "")
    if value == "REX":
        return Conversion("converted", {"stage.schedule": "rex", "stage.rex_bend": 0.9})
    return choices("stage.schedule", {name: name for name in ("constant", "linear", "cosine")})(value, settings)


def _loss(_: Any, settings: Settings) -> Conversion:
    strengths = {name: settings.get(f"{name}_strength", float(name == "mse")) for name in ("mse", "mae", "log_cosh", "huber")}
    used = {name: strength for name, strength in strengths.items() if strength}
    if len(used) != 1 or "log_cosh" in used:
        return Conversion("no equal", {}, f"the loss is one of mse, mae and huber, not {' + '.join(used) or 'none'}")
    ((name, strength),) = used.items()
    values = {"stage.loss": name} | ({"stage.huber_delta": settings.get("huber_delta", 1.0)} if name == "huber" else {})
    if strength != 1:
        return Conversion("nearest", values, f"without the factor {strength:g} of the loss")
    return Conversion("converted", values) if name != "mse" else OFF


def _weighting(value: Any, settings: Settings) -> Conversion:
    strength = settings.get("loss_weight_strength", 5.0)
    if value == "MIN_SNR_GAMMA":
        return Conversion("converted", {"stage.weighting": "min_snr", "stage.weighting_gamma": strength})
    if value in ("P2", "DEBIASED_ESTIMATION"):
        values = (
            {"stage.weighting": "p2", "stage.weighting_gamma": strength} if value == "P2" else {"stage.weighting": "debiased"}
        )
        return Conversion("converted", values | {"stage.weighting_form": "onetrainer"})
    return choices("stage.weighting", {"constant": "none"})(value, settings)


def _strength(value: Any, settings: Settings) -> Conversion:
    if settings.get("loss_weight_fn") in ("MIN_SNR_GAMMA", "P2"):
        return _weighting(settings["loss_weight_fn"], settings)
    return OFF if "loss_weight_fn" in settings else Conversion("same", {"stage.weighting_gamma": value})


def _cycles(value: Any, settings: Settings) -> Conversion:
    if settings.get("learning_rate_scheduler", "COSINE_WITH_HARD_RESTARTS") != "COSINE_WITH_HARD_RESTARTS":
        return OFF
    return _schedule("COSINE_WITH_HARD_RESTARTS", {"learning_rate_cycles": value})


def _timesteps(_: Any, settings: Settings) -> Conversion:
    name = settings.get("timestep_distribution", "LOGIT_NORMAL")
    if name == "UNIFORM":
        return OFF
    if name != "LOGIT_NORMAL":
        return Conversion("no equal", {}, "timesteps is uniform, logit_normal or cubic")
    mean, std = settings.get("noising_bias", 0.0), settings.get("noising_weight", 0.0) + 1.0
    values = {"stage.timesteps": "logit_normal", "stage.timestep_mean": mean, "stage.timestep_std": std}
    return Conversion("converted", values, "the standard deviation is noising_weight + 1")


def _everydream_rates(_: Any, settings: Settings) -> Conversion:
    common: Any = settings.get("optimizer_config.base.lr") or settings.get("lr")
    scale = settings.get("optimizer_config.text_encoder_lr_scale") or 1.0
    text = settings.get("optimizer_config.text_encoder_overrides.lr") or common * scale
    if text == common or settings.get("disable_textenc_training"):
        return Conversion("same", {"stage.lr": common})
    return Conversion("converted", {"stage.lr": {"unet": common, "text_encoder": text}})


def _range(_: Any, settings: Settings) -> Conversion:
    ends = settings.get("min_noising_strength", 0.0), settings.get("max_noising_strength", 1.0)
    first, end = (int(1000 * strength) for strength in ends)
    return Conversion("converted", {"stage.timestep_range": [first, end]}, "of 1000") if ends != (0, 1) else OFF


def _interval(key: str, name: str) -> Rule:
    def rule(_: Any, settings: Settings) -> Conversion:
        unit, count = str(settings.get(f"{name}_unit", "STEP")).upper(), settings.get(name, 0)
        suffixes = {"STEP": "", "EPOCH": "e", "SECOND": "s", "MINUTE": "m", "HOUR": "h"}
        if unit not in suffixes or not count:
            return OFF
        count = max(count // (settings.get("gradient_accumulation_steps") or 1), 1) if unit == "STEP" else count
        return Conversion("converted", {key: count if unit == "STEP" else f"{count}{suffixes[unit]}"})

    return rule


def _resolution(value: Any, _: Settings) -> Conversion:
    sizes = str(value).split(",")
    sides = [int(side) for side in sizes[0].split("x")]
    side = sides[0] if len(sides) == 1 else round((sides[0] * sides[1]) ** 0.5 / 64) * 64
    if len(sizes) > 1:
        return Conversion("nearest", {"data.resolution": side}, f"only the first of {len(sizes)} resolutions")
    if len(sides) > 1:
        return Conversion("nearest", {"data.resolution": side}, "the side of a square of this area")
    return Conversion("converted", {"data.resolution": side})


_PRECISIONS = {"float_32": "fp32", "tfloat_32": "tf32", "bfloat_16": "bf16"}
_UNUSED_PARTS = (
    "prior transformer unconditional_transformer quantization text_encoder_2 text_encoder_3 text_encoder_4 effnet_encoder "
    "decoder decoder_text_encoder decoder_vqgan embedding cloud secrets optimizer_defaults sample muon"
)
ONETRAINER_NOT_NEEDED = {
    "SD1.5 does not use it": " ".join(f"{name}.*" for name in _UNUSED_PARTS.split()) + " text_encoder_2_layer_skip frames "
    "text_encoder_3_layer_skip text_encoder_4_layer_skip text_encoder_sequence_length text_encoder_2_sequence_length "
    "dynamic_timestep_shifting vb_loss_strength additional_embeddings embedding_learning_rate embedding_weight_dtype "
    "preserve_embedding_norm bundle_additional_embeddings",
    "RUN has a log, samples and the settings": "debug_mode debug_dir tensorboard_expose tensorboard_always_on tensorboard_port "
    "prevent_overwrites include_train_config samples_to_tensorboard sample_image_format sample_video_format "
    "sample_audio_format non_ema_sampling save_filename_prefix output_model_destination secrets",
    "latents are always cached": "latent_caching clear_cache_before_training only_cache",
    "devices and memory need no settings": "multi_gpu device_indexes gradient_reduce_precision fused_gradient_reduce "
    "async_gradient_reduce async_gradient_reduce_buffer async_offloading temp_device enable_autocast_cache compile "
    "attention_mechanism fallback_train_dtype dataloader_threads huggingface_cache_dir offline_mode",
    "the same command resumes a run": "continue_last_backup backup_before_save rolling_backup",
    "masters are fp32": "unet.weight_dtype text_encoder.weight_dtype vae.weight_dtype lora_weight_dtype weight_dtype",
    "another key has it": "huber_delta ema_decay "
    "ema_update_step_interval sample_after_unit backup_after_unit save_every_unit validate_after_unit layer_filter_preset "
    "unet.train text_encoder.train unet.include text_encoder.include layer_filter concept_file_name concepts "
    "learning_rate_scaler sample_definition_file_name samples",
    "LoRA is the only adapter": "lora_decompose_norm_epsilon lora_decompose_output_axis oft_block_size lokr_dim "
    "lokr_decompose_factor lokr_dora_on_output lokr_vec_trick oft_block_share oft_scaled lokr_decompose_both lokr_use_tucker "
    "lokr_weight_decompose lokr_full_matrix", "the optimizer has no such option": "optimizer.*",
    "a setting of the program": "__version train_device unet.* text_encoder.* vae.*",
}  # fmt: skip
ONETRAINER_NO_EQUAL = {
    "the offset is equal in all timesteps": "generalized_offset_noise", "its loss is over all elements": "unmasked_probability "
    "normalize_masked_area_loss masked_prior_preservation_weight", "only plain LoRA is trained": "lora_decompose",
    "LoRA is trained without it": "dropout_probability", "SD1.5 is trained without padding tricks": "force_circular_padding",
    "write one [[stage]] for each phase": "unet.stop_training_after text_encoder.stop_training_after",
    "only SD1.5's own inputs can be trained": "custom_conditioning_image", "patterns have * here": "layer_filter_regex",
    "the schedules are constant, linear, cosine and rex": "custom_learning_rate_scheduler scheduler_params",
}  # fmt: skip
# fmt: off
ONETRAINER: Rules = {
    **with_reasons(not_needed, ONETRAINER_NOT_NEEDED), **with_reasons(no_equal, ONETRAINER_NO_EQUAL),
    "training_method": _method, "model_type": lambda value, _: OFF if value in ("STABLE_DIFFUSION_15", "SD15") else Conversion(
        "no equal", {}, "only SD1.5 can be trained"),
    "peft_type": lambda value, _: OFF if value == "LORA" else Conversion("no equal", {}, "only plain LoRA is trained"),
    "base_model_name": same("model.base"), "vae.model_name": same("model.vae"), "workspace_dir": same("run"),
    "cache_dir": same("cache.dir"), "tensorboard": same("log.tensorboard"), "lora_model_name": same("model.lora.file"),
    "lora_rank": lambda rank, settings: Conversion("converted", {"model.lora.rank": rank, "model.lora.alpha": settings.get(
        "lora_alpha", 1.0)}, "" if "lora_alpha" in settings else "lora_alpha is 1 by default"),
    "lora_alpha": same("model.lora.alpha"), "text_encoder_layer_skip": same("model.clip_skip"),
    "force_v_prediction": switch("model.prediction", "v_prediction"),
    "force_epsilon_prediction": switch("model.prediction", "epsilon"),
    "rescale_noise_scheduler_to_zero_terminal_snr": switch("model.zero_snr", True), "resolution": _resolution,
    "aspect_ratio_bucketing": switch("data.buckets", {}, "OneTrainer's sizes differ", "nearest"),
    "masked_training": switch("data.masks", "-masklabel.png"), "unmasked_weight": lambda weight, settings: Conversion(
        "converted", {"stage.unmasked_weight": weight}, "differs where a mask is grey") if settings.get(
        "masked_training", True) else OFF,
    "learning_rate": _rate, "unet.learning_rate": _rate, "text_encoder.learning_rate": _rate,
    "learning_rate_scheduler": _schedule, "learning_rate_warmup_steps": _warmup, "learning_rate_min_factor": same(
        "stage.lr_floor"), "epochs": computed("stage.until", lambda n: f"{n}e"), "batch_size": batch_rule,
    "gradient_accumulation_steps": batch_rule, "ema": averages_rule,
    "train_dtype": choices("stage.precision", _PRECISIONS, {"float_16": ("bf16", "there is no fp16")}),
    "output_dtype": choices("export.dtype", {"float_32": "fp32", "float_16": "fp16", "bfloat_16": "bf16"}),
    "output_model_format": lambda value, _: Conversion("converted", {"export.single_file": value != "DIFFUSERS"}),
    "unet.gradient_checkpointing": switch("stage.checkpointing", "block", '"ff" takes less time'),
    "text_encoder.gradient_checkpointing": not_needed("the text encoder is small"),
    "gradient_checkpointing": lambda value, _: OFF if value in ("OFF", False) else Conversion(
        "converted", {"stage.checkpointing": "block"}, '"ff" takes less time'),
    "text_encoder.dropout_probability": computed(
        "stage.caption_dropout", float, 'there, the embedding becomes 0; here, that of ""', "nearest"),
    "mse_strength": _loss, "mae_strength": _loss, "log_cosh_strength": _loss, "huber_strength": _loss,
    "loss_weight_fn": _weighting, "loss_scaler": lambda value, _: OFF if value == "NONE" else Conversion(
        "no equal", {}, "the loss is a mean; Lion, D-Lion and AdamW do not depend on its scale"),
    "clip_grad_norm": same("stage.grad_clip"), "offset_noise_weight": same("stage.noise_offset"),
    "perturbation_noise_weight": computed(
        "stage.input_perturbation", float, "there, the target contains it as well", "nearest"),
    "noising_weight": _timesteps, "noising_bias": _timesteps, "loss_weight_strength": _strength,
    "learning_rate_cycles": _cycles, "min_noising_strength": _range,
    "max_noising_strength": _range, "timestep_distribution": _timesteps,
    "timestep_shift": lambda value, _: OFF if value == 1 else Conversion("no equal", {}, "use timesteps = \"logit_normal\""),
    "optimizer.optimizer": lambda value, settings: optimizer_rule(str(value).replace("_", ""), {
        key.removeprefix("optimizer."): entry for key, entry in settings.items() if entry is not None}),
    "optimizer.beta1": lambda beta, settings: Conversion("converted", {"stage.betas": [beta, settings.get(
        "optimizer.beta2") or 0.999]}),
    "optimizer.beta2": lambda beta, settings: Conversion("converted", {"stage.betas": [settings.get(
        "optimizer.beta1") or 0.9, beta]}),
    "optimizer.weight_decay": same("stage.weight_decay"), "optimizer.d0": same("stage.d0"),
    "optimizer.growth_rate": lambda rate, _: Conversion("same", {"stage.growth_rate": rate}) if 1 < rate < 1e9 else OFF,
    "optimizer.fused_back_pass": choose("stage.fused_backward", "it needs grad_clip = 0"),
    "sample_skip_first": no_equal("sample_every counts from the start"),
    "sample_after": _interval("stage.sample_every", "sample_after"), "save_skip_first": no_equal("use checkpoint_at"),
    "backup_after": _interval("stage.checkpoint_every", "backup_after"),
    "save_every": _interval("stage.keep_every", "save_every"), "rolling_backup_count": same("stage.keep_checkpoints"),
    "validation": choose("validate.held_out", "a number of images; there, a concept of its own"),
    "validate_after": _interval("validate.every", "validate_after"),
}
# The keys of a concept that change the stage or the data. The converter reads path, balancing, loss_weight, type and enabled.
CONCEPT: Rules = {
    "image.enable_random_flip": switch("data.flip", True), "image.enable_fixed_flip": no_equal("mirrored images are chosen"),
    "image.enable_crop_jitter": switch(
        "data.crop", "random", "there, shifted a little; here, data.crops random crops are stored", "nearest"),
    "text.enable_tag_shuffling": same("stage.shuffle_tags"), "text.tag_delimiter": same("stage.tag_separator"),
    "text.keep_tags_count": lambda count, settings: Conversion("same", {"stage.keep_tags": count}) if settings.get(
        "text.enable_tag_shuffling") or settings.get("text.tag_dropout_enable") else OFF,
    "text.tag_dropout_enable": not_needed("another key has it"), "text.tag_dropout_mode": not_needed("another key has it"),
    "text.tag_dropout_probability": lambda share, settings: OFF if not settings.get("text.tag_dropout_enable") else Conversion(
        "same", {"stage.tag_dropout": share}) if settings.get("text.tag_dropout_mode") == "RANDOM" else Conversion(
        "no equal", {}, "tags are dropped one by one, as in mode RANDOM"),
    "text.prompt_source": lambda value, _: Conversion("converted", {"data.captions": "filename"}) if value == "filename" else (
        OFF if value == "sample" else Conversion("no equal", {}, "write one caption beside each image")),
    "image_variations": not_needed("see data.crops"), "text_variations": not_needed("captions are edited in each step"),
    "seed": not_needed("the config has one seed"), "include_subdirectories": not_needed("folders are searched recursively"),
    "balancing_strategy": not_needed("another key has it"), "concept_stats": not_needed("a statistic"),
    "name": not_needed("a label"), "text.prompt_path": not_needed("another key has it"),
    "image.*": no_equal("only crops and mirrored images are made"), "text.*": no_equal("captions are used as they are"),
}
EVERYDREAM: Rules = {
    "resume_ckpt": same("model.base"), "data_root": computed("data.folders", lambda path: [path], "multiply.txt: use repeats"),
    "batch_size": batch_rule, "grad_accum": batch_rule, "max_epochs": computed("stage.until", lambda n: f"{n}e"),
    "resolution": computed("data.resolution", int), "lr": _everydream_rates, "lr_scheduler": choices(
        "stage.schedule", {name: name for name in ("constant", "linear", "cosine")}), "lr_warmup_steps": same("stage.warmup"),
    "clip_skip": computed("model.clip_skip", lambda n: max(n - 1, 0), "there, 1 is the last layer; here it is 0"),
    "cond_dropout": same("stage.caption_dropout"), "clip_grad_norm": same("stage.grad_clip"),
    "disable_amp": lambda off, _: Conversion("converted", {"stage.precision": "fp32"}) if off else Conversion(
        "nearest", {"stage.precision": "bf16"}, "there, fp16"),
    "disable_textenc_training": lambda off, _: Conversion(
        "converted", {"stage.train": ["unet"] if off else ["unet", "text_encoder"]}),
    "disable_unet_training": switch("stage.train", ["text_encoder"]),
    "flip_p": computed("data.flip", bool, "half of the images", "nearest"),
    "gradient_checkpointing": switch("stage.checkpointing", "block", '"ff" takes less time'),
    "loss_type": choices("stage.loss", {"mse": "mse", "huber": "huber"}, {"mse_huber": ("mse", "the two mixed by timestep")}),
    "optimizer_config.base.optimizer": lambda value, settings: optimizer_rule(value, {
        key.removeprefix("optimizer_config.base."): entry for key, entry in settings.items() if entry is not None}),
    "optimizer_config.base.lr": _everydream_rates, "optimizer_config.text_encoder_overrides.lr": _everydream_rates,
    "optimizer_config.text_encoder_lr_scale": _everydream_rates, "optimizer_config.base.epsilon": lambda epsilon, _: (
        OFF if epsilon == 1e-8 else Conversion("no equal", {}, "it is 1e-8")),
    "optimizer_config.text_encoder_freezing.*": no_equal("name the layers in train, such as text_encoder.layers.11"),
    "optimizer_config.apply_grad_scaler_step_tweaks": not_needed("there is no gradient scaler"),
     "optimizer_config.base.betas": same("stage.betas"),
    "optimizer_config.base.weight_decay": same("stage.weight_decay"), "optimizer_config.base.lr_scheduler": choices(
        "stage.schedule", {name: name for name in ("constant", "linear", "cosine")}),
    "optimizer_config.base.lr_warmup_steps": same("stage.warmup"),
    "optimizer_config.*": no_equal("only lr differs between the components"),
    "project_name": same("export.title"), "logdir": same("run"), "sample_prompts": same("sample.prompts_file"),
    "sample_steps": same("stage.sample_every"), "save_every_n_epochs": computed(
        "stage.checkpoint_every", lambda n: f"{n}e"), "ckpt_every_n_minutes": computed(
        "stage.checkpoint_every", lambda n: f"{n}m"), "seed": lambda seed, _: Conversion(
        "same", {"seed": seed}) if seed >= 0 else OFF,
    "timestep_start": lambda start, settings: Conversion(
        "converted", {"stage.timestep_range": [start, settings.get("timestep_end", 1000)]}),
    "timestep_end": lambda end, settings: Conversion(
        "converted", {"stage.timestep_range": [settings.get("timestep_start", 0), end]}),
    "shuffle_tags": same("stage.shuffle_tags"), "keep_tags": same("stage.keep_tags"),
    "zero_frequency_noise_ratio": same("stage.noise_offset"), "pyramid_noise_discount": pyramid_rule,
    "enable_zero_terminal_snr": switch("model.zero_snr", True), "min_snr_gamma": lambda gamma, _: Conversion(
        "converted", {"stage.weighting": "min_snr", "stage.weighting_gamma": gamma}), "ema_decay_rate": averages_rule,
    "wandb": choose("log.wandb", "the project's name"),
    "embedding_perturbation": no_equal("embeddings are not perturbed"), "validation_config": choose(
        "validate.held_out", "a number of images"), "ema_strength_target": no_equal("choose ema"),
    **with_reasons(not_needed, {
        "a setting of the program": "amp attn_type gpuid notebook optimizer_config run_name write_schedule log_step "
        "load_settings_every_epoch save_optimizer save_ckpts_from_n_epochs save_ckpt_dir no_prepend_last no_save_ckpt "
        "save_full_precision ema_device ema_sample_nonema_model ema_sample_ema_model ema_update_interval ema_resume_model "
        "train_sampler lr_decay_steps plugins rated_dataset rated_dataset_target_dropout_percent config"}),
}
# fmt: on
