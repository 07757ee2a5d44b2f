"""`fastsd convert --merge`: every kind of adapter, with the values of its published formula, or one sentence."""

import json
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from adapters import relative
from safetensors.torch import load_file, save_file
from sentences import refused, says
from tiny import make_tiny_model
from typer.testing import CliRunner

from fastsd.cli import app
from fastsd.commands.convert import ConvertOptions, convert
from fastsd.config.schema import ModelTable
from fastsd.console import Console
from fastsd.model.formats.load import load_model
from fastsd.model.formats.lora_files import PEFT_CONFIG
from fastsd.model.formats.lora_names import kohya_name
from fastsd.model.formats.merge import parse_merge
from fastsd.model.formats.original_names import original_names
from fastsd.model.unet import UNetConfig
from fastsd.storage import TensorFile

FILES = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (32, 64)
CONV = "unet.down_blocks.1.resnets.0.conv1"  # (64, 32, 3, 3)
NORM = "unet.down_blocks.1.resnets.0.norm1"
FC1 = "text_encoder.text_model.encoder.layers.1.mlp.fc1"  # (32, 64)
ones, einsum = torch.ones, torch.einsum


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "m"
    make_tiny_model(folder, UNetConfig(block_out_channels=(32, 64), attention=(True, False), cross_attention_dim=64))
    return folder


def weights(folder):
    return {f"{component}.{name}": t for component, file in FILES.items() for name, t in load_file(folder / file).items()}


def merged(model, out, *merges, **options):
    text = StringIO()
    convert(str(model), out, "", ConvertOptions(merge=merges, **options), Console(file=text, width=9999))
    return weights(out), text.getvalue()


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 4


def magnitudes(weight, direction, m):
    """DoRA, equation 5, by loops: each output's vector gets the length m."""
    rows = [m[i] * row / row.norm() for i, row in enumerate((weight + direction).flatten(1))]
    return torch.stack(rows).view_as(weight) - weight


up, down, mid = numbers(32, 4), numbers(4, 64), numbers(4, 4, 3, 3)
a1, b1, a2, b2 = numbers(32, 4, seed=1), numbers(4, 64, seed=2), numbers(32, 4, seed=3), numbers(4, 64, seed=4)
conv_up, conv_down = numbers(64, 4, 1, 1), numbers(4, 32, 3, 3)
t1, t2 = numbers(4, 4, 3, 3, seed=5), numbers(4, 4, 3, 3, seed=6)
c1, d1, c2, d2 = numbers(4, 64, seed=7), numbers(4, 32, seed=8), numbers(4, 64, seed=9), numbers(4, 32, seed=10)
w1, w2 = numbers(4, 8), numbers(8, 8)
ka, kb = numbers(8, 2, seed=11), numbers(2, 8, seed=12)
kc, kd, t3 = numbers(2, 16, seed=13), numbers(2, 4, seed=14), numbers(2, 2, 3, 3)


def kron(first, second):
    """The Kronecker product, element by element of the first factor."""
    return torch.cat([torch.cat([x * second for x in row], 1) for row in first])


