"""Write models for other tools, as a diffusers folder with the classic names or as one file in the original layout.

Tensors are streamed block by block, so memory use does not depend on the model's size. A single file appears only when all of
it is written and flushed. Read next: `original_names.py` for the names, `fold_vae.py` for the folding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastsd.errors import UserError
from fastsd.model.formats import fold_vae as folding
from fastsd.model.formats.model_source import PICKLED, ModelSource
from fastsd.model.formats.original_names import PREFIX, original_names
from fastsd.model.formats.single_file_layout import CONFIGS, V_PREDICTION, ZERO_SNR
from fastsd.model.latent_space import LatentSpace
from fastsd.model.model import usable_scheduler
from fastsd.storage import Stored, Tensors, new_file, write_bytes, write_safetensors, write_text
from fastsd.terminal.texts import WARNING

DTYPE = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "feature_extractor": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
TOKENIZER_FILES = (  # those to copy, because the folder may hold other files of a whole CLIP
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
)  # fmt: skip
_FILE_ENDINGS = (".safetensors", ".safetensor", ".sft", ".gguf", ".onnx", ".zip", *PICKLED)
Config = Mapping[str, Any]
_STEM = {"unet": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}


def check_folder_name(out: Path, advice: str = "") -> None:
    """Raise UserError if a new folder for a model has the ending of a model file. Other dots ("sd1.5") are accepted.

    Args:
        advice: text after "choose a folder".
    """
    if out.suffix.lower() in _FILE_ENDINGS:
        raise UserError("folder-like-file", f"OUT is {str(out)!r}, but this command writes a folder; choose a folder{advice}")


def write_folder(source: ModelSource, folder: Path, *, dtype: str = "", variant: str = "", shard: int = 0) -> dict[str, str]:
    """Write a whole model into an existing folder, in diffusers' format. Return each file's sha256 by its relative name.

    Args:
        dtype: fp32, fp16 or bf16; "" = unchanged.
        variant: a word in the names of weights files, for `from_pretrained(variant=...)`.
        shard: the size in bytes at which weights continue in another file; 0 = one file per component.

    Raises:
        UserError: a component or the tokenizer is missing, or a number is not finite.
    """
    missing = [component for component in _STEM if component not in source.components]
    if missing:
        advice = {"vae": "give one with --vae", "text_encoder": "give a model that has one with --tokenizer"}
        raise UserError(
            "write-component-missing", f"{source.place}: has no {missing[0].replace('_', ' ')}; {advice[missing[0]]}"
        )
    if source.tokenizer is None:
        raise UserError(
            "write-no-tokenizer", f"{source.place}: has no tokenizer; use for example --tokenizer openai/clip-vit-large-patch14"
        )
    hashes = write_pipeline(folder, source.scheduler, source.tokenizer, source.pipeline)
    for name, component in source.components.items():
        hashes |= write_component(folder, name, component.config, component.tensors, dtype, variant, shard, str(source.place))
    return hashes


def write_component(
    folder: Path,
    name: str,
    config: Config,
    tensors: Tensors,
    dtype: str = "",
    variant: str = "",
    shard: int = 0,
    finite: str = "",
) -> dict[str, str]:
    """Write one component into a model's folder, as `write_folder` does. `finite` is passed on to `write_safetensors`.

    diffusers' StableDiffusionPipeline reads only `scaling_factor`, so a shift or statistics of a VAE are folded into it.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    config = _portable(config)
    metadata: dict[str, str] = {}
    if name == "vae" and not LatentSpace.of(config, str(folder)).is_scaled_only:
        metadata, config, tensors = _folded(config, tensors, str(folder))
    if dtype and name == "text_encoder":
        dtype_name = str(DTYPE[dtype]).removeprefix("torch.")
        config |= {"dtype": dtype_name, "torch_dtype": dtype_name}
    hashes = {f"{name}/config.json": _write_json(folder / name / "config.json", config)}

    suffix = variant and f".{variant}"
    target_dtype = DTYPE.get(dtype)
    shards = _shards(tensors, shard, target_dtype)
    files = [f"{_STEM[name]}{suffix}.safetensors"]
    if len(shards) > 1:
        files = [f"{_STEM[name]}{suffix}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {tensor: file for file, group in zip(files, shards, strict=True) for tensor in group}
        size = sum(_size(tensor, target_dtype) for tensor in tensors.values())
        index = f"{name}/{_STEM[name]}.safetensors.index{suffix}.json"
        hashes[index] = _write_json(folder / index, {"metadata": {"total_size": size}, "weight_map": weight_map})
    for file, group in zip(files, shards, strict=True):
        hashes[f"{name}/{file}"] = write_safetensors(folder / name / file, group, metadata, target_dtype, finite)
    return hashes


def _folded(config: Config, tensors: Tensors, place: str) -> tuple[dict[str, str], dict[str, Any], Tensors]:
    """Return a VAE with factor 0.18215, no shift and no statistics, preceded by the header entry that restores the VAE."""
    return {folding.UNFOLDED: folding.unfold_record(dict(config), tensors)}, *folding.fold(dict(config), tensors, place)


def _shards(tensors: Tensors, limit: int, dtype: torch.dtype | None) -> list[Tensors]:
    """Divide tensors into shards of at most `limit` bytes (0 = no limit). A larger tensor gets a shard of its own."""
    shards, filled = [dict[str, torch.Tensor | Stored]()], 0
    for name, tensor in tensors.items():
        if limit and filled and filled + _size(tensor, dtype) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _size(tensor, dtype)
    return list(shards)


def _size(tensor: torch.Tensor | Stored, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype if dtype and tensor.dtype.is_floating_point else tensor.dtype).itemsize


def write_pipeline(
    folder: Path, scheduler: Config, tokenizer: Path, pipeline: str = "StableDiffusionPipeline"
) -> dict[str, str]:
    """Write the files of a model that are not components: index, scheduler, tokenizer. Return each file's sha256 by name.

    Args:
        pipeline: the class that diffusers loads the model with.
    """
    for name in ("scheduler", "tokenizer"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    scheduler = usable_scheduler(scheduler)
    index = {"_class_name": pipeline, "scheduler": ["diffusers", scheduler.get("_class_name", "PNDMScheduler")]}
    hashes = {
        "model_index.json": _write_json(folder / "model_index.json", {**MODEL_INDEX, **index}),
        "scheduler/scheduler_config.json": _write_json(folder / "scheduler" / "scheduler_config.json", scheduler),
    }
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            hashes[f"tokenizer/{name}"] = write_bytes(folder / "tokenizer" / name, (tokenizer / name).read_bytes())
    return hashes


def _write_json(path: Path, settings: Config) -> str:
    return write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_single_file(
    source: ModelSource, path: Path, *, dtype: str = "", fold: bool = True, metadata: Mapping[str, str] | None = None
) -> list[str]:
    """Write all components into one file in the original layout, in place of an older file. Return notes for the user.

    Args:
        dtype: fp32, fp16 or bf16; "" = unchanged.
        fold: convert a VAE with another scaling factor to 0.18215, which loaders assume.
        metadata: header entries, in addition to those that fastsd needs to read the file.

    Raises:
        UserError: a number or the VAE's factor is not finite, or the factor is 0.
        OSError: the disk is full, or the folder cannot be written.
    """
    components = dict(source.components)
    notes: list[str] = []
    header = dict(metadata or {})
    vae = components.get("vae")
    space = LatentSpace.of(vae.config, vae.config_file) if vae else LatentSpace()
    if vae and space != LatentSpace():
        label = f"VAE: {space}"
        if fold:
            record, config, folded = _folded(vae.config, vae.tensors, vae.place)
            header |= record
            components["vae"] = replace(vae, config=config, tensors=folded)
            notes.append(f"{label} folded into its 1x1 convolutions, because single-file loaders assume 0.18215")
        elif not space.is_scaled_only:
            raise UserError(
                "single-file-shift",
                f"{vae.config_file}: has {space}, which no loader of single files reads; omit --no-fold to fold it "
                "into the VAE's weights",
            )
        else:
            notes.append(f"{WARNING}{label} not folded; tools that assume 0.18215 will show wrong colours")

    if vae and (channels := vae.config.get("latent_channels", 4)) != 4:
        notes.append(f"{WARNING}{channels} latent channels: ComfyUI and A1111 build SD1.5 with 4, and cannot load this file")
    tensors: dict[str, torch.Tensor | Stored] = {}
    for name in ("unet", "vae", "text_encoder"):
        if name in components:
            component = components[name]
            for current_name, original_name in original_names(name, component.config, component.tensors).items():
                tensor = component.tensors[current_name]
                if name == "vae" and ".attentions." in current_name and len(tensor.shape) == 2:
                    tensor = tensor.view(torch.Size([*tensor.shape, 1, 1]))
                tensors[PREFIX[name] + original_name] = tensor
    scheduler = usable_scheduler(source.scheduler)
    if scheduler.get("prediction_type") == "v_prediction":
        tensors[V_PREDICTION] = torch.empty(0)
    if scheduler.get("rescale_betas_zero_snr"):
        tensors[ZERO_SNR] = torch.empty(0)

    configs = {name: _portable(component.config) for name, component in components.items()} | {"scheduler": scheduler}
    header[CONFIGS] = json.dumps(configs, sort_keys=True)
    with new_file(path) as temporary:
        write_safetensors(temporary, tensors, header, DTYPE.get(dtype), str(source.place))
    return notes


def _portable(config: Config) -> dict[str, Any]:
    """Return a config without the path that it was loaded from, which is useless on another machine."""
    return {key: value for key, value in config.items() if key != "_name_or_path"}
