"""Time our VAE encoder and diffusers' in turn in one process: images per second, share of a matmul's rate, memory.

    python bench/vae.py [--precision fp32 bf16] [--batch N ...] [--resolution 512] [--rounds 5] [--small] [--json FILE]

    fastsd          as `fastsd cache` encodes
    diffusers       AutoencoderKL with contiguous tensors, eager
    channels last   the same with weights and images channels last
    compiled        channels last with the encoder compiled by torch.compile; only on a GPU at full size, for the first batch

The VAEs of SD1.5 and SDXL have the same shape; weights are random. Results are compared before timing. `error` is the
error of the mean, relative to diffusers in fp32. Ours may be at most 1e-4 in fp32, and in bf16 twice that of diffusers in bf16.
FLOPs are those of the requested matmuls and convolutions. A share is relative to a square matmul in the same precision,
measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from verdicts import Verdict

from fastsd.bench import counters, timing
from fastsd.model.shapes import SD15_VAE
from fastsd.model.vae import Vae
from fastsd.storage import replace_file
from fastsd.train.device import choose_device, choose_ops
from fastsd.train.precision import COMPUTE_DTYPE, set_precision

Record = dict[str, Any]
SMALL = {
    **SD15_VAE, "block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip
OURS, DIFFUSERS, CHANNELS_LAST, COMPILED = "fastsd", "diffusers", "channels last", "compiled"


def encoders(module: Any, dtype: torch.dtype, device: torch.device, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return the candidates, ours first. Each maps fp32 images on the device to the raw mean."""
    contiguous_module = copy.deepcopy(module).to(device=device, dtype=dtype)
    vae = Vae(copy.deepcopy(module), "random weights", choose_ops("auto", device)).to(device, dtype)

    def diffusers_mean(module: Any, layout: torch.memory_format, images: Tensor) -> Tensor:
        return module.encode(images.to(dtype=dtype, memory_format=layout)).latent_dist.mean

    candidates: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: vae.encode,
        DIFFUSERS: partial(diffusers_mean, contiguous_module, torch.contiguous_format),
        CHANNELS_LAST: partial(diffusers_mean, vae.module, torch.channels_last),
    }
    if compiled:
        compiled_module = copy.deepcopy(vae.module)
        compiled_module.encoder = torch.compile(compiled_module.encoder)
        candidates[COMPILED] = partial(diffusers_mean, compiled_module, torch.channels_last)
    return candidates


def random_vae(small: bool) -> Any:
    """Create an AutoencoderKL with random weights and without its decoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    module = AutoencoderKL.from_config(SMALL if small else SD15_VAE).eval().requires_grad_(False)
    module.decoder = None
    return module


def flops(small: bool, resolution: int) -> int:
    """Count the FLOPs of one image on tensors without data."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        random_vae(small).encode(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops()


def distance(result: Tensor, reference: Tensor) -> float:
    return ((result.double() - reference.double()).norm() / reference.double().norm()).item()


def measure(precision: str, batch: int, first: bool, args: argparse.Namespace) -> list[Record]:
    """Return a record per candidate. Raises AssertionError if our result differs too much from diffusers'."""
    device = choose_device("auto")
    switches, module = set_precision(precision), random_vae(args.small)
    candidates = encoders(module, COMPUTE_DTYPE[precision], device, first and device.type == "cuda" and not args.small)
    images = torch.rand(batch, 3, args.resolution, args.resolution, device=device) * 2 - 1
    turns: dict[str, timing.TimedCall] = {}
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        reference = module.to(device).encode(images[:1]).latent_dist.mean
        for name, encode in candidates.items():
            run = partial(encode, images)
            error = distance(run()[:1], reference)
            rows.append({"name": name, "error": error, "peak_gb": counters.rise(run, device) / 1e9})
            turns[name] = run, nullcontext
        ours, peer = rows[0]["error"], rows[1]["error"]
        max_error = 2 * peer if precision == "bf16" else 1e-4
        assert ours <= max_error, f"error is {ours:.1e}, and that of diffusers is {peer:.1e}"
        order = timing.in_turns(turns, args.rounds, device)

    rate, image_flops = counters.matmul_rate(device, precision, small=args.small), flops(args.small, args.resolution)
    shared = {"device": counters.device_name(device), "gpu": device.type == "cuda", "small": args.small, "switches": switches}
    shared |= {"tflop_per_image": image_flops / 1e12, "matmul_tflop_per_s": rate / 1e12}
    records = []
    for row in rows:
        counters.put_times(row, order, rows[0])
        speed = 1e3 * batch / row["ms"]["median"]
        labels = {"op": "vae", "kind": f"batch {batch}, {args.resolution} px", "mode": precision}
        labels["implementation"] = row.pop("name")
        figures = {"img_per_s": speed, "tflop_per_s": speed * image_flops / 1e12, "share_of_matmul": speed * image_flops / rate}
        records.append({**labels, **shared, **row, **figures})
    return records


