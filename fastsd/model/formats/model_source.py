"""Find models on the disk and describe them before any tensor is read.

A model can be a diffusers folder of any version, with or without shards and variants; a hub id; or one file in the original
Stable Diffusion layout (`single_file_layout.py`). A `ModelSource` describes it, under diffusers' current names. Nothing is
unpickled unless the caller asks for it. In that case torch's loader for weights is used, which runs no code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from fastsd.errors import UserError
from fastsd.model import model
from fastsd.model.formats import flux2_vae, fold_vae, single_file_layout
from fastsd.model.formats.original_names import PREFIX, current_vae_name, usual_name
from fastsd.model.formats.pickles import unpickle
from fastsd.model.formats.quantized import dequantize
from fastsd.model.latent_space import LatentSpace
from fastsd.model.weights import check_names, classic_text_name, expected_tensors
from fastsd.storage import TensorFile, Tensors, read_json

# Hub ids with CLIP's tokenizer, which the whole SD1.5 family uses. Single files come without a tokenizer.
CLIP_TOKENIZERS = (
    "openai/clip-vit-large-patch14", "stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4",
)  # fmt: skip
# diffusers' classes with the components of a text-to-image model, which a converted folder keeps.
_PIPELINES = (
    "StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInstructPix2PixPipeline", "StableDiffusionInpaintPipelineLegacy",
)  # fmt: skip
PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_VARIANTS = ("", ".fp16", ".bf16", ".fp32")
_STEMS = {".safetensors": ("diffusion_pytorch_model", "model"), ".bin": ("diffusion_pytorch_model", "pytorch_model")}


@dataclass(frozen=True)
class ComponentFiles:
    """A component of a model on the disk: its config.json, and its tensors by the names of diffusers or transformers.

    Attributes:
        place: the component's folder, or the single file that contains it.
        file: the name of the weights file.
    """

    config: dict[str, Any]
    tensors: Tensors
    place: str
    file: str

    @property
    def config_file(self) -> str:
        """The file that describes the component, for error messages."""
        return self.place if self.place.endswith(self.file) else f"{self.place}/config.json"


@dataclass
class ModelSource:
    """A model on the disk.

    Attributes:
        components: those of "unet", "text_encoder" and "vae" that exist.
        scheduler: the contents of scheduler_config.json.
        tokenizer: the folder of the tokenizer's files, or None.
        metadata: the header entries of a single file.
        notes: lines that report the files that were read and those that were ignored.
    """

    place: Path
    components: dict[str, ComponentFiles]
    scheduler: dict[str, Any]
    tokenizer: Path | None
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def pipeline(self) -> str:
        """The class of diffusers that loads the model: the folder's, or that of a UNet with so many channels."""
        index = self.place / "model_index.json"
        name = read_json(index).get("_class_name") if index.is_file() else None
        unet = self.components["unet"].config
        inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
        by_channels = {2 * outputs + 1: _PIPELINES[1], 2 * outputs: _PIPELINES[3]}.get(inputs, _PIPELINES[0])
        return name if name in _PIPELINES else by_channels


