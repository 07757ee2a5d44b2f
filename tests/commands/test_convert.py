"""`fastsd convert`: every form there and back with the same bits, what other tools make of them, and the fold."""

import json
import math
import shutil
import subprocess
import sys
import types

import pytest
import torch
from tiny import make_tiny_model, tiny_vae

from fastsd.commands.convert import ConvertOptions, convert
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats import fold_vae, single_file_layout
from fastsd.model.formats.load import load_model, load_vae
from fastsd.model.formats.original_names import PREFIX, ema_name, original_names
from fastsd.model.shapes import SD15_TEXT, SD15_VAE
from fastsd.model.unet import UNetConfig
from fastsd.model.vae import SD15_SCALING_FACTOR
from fastsd.model.weights import expected_tensors
from fastsd.storage import TensorFile, read_safetensors, write_safetensors

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}  # fmt: skip
SD15 = {"unet": UNetConfig.sd15().to_diffusers(), "vae": SD15_VAE, "text_encoder": SD15_TEXT}


def converted(name, out, to="", **options):
    """Convert, and return what was said."""
    lines = []
    convert(str(name), out, to, ConvertOptions(**options), lines.append)
    return lines


def states(folder):
    return {part: read_safetensors(folder / file) for part, file in FILES.items()}


def assert_same(a, b):
    for part in a:
        assert a[part].keys() == b[part].keys(), part
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), part


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with SD1.5's own counts of heads and norm groups, and SD1.5's factor."""
    folder = tmp_path_factory.mktemp("convert") / "m"
    cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=64)
    make_tiny_model(folder, cfg)
    tiny_vae(groups=32, width=32, factor=SD15_SCALING_FACTOR).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def file(model):
    converted(model, model.parent / "one.safetensors")
    return model.parent / "one.safetensors"


def test_a_file_and_back_is_bit_equal(model, file, tmp_path):
    lines = converted(file, tmp_path / "back", tokenizer=str(model))
    assert lines[0].startswith("unet: one.safetensors, ") and lines[-1].endswith(" MB, diffusers")
    assert_same(states(model), states(tmp_path / "back"))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (model / name).read_text() == (tmp_path / "back" / name).read_text()
    vae = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (model, tmp_path / "back")]
    assert vae[0] == vae[1]
    assert all(name.startswith("text_model.") for name in states(tmp_path / "back")["text_encoder"])


def test_names_are_the_original_ones():
    """Full size: diffusers' own conversion functions make of our names, one for one, the names that we started from."""
    from diffusers.loaders import single_file_utils as theirs

    found = {}
    for part, config in SD15.items():
        targets = expected_tensors(part, config, "")
        names = original_names(part, config, targets)
        assert len(set(names.values())) == len(names)
        state = {PREFIX[part] + old: torch.empty(targets[name].shape, device="meta") for name, old in names.items()}
        if part == "unet":
            back = theirs.convert_ldm_unet_checkpoint(dict(state), config)
        elif part == "vae":
            back = theirs.convert_ldm_vae_checkpoint(dict(state), config)
        else:
            back = theirs.convert_ldm_clip_checkpoint(dict(state))
        assert back.keys() == names.keys()
        assert all(back[name] is state[PREFIX[part] + old] for name, old in names.items())
        found[part] = len(names)
    assert found == {"unet": 686, "vae": 248, "text_encoder": 196}


def assert_ours(folder, *pipes):
    """Pipelines of diffusers draw what our sampler draws of a folder, from the same latents."""
    from diffusers import DDIMScheduler

    from fastsd.sampling.generate import denoise, load_to_sample
    from fastsd_kernels import noise

    ours = load_to_sample(ModelTable(base=str(folder)), "cpu")
    eps = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (4, 16, 16))
    latents = denoise(ours, ["a red circle"], eps, [5], SampleTable(sampler="ddim", steps=3, guidance=3.0))
    image = ours.vae.decode(latents)[0] / 2 + 0.5
    for pipe in pipes:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe("a red circle", num_inference_steps=3, guidance_scale=3.0, latents=eps, output_type="pt").images[0]
        assert (image - theirs).abs().max() <= 1e-4


def test_diffusers_draws_our_image(model, file, tmp_path):
    """From the folder, from the file, and of a VAE of another factor from a file that is read as one of SD1.5's."""
    from diffusers import StableDiffusionPipeline

    load = StableDiffusionPipeline.from_single_file
    assert_ours(
        model,
        StableDiffusionPipeline.from_pretrained(model, local_files_only=True),
        load(file, config=str(model), local_files_only=True),
    )
    shutil.copytree(model, tmp_path / "xl")
    tiny_vae(groups=32, width=32, factor=0.13025, seed=5).save_pretrained(tmp_path / "xl" / "vae")
    converted(tmp_path / "xl", tmp_path / "xl.safetensors")
    assert_ours(tmp_path / "xl", load(tmp_path / "xl.safetensors", config=str(model), local_files_only=True))


