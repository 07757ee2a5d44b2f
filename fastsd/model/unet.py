"""Floor 1: the UNet of Stable Diffusion 1.5, at any width and depth, channels last, on a table of `Ops`.

Modules carry diffusers' names, so a weight's path here is its path in every SD tool; only q/k/v are fused into one matmul
(`to_qkv`, `to_kv`) and the 1x1 projections around attention are linears. `fastsd.model.weights` translates at the border.

Shapes: B images, C channels, H x W latent positions, N = H*W tokens, L text tokens, D context width, E time embedding width.
Read next: `kernels/fastsd_kernels/__init__.py` for the operations, `fastsd/model/weights.py` for the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsd.errors import UserError
from fastsd_kernels import REFERENCE, Ops

RESNET_EPS, ATTENTION_EPS, LAYER_NORM_EPS = 1e-5, 1e-6, 1e-5


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a UNet of SD1.5's kind. The defaults are SD1.5's."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)  # per level: transformers after the resnets?
    heads: int = 8  # diffusers calls this attention_head_dim, for history's sake
    cross_attention_dim: int = 768
    norm_groups: int = 32
    sample_size: int = 64  # latent positions a side the model was made for

    @classmethod
    def sd15(cls) -> UNetConfig:
        """Stable Diffusion 1.5: 859,520,964 parameters in 686 tensors."""
        return cls()

    @property
    def time_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def downscale(self) -> int:
        """Latent height and width must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: dict[str, Any], place: str = "unet/config.json") -> UNetConfig:
        """From the dict of a diffusers config.json. Raises UserError for a UNet of another kind than SD1.5's."""
        widths = tuple(config.get("block_out_channels", cls.block_out_channels))
        down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
        known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        found = cls(
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            block_out_channels=widths,
            layers_per_block=config.get("layers_per_block", 2),
            attention=tuple(known.get(kind, False) for kind in down),
            heads=config.get("attention_head_dim", 8),
            cross_attention_dim=config.get("cross_attention_dim", 1280),
            norm_groups=config.get("norm_num_groups", 32),
            sample_size=config.get("sample_size") or 64,
        )
        if not isinstance(found.heads, int):
            raise UserError(f"{place}: attention_head_dim is {found.heads!r}, an SD2 UNet's; give an SD1.5 base model")
        ours = found.to_diffusers()
        for key, value in config.items():
            if key.startswith("_") and key != "_class_name":
                continue
            # Keys another version wrote with a neutral value (null, false) change nothing.
            expected = ours.get(key, value if key in _NEUTRAL or not value else None)
            if _plain(value) != _plain(expected):
                raise UserError(
                    f"{place}: {key} is {value!r}, which is not an SD1.5 UNet's ({expected!r}); give an SD1.5 base model"
                )
        return found

    def to_diffusers(self) -> dict[str, Any]:
        """The dict that diffusers writes as config.json for this UNet."""
        down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attention]
        up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(self.attention)]
        return {
            "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
            "attention_head_dim": self.heads, "block_out_channels": list(self.block_out_channels),
            "center_input_sample": False, "cross_attention_dim": self.cross_attention_dim, "down_block_types": down,
            "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": self.in_channels,
            "layers_per_block": self.layers_per_block, "mid_block_scale_factor": 1, "norm_eps": RESNET_EPS,
            "norm_num_groups": self.norm_groups, "out_channels": self.out_channels, "sample_size": self.sample_size,
            "up_block_types": up, "mid_block_type": "UNetMidBlock2DCrossAttn", "use_linear_projection": False,
            "time_embedding_type": "positional", "conv_in_kernel": 3, "conv_out_kernel": 3,
            "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default", "attention_type": "default",
            "resnet_out_scale_factor": 1.0,
        }  # fmt: skip


# Written by diffusers, without meaning for a UNet of this kind.
_NEUTRAL = {"upcast_attention", "addition_embed_type_num_heads", "projection_class_embeddings_input_dim"}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class GroupNorm(nn.Module):
    def __init__(self, channels: int, groups: int, eps: float, silu: bool, ops: Ops) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.groups, self.eps, self.silu, self.ops = groups, eps, silu, ops

    def forward(self, x_BCHW: Tensor, shift_BC: Tensor | None = None) -> Tensor:
        return self.ops.group_norm(x_BCHW, self.weight, self.bias, self.groups, self.eps, silu=self.silu, shift_BC=shift_BC)


