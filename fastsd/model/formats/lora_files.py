"""LoRA files: read with the names of any tool, written with kohya's or diffusers' (PEFT) names.

A layer's adapter is down, (R, F_in) or (R, C, k, k) of a convolution, up, (F, R) or (F, R, 1, 1), and alpha. The weight becomes
W + alpha / R * up @ down (Hu et al. 2021, section 4.1). Files store alpha in different places:

    kohya's names     a tensor beside each pair, `lora_unet_mid_block_....alpha`; without one, alpha is the rank
    diffusers' names  in the header, `lora_adapter_metadata`: peft's configs of UNet and text encoder in one JSON table;
                      without it, alpha is the rank
    peft's own names  in adapter_config.json beside the file

diffusers refuses a file with alpha tensors and the header entry. Files with kohya's names therefore have peft's config under a
key of our own; converting back reproduces the first file byte for byte. Read next: `lora_names.py`, `fastsd/model/lora.py`.

Shapes: F features, C channels, k sides of a convolution's kernel, R the rank of one adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.lora_names import kind_of, kohya_name, parse_name, unsupported_kind
from fastsd.model.formats.model_summary import metadata_of
from fastsd.model.formats.write import DTYPE
from fastsd.storage import TEMPORARY, TensorFile, check_finite, new_file, write_safetensors

PEFT_CONFIG = "lora_adapter_metadata"  # diffusers' header key for peft's config
RECORD = "fastsd_peft"  # header key with kohya's names: peft's config, header keys we added, naming of text layers
_WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # file names of diffusers and of peft
_CLASSIC, _SHORT = "text_encoder.text_model.", "text_encoder."
_KERNEL = {"proj_in": 1, "proj_out": 1, "conv_shortcut": 1} | dict.fromkeys(
    ("conv", "conv1", "conv2", "conv_in", "conv_out"), 3
)
_ADVICE = "give a plain LoRA for SD1.5's UNet and text encoder"


@dataclass(frozen=True)
class LoraFile:
    """A complete and valid LoRA.

    Attributes:
        tensors: `<component>.<module>.lora_A.weight` (down) and `lora_B` (up), in the order of the file.
        alphas: by `<component>.<module>`.
        metadata: the rest of the header, including peft's config if it is known; "" means the file had none.
        kind: the naming of the file: "kohya", "peft", "diffusers" or "older diffusers".
        short: True if the names of text layers omit `text_model.`, as in transformers 5.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = "diffusers"
    short: bool = False

    @property
    def ranks(self) -> dict[str, int]:
        return {module: self.tensors[f"{module}.lora_A.weight"].shape[0] for module in self.alphas}


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA with any names: a .safetensors file, or a folder written by diffusers or peft.

    Raises:
        UserError: no such file, not a plain LoRA of SD1.5, or an invalid one: half a pair, a shape or a rank that does not fit,
            a number that is not finite.
    """
    path = _weights_file(path)
    file = TensorFile(path)
    stored = dict(sorted(file.stored().items(), key=lambda item: item[1].offset))
    kind, keys = _modules(path, stored)

    tensors, stored_alphas = dict[str, Tensor](), dict[str, float]()
    for name, (module, letter) in keys.items():
        tensor = stored[name].read()
        if letter == "alpha":
            stored_alphas[module] = _alpha(path, name, tensor)
        else:
            check_finite(name, tensor, str(path))
            tensors[f"{module}.lora_{letter}.weight"] = tensor
    ranks = {module: _rank(path, module, tensors) for module in dict.fromkeys(name for name, _ in keys.values())}

    metadata = {key: value for key, value in file.metadata.items() if key != "format"}
    lora = LoraFile(tensors, ranks | stored_alphas, metadata, kind, any(_is_short(name) for name in keys))
    if kind == "kohya":
        return _restore_record(lora)

    config = _json(path, PEFT_CONFIG, metadata.get(PEFT_CONFIG, "{}"))
    # A stored config can be reused only if the file has the names that we write, and no alpha tensors.
    if kind == "diffusers" and not stored_alphas and all(name.startswith(COMPONENTS) for name in keys):
        metadata.setdefault(PEFT_CONFIG, "")
    else:
        metadata.pop(PEFT_CONFIG, None)
    if kind == "peft":
        config_path = path.with_name("adapter_config.json")
        if not config_path.is_file():
            raise UserError(
                "peft-config-missing", f"{path}: has peft's names but no adapter_config.json (with alpha) beside it; add it"
            )
        config = _json(path, config_path.name, config_path.read_text(encoding="utf-8", errors="replace"))
    return replace(lora, alphas=_alphas(str(path), config, ranks) | stored_alphas)


def _weights_file(path: Path) -> Path:
    path = path.expanduser()
    if path.is_dir():
        existing = [path / name for name in _WEIGHTS if (path / name).is_file()]
        if not existing:
            raise UserError(
                "lora-no-weights", f"{path}: contains neither {' nor '.join(_WEIGHTS)}; give a LoRA's .safetensors file"
            )
        return existing[0]
    if not path.is_file():
        raise UserError("lora-missing", f"{path} does not exist; give a LoRA's .safetensors file")
    return path


def _modules(path: Path, names: Iterable[str]) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return the naming of a file, and a map from each tensor's name to (module, "A", "B" or "alpha")."""
    for name in names:
        if unsupported := unsupported_kind(name):
            raise UserError("lora-unsupported", f"{path}: contains {unsupported} ({name}); {_ADVICE}")

    parsed = {name: parse_name(name) for name in names}
    kinds = dict.fromkeys(kind_of(name) for name in names if not name.endswith(".alpha"))
    if not kinds:
        raise UserError("lora-empty", f"{path}: contains no adapters; {_ADVICE}")
    if len(kinds) > 1:
        raise UserError(
            "lora-mixed-names", f"{path}: mixes the naming schemes {' and '.join(kinds)}; give a LoRA with one naming scheme"
        )

    keys: dict[str, tuple[str, str]] = {}
    for name, key in parsed.items():
        if key is None:
            raise UserError("lora-unknown-name", f"{path}: {name} is not a tensor of an SD1.5 LoRA; {_ADVICE}")
        if key in keys.values():
            raise UserError("lora-name-twice", f"{path}: {name} duplicates a tensor under another name; remove one of them")
        keys[name] = key
    return next(iter(kinds)), keys


