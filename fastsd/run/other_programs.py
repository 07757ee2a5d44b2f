"""Notes for ComfyUI and A1111 on models that no file describes in a form that they read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.model.flow_schedule import is_flow, shift_of
from fastsd.run.markdown import code

COMFY_FLOW = "Add *ModelSamplingSD3* with shift {shift:g}, because the model is a rectified flow and SD1.5 defaults to epsilon."
WEBUI_FLOW = "not supported: these programs sample flows of SD3 and Flux only, and an SD1.5 file has no setting for it."


def sampling_notes(scheduler: Mapping[str, Any], file: str) -> tuple[list[str], list[str]]:
    """Return sentences for ComfyUI, and for A1111, on a single file whose model does not predict epsilon. In markdown."""
    if is_flow(scheduler):
        return [COMFY_FLOW.format(shift=shift_of(scheduler))], []
    if scheduler.get("prediction_type") != "v_prediction":
        return [], []
    zsnr = str(bool(scheduler.get("rescale_betas_zero_snr"))).lower()
    comfy = f"Add *ModelSamplingDiscrete* with v_prediction and zsnr {zsnr}, because SD1.5 defaults to epsilon."
    webui = (
        "Because SD1.5 defaults to epsilon, copy `configs/v1-inference.yaml` of A1111 next to the file as "
        f'{code(f"{Path(file).stem}.yaml")} and add `parameterization: "v"` under `model`, `params`.'
    )
    return [comfy], [webui]