def open_source(
    name: str,
    revision: str = "",
    *,
    pickled: bool = False,
    ema: bool = False,
    tokenizer: str = "",
    omitted: Sequence[str] = (),
) -> ModelSource:
    """Find a model and check that its tensors match its configs. Their values are not read.

    Args:
        name: a folder, a file or a hub id. Error messages call it IN. `revision` belongs to the hub id.
        pickled: also read `.ckpt` and `.bin` files.
        ema: use the EMA weights of the UNet in a single file that has both.
        tokenizer: a folder or hub id that has one; "" = the model's own, or CLIP's from the hub's cache.
        omitted: components that are not read, because others replace them.

    Raises:
        UserError: the model does not exist, or it is not a complete model of the SD1.5 family.
    """
    notes: list[str] = []
    base = locate(name, "IN", revision, pickled=pickled)
    file = open_file(base, notes) if base.is_file() else None
    if ema and file is None:
        raise UserError("source-no-ema", f"IN is {name!r}, a folder without EMA weights; omit --ema")

    components = {}
    for component in (name for name in ("unet", "text_encoder", "vae") if name not in omitted):
        opened = file.read(component, notes, ema=ema) if file else read_component(base, component, notes, pickled=pickled)
        if opened is not None:
            components[component] = check_component(component, opened, notes)

    folder = find_tokenizer(base, tokenizer, notes=notes)
    if tokenizer and folder is None:
        raise UserError(
            "tokenizer-folder", f"--tokenizer is {tokenizer!r}, which has no vocab.json and merges.txt; give a folder with both"
        )
    if "text_encoder" not in components and folder is not None and (folder.parent / "text_encoder" / "config.json").is_file():
        notes.append(f"text_encoder: from {folder.parent}, because {base.name} has none")
        text_encoder = read_component(folder.parent, "text_encoder", notes)
        components["text_encoder"] = check_component("text_encoder", text_encoder, notes)

    if file and (ignored := single_file_layout.ignored(file.tensors)):
        others = f" and {len(ignored) - 30} others" if len(ignored) > 30 else ""
        notes.append(f"{base.name}: ignored {', '.join(ignored[:30])}{others}")
    scheduler = file.scheduler() if file else read_scheduler(base)
    return ModelSource(base, components, scheduler, folder, file.metadata if file else {}, notes)


def check_component(name: str, component: ComponentFiles, notes: list[str]) -> ComponentFiles:
    """Return the component and add a note on it. Raise UserError unless it has the tensors that its config requires."""
    check_names(expected_tensors(name, component.config, component.config_file), component.tensors, component.place)
    if name == "vae":
        LatentSpace.of(component.config, component.config_file)
    notes.append(f"{name}: {component.file}, {len(component.tensors)} tensors in {_dtypes(component.tensors)}")
    return component


@dataclass(frozen=True)
class File:
    """One file with the tensors of a whole model, or of a VAE."""

    path: Path
    tensors: Tensors
    metadata: Mapping[str, str]

    def read(self, name: str, notes: list[str], *, ema: bool = False) -> ComponentFiles | None:
        """Return a component of the file, or None if the file lacks it. A UNet is required."""
        contents = single_file_layout.read_component(self.path, self.tensors, self.metadata, name, notes, ema=ema)
        if contents is None:
            if name == "unet":
                raise UserError(
                    "single-file-no-unet",
                    f"{self.path}: no UNet in the original SD layout ({PREFIX[name]}...); give a complete SD1.5 model",
                )
            return None
        if name == "vae":
            contents = _unfolded(*contents, self.metadata, notes)
        return ComponentFiles(*contents, str(self.path), self.path.name)

    def scheduler(self) -> dict[str, Any]:
        """Return the scheduler_config.json that the file defines, with SD1.5's values for the settings it does not have."""
        return single_file_layout.scheduler(self.path, self.tensors, self.metadata)

    @property
    def states_prediction(self) -> bool:
        """True if the file says what its UNet predicts."""
        return single_file_layout.states_prediction(self.path, self.tensors, self.metadata)


def open_file(path: Path, notes: list[str] | None = None) -> File:
    """Open a file in the original layout, `.safetensors` or pickled."""
    tensors: Tensors
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        tensor_file = TensorFile(path)
        tensors, metadata = tensor_file.stored(), tensor_file.metadata
    else:
        tensors = unpickle(path, [] if notes is None else notes)
    # A tensor under its usual name takes precedence. Another one of that name then keeps its own, and is ignored and named.
    usual_names = {name: usual for name in tensors if (usual := usual_name(name)) not in tensors}
    tensors = {usual_names.get(name, name): tensor for name, tensor in tensors.items()}
    return File(path, dequantize(path, tensors, [] if notes is None else notes), metadata)


