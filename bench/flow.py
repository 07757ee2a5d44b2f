"""Training steps from a base that predicts epsilon to a rectified flow, on the demo's base and images.

    python bench/flow.py [--ways naive teacher mixed] [--seeds 0 1 2] [--steps 200] [--out bench/results]

The ways have the same images, noise, timesteps and order. `naive` only changes the target to that of a flow. `teacher` learns
the base's own flow, in closed form (`fastsd/train/flow.py`), and begins with two layers that are fitted to it; `mixed` learns
half of it. Every 5 steps, the script counts how many of 48 samples show the requested colour and shape, until 90 % do, and
reads from the run's validation how far the predicted x_0 at s = 1 lies from the images'. It also samples the base through the
closed form, with no training at all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastsd.bench.counters import stamp
from fastsd.commands.cache import cache
from fastsd.config.schema import Config, ModelTable, load_config
from fastsd.demo import demo, world
from fastsd.model.flow_schedule import flow_scheduler
from fastsd.model.model import Model
from fastsd.run.flow_fit import fit_to_teacher
from fastsd.run.loop import train
from fastsd.run.run import open_run
from fastsd.run.teacher import load_teacher
from fastsd.sampling.generate import generate, load_to_sample
from fastsd.storage import new_file, replace_file
from fastsd.terminal.console import Console
from fastsd.train.flow import Teacher

EVERY, TARGET_ACCURACY, SHOWN, SHOWN_STEPS = 5, 0.9, 6, (0, 50, 200)
SEEDS = (0,)  # each of the 48 prompts is drawn with these
WAYS: dict[str, list[str]] = {
    "naive": [],
    "teacher": ["stage.teacher=base"],
    "mixed": ["stage.teacher=base", "stage.teacher_share=0.5"],
}
QUIET = Console(file=StringIO())


def config_of(folder: Path, way: str, seed: int, steps: int) -> Config:
    keys = [f"model.base={folder / 'models' / 'base'}", "model.prediction=flow", f"run={folder / 'runs' / f'{way}-{seed}'}"]
    keys += [f"seed={seed}", "log.tensorboard=false", "validate.held_out=32", "validate.every=50", *WAYS[way]]
    keys += [f"stage.until={steps}", "stage.sample_every=0", "stage.warmup=0", "stage.schedule=constant", "stage.lr_floor=0.0"]
    keys += [f"stage.checkpoint_every={EVERY}", "stage.keep_checkpoints=1000", "sample.prompts=[]"]
    config = load_config(folder / "demo.toml", keys_of_unet(keys))
    return config.model_copy(update={"stage": config.stage[:1]})


def keys_of_unet(keys: list[str]) -> list[str]:
    """Address the demo's first stage."""
    return [key.replace("stage.", "stage.unet.", 1) if key.startswith("stage.") else key for key in keys]


def judged(config: Config, model: Model) -> tuple[float, list[Image.Image]]:
    """Draw every prompt. Return the share with the right colour and shape, and the images."""
    requests = [(*prompt, seed) for seed in SEEDS for prompt in world.prompts()]
    prompts, seeds = [prompt for _, _, prompt, _ in requests], [seed for *_, seed in requests]
    images = generate(model, prompts, seeds, config.sample, config.data.resolution)
    correct = [world.judge(image) == (colour, shape) for image, (colour, shape, *_) in zip(images, requests, strict=True)]
    return sum(correct) / len(correct), images


def sample(config: Config, step: int) -> tuple[float, list[Image.Image]]:
    if step:
        table = ModelTable(base=str(Path(config.run) / "checkpoints" / f"step-{step:08d}"))
        return judged(config, load_to_sample(table, config.device))
    with open_run(config.model_copy(update={"run": f"{config.run}-start"}), QUIET) as run:  # before its first step
        if config.stage[0].teacher:
            fit_to_teacher(run, load_teacher(config.model, run.ops, QUIET))
        return judged(config, run.model)


