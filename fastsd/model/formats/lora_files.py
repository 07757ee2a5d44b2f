"""Read LoRA files with the names of any tool, and write them with kohya's or diffusers' (PEFT) names.

An adapter consists of `down`, shape (R, F_in), or (R, C, k, k) for a convolution; `up`, shape (F, R), or (F, R, 1, 1) for a
convolution; and the number `alpha`. The weight becomes W + alpha / R * up @ down (Hu et al. 2021, section 4.1).
Each naming scheme has its own place for alpha. If a file with kohya's or diffusers' names has none, alpha is the rank.

    kohya's names     a tensor beside each pair, `lora_unet_mid_block_....alpha`
    diffusers' names  the header entry `lora_adapter_metadata`: peft's configs of UNet and text encoder in one JSON table
    peft's own names  the file adapter_config.json in the same folder

diffusers refuses a file that has both alpha tensors and the header entry. In files with kohya's names we therefore store peft's
config under another key. Converting such a file back reproduces the original file byte for byte, if its alphas are the ranks.
ComfyUI and older versions of diffusers do not read the header entry, and assume that alpha is the rank. Files for other tools
with diffusers' names therefore have alpha / R folded into their matrices (`fold_alpha`).
Read next: `lora_names.py`, `lora_convert.py`, `fastsd/model/lora.py`.

Shapes: F features, C channels, k the side of a convolution's kernel, R the rank of one adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.lora_names import MERGEABLE, kind_of, kohya_name, parse_name, unsupported_kind
from fastsd.model.formats.model_summary import metadata_of
from fastsd.storage import TEMPORARY, TensorFile, check_finite, write_safetensors

PEFT_CONFIG = "lora_adapter_metadata"  # diffusers' header key for peft's config
RECORD = "fastsd_peft"  # our header key in files with kohya's names, for the data that `_restore_record` reads
_WEIGHTS_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # written by diffusers and by peft
_CLASSIC_TEXT, _SHORT_TEXT = "text_encoder.text_model.", "text_encoder."  # prefixes of text layers; short in transformers 5
_KERNEL_SIDES = {  # a convolution's last name -> the side of its kernel
    "proj_in": 1, "proj_out": 1, "conv_shortcut": 1, "conv": 3, "conv1": 3, "conv2": 3, "conv_in": 3, "conv_out": 3,
}  # fmt: skip
_ADVICE = "give a plain LoRA for SD1.5's UNet and text encoder"


@dataclass(frozen=True)
class LoraFile:
    """A complete and valid LoRA.

    Attributes:
        tensors: `<component>.<module>.lora_A.weight` (down) and `lora_B` (up), in the order of the file.
        alphas: `<component>.<module>` -> alpha.
        metadata: the other header entries, with peft's config if it is known; "" in its place means that the file had none.
        kind: the naming scheme of the file, as `kind_of` returns it.
        short: True if the names of text layers omit `text_model.`, as in transformers 5.
        ignored: the embeddings of a textual inversion that OneTrainer bundles with a LoRA.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = "diffusers"
    short: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        return {module: self.tensors[f"{module}.lora_A.weight"].shape[0] for module in self.alphas}


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA with any names from a .safetensors file, or from a folder written by diffusers or peft.

    Raises:
        UserError: the file does not exist or is not a plain LoRA for SD1.5; or down or up is missing, a shape or a rank does
            not fit, or a number is not finite.
    """
    path = weights_file(path)
    file = TensorFile(path)
    stored = dict(sorted(file.stored().items(), key=lambda item: item[1].offset))
    ignored = tuple(name for name in stored if name.startswith("bundle_emb."))
    kind, parsed = _parse_names(path, [name for name in stored if name not in ignored])

    tensors: dict[str, Tensor] = {}
    stored_alphas: dict[str, float] = {}
    for name, (module, role) in parsed.items():
        tensor = stored[name].read()
        if role == "alpha":
            stored_alphas[module] = _checked_alpha(path, name, tensor)
        else:
            check_finite(name, tensor, str(path))
            tensors[f"{module}.lora_{role}.weight"] = tensor
    modules = dict.fromkeys(module for module, _ in parsed.values())
    ranks = {module: _checked_rank(path, module, tensors) for module in modules}

    metadata = {key: value for key, value in file.metadata.items() if key != "format"}
    has_short_names = any(name.startswith(_SHORT_TEXT) and not name.startswith(_CLASSIC_TEXT) for name in parsed)
    lora = LoraFile(tensors, ranks | stored_alphas, metadata, kind, has_short_names, ignored)
    if kind == "kohya":
        return _restore_record(lora)

    config = json_table(path, PEFT_CONFIG, metadata.get(PEFT_CONFIG, "{}"))
    # A stored config can be written again only if the file has the names that we write, and no alpha tensors.
    has_our_names = kind == "diffusers" and all(name.startswith(COMPONENTS) for name in parsed)
    if has_our_names and not stored_alphas:
        metadata.setdefault(PEFT_CONFIG, "")
    else:
        metadata.pop(PEFT_CONFIG, None)
    if kind == "peft":
        config_path = path.with_name("adapter_config.json")
        if not config_path.is_file():
            raise UserError(
                "peft-config-missing", f"{path}: has peft's names but no adapter_config.json (with alpha) beside it; add it"
            )
        config = json_table(path, config_path.name, config_path.read_text(encoding="utf-8", errors="replace"))
    return replace(lora, alphas=alphas_from_config(str(path), config, ranks) | stored_alphas)


def kernel_side(module: str) -> int:
    """Return the side of the kernel of SD1.5's convolution with that name, or 0 for a linear layer."""
    return _KERNEL_SIDES.get(module.rpartition(".")[2], 0)


