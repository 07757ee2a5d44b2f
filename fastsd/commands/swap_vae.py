"""`fastsd swap-vae`: replace a base model's VAE. If there are images, align the UNet's edge layers to the new latents.

    OUT/             a diffusers folder with the base's UNet and text encoder, and the new VAE
    OUT/swap.json    the fits with their maps, R^2 and losses; the model card README.md describes them in words

The mathematics is in `fastsd/model/align.py`. --seed selects images from the whole folder. Three quarters of them determine the
fits; the others measure each fit by the loss that training will minimise. It is the mean square error of the UNet's prediction,
with the images' captions, at one timestep of each of `STRATA` equal strata of the schedule. Timesteps and noise are a function
of (seed, image number, stratum), so they are the same for all fits.

Shapes: N images, B images per forward, C latent channels of the base, D latent channels of the new VAE, S timestep strata.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from fastsd.commands.progress import progress
from fastsd.config.schema import FolderTable, ModelTable
from fastsd.data.building import upkeep
from fastsd.data.building.buckets import Buckets
from fastsd.data.building.build import ProgressCallback
from fastsd.data.building.decode import decode, probe
from fastsd.data.building.pipeline import CacheProgress
from fastsd.data.sources import folders
from fastsd.data.sources.image import DataSource, Rejected
from fastsd.errors import UserError
from fastsd.model import align, bypass
from fastsd.model.formats.adapters import load_merged
from fastsd.model.formats.load import component_state_dict, load_vae, write_component, write_rest
from fastsd.model.formats.write import check_folder_name
from fastsd.model.latent_space import LatentSpace
from fastsd.model.model import Model
from fastsd.model.vae import Vae
from fastsd.run.model_card import untrained, write_card
from fastsd.run.validation import Strata, aggregate
from fastsd.storage import new_folder, write_text
from fastsd.terminal.console import STDOUT, Console
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.objective import alphas_cumprod
from fastsd.train.precision import COMPUTE_DTYPE, precision_switches
from fastsd_kernels.noise import Purpose, permutation

FITS = ("plain", "orthogonal", "affine", "kernel")
FEWEST = 8  # least number of images for a fit
MEASURE_EVERY = 4  # one image in so many measures the fits
STRATA, BATCH = 10, 8  # timestep strata; images per forward
_SELECTION = 1 << 40  # position of the permutation that selects images; no image has it


def swap_vae(
    base: str,
    vae: str,
    out: Path,
    images: Path | None = None,
    fit: str = "",
    limit: int = 256,
    resolution: int = 0,
    vae_scaling_factor: float | None = None,
    tokenizer: str = "",
    precision: str = "fp32",
    device: str = "auto",
    seed: int = 0,
    normalise: Path | None = None,
    console: Console = STDOUT,
) -> dict[str, Any]:
    """Replace the VAE of `base` by `vae`, write the model to `out`, and return the contents of swap.json.

    Args:
        base, vae, tokenizer, vae_scaling_factor: as in `[model]` of a config.
        images: a folder of images, with or without captions; None = only swap the VAE.
        fit: one of `FITS`; "" = the fit with the smallest loss, or plain if there are no images.
        limit: largest number of images to use.
        resolution: side in px to which images are resized and cropped; 0 = the UNet's own.
        normalise: a latent cache of the VAE. Its channels' means and deviations replace the VAE's factor and shift.
        precision: precision of the UNet while losses are measured, fp32 or bf16. The output is fp32.

    Raises:
        UserError: a model does not load, the VAE does not suit the base, images are missing or too few, or `out` exists.
    """
    _check_options(out, images, fit, vae_scaling_factor, normalise, precision)
    sources = _images(images) if images else []
    compute_device = choose_device(device, console)
    table = ModelTable(base=base, tokenizer=tokenizer)
    model = load_merged(table, choose_ops("auto", compute_device))
    new_vae = load_vae(table.model_copy(update={"vae": vae, "vae_scaling_factor": vae_scaling_factor}), ops=model.unet.ops)
    if normalise:
        _normalise(new_vae, normalise)
    _check_vaes(base, model, new_vae, vae, aligning=bool(images))
    _print_changes(console, model, new_vae, aligning=bool(images))

    fp32_weights = {name: parameter.detach() for name, parameter in model.unet.named_parameters()}  # for the output
    edge_layers = align.edge_layers(model.unet) | bypass.last_layers(model.unet)
    record: dict[str, Any] = {"base": base, "vae": vae, "vae_scaling_factor": new_vae.scaling_factor, "fit": "plain"}
    if normalise:
        record |= {"normalised": str(normalise)} | new_vae.latent_space.settings()
    if images:
        record |= {"images": str(images), "seed": seed, "precision": precision}
        new_vae.to(compute_device, torch.float32)
        model.unet.to(compute_device, COMPUTE_DTYPE[precision])
        with progress() as report_progress, precision_switches(precision, model.unet):
            pairs = _encode(model, new_vae, sources, limit, seed, resolution, report_progress)
            results = _Alignment(model, pairs, seed, report_progress).compare(edge_layers)
        if not math.isfinite(results["own"].loss["loss"]):
            raise UserError("swap-base-not-finite", f"BASE is {base!r}, which predicts non-finite values; download it again")
        record |= pairs.counts() | {"fit": fit or min(FITS, key=lambda name: results[name].loss["loss"])}
        record["fits"] = {name: {"r2": result.r2, **result.loss, **result.map} for name, result in results.items()}
        _print_table(console, record)
        edge_layers = results[record["fit"]].edge_layers
    else:
        edge_layers = align.fold_into_edges(edge_layers, align.fit_plain(model.vae.channels, new_vae.channels))

    align.put(model.unet, edge_layers)
    tensors = fp32_weights | {name: tensor.float() for name, tensor in edge_layers.items()}
    try:
        with new_folder(out) as folder:
            write_component(folder, model, "unet", component_state_dict(model, "unet", tensors))
            write_component(folder, model, "text_encoder", component_state_dict(model, "text_encoder"))
            write_rest(folder, replace(model, vae=new_vae))
            write_text(folder / "swap.json", json.dumps(record, indent=2) + "\n")
            write_card(folder, untrained(out.name, base, vae, _describe(record)))
    except OSError as error:
        reason = error.strerror or error
        raise UserError("swap-unwritable", f"OUT {out} cannot be written ({reason}); fix that and run again") from error
    console.echo(f"{out}: {base} with VAE {vae}, fit {record['fit']}")
    return record


def _normalise(vae: Vae, cache_dir: Path) -> None:
    """Give every channel of a VAE mean 0 and deviation 1 over a cache's latents. Raises UserError if they cannot tell."""
    views = upkeep.stats(cache_dir).views.values()
    measured = max((view for view in views if view.meta.vae_hash == vae.hash), key=lambda view: view.meta.cached, default=None)
    if measured is None:
        raise UserError(
            "swap-normalise-latents",
            f"--normalise is {str(cache_dir)!r}, which has no latents of VAE {vae.name}; cache images with "
            f"`fastsd cache CONFIG model.vae={quote(vae.name)}` first",
        )
    shift_C, scale_C = measured.meta.latent_space.per_channel(vae.channels)
    mean_C = torch.tensor(measured.mean, dtype=torch.float64) / scale_C + shift_C
    std_C = torch.tensor(measured.std, dtype=torch.float64) / scale_C
    constant = (std_C <= 1e-6 * (1 + mean_C.abs())).nonzero().flatten().tolist()
    if constant:
        raise UserError(
            "swap-normalise-constant",
            f"--normalise is {str(cache_dir)!r}, in whose {measured.measured} latents channel {constant[0]} has deviation 0; "
            "cache other images, or omit --normalise",
        )
    vae.set_latent_space(LatentSpace(1.0, 0.0, tuple(mean_C.tolist()), tuple(std_C.tolist())))


