"""Adapters of every kind, with the published formula of what each adds to a weight."""

import torch
from safetensors.torch import save_file

from fastsd.model.formats.lora_names import kohya_name

# Layers of the small model.
TO_K = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (32, 64)
CONV = "unet.down_blocks.1.resnets.0.conv1"  # (64, 32, 3, 3)
NORM = "unet.down_blocks.1.resnets.0.norm1"
FC1 = "text_encoder.text_model.encoder.layers.1.mlp.fc1"  # (32, 64)
ones, einsum = torch.ones, torch.einsum


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) / 4


def write_adapter(path, module, tensors, layer=kohya_name, metadata=None):
    """Write the adapter of one module, which has the name `layer(module)`. Return the path."""
    named = {f"{layer(module)}.{name}": torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}
    save_file(named, path, metadata)
    return path


def magnitudes(weight, direction, m):
    """DoRA, equation 5, by loops: each output's vector gets the length m."""
    rows = [m[i] * row / row.norm() for i, row in enumerate((weight + direction).flatten(1))]
    return torch.stack(rows).view_as(weight) - weight


def kron(first, second):
    """The Kronecker product, element by element of the first factor."""
    return torch.cat([torch.cat([x * second for x in row], 1) for row in first])


up, down, w1, w2 = numbers(32, 4), numbers(4, 64), numbers(4, 8), numbers(8, 8)
conv_up, conv_down = numbers(64, 4, 1, 1), numbers(4, 32, 3, 3)
LORA, LOCON = {"lora_up.weight": up, "lora_down.weight": down}, {"lora_up.weight": conv_up, "lora_down.weight": conv_down}
LOHA = {
    "hada_w1_a": numbers(32, 4, seed=1), "hada_w1_b": numbers(4, 64, seed=2),
    "hada_w2_a": numbers(32, 4, seed=3), "hada_w2_b": numbers(4, 64, seed=4),
}  # fmt: skip
TUCKER_LOHA = {
    "hada_w1_a": numbers(4, 64, seed=7), "hada_w1_b": numbers(4, 32, seed=8), "hada_t1": numbers(4, 4, 3, 3, seed=5),
    "hada_w2_a": numbers(4, 64, seed=9), "hada_w2_b": numbers(4, 32, seed=10), "hada_t2": numbers(4, 4, 3, 3, seed=6),
}  # fmt: skip
PAIR = {"lokr_w2_a": numbers(8, 2, seed=11), "lokr_w2_b": numbers(2, 8, seed=12)}
TUCKER_PAIR = {
    "lokr_w2_a": numbers(2, 16, seed=13), "lokr_w2_b": numbers(2, 4, seed=14), "lokr_t2": numbers(2, 2, 3, 3),
}  # fmt: skip

