"""Fold a VAE's scaling factor and shift into its weights, for tools that assume the factor 0.18215.

Single-file loaders scale the latents of every VAE by F = 0.18215. Let f be the VAE's own factor, s its shift, and r = f / F:

    encoder   z = (m - s) f = m' F,  m' = r (m - s)        quant_conv, mean: weight' = r weight, bias' = r (bias - s)
              logvar' = logvar + 2 ln |r|                  quant_conv, logvar: bias' = bias + 2 ln |r|
    decoder   x = z / f + s = x' / r + s,  x' = z / F      post_quant_conv: weight' = weight / r, bias' = bias + s sum_in weight

Both layers are 1x1 convolutions without padding, so folding is exact, except that log variances are clamped to [-30, 20]
after folding instead of before. A VAE without these layers, such as SD3's, first gets identities, because the layout requires
the layers. Folding s into a padded 3x3 convolution instead would be wrong at the border.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import torch
from torch import Tensor

from fastsd.errors import UserError
from fastsd.model.vae import SD15_SCALING_FACTOR
from fastsd.storage import DTYPES, Stored, Tensors, as_tensor

UNFOLDED = "fastsd.vae_unfolded"  # header key of the text from `unfold_record`
_NAMES = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
_SETTINGS = ("scaling_factor", "shift_factor", "use_quant_conv", "use_post_quant_conv")


def factor_and_shift(config: dict[str, Any], place: str) -> tuple[float, float]:
    """Return the scaling factor and the shift in a VAE's config. Raise UserError, naming `place`, if they are not valid."""
    factor = SD15_SCALING_FACTOR if config.get("scaling_factor") is None else config["scaling_factor"]
    shift = 0.0 if config.get("shift_factor") is None else config["shift_factor"]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (factor, shift)) or not factor:
        raise UserError(
            "vae-factor", f"{place}: scaling_factor is {factor!r}, shift_factor is {shift!r}; give finite numbers, factor not 0"
        )
    return factor, shift


def fold(config: dict[str, Any], tensors: Tensors, place: str) -> tuple[dict[str, Any], Tensors]:
    """Return the config and tensors of an equivalent VAE with factor 0.18215 and no shift.

    Raises:
        UserError: the factor is invalid.
    """
    factor, shift = factor_and_shift(config, place)
    old = _latent_convolutions(config, tensors)
    r, channels = factor / SD15_SCALING_FACTOR, old["post_quant_conv.weight"].shape[1]
    weight, bias, post_weight, post_bias = (old[name].double() for name in _NAMES)
    new = {
        "quant_conv.weight": torch.cat([r * weight[:channels], weight[channels:]]),
        "quant_conv.bias": torch.cat([r * (bias[:channels] - shift), bias[channels:] + 2 * math.log(abs(r))]),
        "post_quant_conv.weight": post_weight / r,
        "post_quant_conv.bias": post_bias + shift * post_weight.sum((1, 2, 3)),
    }
    settings = {"scaling_factor": SD15_SCALING_FACTOR, "shift_factor": None}
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
            tensor = as_tensor(tensors[name]).contiguous()
            data = base64.b64encode(tensor.view(torch.uint8).numpy().tobytes()).decode()
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
