"""Export of a run: folder, single file and LoRA with the same weights, their metadata, and the model card."""

import errno
import json
import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commandline import fastsd
from environment import ROOT
from runs import run
from safetensors import safe_open
from safetensors.torch import load_file
from sentences import refused, says
from tiny import job, tiny_vae

from fastsd import __version__
from fastsd.commands.convert import convert
from fastsd.config.schema import ModelTable, load_config
from fastsd.model.formats.load import load_model, write_rest
from fastsd.model.formats.model_source import open_source
from fastsd.model.formats.model_summary import ModelSummary, metadata_of, read_summary, summary_in
from fastsd.model.formats.write import write_single_file
from fastsd.model.latent_space import LatentSpace
from fastsd.plan.disk import export_bytes
from fastsd.run import checkpoint
from fastsd.run import export as export_module
from fastsd.run.card_vae import CardVae
from fastsd.run.export import bytes_of, check_export
from fastsd.run.model_card import public_name, summarize, untrained, write_card
from fastsd.terminal.console import Console

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
LORA_STAGE = '[[stage]]\nname = "lora"\ntrain = ["lora"]\nuntil = 2\nbatch = 4\noptimizer = "adamw"\nlr = 1e-2\nema = 0.5\n'
EXPORTED = ("model", "model-ema", "model.safetensors", "model-ema.safetensors")
OVERRIDES = ("model.clip_skip=1", "validate.held_out=4", "export.author=someone", 'export.license="openrail"', "data.flip=true")


def exported_files(folder: Path, names=EXPORTED) -> dict[str, bytes]:
    """Return the bytes of every exported file by its path in the run."""
    roots = [folder / name for name in names]
    paths = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model, images) -> tuple[Path, str]:
    """The folder and output of a run with two stages and a VAE whose scaling factor is not SD1.5's."""
    folder = tmp_path_factory.mktemp("export")
    tiny_vae(factor=0.25, seed=1).save_pretrained(folder / "other-vae")
    return run(job(folder, tiny_model, images, STAGES), f'model.vae="{folder / "other-vae"}"', *OVERRIDES)


def test_folder_and_single_file_have_the_same_weights(exported):
    folder, text = exported
    for name in ("model", "model-ema"):
        file = folder / f"{name}.safetensors"
        (line,) = [line for line in text.splitlines() if says(line, "exported-file", path=file, dtype="fp16")]
        assert says(text, "exported-folder", path=folder / name) and "0.25" in line
        components, file_components = open_source(str(folder / name)).components, open_source(str(file)).components
        for component in ("unet", "text_encoder"):
            for key, tensor in components[component].tensors.items():
                assert torch.equal(file_components[component].tensors[key].read(), tensor.read().half()), key
        assert all(t.dtype == torch.float16 for t in load_file(file).values())
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (folder / "model" / weights).read_bytes() == (newest / weights).read_bytes()
    assert not os.path.samefile(folder / "model" / weights, newest / weights)
    assert not any(path.name.startswith(".tmp-") for path in folder.iterdir())
    assert json.loads((folder / "cost.json").read_text())["file_bytes"] == (folder / "model.safetensors").stat().st_size


def test_repeating_the_command_writes_the_same_bytes(exported):
    folder, _ = exported
    before = exported_files(folder)
    path, vae = folder.parent / "job.toml", f'model.vae="{folder.parent / "other-vae"}"'
    run(path, vae, *OVERRIDES)
    assert exported_files(folder) == before and {name.split("/")[0] for name in before} == set(EXPORTED)
    run(path, vae, *OVERRIDES, "export.single_file=false", "export.title=another")
    names = {name for name in EXPORTED if (folder / name).exists()}
    assert names == {"model", "model-ema"} and read_summary(folder / "model").title == "another"
    assert json.loads((folder / "cost.json").read_text())["file_bytes"] == bytes_of(folder / "model")
    run(path, vae, *OVERRIDES)
    assert exported_files(folder) == before


def documented_files() -> set[str]:
    """Return the names that docs/monitoring.md lists as the files of a run."""
    page = (ROOT / "docs" / "monitoring.md").read_text()
    rows = re.search(r"\n    runs/xlsd/\n((?:      .*\n)+)", page)[1].splitlines()
    return {name.split("/")[0] for row in rows for name in row.strip().split("  ")[0].split()}


