"""Fixtures of the kernels' tests."""

import pytest
import torch


@pytest.fixture
def ieee_root(monkeypatch):
    """PyTorch's root on a CPU may differ from IEEE's, which the kernels use, in the last bit: give `adamw_reference` IEEE's."""
    root = lambda tensors: [x.double().sqrt().float() for x in tensors]  # noqa: E731 - rounding twice is exact for roots
    monkeypatch.setattr(torch, "_foreach_sqrt", root)
