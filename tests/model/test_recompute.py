"""Layers that leave biases and concatenations to the next pass over memory, compared with layers that do not, in fp64."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from unets import CFG

from fastsd.model import matmul
from fastsd.model.matmul import LayerTensors, Needs
from fastsd.model.unet import UNet
from fastsd_kernels import REFERENCE

FUSED = replace(REFERENCE, name="fused", forward_backward=replace(REFERENCE.forward_backward, fused=True))
# A part of the names of the trained parameters; all are trained for "".
TRAINED = [
    "",
    "norm1.",
    "conv1.weight",
    "conv1.bias",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "proj_in",
    "up_blocks",
    "conv_out",
]


def results_of(ops, trained, checkpointing="none"):
    torch.manual_seed(0)
    unet = UNet(CFG, ops, checkpointing).double()
    for name, p in unet.named_parameters():
        p.requires_grad_(trained in name)
    x, context, target = torch.randn(2, 4, 6, 4), torch.randn(2, 7, 16), torch.randn(2, 4, 6, 4)
    out = unet(x.double(), torch.tensor([3, 700]), context.double())
    (out * target).sum().backward()
    return {"out": out.detach()} | {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("trained, checkpointing", [*product(TRAINED, ["none"]), ("", "block")])
def test_fused_layers_have_the_gradients_of_plain_ones(trained, checkpointing):
    expected, fused = (results_of(ops, trained, checkpointing) for ops in (REFERENCE, FUSED))
    assert fused.keys() == expected.keys() and len(fused) > 1
    for name, value in expected.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("sizes", [(5,), (5, 3)], ids=["one image", "two images"])
@pytest.mark.parametrize("rank", [0, 2], ids=["plain", "adapter"])
def test_a_1x1_convolution_of_images_is_that_of_their_concatenation(sizes, rank):
    torch.manual_seed(0)
    images = [torch.randn(2, n, 3, 4).double().to(memory_format=torch.channels_last) for n in sizes]
    weight, bias = torch.randn(7, sum(sizes), 1, 1).double(), torch.randn(7).double()
    adapter = (torch.randn(rank, sum(sizes)).double(), (torch.randn(7, rank).double(),)) if rank else ()
    layer = LayerTensors(weight, bias, *adapter)
    leaves = [x.clone().requires_grad_() for x in (*images, *layer.flat()) if x is not None]
    joined, kernel = torch.cat(leaves[: len(sizes)], dim=1), leaves[len(sizes)].flatten(1)
    kernel = kernel + leaves[-1] @ leaves[-2] if rank else kernel
    y = torch.nn.functional.conv2d(joined, kernel[:, :, None, None], leaves[len(sizes) + 1])
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(matmul.conv1(images, layer), y.detach())

    for need_x, in_product, *needs in product([True, False], repeat=6 if rank else 4):
        need_weight, need_bias, need_down, need_up = (*needs, False, False)[:4]
        choice = Needs(need_weight, need_bias, need_down, (need_up,))
        dimages = [torch.ones_like(image) for image in images] if need_x else None
        results = matmul.conv1_backward(dy, images, layer, choice, dimages, in_product=in_product)
        assert [result is not None for result in results] == [need_weight, need_bias, need_down, need_up]
        for dimage, value in zip(dimages or (), expected, strict=False):
            torch.testing.assert_close(dimage, 1 + value)
        for result, value in zip(results, expected[len(sizes) :], strict=False):
            if result is not None:
                torch.testing.assert_close(result, value)
