"""Names of tensors are translated there and back for models of any shape."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastsd.model.formats import single_file_layout
from fastsd.model.formats.lora_convert import convert_lora
from fastsd.model.formats.lora_names import kohya_module, kohya_name, parse_name
from fastsd.model.formats.original_names import PREFIX, original_names
from fastsd.model.shapes import SD15_TEXT, SD15_VAE
from fastsd.model.unet import UNetConfig
from fastsd.model.weights import expected_tensors

FEW = settings(max_examples=10, deadline=None, derandomize=True)
KERNEL_SIDES = dict.fromkeys(["conv_in", "conv_out", "conv1", "conv2", "conv"], 3)
KERNEL_SIDES |= dict.fromkeys(["conv_shortcut", "proj_in", "proj_out"], 1)
WIDTHS = st.lists(st.sampled_from([32, 64, 96]), min_size=1, max_size=4)


@st.composite
def configs(draw):
    """A component and a config. Everything that a single file does not store is as in SD1.5."""
    component = draw(st.sampled_from(list(PREFIX)))
    widths, layers = draw(WIDTHS), draw(st.integers(1, 3))
    if component == "unet":
        attention = draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
        inputs, outputs, width = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([16, 48]))
        cfg = UNetConfig(inputs, outputs, tuple(widths), layers, tuple(attention), cross_attention_dim=width)
        return component, cfg.to_diffusers()
    if component == "vae":
        levels = len(widths)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        sizes = {"block_out_channels": widths, "layers_per_block": layers, "latent_channels": draw(st.integers(1, 9))}
        return component, SD15_VAE | blocks | sizes
    width = 64 * draw(st.integers(1, 3))
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 64}
    return component, SD15_TEXT | sizes | {"num_hidden_layers": layers, "vocab_size": draw(st.integers(100, 200))}


@FEW
@given(configs())
def test_a_single_file_gives_back_every_name_and_size(pair):
    component, config = pair
    expected = expected_tensors(component, config, "")
    names = original_names(component, config, expected)
    assert len(set(names.values())) == len(expected)
    state = {PREFIX[component] + names[name]: torch.empty(tensor.shape, device="meta") for name, tensor in expected.items()}
    contents = single_file_layout.read_component(Path("file"), state, {}, component, [])
    assert contents is not None
    read_config, tensors = contents
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: t.shape for name, t in expected.items()}
    assert all(tensors[name] is state[PREFIX[component] + names[name]] for name in tensors)
    assert expected_tensors(component, read_config, "").keys() == expected.keys()


def test_the_names_of_a_config_are_built_once(monkeypatch):
    first = expected_tensors("vae", SD15_VAE, "")
    count = len(first)
    first.clear()  # the caller's own
    monkeypatch.setattr("fastsd.model.weights.empty_component", None)
    assert len(expected_tensors("vae", dict(SD15_VAE), "another place")) == count > 200


def numbered(*templates):
    return st.builds(str.format, st.sampled_from(templates), st.integers(0, 12))


BLOCK = st.one_of(numbered("down_blocks.{}", "up_blocks.{}"), st.just("mid_block"))
RESNET = st.sampled_from(["conv1", "conv2", "conv_shortcut", "time_emb_proj"])
ATTENTION = st.sampled_from(
    ["proj_in", "proj_out", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2"]
    + [f"transformer_blocks.0.attn{n}.to_{layer}" for n in (1, 2) for layer in ("q", "k", "v", "out.0")]
)
INNER = st.one_of(
    st.builds(".".join, st.tuples(numbered("resnets.{}"), RESNET)),
    st.builds(".".join, st.tuples(numbered("attentions.{}"), ATTENTION)),
    st.sampled_from(["downsamplers.0.conv", "upsamplers.0.conv"]),
)
UNET = st.one_of(
    st.builds(".".join, st.tuples(BLOCK, INNER)),
    st.sampled_from(["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]),
)
TEXT_LAYER = st.sampled_from([*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"])
MODULES = st.one_of(
    st.builds("unet.{}".format, UNET),
    st.builds("text_encoder.text_model.encoder.layers.{}.{}".format, st.integers(0, 30), TEXT_LAYER),
)


@settings(FEW, max_examples=300)
@given(MODULES)
def test_every_name_of_an_adapter_means_the_same_layer(module):
    assert kohya_module(kohya_name(module)) == module
    path = module.partition(".")[2]
    assert parse_name(f"{kohya_name(module)}.alpha") == (module, "alpha")
    for role, word in (("A", "down"), ("B", "up")):
        assert parse_name(f"{kohya_name(module)}.lora_{word}.weight") == (module, role)
        assert parse_name(f"{module}.lora_{role}.weight") == (module, role)
        assert parse_name(f"base_model.model.{path}.lora_{role}.weight") == (module, role)


@FEW
@given(st.lists(MODULES, min_size=1, max_size=5, unique=True), st.integers(1, 4))
def test_a_lora_converted_there_and_back_has_the_same_bits(modules, rank):
    tensors = {}
    for module in modules:
        side = KERNEL_SIDES.get(module.rpartition(".")[2])
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, 4, *([side, side] if side else []))
        tensors[f"{module}.lora_B.weight"] = torch.randn(4, rank, *([1, 1] if side else []))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{name}.safetensors") for name in ("peft", "kohya", "back")]
        save_file(tensors, paths[0])
        convert_lora(paths[0], paths[1], "lora-kohya")
        convert_lora(paths[1], paths[2], "lora-peft")
        back = load_file(paths[2])
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
