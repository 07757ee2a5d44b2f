"""`fastsd convert --merge`: several adapters, peft's DoRA, biases; or one sentence. Each kind is in `test_every_model.py`."""

import json

import pytest
import torch
import torch.nn.functional as F
from adapter_kinds import CONV, FC1, LORA, NORM, TO_K, conv_down, conv_up, down, magnitudes, numbers, ones, up, write_adapter
from adapters import relative
from model_files import converted, make_small_sd15, states
from safetensors.torch import save_file
from sentences import refused
from typer.testing import CliRunner

from fastsd.cli import app
from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.model.formats.lora_files import PEFT_CONFIG
from fastsd.model.formats.lora_names import kohya_name
from fastsd.model.formats.merge import parse_merge
from fastsd.storage import TensorFile


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "m"
    make_small_sd15(folder)
    return folder


def weights(folder):
    return {f"{component}.{name}": t for component, state in states(folder).items() for name, t in state.items()}


def merged(model, out, *merges, **options):
    text = converted(model, out, merge=merges, **options)
    return weights(out), text


def test_biases_of_linears_convolutions_and_norms(model, tmp_path):
    tensors = {f"{kohya_name(NORM)}.b_norm": numbers(32), f"{kohya_name(NORM)}.w_norm": numbers(32)}
    tensors |= {f"{kohya_name(CONV)}.diff_b": numbers(64), f"{kohya_name(FC1)}.diff_b": numbers(32)}
    save_file(tensors, tmp_path / "a.safetensors")
    result, _ = merged(model, tmp_path / "out", f"{tmp_path / 'a.safetensors'}:2")
    before = weights(model)
    for module, size in ((NORM, 32), (CONV, 64), (FC1, 32)):
        assert torch.allclose(result[f"{module}.bias"] - before[f"{module}.bias"], 2 * numbers(size), atol=1e-6)
    assert torch.equal(result[f"{CONV}.weight"], before[f"{CONV}.weight"])


@pytest.mark.parametrize("module, shape", [(TO_K, (32,)), (CONV, (1, 64, 1, 1))])
def test_dora_of_peft(module, shape, model, tmp_path):
    """peft stores alpha in the config, and the magnitudes of a convolution's outputs as (1, outputs, 1, 1)."""
    A, B = (down, up) if module == TO_K else (conv_down, conv_up)
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.use_dora": True}
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": numbers(*shape)}
    path = write_adapter(tmp_path / "a.safetensors", module, tensors, str, {PEFT_CONFIG: json.dumps(config)})
    result, text = merged(model, tmp_path / "out", str(path))
    before = weights(model)[f"{module}.weight"]
    direction = (B.flatten(1) @ A.flatten(1)).view_as(before) / 2
    expected = magnitudes(before, direction, numbers(*shape).flatten())
    assert relative(result[f"{module}.weight"] - before, expected) < 1e-5 and "DoRA of LoRA 1" in text


def test_peft_computes_the_same_dora(model, tmp_path):
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layer = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    before = weights(model)[f"{TO_K}.weight"]
    layer[0].weight.data = before.clone()
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=["0"]), layer)
    tensors = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": numbers(32).abs() + 1}
    set_peft_model_state_dict(layer, {f"0.{name}": tensor for name, tensor in tensors.items()})
    config = json.dumps({"unet.r": 4, "unet.lora_alpha": 2})
    result, _ = merged(
        model, tmp_path / "out", str(write_adapter(tmp_path / "a.safetensors", TO_K, tensors, str, {PEFT_CONFIG: config}))
    )
    x = numbers(5, 64)
    with torch.no_grad():
        assert relative(F.linear(x, result[f"{TO_K}.weight"]), layer(x)) < 1e-5


def test_several_adapters_are_merged_in_turn_and_rounded_once(model, tmp_path):
    paths = [write_adapter(tmp_path / f"{i}.safetensors", TO_K, {"diff": numbers(32, 64, seed=i)}) for i in range(3)]
    half = merged(model, tmp_path / "half", dtype="fp16")[0]
    result, text = merged(tmp_path / "half", tmp_path / "out", *(f"{path}:0.3" for path in paths))
    exact = half[f"{TO_K}.weight"].double() + 0.3 * sum(numbers(32, 64, seed=i).double() for i in range(3))
    assert torch.equal(result[f"{TO_K}.weight"], exact.half())
    assert text.count("with weight 0.3, layers: full 1") == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapters merged into the weights: 0.safetensors:0.3, 1.safetensors:0.3, 2.safetensors:0.3." in card


