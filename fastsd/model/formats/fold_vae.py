"""Fold a VAE's latent space into its weights, for tools that know one factor and no shift.

Single-file loaders scale the latents of every VAE by F = 0.18215, and diffusers' StableDiffusionPipeline reads `scaling_factor`
alone. Let f and s be the scale and the shift of a channel (`latent_space.py`), and r = f / F, all of them per channel:

    encoder   z = (m - s) f = m' F,  m' = r (m - s)   quant_conv, mean: weight' = r weight (by row), bias' = r (bias - s)
              logvar' = logvar + 2 ln |r|             quant_conv, logvar: bias' = bias + 2 ln |r|
    decoder   x = z / f + s = x' / r + s,  x' = z / F post_quant_conv: weight' = weight / r (by column), bias' = bias + weight s

Both layers are 1x1 convolutions without padding, so folding is exact for every space that shifts and scales its channels,
except that log variances are clamped to [-30, 20] after folding instead of before. A VAE without these layers, such as SD3's,
first gets identities, because the layout requires the layers. Folding s into a padded 3x3 convolution instead would be wrong at
the border.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import UserError
from fastsd.model.latent_space import LatentSpace
from fastsd.storage import DTYPES, Stored, Tensors, as_tensor

UNFOLDED = "fastsd.vae_unfolded"  # header key of the text from `unfold_record`
_NAMES = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
_SETTINGS = (*LatentSpace().settings(), "use_quant_conv", "use_post_quant_conv")


def fold(config: dict[str, Any], tensors: Tensors, place: str) -> tuple[dict[str, Any], Tensors]:
    """Return the config and tensors of an equivalent VAE with factor 0.18215, no shift and no statistics.

    Raises:
        UserError: the latent space in the config is invalid.
    """
    old = _latent_convolutions(config, tensors)
    weight, bias, post_weight, post_bias = (old[name].double() for name in _NAMES)
    channels = post_weight.shape[1]
    target = LatentSpace()
    s_C, f_C = LatentSpace.of(config, place).per_channel(channels)
    r_C = f_C / target.factor
    r_C111 = r_C[:, None, None, None]
    new = {
        "quant_conv.weight": torch.cat([r_C111 * weight[:channels], weight[channels:]]),
        "quant_conv.bias": torch.cat([r_C * (bias[:channels] - s_C), bias[channels:] + 2 * r_C.abs().log()]),
        "post_quant_conv.weight": post_weight / r_C111[:, 0],
        "post_quant_conv.bias": post_bias + post_weight[:, :, 0, 0] @ s_C,
    }
    settings = {key: value for key, value in target.settings().items() if key in config or not key.startswith("latents_")}
    settings |= {"use_quant_conv": True, "use_post_quant_conv": True}
    return {**config, **settings}, {**tensors, **{name: tensor.float() for name, tensor in new.items()}}


def _latent_convolutions(config: dict[str, Any], tensors: Tensors) -> dict[str, Tensor]:
    """Return the weights of the two 1x1 convolutions next to the latents. A missing convolution is an identity."""
    convolutions = {name: as_tensor(tensors[name]) for name in _NAMES if name in tensors}
    channels = config.get("latent_channels", 4)
    for name, count in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        convolutions.setdefault(f"{name}.weight", torch.eye(count)[:, :, None, None])
        convolutions.setdefault(f"{name}.bias", torch.zeros(count))
    return convolutions


def unfold_record(config: dict[str, Any], tensors: Tensors) -> str:
    """Return header text from which `unfold` restores the unfolded tensors and settings bit for bit."""
    encoded = {}
    for name in _NAMES:
        if name in tensors:
            tensor = as_tensor(tensors[name])
            data = base64.b64encode(tensor.flatten().view(torch.uint8).numpy().tobytes()).decode()
            encoded[name] = [DTYPES[tensor.dtype], list(tensor.shape), data]
    return json.dumps({"config": {key: config[key] for key in _SETTINGS if key in config}, "tensors": encoded})


def unfold(config: dict[str, Any], tensors: Tensors, text: str) -> tuple[dict[str, Any], Tensors] | None:
    """Return the config and tensors that a VAE had before `fold`, or None if its tensors have changed since then.

    A model that is written to a file and read back therefore has the same latents and can keep its latent cache.
    """
    try:
        record = json.loads(text)
        dtypes = {label: dtype for dtype, label in DTYPES.items()}
        originals: dict[str, Tensor | Stored] = {
            name: torch.frombuffer(bytearray(base64.b64decode(data)), dtype=dtypes[label]).view(shape)
            for name, (label, shape, data) in record["tensors"].items()
        }
        other_tensors = {name: tensor for name, tensor in tensors.items() if name not in _NAMES}
        unfolded_config = {key: value for key, value in config.items() if key not in _SETTINGS} | record["config"]
        refolded = fold(unfolded_config, other_tensors | originals, "")[1]
        pairs = [(as_tensor(tensors[name]), as_tensor(refolded[name])) for name in _NAMES]
        is_unchanged = all(torch.equal(tensor, folded.to(tensor.dtype)) for tensor, folded in pairs)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, UserError):
        return None
    return (unfolded_config, other_tensors | originals) if is_unchanged else None
