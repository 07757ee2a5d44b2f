"""`fastsd swap-vae`: files and reports. Bad input gets one sentence and leaves no files behind."""

import json
import shutil
from io import StringIO

import pytest
import torch
from commandline import fastsd
from model_files import edit_json, spoil
from safetensors.torch import load_file, save_file
from sentences import refused, says
from tiny import make_tiny_model, tiny_vae, write_images

from fastsd.commands.swap_vae import FITS, swap_vae
from fastsd.config.schema import ModelTable
from fastsd.model import align
from fastsd.model.formats.load import load_model, load_vae
from fastsd.terminal.console import Console


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """Make a folder of VAEs: other weights, more or fewer channels, another downscale, and the base's with another decoder."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vaes")
    decoder = tiny_vae()
    decoder.decoder.conv_out.bias.data += 1
    kinds = {"other": tiny_vae(seed=1, factor=0.7), "more": tiny_vae(6, seed=1), "fewer": tiny_vae(2, seed=1)}
    kinds["decoder"] = decoder
    kinds["finer"] = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    for name, vae in kinds.items():
        vae.save_pretrained(folder / name)
    return folder


def swapped(base, vae, out, images=None, **options):
    text = StringIO()
    record = swap_vae(str(base), str(vae), out, images, console=Console(file=text, width=200), **options)
    assert json.loads((out / "swap.json").read_text()) == record
    return record, load_model(ModelTable(base=str(out))), text.getvalue()


@pytest.mark.slow
def test_aligns_measures_and_takes_the_best_fit(tmp_path, tiny_model, vaes, images):
    record, model, out = swapped(tiny_model, vaes / "other", tmp_path / "out", images, limit=12)
    losses = {name: record["fits"][name]["loss"] for name in FITS}
    assert record["fit"] == min(losses, key=losses.get) and losses["kernel"] < losses["plain"]
    assert (record["fitted"], record["measured"], record["put_aside"], record["resolution"]) == (9, 3, {}, 32)
    assert all(len(record["fits"][name]["r2"]) == 4 for name in FITS) and record["fits"]["own"]["r2"] == []
    rotation = torch.tensor(record["fits"]["orthogonal"]["A"], dtype=torch.float64)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4, dtype=torch.float64))
    assert len(record["fits"]["affine"]["c"]) == 4 and "A" not in record["fits"]["kernel"]
    assert all(f"\n{name} " in out and f"{losses[name]:.4f} ± " in out for name in FITS)
    assert model.vae.hash == load_vae(ModelTable(base=str(vaes / "other"), vae=str(vaes / "other"))).hash
    assert model.vae.scaling_factor == 0.7
    card = (tmp_path / "out" / "README.md").read_text()
    assert says(card, "swap-card", fit=record["fit"], images=9, loss=f"{losses[record['fit']]:.4f}")
    assert str(tmp_path) not in card
    base = load_model(ModelTable(base=str(tiny_model)))
    edges = set(align.edge_layers(base.unet))
    for (name, before), after in zip(base.unet.named_parameters(), model.unet.parameters(), strict=True):
        assert torch.equal(before, after) != (name in edges), name
    options = {"limit": 12, "fit": "orthogonal", "precision": "bf16"}
    chosen_record, bf16_model, _ = swapped(tiny_model, vaes / "other", tmp_path / "named", images, **options)
    loss = record["fits"]["own"]["loss"]
    assert chosen_record["fit"] == "orthogonal" and chosen_record["fits"]["own"]["loss"] == pytest.approx(loss, rel=0.02)
    assert torch.equal(bf16_model.unet.mid_block.resnets[0].conv1.weight, base.unet.mid_block.resnets[0].conv1.weight)


@pytest.mark.parametrize("kind, channels", [("other", 4), ("more", 6), ("fewer", 2), ("finer", 4)])
def test_without_images_only_swaps(tmp_path, tiny_model, vaes, kind, channels):
    record, model, out = swapped(tiny_model, vaes / kind, tmp_path / "out")
    base = align.edge_layers(load_model(ModelTable(base=str(tiny_model))).unet)
    after, shared = align.edge_layers(model.unet), min(channels, 4)
    assert record["fit"] == "plain" and model.unet.cfg.in_channels == model.vae.channels == channels
    assert torch.equal(after["conv_in.weight"][:, :shared], base["conv_in.weight"][:, :shared])
    assert torch.equal(after["conv_out.bias"][:shared], base["conv_out.bias"][:shared])
    assert not after["conv_in.weight"][:, shared:].any() and not after["conv_out.weight"][shared:].any()
    assert ("widened" in out, "narrowed" in out) == (channels == 6, channels == 2)
    assert says(out, "swap-downscale-change") == (kind == "finer")


@pytest.mark.slow
def test_other_channel_counts_are_aligned_too(tmp_path, tiny_model, vaes, images):
    for kind in ("more", "fewer"):
        record, model, _ = swapped(tiny_model, vaes / kind, tmp_path / kind, images, limit=8)
        assert record["fits"]["kernel"]["loss"] < record["fits"]["plain"]["loss"]
        assert model.unet.conv_in.in_channels == model.vae.channels


def test_v_prediction_model_is_aligned(tmp_path, vaes, images):
    make_tiny_model(tmp_path / "v")
    path = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    record, model, _ = swapped(tmp_path / "v", vaes / "other", tmp_path / "out", images, limit=8)
    assert model.prediction == "v_prediction"
    assert record["fits"]["kernel"]["loss"] < record["fits"]["own"]["loss"]  # a random UNet's last layer, fitted to v


def test_unreadable_images_are_rejected(tmp_path, tiny_model, vaes):
    write_images(tmp_path / "images", 8)
    for name in ("0100.png", "0101.jpg"):
        (tmp_path / "images" / name).write_bytes(b"nothing")
    (tmp_path / "images" / "0102.png").write_bytes(b"")
    for caption in (tmp_path / "images").glob("000*.txt"):
        caption.unlink()
    record, _, out = swapped(tiny_model, vaes / "other", tmp_path / "out", tmp_path / "images")
    assert sum(record["put_aside"].values()) == 3 and record["fitted"] + record["measured"] == 8
    assert says(out, "swap-rejected", count=3) and "1 x " in out
    (tmp_path / "images" / "0000.png").unlink()
    with refused("swap-few-images", count=7, minimum=8) as error:
        swapped(tiny_model, vaes / "other", tmp_path / "few", tmp_path / "images")
    assert "; rejected: 2 x " in str(error.value)


def test_overflowing_base_is_refused(tmp_path, tiny_model, vaes, images):
    shutil.copytree(tiny_model, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"conv_out.weight": torch.full_like(state["conv_out.weight"], 3e38)}, path)
    with refused("swap-base-not-finite"):
        swapped(tmp_path / "base", vaes / "other", tmp_path / "out", images, limit=8)
    assert not list(tmp_path.glob("*out*"))


def test_bad_input_gets_one_sentence(tmp_path, tiny_model, vaes, images, monkeypatch, capsys):
    out, other = tmp_path / "out", vaes / "other"
    (tmp_path / "empty").mkdir()

    def assert_refused(name, *words, **fields):
        code, _, err = fastsd("swap-vae", *words, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2 and err.count("\n") == 1 and err.startswith("fastsd: ") and says(err, name, **fields), err
        assert not list(tmp_path.glob("*out*"))
        return err

    assert_refused("out-exists", tiny_model, other, tmp_path / "empty")
    assert_refused("folder-like-file", tiny_model, other, tmp_path / "out.safetensors")
    assert_refused("source-missing", tmp_path / "none", other, out)
    assert_refused("source-missing", tiny_model, tmp_path / "none", out)
    assert_refused("swap-same-vae", tiny_model, tiny_model, out)
    assert_refused("swap-same-latents", tiny_model, vaes / "decoder", out, "--images", images)
    assert_refused("swap-downscale", tiny_model, vaes / "finer", out, "--images", images, downscale=1)
    for folder in (tmp_path / "none", tmp_path / "empty"):
        assert_refused("swap-images", tiny_model, other, out, "--images", folder, problem=f"--images: {folder}")
    flow = edit_json("scheduler/scheduler_config.json", prediction_type="flow_prediction")
    assert_refused("align-flow", spoil(tiny_model, tmp_path / "flow", flow), other, out, "--images", images)
    assert_refused("swap-unknown-fit", tiny_model, other, out, "--fit", "best", fit="'best'")
    assert_refused("swap-fit-needs-images", tiny_model, other, out, "--fit", "kernel", fit="'kernel'")
    with_images = (tiny_model, other, out, "--images", images)
    assert_refused("swap-resolution", *with_images, "--resolution", "30", step=4, near=32)
    assert_refused("swap-few-positions", *with_images, "--resolution", "4", "--limit", "8", positions=24, minimum=37)
    assert_refused("swap-precision", tiny_model, other, out, "--precision", "tf32", precision="'tf32'")
    assert_refused("swap-scaling-factor", tiny_model, other, out, "--vae-scaling-factor", "0", factor=0)
    both = ("--vae-scaling-factor", "0.3", "--normalise", tmp_path)
    assert_refused("swap-normalise-and-factor", tiny_model, other, out, *both)
    (tmp_path / "file").touch()
    assert_refused("swap-unwritable", tiny_model, other, tmp_path / "file" / "x", reason="Not a directory")
    assert "'abacus'" in assert_refused("device-unavailable", *with_images, "--device", "abacus")
