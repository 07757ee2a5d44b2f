"""Low-rank adapters (LoRA) in the UNet and the text encoder.

The weight W of a target becomes W + alpha / rank * up @ down (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language
Models", section 4.1). W is frozen, down starts at random values, and up starts at zero. peft inserts the adapters according to
its config. `fastsd/model/matmul.py` computes them, so models with and without adapters run the same code.

A fused weight has one adapter for each projection that is a target, as if the projections were separate. The n down matrices
are stacked to (n R, F_in), and the n up matrices to (n F, R). Files store them separately:

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight      down, as diffusers' `save_lora_weights`
    text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight            up

`fastsd/model/formats/lora_files.py` describes the files of other tools, and where they store alpha.

Shapes: F features, C channels, R the rank of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fastsd.config.schema import LoraTable
from fastsd.config.stages import COMPONENTS
from fastsd.errors import UserError
from fastsd.model import recompute
from fastsd.model.matmul import LayerTensors
from fastsd.model.model import Model
from fastsd.model.select import matches, uniform_like
from fastsd.model.weights import classic_text_name, diffusers_views
from fastsd_kernels.noise import Purpose

NamedTensors = Mapping[str, Mapping[str, Tensor]]  # component -> parameter name -> tensor
ADAPTER_NAME = "default"  # peft's name for the only adapter


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter.

    Attributes:
        blocks: for each projection of the weight, the name of its module in files, or "" if it gets no adapter.
        ndim: the number of dimensions of the weight in files: 4 for a 1x1 convolution, although the UNet has a linear there.
        is_3x3: True for a 3x3 convolution.
    """

    blocks: tuple[str, ...]
    ndim: int
    is_3x3: bool

    @property
    def modules(self) -> list[str]:
        return [block for block in self.blocks if block]


