"""Read, write and convert LoRA files with the names of every tool, use ours in other tools, and refuse unusable ones."""

import json
from dataclasses import replace

import pytest
import torch
from adapters import BOTH, move, relative
from safetensors.torch import load_file, save_file
from sentences import LINES, refused, says
from torch import nn

from fastsd.commands.convert import _infer_format
from fastsd.config.schema import ModelTable, SampleTable
from fastsd.model.formats.load import load_model
from fastsd.model.formats.lora_convert import convert_lora
from fastsd.model.formats.lora_files import PEFT_CONFIG, LoraFile, fold_alpha, peft_config, read_lora, write_kohya, write_peft
from fastsd.model.formats.lora_names import MERGEABLE, kohya_module, kohya_name, parse_name
from fastsd.model.formats.lora_weights import load_lora, write_lora
from fastsd.model.formats.original_names import original_names
from fastsd.model.lora import add_lora, merge_lora
from fastsd.model.shapes import SD15_TEXT
from fastsd.model.unet import UNetConfig
from fastsd.sampling.generate import generate
from fastsd.storage import TensorFile, write_safetensors
from fastsd_kernels import noise


@pytest.fixture(scope="module")
def modules():
    """The names of all linear layers and convolutions in SD1.5's UNet and text encoder, as in diffusers and transformers."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNetConfig.sd15().to_diffusers())
        text = CLIPTextModel(CLIPTextConfig.from_dict(SD15_TEXT))
    prefixes = {"unet.": unet, "text_encoder.text_model.": text}
    return [p + n for p, model in prefixes.items() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


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
    current = state_dict_utils.convert_unet_state_dict_to_peft(unet) | text
    assert len(current) == 2 * len(modules)
    assert all(name.rpartition(".lora_")[0] == module for name, module in current.items())
    # Our reader accepts the names of current and older diffusers, and those of peft.
    for name, module in {**older, **current}.items():
        role = "A" if ".down." in name or ".lora_A." in name else "B"
        assert parse_name(name) == parse_name(f"base_model.model.{name.partition('.')[2]}") == (module, role)


def test_kohya_names_from_the_original_layout_are_read(modules):
    unet = [module.removeprefix("unet.") for module in modules if module.startswith("unet.")]
    originals = original_names("unet", UNetConfig.sd15().to_diffusers(), [f"{module}.weight" for module in unet])
    for module in unet:
        name = originals[f"{module}.weight"].removesuffix(".weight").replace(".", "_")
        assert kohya_module(f"lora_unet_{name}") == f"unet.{module}"
    attention = "transformer_blocks_0_attn1_to_q"
    module = kohya_module(f"lora_unet_down_blocks_1_attentions_0_{attention}")
    assert kohya_module(f"lora_unet_input_blocks_4_1_{attention}") == module
    assert kohya_module("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1") is None


@pytest.fixture(scope="module")
def adapted(tiny_model, tmp_path_factory):
    """The tiny model with adapters of every kind, and a folder with two files of them: kohya.safetensors, peft.safetensors."""
    model, folder = load_model(ModelTable(base=str(tiny_model))), tmp_path_factory.mktemp("lora")
    add_lora(model, BOTH, 0)
    move(model)
    for names in ("kohya", "peft"):
        write_lora(folder / f"{names}.safetensors", model, names=names, metadata={"about": "ünì"})
    return model, folder


@pytest.mark.slow
def test_diffusers_draws_the_same_image_with_kohya_names(adapted, tiny_model):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    model, folder = adapted
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    merged = load_model(ModelTable(base=str(tiny_model)))
    table = SampleTable(sampler="ddim", steps=2, guidance=3.0)

    def images():
        latents = noise.normal(0, noise.Purpose.SAMPLE, torch.tensor([5]), (4, 16, 16))
        expected = pipe("a red circle", num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="pil").images[0]
        image = generate(merged, ["a red circle"], [5], table, 32)[0]
        return (torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in (expected, image))

    before, _ = images()
    add_lora(merged, BOTH, 1)
    load_lora(merged, folder / "kohya.safetensors")
    merge_lora(merged)
    pipe.load_lora_weights(folder, weight_name="kohya.safetensors")
    expected, image = images()
    assert (expected - image).abs().max() <= 1 < 10 < (expected - before).abs().max()
    ids, x, t = model.text.tokenize(["a red circle"]), torch.ones(1, 4, 16, 16), torch.tensor([700])
    with torch.no_grad():
        for other in (model, merged):
            context = other.text.encode(ids)
            assert relative(pipe.text_encoder(ids).last_hidden_state, context) < 1e-5
            assert relative(pipe.unet(x, t, context).sample, other.unet(x, t, context)) < 1e-5


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_peft_computes_the_same_output(adapted, tiny_model, component):
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from transformers import CLIPTextModel

    model, folder = adapted
    file = TensorFile(folder / "peft.safetensors")
    settings = json.loads(file.metadata[PEFT_CONFIG])
    config = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith(f"{component}.")}
    other = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}[component].from_pretrained(tiny_model / component)
    prefix = "unet." if component == "unet" else "text_encoder.text_model."
    inject_adapter_in_model(LoraConfig(**config), other)
    loaded = set_peft_model_state_dict(other, {k.removeprefix(prefix): t for k, t in file.items() if k.startswith(prefix)})
    assert not loaded.unexpected_keys and not [name for name in loaded.missing_keys if "lora" in name]
    ids, x, t = model.text.tokenize(["a red circle"]), torch.ones(1, 4, 16, 16), torch.tensor([700])
    with torch.no_grad():
        context = model.text.encode(ids)
        if component == "unet":
            assert relative(other(x, t, context).sample, model.unet(x, t, context)) < 1e-5
        else:
            assert relative(other(ids).last_hidden_state, context) < 1e-5


def test_round_trip_gives_the_same_bytes(adapted, tmp_path):
    _, folder = adapted
    notes = convert_lora(folder / "peft.safetensors", tmp_path / "kohya.safetensors", "lora-kohya")
    assert says(notes[0], "lora-described", kind="diffusers", ranks="2, 3", alphas="2, 3", dtypes="float32")
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors", "lora-peft")
    convert_lora(folder / "kohya.safetensors", tmp_path / "from-kohya.safetensors", "lora-peft")
    for name in ("peft", "from-kohya"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (folder / "peft.safetensors").read_bytes()


@pytest.mark.parametrize("config", [True, False], ids=["with a config", "with none"])
def test_round_trip_keeps_a_file_of_diffusers(adapted, tmp_path, config):
    """The file has the names of transformers 5, the order of the safetensors library, and peft's config or none."""
    lora = read_lora(adapted[1] / "peft.safetensors")
    state = {name.replace("text_model.", ""): tensor for name, tensor in lora.tensors.items()}
    text = json.dumps(json.loads(lora.metadata[PEFT_CONFIG]), indent=2)
    save_file(state, tmp_path / "peft.safetensors", {"format": "pt", **({PEFT_CONFIG: text} if config else {})})
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "lora-kohya")
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "lora-peft")
    original, converted = (header_and_data(tmp_path / f"{name}.safetensors") for name in ("peft", "back"))
    assert original == converted


