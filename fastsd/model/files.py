"""Floor 1: where models come from and how they are written.

In: a diffusers folder, a hub id, or one `.safetensors` file in the original SD layout; a VAE from a folder, a hub id or a
file.  Out: a diffusers folder with the classic names, which every version and tool reads.
Nothing here unpickles: a model that has only `.bin` or `.ckpt` weights is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.config import LoraTable, ModelTable
from fastsd.errors import UserError
from fastsd.model import original
from fastsd.model.text import TextEncoder
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.vae import SD15_SCALING_FACTOR, Vae
from fastsd.model.weights import ADAPTER, check_names, diffusers_state_dict, load_diffusers_unet, plain_name
from fastsd.storage import read_safetensors, write_safetensors, write_text
from fastsd_kernels import REFERENCE, Ops

SD15_SCHEDULER = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False, "prediction_type": "epsilon",
}  # fmt: skip
PART_FILES = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}


@dataclass
class Model:
    """Everything that makes an image: the parts, and the settings of the noise schedule, as diffusers has them.

    Attributes:
        notes: what a user should know of it, a sentence each.
        lora: the adapters that it has (`fastsd/model/lora.py`).
    """

    name: str
    unet: UNet
    text: TextEncoder
    vae: Vae
    scheduler: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    lora: LoraTable | None = None

    @property
    def prediction(self) -> str:
        """What the UNet tells of x_t: "epsilon" or "v_prediction"."""
        return self.scheduler.get("prediction_type", "epsilon")

    def part(self, name: str) -> torch.nn.Module:
        """The trainable module called "unet" or "text_encoder"."""
        return self.unet if name == "unet" else self.text.module

    def trainable(self, name: str) -> set[str]:
        """Names of a part's parameters that the prediction depends on: clip_skip leaves out the last layers."""
        return {name for name, _ in self.unet.named_parameters()} if name == "unet" else self.text.used_parameters()


def load_model(table: ModelTable, ops: Ops = REFERENCE) -> Model:
    """Load a base model in fp32 on the CPU, with the VAE the config names in place of its own.

    Raises:
        UserError: it cannot be found or reached, is of another kind, or its VAE and UNet do not fit.
    """
    base = locate(table.base, "model.base", table.revision)
    unet = _load_unet(base, ops)
    text = load_text(table, base)
    vae = load_vae(table, base)
    if vae.channels != unet.cfg.in_channels:
        raise UserError(
            f"model.vae: {vae.name} has {vae.channels} latent channels and the UNet of {table.base} takes "
            f"{unet.cfg.in_channels}; choose a VAE with {unet.cfg.in_channels}"
        )
    if text.width != unet.cfg.cross_attention_dim:
        raise UserError(
            f"model.base: the text encoder of {table.base} is {text.width} wide and its UNet reads "
            f"{unet.cfg.cross_attention_dim}; give a base whose parts belong together"
        )
    return Model(table.base, unet, text, vae, *_load_scheduler(base, table))


def locate(name: str, field: str, revision: str = "") -> Path:
    """The local folder or file of a model: a path, or a hub id that is cached or can be fetched.

    Raises:
        UserError: neither there nor reachable.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{field} is {name!r}, not a .safetensors file; convert it first, pickled weights are not read")
        return path
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{field} is {name!r}: no such folder or file, and not a hub id (owner/name); check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, etag_timeout=10))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"{field} is {name!r}: no such folder here, and the hub did not give it ({type(error).__name__}: {why}); "
            "check the name, or download it and give its folder"
        ) from None


def _load_unet(base: Path, ops: Ops) -> UNet:
    if base.is_file():
        config, state = original.unet(base)
        place = str(base)
    else:
        folder = _subfolder(base, "unet")
        config, state = _read_json(folder / "config.json"), read_safetensors(_weights(folder))
        place = str(folder)
    cfg = UNetConfig.from_diffusers(config, f"{place}: config" if base.is_file() else f"{place}/config.json")
    with torch.device("meta"):
        unet = UNet(cfg, ops)
    unet.to_empty(device="cpu")
    load_diffusers_unet(unet, state, place)
    return unet


def load_text(table: ModelTable, base: Path) -> TextEncoder:
    """The text encoder and tokenizer of a located base model."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer, where = load_tokenizer(table, base)
    if base.is_file():
        settings, state = original.text_encoder(base)
        place = str(base)
    else:
        folder = _subfolder(base, "text_encoder")
        settings, state = _read_json(folder / "config.json"), read_safetensors(_weights(folder))
        place = str(folder)
    with torch.device("meta"):
        module = CLIPTextModel(CLIPTextConfig.from_dict(settings))
    module.to_empty(device="cpu")
    _fill_position_ids(module)
    targets = {classic_text_name(name): tensor for name, tensor in module.state_dict().items()}
    found = {classic_text_name(n): t for n, t in state.items() if not n.endswith("position_ids")}
    check_names(targets, found, place)
    with torch.no_grad():
        for name, tensor in targets.items():
            tensor.copy_(found[name])
    return TextEncoder(module, tokenizer, table.clip_skip, where, table.chunks)


