"""fastsd's attention and norms in a diffusers UNet, so that any diffusers pipeline or trainer uses them.

python examples/diffusers_unet.py MODEL  MODEL: a diffusers folder or a hub id of SD1.5
"""

import sys

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from fastsd_kernels import fastest

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ops = fastest(device)


def attention(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)))
    return attn.to_out[1](attn.to_out[0](ops.attention(q, k, v).flatten(2)))


unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet").to(device, memory_format=torch.channels_last)
cfg, side = unet.config, unet.config.sample_size
latents, text = torch.randn(2, cfg.in_channels, side, side), torch.randn(2, 77, cfg.cross_attention_dim)
inputs = latents.to(device), torch.tensor([10, 900], device=device), text.to(device)
expected = unet(*inputs).sample
unet.set_attn_processor(attention)
for module in unet.modules():
    if isinstance(module, nn.GroupNorm):
        module.forward = lambda x, m=module: ops.group_norm(x, m.weight, m.bias, m.num_groups, m.eps)
    elif isinstance(module, nn.LayerNorm):
        module.forward = lambda x, m=module: ops.layer_norm(x, m.weight, m.bias, m.eps)
print(f"{ops.name}: largest difference {(unet(*inputs).sample - expected).abs().max().item():.1e}")
