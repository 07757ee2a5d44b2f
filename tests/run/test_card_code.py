"""Every program in a model card is run. It draws the image that fastsd draws from the same noise."""

import json
import re
from types import ModuleType

import numpy as np
import pytest
import torch
from adapters import move
from model_files import edit_json, spoil
from tiny import make_tiny_model

from fastsd.config.schema import LoraTable, ModelTable, SampleTable
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.formats.load import load_model
from fastsd.model.formats.lora_weights import write_lora
from fastsd.model.formats.model_source import open_source
from fastsd.model.formats.model_summary import Adapters, Samples
from fastsd.model.formats.write import write_single_file
from fastsd.model.lora import add_lora
from fastsd.run.card_code import SAMPLERS
from fastsd.run.model_card import untrained, write_card
from fastsd.sampling.generate import generate, load_to_sample
from fastsd_kernels import noise

SIZE, SEED, PROMPT = 32, 5, "a red circle, " * 40 + "a blue star"  # longer than two windows
TABLES = {name: SampleTable(sampler=name, steps=4, guidance=9.0, negative="green star") for name in SAMPLERS}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose text encoder has four layers, and whose scaling factor is that of SD1.5."""
    folder = tmp_path_factory.mktemp("card") / "tiny"
    make_tiny_model(folder, text_layers=4)
    edit_json("vae/config.json", scaling_factor=0.18215)(folder)
    return folder


def summary_of(table: SampleTable, **fields):
    settings = table.model_dump(include={"sampler", "steps", "guidance", "negative"})
    return untrained("title", "base").model_copy(
        update={"resolution": SIZE, "samples": Samples(step=1, prompts=[PROMPT], **settings)} | fields
    )


def programs(folder) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)


def replaced(program: str, load: str) -> str:
    """Replace the line `pipe = ...` of a program, as the card says."""
    (line,) = re.findall(r"^pipe = .*$", program, re.MULTILINE)
    return program.replace(line, load)


def drawn(program: str, monkeypatch, size: int = SIZE, **names) -> np.ndarray:
    """Run a program on the CPU in fp32, from fastsd's noise. Return the pixels of its image."""
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

    eps = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([SEED]), (4, size // 2, size // 2))
    monkeypatch.setattr(pipeline_stable_diffusion, "randn_tensor", lambda shape, **_: eps.expand(shape))
    for text, value in {'"cuda"': '"cpu"', r"torch\.b?float16": "torch.float32", **names}.items():
        program, count = re.subn(text, lambda _, value=value: value, program)
        assert count, text
    namespace = vars(ModuleType("program"))
    exec(program, namespace)
    return np.asarray(namespace["image"]).astype(int)


def ours(folder, table: SampleTable, size: int = SIZE, **settings) -> np.ndarray:
    model = load_to_sample(ModelTable(base=str(folder), **settings), "cpu")
    return np.asarray(generate(model, [PROMPT], [SEED], table, size)[0]).astype(int)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(abs(a - b).max())


@pytest.mark.parametrize("sampler", ["dpm++", "ddim"])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_program_draws_our_image(clip_skip, chunks, sampler, base, tmp_path, monkeypatch):
    folder, table = spoil(base, tmp_path / "model", lambda _: None), TABLES[sampler]
    write_card(tmp_path / "model", summary_of(table, clip_skip=clip_skip, chunks=chunks))
    (program,) = programs(tmp_path / "model")
    image = drawn(program, monkeypatch, FOLDER=folder)
    assert difference(image, ours(folder, table, clip_skip=clip_skip, chunks=chunks)) <= 1
    assert difference(image, ours(folder, table, clip_skip=clip_skip + 1, chunks=chunks)) > 4
    assert difference(image, ours(folder, table, clip_skip=clip_skip, chunks=3 - chunks)) > 4


@pytest.mark.parametrize("chunks", [3, "auto"])
@pytest.mark.parametrize("cut", ["tokens", "commas", "words"])
def test_program_cuts_prompts_as_training_does(cut, chunks, base, tmp_path, monkeypatch):
    folder, table = spoil(base, tmp_path / "model", lambda _: None), TABLES["dpm++"]
    write_card(tmp_path / "model", summary_of(table, clip_skip=1, chunks=chunks, cut=cut))
    (program,) = programs(tmp_path / "model")
    image = drawn(program, monkeypatch, FOLDER=folder)
    assert difference(image, ours(folder, table, clip_skip=1, chunks=chunks, cut=cut)) <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scheduler", [{}, ZERO_SNR], ids=["epsilon", "zero-snr"])
def test_program_names_sampler_negative_prompt_and_size(scheduler, sampler, base, tmp_path, monkeypatch):
    from diffusers import EulerAncestralDiscreteScheduler

    folder, table = spoil(base, tmp_path / "model", edit_json("scheduler/scheduler_config.json", **scheduler)), TABLES[sampler]
    write_card(tmp_path / "model", summary_of(table, resolution=48))
    (program,) = programs(tmp_path / "model")
    if sampler == "euler_a":  # it adds noise in every step, which differs
        step = EulerAncestralDiscreteScheduler.step

        def seeded(self, *args, generator, **options):
            return step(self, *args, **options, generator=torch.Generator().manual_seed(0))

        monkeypatch.setattr(EulerAncestralDiscreteScheduler, "step", seeded)
    image = drawn(program, monkeypatch, 48, FOLDER=folder)
    assert image.shape == (48, 48, 3) and difference(image, ours(folder, table, 48)) <= 1
    assert difference(image, ours(folder, table.model_copy(update={"negative": ""}), 48)) > 4


@pytest.mark.parametrize("sampler", ["ddim", "a\nb"])
def test_program_says_that_it_draws_with_another_sampler(sampler, base, tmp_path, monkeypatch):
    """The summary names a sampler that is unknown, or cannot sample a flow. The folder's own is DPM++."""

    def change(folder):
        edit_json("scheduler/scheduler_config.json", **flow_scheduler({}))(folder)
        edit_json("model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])(folder)

    folder, table = spoil(base, tmp_path / "model", change), TABLES["dpm++"]
    write_card(tmp_path / "model", summary_of(table.model_copy(update={"sampler": sampler})))
    (program,) = programs(tmp_path / "model")
    assert (
        f"# The folder's own sampler. That of the samples is not available for this model: {json.dumps(sampler)}\n" in program
    )
    assert difference(drawn(program, monkeypatch, FOLDER=folder), ours(folder, table)) <= 1
    write_card(tmp_path / "model", summary_of(table))
    assert "own sampler" not in programs(tmp_path / "model")[0]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("factor", [0.18215, 0.5])
def test_single_file_draws_our_image(factor, fold, base, tmp_path, monkeypatch):
    def change(folder):
        edit_json("vae/config.json", scaling_factor=factor)(folder)
        edit_json("scheduler/scheduler_config.json", **ZERO_SNR)(folder)

    folder, table = spoil(base, tmp_path / "model", change), TABLES["dpm++"]
    write_single_file(open_source(folder), tmp_path / "model.safetensors", dtype="fp32", fold=fold)
    write_card(tmp_path / "model", summary_of(table, clip_skip=1), single="model.safetensors", fold=fold)
    program, load = programs(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    image = drawn(replaced(program, load), monkeypatch, FOLDER=folder)
    assert difference(image, ours(folder, table, clip_skip=1)) <= 1


@pytest.mark.parametrize("names", ["kohya", "peft"])
def test_lora_draws_our_image(names, base, tmp_path, monkeypatch):
    lora = LoraTable(rank=2, alpha=1.0, text_encoder=True)
    model = load_model(ModelTable(base=str(base)))
    add_lora(model, lora, 0)
    move(model)
    write_lora(tmp_path / "lora.safetensors", model, names=names, metadata={})
    other = spoil(base, tmp_path / "model", edit_json("vae/config.json", scaling_factor=0.25))  # as after a swap of the VAE
    adapters = Adapters.model_validate(lora.model_dump())
    write_card(tmp_path / "model", summary_of(TABLES["dpm++"], lora=adapters, vae="other"))
    load, program = programs(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    image = drawn(replaced(program, load), monkeypatch, FOLDER=other, BASE=str(base))
    before = ours(other, TABLES["dpm++"])
    model.vae = load_model(ModelTable(base=other)).vae
    expected = np.asarray(generate(model, [PROMPT], [SEED], TABLES["dpm++"], SIZE)[0]).astype(int)
    assert difference(image, expected) <= 1 and difference(before, expected) > 4
