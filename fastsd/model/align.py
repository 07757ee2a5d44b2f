"""Align a UNet's edge layers (its first and last convolution) with another VAE's latents by a linear map.

x are scaled latents of the VAE that the UNet was trained on. y are those of another VAE for the same images and positions.
The UNet was trained on x_t = a x + b n with a = sqrt(abar_t), b = sqrt(1 - abar_t) and white noise n. It will receive
y_t = a y + b e. Both convolutions are linear, so a linear map from y_t to x_t is folded into the first and its inverse into
the last. Shapes and speed stay the same. With x ~ A y + c, A y_t + a c is about a x + b A e. Predictions have hats:

    x^ = (x_t - b n^) / a,  y^ = (y_t - b e^) / a,  x^ = A y^ + c      =>   e^ = A^-1 n^
    v = a e - b x                                                      =>   v^_y = A^-1 v^_x + b A^-1 c

plain        No map. If one space has more channels than the other, the extra channels get zero weights.
orthogonal   A = Q with Q^T Q = 1, closest to x over all positions (Schoenemann 1966: U V^T of the cross-covariance's SVD).
             Exact: the noise, because Q e is as white as e at every timestep; and the part of x that equals Q y.
             Approximate: the rest of x, mainly a stretch of the space; the offset, see below.
affine       A by least squares with a ridge towards Q; its inverse in the last convolution.
             Exact: the linear part of the map, so it maps images without noise more closely.
             Approximate: the noise A e is stronger in some directions and weaker in others than in the UNet's training. Do
             not use it if A is far from orthogonal, or for training on noisy timesteps only.
kernel       A 3x3 kernel in the first convolution, by least squares from patches of y_t to patches of x_t = a x + b Q e, of
             images and noise at all timesteps. The noise acts as a ridge towards Q. The last convolution is fitted again by
             least squares from the UNet's own last features to the target, with a ridge towards Q^T conv_out (`refit_last`).
             Exact: nothing, not even what Q maps exactly. This fit has the smallest error on the data it was fitted to, but
             9 F + 1 unknowns per output channel. Do not use it with few images, or with images unlike the training images.

All fits share these limits. The offset enters x_t as a c, which changes with t, but a bias is constant. The bias is E_t[a] c,
the least-squares value over uniform timesteps (for v, likewise b A^-1 c in the last convolution). At the border the UNet pads
x_t with zeros, but the bias adds c there too; only the kernel fit accounts for that. Every fit is one linear map of a
position or its neighbours. Spaces without such a relation (R^2 well below 0.9), or with another downscale, need training.
If channel counts differ, Q and A are rectangular. If y has fewer, nothing changes above. If y has more (D > C):

Q            Q Q^T = 1, closest to x. Then |Q y|^2 depends on Q, so the singular vectors of the cross-covariance are not the
             answer; `_widening` iterates to it (Nie, Zhang, Li 2017, "A generalized power iteration method for solving
             quadratic problem on the Stiefel manifold"). Exact: Q e is white. Directions in which y hardly varies add the
             noise that stretched directions lack, so x is approximated far better than by those singular vectors.
the rest     w = N y, where the D - C rows of N complete those of Q, and e = Q^T n + N^T e_w. Q^T n^ maps what the base
             predicts. e_w needs y_t itself: with w ~ M x + m + r, the best linear estimate is

                 e_w^ = b (a^2 Cov(r) + b^2)^-1 (w_t - M (x_t - b n^) - a m)

             Only the kernel fit can estimate it. It carries y_t past all blocks to the last convolution (`bypass`), and
             `refit_last` reads both y_t and n^ there, by least squares over images, noise and timesteps: the noise's own best
             estimate from the features. Approximate: the coefficients above change with t, but a convolution's do not; the
             base loses some of its last features. All other fits predict no noise outside of Q.

Shapes: B images, C channels of x, D of y, H x W positions. Patches are 3x3, flattened channel first like convolution weights:
9 C or 9 D numbers. F features enter the last convolution. K columns of N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsd.model.unet import UNet

RIDGE = 1e-7  # ridge of the affine fit, as a multiple of the mean variance of y
LAST_RIDGE = 1e-3  # ridge of the fit of conv_out, as a multiple of the mean variance of a feature
CARRIED_RIDGE = 1e-6  # the same if y_t is among the features: the other features must not be drawn to the base's weights
# Weights and biases of conv_in and conv_out by name, and of other layers that a fit changes, in fp64 on the CPU.
EdgeLayers = dict[str, Tensor]


class Moments:
    """The mean and the covariance of rows that are added in batches. Sums are in fp64."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._sum_K = torch.zeros(columns, dtype=torch.float64, device=device)
        self._gram_KK = torch.zeros(columns, columns, dtype=torch.float64, device=device)

    def add(self, rows_NK: Tensor) -> None:
        """Add a batch of rows. Products are computed in the dtype of the rows."""
        self.count += len(rows_NK)
        self._sum_K += rows_NK.sum(0, dtype=torch.float64)
        self._gram_KK += rows_NK.T @ rows_NK

    @property
    def mean(self) -> Tensor:
        return self._sum_K / self.count

    @property
    def covariance(self) -> Tensor:
        return self._gram_KK / self.count - torch.outer(self.mean, self.mean)