def _check_options(
    out: Path, images: Path | None, fit: str, vae_scaling_factor: float | None, normalise: Path | None, precision: str
) -> None:
    check_folder_name(out)
    if out.exists():
        raise UserError("out-exists", f"OUT is {str(out)!r}, which already exists; choose a new folder")
    if fit and fit not in FITS:
        raise UserError("swap-unknown-fit", f"--fit is {fit!r}; choose {', '.join(FITS)}")
    if fit not in ("", "plain") and images is None:
        raise UserError("swap-fit-needs-images", f"--fit is {fit!r}, which is computed from images; add --images DIR")
    if precision not in ("fp32", "bf16"):
        raise UserError("swap-precision", f"--precision is {precision!r}; choose fp32 or bf16")
    if vae_scaling_factor is not None and not vae_scaling_factor > 0:
        raise UserError("swap-scaling-factor", f"--vae-scaling-factor is {vae_scaling_factor:g}; give a number above 0")
    if vae_scaling_factor is not None and normalise:
        raise UserError(
            "swap-normalise-and-factor",
            "--normalise and --vae-scaling-factor are given, and the first replaces the factor; omit --vae-scaling-factor",
        )


def _describe(record: Mapping[str, Any]) -> str:
    """Describe how the model was made, for its model card."""
    vae_only = "Only the VAE was replaced; the model must be trained before its images are usable."
    if "fits" not in record:
        return vae_only
    fit, losses = record["fit"], {name: f"{row['loss']:.4f} ± {row['se']:.4f}" for name, row in record["fits"].items()}
    carried = ", which are also carried past all blocks," if "groups" in record["fits"][fit] else ""
    mapping = (
        f"The UNet's first and last convolution were mapped to the new latents{carried} ({fit} fit, {record['fitted']} images)."
    )
    return (
        f"Nothing was trained. {vae_only if fit == 'plain' else mapping} Loss before training: {losses[fit]}; with the VAE "
        f"replaced and nothing mapped: {losses['plain']}; base model with its own VAE: {losses['own']}."
    )


