"""The configs in configs/: the presets fit their cards, and the commands at the head of each file work in their order."""

import re
import shlex

import pytest
from environment import ROOT

from fastsd.config.keys import LIGHT, defaults, keys_with
from fastsd.config.schema import load_config
from fastsd.config.stages import StageTable
from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes
from fastsd.model.unet import UNetConfig
from fastsd.plan.plan import GIB, RESERVED, plan_stage
from fastsd_kernels import TRITON

DISPLAY = 1.0  # GiB
# What CUDA reports as the memory of the common card with the least, in GiB: PyTorch prints it when memory runs out.
CARDS = {"xlsd-12gb": ("RTX 3060", 11.75), "xlsd-16gb": ("RTX 4060 Ti", 15.55), "xlsd-24gb": ("RTX 3090", 23.69)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CARDS, "xlsd"])
def test_a_preset_fits_its_card_and_a_display(name):
    config = load_config(ROOT / "configs" / f"{name}.toml")
    card, memory = CARDS.get(name, CARDS["xlsd-24gb"])
    shapes = Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    light, room = {**defaults(StageTable, keys_with(StageTable, LIGHT)), "until": 1}, int((memory - DISPLAY) * GIB) - RESERVED
    stages = {repr(stage.model_copy(update=light)): stage for stage in config.stage}
    assert len(stages) == 2  # both of the UNet are alike
    for stage in stages.values():
        plan = plan_stage(shapes, stage, config.data.resolution, room, TRITON)
        size = stage.micro_batch_size if stage.micro_batch != "auto" else plan.largest_micro_batch()
        assert size and plan.need(size).total <= room, (name, stage.name)
    if name in CARDS:
        text = (ROOT / "configs" / f"{name}.toml").read_text()
        assert {stage.precision for stage in config.stage} == {"bf16"} and f"{card} of" in text
        assert f"CUDA reports {memory} GiB" in text and f"--vram {memory - DISPLAY:.2f}" in text
        assert [stage.train for stage in config.stage] == [
            stage.train for stage in load_config(ROOT / "configs/xlsd.toml").stage
        ]


def test_presets_are_named_where_users_look():
    for page in ("configs/README.md", "docs/smaller-cards.md"):
        names = set(re.findall(r"`(?:configs/)?(xlsd-\d+gb)\.toml`", (ROOT / page).read_text()))
        assert names == CARDS.keys(), page


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_each_command_of_a_header_has_what_it_needs(path):
    """A config is cached before it is trained, and a run or a model exists before it is used."""
    text = path.read_text()
    lines = [line[6:] for line in text.splitlines() if line.startswith("#     fastsd ")]
    folders = {"demo-out"} if path.stem == "demo" else set()
    for name in re.findall(r"Continues from ([\w-]+\.toml)", text):
        folders.add(load_config(ROOT / "configs" / name).run)
    views = set()
    for line in lines:
        command, *words = shlex.split(re.split(r" {3,}|\(", line.replace("fastsd ", "", 1).lstrip())[0])
        words = [word for word in words if not word.startswith("-")]
        needed = [word for word in words if re.match(r"(runs|models|demo-out)/", word) and not word.endswith(".toml")]
        if command == "long-clip":
            folders.add(needed.pop())
        assert all(any(f"{word}/".startswith(f"{folder}/") for folder in folders) for word in needed), line
        for name in (re.sub("^.*/", "", word) for word in words if word.endswith(".toml")):
            config = load_config(ROOT / "configs" / name)
            view = repr((config.data, config.model.vae or config.model.base, config.cache))
            assert view in views or command not in ("train", "check", "redraw"), line
            views |= {view} if command == "cache" else set()
            runs = [word[4:] for word in words if word.startswith("run=")] or [config.run]
            folders |= set(runs) if command in ("train", "sweep") else set()
