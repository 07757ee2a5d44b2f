"""The UNet of Stable Diffusion 1.5, at any width and depth, channels last, on a table of `Ops`.

Modules have diffusers' names, so a weight's path here is its path in every SD tool. `fastsd.model.weights` converts the two
exceptions: q/k/v are fused into one matmul (`to_qkv`, `to_kv`), and the 1x1 projections around attention are linears.

Shapes: B images, C channels, H x W latent positions, N = H*W tokens, L text tokens, widths D (text) and E (time embedding).
Read next: `kernels/fastsd_kernels/__init__.py` for the operations, `fastsd/model/weights.py` for the names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVarTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastsd.errors import UserError
from fastsd.model import recompute
from fastsd.model.matmul import LayerTensors
from fastsd.model.recompute import Image, NormTensors
from fastsd_kernels import REFERENCE, Ops

Arguments = TypeVarTuple("Arguments")
RESNET_EPS, ATTENTION_EPS, LAYER_NORM_EPS = 1e-5, 1e-6, 1e-5


@dataclass(frozen=True)
class UNetConfig:
    """The dimensions of a UNet of the SD1.5 family. The defaults are SD1.5's."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)  # per level: True if transformers follow the resnets
    heads: int = 8  # diffusers calls this attention_head_dim for historical reasons
    cross_attention_dim: int = 768
    norm_groups: int = 32
    sample_size: int = 64  # the latent positions per side for which the model is designed

    @classmethod
    def sd15(cls) -> UNetConfig:
        """Return the config of Stable Diffusion 1.5: 859,520,964 parameters in 686 tensors."""
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
        """Build a config from the dict of a diffusers config.json. Raise UserError for a UNet outside the SD1.5 family."""
        widths = tuple(config.get("block_out_channels", cls.block_out_channels))
        down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
        has_attention = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        cfg = cls(
            in_channels=config.get("in_channels", 4),
            out_channels=config.get("out_channels", 4),
            block_out_channels=widths,
            layers_per_block=config.get("layers_per_block", 2),
            attention=tuple(has_attention.get(kind, False) for kind in down),
            heads=config.get("attention_head_dim", 8),
            cross_attention_dim=config.get("cross_attention_dim", 1280),
            norm_groups=config.get("norm_num_groups", 32),
            sample_size=config.get("sample_size") or 64,
        )

        if not isinstance(cfg.heads, int):
            raise UserError("sd2-unet", f"{place}: attention_head_dim is {cfg.heads!r}, as in SD2; give an SD1.5 base model")

        rebuilt = cfg.to_diffusers()
        for key, value in config.items():
            if key.startswith("_") and key != "_class_name":
                continue
            # A key that only other versions of diffusers know has no effect if its value is null or false.
            expected = rebuilt.get(key, value if key in _NEUTRAL or not value else None)
            if _as_list(value) != _as_list(expected):
                raise UserError(
                    "other-unet", f"{place}: {key} is {value!r}, expected {expected!r} for SD1.5; give an SD1.5 base model"
                )
        return cfg

    def to_diffusers(self) -> dict[str, Any]:
        """Return the dict that diffusers writes as config.json for this UNet."""
        down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in self.attention]
        up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(self.attention)]
        same_names = ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "sample_size")
        sizes = {"attention_head_dim": self.heads, "norm_num_groups": self.norm_groups}
        sizes |= {name: getattr(self, name) for name in same_names}
        blocks = {"block_out_channels": list(self.block_out_channels), "down_block_types": down, "up_block_types": up}
        return _FIXED | sizes | blocks


# Settings that all UNets of this family have in common.
_FIXED = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "center_input_sample": False,
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1, "norm_eps": RESNET_EPS,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "use_linear_projection": False, "time_embedding_type": "positional",
    "conv_in_kernel": 3, "conv_out_kernel": 3, "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default",
    "attention_type": "default", "resnet_out_scale_factor": 1.0,
}  # fmt: skip
# Keys that diffusers writes but that have no effect on a UNet of this family.
_NEUTRAL = {"upcast_attention", "addition_embed_type_num_heads", "projection_class_embeddings_input_dim"}


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def operands(layer: nn.Module) -> LayerTensors:
    """Return the tensors of a linear or convolution, and of its adapter if it has one."""
    if isinstance(layer, nn.Linear | nn.Conv2d):
        return LayerTensors(layer.weight, layer.bias)
    return cast(Any, layer).operands()  # `fastsd.model.lora`