def _images(folder: Path) -> list[DataSource]:
    """List all images of a folder, including unusable ones."""
    try:
        return list(folders.scan([FolderTable(path=str(folder))]))
    except UserError as error:
        raise UserError("swap-images", str(error).replace("data.folders", "--images")) from None


def _check_vaes(base_name: str, model: Model, new: Vae, name: str, *, aligning: bool) -> None:
    """Raise UserError if the VAE is the base's own, or if its latents need no alignment or cannot be aligned."""
    base = model.vae
    if aligning and model.prediction == "flow":
        raise UserError(
            "align-flow",
            f"BASE {base_name} is a flow, and the fits are for models that predict epsilon or v; align the base that the flow "
            "was trained from, or omit --images",
        )

    def latent_space(vae: Vae) -> tuple[object, ...]:
        return vae.hash, vae.latent_space

    if latent_space(base) == latent_space(new):
        state, new_state = base.module.state_dict(), new.module.state_dict()
        if state.keys() == new_state.keys() and all(torch.equal(tensor, new_state[key]) for key, tensor in state.items()):
            raise UserError("swap-same-vae", f"VAE is {name}, which the base already uses; choose another VAE")
        if aligning:
            raise UserError("swap-same-latents", f"VAE is {name}, which has the same encoder as the base's VAE; omit --images")
    if aligning and base.downscale != new.downscale:
        raise UserError(
            "swap-downscale",
            f"VAE is {name}: its latents are {new.downscale} times smaller than images, but the base's are {base.downscale} "
            "times smaller; omit --images and train the model instead",
        )


def _print_changes(console: Console, model: Model, new: Vae, *, aligning: bool) -> None:
    base_vae, channels = model.vae, model.unet.cfg.in_channels
    console.echo(f"VAE {base_vae.latent_space} -> {new.latent_space}")
    for note in model.notes:
        console.warn(note)
    if new.channels != channels:
        change = "widened" if new.channels > channels else "narrowed, extra channels removed"
        start = "" if aligning or new.channels < channels else ", new channels start at zero"
        console.echo(f"latent channels {channels} -> {new.channels}: first and last convolution {change}{start}")
    if new.downscale != base_vae.downscale:
        change = f"{base_vae.downscale} -> {new.downscale}"
        console.warn(f"VAE downscale {change}: latents have other sizes than those the UNet was trained on")


@dataclass(frozen=True)
class _Pairs:
    """Images encoded by both VAEs, in the order in which they were selected.

    Attributes:
        numbers_N: the images' numbers in their folder, which determine their noise.
        x_NCHW, y_NDHW: scaled latents of the base's VAE and of the new VAE, fp32, on the CPU.
        rejected: number of rejected images by reason.
    """

    resolution: int
    numbers_N: Tensor
    x_NCHW: Tensor
    y_NDHW: Tensor
    text_embeds_NLD: Tensor
    rejected: Counter[str]

    def indices(self, *, measuring: bool) -> Tensor:
        """Return the indices of the images that measure the fits, or of those that determine them."""
        index_N = torch.arange(len(self.numbers_N))
        return index_N[(index_N % MEASURE_EVERY == 0) == measuring]

    def counts(self) -> dict[str, Any]:
        sizes = {"fitted": len(self.indices(measuring=False)), "measured": len(self.indices(measuring=True))}
        return {"resolution": self.resolution, **sizes, "put_aside": dict(self.rejected)}