def closed_form(config: Config) -> dict[str, Any]:
    """Sample the base as it is, and as a flow through the closed form. Return the shares of right samples and the distance."""
    table = ModelTable(base=config.model.base)
    base, flow = load_to_sample(table, config.device), load_to_sample(table, config.device)
    teacher = Teacher(flow.unet, flow.scheduler)
    flow.scheduler, flow.precision = flow_scheduler(flow.scheduler), ""
    flow.unet = _AsUNet(flow.unet, teacher)  # type: ignore[assignment]
    result: dict[str, Any] = {}
    for steps in (config.sample.steps, 4 * config.sample.steps):
        few = config.model_copy(update={"sample": config.sample.model_copy(update={"steps": steps})})
        (base_share, base_images), (flow_share, flow_images) = judged(few, base), judged(few, flow)
        pixels = np.stack([np.abs(np.subtract(a, b, dtype=float)) for a, b in zip(base_images, flow_images, strict=True)])
        result[str(steps)] = {"base": base_share, "flow": flow_share, "mean_pixel_difference": round(pixels.mean(), 3)}
    return result


class _AsUNet:
    """A teacher in place of a UNet, of which sampling also reads the config and a weight's device."""

    def __init__(self, unet: Any, teacher: Teacher) -> None:
        self.cfg, self.conv_in, self.teacher = unet.cfg, unet.conv_in, teacher

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        return self.teacher(*args)


def measure(folder: Path, way: str, seed: int, steps: int) -> dict[str, Any]:
    config = config_of(folder, way, seed, steps)
    train(config, QUIET, export=False)
    rows = [json.loads(line) for line in (Path(config.run) / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    stored = Path(config.run) / "accuracy.json"
    accuracy = {int(step): share for step, share in json.loads(stored.read_text()).items()} if stored.exists() else {}
    for step in range(0, steps + 1, EVERY):
        if max(accuracy.values(), default=0.0) >= TARGET_ACCURACY:
            break
        if step not in accuracy:
            accuracy[step] = sample(config, step)[0]
            replace_file(stored, json.dumps(accuracy))
    reached = next((step for step, share in accuracy.items() if share >= TARGET_ACCURACY), None)
    starts = {row["step"]: row["start"] for row in rows}
    result = {"steps_to_accuracy": reached, "accuracy": accuracy, "loss": {row["step"]: row["loss"] for row in rows}}
    return result | {"start": starts}


def picture(folder: Path, ways: list[str], seed: int, steps: int, path: Path) -> None:
    """Save samples at three steps, one row for each way."""
    prompts, rows = [prompt for *_, prompt in world.prompts()[:SHOWN]], []
    for way in ways:
        panels = [(step, *sample(config_of(folder, way, seed, steps), step)) for step in SHOWN_STEPS if step <= steps]
        rows.append(world.picture([(f"{way}, step {n}: {share:.0%}", images[:SHOWN]) for n, share, images in panels], prompts))
    sheet = Image.new("RGB", (rows[0].width, len(rows) * rows[0].height))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * row.height))
    with new_file(path) as temporary:
        sheet.save(temporary, "PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS)[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--no-closed-form", action="store_true", help="do not sample through the closed form")
    parser.add_argument("--scratch", type=Path, help="folder for the runs; an interrupted call continues there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        demo._lay_out(folder, QUIET)
        config = config_of(folder, args.ways[0], 0, args.steps)
        cache(config, QUIET)
        result: dict[str, Any] = {"what": "from a base that predicts epsilon to a flow, on the demo's base and images"}
        result |= {
            "closed_form": {} if args.no_closed_form else closed_form(config),
            "steps": args.steps,
            "ways": {way: {} for way in args.ways},
        }
        result |= {"threads": torch.get_num_threads(), "stamp": stamp(torch.device("cpu"))}
        print(json.dumps(result["closed_form"]), flush=True)
        for seed, way in itertools.product(args.seeds, args.ways):
            result["ways"][way][seed] = measure(folder, way, seed, args.steps)
            print(way, seed, json.dumps(result["ways"][way][seed]["accuracy"]), flush=True)
            replace_file(args.out / "flow-cpu.json", json.dumps(result, indent=1) + "\n")
        picture(folder, args.ways, args.seeds[0], args.steps, args.out / "flow.png")


if __name__ == "__main__":
    main()