class LayerNorm(nn.Module):
    def __init__(self, features: int, ops: Ops) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, LAYER_NORM_EPS)


class Attention(nn.Module):
    """Self-attention (context None, one fused q/k/v matmul) or cross-attention (fused k/v over the text)."""

    def __init__(self, width: int, context_dim: int | None, heads: int, ops: Ops) -> None:
        super().__init__()
        self.heads, self.ops = heads, ops
        self.precision = "ieee"  # of fp32, on a GPU
        if context_dim is None:
            self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        else:
            self.to_q = nn.Linear(width, width, bias=False)
            self.to_kv = nn.Linear(context_dim, 2 * width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BNC: Tensor, context_BLD: Tensor | None = None) -> Tensor:
        if context_BLD is None:
            q, k, v = self.to_qkv(x_BNC).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            q = self.to_q(x_BNC).unflatten(-1, (self.heads, -1))
            k, v = self.to_kv(context_BLD).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.to_out[0](self.ops.attention(q, k, v, precision=self.precision).flatten(2))


class GegluProjection(nn.Module):
    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.proj, self.ops = nn.Linear(width, 2 * inner), ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        # Place 1 is a dropout of 0 in diffusers: it keeps the second linear's name.
        self.net = nn.ModuleList([GegluProjection(width, 4 * width, ops), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(width, ops), Attention(width, None, cfg.heads, ops)
        self.norm2, self.attn2 = LayerNorm(width, ops), Attention(width, cfg.cross_attention_dim, cfg.heads, ops)
        self.norm3, self.ff = LayerNorm(width, ops), FeedForward(width, ops)

    def forward(self, x_BNC: Tensor, context_BLD: Tensor) -> Tensor:
        x_BNC = x_BNC + self.attn1(self.norm1(x_BNC))
        x_BNC = x_BNC + self.attn2(self.norm2(x_BNC), context_BLD)
        return x_BNC + self.ff(self.norm3(x_BNC))


class Transformer(nn.Module):
    """The positions of an image as tokens: norm, project, one block, project back, add. Channels last makes both views."""

    def __init__(self, width: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.norm = GroupNorm(width, cfg.norm_groups, ATTENTION_EPS, False, ops)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, cfg, ops)])
        self.proj_out = nn.Linear(width, width)

    def forward(self, x_BCHW: Tensor, context_BLD: Tensor) -> Tensor:
        size = x_BCHW.shape[2:]
        x_BNC = self.proj_in(self.norm(x_BCHW).permute(0, 2, 3, 1).flatten(1, 2))
        x_BNC = self.proj_out(self.transformer_blocks[0](x_BNC, context_BLD))
        return x_BCHW + x_BNC.unflatten(1, size).permute(0, 3, 1, 2)


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, cfg.norm_groups, RESNET_EPS, True, ops)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(cfg.time_dim, outputs)
        self.norm2 = GroupNorm(outputs, cfg.norm_groups, RESNET_EPS, True, ops)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x_BCHW: Tensor, time_BE: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x_BCHW))
        h = self.conv2(self.norm2(h, self.time_emb_proj(time_BE)))
        return h + (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW))


class Resample(nn.Module):
    """Halves the positions (stride 2), or grows them to a given size (nearest neighbour), then convolves."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x_BCHW: Tensor, size: torch.Size | None = None) -> Tensor:
        if size is not None:
            x_BCHW = F.interpolate(x_BCHW, size=size, mode="nearest")
        return self.conv(x_BCHW)


class Level(nn.Module):
    """Resnets of one resolution, each followed by a transformer where the level attends."""

    def __init__(self, widths: list[tuple[int, int]], attends: bool, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(inputs, outputs, cfg, ops) for inputs, outputs in widths])
        if attends:
            self.attentions = nn.ModuleList([Transformer(outputs, cfg, ops) for _, outputs in widths])
        self.attends = attends
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layer(self, i: int, x_BCHW: Tensor, time_BE: Tensor, context_BLD: Tensor) -> Tensor:
        x_BCHW = self.resnets[i](x_BCHW, time_BE)
        return self.attentions[i](x_BCHW, context_BLD) if self.attends else x_BCHW


class MidBlock(nn.Module):
    def __init__(self, width: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width, cfg, ops) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(width, cfg, ops)])

    def forward(self, x_BCHW: Tensor, time_BE: Tensor, context_BLD: Tensor) -> Tensor:
        x_BCHW = self.attentions[0](self.resnets[0](x_BCHW, time_BE), context_BLD)
        return self.resnets[1](x_BCHW, time_BE)


class TimeEmbedding(nn.Module):
    """Sinusoids of t (cosines first), then a two-layer perceptron."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(cfg.block_out_channels[0], cfg.time_dim)
        self.linear_2 = nn.Linear(cfg.time_dim, cfg.time_dim)

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.linear_1.in_features // 2
        frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t_B.device))
        angle = t_B.float()[:, None] * frequency
        wave_BE = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(wave_BE)))


