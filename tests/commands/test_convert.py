"""`fastsd convert`: equal bits in all formats and back, results in other tools, and folding the VAE."""

import json
import math
import os
import shutil
import subprocess
import sys
import types
from functools import partial

import model_files
import pytest
import torch
from model_files import FILES, assert_same, make_small_sd15, states, zero_snr_folder
from safetensors.torch import load_file
from sentences import refused, says
from tiny import tiny_vae

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.model.formats import fold_vae, single_file_layout
from fastsd.model.formats.load import load_model, load_vae, write_rest
from fastsd.model.formats.model_summary import ModelSummary
from fastsd.model.formats.original_names import PREFIX, ema_name, original_names
from fastsd.model.latent_space import SD15_SCALING_FACTOR
from fastsd.model.shapes import SD15_TEXT, SD15_VAE
from fastsd.model.unet import UNetConfig
from fastsd.model.weights import expected_tensors
from fastsd.run.model_card import write_card
from fastsd.storage import TensorFile, write_safetensors

SD15 = {"unet": UNetConfig.sd15().to_diffusers(), "vae": SD15_VAE, "text_encoder": SD15_TEXT}


def converted(*arguments, **options):
    """Convert a model, and return the printed lines."""
    return model_files.converted(*arguments, **options).splitlines()


