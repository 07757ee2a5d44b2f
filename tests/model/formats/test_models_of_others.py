"""Models as other tools write them are read exactly, and what is ignored in them is named."""

import json
import shutil
from io import StringIO

import pytest
import torch
from safetensors.torch import load_file
from sentences import refused, says
from tiny import make_tiny_model, tiny_vae

from fastsd.commands.convert import ConvertOptions, convert
from fastsd.config.schema import ModelTable
from fastsd.console import Console
from fastsd.errors import UserError
from fastsd.model.formats.load import component_state_dict, load_model
from fastsd.model.formats.original_names import PREFIX
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