def test_dtype_variant_and_shards(model, tmp_path):
    from diffusers import StableDiffusionPipeline

    converted(model, tmp_path / "half", dtype="fp16", variant="fp16", shard=5e-4)
    shards = sorted(path.name for path in (tmp_path / "half" / "unet").glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model.fp16-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    assert all(path.stat().st_size < 1e6 for path in (tmp_path / "half").rglob("*.safetensors"))
    half = {part: {name: t.half() for name, t in state.items()} for part, state in states(model).items()}
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path / "half", variant="fp16", local_files_only=True, torch_dtype=torch.float16
    )
    theirs = pipe.unet.state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in half["unet"].items())
    lines = converted(tmp_path / "half", tmp_path / "whole")
    assert "diffusion_pytorch_model.safetensors.index.fp16.json, " in lines[0] and lines[0].endswith(" in fp16")
    assert_same(half, states(tmp_path / "whole"))
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    loaded = load_model(ModelTable(base=str(tmp_path / "half")))  # shards and variants train, too
    assert torch.equal(loaded.unet.conv_in.weight, half["unet"]["conv_in.weight"].float())


def test_averages_pickles_and_what_lies_beside(model, file, tmp_path):
    """A checkpoint as its trainer left it: pickled, averages by names without dots, the trainer's own things, position ids."""
    state = read_safetensors(file)
    averages = {
        ema_name(name.removeprefix(PREFIX["unet"])): t * 2 for name, t in state.items() if name.startswith(PREFIX["unet"])
    }
    ids = {PREFIX["text_encoder"] + "text_model.embeddings.position_ids": torch.arange(77)[None]}
    whole = {**state, **averages, **ids, "alphas_cumprod": torch.rand(9), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "old.ckpt")
    lines = converted(tmp_path / "old.ckpt", tmp_path / "raw", tokenizer=str(model))
    said = "\n".join(lines)
    assert "ignored what lies beside state_dict: global_step" in said and "ignored alphas_cumprod" in said
    assert f"{len(averages) + 1} averaged (EMA) tensors ignored, --ema takes them" in said
    assert_same(states(model), states(tmp_path / "raw"))
    converted(tmp_path / "old.ckpt", tmp_path / "ema", tokenizer=str(model), ema=True)
    mine, theirs = states(model)["unet"], states(tmp_path / "ema")["unet"]
    assert mine.keys() == theirs.keys() and all(torch.equal(theirs[name], t * 2) for name, t in mine.items())


