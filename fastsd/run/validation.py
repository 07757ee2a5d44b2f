"""Validation loss: always on the same images, noise and timesteps, whatever the stage's own objective is.

Timesteps are divided into bands, and bands into strata. An image is measured at one timestep per stratum, with its own noise:

    e_is = mean over elements of |prediction - target|^2                image i, stratum s; `model.prediction` sets the target
    loss = mean of e_is over images and strata; for a band, over its strata
    se   = sqrt(sum_i (m_i - loss)^2 / (n - 1) / n)                     m_i = mean of e_is over strata; 0 for a single image

Timestep and noise are functions of (validate.seed, identity of the image, stratum), so they do not depend on the batches or on
the other images measured. Sums are exact (`math.fsum`), so they do not depend on the order.

`se` estimates how far the loss would move with other images. On the same images and noise, similar models share most of this
movement, so their difference is known better than either loss. To compute it, rows store every m_i ("each") and a hash of the
images, timesteps and noise ("items").

Several ranks share the forwards: each makes every world-th, as one process would. So the values are the same, bit for bit.

Shapes: n images, B images per forward, S strata.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from fastsd.config.schema import ValidateTable
from fastsd.data.loader import Loader
from fastsd.data.validation_split import ValidationSplits
from fastsd.errors import UserError
from fastsd.model.flow_schedule import timesteps_of
from fastsd.model.model import Model
from fastsd.run.flow_start import compared, moments, start_text
from fastsd.terminal.console import counted
from fastsd.train.flow import objective_of
from fastsd.train.objective import Objective
from fastsd.train.ranks import ALONE, Ranks
from fastsd.train.trainable import TrainableComponent
from fastsd_kernels.noise import Purpose, philox

# For a flow also {"start": see `flow_start.compared`}.
# {"set", "weights", "loss", "se", "bands": [[first timestep, last + 1, loss, se], ...], "items": hash, "each": [m_i, ...]}
ValidationRow = dict[str, Any]


@dataclass(frozen=True)
class Strata:
    """Equal strata of a model's timesteps. Each image is measured at one timestep per stratum, with its own noise.

    Args:
        model: on its device, in any precision.
        count: the number of strata.
        seed, purpose: with an image's identity, they determine its timesteps and noise.
    """

    model: Model
    count: int
    seed: int
    purpose: Purpose

    @cached_property
    def objective(self) -> Objective:
        """The objective with plain noise, on the UNet's device, where it must be before the first use."""
        unet = self.model.unet
        return objective_of(self.model.scheduler, self.seed, unet.ops, device=unet.conv_in.weight.device)

    @property
    def timesteps(self) -> int:
        """The number of the model's timesteps."""
        return timesteps_of(self.model.scheduler)

    @property
    def bounds(self) -> list[int]:
        """The first timestep of each stratum, and the number of timesteps."""
        return [stratum * self.timesteps // self.count for stratum in range(self.count + 1)]

    def draw(self, identity_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return a timestep, int64 or fp32 for a flow, and an int64 noise position for each stratum and image, both (S, B)."""
        bounds = torch.tensor(self.bounds)[:, None]
        words = philox(self.seed, self.purpose, identity_B, torch.arange(self.count)).transpose(0, 1)
        if self.model.prediction == "flow":  # its timesteps are continuous
            t_SB = (bounds[:-1] + words[..., 0].double() * 2.0**-32 * bounds.diff(dim=0)).float()
        else:
            t_SB = bounds[:-1] + (words[..., 0] * bounds.diff(dim=0) >> 32)
        return t_SB, words[..., 1] << 32 | words[..., 2]

    def forwards(self, latents_BCHW: Tensor, text_embeds_BLD: Tensor, identity_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the UNet's output and its target, both fp32 (B, C, H, W), for each stratum. Latents are scaled."""
        unet, device = self.model.unet, latents_BCHW.device
        for t_B, position_B in zip(*(tensor.to(device) for tensor in self.draw(identity_B)), strict=True):
            noisy_BCHW, _, target_BCHW = self.objective.add_noise(latents_BCHW, position_B, t_B)
            yield unet(noisy_BCHW, t_B, text_embeds_BLD).float(), target_BCHW

    def start(self, latents_BCHW: Tensor, text_embeds_BLD: Tensor, identity_B: Tensor) -> Tensor:
        """Return x_0 as a flow predicts it from pure noise, fp64 (B, C, H, W). The latents give the shape."""
        words = philox(self.seed, self.purpose, identity_B, torch.tensor([self.count]))[:, 0].to(latents_BCHW.device)
        t_B = torch.full((len(latents_BCHW),), float(self.timesteps), device=latents_BCHW.device)
        eps_BCHW, _, _ = self.objective.add_noise(latents_BCHW, words[:, 1] << 32 | words[:, 2], t_B)
        return eps_BCHW.double() - self.model.unet(eps_BCHW, t_B, text_embeds_BLD).double()

    def errors(self, latents_BCHW: Tensor, text_embeds_BLD: Tensor, identity_B: Tensor) -> Tensor:
        """Return the mean squared errors, fp64 (B, S)."""
        forwards = self.forwards(latents_BCHW, text_embeds_BLD, identity_B)
        errors = [(output.double() - target.double()).square().flatten(1).mean(1) for output, target in forwards]
        return torch.stack(errors, dim=1)


class Validation:
    """Measures a model on fixed sets of images.

    Args:
        model: on its device, in any precision; it is not modified.
        loader: reads the images; the random changes of its stage are not applied.
        sets: sets of samples to measure.
        table: `[validate]` of the config.

    Raises:
        UserError: there are more strata than timesteps.
    """

    def __init__(self, model: Model, loader: Loader, sets: ValidationSplits, table: ValidateTable) -> None:
        self.model, self.loader, self.sets, self.table = model, loader, sets, table
        self._strata = Strata(model, table.bands * table.per_band, table.seed, Purpose.VALIDATION)
        timesteps = self._strata.timesteps
        if self._strata.count > timesteps:
            raise UserError(
                "validate-bands",
                f"validate.bands * validate.per_band is {table.bands} * {table.per_band} = {self._strata.count}, but the model "
                f"has {timesteps} timesteps; lower one of them",
            )
        self._batches = {name: self._split(samples) for name, samples in sets.measured.items()}

    def __str__(self) -> str:
        sizes = " and ".join(f"{len(samples)} {name.replace('_', '-')}" for name, samples in self.sets.measured.items())
        left_out, held_out = len(self.sets.left_out), len(self.sets.measured.get("held_out", ()))
        copies = f" ({left_out} not trained on, with duplicates)" if left_out > held_out else ""
        timesteps = f"{self._strata.count} timesteps per image ({self.table.bands} bands)"
        return f"{sizes} images{copies}, {timesteps}: {self.forwards} forwards"

    @property
    def forwards(self) -> int:
        """Number of UNet forwards needed to measure one set of weights."""
        return sum(map(len, self._batches.values())) * self._strata.count

    @property
    def shapes(self) -> set[tuple[int, ...]]:
        """The shapes (B, C, H, W) of the forwards' latents."""
        batches = [samples for batches in self._batches.values() for samples in batches]
        return {(len(samples), *self._shape(samples[0])) for samples in batches}

    def rows(self) -> list[ValidationRow]:
        """Measure the current weights. Raises UserError if the cache is damaged."""
        return self.summary(self.measure())

    @torch.no_grad()
    def measure(
        self, components: Collection[TrainableComponent] = (), batch: int | None = None, ranks: Ranks = ALONE
    ) -> Tensor:
        """Measure the current weights. For each average that `components` have, measure again with its weights in their place.

        Args:
            batch: images per forward, at most `validate.batch`; None = `validate.batch`.
            ranks: the ranks that share the forwards.

        Returns:
            The values of each image, fp64 (kinds of weights, images of all sets, V), for `summary`. Those that other ranks
            measure are 0, so the sum over all ranks is exact.

        Raises:
            UserError: the cache is damaged.
        """
        size = batch or self.table.batch
        values = [self._measure(size, ranks)]
        for average in dict.fromkeys(name for component in components for name in component.averages):
            with ExitStack() as stack:
                for component in components:
                    stack.enter_context(component.averaged(average))
                values.append(self._measure(size, ranks))
        return torch.stack(values)

    def _measure(self, size: int, ranks: Ranks) -> Tensor:
        values = []
        flow, channels = self.model.prediction == "flow", self.model.unet.cfg.in_channels
        for name, batches in self._batches.items():
            forwards = [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]
            values_nV = torch.zeros(sum(map(len, batches)), self._strata.count + 4 * channels * flow, dtype=torch.float64)
            slices = values_nV.split([len(samples) for samples in forwards])
            for i in counted(f"validating {name.replace('_', '-')}", range(ranks.rank, len(forwards), ranks.world), "batches"):
                slices[i].copy_(self._values(forwards[i]))
            values.append(values_nV)
        return torch.cat(values)

    def summary(self, values_WnV: Tensor, kinds: Sequence[str] = ("raw",)) -> list[ValidationRow]:
        """Return the rows of all sets for the results of `measure`, with the names of its W kinds of weights."""
        rows, strata = [], self._strata.count
        for weights, values_nV in zip(kinds, values_WnV, strict=True):
            sizes = [sum(map(len, batches)) for batches in self._batches.values()]
            for (name, batches), values in zip(self._batches.items(), values_nV.split(sizes), strict=True):
                errors_nS, moments_nM = values[:, :strata].tolist(), values[:, strata:]
                per_image = [math.fsum(errors_S) / strata for errors_S in errors_nS]
                metrics = aggregate(errors_nS, self._strata.bounds, self.table.per_band)
                start = (
                    {"start": compared(*moments_nM.unflatten(1, (2, 2, -1)).transpose(0, 1).tolist())}
                    if moments_nM.numel()
                    else {}
                )
                rows.append(
                    {"set": name, "weights": weights, **metrics, **start, "items": self._hash(batches), "each": per_image}
                )
        return rows

    def _inputs(self, samples: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the scaled latents and the text embeddings of a batch."""
        model, device = self.model, self.model.unet.conv_in.weight.device
        raw_BCHW, text = (tensor.to(device) for tensor in self.loader.load_unaugmented(samples))
        text_embeds_BLD = text if text.ndim == 3 else model.text.encode(text)  # cached embeddings, or token ids
        return model.vae.scale(raw_BCHW.float()), text_embeds_BLD

    def _hash(self, batches: Sequence[np.ndarray]) -> str:
        """Hash the timesteps and noise positions of all samples in order. They depend on the samples, so the hash does too."""
        arrays = [tensor.numpy().tobytes() for batch in batches for tensor in self._strata.draw(self._identities(batch))]
        return xxhash.xxh3_64_hexdigest(b"".join(arrays))

    def _values(self, samples: np.ndarray) -> Tensor:
        """Return what is measured of each image of a batch, fp64 (B, V).

        The first S values are the mean squared errors at each stratum's timestep. With a flow, 4 C follow: mean and mean
        square by channel, of x_0 predicted from pure noise and of the image's latents.  A flow that predicts grey for all
        captions has the right loss at most timesteps, and all samples start there.
        """
        latents_BCHW, text_embeds_BLD = self._inputs(samples)
        errors_BS = self._strata.errors(latents_BCHW, text_embeds_BLD, self._identities(samples))
        if self.model.prediction != "flow":
            return errors_BS
        x_0_BCHW = self._strata.start(latents_BCHW, text_embeds_BLD, self._identities(samples))
        return torch.cat([errors_BS, *(moments(x_BCHW.double()).flatten(1) for x_BCHW in (x_0_BCHW, latents_BCHW))], dim=1)

    def _identities(self, samples: np.ndarray) -> Tensor:
        return torch.tensor([self.sets.identity[sample] for sample in samples.tolist()])

    def _split(self, samples: np.ndarray) -> list[np.ndarray]:
        """Group samples by shape into batches of at most `validate.batch`."""
        by_shape = dict[tuple[int, ...], list[int]]()
        for sample in samples.tolist():
            by_shape.setdefault(self._shape(sample), []).append(sample)
        size = self.table.batch
        return [np.array(same_shape[i : i + size]) for same_shape in by_shape.values() for i in range(0, len(same_shape), size)]

    def _shape(self, sample: int) -> tuple[int, ...]:
        groups = self.loader.cache.groups
        return groups[bisect_right(groups, sample, key=lambda group: group.first) - 1].shape


def aggregate(errors_nS: Sequence[Sequence[float]], bounds: Sequence[int], per_band: int) -> ValidationRow:
    """Return the "loss", "se" and "bands" of a row for the errors of n images at S timesteps. Stratum s starts at bounds[s]."""
    bands = []
    for stratum in range(0, len(bounds) - 1, per_band):
        band_errors = [errors_S[stratum : stratum + per_band] for errors_S in errors_nS]
        bands.append([bounds[stratum], bounds[stratum + per_band], *_mean_and_standard_error(band_errors)])
    loss, se = _mean_and_standard_error(errors_nS)
    return {"loss": loss, "se": se, "bands": bands}


def _mean_and_standard_error(errors: Sequence[Sequence[float]]) -> tuple[float, float]:
    n = len(errors)
    means = [math.fsum(image_errors) / len(image_errors) for image_errors in errors]
    mean = math.fsum(means) / n
    return mean, math.sqrt(math.fsum((image_mean - mean) ** 2 for image_mean in means) / max(n - 1, 1) / n)


def format_line(rows: Sequence[ValidationRow]) -> str:
    """Format as "held out 0.1432 ± 0.0021, stabilised 0.1398 ± 0.0020; t 0000-0199 0.3100, ...", with the first row's bands."""
    losses = ", ".join(f"{_title(row)} {row['loss']:.4f} ± {row['se']:.4f}" for row in rows)
    start = f"; {start_text(rows[0]['start'])}" if "start" in rows[0] else ""
    return f"{losses}; t {', '.join(f'{band_label(*band[:2])} {band[2]:.4f}' for band in rows[0]['bands'])}{start}"


def band_label(first: int, end: int) -> str:
    """Return a range of timesteps with four digits each, so that names are in the order of numbers."""
    return f"{first:04}-{end - 1:04}"


def format_table(rows: Sequence[ValidationRow]) -> str:
    """Format as a table with one line per band and one column per row."""
    lines = [["timesteps", *map(_title, rows)]]
    for bands in zip(*(row["bands"] for row in rows), strict=True):
        lines.append([band_label(*bands[0][:2]), *(f"{loss:.4f} ± {se:.4f}" for _, _, loss, se in bands)])
    lines.append(["all", *(f"{row['loss']:.4f} ± {row['se']:.4f}" for row in rows)])
    table = "\n".join("".join(cell.ljust(18) for cell in line).rstrip() for line in lines)
    starts = [f"{_title(row)}: {start_text(row['start'])}" for row in rows if "start" in row]
    return "\n".join([table, *starts])


def _title(row: ValidationRow) -> str:
    return row["set"].replace("_", " ") + ("" if row["weights"] == "raw" else f" ({row['weights']})")