class Adapted(nn.Module, LoraLayer):
    """A linear or convolution `base_layer` with adapters. peft replaces the layer by it.

    Attributes:
        lora_A: a dict whose only entry is down, shape (n R, F_in), or (n R, C, 3, 3) for a 3x3 convolution.
        lora_B: a dict whose only entry is up, shape (n F, R).
    """

    base_layer: Any
    lora_A: Any
    lora_B: Any

    def __init__(self, base: nn.Linear | nn.Conv2d, target: Target, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base)
        self.target, self.count = target, len(target.modules)
        self.r[ADAPTER_NAME], self.lora_alpha[ADAPTER_NAME], self.scaling[ADAPTER_NAME] = rank, alpha, alpha / rank
        outputs, inputs, *kernel = base.weight.shape
        down = base.weight.new_zeros(self.count * rank, inputs, *(kernel if target.is_3x3 else []))
        if target.is_3x3:
            down = down.to(memory_format=torch.channels_last)
        up = base.weight.new_zeros(self.count * outputs // len(target.blocks), rank)
        self.lora_A, self.lora_B = nn.ParameterDict({ADAPTER_NAME: down}), nn.ParameterDict({ADAPTER_NAME: up})

    def operands(self) -> LayerTensors:
        """Return the layer's tensors. Each up is multiplied by alpha / rank."""
        up = self.lora_B[ADAPTER_NAME]
        if self.scaling[ADAPTER_NAME] != 1:
            up = self.scaling[ADAPTER_NAME] * up
        ups = iter(up.chunk(self.count))
        ups_or_none = tuple(next(ups) if block else None for block in self.target.blocks)
        return LayerTensors(self.base_layer.weight, self.base_layer.bias, self.lora_A[ADAPTER_NAME], ups_or_none)

    def forward(self, x: Tensor) -> Tensor:
        layer, conv = self.operands(), self.base_layer
        if layer.weight.ndim == 2:
            return recompute.linear(x, layer)
        (up,) = layer.ups
        assert layer.down is not None and up is not None
        reduced = F.conv2d(x, layer.down, stride=conv.stride, padding=conv.padding)
        return conv(x) + F.conv2d(reduced, up[:, :, None, None])

    def views(self, letter: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name without component, view) of each file entry of `tensor`, which is or resembles lora_A or lora_B."""
        for module, view in zip(self.target.modules, tensor.chunk(self.count), strict=True):
            yield f"{module}.lora_{letter}.weight", view[(...,) + (None,) * (self.target.ndim - view.ndim)]


def add_lora(model: Model, table: LoraTable, seed: int) -> None:
    """Add adapters to a model that has none. Its predictions do not change. `table.file` is not read.

    Args:
        seed: the down matrices are a function of (seed, name in files). They are uniform within 1 / sqrt(fan in), as in peft.

    Raises:
        UserError: a target matches no layer, or no target matches a layer of a component.
    """
    assert model.lora is None
    components = COMPONENTS if table.text_encoder else COMPONENTS[:1]
    targets_by_component = {component: _targets(model, component, table) for component in components}
    _check_targets(table, targets_by_component)
    for component, (targets, _) in targets_by_component.items():
        _inject(model.component(component), targets, table)
    model.lora = table
    for name, down in lora_state_dict(model).items():
        if ".lora_A." in name and not down.is_meta:
            down.copy_(uniform_like(down, seed, Purpose.ADAPTER, name) / math.sqrt(down[0].numel()))


def _inject(module: nn.Module, targets: Mapping[str, Target], table: LoraTable) -> None:
    target_by_layer = {module.get_submodule(path): target for path, target in targets.items()}

    def adapt(base: Any, _: str, *, r: int, lora_alpha: float, **others: Any) -> Adapted:
        return Adapted(base, target_by_layer[base], r, lora_alpha)

    # The last part of the path is enough as a pattern: no linear is called conv1, conv2, conv, conv_in or conv_out.
    conv_names = sorted({path.rpartition(".")[2] for path, target in targets.items() if target.is_3x3})
    config = LoraConfig(
        r=table.rank,
        lora_alpha=cast(int, table.alpha or table.rank),
        target_modules=sorted(targets),
        rank_pattern=dict.fromkeys(conv_names, table.conv),
        alpha_pattern=dict.fromkeys(conv_names, table.conv_alpha or table.alpha or table.conv),
    )
    config._register_custom_module({nn.Module: cast(type[nn.Module], adapt)})
    inject_adapter_in_model(config, module, ADAPTER_NAME)


def _targets(model: Model, component: str, table: LoraTable) -> tuple[dict[str, Target], set[str]]:
    """Return the layers of a component that get adapters (module path -> `Target`), and the patterns that match a layer."""
    usable = model.trainable(component)
    targets: dict[str, Target] = {}
    untargeted_convs: dict[str, Target] = {}
    matched_patterns: set[str] = set()
    for path, layer in model.component(component).named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or f"{path}.weight" not in usable:
            continue
        is_3x3 = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        if is_3x3 and not table.conv:
            continue
        views = dict(_file_views(component, f"{path}.weight", layer.weight))
        patterns_by_name = {name: {p for p in table.targets if matches(component, p, name)} for name in views}
        matched_patterns.update(*patterns_by_name.values())
        blocks = tuple(name.removesuffix(".weight") if patterns else "" for name, patterns in patterns_by_name.items())
        target = Target(blocks, next(iter(views.values())).ndim, is_3x3)
        if any(blocks):
            targets[path] = target
        elif is_3x3 and path not in ("conv_in", "conv_out"):
            untargeted_convs[path] = replace(target, blocks=(path,))

    if not any(target.is_3x3 for target in targets.values()):
        targets |= untargeted_convs  # no target names a 3x3 convolution, so all but the first and the last get an adapter
    return targets, matched_patterns


def _check_targets(table: LoraTable, targets_by_component: Mapping[str, tuple[dict[str, Target], set[str]]]) -> None:
    """Raise UserError if a target matches no layer, or if no target matches a layer of a component."""
    labels = {component: f"the {component.replace('_', ' ')}" for component in targets_by_component}
    for pattern in table.targets:
        if not any(pattern in matched_patterns for _, matched_patterns in targets_by_component.values()):
            convolutions = "" if table.conv else ", or set model.lora.conv for 3x3 convolutions"
            raise UserError(
                "lora-target",
                f"model.lora.targets has {pattern!r}, which matches no linear layer of {' or '.join(labels.values())}; "
                f'use a group such as "attention", or a diffusers layer name such as "to_q"{convolutions}',
            )
    for component, (targets, _) in targets_by_component.items():
        if not targets:
            raise UserError(
                "lora-target-component",
                f"model.lora.targets is {', '.join(table.targets)}, which matches no layer of {labels[component]}; "
                'add a matching target, for example "attention"',
            )


def _file_views(component: str, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the names that a parameter has in its component's file, each with the view of the tensor that it stands for."""
    yield from diffusers_views(name, tensor) if component == "unet" else [(classic_text_name(name), tensor)]


def adaptable_layers(model: Model, component: str) -> list[str]:
    """Return the layers of a component that can have an adapter, with their names in files."""
    return [
        name.removesuffix(".weight")
        for path, layer in model.component(component).named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        for name, _ in _file_views(component, f"{path.removesuffix('.base_layer')}.weight", layer.weight)
    ]


def adapted_layers(model: Model, component: str) -> list[tuple[str, Adapted]]:
    return [(path, layer) for path, layer in model.component(component).named_modules() if isinstance(layer, Adapted)]


def lora_state_dict(model: Model, tensors: NamedTensors | None = None) -> dict[str, Tensor]:
    """Return all adapters under their names in files, as detached views.

    Args:
        tensors: used in place of the parameters, for example the fp32 masters or the EMA.
    """
    state: dict[str, Tensor] = {}
    for component in COMPONENTS:
        replacements = (tensors or {}).get(component, {})
        for path, layer in adapted_layers(model, component):
            for letter, parameters in (("A", layer.lora_A), ("B", layer.lora_B)):
                tensor = replacements.get(f"{path}.lora_{letter}.{ADAPTER_NAME}", parameters[ADAPTER_NAME])
                state |= {f"{component}.{name}": view for name, view in layer.views(letter, tensor.detach())}
    return state


@torch.no_grad()
def merge_lora(model: Model) -> None:
    """Add the adapters to the weights, rounding once, and remove them from the model."""
    for component in COMPONENTS:
        for path, layer in adapted_layers(model, component):
            weight, _, down, ups = layer.operands()
            assert weight.dtype == torch.float32 and down is not None
            downs = iter(down.double().flatten(1).chunk(layer.count))
            for block, up in zip(weight.chunk(len(ups)), ups, strict=True):
                if up is not None:
                    block.copy_(block.double() + (up.double() @ next(downs)).view_as(block))
            model.component(component).set_submodule(path, layer.base_layer)
        vars(model.component(component)).pop("peft_config", None)
    model.lora = None
