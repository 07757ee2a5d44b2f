"""Models in and out: folders, single files, hub ids, what other tools make of ours, and what is refused."""

import shutil

import pytest
import torch
from model_files import edit_json, single_file, spoil
from tiny import make_tiny_model, tiny_vae

from fastsd.config.schema import ModelTable
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model, load_vae
from fastsd.model.unet import UNetConfig
from fastsd.model.weights import diffusers_state_dict
from fastsd.storage import read_safetensors


def states(model):
    return {
        "unet": diffusers_state_dict(model.unet),
        "text": model.text.module.state_dict(),
        "vae": model.vae.module.state_dict(),
    }


def assert_same(a, b):
    for part in a:
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part


def test_folder_there_and_back(tmp_path):
    made = make_tiny_model(tmp_path / "m")
    loaded = load_model(ModelTable(base=str(tmp_path / "m")))
    assert_same(states(made), states(loaded))
    assert loaded.unet.cfg == made.unet.cfg
    assert loaded.vae.scaling_factor == 0.5 and loaded.vae.hash == made.vae.hash
    ids = loaded.text.tokenize(["a red circle", ""])
    assert ids.shape == (2, 77) and torch.equal(ids, made.text.tokenize(["a red circle", ""]))


def test_diffusers_runs_our_folder_and_makes_our_image(tiny_model):
    """`from_pretrained` on the folder, and its DDIM from our first latents gives our latents' image."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from fastsd.config.schema import SampleTable
    from fastsd.sampling.generate import generate
    from fastsd_kernels import noise

    names = read_safetensors(tiny_model / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (4, 16, 16))
    theirs = pipe("a red circle", num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="pt").images[0]
    ours = generate(
        load_model(ModelTable(base=str(tiny_model))), ["a red circle"], [5],
        SampleTable(sampler="ddim", steps=4, guidance=3.0), 32,
    )[0]  # fmt: skip
    pixels = torch.tensor(list(ours.getdata())).view(32, 32, 3).permute(2, 0, 1) / 255
    assert (pixels - theirs).abs().max() <= 0.5 / 255 + 1e-4


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A small model with SD1.5's own counts of heads and norm groups, which a single file cannot tell."""
    cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=64)
    folder = tmp_path_factory.mktemp("wide") / "m"
    model = make_tiny_model(folder, cfg)
    model.vae.module = tiny_vae(groups=32, width=32, factor=0.18215)
    single_file(folder.parent / "m.safetensors", model)
    return model, folder.parent / "m.safetensors", folder / "tokenizer"


def test_single_file(wide):
    made, path, tokenizer = wide
    loaded = load_model(ModelTable(base=str(path), tokenizer=str(tokenizer)))
    assert_same(states(made), states(loaded))
    assert loaded.vae.scaling_factor == 0.18215
    vae = load_vae(ModelTable(base="", vae=str(path), vae_scaling_factor=0.13025))
    assert vae.scaling_factor == 0.13025
    with pytest.raises(UserError, match="has no tokenizer; set model.tokenizer"):
        load_model(ModelTable(base=str(path)))
    with pytest.raises(UserError, match="does not say its scaling factor; add model.vae_scaling_factor"):
        load_model(ModelTable(base=str(path), vae=str(path), tokenizer=str(tokenizer)))


def test_vae_from_elsewhere(tmp_path, tiny_model):
    tiny_vae(factor=0.13025, seed=3).save_pretrained(tmp_path / "vae")
    model = load_model(ModelTable(base=str(tiny_model), vae=str(tmp_path / "vae")))
    assert model.vae.scaling_factor == 0.13025
    assert model.vae.hash != load_model(ModelTable(base=str(tiny_model))).vae.hash
    again = load_vae(ModelTable(base="", vae=str(tiny_model)))  # a whole model named as VAE
    assert again.scaling_factor == 0.5


def only_pickles(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def cut(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD = [
    (only_pickles, "only pickled weights"),
    (cut, "cannot be read as safetensors"),
    (lambda f: shutil.rmtree(f / "unet"), "there is no unet/config.json in it"),
    (lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be read as JSON"),
    (edit_json("unet/config.json", cross_attention_dim=24), "expected"),
    (edit_json("unet/config.json", class_embed_type="timestep"), "not an SD1.5 UNet's"),
    (edit_json("scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type is 'sample'; give a base with"),
    (lambda f: shutil.rmtree(f / "tokenizer"), "no CLIP tokenizer there"),
    (edit_json("vae/config.json", _class_name="AutoencoderTiny"), "give an AutoencoderKL"),
    (edit_json("text_encoder/config.json", num_hidden_layers=3), "missing"),
]


@pytest.mark.parametrize("change, sentence", BAD, ids=[sentence for _, sentence in BAD])
def test_broken_folders(tmp_path, tiny_model, change, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_model(ModelTable(base=spoil(tiny_model, tmp_path / "m", change)))
    assert "\n" not in str(error.value)


def test_what_cannot_be_found_or_does_not_fit(tmp_path, tiny_model):
    with pytest.raises(UserError, match="no such folder or file, and not a hub id"):
        load_model(ModelTable(base=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="pickled weights; run `fastsd convert"):
        (tmp_path / "x.ckpt").write_bytes(b"x")
        load_model(ModelTable(base=str(tmp_path / "x.ckpt")))
    tiny_vae(channels=16).save_pretrained(tmp_path / "vae16")
    with pytest.raises(UserError, match="has 16 latent channels and the UNet of .* takes 4; choose a VAE with 4"):
        load_model(ModelTable(base=str(tiny_model), vae=str(tmp_path / "vae16")))
    with pytest.raises(UserError, match="the text encoder has 2 layers; choose 0 to 1"):
        load_model(ModelTable(base=str(tiny_model), clip_skip=2))


def test_the_hub_out_of_reach(monkeypatch, tiny_model):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="model.base is 'owner/model': no such folder here, and the hub did not give it"):
        load_model(ModelTable(base="owner/model"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tiny_model))
    assert load_model(ModelTable(base="owner/model")).name == "owner/model"


def test_clip_skip_is_the_earlier_layer_with_the_final_norm(tiny_model):
    model = load_model(ModelTable(base=str(tiny_model), clip_skip=1))
    ids = model.text.tokenize(["a red circle"])
    out = model.text.module(ids, output_hidden_states=True)
    assert torch.equal(model.text.encode(ids), model.text.final_layer_norm(out.hidden_states[-2]))
    model.text.clip_skip = 0
    assert torch.equal(model.text.encode(ids), out.last_hidden_state)
