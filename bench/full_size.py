"""Run the main job at full size on this machine: cache, train, stop, resume and sample a random SD1.5 by the command line.

    python bench/full_size.py [--folder DIR] [--json FILE]

The script writes a diffusers folder with SD1.5's shapes and random weights, and eight pictures. It runs each command in its
own process and measures seconds per step, peak resident memory and the size of a checkpoint. It needs about 45 GB of disk and
20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsd.model.shapes import Shapes

CONFIG = """
run = "run"
[model]
base = "base"
[data]
folders = ["images"]
[cache]
dir = "cache"
batch = 1
[log]
every = 1
[[stage]]
train = ["unet"]
until = 2
batch = 1
optimizer = "dlion"
"""


def make_base(folder: Path, factor: float = 0.13025, shapes: Shapes | None = None) -> None:
    """Write a diffusers folder with random weights and SD1.5's shapes, or others."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from fastsd.demo.models import write_tokenizer
    from fastsd.model.formats.load import component_state_dict, write_component, write_rest
    from fastsd.model.model import SD15_SCHEDULER, Model
    from fastsd.model.shapes import SD15_TEXT, SD15_VAE, Shapes
    from fastsd.model.text_encoder import TextEncoder
    from fastsd.model.unet import UNet, UNetConfig
    from fastsd.model.vae import Vae

    shapes = shapes or Shapes(UNetConfig.sd15(), SD15_TEXT, SD15_VAE)
    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    # The vocabulary includes the token ids of the small tokenizer.
    token_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config = CLIPTextConfig(**{**shapes.text, **token_ids})
    vae = AutoencoderKL(**shapes.vae, scaling_factor=factor)
    text_encoder = TextEncoder(CLIPTextModel(text_config), tokenizer, 0, folder / "words")
    model = Model("random", UNet(shapes.unet), text_encoder, Vae(vae, "random"), SD15_SCHEDULER)
    for component in ("unet", "text_encoder"):
        write_component(folder, model, component, component_state_dict(model, component))
    write_rest(folder, model)


def run(folder: Path, *words: str) -> dict[str, float]:
    """Run one command as a process and return its seconds and peak resident GB."""
    print("$ fastsd", *words, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fastsd", *words], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"fastsd {words[0]} failed with wait status {status}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="working folder (default: a temporary folder, deleted at the end)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fastsd-full-size-"))
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    from fastsd.bench.counters import stamp
    from fastsd.demo.world import write_dataset
    from fastsd.storage import replace_file

    if not (folder / "base" / "model_index.json").exists():
        make_base(folder / "base")
    write_dataset(folder / "images", 8, seed=0)
    (folder / "job.toml").write_text(CONFIG)
    figures: dict[str, object] = {}
    figures["cache, 8 images at 512 px"] = run(folder, "cache", "job.toml")
    figures["train, 2 steps"] = run(folder, "train", "job.toml")
    figures["resume, 1 more"] = run(folder, "train", "job.toml", "stage.until=3")
    figures["sample, 2 steps"] = run(folder, "sample", "run/model", "--prompt", "a red circle", "--steps", "2")
    rows = [json.loads(line) for line in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    figures["seconds a step"] = [round(1 / row["images_per_second"], 1) for row in rows]
    checkpoint = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    figures["checkpoint GB"] = round(sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) / 1e9, 2)
    metadata = {"config": "full-size SD1.5, random weights, 512 px, batch 1, fp32, D-Lion", **stamp(torch.device("cpu"))}
    text = json.dumps({"stamp": metadata, "figures": figures}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        replace_file(arguments.json, text + "\n")
    if not arguments.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