def assert_equal(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "m"
    make_small_sd15(folder)
    return folder


@pytest.fixture(scope="module")
def file(model):
    converted(model, model.parent / "one.safetensors")
    return model.parent / "one.safetensors"


def test_file_and_back_is_bit_equal(model, file, tmp_path):
    lines = converted(file, tmp_path / "back", tokenizer=str(model))
    assert lines[0].startswith("unet: one.safetensors, ") and lines[-1].endswith(" MiB, diffusers")
    assert_same(states(model), states(tmp_path / "back"))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (model / name).read_text() == (tmp_path / "back" / name).read_text()
    configs = [json.loads((folder / "vae" / "config.json").read_text()) for folder in (model, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert all(name.startswith("text_model.") for name in states(tmp_path / "back")["text_encoder"])


def test_original_names_are_inverted_by_diffusers():
    """The conversion functions of diffusers map the original names of a full-size model back, one to one."""
    from diffusers.loaders import single_file_utils as diffusers

    counts = {}
    for component, config in SD15.items():
        targets, prefix = expected_tensors(component, config, ""), PREFIX[component]
        names = original_names(component, config, targets)
        assert len(set(names.values())) == len(names)
        state = {prefix + old: torch.empty(targets[name].shape, device="meta") for name, old in names.items()}
        if component == "unet":
            back = diffusers.convert_ldm_unet_checkpoint(dict(state), config)
        elif component == "vae":
            back = diffusers.convert_ldm_vae_checkpoint(dict(state), config)
        else:
            back = diffusers.convert_ldm_clip_checkpoint(dict(state))
        assert back.keys() == names.keys()
        assert all(back[name] is state[prefix + old] for name, old in names.items())
        counts[component] = len(names)
    assert counts == {"unet": 686, "vae": 248, "text_encoder": 196}


def assert_same_image(folder, *pipes):
    """Assert that pipelines of diffusers draw the same image from the same noise as our sampler does with a folder."""
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
        reference = pipe("a red circle", num_inference_steps=3, guidance_scale=3.0, latents=eps, output_type="pt").images[0]
        assert (image - reference).abs().max() <= 1e-4


def test_diffusers_draws_our_image(model, file, tmp_path):
    """The model comes from a folder, from a file, and from a file whose VAE had another scaling factor."""
    from diffusers import StableDiffusionPipeline

    load_file = partial(StableDiffusionPipeline.from_single_file, config=str(model), local_files_only=True)
    assert_same_image(model, StableDiffusionPipeline.from_pretrained(model, local_files_only=True), load_file(file))
    shutil.copytree(model, tmp_path / "xl")
    tiny_vae(groups=32, width=32, factor=0.13025, seed=5).save_pretrained(tmp_path / "xl" / "vae")
    converted(tmp_path / "xl", tmp_path / "xl.safetensors")
    assert_same_image(tmp_path / "xl", load_file(tmp_path / "xl.safetensors"))


def test_dtype_variant_and_shards(model, tmp_path):
    from diffusers import StableDiffusionPipeline

    converted(model, tmp_path / "half", dtype="fp16", variant="fp16", shard=5e-4)
    shards = sorted(path.name for path in (tmp_path / "half" / "unet").glob("*.safetensors"))
    assert shards[0] == f"diffusion_pytorch_model.fp16-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    assert all(path.stat().st_size < 1e6 for path in (tmp_path / "half").rglob("*.safetensors"))
    half = {component: {name: t.half() for name, t in state.items()} for component, state in states(model).items()}
    options = {"variant": "fp16", "local_files_only": True, "torch_dtype": torch.float16}
    weights = StableDiffusionPipeline.from_pretrained(tmp_path / "half", **options).unet.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in half["unet"].items())
    lines = converted(tmp_path / "half", tmp_path / "whole")
    assert "diffusion_pytorch_model.safetensors.index.fp16.json, " in lines[0] and lines[0].endswith(" in fp16")
    assert_same(half, states(tmp_path / "whole"))
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    loaded = load_model(ModelTable(base=str(tmp_path / "half")))  # shards and variants can also be loaded for training
    assert torch.equal(loaded.unet.conv_in.weight, half["unet"]["conv_in.weight"].float())


def test_pickled_checkpoint_with_ema_and_other_entries(model, file, tmp_path):
    """The checkpoint has EMA weights under names without dots, entries of its trainer, and position ids."""
    state = load_file(file)
    prefix = PREFIX["unet"]
    averages = {ema_name(name.removeprefix(prefix)): t * 2 for name, t in state.items() if name.startswith(prefix)}
    ids = {PREFIX["text_encoder"] + "text_model.embeddings.position_ids": torch.arange(77)[None]}
    whole = {**state, **averages, **ids, "alphas_cumprod": torch.rand(9), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": whole, "global_step": 7}, tmp_path / "old.ckpt")
    out = "\n".join(converted(tmp_path / "old.ckpt", tmp_path / "raw", tokenizer=str(model)))
    assert says(out, "ema-ignored", count=len(averages)) and says(out, "entries-ignored", entries="global_step")
    assert out.count("old.ckpt: ignored alphas_cumprod, model_ema.decay\n") == 1
    assert_same(states(model), states(tmp_path / "raw"))
    converted(tmp_path / "old.ckpt", tmp_path / "ema", tokenizer=str(model), ema=True)
    assert_equal(states(tmp_path / "ema")["unet"], {name: t * 2 for name, t in states(model)["unet"].items()})


def test_checkpoint_that_names_its_trainers_class(file, tmp_path, monkeypatch):
    """Early models have such a key beside their weights. The trainer is not installed, and none of its objects is created."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    trainer = types.ModuleType(name)
    trainer.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    parents = ("pytorch_lightning", "pytorch_lightning.callbacks")
    with monkeypatch.context() as patch:
        for parent in parents:
            patch.setitem(sys.modules, parent, types.ModuleType(parent))
        patch.setitem(sys.modules, name, trainer)
        whole = {"state_dict": load_file(file), "callbacks": {trainer.ModelCheckpoint: {"best": 1.0}}}
        torch.save(whole, tmp_path / "old.ckpt")
    converted(tmp_path / "old.ckpt", tmp_path / "new.safetensors")
    assert_equal(load_file(file), load_file(tmp_path / "new.safetensors"))


def test_folders_of_pickled_weights(model, tmp_path):
    shutil.copytree(model, tmp_path / "bin")
    for component, name in FILES.items():
        path = tmp_path / "bin" / name
        stem = "pytorch_model" if component == "text_encoder" else "diffusion_pytorch_model"
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    with refused("only-pickled-weights"):
        load_model(ModelTable(base=str(tmp_path / "bin")))
    converted(tmp_path / "bin", tmp_path / "out")
    assert_same(states(model), states(tmp_path / "out"))


def test_file_without_vae_or_text_encoder(model, file, tmp_path):
    state = {name: t for name, t in TensorFile(file).stored().items() if name.startswith(PREFIX["unet"])}
    write_safetensors(tmp_path / "unet.safetensors", state)
    for options, option in (({}, "--tokenizer"), ({"tokenizer": str(model)}, "--vae")):
        with refused("write-component-missing") as error:
            converted(tmp_path / "unet.safetensors", tmp_path / "out", **options)
        assert option in str(error.value)
    converted(tmp_path / "unet.safetensors", tmp_path / "out", tokenizer=str(model), vae=str(model))
    assert_same(states(model), states(tmp_path / "out"))
    base = {"base": str(tmp_path / "unet.safetensors"), "vae": str(model)}
    loaded = load_model(ModelTable(tokenizer=str(model), **base))
    assert torch.equal(loaded.text.final_layer_norm.weight, states(model)["text_encoder"]["text_model.final_layer_norm.weight"])
    shutil.copytree(model / "tokenizer", tmp_path / "words")
    with refused("single-file-text-encoder"):
        load_model(ModelTable(tokenizer=str(tmp_path / "words"), **base))


def test_a_vae_that_does_not_fit_is_refused(model, file, tmp_path):
    state = {name: t for name, t in TensorFile(file).stored().items() if name.startswith(PREFIX["unet"])}
    write_safetensors(tmp_path / "unet.safetensors", state)
    with refused("convert-no-vae", vae=repr(str(tmp_path / "unet.safetensors"))):
        converted(model, tmp_path / "out", vae=str(tmp_path / "unet.safetensors"))
    tiny_vae(channels=16).save_pretrained(tmp_path / "vae16")
    with refused("convert-vae-channels", place=tmp_path / "vae16", channels=16, unet_channels=4, unet_channels_2=4):
        converted(model, tmp_path / "out", vae=str(tmp_path / "vae16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shift", [0.0, 0.0609, -1.3])
@pytest.mark.parametrize("factor", [0.13025, 0.3611, 1.5305])
def test_folded_vae_equals_the_vae(factor, shift):
    """With factor 0.18215 and no shift, the folded VAE equals the VAE with its own factor and shift."""
    vae = tiny_vae(factor=factor, seed=1)
    config = dict(vae.config) | {"shift_factor": shift}
    folded_config, tensors = fold_vae.fold(config, vae.state_dict(), "")
    assert (folded_config["scaling_factor"], folded_config["shift_factor"]) == (SD15_SCALING_FACTOR, None)
    folded = tiny_vae()
    folded.load_state_dict(tensors)
    torch.manual_seed(0)
    z, image = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert (folded.decode(z / SD15_SCALING_FACTOR).sample - vae.decode(z / factor + shift).sample).abs().max() <= 1e-5
        result, reference = folded.encode(image).latent_dist, vae.encode(image).latent_dist
    assert (result.mean * SD15_SCALING_FACTOR - (reference.mean - shift) * factor).abs().max() <= 1e-5
    assert (result.logvar - reference.logvar - 2 * math.log(factor / SD15_SCALING_FACTOR)).abs().max() <= 1e-5
    changed = [name for name, tensor in vae.state_dict().items() if not torch.equal(tensor, tensors[name])]
    assert {name.split(".")[0] for name in changed} == {"quant_conv", "post_quant_conv"}
    back = fold_vae.unfold(folded_config, tensors, fold_vae.unfold_record(config, vae.state_dict()))
    assert back and all(torch.equal(back[1][name], tensor) for name, tensor in vae.state_dict().items())
    assert back[0] == config


def test_fold_into_a_vae_without_1x1_convolutions():
    from diffusers import AutoencoderKL

    config = dict(tiny_vae().config) | {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5}
    del config["_use_default_values"]  # diffusers resets the keys it lists, whatever they are set to
    torch.manual_seed(0)
    plain = AutoencoderKL.from_config(config)
    assert plain.quant_conv is None and plain.post_quant_conv is None
    folded_config, tensors = fold_vae.fold(config | {"shift_factor": 0.1}, plain.state_dict(), "")
    folded = AutoencoderKL.from_config(folded_config)
    folded.load_state_dict(tensors)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert (folded.decode(z / SD15_SCALING_FACTOR).sample - plain.decode(z / 1.5 + 0.1).sample).abs().max() <= 1e-5


def test_swapped_vae_in_one_file(model, tmp_path):
    """Other tools decode the VAE correctly. Converted back, it has its old factor and bits, so its latent cache stays valid."""
    shutil.copytree(model, tmp_path / "xl")
    tiny_vae(groups=32, width=32, factor=0.13025, seed=5).save_pretrained(tmp_path / "xl" / "vae")
    lines = converted(tmp_path / "xl", tmp_path / "xl.safetensors", dtype="fp16")
    assert any("0.13025 folded" in line for line in lines)
    vae = load_vae(ModelTable(base=str(tmp_path / "xl")))
    # A tool that does not know scaling factors reads the original names and assumes 0.18215.
    read_by_others = tiny_vae(groups=32, width=32)
    state = {name: t for name, t in load_file(tmp_path / "xl.safetensors").items() if name.startswith(PREFIX["vae"])}
    _, named = single_file_layout.read_component(tmp_path, state, {}, "vae", [])
    read_by_others.load_state_dict({name: tensor.float() for name, tensor in named.items()})
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = read_by_others.decode(z / SD15_SCALING_FACTOR).sample
        assert (decoded - vae.module.decode(z / 0.13025).sample).abs().max() < 0.02
    converted(tmp_path / "xl", tmp_path / "whole.safetensors")
    converted(tmp_path / "whole.safetensors", tmp_path / "back", tokenizer=str(model))
    assert_same(states(tmp_path / "xl"), states(tmp_path / "back"))
    again = load_vae(ModelTable(base=str(tmp_path / "back")))
    assert (again.scaling_factor, again.hash) == (0.13025, vae.hash)
    lines = converted(tmp_path / "xl", tmp_path / "plain.safetensors", fold=False)
    assert any(line.startswith("warning: ") and "0.13025 not folded" in line for line in lines)
    # A VAE that replaced the folded one is not unfolded.
    state, metadata = load_file(tmp_path / "whole.safetensors"), TensorFile(tmp_path / "whole.safetensors").metadata
    state[PREFIX["vae"] + "quant_conv.bias"] += 1
    write_safetensors(tmp_path / "baked.safetensors", state, metadata)
    lines = converted(tmp_path / "baked.safetensors", tmp_path / "baked", tokenizer=str(model))
    assert says("\n".join(lines), "vae-not-unfolded")
    assert json.loads((tmp_path / "baked" / "vae" / "config.json").read_text())["scaling_factor"] == SD15_SCALING_FACTOR


def test_prediction_and_zero_snr_are_kept(model, tmp_path):
    shutil.copytree(model, tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler |= {"timestep_spacing": "trailing", "_class_name": "DDIMScheduler"}
    path.write_text(json.dumps(scheduler))
    converted(tmp_path / "v", tmp_path / "v.safetensors")
    state = load_file(tmp_path / "v.safetensors")
    assert state["v_pred"].numel() == state["ztsnr"].numel() == 0
    write_safetensors(tmp_path / "bare.safetensors", state)  # without our header
    for name in ("v", "bare"):
        converted(tmp_path / f"{name}.safetensors", tmp_path / f"back-{name}", tokenizer=str(model))
        back = json.loads((tmp_path / f"back-{name}" / "scheduler" / "scheduler_config.json").read_text())
        assert back["prediction_type"] == "v_prediction" and back["rescale_betas_zero_snr"]
        assert name == "bare" or back == scheduler


def from_bare_file(model, place):
    """Convert a file whose only settings are the marks of other tools."""
    converted(zero_snr_folder(model, place / "in"), place / "v.safetensors")
    write_safetensors(place / "bare.safetensors", load_file(place / "v.safetensors"))
    converted(place / "bare.safetensors", place / "out", tokenizer=str(model))


def from_file_with_configs(model, place):
    """Convert a file whose header has a schedule of PNDM, as fastsd wrote it before."""
    converted(zero_snr_folder(model, place / "in"), place / "v.safetensors")
    header = TensorFile(place / "v.safetensors").metadata
    configs = json.loads(header[single_file_layout.CONFIGS])
    configs["scheduler"] = json.loads((place / "in" / "scheduler" / "scheduler_config.json").read_text())
    header = header | {single_file_layout.CONFIGS: json.dumps(configs)}
    write_safetensors(place / "old.safetensors", load_file(place / "v.safetensors"), header)
    converted(place / "old.safetensors", place / "out", tokenizer=str(model))


def from_trained_model(model, place):
    """Write a loaded model, as training and `swap-vae` do."""
    loaded = load_model(ModelTable(base=str(zero_snr_folder(model, place / "in"))))
    shutil.copytree(place / "in", place / "out")
    write_rest(place / "out", loaded)


ZERO_SNR = {
    "a bare file": from_bare_file,
    "a file with configs": from_file_with_configs,
    "a folder": lambda model, place: converted(zero_snr_folder(model, place / "in"), place / "out"),
    "a model": from_trained_model,
}


@pytest.mark.parametrize("make", ZERO_SNR.values(), ids=ZERO_SNR)
def test_diffusers_samples_from_pure_noise_with_zero_snr(make, model, tmp_path, capfd):
    from diffusers import DiffusionPipeline

    make(model, tmp_path)
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True).scheduler
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] == 0
    assert type(scheduler).__name__ == "DDIMScheduler" and scheduler.config.prediction_type == "v_prediction"
    assert "will be ignored" not in capfd.readouterr().err


@pytest.mark.parametrize("zero_snr", [True, False])
def test_a_v_prediction_file_prints_the_instructions_of_the_card(zero_snr, model, tmp_path):
    folder = zero_snr_folder(model, tmp_path / "v", rescale_betas_zero_snr=zero_snr)
    write_card(folder, ModelSummary(), single="v.safetensors")
    card = (folder / "README.md").read_text().replace("*", "")
    lines = [line for line in converted(folder, tmp_path / "v.safetensors") if line.startswith("v-prediction, ")]
    assert len(lines) == 2 and all(line.partition(": ")[2] in card for line in lines)
    assert f"zsnr {str(zero_snr).lower()}," in lines[0]
    assert not any("v-prediction" in line for line in converted(model, tmp_path / "plain.safetensors"))


def test_a_scheduler_that_supports_zero_snr_is_kept(model, tmp_path):
    converted(zero_snr_folder(model, tmp_path / "in", _class_name="EulerDiscreteScheduler"), tmp_path / "out")
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "EulerDiscreteScheduler" and scheduler["timestep_spacing"] == "trailing"


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """Convert 160 MB from fp32 to fp16 in a process that may allocate at most 80 MB after loading its libraries.

    The limit is on the address space, because resident memory depends on the machine's load. The file is mapped before the
    limit is set, and at most 80 MB of the mapping may become resident.
    """
    for name, size in (("small", 40), ("big", 40_000_000)):
        write_safetensors(tmp_path / f"{name}.safetensors", {name: torch.ones(size)})
    code = """
import resource, torch
from pathlib import Path
from fastsd.terminal.console import Console
from fastsd.run.model_card import write_card
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
    # Only what is in use is counted: no address space of threads and their arenas, nor freed memory that glibc keeps.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    allocation, resident = process.stdout.splitlines()
    assert allocation == "too much" and int(resident) < 80_000
    assert load_file(tmp_path / "half.safetensors")["big"].sum(dtype=torch.float64) == 40_000_000


def test_tokenizer_from_the_hubs_cache(model, file, tmp_path, monkeypatch):
    import huggingface_hub.constants

    clip = tmp_path / "hub" / "models--openai--clip-vit-large-patch14"
    shutil.copytree(model / "tokenizer", clip / "snapshots" / "abc")
    (clip / "snapshots" / "abc" / "config.json").write_text("{}")  # config of the complete CLIP
    (clip / "snapshots" / "abc" / "special_tokens_map.json").write_bytes(b'{"unk_token": "\xff"}\r\n')  # copied, never read
    (clip / "refs").mkdir()
    (clip / "refs" / "main").write_text("abc")
    with refused("write-no-tokenizer"):
        converted(file, tmp_path / "out")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert says("\n".join(converted(file, tmp_path / "out")), "tokenizer-cached", owner="openai/clip-vit-large-patch14")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "out" / "tokenizer" / name).read_bytes() == (model / "tokenizer" / name).read_bytes()
    assert not (tmp_path / "out" / "tokenizer" / "config.json").exists()
    assert (tmp_path / "out" / "tokenizer" / "special_tokens_map.json").read_bytes().endswith(b'\xff"}\r\n')
    (clip / "snapshots" / "abc" / "special_tokens_map.json").unlink()
    assert load_model(ModelTable(base=str(file))).text.tokenize(["a"]).shape == (1, 77)


def test_hub_id_of_pickled_weights(model, tmp_path, monkeypatch):
    """Pickled weights are fetched only for conversion, and only if there are no others. The revision is passed on."""
    import huggingface_hub

    requests = []

    def fetch(name, revision, allow_patterns, **others):
        requests.append((name, revision, [pattern for pattern in allow_patterns if pattern.endswith(".bin")]))
        return str(model if requests[-1][2] else tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    converted("owner/old", tmp_path / "out.safetensors", revision="v1")
    assert requests == [("owner/old", "v1", []), ("owner/old", "v1", ["*diffusion_pytorch_model*.bin", "text_encoder/*.bin"])]


def test_a_hub_id_has_no_ema_weights(model, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(model))
    with refused("source-no-ema", name="'owner/model'"):
        converted("owner/model", tmp_path / "out", ema=True)
    assert not (tmp_path / "out").exists()