def operands_with_summed_bias(layer: nn.Module) -> tuple[LayerTensors, Tensor | None]:
    """Return the tensors of a linear with its bias detached, and the bias, of which the next LayerNorm sums the gradient."""
    tensors = operands(layer)
    return tensors._replace(bias=None if tensors.bias is None else tensors.bias.detach()), tensors.bias


class Norm(nn.Module):
    """The weight and bias of a GroupNorm or LayerNorm. The next layer computes the norm (`fastsd/model/recompute.py`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def operands(self) -> NormTensors:
        return NormTensors(self.weight, self.bias)


class Linear(nn.Linear):
    """A linear whose gradients may go to sinks (`fastsd/model/gradient_sink.py`)."""

    def forward(self, x: Tensor) -> Tensor:
        return recompute.linear(x, operands(self))


class Attention(nn.Module):
    """Self-attention with fused q/k/v if `text_dim` is None, otherwise cross-attention with fused k/v of the text."""

    def __init__(self, width: int, text_dim: int | None, heads: int, ops: Ops) -> None:
        super().__init__()
        self.heads, self.ops = heads, ops
        self.precision = "ieee"  # see `UNet.set_attention_precision`
        if text_dim is None:
            self.to_qkv = Linear(width, 3 * width, bias=False)
        else:
            self.to_q = Linear(width, width, bias=False)
            self.to_kv = Linear(text_dim, 2 * width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, q_BNC: Tensor, kv_BLC: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Attend with packed q, k, v, or with q and packed k, v. Return (B, N, C), and its bias for `layer_norm_linear`."""
        layer, bias = operands_with_summed_bias(self.to_out[0])
        attention = self.ops.forward_backward, self.precision, self.heads
        return recompute.attention_linear(*attention, q_BNC, kv_BLC, layer), bias


class GegluProjection(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner)


class FeedForward(nn.Module):
    """Linear, GEGLU, linear. The placeholder for diffusers' dropout, which is 0, gives the second linear the index 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GegluProjection(width, 4 * width), nn.Identity(), Linear(4 * width, width)])

    def operands(self) -> tuple[LayerTensors, LayerTensors]:
        return operands(cast(GegluProjection, self.net[0]).proj), operands(self.net[2])


class TransformerBlock(nn.Module):
    def __init__(self, width: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.keep_hidden = True  # False: recompute the feed-forward's first matmul (checkpointing = "ff")
        self.norm1, self.attn1 = Norm(width), Attention(width, None, cfg.heads, ops)
        self.norm2, self.attn2 = Norm(width), Attention(width, cfg.cross_attention_dim, cfg.heads, ops)
        self.norm3, self.ff = Norm(width), FeedForward(width)

    def forward(self, x_BNC: Tensor, context_BLD: Tensor, x_bias: Tensor | None = None) -> Tensor:
        """Apply the block. `x_bias` is as in `recompute.layer_norm_linear`."""
        ops, eps = self.ops.forward_backward, LAYER_NORM_EPS
        norm1, norm2, norm3 = (norm.operands() for norm in (self.norm1, self.norm2, self.norm3))
        qkv, x_BNC = recompute.layer_norm_linear(ops, eps, x_BNC, None, norm1, operands(self.attn1.to_qkv), x_bias)
        attended, bias = self.attn1(qkv)
        q, s_BNC = recompute.layer_norm_linear(ops, eps, attended, x_BNC, norm2, operands(self.attn2.to_q), bias)
        attended, bias = self.attn2(q, self.attn2.to_kv(context_BLD))
        layers = self.ff.operands()
        return recompute.feed_forward(ops, eps, attended, s_BNC, norm3, layers, keep_hidden=self.keep_hidden, x_bias=bias)


class Transformer(nn.Module):
    """Attention over positions: norm, project, one block, project back, add. In channels last, the tokens are a view."""

    def __init__(self, width: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.groups = ops, cfg.norm_groups
        self.norm = Norm(width)
        self.proj_in = Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, cfg, ops)])
        self.proj_out = Linear(width, width)

    def forward(self, image: Image, context_BLD: Tensor) -> Image:
        ops = self.ops.forward_backward
        proj_in, bias = operands_with_summed_bias(self.proj_in)
        layer = self.norm.operands(), proj_in
        x_BNC, x_BCHW = recompute.group_norm_linear(ops, self.groups, ATTENTION_EPS, image, *layer)
        x_BNC = self.proj_out(self.transformer_blocks[0](x_BNC, context_BLD, bias))
        return recompute.add(ops, recompute.image(x_BNC, x_BCHW.shape[2:]), None, x_BCHW)


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.groups = ops, cfg.norm_groups
        self.norm1 = Norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = Linear(cfg.time_dim, outputs)
        self.norm2 = Norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, image: Image, skip: Image | None, time_BE: Tensor) -> Image:
        """Apply the block. `skip` holds further channels of the input, from the down blocks."""
        ops, norms = self.ops.forward_backward, (self.norm1.operands(), self.norm2.operands())
        (conv1, bias1), (conv2, bias2) = (recompute.without_bias(ops, operands(conv)) for conv in (self.conv1, self.conv2))
        shortcut = None
        if self.conv_shortcut is not None:
            shortcut, bias = recompute.without_bias(ops, operands(self.conv_shortcut))
            bias2 = bias2 if bias is None or bias2 is None else bias2 + bias  # their gradients are the same sum
        layer = ops, self.groups, RESNET_EPS
        h, residual = recompute.norm_conv(*layer, image, skip, None, norms[0], conv1, shortcut, residual=True)
        shift = self.time_emb_proj(time_BE)
        shift = shift if bias1 is None else shift + bias1
        h, _ = recompute.norm_conv(*layer, Image(h), None, shift, norms[1], conv2, None)
        return recompute.add(ops, h, bias2, residual)


def convolve(ops: Ops, conv: nn.Conv2d, x_BCHW: Tensor) -> Image:
    """Apply a convolution without a norm before it. An adapted one adds its bias itself."""
    layer, bias = recompute.without_bias(ops.forward_backward, operands(conv))
    if bias is None or layer.down is not None:
        return Image(conv(x_BCHW))
    return recompute.add(ops.forward_backward, F.conv2d(x_BCHW, layer.weight, None, conv.stride, conv.padding), bias, None)


class Downsample(nn.Module):
    """A convolution of stride 2, which halves height and width."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, image: Image) -> Image:
        return convolve(self.ops, self.conv, image.x_BCHW)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size, followed by a convolution."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, image: Image, size: torch.Size) -> Image:
        ops = self.ops.forward_backward
        layer, bias = recompute.without_bias(ops, operands(self.conv))
        h = recompute.upsample_conv(size, image.x_BCHW, layer)
        return Image(h) if bias is None else recompute.add(ops, h, bias, None)


