"""LoRA files: kohya's, diffusers' and peft's names, what other tools make of ours, and what is refused."""

import json

import pytest
import torch
from adapters import BOTH, move, relative
from safetensors.torch import save_file
from torch import nn

from fastsd.config.schema import ModelTable, SampleTable
from fastsd.errors import UserError
from fastsd.model.formats.load import load_model
from fastsd.model.formats.lora_files import PEFT_CONFIG, LoraFile, convert_lora, read_lora, write_kohya, write_peft
from fastsd.model.formats.lora_names import kohya_module, kohya_name, tensor_of
from fastsd.model.formats.lora_weights import load_lora, write_lora
from fastsd.model.formats.original_names import original_names
from fastsd.model.lora import add_lora, merge_lora
from fastsd.model.shapes import SD15_TEXT
from fastsd.model.unet import UNetConfig
from fastsd.sampling.generate import generate
from fastsd.storage import TensorFile, read_safetensors, write_safetensors
from fastsd_kernels import noise


@pytest.fixture(scope="module")
def modules():
    """All linear layers and convolutions of SD1.5's UNet and text encoder, as diffusers and transformers name them."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNetConfig.sd15().to_diffusers())
        text = CLIPTextModel(CLIPTextConfig.from_dict(SD15_TEXT))
    named = {"unet.": unet, "text_encoder.text_model.": text}
    return [p + n for p, model in named.items() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def test_every_module_has_kohyas_name_and_diffusers_reads_it(modules):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils import state_dict_utils

    assert len(modules) == 282 + 72 and kohya_name(modules[0]) == "lora_unet_conv_in"
    assert [kohya_module(kohya_name(module)) for module in modules] == modules
    file = {f"{kohya_name(module)}.{leaf}.weight": module for module in modules for leaf in ("lora_up", "lora_down")}
    older, _ = _convert_non_diffusers_lora_to_diffusers(dict(file))
    unet = {name: module for name, module in older.items() if name.startswith("unet.")}
    text = {name: module for name, module in older.items() if name not in unet}
    text = state_dict_utils.convert_state_dict_to_peft(state_dict_utils.convert_state_dict_to_diffusers(text))
    today = state_dict_utils.convert_unet_state_dict_to_peft(unet) | text
    assert len(today) == 2 * len(modules)
    assert all(name.rpartition(".lora_")[0] == module for name, module in today.items())
    # Those names, too, are read: diffusers' of today, its older ones, and peft's.
    for name, module in {**older, **today}.items():
        place = module, "A" if ".down." in name or ".lora_A." in name else "B"
        assert tensor_of(name) == tensor_of(f"base_model.model.{name.partition('.')[2]}") == place


def test_names_by_the_original_layout(modules):
    unet = [module.removeprefix("unet.") for module in modules if module.startswith("unet.")]
    theirs = original_names("unet", UNetConfig.sd15().to_diffusers(), [f"{module}.weight" for module in unet])
    for module in unet:
        name = theirs[f"{module}.weight"].removesuffix(".weight").replace(".", "_")
        assert kohya_module(f"lora_unet_{name}") == f"unet.{module}"
    attention = "transformer_blocks_0_attn1_to_q"
    assert kohya_module(f"lora_unet_input_blocks_4_1_{attention}") == kohya_module(
        f"lora_unet_down_blocks_1_attentions_0_{attention}"
    )
    assert kohya_module("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1") is None


@pytest.fixture(scope="module")
def adapted(tiny_model, tmp_path_factory):
    """(The tiny model with adapters of every kind, alpha not their rank; a folder with them in both kinds of names)."""
    model, folder = load_model(ModelTable(base=str(tiny_model))), tmp_path_factory.mktemp("lora")
    add_lora(model, BOTH, 0)
    move(model)
    for names in ("kohya", "peft"):
        write_lora(folder / f"{names}.safetensors", model, names=names, metadata={"about": "ünì"})
    return model, folder


def test_diffusers_makes_our_image_of_kohyas_file(adapted, tiny_model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    model, folder = adapted
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    merged = load_model(ModelTable(base=str(tiny_model)))
    table = SampleTable(sampler="ddim", steps=2, guidance=3.0)

    def images():
        latents = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (4, 16, 16))
        theirs = pipe("a red circle", num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="pil").images[0]
        ours = generate(merged, ["a red circle"], [5], table, 32)[0]
        return (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in (theirs, ours))

    before, _ = images()
    add_lora(merged, BOTH, 1)
    load_lora(merged, folder / "kohya.safetensors")
    merge_lora(merged)
    pipe.load_lora_weights(folder, weight_name="kohya.safetensors")
    theirs, ours = images()
    assert (theirs - ours).abs().max() <= 1 < 10 < (theirs - before).abs().max()
    ids, x, t = model.text.tokenize(["a red circle"]), torch.ones(1, 4, 16, 16), torch.tensor([700])
    with torch.no_grad():
        for other in (model, merged):
            context = other.text.encode(ids)
            assert relative(pipe.text_encoder(ids).last_hidden_state, context) < 1e-5
            assert relative(pipe.unet(x, t, context).sample, other.unet(x, t, context)) < 1e-5


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_peft_makes_our_result_of_a_file(adapted, tiny_model, part):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from transformers import CLIPTextModel

    model, folder = adapted
    file = TensorFile(folder / "peft.safetensors")
    config = {k.partition(".")[2]: v for k, v in json.loads(file.metadata[PEFT_CONFIG]).items() if k.startswith(f"{part}.")}
    other = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}[part].from_pretrained(tiny_model / part)
    prefix = "unet." if part == "unet" else "text_encoder.text_model."
    inject_adapter_in_model(LoraConfig(**config), other)
    loaded = set_peft_model_state_dict(other, {k.removeprefix(prefix): t for k, t in file.items() if k.startswith(prefix)})
    assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "lora" in name]
    ids, x, t = model.text.tokenize(["a red circle"]), torch.ones(1, 4, 16, 16), torch.tensor([700])
    with torch.no_grad():
        context = model.text.encode(ids)
        if part == "unet":
            assert relative(other(x, t, context).sample, model.unet(x, t, context)) < 1e-5
        else:
            assert relative(other(ids).last_hidden_state, context) < 1e-5


def test_there_and_back_gives_the_same_bytes(adapted, tmp_path):
    _, folder = adapted
    notes = convert_lora(folder / "peft.safetensors", tmp_path / "kohya.safetensors", "lora-kohya")
    assert "with diffusers names, " in notes[0] and "rank 2, 3, alpha 4.5, float32" in notes[0] and len(notes) == 1
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors", "lora-peft")
    convert_lora(folder / "kohya.safetensors", tmp_path / "own.safetensors", "lora-peft")
    want = (folder / "peft.safetensors").read_bytes()
    assert (tmp_path / "peft.safetensors").read_bytes() == (tmp_path / "own.safetensors").read_bytes() == want


@pytest.mark.parametrize("config", [True, False], ids=["with a config", "with none"])
def test_diffusers_own_file_comes_back(adapted, tmp_path, config):
    """As transformers 5 names text layers, in the order of the safetensors library, with and without a header."""
    whole = read_lora(adapted[1] / "peft.safetensors")
    state = {name.replace("text_model.", ""): tensor for name, tensor in whole.tensors.items()}
    text = json.dumps(json.loads(whole.metadata[PEFT_CONFIG]), indent=2)
    save_file(state, tmp_path / "peft.safetensors", {"format": "pt", **({PEFT_CONFIG: text} if config else {})})
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "lora-kohya")
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "lora-peft")
    (first, data), (last, data_back) = (parts(tmp_path / f"{name}.safetensors") for name in ("peft", "back"))
    assert first == last and data == data_back


def parts(path):
    """(The header, the rest) of a file: the library orders what is not a tensor by chance."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