def load_tokenizer(table: ModelTable, base: Path | None = None) -> tuple[Any, Path]:
    """The tokenizer a config means, without the text encoder: transformers' CLIPTokenizer, and the folder of its files.

    Raises:
        UserError: there is none, or it does not load.
    """
    from transformers import CLIPTokenizer

    base = base or locate(table.base, "model.base", table.revision)
    if base.is_file() and not table.tokenizer:
        raise UserError(
            f"model.base is the single file {base}, which has no tokenizer; "
            'set model.tokenizer to a folder or hub id that has one, for example "openai/clip-vit-large-patch14"'
        )
    source = locate(table.tokenizer, "model.tokenizer") if table.tokenizer else base
    where = source / "tokenizer" if (source / "tokenizer").is_dir() else source
    if not ((where / "vocab.json").is_file() and (where / "merges.txt").is_file()):
        raise UserError(f"{where}: no CLIP tokenizer there (vocab.json, merges.txt); set model.tokenizer to a folder with one")
    try:
        return CLIPTokenizer.from_pretrained(where, local_files_only=True), where
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: its tokenizer does not load ({str(error).splitlines()[0]}); fetch it again") from None


def _fill_position_ids(module: torch.nn.Module) -> None:
    # A buffer outside the state dict, so `to_empty` leaves it undefined.
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids"), name
        buffer.copy_(torch.arange(buffer.shape[-1]))


