"""The precision of fp32 products by GPU, with stand-ins for devices."""

from types import SimpleNamespace

import pytest
import torch

from fastsd.train.precision import precision_switches, set_precision

BACKENDS = torch.backends
SWITCHES = [(owner, "fp32_precision") for owner in (
    BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv,
    BACKENDS.mkldnn.rnn)]  # fmt: skip
SWITCHES += [
    (BACKENDS.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (BACKENDS.cudnn, "deterministic"),
    (BACKENDS.cudnn, "benchmark"),
]


@pytest.fixture(autouse=True)
def restored():
    with precision_switches("fp32"):
        yield


def attention(precision, device, capability, monkeypatch) -> str:
    """Return the precision of attention that is chosen for a GPU."""
    chosen = []
    weight = SimpleNamespace(device=torch.device(device))
    unet = SimpleNamespace(conv_in=SimpleNamespace(weight=weight), set_attention_precision=chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    text = set_precision(precision, unet)
    assert text.endswith(f", attention: {chosen[0]})") and text.startswith(f"{precision} (")
    return chosen[0]


@pytest.mark.parametrize(
    "precision, device, capability, expected",
    [
        ("fp32", "cuda", (8, 0), "fp16x3"),
        ("fp32", "cuda", (9, 0), "fp16x3"),
        ("fp32", "cuda", (8, 6), "fp16x3"),
        ("fp32", "cuda", (8, 9), "fp16x3"),
        ("fp32", "cuda", (12, 0), "fp16x3"),
        ("fp32", "cpu", (9, 0), "ieee"),
        ("tf32", "cuda", (9, 0), "tf32"),
        ("bf16", "cuda", (9, 0), "fp16x3"),
    ],
)
def test_attention_uses_tensor_cores_where_they_are_exact_and_faster(precision, device, capability, expected, monkeypatch):
    assert attention(precision, device, capability, monkeypatch) == expected


@pytest.mark.parametrize("precision, mode", [("fp32", "ieee"), ("tf32", "tf32"), ("bf16", "ieee")])
@pytest.mark.parametrize("deterministic", [True, False])
def test_all_switches_follow_the_precision(precision, mode, deterministic):
    text = set_precision(precision, deterministic=deterministic)
    assert text == f"{precision} (fp32 matmuls and convolutions: {mode}{'' if deterministic else ', cuDNN benchmark mode'})"
    assert [getattr(owner, name) for owner, name in SWITCHES] == [mode] * 6 + [False, deterministic, not deterministic]
    # PyTorch refuses to read an old name that disagrees with the new ones.
    assert BACKENDS.cudnn.allow_tf32 == BACKENDS.cuda.matmul.allow_tf32 == (mode == "tf32")
    assert torch.get_float32_matmul_precision() == {"ieee": "highest", "tf32": "high"}[mode]


def test_settings_of_new_names_only_are_restored():
    conv = BACKENDS.cudnn.conv
    conv.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):
        print(BACKENDS.cudnn.allow_tf32)  # the caller's own mixture
    with precision_switches("bf16"):
        assert conv.fp32_precision == "ieee" and not BACKENDS.cudnn.allow_tf32
    assert conv.fp32_precision == "tf32"