def vae_verdicts(records: Sequence[Record]) -> list[Verdict]:
    """Judge every goal: ratios at the worst batch size, the share at the best. Records of a tiny encoder are ignored."""
    real = [r for r in records if not r["small"]]
    gpu = not real or real[0]["gpu"]
    verdicts = []
    for mode, at_least in (("fp32", 1.0), ("bf16", 2.0 if gpu else 1.0)):
        ratios = [(r["times"], r["kind"]) for r in real if (r["mode"], r["implementation"]) == (mode, DIFFUSERS)]
        verdicts.append(_verdict(f"VAE {mode}, encoding over diffusers", at_least, min(ratios, default=None)))
    if gpu:
        shares = [(r["share_of_matmul"], r["kind"]) for r in real if (r["mode"], r["implementation"]) == ("bf16", OURS)]
        verdicts.append(_verdict("VAE bf16, share of a matmul's rate", 0.4, max(shares, default=None)))
    return verdicts


def _verdict(goal: str, at_least: float, measured: tuple[float, str] | None) -> Verdict:
    figure, kind = measured or (None, "")
    return Verdict(goal, at_least, figure, None if figure is None else figure >= at_least, kind)


def vae_table(records: Sequence[Record]) -> list[str]:
    """Return a line per record; `x` is its time relative to ours."""
    return [
        f"vae {r['mode']} {r['kind']:18} {r['implementation']:13} {r['img_per_s']:8.3f} img/s {r['ms']['median']:8.1f} ms"
        f" ({r['ms']['min']:.1f} - {r['ms']['max']:.1f}) {r['tflop_per_s']:7.3f} TFLOP/s {r['share_of_matmul']:4.0%}"
        f" {r['peak_gb']:6.2f} GB {r['times']:5.2f} x, error {r['error']:.1e}"
        for r in records
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 1 if anything failed, whatever the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=COMPUTE_DTYPE, default=["bf16", "fp32"])
    parser.add_argument("--batch", nargs="+", type=int, help="images per call (default: 8 and 1; on a CPU 1)")
    parser.add_argument("--resolution", type=int, default=512, help="px (default: 512)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each candidate, with 4 calls each on a GPU (default: 5)"
    )
    parser.add_argument("--small", action="store_true", help="tiny encoder, takes seconds: a trial run without real figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--lines", type=Path, metavar="FILE", help="append every outcome to this file, as JSON lines")
    options = parser.parse_args(arguments)

    device, failed = choose_device("auto"), False
    records: list[Record] = []
    for precision in options.precision:
        for i, batch in enumerate(options.batch or ([8, 1] if device.type == "cuda" else [1])):
            line: dict[str, Any] = {"test": f"vae: {precision}, batch {batch}", "outcome": "passed"}
            start = time.monotonic()
            try:
                line["records"] = measure(precision, batch, i == 0, options)
            except Exception:
                line |= {"outcome": "failed", "message": traceback.format_exc()[-2000:]}
                failed = True
            line["seconds"] = round(time.monotonic() - start, 1)
            records += line.get("records", [])
            print(line.get("message") or "\n".join(vae_table(line["records"])), flush=True)
            if options.lines:
                with options.lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    goals = vae_verdicts(records)
    print("\n".join(goal.line() for goal in goals))
    if options.json:
        settings = {"resolution": options.resolution, "rounds": options.rounds}
        result = {"stamp": counters.stamp(device), "settings": settings, "results": records}
        replace_file(options.json, json.dumps({**result, "verdicts": [goal._asdict() for goal in goals]}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