def load_vae(table: ModelTable, base: Path | None = None, ops: Ops = REFERENCE) -> Vae:
    """The VAE a config means: `model.vae`, or the base's own. fp32, on the CPU."""
    from diffusers import AutoencoderKL

    if not table.vae:
        base = base or locate(table.base, "model.base", table.revision)
        source, name = (base, table.base) if base.is_file() else (_subfolder(base, "vae"), table.base)
    else:
        source, name = locate(table.vae, "model.vae"), table.vae
        if (source / "vae").is_dir():  # a whole model named as VAE: take the VAE in it
            source = source / "vae"
    if source.is_file():
        config, state = original.vae(source)
        if table.vae and table.vae_scaling_factor is None:
            raise UserError(
                f"model.vae is the single file {source}, which does not say its scaling factor; add "
                "model.vae_scaling_factor (0.13025 for SDXL's VAE, 0.18215 for SD1.5's)"
            )
        config["scaling_factor"] = table.vae_scaling_factor or SD15_SCALING_FACTOR
        module = AutoencoderKL.from_config(config)
        check_names(module.state_dict(), state, str(source))
        module.load_state_dict(state)
    else:
        config = _read_json(source / "config.json")
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise UserError(f"{source}/config.json: the class is {config['_class_name']}; give an AutoencoderKL")
        variant = "fp16" if ".fp16." in _weights(source).name else None
        try:
            module = AutoencoderKL.from_pretrained(
                source, torch_dtype=torch.float32, variant=variant, use_safetensors=True, low_cpu_mem_usage=False,
                local_files_only=True,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{source}: not a VAE that loads ({str(error).splitlines()[0]}); fetch it again") from None
        if table.vae_scaling_factor is not None:
            module.register_to_config(scaling_factor=table.vae_scaling_factor)
    return Vae(module, name, ops)


def _load_scheduler(base: Path, table: ModelTable) -> tuple[dict[str, Any], list[str]]:
    """(The base's scheduler config with what the table says instead, notes)."""
    path, notes = base / "scheduler" / "scheduler_config.json", []
    config = dict(SD15_SCHEDULER) if base.is_file() or not path.exists() else _read_json(path)
    own = config.get("prediction_type", "epsilon")
    if own not in ("epsilon", "v_prediction"):
        raise UserError(f"{path}: prediction_type is {own!r}; give a base with epsilon or v_prediction")
    if table.prediction and table.prediction != own:
        config["prediction_type"] = table.prediction
        notes.append(
            f'the base predicts {own} and model.prediction is "{table.prediction}": the UNet has to learn it anew, '
            "so the loss starts high"
        )
    if table.zero_snr is not None:
        config["rescale_betas_zero_snr"] = table.zero_snr
    if config.get("rescale_betas_zero_snr"):
        if (table.prediction or own) == "epsilon":
            raise UserError(
                f"model: the noise schedule of {table.base} is to end in pure noise, of which epsilon tells nothing; set "
                'model.prediction = "v_prediction", or model.zero_snr = false'
            )
        # Samples must start at the last timestep (Lin et al. 2024, section 3.3). SD1.5's PNDM cannot be told the schedule.
        config |= {"timestep_spacing": "trailing", "_class_name": "DDIMScheduler", "clip_sample": False}
    return config, notes


def _subfolder(base: Path, part: str) -> Path:
    if not (base / part / "config.json").is_file():
        raise UserError(f"{base}: there is no {part}/config.json in it; give a diffusers folder with all its parts")
    return base / part


def _weights(folder: Path) -> Path:
    stems = ("diffusion_pytorch_model", "model")
    for name in [f"{stem}{variant}.safetensors" for variant in ("", ".fp16") for stem in stems]:
        if (folder / name).is_file():
            return folder / name
    pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt")]
    if pickled:
        raise UserError(f"{folder}: only pickled weights ({pickled[0]}); convert them to .safetensors first")
    raise UserError(f"{folder}: no weights; expected one of {stems[0]}.safetensors, {stems[1]}.safetensors")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch or copy the file again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, expected a table of settings; fetch the file again")
    return data


def classic_text_name(name: str) -> str:
    """A CLIP text weight's name with the `text_model.` that transformers 5 leaves out and older loaders need."""
    return name if name.startswith("text_model.") else f"text_model.{name}"


def part_state_dict(model: Model, part: str, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A trainable part without adapters, as its file names it. `tensors` replaces parameters (masters in another precision)."""
    if part == "unet":
        return diffusers_state_dict(model.unet, tensors=tensors)
    state = {**model.text.module.state_dict(), **(tensors or {})}
    return {classic_text_name(plain_name(name)): t.detach() for name, t in state.items() if ADAPTER not in name}


def write_part(folder: Path, model: Model, part: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Write one trainable part into a diffusers folder: {relative file name: sha256}."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    if part == "unet":
        config = model.unet.cfg.to_diffusers()
    else:
        settings = model.text.module.config.to_dict()
        settings.pop("_name_or_path", None)
        config = {**settings, "architectures": ["CLIPTextModel"], "dtype": "float32", "torch_dtype": "float32"}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {
        f"{part}/config.json": write_text(folder / part / "config.json", text),
        PART_FILES[part]: write_safetensors(folder / PART_FILES[part], state),
    }


def write_rest(folder: Path, model: Model) -> dict[str, str]:
    """Write what training never changes - VAE, tokenizer, scheduler, model_index.json: {relative file name: sha256}."""
    hashes: dict[str, str] = {}

    def put(name: str, settings: Mapping[str, Any]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in settings.items() if key != "_name_or_path"}  # a path of this machine
        hashes[name] = write_text(folder / name, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    sampler = ["diffusers", model.scheduler.get("_class_name", "PNDMScheduler")]
    put("model_index.json", {**MODEL_INDEX, "scheduler": sampler})
    put("scheduler/scheduler_config.json", model.scheduler)
    put("vae/config.json", json.loads(model.vae.module.to_json_string()))
    weights = "vae/diffusion_pytorch_model.safetensors"
    hashes[weights] = write_safetensors(folder / weights, model.vae.module.state_dict())
    (folder / "tokenizer").mkdir(exist_ok=True)
    for source in sorted(model.text.tokenizer_folder.iterdir()):
        if source.suffix in (".json", ".txt") and source.is_file():
            hashes[f"tokenizer/{source.name}"] = write_text(
                folder / "tokenizer" / source.name, source.read_text(encoding="utf-8")
            )
    return hashes


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", "feature_extractor": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None], "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
