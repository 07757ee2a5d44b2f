"""Model cards on ComfyUI and A1111, for every prediction, number of channels, and kind of weights."""

from itertools import product
from pathlib import Path

import pytest
from model_files import converted, edit_json, spoil
from sentences import says
from tiny import make_wide_model

from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.formats.model_summary import Adapters, ModelSummary
from fastsd.model.model import SD15_SCHEDULER
from fastsd.run.model_card import write_card

SCHEDULERS = {
    "epsilon": SD15_SCHEDULER, "v": SD15_SCHEDULER | {"prediction_type": "v_prediction"},
    "flow": flow_scheduler(SD15_SCHEDULER, 3.0),
}  # fmt: skip
LORA = Adapters(rank=2, alpha=1.0, targets=["attention"])


@pytest.mark.parametrize(("prediction", "channels", "lora"), product(SCHEDULERS, (4, 16), (False, True)))
def test_card_of_each_combination(prediction, channels, lora, tiny_model, tmp_path):
    scheduler = edit_json("scheduler/scheduler_config.json", **SCHEDULERS[prediction])
    folder = Path(spoil(tiny_model, tmp_path / "model", scheduler))
    edit_json("vae/config.json", latent_channels=channels)(folder)
    write_card(folder, ModelSummary(base="base", lora=LORA if lora else None), single="model.safetensors")
    card = (folder / "README.md").read_text()
    section = card[card.index("## LoRA" if lora else "## Usage") :]
    section = section[: section.index("## Usage")] if lora else section
    loads, flow = channels == 4, prediction == "flow"
    assert says(section, "card-channels", channels=channels) == (not loads)
    assert says(section, "card-comfy-flow", shift=3) == (loads and flow) == says(section, "card-webui-flow")
    assert says(section, "card-comfy-v", zsnr="false") == (loads and prediction == "v")
    assert says(section, "card-lora-webui-v" if lora else "card-webui-v") == (loads and prediction == "v")
    if lora:
        assert says(section, "card-lora-file", file="it") == (loads and not flow)
        assert says(section, "card-lora-file-flow", file="it") == (loads and flow)
    assert ("models/Stable-diffusion" in section) == (loads and not flow and not lora)


def test_a_lora_of_another_vae_says_how_to_make_its_base(tiny_model, tmp_path):
    folder = Path(spoil(tiny_model, tmp_path / "model", lambda _: None))
    for vae, expected in (("base", False), ("other", True)):
        write_card(folder, ModelSummary(base="base", vae=vae, lora=LORA))
        assert says((folder / "README.md").read_text(), "card-lora-base") == expected


def test_convert_prints_the_instructions_of_a_flow(tiny_model, tmp_path):
    """A model with other channels gets none, because these programs cannot load it."""
    scheduler = edit_json("scheduler/scheduler_config.json", **SCHEDULERS["flow"])
    folder = Path(spoil(tiny_model, tmp_path / "in", scheduler))
    write_card(folder, ModelSummary(), single="out.safetensors")
    card = (folder / "README.md").read_text().replace("*", "")
    lines = [line for line in converted(folder, tmp_path / "out.safetensors").splitlines() if line.startswith("flow, ")]
    assert len(lines) == 2 and all(line.partition(": ")[2] in card for line in lines)
    make_wide_model(tmp_path / "wide")
    scheduler(tmp_path / "wide")
    assert "flow, " not in converted(tmp_path / "wide", tmp_path / "wide.safetensors")