# kind -> module, tensors, the difference of the weight as a function of it and of the tensors, and the name in the note
KINDS = {
    "LoRA": (TO_K, LORA | {"alpha": 2.0}, lambda w, up, down, _: up @ down / 2, "LoRA"),
    "LoRA without alpha": (TO_K, LORA, lambda w, up, down: up @ down, "LoRA"),
    "alpha 0": (TO_K, LORA | {"alpha": 0.0}, lambda w, up, down, _: up @ down, "LoRA"),
    "LoRA of the text encoder": (FC1, LORA | {"alpha": 2.0}, lambda w, up, down, _: up @ down / 2, "LoRA"),
    "LoCon": (
        CONV, LOCON | {"alpha": 1.0}, lambda w, up, down, _: einsum("or,rikl->oikl", up[:, :, 0, 0], down) / 4, "LoRA",
    ),
    "LoCon, Tucker": (
        CONV,
        {"lora_up.weight": conv_up, "lora_down.weight": numbers(4, 32, 1, 1), "lora_mid.weight": numbers(4, 4, 3, 3)},
        lambda w, up, down, mid: einsum("om,mnkl,ni->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0]), "LoRA",
    ),
    "LoHa": (TO_K, LOHA | {"alpha": 2.0}, lambda w, a1, b1, a2, b2, _: (a1 @ b1) * (a2 @ b2) / 2, "LoHa"),
    "LoHa, Tucker": (
        CONV, TUCKER_LOHA | {"alpha": 2.0},
        lambda w, a1, b1, t1, a2, b2, t2, _: (
            einsum("mo,mnkl,ni->oikl", a1, t1, b1) * einsum("mo,mnkl,ni->oikl", a2, t2, b2) / 2
        ), "LoHa",
    ),
    "LoKr": (TO_K, {"lokr_w1": w1, "lokr_w2": w2, "alpha": 7.0}, lambda w, w1, w2, _: kron(w1, w2), "LoKr"),
    "LoKr, low rank": (TO_K, {"lokr_w1": w1, **PAIR, "alpha": 1.0}, lambda w, w1, a, b, _: kron(w1, a @ b) / 2, "LoKr"),
    "LoKr, both": (
        TO_K, {"lokr_w1_a": numbers(4, 2), "lokr_w1_b": numbers(2, 8), **PAIR, "alpha": 1.0},
        lambda w, a1, b1, a2, b2, _: kron(a1 @ b1, a2 @ b2) / 2, "LoKr",
    ),
    "LoKr, convolution": (
        CONV, {"lokr_w1": w1, "lokr_w2": numbers(16, 4, 3, 3)},
        lambda w, w1, w2: einsum("ab,cdkl->acbdkl", w1, w2).reshape(64, 32, 3, 3), "LoKr",
    ),
    "LoKr, Tucker": (
        CONV, {"lokr_w1": w1, **TUCKER_PAIR, "alpha": 1.0},
        lambda w, w1, a, b, t, _: einsum("ab,mc,mnkl,nd->acbdkl", w1, a, t, b).reshape(64, 32, 3, 3) / 2, "LoKr",
    ),
    "DoRA": (
        TO_K, LORA | {"alpha": 2.0, "dora_scale": ones(32, 1) * 3},
        lambda w, up, down, _, m: magnitudes(w, up @ down / 2, m.flatten()), "DoRA of LoRA",
    ),
    "DoRA of inputs": (
        TO_K, LORA | {"alpha": 2.0, "dora_scale": numbers(1, 64)},
        lambda w, up, down, _, m: magnitudes(w.T, (up @ down).T / 2, m.flatten()).T, "DoRA of LoRA",
    ),
    "DoRA, convolution": (
        CONV, LOCON | {"dora_scale": numbers(64, 1, 1, 1)},
        lambda w, up, down, m: magnitudes(w, einsum("or,rikl->oikl", up[:, :, 0, 0], down), m.flatten()), "DoRA of LoRA",
    ),
    "DoRA of a LoHa": (
        TO_K, LOHA | {"dora_scale": ones(32, 1)},
        lambda w, a1, b1, a2, b2, m: magnitudes(w, (a1 @ b1) * (a2 @ b2), m.flatten()), "DoRA of LoHa",
    ),
    "full": (TO_K, {"diff": numbers(32, 64)}, lambda w, diff: diff, "full"),
    "a norm": (NORM, {"w_norm": numbers(32)}, lambda w, diff: diff, "full"),
    "(IA)^3": (TO_K, {"weight": numbers(32), "on_input": 0}, lambda w, m, _: w * m[:, None], "(IA)^3"),
    "(IA)^3 of inputs": (TO_K, {"weight": numbers(64), "on_input": 1}, lambda w, m, _: w * m[None], "(IA)^3"),
}  # fmt: skip


def merged_weight(kind, weight, strength):
    """Return a weight with an adapter, computed in fp64 and rounded once."""
    _, tensors, difference, _ = KINDS[kind]
    exact = weight.double()
    return (exact + strength * difference(exact, *(torch.as_tensor(t).double() for t in tensors.values()))).float()
