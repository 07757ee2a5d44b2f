"""`fastsd swap-vae`: what it writes and says, and that bad input is one sentence and leaves nothing behind."""

import json
import shutil
from io import StringIO

import pytest
import torch
from commandline import fastsd
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model, tiny_vae, write_images

from fastsd.commands.swap_vae import FITS, swap_vae
from fastsd.config.schema import ModelTable
from fastsd.errors import UserError
from fastsd.model import align
from fastsd.model.formats.load import load_model, load_vae


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """By name: another one, with more channels, with fewer, of another downscale, and the base's own with another decoder."""
    folder = tmp_path_factory.mktemp("vaes")
    own = tiny_vae()
    own.decoder.conv_out.bias.data += 1
    kinds = {"other": tiny_vae(seed=1, factor=0.7), "more": tiny_vae(6, seed=1), "fewer": tiny_vae(2, seed=1), "decoder": own}
    from diffusers import AutoencoderKL

    kinds["finer"] = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    for name, vae in kinds.items():
        vae.save_pretrained(folder / name)
    return folder


def swapped(base, vae, out, images=None, **options):
    said = StringIO()
    found = swap_vae(str(base), str(vae), out, images, console=Console(file=said, width=200), **options)
    assert json.loads((out / "swap.json").read_text()) == found
    return found, load_model(ModelTable(base=str(out))), said.getvalue()


def test_it_aligns_measures_and_takes_the_best(tmp_path, tiny_model, vaes, images):
    found, model, said = swapped(tiny_model, vaes / "other", tmp_path / "out", images, limit=12)
    losses = {name: found["fits"][name]["loss"] for name in FITS}
    assert found["fit"] == min(losses, key=losses.get) and losses["kernel"] < losses["plain"]
    assert (found["fitted"], found["measured"], found["put_aside"], found["resolution"]) == (9, 3, {}, 32)
    assert all(len(found["fits"][name]["r2"]) == 4 for name in FITS) and found["fits"]["own"]["r2"] == []
    turn = torch.tensor(found["fits"]["orthogonal"]["A"], dtype=torch.float64)
    torch.testing.assert_close(turn @ turn.T, torch.eye(4, dtype=torch.float64))
    assert len(found["fits"]["affine"]["c"]) == 4 and "A" not in found["fits"]["kernel"]
    assert all(f"\n{name} " in said and f"{losses[name]:.4f} ± " in said for name in FITS)
    assert model.vae.hash == load_vae(ModelTable(base=str(vaes / "other"), vae=str(vaes / "other"))).hash
    assert model.vae.scaling_factor == 0.7
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"({found['fit']} fit, 9 images). Loss before training: {losses[found['fit']]:.4f}" in card
        and str(tmp_path) not in card
    )
    base = load_model(ModelTable(base=str(tiny_model)))
    edges = set(align.edge_layers(base.unet))
    for (name, before), after in zip(base.unet.named_parameters(), model.unet.parameters(), strict=True):
        assert torch.equal(before, after) != (name in edges), name
    options = {"limit": 12, "fit": "orthogonal", "precision": "bf16"}
    named, rough, _ = swapped(tiny_model, vaes / "other", tmp_path / "named", images, **options)
    assert named["fit"] == "orthogonal" and named["fits"]["own"]["loss"] == pytest.approx(
        found["fits"]["own"]["loss"], rel=0.02
    )
    assert torch.equal(rough.unet.mid_block.resnets[0].conv1.weight, base.unet.mid_block.resnets[0].conv1.weight)


@pytest.mark.parametrize("kind, channels", [("other", 4), ("more", 6), ("fewer", 2), ("finer", 4)])
def test_without_images_it_only_swaps(tmp_path, tiny_model, vaes, kind, channels):
    found, model, said = swapped(tiny_model, vaes / kind, tmp_path / "out")
    base = align.edge_layers(load_model(ModelTable(base=str(tiny_model))).unet)
    after, shared = align.edge_layers(model.unet), min(channels, 4)
    assert found["fit"] == "plain" and model.unet.cfg.in_channels == model.vae.channels == channels
    assert torch.equal(after["conv_in.weight"][:, :shared], base["conv_in.weight"][:, :shared])
    assert torch.equal(after["conv_out.bias"][:shared], base["conv_out.bias"][:shared])
    assert not after["conv_in.weight"][:, shared:].any() and not after["conv_out.weight"][shared:].any()
    assert ("widened" in said, "narrowed" in said) == (channels == 6, channels == 2)
    assert ("times smaller" in said) == (kind == "finer")