def header_and_data(path):
    """Return a file's header as a dict, because the library writes its entries in random order, and the file's other bytes."""
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
    """Return adapters with ranks and alphas that differ by module."""
    torch.manual_seed(0)
    pairs = {module: zip("AB", shapes, strict=True) for module, shapes in SHAPES.items()}
    tensors = {f"{m}.lora_{letter}.weight": torch.randn(shape).to(dtype) for m, pair in pairs.items() for letter, shape in pair}
    return LoraFile(tensors, dict(ALPHAS))


def deltas(lora: LoraFile, *, with_alpha: bool = True) -> dict[str, torch.Tensor]:
    """Return what each adapter adds to its weight. Without alpha: as tools compute it that do not read the header."""
    result = {}
    for module, rank in lora.ranks.items():
        down, up = (lora.tensors[f"{module}.lora_{letter}.weight"].double().flatten(1) for letter in "AB")
        result[module] = up @ down * (lora.alphas[module] / rank if with_alpha else 1)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_for_diffusers_has_its_strength_without_the_header(tmp_path, dtype):
    """ComfyUI, and diffusers before 0.34, read no alpha from a file with diffusers' names."""
    original, peft, back = mixed(dtype), tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    write_kohya(tmp_path / "kohya.safetensors", original)
    convert_lora(tmp_path / "kohya.safetensors", peft, "lora-peft")
    assert read_lora(peft).alphas == original.ranks
    convert_lora(peft, back, "lora-kohya")
    for path in (peft, back):
        for module, delta in deltas(read_lora(path), with_alpha=False).items():
            assert relative(delta, deltas(original)[module]) < torch.finfo(dtype).eps
            is_power_of_two = ALPHAS[module] / original.ranks[module] in (0.25, 0.5, 1)
            assert not is_power_of_two or torch.equal(delta, deltas(original)[module])
    # Times 1 / 32, the numbers of up would be below the normal range of fp16.
    tensors = {f"{TO_K}.lora_A.weight": (1 + torch.rand(32, 8)) / 9, f"{TO_K}.lora_B.weight": (1 + torch.rand(8, 32)) / 999}
    small = LoraFile({name: tensor.half() for name, tensor in tensors.items()}, {TO_K: 1.0})
    assert torch.equal(deltas(fold_alpha(small, ""), with_alpha=False)[TO_K], deltas(small)[TO_K])