def _is_short(name: str) -> bool:
    return name.startswith(_SHORT) and not name.startswith(_CLASSIC)


def _alpha(path: Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not 0 < tensor.item() < math.inf:
        value = f"{tensor.item():g}" if tensor.numel() == 1 else f"of shape {tuple(tensor.shape)}"
        raise UserError("lora-alpha", f"{path}: {name} is {value}, but alpha must be one number above 0; export the LoRA again")
    return tensor.item()


def _rank(path: Path, module: str, tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of a module's pair. Raises UserError if the pair is incomplete or its shapes do not fit."""
    pair = [tensors.get(f"{module}.lora_{letter}.weight") for letter in "AB"]
    if pair[0] is None or pair[1] is None:
        raise UserError(
            "lora-half-pair", f"{path}: {module} has no {'down' if pair[0] is None else 'up'} tensor; export the LoRA again"
        )

    down, up = pair[0], pair[1]
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UserError("lora-dtype", f"{path}: {module} has {down.dtype} and {up.dtype}; give a LoRA in fp16, bf16 or fp32")

    k = _KERNEL.get(module.rpartition(".")[2], 0)
    ends = ([k, k], [1, 1]) if k else ([], [])
    rank = down.shape[0] if down.ndim else 0
    if not rank or [*down.shape] != [rank, *down.shape[1:2], *ends[0]] or [*up.shape] != [*up.shape[:1], rank, *ends[1]]:
        sides = [", ".join(map(str, end)) for end in (["rank", "inputs", *ends[0]], ["outputs", "rank", *ends[1]])]
        raise UserError(
            "lora-shapes",
            f"{path}: {module} has shapes {tuple(down.shape)} (down) and {tuple(up.shape)} (up), expected ({sides[0]}) and "
            f"({sides[1]}); {_ADVICE}",
        )
    return rank


def _json(place: object, name: str, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            "peft-config-no-table", f"{place}: {name} is not a JSON object ({error}); download or export the LoRA again"
        ) from None


def _alphas(place: str, config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Return each module's alpha as peft reads a config: one for all components, or with keys that begin with the component.

    A rank-stabilised factor is alpha / sqrt(R) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with
    LoRA"). Since we divide by R, alpha is multiplied by sqrt(R).
    """
    alphas = {}
    try:
        for module, rank in ranks.items():
            component, _, path = module.partition(".")
            settings = {key.removeprefix(f"{component}."): value for key, value in config.items()}
            if rank != (config_rank := _pattern_value(settings.get("rank_pattern"), path, settings.get("r", rank))):
                raise UserError(
                    "lora-rank", f"{place}: {module} has rank {rank}, but peft's config has {config_rank}; export it again"
                )
            alpha = float(_pattern_value(settings.get("alpha_pattern"), path, settings.get("lora_alpha", rank)))
            alphas[module] = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha is {alpha:g}")
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError("peft-config-invalid", f"{place}: peft's config is invalid ({error}); export the LoRA again") from None
    return alphas


def _pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return peft's value for a module: the first with a key (a regular expression) that ends its path, or `default`."""
    names = (path, path.removeprefix("text_model."))
    for key, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return default


def _restore_record(lora: LoraFile) -> LoraFile:
    """Restore alphas, header and naming as recorded by a conversion to kohya's names, unless rank or alpha has changed."""
    # Hashes are valid only for the bytes of this file.
    metadata = {k: v for k, v in lora.metadata.items() if not k.startswith(("sshs_", "modelspec.hash"))}
    record = metadata.pop(RECORD, None)
    if record is None:
        return replace(lora, metadata=metadata)
    try:
        entries = _json("", RECORD, record)
        alphas = _alphas("", _json("", RECORD, entries[PEFT_CONFIG] or "{}"), lora.ranks)
        header = {PEFT_CONFIG if k == RECORD else k: v for k, v in lora.metadata.items() if k not in entries["added"]}
        header, short = header | {PEFT_CONFIG: entries[PEFT_CONFIG]}, bool(entries["short"])
    except (UserError, KeyError, TypeError):
        return replace(lora, metadata=metadata)
    if not all(math.isclose(alphas[module], alpha, rel_tol=1e-6) for module, alpha in lora.alphas.items()):
        return replace(lora, metadata=metadata)
    return replace(lora, alphas=alphas, metadata=header, short=short)


def write_peft(path: Path, lora: LoraFile) -> str:
    """Write a LoRA with diffusers' names and with peft's config in its header. Returns the file's sha256."""
    metadata = lora.metadata if PEFT_CONFIG in lora.metadata else {**lora.metadata, PEFT_CONFIG: peft_config(lora)}
    metadata = {key: value for key, value in metadata.items() if value or key != PEFT_CONFIG}
    shorten = (lambda name: name.replace(_CLASSIC, _SHORT)) if lora.short else str
    return write_safetensors(path, {shorten(name): tensor for name, tensor in lora.tensors.items()}, metadata)


def peft_config(lora: LoraFile) -> str:
    """Return peft's config of a LoRA in diffusers' form: the most common rank and alpha, and patterns for the other modules."""
    ranks, config = lora.ranks, dict[str, Any]()
    for prefix in COMPONENTS:
        # Text layers are named as in transformers 5. In older versions peft finds these as the end of a longer name.
        paths = {m: m.removeprefix(f"{prefix}.").removeprefix("text_model.") for m in ranks if m.startswith(f"{prefix}.")}
        if paths:
            rank, alpha = (_most_common(values[m] for m in paths) for values in (ranks, lora.alphas))
            config |= {
                f"{prefix}.r": rank,
                f"{prefix}.lora_alpha": _as_int(alpha),
                f"{prefix}.target_modules": sorted(paths.values()),
                f"{prefix}.rank_pattern": {paths[m]: ranks[m] for m in paths if ranks[m] != rank},
                f"{prefix}.alpha_pattern": {paths[m]: _as_int(lora.alphas[m]) for m in paths if lora.alphas[m] != alpha},
            }
    return json.dumps(config, sort_keys=True)


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _as_int(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def write_kohya(path: Path, lora: LoraFile, metadata: Mapping[str, str] | None = None) -> str:
    """Write a LoRA with kohya's names and an alpha beside each pair. Returns the file's sha256.

    Args:
        metadata: further header entries. Keys that the LoRA's own metadata has are ignored.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in lora.tensors.items():
        module, letter, _ = name.rsplit(".", 2)
        stem = kohya_name(module)
        tensors.setdefault(f"{stem}.alpha", _scalar(lora.alphas[module], tensor.dtype))
        tensors[f"{stem}.{'lora_down' if letter == 'lora_A' else 'lora_up'}.weight"] = tensor
    title = path.name.removeprefix(TEMPORARY).removesuffix(".safetensors")
    added = metadata_of(None, {}, 512, title=title, lora=True) | _network_metadata(lora) | dict(metadata or {})
    added = {key: value for key, value in added.items() if key not in lora.metadata}
    header = {RECORD if key == PEFT_CONFIG else key: value for key, value in lora.metadata.items()}
    if RECORD in header:
        header[RECORD] = json.dumps({"added": [*added], "short": lora.short, PEFT_CONFIG: lora.metadata[PEFT_CONFIG]})
    return write_safetensors(path, tensors, header | added)


def _scalar(alpha: float, dtype: torch.dtype) -> Tensor:
    """Return alpha as a tensor in the weights' dtype, as sd-scripts stores it, or in fp32 if that dtype cannot represent it."""
    tensor = torch.tensor(alpha, dtype=dtype)
    return tensor if float(tensor) == alpha else torch.tensor(alpha, dtype=torch.float32)


def _network_metadata(lora: LoraFile) -> dict[str, str]:
    """Return rank and alpha as sd-scripts records them, 3x3 convolutions separately; "Dynamic" where they differ by module."""

    def common(values: Mapping[str, Any], wide: bool) -> str:
        distinct = {f"{values[m]:g}" for m in values if (_KERNEL.get(m.rpartition(".")[2]) == 3) == wide}
        return distinct.pop() if len(distinct) == 1 else "Dynamic" if distinct else ""

    (dim, conv_dim), (alpha, conv_alpha) = ([common(v, wide) for wide in (False, True)] for v in (lora.ranks, lora.alphas))
    metadata = {"ss_network_dim": dim or conv_dim, "ss_network_alpha": alpha or conv_alpha}
    if conv_dim:
        metadata["ss_network_args"] = json.dumps({"conv_dim": conv_dim, "conv_alpha": conv_alpha})
    return metadata


def convert_lora(source: Path, out: Path, to: str, dtype: str = "") -> list[str]:
    """Write a LoRA with other names. Returns notes on what was found.

    Args:
        to: "lora-kohya" or "lora-peft".
        dtype: fp32, fp16 or bf16; "" = unchanged.

    Raises:
        UserError: see `read_lora`; or `out` exists or is not a .safetensors name; or a number is not finite in `dtype`.
        OSError: the disk is full, or the folder cannot be written.
    """
    lora = read_lora(source)
    if out.exists():
        raise UserError("lora-out-exists", f"{out} already exists; choose a new name, or remove it")
    if out.suffix != ".safetensors":
        raise UserError("lora-ending", f"{out}: a LoRA is one file; choose a name that ends in .safetensors")

    notes = [f"{source}: {describe(lora)}"]
    if dtype:
        cast = {name: tensor.to(DTYPE[dtype]) for name, tensor in lora.tensors.items()}
        for name, tensor in cast.items():
            check_finite(name, tensor, str(source), f" in {dtype}; choose another dtype")
        lora = replace(lora, tensors=cast)

    with new_file(out) as temporary:
        if to == "lora-peft":
            write_peft(temporary, lora)
        else:
            modified = datetime.fromtimestamp(int(_weights_file(source).stat().st_mtime)).isoformat()
            write_kohya(temporary, lora, {"modelspec.date": modified})
            notes += _alpha_warnings(lora)
    return notes


def _alpha_warnings(lora: LoraFile) -> list[str]:
    # diffusers' `get_peft_kwargs` stores the other alphas under names that no attention layer has.
    for component in COMPONENTS:
        alphas = {module: alpha for module, alpha in lora.alphas.items() if module.startswith(f"{component}.")}
        if any("attn" in module and alpha != _most_common(alphas.values()) for module, alpha in alphas.items()):
            return [
                "warning: alpha differs by module, but diffusers (0.42) applies the most common one to all attention layers if "
                "names are kohya's; for diffusers, convert with --to lora-peft"
            ]
    return []


def describe(lora: LoraFile) -> str:
    """Describe a LoRA in one line."""
    counts = Counter(module.partition(".")[0].replace("_", " ").replace("unet", "UNet") for module in lora.alphas)
    layers = ", ".join(f"{component} {count}" for component, count in counts.items())
    values = [", ".join(f"{value:g}" for value in sorted(set(values.values()))) for values in (lora.ranks, lora.alphas)]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in lora.tensors.values()})
    return f"a LoRA with {lora.kind} names, layers: {layers}, rank {values[0]}, alpha {values[1]}, {' and '.join(dtypes)}"