def test_other_channel_counts_are_aligned_too(tmp_path, tiny_model, vaes, images):
    for kind in ("more", "fewer"):
        found, model, _ = swapped(tiny_model, vaes / kind, tmp_path / kind, images, limit=8)
        assert found["fits"]["kernel"]["loss"] < found["fits"]["plain"]["loss"]
        assert model.unet.conv_in.in_channels == model.vae.channels


def test_a_model_that_predicts_v(tmp_path, vaes, images):
    make_tiny_model(tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    found, model, _ = swapped(tmp_path / "v", vaes / "other", tmp_path / "out", images, limit=8)
    assert model.prediction == "v_prediction"
    assert found["fits"]["kernel"]["loss"] < found["fits"]["own"]["loss"]  # a random UNet's last layer, fitted to v


def test_what_cannot_be_read_is_put_aside(tmp_path, tiny_model, vaes):
    write_images(tmp_path / "images", 8)
    for name in ("0100.png", "0101.jpg"):
        (tmp_path / "images" / name).write_bytes(b"nothing")
    (tmp_path / "images" / "0102.png").write_bytes(b"")
    for caption in (tmp_path / "images").glob("000*.txt"):
        caption.unlink()
    found, _, said = swapped(tiny_model, vaes / "other", tmp_path / "out", tmp_path / "images")
    assert sum(found["put_aside"].values()) == 3 and found["fitted"] + found["measured"] == 8
    assert "3 put aside: " in said and "1 x the file is empty" in said
    (tmp_path / "images" / "0000.png").unlink()
    with pytest.raises(UserError, match="--images has 7 that can be used, and a fit needs 8 or more.*put aside: 2 x"):
        swapped(tiny_model, vaes / "other", tmp_path / "few", tmp_path / "images")


def test_a_base_that_overflows(tmp_path, tiny_model, vaes, images):
    shutil.copytree(tiny_model, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"conv_out.weight": torch.full_like(state["conv_out.weight"], 3e38)}, path)
    with pytest.raises(UserError, match="predicts what is not finite from its own latents"):
        swapped(tmp_path / "base", vaes / "other", tmp_path / "out", images, limit=8)
    assert not list(tmp_path.glob("*out*"))


def test_bad_input_is_one_sentence(tmp_path, tiny_model, vaes, images, monkeypatch, capsys):
    out, other = tmp_path / "out", vaes / "other"
    (tmp_path / "empty").mkdir()

    def said(*words):
        code, _, err = fastsd("swap-vae", *words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and err.count("\n") == 1 and err.startswith("fastsd: "), err
        assert not list(tmp_path.glob("*out*"))
        return err

    assert "which exists; name a new folder" in said(tiny_model, other, tmp_path / "empty")
    assert "no such folder or file" in said(tmp_path / "none", other, out)
    assert "no such folder or file" in said(tiny_model, tmp_path / "none", out)
    assert "is the base's own; name another one" in said(tiny_model, tiny_model, out)
    assert "only decodes otherwise; leave out --images" in said(tiny_model, vaes / "decoder", out, "--images", images)
    assert "latents 1 times smaller" in said(tiny_model, vaes / "finer", out, "--images", images)
    assert "--images: " in said(tiny_model, other, out, "--images", tmp_path / "none")
    assert "holds no image" in said(tiny_model, other, out, "--images", tmp_path / "empty")
    assert "--fit is 'best'; choose plain" in said(tiny_model, other, out, "--fit", "best")
    assert "add --images DIR" in said(tiny_model, other, out, "--fit", "kernel")
    assert "no multiple of 4, which this base needs; use 28" in said(
        tiny_model, other, out, "--images", images, "--resolution", "30"
    )
    assert "have 24 positions to fit to and need 37" in said(
        tiny_model, other, out, "--images", images, "--resolution", "4", "--limit", "8"
    )
    assert "--precision is 'tf32'; choose fp32 or bf16" in said(tiny_model, other, out, "--precision", "tf32")
    assert "--vae-scaling-factor is 0; give" in said(tiny_model, other, out, "--vae-scaling-factor", "0")
    assert "choose" not in said(tiny_model, other, out, "--device", "abacus", "--images", images)
