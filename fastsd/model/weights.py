"""Convert between the UNet's parameters and weights with diffusers' names, without changing a bit.

There are three differences. Our UNet fuses q/k/v of self-attention into one weight, and k/v of cross-attention into one weight.
The projections around a transformer are 1x1 convolutions in diffusers. Read next: `fastsd/model/formats/load.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastsd.errors import UserError
from fastsd.model.unet import UNet, UNetConfig
from fastsd.storage import Tensors, as_tensor, check_finite
from fastsd.terminal.console import work

FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
MAX_LAYERS = 1000  # the largest number of layers that a config may request; SD1.5's text encoder has 12
ADAPTER = ".lora_"  # a text that only the names of adapter parameters contain


def plain_name(name: str) -> str:
    """Return the name that a parameter would have without adapters. A layer with an adapter is one level deeper."""
    return name.replace(".base_layer.", ".")


def diffusers_views(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each diffusers name of a parameter, with the view of its rows in `tensor`. Adapters have no diffusers names."""
    if ADAPTER in name:
        return
    name = plain_name(name)
    *parents, module, leaf = name.split(".")
    if module in FUSED:
        projections = FUSED[module]
        for projection, view in zip(projections, tensor.chunk(len(projections)), strict=True):
            yield ".".join([*parents, projection, leaf]), view
    elif module in ("proj_in", "proj_out") and leaf == "weight":
        yield name, tensor[:, :, None, None]
    else:
        yield name, tensor


def diffusers_names(name: str) -> list[str]:
    """Return the diffusers names of a parameter of `UNet`: one, or two or three for a fused weight, or none for an adapter."""
    return [file_name for file_name, _ in diffusers_views(name, torch.empty(6, 1, device="meta"))]


def diffusers_state_dict(unet: UNet, *, grad: bool = False, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the parameters, or their gradients, under diffusers' names (686 for SD1.5).

    The tensors are detached views of the module's memory: nothing is copied, and later steps change them.

    Args:
        grad: return gradients. Parameters without a gradient are omitted.
        tensors: used in place of the parameters of the same name, for example the fp32 masters of a bf16 module.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in unet.named_parameters():
        tensor = parameter.grad if grad else (tensors or {}).get(name, parameter)
        if tensor is not None:
            state.update(diffusers_views(name, tensor.detach()))
    return state


def load_diffusers_unet(unet: UNet, state_dict: Tensors, place: str = "unet") -> None:
    """Copy weights with diffusers' names into `unet`, and convert them to its dtype. All names and shapes are checked first.

    Raises:
        UserError: a name is missing or unexpected, a shape differs, or a number is not finite. The message begins with `place`.
    """
    copy_tensors(diffusers_state_dict(unet), state_dict, place)


@torch.no_grad()
def copy_tensors(targets: Mapping[str, Tensor], sources: Tensors, place: str) -> None:
    """Copy tensors into the targets of the same name, with the checks of `load_diffusers_unet`."""
    check_names(targets, sources, place)
    with work(f"loading {place}", sum(target.nbytes for target in targets.values()), "bytes") as loading:
        for name, target in targets.items():
            tensor = as_tensor(sources[name])
            check_finite(name, tensor, place)
            target.copy_(tensor)
            loading.add(target.nbytes)


def empty_component(component: str, config: dict[str, Any], place: str) -> nn.Module:
    """Build the module that a config describes, without data.

    Args:
        component: "unet", "vae" or "text_encoder". `config` is its config.json, found at `place`.

    Raises:
        UserError: the config describes another kind of model, or is invalid.
    """
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    if component == "vae" and config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise UserError("not-a-vae", f"{place}: _class_name is {config['_class_name']}; give an AutoencoderKL")
    for key in ("num_hidden_layers", "layers_per_block", "block_out_channels"):
        value = config.get(key)
        count = len(value) if isinstance(value, list) else value
        if isinstance(count, int) and count > MAX_LAYERS:
            raise UserError(
                "layer-count", f"{place}: {key} requests {count} layers, more than {MAX_LAYERS}; give an SD1.5 model"
            )
    try:
        with torch.device("meta"):
            if component == "unet":
                return UNet(UNetConfig.from_diffusers(config, place))
            if component == "vae":
                return cast(nn.Module, AutoencoderKL.from_config(config))
            return cast(nn.Module, CLIPTextModel(CLIPTextConfig.from_dict(config)))
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types of errors for an invalid config
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            "config-of-other-component", f"{place}: invalid {component.replace('_', ' ')} config ({reason}); download it again"
        ) from None


# What `expected_tensors` has built: each export asks again for the same model.
_EXPECTED: dict[tuple[str, str], dict[str, Tensor]] = {}


def expected_tensors(component: str, config: dict[str, Any], place: str) -> dict[str, Tensor]:
    """Return the tensors, without data, that a config requires, under their names in the component's file."""
    key = component, repr(config)
    if key not in _EXPECTED:
        module = empty_component(component, config, place)
        if component == "unet":
            _EXPECTED[key] = diffusers_state_dict(cast(UNet, module))
        else:
            name_of = classic_text_name if component == "text_encoder" else str
            _EXPECTED[key] = {name_of(name): tensor for name, tensor in module.state_dict().items()}
    return dict(_EXPECTED[key])


def check_names(
    expected: Mapping[str, Tensor], tensors: Tensors, place: str, advice: str = "give weights that match the config"
) -> None:
    """Raise UserError unless `tensors` are floating-point and have exactly the names and shapes of `expected`."""
    for name in expected.keys() & tensors.keys():
        if not tensors[name].dtype.is_floating_point:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise UserError(
                "weights-quantized", f"{place}: {name} is quantised to {dtype}; give weights in fp8, fp16, bf16 or fp32"
            )
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing or extra:
        kind, count = ("missing", f"{len(missing)} of {len(expected)}") if missing else ("unexpected", len(extra))
        raise UserError(
            "weights-names", f"{place}: tensors are {kind} ({count}, the first is {(missing or extra)[0]}); {advice}"
        )
    for name, target in expected.items():
        if target.shape != tensors[name].shape:
            raise UserError(
                "weights-shape",
                f"{place}: {name} has shape {tuple(tensors[name].shape)}, expected {tuple(target.shape)}; {advice}",
            )


def classic_text_name(name: str) -> str:
    """Return a CLIP text weight's name with the prefix `text_model.`, which transformers 5 omits and older loaders need."""
    return name if name.startswith("text_model.") else f"text_model.{name}"