def patches(z_BCHW: Tensor) -> Tensor:
    """Return the 3x3 patch around each position, (B H W, 9 C). Beyond the border it is zero."""
    return F.unfold(z_BCHW, 3, padding=1).transpose(1, 2).flatten(0, 1)


class Pairs:
    """The moments of the patches of x and y.

    Attributes:
        mean_x, mean_y: means (9 C) and (9 D).
        xx, xy, yy: covariances (9 C, 9 C), (9 C, 9 D) and (9 D, 9 D).
        inside: for each of the 9 places of a patch, the share of patches in which it lies within the image, (9).
    """

    def __init__(self, x_BCHW: Tensor, y_BDHW: Tensor) -> None:
        self.channels = x_BCHW.shape[1], y_BDHW.shape[1]
        moments = Moments(9 * (sum(self.channels) + 1))
        for x_CHW, y_DHW in zip(x_BCHW.double(), y_BDHW.double(), strict=True):  # patches of one image at a time
            moments.add(patches(torch.cat([x_CHW, y_DHW, torch.ones_like(x_CHW[:1])])[None]))
        sizes = [9 * self.channels[0], 9 * self.channels[1], 9]
        self.mean_x, self.mean_y, self.inside = moments.mean.split(sizes)
        rows_x, rows_y, _ = moments.covariance.split(sizes)
        self.xx, self.xy, _ = rows_x.split(sizes, 1)
        self.yy = rows_y.split(sizes, 1)[1]

    def centres(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the moments of single positions: xy (C, D), yy (D, D), mean_x (C), mean_y (D)."""
        return self.xy[4::9, 4::9], self.yy[4::9, 4::9], self.mean_x[4::9], self.mean_y[4::9]

    def r2(self, fit: Fit) -> list[float]:
        """Return the share of the variance that a fit predicts from y without noise, for each channel of x."""
        to_x, xx, xy = fit.to_x[4::9], self.xx[4::9, 4::9], self.xy[4::9]
        residual = xx - to_x @ xy.T - xy @ to_x.T + to_x @ self.yy @ to_x.T
        return (1 - residual.diagonal() / xx.diagonal()).tolist()


@dataclass(frozen=True)
class Schedule:
    """Means over uniform timesteps, and the kind of prediction.

    Attributes:
        signal, noise, power: the means of a, of b and of a^2.
        velocity: True if the UNet predicts v.
    """

    signal: float
    noise: float
    power: float
    velocity: bool

    @classmethod
    def of(cls, alphas_cumprod_T: Tensor, prediction: str) -> Schedule:
        abar_T = alphas_cumprod_T.double()
        signal, noise, power = (values.mean().item() for values in (abar_T.sqrt(), (1 - abar_T).sqrt(), abar_T))
        return cls(signal, noise, power, prediction == "v_prediction")


@dataclass(frozen=True)
class Fit:
    """The maps to fold into the two edge layers.

    Attributes:
        to_x, offset: matrix (9 C, 9 D) and offset (9 C) that map patches of y_t to patches of x_t.
        to_y, shift: matrix (D, C) and offset (D) that map n or v of x to that of y.
        A, c: matrix (C, D) and offset (C) of x ~ A y + c if the fit maps single positions, otherwise None.
    """

    to_x: Tensor
    offset: Tensor
    to_y: Tensor
    shift: Tensor
    A: Tensor | None = None
    c: Tensor | None = None


def fit_plain(channels: int, new_channels: int) -> Fit:
    """Map channel i to channel i."""
    return _pointwise(torch.eye(channels, new_channels), torch.zeros(channels), Schedule(0, 0, 0, velocity=False))


def fit_orthogonal(pairs: Pairs, schedule: Schedule) -> Fit:
    """Fit Q by "A generalized solution of the orthogonal Procrustes problem" (Schoenemann 1966), or by `_widening`. c follows
    from the means."""
    Q, _, _, mean_x, mean_y = _procrustes(pairs)
    return _pointwise(Q, mean_x - Q @ mean_y, schedule)


def fit_affine(pairs: Pairs, schedule: Schedule) -> Fit:
    """Fit A and c that minimise mean |x - A y - c|^2 + r |A - Q|^2. r is `RIDGE` times the mean variance of y's channels."""
    Q, xy, yy, mean_x, mean_y = _procrustes(pairs)
    r = RIDGE * yy.diagonal().mean()
    A = torch.linalg.solve(yy + r * torch.eye(len(yy)), xy + r * Q, left=False)
    return _pointwise(A, mean_x - A @ mean_y, schedule)


def fit_kernel(pairs: Pairs, schedule: Schedule) -> Fit:
    """Fit a map from patches of y_t = a y + b e to patches of x_t = a x + b Q e, by least squares over data and timesteps.

    The noise e is white and, like all other inputs, zero beyond the border. With E as the mean over timesteps:

        Cov(x_t, y_t) = E[a^2] (Cov(x, y) + mean_x mean_y^T) - E[a]^2 mean_x mean_y^T + E[b^2] Q (x) diag(inside)
    """
    Q, *_ = _procrustes(pairs)

    def noisy_moment(covariance: Tensor, mean: Tensor, mean_y: Tensor, noise: Tensor) -> Tensor:
        spread = schedule.power * covariance + (schedule.power - schedule.signal**2) * torch.outer(mean, mean_y)
        return spread + (1 - schedule.power) * torch.kron(noise, pairs.inside.diag())

    xy = noisy_moment(pairs.xy, pairs.mean_x, pairs.mean_y, Q)
    yy = noisy_moment(pairs.yy, pairs.mean_y, pairs.mean_y, torch.eye(len(Q.T)))
    to_x = torch.linalg.solve(yy, xy, left=False)
    offset = schedule.signal * (pairs.mean_x - to_x @ pairs.mean_y)
    return replace(fit_orthogonal(pairs, schedule), to_x=to_x, offset=offset, A=None, c=None)


def _procrustes(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return Q (C, D) and the results of `Pairs.centres`."""
    xy, yy, mean_x, mean_y = pairs.centres()
    U, _, V = torch.linalg.svd(xy, full_matrices=False)
    Q = U @ V if len(yy) <= len(xy) else _widening(U @ V, xy, yy)
    return Q, xy, yy, mean_x, mean_y


def _widening(Q: Tensor, xy: Tensor, yy: Tensor, steps: int = 2000) -> Tensor:
    """Return Q (C, D), D > C, with Q Q^T = 1 that minimises mean |x - Q y|^2 near a given Q. Every step lowers the error."""
    bound = torch.linalg.eigvalsh(yy)[-1] * torch.eye(len(yy)) - yy
    for _ in range(steps):
        U, _, V = torch.linalg.svd(Q @ bound + xy, full_matrices=False)
        Q, previous = U @ V, Q
        if (Q - previous).abs().max() < 1e-9:
            break
    return Q


def _pointwise(A: Tensor, c: Tensor, schedule: Schedule) -> Fit:
    """Return the fit of x ~ A y + c at single positions."""
    A, c = A.double(), c.double()
    to_y = torch.linalg.pinv(A)
    shift = schedule.noise * to_y @ c * schedule.velocity
    return Fit(torch.kron(A, torch.eye(9)), schedule.signal * c.repeat_interleave(9), to_y, shift, A, c)


def edge_layers(unet: UNet) -> EdgeLayers:
    """Copy the weights and biases of the edge layers."""
    parameters = dict(unet.named_parameters())
    names = ("conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias")
    return {name: parameters[name].detach().cpu().double() for name in names}


def fold_into_edges(layers: EdgeLayers, fit: Fit) -> EdgeLayers:
    """Return edge layers for a UNet that takes y_t and predicts e or v of y. The given `layers` take x_t."""
    in_weight_FP = layers["conv_in.weight"].flatten(1)
    return layers | {
        "conv_in.weight": (in_weight_FP @ fit.to_x).unflatten(1, (-1, 3, 3)),
        "conv_in.bias": layers["conv_in.bias"] + in_weight_FP @ fit.offset,
        "conv_out.weight": torch.einsum("dc,cfij->dfij", fit.to_y, layers["conv_out.weight"]),
        "conv_out.bias": fit.to_y @ layers["conv_out.bias"] + fit.shift,
    }


def reading_features(layers: EdgeLayers) -> EdgeLayers:
    """Return `layers` with an identity as the last convolution. The UNet then returns its features (B, F, H, W)."""
    weight = layers["conv_out.weight"]
    identity = nn.init.dirac_(torch.empty(weight.shape[1], *weight.shape[1:], dtype=weight.dtype))
    return layers | {"conv_out.weight": identity, "conv_out.bias": torch.zeros(len(identity), dtype=weight.dtype)}


def refit_last(layers: EdgeLayers, moments: Moments, ridge: float = LAST_RIDGE) -> EdgeLayers:
    """Return `layers` with a last convolution w fitted by least squares from features to targets.

    The fit minimises mean |target - w * features|^2 + r |w - w_0|^2 over w and its bias. w_0 is the weight in `layers`, and r
    is `ridge` times the mean variance of a feature.

    Args:
        moments: the moments of rows with 9 F + D columns: a patch of features, followed by its target.
    """
    initial_DP = layers["conv_out.weight"].flatten(1)
    P = initial_DP.shape[1]  # 9 F
    covariance, mean = moments.covariance.cpu(), moments.mean.cpu()
    features_PP, cross_PD = covariance[:P, :P], covariance[:P, P:]
    r = ridge * features_PP.diagonal().mean()
    weight_DP = torch.linalg.solve(features_PP + r * torch.eye(P), cross_PD + r * initial_DP.T).T
    bias = mean[P:] - weight_DP @ mean[:P]
    return layers | {"conv_out.weight": weight_DP.unflatten(1, (-1, 3, 3)), "conv_out.bias": bias}


@torch.no_grad()
def put(unet: UNet, layers: EdgeLayers) -> None:
    """Install edge layers in a UNet, in its dtype and on its device, and update the channel counts in its config."""
    old = unet.conv_in.weight
    for name in ("conv_in", "conv_out"):
        weight, bias = layers[f"{name}.weight"], layers[f"{name}.bias"]
        conv = nn.utils.skip_init(nn.Conv2d, *weight.shape[1::-1], 3, padding=1, device=old.device, dtype=old.dtype)
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        setattr(unet, name, conv.to(memory_format=torch.channels_last))
    for name in layers.keys() - {"conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias"}:
        unet.get_parameter(name).copy_(layers[name])
    unet.cfg = replace(unet.cfg, in_channels=unet.conv_in.in_channels, out_channels=unet.conv_out.out_channels)
