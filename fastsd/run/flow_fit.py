"""Fit a UNet to the flow that its base already knows: the start of a run from eps or v to a flow, before its first step.

A flow's UNet is told T s where the base is told the timestep with that ratio of signal to noise, and returns u where the base
returns eps or v (`fastsd/train/flow.py`). Two layers can take up most of both changes, by least squares:

time embedding      The first layer, W phi(t) + b with sinusoids phi, shall return at T s what it returned at the base's t(s):

                        mean_s |W' phi(T s) + b' - W phi(t(s)) - b|^2 + r |W' - W|^2,    s uniform

last convolution    It shall return the base's u from the UNet's own last features, over images of the stage, with their
                    captions, noise, and s uniform (`align.refit_last`, with a ridge towards the base's weights).

Exact: nothing. Approximate: sinusoids whose waves are shorter than the change from T s to t(s) cannot follow it and keep nearly
their weights. The UNet still receives x_s, not x_s / n. Its last convolution has the same weights at every s, but u is
(eps - x_s) / (1 - s); what of x_s the features still hold makes up for the rest. Training removes these errors quickly, since
the layers between begin close to what they did in the base.

The fit is made if the first stage has a teacher and trains both layers. Under several ranks, rank 0 makes it for all.

Shapes: B images, C latent channels, F features, H x W positions, P = 9 F; N values of s, E sinusoids, K = E + 1, O outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from safetensors.torch import load, save
from torch import Tensor

from fastsd.errors import out_of_memory
from fastsd.model import align
from fastsd.model.select import selected
from fastsd.model.unet import Attention, TimeEmbedding
from fastsd.run.run import Run
from fastsd.run.validation import Strata
from fastsd.terminal.console import work
from fastsd.train.flow import Teacher
from fastsd.train.precision import precision_switches
from fastsd.train.ranks import ALONE
from fastsd_kernels.noise import Purpose

LAYERS = "time_embedding.linear_1.weight", "time_embedding.linear_1.bias", "conv_out.weight", "conv_out.bias"
FEWEST, MOST, MEASURED = 64, 512, 32  # images that determine the fit, and others that measure it
_ROWS = 32  # rows of features for each unknown weight of an output channel
_BATCH = 4  # images per forward; training needs more memory than these without gradients
_TIME_RIDGE = 1e-2  # as a multiple of the mean square of a sinusoid
_GRID = 2001  # values of s for the time embedding

Forward = tuple[Tensor, Tensor, Tensor]  # x_s (B, C, H, W), t and text embeddings


@torch.no_grad()
def fit_to_teacher(run: Run, teacher: Teacher) -> None:
    """Fit the UNet of a run that has not begun, and print how far it is from the teacher's flow before and after."""
    unet, stage, name = run.model.unet, run.config.stage[0], run.config.stage_name(0)
    if not set(LAYERS) <= selected(run.model, stage.train, f"stage {name!r}: train").get("unet", set()):
        return
    weights: dict[str, Tensor] = {key: weight for key, weight in unet.named_parameters() if key in LAYERS}
    sent = b""
    if run.ranks.main and (distances := _fit_if_memory_is_enough(run, teacher)):
        sent = save({key: weight.contiguous() for key, weight in weights.items()})
        run.console.echo(
            f"{name}: time embedding and last convolution are fitted to the base's flow; mean square distance from it "
            f"{distances[0]:.3g} -> {distances[1]:.3g} on {MEASURED} other images"
        )
    if fitted := run.ranks.gathered(sent)[0]:
        for key, tensor in load(fitted).items():
            weights[key].copy_(tensor)
        run.saving.changed.add("unet")