TO_Q, TO_K = (f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_{x}" for x in "qk")
SAME_AS_K = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
CONV, PROJ = "unet.down_blocks.0.resnets.1.conv2", "unet.up_blocks.2.attentions.0.proj_in"
FC1 = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
SHAPES = {TO_Q: ([4, 8], [8, 4]), TO_K: ([4, 16], [8, 4]), CONV: ([2, 8, 3, 3], [8, 2, 1, 1]),
          PROJ: ([8, 8, 1, 1], [8, 8, 1, 1]), FC1: ([3, 6], [24, 3])}  # fmt: skip
ALPHAS = {TO_Q: 4.0, TO_K: 1.0, CONV: 4.3, PROJ: 4.0, FC1: 16.0}


def mixed(dtype: torch.dtype = torch.float32) -> LoraFile:
    """Adapters whose ranks and alphas differ by module."""
    torch.manual_seed(0)
    pairs = {module: zip("AB", shapes, strict=True) for module, shapes in SHAPES.items()}
    tensors = {f"{m}.lora_{letter}.weight": torch.randn(shape).to(dtype) for m, pair in pairs.items() for letter, shape in pair}
    return LoraFile(tensors, dict(ALPHAS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ranks_and_alphas_of_each_module_survive(tmp_path, dtype):
    first, peft, last = (tmp_path / f"{name}.safetensors" for name in ("first", "peft", "last"))
    write_kohya(first, mixed(dtype), {"ss_seed": "3", "sshs_model_hash": "of the first"})
    notes = convert_lora(first, peft, "lora-peft")
    assert notes[0].startswith(
        f"{first}: a LoRA with kohya names, layers: UNet 4, text encoder 1, rank 2, 3, 4, 8, alpha 1, 4, 4.3"
    )
    notes = convert_lora(peft, last, "lora-kohya")
    assert "diffusers (0.42) takes the most common one" in notes[1]
    before, after = read_safetensors(first), read_safetensors(last)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    alpha = before[f"{kohya_name(TO_K)}.alpha"]
    assert alpha.shape == () and alpha.dtype == dtype and before[f"{kohya_name(CONV)}.alpha"].item() == pytest.approx(4.3)
    settings = json.loads(TensorFile(peft).metadata[PEFT_CONFIG])
    assert settings["unet.alpha_pattern"] == {TO_K[5:]: 1, CONV[5:]: pytest.approx(4.3)}
    assert settings["unet.rank_pattern"] == {CONV[5:]: 2, PROJ[5:]: 8} and settings["text_encoder.lora_alpha"] == 16
    header = TensorFile(last).metadata
    assert header["ss_seed"] == "3" and "sshs_model_hash" not in header
    told = {
        "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "ss_base_model_version": "sd_v1",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "4.3"}', "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert told.items() <= header.items() and {"modelspec.title", "modelspec.resolution", "modelspec.implementation"} <= set(
        header
    )


def test_another_dtype(tmp_path):
    write_peft(tmp_path / "peft.safetensors", mixed())
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "half.safetensors", "lora-kohya", "fp16")
    half = read_lora(tmp_path / "half.safetensors")
    assert all(torch.equal(tensor.half(), half.tensors[name]) for name, tensor in mixed().tensors.items())
    assert half.alphas == ALPHAS


def test_other_files_that_are_read(tmp_path):
    """peft's folder with its patterns, older diffusers names, kohya's without alphas, adapters changed by another tool."""
    tensors = mixed().tensors
    (tmp_path / "peft").mkdir()
    unet = {f"base_model.model.{name[5:]}": t for name, t in tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"conv2": 2, "^up.*proj_in": 8},
              "alpha_pattern": {r"attn2\.to_[kv]": 1.0}}  # fmt: skip
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    found = read_lora(tmp_path / "peft")
    factors = {module: found.alphas[module] / rank for module, rank in found.ranks.items()}
    assert factors == pytest.approx({TO_Q: 3, TO_K: 0.5, CONV: 6 / 2**0.5, PROJ: 6 / 8**0.5})

    def older(name: str) -> str:
        name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up").replace("fc1.lora.", "fc1.lora_linear_layer.")
        return name.replace(".to_q.lora.", ".processor.to_q_lora.")

    save_file({older(name): t for name, t in tensors.items()}, tmp_path / "older.safetensors")
    write_kohya(tmp_path / "kohya.safetensors", mixed())
    plain = {name: t for name, t in read_safetensors(tmp_path / "kohya.safetensors").items() if not name.endswith("alpha")}
    save_file(plain, tmp_path / "plain.safetensors")
    for name, kind in (("older", "older diffusers"), ("plain", "kohya")):
        found = read_lora(tmp_path / f"{name}.safetensors")
        assert found.kind == kind and found.alphas == found.ranks
        assert found.tensors.keys() == tensors.keys()
        assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in tensors.items())

    # A UNet's alone, as diffusers' `save_lora_adapter` has it: neither names nor config tell the part.
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {CONV[5:]: 2, PROJ[5:]: 8}}
    save_file(
        {n[5:]: t for n, t in tensors.items() if n[:5] == "unet."},
        tmp_path / "u.safetensors",
        {PEFT_CONFIG: json.dumps(config)},
    )
    convert_lora(tmp_path / "u.safetensors", tmp_path / "unet.safetensors", "lora-peft")
    assert read_lora(tmp_path / "unet.safetensors").alphas == dict.fromkeys((TO_Q, TO_K, CONV, PROJ), 6)
    assert json.loads(TensorFile(tmp_path / "unet.safetensors").metadata[PEFT_CONFIG])["unet.lora_alpha"] == 6

    write_peft(tmp_path / "first.safetensors", mixed())
    convert_lora(tmp_path / "first.safetensors", tmp_path / "second.safetensors", "lora-kohya")
    file = TensorFile(tmp_path / "second.safetensors")
    changed = dict(file) | {f"{kohya_name(TO_K)}.alpha": torch.tensor(2.0)}
    write_safetensors(tmp_path / "changed.safetensors", changed, file.metadata)
    assert read_lora(tmp_path / "changed.safetensors").alphas[TO_K] == 2