def test_a_single_file_from_the_command_line(model, tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", TO_K, {"diff": numbers(32, 64)})
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(app, ["convert", str(model), str(out), "--merge", f"{path}:0.5", "--merge", str(path)])
    assert result.exit_code == 0, result.output
    loaded = load_model(ModelTable(base=str(out), tokenizer=str(model / "tokenizer")))
    before, after = (load_model(ModelTable(base=str(model))), loaded)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_kv.weight"
    difference = after.unet.state_dict()[name] - before.unet.state_dict()[name]
    assert torch.allclose(difference[:32], 1.5 * numbers(32, 64), atol=1e-6) and not difference[32:].any()
    assert "Adapters merged" in TensorFile(out).metadata["fastsd.note"]


STRENGTHS = {
    "a.safetensors": ("a.safetensors", 1.0), "a.safetensors:0.5": ("a.safetensors", 0.5), "x:1e-1": ("x", 0.1),
    "C:/x/a.safetensors": ("C:/x/a.safetensors", 1.0), "C:/a:-2": ("C:/a", -2.0),
}  # fmt: skip


def test_a_colon_of_the_path_is_not_a_weight():
    assert {text: (str(path), strength) for text in STRENGTHS for path, strength in [parse_merge(text)]} == STRENGTHS


K = kohya_name(TO_K)
BROKEN = {
    "OFT": ({f"{K}.oft_blocks": ones(2, 2, 2)}, "merge-unsupported"),
    "GLoRA": ({f"{K}.a1.weight": ones(2, 2)}, "merge-no-layer"),
    "SDXL": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.diff": ones(2)}, "merge-no-layer"),
    "another layer": ({"lora_unet_down_blocks_9_resnets_0_conv1.diff": ones(2)}, "merge-no-layer"),
    "a model": ({"model.diffusion_model.out.2.weight": ones(2)}, "merge-no-layer"),
    "nothing": ({"bundle_emb.x": ones(2)}, "merge-empty"),
    "transposed": ({f"{K}.diff": ones(64, 32)}, "merge-shapes"),
    "other inputs": ({f"{K}.lora_up.weight": up, f"{K}.lora_down.weight": ones(4, 65)}, "merge-shapes"),
    "half a LoRA": ({f"{K}.lora_up.weight": up}, "merge-shapes"),
    "half a LoHa": ({f"{K}.hada_w1_a": ones(32, 4)}, "merge-shapes"),
    "half a LoKr": ({f"{K}.lokr_w1": ones(4, 8)}, "merge-shapes"),
    "only alpha": ({f"{K}.alpha": ones(())}, "merge-shapes"),
    "other magnitudes": (
        {**{f"{K}.{name}": tensor for name, tensor in LORA.items()}, f"{K}.dora_scale": ones(9, 1)},
        "merge-shapes",
    ),
    "no bias": ({f"{K}.diff_b": ones(32)}, "merge-no-bias"),
    "NaN": ({f"{K}.diff": ones(32, 64) / 0}, "not-finite"),
    "twice": ({f"{K}.diff": ones(32, 64), f"lora_unet.{TO_K[5:]}.diff": ones(32, 64)}, "merge-name-twice"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, code", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_merged_is_refused_in_one_line(tensors, code, model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with refused(code) as error:
        merged(model, tmp_path / "out", str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_refuses_unusable_options(model, tmp_path):
    with refused("merge-strength", text=repr("a.safetensors:nan")):
        merged(model, tmp_path / "out", "a.safetensors:nan")
    with refused("lora-missing"):
        merged(model, tmp_path / "out", str(tmp_path / "none.safetensors"))
    with refused("merge-into-lora", to="lora-kohya"):
        converted(model, tmp_path / "out.safetensors", "lora-kohya", merge=("a",))
