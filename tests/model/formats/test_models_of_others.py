"""Models as other tools write them are read exactly, and what is ignored in them is named."""

import json
import shutil
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentences import refused, says
from tiny import make_tiny_model, tiny_vae

from fastsd.commands.convert import ConvertOptions, convert
from fastsd.config.schema import ModelTable
from fastsd.console import Console
from fastsd.errors import UserError
from fastsd.model.formats.load import component_state_dict, load_model
from fastsd.model.formats.original_names import PREFIX
from fastsd.model.shapes import read_shapes
from fastsd.model.unet import UNetConfig
from fastsd.model.vae import SD15_SCALING_FACTOR
from fastsd.storage import write_safetensors

UNET, VAE, TEXT = PREFIX["unet"], PREFIX["vae"], PREFIX["text_encoder"]
FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}  # fmt: skip
ones = torch.ones


def converted(name, out, **options):
    """Convert a model, and return the printed text."""
    text = StringIO()
    convert(str(name), out, "", ConvertOptions(**options), Console(file=text, width=9999))
    return text.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of a small model with SD1.5's numbers of heads and norm groups, and its scaling factor."""
    folder = tmp_path_factory.mktemp("others") / "m"
    cfg = UNetConfig(block_out_channels=(32, 64), attention=(True, False), layers_per_block=2, cross_attention_dim=64)
    make_tiny_model(folder, cfg)
    tiny_vae(groups=32, width=32, factor=SD15_SCALING_FACTOR).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def state(model):
    """The tensors of the model as a single file."""
    converted(model, model.parent / "one.safetensors")
    return load_file(model.parent / "one.safetensors")


def states(folder):
    return {name: load_file(folder / file) for name, file in FILES.items()}


def assert_same(state, other):
    for component in state:
        assert state[component].keys() == other[component].keys()
        assert all(torch.equal(tensor, other[component][name]) for name, tensor in state[component].items()), component


def assert_read(path, model, out, **options):
    """Assert that a file is read as `model` in both ways: by `convert`, and for training. Return what `convert` prints."""
    text = converted(path, out, tokenizer=str(model / "tokenizer"), **options)
    assert_same(states(model), states(out))
    if path.suffix == ".safetensors":
        loaded = load_model(ModelTable(base=str(path), tokenizer=str(model / "tokenizer"), vae=options.get("vae", "")))
        tensors = {name: component_state_dict(loaded, name) for name in ("unet", "text_encoder")}
        assert_same(tensors, {name: states(model)[name] for name in tensors})
        assert torch.equal(loaded.vae.module.quant_conv.bias, states(model)["vae"]["quant_conv.bias"])
    return text