def _fit_if_memory_is_enough(run: Run, teacher: Teacher) -> tuple[float, float] | None:
    """Fit both layers in fp32. Return the distances before and after, or None, with a warning, if memory has run out."""
    unet, name = run.model.unet, run.config.stage_name(0)
    attention = next(layer.precision for layer in unet.modules() if isinstance(layer, Attention))
    before = [(weight, weight.clone()) for key, weight in unet.named_parameters() if key in LAYERS]
    try:
        teacher.unet.to(run.device)
        with precision_switches("fp32", teacher.unet), precision_switches("fp32", unet):
            return _fit(run, teacher)
    except Exception as error:
        problem = out_of_memory(error)
        if problem is None:
            raise
        for weight, copy in before:
            weight.copy_(copy)
        run.console.warn(
            f"{name}: training begins without fitting the UNet to the base's flow, for which memory ran out: {problem}"
        )
        return None
    finally:  # the stage moves a teacher in its own precision
        unet.set_attention_precision(attention)
        teacher.unet.to("cpu")
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def _fit(run: Run, teacher: Teacher) -> tuple[float, float]:
    """Fit both layers. Return the mean square distances from the teacher's flow before and after."""
    unet, rows = run.model.unet, _ROWS * run.model.unet.conv_out.weight[0].numel()
    forwards = _forwards(run)
    measured, images = list[Forward](), 0
    while images < MEASURED:
        measured.append(next(forwards))
        images += len(measured[-1][0])
    before = _distance(run, teacher, measured)
    fit_time_embedding(unet.time_embedding, teacher)

    images, layers, edges = 0, align.edge_layers(teacher.unet), (unet.conv_in, unet.conv_out, unet.cfg)
    P, C = layers["conv_out.weight"][0].numel(), len(layers["conv_out.weight"])
    moments = align.Moments(P + C, run.device)
    align.put(unet, align.reading_features(layers))
    try:
        with work("fitting the flow", unit="images") as progress:
            for forward in forwards:
                features_BFHW, u_BCHW = unet(*forward).float(), teacher(*forward)
                for features_FHW, u_CHW in zip(features_BFHW, u_BCHW, strict=True):  # one image's patches in memory
                    moments.add(torch.cat([align.patches(features_FHW[None]), u_CHW.flatten(1).T], dim=1))
                    progress.add()
                images += len(u_BCHW)
                if images >= MOST or (images >= FEWEST and moments.count >= rows):
                    break
    finally:
        unet.conv_in, unet.conv_out, unet.cfg = edges
    layers, parameters = align.refit_last(layers, moments), dict(unet.named_parameters())
    for key in ("conv_out.weight", "conv_out.bias"):
        parameters[key].copy_(layers[key])
    return before, _distance(run, teacher, measured)


def fit_time_embedding(embedding: TimeEmbedding, teacher: Teacher) -> None:
    """Fit the first layer, so that at T s it returns what it returned at the base's timestep (see the note above)."""
    layer, base, device = embedding.linear_1, teacher.unet.time_embedding.linear_1, embedding.linear_1.weight.device
    s_N = torch.linspace(0, 1, _GRID, device=device)
    told_NE, known_NE = (embedding.waves(t_N).double().cpu() for t_N in (teacher.total * s_N, teacher.base_timesteps(s_N)[1]))
    weight_OE, bias_O = base.weight.double().cpu(), base.bias.double().cpu()
    ones_N1 = torch.ones(_GRID, 1, dtype=torch.float64)
    rows_NK, initial_OK = torch.cat([told_NE, ones_N1], dim=1), torch.cat([weight_OE, bias_O[:, None]], dim=1)
    target_NO = known_NE @ weight_OE.T + bias_O
    r = _TIME_RIDGE * rows_NK.square().sum(0).mean()
    gram_KK = rows_NK.T @ rows_NK + r * torch.eye(rows_NK.shape[1], dtype=torch.float64)
    fitted_KO = torch.linalg.solve(gram_KK, rows_NK.T @ target_NO + r * initial_OK.T)
    layer.weight.copy_(fitted_KO[:-1].T)
    layer.bias.copy_(fitted_KO[-1])


def _forwards(run: Run) -> Iterator[Forward]:
    """Yield inputs of the UNet from the first batches of the first stage, whole ones under every number of ranks."""
    model, batch = run.model, run.config.stage[0].batch
    loader, strata = run.data.loader(0, ranks=ALONE), Strata(model, 1, run.config.seed, Purpose.ALIGNMENT)
    for position in itertools.count(0, batch):
        images = loader.batch(position, batch)
        for i in range(0, batch, _BATCH):
            some = slice(i, i + _BATCH)
            raw_BCHW, position_B = images.latents_BCHW[some].to(run.device).float(), images.positions_B[some]
            if images.text_embeds_BLD is None:
                context_BLD = model.text.encode(images.token_ids_BL[some].to(model.text.device)).to(run.device)
            else:
                context_BLD = images.text_embeds_BLD[some].to(run.device)
            t_B, noise_B = (values[0].to(run.device) for values in strata.draw(position_B))
            yield strata.objective.add_noise(model.vae.scale(raw_BCHW), noise_B, t_B)[0], t_B, context_BLD


def _distance(run: Run, teacher: Teacher, forwards: list[Forward]) -> float:
    errors = [(run.model.unet(*forward).float() - teacher(*forward)).square().flatten(1).mean(1) for forward in forwards]
    return torch.cat(errors).mean().item()