def locate(name: str, field: str, revision: str = "", *, pickled: bool = False) -> Path:
    """Return the local folder or file of a model: a path, or a hub id that is cached or can be fetched.

    Raises:
        UserError: the model is neither local nor reachable, or its file type is not accepted.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix == ".safetensors" or (pickled and path.suffix in PICKLED):
            return path
        if path.suffix in PICKLED:
            safe = path.with_suffix(".safetensors")
            advice = f"run `fastsd convert {quote(str(path))} {quote(str(safe))}` and give {safe}"
            raise UserError("source-pickled", f"{field} is {name!r}, which is pickled; {advice}")
        raise UserError(
            "source-ending", f"{field} is {name!r}, which is not a .safetensors file; give one, a diffusers folder or a hub id"
        )
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(
            "source-missing", f"{field} is {name!r}, which is neither an existing path nor a hub id (owner/name); check it"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Skip the single files in the top folder, which have gigabytes each, and components that fastsd never reads.
    allowed = ["*.json", "*.txt", "*diffusion_pytorch_model*.safetensors", "text_encoder/*.safetensors"]
    ignored = ["*non_ema*", "safety_checker/*", "feature_extractor/*"]
    try:
        fetch = partial(snapshot_download, name, revision=revision or None, ignore_patterns=ignored, etag_timeout=10)
        folder = Path(fetch(allow_patterns=allowed))
        if pickled and not any(folder.rglob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[pattern.replace(".safetensors", ".bin") for pattern in allowed]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(
            "hub-failed",
            f"{field} is {name!r}, which is not a local path and cannot be downloaded ({type(error).__name__}: {reason}); "
            "check the name, or give a local folder",
        ) from None


def read_component(folder: Path, component: str, notes: list[str] | None = None, *, pickled: bool = False) -> ComponentFiles:
    """Read a component of a diffusers folder. Lines on the files that were read or ignored are added to `notes`.

    Args:
        folder: the folder of the model, or of the component itself.
        component: "unet", "text_encoder" or "vae".

    Raises:
        UserError: the component is missing or cannot be read.
    """
    notes = [] if notes is None else notes
    base = folder
    if (base / component).is_dir() or (base / "model_index.json").exists():
        folder = base / component
    if not (folder / "config.json").is_file():
        raise UserError("component-missing", f"{base}: {component}/config.json not found; give a complete diffusers folder")
    config = read_json(folder / "config.json")
    if component == "text_encoder" and isinstance(config.get("text_config"), dict):  # the config of a whole CLIP
        config = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **config["text_config"]}
    files = _weight_files(folder, base, pickled=pickled)
    ignored = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", *PICKLED) and path not in files)
    weights = files[0]
    tensors = _open_shards(weights, notes) if weights.suffix == ".json" else _open_tensors(weights, notes)
    if component == "vae" and config.get("_class_name") == flux2_vae.CLASS:
        config, tensors = flux2_vae.as_autoencoder_kl(config, tensors, f"{folder}/config.json")
    unused = [name for name in tensors if single_file_layout.is_unused(component, name)]
    ignored += dict.fromkeys(name.split(".")[0] for name in unused if not name.endswith("position_ids"))
    if ignored:
        notes.append(f"{component}: ignored {', '.join(ignored)}")
    rename = {"text_encoder": classic_text_name, "vae": current_vae_name}.get(component, str)
    renamed: Tensors = {rename(name): tensor for name, tensor in tensors.items() if name not in unused}
    if component == "vae" and files[-1].suffix == ".safetensors":
        config, renamed = _unfolded(config, renamed, TensorFile(files[-1]).metadata, notes)
    return ComponentFiles(config, renamed, str(folder), weights.name)


def _unfolded(
    config: dict[str, Any], tensors: Tensors, metadata: Mapping[str, str], notes: list[str]
) -> tuple[dict[str, Any], Tensors]:
    """Return a VAE as it was before its latent space was folded into its weights, if a file's header says so."""
    if fold_vae.UNFOLDED not in metadata:
        return config, tensors
    unfolded = fold_vae.unfold(config, tensors, metadata[fold_vae.UNFOLDED])
    notes.append("vae: scaling factor " + ("unfolded" if unfolded else "not unfolded, because the VAE has changed"))
    return unfolded or (config, tensors)