@torch.no_grad()
def _encode(
    model: Model,
    new: Vae,
    sources: Sequence[DataSource],
    limit: int,
    seed: int,
    resolution: int,
    report_progress: ProgressCallback,
) -> _Pairs:
    """Encode images and captions. Raises UserError if the model does not support the resolution or there are too few images."""
    start_time = time.perf_counter()
    device, base = new.device, model.vae
    base.to(device, torch.float32)
    model.text.module.to(device)
    resolution = resolution or model.unet.cfg.sample_size * base.downscale
    step = base.downscale * model.unet.cfg.downscale
    if resolution % step:
        near = max((resolution + step // 2) // step, 1) * step
        raise UserError("swap-resolution", f"--resolution is {resolution}, not a multiple of {step}; use {near}")

    buckets, rejected = Buckets(resolution, None), Counter[str]()
    rows: list[tuple[Tensor, ...]] = []
    for number in permutation(seed, Purpose.ALIGNMENT, _SELECTION, len(sources)):
        if len(rows) == limit:
            break
        try:
            pixels, caption = _read(sources[number], buckets)
            image = pixels.to(device)[None].float() / 127.5 - 1
            x, y = (vae.scale(vae.encode(image)).cpu() for vae in (base, new))
            if not (x.isfinite().all() and y.isfinite().all()):
                raise Rejected("latents are not finite")
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        text_embeds = model.text.encode(model.text.tokenize([caption]).to(device)).cpu()
        rows.append((number[None], x, y, text_embeds))
        speed = len(rows) / (time.perf_counter() - start_time)
        report_progress(CacheProgress("encode", len(rows), min(limit, len(sources)), speed))

    rejections = f"; rejected: {_reasons(rejected)}" if rejected else ""
    if len(rows) < FEWEST:
        raise UserError(
            "swap-few-images", f"--images has {len(rows)} usable images, but a fit needs {FEWEST}; add images{rejections}"
        )
    numbers, x, y, text_embeds = (torch.cat(column) for column in zip(*rows, strict=True))
    pairs = _Pairs(resolution, numbers, x, y, text_embeds, rejected)
    positions = len(pairs.indices(measuring=False)) * math.prod(x.shape[2:])
    minimum = max(9 * new.channels, -(-9 * model.unet.cfg.block_out_channels[0] // STRATA)) + 1
    if positions < minimum:
        raise UserError(
            "swap-few-positions",
            f"--images has {len(rows)} images of {resolution} px with {positions} latent positions for the fit, which needs "
            f"{minimum}; add images, or raise --limit or --resolution{rejections}",
        )
    return pairs


def _read(source: DataSource, buckets: Buckets) -> tuple[Tensor, str]:
    """Return an image's pixels, uint8 (3, R, R), and its first caption, or "". Raises Rejected if it is unusable."""
    if source.problem:
        raise Rejected(source.problem)
    data, captions = folders.read_bytes(source), folders.captions_of(source)
    return torch.from_numpy(decode(data, buckets.place(*probe(data)))), captions[0] if captions else ""


@dataclass
class _Measured:
    """A measured fit: R^2 of each base channel ([] for the base itself), {"loss", "se"}, and the map {"A", "c"} if any."""

    edge_layers: align.EdgeLayers
    r2: list[float] = field(default_factory=list)
    loss: dict[str, float] = field(default_factory=dict)
    map: dict[str, Any] = field(default_factory=dict)


class _Alignment:
    """Computes and measures the fits. The UNet of `model` is on its device, in the precision of the measurement."""

    def __init__(self, model: Model, pairs: _Pairs, seed: int, report_progress: ProgressCallback) -> None:
        self.model, self.pairs, self.report_progress = model, pairs, report_progress
        self.strata = Strata(model, STRATA, seed, Purpose.ALIGNMENT)
        self.fit_index_N, self.measure_index_N = pairs.indices(measuring=False), pairs.indices(measuring=True)
        self.start_time, self.done = time.perf_counter(), 0
        channels, new_channels = pairs.x_NCHW.shape[1], pairs.y_NDHW.shape[1]
        # The norm groups of the last features that carry y_t, if its channels are more than the base takes.
        self.groups = bypass.groups_for(model.unet.cfg, new_channels) if new_channels > channels else 0
        self.total = (1 + bool(self.groups)) * len(self.fit_index_N) + (1 + len(FITS)) * len(self.measure_index_N)

    @torch.no_grad()
    def compare(self, edge_layers: align.EdgeLayers) -> dict[str, _Measured]:
        """Measure the base with its own VAE (called "own"), and each of `FITS`."""
        fit_pairs, measure_pairs = (
            align.Pairs(self.pairs.x_NCHW[i], self.pairs.y_NDHW[i]) for i in (self.fit_index_N, self.measure_index_N)
        )
        schedule = align.Schedule.of(alphas_cumprod(self.model.scheduler), self.model.prediction)
        results = {"own": _Measured(edge_layers, loss=self._loss(edge_layers, self.pairs.x_NCHW))}
        fits = [align.fit_plain(*fit_pairs.channels)]
        fits += [fit(fit_pairs, schedule) for fit in (align.fit_orthogonal, align.fit_affine, align.fit_kernel)]
        for name, fit in zip(FITS, fits, strict=True):
            mapped_layers = align.fold_into_edges(edge_layers, fit)
            record: dict[str, Any] = {}
            if name == "kernel":
                if self.groups:
                    record["groups"] = groups = self._spare_groups(edge_layers)
                    norm_groups = self.model.unet.cfg.norm_groups
                    mapped_layers = bypass.carry(mapped_layers, edge_layers, fit_pairs, schedule, groups, norm_groups)
                ridge = align.CARRIED_RIDGE if self.groups else align.LAST_RIDGE
                mapped_layers = align.refit_last(mapped_layers, self._features(mapped_layers, self.pairs.y_NDHW), ridge)
            if fit.A is not None and fit.c is not None:
                record = {"A": fit.A.tolist(), "c": fit.c.tolist()}
            loss = self._loss(mapped_layers, self.pairs.y_NDHW)
            results[name] = _Measured(mapped_layers, measure_pairs.r2(fit), loss, record)
        return results

    def _spare_groups(self, base: align.EdgeLayers) -> list[int]:
        """Return the norm groups of the base's last features that it needs least. They carry y_t past its blocks."""
        moments = self._features(base, self.pairs.x_NCHW)
        return bypass.spare_groups(moments, base["conv_out.weight"].shape[1], self.model.unet.cfg.norm_groups, self.groups)

    def _features(self, edge_layers: align.EdgeLayers, latents_NCHW: Tensor) -> align.Moments:
        """Return the moments of patches of the last features and of the targets, over the images that determine the fits."""
        align.put(self.model.unet, align.reading_features(edge_layers))
        columns = edge_layers["conv_out.weight"][0].numel() + latents_NCHW.shape[1]
        moments = align.Moments(columns, self.model.unet.conv_in.weight.device)
        for batch in self._batches(self.fit_index_N, latents_NCHW):
            for features_BFHW, target_BDHW in self.strata.forwards(*batch):
                for features_FHW, target_DHW in zip(features_BFHW, target_BDHW, strict=True):  # one image's patches in memory
                    moments.add(torch.cat([align.patches(features_FHW[None]), target_DHW.flatten(1).T], dim=1))
        return moments

    def _loss(self, edge_layers: align.EdgeLayers, latents_NCHW: Tensor) -> dict[str, float]:
        align.put(self.model.unet, edge_layers)
        errors = [self.strata.errors(*batch) for batch in self._batches(self.measure_index_N, latents_NCHW)]
        metrics = aggregate(torch.cat(errors).tolist(), self.strata.bounds, STRATA)
        return {"loss": metrics["loss"], "se": metrics["se"]}

    def _batches(self, index_N: Tensor, latents_NCHW: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield batches of latents, text embeddings and image numbers, the arguments of `Strata.forwards`."""
        device = self.model.unet.conv_in.weight.device
        for index_B in index_N.split(BATCH):
            text_embeds_BLD = self.pairs.text_embeds_NLD[index_B].to(device)
            yield latents_NCHW[index_B].to(device), text_embeds_BLD, self.pairs.numbers_N[index_B]
            self.done += len(index_B)
            speed = self.done / (time.perf_counter() - self.start_time)
            self.report_progress(CacheProgress("measure", self.done, self.total, speed))


def _reasons(rejected: Mapping[str, int]) -> str:
    """Return the most common reasons. Some include a position in a file, so there may be as many reasons as files."""
    return "; ".join(f"{count} x {reason}" for reason, count in Counter(rejected).most_common(3))


def _print_table(console: Console, record: dict[str, Any]) -> None:
    images = f"images of {record['images']} at {record['resolution']} px"
    console.echo(f"{record['fitted']} {images} for the fit, {record['measured']} others to measure it")
    if record["put_aside"]:
        console.warn(f"{sum(record['put_aside'].values())} rejected: {_reasons(record['put_aside'])}")
    console.echo(f"{'fit':12}{'step-0 loss':20}R^2 of each channel")
    for name, row in record["fits"].items():
        loss = f"{row['loss']:.4f} ± {row['se']:.4f}"
        r2 = " ".join(f"{channel_r2:.4f}" for channel_r2 in row["r2"])
        console.echo(f"{name:12}{loss:20}{r2 or 'base model with its own VAE'}")
