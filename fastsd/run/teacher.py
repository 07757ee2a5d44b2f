"""The base of a run as the teacher of a stage: what it must be, what it predicts, and whether it is still the same.

A run reads its base twice: when it starts, and at the start of each stage with `teacher = "base"`, which may be weeks later.
The checkpoints keep the key of the base's contents, so that a base that has changed on the disk is not taken for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from shlex import quote
from typing import Any

import torch
import xxhash

from fastsd.config.schema import Config, ModelTable
from fastsd.errors import UserError
from fastsd.model.flow_schedule import is_flow
from fastsd.model.formats.adapters import load_merged
from fastsd.model.formats.load import load_vae, scheduler_of, table_of
from fastsd.model.formats.model_source import locate
from fastsd.model.unet import UNet
from fastsd.model.vae import Vae
from fastsd.model.weights import ADAPTER, plain_name
from fastsd.terminal.console import STDOUT, Console
from fastsd.train.flow import Teacher, prediction_of
from fastsd_kernels import REFERENCE, Ops

_ROUNDING, _SMALLEST = 2.0**-8, 1e-6  # of bf16 and of fp16, in which a VAE may be stored


def check_teachers(config: Config, first: int = 0) -> None:
    """Raise UserError if a stage has a teacher and the base is a flow already, or does not know the latents of `model.vae`.

    Args:
        first: index of the first stage that is still to be trained. The base need not exist for earlier ones.
    """
    stages = [config.stage_name(i) for i, stage in enumerate(config.stage) if stage.teacher and i >= first]
    if not stages:
        return
    table, stage = config.model, stages[0]
    base = locate(table.base, "model.base", table.revision)
    if is_flow(scheduler_of(base)[0]):
        raise UserError(
            "teacher-is-flow",
            f'stage {stage!r}: teacher is "base", but {table.base} is a flow itself, which training continues; remove teacher',
        )
    if table.vae and not _has_latents_of(table):
        raise UserError(
            "teacher-and-vae",
            f'stage {stage!r}: teacher is "base", but {table.base} does not know the latents of model.vae {table.vae}; run '
            f"`fastsd swap-vae {quote(table.base)} {quote(table.vae)} OUT --images DIR`, set model.base to OUT, and remove "
            "model.vae",
        )


def _has_latents_of(table: ModelTable) -> bool:
    """Return True if a base's VAE gives the latents of `model.vae`, or if the base has none."""
    with suppress(UserError):
        return _alike(load_vae(table), load_vae(table_of(table.base, table)))
    return True


def _alike(vae: Vae, other: Vae) -> bool:
    """Return True if two VAEs have the same latents, apart from rounding their weights to 16 bits."""
    weights, others = vae.encoder_weights(), other.encoder_weights()
    if vae.latent_space != other.latent_space or weights.keys() != others.keys():
        return False
    pairs = [(weights[name].float(), others[name].float()) for name in weights]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=_ROUNDING, atol=_SMALLEST) for a, b in pairs)


def load_teacher(table: ModelTable, ops: Ops = REFERENCE, console: Console = STDOUT) -> Teacher:
    """Load the base of a config as a teacher. A checkpoint of the run has other weights.

    Raises:
        UserError: the base is missing, or nothing shows whether it predicts epsilon or v.
    """
    table = table.model_copy(update={"prediction": "", "zero_snr": None, "flow_shift": None, "lora": None})
    stated = scheduler_of(locate(table.base, "model.base", table.revision))[1]
    measured = {} if stated else {"prediction_type": _measured_prediction(table, console)}
    base = load_merged(table, ops)
    return Teacher(base.unet, base.scheduler | measured)


def _measured_prediction(table: ModelTable, console: Console) -> str:
    base = load_merged(table, REFERENCE)  # on the CPU, where other kernels may not run
    with torch.no_grad():
        context_1LD = base.text.encode(base.text.tokenize([""]))
        prediction = prediction_of(base.unet, base.scheduler, context_1LD, base.vae.channels)
    how = (
        f"run `fastsd convert {quote(table.base)} OUT`, set prediction_type in OUT/scheduler/scheduler_config.json, and set "
        "model.base to OUT"
    )
    if not prediction:
        raise UserError(
            "teacher-prediction-unknown",
            f"model.base is {table.base}, which neither says nor shows whether it predicts epsilon or v; {how}",
        )
    console.warn(
        f"model.base is {table.base}, which does not say what it predicts; its answer to pure noise shows {prediction} (if "
        f"that is wrong, {how})"
    )
    return prediction


def base_key(table: ModelTable, unet: UNet) -> str:
    """Return a hash of what a teacher depends on.

    Args:
        unet: with the weights of the base, and any adapters.
    """
    return content_key(unet, scheduler_of(locate(table.base, "model.base", table.revision))[0])


def check_unchanged(table: ModelTable, stage: str, saved: str, key: str) -> None:
    """Raise UserError if the base is no longer the one that a run started with.

    Args:
        saved: the key in the checkpoint; "" = that of an earlier version, which had none.
    """
    if saved and saved != key:
        raise UserError(
            "teacher-changed",
            f"stage {stage!r}: model.base {table.base}, the teacher, has changed since the run was started; put the earlier "
            "version back, or start a new run with run=FOLDER",
        )


def content_key(unet: UNet, scheduler: Mapping[str, Any]) -> str:
    """Return a hash of a UNet's weights, without adapters, and of its prediction and noise schedule."""
    digest = xxhash.xxh3_128(repr(sorted((key, scheduler.get(key)) for key in _SCHEDULE)).encode())
    parameters = {plain_name(name): parameter for name, parameter in unet.named_parameters()}
    for name, parameter in sorted(parameters.items()):
        if ADAPTER not in name:
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            digest.update(parameter.detach().float().flatten().numpy().data)
    return digest.hexdigest()


_SCHEDULE: Sequence[str] = (
    "prediction_type", "rescale_betas_zero_snr", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
    "trained_betas",
)  # fmt: skip
