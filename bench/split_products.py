"""Emulate fp32 products as one TF32 product of split operands, and compare their errors with those of fp32 multiply-adds.

    python bench/split_products.py [K ...]

x = hi + lo, both TF32. One product of [lo, hi, hi] and [hi, lo, hi] over 3K terms leaves out only lo * lo. A tensor core adds
eight products to its accumulator and truncates the sum to fp32 (Fasi et al. 2021, Ootomo and Yokota 2022), where a multiply-add
rounds to nearest. Columns: the error of K multiply-adds in order, relative to the result in fp64, then factors of it:

    one sum     the 3K products in one accumulator, as one call to cuBLAS or cuDNN computes them
    nearest     the same with sums rounded to nearest: the error of the split, which no tensor core reaches
    blocks      a new accumulator every 8 to 128 terms of K, added up in fp32, as Triton's tf32x3 does with each `tl.dot`
"""

from __future__ import annotations

import sys

import torch
from precision_curves import round_to_tf32
from torch import Tensor

# The reduced lengths of SD1.5's linears and convolutions, then positions of weight gradients for 1, 8 and 32 images.
LENGTHS = 320, 640, 1280, 2560, 2880, 5120, 5760, 10240, 11520, 23040, 4096, 32768, 131072
_SUMS = 1024
_STEP = 8  # terms that a tensor core adds at once
BLOCKS = 8, 32, 128


def truncate(x: Tensor) -> Tensor:
    """Round fp64 numbers to fp32 toward zero."""
    nearest = x.float()
    return torch.where(nearest.double().abs() > x.abs(), nearest.nextafter(torch.zeros(())), nearest)


def tensor_core_sums(a: Tensor, b: Tensor, *, truncates: bool = True) -> Tensor:
    """Return the sums of a * b over the last dimension, a multiple of 8, in fp32 accumulators."""
    products = (a.double() * b.double()).unflatten(-1, (-1, _STEP)).sum(-1)
    total = torch.zeros(products.shape[:-1])
    for added in products.unbind(-1):
        exact = total.double() + added
        total = truncate(exact) if truncates else exact.float()
    return total


def multiply_adds(a: Tensor, b: Tensor) -> Tensor:
    total = torch.zeros(len(a))
    for product in (a.double() * b.double()).t().contiguous():
        total = (total.double() + product).float()
    return total


def split_sums(a: Tensor, b: Tensor, block: int, *, truncates: bool = True) -> Tensor:
    """Return the sums of a * b, (N, K), from split operands, with one accumulator per `block` terms of K."""
    a, b = (x.unflatten(-1, (-1, block)) for x in (a, b))
    a_hi, b_hi = round_to_tf32(a), round_to_tf32(b)
    a_lo, b_lo = round_to_tf32(a - a_hi), round_to_tf32(b - b_hi)
    blocks = tensor_core_sums(torch.cat([a_lo, a_hi, a_hi], -1), torch.cat([b_hi, b_lo, b_hi], -1), truncates=truncates)
    total = torch.zeros(len(a))
    for block_sum in blocks.unbind(-1):
        total = total + block_sum
    return total


def main(arguments: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    print("     K  multiply-adds  one sum  nearest  " + "  ".join(f"blocks of {block}" for block in BLOCKS))
    for length in [int(argument) for argument in arguments] or LENGTHS:
        a, b = (torch.randn(_SUMS, length, generator=generator) for _ in range(2))
        truth = (a.double() * b.double()).sum(1)

        def error(sums: Tensor, truth: Tensor = truth) -> float:
            return ((sums.double() - truth).norm() / truth.norm()).item()

        ieee = error(multiply_adds(a, b))
        sums = [
            split_sums(a, b, length),
            split_sums(a, b, length, truncates=False),
            *(split_sums(a, b, n) for n in BLOCKS if length % n == 0),
        ]
        print(f"{length:6d}  {ieee:13.1e}  " + "  ".join(f"{error(x) / ieee:8.2f}" for x in sums), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
