"""What a run ends with: folder, single file and LoRA of the same weights, their metadata, and a card that is true."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from runs import run
from safetensors import safe_open
from tiny import job, tiny_vae

from fastsd.config.schema import load_config
from fastsd.errors import UserError
from fastsd.model.formats.model_source import open_source
from fastsd.model.formats.model_summary import ModelSummary, metadata_of, read_summary, summary_in
from fastsd.model.formats.write import write_single_file
from fastsd.plan.disk import export_bytes
from fastsd.run import checkpoint
from fastsd.run import export as export_module
from fastsd.run.export import bytes_of
from fastsd.run.model_card import called, untrained, write_card
from fastsd.storage import read_safetensors

STAGES = """
[[stage]]
name = "unet"
train = ["unet"]
until = 2
batch = 4
d0 = 1e-4
caption_dropout = 0.25
[[stage]]
name = "both"
train = ["unet", "text_encoder"]
until = "12 images"
batch = 4
optimizer = "lion"
lr = { unet = 1e-3, text_encoder = 2e-4 }
ema = 0.5
"""
LORA = '[[stage]]\nname = "lora"\ntrain = ["lora"]\nuntil = 2\nbatch = 4\noptimizer = "adamw"\nlr = 1e-2\nema = 0.5\n'
EXPORTED = ("model", "model-ema", "model.safetensors", "model-ema.safetensors")
KEYS = ("model.clip_skip=1", "validate.held_out=4", "export.author=someone", 'export.license="openrail"', "data.flip=true")


def contents(folder: Path, names=EXPORTED) -> dict[str, bytes]:
    """Every exported file, by its path in the run."""
    paths = [path for name in names for path in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, images) -> tuple[Path, str]:
    """A run whose VAE has another factor than SD1.5's, in two stages, and what it said."""
    folder = tmp_path_factory.mktemp("export")
    tiny_vae(factor=0.25, seed=1).save_pretrained(folder / "other-vae")
    return run(job(folder, tiny_model, images, STAGES), f'model.vae="{folder / "other-vae"}"', *KEYS)


