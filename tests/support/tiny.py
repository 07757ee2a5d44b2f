"""Tiny models, pictures and jobs, made from fixed seeds."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Sizes of a UNet with one resolution, for tests with many steps.
ONE_LEVEL = {
    "block_out_channels": (16,), "attention": (True,), "layers_per_block": 1, "heads": 2, "cross_attention_dim": 16,
    "norm_groups": 4, "sample_size": 16,
}  # fmt: skip


def tiny_vae(channels: int = 4, factor: float = 0.5, seed: int = 0, groups: int = 4, width: int = 8):
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(width, width),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=groups,
        layers_per_block=1,
        scaling_factor=factor,
    )


def wide_vae(channels: int = 16, **sizes: int):
    """Make a VAE of many channels with a scale, a shift and no 1x1 convolutions, as SD3's and Flux.1's."""
    from diffusers import AutoencoderKL

    config = {key: value for key, value in tiny_vae(channels, **sizes).config.items() if not key.startswith("_")}
    torch.manual_seed(2)
    space = {"scaling_factor": 1.5305, "shift_factor": 0.0609}
    return AutoencoderKL(**config | space | {"use_quant_conv": False, "use_post_quant_conv": False})


def make_wide_model(folder: Path) -> None:
    """Write a small model whose UNet and VAE have 16 latent channels, for images of 32 px."""
    from fastsd.model.formats.load import write_rest
    from fastsd.model.unet import UNetConfig
    from fastsd.model.vae import Vae

    model = make_tiny_model(folder, UNetConfig(**ONE_LEVEL, in_channels=16, out_channels=16))
    model.vae = Vae(wide_vae(), "wide")
    write_rest(folder, model)


def make_tiny_model(folder: Path, cfg=None, seed: int = 0, text_layers: int = 2):
    """Write a small model of SD1.5's structure, with random weights, as a diffusers folder for images of 32 px."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from fastsd.demo.models import write_tokenizer
    from fastsd.model.formats.load import component_state_dict, write_component, write_rest
    from fastsd.model.model import SD15_SCHEDULER, Model
    from fastsd.model.text_encoder import TextEncoder
    from fastsd.model.unet import UNet, UNetConfig
    from fastsd.model.vae import Vae

    cfg = cfg or UNetConfig(
        block_out_channels=(16, 32),
        attention=(True, False),
        layers_per_block=1,
        heads=2,
        cross_attention_dim=16,
        norm_groups=4,
        sample_size=16,
    )
    torch.manual_seed(seed)
    write_tokenizer(folder / "source-tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "source-tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=cfg.cross_attention_dim,
            intermediate_size=32,
            num_hidden_layers=text_layers,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model = Model(
        str(folder),
        UNet(cfg),
        TextEncoder(text, tokenizer, 0, folder / "source-tokenizer"),
        Vae(tiny_vae(cfg.in_channels), str(folder)),
        SD15_SCHEDULER,
    )
    for component in ("unet", "text_encoder"):
        write_component(folder, model, component, component_state_dict(model, component))
    write_rest(folder, model)
    return model


def write_images(folder: Path, count: int, size: int = 40, seed: int = 0) -> None:
    """Write smooth random pictures with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "circle", "square", "star"]
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(", ".join(rng.permutation(words)[:3]))


def job(tmp_path: Path, model: Path, images: Path, stages: str, *, resolution: int = 16, **top: str) -> Path:
    """Write a config for the tiny model into `tmp_path` and return its path."""
    lines = [f'run = "{tmp_path / "run"}"', *(f"{key} = {value}" for key, value in top.items())]
    text = (
        "\n".join(lines)
        + f"""
[model]
base = "{model}"
[data]
folders = ["{images}"]
resolution = {resolution}
[cache]
dir = "{images.parent / "cache"}"
[sample]
prompts = ["red circle", "blue star"]
steps = 2
images = 1
[log]
every = 1
tensorboard = false
{stages}
"""
    )
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path
