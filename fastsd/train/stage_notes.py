"""Warnings of settings of a stage that are valid and often not meant. `fastsd check` and the start of a run print them."""

from __future__ import annotations

import math

import torch

from fastsd.config.stages import ENDLESS, StageTable
from fastsd.train.flow import objective_of

LARGEST_SHARE = 0.05  # of the starting weights in an EMA


def stage_notes(stage: StageTable, name: str, steps: int, scheduler: dict[str, object]) -> list[str]:
    """Return a sentence for each such setting.

    Args:
        name: the stage's name for messages.
        steps: its length in steps, `ENDLESS` if that is a time.
        scheduler: the model's scheduler config.

    Raises:
        UserError: as `objective_of`.
    """
    notes = [_ema_note(stage, steps), _weighting_note(stage, scheduler), _dlion_note(stage), _dropout_note(stage)]
    return [f"stage {name!r}: {note}" for note in notes if note]


def starting_share(stage: StageTable, steps: int) -> float:
    """Compute the share of the weights with which an EMA starts in its value after `steps` steps of a stage."""
    if stage.sigma_rel:
        return 0.0
    assert isinstance(stage.ema, float)
    averaged_steps = max(steps - stage.ema_after, 0)
    if not stage.ema_power:
        return float(stage.ema**averaged_steps)
    n = torch.arange(1, min(averaged_steps, 1_000_000) + 1, dtype=torch.float64)
    return math.exp((1 - (1 + n) ** -stage.ema_power).clamp(max=stage.ema).log().sum().item())


def _ema_note(stage: StageTable, steps: int) -> str:
    if not stage.ema or stage.sigma_rel or stage.state == "carry" or steps >= ENDLESS:
        return ""
    share, power = starting_share(stage, steps), 0.67 if steps >= 100_000 else 0.75
    advised = stage.model_copy(update={"ema_power": power})
    if share <= LARGEST_SHARE or starting_share(advised, steps) > LARGEST_SHARE:
        return ""
    return (
        f"ema is {stage.ema:g}, so after {steps:,} steps {share:.0%} of the EMA are still the weights it started with; "
        f"set ema_power = {power:g}, or lower ema"
    )


def _weighting_note(stage: StageTable, scheduler: dict[str, object]) -> str:
    objective = objective_of(scheduler, 0, stage=stage)
    if objective.prediction == "flow" and stage.weighting != "none" and not stage.weighting_min:
        return (
            f"weighting is {stage.weighting!r}, whose weights for a flow fall to 0 towards pure noise, from which sampling "
            'starts; set weighting_min = 0.1, or weighting = "none"'
        )
    if objective.prediction != "v_prediction" or objective.weights_T is None:
        return ""
    last = len(objective.weights_T) - 1
    if objective.weights_T[last] == 0 and objective.end > last:
        return (
            f"weighting is {stage.weighting!r}, whose weight is 0 at timestep {last}, so the pure noise from which sampling "
            'starts is never trained; set weighting_min = 0.1, or weighting = "none"'
        )
    if stage.weighting_form == "paper" and stage.weighting != "min_snr":
        other = '"sd-scripts" or "onetrainer"' if stage.weighting == "debiased" else '"onetrainer"'
        return (
            f"weighting {stage.weighting!r} of v-prediction has the form of its paper, whose weights fall towards pure noise, "
            f"where those of other trainers rise; for theirs, set weighting_form to {other}"
        )
    return ""


def _dlion_note(stage: StageTable) -> str:
    components = {name.split(".")[0] for name in stage.train}
    if stage.optimizer != "dlion" or "text_encoder" not in components:
        return ""
    lr = "3e-6" if components == {"text_encoder"} else "{ unet = 1e-6, text_encoder = 3e-6 }"
    return (
        'optimizer is "dlion" and the text encoder is trained, whose loss says little about a good step size, so that d may '
        f'grow until the model forgets its words; set optimizer = "lion" and lr = {lr}'
    )


def _dropout_note(stage: StageTable) -> str:
    """Return a sentence for a stage that trains the whole UNet: one that trains less of the model keeps its empty caption."""
    if stage.caption_dropout or "unet" not in stage.train:
        return ""
    return (
        "caption_dropout is 0, so the empty caption, which guidance needs for sampling, is not trained; set "
        "caption_dropout = 0.1, unless data.folders has images without captions"
    )