class UNet(nn.Module):
    """The noise predictor of Stable Diffusion 1.5 (Rombach et al. 2022, appendix; Ho et al. 2020).

    Args:
        cfg: widths and depths.
        ops: the implementations of attention, norms and GEGLU.
        checkpointing: "none", or "block": recompute each resnet and transformer in the backward instead of storing it.
    """

    def __init__(self, cfg: UNetConfig, ops: Ops = REFERENCE, checkpointing: str = "none") -> None:
        super().__init__()
        if checkpointing not in ("none", "block"):
            raise ValueError(f"checkpointing is {checkpointing!r}; choose none or block")
        self.cfg, self.ops, self.checkpointing = cfg, ops, checkpointing
        widths, first = cfg.block_out_channels, cfg.block_out_channels[0]
        self.conv_in = nn.Conv2d(cfg.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(cfg)

        self.down_blocks = nn.ModuleList()
        skips = [first]  # widths of what the way up will concatenate
        for level, (width, attends) in enumerate(zip(widths, cfg.attention, strict=True)):
            ins = [widths[max(level - 1, 0)]] + [width] * (cfg.layers_per_block - 1)
            block = Level([(w, width) for w in ins], attends, cfg, ops)
            skips += [width] * cfg.layers_per_block
            if level < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Resample(width, stride=2)])
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = MidBlock(widths[-1], cfg, ops)

        self.up_blocks = nn.ModuleList()
        previous = widths[-1]
        for level in reversed(range(len(widths))):
            width = widths[level]
            ins = [previous] + [width] * cfg.layers_per_block
            block = Level([(w + skips.pop(), width) for w in ins], cfg.attention[level], cfg, ops)
            if level > 0:
                block.upsamplers = nn.ModuleList([Resample(width, stride=1)])
            self.up_blocks.append(block)
            previous = width

        self.conv_norm_out = GroupNorm(first, cfg.norm_groups, RESNET_EPS, True, ops)
        self.conv_out = nn.Conv2d(first, cfg.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def set_attention_precision(self, precision: str) -> None:
        """How fp32 attention multiplies on a GPU: "ieee", "tf32" or "tf32x3"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.precision = precision

    def forward(self, latents_BCHW: Tensor, t_B: Tensor, context_BLD: Tensor) -> Tensor:
        """Predict the noise in x_t.

        Args:
            latents_BCHW: noisy latents x_t (B, in_channels, H, W), scaled by the VAE's factor.
            t_B: timesteps (B,), 0 to 999.
            context_BLD: text encoder states (B, L, cross_attention_dim).

        Returns:
            (B, out_channels, H, W), channels last, in the dtype of the weights.
        """
        dtype = self.conv_in.weight.dtype
        x = latents_BCHW.to(dtype, memory_format=torch.channels_last)
        context_BLD = context_BLD.to(dtype)
        time_BE = F.silu(self.time_embedding(t_B))  # every resnet projects the same activated embedding

        x = self.conv_in(x)
        skips = [x]
        for block in cast(Iterable[Level], self.down_blocks):
            for i in range(len(block.resnets)):
                x = self._run(block.layer, i, x, time_BE, context_BLD)
                skips.append(x)
            if block.downsamplers is not None:
                x = block.downsamplers[0](x)
                skips.append(x)

        x = self._run(self.mid_block, x, time_BE, context_BLD)

        for block in cast(Iterable[Level], self.up_blocks):
            for i in range(len(block.resnets)):
                x = self._run(block.layer, i, torch.cat([x, skips.pop()], dim=1), time_BE, context_BLD)
            if block.upsamplers is not None:
                x = block.upsamplers[0](x, size=skips[-1].shape[2:])

        return self.conv_out(self.conv_norm_out(x))

    def _run(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return function(*args)
        # No random numbers are drawn inside, so there is no generator state to keep.
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