def weights_file(path: Path) -> Path:
    """Return the file of a LoRA: `path`, or the weights in that folder."""
    path = path.expanduser()
    if path.is_dir():
        existing = [path / name for name in _WEIGHTS_FILES if (path / name).is_file()]
        if not existing:
            raise UserError(
                "lora-no-weights", f"{path}: contains neither {' nor '.join(_WEIGHTS_FILES)}; give a LoRA's .safetensors file"
            )
        return existing[0]
    if not path.is_file():
        raise UserError("lora-missing", f"{path} does not exist; give a LoRA's .safetensors file")
    return path


def _parse_names(path: Path, names: Iterable[str]) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return a file's naming scheme, and for each tensor name its module and its role in the adapter: "A", "B" or "alpha"."""
    for name in names:
        if unsupported := unsupported_kind(name):
            merge = f", or merge this file into a model with `fastsd convert MODEL OUT --merge {quote(str(path))}`"
            advice = _ADVICE + (merge if unsupported in MERGEABLE else "")
            raise UserError("lora-unsupported", f"{path}: contains {unsupported} ({name}); {advice}")

    kinds = dict.fromkeys(kind_of(name) for name in names if not name.endswith(".alpha"))
    if not kinds:
        raise UserError("lora-empty", f"{path}: contains no adapters; {_ADVICE}")
    if len(kinds) > 1:
        raise UserError(
            "lora-mixed-names", f"{path}: mixes the naming schemes {' and '.join(kinds)}; give a LoRA with one naming scheme"
        )

    parsed: dict[str, tuple[str, str]] = {}
    for name in names:
        module_and_role = parse_name(name)
        if module_and_role is None:
            raise UserError("lora-unknown-name", f"{path}: {name} is not a tensor of an SD1.5 LoRA; {_ADVICE}")
        if module_and_role in parsed.values():
            raise UserError("lora-name-twice", f"{path}: {name} duplicates a tensor under another name; remove one of them")
        parsed[name] = module_and_role
    return next(iter(kinds)), parsed