# Leftovers: name of a tensor -> the label under which it is named.
LEFTOVERS = {
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_conv_in.lora_up.weight": "lora_unet_conv_in",
    "conditioner.embedders.0.x": "conditioner",
    "control_model.zero_convs.0.0.weight": "control_model",
    "cond_stage_model.model.ln_final.weight": "cond_stage_model.model",
    "cond_stage_model.logit_scale": "cond_stage_model.logit_scale",
    TEXT + "text_projection.weight": TEXT + "text_projection",
    TEXT + "logit_scale": TEXT + "logit_scale",
    TEXT + "visual_projection.weight": TEXT + "visual_projection",
    TEXT + "vision_model.embeddings.class_embedding": TEXT + "vision_model",
    VAE + "loss.logvar": VAE + "loss",
    VAE + "loss.discriminator.main.0.weight": VAE + "loss",
    VAE + "model_ema.decay": VAE + "model_ema",
    "model_ema.decay": "model_ema.decay",
    "model_ema.num_updates": "model_ema.num_updates",
    "model.betas": "model.betas",
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_a_leftover_is_ignored_and_named(name, model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, {name: ones(2), **state})
    text = assert_read(path, model, tmp_path / "out")
    assert f"in.safetensors: ignored {LEFTOVERS[name]}\n" in text
    assert "EMA" not in text


def test_all_leftovers_at_once_are_named_once(model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, {**dict.fromkeys(LEFTOVERS, ones(2)), **state})
    (line,) = [line for line in assert_read(path, model, tmp_path / "out").splitlines() if "in.safetensors: ignored" in line]
    assert line.partition("ignored ")[2].split(", ") == list(dict.fromkeys(LEFTOVERS.values()))


def test_many_leftovers_are_counted(model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, {**state, **{f"lora_te_{i}.alpha": ones(1) for i in range(33)}})
    assert assert_read(path, model, tmp_path / "out").count("lora_te_29 and 3 others\n") == 1


def test_leftovers_do_not_prove_a_component(model, state, tmp_path):
    """A file with leftovers of a VAE and a text encoder, but without these, has neither."""
    path = tmp_path / "in.safetensors"
    unet = {name: tensor for name, tensor in state.items() if name.startswith(UNET)}
    write_safetensors(path, {**unet, **dict.fromkeys(LEFTOVERS, ones(2))})
    with refused("write-component-missing"):
        converted(path, tmp_path / "out", tokenizer=str(model / "tokenizer"))


def test_a_whole_clip_as_text_encoder_of_a_folder(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    tensors = load_file(model / FILES["text_encoder"])
    others = {"text_projection.weight": ones(2, 2), "logit_scale": ones(()), "vision_model.post_layernorm.bias": ones(2)}
    write_safetensors(folder / FILES["text_encoder"], {**tensors, **others})
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    whole = {"model_type": "clip", "text_config": config, "vision_config": {}, "architectures": ["CLIPModel"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(whole))
    text = converted(folder, tmp_path / "out")
    assert "text_encoder: ignored text_projection, logit_scale, vision_model\n" in text
    assert_same(states(model), states(tmp_path / "out"))
    loaded = load_model(ModelTable(base=str(folder)))
    assert_same({"text_encoder": component_state_dict(loaded, "text_encoder")}, {"text_encoder": tensors})


def renamed(state, *replacements):
    def new_name(name):
        for old, new in replacements:
            name = name.replace(old, new)
        return name

    return {new_name(name): tensor for name, tensor in state.items()}


ATTENTION = (("attn_1.q.", "attn_1.to_q."), ("attn_1.k.", "attn_1.to_k."), ("attn_1.v.", "attn_1.to_v."))
NAMES = {
    "ComfyUI's text encoder": ((TEXT, "text_encoders.clip_l.transformer."),),
    "text encoder by name": ((TEXT, "cond_stage_model.clip_l.transformer."),),
    "text encoder without its prefix": ((TEXT, "clip_l.transformer."),),
    "text encoder without text_model": ((TEXT + "text_model.", TEXT),),
    "VAE": ((VAE, "vae."),),
    "half-converted attention": (*ATTENTION, ("attn_1.proj_out.", "attn_1.to_out.0.")),
    "old half-converted attention": (
        ("attn_1.q.", "attn_1.query."), ("attn_1.k.", "attn_1.key."), ("attn_1.v.", "attn_1.value."),
        ("attn_1.proj_out.", "attn_1.proj_attn."), ("attn_1.norm.", "attn_1.group_norm."),
    ),
}  # fmt: skip


@pytest.mark.parametrize("replacements", NAMES.values(), ids=NAMES)
def test_names_of_other_tools(replacements, model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    tensors = renamed(state, *replacements)
    assert tensors.keys() != state.keys()
    write_safetensors(path, tensors)
    assert ": ignored" not in assert_read(path, model, tmp_path / "out")
    torch.save(tensors, tmp_path / "in.ckpt")
    assert_read(tmp_path / "in.ckpt", model, tmp_path / "out2")


def test_the_usual_name_takes_precedence(model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, {"vae.quant_conv.bias": ones(8), **state})
    assert "ignored vae\n" in assert_read(path, model, tmp_path / "out")


UNKNOWN = {
    "cond_stage_model.wrapped.text_model.": "cond_stage_model.wrapped.text_model.encoder.layers.0.layer_norm1.bias",
    "te.text_model.": "te.text_model.encoder.layers.0.layer_norm1.bias",
    "text_encoder.model.": "text_encoder.model.encoder.layers.0.layer_norm1.bias",
}


@pytest.mark.parametrize("prefix", UNKNOWN)
def test_a_text_encoder_with_unknown_names_is_not_replaced(prefix, model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, dict(sorted(renamed(state, (TEXT + "text_model.", prefix)).items())))
    with refused("single-file-text-names", name=UNKNOWN[prefix]):
        converted(path, tmp_path / "out", tokenizer=str(model / "tokenizer"))
    with refused("single-file-text-names", name=UNKNOWN[prefix]):
        load_model(ModelTable(base=str(path), tokenizer=str(model / "tokenizer")))


def test_a_text_encoder_from_elsewhere_is_named(model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, {name: tensor for name, tensor in state.items() if not name.startswith(TEXT)})
    assert says(assert_read(path, model, tmp_path / "out"), "text-encoder-from", folder=model, file="in.safetensors")
    notes = load_model(ModelTable(base=str(path), tokenizer=str(model / "tokenizer"))).notes
    assert says("\n".join(notes), "text-encoder-from-2", folder=model, file="in.safetensors")
    write_safetensors(tmp_path / "whole.safetensors", state)
    assert not load_model(ModelTable(base=str(tmp_path / "whole.safetensors"), tokenizer=str(model / "tokenizer"))).notes


@pytest.mark.parametrize("lost", ["encoder.", "decoder.mid", "quant_conv"])
def test_another_vae_replaces_half_a_vae(lost, model, state, tmp_path):
    path = tmp_path / "in.safetensors"
    write_safetensors(path, {name: tensor for name, tensor in state.items() if not name.startswith(VAE + lost)})
    with pytest.raises(UserError):
        converted(path, tmp_path / "out", tokenizer=str(model / "tokenizer"))
    assert_read(path, model, tmp_path / "out", vae=str(model / "vae"))


@pytest.mark.parametrize("change", [shutil.rmtree, lambda vae: (vae / "diffusion_pytorch_model.safetensors").unlink()])
def test_another_vae_replaces_that_of_a_folder(change, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    change(folder / "vae")
    converted(folder, tmp_path / "out", vae=str(model / "vae"))
    assert_same(states(model), states(tmp_path / "out"))


FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def in_fp8(state, dtype, scale_name=""):
    """Return the weights of linears and convolutions in fp8, with the scales of a tool, and the values that they stand for."""
    tensors, values = {}, {}
    for name, tensor in state.items():
        if tensor.ndim < 2 or not name.startswith((UNET, TEXT)):
            tensors[name] = values[name] = tensor
            continue
        scale = (tensor.abs().max() / 100).reshape(1) if scale_name else ones(1)
        tensors[name] = (tensor / scale).to(dtype)
        values[name] = tensors[name].float() * scale if scale_name else tensors[name].bfloat16()
        if scale_name:
            tensors[name.replace(".weight", scale_name)] = scale
            tensors[name.replace(".weight", ".scale_input")] = ones(1)
    return tensors, values


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("scale_name", ["", ".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("dtype", FP8.values(), ids=FP8)
def test_fp8_is_read_exactly(dtype, scale_name, ending, model, state, tmp_path):
    path, expected = tmp_path / f"in.{ending}", tmp_path / "expected.safetensors"
    tensors, values = in_fp8(state, dtype, scale_name)
    write_safetensors(expected, values)
    marked = tensors | ({UNET + "scaled_fp8": torch.empty(0, dtype=dtype)} if scale_name else {})
    save_file(marked, path) if ending == "safetensors" else torch.save(marked, path)
    text = converted(path, tmp_path / "out", tokenizer=str(model / "tokenizer"))
    converted(expected, tmp_path / "expected", tokenizer=str(model / "tokenizer"))
    assert_same(states(tmp_path / "expected"), states(tmp_path / "out"))
    count = sum(tensor.dtype == dtype for tensor in tensors.values())
    assert count > 20 and says(
        text.replace("in.ckpt", "in.safetensors"), "fp8-scaled" if scale_name else "fp8-read", count=count
    )
    weight = states(tmp_path / "out")["unet"]["conv_in.weight"]
    assert weight.dtype == (torch.float32 if scale_name else torch.bfloat16)
    if ending == "safetensors":
        loaded = load_model(ModelTable(base=str(path), tokenizer=str(model / "tokenizer")))
        assert torch.equal(loaded.unet.conv_in.weight, weight.float())


def with_channels(model, folder, inputs, pipeline):
    """Copy a model, and widen the first convolution of its UNet."""
    shutil.copytree(model, folder)
    tensors = load_file(model / FILES["unet"])
    conv_in = tensors["conv_in.weight"]
    extra = torch.linspace(-1, 1, 32 * (inputs - 4) * 9).view(32, inputs - 4, 3, 3)
    write_safetensors(folder / FILES["unet"], tensors | {"conv_in.weight": torch.cat([conv_in, extra], 1)})
    for name, changes in (("unet/config.json", {"in_channels": inputs}), ("model_index.json", {"_class_name": pipeline})):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


IMAGES = {
    "StableDiffusionInpaintPipeline": (9, "an inpainting base"),
    "StableDiffusionInstructPix2PixPipeline": (8, "a base for editing images (InstructPix2Pix)"),
}


@pytest.mark.parametrize("pipeline", IMAGES)
def test_models_that_take_images_keep_their_pipeline_and_are_not_trained(pipeline, model, tmp_path):
    from diffusers import DiffusionPipeline

    inputs, kind = IMAGES[pipeline]
    folder = with_channels(model, tmp_path / "in", inputs, pipeline)
    converted(folder, tmp_path / "m.safetensors")
    converted(folder, tmp_path / "folder")
    write_safetensors(tmp_path / "bare.safetensors", load_file(tmp_path / "m.safetensors"))
    converted(tmp_path / "bare.safetensors", tmp_path / "file", tokenizer=str(model / "tokenizer"))
    for name in ("folder", "file"):
        assert_same(states(folder), states(tmp_path / name))
        loaded = DiffusionPipeline.from_pretrained(tmp_path / name, local_files_only=True)
        assert type(loaded).__name__ == pipeline and loaded.unet.config.in_channels == inputs
    table = ModelTable(base=str(folder), tokenizer=str(model / "tokenizer"))
    for read in (load_model, read_shapes):
        with refused("base-takes-images", kind=kind, inputs=inputs, outputs=4):
            read(table)
    with refused("base-takes-images", kind=kind):
        load_model(table.model_copy(update={"base": str(tmp_path / "bare.safetensors")}))


def test_another_pipeline_with_the_same_components_is_kept(model, tmp_path):
    names = {"StableDiffusionImg2ImgPipeline": "StableDiffusionImg2ImgPipeline", "SomePipeline": "StableDiffusionPipeline"}
    for name, expected in names.items():
        converted(with_channels(model, tmp_path / f"in-{name}", 4, name), tmp_path / name)
        assert json.loads((tmp_path / name / "model_index.json").read_text())["_class_name"] == expected
