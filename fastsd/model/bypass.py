"""Carry the latents of a wider VAE past all blocks of a UNet, to its last convolution.

A UNet of C latent channels predicts noise in C directions. If an aligned start (`align`) has D > C, the noise in the other
D - C directions can be estimated only from y_t itself, and no block of the base passes that on. The skip connection from the
first convolution to the last resnet does:

conv_in         writes y_t - E[a] mean_y into D directions U of its F features, in place of the base's own part there. U are the
                directions in which the base's features of x_t vary least. With F >= 9 C + D, as in SD1.5, they do not vary at
                all, and the base loses nothing.
last resnet     Its shortcut, a 1x1 convolution, reads U^T features, which are exactly y_t - E[a] mean_y, and writes them into
                features that only they use: the other convolution and the attention after it no longer write there.
conv_norm_out   Those features are whole groups of the norm, so the base's other features keep theirs. The norm divides by the
                deviation, so that noise keeps unit variance at all timesteps, also in directions in which y hardly varies:
                (a y + b e) / b there. A bias of `SILU_BIAS` makes SiLU nearly linear: silu(z + 3) = z + 3 within 0.28 for
                |z| <= 3.
conv_out        is then fitted to all features (`align.refit_last`).

Approximate: the base loses the features of those groups. `spare_groups` selects the groups without which the base's own
features predict its target best, one after another, by the exact increase of the least-squares error (Hassibi, Stork 1992,
"Second order derivatives for network pruning: optimal brain surgeon", for groups of columns).

Shapes: C, D latent channels; F features of conv_in, and as many of the last block; P = 9 C numbers of a patch of x_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsd.model.align import EdgeLayers, Moments, Pairs, Schedule
from fastsd.model.unet import UNet, UNetConfig

GAIN = 0.15  # deviation of a direction per unit of y_t, as a multiple of that of a feature of x_t: it hardly disturbs the base
SILU_BIAS = 3.0
SPARE_RIDGE = 1e-6  # ridge of the fits that select groups, as a multiple of the mean variance of a feature


def groups_for(cfg: UNetConfig, channels: int) -> int:
    """Return the number of norm groups that hold so many channels, or 0 if the base would lose more than half of its own."""
    features = cfg.block_out_channels[0]
    count = -(-channels * cfg.norm_groups // features)
    return count if 2 * count <= cfg.norm_groups and 2 * channels <= features else 0


def last_layers(unet: UNet) -> EdgeLayers:
    """Copy the layers between conv_in's skip connection and conv_out, in fp64 on the CPU."""
    level = f"up_blocks.{len(unet.up_blocks) - 1}"
    last = unet.cfg.layers_per_block
    modules = [f"{level}.resnets.{last}.conv2", f"{level}.resnets.{last}.conv_shortcut", "conv_norm_out"]
    modules += [f"{level}.attentions.{last}.proj_out"] * unet.cfg.attention[0]
    names = [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return {name: unet.get_parameter(name).detach().cpu().double() for name in names}


def spare_groups(moments: Moments, features: int, norm_groups: int, count: int) -> list[int]:
    """Return the norm groups without which the last convolution fits its targets best.

    Args:
        moments: the moments of rows with 9 F columns, a patch of features, followed by those of the targets.
        features: F.
    """
    columns = 9 * features
    covariance = moments.covariance.cpu()
    gram, cross = covariance[:columns, :columns], covariance[:columns, columns:]
    ridge = SPARE_RIDGE * gram.diagonal().mean() * torch.eye(columns, dtype=gram.dtype)
    inverse = torch.linalg.inv(gram + ridge)
    kept, size, selected = torch.arange(columns), columns // norm_groups, list[int]()
    for _ in range(count):
        weights, group_of = inverse @ cross[kept], kept // size
        increases = {group: _increase(inverse, weights, group_of == group) for group in group_of.unique().tolist()}
        selected.append(min(increases, key=lambda group: increases[group]))
        gone, stays = group_of == selected[-1], group_of != selected[-1]
        lost = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stays])
        inverse, kept = inverse[stays][:, stays] - inverse[stays][:, gone] @ lost, kept[stays]
    return sorted(selected)


def _increase(inverse: Tensor, weights: Tensor, columns: Tensor) -> float:
    """Return by how much the error of a least-squares fit grows without some columns."""
    return (weights[columns] * torch.linalg.solve(inverse[columns][:, columns], weights[columns])).sum().item()


def carry(
    layers: EdgeLayers, base: EdgeLayers, pairs: Pairs, schedule: Schedule, groups: list[int], norm_groups: int
) -> EdgeLayers:
    """Return `layers` that also carry y_t - E[a] mean_y to features of the last block, in the given norm groups.

    Args:
        layers: the first convolution takes y_t; with the layers of `last_layers`.
        base: the base's edge layers, which take x_t.
    """
    *_, mean_x, mean_y = pairs.centres()
    channels, in_weight_FP = len(mean_y), base["conv_in.weight"].flatten(1)
    white = torch.kron(torch.eye(len(mean_x)), pairs.inside.diag())
    features_FF = in_weight_FP @ (schedule.power * pairs.xx + (1 - schedule.power) * white) @ in_weight_FP.T
    directions_FD = torch.linalg.eigh(features_FF)[1][:, :channels]
    gain = GAIN * (features_FF.trace() / len(features_FF)).sqrt()

    def without_directions(tensor: Tensor) -> Tensor:
        return tensor - torch.einsum("fd,gd,g...->f...", directions_FD, directions_FD, tensor)

    changed = {name: tensor.clone() for name, tensor in layers.items() if not name.startswith("conv_out")}
    changed["conv_in.weight"] = without_directions(layers["conv_in.weight"])
    changed["conv_in.weight"][:, :, 1, 1] += gain * directions_FD
    changed["conv_in.bias"] = without_directions(layers["conv_in.bias"]) - gain * schedule.signal * directions_FD @ mean_y

    size = len(layers["conv_norm_out.weight"]) // norm_groups
    carried_F = torch.tensor([group * size + i for group in groups for i in range(size)])
    for name, tensor in changed.items():
        if not name.startswith("conv_in"):
            tensor[carried_F] = {"conv_norm_out.weight": 1.0, "conv_norm_out.bias": SILU_BIAS}.get(name, 0.0)
    shortcut = next(tensor for name, tensor in changed.items() if name.endswith("conv_shortcut.weight"))
    shortcut[carried_F[:channels], -len(directions_FD) :, 0, 0] = directions_FD.T / gain
    return layers | changed