def test_files_of_a_run_are_documented(exported):
    names = {path.name for path in exported[0].iterdir()}
    assert {"cost.json", "images.json", "lock", "model-ema"} <= names <= documented_files()


def test_metadata_of_a_single_file(exported, tmp_path):
    folder, _ = exported
    header, ema_header = (metadata(folder / f"{name}.safetensors") for name in ("model", "model-ema"))
    spec = {key.removeprefix("modelspec."): value for key, value in header.items() if key.startswith("modelspec.")}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", spec.pop("date"))
    assert spec == {
        "sai_model_spec": "1.0.0", "architecture": "stable-diffusion-v1", "title": "run", "author": "someone",
        "implementation": "https://github.com/Stability-AI/generative-models", "resolution": "16x16", "license": "openrail",
        "prediction_type": "epsilon", "encoder_layer": "2",
    }  # fmt: skip
    assert not any(key.startswith("ss_") for key in header)
    assert json.loads(header["fastsd.images"]) == 20 and json.loads(ema_header["fastsd.weights"]) == "ema"
    summary = read_summary(folder / "model")
    assert summary_in(header) == summary and summary_in({"modelspec.title": "x"}) is None
    for broken in ("{", '"text"', "5"):
        assert summary_in({"fastsd.stages": broken}) is None
        (tmp_path / "fastsd.json").write_text(broken)
        assert read_summary(tmp_path) is None
    header = metadata_of(None, {"prediction_type": "v_prediction"}, 512, title="base")
    assert header["modelspec.prediction_type"] == "v" and header["modelspec.title"] == "base" and "fastsd.base" not in header


def test_card_matches_the_run(exported):
    folder, _ = exported
    config, summary = load_config(folder.parent / "job.toml", list(OVERRIDES)), read_summary(folder / "model")
    assert (summary.base, summary.vae, summary.vae_factor) == ("tiny", "other-vae", 0.25)
    assert (summary.steps, summary.images, summary.dataset, summary.seed) == (5, 20, 21, config.seed)
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    ends = {(row["set"], row["weights"]): row["loss"] for row in rows}
    assert {(loss.set, loss.weights): loss.last for loss in summary.validation} == ends and len(ends) == 2
    card = (folder / "model" / "README.md").read_text()
    assert says(card, "card-based-on", base="`tiny`", vae="`other-vae`") and says(card, "card-samples", guidance=7, steps=2)
    assert says(card, "card-vae", vae="other-vae", channels=4, factor=0.25) and says(card, "card-folded", factor=0.25)
    assert says(card, "card-training", steps=5, images=20) and says(card, "card-dataset", images=21) and says(card, "card-raw")
    assert says(card, "card-all-stages", settings="data.flip = true")
    assert says(card, "card-comfy-clip-skip", layer=-2) and says(card, "card-webui-clip-skip", skip=2)
    for line in (
        'license: "openrail"',
        "| Resolution | 16 px |",
        "| unet | unet | dlion | 1 | fp32 | 4 | 2 | 8 |",
        "| both | unet, text_encoder | lion | text_encoder 0.0002, unet 0.001 | fp32 | 4 | 3 | 12 |",
        "- unet: d0 = 0.0001, caption_dropout = 0.25",
        "- both: ema = 0.5",
        "- red circle",
        "    num_inference_steps=2, guidance_scale=7,",
    ):
        assert line in card, line
    assert "base_model" not in card  # a local folder is not a model of the hub
    assert says((folder / "model-ema" / "README.md").read_text(), "card-ema")
    samples = sorted((folder / "samples").glob("*.png"))[0]
    assert samples.name.startswith("both-") and (folder / "model/samples.png").read_bytes() == samples.read_bytes()


def test_exports_contain_no_local_path(exported, tiny_model):
    folder, _ = exported
    paths = [str(folder.parent), str(tiny_model.parent), str(Path.home()), str(Path.cwd())]
    for name, data in exported_files(folder).items():
        header = data[: 8 + int.from_bytes(data[:8], "little")] if name.endswith(".safetensors") else data
        assert not any(path.encode() in header for path in paths), name