def kohya(**changes: torch.Tensor | None):
    """Writes a file in kohya's names whose tensors are others, or missing: `<module>__<down, up or alpha>`."""
    stems = {"k": kohya_name(TO_K), "conv": kohya_name(CONV), "proj": kohya_name(PROJ), "again": SAME_AS_K}

    def make(path):
        write_kohya(path, mixed())
        state = read_safetensors(path)
        for name, tensor in changes.items():
            module, leaf = name.split("__")
            state[f"{stems[module]}.{ {'down': 'lora_down.weight', 'up': 'lora_up.weight'}.get(leaf, leaf) }"] = tensor
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)

    return make


def renamed(old: str, new: str):
    """Writes a file in kohya's names with some of them changed."""

    def make(path):
        write_kohya(path, mixed())
        save_file({name.replace(old, new): tensor for name, tensor in read_safetensors(path).items()}, path)

    return make


def alone(*names: str):
    """Writes a file with these tensors only."""
    return lambda path: save_file({name: torch.ones(1) for name in names}, path)


def peft(change):
    """Writes a file in diffusers' names with peft's config as `change` makes it: in place, or the text it returns."""

    def make(path):
        lora = mixed()
        write_peft(path, lora)
        settings = json.loads(TensorFile(path).metadata[PEFT_CONFIG])
        text = change(settings) or json.dumps(settings)
        save_file(lora.tensors, path, {PEFT_CONFIG: text})

    return make