# kind -> module, tensors, the difference of the weight as a function of it, and the name in the note
MERGES = {
    "LoRA": (TO_K, {"lora_up.weight": up, "lora_down.weight": down, "alpha": 2.0}, lambda w: up @ down / 2, "LoRA"),
    "LoRA without alpha": (TO_K, {"lora_up.weight": up, "lora_down.weight": down}, lambda w: up @ down, "LoRA"),
    "alpha 0": (TO_K, {"lora_up.weight": up, "lora_down.weight": down, "alpha": 0.0}, lambda w: up @ down, "LoRA"),
    "text encoder": (FC1, {"lora_up.weight": up, "lora_down.weight": down, "alpha": 2.0}, lambda w: up @ down / 2, "LoRA"),
    "LoCon": (
        CONV, {"lora_up.weight": conv_up, "lora_down.weight": conv_down, "alpha": 1.0},
        lambda w: einsum("or,rikl->oikl", conv_up[:, :, 0, 0], conv_down) / 4, "LoRA",
    ),
    "LoCon, Tucker": (
        CONV, {"lora_up.weight": conv_up, "lora_down.weight": numbers(4, 32, 1, 1), "lora_mid.weight": mid, "alpha": 1.0},
        lambda w: einsum("om,mnkl,ni->oikl", conv_up[:, :, 0, 0], mid, numbers(4, 32, 1, 1)[:, :, 0, 0]) / 4, "LoRA",
    ),
    "LoHa": (
        TO_K, {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": 2.0},
        lambda w: (a1 @ b1) * (a2 @ b2) / 2, "LoHa",
    ),
    "LoHa, Tucker": (
        CONV,
        {"hada_w1_a": c1, "hada_w1_b": d1, "hada_t1": t1, "hada_w2_a": c2, "hada_w2_b": d2, "hada_t2": t2, "alpha": 2.0},
        lambda w: einsum("mo,mnkl,ni->oikl", c1, t1, d1) * einsum("mo,mnkl,ni->oikl", c2, t2, d2) / 2, "LoHa",
    ),
    "LoKr": (TO_K, {"lokr_w1": w1, "lokr_w2": w2, "alpha": 7.0}, lambda w: kron(w1, w2), "LoKr"),
    "LoKr, low rank": (
        TO_K, {"lokr_w1": w1, "lokr_w2_a": ka, "lokr_w2_b": kb, "alpha": 1.0}, lambda w: kron(w1, ka @ kb) / 2, "LoKr",
    ),
    "LoKr, both": (
        TO_K, {"lokr_w1_a": ka[:4].clone(), "lokr_w1_b": kb.clone(), "lokr_w2_a": ka, "lokr_w2_b": kb, "alpha": 1.0},
        lambda w: kron(ka[:4] @ kb, ka @ kb) / 2, "LoKr",
    ),
    "LoKr, convolution": (
        CONV, {"lokr_w1": w1, "lokr_w2": numbers(16, 4, 3, 3)},
        lambda w: einsum("ab,cdkl->acbdkl", w1, numbers(16, 4, 3, 3)).reshape(64, 32, 3, 3), "LoKr",
    ),
    "LoKr, Tucker": (
        CONV, {"lokr_w1": w1, "lokr_w2_a": kc, "lokr_w2_b": kd, "lokr_t2": t3, "alpha": 1.0},
        lambda w: einsum("ab,mc,mnkl,nd->acbdkl", w1, kc, t3, kd).reshape(64, 32, 3, 3) / 2, "LoKr",
    ),
    "DoRA": (
        TO_K, {"lora_up.weight": up, "lora_down.weight": down, "alpha": 2.0, "dora_scale": ones(32, 1) * 3},
        lambda w: magnitudes(w, up @ down / 2, ones(32) * 3), "DoRA of LoRA",
    ),
    "DoRA of inputs": (
        TO_K, {"lora_up.weight": up, "lora_down.weight": down, "alpha": 2.0, "dora_scale": numbers(1, 64)},
        lambda w: magnitudes(w.T, (up @ down).T / 2, numbers(1, 64)[0]).T, "DoRA of LoRA",
    ),
    "DoRA, convolution": (
        CONV, {"lora_up.weight": conv_up, "lora_down.weight": conv_down, "dora_scale": numbers(64, 1, 1, 1)},
        lambda w: magnitudes(w, einsum("or,rikl->oikl", conv_up[:, :, 0, 0], conv_down), numbers(64, 1, 1, 1).flatten()),
        "DoRA of LoRA",
    ),
    "DoRA of a LoHa": (
        TO_K, {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "dora_scale": ones(32, 1)},
        lambda w: magnitudes(w, (a1 @ b1) * (a2 @ b2), ones(32)), "DoRA of LoHa",
    ),
    "full": (TO_K, {"diff": numbers(32, 64)}, lambda w: numbers(32, 64), "full"),
    "a norm": (NORM, {"w_norm": numbers(32)}, lambda w: numbers(32), "full"),
    "(IA)^3": (TO_K, {"weight": numbers(32), "on_input": 0}, lambda w: w * numbers(32)[:, None], "(IA)^3"),
    "(IA)^3 of inputs": (TO_K, {"weight": numbers(64), "on_input": 1}, lambda w: w * numbers(64)[None], "(IA)^3"),
}  # fmt: skip


def write(path, module, tensors, layer=kohya_name, metadata=None):
    named = {f"{layer(module)}.{name}": torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    save_file(named, path, metadata)
    return path


@pytest.mark.parametrize("strength", [1, -0.5])
@pytest.mark.parametrize("module, tensors, difference, kind", MERGES.values(), ids=MERGES)
def test_every_kind_equals_its_formula(module, tensors, difference, kind, strength, model, tmp_path):
    path = write(tmp_path / "a.safetensors", module, tensors)
    result, text = merged(model, tmp_path / "out", f"{path}:{strength}")
    before, name = weights(model), f"{module}.weight"
    assert relative(result[name] - before[name], strength * difference(before[name])) < 1e-5
    assert {other for other in result if not torch.equal(result[other], before[other])} == {name}
    assert says(text, "lora-merged", path=path, strength=strength, kinds=f"{kind} 1")


def test_biases_of_linears_convolutions_and_norms(model, tmp_path):
    tensors = {f"{kohya_name(NORM)}.b_norm": numbers(32), f"{kohya_name(NORM)}.w_norm": numbers(32)}
    tensors |= {f"{kohya_name(CONV)}.diff_b": numbers(64), f"{kohya_name(FC1)}.diff_b": numbers(32)}
    save_file(tensors, tmp_path / "a.safetensors")
    result, _ = merged(model, tmp_path / "out", f"{tmp_path / 'a.safetensors'}:2")
    before = weights(model)
    for module, size in ((NORM, 32), (CONV, 64), (FC1, 32)):
        assert torch.allclose(result[f"{module}.bias"] - before[f"{module}.bias"], 2 * numbers(size), atol=1e-6)
    assert torch.equal(result[f"{CONV}.weight"], before[f"{CONV}.weight"])


def original(model, module):
    config = json.loads((model / "unet" / "config.json").read_text())
    name = f"{module.removeprefix('unet.')}.weight"
    return original_names("unet", config, [name])[name].removesuffix(".weight")


@pytest.mark.parametrize("module", [TO_K, CONV, NORM, FC1])
def test_names_of_all_tools(module, model, tmp_path):
    is_unet, stem = module.startswith("unet."), module.partition(".")[2]
    other = original(model, module) if is_unet else stem
    labels = [kohya_name(module)]
    if is_unet:
        labels += [f"lora_unet_{other.replace('.', '_')}", f"diffusion_model.{other}", f"lycoris_{stem.replace('.', '_')}"]
        labels += [f"lora_unet.{stem}", f"unet.{other}"]
    else:
        labels += [f"lora_te.{stem}", f"clip_l.{stem}", f"text_encoders.clip_l.transformer.{stem}", module]
    before, name = weights(model), f"{module}.weight"
    for i, label in enumerate(labels):
        path = write(tmp_path / "a.safetensors", module, {"diff": numbers(*before[name].shape)}, lambda m, label=label: label)
        result, _ = merged(model, tmp_path / f"out{i}", str(path))
        assert torch.allclose(result[name] - before[name], numbers(*before[name].shape), atol=1e-6), label


@pytest.mark.parametrize("module, shape", [(TO_K, (32,)), (CONV, (1, 64, 1, 1))])
def test_dora_of_peft(module, shape, model, tmp_path):
    """peft stores alpha in the config, and the magnitudes of a convolution's outputs as (1, outputs, 1, 1)."""
    A, B = (down, up) if module == TO_K else (conv_down, conv_up)
    config = {"unet.r": 4, "unet.lora_alpha": 2, "unet.use_dora": True}
    tensors = {"lora_A.weight": A, "lora_B.weight": B, "lora_magnitude_vector": numbers(*shape)}
    path = write(tmp_path / "a.safetensors", module, tensors, str, {PEFT_CONFIG: json.dumps(config)})
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
        model, tmp_path / "out", str(write(tmp_path / "a.safetensors", TO_K, tensors, str, {PEFT_CONFIG: config}))
    )
    x = numbers(5, 64)
    with torch.no_grad():
        assert relative(F.linear(x, result[f"{TO_K}.weight"]), layer(x)) < 1e-5


def test_several_adapters_are_merged_in_turn_and_rounded_once(model, tmp_path):
    paths = [write(tmp_path / f"{i}.safetensors", TO_K, {"diff": numbers(32, 64, seed=i)}) for i in range(3)]
    half = merged(model, tmp_path / "half", dtype="fp16")[0]
    result, text = merged(tmp_path / "half", tmp_path / "out", *(f"{path}:0.3" for path in paths))
    exact = half[f"{TO_K}.weight"].double() + 0.3 * sum(numbers(32, 64, seed=i).double() for i in range(3))
    assert torch.equal(result[f"{TO_K}.weight"], exact.half())
    assert text.count("with weight 0.3, layers: full 1") == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Adapters merged into the weights: 0.safetensors:0.3, 1.safetensors:0.3, 2.safetensors:0.3." in card


def test_a_single_file_from_the_command_line(model, tmp_path):
    path = write(tmp_path / "a.safetensors", TO_K, {"diff": numbers(32, 64)})
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
    "half a LoHa": ({f"{K}.hada_w1_a": a1}, "merge-shapes"),
    "half a LoKr": ({f"{K}.lokr_w1": w1}, "merge-shapes"),
    "only alpha": ({f"{K}.alpha": ones(())}, "merge-shapes"),
    "other magnitudes": (
        {f"{K}.lora_up.weight": up, f"{K}.lora_down.weight": down, f"{K}.dora_scale": ones(9, 1)},
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
        convert(str(model), tmp_path / "out.safetensors", "lora-kohya", ConvertOptions(merge=("a",)))