def test_alpha_that_does_not_fit_into_the_dtype_is_refused(tmp_path):
    big = replace(mixed(torch.float16), alphas=dict.fromkeys(ALPHAS, 6e9))
    write_kohya(tmp_path / "kohya.safetensors", big)
    with refused("not-finite", advice=LINES["alpha-not-finite"].format(dtype="torch.float16")):
        convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors", "lora-peft")
    convert_lora(tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors", "lora-peft", "fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ranks_and_alphas_of_each_module_survive(tmp_path, dtype):
    first, last = tmp_path / "first.safetensors", tmp_path / "last.safetensors"
    write_kohya(first, mixed(dtype), {"ss_seed": "3", "sshs_model_hash": "of the first"})
    notes = convert_lora(first, tmp_path / "peft.safetensors", "lora-peft")
    described = {"kind": "kohya", "layers": "UNet 4, text encoder 1", "ranks": "2, 3, 4, 8", "alphas": "1, 4, 4.3, 16"}
    assert says(notes[0], "lora-described", path=first, **described)
    expected_notes = ("lora-peft-comfy", "lora-peft-cpp", "lora-ranks-differ")
    assert all(map(says, notes[1:], expected_notes)) and len(notes) == 4
    notes = convert_lora(first, last, "lora-kohya")
    assert says(notes[1], "lora-alphas-differ") and len(notes) == 2

    before, after = load_file(first), load_file(last)
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    alpha = before[f"{kohya_name(TO_K)}.alpha"]
    assert alpha.shape == () and alpha.dtype == dtype and before[f"{kohya_name(CONV)}.alpha"].item() == pytest.approx(4.3)

    settings = json.loads(peft_config(mixed(dtype)))
    assert settings["unet.alpha_pattern"] == {TO_K[5:]: 1, CONV[5:]: pytest.approx(4.3)}
    assert settings["unet.rank_pattern"] == {CONV[5:]: 2, PROJ[5:]: 8} and settings["text_encoder.lora_alpha"] == 16

    header = TensorFile(last).metadata
    assert header["ss_seed"] == "3" and "sshs_model_hash" not in header
    expected = {
        "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic", "ss_base_model_version": "sd_v1",
        "ss_network_args": '{"conv_dim": "2", "conv_alpha": "4.3"}', "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.prediction_type": "epsilon",
    }  # fmt: skip
    assert expected.items() <= header.items()
    assert {"modelspec.title", "modelspec.resolution", "modelspec.implementation"} <= header.keys()


@pytest.mark.parametrize("module", ["unet.conv_in", "unet.conv_out"])
def test_the_first_and_last_convolution_are_warned_of(module, tmp_path):
    """diffusers 0.24 raises an error for them, and reads the convolutions between them exactly."""
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{module}.lora_B.weight": torch.ones(4, 2, 1, 1)}
    write_kohya(tmp_path / "in.safetensors", LoraFile(tensors, {module: 2.0}))
    notes = convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "lora-kohya")
    assert says(notes[1], "lora-conv-in") and len(notes) == 2


def test_converts_to_another_dtype(tmp_path):
    write_peft(tmp_path / "peft.safetensors", mixed())
    convert_lora(tmp_path / "peft.safetensors", tmp_path / "half.safetensors", "lora-kohya", "fp16")
    half = read_lora(tmp_path / "half.safetensors")
    assert all(torch.equal(tensor.half(), half.tensors[name]) for name, tensor in mixed().tensors.items())
    assert half.alphas == ALPHAS


