"""A fixture for the tests of optimizer kernels."""

import pytest
import torch


@pytest.fixture
def ieee_root(monkeypatch):
    """Give `adamw_reference` the IEEE square root that the kernels use. PyTorch's on a CPU may differ in the last bit."""
    ieee_sqrt = lambda tensors: [x.double().sqrt().float() for x in tensors]  # noqa: E731 - rounding twice is exact for roots
    monkeypatch.setattr(torch, "_foreach_sqrt", ieee_sqrt)
