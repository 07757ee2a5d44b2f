"""Merge adapters of any kind into the weights of a model: LoRA, LoCon, LoHa, LoKr, DoRA, (IA)^3 and full differences.

With strength s, rank R and scale c = alpha / R, the weight W becomes W + s (W' - W), where W' is

    LoRA, LoCon     W + c up down                                  Hu et al. 2021, "LoRA", section 4.1
    with `mid`      W + c sum_mn mid[m, n] up[:, m] down[n, :]     Tucker decomposition of a convolution; Yeh et al. 2023
    LoHa            W + c (w1_a w1_b) * (w2_a w2_b)                elementwise product; Hyeon-Woo et al. 2021, "FedPara"
    LoKr            W + c kron(w1, w2)                             Yeh et al. 2023, "Navigating Text-To-Image Customization"
    (IA)^3          W + W * weight                                 of each output, or of each input; Liu et al. 2022
    full, norms     W + diff                                       also of a bias
    DoRA            V * m / |V|, V any W' above                    Liu et al. 2024, "DoRA", equation 5

w1 and w2 of LoKr are stored whole, or as products of a and b. If both are whole, c is 1. The norm |V| is that of each output,
or of each input if LyCORIS' `dora_scale` has the shape (1, inputs). Without alpha, or if it is 0, c is 1. Interpolating DoRA by
s is ComfyUI's rule. The names of layers are those of `lora_names.py`, and the names of tensors are LyCORIS'.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model.formats.load import component_state_dict
from fastsd.model.formats.lora_files import PEFT_CONFIG, alphas_from_config, json_table, weights_file
from fastsd.model.formats.lora_names import kohya_form, kohya_name, module_of, split_name
from fastsd.model.formats.model_source import ComponentFiles
from fastsd.model.formats.original_names import original_names
from fastsd.model.model import Model
from fastsd.storage import TensorFile, as_tensor, check_finite

Group = dict[str, Tensor]  # the tensors of one layer, by their last names
_LEAF = re.compile(
    r"(.+?)\.(?:(alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff(?:_b)?|[wb]_norm|on_input|weight)"
    r"|lora_(mid|magnitude_vector)(?:\.\w+)?(?:\.weight)?)"
)
_ROLES = {"w_norm": "diff", "b_norm": "diff_b"}


def parse_merge(text: str, option: str = "--merge") -> tuple[Path, float]:
    """Return the file and the strength in LORA[:weight]. Raise UserError, naming `option`, if the strength is not finite."""
    name, _, tail = text.rpartition(":")
    try:
        strength = float(tail) if name else 1.0
    except ValueError:  # the colon belongs to the path
        name, strength = "", 1.0
    if not math.isfinite(strength):
        raise UserError("merge-strength", f"{option} is {text!r}; give a finite weight after the colon, such as 0.8")
    return Path(name or text).expanduser(), strength


def merge_into(
    components: Mapping[str, ComponentFiles], merges: Iterable[str], option: str = "--merge"
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the changed tensors of each component in their own dtype, rounded once, and one note for each adapter file.

    Args:
        components: "unet" and, if the model has one, "text_encoder".
        merges: LORA[:weight], in the order in which they are merged.
        option: the command line's name for them, for an error.

    Raises:
        UserError: a file cannot be read, has tensors of another kind, or does not fit the model.
    """
    layers = _layers(components)
    files = [_read(*parse_merge(text, option), layers) for text in merges]
    changed: dict[str, dict[str, Tensor]] = {name: {} for name in COMPONENTS}
    for module in dict.fromkeys(module for file in files for module in file.groups):
        component, _, stem = module.partition(".")
        for leaf in ("weight", "bias"):
            adapters = [file for file in files if leaf == "weight" or "diff_b" in file.groups.get(module, ())]
            if not adapters:
                continue
            stored = components[component].tensors.get(f"{stem}.{leaf}")
            if stored is None:
                raise UserError(
                    "merge-no-bias", f"{adapters[0].path}: changes {module}.{leaf}, which the model does not have; give another"
                )
            tensor = as_tensor(stored).double()
            for file in adapters:
                if module in file.groups:
                    tensor = file.apply(module, leaf, tensor)
            changed[component][f"{stem}.{leaf}"] = tensor.to(stored.dtype)
    return changed, [file.note() for file in files]


