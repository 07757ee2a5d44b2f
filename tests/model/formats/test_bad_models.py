"""Broken and hostile models: one sentence each, nothing executed, nothing half-written."""

import json
import os
import re
import shutil
import struct

import pytest
import torch
from tiny import make_tiny_model
from typer.testing import CliRunner

from fastsd.cli import app
from fastsd.commands.convert import ConvertOptions, convert
from fastsd.errors import UserError
from fastsd.model.unet import UNetConfig
from fastsd.storage import read_safetensors, write_safetensors

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that is whole, as a folder and as a file of the original layout."""
    folder = tmp_path_factory.mktemp("bad") / "m"
    make_tiny_model(folder, UNetConfig(block_out_channels=(32, 64), attention=(True, False), cross_attention_dim=64))
    convert(str(folder), folder.parent / "m.safetensors", reporter=lambda line: None)
    return folder, folder.parent / "m.safetensors"


def tensors(change, name=UNET):
    """Make a folder whose weights are changed."""

    def make(folder, file, place):
        shutil.copytree(folder, place / "in")
        state = {key: tensor.clone() for key, tensor in read_safetensors(folder / name).items()}
        change(state)
        write_safetensors(place / "in" / name, state)
        return place / "in"

    return make


def in_file(change, metadata=None):
    def make(folder, file, place):
        state = read_safetensors(file)
        made = change(state)
        write_safetensors(place / "in.safetensors", made if isinstance(made, dict) else state, metadata)
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
    """A file of these bytes; `content` may be made of the bytes of a good file."""

    def make(folder, file, place):
        (place / name).write_bytes(content(file.read_bytes()) if callable(content) else content)
        return place / name

    return make


def header(**entries):
    """A safetensors file of 16 bytes with this header."""
    text = json.dumps(entries).encode()
    return data(struct.pack("<Q", len(text)) + text + bytes(16))


def twice(good):
    """The same header with its first tensor's entry repeated."""
    length = struct.unpack("<Q", good[:8])[0]
    entries = json.loads(good[8 : 8 + length])
    name = next(name for name in entries if name != "__metadata__")
    text = good[8 : 8 + length].rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}}}".encode()
    return struct.pack("<Q", len(text)) + text + good[8 + length :]


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


def pickled_part(folder, file, place):
    shutil.copytree(folder, place / "in")
    (place / "in" / UNET).unlink()
    torch.save({"conv_in.weight": Payload()}, place / "in" / "unet" / "diffusion_pytorch_model.bin")
    return place / "in"


def index(places, keep=True):
    """A folder whose UNet is said to lie in these files."""

    def make(folder, file, place):
        shutil.copytree(folder, place / "in")
        names = read_safetensors(folder / UNET)
        whole = place / "in" / UNET
        whole.rename(whole.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
        shutil.copy(folder / UNET, place / "outside.safetensors")
        said = {"weight_map": places if not callable(places) else {name: places(place) for name in names}}
        whole.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(said))
        return place / "in"

    return make


def rename(old, new):
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def put(name, value):
    return lambda state: state.__setitem__(name, value)


SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
ORIGINAL = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
BAD = {
    "missing": (tensors(lambda s: s.pop("conv_in.bias")), "tensors is missing, the first is conv_in.bias"),
    "extra": (tensors(put("conv_in.extra", torch.ones(1))), "is not part of this model, the first is conv_in.extra"),
    "shape": (tensors(put("conv_in.weight", torch.ones(32, 9, 3, 3))), r"conv_in.weight has shape \(32, 9, 3, 3\), expected"),
    "missing in a file": (in_file(lambda s: s.pop(ORIGINAL)), "is missing, the first is down_blocks.0.resnets.0.conv1"),
    "extra in a file": (in_file(put("model.diffusion_model.x.y", torch.ones(1))), "not part of this model, the first is x.y"),
    "shape in a file": (in_file(put(ORIGINAL, torch.ones(3))), r"has shape \(3,\), expected"),
    "flat": (in_file(put("model.diffusion_model.out.2.weight", torch.ones(3)), {}), "has shape"),
    "NaN": (tensors(lambda s: s["conv_in.weight"].view(-1)[7].fill_(float("nan"))), "1 of 1152 numbers of .* are not finite; "),
    "infinite": (tensors(put("text_model.final_layer_norm.bias", torch.full((64,), torch.inf)), TEXT), "64 of 64 numbers"),
    "too large for fp16": (tensors(lambda s: s["conv_in.bias"].fill_(1e6)), "not finite in torch.float16; choose another"),
    "SD2 folder": (setting("unet/config.json", attention_head_dim=[5, 10, 20, 20]), "an SD2 UNet's; give an SD1.5"),
    "SD2 linear": (setting("unet/config.json", use_linear_projection=True), "which is not an SD1.5 UNet's"),
    "SD2 file": (in_file(rename("cond_stage_model.transformer.", "cond_stage_model.model.")), "an SD2 file"),
    "SDXL file": (in_file(rename("cond_stage_model.", "conditioner.embedders.0.")), "an SDXL file"),
    "SDXL folder": (setting("unet/config.json", addition_embed_type="text_time"), "which is not an SD1.5 UNet's"),
    "LoRA": (in_file(lambda s: {"lora_unet_x.lora_down.weight": torch.ones(1)}), "a LoRA file|which no LoRA of SD1.5 has"),
    "other VAE": (setting("vae/config.json", _class_name="AutoencoderTiny"), "give an AutoencoderKL"),
    "code in a checkpoint": (pickled({"state_dict": {"x": Payload()}}), "asks to run .*system, which no weights need"),
    "code in a folder": (pickled_part, "asks to run .*system, which no weights need"),
    "cut checkpoint": (pickled({"x": torch.ones(5000)}, cut=9000), "cannot be read as weights"),
    "no checkpoint": (data(b"not a checkpoint", "in.ckpt"), "cannot be read as weights"),
    "a list": (pickled([torch.ones(1)]), "holds no tensors by name"),
    "cut file": (data(lambda good: good[:-100]), "cannot be read as safetensors"),
    "cut header": (data(lambda good: good[:1000]), "its header claims .* bytes and 992 follow"),
    "empty": (data(b""), "cannot be read as safetensors"),
    "text": (data(b"<html>404: this file is a web page</html>"), "cannot be read as safetensors"),
    "header of 100 MB": (data(struct.pack("<Q", 100 << 20) + b"{" + b" " * (100 << 20)), "and no model's has more than"),
    "deep header": (data(struct.pack("<Q", 99_999) + b"[" * 100_000), "cannot be read as safetensors"),
    "a name twice": (data(twice), "its header has .* twice"),
    "data outside": (header(x={"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}), "cannot be read as safetensors"),
    "data shared": (header(x={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                           y={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), "cannot be read as safetensors"),
    "fp8": (header(x={"dtype": "F8_E4M3", "shape": [16], "data_offsets": [0, 16]}), "is of type F8_E4M3"),
    "escape": (index(lambda place: "../../outside.safetensors"), "names the file '../../outside.safetensors', which is not"),
    "absolute": (index(lambda place: str(place / "outside.safetensors")), "which is not one beside it"),
    "no shard": (index(lambda place: "gone.safetensors"), "names gone.safetensors, which is not there"),
    "wrong shard": (index({"conv_in.weight": SHARD, "conv_gone.weight": SHARD}), "conv_gone.weight is in .*, and it is not"),
    "no map": (index([1, 2]), "weight_map is list, expected file names"),
    "no JSON": (text("unet/config.json", "{"), "cannot be read as JSON"),
    "deep JSON": (text("vae/config.json", "[" * 100_000), "cannot be read as JSON"),
    "a list for a config": (text("text_encoder/config.json", "[]"), "holds a list, expected a table"),
    "odd config": (setting("unet/config.json", block_out_channels="wide"), "unet/config.json: "),
    "endless config": (setting("text_encoder/config.json", num_hidden_layers=10**9), "asks for 1000000000 layers"),
    "endless list": (setting("vae/config.json", block_out_channels=[8] * 10**5), "block_out_channels asks for 100000 layers"),
    "odd VAE": (setting("vae/config.json", down_block_types=7), "vae/config.json: describes no vae"),
    "odd factor": (setting("vae/config.json", scaling_factor="big"), "scaling_factor is 'big' and .*; give numbers"),
    "no factor": (setting("vae/config.json", scaling_factor=0), "scaling_factor is 0 and .*; give numbers"),
    "odd header": (in_file(lambda s: None, {"fastsd.configs": "[1"}), "fastsd.configs in its header is no table"),
    "nothing": (lambda folder, file, place: place, "there is no unet/config.json in it"),
    "nowhere": (lambda folder, file, place: place / "nowhere", "no such folder or file, and not a hub id"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_one_sentence(case, made, tmp_path, monkeypatch):
    make, sentence = BAD[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    bad = make(*made, tmp_path / "in")
    for out in ("m.safetensors", "m"):
        dtype = "fp16" if "fp16" in case else ""
        with pytest.raises(UserError, match=sentence) as error:
            convert(
                str(bad),
                tmp_path / "out" / out,
                options=ConvertOptions(dtype=dtype, tokenizer=str(made[0])),
                reporter=lambda line: None,
            )
        assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "executed").exists()


def test_what_out_may_be(made, tmp_path):
    folder, file = made
    for words, sentence in (
        ([folder, file], "which already exists; choose a new file"),
        ([file, folder], "which already exists; choose a new folder"),
        ([folder, tmp_path / "x", "--to", "single-file"], "choose a name that ends in .safetensors"),
        ([folder, tmp_path / "x.safetensors", "--to", "diffusers"], "choose a folder"),
        ([folder, file / "x.safetensors"], "m.safetensors: (Not a directory|File exists); fix that"),
        ([file, tmp_path / "x", "--tokenizer", tmp_path], "where no vocab.json and merges.txt are"),
        ([file, tmp_path / "x", "--ema"], r"has no averaged \(EMA\) weights; leave --ema out"),
        ([folder, tmp_path / "x", "--ema"], "has no EMA weights; omit --ema"),
    ):
        result = CliRunner().invoke(app, ["convert", *map(str, words)])
        assert isinstance(result.exception, UserError), (words, result.output, result.exception)
        assert re.search(sentence, str(result.exception)) and "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())