def test_reads_files_of_other_tools(tmp_path):
    tensors = mixed().tensors
    (tmp_path / "peft").mkdir()
    unet = {f"base_model.model.{name[5:]}": t for name, t in tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"conv2": 2, "^up.*proj_in": 8},
              "alpha_pattern": {r"attn2\.to_[kv]": 1.0}}  # fmt: skip
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    lora = read_lora(tmp_path / "peft")
    factors = {module: lora.alphas[module] / rank for module, rank in lora.ranks.items()}
    assert factors == pytest.approx({TO_Q: 3, TO_K: 0.5, CONV: 6 / 2**0.5, PROJ: 6 / 8**0.5})

    def older(name: str) -> str:
        name = name.replace("lora_A", "lora.down").replace("lora_B", "lora.up").replace("fc1.lora.", "fc1.lora_linear_layer.")
        return name.replace(".to_q.lora.", ".processor.to_q_lora.")

    save_file({older(name): t for name, t in tensors.items()}, tmp_path / "older.safetensors")
    write_kohya(tmp_path / "kohya.safetensors", mixed())
    plain = {name: t for name, t in load_file(tmp_path / "kohya.safetensors").items() if not name.endswith("alpha")}
    save_file(plain, tmp_path / "plain.safetensors")
    for name, kind in (("older", "older diffusers"), ("plain", "kohya")):
        lora = read_lora(tmp_path / f"{name}.safetensors")
        assert lora.kind == kind and lora.alphas == lora.ranks
        assert lora.tensors.keys() == tensors.keys()
        assert all(torch.equal(tensor, lora.tensors[name]) for name, tensor in tensors.items())

    # A file of `save_lora_adapter` in diffusers: neither names nor config contain the component.
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {CONV[5:]: 2, PROJ[5:]: 8}}
    unet = {name[5:]: t for name, t in tensors.items() if name.startswith("unet.")}
    save_file(unet, tmp_path / "u.safetensors", {PEFT_CONFIG: json.dumps(config)})
    assert read_lora(tmp_path / "u.safetensors").alphas == dict.fromkeys((TO_Q, TO_K, CONV, PROJ), 6)
    convert_lora(tmp_path / "u.safetensors", tmp_path / "unet.safetensors", "lora-peft")
    assert json.loads(TensorFile(tmp_path / "unet.safetensors").metadata[PEFT_CONFIG])["unet.lora_alpha"] == 4

    write_peft(tmp_path / "first.safetensors", mixed())
    convert_lora(tmp_path / "first.safetensors", tmp_path / "second.safetensors", "lora-kohya")
    file = TensorFile(tmp_path / "second.safetensors")
    changed = dict(file) | {f"{kohya_name(TO_K)}.alpha": torch.tensor(2.0)}
    write_safetensors(tmp_path / "changed.safetensors", changed, file.metadata)
    assert read_lora(tmp_path / "changed.safetensors").alphas[TO_K] == 2


def original(module):
    """Return the name of a UNet module in the original layout."""
    names = original_names("unet", UNetConfig.sd15().to_diffusers(), [f"{module.removeprefix('unet.')}.weight"])
    return next(iter(names.values())).removesuffix(".weight")


TEXT_MODEL = "text_encoder.text_model."
OTHER_TOOLS = {
    "OneTrainer": lambda m: m.replace("unet.", "lora_unet.", 1).replace(TEXT_MODEL, "lora_te.text_model."),
    "OneTrainer's OMI": lambda m: (
        f"unet.{original(m)}" if m.startswith("unet.") else m.replace(TEXT_MODEL, "clip_l.text_model.")
    ),
    "ComfyUI": lambda m: (
        f"diffusion_model.{original(m)}" if m.startswith("unet.")
        else m.replace(TEXT_MODEL, "text_encoders.clip_l.transformer.text_model.")
    ),
}  # fmt: skip


