"""Build a model that has shapes but no data, for planning, from a config or from a loaded model.

Only `config.json` files are read. A component without one gets SD1.5's shapes, and a note reports this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastsd.config.schema import Chunks, LoraTable, ModelTable
from fastsd.errors import UserError
from fastsd.model.latent_space import LatentSpace
from fastsd.model.model import SD15_SCHEDULER, Model
from fastsd.model.text_encoder import TextEncoder
from fastsd.model.unet import UNet, UNetConfig
from fastsd.model.vae import Vae
from fastsd.storage import read_json
from fastsd_kernels import REFERENCE, TRITON, Ops

SD15_TEXT = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "max_position_embeddings": 77, "hidden_act": "quick_gelu",
}  # fmt: skip
SD15_VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """The settings that determine a model's memory. `text` and `vae` have the form of the components' config.json."""

    unet: UNetConfig
    text: dict[str, Any]
    vae: dict[str, Any]
    clip_skip: int = 0
    chunks: Chunks = 1
    lora: LoraTable | None = None

    @classmethod
    def of(cls, model: Model) -> Shapes:
        text, vae_config = model.text, dict(model.vae.module.config)
        return cls(model.unet.cfg, text.module.config.to_dict(), vae_config, text.clip_skip, text.chunks, model.lora)

    def side(self, resolution: int) -> int:
        """Return the latent positions per side of images of `resolution` px. Raise UserError if the model cannot use it."""
        step = self.step
        if resolution % step:
            usable = max((resolution + step // 2) // step, 1) * step
            raise UserError(
                "model-resolution", f"data.resolution is {resolution}, but this UNet needs a multiple of {step}; use {usable}"
            )
        return resolution // self._downscale

    @property
    def step(self) -> int:
        """Pixels of which the sides of square images are multiples."""
        return self._downscale * self.unet.downscale

    @property
    def _downscale(self) -> int:
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    def check_heads(self, ops: Ops) -> None:
        """Raise UserError if the kernels do not support the size of the UNet's attention heads."""
        attending = [width for width, attends in zip(self.unet.block_out_channels, self.unet.attention, strict=True) if attends]
        for width in (*attending, self.unet.block_out_channels[-1]):
            size = width // self.unet.heads
            if ops is TRITON and (size % 8 or size > 256):
                raise UserError(
                    "head-size",
                    f"the attention heads of this UNet have {size} channels, but the kernels need a multiple of 8 up to 256; "
                    'set kernels = "reference"',
                )


def read_shapes(table: ModelTable) -> tuple[Shapes, list[str]]:
    """Read the shapes of a config's model from config files on this machine. Return them and a note for each missing file.

    Raises:
        UserError: a file exists and cannot be used, or components do not fit together.
    """
    sources: dict[str, tuple[str, str, list[str]]] = {  # model, revision, folders that may have a config.json
        "UNet": (table.base, table.revision, ["unet"]),
        "text encoder": (table.base, table.revision, ["text_encoder"]),
        "VAE": (table.vae, "", ["vae", "."]) if table.vae else (table.base, table.revision, ["vae"]),
    }
    configs = {name: _read_config(*source) for name, source in sources.items()}
    notes = [f"{name}: SD1.5's ({sources[name][0]} has no config.json here)" for name in configs if configs[name] is None]
    unet_config = configs["UNet"]
    unet = UNetConfig.sd15() if unet_config is None else UNetConfig.from_diffusers(unet_config, f"{table.base}: unet config")
    check_text_to_image(unet, table.base)
    text, vae = configs["text encoder"] or SD15_TEXT, configs["VAE"] or SD15_VAE
    shapes = Shapes(unet, text, vae, table.clip_skip, table.chunks, table.lora)

    channels, width = shapes.vae.get("latent_channels", 4), shapes.text.get("hidden_size", 512)
    if channels != unet.in_channels or width != unet.cross_attention_dim:
        raise UserError(
            "components-do-not-fit",
            f"model: the UNet takes {unet.in_channels} latent channels and text width {unet.cross_attention_dim}, but the VAE "
            f"has {channels} and the text encoder has width {width}; choose matching components",
        )
    return shapes, notes


def check_text_to_image(cfg: UNetConfig, base: str) -> None:
    """Raise UserError if a UNet also takes an image, as for inpainting, or for editing (Brooks et al. 2023, section 3.2)."""
    kind = {2 * cfg.out_channels + 1: "an inpainting base", 2 * cfg.out_channels: "a base for editing images (InstructPix2Pix)"}
    if cfg.in_channels in kind:
        raise UserError(
            "base-takes-images",
            f"model.base is {base}, {kind[cfg.in_channels]}, which is not supported: its UNet takes {cfg.in_channels} "
            f"channels, {cfg.out_channels} of them latents and the others an image; fastsd only converts such models; choose "
            "a text-to-image base",
        )


def _read_config(name: str, revision: str, folders: list[str]) -> dict[str, Any] | None:
    """Read config.json in the first of `folders` that has one. `name` is a model's folder, or a hub id that is in the cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for folder in folders:
        path = Path(name).expanduser() / folder / "config.json"
        if not path.is_file():
            try:
                cached = try_to_load_from_cache(name, f"{folder}/config.json".removeprefix("./"), revision=revision or None)
            except HFValidationError:  # a path, not a hub id
                continue
            if not isinstance(cached, str):
                continue
            path = Path(cached)
        return read_json(path)
    return None


class _ShapedVae(Vae):
    """A VAE without data. It has no hash."""

    def __init__(self, module: Any) -> None:
        self.module = module.eval().requires_grad_(False)
        self.latent_space = LatentSpace(1.0)


def empty_model(shapes: Shapes, ops: Ops) -> Model:
    """Build a model on the meta device, without tokenizer or hash. Call `materialize` on its modules before a step runs."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet(shapes.unet, ops)
        text = CLIPTextModel(CLIPTextConfig.from_dict(shapes.text))
        vae = AutoencoderKL.from_config(shapes.vae)
    encoder = TextEncoder(text, None, shapes.clip_skip, Path(), shapes.chunks)
    model = Model("", unet, encoder, _ShapedVae(vae), SD15_SCHEDULER)
    if shapes.lora is not None:
        from fastsd.model.lora import add_lora

        add_lora(model, shapes.lora, seed=0)
    return model


@cache
def forward_flops(cfg: UNetConfig, side: int) -> int:
    """Count the FLOPs of the UNet's forward for an image of side x side latents and 77 text tokens, without computing it."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet(cfg, REFERENCE)
        latents = torch.empty(1, cfg.in_channels, side, side)
        unet(latents, torch.empty(1, dtype=torch.long), torch.empty(1, 77, cfg.cross_attention_dim))
    return counter.get_total_flops()


def materialize(module: nn.Module, device: torch.device) -> None:
    """Replace all parameters and buffers by uninitialised tensors with the same layout on `device`."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            setattr(child, name, nn.Parameter(empty(parameter), parameter.requires_grad))
        for name, buffer in child.named_buffers(recurse=False):
            setattr(child, name, empty(buffer))