def merge_loaded(model: Model, merges: Iterable[str], option: str) -> list[str]:
    """Merge adapters into a loaded model's weights, as `merge_into` does. Return a note for each adapter file."""
    configs = {"unet": model.unet.cfg.to_diffusers(), "text_encoder": model.text.module.config.to_dict()}
    states = {name: component_state_dict(model, name) for name in COMPONENTS}
    components = {name: ComponentFiles(configs[name], states[name], model.name, "") for name in COMPONENTS}
    changed, notes = merge_into(components, merges, option)
    with torch.no_grad():
        for component, tensors in changed.items():
            for name, tensor in tensors.items():
                states[component][name].copy_(tensor)  # a view of the parameter
    return notes


def _layers(components: Mapping[str, ComponentFiles]) -> dict[str, str]:
    """Return the modules of a model, with their components, by kohya's names from diffusers' and from the original names."""
    layers = {}
    for component in COMPONENTS:
        if component in components:
            files = components[component]
            originals = original_names(component, files.config, files.tensors)
            for name, original in originals.items():
                module = f"{component}.{name.rpartition('.')[0]}"
                layers[kohya_name(f"{component}.{original.rpartition('.')[0]}")] = module
                layers[kohya_name(module)] = module
    return layers


@dataclass
class _Adapters:
    """The adapters of a file: the tensors and the alphas by module. `kinds` counts those that were applied."""

    path: Path
    strength: float
    groups: dict[str, Group]
    alphas: dict[str, float]
    kinds: Counter[str] = field(default_factory=Counter)

    def apply(self, module: str, leaf: str, tensor: Tensor) -> Tensor:
        """Return a weight or bias in fp64 with this file's adapter."""
        group = {name: values.double() for name, values in self.groups[module].items()}
        try:
            kind, result = _applied(tensor, group, self.alphas.get(module), leaf)
        except (RuntimeError, IndexError, KeyError) as error:
            reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UserError(
                "merge-shapes",
                f"{self.path}: {module} does not fit a weight of shape {tuple(tensor.shape)} ({reason}); give a complete "
                "adapter for this model",
            ) from None
        self.kinds[kind] += bool(kind)
        return tensor + self.strength * (result - tensor)

    def note(self) -> str:
        layers = ", ".join(f"{kind} {count}" for kind, count in sorted(self.kinds.items()) if count)
        return f"merged {self.path} with weight {self.strength:g}, layers: {layers or 'biases only'}"


def _read(path: Path, strength: float, layers: Mapping[str, str]) -> _Adapters:
    path = weights_file(path)
    file = TensorFile(path)
    groups: defaultdict[str, Group] = defaultdict(dict)
    for name, stored in file.stored().items():
        if name.startswith("bundle_emb."):  # embeddings of a textual inversion
            continue
        module, role = _split(path, name, layers)
        if role in groups[module]:
            raise UserError("merge-name-twice", f"{path}: {name} is a second {role} of {module}; give another file")
        groups[module][role] = stored.read()
        check_finite(name, groups[module][role], str(path))
    if not groups:
        raise UserError("merge-empty", f"{path}: contains no adapters; give a LoRA")

    alphas = {module: group.pop("alpha").item() for module, group in groups.items() if "alpha" in group}
    config, beside = json_table(path, PEFT_CONFIG, file.metadata.get(PEFT_CONFIG, "{}")), path.with_name("adapter_config.json")
    if any(name.startswith("base_model.model.") for name in file) and beside.is_file():
        config = json_table(path, beside.name, beside.read_text(encoding="utf-8", errors="replace"))
    ranks = {module: len(group["A"]) for module, group in groups.items() if "A" in group}
    return _Adapters(path, strength, groups, (alphas_from_config(str(path), config, ranks) if config else {}) | alphas)


