"""Error messages for invalid configs: one sentence per problem, with the field, the value found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

Tables = Mapping[str, Any]  # pydantic models by table name; a nested table has a dotted name, such as data.buckets

# Descriptions of the accepted values, for keys that accept more than one type.
KINDS = {
    "folders": 'a list of paths, each a string or { path = "...", repeats = 2 } or { path = "...", weight = 0.5 }',
    "micro_batch": 'a whole number, 0 for the whole batch, or "auto"',
    "lr": "a number above 0, or one per trained component: { unet = 1e-6, text_encoder = 3e-6 }",
    "until": 'a number of steps, or "2e", "64000 images", "12h"',
    "validate.every": 'a number of steps, or "1e", "30m"',
    "sample_every": 'a number of steps, 0 for never, or "1e", "30m"',
    "checkpoint_every": 'a number of steps, or "1e", "30m"',
    "keep_every": 'a number of steps, 0 for never, or "10e", "1000000 images"',
    "checkpoint_at": 'a list of steps or "1e", "5000 images"',
}
# Names in other trainers -> the name of the same setting here.
# fmt: off
FAMILIAR = {
    "learning_rate": "lr", "train_batch_size": "batch", "batch_size": "batch", "mixed_precision": "precision",
    "pretrained_model_name_or_path": "model.base", "base_model": "model.base", "vae_path": "model.vae",
    "max_train_steps": "until", "max_train_epochs": "until", "num_train_epochs": "until", "epochs": "until",
    "steps": "until", "gradient_accumulation_steps": "micro_batch", "gradient_checkpointing": "checkpointing",
    "optimizer_type": "optimizer", "lr_scheduler": "schedule", "lr_warmup_steps": "warmup", "warmup_steps": "warmup",
    "max_grad_norm": "grad_clip", "caption_dropout_rate": "caption_dropout", "output_dir": "run", "logging_dir": "run",
    "train_data_dir": "data.folders", "instance_data_dir": "data.folders", "folder": "folders", "images": "folders",
    "save_every_n_steps": "checkpoint_every", "checkpointing_steps": "checkpoint_every", "initial_d": "d0",
    "sample_every_n_steps": "sample_every", "sample_prompts": "sample.prompts", "cfg": "guidance",
    "guidance_scale": "guidance", "num_inference_steps": "steps", "scheduler": "sampler", "decay": "weight_decay",
    "enable_bucket": "data.buckets", "min_bucket_reso": "data.buckets.min", "max_bucket_reso": "data.buckets.max",
    "bucket_reso_steps": "data.buckets.step", "bucket_no_upscale": "data.buckets.no_upscale", "num_repeats": "repeats",
    "random_crop": "crop", "center_crop": "crop", "flip_aug": "flip", "random_flip": "flip", "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tags", "caption_tag_dropout_rate": "tag_dropout", "caption_separator": "tag_separator",
    "caption_column": "data.caption_key", "cache_latents": "cache.dir", "cache_text_encoder_outputs": "cache.hidden_states",
    "train_unet": "train", "train_text_encoder": "train", "vae_batch_size": "cache.batch", "log_every": "log.every",
    "lora": "model.lora", "network_dim": "model.lora.rank", "network_alpha": "model.lora.alpha", "lora_rank": "model.lora.rank",
    "lora_alpha": "model.lora.alpha", "target_modules": "model.lora.targets", "network_weights": "model.lora.file",
    "prediction": "model.prediction", "prediction_type": "model.prediction", "v_parameterization": "model.prediction",
    "zero_snr": "model.zero_snr", "zero_terminal_snr": "model.zero_snr", "rescale_betas_zero_snr": "model.zero_snr",
    "max_token_length": "model.chunks", "loss_type": "loss", "huber_c": "huber_delta", "min_snr": "weighting",
    "min_snr_gamma": "weighting_gamma", "snr_gamma": "weighting_gamma", "debiased_estimation_loss": "weighting",
    "p2_gamma": "weighting_gamma", "multires_noise_discount": "pyramid_noise", "ip_noise_gamma": "input_perturbation",
    "min_timestep": "timestep_range", "max_timestep": "timestep_range", "timestep_sampling": "timesteps",
    "logit_mean": "timestep_mean", "logit_std": "timestep_std", "masked_loss": "data.masks", "masked_training": "data.masks",
    "lr_scheduler_num_cycles": "restarts", "lr_scheduler_min_lr_ratio": "lr_floor", "min_lr": "lr_floor",
    "use_ema": "ema", "ema_decay": "ema", "ema_max_decay": "ema", "num_validation_images": "validate.held_out",
    "save_precision": "export.dtype", "save_model_as": "export.single_file", "metadata_title": "export.title",
    "metadata_author": "export.author", "metadata_license": "export.license",
    "validation_split": "validate.held_out", "validation_steps": "validate.every", "freeze": "train", "unfreeze": "train",
}
# fmt: on


def unknown_keys(raw: dict[str, Any], top: Collection[str], tables: Tables) -> list[str]:
    """Return a sentence for each key that is not in the schema. `top` holds the valid keys outside tables."""
    problems = []
    for key in raw:
        if key not in top:
            problems.append(f"{key}: unknown key{_did_you_mean(key, sorted(top), tables)}")
    for name, table in tables.items():
        entries: Any = raw
        for segment in name.split("."):
            entries = entries.get(segment, {}) if isinstance(entries, dict) else {}
        for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            place = f"stage.{i}" if name == "stage" else name
            for key in entry if isinstance(entry, dict) else []:
                if key not in table.model_fields:
                    problems.append(f"{place}.{key}: unknown key{_did_you_mean(key, sorted(table.model_fields), tables)}")
    return problems


def _did_you_mean(key: str, names: list[str], tables: Tables) -> str:
    full_names = {field: f"{table}.{field}" for table, cls in tables.items() for field in cls.model_fields}
    if key in FAMILIAR:
        target = FAMILIAR[key]
        return f"; use {target if target in names else full_names.get(target, target)}"
    close = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    if key in full_names:
        return f"; did you mean {full_names[key]}?"
    return f"; valid keys are {', '.join(names)}" if names else ""


def sentence(item: Any) -> str:
    """Turn a pydantic error into a sentence: the field, the value found and what to do."""
    place = ".".join(str(segment) for segment in item["loc"] if segment not in ("int", "str", "float"))
    value = item["input"]
    for i, segment in enumerate(item["loc"]):
        location = ".".join(map(str, item["loc"][: i + 1]))
        accepted = KINDS.get(location) or KINDS.get(str(segment))
        if accepted and item["type"] not in ("value_error", "missing"):
            return f"{location} is {value!r}; it must be {accepted}"

    if item["type"] == "missing":
        if len(item["loc"]) == 1:
            return f"[{place}] is missing; add the table"
        return f"{place} is missing; add it"
    if place == "stage" and isinstance(value, dict):
        return "stage is a table; write [[stage]] with two brackets"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])
        return f"{place}: {message}" if place else message

    expected = item["msg"].replace("Input should be ", "").replace("a valid ", "a ").replace("a integer", "a whole number")
    if item["type"] == "literal_error":
        return f"{place} is {value!r}; choose {expected}"
    if item["type"] in ("too_short", "too_long"):
        limit = item["ctx"].get("min_length", item["ctx"].get("max_length"))
        bound = "least" if item["type"] == "too_short" else "most"
        noun = "entry" if limit == 1 else "entries"
        return f"{place} is {value!r}; it must have at {bound} {limit} {noun}"
    if "instance of" in expected:
        expected = "a table"
    type_name = type(value).__name__
    shown = value if len(repr(value)) < 80 else type_name
    type_note = f" (a{'n' if type_name[0] in 'aeiou' else ''} {type_name})" if item["type"].endswith("_type") else ""
    return f"{place} is {shown!r}{type_note}; it must be {expected[0].lower()}{expected[1:]}"