def _checked_alpha(path: Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not 0 < tensor.item() < math.inf:
        value = f"{tensor.item():g}" if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise UserError("lora-alpha", f"{path}: {name} is {value}, but alpha must be one number above 0; export the LoRA again")
    return tensor.item()


def _checked_rank(path: Path, module: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of a module's adapter. Raise UserError if down or up is missing, or their dtypes or shapes do not fit."""
    down, up = (tensors.get(f"{module}.lora_{role}.weight") for role in "AB")
    if down is None or up is None:
        raise UserError(
            "lora-half-pair", f"{path}: {module} has no {'down' if down is None else 'up'} tensor; export the LoRA again"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UserError("lora-dtype", f"{path}: {module} has {down.dtype} and {up.dtype}; give a LoRA in fp16, bf16 or fp32")

    side = kernel_side(module)
    down_kernel, up_kernel = ([side, side], [1, 1]) if side else ([], [])
    rank = down.shape[0] if down.ndim else 0
    down_fits = [*down.shape] == [rank, *down.shape[1:2], *down_kernel]
    up_fits = [*up.shape] == [*up.shape[:1], rank, *up_kernel]
    if not (rank and down_fits and up_fits):
        expected_down = ", ".join(map(str, ["rank", "inputs", *down_kernel]))
        expected_up = ", ".join(map(str, ["outputs", "rank", *up_kernel]))
        raise UserError(
            "lora-shapes",
            f"{path}: {module} has shapes {tuple(down.shape)} (down) and {tuple(up.shape)} (up), expected ({expected_down}) "
            f"and ({expected_up}); {_ADVICE}",
        )
    return rank


def json_table(place: object, name: str, text: str) -> dict[str, Any]:
    """Return a JSON object, the entry or file `name` of the LoRA at `place`. Raise UserError for anything else."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            "peft-config-no-table", f"{place}: {name} is not a JSON object ({error}); download or export the LoRA again"
        ) from None


def alphas_from_config(place: str, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return each module's alpha as peft reads it from a config. A key may begin with the only component that it applies to.

    A rank-stabilised LoRA scales by alpha / sqrt(R) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning
    with LoRA"). We scale by alpha / R, so its alpha is multiplied by sqrt(R).
    """
    alphas = {}
    try:
        for module, rank in ranks.items():
            component, _, layer = module.partition(".")
            settings = {key.removeprefix(f"{component}."): value for key, value in config.items()}
            config_rank = _pattern_value(settings.get("rank_pattern"), layer, settings.get("r", rank))
            if rank != config_rank:
                raise UserError(
                    "lora-rank", f"{place}: {module} has rank {rank}, but peft's config has {config_rank}; export it again"
                )
            alpha = float(_pattern_value(settings.get("alpha_pattern"), layer, settings.get("lora_alpha", rank)))
            alphas[module] = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha is {alpha:g}")
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError("peft-config-invalid", f"{place}: peft's config is invalid ({error}); export the LoRA again") from None
    return alphas


def _pattern_value(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """Return the value of the first pattern (a regular expression) that matches the end of a layer's name, or `default`."""
    names = (layer, layer.removeprefix("text_model."))
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default


def _restore_record(lora: LoraFile) -> LoraFile:
    """Restore alphas, header and names as a conversion to kohya's names recorded them, unless a rank or alpha has changed."""
    # Hashes describe the bytes of this file, so they are not copied to another one.
    metadata = {key: value for key, value in lora.metadata.items() if not key.startswith(("sshs_", "modelspec.hash"))}
    record = metadata.pop(RECORD, None)
    if record is None:
        return replace(lora, metadata=metadata)
    try:
        entries = json_table("", RECORD, record)
        config = json_table("", RECORD, entries[PEFT_CONFIG] or "{}")
        alphas = alphas_from_config("", config, lora.ranks)
        header = {key: value for key, value in lora.metadata.items() if key not in entries["added"]}
        header = {PEFT_CONFIG if key == RECORD else key: value for key, value in header.items()}
        header[PEFT_CONFIG] = entries[PEFT_CONFIG]
        short = bool(entries["short"])
    except (UserError, KeyError, TypeError):
        return replace(lora, metadata=metadata)
    if not all(math.isclose(alphas[module], alpha, rel_tol=1e-6) for module, alpha in lora.alphas.items()):
        return replace(lora, metadata=metadata)
    return replace(lora, alphas=alphas, metadata=header, short=short)


def fold_alpha(lora: LoraFile, place: str) -> LoraFile:
    """Return an equal LoRA whose alphas are the ranks: alpha / R is multiplied into up and down.

    Down takes the power of two next to the square root of alpha / R, which is exact, and up takes the rest. Otherwise, small
    numbers in fp16 would lose bits, because an up matrix alone times 1 / 32 often leaves fp16's normal range.

    Raises:
        UserError: a product is not finite in its dtype.
    """
    ranks = lora.ranks
    tensors = dict(lora.tensors)
    changed = [module for module, alpha in lora.alphas.items() if alpha != ranks[module]]
    for module in changed:
        scale = lora.alphas[module] / ranks[module]
        down_scale = 2.0 ** round(math.log2(scale) / 2)
        for role, factor in (("A", down_scale), ("B", scale / down_scale)):
            name = f"{module}.lora_{role}.weight"
            tensors[name] = (tensors[name].double() * factor).to(tensors[name].dtype)
            check_finite(name, tensors[name], place, f" after alpha is folded in, in {tensors[name].dtype}; use --dtype fp32")
    folded = replace(lora, tensors=tensors, alphas={module: float(rank) for module, rank in ranks.items()})
    if changed and PEFT_CONFIG in lora.metadata:
        folded = replace(folded, metadata={**lora.metadata, PEFT_CONFIG: peft_config(folded)})
    return folded


def write_peft(path: Path, lora: LoraFile) -> str:
    """Write a LoRA with diffusers' names and with peft's config in its header. Return the file's sha256."""
    metadata = lora.metadata if PEFT_CONFIG in lora.metadata else {**lora.metadata, PEFT_CONFIG: peft_config(lora)}
    metadata = {key: value for key, value in metadata.items() if value or key != PEFT_CONFIG}
    tensors = lora.tensors
    if lora.short:
        tensors = {name.replace(_CLASSIC_TEXT, _SHORT_TEXT): tensor for name, tensor in tensors.items()}
    return write_safetensors(path, tensors, metadata)


def peft_config(lora: LoraFile) -> str:
    """Return a LoRA's peft config in diffusers' form: the most common rank and alpha, and patterns for the other modules."""
    config: dict[str, object] = {}
    for component in COMPONENTS:
        modules = [module for module in lora.alphas if module.startswith(f"{component}.")]
        # Text layers get the names of transformers 5. In older versions, peft matches these with the end of a longer name.
        layers = {module: module.removeprefix(f"{component}.").removeprefix("text_model.") for module in modules}
        ranks = {layers[module]: lora.ranks[module] for module in modules}
        alphas = {layers[module]: lora.alphas[module] for module in modules}
        if modules:
            common_rank, common_alpha = most_common(ranks.values()), most_common(alphas.values())
            config |= {
                f"{component}.r": common_rank,
                f"{component}.lora_alpha": _as_int(common_alpha),
                f"{component}.target_modules": sorted(ranks),
                f"{component}.rank_pattern": {layer: rank for layer, rank in ranks.items() if rank != common_rank},
                f"{component}.alpha_pattern": {layer: _as_int(a) for layer, a in alphas.items() if a != common_alpha},
            }
    return json.dumps(config, sort_keys=True)


def most_common(values: Iterable[float]) -> float:
    """Return the value that occurs most often."""
    return Counter(values).most_common(1)[0][0]


def _as_int(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def write_kohya(path: Path, lora: LoraFile, metadata: Mapping[str, str] | None = None) -> str:
    """Write a LoRA with kohya's names and an alpha beside each pair. Return the file's sha256.

    Args:
        metadata: further header entries. A key that is in the LoRA's own metadata is ignored.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in lora.tensors.items():
        module, matrix, _ = name.rsplit(".", 2)
        kohya_module = kohya_name(module)
        tensors.setdefault(f"{kohya_module}.alpha", _scalar(lora.alphas[module], tensor.dtype))
        tensors[f"{kohya_module}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor

    title = path.name.removeprefix(TEMPORARY).removesuffix(".safetensors")
    added = metadata_of(None, {}, 512, title=title, lora=True) | _network_metadata(lora) | dict(metadata or {})
    added = {key: value for key, value in added.items() if key not in lora.metadata}
    header = {RECORD if key == PEFT_CONFIG else key: value for key, value in lora.metadata.items()}
    if RECORD in header:
        header[RECORD] = json.dumps({"added": [*added], "short": lora.short, PEFT_CONFIG: lora.metadata[PEFT_CONFIG]})
    return write_safetensors(path, tensors, header | added)


def _scalar(alpha: float, dtype: torch.dtype) -> Tensor:
    """Return alpha as a tensor in the weights' dtype, as sd-scripts does, or in fp32 if that dtype cannot represent it."""
    tensor = torch.tensor(alpha, dtype=dtype)
    return tensor if float(tensor) == alpha else torch.tensor(alpha, dtype=torch.float32)


def _network_metadata(lora: LoraFile) -> dict[str, str]:
    """Return rank and alpha as sd-scripts records them: separately for 3x3 convolutions, and "Dynamic" if modules differ."""

    def common(values: Mapping[str, float], *, is_3x3: bool) -> str:
        modules = [module for module in values if (kernel_side(module) == 3) == is_3x3]
        distinct = {f"{values[module]:g}" for module in modules}
        return "Dynamic" if len(distinct) > 1 else "".join(distinct)

    dim, conv_dim = common(lora.ranks, is_3x3=False), common(lora.ranks, is_3x3=True)
    alpha, conv_alpha = common(lora.alphas, is_3x3=False), common(lora.alphas, is_3x3=True)
    metadata = {"ss_network_dim": dim or conv_dim, "ss_network_alpha": alpha or conv_alpha}
    if conv_dim:
        metadata["ss_network_args"] = json.dumps({"conv_dim": conv_dim, "conv_alpha": conv_alpha})
    return metadata
