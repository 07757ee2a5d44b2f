"""The emulation of tensor cores, against sums worked out by hand."""

import pytest
import torch
from split_products import multiply_adds, split_sums, tensor_core_sums, truncate


def test_sums_are_truncated_after_eight_terms_and_multiply_adds_rounded_after_one():
    ones, tiny = torch.ones(16), torch.full((16,), 2.0**-24)
    tiny[0] = 1.0
    # 1 + 7 * 2^-24 is 1 + 3 * 2^-23 when truncated; then 8 * 2^-24 are added.
    assert tensor_core_sums(tiny[None], ones[None]) == 1 + 7 * 2.0**-23
    assert tensor_core_sums(tiny[None], ones[None], truncates=False) == 1 + 8 * 2.0**-23
    assert multiply_adds(tiny[None], ones[None]) == 1  # each half of a last place goes to the even number
    assert truncate(torch.tensor([-1 - 2.0**-24 - 2.0**-30], dtype=torch.float64)) == -1


@pytest.mark.parametrize("block", [8, 32, 64])
def test_split_operands_keep_all_but_the_product_of_the_low_halves(block):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 64, generator=generator) for _ in range(2))
    a[:, 1:] = 0  # one product, so no sum is truncated more than once for each of the three terms
    truth = (a.double() * b.double()).sum(1)
    assert ((split_sums(a, b, block).double() - truth).abs() <= 2.0**-21 * truth.abs()).all()