def test_a_checkpoint_that_names_its_trainers_class(file, tmp_path, monkeypatch):
    """As the first models' do, as a key beside their weights; the trainer is not here, and nothing of it is made."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    trainer = types.ModuleType(name)
    trainer.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    parents = ("pytorch_lightning", "pytorch_lightning.callbacks")
    with monkeypatch.context() as there:
        for parent in parents:
            there.setitem(sys.modules, parent, types.ModuleType(parent))
        there.setitem(sys.modules, name, trainer)
        whole = {"state_dict": read_safetensors(file), "callbacks": {trainer.ModelCheckpoint: {"best": 1.0}}}
        torch.save(whole, tmp_path / "old.ckpt")
    converted(tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    mine, theirs = read_safetensors(file), read_safetensors(tmp_path / "new.safetensors")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_folders_of_pickled_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "bin")
    for part, name in FILES.items():
        path = tmp_path / "bin" / name
        stem = "pytorch_model" if part == "text_encoder" else "diffusion_pytorch_model"
        torch.save(read_safetensors(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    with pytest.raises(UserError, match="only pickled weights .*; run `fastsd convert`"):
        load_model(ModelTable(base=str(tmp_path / "bin")))
    converted(tmp_path / "bin", tmp_path / "out")
    assert_same(states(model), states(tmp_path / "out"))


def test_a_file_without_vae_or_text_encoder(model, file, tmp_path):
    state = {name: t for name, t in TensorFile(file).stored().items() if name.startswith(PREFIX["unet"])}
    write_safetensors(tmp_path / "unet.safetensors", state)
    with pytest.raises(UserError, match="there is no text encoder in it; name a model that has one with --tokenizer"):
        converted(tmp_path / "unet.safetensors", tmp_path / "out")
    with pytest.raises(UserError, match="there is no vae in it; name one with --vae"):
        converted(tmp_path / "unet.safetensors", tmp_path / "out", tokenizer=str(model))
    converted(tmp_path / "unet.safetensors", tmp_path / "out", tokenizer=str(model), vae=str(model))
    assert_same(states(model), states(tmp_path / "out"))
    base = {"base": str(tmp_path / "unet.safetensors"), "vae": str(model)}
    loaded = load_model(ModelTable(tokenizer=str(model), **base))
    assert torch.equal(loaded.text.final_layer_norm.weight, states(model)["text_encoder"]["text_model.final_layer_norm.weight"])
    shutil.copytree(model / "tokenizer", tmp_path / "words")
    with pytest.raises(UserError, match="which has no text encoder; set model.tokenizer to a diffusers folder"):
        load_model(ModelTable(tokenizer=str(tmp_path / "words"), **base))


@pytest.mark.parametrize("shift", [0.0, 0.0609, -1.3])
@pytest.mark.parametrize("factor", [0.13025, 0.3611, 1.5305])
def test_the_fold(factor, shift):
    """At 0.18215 and without shift, the folded VAE is the VAE at its own factor and shift."""
    vae = tiny_vae(factor=factor, seed=1)
    config = dict(vae.config) | {"shift_factor": shift}
    said, tensors = fold_vae.fold(config, vae.state_dict(), "")
    assert (said["scaling_factor"], said["shift_factor"]) == (SD15_SCALING_FACTOR, None)
    folded = tiny_vae()
    folded.load_state_dict(tensors)
    torch.manual_seed(0)
    z, image = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert (folded.decode(z / SD15_SCALING_FACTOR).sample - vae.decode(z / factor + shift).sample).abs().max() <= 1e-5
        mine, theirs = folded.encode(image).latent_dist, vae.encode(image).latent_dist
    assert (mine.mean * SD15_SCALING_FACTOR - (theirs.mean - shift) * factor).abs().max() <= 1e-5
    assert (mine.logvar - theirs.logvar - 2 * math.log(factor / SD15_SCALING_FACTOR)).abs().max() <= 1e-5
    changed = [name for name, tensor in vae.state_dict().items() if not torch.equal(tensor, tensors[name])]
    assert {name.split(".")[0] for name in changed} == {"quant_conv", "post_quant_conv"}
    back = fold_vae.unfold(said, tensors, fold_vae.undo(config, vae.state_dict()))
    assert back and all(torch.equal(back[1][name], tensor) for name, tensor in vae.state_dict().items())
    assert back[0] == config


def test_a_fold_into_a_vae_without_those_convolutions():
    from diffusers import AutoencoderKL

    config = dict(tiny_vae().config) | {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5}
    torch.manual_seed(0)
    plain = AutoencoderKL.from_config(config)
    said, tensors = fold_vae.fold(config | {"shift_factor": 0.1}, plain.state_dict(), "")
    folded = AutoencoderKL.from_config(said)
    folded.load_state_dict(tensors)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert (folded.decode(z / SD15_SCALING_FACTOR).sample - plain.decode(z / 1.5 + 0.1).sample).abs().max() <= 1e-5


def test_a_swapped_vae_in_one_file(model, tmp_path):
    """Other tools decode it right; back here it has its own factor, its own bits, and so its latent cache."""
    shutil.copytree(model, tmp_path / "xl")
    tiny_vae(groups=32, width=32, factor=0.13025, seed=5).save_pretrained(tmp_path / "xl" / "vae")
    lines = converted(tmp_path / "xl", tmp_path / "xl.safetensors", dtype="fp16")
    assert any("factor 0.13025 folded" in line for line in lines)
    mine = load_vae(ModelTable(base=str(tmp_path / "xl")))
    # As a tool that knows no factors reads it: by the original names, at 0.18215.
    theirs = tiny_vae(groups=32, width=32)
    state = {name: t for name, t in read_safetensors(tmp_path / "xl.safetensors").items() if name.startswith(PREFIX["vae"])}
    _, named = single_file_layout.read_part(tmp_path, state, {}, "vae", [])
    theirs.load_state_dict({name: tensor.float() for name, tensor in named.items()})
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs.decode(z / SD15_SCALING_FACTOR).sample - mine.module.decode(z / 0.13025).sample).abs().max() < 0.02
    converted(tmp_path / "xl", tmp_path / "whole.safetensors")
    converted(tmp_path / "whole.safetensors", tmp_path / "back", tokenizer=str(model))
    assert_same(states(tmp_path / "xl"), states(tmp_path / "back"))
    again = load_vae(ModelTable(base=str(tmp_path / "back")))
    assert (again.scaling_factor, again.hash) == (0.13025, mine.hash)
    lines = converted(tmp_path / "xl", tmp_path / "plain.safetensors", fold=False)
    assert any(line.startswith("warning: VAE: factor 0.13025 not folded") for line in lines)
    # A VAE that someone has baked over the folded one is not unfolded.
    state, metadata = read_safetensors(tmp_path / "whole.safetensors"), TensorFile(tmp_path / "whole.safetensors").metadata
    state[PREFIX["vae"] + "quant_conv.bias"] += 1
    write_safetensors(tmp_path / "baked.safetensors", state, metadata)
    lines = converted(tmp_path / "baked.safetensors", tmp_path / "baked", tokenizer=str(model))
    assert any("not unfolded" in line for line in lines)
    assert json.loads((tmp_path / "baked" / "vae" / "config.json").read_text())["scaling_factor"] == SD15_SCALING_FACTOR


def test_prediction_and_zero_snr_go_along(model, tmp_path):
    shutil.copytree(model, tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    said = json.loads(path.read_text()) | {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        "_class_name": "DDIMScheduler",
    }  # fmt: skip
    path.write_text(json.dumps(said))
    converted(tmp_path / "v", tmp_path / "v.safetensors")
    state = read_safetensors(tmp_path / "v.safetensors")
    assert state["v_pred"].numel() == state["ztsnr"].numel() == 0
    write_safetensors(tmp_path / "bare.safetensors", state)  # without our header, by the marks alone
    for name in ("v", "bare"):
        converted(tmp_path / f"{name}.safetensors", tmp_path / f"back-{name}", tokenizer=str(model))
        back = json.loads((tmp_path / f"back-{name}" / "scheduler" / "scheduler_config.json").read_text())
        assert back == said if name == "v" else back["prediction_type"] == "v_prediction" and back["rescale_betas_zero_snr"]


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """160 MB in fp32 to fp16, in a process that cannot have 80 MB more than it has once its libraries are loaded.

    What it may ask for is limited, for what of it is resident depends on what else the machine does; the file is mapped before
    that, and no more of it may be looked at through the mapping.
    """
    for name, size in (("small", 40), ("big", 40_000_000)):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: torch.ones(size)})
    code = """
