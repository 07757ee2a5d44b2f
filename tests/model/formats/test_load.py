"""Load models from folders, single files and hub ids, load our folders in diffusers, and refuse unusable models."""

import shutil

import pytest
import torch
from model_files import assert_same, edit_json, make_small_sd15, single_file, spoil
from safetensors.torch import load_file
from sentences import refused, says
from tiny import make_tiny_model, tiny_vae

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.model.formats.load import load_model, load_tokenizer, load_vae, table_of
from fastsd.model.formats.model_source import read_component
from fastsd.model.formats.single_file_layout import CONFIGS
from fastsd.model.weights import diffusers_state_dict
from fastsd.storage import write_safetensors


def state_dicts(model):
    modules = {"text": model.text.module, "vae": model.vae.module}
    return {"unet": diffusers_state_dict(model.unet), **{name: module.state_dict() for name, module in modules.items()}}


def test_folder_round_trip(tmp_path):
    model = make_tiny_model(tmp_path / "m")
    loaded = load_model(ModelTable(base=str(tmp_path / "m")))
    assert_same(state_dicts(model), state_dicts(loaded))
    assert loaded.unet.cfg == model.unet.cfg
    assert loaded.vae.scaling_factor == 0.5 and loaded.vae.hash == model.vae.hash
    ids = loaded.text.tokenize(["a red circle", ""])
    assert ids.shape == (2, 77) and torch.equal(ids, model.text.tokenize(["a red circle", ""]))


