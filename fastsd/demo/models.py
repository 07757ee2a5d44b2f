"""Train the two models that `fastsd demo` ships with, from scratch: `python -m fastsd.demo.models OUT`.

`OUT/base` is a diffusers folder with a tiny Stable Diffusion 1.5 that can draw the shapes of `world`. `OUT/vae` is a second
VAE. It has the same architecture, but another latent space and another scaling factor. `OUT/vae16` is a third one with 16
latent channels, a scale and a shift, as SD3's has. All weights are fp16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fastsd.demo import world
from fastsd.storage import new_folder

IMAGE_SIZE, LATENT_SIZE = 64, 8
CONTEXT_LENGTH, CONTEXT_WIDTH = 77, 64
SCHEDULE = {  # of SD1.5
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip


@dataclass(frozen=True)
class VaeRecipe:
    """Settings that differ between the two VAEs. `kl_weight` decides how strongly latents are pulled to unit variance."""

    seed: int
    kl_weight: float
    steps: int
    rate: float


BASE_VAE = VaeRecipe(seed=1, kl_weight=3e-3, steps=2500, rate=2e-3)
OTHER_VAE = VaeRecipe(seed=2, kl_weight=1e-5, steps=300, rate=1e-3)
WIDE_VAE = VaeRecipe(seed=3, kl_weight=1e-5, steps=400, rate=1e-3)
WIDE_CHANNELS = 16
# The other VAE's latent space starts as the base's space, turned in two planes of its four channels, stretched and shifted.
TURN, STRETCH, OFFSET = math.radians(60), 1.7, (0.3, -0.3, 0.2, -0.2)


def _byte_letters() -> list[str]:
    """Return the 256 letters that byte-level BPE uses for bytes. Unprintable bytes become letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _split_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Return a word's BPE tokens. `ranks` holds the merges and their order."""
    tokens = [*word[:-1], word[-1] + "</w>"]
    while candidates := [pair for pair in pairwise(tokens) if pair in ranks]:
        pair = min(candidates, key=ranks.__getitem__)
        index = list(pairwise(tokens)).index(pair)
        tokens[index : index + 2] = ["".join(pair)]
    return tokens


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer that has one token for every word of the captions, and splits anything else into bytes.

    Merges are added word by word, until each word is a single token. Later merges rank lower, so they never change the tokens
    of an earlier word.
    """
    wordings = re.sub("{.*?}", "", " ".join(world.TEMPLATES))
    words = sorted({*world.COLOURS, *world.SHAPES, "a", "an", *re.findall("[a-z]+", wordings)})
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        word_tokens = _split_word(word, ranks)
        while len(word_tokens) > 1:
            ranks.setdefault((word_tokens[0], word_tokens[1]), len(ranks))
            word_tokens[:2] = [word_tokens[0] + word_tokens[1]]

    letters = _byte_letters()
    merges = list(ranks)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *dict.fromkeys(a + b for a, b in merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([*tokens, start, end])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    specials = {name: config[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2) + "\n", encoding="utf-8")


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Create CLIP's text model as in SD1.5, but with two layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=4 * CONTEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=CONTEXT_WIDTH,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """Create SD1.5's UNet with three levels instead of four. As in SD1.5, `attention_head_dim` is the number of heads."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_vae() -> AutoencoderKL:
    """Create a narrow version of SD1.5's VAE, with eightfold downsampling to four latent channels."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
    )


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Convert pictures to a tensor (n, 3, height, width) in [-1, 1], as the models read them."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert a tensor (n, 3, height, width) in [-1, 1] to pictures."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).contiguous().numpy()]


def _picture_for_vae(rng: np.random.Generator) -> Image.Image:
    """Draw a picture of the world. A quarter of them get colours without a name, so that latents cover these as well."""
    combos = world.combinations()
    picture = world.draw(*combos[rng.integers(len(combos))], rng)
    if rng.random() < 0.75:
        return picture
    order = rng.permutation(3)
    pixels = np.asarray(picture)[:, :, order].astype(np.float64) * rng.uniform(0.6, 1.05, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def relative(vae: AutoencoderKL) -> AutoencoderKL:
    """Return a copy that decodes to the same pictures, but whose latent channels are mixed, stretched and shifted.

    The copy relates to the base's VAE as SDXL's VAE does to SD1.5's. A part of a picture keeps its latent position, the meaning
    of the channels changes, and a nearly linear map leads from one latent space to the other. Further training makes the map
    less linear. A UNet could also learn a VAE that was trained from other random weights, but not within a demo.
    """
    other = copy.deepcopy(vae).requires_grad_(requires_grad=True)
    cos, sin = math.cos(TURN), math.sin(TURN)
    mixing = STRETCH * torch.block_diag(*[torch.tensor([[cos, -sin], [sin, cos]])] * 2)
    quant_conv, post_quant_conv = other.quant_conv, other.post_quant_conv
    quant_conv.weight[:4] = torch.einsum("ij,jkhw->ikhw", mixing, quant_conv.weight[:4])
    quant_conv.bias[:4] = mixing @ quant_conv.bias[:4] + torch.tensor(OFFSET)
    quant_conv.bias[4:] += 2 * math.log(STRETCH)
    post_quant_conv.weight.copy_(torch.einsum("ijhw,jk->ikhw", post_quant_conv.weight, torch.linalg.inv(mixing)))
    post_quant_conv.bias -= post_quant_conv.weight[:, :, 0, 0] @ torch.tensor(OFFSET)
    return other


@torch.no_grad()
def widened(vae: AutoencoderKL, channels: int = WIDE_CHANNELS, seed: int = WIDE_VAE.seed) -> AutoencoderKL:
    """Return a VAE with more latent channels and no 1x1 convolutions, as SD3's and Flux.1's, that training then completes.

    It starts from the given VAE, whose 1x1 convolutions are folded into their neighbours. New channels are random projections
    of the encoder's features, which the decoder does not use yet. All channels are mixed by a random rotation, so none of them
    is a channel of the given VAE.
    """
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    wide = AutoencoderKL(
        **config | {"latent_channels": channels, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.0}
    )
    state, old = vae.state_dict(), vae.config.latent_channels
    for name, tensor in wide.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            tensor.copy_(state[name])
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    quant, post_quant = state["quant_conv.weight"][:, :, 0, 0], state["post_quant_conv.weight"][:, :, 0, 0]

    weight = torch.einsum("ij,jkhw->ikhw", quant, state["encoder.conv_out.weight"])
    bias = quant @ state["encoder.conv_out.bias"] + state["quant_conv.bias"]
    new = torch.randn(channels - old, *weight.shape[1:], generator=generator) * weight[:old].std()
    conv_out, conv_in = wide.encoder.conv_out, wide.decoder.conv_in
    conv_out.weight[:channels] = torch.einsum("ij,jkhw->ikhw", mixing, torch.cat([weight[:old], new]))
    conv_out.bias[:channels] = mixing[:, :old] @ bias[:old]
    conv_out.weight[channels:], conv_out.bias[channels:] = 0, bias[old:].mean()

    decoder_weight = torch.einsum("okhw,kj->ojhw", state["decoder.conv_in.weight"], post_quant)
    conv_in.weight.copy_(torch.einsum("ojhw,ij->oihw", decoder_weight, mixing[:, :old]))
    conv_in.bias += torch.einsum("okhw,k->o", state["decoder.conv_in.weight"], state["post_quant_conv.bias"])
    return wide


def train_vae(vae: AutoencoderKL, recipe: VaeRecipe, batch: int = 8) -> AutoencoderKL:
    """Train a VAE on drawn pictures, and set the scaling factor that gives its latents unit variance."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    vae = vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=recipe.steps, pct_start=0.05)
    start_time = time.monotonic()
    for step in range(recipe.steps):
        pixels = to_tensor([_picture_for_vae(rng) for _ in range(batch)]).to(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        error = vae.decode(posterior.sample()).sample - pixels
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + error.square().mean() + recipe.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            seconds = time.monotonic() - start_time
            print(f"vae {recipe.seed}: step {step + 1}, error {error.detach().abs().mean():.4f}, {seconds:.0f} s")
    vae.eval().requires_grad_(requires_grad=False)
    # Round to fp16 first, so that the scaling factor and all later training suit the stored weights.
    vae.half().float()
    latents = encode(vae, [_picture_for_vae(rng) for _ in range(512)]) / vae.config.scaling_factor
    if vae.config.shift_factor is not None:
        vae.register_to_config(shift_factor=round(latents.mean().item(), 5))
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: list[Image.Image]) -> torch.Tensor:
    """Encode pictures into scaled latents."""
    means = [vae.encode(to_tensor(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(means) * vae.config.scaling_factor


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: torch.Tensor) -> list[Image.Image]:
    """Decode scaled latents into pictures."""
    return to_images(vae.decode(latents / vae.config.scaling_factor).sample)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Convert captions to token ids (n, 77), padded as SD1.5 pads them."""
    return tokenizer(texts, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt").input_ids


def train_text_encoder(tokenizer: CLIPTokenizer, steps: int = 400, batch: int = 64) -> CLIPTextModel:
    """Train a text encoder to distinguish the colours and shapes that captions name.

    Two linear heads predict the colour and the shape at the end token and at the padding after it. An empty caption has a class
    of its own. The heads are dropped after the training.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = new_text_encoder(tokenizer).train()
    colours, shapes, combos = list(world.COLOURS), list(world.SHAPES), world.combinations()
    heads = torch.nn.Linear(CONTEXT_WIDTH, len(colours) + 1), torch.nn.Linear(CONTEXT_WIDTH, len(shapes) + 1)
    parameters = [p for module in (model, *heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    for _ in range(steps):
        chosen = [combos[i] if rng.random() > 0.1 else None for i in rng.integers(len(combos), size=batch)]
        ids = token_ids(tokenizer, [world.caption(pair[0], pair[1], rng) if pair else "" for pair in chosen])
        text_embeds, end_mask = model(ids).last_hidden_state, ids == tokenizer.eos_token_id
        labels = (
            [colours.index(pair[0]) if pair else len(colours) for pair in chosen],
            [shapes.index(pair[1]) if pair else len(shapes) for pair in chosen],
        )
        loss = torch.zeros(())
        for head, class_ids in zip(heads, labels, strict=True):
            targets = torch.tensor(class_ids)[:, None].expand_as(ids)
            loss = loss + functional.cross_entropy(head(text_embeds[end_mask]), targets[end_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"text encoder: loss {loss.item():.4f}")
    return model.eval().requires_grad_(requires_grad=False)


def train_base(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    steps: int,
    batch: int = 48,
    rate: float = 1e-3,
    pictures: int = 4800,
) -> UNet2DConditionModel:
    """Train a UNet from random weights on latents and text embeddings, and return the EMA of its weights."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    combos = world.combinations() * (pictures // len(world.combinations()))
    latents = encode(vae, [world.draw(c, s, rng) for c, s in combos]).clone()
    # Each text occurs many times, but its embeddings are computed only once.
    texts = ["", *(world.caption(c, s, rng) for c, s in combos)]
    row_by_text = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    with torch.no_grad():
        text_embeds = text_encoder(token_ids(tokenizer, list(row_by_text))).last_hidden_state
    text_rows = torch.tensor([row_by_text[text] for text in texts[1:]])
    unet = new_unet().train()
    ema = copy.deepcopy(unet).requires_grad_(requires_grad=False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    noise_scheduler = DDPMScheduler(**{name: SCHEDULE[name] for name in SCHEDULE if name != "set_alpha_to_one"})
    start_time = time.monotonic()
    for step in range(steps):
        indices = torch.randint(len(latents), (batch,))
        noise, t = torch.randn(batch, *latents.shape[1:]), torch.randint(1000, (batch,))
        # A tenth of the captions is dropped, because classifier-free guidance also needs unconditional predictions.
        rows = text_rows[indices] * (torch.rand(batch) > 0.1)
        predicted = unet(noise_scheduler.add_noise(latents[indices], noise, t), t, text_embeds[rows]).sample
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        # The decay starts low, so that the EMA forgets the random initial weights.
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
        if step % 250 == 249:
            print(f"base: step {step + 1}, loss {loss.item():.4f}, {time.monotonic() - start_time:.0f} s")
    return ema.eval()


def save_base(
    folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> None:
    """Write a diffusers folder with fp16 weights. An existing folder is replaced when the new one is complete."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with new_folder(folder) as fresh:
        copy.deepcopy(pipeline).to(torch.float16).save_pretrained(fresh)
        # Replace the tokenizer files: the form in which transformers stores them depends on its version.
        shutil.rmtree(fresh / "tokenizer")
        write_tokenizer(fresh / "tokenizer")


def save_vae(folder: Path, vae: AutoencoderKL) -> None:
    """Write a VAE folder with fp16 weights. An existing folder is replaced when the new one is complete."""
    with new_folder(folder) as fresh:
        copy.deepcopy(vae).half().save_pretrained(fresh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--base-steps", type=int, default=4500)
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.manual_seed(BASE_VAE.seed)
    vae = train_vae(new_vae(), BASE_VAE)
    save_vae(out / "vae", train_vae(relative(vae), OTHER_VAE))
    save_vae(out / "vae16", train_vae(widened(vae), WIDE_VAE))
    write_tokenizer(out / "base" / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "base" / "tokenizer")
    text_encoder = train_text_encoder(tokenizer)
    unet = train_base(vae, tokenizer, text_encoder, arguments.base_steps)
    save_base(out / "base", unet, text_encoder, vae, tokenizer)


if __name__ == "__main__":
    main()