import resource, torch
from pathlib import Path
from fastsd.storage import TensorFile, write_safetensors
def kilobytes(file, word):
    return int(next(line for line in file if line.startswith(word)).split()[1])
small, big = (TensorFile(Path(name + ".safetensors")).stored() for name in ("small", "big"))
def convert(tensors):
    write_safetensors(Path("half.safetensors"), tensors, dtype=torch.float16, finite="it")
convert(small)
size = kilobytes(open("/proc/self/status"), "VmSize") << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (80 << 20), resource.RLIM_INFINITY))
convert(big)
try:
    torch.empty(40_000_000)
except RuntimeError:
    print("too much")
maps = open("/proc/self/smaps")
print(sum(kilobytes(maps, "Rss") for line in maps if line.rstrip().endswith("big.safetensors")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, looked_at = done.stdout.splitlines()
    assert refused == "too much" and int(looked_at) < 80_000
    assert read_safetensors(tmp_path / "half.safetensors")["big"].sum(dtype=torch.float64) == 40_000_000


def test_a_tokenizer_from_the_hubs_cache(model, file, tmp_path, monkeypatch):
    import huggingface_hub.constants

    place = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(model / "tokenizer", place / "snapshots" / "abc")
    (place / "snapshots" / "abc" / "config.json").write_text("{}")  # of the whole CLIP that lies there
    (place / "snapshots" / "abc" / "special_tokens_map.json").write_bytes(b'{"unk_token": "\xff"}\r\n')  # copied, never read
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    with pytest.raises(UserError, match="has no tokenizer; name one, --tokenizer openai/clip-vit-large-patch14 for example"):
        converted(file, tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "tokenizer: openai/clip-vit-large-patch14's, from the hub's cache" in converted(file, tmp_path / "out")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / "tokenizer" / name).read_bytes() == (model / "tokenizer" / name).read_bytes()
    assert not (tmp_path / "out" / "tokenizer" / "config.json").exists()
    assert (tmp_path / "out" / "tokenizer" / "special_tokens_map.json").read_bytes().endswith(b'\xff"}\r\n')
    (place / "snapshots" / "abc" / "special_tokens_map.json").unlink()
    assert load_model(ModelTable(base=str(file))).text.tokenize(["a"]).shape == (1, 77)


def test_a_hub_id_of_pickled_weights(model, tmp_path, monkeypatch):
    """They are fetched only where there are no others, and only to be converted; the revision goes along."""
    import huggingface_hub

    asked = []

    def fetch(name, revision, allow_patterns, **others):
        asked.append((name, revision, [pattern for pattern in allow_patterns if pattern.endswith(".bin")]))
        return str(model if asked[-1][2] else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    converted("owner/old", tmp_path / "out.safetensors", revision="v1")
    assert asked == [("owner/old", "v1", []), ("owner/old", "v1", ["*diffusion_pytorch_model*.bin", "text_encoder/*.bin"])]