ones = torch.ones
BROKEN = {
    "SDXL": (renamed("lora_te_", "lora_te1_"), r"has weights of SDXL \(lora_te1_text_model_encoder_layers_1_mlp_fc1"),
    "SDXL's UNet": (renamed("transformer_blocks_0", "transformer_blocks_3"), "has weights of SDXL"),
    "Flux": (renamed("mid_block_attentions_0", "double_blocks_0_img"), "has weights of Flux or SD3"),
    "LoHa": (renamed("lora_up.weight", "hada_w1_a"), "has LoHa's weights"),
    "LoKr": (renamed("lora_up.weight", "lokr_w1"), "has LoKr's weights"),
    "OFT": (renamed("lora_up.weight", "oft_blocks"), "has OFT's weights"),
    "DoRA": (kohya(k__dora_scale=ones(8, 1)), "has DoRA's weights"),
    "LoCon": (renamed("conv2.lora_up.weight", "conv2.lora_mid.weight"), "has weights in Tucker's decomposition"),
    "ControlNet": (alone("lora_controlnet"), "has a ControlNet's weights"),
    "a model": (alone("model.diffusion_model.out.2.weight"), "has a model's weights"),
    "a VAE": (alone("encoder.conv_in.weight"), "has encoder.conv_in.weight, which no LoRA of SD1.5 has"),
    "a layer of none": (renamed("attn2_to_k", "attn3_to_k"), r"attn3_to_k\.\S+, which no LoRA of SD1.5 has"),
    "nothing": (alone("x.alpha"), "there are no adapters in it"),
    "two kinds": (renamed("lora_te_text_model_encoder_layers_1_mlp_fc1", FC1), "of kohya and of older diffusers side by side"),
    "twice": (kohya(again__down=ones(4, 16)), "under another name"),
    "no up": (kohya(k__up=None), f"{TO_K} has no up tensor"),
    "no down": (kohya(k__down=None), f"{TO_K} has no down tensor"),
    "ranks": (kohya(k__up=ones(8, 5)), r"has shapes \(4, 16\) down and \(8, 5\) up, where SD1.5 has \(rank, inputs\)"),
    "a convolution": (kohya(k__down=ones(4, 16, 1, 1)), r"has shapes \(4, 16, 1, 1\) down"),
    "SD2's linear": (kohya(proj__down=ones(8, 8)), r"where SD1.5 has \(rank, inputs, 1, 1\)"),
    "another kernel": (kohya(conv__down=ones(2, 8, 5, 5)), r"where SD1.5 has \(rank, inputs, 3, 3\)"),
    "a scalar": (kohya(k__down=torch.tensor(1.0)), r"has shapes \(\) down"),
    "rank 0": (kohya(k__down=ones(0, 16), k__up=ones(8, 0)), r"has shapes \(0, 16\) down"),
    "NaN": (kohya(k__down=ones(4, 16) / 0), "64 of 64 numbers of .*lora_down.weight are not finite"),
    "integers": (kohya(k__down=ones(4, 16).int()), "is of torch.int32 and torch.float32; give a LoRA in fp16"),
    "alpha 0": (kohya(k__alpha=torch.tensor(0.0)), "alpha is 0; an alpha is one number above 0"),
    "alphas": (kohya(k__alpha=ones(2)), r"alpha is of shape \(2,\); an alpha is one"),
    "no JSON": (peft(lambda config: "{"), "lora_adapter_metadata is no table of JSON"),
    "a list": (peft(lambda config: "[3]"), "lora_adapter_metadata is no table of JSON"),
    "another rank": (peft(lambda config: config.update({"unet.r": 5})), "has rank 4, and 5 by peft's config"),
    "no number": (peft(lambda config: config.update({"unet.lora_alpha": "x"})), "peft's config of it cannot be used"),
    "no pattern": (peft(lambda config: config.update({"unet.alpha_pattern": {"(": 2}})), "peft's config of it cannot be used"),
    "no config": (
        lambda path: save_file({f"base_model.model.{n[5:]}": t for n, t in mixed().tensors.items() if n[:5] == "unet."}, path),
        "has peft's names and no adapter_config.json beside it",
    ),
    "cut off": (lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"), "cannot be read as safetensors"),
    "no file": (lambda path: None, "no such file; give a LoRA's .safetensors file"),
    "a folder": (lambda path: path.mkdir(), "has neither pytorch_lora_weights.safetensors nor adapter_model.safetensors; give"),
}  # fmt: skip


@pytest.mark.parametrize("make, sentence", BROKEN.values(), ids=BROKEN)
def test_what_is_refused(tmp_path, make, sentence):
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    make(path)
    with pytest.raises(UserError, match=sentence) as error:
        convert_lora(path, out, "lora-peft")
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)
    assert set(tmp_path.iterdir()) <= {path}


def test_nothing_is_overwritten_or_left(tmp_path):
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    big = mixed()
    big.tensors[f"{TO_K}.lora_A.weight"][0, 0] = 1e6
    write_peft(path, big)
    with pytest.raises(UserError, match="1 of 64 numbers of .* are not finite in fp16; choose another dtype"):
        convert_lora(path, out, "lora-kohya", "fp16")
    with pytest.raises(UserError, match="a LoRA is one file; give a name that ends in .safetensors"):
        convert_lora(path, tmp_path / "out", "lora-kohya")
    assert [*tmp_path.iterdir()] == [path]
    out.write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already; give a new name, or remove it"):
        convert_lora(path, out, "lora-kohya")
    assert out.read_bytes() == b"mine"


def test_alphas_that_are_not_the_models(tiny_model, adapted):
    model = load_model(ModelTable(base=str(tiny_model)))
    add_lora(model, BOTH.model_copy(update={"alpha": 3.0}), 0)
    with pytest.raises(UserError, match="its adapters count 2.25 times and model.lora.alpha makes it 1.5; set it to 4.5"):
        load_lora(model, adapted[1] / "kohya.safetensors")