def test_diffusers_loads_our_folder_and_draws_the_same_image(tiny_model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from fastsd.sampling.generate import generate
    from fastsd_kernels import noise

    names = load_file(tiny_model / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (4, 16, 16))
    expected = pipe("a red circle", num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="pt").images[0]
    model, table = load_model(ModelTable(base=str(tiny_model))), SampleTable(sampler="ddim", steps=4, guidance=3.0)
    image = generate(model, ["a red circle"], [5], table, 32)[0]
    pixels = torch.tensor(list(image.getdata())).view(32, 32, 3).permute(2, 0, 1) / 255
    assert (pixels - expected).abs().max() <= 0.5 / 255 + 1e-4


def test_config_supplies_settings_the_model_does_not_store(tmp_path):
    config = ModelTable(base="b", vae="v", revision="r", clip_skip=1, chunks=2, prediction="v_prediction", zero_snr=True)
    captions = {"clip_skip": 1, "chunks": 2}
    assert table_of("m", config) == ModelTable(base="m", **captions)
    assert table_of("b", config) == ModelTable(base="b", revision="r", **captions)
    ours, other = tmp_path / "ours.safetensors", tmp_path / "other.safetensors"
    write_safetensors(ours, {}, {CONFIGS: "{}"})
    write_safetensors(other, {})
    missing = {"prediction": "v_prediction", "zero_snr": True}
    assert table_of(str(ours), config) == ModelTable(base=str(ours), tokenizer="b", **captions)
    assert table_of(str(other), config) == ModelTable(base=str(other), tokenizer="b", **captions, **missing)
    own_factor = ModelTable(base=str(ours), vae_scaling_factor=0.13)
    assert table_of(str(other), own_factor) == ModelTable(base=str(other), vae_scaling_factor=0.13)
    assert table_of(str(other), own_factor.model_copy(update={"vae": "v"})) == ModelTable(base=str(other))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small model with SD1.5's counts of heads and norm groups, which a single file does not contain."""
    folder = tmp_path_factory.mktemp("wide") / "m"
    model = make_small_sd15(folder)
    single_file(folder.parent / "m.safetensors", model)
    return model, folder.parent / "m.safetensors", folder / "tokenizer"


def test_single_file(wide):
    model, path, tokenizer = wide
    loaded = load_model(ModelTable(base=str(path), tokenizer=str(tokenizer)))
    assert_same(state_dicts(model), state_dicts(loaded))
    assert loaded.vae.scaling_factor == 0.18215
    vae = load_vae(ModelTable(base="", vae=str(path), vae_scaling_factor=0.13025))
    assert vae.scaling_factor == 0.13025
    with refused("single-file-tokenizer", base=path):
        load_model(ModelTable(base=str(path)))
    with refused("vae-factor-unknown", source=path):
        load_model(ModelTable(base=str(path), vae=str(path), tokenizer=str(tokenizer)))


def test_vae_of_another_folder(tmp_path, tiny_model):
    tiny_vae(factor=0.13025, seed=3).save_pretrained(tmp_path / "vae")
    model = load_model(ModelTable(base=str(tiny_model), vae=str(tmp_path / "vae")))
    assert model.vae.scaling_factor == 0.13025
    assert model.vae.hash != load_model(ModelTable(base=str(tiny_model))).vae.hash
    assert load_vae(ModelTable(base="", vae=str(tiny_model))).scaling_factor == 0.5  # a complete model given as VAE


def test_a_model_without_vae_is_refused(tmp_path, tiny_model, wide):
    path = tmp_path / "unet.safetensors"
    state = load_file(wide[1])
    write_safetensors(path, {name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")})
    for table, is_replaced in ((ModelTable(base=str(path)), False), (ModelTable(base=str(tiny_model), vae=str(path)), True)):
        with refused("no-vae", source=path) as error:
            load_vae(table)
        assert ("another" in str(error.value).rpartition(";")[2]) == is_replaced


def test_a_text_encoder_of_another_width_is_refused(tmp_path, tiny_model, wide):
    def change(folder):
        shutil.rmtree(folder / "text_encoder")
        shutil.copytree(wide[2].parent / "text_encoder", folder / "text_encoder")

    base = spoil(tiny_model, tmp_path / "m", change)
    with refused("text-width", base=base, width=64, cross_attention_dim=16):
        load_model(ModelTable(base=base))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_broken_tokenizer_is_refused(name, tmp_path, tiny_model):
    base = spoil(tiny_model, tmp_path / "m", lambda folder: (folder / "tokenizer" / name).write_text("{"))
    with refused("tokenizer-broken", folder=tmp_path / "m" / "tokenizer") as error:
        load_tokenizer(ModelTable(base=base))
    assert "\n" not in str(error.value)


def only_pickles(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def cut_unet(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


predict_samples = edit_json("scheduler/scheduler_config.json", prediction_type="sample")
BAD = [  # change of a folder, code and fields of the error
    (only_pickles, "only-pickled-weights", {}),
    (cut_unet, "safetensors-unreadable", {}),
    (lambda f: shutil.rmtree(f / "unet"), "component-missing", {"component": "unet"}),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no-weights", {}),
    (lambda f: (f / "unet" / "config.json").write_text("{"), "json-unreadable", {}),
    (edit_json("unet/config.json", cross_attention_dim=24), "weights-shape", {}),
    (edit_json("unet/config.json", class_embed_type="timestep"), "other-unet", {"key": "class_embed_type"}),
    (predict_samples, "scheduler-prediction", {"prediction": "'sample'"}),
    (lambda f: shutil.rmtree(f / "tokenizer"), "no-tokenizer", {}),
    (edit_json("vae/config.json", _class_name="AutoencoderTiny"), "not-a-vae", {}),
    (edit_json("text_encoder/config.json", num_hidden_layers=3), "weights-names", {"kind": "missing"}),
]


@pytest.mark.parametrize("change, code, fields", BAD, ids=[code for _, code, _ in BAD])
def test_broken_folders_are_refused(tmp_path, tiny_model, change, code, fields):
    with refused(code, **fields) as error:
        load_model(ModelTable(base=spoil(tiny_model, tmp_path / "m", change)))
    assert "\n" not in str(error.value)


def test_missing_and_mismatched_models_are_refused(tmp_path, tiny_model):
    with refused("source-missing", field="model.base"):
        load_model(ModelTable(base=str(tmp_path / "nowhere")))
    with refused("source-pickled", field="model.base"):
        (tmp_path / "x.ckpt").write_bytes(b"x")
        load_model(ModelTable(base=str(tmp_path / "x.ckpt")))
    tiny_vae(channels=16).save_pretrained(tmp_path / "vae16")
    with refused("vae-channels", channels=16, in_channels=4, in_channels_2=4):
        load_model(ModelTable(base=str(tiny_model), vae=str(tmp_path / "vae16")))
    with refused("clip-skip", layers=2, layers_2=1):
        load_model(ModelTable(base=str(tiny_model), clip_skip=2))


def test_hub_id_without_a_connection(monkeypatch, tiny_model):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with refused("hub-failed", field="model.base", name="'owner/model'"):
        load_model(ModelTable(base="owner/model"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tiny_model))
    assert load_model(ModelTable(base="owner/model")).name == "owner/model"


def test_clip_skip_reads_an_earlier_layer_through_the_final_norm(tiny_model):
    model = load_model(ModelTable(base=str(tiny_model), clip_skip=1))
    ids = model.text.tokenize(["a red circle"])
    out = model.text.module(ids, output_hidden_states=True)
    assert torch.equal(model.text.encode(ids), model.text.final_layer_norm(out.hidden_states[-2]))
    model.text.clip_skip = 0
    assert torch.equal(model.text.encode(ids), out.last_hidden_state)


def test_a_text_encoder_beside_the_tokenizer_is_used_only_if_the_base_has_none(tmp_path, wide):
    model, path, _ = wide
    tokenizer = str(tmp_path / "other" / "tokenizer")
    make_tiny_model(tmp_path / "other", model.unet.cfg, seed=5)
    other = load_model(ModelTable(base=str(tmp_path / "other")))
    with_own = load_model(ModelTable(base=str(path), tokenizer=tokenizer))
    assert_same({"text": state_dicts(model)["text"]}, {"text": state_dicts(with_own)["text"]})
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("cond_stage_model.")}
    base = "no-text.safetensors"
    write_safetensors(tmp_path / base, tensors)
    without = load_model(ModelTable(base=str(tmp_path / base), tokenizer=tokenizer))
    assert_same({"text": state_dicts(other)["text"]}, {"text": state_dicts(without)["text"]})
    assert_same({"unet": state_dicts(model)["unet"]}, {"unet": state_dicts(without)["unet"]})
    assert not with_own.notes
    assert any(says(note, "text-encoder-from-2", folder=tmp_path / "other", file=base) for note in without.notes)


def test_the_prediction_of_the_base_can_be_changed_with_a_note(tiny_model):
    plain = load_model(ModelTable(base=str(tiny_model)))
    same = load_model(ModelTable(base=str(tiny_model), prediction="epsilon"))
    changed = load_model(ModelTable(base=str(tiny_model), prediction="v_prediction"))
    assert plain.prediction == same.prediction == "epsilon" and plain.scheduler == same.scheduler
    assert changed.prediction == "v_prediction"
    assert plain.notes == same.notes == [] and len(changed.notes) == 1 and "v_prediction" in changed.notes[0]
    zero = load_model(ModelTable(base=str(tiny_model), prediction="v_prediction", zero_snr=True))
    expected = {"timestep_spacing": "trailing", "_class_name": "DDIMScheduler", "clip_sample": False}
    assert expected.items() <= zero.scheduler.items() and zero.scheduler["rescale_betas_zero_snr"] is True
    with refused("zero-snr-epsilon", base=tiny_model):
        load_model(ModelTable(base=str(tiny_model), zero_snr=True))


@pytest.mark.parametrize("old", [False, True], ids=["current", "old"])
def test_a_vae_alone_in_a_file_may_have_the_names_of_diffusers(old, tmp_path):
    from safetensors.torch import save_file

    vae = tiny_vae(groups=32, width=32)
    renamed = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."} if old else {}
    state = {}
    for name, tensor in vae.state_dict().items():
        for new_name, old_name in renamed.items():
            name = name.replace(new_name, old_name)
        state[name] = tensor
    save_file(state, tmp_path / "vae.safetensors")
    loaded = load_vae(ModelTable(base="", vae=str(tmp_path / "vae.safetensors"), vae_scaling_factor=0.5))
    assert_same({"vae": vae.state_dict()}, {"vae": loaded.module.state_dict()})


def test_ignored_files_of_a_folder_are_noted(tmp_path, tiny_model):
    shutil.copytree(tiny_model / "unet", tmp_path / "m" / "unet")
    notes = ["earlier"]
    assert read_component(tmp_path / "m", "unet", notes).tensors and notes == ["earlier"]
    write_safetensors(tmp_path / "m" / "unet" / "other.safetensors", {"a": torch.ones(1)})
    read_component(tmp_path / "m", "unet", notes)
    assert len(notes) == 2 and "ignored other.safetensors" in notes[1]
    assert len(read_component(tmp_path / "m", "unet").tensors) > 100  # without a list of notes
