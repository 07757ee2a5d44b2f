"""Encode captions of any length with chunks or Long-CLIP's position embeddings, also with clip skip."""

import json
import re
from io import StringIO

import pytest
import torch
import torch.nn.functional as F
from commandline import fastsd
from runs import run
from sentences import refused, says
from tiny import job, make_tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from fastsd.config.schema import ModelTable
from fastsd.model.formats.load import load_model
from fastsd.model.text_encoder import stretch
from fastsd.terminal.console import Console

LONG = " ".join(["red", "green", "blue", "circle", "square"] * 40)  # 200 words, more than 200 tokens
SHORT = ["a red circle", "", "blue star, green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def longer(folder, tmp_path_factory):
    """The model with 248 positions, as the command `long-clip` writes it."""
    from fastsd.commands.long_clip import long_clip

    out = tmp_path_factory.mktemp("long") / "clip"
    text = StringIO()
    with refused("folder-like-file"):
        long_clip(str(folder), out.with_suffix(".safetensors"), 248)
    long_clip(str(folder), out, 248, console=Console(file=text))
    assert {"77", "248", "20"} <= set(re.findall(r"\d+", text.getvalue()))
    return out


def text_of(base, **keys):
    return load_model(ModelTable(base=str(base), **keys)).text


def test_stretched_positions_equal_the_paper(folder, longer):

    def positions(base):
        return next(p.double() for n, p in text_of(base).module.named_parameters() if "position_embedding" in n)

    old, new = positions(folder), positions(longer)
    assert new.shape == (248, old.shape[1]) and torch.equal(new[:20], old[:20])
    for i in range(20, 76):
        for quarter in range(4):
            expected = ((4 - quarter) * old[i] + quarter * old[i + 1]) / 4
            torch.testing.assert_close(new[20 + 4 * (i - 20) + quarter], expected, rtol=1e-6, atol=1e-7)
    for quarter in range(4):
        torch.testing.assert_close(new[244 + quarter], old[76] + quarter * (old[76] - old[75]) / 4, rtol=1e-6, atol=1e-7)


def test_a_long_caption_reaches_beyond_77(longer):
    text = text_of(longer)
    assert text.lengths == [248]
    ids = text.tokenize([LONG, LONG, " ".join(LONG.split()[:75])])
    text_embeds = text.encode(ids)
    assert text_embeds.shape == (3, 248, text.width)
    assert torch.equal(text_embeds[0], text_embeds[1])
    torch.testing.assert_close(text_embeds[0, :70], text_embeds[2, :70])  # the encoder is causal
    assert all(not torch.allclose(text_embeds[0, i], text_embeds[2, i], atol=1e-4) for i in range(80, 200))


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("fixture", ["folder", "longer"])
def test_short_captions_equal_transformers(fixture, skip, request):
    base = request.getfixturevalue(fixture)
    text = text_of(base, clip_skip=skip)
    ids = text.tokenizer(SHORT, padding="max_length", max_length=text.window, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(text.tokenize(SHORT), ids)
    out = text.module(ids, output_hidden_states=True)
    expected = out.last_hidden_state if skip == 0 else text.final_layer_norm(out.hidden_states[-(skip + 1)])
    assert torch.equal(text.encode(ids), expected)


def test_stretching_does_not_change_the_first_twenty_tokens(folder, longer):
    before, after = (text.encode(text.tokenize(SHORT))[:, :20] for text in (text_of(folder), text_of(longer)))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("skip", [0, 1])
def test_chunks_are_encoded_separately(folder, skip):
    single, three = text_of(folder, clip_skip=skip), text_of(folder, chunks=3, clip_skip=skip)
    ids = three.tokenize([LONG, "red circle"])
    tokens = three.tokenizer([LONG], add_special_tokens=False).input_ids[0]
    assert ids.shape == (2, 3 * 77) and len(tokens) > 150
    begin, end = three.tokenizer.bos_token_id, three.tokenizer.eos_token_id
    for c in range(3):
        row = ids[0, 77 * c : 77 * (c + 1)].tolist()
        chunk = tokens[75 * c : 75 * (c + 1)]
        assert row[0] == begin and row[1 : 1 + len(chunk)] == chunk and row[1 + len(chunk)] == end
    text_embeds = three.encode(ids)
    expected = torch.cat([single.encode(ids[:, 77 * c : 77 * (c + 1)]) for c in range(3)], dim=1)
    torch.testing.assert_close(text_embeds, expected)
    torch.testing.assert_close(text_embeds[1, :77], single.encode(single.tokenize(["red circle"]))[0])
    torch.testing.assert_close(text_embeds[1, 77:154], single.encode(single.tokenize([""]))[0])


STAGE = '[[stage]]\ntrain = ["unet", "text_encoder"]\nuntil = 2\nbatch = 4\noptimizer = "lion"\nlr = 1e-3\n'


@pytest.mark.slow
@pytest.mark.parametrize("override", ["", "cache.hidden_states=true"])
def test_training_with_chunks_from_cached_ids_or_embeddings(override, tmp_path, folder, images):
    import shutil

    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "0000.txt").write_text(LONG)
    stage = STAGE.replace(', "text_encoder"', "") if override else STAGE
    path = job(tmp_path, folder, tmp_path / "images", stage)
    losses = {}
    for chunks in (1, 3):
        keys = [f"model.chunks={chunks}", f"run={tmp_path}/run-{chunks}", "stage.batch=21", *([override] if override else [])]
        run_folder, out = run(path, *keys)
        assert not says(out, "tokenized-on-the-way")
        losses[chunks] = [json.loads(line)["loss"] for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert losses[1] != losses[3]


def test_long_clip_command_refuses_in_one_line(tmp_path, folder, monkeypatch, capsys):
    def error_line(*words):
        code, out, err = fastsd("long-clip", *words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and err.count("\n") == 1, (out, err)
        return err

    assert says(error_line(folder, folder), "out-exists")
    line = error_line(folder, tmp_path / "o", "--tokens", "77")
    assert says(line, "long-clip-tokens") and says(line, "stretch-tokens", tokens=77, count=77)
    assert says(error_line(tmp_path / "none", tmp_path / "o"), "source-missing")
    assert not (tmp_path / "o").exists()


def test_stretches_to_any_length():
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    module = CLIPTextModel(config)
    stretch(module, 134, keep=20)
    assert module.config.max_position_embeddings == 134
    assert module(torch.zeros(1, 134, dtype=torch.int64)).last_hidden_state.isfinite().all()


class Operations(TorchDispatchMode):
    """Collects the names of operations, each with those of its tensor options."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.names.append(f"{func} {sorted(name for name, value in kwargs.items() if isinstance(value, torch.Tensor))}")
        return func(*args, **kwargs)


@pytest.mark.parametrize("skip", [0, 1])
def test_a_capture_runs_the_same_operations(skip, folder, monkeypatch):
    """Some versions of transformers build a mask only during a capture. With it, PyTorch chooses another kernel."""
    from transformers.models.clip import modeling_clip

    mask_BHWW = torch.full((1, 1, 77, 77), -torch.inf).triu(1)
    build = lambda *_, **__: mask_BHWW if torch.cuda.is_current_stream_capturing() else None  # noqa: E731
    monkeypatch.setattr(modeling_clip, "create_causal_mask", build, raising=False)  # missing before version 5
    text, runs = text_of(folder, clip_skip=skip), []
    ids = text.tokenize([LONG, *SHORT])
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        text.module.zero_grad(set_to_none=True)
        with Operations() as operations:
            text_embeds = text.encode(ids)
            text_embeds.square().sum().backward()
        runs.append((operations.names, text_embeds, next(text.module.parameters()).grad))
    (names, *tensors), (same_names, *same_tensors) = runs
    assert names == same_names and any("attention" in name for name in names)
    assert all(torch.equal(a, b) for a, b in zip(tensors, same_tensors, strict=True))


@pytest.mark.parametrize("device, fused", [("cuda", False), ("cpu", True)])
def test_a_gpu_computes_attention_without_fused_kernels(device, fused, folder, monkeypatch):
    """The gradients of fused kernels change from run to run. Tensors without data need no GPU."""
    attend = AttentionInterface()[text_of(folder).module.config._attn_implementation]
    cuda, enabled = torch.backends.cuda, []

    def product(q, k, v, *, is_causal, scale):
        switches = cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled, cuda.math_sdp_enabled
        enabled.extend(switch() for switch in switches)
        assert is_causal and scale == 0.25
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", product)
    with FakeTensorMode():
        q_BHWD = torch.empty(2, 77, 4, 16, device=device).transpose(1, 2)
        o_BWHD, _ = attend(None, q_BHWD, q_BHWD, q_BHWD, None, scaling=0.25)
    assert o_BWHD.shape == (2, 77, 4, 16) and enabled == [fused, fused, fused, True]