def test_a_run_ends_with_folder_and_file_of_the_same_weights(whole):
    folder, text = whole
    for name in ("model", "model-ema"):
        said = [line for line in text.splitlines() if re.match(rf"model: {folder / name}(,|\.saf)", line)]
        assert len(said) == 2 and "diffusers folder in fp32" in said[0] and "0.25 folded into" in said[1] and " MB, " in said[1]
        parts, file = open_source(str(folder / name)).parts, folder / f"{name}.safetensors"
        again = open_source(str(file)).parts
        for part in ("unet", "text_encoder"):
            for tensor, was in parts[part].tensors.items():
                assert torch.equal(again[part].tensors[tensor].read(), was.read().half()), tensor
        assert all(t.dtype == torch.float16 for t in read_safetensors(file).values())
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert os.path.samefile(folder / "model" / weights, newest / weights)
    assert not any(path.name.startswith(".tmp-") for path in folder.iterdir())
    assert json.loads((folder / "cost.json").read_text())["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_the_same_line_again_writes_the_same_bytes(whole, tmp_path):
    folder, _ = whole
    before = contents(folder)
    path, vae = folder.parent / "job.toml", f'model.vae="{folder.parent / "other-vae"}"'
    run(path, vae, *KEYS)
    assert contents(folder) == before and {name.split("/")[0] for name in before} == set(EXPORTED)
    run(path, vae, *KEYS, "export.single_file=false", "export.title=another")
    names = {name for name in EXPORTED if (folder / name).exists()}
    assert names == {"model", "model-ema"} and read_summary(folder / "model").title == "another"
    assert json.loads((folder / "cost.json").read_text())["file_bytes"] == bytes_of(folder / "model")
    run(path, vae, *KEYS)
    assert contents(folder) == before


def test_a_files_metadata_tells_what_it_is(whole, tmp_path):
    folder, _ = whole
    told, averaged = (metadata(folder / f"{name}.safetensors") for name in ("model", "model-ema"))
    assert {key.removeprefix("modelspec."): value for key, value in told.items() if key.startswith("modelspec.")} == {
        "sai_model_spec": "1.0.0", "architecture": "stable-diffusion-v1", "title": "run", "author": "someone",
        "implementation": "https://github.com/Stability-AI/generative-models", "resolution": "16x16", "license": "openrail",
        "prediction_type": "epsilon", "encoder_layer": "2", "date": told["modelspec.date"],
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["modelspec.date"])
    assert not any(key.startswith("ss_") for key in told)
    assert json.loads(told["fastsd.images"]) == 20 and json.loads(averaged["fastsd.weights"]) == "ema"
    # What a file tells becomes a folder's summary again, whatever else stands in its header.
    summary = read_summary(folder / "model")
    assert summary_in(told) == summary and summary_in({"modelspec.title": "x"}) is None
    for broken in ("{", '"text"', "5"):
        assert summary_in({"fastsd.stages": broken}) is None
        (tmp_path / "fastsd.json").write_text(broken)
        assert read_summary(tmp_path) is None
    nothing = metadata_of(None, {"prediction_type": "v_prediction"}, 512, title="base")
    assert nothing["modelspec.prediction_type"] == "v" and nothing["modelspec.title"] == "base" and "fastsd.base" not in nothing


def test_the_card_is_the_runs(whole, tiny_model):
    folder, _ = whole
    config, summary = load_config(folder.parent / "job.toml", list(KEYS)), read_summary(folder / "model")
    assert (summary.base, summary.vae, summary.vae_factor) == ("tiny", "other-vae", 0.25)
    assert (summary.steps, summary.images, summary.dataset, summary.seed) == (5, 20, 21, config.seed)
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    ends = {(row["set"], row["weights"]): row["loss"] for row in rows}
    assert {(loss.set, loss.weights): loss.last for loss in summary.validation} == ends and len(ends) == 2
    card = (folder / "model" / "README.md").read_text()
    for line in (
        "license: \"openrail\"", "It starts from `tiny`, with `other-vae` in place of its VAE.",
        "| VAE | other-vae, 4 channels, scaling factor 0.25 (SD1.5's is 0.18215) |", "| Resolution | 16 px |",
        "| Images seen | 20, in 5 steps |", "| Data set | 21 images |", "| Weights | as trained |",
        "| unet | unet | dlion | 1 | fp32 | 4 | 2 | 8 |",
        "| both | unet, text_encoder | lion | text_encoder 0.0002, unet 0.001 | fp32 | 4 | 3 | 12 |",
        "- unet: d0 = 0.0001, caption_dropout = 0.25", "- both: ema = 0.5", "- all stages: data.flip = true",
        "- red circle", "dpm++, 2 steps, guidance 7", "guidance_scale=7, clip_skip=1).images[0]", "stop_at_clip_layer -2",
        "Set *Clip skip* to 2.", "in the file the VAE's factor 0.25 is part of its weights",
    ):  # fmt: skip
        assert line in card, line
    assert "base_model" not in card  # a folder of this machine is no model of the hub
    assert "| Weights | their exponential moving average |" in (folder / "model-ema" / "README.md").read_text()
    samples = sorted((folder / "samples").glob("*.png"))[0]
    assert samples.name.startswith("both-") and (folder / "model/samples.png").read_bytes() == samples.read_bytes()


def test_no_path_of_this_machine_is_told(whole, tiny_model):
    folder, _ = whole
    exported = contents(folder)
    places = [str(folder.parent), str(tiny_model.parent), str(Path.home()), str(Path.cwd())]
    for name, data in exported.items():
        header = data[: 8 + int.from_bytes(data[:8], "little")] if name.endswith(".safetensors") else data
        assert not any(place.encode() in header for place in places), name


def test_a_lora_comes_out_by_itself_and_merged(tmp_path, tiny_model, images):
    keys = ["model.lora={rank=2, alpha=1, text_encoder=true}", 'model.base="' + str(tiny_model) + '"']
    folder, text = run(job(tmp_path, tiny_model, images, LORA), *keys)
    assert f"model: {folder}/lora.safetensors" in text and "kohya names" in text
    told = metadata(folder / "lora-ema.safetensors")
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora" and told["ss_network_module"] == "networks.lora"
    assert told["ss_network_dim"] == "2" and float(told["ss_network_alpha"]) == 1 and told["ss_steps"] == "2"
    assert any(name.startswith("lora_unet_") for name in read_safetensors(folder / "lora.safetensors"))
    card = (folder / "model" / "README.md").read_text()
    assert "- lora\n" in card and "(rank 2, alpha 1, on attention, of the text encoder as well)" in card
    names = [*EXPORTED, "lora.safetensors", "lora-ema.safetensors"]
    before = contents(folder, names)
    run(folder.parent / "job.toml", *keys)
    assert contents(folder, names) == before
    run(folder.parent / "job.toml", *keys, "export.lora=peft")
    assert all(".lora_" in name for name in read_safetensors(folder / "lora.safetensors"))


@pytest.fixture
def folder(tmp_path, tiny_model) -> Path:
    """A model's configs, to be written on."""
    for name in ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    return tmp_path


def card(folder: Path, summary: ModelSummary, file: str = "", single: str = "", fold: bool = True, **values) -> str:
    if file:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    write_card(folder, summary, single=single, fold=fold)
    return (folder / "README.md").read_text()


def test_cards_tell_other_tools_what_they_cannot_know(folder):
    summary = untrained(
        "swapped", "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/sdxl-vae", "The VAE was swapped."
    )
    text = card(folder, summary, "vae/config.json", scaling_factor=0.13025)
    assert "base_model: stable-diffusion-v1-5/stable-diffusion-v1-5\n" in text and "The VAE was swapped." in text
    assert "](https://huggingface.co/stabilityai/sdxl-vae)" in text and "made with fastsd" in text and "## Training" not in text
    assert (
        "--no-half-vae" in text and "torch.bfloat16" in text and "`fastsd convert FOLDER model.safetensors` makes one" in text
    )
    text = card(folder, summary, "vae/config.json", "a.safetensors", False, scaling_factor=0.5)
    assert "`a.safetensors` does not have the factor 0.5 folded in" in text and 'config="FOLDER"' in text
    text = card(folder, summary, "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert "| Predicts | v, with a noise schedule that ends in pure noise |" in text and "v_prediction, zsnr true" in text
    assert '`model.yaml`, with `parameterization: "v"`' in text and "Zero Terminal SNR" in text
    text = card(folder, summary, "text_encoder/config.json", max_position_embeddings=248)
    assert "reads 248 tokens at once" in text
    text = card(folder, summary.model_copy(update={"chunks": 3}), "text_encoder/config.json", max_position_embeddings=77)
    assert "up to 3 times 75 tokens" in text and "3 chunks of 77 tokens" in text
    assert "cannot load this model of 16" in card(folder, summary, "vae/config.json", latent_channels=16)
    assert read_summary(folder) == summary
    # A run that starts from an exported folder calls it by its title.
    assert called(str(folder)) == "swapped" and called("owner/name") == "owner/name" and called("a/b/c") == "c"


@pytest.mark.parametrize(
    "key, sentence",
    [("export.dtype=fp8", "export.dtype is 'fp8'; choose 'fp16', 'bf16' or 'fp32'"),
     ("export.lora=comfy", "export.lora is 'comfy'; choose 'kohya' or 'peft'"),
     ("export.single_file=1", "export.single_file is 1 (an int); it must be a boolean"),
     ("export.fold=maybe", "export.fold is 'maybe' (a str); it must be a boolean"),
     ("export.licence=mit", "export.licence: unknown key; did you mean license?"),
     ("export=fp16", "export is 'fp16'"),
     ("save_precision=fp16", "save_precision: unknown key; it is called export.dtype here")],
)  # fmt: skip
def test_bad_keys_are_one_sentence(key, sentence, tmp_path, tiny_model, images):
    with pytest.raises(UserError) as caught:
        load_config(job(tmp_path, tiny_model, images, LORA), [key, "model.lora={rank=2}"])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_file(whole, monkeypatch):
    folder, _ = whole
    before = contents(folder)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    keys = (f'model.vae="{folder.parent / "other-vae"}"', *KEYS)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_single_file", full)
        with pytest.raises(UserError, match="the model could not be written .No space left on device."):
            run(folder.parent / "job.toml", *keys)
    assert contents(folder) == before


def test_what_it_takes_on_the_disk_is_planned(whole, tiny_model, images):
    folder, _ = whole
    config = load_config(folder.parent / "job.toml", list(KEYS))
    sizes = {
        part: sum(4 * t.numel() for t in found.tensors.values())
        for part, found in open_source(str(folder / "model")).parts.items()
    }
    links = {"model": 0, "model-ema": sizes["unet"] + sizes["text_encoder"]}
    taken = sum(links[name] + (folder / f"{name}.safetensors").stat().st_size for name in links)
    assert export_bytes(config, sizes) == pytest.approx(taken, rel=0.1)  # headers and configs are not counted


def test_a_file_can_be_written_by_itself(whole, tmp_path):
    """As convert does it: from the folder, with what the folder tells."""
    folder, _ = whole
    source, summary = open_source(str(folder / "model")), read_summary(folder / "model")
    write_single_file(source, tmp_path / "a.safetensors", dtype="fp16", metadata=metadata_of(summary, source.scheduler, 32))
    assert (tmp_path / "a.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
