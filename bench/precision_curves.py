"""Compare loss curves of the demo's job in fp32, tf32 and bf16, in a picture and a table.

    python bench/precision_curves.py [--steps 200] [--out bench/results]

The demo's job from a plain swap (D-Lion, batch 32) is trained in each precision from the same seed, and in fp32 from other
seeds. Their spread is the noise that a change of precision must stay within. Curves are smoothed over about 20 steps.

A CPU has no TF32, so "tf32" is emulated there. Every operand of a matmul or convolution, forward and backward, is rounded to 10
bits of mantissa, to nearest, and the products are summed in fp32. Attention is that of our kernels: all its matmuls round q, k,
v, do, P and dS in the same way, and the weights P are added up after rounding. Not emulated are the order of sums on a GPU, and
that tensor cores do not round every partial sum to nearest. TF32 of cuBLAS and cuDNN is assumed to round its operands.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from plain_swap import plain_swap
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastsd.commands.cache import cache
from fastsd.config.schema import load_config
from fastsd.demo import demo
from fastsd.run.loop import train
from fastsd.storage import new_file, replace_file
from fastsd.terminal.console import Console

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
SMOOTHING = 0.95
MATMUL_OPS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


def round_to_tf32(value: Any) -> Any:
    """Round an fp32 tensor to the nearest TF32 number (10 bits of mantissa, ties away from zero); return others unchanged."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    return torch.where(value.isfinite(), (value.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32), value)


def _scores(q: Tensor, k: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float) -> Tensor:
    scores = round_to_tf32(q) @ round_to_tf32(k).mT * scale
    if is_causal:
        attn_mask = torch.full_like(scores, float("-inf")).triu(1)
    return scores if attn_mask is None else scores + attn_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor]:
    """Return o (B, H, N, D) and the logarithm of the softmax's denominator, as the attention kernels compute them in "tf32"."""
    scores = _scores(q, k, is_causal, attn_mask, scale or q.shape[-1] ** -0.5)
    top = scores.amax(-1, keepdim=True)
    p = round_to_tf32((scores - top).exp())
    total = p.sum(-1, keepdim=True)
    return p @ round_to_tf32(v) / total, (top + total.log()).squeeze(-1)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Any = None,
    scale: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, as the attention kernels compute them in "tf32"."""
    scale = scale or q.shape[-1] ** -0.5
    p = (_scores(q, k, is_causal, attn_mask, scale) - lse[..., None]).exp()
    q, k, v, do = map(round_to_tf32, (q, k, v, do))
    ds = round_to_tf32(p * (do @ v.mT - (o * do).sum(-1, keepdim=True)))
    return ds @ k * scale, ds.mT @ q * scale, round_to_tf32(p).mT @ do


class EmulatedTf32(TorchDispatchMode):
    """Rounds the operands of matmuls, convolutions and attention."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in MATMUL_OPS:
            args = tree_map(round_to_tf32, args)
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            func = attention
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            func = attention_backward
        return func(*args, **(kwargs or {}))


def losses(out: Path, precision: str, seed: int, steps: int) -> list[float]:
    """Train one run and return the loss of every step."""
    run = out / f"{precision}-{seed}"
    overrides = [
        *plain_swap(out),
        f"run={run}",
        f"seed={seed}",
        f"stage.unet.until={steps}",
        "stage.unet.sample_every=0",
        "log.every=1",
    ]
    overrides += ["stage.unet.checkpoint_every=100000", "sample.prompts=[]", "log.tensorboard=false"]
    config = load_config(out / "demo.toml", overrides, precision)
    config = config.model_copy(update={"stage": config.stage[:1]})
    quiet = Console(file=StringIO())
    cache(config, quiet)
    emulated = precision == "tf32" and not torch.cuda.is_available()
    with EmulatedTf32() if emulated else nullcontext():
        train(config, quiet)
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def smooth(values: list[float]) -> list[float]:
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        result.append(total / weight)
    return result


def draw(curves: dict[tuple[str, int], list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    steps = range(1, len(curves["fp32", 0]) + 1)
    losses_by_step = list(zip(*(smooth(curves["fp32", seed]) for seed in SEEDS), strict=True))
    lowest, highest = [min(row) for row in losses_by_step], [max(row) for row in losses_by_step]
    left.fill_between(steps, lowest, highest, color="0.85", label=f"fp32, {len(SEEDS)} seeds")
    for precision, style in (("fp32", "k-"), ("tf32", "C0--"), ("bf16", "C1:")):
        curve = smooth(curves[precision, 0])
        left.plot(steps, curve, style, label=f"{precision}, seed 0")
        percent = [100 * (a / b - 1) for a, b in zip(curve, smooth(curves["fp32", 0]), strict=True)]
        right.plot(steps, percent, style, label=precision)
    for axes, title in ((left, "loss, smoothed"), (right, "difference to fp32, same seed, %")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.legend()
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        demo._lay_out(Path(scratch), Console(file=StringIO()))
        runs = [("fp32", seed) for seed in SEEDS] + [("tf32", 0), ("bf16", 0)]
        curves = {run: losses(Path(scratch), *run, options.steps) for run in runs}

    options.out.mkdir(parents=True, exist_ok=True)
    draw(curves, options.out / "precision-curves.png")
    final_losses = {f"{precision} seed {seed}": smooth(values)[-1] for (precision, seed), values in curves.items()}
    fp32_curve = smooth(curves["fp32", 0])
    differences = {
        precision: max(abs(a / b - 1) for a, b in zip(smooth(curves[precision, 0])[20:], fp32_curve[20:], strict=True))
        for precision in ("tf32", "bf16")
    }
    spread = max(abs(final_losses[f"fp32 seed {seed}"] / final_losses["fp32 seed 0"] - 1) for seed in SEEDS)

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    stamp = {"device": device, "tf32": "hardware" if torch.cuda.is_available() else "emulated", "commit": commit}
    stamp |= {"torch": torch.__version__, "python": platform.python_version()}
    result = {"stamp": stamp, "steps": options.steps, "smoothed_loss_at_the_end": final_losses}
    result["largest_difference_to_fp32_after_20_steps"] = differences
    result["largest_difference_between_seeds_at_the_end"] = spread
    result["losses"] = {f"{precision} seed {seed}": values for (precision, seed), values in curves.items()}
    replace_file(options.out / "precision-curves.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "losses"}, indent=1))


if __name__ == "__main__":
    main()
