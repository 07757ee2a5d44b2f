"""Notes for ComfyUI and A1111 on models that no file describes in a form that they read.

    predicts    latents       ComfyUI                                     A1111, Forge
    epsilon     4 channels    nothing to set                              nothing to set
    v           4 channels    a node that names the prediction            a config beside the file
    flow        4 channels    a node that names the prediction, shift     cannot sample it
    any         others        cannot load it                              cannot load it

A LoRA has the limits of its base, and a file of the base's names in the place of the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd.model.flow_schedule import is_flow, shift_of
from fastsd.run.markdown import code

CHANNELS = 4  # of the latents that these programs build SD1.5 with
_COMFY_FLOW = (
    "Add *ModelSamplingSD3* with shift {shift:g}, because the model is a rectified flow and SD1.5 defaults to epsilon."
)
_WEBUI_FLOW = "not supported: these programs sample flows of SD3 and Flux only, and an SD1.5 file has no setting for it."


def other_channels(channels: int) -> str:
    """Return the sentence on a model with other latents than these programs build, in markdown, or ""."""
    if channels == CHANNELS:
        return ""
    return f"**ComfyUI and A1111** are not supported: they expect {CHANNELS} latent channels, and this model has {channels}."


def sampling_notes(scheduler: Mapping[str, Any], file: str) -> tuple[list[str], list[str]]:
    """Return sentences for ComfyUI, and for A1111, on a single file whose model does not predict epsilon. In markdown."""
    if is_flow(scheduler):
        return [_COMFY_FLOW.format(shift=shift_of(scheduler))], [_WEBUI_FLOW]
    if scheduler.get("prediction_type") != "v_prediction":
        return [], []
    zsnr = str(bool(scheduler.get("rescale_betas_zero_snr"))).lower()
    comfy = f"Add *ModelSamplingDiscrete* with v_prediction and zsnr {zsnr}, because SD1.5 defaults to epsilon."
    webui = (
        "Because SD1.5 defaults to epsilon, copy `configs/v1-inference.yaml` of A1111 next to the file as "
        f'{code(f"{Path(file).stem}.yaml")} and add `parameterization: "v"` under `model`, `params`.'
    )
    return [comfy], [webui]


def lora_notes(scheduler: Mapping[str, Any], channels: int, file: str, peft_file: str = "", *, other_vae: bool) -> str:
    """Return how ComfyUI and A1111 apply a LoRA to its base, in markdown.

    Args:
        channels: of the model's latents.
        file: words for the file to copy.
        peft_file: the name of a file with diffusers' names, which has to be converted first; "" = the file has kohya's.
        other_vae: True if the LoRA was trained with another VAE than its base has.
    """
    if sentence := other_channels(channels):
        return sentence
    comfy, webui = sampling_notes(scheduler, "BASE.safetensors")
    places = "`models/loras` in ComfyUI" + ("" if is_flow(scheduler) else " or `models/Lora` in A1111")
    convert = ""
    if peft_file:
        command = code(f"fastsd convert {peft_file} lora-kohya.safetensors --to lora-kohya")
        convert = f": {command}. ComfyUI ignores the UNet's attention layers in a file with diffusers' names"
    notes = [f"copy {file} to {places}{convert}."]
    if other_vae:
        notes.append(
            "The base needs the VAE of this model: `fastsd swap-vae BASE FOLDER OUT` puts it in, and "
            "`fastsd convert OUT BASE.safetensors` writes the result for these programs."
        )
    notes += [f"ComfyUI: {note}" for note in comfy] + [f"A1111, Forge: {note}" for note in webui]
    if comfy and not is_flow(scheduler):
        notes.append("Here `BASE.safetensors` is the file of the base model.")
    return " ".join(notes)