def read_scheduler(base: Path) -> dict[str, Any]:
    """Return the scheduler_config.json of a diffusers folder, or SD1.5's if it has none."""
    path = base / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.exists() else dict(model.SD15_SCHEDULER)


def find_tokenizer(base: Path, name: str = "", field: str = "--tokenizer", notes: list[str] | None = None) -> Path | None:
    """Return the folder of a tokenizer's files, or None: that of `name`, the model's, or CLIP's in the hub cache for a file.

    Args:
        field: the argument that `name` comes from, for error messages.
    """
    if not name and base.is_file():
        from huggingface_hub import try_to_load_from_cache

        for hub_id in CLIP_TOKENIZERS:
            for vocabulary in ("vocab.json", "tokenizer/vocab.json"):
                cached = try_to_load_from_cache(hub_id, vocabulary)
                if isinstance(cached, str) and Path(cached).with_name("merges.txt").is_file():
                    if notes is not None:
                        notes.append(f"tokenizer: {hub_id}, from the hub cache")
                    return Path(cached).parent
        return None
    source = locate(name, field) if name else base
    folder = source / "tokenizer" if (source / "tokenizer").is_dir() else source
    return folder if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() else None


def _open_tensors(path: Path, notes: list[str]) -> Tensors:
    tensors = TensorFile(path).stored() if path.suffix == ".safetensors" else unpickle(path, notes)
    return dequantize(path, tensors, notes)


def _weight_files(folder: Path, base: Path, *, pickled: bool) -> list[Path]:
    """Return the file of the weights of a component of `base`, or the index of its shards followed by the shards."""
    for ending in (".safetensors", ".bin") if pickled else (".safetensors",):
        for variant in _VARIANTS:
            for stem in _STEMS[ending]:
                index = folder / f"{stem}{ending}.index{variant}.json"
                if (folder / f"{stem}{variant}{ending}").is_file():
                    return [folder / f"{stem}{variant}{ending}"]
                if index.is_file():
                    return [index, *_shards(index)]
    names = [path.name for path in folder.iterdir() if path.suffix in PICKLED]
    if names:
        safe = f"{base.name}-safetensors"
        advice = f"run `fastsd convert {quote(str(base))} {quote(safe)}` and give {safe}"
        raise UserError("only-pickled-weights", f"{folder}: has only pickled weights ({names[0]}); {advice}")
    expected = ", ".join(f"{stem}.safetensors" for stem in _STEMS[".safetensors"])
    raise UserError("no-weights", f"{folder}: no weights found; expected one of {expected}")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names. Raise UserError if one of them is not in the same folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            "index-no-map",
            f"{index}: weight_map is a {type(weight_map).__name__}, expected file names by tensor; download it again",
        )
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or name != Path(name).name or "\\" in name or name in ("", ".", ".."):
            raise UserError(
                "index-outside", f"{index}: weight_map names {name!r}, which is not in the same folder; do not trust this model"
            )
        if not (index.parent / name).is_file():
            raise UserError("index-file-missing", f"{index}: weight_map names {name}, which is missing; download that file")
    return [index.parent / name for name in dict.fromkeys(weight_map.values())]


def _open_shards(index: Path, notes: list[str]) -> Tensors:
    shards = {path.name: _open_tensors(path, notes) for path in _shards(index)}
    tensors = {}
    for name, file in read_json(index)["weight_map"].items():
        if name not in shards[file]:
            raise UserError(
                "index-tensor-missing", f"{index}: weight_map places {name} in {file}, which lacks it; download both again"
            )
        tensors[name] = shards[file][name]
    return tensors


def _dtypes(tensors: Tensors) -> str:
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    short_names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    return " and ".join(sorted(short_names.get(name, name) for name in names))