@pytest.mark.slow
def test_lora_is_exported_alone_and_merged(tmp_path, tiny_model, images):
    keys = ["model.lora={rank=2, alpha=1, conv=3, conv_alpha=1.5, text_encoder=true}", 'model.base="' + str(tiny_model) + '"']
    folder, text = run(job(tmp_path, tiny_model, images, LORA_STAGE), *keys)
    assert says(text, "exported-lora", path=folder / "lora.safetensors", names="kohya")
    header = metadata(folder / "lora-ema.safetensors")
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora" and header["ss_network_module"] == "networks.lora"
    assert header["ss_network_dim"] == "2" and float(header["ss_network_alpha"]) == 1 and header["ss_steps"] == "2"
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1.5"}
    exported = load_file(folder / "lora.safetensors")
    assert exported["lora_unet_mid_block_resnets_0_conv1.alpha"] == 1.5
    card = (folder / "model" / "README.md").read_text()
    assert "- lora\n" in card and says(card, "card-lora", rank=2, alpha=1, targets="attention")
    assert says(card, "card-lora-convolutions", rank=3, alpha=1.5)
    assert {path.name for path in folder.iterdir()} <= documented_files()
    names = [*EXPORTED, "lora.safetensors", "lora-ema.safetensors"]
    before = exported_files(folder, names)
    run(folder.parent / "job.toml", *keys)
    assert exported_files(folder, names) == before
    run(folder.parent / "job.toml", *keys, "export.lora=peft")
    assert all(".lora_" in name for name in load_file(folder / "lora.safetensors"))
    assert says(card, "card-lora-file", file="it") and not says(card, "card-lora-peft")
    card = (folder / "model-ema" / "README.md").read_text()
    assert says(card, "card-lora-file", file="the result of this command") and says(card, "card-lora-peft", name="lora-ema")
    command = card.partition("A1111: `fastsd convert ")[2].partition("`")[0].split()
    convert(str(folder / command[0]), tmp_path / command[1], command[3], console=Console(quiet=True))
    assert all(name.startswith("lora_") for name in load_file(tmp_path / command[1]))