def _split(path: Path, name: str, layers: Mapping[str, str]) -> tuple[str, str]:
    """Return the module, with its component, of a tensor in an adapter file, and its role in the formulas of this file."""
    match = _LEAF.fullmatch(name)
    layer, role = split_name(name) or (match[1] if match else "", match and (match[2] or match[3]))
    if not role:
        raise UserError(
            "merge-unsupported", f"{path}: {name} cannot be merged; give a LoRA, LoCon, LoHa, LoKr, DoRA or full difference"
        )
    names = [kohya_form(layer), (module := module_of(layer)) and kohya_name(module)]
    target = next((layers[name] for name in names if name and name in layers), None)
    if target is None:
        raise UserError(
            "merge-no-layer", f"{path}: {name} belongs to a layer that the model does not have; give a LoRA for SD1.5"
        )
    return target, _ROLES.get(role, role)


def _applied(weight: Tensor, group: Group, alpha: float | None, leaf: str) -> tuple[str, Tensor]:
    """Return the kind of an adapter, "" for a bias, and the weight or bias W' of a layer with it."""
    if leaf == "bias":
        return "", weight + group["diff_b"].view_as(weight)
    if "on_input" in group:
        side = 1 if group["on_input"].item() else 0
        return "(IA)^3", weight + weight * group["weight"].flatten().view(_broadcast(weight, side))
    if group.keys() == {"diff_b"}:
        return "", weight
    kinds = [kind for kind in _KINDS if any(name.startswith(kind) for name in group)]
    if not kinds:
        raise KeyError("lora_up, hada, lokr or diff")
    kind, compute = _KINDS[kinds[0]]
    delta, rank = compute(group)
    if len(delta) != len(weight):
        raise RuntimeError(f"it has {len(delta)} outputs")
    result = weight + (alpha / rank if alpha and rank else 1.0) * delta.reshape(weight.shape)
    magnitude = group.get("dora_scale", group.get("magnitude_vector"))
    if magnitude is not None:
        side = 1 if "dora_scale" in group and magnitude.shape[0] == 1 < len(weight) else 0
        norms = result.transpose(0, side).flatten(1).norm(dim=1)
        result = result * (magnitude.flatten() / norms).view(_broadcast(weight, side))
        kind = f"DoRA of {kind}"
    return kind, result


def _broadcast(weight: Tensor, side: int) -> list[int]:
    return [-1 if i == side else 1 for i in range(weight.ndim)]


def _lora(group: Group) -> tuple[Tensor, int]:
    down, up = group["A"], group["B"]
    if "mid" in group:
        return torch.einsum("mn...,im,nj->ij...", group["mid"], up.flatten(1), down.flatten(1)), len(down)
    return up.flatten(1) @ down.flatten(1), len(down)


def _loha(group: Group) -> tuple[Tensor, int]:
    factors = []
    for i in "12":
        a, b, t = group[f"hada_w{i}_a"], group[f"hada_w{i}_b"], group.get(f"hada_t{i}")
        factors.append(a.flatten(1) @ b.flatten(1) if t is None else torch.einsum("ij...,ip,jr->pr...", t, a, b))
    return factors[0] * factors[1], len(group["hada_w1_b"])


def _lokr(group: Group) -> tuple[Tensor, int]:
    factors, rank = [], 0
    for i in "21":
        if f"lokr_w{i}" in group:
            factors.append(group[f"lokr_w{i}"])
            continue
        a, b, t = group[f"lokr_w{i}_a"], group[f"lokr_w{i}_b"], group.get(f"lokr_t{i}")
        factors.append(a @ b if t is None else torch.einsum("ij...,ip,jr->pr...", t, a, b))
        rank = rank or len(b)
    second, first = factors
    return torch.kron(first.view(*first.shape, *[1] * (second.ndim - first.ndim)), second.contiguous()), rank


def _full(group: Group) -> tuple[Tensor, int]:
    return group["diff"], 0


# The beginning of a tensor's role -> the name of the kind, and the function that returns its difference and rank (0 = no rank).
_KINDS: dict[str, tuple[str, Callable[[Group], tuple[Tensor, int]]]] = {
    "B": ("LoRA", _lora), "hada_": ("LoHa", _loha), "lokr_": ("LoKr", _lokr), "diff": ("full", _full),
}  # fmt: skip