@pytest.mark.parametrize("tool", OTHER_TOOLS)
@pytest.mark.parametrize("to", ["lora-kohya", "lora-peft"])
def test_reads_names_of_other_tools(tool, to, tmp_path):
    lora, state = mixed(), {}
    for name, tensor in lora.tensors.items():
        module, matrix, _ = name.rsplit(".", 2)
        other = OTHER_TOOLS[tool](module)
        state[f"{other}.{'lora_down' if matrix == 'lora_A' else 'lora_up'}.weight"] = tensor
        state[f"{other}.alpha"] = torch.tensor(ALPHAS[module])
    save_file(state | {"bundle_emb.x.string_to_param.*": torch.ones(2, 8)}, tmp_path / "in.safetensors")
    assert _infer_format(str(tmp_path / "in.safetensors"), tmp_path / "out.safetensors").startswith("lora-")
    notes = convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", to)
    assert says(notes[0], "lora-described", kind=tool.split("'")[0]) and "; ignored bundle_emb.x" in notes[0]
    converted = read_lora(tmp_path / "out.safetensors")
    assert converted.ranks.keys() == lora.ranks.keys()
    for module, delta in deltas(converted).items():
        assert relative(delta, deltas(lora)[module]) < 1e-6


def kohya(**changes: torch.Tensor | None):
    """Return a writer of a file with kohya's names and changed tensors `<module>__<down, up or alpha>`. None removes one."""
    kohya_names = {"k": kohya_name(TO_K), "conv": kohya_name(CONV), "proj": kohya_name(PROJ), "again": SAME_AS_K}

    def make(path):
        write_kohya(path, mixed())
        state = load_file(path)
        for name, tensor in changes.items():
            module, leaf = name.split("__")
            state[f"{kohya_names[module]}.{ {'down': 'lora_down.weight', 'up': 'lora_up.weight'}.get(leaf, leaf) }"] = tensor
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)

    return make


def renamed(old: str, new: str):
    def make(path):
        write_kohya(path, mixed())
        save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)

    return make


def only(*names: str):
    return lambda path: save_file({name: torch.ones(1) for name in names}, path)


def peft(change):
    """Return a writer of a file with diffusers' names. `change` edits peft's config in place, or returns its text."""

    def make(path):
        lora = mixed()
        write_peft(path, lora)
        settings = json.loads(TensorFile(path).metadata[PEFT_CONFIG])
        text = change(settings) or json.dumps(settings)
        save_file(lora.tensors, path, {PEFT_CONFIG: text})

    return make


ones, UNSUPPORTED = torch.ones, "lora-unsupported"
TUCKER = "Tucker-decomposed weights"
FILES = "pytorch_lora_weights.safetensors nor adapter_model.safetensors"


def case(make, code, /, **fields):
    return make, code, fields


def as_peft(path):
    """Write a file with peft's own names but without adapter_config.json."""
    save_file({f"base_model.model.{n[5:]}": t for n, t in mixed().tensors.items() if n.startswith("unet.")}, path)


