"""Broken and hostile models: each gives one line of error, executes nothing and leaves no partial output."""

import json
import os
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file
from sentences import LINES, refused, says
from tiny import make_tiny_model
from typer.testing import CliRunner

from fastsd.cli import app
from fastsd.commands.convert import ConvertOptions, convert
from fastsd.errors import UserError
from fastsd.model.unet import UNetConfig
from fastsd.storage import write_safetensors
from fastsd.terminal.console import Console

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """A model without damage, as a folder and as a file in the original layout."""
    folder = tmp_path_factory.mktemp("bad") / "m"
    make_tiny_model(folder, UNetConfig(block_out_channels=(32, 64), attention=(True, False), cross_attention_dim=64))
    convert(str(folder), folder.parent / "m.safetensors", console=Console(quiet=True))
    return folder, folder.parent / "m.safetensors"


def tensors(change, name=UNET):
    def make(folder, file, place):
        shutil.copytree(folder, place / "in")
        state = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        change(state)
        write_safetensors(place / "in" / name, state)
        return place / "in"

    return make


def in_file(change, metadata=None):
    def make(folder, file, place):
        state = load_file(file)
        renamed = change(state)
        write_safetensors(place / "in.safetensors", renamed if isinstance(renamed, dict) else state, metadata)
        return place / "in.safetensors"

    return make


def setting(name, **values):
    def make(folder, file, place):
        shutil.copytree(folder, place / "in")
        path = place / "in" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return place / "in"

    return make


def text(name, content):
    def make(folder, file, place):
        shutil.copytree(folder, place / "in")
        (place / "in" / name).write_text(content)
        return place / "in"

    return make


def data(content, name="in.safetensors"):
    """Return a function that writes a file with the bytes `content`. If that is a function, it gets an undamaged file's."""

    def make(folder, file, place):
        (place / name).write_bytes(content(file.read_bytes()) if callable(content) else content)
        return place / name

    return make


def header(**entries):
    text = json.dumps(entries).encode()
    return data(struct.pack("<Q", len(text)) + text + bytes(16))


def repeat_entry(content):
    length = struct.unpack("<Q", content[:8])[0]
    entries = json.loads(content[8 : 8 + length])
    name = next(name for name in entries if name != "__metadata__")
    text = content[8 : 8 + length].rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}}}".encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def pickled(value, name="in.ckpt", cut=None):
    def make(folder, file, place):
        torch.save(value, place / name)
        if cut:
            os.truncate(place / name, cut)
        return place / name

    return make


def pickled_component(folder, file, place):
    shutil.copytree(folder, place / "in")
    (place / "in" / UNET).unlink()
    torch.save({"conv_in.weight": Payload()}, place / "in" / "unet" / "diffusion_pytorch_model.bin")
    return place / "in"


def index(weight_map):
    """Return a function that writes a folder with an index of the UNet's weights, a dict or a function that names one file."""

    def make(folder, file, place):
        shutil.copytree(folder, place / "in")
        weights = place / "in" / UNET
        weights.rename(weights.with_name(SHARD))
        shutil.copy(folder / UNET, place / "outside.safetensors")
        entry = dict.fromkeys(load_file(folder / UNET), weight_map(place)) if callable(weight_map) else weight_map
        index_path = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
        index_path.write_text(json.dumps({"weight_map": entry}))
        return place / "in"

    return make


def rename(old, new):
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def without(names):
    """Return a function that leaves out the tensors whose names match a regular expression."""
    return lambda state: {name: tensor for name, tensor in state.items() if not re.match(names, name)}


def put(name, value):
    return lambda state: state.update({name: value})


SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
PREFIX, NORM = "model.diffusion_model.", "text_model.final_layer_norm.bias"
ORIGINAL, CURRENT = f"{PREFIX}input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.0.conv1.weight"
CONV_IN, OTHER_DTYPE = "conv_in.weight", LINES["other-dtype"].format(dtype="torch.float16")
QUANT, FIRST_BLOCK = "quant_conv.weight", "input_blocks.1.0.out_layers.3.weight"
TO_K = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
IN, OUT = f"{PREFIX}input_blocks.0.0.weight", f"{PREFIX}out.2.weight"
WORDS = "cond_stage_model.transformer.text_model."
POSITIONS, TOKENS = "embeddings.position_embedding.weight", "embeddings.token_embedding.weight"
INNER = "encoder.layers.0.mlp.fc1.weight"
SCALE = ORIGINAL.replace(".weight", ".scale_weight")
NO_SCALE = f"{PREFIX}x.scale_weight"
SYSTEM = f"{os.system.__module__}.system"
FLAT = put(OUT, torch.ones(3))
ones = torch.ones
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HUGE = struct.pack("<Q", 100 << 20) + b"{" + b" " * (100 << 20)


def case(make, code, /, **fields):
    return make, code, fields


BAD = {
    "missing": case(tensors(lambda s: s.pop("conv_in.bias")), "weights-names", kind="missing", name="conv_in.bias"),
    "extra": case(tensors(put("conv_in.extra", ones(1))), "weights-names", kind="unexpected", name="conv_in.extra"),
    "shape": case(tensors(put(CONV_IN, ones(32, 9, 3, 3))), "weights-shape", name=CONV_IN, shape=(32, 9, 3, 3)),
    "missing in a file": case(in_file(lambda s: s.pop(ORIGINAL)), "weights-names", kind="missing", name=CURRENT),
    "extra in a file": case(in_file(put(f"{PREFIX}x.y", ones(1))), "weights-names", kind="unexpected", name="x.y"),
    "shape in a file": case(in_file(put(ORIGINAL, ones(3))), "weights-shape", shape=(3,)),
    "flat": case(in_file(FLAT, {}), "weights-shape", shape=(3,)),
    "no UNet": case(in_file(without(PREFIX)), "single-file-no-unet", prefix=PREFIX),
    "no first convolution": case(in_file(without(IN)), "single-file-no-whole-unet"),
    "no last convolution": case(in_file(without(OUT)), "single-file-no-whole-unet"),
    "no convolution in a block": case(
        in_file(without(PREFIX + FIRST_BLOCK)), "single-file-tensor-missing", prefix=PREFIX, last=FIRST_BLOCK
    ),
    "uneven levels": case(in_file(without(f"{PREFIX}input_blocks.5.")), "single-file-blocks", per_level=[2, 1]),
    "no levels": case(in_file(without(f"{PREFIX}input_blocks.[1-5].")), "single-file-blocks", per_level=[0]),
    "no attention": case(in_file(without(r".+attn2\.to_k")), "single-file-no-attention"),
    "flat first convolution": case(in_file(put(IN, ones(3))), "single-file-shape", name=IN.removeprefix(PREFIX), shape=(3,)),
    "scalar": case(in_file(put(OUT, ones(()))), "single-file-shape", name=OUT.removeprefix(PREFIX), shape=()),
    "scalar in a block": case(in_file(put(PREFIX + FIRST_BLOCK, ones(()))), "single-file-shape", name=FIRST_BLOCK, shape=()),
    "scalar in attention": case(in_file(put(PREFIX + TO_K, ones(()))), "single-file-shape", name=TO_K, shape=()),
    "VAE without encoder": case(in_file(without(r"first_stage_model\.encoder.conv_in")), "single-file-no-vae"),
    "VAE without convolution": case(in_file(without(r"first_stage_model\.post_quant")), "single-file-no-vae"),
    "no positions": case(in_file(without(WORDS + POSITIONS)), "single-file-no-text-encoder", missing=f"text_model.{POSITIONS}"),
    "no tokens": case(in_file(without(WORDS + TOKENS)), "single-file-no-text-encoder", missing=f"text_model.{TOKENS}"),
    "no layers": case(in_file(without(WORDS + INNER)), "single-file-no-text-encoder", missing=f"text_model.{INNER}"),
    "wide VAE convolution": case(tensors(put(QUANT, ones(8, 8, 3, 3)), VAE), "weights-shape", name=QUANT, shape=(8, 8, 3, 3)),
    "NaN": case(tensors(lambda s: s[CONV_IN].view(-1)[7].fill_(float("nan"))), "not-finite", count=1, total=1152),
    "infinite": case(tensors(put(NORM, ones(64) / 0), TEXT), "not-finite", count=64, total=64),
    "too large for fp16": case(tensors(lambda s: s["conv_in.bias"].fill_(1e6)), "not-finite", advice=OTHER_DTYPE),
    "SD2 folder": case(setting("unet/config.json", attention_head_dim=[5, 10, 20, 20]), "sd2-unet"),
    "SD2 linear": case(setting("unet/config.json", use_linear_projection=True), "other-unet", key="use_linear_projection"),
    "SDXL folder": case(setting("unet/config.json", addition_embed_type="text_time"), "other-unet", key="addition_embed_type"),
    "other VAE": case(setting("vae/config.json", _class_name="AutoencoderTiny"), "not-a-vae", config="AutoencoderTiny"),
    "code in a checkpoint": case(pickled({"state_dict": {"x": Payload()}}), "pickle-runs-code", match=SYSTEM),
    "code in a folder": case(pickled_component, "pickle-runs-code", match=SYSTEM),
    "cut checkpoint": case(pickled({"x": ones(5000)}, cut=9000), "weights-unreadable"),
    "no checkpoint": case(data(b"not a checkpoint", "in.ckpt"), "weights-unreadable"),
    "a list": case(pickled([ones(1)]), "weights-no-tensors"),
    "cut file": case(data(lambda content: content[:-100]), "safetensors-unreadable"),
    "cut header": case(data(lambda content: content[:1000]), "safetensors-unreadable", error=("header-cut", {"rest": 992})),
    "empty": case(data(b""), "safetensors-unreadable"),
    "text": case(data(b"<html>404: this file is a web page</html>"), "safetensors-unreadable"),
    "header of 100 MB": case(data(HUGE), "safetensors-unreadable", error=("header-too-long", {"length": 100 << 20})),
    "deep header": case(data(struct.pack("<Q", 99_999) + b"[" * 100_000), "safetensors-unreadable"),
    "a name twice": case(data(repeat_entry), "safetensors-unreadable", error=("header-name-twice", {})),
    "data outside": case(header(x={**ENTRY, "shape": [8], "data_offsets": [0, 32]}), "safetensors-unreadable"),
    "data shared": case(header(x=ENTRY, y=ENTRY), "safetensors-unreadable"),
    "fp8 scales": case(header(x={**ENTRY, "dtype": "F8_E8M0", "shape": [16]}), "tensor-dtype", dtype="F8_E8M0"),
    "int8 in a folder": case(tensors(put(CONV_IN, ones(2).char())), "weights-quantized", name=CONV_IN, dtype="int8"),
    "a negative scale": case(in_file(put(SCALE, -ones(1))), "scale-not-a-number", name=SCALE),
    "a scale without a weight": case(in_file(put(NO_SCALE, ones(1))), "scale-of-no-tensor", name=NO_SCALE),
    "escape": case(index(lambda place: "../../outside.safetensors"), "index-outside", name="'../../outside.safetensors'"),
    "absolute": case(index(lambda place: str(place / "outside.safetensors")), "index-outside"),
    "no shard": case(index(lambda place: "gone.safetensors"), "index-file-missing", name="gone.safetensors"),
    "wrong shard": case(index({"conv_in.weight": SHARD, "gone": SHARD}), "index-tensor-missing", name="gone"),
    "no map": case(index([1, 2]), "index-no-map", type="list"),
    "no JSON": case(text("unet/config.json", "{"), "json-unreadable"),
    "deep JSON": case(text("vae/config.json", "[" * 100_000), "json-unreadable"),
    "a list for a config": case(text("text_encoder/config.json", "[]"), "json-no-table", type="list"),
    "odd config": case(setting("unet/config.json", block_out_channels="wide"), "other-unet", value="'wide'"),
    "endless config": case(setting("text_encoder/config.json", num_hidden_layers=10**9), "layer-count", count=10**9),
    "endless list": case(setting("vae/config.json", block_out_channels=[8] * 10**5), "layer-count", count=10**5),
    "odd VAE": case(setting("vae/config.json", down_block_types=7), "config-of-other-component", component="vae"),
    "odd factor": case(setting("vae/config.json", scaling_factor="big"), "vae-factor", factor="'big'"),
    "no factor": case(setting("vae/config.json", scaling_factor=0), "vae-factor", factor=0),
    "odd header": case(in_file(lambda s: None, {"fastsd.configs": "[1"}), "header-configs", configs="fastsd.configs"),
    "nothing": case(lambda folder, file, place: place, "component-missing", component="unet"),
    "nowhere": case(lambda folder, file, place: place / "nowhere", "source-missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_models_are_refused_in_one_line(case, undamaged, tmp_path, monkeypatch):
    make, code, fields = BAD[case]
    header_line = fields.pop("error", None)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    path = make(*undamaged, tmp_path / "in")
    options = ConvertOptions(dtype="fp16" if "fp16" in case else "", tokenizer=str(undamaged[0]))
    for out in ("m.safetensors", "m"):
        with refused(code, **fields) as error:
            convert(str(path), tmp_path / "out" / out, options=options, console=Console(quiet=True))
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        assert header_line is None or says(str(error.value), header_line[0], **header_line[1])
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("out", ["m.safetensors", "m"])
def test_a_file_that_becomes_shorter_during_conversion_is_refused(out, undamaged, tmp_path):
    folder, file = undamaged
    path = shutil.copy(file, tmp_path / "in.safetensors")
    size = file.stat().st_size // 2
    console = Console(quiet=True)
    console.echo = lambda line: os.truncate(path, size)
    with refused("file-became-shorter", path=path):
        options = ConvertOptions(tokenizer=str(folder))
        convert(str(path), tmp_path / out, options=options, console=console)
    assert list(tmp_path.iterdir()) == [path]


def test_a_lora_is_not_converted_to_a_model(undamaged, tmp_path):
    path = in_file(lambda state: {"lora_unet_x.lora_down.weight": torch.ones(1)})(*undamaged, tmp_path)
    options = ConvertOptions(tokenizer=str(undamaged[0]))
    for out, code in (("m.safetensors", "lora-unknown-name"), ("m", "other-family")):
        with refused(code) as error:
            convert(str(path), tmp_path / "out" / out, options=options, console=Console(quiet=True))
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_refuses_unusable_output_and_options(undamaged, tmp_path):
    folder, file = undamaged
    for words, code, fields in (
        ([folder, file], "convert-out-exists", {"kind": "file"}),
        ([file, folder], "convert-out-exists", {"kind": "folder"}),
        ([folder, tmp_path / "x", "--to", "single-file"], "convert-ending", {"to": "single-file"}),
        ([folder, tmp_path / "x.safetensors", "--to", "diffusers"], "folder-like-file", {}),
        ([folder, tmp_path / "x.ckpt"], "folder-like-file", {"advice": LINES["or-one-file"]}),
        ([folder, tmp_path / "x.BIN", "--to", "diffusers"], "folder-like-file", {}),
        ([folder, tmp_path / "x.safetensor"], "folder-like-file", {}),
        ([folder, tmp_path / "x.SAFETENSORS"], "folder-like-file", {}),
        ([folder, file / "x.safetensors"], "convert-unwritable", {"file": file}),
        ([file, tmp_path / "x", "--tokenizer", tmp_path], "tokenizer-folder", {}),
        ([file, tmp_path / "x", "--ema"], "single-file-no-ema", {}),
        ([folder, tmp_path / "x", "--ema"], "convert-no-ema", {}),
        ([folder, tmp_path / "x.safetensors", "--to", "lora-kohya", "--ema"], "convert-no-lora-ema", {"run": folder}),
    ):
        result = CliRunner().invoke(app, ["convert", *map(str, words)])
        assert isinstance(result.exception, UserError), (words, result.output, result.exception)
        assert result.exception.code == code and says(str(result.exception), code, **fields)
        assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())
