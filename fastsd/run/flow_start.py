"""The colours with which samples of a flow start: x_0 as predicted from pure noise (s = 1), beside the images of the captions.

A perfect flow predicts the mean of all images that a caption may have. Over captions, its mean by channel is therefore that of
the images, up to the standard error of the few that are measured. Its deviation is smaller: what captions do not say is
averaged. Grey for all captions is a mean that is wrong and a deviation near 0.

Shapes: n images, B images per forward, C latent channels, H x W positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FAR, FLAT = 0.1, 0.25  # of the images' deviation

Moments = Sequence[Sequence[Sequence[float]]]  # of n images: the means and the mean squares of their channels


def moments(x_BCHW: Tensor) -> Tensor:
    """Return the mean and the mean square of each image's channels, (B, 2, C)."""
    return torch.stack([x_BCHW.mean((2, 3)), x_BCHW.square().mean((2, 3))], dim=1)


def compared(predicted: Moments, images: Moments) -> dict[str, list[float]]:
    """Return "mean" and "deviation" by channel over all predictions, "data_mean" and "data_deviation" over the same images.

    "error" is the standard error of the difference of the two means. Sums are exact, so they do not depend on the order.
    """
    mean, deviation = _mean_and_deviation(predicted)
    data_mean, data_deviation = _mean_and_deviation(images)
    n, errors = len(images), []
    for c, difference in enumerate(a - b for a, b in zip(mean, data_mean, strict=True)):
        squares = [(p[0][c] - x[0][c] - difference) ** 2 for p, x in zip(predicted, images, strict=True)]
        errors.append(math.sqrt(math.fsum(squares) / max(n - 1, 1) / n))
    result = {"mean": mean, "deviation": deviation, "data_mean": data_mean, "data_deviation": data_deviation}
    return result | {"error": errors}


def _mean_and_deviation(of_images: Moments) -> tuple[list[float], list[float]]:
    means, squares = (
        [math.fsum(values) / len(of_images) for values in zip(*(image[i] for image in of_images), strict=True)] for i in (0, 1)
    )
    return means, [math.sqrt(max(square - mean**2, 0.0)) for mean, square in zip(means, squares, strict=True)]


def start_text(start: Mapping[str, Sequence[float]]) -> str:
    """Format as "from pure noise: mean -0.48 0.12 (images -0.49 0.16), deviation 0.94 0.51 (images 1.06 0.53)"."""
    mean, deviation, data_mean, data_deviation = (
        " ".join(f"{value:.2f}" for value in start[key]) for key in ("mean", "deviation", "data_mean", "data_deviation")
    )
    return f"from pure noise: mean {mean} (images {data_mean}), deviation {deviation} (images {data_deviation})"


def colour_warning(start: Mapping[str, Sequence[float]]) -> str:
    """Return a sentence if samples start with one colour, or "".

    The mean of a channel is then further from the images' than `FAR` and two standard errors, or its deviation is below `FLAT`
    of theirs: latents with mean 0, such as normalised ones, show grey only in their deviation.
    """
    advice = (
        '; train on, and if it stays, with timestep_shift = 3.0 or, unless the base is a flow, a stage with teacher = "base"'
    )
    off = [abs(a - b) - 2 * error for a, b, error in zip(start["mean"], start["data_mean"], start["error"], strict=True)]
    shares = [excess / deviation if deviation else 0.0 for excess, deviation in zip(off, start["data_deviation"], strict=True)]
    c = max(range(len(shares)), key=shares.__getitem__)
    if shares[c] > FAR:
        return (
            f"from pure noise, the mean of latent channel {c} is {start['mean'][c]:.2f} and that of the same images "
            f"{start['data_mean'][c]:.2f}, so samples lean towards one colour{advice}"
        )
    for c, (deviation, expected) in enumerate(zip(start["deviation"], start["data_deviation"], strict=True)):
        if deviation < FLAT * expected:
            return (
                f"from pure noise, the deviation of latent channel {c} is {deviation:.2f} and that of the same images "
                f"{expected:.2f}, so samples are close to one colour{advice}"
            )
    return ""