BROKEN = {
    "SDXL": case(renamed("lora_te_", "lora_te1_"), UNSUPPORTED, unsupported="SDXL weights"),
    "SDXL's UNet": case(
        renamed("transformer_blocks_0", "transformer_blocks_3"), UNSUPPORTED, unsupported="SDXL weights", merge=""
    ),
    "Flux": case(renamed("mid_block_attentions_0", "double_blocks_0_img"), UNSUPPORTED, unsupported="Flux or SD3 weights"),
    "LoHa": case(renamed("lora_up.weight", "hada_w1_a"), UNSUPPORTED, unsupported="LoHa weights"),
    "LoKr": case(renamed("lora_up.weight", "lokr_w1"), UNSUPPORTED, unsupported="LoKr weights"),
    "OFT": case(renamed("lora_up.weight", "oft_blocks"), UNSUPPORTED, unsupported="OFT weights"),
    "DoRA": case(kohya(k__dora_scale=ones(8, 1)), UNSUPPORTED, unsupported="DoRA weights"),
    "LoCon": case(renamed("conv2.lora_up", "conv2.lora_mid"), UNSUPPORTED, unsupported="Tucker-decomposed weights"),
    "a difference": case(renamed("lora_up.weight", "diff"), UNSUPPORTED, unsupported="full weight differences"),
    "ControlNet": case(only("lora_controlnet"), UNSUPPORTED, unsupported="ControlNet weights"),
    "a model": case(only("model.diffusion_model.out.2.weight"), UNSUPPORTED, unsupported="weights of a full model"),
    "a VAE": case(only("encoder.conv_in.weight"), "lora-unknown-name", name="encoder.conv_in.weight"),
    "an unknown layer": case(renamed("attn2_to_k", "attn3_to_k"), "lora-unknown-name"),
    "nothing": case(only("x.alpha"), "lora-empty"),
    "two kinds": case(renamed(kohya_name(FC1), FC1), "lora-mixed-names", kinds="kohya and older diffusers"),
    "twice": case(kohya(again__down=ones(4, 16)), "lora-name-twice"),
    "no up": case(kohya(k__up=None), "lora-half-pair", module=TO_K, half="up"),
    "no down": case(kohya(k__down=None), "lora-half-pair", module=TO_K, half="down"),
    "ranks": case(kohya(k__up=ones(8, 5)), "lora-shapes", down=(4, 16), up=(8, 5), down_sides="rank, inputs"),
    "a convolution": case(kohya(k__down=ones(4, 16, 1, 1)), "lora-shapes", down=(4, 16, 1, 1)),
    "SD2's linear": case(kohya(proj__down=ones(8, 8)), "lora-shapes", down_sides="rank, inputs, 1, 1"),
    "another kernel": case(kohya(conv__down=ones(2, 8, 5, 5)), "lora-shapes", down_sides="rank, inputs, 3, 3"),
    "a scalar": case(kohya(k__down=torch.tensor(1.0)), "lora-shapes", down=()),
    "rank 0": case(kohya(k__down=ones(0, 16), k__up=ones(8, 0)), "lora-shapes", down=(0, 16)),
    "NaN": case(kohya(k__down=ones(4, 16) / 0), "not-finite", count=64, total=64, name=f"{kohya_name(TO_K)}.lora_down.weight"),
    "integers": case(kohya(k__down=ones(4, 16).int()), "lora-dtype", down_dtype="torch.int32", up_dtype="torch.float32"),
    "alpha 0": case(kohya(k__alpha=torch.tensor(0.0)), "lora-alpha", value=0),
    "alphas": case(kohya(k__alpha=ones(2)), "lora-alpha", value="of shape (2,)"),
    "no JSON": case(peft(lambda config: "{"), "peft-config-no-table", name=PEFT_CONFIG),
    "a list": case(peft(lambda config: "[3]"), "peft-config-no-table", name=PEFT_CONFIG),
    "another rank": case(peft(lambda config: config.update({"unet.r": 5})), "lora-rank", rank=4, config_rank=5),
    "no number": case(peft(lambda config: config.update({"unet.lora_alpha": "x"})), "peft-config-invalid"),
    "no pattern": case(peft(lambda config: config.update({"unet.alpha_pattern": {"(": 2}})), "peft-config-invalid"),
    "no config": case(as_peft, "peft-config-missing"),
    "cut off": case(lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"), "safetensors-unreadable"),
    "no file": case(lambda path: None, "lora-missing"),
    "a folder": case(lambda path: path.mkdir(), "lora-no-weights", weights=FILES),
}


@pytest.mark.parametrize("make, code, fields", BROKEN.values(), ids=BROKEN)
def test_unusable_files_are_refused_in_one_line(tmp_path, make, code, fields):
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    make(path)
    with refused(code, **fields) as error:
        convert_lora(path, out, "lora-peft")
    mergeable = fields.get("unsupported") in MERGEABLE
    assert mergeable == says(str(error.value), "merge-this-file", file=path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "; " in str(error.value)
    assert set(tmp_path.iterdir()) <= {path}


def test_nothing_is_overwritten_or_left(tmp_path):
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    big = mixed()
    big.tensors[f"{TO_K}.lora_A.weight"][0, 0] = 1e6
    write_peft(path, big)
    with refused("not-finite", count=1, total=64, advice=LINES["other-dtype"].format(dtype="fp16")):
        convert_lora(path, out, "lora-kohya", "fp16")
    with refused("lora-ending", out=tmp_path / "out"):
        convert_lora(path, tmp_path / "out", "lora-kohya")
    assert [*tmp_path.iterdir()] == [path]
    out.write_bytes(b"mine")
    with refused("lora-out-exists", out=out):
        convert_lora(path, out, "lora-kohya")
    assert out.read_bytes() == b"mine"


def test_another_alpha_than_the_models_is_refused(tiny_model, adapted):
    model = load_model(ModelTable(base=str(tiny_model)))
    add_lora(model, BOTH.model_copy(update={"alpha": 3.0}), 0)
    with refused(
        "lora-other-alpha", scale=2.25, config_scale=1.5, advice=LINES["set-lora-settings"].format(settings="alpha = 4.5")
    ):
        load_lora(model, adapted[1] / "kohya.safetensors")