@pytest.fixture
def folder(tmp_path, tiny_model) -> Path:
    """A folder with the configs of a model, which tests may change."""
    for name in ("vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    return tmp_path


def card_of(folder: Path, summary: ModelSummary, file: str = "", single: str = "", fold: bool = True, **values) -> str:
    if file:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
    write_card(folder, summary, single=single, fold=fold)
    return (folder / "README.md").read_text()


def test_card_has_instructions_for_other_tools(folder):
    base, note = "stable-diffusion-v1-5/stable-diffusion-v1-5", "The VAE was swapped."
    summary = untrained("swapped", base, "stabilityai/sdxl-vae", note)
    text = card_of(folder, summary, "vae/config.json", scaling_factor=0.13025)
    assert f"base_model: {base}\n" in text and note in text and "](https://huggingface.co/stabilityai/sdxl-vae)" in text
    assert says(text, "card-made") and says(text, "card-convert") and "## Training" not in text
    assert "--no-half-vae" in text and "torch.bfloat16" in text
    text = card_of(folder, summary, "vae/config.json", "a.safetensors", False, scaling_factor=0.5)
    assert says(text, "card-not-folded", file="a.safetensors", factor=0.5) and 'config="FOLDER"' in text
    scheduler = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    text = card_of(folder, summary, "scheduler/scheduler_config.json", **scheduler)
    assert says(text, "card-zero-snr") and says(text, "card-comfy-v", zsnr="true")
    assert says(text, "card-webui-v") and says(text, "card-webui-zero-snr")
    text = card_of(folder, summary, "text_encoder/config.json", max_position_embeddings=248)
    assert says(text, "card-window", window=248)
    text = card_of(folder, summary.model_copy(update={"chunks": 3}), "text_encoder/config.json", max_position_embeddings=77)
    assert says(text, "card-long-captions", chunks=3, tokens=75) and says(text, "card-chunks", chunks=3, window=77)
    assert says(card_of(folder, summary, "vae/config.json", latent_channels=16), "card-channels", channels=16)
    assert read_summary(folder) == summary


def test_card_of_a_vae_whose_statistics_are_folded(tiny_model, tmp_path):
    """The card tells the latent space of training, and a dtype for it. diffusers reads the folder's own factor."""
    model = load_model(ModelTable(base=str(tiny_model)))
    model.vae.set_latent_space(LatentSpace(1.0, 0.0, (0.1, 0.2, -0.3, 0.0), (3.0, 4.0, 5.0, 6.0)))
    write_rest(tmp_path, model)
    assert CardVae.of(tmp_path).space == model.vae.latent_space != CardVae.of(tmp_path).stored == LatentSpace()
    text = card_of(tmp_path, ModelSummary(vae="other"), single="a.safetensors")
    assert says(text, "card-vae-folded", vae="other", channels=4, space="scaling factor 1, mean and deviation of each channel")
    assert "torch.bfloat16" in text and "this VAE may overflow in float16" in text and "already scaled" in text
    assert "register_to_config" not in text


def test_public_name_of_a_model(folder):
    card_of(folder, untrained("swapped", "base"))
    assert public_name(str(folder)) == "swapped" and public_name("owner/name") == "owner/name" and public_name("a/b/c") == "c"


@pytest.mark.parametrize(
    "key, facts",
    [
        ("export.dtype=fp8", ["export.dtype", "'fp8'", "'fp16'", "'bf16'", "'fp32'"]),
        ("export.lora=comfy", ["export.lora", "'comfy'", "'kohya'", "'peft'"]),
        ("export.single_file=1", ["export.single_file", "1", "int", "boolean"]),
        ("export.fold=maybe", ["export.fold", "'maybe'", "boolean"]),
        ("export.licence=mit", ["export.licence", "license"]),
        ("export=fp16", ["export", "'fp16'"]),
        ("save_precision=fp16", ["save_precision", "export.dtype"]),
    ],
)
def test_bad_keys_are_refused(key, facts, tmp_path, tiny_model, images):
    with refused("config-invalid") as error:
        load_config(job(tmp_path, tiny_model, images, LORA_STAGE), [key, "model.lora={rank=2}"])
    assert all(fact in str(error.value) for fact in facts) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_run_without_a_readable_config_is_refused(content, exported, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(exported[0], tmp_path / "run")
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with refused("run-config-unreadable", config=path):
        summarize(folder, checkpoint.checkpoints(folder / "checkpoints")[-1])
    code, _, err = fastsd("convert", folder, tmp_path / "out.safetensors", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and says(err, "run-config-unreadable", config=path) and not (tmp_path / "out.safetensors").exists()


def test_a_full_disk_keeps_the_previous_export(exported, monkeypatch):
    folder, _ = exported
    before = exported_files(folder)

    def disk_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    keys = (f'model.vae="{folder.parent / "other-vae"}"', *OVERRIDES)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_single_file", disk_full)
        with refused("model-not-written", strerror="No space left on device"):
            run(folder.parent / "job.toml", *keys)
    assert exported_files(folder) == before


def test_planned_export_size(exported):
    folder, _ = exported
    config = load_config(folder.parent / "job.toml", list(OVERRIDES))
    components = open_source(str(folder / "model")).components
    sizes = {name: sum(4 * t.numel() for t in files.tensors.values()) for name, files in components.items()}
    written = sum(sum(sizes.values()) + (folder / f"{name}.safetensors").stat().st_size for name in ("model", "model-ema"))
    assert export_bytes(config, sizes) == pytest.approx(written, rel=0.1)  # headers and configs are not counted


def test_converting_the_folder_gives_the_same_single_file(exported, tmp_path):
    folder, _ = exported
    source, summary = open_source(str(folder / "model")), read_summary(folder / "model")
    write_single_file(source, tmp_path / "a.safetensors", dtype="fp16", metadata=metadata_of(summary, source.scheduler, 32))
    assert (tmp_path / "a.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_summary_has_every_fact_of_the_run(exported):
    """Compare the whole summary, so that no field can be left out."""
    folder, _ = exported
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    validation = []
    for weights, first in (("raw", rows[0]), ("ema", rows[-1])):
        last = [row for row in rows if row["weights"] == weights][-1]
        validation.append({"set": "held_out", "weights": weights, "step": 5, "se": last["se"]})
        validation[-1] |= {"first": first["loss"], "first_step": first["step"], "last": last["loss"]}
    stages = [
        {"name": "unet", "train": ["unet"], "optimizer": "dlion", "precision": "fp32", "batch": 4, "steps": 2, "images": 8,
         "lr": 1.0, "settings": {"caption_dropout": "0.25", "d0": "0.0001"}, "changes": []},
        {"name": "both", "train": ["unet", "text_encoder"], "optimizer": "lion", "precision": "fp32", "batch": 4, "steps": 3,
         "images": 12, "lr": {"text_encoder": 0.0002, "unet": 0.001}, "settings": {"ema": "0.5"},
         "changes": []},
    ]  # fmt: skip
    saved_at = (checkpoint.checkpoints(folder / "checkpoints")[-1] / "state.json").stat().st_mtime
    expected = {
        "version": __version__, "author": "someone", "license": "openrail", "note": "", "base": "tiny", "vae": "other-vae",
        "vae_factor": 0.25, "clip_skip": 1, "chunks": 1, "cut": "tokens", "resolution": 16, "seed": 0, "precision": "fp32",
        "steps": 5, "images": 20, "dataset": 21, "stages": stages, "settings": {"data.flip": "true"}, "validation": validation,
        "lora": None,
        "samples": {
            "step": 5, "prompts": ["red circle", "blue star"], "sampler": "dpm++", "steps": 2, "guidance": 7.0,
            "guidance_rescale": 0.0, "weights": "model", "negative": "", "width": 16, "height": 16,
        },
        "date": datetime.fromtimestamp(int(saved_at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }  # fmt: skip
    for name, title, weights in (("model", "run", "raw"), ("model-ema", "run-ema", "ema")):
        assert read_summary(folder / name).model_dump() == expected | {"title": title, "weights": weights}


def test_card_lists_first_and_last_losses(exported):
    folder, _ = exported
    raw, ema = read_summary(folder / "model").validation
    card = (folder / "model" / "README.md").read_text()
    assert f"| held out | as trained | {raw.first:.4f} at step 0 | {raw.last:.4f} ± {raw.se:.4f} at step 5 |" in card
    assert f"| held out | EMA |  | {ema.last:.4f} ± {ema.se:.4f} at step 5 |" in card  # it has been measured only once


def test_metadata_has_sorted_keys(exported):
    header = metadata(exported[0] / "model.safetensors")
    texts = [text for name, text in header.items() if name != "fastsd.vae_unfolded" and text[:1] in ("{", "[")]
    assert len(texts) > 3
    for text in texts:
        assert text == json.dumps(json.loads(text), sort_keys=True)


def test_components_without_adapters_are_copied_from_the_checkpoint(tmp_path, tiny_model, images):
    folder, _ = run(job(tmp_path, tiny_model, images, LORA_STAGE), "model.lora={rank=2}")
    newest = checkpoint.checkpoints(folder / "checkpoints")[-1]
    for name, is_copy in (("text_encoder/model.safetensors", True), ("unet/diffusion_pytorch_model.safetensors", False)):
        assert ((folder / "model" / name).read_bytes() == (newest / name).read_bytes()) == is_copy
        assert not os.path.samefile(folder / "model" / name, newest / name)


@pytest.mark.parametrize("window", [77, 248])
@pytest.mark.parametrize("cut", ["tokens", "commas", "words"])
@pytest.mark.parametrize("chunks", [1, 2, "auto"])
def test_card_explains_long_captions_only_if_there_are_any(chunks, cut, window, folder):
    """`tests/model/test_chunks.py` compares what it says with the formulas of the other tools."""
    summary = untrained("swapped", "base").model_copy(update={"chunks": chunks, "cut": cut})
    text = card_of(folder, summary, "text_encoder/config.json", max_position_embeddings=window)
    assert says(text, "card-long-captions", chunks=3 if chunks == "auto" else chunks, tokens=window - 2) == (chunks != 1)
    assert says(text, "card-empty-chunks", chunks=2) == (chunks == 2)
    names = {"tokens": "card-cut-tokens", "commas": "card-cut-commas", "words": "card-cut-words"}
    assert [name for name in names.values() if says(text, name)] == ([names[cut]] if chunks != 1 else [])
    assert says(text, "card-chunks", chunks="up to 3", window=window) == (chunks == "auto")
    assert says(text, "card-window", window=248) == (window == 248)


def test_a_shifted_vae_that_is_not_folded_is_refused_before_training():
    def check(space, **keys):
        table = SimpleNamespace(**{"single_file": True, "fold": False} | keys)
        check_export(SimpleNamespace(export=table), SimpleNamespace(vae=SimpleNamespace(latent_space=space)))

    for space in (LatentSpace(0.36, 0.12), LatentSpace(1.0, 0.0, (0.1,) * 4, (0.5,) * 4)):
        with refused("export-fold-shift", space=space):
            check(space)
        check(space, fold=True)
        check(space, single_file=False)
    check(LatentSpace(0.13))