class Level(nn.Module):
    """The resnets of one resolution. A transformer follows each of them if the level has attention."""

    def __init__(self, widths: list[tuple[int, int]], cfg: UNetConfig, ops: Ops, *, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(inputs, outputs, cfg, ops) for inputs, outputs in widths])
        if attends:
            self.attentions = nn.ModuleList([Transformer(outputs, cfg, ops) for _, outputs in widths])
        self.attends = attends
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def layer(self, i: int, image: Image, skip: Image | None, time_BE: Tensor, context_BLD: Tensor) -> Image:
        image = self.resnets[i](image, skip, time_BE)
        return self.attentions[i](image, context_BLD) if self.attends else image


class MidBlock(nn.Module):
    def __init__(self, width: int, cfg: UNetConfig, ops: Ops) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(width, width, cfg, ops) for _ in range(2)])
        self.attentions = nn.ModuleList([Transformer(width, cfg, ops)])

    def forward(self, image: Image, time_BE: Tensor, context_BLD: Tensor) -> Image:
        image = self.attentions[0](self.resnets[0](image, None, time_BE), context_BLD)
        return self.resnets[1](image, None, time_BE)


class TimeEmbedding(nn.Module):
    """Sinusoids of t (cosines first), followed by a two-layer perceptron."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.linear_1 = Linear(cfg.block_out_channels[0], cfg.time_dim)
        self.linear_2 = Linear(cfg.time_dim, cfg.time_dim)

    def waves(self, t_B: Tensor) -> Tensor:
        """Return the sinusoids of t, fp32 (B, first width of the UNet)."""
        half = self.linear_1.in_features // 2
        frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=t_B.device))
        angle = t_B.float()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=-1)

    def forward(self, t_B: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(self.waves(t_B).to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """The noise predictor of Stable Diffusion 1.5 (Rombach et al. 2022, appendix; Ho et al. 2020).

    Args:
        cfg: widths and depths.
        ops: the implementations of attention, norms and GEGLU.
        checkpointing: the activations that the backward recomputes instead of saving: "none" (those of norms and gates only),
            "ff" (also those of the feed-forwards' first matmul) or "block" (those of every resnet and transformer).

    Saved for backward at 64 x 64 latents in SD1.5: 252 M numbers per image, 160 M with "ff", 18 M with "block".
    """

    def __init__(self, cfg: UNetConfig, ops: Ops = REFERENCE, checkpointing: str = "none") -> None:
        super().__init__()
        self.cfg, self.ops = cfg, ops
        widths = cfg.block_out_channels
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(cfg)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # widths of the skip connections to the up blocks
        for level, (width, attends) in enumerate(zip(widths, cfg.attention, strict=True)):
            in_widths = [widths[max(level - 1, 0)]] + [width] * (cfg.layers_per_block - 1)
            block = Level([(in_width, width) for in_width in in_widths], cfg, ops, attends=attends)
            skips += [width] * cfg.layers_per_block
            if level < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample(width, ops)])
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = MidBlock(widths[-1], cfg, ops)

        self.up_blocks = nn.ModuleList()
        previous_width = widths[-1]
        for level in reversed(range(len(widths))):
            width = widths[level]
            in_widths = [previous_width] + [width] * cfg.layers_per_block
            channels = [(in_width + skips.pop(), width) for in_width in in_widths]
            block = Level(channels, cfg, ops, attends=cfg.attention[level])
            if level > 0:
                block.upsamplers = nn.ModuleList([Upsample(width, ops)])
            self.up_blocks.append(block)
            previous_width = width

        self.conv_norm_out = Norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], cfg.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.checkpointing = checkpointing

    @property
    def checkpointing(self) -> str:
        """The activations that the backward recomputes: "none", "ff" or "block". It may be set at any time between steps."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, level: str) -> None:
        if level not in ("none", "ff", "block"):
            raise ValueError(f"checkpointing is {level!r}; choose none, ff or block")
        self._checkpointing = level
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                module.keep_hidden = level != "ff"

    def set_attention_precision(self, precision: str) -> None:
        """Set how attention multiplies fp32 on a GPU: "ieee", "fp16x3", "tf32" or "tf32x3"."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.precision = precision

    def forward(self, latents_BCHW: Tensor, t_B: Tensor, context_BLD: Tensor) -> Tensor:
        """Predict the noise in x_t.

        Args:
            latents_BCHW: noisy latents x_t (B, in_channels, H, W), scaled by the VAE's scaling factor.
            t_B: timesteps (B,), 0 to 999.
            context_BLD: text embeddings (B, L, cross_attention_dim).

        Returns:
            (B, out_channels, H, W), channels last, in the dtype of the weights.
        """
        dtype = self.conv_in.weight.dtype
        context_BLD = context_BLD.to(dtype)
        time_BE = F.silu(self.time_embedding(t_B))  # computed once, because every resnet applies the same SiLU

        image = convolve(self.ops, self.conv_in, latents_BCHW.to(dtype, memory_format=torch.channels_last))
        skips = [image]
        for block in cast(Iterable[Level], self.down_blocks):
            for i in range(len(block.resnets)):
                image = self._run(block.layer, i, image, None, time_BE, context_BLD)
                skips.append(image)
            if block.downsamplers is not None:
                image = block.downsamplers[0](image)
                skips.append(image)

        image = self._run(self.mid_block, image, time_BE, context_BLD)

        for block in cast(Iterable[Level], self.up_blocks):
            for i in range(len(block.resnets)):
                image = self._run(block.layer, i, image, skips.pop(), time_BE, context_BLD)
            if block.upsamplers is not None:
                image = block.upsamplers[0](image, size=skips[-1].x_BCHW.shape[2:])

        layer = self.conv_norm_out.operands(), operands(self.conv_out), None
        return recompute.norm_conv(self.ops.forward_backward, self.cfg.norm_groups, RESNET_EPS, image, None, None, *layer)[0]

    def _run(self, function: Callable[[*Arguments], Image], *args: *Arguments) -> Image:
        if self.checkpointing != "block" or not torch.is_grad_enabled():
            return function(*args)
        # Statistics are taken again rather than saved.
        images = (Image(arg.x_BCHW) if isinstance(arg, Image) else arg for arg in args)
        # No random numbers are drawn inside, so no generator state needs saving.
        return cast(Image, checkpoint(function, *images, use_reentrant=False, preserve_rng_state=False))
